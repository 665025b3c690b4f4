"""Classifiers: loaded, what their labels mean, how a new head starts, and how texts are padded."""

from __future__ import annotations

import functools
import itertools
import re
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..running.errors import require
from .loading import find_model, load_model, require_all_used
from .lora import adapter_labels
from .padding import context_of

if typing.TYPE_CHECKING:
    from ..data.pairs import Example
    from ..reward import RewardModel

NUMBER = re.compile(r"^[+-]?\d+(\.\d+)?|\d+(\.\d+)?$")  # of a label's name

SIDES = {"very negative": -2, "negative": -1, "neg": -1, "bad": -1, "rejected": -1}
SIDES |= {"neutral": 0, "neu": 0, "positive": 1, "pos": 1, "good": 1, "chosen": 1}
SIDES |= {"very positive": 2}


class Objective(NamedTuple):
    """What a reward model is trained for, over K texts in order, the best first (a pair: K = 2).

    Logits are (K, B, labels), those of `by_place`. There are B examples, and a loss has one value
    for each.

    labels: outputs of the head.
    order_losses: (logits, examples) -> (B,) -log P(this order), nats.
    penalties: (logits, examples) -> (B,) or a number, what training adds to the order losses.
    win_probabilities: logits (N, labels) of N texts and of N others -> (N,), the probability that
        the first is better.
    """

    labels: int
    order_losses: Callable[[torch.Tensor, Sequence[Example]], torch.Tensor]
    penalties: Callable[[torch.Tensor, Sequence[Example]], torch.Tensor | float]
    win_probabilities: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_place(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """Logits (N, labels) of the texts of one example after another -> (K, B, labels).

    Row k has those of each example's text k; 0 where its list is shorter, see `place_mask`.
    """
    counts = [len(example.texts) for example in examples]
    return torch.nn.utils.rnn.pad_sequence(logits.split(counts))


def place_mask(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """(K, B) bool: which of the logits of `by_place` are those of a text."""
    counts = torch.tensor([len(example.texts) for example in examples], device=logits.device)
    return torch.arange(len(logits), device=logits.device)[:, None] < counts


def load_classifier(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with a trained head and its tokenizer, see `loading.load_model`."""
    where = f"--rm {path}"
    labels = adapter_labels(find_model(path, where))
    options = {} if labels is None else {"num_labels": labels, "problem_type": None}
    model, tokenizer, missing, unused = load_model(
        AutoModelForSequenceClassification, path, "--rm", **options
    )
    # transformers would continue with a random head.
    require(
        not missing,
        f"{where}: no trained classification head ({', '.join(sorted(missing)[:3])} missing"
        f"{', got ' if unused else ''}{', '.join(sorted(unused)[:3])}): make one with train_rm.py",
    )
    require_all_used(where, model, unused)
    if labels is not None:  # adapters bring neither a pad token nor the names of the scores
        set_up_labels_(model, tokenizer, new_head=False)
    return model, tokenizer


def load_body(path: str, num_labels: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier on the body of another model and its tokenizer.

    Its head is new, or that of a classifier with as many labels.
    """
    where, options = f"--model {path}", {"num_labels": num_labels, "problem_type": None}
    model, tokenizer, missing, unused = load_model(
        AutoModelForSequenceClassification, path, "--model", **options
    )
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: masked language models have none.
    lacking = [name for name in missing if name.startswith(body) and "pooler" not in name]
    named = ", ".join(sorted(lacking)[:3])
    require(not lacking, f"{where}: weights missing: {named}: a broken checkpoint")
    old_head = {name for name in unused if missing and not name.startswith(body)}
    require_all_used(where, model, unused - old_head)
    if old_head:
        print(f"note: {where}: a new head, so not used: {', '.join(sorted(old_head)[:3])}")
    set_up_labels_(model, tokenizer, new_head=bool(missing))
    return model, tokenizer


def label_order(config: PreTrainedConfig) -> list[int]:
    """The labels of a classifier from the worst to the best, by their names.

    Names are numbers ("1 star", "LABEL_0"), or such as negative, neutral and positive, in any
    order. Two labels of other names are taken as they come.

    Raises:
        UserError: more labels, of which the names do not say what is better; or labels that do not
            exclude each other.

    >>> from transformers import BertConfig
    >>> label_order(BertConfig(id2label={0: "positive", 1: "neutral", 2: "negative"}))
    [2, 1, 0]
    """
    count = config.num_labels
    given = [str(config.id2label.get(k, k)) for k in range(count)]
    names = [name.strip().lower() for name in given]
    labels = f"{count} labels ({', '.join(given[:5])})"
    require(
        count == 1 or config.problem_type in (None, "single_label_classification"),
        f"{labels} of a {config.problem_type}: expected one, or labels that exclude each other",
    )
    numbers = [NUMBER.search(name) for name in names]
    if all(numbers) and len({NUMBER.sub("", name).strip().rstrip("s") for name in names}) == 1:
        values = [float(number[0]) for number in numbers]
    else:
        values = [SIDES.get(re.sub("[_-]", " ", name)) for name in names]
        if count == 2 and values.count(None) == 1:  # one name says what the other is
            values = [-sum(filter(None, values)) if v is None else v for v in values]
    if None not in values and len(set(values)) == count:
        return sorted(range(count), key=values.__getitem__)
    require(
        count <= 2,
        f"{labels}: their names do not say which is better: number them in id2label of its "
        "config.json",
    )
    return list(range(count))


def has_linear_score(model: PreTrainedModel) -> bool:
    """Whether a classifier's head is one product, a decoder's. Other heads pool by themselves."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a classifier takes."""
    context = context_of(model.config) or 0
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if getattr(positions, "padding_idx", None) is not None:
        context -= positions.padding_idx + 1  # RoBERTa's begin behind that of padding
    if context <= 0:  # XLNet's is -1
        return tokenizer.model_max_length
    return context if has_linear_score(model) else min(context, tokenizer.model_max_length)


def set_up_labels_(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_head: bool
) -> None:
    """Start a new head small, name the scores, and see to a pad token.

    Without a pad token of its own, transformers would later pool on the wrong token. Where the
    tokenizer has none (or it is the begin or end token), the unknown token becomes the pad token,
    or a new one is added.
    """
    linear = has_linear_score(model)
    if new_head and linear:  # an encoder's head has layers of its own, started as it was designed
        std = (model.score.in_features + 1) ** -0.5  # Stiennon et al. 2020
        torch.nn.init.normal_(model.score.weight, std=std)
    taken = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    if tokenizer.pad_token_id in taken:
        if tokenizer.unk_token_id not in taken:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    inner = model.config.get_text_config()
    if linear or inner.pad_token_id is None:
        for config in (model.config, inner):
            config.pad_token_id = tokenizer.pad_token_id
    if model.config.num_labels > 2:
        names = {k: str(k + 1) for k in range(model.config.num_labels)}
        model.config.id2label, model.config.label2id = names, {v: k for k, v in names.items()}


@torch.no_grad()
def try_out(reward_model: RewardModel) -> None:
    """Find out how texts go through a reward model together: as each would alone.

    The reference is transformers' own forward of one row. Where padding changes the logits on
    either side (FNet, Nystromformer), texts go one at a time, which is said.
    """
    model, tokenizer = reward_model.model, reward_model.tokenizer
    # bfloat16 scores tie, so heads stay in float32.
    for head in set(model.children()) - {model.base_model}:
        head.forward = functools.partial(in_float32, head.forward)
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    words &= set(range(model.get_input_embeddings().num_embeddings))
    words = itertools.cycle(sorted(words))
    end = {tokenizer.eos_token_id} - {None, reward_model.pad_token_id}
    lengths = (3, min(13, reward_model.context - 1))
    rows = [[*itertools.islice(words, n), *end] for n in lengths]
    options = {"use_cache": False} if reward_model.plain_head else {}
    one_by_one = [torch.tensor([row], device=model.device) for row in rows]
    alone = torch.cat([model(input_ids=ids, **options).logits for ids in one_by_one])
    for plain, side in ((reward_model.plain_head, "right"), (False, "right"), (False, "left")):
        reward_model.plain_head, reward_model.padding_side = plain, side
        difference = (reward_model.one_pass(rows) - alone).abs().max()
        if difference <= 1e-3 * max(1.0, alone.abs().max().item()):
            return
    reward_model.together = False
    print(f"note: padding changes the scores of a {model.config.model_type}: one at a time")


def in_float32(function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
    """Outside of autocast, with inputs in float32: in bfloat16 scores near 5 are .02 apart."""
    floats = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*floats)
