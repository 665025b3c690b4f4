"""Policies loaded in float32 and saved, what both kinds of models share in loading, and checkpoints to resume from."""

import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .common import UserError, require
from .folders import LOADING_ERRORS, first_line, model_folder, whole_folder
from .lora import dense_state, load_adapter_, save_adapter
from .shard import load_whole_state_, whole_state

logging.set_verbosity_error()  # what matters of a loading report is checked here, and is an error
logging.disable_progress_bar()


def load_model(kind: type, path: str, flag: str, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str]]:
    """A model of an Auto class and its tokenizer from a run, a folder or a hub id: float32, dropout off.

    float32 whatever the checkpoint holds: in bfloat16 most updates of 1e-6 round to nothing. Adapters in PEFT's files
    are added to the weights of their base model. Code in a checkpoint is never run, and a pickle only read as weights.

    Returns also the names of the weights that the checkpoint lacks. Raises UserError, beginning with `flag`, where
    something cannot be loaded, or the tokenizer has tokens that the model does not know.
    """
    folder = model_folder(path)
    try:
        base, adapters = folder, []
        while (config := Path(base) / "adapter_config.json").is_file():  # adapters may be of a model that is adapters itself
            if base in adapters:
                raise ValueError(f"{base} is an adapter of itself")
            adapters.insert(0, base)
            base = model_folder(json.loads(config.read_text())["base_model_name_or_path"])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = kind.from_pretrained(
            base, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
        )
        missing = set(report["missing_keys"])
        for adapter in adapters:  # the innermost first
            missing -= load_adapter_(model, adapter)
    except LOADING_ERRORS as error:
        raise UserError(f"{flag} {path}: cannot be loaded: {_reason(error)}") from error
    unknown = [t for t, i in tokenizer.get_vocab().items() if i >= model.get_input_embeddings().num_embeddings]
    unknown = sorted(set(unknown) - {tokenizer.pad_token})  # a pad is masked, and never looked up
    require(
        not unknown,
        f"{flag} {path}: the tokenizer has {len(unknown)} tokens that the model has no embedding for ({unknown[:1]}): "
        "the two do not belong together",
    )
    return model.eval(), tokenizer, missing


def load_policy(path: str, flag: str = "--model") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, see load_model.

    Raises UserError where weights are missing, or the tokenizer has no end token. A missing pad token becomes the end
    token: harmless here, since masks go by position.
    """
    model, tokenizer, missing = load_model(AutoModelForCausalLM, path, flag)
    require(
        not missing,
        f"{flag} {path}: weights missing: {', '.join(sorted(missing)[:3])}: not a causal language model, or a broken checkpoint",
    )
    require(
        tokenizer.eos_token_id is not None,
        f"{flag} {path}: the tokenizer has no end token, so no completion could end: set eos_token (and pad_token) in "
        "its tokenizer_config.json",
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter_of: str = "") -> None:
    """A checkpoint that AutoModelForCausalLM loads, whole or not there; adapters are added to the weights.

    With `adapter_of`, the name of their base model, the adapters alone, in PEFT's files.
    """
    with whole_folder(folder) as new:
        if adapter_of:
            save_adapter(policy, new, model_folder(adapter_of))
        else:
            # Under torchrun, transformers saves on rank 0 alone, in silence; warp.py's other ranks have runs of their own.
            policy.should_save_on_this_rank = lambda is_main_process: True
            policy.save_pretrained(new, state_dict=dense_state(policy))
        tokenizer.save_pretrained(new)


def save_checkpoint(out: Path, step: int, state: dict, keep: int, best_step: int | None = None, writing: bool = True) -> None:
    """Everything that a run needs to go on after `step`, as <out>/checkpoints/step-N, whole or not there.

    state: by name, lists of tensors, generators, whatever has a state_dict, and dicts of tensors, numbers and strings.
    Afterwards the last `keep` checkpoints are there, and the one of `best_step`. Raises UserError where it cannot be written;
    the earlier ones are untouched then. All processes of a run call it, to gather what is spread over them; one is `writing`.
    """
    content = {key: _content(value, writing) for key, value in state.items()}
    if not writing:
        return
    folder, name = out / "checkpoints", f"step-{step:07d}"
    with whole_folder(folder / name) as new:
        for log in out.glob("*.jsonl"):  # on the disk before the checkpoint: no line is missing after a power cut
            with open(log, "ab") as file:
                os.fsync(file.fileno())
        torch.save(content, new / "state.pt")
    last = sorted(path.name for path in folder.glob("step-???????") if path.name <= name)[-keep:]
    for path in folder.glob("step-*"):  # later ones could not be read when the run went on before them; .new is half a one
        if path.name not in (*last, f"step-{best_step or 0:07d}"):
            shutil.rmtree(path)


def _content(value, keep: bool):
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.optim.Optimizer):
        return whole_state(value, keep)
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return [tensor.detach() for tensor in value] if isinstance(value, list) else value


@torch.no_grad()
def resume_(out: Path, state: dict) -> int:
    """Put the newest checkpoint of `out` into what `save_checkpoint` took; returns its step, 0 where there is none.

    A generator of another device than the saved one's (after a change of --device) goes on with a seed of that step.
    """
    found = load_checkpoint(out)
    if found is None:
        return 0
    step, saved = found
    for key, value in state.items():
        if isinstance(value, torch.Generator):
            if key in saved and saved[key].numel() == value.get_state().numel():
                value.set_state(saved[key])
            else:
                value.manual_seed(value.initial_seed() + step)
        elif isinstance(value, list):
            for tensor, content in zip(value, saved[key], strict=True):
                tensor.copy_(content)
        elif isinstance(value, dict):
            value.update(saved[key])
        elif isinstance(value, torch.optim.Optimizer):
            load_whole_state_(value, saved[key])
        else:
            value.load_state_dict(saved[key])
    return step


def load_checkpoint(out: Path) -> tuple[int, dict] | None:
    """(step, state) of the newest checkpoint in `out` that can be read, on the CPU; None where there is none.

    One that cannot be read is passed over with a line that says so.
    """
    paths = sorted((out / "checkpoints").glob("step-???????"), reverse=True)
    for path in paths:
        try:
            with zipfile.ZipFile(path / "state.pt") as archive:  # torch checks no checksums
                if archive.testzip():
                    raise ValueError("wrong checksum")
            return int(path.name.removeprefix("step-")), torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (*LOADING_ERRORS, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
            instead = "beginning from the start" if path == paths[-1] else "taking the one before"
            print(f"{path}: cannot be read ({first_line(error)}): {instead}")
    return None


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and all that the checkpoint's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({tokenizer.eos_token_id, *named})


def _reason(error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run: take a model that transformers itself knows"
    if "couldn't connect" in reason or "not a local folder" in reason or "Hub" in reason:
        return f"{reason.rstrip('.')}: without a network, give the folder of a local copy"
    return reason
