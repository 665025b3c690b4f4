"""Pairs become ids: drawn by the seed, cropped from their beginning, counted where dropped; batches pad little."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minalign.batches import encode_pairs, length_grouped_batches, length_parts, pad, shuffled_forever
from minalign.chat import encode
from minalign.data import Pair, RatedPairs


def make_tokenizer():
    """Words of one letter."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate("abcdef")}}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("side, ids, mask", [
    ("left", [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]),
    ("right", [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
])  # fmt: skip
def test_padding_goes_to_the_side_asked_for(side, ids, mask, device):
    rows = [[2, 3, 4], [5]]
    got = pad(rows, side, device)
    assert [tensor.tolist() for tensor in got] == [ids, mask] and got[0].device.type == device.type
    assert rows == [[2, 3, 4], [5]]


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}], ""])
def test_identical_and_over_long_pairs_are_dropped_and_counted(prompt, capsys):
    """The same whether the text is tokenised once for many pairs (no prompt) or each time."""
    tokenizer, first = make_tokenizer(), "" if prompt else "a"  # where there is no prompt, the completion has its text
    pairs = [
        Pair(prompt, first + " b", first + " c"),
        Pair(prompt, first + " b", first + " b"),  # identical
        Pair(prompt, first + " b", first + " b "),  # identical as ids
        Pair(prompt, first + " b c d e", first + " b"),  # with begin and end one token too long, on either side
        Pair(prompt, first + " b", first + " b c d e"),
        Pair(prompt, first + " b c d", first + " b c e"),  # just fits; cutting would have made it identical
        Pair(prompt, first + " b c d e", first + " b c d e"),  # both
    ]

    def encode_text(prompt, completion):
        return encode(tokenizer, (prompt if isinstance(prompt, str) else prompt[0]["content"]) + completion, end=True)

    examples = encode_pairs(pairs, encode_text, max_tokens=6, max_pairs=10, seed=0)
    assert examples == [([0, 2, 3, 1], [0, 2, 4, 1], pairs[0]), ([0, 2, 3, 4, 5, 1], [0, 2, 3, 4, 6, 1], pairs[5])]
    assert "kept 2 of 7 pairs: 2 identical and 3 longer than 6 tokens dropped" in capsys.readouterr().out


def test_pairs_beyond_the_maximum_are_drawn_by_the_seed(capsys):
    pairs = RatedPairs([str(n) for n in range(2000)], list(range(2000)), min_gap=1)
    draw = lambda seed: encode_pairs(pairs, lambda _, text: [int(text)], max_tokens=9, max_pairs=50, seed=seed)
    assert draw(0) == draw(0) != draw(1)
    assert len({(e.chosen[0], e.rejected[0]) for e in draw(0)}) == 50
    assert "kept 50 of 50 pairs" in capsys.readouterr().out
    few = encode_pairs([Pair("", "1", "2")] * 3, lambda _, text: [int(text)], max_tokens=9, max_pairs=3, seed=0)
    assert len(few) == 3, "all of them where there are not more"


def test_a_text_in_many_pairs_is_encoded_once():
    calls = []
    texts = [f"{n}" for n in range(30)]

    def encode_text(prompt, text):
        calls.append(text)
        return [int(text)]

    examples = encode_pairs(RatedPairs(texts, list(range(30)), 1), encode_text, max_tokens=9, max_pairs=10**6, seed=0)
    assert len(examples) == 30 * 29 // 2 and sorted(calls) == sorted(texts)


# --- crops -----------------------------------------------------------------------------------------------------------

REVIEW = "  A long, long film.\n\nIt has\ttabs ; and 12 words - don't it?"


def crops_of(pairs, span, seed=0):
    """(prompt, chosen, rejected) as they were encoded."""
    seen = []
    encode_pairs(
        pairs, lambda p, c: [seen.append((p, c)) or len(seen)], max_tokens=9, max_pairs=10**6, seed=seed, crop_words=span
    )
    return seen


@pytest.mark.parametrize(
    "prompt", ["", "one two three four five six seven", [{"role": "user", "content": "one two three four"}]]
)
@pytest.mark.parametrize("span", [(2, 5), (1, 1), (3, 30)])
def test_a_crop_is_a_beginning_of_so_many_words(prompt, span):
    crops = crops_of([Pair(prompt, REVIEW, REVIEW[2:])] * 300, span)
    assert {str(p) for p, _ in crops} == {str(prompt)}, "prompts are never cropped"
    words = len(REVIEW.split())
    for _, crop in crops:
        assert crop and (REVIEW.startswith(crop) or REVIEW[2:].startswith(crop))
        assert crop.split() == REVIEW.split()[: len(crop.split())], "whole words"
    counts = {len(crop.split()) for _, crop in crops}
    assert counts == set(range(span[0], min(span[1], words) + 1)), "every length occurs, both ends included"


def test_crops_are_drawn_anew_for_each_text_and_by_the_seed():
    pairs = [Pair("p", REVIEW, REVIEW)] * 50
    lengths = [len(text.split()) for _, text in crops_of(pairs, (1, 12))]
    assert len(set(lengths[0::2])) > 6 and lengths[0::2] != lengths[1::2], "of chosen and rejected apart"
    assert crops_of(pairs, (1, 12)) == crops_of(pairs, (1, 12)) != crops_of(pairs, (1, 12), seed=1)
    assert [text for _, text in crops_of(pairs, None)] == [REVIEW] * 100


def test_a_short_text_stays_whole():
    assert {text for _, text in crops_of([Pair("p", "two words", "x")] * 5, (7, 9))} == {"two words", "x"}


# --- order -----------------------------------------------------------------------------------------------------------


def test_batches_cover_each_epoch_once_and_pad_little():
    lengths = [random.Random(n).randrange(5, 200) for n in range(1003)]
    batches = length_grouped_batches(lengths, 10, torch.Generator().manual_seed(0))
    epochs = [[next(batches) for _ in range(101)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(1003))
        assert sorted(map(len, epoch)) == [3] + [10] * 100
        columns = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch)
        assert sum(lengths) / columns > 0.93  # 0.55 in random order
        longest = [max(lengths[i] for i in batch) for batch in epoch]
        assert longest != sorted(longest), "short texts first would be a curriculum"
    mates = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert len(mates[0] & mates[1]) < 10, "each epoch groups anew"
    again = length_grouped_batches(lengths, 10, torch.Generator().manual_seed(0))
    assert [next(again) for _ in range(101)] == epochs[0]


def test_prompts_come_once_an_epoch_in_ever_new_orders():
    items = list(range(50))
    stream = shuffled_forever(items, seed=0)
    first, second = ([next(stream) for _ in items] for _ in range(2))
    assert sorted(first) == sorted(second) == items == list(range(50))
    other, again = ([next(it) for _ in items] for it in (shuffled_forever(items, seed=1), shuffled_forever(items, seed=0)))
    assert first == again and len({tuple(order) for order in (items, first, second, other)}) == 4


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_parts_hold_every_row_once_longest_first(max_rows):
    lengths = torch.randint(1, 2000, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = length_parts(lengths, max_rows)
    assert sorted(i for part in parts for i in part) == list(range(57)) and max(map(len, parts)) <= max_rows
    in_order = [lengths[i] for part in parts for i in part]
    assert in_order == sorted(lengths, reverse=True)
    real, padded = sum(lengths), sum(len(part) * lengths[part[0]] for part in parts)
    assert padded < 1.25 * real + 1024 * (max_rows > 1)


def test_few_tokens_are_not_split():
    assert length_parts([40, 3, 1, 9], 8) == [[0, 3, 1, 2]]
    assert length_parts([], 8) == []
