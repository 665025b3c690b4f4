"""The logs of a run: files of JSON lines, a printed table, and what --report names."""

import contextlib
import importlib
import importlib.util
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..models.folders import first_line
from .errors import UserError, require
from .files import to_json, write_json_lines

Report = Callable[[dict[str, float], int], object]  # of metrics and their step


def rows_until(path: Path, last_step: int) -> list[dict]:
    """The rows of a log up to this step, where a run is resumed. Lost ones are counted aloud."""
    kept = []
    for line in path.read_bytes().splitlines() if last_step and path.exists() else []:
        # The last line of a killed run may be torn.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            kept += [row for row in [json.loads(line)] if row["step"] <= last_step]
    lost = last_step - len(kept)
    if lost > 0:
        print(f"{path}: {lost} of the first {last_step} steps are missing or broken in it")
    return kept


class JsonLines:
    """A file of one JSON object per line, written line by line: a killed run keeps what it had.

    Args:
        rows: those that it begins with. What the file held before is gone.
    """

    def __init__(self, path: Path, rows: Sequence[dict] = ()) -> None:
        self.path, self.last = path, rows[-1] if rows else None
        write_json_lines(path, rows)
        # Unbuffered: a buffer would try again at exit what a full disk refused.
        self.file = open(path, "ab", buffering=0)

    def append(self, row: dict) -> None:
        """Write one line, on disk at once.

        Raises:
            UserError: the disk is full.
        """
        try:
            self.file.write(f"{to_json(row)}\n".encode())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}): make room there"
            ) from error
        self.last = row


def require_report(name: str | None) -> None:
    """UserError where what --report names is not installed."""
    there = not name or name in sys.modules
    if not there:  # a folder of that name, as wandb makes, is a spec without origin
        there = getattr(importlib.util.find_spec(name), "origin", None) is not None
    require(there, f"--report {name}: it is not installed: pip install {name}, or leave it out")


@contextlib.contextmanager
def open_report(name: str | None, folder: Path, last_step: int, flags: dict) -> Iterator[Report]:
    """Inside, a function that reports a step's metrics to what --report names, or to nobody.

    A resumed run goes on in its own report: <folder>/report_id keeps its name there.

    Args:
        last_step: the steps after it are reported anew.
        flags: of the run.
    Raises:
        UserError: the report cannot be begun.
    """
    if not name:
        yield lambda metrics, step: None
    elif name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / name), purge_step=last_step + 1) as board:
            yield lambda metrics, step: [board.add_scalar(k, metrics[k], step) for k in metrics]
    else:
        file = folder / "report_id"
        new = f"{re.sub(r'[^A-Za-z0-9]+', '-', str(folder))[-80:]}-{uuid.uuid4().hex[:8]}".strip(
            "-"
        )
        identity = file.read_text() if last_step and file.is_file() else new
        file.write_text(identity)
        own = {"id": identity, "dir": str(folder)} if name == "wandb" else {}
        names = {"project": "minalign", "name": identity, "resume": "allow"} | own
        try:
            package = importlib.import_module(name)
            report = package.init(config=flags, **names).log
        except Exception as error:
            fix = "log in there, choose its offline mode, or leave --report out"
            raise UserError(f"--report {name}: {first_line(error)}: {fix}") from error
        try:
            yield report
        finally:
            package.finish()


class MetricsLog:
    """<folder>/metrics.jsonl, a printed table of some columns, and a report.

    Args:
        last_step: rows up to this step stay, where a run is resumed.
        report: gets the metrics of each step, too.
    """

    def __init__(self, folder: Path, last_step: int = 0, report: Report | None = None) -> None:
        self.report = report
        path = folder / "metrics.jsonl"
        self.lines = JsonLines(path, rows_until(path, last_step))
        before = (self.lines.last or {}).get("seconds")
        self.start = time.monotonic() - (before if isinstance(before, (int, float)) else 0)
        self.printed = 0

    def write(
        self, step: int, metrics: dict[str, float], columns: dict[str, str] | None = None
    ) -> None:
        """Append {"step": step, "seconds": since the start, **metrics}, and print some of it.

        Args:
            columns: metric -> heading, of the printed table. None prints nothing.
        """
        seconds = round(time.monotonic() - self.start, 3)
        self.lines.append({"step": step, "seconds": seconds, **metrics})
        if self.report:
            self.report(metrics, step)
        if columns:
            if self.printed % 25 == 0:
                tqdm.write(" step" + "".join(f"{heading:>8}" for heading in columns.values()))
            tqdm.write(f"{step:5d}" + "".join(f"{_short(metrics[name]):>8}" for name in columns))
            self.printed += 1


def _short(value: float) -> str:
    # + 0.0 makes 0.00 of -0.00.
    return f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, 2) + 0.0:.2f}"
