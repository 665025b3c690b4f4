"""Saved models merged by their task vectors (WARP), tensor by tensor: none is ever held whole.

python -m minalign merge --init runs/sft --models runs/policy-1 runs/policy-2 --out merged
"""

import json
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..merge import merge_policies
from ..models.folders import LOADING_ERRORS, atomic_folder, first_line, model_folder
from ..running.errors import UserError, require
from ..running.flags import flag, parse_flags
from ..running.logs import to_json

SHARD_BYTES = 128 * 2**20


@dataclass
class Config:
    """Merging of saved models."""

    init: str = flag(
        "", "theta_init: the model that the others were trained from (a run or a folder)"
    )
    models: list[str] | None = flag(None, "the policies to merge, in order")
    out: str = flag("", "folder of the merged model; must not exist")
    method: str = flag("slerp", "how task vectors are merged", ("slerp", "slerp-symmetric", "lerp"))
    scope: str = flag("layer", "what shares an angle", ("layer", "tensor", "model"))
    lam: float | None = flag(None, "weight of the second of two models (default: 1/2)")
    eta: float = flag(1.0, "LITI: (1 - eta) theta_init + eta merged", "[0, 1]")


class SavedTensors(Mapping):
    """Name -> tensor of a saved model, mapped from its file when it is asked for.

    Args:
        path: a run or a folder with one safetensors file, or several and an index.
    Raises:
        UserError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(model_folder(path))
        index = self.folder / "model.safetensors.index.json"
        try:
            if index.exists():
                names = json.loads(index.read_text())["weight_map"]
                files = {file: safe_open(self.folder / file, "pt") for file in set(names.values())}
                self.file_of = {name: files[file] for name, file in names.items()}
            else:
                file = safe_open(self.folder / "model.safetensors", "pt")
                self.file_of = dict.fromkeys(file.keys(), file)
        except LOADING_ERRORS as error:
            raise UserError(
                f"{path}: no readable model.safetensors (or index of one): {first_line(error)}"
            ) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


class Shards:
    """Takes merged tensors one by one, moves them by LITI, and writes them in shards.

        (1 - eta) theta_init + eta merged          (WARP, arXiv 2406.16768: LITI)

    A shard has about 128 MiB. A thread writes it while the next one is merged.
    """

    def __init__(self, folder: Path, init: Mapping[str, torch.Tensor], eta: float) -> None:
        self.folder, self.init, self.eta = folder, init, eta
        self.pending: dict[str, torch.Tensor] = {}
        self.files: list[list[str]] = []  # of each shard the names of its tensors
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if self.eta != 1 and tensor.is_floating_point():
            moved = (1 - self.eta) * self.init[name].float() + self.eta * tensor.float()
            tensor = moved.to(tensor.dtype)
        self.pending[name] = tensor.contiguous()
        if sum(t.numel() * t.element_size() for t in self.pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Begin to write what is pending as the next shard, once the one before is written."""
        self.wait()
        self.files.append(list(self.pending))
        path = self.folder / f"shard-{len(self.files)}"
        self.writing = self.thread.submit(save_synced, self.pending, path)
        self.pending = {}

    def wait(self) -> None:
        """Wait until the latest shard is written. Raises its error, where it could not be."""
        if self.writing:
            self.writing.result()

    def finish(self) -> None:
        """Write the last shard, and give the files the names that transformers looks for.

        Several files get an index.
        """
        if self.pending:
            self.flush()
        self.wait()
        self.thread.shutdown()
        many = len(self.files)
        names = [f"model-{i:05d}-of-{many:05d}.safetensors" for i in range(1, many + 1)]
        if many == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names, 1):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if many > 1:
            size = sum((self.folder / name).stat().st_size for name in names)
            weight_map = {}
            for name, tensors in zip(names, self.files):
                weight_map |= dict.fromkeys(tensors, name)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")


def save_synced(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save, and wait for the disk.

    The writing thread does so, and `atomic_folder`, which waits for all of it, has little left to
    wait for.
    """
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def merge_folders(config: Config) -> dict[str, dict]:
    """Merge saved models into config.out, as `config` says.

    Everything but weights (config, tokenizer, chat template) is copied from the init.

    Returns:
        The report of `merge_policies`.
    Raises:
        UserError: keys, shapes or tokenizers differ. The model is named.
    """
    init, states = SavedTensors(config.init), [SavedTensors(path) for path in config.models]
    for path, state in zip(config.models, states):
        for file in ("tokenizer.json", "vocab.json", "tokenizer.model"):
            require(
                same_vocabulary(init.folder / file, state.folder / file),
                f"{path}: its {file} has another vocabulary than {config.init}'s: merge models of "
                "one init",
            )
    with atomic_folder(Path(config.out)) as folder:
        for file in sorted(init.folder.iterdir()):
            weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth")
            if file.is_file() and not weights and not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
        shards, threads = Shards(folder, init, config.eta), torch.get_num_threads()
        # One core writes. The threads of a product wait for each other, and would wait for it.
        torch.set_num_threads(max(1, threads - 1))
        try:
            how = (config.method, config.scope, config.lam)
            _, report = merge_policies(init, states, *how, out=shards)
        except ValueError as error:
            raise UserError(f"{config.init}, {', '.join(config.models)}: {error}") from error
        finally:
            torch.set_num_threads(threads)
        shards.finish()
        (folder / "angles.json").write_text(to_json(report, indent=1) + "\n")
    return report


def same_vocabulary(ours: Path, theirs: Path) -> bool:
    """Whether two tokenizer files name the same tokens.

    Padding and truncation settings are left out, since saving may change them.
    """
    contents = [file.read_bytes() if file.exists() else None for file in (ours, theirs)]
    if contents[0] == contents[1] or None in contents or ours.name != "tokenizer.json":
        return contents[0] == contents[1]
    one, two = (json.loads(content) for content in contents)
    return all(one.get(key) == two.get(key) for key in ("model", "added_tokens"))


def angle_summary(report: dict[str, dict]) -> str:
    """One line on the geometry of a merge, from the report of `merge_policies`."""
    angles = [group["angle"] for group in report.values() if group["angle"] is not None]
    if not angles:
        return "no angles: fewer than two task vectors that are not zero"
    norms = [group["norms"] for group in report.values()]
    ratio = max(max(of_group) / min(of_group) for of_group in norms if min(of_group) > 0)
    return (
        f"angles of task vectors over {len(angles)} groups, degrees: min {min(angles):.1f}, median "
        f"{statistics.median(angles):.1f}, max {max(angles):.1f}; norm ratios up to {ratio:.2f}"
    )


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, merge, print the angles."""
    config = parse_flags(Config, __doc__, argv, "minalign merge")
    for name in ("init", "models", "out"):
        require(bool(getattr(config, name)), f"--{name} is missing")
    require(
        not Path(config.out).exists(),
        f"--out {config.out}: exists: choose another folder or remove that one",
    )
    print(angle_summary(merge_folders(config)))
    print(f"saved {config.out}")
