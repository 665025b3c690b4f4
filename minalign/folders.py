"""Folders of models: whole or not there, and where in a run they lie. Nothing heavy is imported."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .common import UserError, is_out_of_memory

# What broken checkpoints raise.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, synced and renamed to `folder` at the end: a reader sees the old one or the new one.

    Raises UserError where the disk is full or read-only; the old folder is untouched then.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
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
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch and safetensors on a full disk
        shutil.rmtree(new, ignore_errors=True)
        if is_out_of_memory(error):  # what is written may be made inside, such as the toy world's reward model
            raise
        raise UserError(
            f"{folder}: cannot be written ({first_line(error)}): what was there is whole; make room there"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def model_folder(path: str) -> str:
    """Where a model lies: a run's folder stands for the `model` folder in it; hub ids and model folders for themselves."""
    inner = Path(path) / "model"
    return str(inner) if inner.is_dir() else path


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
