"""Language models and tokenizers: loaded in float32, and saved."""

import copy
import json
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..running.errors import UserError, require
from .folders import LOADING_ERRORS, atomic_folder, first_line, model_folder
from .lora import dense_state, load_adapter_, save_adapter
from .older_readers import write_for_older_readers

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
        UserError: weights are missing, or the tokenizer has no end token.
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
        save_files(policy, tokenizer, new, adapter_of)


def save_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    adapter_of: str = "",
    weights: bool = True,
) -> None:
    """What `save_policy` writes, of a model of any Auto class, or all of it but the weights."""
    if adapter_of:
        save_adapter(model, folder, model_folder(adapter_of))
    else:
        # Under torchrun, transformers saves on rank 0 alone, in silence; warp.py's other ranks have
        # runs of their own.
        model.should_save_on_this_rank = lambda is_main_process: True
        generation = model.generation_config if model.can_generate() else None
        try:
            if generation:  # transformers refuses to save some that it loads
                model.generation_config = GenerationConfig()
            model.save_pretrained(folder, state_dict=dense_state(model) if weights else {})
        finally:
            model.generation_config = generation
        if generation:
            save_generation_config(generation, end_token_ids(model, tokenizer), folder)
    tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)


def save_generation_config(generation: GenerationConfig, ends: list[int], folder: Path) -> None:
    """Write a generation config with these end tokens."""
    generation = copy.deepcopy(generation)
    generation.eos_token_id = ends
    generation._from_model_config = None  # or readers may make it anew from config.json
    generation.to_json_file(folder / "generation_config.json")


def try_save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save all but the weights, and throw it away: what would fail at a run's end fails now.

    Raises:
        UserError: something cannot be saved.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_files(model, tokenizer, Path(folder), weights=False)
    except Exception as error:
        reason = f"it can be loaded, but not saved ({first_line(error)})"
        raise UserError(f"{model.name_or_path}: {reason}: mend its config or tokenizer") from error


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion.

    The tokenizer's end token, all that the checkpoint's generation config and config name, and the
    end of turn that the chat template writes after an answer.
    """

    def named(config: GenerationConfig | PreTrainedConfig | None) -> set[int]:
        ends = getattr(config, "eos_token_id", None)
        return set(ends) if isinstance(ends, list) else {ends}

    ends = {tokenizer.eos_token_id, *_ends_of_turn(tokenizer), *named(model.generation_config)}
    # A config that names none has its family's default, which may be any word of this vocabulary.
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for config in (model.config, model.config.get_text_config(decoder=True)):
        ends |= named(config) & added
    return sorted(ends - {None})


def _ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first special token that the chat template writes after an answer, if there is one."""
    answer = "minalign-answer"
    for content in (answer, [{"type": "text", "text": answer}]):
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # no template, or one whose fault is named where prompts are rendered
            continue
        before, _, ending = text.rpartition(answer)
        if answer in before:  # the question's, and so the last one is the answer's
            added = tokenizer.added_tokens_decoder
            ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
            return [i for i in ids if i in added and added[i].special][:1]
    return []


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
