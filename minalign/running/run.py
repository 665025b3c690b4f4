"""A run: its folder, logs and checkpoints, --resume, Ctrl-C, and which process speaks.

A script opens its run, loads what it needs, and takes its steps from it:

    with open_run(config, "policy") as run:
        ...
        with run.begun():
            for step, batch in run.steps(config.steps, batches, state):
                ...
                run.log(metrics)

Nothing here knows a model, a loss or an optimizer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .device import pick_device, pick_dtype
from .errors import UserError, one_line, require
from .files import write_json
from .fingerprints import fingerprints
from .flags import as_given, dashed
from .logs import JsonLines, MetricsLog, open_report, require_report, rows_until
from .ranks import Ranks, launcher_is_gone, process_group
from .run_folder import claimed_folder, require_same_fingerprints

if typing.TYPE_CHECKING:
    import torch


@dataclass
class Run:
    """What a training loop needs of the machine it runs on, and nothing that a paper would mention.

    `counts` holds numbers and names that a checkpoint keeps. A loop may add to it. Run itself reads
    best_step, whose checkpoint stays, and ended, the last step whatever was planned.

    Args:
        folder: of the run.
        config: a dataclass with RunFlags.
        dtype: of the forward passes.
        ranks: the processes that share the run.
        stop: once set, the loop ends after its step.
        require_in_place: UserError where the folder was deleted, or is another run's by now.
    """

    folder: Path
    config: typing.Any
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = field(default_factory=Ranks)
    stop: threading.Event = field(default_factory=threading.Event)
    require_in_place: Callable[[], None] = field(default_factory=lambda: lambda: None)
    made_of: dict = field(init=False)  # see `is_made_of`
    counts: dict = field(init=False)
    done: int = field(init=False, default=0)  # steps that were done when the run was resumed
    step: int = field(init=False, default=0)  # the current one
    began: float = field(init=False, default=0.0)  # when it began, by time.monotonic()
    logs: dict = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.logs, self.made_of = {"skipped": 0}, {}, {}

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.ranks.first

    def is_made_of(self, data: dict[str, Sequence], models: dict[str, str]) -> None:
        """Take the fingerprints of what the run reads, see fingerprints.py. config.json keeps them.

        Raises:
            UserError: processes differ in something, or with --resume it has changed.
        """
        self.made_of = fingerprints(data, models)
        self.ranks.require_same(self.made_of)
        if self.config.resume:
            what = self.folder / "config.json", self.config, self.made_of
            self.ranks.from_first(lambda: require_same_fingerprints(*what))

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Write config.json: the folder can now be resumed. Inside, Ctrl-C waits for the step."""
        self.write_config()
        with contextlib.suppress(OSError, AttributeError):  # glibc holds what loading took
            ctypes.CDLL(None).malloc_trim(0)
        with stop_after_step(self.folder, self.stop):
            yield

    def write_config(self) -> None:
        """Write what runs to <folder>/config.json. That of a resumed run tells how it goes on."""
        if self.first:
            write_json(self.folder / "config.json", self.ran)

    @property
    def ran(self) -> dict[str, typing.Any]:
        """What config.json holds, and a model's card tells."""
        return describe(self.config, self.device, self.dtype) | {"fingerprints": self.made_of}

    def require_shared_folder(self) -> None:
        """UserError where processes on other machines do not see the run's folder."""
        lock = self.folder / "lock"
        seen = lock.read_text() if lock.exists() else ""
        alone = self.ranks.any(seen != self.ranks.from_first(lambda: seen), self.device)
        require(not alone, f"--out {self.folder}: expected a folder that all machines share")

    def steps(
        self, total: int, batches: Iterator, state: dict[str, typing.Any], name: str = "steps"
    ) -> Iterator[tuple[int, typing.Any]]:
        """(step, batch) from 1 to `total`, with a progress bar.

        With --resume, `state` first becomes that of the newest checkpoint, and the steps continue
        after it. After each step a checkpoint of `state` is saved where one is due. Where `stop` is
        set, one is saved at once, and the loop ends.

        Args:
            batches: one per step. Those of the steps that are done already are taken and left out.
            state: what the loop changes, by name, see checkpoints.save_checkpoint.
            name: of the progress bar.
        Raises:
            KeyboardInterrupt: `stop` was set before the last step.
        """
        from .checkpoints import resume_, save_checkpoint

        state = state | {"counts": self.counts}
        resume = self.config.resume
        self.done = resume_(self.folder, state, self.ranks, self.device) if resume else 0
        for _ in range(self.done):
            next(batches)
        if self.counts.get("ended"):
            print(f"--resume: the run ended at step {self.counts['ended']}")
            total = self.done
        remaining = range(self.done + 1, total + 1)
        bar = dict(desc=name, unit="step", initial=self.done, total=total)
        report = self.config.report if self.first else None
        with open_report(report, self.folder, self.done, dataclasses.asdict(self.config)) as report:
            if self.first:
                self.logs["metrics"] = MetricsLog(self.folder, self.done, report)
            for step in tqdm(remaining, **bar, disable=not self.first or None):
                self.step, self.began = step, time.monotonic()
                yield step, next(batches)
                self.require_in_place()
                stopping = self.ranks.any(self.stop.is_set() or launcher_is_gone(), self.device)
                best = self.counts.get("best_step")  # known to the first process alone
                ended = self.ranks.any("ended" in self.counts, self.device)
                due = stopping or ended or step in (total, best)
                due |= step % self.config.save_every == 0
                if self.ranks.any(self.first and due, self.device):
                    keep = self.config.keep
                    save_checkpoint(self.folder, step, state, keep, best, writing=self.first)
                if ended:
                    return
                if stopping and step < total:
                    raise KeyboardInterrupt(f"after step {step} of {total}")

    @property
    def last(self) -> dict[str, float] | None:
        """The last row of metrics.jsonl; None where there is none."""
        return self.logs["metrics"].lines.last if "metrics" in self.logs else None

    @property
    def seconds(self) -> float:
        """Seconds since this step began."""
        return time.monotonic() - self.began

    def log(self, metrics: dict[str, float], columns: dict[str, str] | None = None) -> None:
        """Write a row of metrics.jsonl, and of the printed table.

        Args:
            columns: metric -> heading, of the table. None prints nothing.
        """
        if self.first:
            self.logs["metrics"].write(self.step, metrics, columns)

    def log_line(self, name: str, row: dict) -> None:
        """Write a row of <folder>/<name>.jsonl."""
        if self.first:
            if name not in self.logs:
                path = self.folder / f"{name}.jsonl"
                self.logs[name] = JsonLines(path, rows_until(path, self.done))
            self.logs[name].append({"step": self.step} | row)

    def skip(self, problem: str, kept: str = "", overflow: bool = False) -> None:
        """Say and count that this step is left out.

        Args:
            problem: what is not finite.
            kept: what is kept of the model, in words.
            overflow: of float16: part of how its loss scale is found, and no reason to end.
        Raises:
            UserError: with --on-nonfinite stop, but for an overflow.
        """
        if self.config.on_nonfinite == "stop" and not overflow:
            kept = kept or f"{self.folder} keeps the last good model"
            raise UserError(f"step {self.step}: {problem}: {kept}: lower --lr")
        if overflow:
            problem = "a gradient beyond float16, whose loss scale is halved"
        self.counts["skipped"] += 1
        skipped = self.counts["skipped"]
        tqdm.write(f"step {self.step}: {problem}: the step is skipped, {skipped} so far")


@contextlib.contextmanager
def open_run(config: typing.Any, kind: str) -> Iterator[Run]:
    """The run that a script was started for: device, precision, processes, folder, printed header.

    Args:
        config: a dataclass with RunFlags, DeviceFlags and `out`.
        kind: of run, for the folder's name: policy, rm or warp.
    Raises:
        UserError: the folder cannot be used, --report lacks its package, or processes were
            started with different flags or versions.
    """
    require_report(config.report)
    device, reason = pick_device(config.device)
    with process_group(device) as (ranks, device), contextlib.ExitStack() as stack:
        given = dataclasses.asdict(config).items()
        own = ("out", "micro_batch_size")  # of each process
        flags = {dashed(name): value for name, value in given if name not in own}
        ranks.require_same(flags | _versions() | fingerprints({}, {}))
        run = Run(Path(), config, device, pick_dtype(config.dtype, device), ranks)

        def claim() -> Path:
            folder, run.require_in_place = stack.enter_context(claimed_folder(config, kind))
            return folder

        run.folder = ranks.from_first(claim)
        show_config(config, device, reason, run.dtype)
        yield run


@contextlib.contextmanager
def stop_after_step(out: Path, stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Inside, SIGINT (Ctrl-C) or SIGTERM sets the event. A second one ends the program at once.

    The loop that sees the event ends after its step.

    Args:
        stop: the event to set; None makes one.
    Raises:
        KeyboardInterrupt: after one signal or two, with a message that says how to resume.
    """
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield stop
        return

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(
            f"{str(stopped) or 'at once'}: go on with the same flags and --out {out} --resume"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_config(config: typing.Any, device: torch.device, reason: str, dtype: torch.dtype) -> None:
    """Print the run's header: device and why, precision, and every flag as resolved."""
    import torch

    dtype_name = str(dtype).removeprefix("torch.")
    print(f"device {device} ({reason}), {dtype_name}, torch {torch.__version__}")
    given = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value not in ("", None) and value is not False
    }
    print("  " + "  ".join(one_line(f"{name} {value}") for name, value in given.items()))


def describe(config: typing.Any, device: torch.device, dtype: torch.dtype) -> dict[str, typing.Any]:
    """What config.json holds: flags as resolved and as given, device, command, commit, versions."""
    import torch

    machine = f"{platform.machine()}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return dataclasses.asdict(config) | {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine,
        "argv": sys.argv,
        **as_given(config),
        "git": _git_revision(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _git_revision() -> str | None:
    """The commit that is checked out beside this package; None where there is none."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # installed: git would answer for a repository around it
        return None
    ask = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
