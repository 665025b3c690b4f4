"""Pairs and prompts: every source reads alike, bad rows are named, splits hold, and texts become ids in one way."""

import gzip
import json
import random
import time
import tracemalloc
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minalign.common import UserError
from minalign.data import (
    Pair, RatedPairs, encode, encode_pairs, held_out, length_grouped_batches, load_pairs, load_prompts, pad, read_rows,
    shuffled_forever,
)  # fmt: skip

datasets = pytest.importorskip("datasets")  # the one package that a GPU machine may lack


@pytest.fixture(autouse=True)
def no_traces_in_the_home_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# --- sources ---------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"film {n}: naïve, \"quoted\"\nand two lines", "rating": n / 2} for n in range(5)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved", "saved-splits"])
def test_every_source_reads_alike(name, tmp_path):
    path, table = tmp_path / name, datasets.Dataset.from_list(ROWS)
    if name == "saved":
        table.save_to_disk(path)
    elif name == "saved-splits":
        datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(path)
    elif name == "a.csv":
        table.to_csv(path)
    elif name == "a.parquet":
        table.to_parquet(path)
    elif name == "a.json":
        path.write_text(json.dumps(ROWS))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert [dict(row) for row in read_rows(str(path), "test")] == ROWS


@pytest.mark.parametrize("row, pair", [
    ({"chosen": "a", "rejected": "b"}, Pair("", "a", "b")),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Pair("p", "a", "b")),
    ({"prompt": "", "chosen": "a", "rejected": "b", "margin": 2}, Pair("", "a", "b", None, None, 2.0)),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 1}, Pair("p", "a", "b", 4.0, 1.0)),
])  # fmt: skip
def test_columns_of_a_pair(row, pair, tmp_path):
    others = [{**row, "prompt": f"other {n}", "chosen": f"good {n}"} for n in range(40)]
    if "prompt" not in row:
        others = [{k: v for k, v in other.items() if k != "prompt"} for other in others]
    train, held = load_pairs(write_jsonl(tmp_path / "a.jsonl", [row, *others]), eval_share=0.3)
    assert pair in [*train, *held] and len(train) + len(held) == 41


@pytest.mark.parametrize("column", ["rating", "label"])
def test_rated_texts_become_pairs_within_each_part(column, tmp_path):
    rows = [{"text": f"film {n}", column: n % 5} for n in range(60)]
    train, held = load_pairs(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3, min_rating_gap=2)
    texts = [{text for pair in part for text in (pair.chosen, pair.rejected)} for part in (train, held)]
    assert texts[0].isdisjoint(texts[1]) and len(texts[0]) + len(texts[1]) == 60
    assert all(pair.chosen_rating - pair.rejected_rating >= 2 for part in (train, held) for pair in part)


def test_prompts_come_once_each_from_prompt_or_text(tmp_path):
    texts = [f"film {n}" for n in range(50)]
    for column in ("prompt", "text"):
        train, held = load_prompts(write_jsonl(tmp_path / "a.jsonl", [{column: text} for text in texts * 2]), eval_share=0.3)
        assert sorted(train + held) == sorted(texts)


# --- bad input -------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("rows, message", [
    ([], "no rows"),
    ([{"prompt": "p", "chosen": "a"}], r"columns \['chosen', 'prompt'\]: expected chosen and rejected, or text and rating"),
    ([PAIR, PAIR, {**PAIR, "chosen": "  "}], "row 3: column 'chosen': got an empty text"),
    ([PAIR, {**PAIR, "rejected": 7}], "row 2: column 'rejected': got int 7"),
    ([PAIR, {"prompt": "p", "chosen": "a"}], "row 2: column 'rejected': got NoneType"),
    ([PAIR, {**PAIR, "prompt": None}], "row 2: column 'prompt': got NoneType"),
    ([{**PAIR, "margin": 1}, {**PAIR, "margin": "wide"}], "row 2: column 'margin': got 'wide', expected a number"),
    ([{"text": "a", "rating": 1}, {"text": "b", "rating": True}], "row 2: column 'rating': got True, expected a number"),
    (['{"text": "a", "rating": 1}', '{"text": "b", "rating": NaN}'], "row 2: column 'rating': got nan, expected a number"),
    ([PAIR, '{"prompt": "p", '], "row 2: not JSON"),
    ([PAIR, PAIR, '["p", "a", "b"]'], r'row 3: got \["p", "a", "b"\], expected \{"column": value'),
    ([PAIR], "expected both, so more rows"),
])  # fmt: skip
def test_bad_pairs_are_named(rows, message, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=f"^{path}: .*{message}") as error:
        load_pairs(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", ['{"prompt": 7}', '{"prompt": ', "[]"])
def test_blank_lines_are_no_rows(bad, tmp_path):
    with pytest.raises(UserError, match="row 2"):
        load_prompts(write_jsonl(tmp_path / "a.jsonl", ['{"prompt": "p"}', "", bad]))


@pytest.mark.parametrize("rows, message", [
    ([{"question": "p"}], r"columns \['question'\]: expected prompt"),
    ([{"prompt": "p"}, {"prompt": ""}], "row 2: column 'prompt': got an empty text"),
    ([{"prompt": "p"}], "expected both, so more rows"),
])  # fmt: skip
def test_bad_prompts_are_named(rows, message, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        load_prompts(path)


def test_bad_files_are_named(tmp_path):
    for name in ("no.gz", "no.jsonl.gz", "no.jsonl", "no.txt", "no.json", "no.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match=f"^{tmp_path / name}"):
            read_rows(str(tmp_path / name))
    for missing in (f"{tmp_path}/missing.jsonl", "missing.csv", "./missing", "a/b/c"):
        with pytest.raises(UserError, match=f"^{missing}: no such file"):
            read_rows(missing)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="split test"):
        read_rows(str(tmp_path / "saved"), "test")


# --- rated pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_gap", [0.0, 0.25, 1.0, 1.75, 3.0])
def test_rated_pairs_are_those_of_a_double_loop(min_gap):
    rng = random.Random(0)
    texts, ratings = [f"text {n}" for n in range(40)], [rng.randrange(12) / 4 for _ in range(40)]  # with ties, exact in binary
    rated = dict(zip(texts, ratings))
    expected = Counter(
        Pair("", a, b, rated[a], rated[b])
        for a in texts
        for b in texts
        if rated[a] > rated[b] and rated[a] - rated[b] >= min_gap
    )
    assert Counter(RatedPairs(texts, ratings, min_gap)) == expected


def test_a_gap_of_exactly_the_minimum_is_a_pair():
    """Of decimal ratings, too: the bound 1.2 - 1.0 would round to less than 0.2."""
    assert len(RatedPairs(["a", "b"], [1.2, 0.2], min_gap=1.0)) == 1


def test_156_million_pairs_cost_one_list():
    texts, ratings = [f"text {n}" for n in range(25_000)], [n % 2 for n in range(25_000)]
    tracemalloc.start()
    began = time.monotonic()
    pairs = RatedPairs(texts, ratings, min_gap=1.0)
    assert len(pairs) == 156_250_000
    for k in (0, 1, 78_125_001, 156_249_999):
        assert (pairs[k].chosen_rating, pairs[k].rejected_rating) == (1, 0)
    assert len({pairs[k][1:3] for k in range(0, len(pairs), 1_000_003)}) == 157
    assert time.monotonic() - began < 2 and tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    for beyond in (156_250_000, 10**9):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_no_pairs_without_a_gap():
    assert len(RatedPairs(["a", "b"], [1.0, 1.0], 0.0)) == len(RatedPairs([], [], 1.0)) == 0


# --- split -----------------------------------------------------------------------------------------------------------


def test_pairs_and_prompts_are_split_alike_by_prompt(tmp_path):
    """A prompt that the reward model was trained on is never one that the policy is judged on (A13)."""
    prompts = [f"prompt {n}" for n in range(1000)]
    rows = [{"prompt": p, "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(3) for p in prompts]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train_pairs, held_pairs = load_pairs(path, eval_share=0.2, seed=3)
    train_prompts, held_prompts = load_prompts(path, eval_share=0.2, seed=3)
    assert {pair.prompt for pair in train_pairs} == set(train_prompts)
    assert {pair.prompt for pair in held_pairs} == set(held_prompts)
    assert set(train_prompts).isdisjoint(held_prompts)
    assert 150 < len(held_prompts) < 250
    assert set(load_prompts(path, eval_share=0.2, seed=4)[1]) != set(held_prompts)


def test_the_split_is_the_same_on_every_machine():
    """Pinned: were it another in the next process or version, old runs would be judged on their training data."""
    assert [n for n in range(60) if held_out(f"prompt {n}", seed=0, share=0.1)] == [4, 8, 30, 34, 40, 45, 47]
    assert not held_out("prompt", 0, 0.0) and held_out("prompt", 0, 1.0)


# --- texts to ids ----------------------------------------------------------------------------------------------------


def make_tokenizer(template="$A", begin="<s>", end="</s>"):
    """Words of one letter; `template` is what the tokenizer adds by itself."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate("abcdef")}}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_text_begins_once_and_ends_once_or_not_at_all(template):
    tokenizer = make_tokenizer(template)
    assert encode(tokenizer, "a b", end=True) == [0, 2, 3, 1]
    assert encode(tokenizer, "a b", end=False) == [0, 2, 3]
    assert encode(tokenizer, "", end=True) == [0, 1]
    assert encode(tokenizer, "", end=False) == [0]


@pytest.mark.parametrize("template", ["$A", "</s> $A"])
def test_one_token_that_is_begin_and_end(template):
    tokenizer = make_tokenizer(template, begin="</s>")
    assert encode(tokenizer, "a", end=True) == [1, 2, 1]
    assert encode(tokenizer, "a", end=False) == [1, 2]
    assert encode(tokenizer, "", end=False) == [1]


def test_tokens_that_a_tokenizer_lacks_are_left_out():
    assert encode(make_tokenizer(begin=None), "a", end=True) == [2, 1]
    assert encode(make_tokenizer(end=None), "a", end=True) == [0, 2]


@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
def test_special_tokens_written_in_the_text_are_not_doubled(template):
    """Text from a chat template holds them already (A2)."""
    assert encode(make_tokenizer(template), "<s> a b </s>", end=True) == [0, 2, 3, 1]
    assert encode(make_tokenizer(template), "<s> a </s> b", end=False) == [0, 2, 1, 3], "those inside stay"


@pytest.mark.parametrize("side, ids, mask", [
    ("left", [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]),
    ("right", [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
])  # fmt: skip
def test_padding_goes_to_the_side_asked_for(side, ids, mask, device):
    rows = [[2, 3, 4], [5]]
    got = pad(rows, side, device)
    assert [tensor.tolist() for tensor in got] == [ids, mask] and got[0].device.type == device.type
    assert rows == [[2, 3, 4], [5]]


def test_identical_and_over_long_pairs_are_dropped_and_counted(capsys):
    tokenizer = make_tokenizer()
    pairs = [
        Pair("a", " b", " c"),
        Pair("a", " b", " b"),  # identical
        Pair("a", " b", " b "),  # identical as ids
        Pair("a b", " c d", " c d"),
        Pair("a", " b c d e", " b"),  # with begin and end one token too long, on either side
        Pair("a", " b", " b c d e"),
        Pair("a", " b c d", " b c e"),  # just fits; cutting would have made it identical
    ]
    encode_text = lambda prompt, completion: encode(tokenizer, prompt + completion, end=True)  # noqa: E731
    examples = encode_pairs(pairs, encode_text, max_tokens=6, max_pairs=10, seed=0)
    assert examples == [([0, 2, 3, 1], [0, 2, 4, 1], pairs[0]), ([0, 2, 3, 4, 5, 1], [0, 2, 3, 4, 6, 1], pairs[6])]
    assert "kept 2 of 7 pairs: 3 identical and 2 longer than 6 tokens dropped" in capsys.readouterr().out


def test_pairs_beyond_the_maximum_are_drawn_by_the_seed():
    pairs = RatedPairs([str(n) for n in range(2000)], list(range(2000)), min_gap=1)
    draw = lambda seed: encode_pairs(pairs, lambda _, text: [int(text)], max_tokens=9, max_pairs=50, seed=seed)  # noqa: E731
    assert draw(0) == draw(0) != draw(1)
    assert len({(e.chosen[0], e.rejected[0]) for e in draw(0)}) == 50


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
