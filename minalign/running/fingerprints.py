"""What a run is made of, as short hashes: its code, its data as they are used, its models' files.

A resumed run compares them with those that it began with, and the processes of a run with one
another.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..models.folders import model_folder
from ..models.functions import file_of

MODEL_FILES = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"}


def fingerprints(data: dict[str, Sequence], models: dict[str, str]) -> dict[str, str]:
    """Name -> hash, of everything that a run reads.

    Files are read whole (more than 1 GiB a second), so that no replaced weight goes unnoticed.

    Args:
        data: name -> what is trained on or measured with, as it is used: prompts or examples.
        models: name -> a model's path or hub id, or a reward's module:function. What is loaded must
            be there: nothing is downloaded.
    """
    package = Path(__file__).parents[1]
    scripts = [package.parent / f"{name}.py" for name in ("train_policy", "train_rm", "warp")]
    found = {"code": _of_files([*package.rglob("*.py"), *filter(Path.is_file, scripts)])}
    found |= {name: _of_items(items) for name, items in data.items()}
    return found | {name: _of_files(_files_of(path)) for name, path in models.items()}


def _of_items(items: Iterable) -> str:
    if hasattr(items, "fingerprint"):  # data.tokens.TokenItems
        return items.fingerprint()
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _of_files(paths: Iterable[Path]) -> str:
    """A hash of names and content, whatever the order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: (path.name, path)):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def _files_of(name: str) -> Iterator[Path]:
    """The files that a model is loaded from, its base model's among them, or a function's file."""
    module, colon, _ = name.rpartition(":")
    if colon and not Path(name).exists():
        file = file_of(module) or getattr(sys.modules.get(module), "__file__", None)
        yield from [Path(file)] if file else []
        return
    folder = Path(model_folder(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, local_files_only=True))
    inside = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    yield from (path for path in inside if path.suffix in MODEL_FILES and path.is_file())
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
        yield from _files_of(base)
