"""The logs of a run: files of JSON lines, a printed table, TensorBoard."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .errors import UserError
from .files import to_json, write_json_lines


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


class MetricsLog:
    """<folder>/metrics.jsonl, a printed table of some columns, and TensorBoard's files on request.

    Args:
        last_step: rows up to this step stay, where a run is resumed.
    """

    def __init__(self, folder: Path, last_step: int = 0, tensorboard: bool = False) -> None:
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
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
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
        if columns:
            if self.printed % 25 == 0:
                tqdm.write(" step" + "".join(f"{heading:>8}" for heading in columns.values()))
            tqdm.write(f"{step:5d}" + "".join(f"{_short(metrics[name]):>8}" for name in columns))
            self.printed += 1


def _short(value: float) -> str:
    # + 0.0 makes 0.00 of -0.00.
    return f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, 2) + 0.0:.2f}"
