"""Models and tokenizers saved, so that other tools load what was trained."""

import copy
import tempfile
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..running.errors import UserError
from .folders import atomic_folder, first_line, model_folder
from .loading import end_token_ids
from .lora import dense_state, save_adapter
from .older_readers import write_for_older_readers


def save_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    adapter_of: str = "",
    card: str = "",
) -> None:
    """Write an atomic checkpoint that AutoModelForCausalLM loads.

    Args:
        policy: its adapters are added to the weights.
        tokenizer: saved beside it.
        folder: where to.
        adapter_of: the name of the adapters' base model: with it, the adapters are saved alone, in
            PEFT's files.
        card: the text of README.md.
    """
    with atomic_folder(folder) as new:
        save_files(policy, tokenizer, new, adapter_of)
        if card:
            (new / "README.md").write_text(card, encoding="utf-8")


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
        raise UserError(f"{model.name_or_path}: {reason}: fix its config or tokenizer") from error
