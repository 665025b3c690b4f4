"""Checkpoints of a whole run: saved atomically, and resumed to the same bits."""

import os
import typing
import zipfile
from pathlib import Path

import torch

from ..models.folders import atomic_folder, first_line, remove
from .errors import UserError, require
from .ranks import Ranks


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
    folder = checkpoint_folder(out, step)
    with atomic_folder(folder) as new:
        # The logs reach the disk first, so that no line is missing after a power cut.
        for log in out.glob("*.jsonl"):
            with open(log, "ab") as file:
                os.fsync(file.fileno())
        torch.save(content, new / "state.pt")
    saved = sorted(folder.parent.glob("step-???????"))
    kept = [path for path in saved if path <= folder][-keep:]
    kept.append(checkpoint_folder(out, best_step or 0))
    # A later one could not be read when the run was resumed from an earlier one. One that ends in
    # .new is half written.
    for path in folder.parent.glob("step-*"):
        if path not in kept:
            remove(path)


def _content(value: typing.Any) -> typing.Any:
    """What is saved of a part of the state."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return [tensor.detach() for tensor in value] if isinstance(value, list) else value


def resume_(out: Path, state: dict[str, typing.Any], ranks: Ranks, device: torch.device) -> int:
    """Restore `state` from the newest checkpoint in `out`, which rank 0 reads and sends.

    Args:
        state: what `save_checkpoint` took, changed in place.
        device: what the checkpoint is sent through.
    Returns:
        The checkpoint's step, 0 where there is none.
    Raises:
        UserError: it is not of this run.
    """
    found = ranks.from_first(lambda: load_checkpoint(out), device)
    if found is None:
        print(f"--resume: no checkpoint in {out}: beginning from the start")
        return 0
    step, saved = found
    for name, value in state.items():
        try:
            _restore_(value, saved.get(name), step)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint_folder(out, step)}: not of this run: {name}: {first_line(error)}"
            ) from error
    return step


@torch.no_grad()
def _restore_(value: typing.Any, saved: typing.Any, step: int) -> None:
    """Put one part of the state back, in place.

    A generator of another device than the saved one's (after a change of --device) is seeded anew,
    by its first seed plus the step.
    """
    if isinstance(value, torch.Generator):
        if saved is not None and saved.numel() == value.get_state().numel():
            value.set_state(saved)
        else:
            value.manual_seed(value.initial_seed() + step)
    elif saved is None:
        raise ValueError("is missing")
    elif isinstance(value, list):
        for tensor, content in zip(value, saved, strict=True):
            # copy_ would spread a smaller one over it
            shapes = f"shape {tuple(content.shape)}, expected {tuple(tensor.shape)}"
            require(tensor.shape == content.shape, shapes)
            tensor.copy_(content)
    elif isinstance(value, dict):
        value.update(saved)
    else:
        value.load_state_dict(saved)


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return out / "checkpoints" / f"step-{step:07d}"


def load_checkpoint(out: Path) -> tuple[int, dict] | None:
    """The newest checkpoint in `out` that can be read.

    One that cannot be read is passed over, with a line that says so.

    Returns:
        (step, state), with tensors on the CPU; None where there is no checkpoint.
    """
    paths = sorted((out / "checkpoints").glob("step-???????"), reverse=True)
    for path in paths:
        instead = "beginning from the start" if path == paths[-1] else "taking the one before"
        state = read_checkpoint(path, instead)
        if state is not None:
            return int(path.name.removeprefix("step-")), state
    return None


def read_checkpoint(path: Path, instead: str) -> dict | None:
    """The state in one checkpoint's folder; None, and a line, where it cannot be read.

    Args:
        instead: what happens then, in words.
    """
    file = path / "state.pt"
    try:
        with zipfile.ZipFile(file) as archive:  # torch checks no checksums
            if archive.testzip():
                raise ValueError("wrong checksum")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}")
        return state
    except Exception as error:  # whatever a broken file raises
        print(f"{path}: cannot be read ({first_line(error)}): {instead}")
        return None
