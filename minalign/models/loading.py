"""Language models and tokenizers, from runs, folders and hub ids: loaded in float32."""

import functools
import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from ..data.templates import render, require_templates
from ..running.errors import UserError, require
from .broken import loading_errors
from .folders import model_folder
from .lora import load_adapter_
from .probe import check_policy

logging.set_verbosity_error()  # what matters of a loading report is checked here, and is an error
logging.disable_progress_bar()

# Buffers in checkpoints of before: models compute them.
COMPUTED = re.compile(
    r"(inv_freq|position_ids|masked_bias|causal_mask|attn\.bias|attention\.bias|_cached)$"
)

# Parts that texts do not need, and other heads. They are named in a line.
SPARE = re.compile(r"(model\.)?(lm_head|embed_out|v_head|mtp|visual|vision|audio|multi_modal)")


def load_model(
    kind: type, path: str, flag: str, **options: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str], set[str]]:
    """A model of an Auto class and its tokenizer, in float32, with dropout off.

    float32 whatever the checkpoint holds: in bfloat16 most updates of 1e-6 round to nothing.
    Adapters in PEFT's files are added to the weights of their base model. Code in a checkpoint is
    never run, a pickle only read as weights, and the way to compute attention never taken from it.

    Args:
        kind: the Auto class. The number of a classifier's labels is that of its head.
        path: a run, a folder or a hub id.
        flag: the command-line flag that named it, for errors.
        options: for the model's config.
    Returns:
        The model, the tokenizer, the names of the weights that the checkpoint lacks, and of those
        that the model does not take.
    Raises:
        UserError: something cannot be loaded, a weight has another shape or is not finite, or the
            tokenizer has plain tokens that the model does not know. The message begins with `flag`.
    """
    where = f"{flag} {path}"
    folders, place = adapters_and_base(path, where)
    *adapters, base = folders
    safe = {"trust_remote_code": False, "local_files_only": _is_local(base, place)}

    with loading_errors(place, base, "config.json"):
        config = AutoConfig.from_pretrained(base, **safe, **options)
        config._attn_implementation = config._experts_implementation = None
        heads = " ".join(config.architectures or [])
        if kind is AutoModelForSequenceClassification:
            require(
                not re.search("TokenClassification|MultipleChoice", heads),
                f"{where}: a {heads}, whose head does not score a text: expected a sequence "
                "classifier",
            )
    with loading_errors(where, folders[0], "the tokenizer"):
        source = next(filter(_has_tokenizer, folders), None)
        require(source is not None, f"{where}: no tokenizer in {folders[0]}: put one there")
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        require_templates(tokenizer)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some files are found to be wrong in use
    with loading_errors(place, base, "the weights"):
        for index in Path(base).glob("*.index.json"):
            files = set(json.loads(index.read_text())["weight_map"].values())
            away = [file for file in files if file != os.path.basename(file)]
            require(not away, f"{place}: {index.name} names {away[:1]}, outside of the folder")
        model, report = kind.from_pretrained(
            base,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # an error of transformers names none
            output_loading_info=True,
            **safe,
        )
        model.get_input_embeddings()  # some families have none
    others = {name: (list(got), list(want)) for name, got, want in report["mismatched_keys"]}
    in_head = not any(name.startswith(f"{model.base_model_prefix}.") for name in others)
    labels = {got[0] for got, _ in others.values()}
    if kind is AutoModelForSequenceClassification and "num_labels" not in options:
        if in_head and len(labels) == 1:
            return load_model(kind, path, flag, num_labels=labels.pop(), **options)
    missing = set(report["missing_keys"])
    with loading_errors(where, folders[0], "the adapters"):
        for adapter in reversed(adapters):  # the innermost first
            brought = load_adapter_(model, adapter)
            missing -= brought
            others = {name: shapes for name, shapes in others.items() if name not in brought}
    for name, (got, want) in others.items():
        raise UserError(
            f"{where}: cannot be loaded: {name} is {got} in the checkpoint, expected {want} of a "
            f"{type(model).__name__} {f'of {want[0]} labels' if in_head else 'of its config'}"
        )
    for name, weight in model.named_parameters():
        floating = weight.is_floating_point()
        require(floating, f"{where}: {name} is {weight.dtype}: take the model before quantisation")
        finite = bool(weight.sum().isfinite() or weight.isfinite().all())
        require(finite, f"{where}: {name} holds NaN or infinity: a broken checkpoint")
    _check_tokens(model, tokenizer, where)
    unused = {name for name in report["unexpected_keys"] if not COMPUTED.search(name)}
    return model.eval(), tokenizer, missing, unused


def require_all_used(where: str, model: PreTrainedModel, unused: set[str]) -> None:
    """Name the parts of a checkpoint that texts do not need; UserError for any other."""
    named = ", ".join(sorted(unused)[:3])
    require(
        all(SPARE.match(name) for name in unused),
        f"{where}: {named}: a {type(model).__name__} has no such weights, so it is another kind of "
        f"model ({', '.join(model.config.architectures or ['of no known architecture'])})",
    )
    if unused:
        print(f"note: {where}: not used: {named}{' ...' if len(unused) > 3 else ''}")


def load_policy(
    path: str, flag: str = "--model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, see load_model.

    A missing pad token becomes the end token: harmless here, since masks go by position.

    Raises:
        UserError: weights or the end token are missing, weights are of another kind of model, or it
            fails the trial of `check_policy`.
    """
    where = f"{flag} {path}"
    model, tokenizer, missing, unused = load_model(AutoModelForCausalLM, path, flag)
    require(
        not missing,
        f"{where}: weights missing: {', '.join(sorted(missing)[:3])}: not a causal language "
        "model, or a broken checkpoint",
    )
    require_all_used(where, model, unused)
    require(
        tokenizer.eos_token_id is not None,
        f"{where}: the tokenizer has no end token, so no completion could end: set eos_token "
        "(and pad_token) in its tokenizer_config.json",
    )
    with loading_errors(where, model_folder(path), "generation_config.json"):
        end_token_ids(model, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_policy(model, tokenizer, where)
    return model, tokenizer


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion.

    The tokenizer's end token, all that the checkpoint's generation config and config name, and the
    end of turn that the chat template writes after an answer.
    """

    def named(config: GenerationConfig | PreTrainedConfig | None) -> set[int]:
        given = getattr(config, "eos_token_id", None)
        ends = set(given) if isinstance(given, list) else {given}
        if not all(end is None or type(end) is int for end in ends):
            raise ValueError(f"got eos_token_id {given!r}, expected ids of tokens")
        return ends

    ends = {tokenizer.eos_token_id, *_end_of_turn(tokenizer), *named(model.generation_config)}
    # A config that names none has its family's default, which may be any word of this vocabulary.
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for config in (model.config, model.config.get_text_config(decoder=True)):
        ends |= named(config) & added
    return sorted(ends - {None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first special token that the chat template writes after an answer, if there is one."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = render(tokenizer, turns, cue=False) if tokenizer.chat_template else ""
    except UserError:  # said where prompts are rendered
        return []
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    return [i for i in ids if i in added and added[i].special][:1]


def adapters_and_base(path: str, where: str) -> tuple[list[str], str]:
    """The folders of adapters, the outermost first, and of their base; and what to call that."""
    folders, place = [find_model(path, where)], where
    with loading_errors(where, folders[0], "adapter_config.json"):
        # Adapters may be of a model that is adapters itself.
        while os.path.isfile(file := os.path.join(folders[-1], "adapter_config.json")):
            named = str(json.loads(Path(file).read_text())["base_model_name_or_path"])
            beside = os.path.join(folders[-1], named)
            is_beside = os.path.isdir(beside) and not os.path.isdir(named)
            place = f"{where}: its base model {named}"
            base = find_model(beside if is_beside else named, place)
            if base in folders:
                raise ValueError(f"{base} is an adapter of itself")
            folders.append(base)
    return folders, place


def base_config(path: str, flag: str) -> PreTrainedConfig:
    """The config of a model, or of the base of adapters."""
    (*_, base), place = adapters_and_base(path, f"{flag} {path}")
    with loading_errors(place, base, "config.json"):
        return AutoConfig.from_pretrained(
            base, trust_remote_code=False, local_files_only=_is_local(base, place)
        )


def find_model(path: str, where: str) -> str:
    """The folder of a model; of one on the hub its name, but of adapters there a local copy.

    Raises:
        UserError: it is not here, and no hub can have it.
    """
    name = model_folder(path)
    safe = {"local_files_only": _is_local(name, where)}
    if os.path.isdir(name) or not find_adapter_config_file(name, **safe):
        return name
    with loading_errors(where, name, "the adapters"):
        return snapshot_download(name, ignore_patterns="*/*", **safe)


@functools.lru_cache
def _is_local(name: str, where: str) -> bool:
    """Whether a model is to be looked for on this machine alone.

    Raises:
        UserError: it is not here, and no hub can have it.
    """
    if os.path.isdir(name):
        return True
    owner, _, rest = name.partition("/")
    try:
        validate_repo_id(name)
        possible = not (rest and os.path.isdir(owner)) and not os.path.isfile(name)
    except HFValidationError:
        possible = False
    require(possible, f"{where}: cannot be loaded: there is no such folder, nor can a hub have it")
    try:  # once, where transformers would try for a minute
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the network says
        return True
    return False


def _has_tokenizer(folder: str) -> bool:
    """Whether a folder has files of a tokenizer; a hub id is taken to have them."""
    patterns = ("tokenizer*", "vocab*", "*.model")
    return not os.path.isdir(folder) or any(any(Path(folder).glob(each)) for each in patterns)


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """UserError for plain tokens without an embedding; special ones end the text that holds one."""
    known = model.get_input_embeddings().num_embeddings
    unknown = {i: token for token, i in tokenizer.get_vocab().items() if i >= known}
    unknown.pop(tokenizer.pad_token_id, None)  # a pad is masked, and never looked up
    added = tokenizer.get_added_vocab()
    plain = [token for token in unknown.values() if token not in added]
    require(
        not plain,
        f"{where}: the tokenizer has {len(plain)} tokens that the model has no embedding for "
        f"({plain[:1]}): the two do not belong together",
    )
    if not unknown:
        return
    named = ", ".join(list(unknown.values())[:3])
    print(f"note: {where}: {len(unknown)} special tokens without an embedding: {named:.80}")

    def look(embedding: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # sampled ids: every one has an embedding
        token = int(inputs[0].max())
        require(
            token < embedding.num_embeddings,
            f"{where}: a text holds {unknown.get(token, token)}, which has no embedding: remove it",
        )

    model.get_input_embeddings().register_forward_pre_hook(look)
