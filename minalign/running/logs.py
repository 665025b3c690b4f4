"""The logs of a run: files of JSON lines, a printed table, TensorBoard."""

import base64
import contextlib
import json
import math
import time
import typing
from pathlib import Path

from tqdm import tqdm

from .errors import UserError, require


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it: a reader sees the old or the new file.

    Raises:
        UserError: the disk is full or read-only.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): make room there") from error


def to_json(value: object, indent: int | None = None) -> str:
    """JSON text of a value, whatever types a data set or a function gave it.

    Times become ISO texts, bytes base64, arrays lists, what is not finite null, anything else that
    JSON has not its text.

    >>> to_json({"n": math.nan, "b": b"hi", "nested": [{"t": (1, 2)}]})
    '{"n": null, "b": "aGk=", "nested": [{"t": [1, 2]}]}'
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: typing.Any) -> object:
    """`value` in the types of JSON."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # numpy and torch; nanoseconds would become a bare number
        times = getattr(value.dtype, "kind", "") in ("M", "m")
        return _plain((value.astype(str) if times else value).tolist())
    if value != value or value in (math.inf, -math.inf):  # nan, NaT
        return None
    if isinstance(value, (int, float)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is no object, or lacks one of `keys`.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}): bring it back") from error
    whole = isinstance(found, dict) and found.keys() >= set(keys)
    wanted = f"an object with {', '.join(keys)}" if keys else "an object"
    require(whole, f"{path}: not what a run wrote: expected {wanted}")
    return found


def read_json_lines(path: Path, *keys: str) -> list[dict]:
    """The rows of a file of JSON lines.

    Raises:
        UserError: it is not there, or a line is broken, or lacks one of `keys`.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): bring it back") from error
    rows = []
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
        whole = len(rows) == number and isinstance(rows[-1], dict) and rows[-1].keys() >= set(keys)
        wanted = f"no JSON object with {', '.join(keys)}: fix or remove it"
        require(whole, f"{path}: line {number}: {wanted}")
    return rows


class JsonLines:
    """A file of one JSON object per line, written line by line: a killed run keeps what it had.

    `last` is the last row, or None.

    Args:
        last_step: rows up to this step stay, where a run is resumed. 0 begins the file anew.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        kept = []
        for line in path.read_bytes().splitlines() if last_step and path.exists() else []:
            # The last line of a killed run may be torn.
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                kept += [row for row in [json.loads(line)] if row["step"] <= last_step]
        lost = last_step - len(kept)
        if lost > 0:
            print(f"{path}: {lost} of the first {last_step} steps are missing or broken in it")
        self.path, self.last = path, kept[-1] if kept else None
        write_atomic(path, "".join(to_json(row) + "\n" for row in kept))
        # Unbuffered: a buffer would try again at exit what a full disk refused.
        self.file = open(path, "ab", buffering=0)

    def append(self, row: dict) -> None:
        """Write one line. A number that is not finite becomes null, since JSON has none.

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
        self.lines = JsonLines(folder / "metrics.jsonl", last_step)
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
