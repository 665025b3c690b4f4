"""Folders of models: written atomically, and where in a run they lie. Nothing heavy is imported."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..running.errors import UserError, is_out_of_memory


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, synced and renamed to `folder` at the end.

    A reader sees the old folder or the new one.

    Raises:
        UserError: the disk is full or read-only. The old folder is untouched then.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (new, old):
        remove(leftover)
    try:
        new.mkdir(parents=True)
        yield new
        for path in (*new.rglob("*"), new):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():  # stopped between the two renames
            old.rename(folder)
        # On a full disk torch raises RuntimeError, safetensors SafetensorError. What is written may
        # be made inside, such as the toy world's reward model.
        of_the_disk = isinstance(error, (OSError, RuntimeError, SafetensorError))
        if not of_the_disk or is_out_of_memory(error):
            raise
        raise UserError(
            f"{folder}: cannot be written ({first_line(error)}): what was there is whole; "
            "make room there"
        ) from error
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder, as far as that goes. Of a symbolic link only the link."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def model_folder(path: str) -> str:
    """Where a model lies.

    A run's folder stands for the `model` folder in it. Hub ids and model folders stand for
    themselves.
    """
    inner = os.path.join(path, "model")
    return inner if os.path.isdir(inner) else path  # False, too, where a name is too long


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name.

    Lines that end in a colon bring the next one along.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    while first.endswith(":") and others:
        first += f" {others.pop(0)}"
    return first
