"""Merged tensors on their way to a folder, in shards, while the next ones are merged."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..merge import liti

SHARD_BYTES = 128 * 2**20
INDEX = "model.safetensors.index.json"


class Shards:
    """Takes merged tensors one by one, moves them by LITI, and writes them in shards.

        (1 - eta) theta_init + eta merged          (WARP, arXiv 2406.16768: LITI)

    A shard has about 128 MiB. A thread writes it while the next one is merged.
    """

    def __init__(self, folder: Path, init: Mapping[str, torch.Tensor], eta: float) -> None:
        self.folder, self.init, self.eta = folder, init, eta
        self.pending, self.bytes = {}, 0  # merged tensors by name, and the sum of their sizes
        self.files: list[list[str]] = []  # of each shard the names of its tensors
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if self.eta != 1 and tensor.is_floating_point():
            moved = liti({name: self.init[name]}, {name: tensor}, self.eta)[name]
            tensor = moved.to(tensor.dtype)
        self.pending[name] = tensor.contiguous()
        self.bytes += tensor.nbytes
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Begin to write what is pending as the next shard, once the one before is written."""
        if self.writing:
            self.writing.result()
        self.files.append(list(self.pending))
        path = self.folder / f"shard-{len(self.files)}"
        self.writing = self.thread.submit(save_synced, self.pending, path)
        self.pending, self.bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard, and give the files the names that transformers looks for.

        Several files get an index.
        """
        if self.pending:
            self.flush()
        self.writing.result()  # raises its error, where it could not be written
        self.thread.shutdown()
        many = len(self.files)
        names = ["model.safetensors"]
        if many > 1:
            names = [f"model-{i:05d}-of-{many:05d}.safetensors" for i in range(1, many + 1)]
        for i, name in enumerate(names, 1):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if many > 1:
            size = sum((self.folder / name).stat().st_size for name in names)
            weight_map = {
                tensor: name for name, tensors in zip(names, self.files) for tensor in tensors
            }
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_synced(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save, and wait for the disk: `atomic_folder` waits for all of it, and then for little."""
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
