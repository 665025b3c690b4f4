"""Language models and tokenizers: loaded in float32, and saved."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..data.chat import require_templates
from ..running.errors import UserError, require
from .folders import LOADING_ERRORS, atomic_folder, first_line, model_folder
from .lora import dense_state, load_adapter_, save_adapter
from .probe import check_policy

logging.set_verbosity_error()  # what matters of a loading report is checked here, and is an error
logging.disable_progress_bar()


def load_model(
    kind: type, path: str, flag: str, **options: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str]]:
    """A model of an Auto class and its tokenizer, in float32, with dropout off.

    float32 whatever the checkpoint holds: in bfloat16 most updates of 1e-6 round to nothing.
    Adapters in PEFT's files are added to the weights of their base model. Code in a checkpoint is
    never run, and a pickle only read as weights.

    Args:
        kind: the Auto class.
        path: a run, a folder or a hub id.
        flag: the command-line flag that named it, for errors.
        options: for `kind.from_pretrained`.
    Returns:
        The model, the tokenizer, and the names of the weights that the checkpoint lacks.
    Raises:
        UserError: something cannot be loaded, or the tokenizer has tokens that the model does not
            know. The message begins with `flag`.
    """
    folder = model_folder(path)
    try:
        base, adapters = folder, []
        # Adapters may be of a model that is adapters itself.
        while (config := Path(base) / "adapter_config.json").is_file():
            if base in adapters:
                raise ValueError(f"{base} is an adapter of itself")
            adapters.insert(0, base)
            base = model_folder(json.loads(config.read_text())["base_model_name_or_path"])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        require_templates(tokenizer)
        model, report = kind.from_pretrained(
            base, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
        )
        missing = set(report["missing_keys"])
        for adapter in adapters:  # the innermost first
            missing -= load_adapter_(model, adapter)
    except LOADING_ERRORS as error:
        raise UserError(f"{flag} {path}: cannot be loaded: {_reason(error)}") from error
    known = model.get_input_embeddings().num_embeddings
    unknown = {token for token, i in tokenizer.get_vocab().items() if i >= known}
    unknown = sorted(unknown - {tokenizer.pad_token})  # a pad is masked, and never looked up
    require(
        not unknown,
        f"{flag} {path}: the tokenizer has {len(unknown)} tokens that the model has no embedding "
        f"for ({unknown[:1]}): the two do not belong together",
    )
    return model.eval(), tokenizer, missing


def load_policy(
    path: str, flag: str = "--model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, see load_model.

    A missing pad token becomes the end token: harmless here, since masks go by position.

    Raises:
        UserError: weights or the end token are missing, or it fails the trial of `check_policy`.
    """
    model, tokenizer, missing = load_model(AutoModelForCausalLM, path, flag)
    require(
        not missing,
        f"{flag} {path}: weights missing: {', '.join(sorted(missing)[:3])}: not a causal language "
        "model, or a broken checkpoint",
    )
    require(
        tokenizer.eos_token_id is not None,
        f"{flag} {path}: the tokenizer has no end token, so no completion could end: set eos_token "
        "(and pad_token) in its tokenizer_config.json",
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_policy(model, tokenizer, f"{flag} {path}")
    return model, tokenizer


def save_policy(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter_of: str = ""
) -> None:
    """Write an atomic checkpoint that AutoModelForCausalLM loads.

    Args:
        policy: its adapters are added to the weights.
        tokenizer: saved beside it.
        folder: where to.
        adapter_of: the name of the adapters' base model: with it, the adapters are saved alone, in
            PEFT's files.
    """
    with atomic_folder(folder) as new:
        if adapter_of:
            save_adapter(policy, new, model_folder(adapter_of))
        else:
            # Under torchrun, transformers saves on rank 0 alone, in silence; warp.py's other ranks
            # have runs of their own.
            policy.should_save_on_this_rank = lambda is_main_process: True
            policy.save_pretrained(new, state_dict=dense_state(policy))
        tokenizer.save_pretrained(new)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion.

    The tokenizer's end token, and all that the checkpoint's generation config names.
    """
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({tokenizer.eos_token_id, *named})


def _reason(error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            "it needs code of its own, which is never run: take a model that transformers itself "
            "knows"
        )
    if "couldn't connect" in reason or "not a local folder" in reason or "Hub" in reason:
        return f"{reason.rstrip('.')}: without a network, give the folder of a local copy"
    return reason
