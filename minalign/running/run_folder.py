"""The folder of a run: found or made, claimed for one process, refused where another run is."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .errors import UserError, require
from .files import read_json
from .flags import dashed

# Flags that may have another value when a run is resumed.
FREE_TO_CHANGE = (
    *"out resume device dtype save_every keep on_nonfinite micro_batch_size shard".split(),
    *"report gradient_checkpointing eval_every".split(),
)

# What scripts and tools write. Other files, such as a job's log, make a folder no run.
WRITTEN = (
    *"config.json metrics.jsonl samples.jsonl results.json front.json pairs.jsonl".split(),
    *"answers.jsonl answers.csv model best checkpoints iteration-1".split(),
)

WHY_NOT = {  # (kind of run, flag) -> why it may not change, where one may think that it could
    ("rm", "steps"): "its learning rate ends with the steps",
    ("warp", "steps"): "its finished runs would be of two lengths",
    ("warp", "eval_prompts"): "what it has measured would be of two sets of prompts",
}


@contextlib.contextmanager
def claimed_folder(
    config: typing.Any, kind: str, free: Collection[str] = FREE_TO_CHANGE
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder of a run, which no other process can claim meanwhile.

    It is there at once, before anything is loaded. One in which nothing ran is removed again. With
    --resume, a folder without config.json is a job script's first try, or a run that was killed
    before its first step: it starts anew.

    Args:
        config: a dataclass with `out`, and `resume` where there is such a flag.
        kind: of run, for the folder's name.
        free: flags that may have another value with --resume.
    Returns:
        (folder, a function that raises UserError where it was deleted, or is another run's by now).
    Raises:
        UserError: it is another run's, ran with other flags, another process runs there, or it
            cannot be used.
    """
    resume = getattr(config, "resume", False)
    require(bool(config.out) or not resume, "--resume needs --out: the folder of the run")
    made = not os.path.exists(config.out)
    try:
        folder = _make(config.out, kind)
        lock, file = _lock(folder), folder / "lock"
    except OSError as error:
        reason = f"cannot be used ({error.strerror}): choose another folder"
        raise UserError(f"--out {config.out or 'runs'}: {reason}") from error

    def require_in_place() -> None:
        gone = f"{folder}: was deleted or replaced during the run: start it again"
        require(_is_at(lock, file), gone)

    try:
        if resume and (folder / "config.json").is_file():
            require_same_flags(folder / "config.json", config, kind, free)
        else:
            if resume:
                print(f"--resume: no run in {folder} yet: starting it")
            occupied = any((folder / name).exists() for name in WRITTEN)
            fix = "choose another folder or remove that one"
            require(not occupied, f"--out {folder}: holds another run: {fix}")
        yield folder, require_in_place
    finally:
        with contextlib.suppress(OSError):  # what stays is a file without a lock
            if _is_at(lock, file):
                file.unlink()
                if made and not any(folder.iterdir()):
                    folder.rmdir()
        os.close(lock)


def _lock(folder: Path) -> int:
    """The open file <folder>/lock, locked by this process.

    The lock ends with the process, however it ends. On NFS, Linux asks the server for it, which
    takes an open file for writing, and gives back that of a lost machine when its lease ends.
    """
    path = folder / "lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            fix = "wait for it, or choose another folder"
            raise UserError(f"--out {folder}: {who} is running there: {fix}") from None
        except OSError as error:
            print(f"--out {folder}: cannot be locked ({error.strerror}): start no second run there")
        if _is_at(file, path):
            break
        os.close(file)  # whoever had it has removed it in between
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    return file


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _make(out: str, kind: str) -> Path:
    """The folder `out`, or the next free runs/<kind>-<number>."""
    folder = Path(out or "runs")
    folder.mkdir(parents=True, exist_ok=True)
    if out:
        return folder
    numbers = [path.name.rpartition("-")[2] for path in folder.glob(f"{kind}-*")]
    number = max((int(number) for number in numbers if number.isdecimal()), default=0)
    while True:  # another process may make the same one at this moment
        number += 1
        with contextlib.suppress(FileExistsError):
            (folder / f"{kind}-{number}").mkdir()
            return folder / f"{kind}-{number}"


def require_same_flags(path: Path, config: typing.Any, kind: str, free: Collection[str]) -> None:
    """Compare the flags of an earlier run with those of this one.

    A policy run may grow, and be measured on other held-out prompts.

    Args:
        path: config.json of the earlier run. A flag that it lacks is younger, and had its default.
        kind: of run.
        free: names of flags that may differ.
    Raises:
        UserError: a flag has another value (it is named), or the file cannot be read.
    """
    ran, given = read_json(path), json.loads(json.dumps(dataclasses.asdict(config)))
    for field in dataclasses.fields(config):
        name, value = field.name, given[field.name]
        before = ran.get(name, field.default)
        grows = name == "steps" and isinstance(before, int) and value > before
        if name in free or (kind == "policy" and (grows or name == "eval_prompts")):
            continue
        why = f", but {WHY_NOT[kind, name]}" if (kind, name) in WHY_NOT else ""
        require(
            before == value,
            f"--resume: {path.parent} ran with {dashed(name)} {before}, now {value}{why}: give "
            f"the same{' or more' * (kind == 'policy' and name == 'steps')}, or another --out",
        )


def require_same_fingerprints(path: Path, config: typing.Any, found: dict[str, str]) -> None:
    """Compare what an earlier run was made of with what this one has.

    Another version of the code is named. So is a run of before, without fingerprints.

    Args:
        path: config.json of the earlier run. Nothing is compared where it is not there.
        config: of this run. With another --eval-prompts the held-out data are others.
        found: of fingerprints.fingerprints.
    Raises:
        UserError: data, a model or a reward has changed. All of them are named.
    """
    if not path.exists():
        return
    ran = read_json(path)
    began = ran.get("fingerprints")
    if not isinstance(began, dict):
        print(f"--resume: {path} has no fingerprints: whether data or models changed is unknown")
        return
    changed = {name for name in began | found if began.get(name) != found.get(name)}
    # Of a run of before they were hashed otherwise.
    older = {n for n in changed if found.get(n, "")[:4] == "ids-" != str(began.get(n, "ids-"))[:4]}
    if older:
        print(f"--resume: whether {', '.join(sorted(older))} changed is unknown: {path} is older")
        changed -= older
    if "code" in changed:
        print(f"--resume: the code of minalign has changed since {path.parent} ran")
    if ran.get("eval_prompts") != getattr(config, "eval_prompts", None):
        changed -= {"held-out data"}
    named = ", ".join(sorted(changed - {"code"}))
    fix = "bring that back, or give another --out"
    require(not named, f"--resume: {path.parent} began with other content of: {named}: {fix}")
