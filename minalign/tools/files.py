"""Files that tools write: whole or not at all, and rows with values that JSON has not."""

import base64
import contextlib
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path

from ..running.errors import UserError, require


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
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
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


def json_line(row: dict) -> str:
    """A row as a line of JSON, whatever types a data set gave it.

    Times become ISO texts, bytes base64, arrays lists, what is not finite null, anything else that
    JSON has not its text.

    >>> json_line({"n": math.nan, "b": b"hi", "nested": [{"t": (1, 2)}]})
    '{"n": null, "b": "aGk=", "nested": [{"t": [1, 2]}]}\\n'
    """
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: object) -> object:
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
