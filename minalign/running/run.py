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
import dataclasses
import importlib.util
import json
import math
import platform
import signal
import sys
import threading
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .device import pick_device, pick_dtype
from .errors import UserError, one_line, require
from .flags import dashed
from .logs import JsonLines, MetricsLog, to_json, write_atomic
from .ranks import Ranks, process_group

if typing.TYPE_CHECKING:
    import torch

# Flags that may have another value when a run is resumed.
FREE_TO_CHANGE = (
    *"out resume device dtype save_every keep".split(),
    *"on_nonfinite micro_batch_size shard tensorboard".split(),
)


@dataclass
class Run:
    """What a training loop needs of the machine it runs on, and nothing that a paper would mention.

    `counts` holds numbers and names that a checkpoint keeps. A loop may add to it.

    Args:
        folder: of the run.
        config: a dataclass with RunFlags.
        dtype: of the forward passes.
        ranks: the processes that share the run.
        stop: once set, the loop ends after its step.
    """

    folder: Path
    config: typing.Any
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = field(default_factory=Ranks)
    stop: threading.Event = field(default_factory=threading.Event)
    counts: dict = field(init=False)
    done: int = field(init=False, default=0)  # steps that were done when the run was resumed
    step: int = field(init=False, default=0)  # the current one
    began: float = field(init=False, default=0.0)  # when it began, by time.monotonic()
    logs: dict = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.logs = {"skipped": 0}, {}

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.ranks.first

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Write config.json: the folder can now be resumed. Inside, Ctrl-C waits for the step."""
        self.write_config()
        with stop_after_step(self.folder, self.stop):
            yield

    def write_config(self) -> None:
        """Write what runs to <folder>/config.json. A resumed run has it already."""
        if self.first and not (self.folder / "config.json").exists():
            what = describe(self.config, self.device, self.dtype)
            write_atomic(self.folder / "config.json", to_json(what, indent=2) + "\n")

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
        self.done = resume_(self.folder, state) if self.config.resume else 0
        if self.first:
            self.logs["metrics"] = MetricsLog(self.folder, self.done, self.config.tensorboard)
        for _ in range(self.done):
            next(batches)
        remaining = range(self.done + 1, total + 1)
        bar = dict(desc=name, unit="step", initial=self.done, total=total)
        for step in tqdm(remaining, **bar, disable=not self.first or None):
            self.step, self.began = step, time.monotonic()
            yield step, next(batches)
            stopping = self.ranks.any(self.stop.is_set(), self.device)
            best = self.counts.get("best_step")  # known to the first process alone
            due = step % self.config.save_every == 0 or step in (total, best) or stopping
            if self.ranks.any(self.first and due, self.device):
                keep = self.config.keep
                save_checkpoint(self.folder, step, state, keep, best, writing=self.first)
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
                self.logs[name] = JsonLines(self.folder / f"{name}.jsonl", self.done)
            self.logs[name].append({"step": self.step} | row)

    def skip(self, problem: str) -> None:
        """Say and count that this step is left out.

        Args:
            problem: what is not finite.
        Raises:
            UserError: with --on-nonfinite stop, always.
        """
        if self.config.on_nonfinite == "stop":
            kept = f"{self.folder} keeps the last good model"
            raise UserError(f"step {self.step}: {problem}: {kept}: lower --lr")
        self.counts["skipped"] += 1
        skipped = self.counts["skipped"]
        tqdm.write(f"step {self.step}: {problem}: the step is skipped, {skipped} so far")

    def is_best(self, value: float) -> bool:
        """Whether `value` is above those of all earlier steps. If so, this checkpoint is kept."""
        better = value > self.counts.get("best", -math.inf)
        if better:
            self.counts |= {"best_step": self.step, "best": value}
        return better


@contextlib.contextmanager
def open_run(config: typing.Any, kind: str, patience_hours: float = 0.5) -> Iterator[Run]:
    """The run that a script was started for: device, precision, processes, folder, printed header.

    Args:
        config: a dataclass with RunFlags, DeviceFlags and `out`.
        kind: of run, for the folder's name.
        patience_hours: a process that waits longer for another one ends with an error.
    """
    device, reason = pick_device(config.device)
    with process_group(device, patience_hours) as (ranks, device):
        folder = Path(ranks.from_first(lambda: str(run_folder(config, kind))))
        dtype = pick_dtype(config.dtype, device)
        show_config(config, device, reason, dtype)
        yield Run(folder, config, device, dtype, ranks)


def run_folder(config: typing.Any, kind: str) -> Path:
    """The folder of a run: with --resume the one to resume, otherwise a new one.

    Raises:
        UserError: the folder cannot be used, or --tensorboard lacks its package.
    """
    require(
        not config.tensorboard or importlib.util.find_spec("tensorboard") is not None,
        "--tensorboard: it is not installed: pip install tensorboard, or leave it out",
    )
    return resumed_run(config.out, config) if config.resume else new_run(config.out, kind)


def new_run(out: str, kind: str) -> Path:
    """The folder of a new run: `out`, or the next free runs/<kind>-<number>.

    Raises:
        UserError: it holds another run, or cannot be made.
    """
    if not out:
        numbers = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{kind}-*")]
        taken = max((int(number) for number in numbers if number.isdigit()), default=0)
        out = f"runs/{kind}-{taken + 1}"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        reason = f"cannot be used ({error.strerror}): choose another folder"
        raise UserError(f"--out {out}: {reason}") from error
    fix = "choose another folder or remove that one"
    require(not occupied, f"--out {out}: holds another run: {fix}")
    return folder


def resumed_run(out: str, config: typing.Any) -> Path:
    """The folder of a run to resume.

    A folder without config.json is a run that was killed before its first step, or a job script's
    first try: it starts anew.

    Raises:
        UserError: --out is missing, or the run had other flags (they are named).
    """
    require(bool(out), "--resume needs --out: the folder of the run to resume")
    path = Path(out) / "config.json"
    if not path.is_file():
        print(f"--resume: no run in {out} yet: starting it")
        # A run that was killed while it wrote config.json leaves this file. Where --out cannot be
        # used, new_run says why.
        with contextlib.suppress(OSError):
            path.with_name("config.json.new").unlink(missing_ok=True)
        return new_run(out, "")
    require_same_flags(path, config, FREE_TO_CHANGE)
    return Path(out)


def require_same_flags(path: Path, config: typing.Any, free: tuple[str, ...]) -> None:
    """Compare the flags of an earlier run with those of this one.

    Args:
        path: config.json of the earlier run.
        free: names of flags that may differ.
    Raises:
        UserError: a flag has another value (it is named), or the file cannot be read.
    """
    try:
        ran = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be read ({error}): give another --out"
        raise UserError(f"--resume: {path}: {reason}") from error
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in given.items():
        require(
            name in free or ran.get(name) == value,
            f"--resume: {path.parent} ran with {dashed(name)} {ran.get(name)}, now {value}: give "
            "the same, or another --out",
        )


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
    """What config.json holds: every flag as resolved, device, command, commit, versions."""
    import torch
    import transformers

    return dataclasses.asdict(config) | {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "argv": sys.argv,
        "git": _git_revision(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _git_revision() -> str | None:
    """The commit that is checked out beside this package; None where there is none."""
    folder = Path(__file__).parents[2] / ".git"
    try:
        head = (folder / "HEAD").read_text().strip()
        is_branch = head.startswith("ref: ")
        return (folder / head.removeprefix("ref: ")).read_text().strip() if is_branch else head
    except OSError:
        return None
