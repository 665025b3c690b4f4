"""Pairs become ids: drawn by the seed, cropped, counted where dropped. Batches pad little."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minalign.data import chat, tokens
from minalign.data.batches import length_grouped_batches, shuffled_forever
from minalign.data.columns import Pair
from minalign.data.pairs import RatedPairs, encode_pairs
from minalign.models.padding import length_parts, pad


def make_tokenizer(words="abcdef"):
    """Words of one letter, or others."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "side, ids, mask",
    [
        ("left", [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]),
        ("right", [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_padding_goes_to_the_side_asked_for(side, ids, mask, device):
    rows = [[2, 3, 4], [5]]
    got = pad(rows, side, device)
    assert [tensor.tolist() for tensor in got] == [ids, mask] and got[0].device.type == device.type
    assert rows == [[2, 3, 4], [5]]


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}], ""])
def test_identical_and_over_long_pairs_are_dropped_and_counted(prompt, capsys):
    """The same whether the text is tokenised once for many pairs (no prompt) or each time."""
    tokenizer = make_tokenizer()
    a = "" if prompt else "a"  # where there is no prompt, the completion has its text
    pairs = [
        Pair(prompt, f"{a} b", f"{a} c"),
        Pair(prompt, f"{a} b", f"{a} b"),  # identical
        Pair(prompt, f"{a} b", f"{a} b "),  # identical as ids
        Pair(prompt, f"{a} b c d e", f"{a} b"),  # one token too long with begin and end ...
        Pair(prompt, f"{a} b", f"{a} b c d e"),  # ... on either side
        Pair(prompt, f"{a} b c d", f"{a} b c e"),  # just fits: a cut would make it identical
        Pair(prompt, f"{a} b c d e", f"{a} b c d e"),  # both
    ]
    if isinstance(prompt, list):
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}</s>"
    examples = encode_pairs(pairs, tokenizer, max_tokens=6, max_pairs=10, seed=0)
    assert list(examples) == [
        ([[0, 2, 3, 1], [0, 2, 4, 1]], pairs[0].ratings, pairs[0].gap, 1.0),
        ([[0, 2, 3, 4, 5, 1], [0, 2, 3, 4, 6, 1]], pairs[5].ratings, pairs[5].gap, 1.0),
    ]
    counts = "kept 2 of 7 pairs: 2 identical and 3 longer than 6 tokens dropped"
    assert counts in capsys.readouterr().out


def test_pairs_beyond_the_maximum_are_drawn_by_the_seed(capsys):
    many = RatedPairs([str(n) for n in range(2000)], list(range(2000)), min_gap=1)

    tokenizer = make_tokenizer(map(str, range(2000)))

    def draw(seed, pairs=many, max_pairs=50):
        drawn = encode_pairs(pairs, tokenizer, max_tokens=9, max_pairs=max_pairs, seed=seed)
        return list(drawn)

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(text[1] for text in e.texts) for e in draw(0)}) == 50
    assert "kept 50 of 50 pairs" in capsys.readouterr().out
    few = draw(0, [Pair("", "1", "2")] * 3, max_pairs=3)
    assert len(few) == 3, "all of them where there are not more"


def test_a_text_in_many_pairs_is_encoded_once(monkeypatch):
    calls = []
    pairs = RatedPairs([f"{n}" for n in range(30)], list(range(30)), 1)

    def encode_batch(tokenizer, texts, end):
        calls.extend(text for text, _ in texts)
        return chat.encode_batch(tokenizer, texts, end)

    monkeypatch.setattr(tokens, "encode_batch", encode_batch)
    tokenizer = make_tokenizer(map(str, range(30)))
    examples = encode_pairs(pairs, tokenizer, max_tokens=9, max_pairs=10**6, seed=0)
    assert len(examples) == 30 * 29 // 2
    assert sorted(calls) == sorted(f"{n}" for n in range(30))


# --- crops

REVIEW = "  A long, long film.\n\nIt has\ttabs ; and 12 words - don't it?"


def crops_of(pairs, span, monkeypatch, seed=0):
    """(prompt, text) of each text that was made, in turn a chosen and a rejected one."""
    seen = []

    def whole_text(tokenizer, prompt, text):
        seen.append((prompt, text))
        return chat.Text(text, False)

    monkeypatch.setattr("minalign.data.pairs.whole_text", whole_text)
    limits = dict(max_tokens=99, max_pairs=10**6)
    encode_pairs(pairs, make_tokenizer(), **limits, seed=seed, crop_words=span)
    return seen


@pytest.mark.parametrize(
    "prompt",
    ["", "one two three four five six seven", [{"role": "user", "content": "one two three four"}]],
)
@pytest.mark.parametrize("span", [(2, 5), (1, 1), (3, 30)])
def test_a_crop_is_a_beginning_of_so_many_words(prompt, span, monkeypatch):
    crops = crops_of([Pair(prompt, REVIEW, REVIEW[2:])] * 300, span, monkeypatch)
    assert {str(p) for p, _ in crops} == {str(prompt)}, "prompts are never cropped"
    words = len(REVIEW.split())
    for _, crop in crops:
        assert crop and (REVIEW.startswith(crop) or REVIEW[2:].startswith(crop))
        assert crop.split() == REVIEW.split()[: len(crop.split())], "whole words"
    counts = {len(crop.split()) for _, crop in crops}
    # every length occurs, both ends included
    assert counts == set(range(span[0], min(span[1], words) + 1))


def test_crops_are_drawn_anew_for_each_text_and_by_the_seed(monkeypatch):
    pairs = [Pair("p", REVIEW, REVIEW)] * 50
    lengths = [len(text.split()) for _, text in crops_of(pairs, (1, 12), monkeypatch)]
    chosen, rejected = lengths[0::2], lengths[1::2]
    assert len(set(chosen)) > 6 and chosen != rejected
    assert (
        crops_of(pairs, (1, 12), monkeypatch)
        == crops_of(pairs, (1, 12), monkeypatch)
        != crops_of(pairs, (1, 12), monkeypatch, seed=1)
    )
    assert [text for _, text in crops_of(pairs, None, monkeypatch)] == [REVIEW] * 100


def test_a_short_text_stays_whole(monkeypatch):
    crops = crops_of([Pair("p", "two words", "x")] * 5, (7, 9), monkeypatch)
    assert {text for _, text in crops} == {"two words", "x"}


# --- order


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
    streams = [shuffled_forever(items, seed=seed) for seed in (1, 0)]
    other, again = ([next(stream) for _ in items] for stream in streams)
    assert first == again and len({tuple(order) for order in (items, first, second, other)}) == 4


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_parts_hold_every_row_once_longest_first(max_rows):
    lengths = torch.randint(1, 2000, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = length_parts(lengths, max_rows)
    assert sorted(i for part in parts for i in part) == list(range(57))
    assert max(map(len, parts)) <= max_rows
    in_order = [lengths[i] for part in parts for i in part]
    assert in_order == sorted(lengths, reverse=True)
    real, padded = sum(lengths), sum(len(part) * lengths[part[0]] for part in parts)
    assert padded < 1.25 * real + 1024 * (max_rows > 1)


def test_few_tokens_are_not_split():
    assert length_parts([40, 3, 1, 9], 8) == [[0, 3, 1, 2]]
    assert length_parts([], 8) == []
