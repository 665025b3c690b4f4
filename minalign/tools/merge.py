"""Saved models merged by their task vectors (WARP), tensor by tensor: none is ever held whole.

python -m minalign merge --init runs/sft --models runs/policy-1 runs/policy-2 --out merged
"""

from __future__ import annotations

import functools
import json
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from ..merge import merge_policies
from ..models.folders import atomic_folder
from ..running.errors import UserError, require
from ..running.files import to_json
from ..running.flags import flag, parse_flags
from .shards import INDEX, Shards
from .task_vectors import angle_summary, with_moves

if typing.TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

TEMPLATES = "additional_chat_templates"
# Of a config: what changes no logit.
NO_SETTINGS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
NO_SETTINGS |= {"bos_token_id", "eos_token_id", "pad_token_id"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass
class Config:
    """Merging of saved models."""

    init: str = flag(
        "", "theta_init: the model that the others were trained from (a run or a folder)"
    )
    models: list[str] | None = flag(None, "the policies to merge, in order")
    out: str = flag("", "folder of the merged model; must not exist")
    method: str = flag(
        "slerp", "how task vectors are merged", ("slerp", "slerp-symmetric", "lerp", "ram")
    )
    ram_threshold: float = flag(
        1e-5,
        "a model has moved a weight by more than this: for the report, and for ram",
        "[0, inf)",
    )
    scope: str = flag(
        "layer", "what shares an angle, and a line of the report", ("layer", "tensor", "model")
    )
    lam: float | None = flag(None, "weight of the second of two models (default: 1/2)", "[0, 1]")
    eta: float = flag(1.0, "LITI: (1 - eta) theta_init + eta merged", "[0, 1]")


class SavedModel(NamedTuple):
    """A model in a folder, its tensors mapped from their files.

    path: what the user calls it.
    generation: its generation config; None of a classifier.
    ends: every token that ends a completion.
    """

    path: str
    folder: Path
    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    vocabulary: dict[str, int]
    generation: GenerationConfig | None
    ends: list[int]


def read_model(path: str, folder: Path) -> SavedModel:
    """A model whose folder has one safetensors file, or several and an index of them."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from ..models.broken import loading_errors
    from ..models.loading import end_token_ids

    with loading_errors(path, str(folder), "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None)
        require(not quantised, "quantised: merge models as they were before")
    with loading_errors(path, str(folder), "the weights"):
        names, index, tensors = ["model.safetensors"], {}, {}
        if not (folder / names[0]).exists():  # as transformers: else an index is out of date
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(index.values()))
        for name in names:
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            require(inside, f"{INDEX} names {name}, outside of the folder")
            tensors |= load_file(folder / name)
        lost = index.keys() - tensors.keys()
        require(tensors and not lost, f"no file holds {min(lost, default='a tensor')}")
        if config.get_text_config().tie_word_embeddings:  # a copy is no weight of its own
            head = tensors.pop("lm_head.weight", None)
            alike = (t for t in tensors.values() if head is not None and t.shape == head.shape)
            if head is not None and not any(tensor.equal(head) for tensor in alike):
                tensors["lm_head.weight"] = head
    with loading_errors(path, str(folder), "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder)
        model = SimpleNamespace(config=config, generation_config=generation)
        ends = end_token_ids(model, tokenizer)
    if is_classifier(config):
        generation = None
    return SavedModel(path, folder, config, tensors, tokenizer.get_vocab(), generation, ends)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a config is a reward model's."""
    return "SequenceClassification" in str(config.architectures)


def merge_folders(config: Config) -> dict[str, dict]:
    """Merge saved models into config.out, as `config` says.

    Everything but weights (config, tokenizer, chat templates) is copied from the init. The
    generation config lists every end token of the models.

    Returns:
        The report of `merge_policies`, as `with_moves` completes it.
    Raises:
        UserError: keys, shapes or tokenizers differ, or a weight cannot be merged. The model is
            named.
    """
    from ..models.older_readers import write_for_older_readers
    from ..models.saving import save_generation_config
    from ..running.card import model_card
    from ..running.fingerprints import fingerprints
    from ..running.run import describe

    with atomic_folder(Path(config.out)) as folder:
        inputs = read_models([config.init, *config.models], folder / "inputs")
        dtype, (init, *states) = require_mergeable(inputs), [model.tensors for model in inputs]
        copied = inputs[0].folder
        for file in sorted(copied.iterdir()):
            if file.is_file() and file.suffix not in WEIGHTS and file.name != INDEX:
                shutil.copy(file, folder)
        if (copied / TEMPLATES).is_dir():
            shutil.copytree(copied / TEMPLATES, folder / TEMPLATES)
        shards, threads = Shards(folder, init, config.eta), torch.get_num_threads()
        # One core writes. The threads of a product wait for each other, and would wait for it.
        torch.set_num_threads(max(1, threads - 1))
        try:
            how, threshold = (config.method, config.scope, config.lam), config.ram_threshold
            _, report = merge_policies(init, states, *how, shards, threshold)
            if shards.pending:
                shards.flush()  # it is written during the count
            part = 1 if config.method == "ram" else 32  # of large tensors: all of them take long
            report = with_moves(report, init, states, config.scope, threshold, part)
        except ValueError as error:
            policies = ", ".join(f"policy {m} {path}" for m, path in enumerate(config.models, 1))
            raise UserError(f"init {config.init}, {policies}: {error}") from error
        finally:
            torch.set_num_threads(threads)
        shards.finish()
        if inputs[0].generation:
            ends = sorted({end for model in inputs for end in model.ends})
            save_generation_config(inputs[0].generation, ends, folder)
        write_for_older_readers(folder, dtype)
        print(f"written in {dtype}, the widest dtype of the models")
        shutil.rmtree(folder / "inputs", ignore_errors=True)
        (folder / "angles.json").write_text(to_json(report, indent=1) + "\n")
        ran = describe(config, torch.device("cpu"), getattr(torch, dtype))
        # Weights are not hashed, which would take as long as the merge does
        sizes = [sum(t.nbytes for t in model.tensors.values()) for model in inputs]
        named = {f"model {m.path}": f"{size:,} bytes" for m, size in zip(inputs, sizes)}
        ran["fingerprints"] = fingerprints({}, {}) | named
        kind = "text-generation" if inputs[0].generation else "text-classification"
        title = f"Merge of {len(states)} models by {config.method}"
        card = model_card(ran, title, kind, ["merge"], {})
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def read_models(paths: list[str], scratch: Path) -> list[SavedModel]:
    """The models with their tensors by the names that training saves them under.

    Files as training saves them are read where they lie. Others (adapters, pickles, hub ids, copies
    of weights, names of before) are loaded as training loads them, and saved into `scratch`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from ..models.loading import base_config, find_model, load_model, require_all_used
    from ..models.saving import save_policy

    flags = ["--init"] + ["--models"] * (len(paths) - 1)
    config, options = base_config(paths[0], "--init"), {}
    kind = AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM
    if is_classifier(config):
        options = {"num_labels": config.num_labels}

    def saved_again(i: int) -> SavedModel:
        where = f"{flags[i]} {paths[i]}"
        model, tokenizer, missing, unused = load_model(kind, paths[i], flags[i], **options)
        require(not missing, f"{where}: weights missing: {', '.join(sorted(missing)[:3])}")
        require_all_used(where, model, unused)
        for dtype in (torch.bfloat16, torch.float16):  # it was loaded in float32: narrow again?
            tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
            if all(torch.equal(t.to(dtype).float(), t) for t in tensors):
                model.to(dtype)
                break
        save_policy(model, tokenizer, scratch / str(i))
        return read_model(paths[i], scratch / str(i))

    models = []
    for i, path in enumerate(paths):
        folder = Path(find_model(path, f"{flags[i]} {path}"))
        plain = (folder / "model.safetensors").is_file() or (folder / INDEX).is_file()
        plain &= not (folder / "adapter_config.json").is_file()
        models.append(read_model(path, folder) if plain else saved_again(i))
    for i in range(len(paths)):  # the init first, since training saved the others
        if any(model.tensors.keys() != models[0].tensors.keys() for model in models):
            models[i] = saved_again(i)
    return models


def require_mergeable(models: list[SavedModel]) -> str:
    """The widest dtype of the weights; UserError where vocabularies or masks are not the init's."""
    init, dtypes = models[0], set()
    settings = init.config.to_dict()
    for model in models:
        theirs = model.config.to_dict()
        names = settings.keys() & theirs.keys() - NO_SETTINGS
        if other := sorted(name for name in names if theirs[name] != settings[name]):
            print(
                f"note: {model.path}: another {', '.join(other)} than {init.path}: taken from that"
            )
        require(
            model.vocabulary == init.vocabulary,
            f"{model.path}: its tokenizer has another vocabulary than {init.path}'s: merge models "
            "of one init",
        )
        for name, tensor in model.tensors.items():
            if tensor.is_floating_point() and tensor.itemsize > 1:
                dtypes.add(tensor.dtype)
                continue
            ours = init.tensors.get(name)
            mask = not tensor.is_floating_point() and not name.endswith("weight")
            require(
                mask and ours is not None and ours.dtype == tensor.dtype and ours.equal(tensor),
                f"{model.path}: {name} is {tensor.dtype}, expected weights of 16 bits or more: "
                "merge models as they were before they were quantised",
            )
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, merge, print what was merged."""
    config = parse_flags(Config, __doc__, argv, "minalign merge")
    for name in ("init", "models", "out"):
        require(bool(getattr(config, name)), f"--{name} is missing")
    require(
        not Path(config.out).exists(),
        f"--out {config.out}: exists: choose another folder or remove that one",
    )
    print(angle_summary(merge_folders(config)))
    print(f"saved {config.out}")
