"""Ranked lists, probabilities, and a split that no text is on both sides of."""

import json
import math
import random

import pytest
from messages import assistant, user
from tiny_runs import tiny_model

import train_rm
from minalign.data import tokens, toy
from minalign.data.columns import Pair, Ranking
from minalign.data.pairs import encode_pairs, load_pairs
from minalign.data.prompts import load_prompts
from minalign.data.splits import Split, held_out
from minalign.data.toy import make_tokenizer
from minalign.running.errors import UserError

COUNT = 40
ASKED, TALK = [user("Why {n}?")], "\n\nHuman: Why {n}?\n\nAssistant:"
THREE = "Good {n}.", "So-so {n}.", "Bad {n}."
SPACED = tuple(f" {text}" for text in THREE)
FORMS = {  # row -> as text, and as chat
    "no prompt": ({"ranked": [*THREE]}, ("", THREE), ("", THREE)),
    "text": ({"prompt": "Why {n}?", "ranked": [*SPACED]}, ("Why {n}?", SPACED), (ASKED, THREE)),
    "dialogues": (
        {"ranked": [[*ASKED, assistant(text)] for text in THREE]},
        (TALK, SPACED),
        (ASKED, THREE),
    ),
    "hh-rlhf": ({"ranked": [TALK + text for text in SPACED]}, (TALK, SPACED), (ASKED, THREE)),
    "messages": (
        {"prompt": ASKED, "ranked": [[assistant(text)] for text in THREE]},
        (TALK, SPACED),
        (ASKED, THREE),
    ),
    "one message each": (
        {"prompt": ASKED, "ranked": [assistant(text) for text in THREE]},
        (TALK, SPACED),
        (ASKED, THREE),
    ),
}


def filled(value, n):
    if isinstance(value, str):
        return value.replace("{n}", str(n))
    if isinstance(value, dict):
        return {key: filled(part, n) for key, part in value.items()}
    return (
        type(value)(filled(part, n) for part in value)
        if isinstance(value, (list, tuple))
        else value
    )


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Rows, or splits of rows -> (training, held-out) items of d.jsonl."""
    monkeypatch.chdir(tmp_path)

    def load(rows, chat=False, share=0.3, **options):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_pairs(Split("d.jsonl", eval_share=share), chat=chat, **options)

    return load


def rows_of(row, count=COUNT):
    return [filled(row, n) for n in range(count)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_ranked_list(form, chat, read, capsys):
    row, *expected = FORMS[form]
    train, held = read(rows_of(row), chat)
    assert 5 < len(held) < 25
    items = [Ranking(*filled(expected[chat], n)) for n in range(COUNT)]
    assert sorted([*train, *held], key=str) == sorted(items, key=str)
    how = ", as chat" if chat and form != "no prompt" else ""
    how += f", {COUNT} of {COUNT} without a prompt" * (form == "no prompt")
    counts = f"{len(train)} training and {len(held)} held-out lists"
    assert f"d.jsonl: read as ranked, 3 texts each{how}: {counts}" in capsys.readouterr().out
    if "prompt" in row:  # the policy's split is the same
        prompts = load_prompts(Split("d.jsonl", eval_share=0.3), chat=chat)
        assert [[item.prompt for item in part] for part in (train, held)] == [*prompts[:2]]


def test_two_ranked_texts_are_a_pair(read):
    train, held = read(rows_of({"prompt": "Why {n}?", "ranked": [" a {n}", " b {n}"]}))
    expected = {Pair(f"Why {n}?", f" a {n}", f" b {n}") for n in range(COUNT)}
    assert {*train, *held} == expected


def test_responses_are_sorted_by_their_ratings(read, capsys):
    row = {"prompt": "Why {n}?", "responses": [*THREE], "ratings": [2, "7.5", -1]}
    for part in read(rows_of(row) + rows_of(row | {"prompt": "How {n}?"})):
        for item in part:
            n = item.prompt.split()[1][:-1]
            assert item.answers == (f"So-so {n}.", f"Good {n}.", f"Bad {n}.")
            assert item.ratings == (7.5, 2.0, -1.0)
    assert "read as responses ranked by ratings, 3 texts each: " in capsys.readouterr().out


def test_equal_ratings_drop_their_pair_and_are_counted(read, capsys):
    """Four texts of three ratings: five pairs are left of six, each with its ratings and gap."""
    tied = {"prompt": "Why {n}?", "responses": ["a", "b", "c", "d"], "ratings": [3, 1, 3, 2]}
    clear = {"prompt": "How {n}?", "responses": ["a", "b", "c"], "ratings": [1, 2, 3]}
    parts = read(rows_of(tied, 20) + rows_of(clear, 30))
    found = [item for part in parts for item in part]
    pairs = [item for item in found if isinstance(item, Pair)]
    assert len(found) == 20 * 5 + 30 and len(pairs) == 100
    by_hand = {
        ("a", "d", 3, 2),
        ("a", "b", 3, 1),
        ("c", "d", 3, 2),
        ("c", "b", 3, 1),
        ("d", "b", 2, 1),
    }
    assert {pair[1:5] for pair in pairs} == by_hand
    assert all(pair.gap == pair.chosen_rating - pair.rejected_rating for pair in pairs)
    out = capsys.readouterr().out
    assert (
        "20 pairs of equal ratings dropped: 20 rows with them train as their 100 other pairs" in out
    )
    for part, other in (parts, parts[::-1]):  # a row's pairs stay together
        assert {item.prompt for item in part}.isdisjoint(item.prompt for item in other)


LIST = {"prompt": "Why {n}?", "ranked": ["a", "b", "c"]}
RATED = {"prompt": "Why {n}?", "responses": ["a", "b", "c"], "ratings": [3, 1, 2]}
BAD_ROWS = [
    (LIST, {"ranked": ["a"]}, "column 'ranked': got a list of 1, expected a list of two"),
    (LIST, {"ranked": []}, "column 'ranked': got a list of 0, expected a list of two"),
    (LIST, {"ranked": None}, "column 'ranked': got NoneType, expected a list"),
    (LIST, {"ranked": "a"}, "column 'ranked': got str, expected a list"),
    (LIST, {"ranked": {"a": 1}}, "column 'ranked': got dict, expected a list"),
    (LIST, {"ranked": ["a", "b", "a"]}, "column 'ranked': a text twice"),
    (LIST, {"ranked": ["é", "b", "é"]}, "column 'ranked': a text twice"),
    (LIST, {"ranked": ["a", " ", "b"]}, "an empty answer"),
    (LIST, {"ranked": ["a", 7, "b"]}, "column 'ranked': got int, expected a text"),
    (LIST, {"ranked": ["a", None, "b"]}, "column 'ranked': got NoneType, expected a text"),
    (LIST, {"ranked": ["a", "\ud83d", "b"]}, "column 'ranked': has half a character"),
    (LIST, {"prompt": None}, "column 'prompt': got NoneType, expected a text"),
    (
        LIST,
        {"prompt": "", "ranked": [[user(asked), assistant("a")] for asked in "xy"]},
        "those of 'ranked' answer different prompts",
    ),
    (RATED, {"ratings": [1, 2]}, "column 'ratings': got 2 ratings, expected one for each of 3"),
    (RATED, {"ratings": []}, "column 'ratings': got 0 ratings, expected one for each of 3"),
    (RATED, {"ratings": None}, "column 'ratings': got NoneType, expected one for each of 3"),
    (RATED, {"ratings": 4}, "column 'ratings': got int, expected one for each of 3"),
    (RATED, {"ratings": [1, float("nan"), 2]}, "column 'ratings': got nan, expected a number"),
    (RATED, {"ratings": [1, float("inf"), 2]}, "column 'ratings': got inf, expected a number"),
    (RATED, {"ratings": [1, True, 2]}, "column 'ratings': got bool, expected a number"),
    (RATED, {"ratings": [1, None, 2]}, "column 'ratings': got NoneType, expected a number"),
    (RATED, {"ratings": [2, 2, 2]}, "column 'ratings': all are equal"),
    (RATED, {"responses": ["a", "a", "b"]}, "column 'responses': a text twice"),
    (RATED, {"responses": ["a"], "ratings": [1]}, "column 'responses': got a list of 1"),
]


@pytest.mark.parametrize("row, bad, reason", BAD_ROWS, ids=str)
def test_lists_of_no_use_are_dropped_and_counted(row, bad, reason, read, capsys):
    rows = rows_of(row)
    rows[11] = rows[11] | bad
    train, held = read(rows)
    assert len(train) + len(held) == COUNT - 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert line.startswith(f"d.jsonl: 1 rows dropped: {reason}") and line.endswith(
        "(first: row 12)"
    )
    with pytest.raises(UserError, match="21 of 40 are of no use: .*first: row 1") as error:
        read([rows[n] | bad if n < 21 else rows[n] for n in range(COUNT)])
    assert "\n" not in str(error.value)


def test_columns_that_do_not_go_together_are_refused(read):
    pair = {"chosen": "a", "rejected": "b"}
    for row, options, message in (
        (LIST | pair, {}, "d.jsonl: has both ranked and chosen: expected one of them"),
        (RATED | pair, {}, "d.jsonl: has both responses and chosen: expected one of them"),
        (LIST | RATED, {}, "d.jsonl: has both ranked and responses: expected one of them"),
        (LIST | {"probability": 1}, {}, "a column probability beside ranked: it is of pairs"),
        (RATED | {"probability": 1}, {}, "a column probability beside responses: it is of pairs"),
        (LIST, {"needs": "ratings"}, "have no ratings: --rating-coef needs responses and ratings"),
        (LIST, {"needs": "margin"}, "have no ratings: --margin needs responses and ratings"),
        ({"responses": ["a", "b"]}, {}, "expected chosen and rejected.* responses and ratings"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(rows_of(row), **options)
        assert "\n" not in str(error.value)


def test_what_is_beside_a_ranked_list_is_named(read, capsys):
    read(rows_of(LIST | {"ratings": [1, 2, 3], "id": 7}))
    assert "columns not read: ['id', 'ratings']" in capsys.readouterr().out
    read(rows_of({"prompt": "{n}", "chosen": "a", "rejected": "b", "responses": ["a", "b"]}))
    assert "columns not read: ['responses']" in capsys.readouterr().out


# --- probabilities

SOFT = {
    "prompt": "Why {n}?",
    "chosen": "a {n}",
    "rejected": "b {n}",
    "chosen_rating": 4,
    "rejected_rating": 1,
    "margin": 2,
}


def test_the_likelier_text_comes_first_and_is_counted(read, capsys):
    rows = rows_of(SOFT)
    for n, row in enumerate(rows):
        row["probability"] = [0.75, "0.25", 0.5, 0, 1][n % 5]
    found = {item.prompt: item for part in read(rows) for item in part}
    for n in range(COUNT):
        a, b, pair = f"a {n}", f"b {n}", found[f"Why {n}?"][1:]
        one, other = (a, b, 4.0, 1.0, 2.0), (b, a, 1.0, 4.0, -2.0)
        assert pair == [(*one, 0.75), (*other, 0.75), (*one, 0.5), (*other, 1), (*one, 1)][n % 5]
    out = capsys.readouterr().out
    note = "16 rows: probability below .5: rejected is taken for the better one (first: row 2)"
    assert f"d.jsonl: {note}" in out
    assert "read as chosen / rejected rated by chosen_rating, margin, probability" in out


@pytest.mark.parametrize(
    "bad", [62, 1.01, -0.1, True, None, float("nan"), float("inf"), "N/A", "", [0.5]], ids=str
)
def test_what_is_no_probability_drops_its_row(bad, read, capsys):
    rows = rows_of(SOFT | {"probability": 0.8})
    rows[4]["probability"] = bad
    train, held = read(rows)
    assert len(train) + len(held) == COUNT - 1
    out = capsys.readouterr().out
    assert "1 rows dropped: column 'probability': got " in out and "(first: row 5)" in out
    with pytest.raises(UserError, match="40 of 40 are of no use: .*'probability'"):
        read(rows_of(SOFT | {"probability": bad}))


def test_smoothing_is_of_the_labels_that_train():
    """(1 - e) p + e (1 - p), by hand."""
    pairs = [Pair("overall , the plot is", " good .", " bad .", probability=p) for p in (1.0, 0.7)]
    limits = dict(max_tokens=60, max_pairs=9, seed=0)
    plain = encode_pairs(pairs, make_tokenizer(), **limits)
    assert [example.probability for example in plain] == [1.0, 0.7]
    smooth = encode_pairs(pairs, make_tokenizer(), **limits, label_smoothing=0.1)
    assert [example.probability for example in smooth] == pytest.approx([0.9, 0.66])
    assert plain.fingerprint() != smooth.fingerprint()


# --- lists as token ids


@pytest.mark.parametrize("size", [10**9, 0])
def test_lists_of_any_length_keep_their_texts(size, tmp_path, monkeypatch, capsys):
    """From memory, written and read again; what is too long or twice the same is counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokens, "KEPT_FROM", size)
    words = "good bad fine odd weak dull".split()
    lists = [
        Ranking("the plot is", tuple(f" {word}" for word in words[: 2 + n % 4])) for n in range(9)
    ]
    lists[4] = Ranking("the plot is", (" good", " bad", " good "))  # the same ids
    lists[5] = Ranking("the plot is", (" good", " bad" * 20, " odd"))
    for _ in range(2):
        tokenizer = make_tokenizer()
        found = encode_pairs(lists, tokenizer, max_tokens=12, max_pairs=99, seed=0)
        assert "kept 7 of 9 lists: 1 identical and 1 longer than 12" in capsys.readouterr().out
        kept = [n for n in range(9) if n not in (4, 5)]
        expected = [
            [tokenizer(f"<s> the plot is{answer} </s>")["input_ids"] for answer in lists[n].answers]
            for n in kept
        ]
        assert [example.texts for example in found] == expected
        assert found.lengths.tolist() == [
            [len(text) for text in texts] + [0] * (5 - len(texts)) for texts in expected
        ]


# --- no text on both sides


def sides_of(parts):
    return [{text.strip() for item in part for text in item.answers} for part in parts]


@pytest.mark.parametrize("per_text", [1, 2, 6])
def test_no_text_of_bare_pairs_is_on_both_sides(per_text, read, capsys):
    """Texts in one pair, in a few, in many: the chosen one's hash decides which are held out."""
    rng, texts = random.Random(0), [f"text {n}" + " " * (n % 2) for n in range(300)]
    rows = []
    for _ in range(150 * per_text):
        one, other = rng.sample(texts, 2)
        rows.append({"chosen": one, "rejected": other})
    train, held = read(rows, share=0.1)
    one, other = sides_of((train, held))
    assert one and other and one.isdisjoint(other)
    expected = [row for row in rows if held_out(row["chosen"].strip(), 0, 0.1)]
    assert [list(pair.answers) for pair in held] == [list(row.values()) for row in expected]
    lost = len(rows) - len(train) - len(held)
    assert f"d.jsonl: {lost} rows dropped: a text of theirs is held out" in capsys.readouterr().out
    again = read(rows[::-1], share=0.1)
    assert [sorted(part) for part in again] == [sorted(train), sorted(held)]


def test_no_text_of_bare_lists_is_on_both_sides(read):
    rng, texts = random.Random(1), [f"text {n}" for n in range(400)]
    rows = [{"ranked": rng.sample(texts, rng.randint(2, 5))} for _ in range(150)]
    rows += [{"ranked": [f"lone {n}", f"alone {n}"]} for n in range(50)]
    parts = read(rows, share=0.1)
    one, other = sides_of(parts)
    assert one.isdisjoint(other) and min(map(len, parts)) > 5


def test_pairs_of_which_all_share_a_text_are_refused(read):
    rows = [{"chosen": f"text {n}", "rejected": "the same"} for n in range(40)]
    with pytest.raises(
        UserError, match="all of --split train shares texts with the pairs held out"
    ):
        read(rows)


def test_no_text_of_the_split_held_out_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = [{"chosen": f"a {n}", "rejected": f"b {n}"} for n in range(20)]
    test = [{"chosen": "b 3 ", "rejected": "new"}, {"chosen": "other", "rejected": "a 5"}]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = load_pairs(Split(".", eval_split="test"))
    assert [len(part) for part in parts] == [18, 2]
    one, other = sides_of(parts)
    assert one.isdisjoint(other)
    assert "2 rows dropped: in the held-out split, too" in capsys.readouterr().out


def test_without_texts_in_common_nothing_is_dropped(read, capsys):
    rows = [{"chosen": f"a {n}", "rejected": f"b {n}"} for n in range(200)]
    train, held = read(rows, share=0.1)
    assert len(train) + len(held) == 200 and math.isclose(len(held), 20, abs_tol=10)
    assert "dropped" not in capsys.readouterr().out


# --- a run


@pytest.mark.parametrize("loss", ["bradley-terry", pytest.param("ordinal", marks=pytest.mark.slow)])
def test_lists_of_any_length_train_and_resume_bit_for_bit(loss, tmp_path, monkeypatch):
    """And flags that are of pairs alone are refused."""
    monkeypatch.chdir(tmp_path)
    rng, (model, tokenizer) = random.Random(0), tiny_model()
    for part in (model, tokenizer):
        part.save_pretrained("start")
    rows = []
    for n in range(60):
        prompt = toy.write_prompt(rng)
        answers = list({toy.write_completion(rng, prompt): None for _ in range(2 + n % 3)})
        ratings = [max(1, min(10, 5 + toy.gold_reward(prompt + text))) for text in answers]
        rows.append({"prompt": prompt, "responses": answers, "ratings": ratings})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--model start --dataset d.jsonl --eval-share 0.3 --device cpu --batch-size 8 --lr 0.01"
    flags = [*flags.split(), "--loss", loss, "--save-every", "2"]
    flags += ["--rating-coef", "0.5"] * (loss == "ordinal")
    train_rm.main([*flags, "--steps", "4", "--micro-batch-size", "3", "--out", "whole"])
    with pytest.raises(KeyboardInterrupt):
        with monkeypatch.context() as patch:
            real, calls = train_rm.pair_losses, []

            def losses(*args):
                calls.append(0)
                if len(calls) > 7:
                    raise KeyboardInterrupt
                return real(*args)

            patch.setattr(train_rm, "pair_losses", losses)
            train_rm.main([*flags, "--steps", "4", "--micro-batch-size", "3", "--out", "parts"])
    train_rm.main([*flags, "--steps", "4", "--micro-batch-size", "3", "--out", "parts", "--resume"])
    logs = []
    for folder in ("whole", "parts"):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        logs.append([{**json.loads(line), "seconds": 0} for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert {"eval_longer_wins", "eval_length_corr"} <= logs[0][-1].keys()
    for flag in ("--margin", "--label-smoothing"):
        if loss == "ordinal" and flag == "--margin":
            continue
        with pytest.raises(UserError, match=f"^{flag}: is of pairs, and d.jsonl ranks up to 4"):
            train_rm.main([*flags, flag, "0.1", "--out", "refused"])
