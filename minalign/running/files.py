"""Files that are written whole or not at all, and JSON of whatever there is."""

import base64
import contextlib
import json
import math
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError, require


def require_writable(out: str | Path, overwrite: bool = False) -> None:
    """Check that a file can be written, before the work that fills it.

    Raises:
        UserError: it cannot, or without `overwrite` it exists.
    """
    path = Path(out)
    try:
        require(not path.is_dir(), f"--out {out}: is a folder: give a file in it")
        require(overwrite or not path.exists(), f"--out {out}: exists: choose another file")
        part = _part(path)
        if part.exists():
            print(f"{part}: left by a try that did not end: written anew")
        else:
            part.touch()
            part.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({_reason(error)})") from error


@contextlib.contextmanager
def whole_file(out: str | Path, mode: str = "w") -> Iterator[typing.IO]:
    """`out`, written under another name, <out>.part, and renamed at the end.

    So half a file never looks like a whole one. Text is on disk line by line: what was written when
    the program was killed is in <out>.part.

    Raises:
        UserError: it cannot be written.
    """
    path, part = Path(out), _part(Path(out))
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "", "buffering": 1}
    try:
        with open(part, mode, **{} if "b" in mode else text) as file:
            yield file
        part.replace(path)
    except OSError as error:
        if error.filename not in (None, str(part)):  # of another file
            raise
        raise UserError(f"{out}: cannot be written ({_reason(error)}): make room there") from error
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def write_json(path: Path, value: object) -> None:
    """Write a file with one JSON value: a reader sees the old file or the new one."""
    with whole_file(path) as file:
        file.write(to_json(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write a file of JSON lines: a reader sees the old file or the new one."""
    with whole_file(path) as file:
        file.writelines(to_json(row) + "\n" for row in rows)


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
