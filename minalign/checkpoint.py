"""Folders that are whole or not there, and models loaded from them in float32."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .common import UserError

logging.set_verbosity_error()  # what matters of a loading report is checked here, and is an error
logging.disable_progress_bar()

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # what broken checkpoints raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `folder` at the end: a reader sees the old one or the new one."""
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def model_folder(path: str) -> str:
    """Where a model lies: a run's folder stands for the `model` folder in it; hub ids and model folders for themselves."""
    inner = Path(path) / "model"
    return str(inner) if inner.is_dir() else path


def load_policy(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a run, a folder or a hub id: float32, dropout off.

    float32 whatever the checkpoint holds: in bfloat16 most updates of 1e-6 round to nothing.

    Raises UserError where it cannot be loaded, or the tokenizer has no end token. A missing pad token becomes the end
    token: harmless here, since masks go by position.
    """
    try:
        folder = model_folder(path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except LOADING_ERRORS as error:
        raise UserError(f"--model {path}: cannot be loaded as a causal language model: {first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(
            f"--model {path}: weights missing: {', '.join(sorted(report['missing_keys'])[:3])}: not a causal "
            "language model, or a broken checkpoint"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model {path}: the tokenizer has no end token, so no completion could end: set eos_token (and "
            "pad_token) in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and all that the checkpoint's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({tokenizer.eos_token_id, *named})


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
