"""Checkpoints of a whole run: saved atomically, and resumed to the same bits."""

import os
import shutil
import struct
import typing
import zipfile
import zlib
from pathlib import Path

import torch

from ..models.folders import LOADING_ERRORS, atomic_folder, first_line


def save_checkpoint(
    out: Path,
    step: int,
    state: dict[str, typing.Any],
    keep: int,
    best_step: int | None = None,
    writing: bool = True,
) -> None:
    """Save everything that resumes a run after `step`, atomically, as <out>/checkpoints/step-N.

    Afterwards the last `keep` checkpoints are there, and the one of `best_step`.

    Args:
        state: by name: lists of tensors, generators, objects with a state_dict, and dicts of
            tensors, numbers and strings.
        writing: whether this process writes. One does; all processes of a run call, since the
            parts of the state that are spread over them are gathered.
    Raises:
        UserError: the checkpoint cannot be written. The earlier ones are untouched.
    """
    content = {name: _content(value) for name, value in state.items()}
    if not writing:
        return
    folder, name = out / "checkpoints", f"step-{step:07d}"
    with atomic_folder(folder / name) as new:
        # The logs reach the disk first, so that no line is missing after a power cut.
        for log in out.glob("*.jsonl"):
            with open(log, "ab") as file:
                os.fsync(file.fileno())
        torch.save(content, new / "state.pt")
    last = sorted(path.name for path in folder.glob("step-???????") if path.name <= name)[-keep:]
    # A later one could not be read when the run was resumed from an earlier one. One that ends in
    # .new is half written.
    for path in folder.glob("step-*"):
        if path.name not in (*last, f"step-{best_step or 0:07d}"):
            shutil.rmtree(path)


def _content(value: typing.Any) -> typing.Any:
    """What is saved of a part of the state."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return [tensor.detach() for tensor in value] if isinstance(value, list) else value


@torch.no_grad()
def resume_(out: Path, state: dict[str, typing.Any]) -> int:
    """Restore `state` from the newest checkpoint in `out`.

    A generator of another device than the saved one's (after a change of --device) is seeded anew,
    by its first seed plus the step.

    Args:
        state: what `save_checkpoint` took, changed in place.
    Returns:
        The checkpoint's step, 0 where there is none.
    """
    found = load_checkpoint(out)
    if found is None:
        return 0
    step, saved = found
    for name, value in state.items():
        if isinstance(value, torch.Generator):
            if name in saved and saved[name].numel() == value.get_state().numel():
                value.set_state(saved[name])
            else:
                value.manual_seed(value.initial_seed() + step)
        elif isinstance(value, list):
            for tensor, content in zip(value, saved[name], strict=True):
                tensor.copy_(content)
        elif isinstance(value, dict):
            value.update(saved[name])
        else:
            value.load_state_dict(saved[name])
    return step


def load_checkpoint(out: Path) -> tuple[int, dict] | None:
    """The newest checkpoint in `out` that can be read.

    One that cannot be read is passed over, with a line that says so.

    Returns:
        (step, state), with tensors on the CPU; None where there is no checkpoint.
    """
    paths = sorted((out / "checkpoints").glob("step-???????"), reverse=True)
    for path in paths:
        file = path / "state.pt"
        try:
            with zipfile.ZipFile(file) as archive:  # torch checks no checksums
                if archive.testzip():
                    raise ValueError("wrong checksum")
            step = int(path.name.removeprefix("step-"))
            return step, torch.load(file, map_location="cpu", weights_only=True)
        except (*LOADING_ERRORS, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
            last = path == paths[-1]
            instead = "beginning from the start" if last else "taking the one before"
            print(f"{path}: cannot be read ({first_line(error)}): {instead}")
    return None
