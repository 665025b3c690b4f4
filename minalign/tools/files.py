"""Files that tools write: whole or not at all."""

import contextlib
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
