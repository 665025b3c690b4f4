"""Token ids -> batches: padding, pairs drawn and checked, batches of like length."""

import functools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .chat import Prompt
from .common import require
from .data import Pair


def pad(rows: Sequence[list[int]], side: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> input_ids (B, T) and attention_mask (B, T); id 0 fills up, since the mask alone says what is real.

    >>> pad([[5, 6], [7]], side="left")
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    join = (lambda row, gap: gap + row) if side == "left" else (lambda row, gap: row + gap)
    ids = torch.tensor([join(list(row), gap) for row, gap in zip(rows, fill)])
    mask = torch.tensor([join(one, gap) for one, gap in zip(ones, fill)])
    return ids.to(device), mask.to(device)


def length_parts(lengths: Sequence[int], max_rows: int, max_tokens: float = math.inf) -> list[list[int]]:
    """Indices in parts of at most `max_rows` and `max_tokens` (padded; a longer row goes alone), longest first.

    Cut, too, where padding would cost more than another pass: a row under 3/4 of its part's longest opens a new part once
    the part holds 1,024 tokens.

    >>> length_parts([300, 10, 1100, 280, 20], max_rows=8)
    [[2], [0, 3, 4, 1]]
    >>> length_parts([300, 10, 1100, 280, 20], max_rows=8, max_tokens=600)
    [[2], [0, 3], [4, 1]]
    """
    parts = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = parts[-1] if parts else []
        longest = lengths[part[0]] if part else 0
        full = len(part) == max_rows or (len(part) + 1) * longest > max_tokens
        if not part or full or (len(part) * longest >= 1024 and lengths[i] < 0.75 * longest):
            parts.append([])
        parts[-1].append(i)
    return parts


def tokens_a_pass(model: PreTrainedModel) -> float:
    """`max_tokens` of a pass. On a CPU, hidden states of 1 MiB: more of them leave its cache, cost memory, and are no faster."""
    return 2**18 // model.config.hidden_size if model.device.type == "cpu" else math.inf


class Example(NamedTuple):
    """A pair as token ids, ready for the reward model."""

    chosen: list[int]
    rejected: list[int]
    pair: Pair


def encode_pairs(
    pairs: Sequence[Pair],
    encode_whole: Callable[[Prompt, str], list[int]],
    *,
    max_tokens: int,
    max_pairs: int,
    seed: int,
    crop_words: tuple[int, int] | None = None,
) -> list[Example]:
    """At most `max_pairs` pairs, drawn by `seed`, as token ids; identical and over-long ones dropped and counted.

    `crop_words` (low, high) keeps the beginning of each completion, low..high words drawn anew each time: for a reward
    model that will score short continuations, not whole reviews.
    """
    rng = random.Random(seed)
    indices = range(len(pairs))
    if max_pairs < len(pairs):
        indices = rng.sample(indices, max_pairs)
    encode_once = functools.lru_cache(100_000)(lambda text: encode_whole("", text))  # rated texts are in many pairs

    def encode(prompt: Prompt, completion: str) -> list[int]:
        if crop_words:
            completion = re.match(rf"(?:\s*\S+){{0,{rng.randint(*crop_words)}}}", completion)[0]
        return encode_whole(prompt, completion) if prompt else encode_once(completion)

    examples, identical, too_long = [], 0, 0
    for i in tqdm(indices, desc="tokens of pairs", leave=False):
        pair = pairs[i]
        chosen, rejected = encode(pair.prompt, pair.chosen), encode(pair.prompt, pair.rejected)
        if max(len(chosen), len(rejected)) > max_tokens:  # never cut: what is cut off may hold the difference
            too_long += 1
        elif chosen == rejected:
            identical += 1
        else:
            examples.append(Example(chosen, rejected, pair))
    print(
        f"  kept {len(examples)} of {len(indices)} pairs: {identical} identical and {too_long} longer than "
        f"{max_tokens} tokens dropped"
    )
    return examples


def length_grouped_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices, each item once an epoch; items of like length together, so that little is padding.

    Each epoch is shuffled, cut into groups of 50 batches, and only within a group sorted by length; the last batch of
    an epoch may be smaller.
    """
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        groups = [order[i : i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
        batches = []
        for group in groups:
            group.sort(key=lambda i: lengths[i])
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def shuffled_forever(items: Sequence, seed: int) -> Iterator:
    """Each item once an epoch, in an order that differs between epochs and seeds."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(items, len(items))


def require_ratings(config, *pairs: Pair) -> None:
    """UserError where --rating-coef or --margin asks for what these pairs do not have."""
    for pair in pairs:
        rated = pair.chosen_rating is not None and pair.rejected_rating is not None
        require(rated or not config.rating_coef,
                f"{config.dataset}: no chosen_rating and rejected_rating: --rating-coef needs both")  # fmt: skip
        require(rated or pair.margin is not None or not config.margin,
                f"{config.dataset}: no margin and no ratings: --margin needs them")  # fmt: skip


def require_rating_range(config, examples: Sequence[Example]) -> None:
    """UserError where the ratings that --rating-coef asks for lie outside --rating-range."""
    if config.rating_coef:
        low, high = config.rating_range
        ratings = [rating for e in examples for rating in (e.pair.chosen_rating, e.pair.rejected_rating)]
        require(low <= min(ratings) and max(ratings) <= high,
                f"{config.dataset or 'toy world'}: ratings from {min(ratings):g} to {max(ratings):g}, outside --rating-range "
                f"{low:g} {high:g}: give the scale of the data")  # fmt: skip
