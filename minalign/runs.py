"""A run's folder: the one to begin or to go on with, what ran, and the logs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import platform
import sys
import time
import typing
from pathlib import Path

from tqdm import tqdm

from .common import UserError, require

if typing.TYPE_CHECKING:
    import torch

FREE_TO_CHANGE = ("out", "resume", "device", "dtype", "save_every", "keep", "on_nonfinite", "micro_batch_size", "shard",
                  "tensorboard")  # by --resume  # fmt: skip


def new_run(out: str, kind: str) -> Path:
    """The folder of a new run: `out`, or the next free runs/<kind>-<number>. UserError if it holds another run."""
    if not out:
        taken = (int(p.name.rpartition("-")[2]) for p in Path("runs").glob(f"{kind}-*") if p.name.rpartition("-")[2].isdigit())
        out = f"runs/{kind}-{max(taken, default=0) + 1}"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be used ({error.strerror}): choose another folder") from error
    require(not occupied, f"--out {out}: holds another run: choose another folder or remove that one")
    return folder


def open_run(config, kind: str) -> Path:
    """The folder of a run: the one to go on with under --resume, a new one otherwise."""
    require(not config.tensorboard or importlib.util.find_spec("tensorboard") is not None,
            "--tensorboard: it is not installed: pip install tensorboard, or leave it out")  # fmt: skip
    return resumed_run(config.out, config) if config.resume else new_run(config.out, kind)


def resumed_run(out: str, config) -> Path:
    """The folder of a run to go on with. UserError if it ran with other flags (they are named).

    A folder without config.json is a run that was killed before its first step, or a job script's first try: it starts anew.
    """
    require(bool(out), "--resume needs --out: the folder of the run to go on with")
    path = Path(out) / "config.json"
    if not path.is_file():
        print(f"--resume: no run in {out} yet: starting it")
        with contextlib.suppress(OSError):  # new_run says what is wrong with --out
            path.with_name("config.json.new").unlink(missing_ok=True)  # killed while it wrote that
        return new_run(out, "")
    try:
        ran = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume: {path}: cannot be read ({error}): give another --out") from error
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in given.items():
        if name not in FREE_TO_CHANGE and ran.get(name) != value:
            flag_name = "--" + name.replace("_", "-")
            raise UserError(
                f"--resume: {out} ran with {flag_name} {ran.get(name)}, now {value}: give the same, or another --out"
            )
    return Path(out)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it: killed in between, the old file or none is there."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): make room there") from error


def write_config(folder: Path, config, device: torch.device, dtype: torch.dtype) -> None:
    """Write what runs to <folder>/config.json: every flag as resolved, versions, device, command. A resumed run has it already."""
    if (folder / "config.json").exists():
        return

    import torch
    import transformers

    ran = dataclasses.asdict(config) | {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "argv": sys.argv,
        "git": _git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(folder / "config.json", json.dumps(ran, indent=2) + "\n")


def _git_revision() -> str | None:
    """The commit that is checked out beside this package; None where there is none."""
    folder = Path(__file__).parents[1] / ".git"
    try:
        head = (folder / "HEAD").read_text().strip()
        return (folder / head.removeprefix("ref: ")).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return None


POLICY_COLUMNS = {  # of the printed table: metric -> heading
    "reward": "reward", "kl_sft": "kl_sft", "kl_anchor": "kl_anch", "shaped_reward": "shaped", "baseline": "base",
    "advantage_std": "adv_sd", "entropy": "entropy", "length": "length", "ended": "ended", "grad_norm": "grad",
    "tokens_per_second": "tok/s",
}  # fmt: skip


class JsonLines:
    """A file of one JSON object a line, written line by line: a killed run keeps what it had.

    Of what is there already, lines up to `last_step` stay (a resumed run); 0 begins anew. `last` is the last line, or None.
    """

    def __init__(self, path: Path, last_step: int = 0):
        kept = []
        for line in path.read_bytes().splitlines() if last_step and path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed run may be torn
                kept += [row for row in [json.loads(line)] if row["step"] <= last_step]
        self.path, self.last = path, kept[-1] if kept else None
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(path, "ab", buffering=0)  # a buffer would try again at exit what a full disk refused

    def append(self, row: dict) -> None:
        """Write one line; a number that is not finite becomes null, since JSON has none."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self.file.write(f"{json.dumps(row)}\n".encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): make room there") from error


class MetricsLog:
    """<folder>/metrics.jsonl, a printed table of some of it, and TensorBoard's files where they are asked for."""

    def __init__(self, folder: Path, last_step: int = 0, tensorboard: bool = False):
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        self.lines = JsonLines(folder / "metrics.jsonl", last_step)
        self.start = time.monotonic() - (self.lines.last["seconds"] if self.lines.last else 0)
        self.printed = 0

    def write(self, step: int, metrics: dict[str, float], columns: dict[str, str] | None = None) -> None:
        """Append {"step": step, "seconds": since the start, **metrics}; print `columns` of it (metric -> heading)."""
        self.lines.append({"step": step, "seconds": round(time.monotonic() - self.start, 3), **metrics})
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        if columns:
            if self.printed % 25 == 0:
                tqdm.write(" step" + "".join(f"{heading:>8}" for heading in columns.values()))
            tqdm.write(f"{step:5d}" + "".join(f"{_short(metrics[name]):>8}" for name in columns))
            self.printed += 1


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
