"""Pairs and prompts: every form of data reads alike, and bad rows are named.

What one script holds out, no other trains on.
"""

import gzip
import json
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from messages import assistant, system, user

from minalign.data.columns import Pair
from minalign.data.messages import first_turn, to_text
from minalign.data.pairs import RatedPairs, load_pairs
from minalign.data.prompts import load_prompts
from minalign.data.splits import Split, held_out
from minalign.running.errors import UserError

datasets = pytest.importorskip("datasets")  # the one package that a GPU machine may lack


@pytest.fixture(autouse=True)
def no_traces_in_the_home_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


# --- forms of pairs

HH = "\n\nHuman: Why {n}?\n\nAssistant: How so?\n\nHuman: Just so.\n\nAssistant:"
HH_TURNS = [user("Why {n}?"), assistant("How so?"), user("Just so.")]
TAGGED = "Why {n}?\n<extra_id_1>Assistant\nHow so?\n<extra_id_1>User\nJust so."
ASKED, TALK = [user("Why {n}?")], "\n\nHuman: Why {n}?\n\nAssistant:"

# row, with {n} for its number -> the pair as text, and as chat
FORMS = {
    "no prompt": (
        {"chosen": "Good {n}.", "rejected": "Bad {n}."},
        Pair("", "Good {n}.", "Bad {n}."),
        Pair("", "Good {n}.", "Bad {n}."),
    ),
    "text": (
        {"prompt": "Why {n}?", "chosen": " Good {n}.", "rejected": " Bad {n}."},
        Pair("Why {n}?", " Good {n}.", " Bad {n}."),
        Pair(ASKED, "Good {n}.", "Bad {n}."),
    ),
    "empty prompt, margin": (
        {"prompt": "", "chosen": "Good {n}.", "rejected": "Bad {n}.", "margin": 2},
        Pair("", "Good {n}.", "Bad {n}.", None, None, 2.0),
        Pair("", "Good {n}.", "Bad {n}.", None, None, 2.0),
    ),
    "rated text": (
        {
            "prompt": "Why {n}?",
            "chosen": " Good {n}.",
            "rejected": " Bad {n}.",
            "rating_chosen": 5,
            "rating_rejected": 2.5,
        },
        Pair("Why {n}?", " Good {n}.", " Bad {n}.", 5.0, 2.5),
        Pair(ASKED, "Good {n}.", "Bad {n}.", 5.0, 2.5),
    ),
    "HelpSteer": (  # one user's turn that holds all turns
        {
            "prompt": TAGGED,
            "chosen": [user(TAGGED), assistant("Good {n}.")],
            "rejected": [user(TAGGED), assistant("Bad {n}.")],
            "chosen_rating": 4,
            "rejected_rating": 1,
        },
        Pair(HH, " Good {n}.", " Bad {n}.", 4.0, 1.0),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}.", 4.0, 1.0),
    ),
    "HelpSteer as text": (
        {"prompt": TAGGED, "chosen": "Good {n}.", "rejected": "Bad {n}."},
        Pair(HH, " Good {n}.", " Bad {n}."),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}."),
    ),
    "UltraFeedback": (  # the prompt is in the messages
        {
            "chosen": [*ASKED, assistant("Good {n}.")],
            "rejected": [*ASKED, assistant("Bad {n}.")],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        Pair(TALK, " Good {n}.", " Bad {n}.", 8.5, 3.0),
        Pair(ASKED, "Good {n}.", "Bad {n}.", 8.5, 3.0),
    ),
    "UltraFeedback, prompt and messages": (
        {
            "prompt": "Why {n}?",
            "prompt_id": "x",
            "messages": [*ASKED, assistant("Good {n}.")],
            "chosen": [*ASKED, assistant("Good {n}.")],
            "rejected": [*ASKED, assistant("Bad {n}.")],
            "chosen_score": 1,
            "rejected_score": 2,
        },
        Pair(TALK, " Good {n}.", " Bad {n}.", 1.0, 2.0),
        Pair(ASKED, "Good {n}.", "Bad {n}.", 1.0, 2.0),
    ),
    "system turn": (
        {
            "chosen": [system("Short."), *ASKED, assistant("Good {n}.")],
            "rejected": [system("Short."), *ASKED, assistant("Bad {n}.")],
        },
        Pair("\n\nSystem: Short." + TALK, " Good {n}.", " Bad {n}."),
        Pair([system("Short."), *ASKED], "Good {n}.", "Bad {n}."),
    ),
    "prompt as messages": (
        {
            "prompt": HH_TURNS,
            "chosen": [assistant("Good {n}.")],
            "rejected": [assistant("Bad {n}.")],
        },
        Pair(HH, " Good {n}.", " Bad {n}."),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}."),
    ),
    "prompt as messages, answers as text": (
        {"prompt": HH_TURNS, "chosen": "Good {n}.", "rejected": "Bad {n}."},
        Pair(HH, " Good {n}.", " Bad {n}."),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}."),
    ),
    "prompt as text, answers as messages": (
        {
            "prompt": "Why {n}?",
            "chosen": [assistant("Good {n}.")],
            "rejected": [assistant("Bad {n}.")],
        },
        Pair(TALK, " Good {n}.", " Bad {n}."),
        Pair(ASKED, "Good {n}.", "Bad {n}."),
    ),
    "hh-rlhf": (
        {"chosen": HH + " Good {n}.", "rejected": HH + " Bad {n}."},
        Pair(HH, " Good {n}.", " Bad {n}."),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}."),
    ),
    "prompt in the text of hh-rlhf": (
        {"prompt": HH, "chosen": " Good {n}.", "rejected": " Bad {n}."},
        Pair(HH, " Good {n}.", " Bad {n}."),
        Pair(HH_TURNS, "Good {n}.", "Bad {n}."),
    ),
}


def has_messages(row):
    return any(isinstance(value, list) for value in row.values())


WITH_MESSAGES = [name for name, (row, *_) in FORMS.items() if has_messages(row)]


def filled(value, n):
    """The same with the number n in every text."""
    if isinstance(value, str):
        return value.replace("{n}", str(n))
    if isinstance(value, dict):
        return {key: filled(part, n) for key, part in value.items()}
    if isinstance(value, Pair):
        return Pair(*(filled(part, n) for part in value))
    return [filled(part, n) for part in value] if isinstance(value, list) else value


def rows_of(form, numbers=range(60)):
    return [filled(FORMS[form][0], n) for n in numbers]


@pytest.mark.parametrize("chat", [True, False, None])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pairs(form, chat, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(form))
    if chat is None and form in WITH_MESSAGES:
        message = f"^{path}: 60 of 60 .* has chat messages, .* --format plain .*first: row 1"
        with pytest.raises(UserError, match=message) as error:
            load_pairs(Split(path), chat=None)
        assert "\n" not in str(error.value)
        return
    train, held = load_pairs(Split(path, eval_share=0.3), chat=chat)
    assert 5 < len(held) < 30
    expected = [filled(FORMS[form][2 if chat else 1], n) for n in range(60)]
    assert sorted([*train, *held], key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    "form",
    ["no prompt", "rated text", "UltraFeedback", "HelpSteer", "prompt as messages", "hh-rlhf"],
)
@pytest.mark.parametrize("kind", ["a.json", "a.parquet", "a.csv", "saved", "folder"])
def test_every_source_of_pairs(kind, form, tmp_path):
    """Columns of messages come as lists of dicts from all sources but .csv, which has none."""
    if kind == "a.csv" and form in WITH_MESSAGES:
        pytest.skip("no messages in .csv")
    rows, path = rows_of(form, range(30)), tmp_path / kind
    table = datasets.Dataset.from_list(rows)
    if kind == "a.json":
        path.write_text(json.dumps(rows))
    elif kind == "a.parquet":
        table.to_parquet(path)
    elif kind == "a.csv":
        table.to_csv(path)
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", rows)
    expected = load_pairs(Split(write_jsonl(tmp_path / "b.jsonl", rows), eval_share=0.3), chat=True)
    assert load_pairs(Split(str(path), eval_share=0.3), chat=True) == expected


def texts_of(pairs):
    return {text for pair in pairs for text in (pair.chosen, pair.rejected)}


@pytest.mark.parametrize("column", ["rating", "label"])
def test_rated_texts_become_pairs_within_each_part(column, tmp_path, capsys):
    rows = [{"text": f"film {n}", column: n % 5} for n in range(60)]
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3)
    train, held = load_pairs(data, min_rating_gap=2)
    texts = [texts_of(train), texts_of(held)]
    assert texts[0].isdisjoint(texts[1]) and len(texts[0]) + len(texts[1]) == 60
    for pair in [*train, *held]:
        assert pair.chosen_rating - pair.rejected_rating >= 2
        assert int(pair.chosen.split()[1]) % 5 == pair.chosen_rating
        assert int(pair.rejected.split()[1]) % 5 == pair.rejected_rating
    reading = f"read as text by {column}, gap >= 2: "
    counts = f"{len(train)} training and {len(held)} held-out pairs"
    assert reading + counts in capsys.readouterr().out


def test_the_reading_is_printed_with_the_share_of_pairs_rated_rightly(tmp_path, capsys):
    """So that an inverted data set shows."""
    # Rejected ones have 2.5. Ties are no inversion.
    ratings = [5] * 30 + [2.6] * 5 + [2.5] * 5 + [2.4] * 10
    rows = rows_of("rated text", range(50))
    for row, rating in zip(rows, ratings):
        row["rating_chosen"] = rating
    load_pairs(Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3), chat=True)
    reading = (
        "read as chosen / rejected rated by rating_chosen (above the rejected one's in 70.0%, "
        "equal in 10.0%), as chat: "
    )
    assert reading in capsys.readouterr().out


def test_pairs_that_are_none_are_dropped_and_counted(tmp_path, capsys):
    rows = rows_of("hh-rlhf", range(40))
    rows += [{"chosen": HH + " Good.", "rejected": "\n\nHuman: Else?\n\nAssistant: Bad."}] * 2
    rows += [{"chosen": HH + " ", "rejected": HH + " Bad."}]
    train, held = load_pairs(Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3))
    out = capsys.readouterr().out
    assert len(train) + len(held) == 40
    assert "2 rows dropped: chosen and rejected answer different prompts" in out
    assert "1 rows dropped: an empty answer" in out


# --- forms of prompts


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_prompts_come_once_each_from_prompt_or_text(column, tmp_path):
    texts = [f"film {n}" for n in range(50)]
    path = write_jsonl(tmp_path / "a.jsonl", [{column: text} for text in texts * 2])
    for chat in (True, False, None):
        train, held, name, _ = load_prompts(Split(path, eval_share=0.3), chat=chat)
        expected = [[user(text)] for text in texts] if chat and column == "prompt" else texts
        assert sorted(train + held, key=str) == sorted(expected, key=str) and name == column


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"no prompt", "empty prompt, margin"}))
@pytest.mark.parametrize("chat", [True, False])
def test_prompts_of_every_form_of_pairs(form, chat, tmp_path):
    """In training, scoring and sampling a prompt is the same."""
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows_of(form)), eval_share=0.3)
    expected = [[pair.prompt for pair in part] for part in load_pairs(data, chat=chat)]
    in_both = form == "prompt as text, answers as messages" or form.startswith("UltraFeedback, ")
    if in_both and not chat:  # the prompt's own column is not written as a dialogue
        talk = slice(len("\n\nHuman: "), -len("\n\nAssistant:"))
        expected = [[prompt[talk] for prompt in part] for part in expected]
    train, held, *_ = load_prompts(data, chat=chat)
    assert [train, held] == expected


def test_the_prompt_of_a_dialogue_is_what_is_asked_last(tmp_path, capsys):
    later = [assistant("So."), user("And?"), assistant("No."), assistant("Never.")]
    rows = [{"messages": [user(f"Why {n}?"), *later]} for n in range(40)]
    rows += [{"messages": [assistant("Hi!")]}]
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3)
    train, held, column, _ = load_prompts(data, chat=True)
    assert column == "messages" and len(train) + len(held) == 40
    assert all([m["content"] for m in prompt[1:]] == ["So.", "And?"] for prompt in train + held)
    assert "1 rows dropped: nothing is asked" in capsys.readouterr().out


def test_the_column_of_prompts_can_be_named(tmp_path):
    rows = [{"prompt": f"no {n}", "question": f"yes {n}"} for n in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for ours in ("prompt", "text"):
        train, held, column, _ = load_prompts(Split(path, eval_share=0.3, names={ours: "question"}))
        assert column == ours and all(prompt.startswith("yes") for prompt in train + held)
    with pytest.raises(UserError, match=r"columns \['prompt', 'question'\]: expected 'answer'"):
        load_prompts(Split(path, names={"prompt": "answer"}))


# --- bad input

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALKS = {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        (
            [{"prompt": "p", "chosen": "a"}],
            r"columns \['chosen', 'prompt'\]: expected chosen and rejected, as "
            r".*\"chosen\": .* or text and rating",
        ),
        ([PAIR, PAIR, {**PAIR, "chosen": "  "}], "dropped: an empty answer .first: row 3"),
        (
            [PAIR, {**PAIR, "rejected": 7}],
            "column 'rejected': got int, expected a text .first: row 2",
        ),
        (
            [PAIR, {"prompt": "p", "chosen": "a"}],
            "column 'rejected': got NoneType, expected a text .first: row 2",
        ),
        (
            [PAIR, {**PAIR, "prompt": None}],
            "column 'prompt': got NoneType, expected a text .first: row 2",
        ),
        (
            [{"text": "a", "rating": 1}, {"text": "b", "rating": True}],
            "column 'rating': got bool, expected a number .first: row 2",
        ),
        (
            ['{"text": "a", "rating": 1}', '{"text": "b", "rating": NaN}'],
            "column 'rating': got nan, expected a number .first: row 2",
        ),
        (
            [{"text": f"film {n}", "label": 1} for n in range(50)],
            "column 'label' lies in 1 to 1, and no two differ",
        ),
        ([PAIR, '{"prompt": "p", '], "row 2: not JSON"),
        (
            [PAIR, PAIR, '["p", "a", "b"]'],
            r'row 3: got \[.p., .a., .b.\], expected \{"column": value',
        ),
        ([PAIR], "expected both, so more rows"),
        (
            [{"chosen": HH + " Good.", "rejected": "\n\nHuman: Else?\n\nAssistant: Bad."}],
            "4 of 4 are of no use: 4 rows dropped: chosen and rejected answer different prompts",
        ),
        (
            [TALKS, {**TALKS, "chosen": [{"content": "a"}]}],
            r"column 'chosen': expected messages, as \[\{\"role\".*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "chosen": [user("p"), assistant(None)]}],
            "column 'chosen': expected messages, .*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "chosen": [user("p"), assistant([{"type": "image"}])]}],
            "column 'chosen': a part 'image' of a content: only text is read.*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "rejected": ["p", "b"]}],
            "column 'rejected': expected messages, .*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "rejected": []}],
            r"column 'rejected': expected messages, .*got \[\].*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "rejected": [user("p")]}],
            "column 'rejected': ends with a turn of 'user', expected assistant .first: row 2",
        ),
        (
            [TALKS, {**TALKS, "rejected": [assistant("b")]}],
            "column 'rejected' is an answer alone, .*first: row 2",
        ),
        (
            [TALKS, {**TALKS, "rejected": {"role": "user", "content": "b"}}],
            "column 'rejected': ends with a turn of 'user', .*first: row 2",
        ),
        (
            [{"prompt": 7, "chosen": [assistant("a")], "rejected": [assistant("b")]}],
            "column 'prompt': got int.*first: row 1",
        ),
        (
            [{"prompt": {"a": "p"}, "chosen": [assistant("a")], "rejected": [assistant("b")]}],
            "column 'prompt': got dict.*first: row 1",
        ),
        (
            [{"prompt": [], "chosen": "a", "rejected": "b"}],
            r"column 'prompt': expected messages, .*got \[\].*first: row 1",
        ),
        (
            [{"chosen": "\n\nHuman: Why?", "rejected": "\n\nHuman: Why?"}],
            "column 'chosen': a dialogue without a turn of the assistant .first: row 1",
        ),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_bad_pairs_are_named(rows, message, chat, tmp_path):
    """The last row is bad. Of a few bad ones the run goes on: here they are the most."""
    path = write_jsonl(tmp_path / "a.jsonl", rows + rows[-1:] * 3)
    with pytest.raises(UserError, match=f"^{path}: .*{message}") as error:
        load_pairs(Split(path), chat=chat)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question": "p"}], r"columns \['question'\]: expected prompt.*as \{\"prompt\""),
        ([{"prompt": "p"}, {"prompt": ""}], "column 'prompt': got an empty text.*first: row 2"),
        ([{"prompt": "p"}, {"prompt": 7}], "column 'prompt': got int.*first: row 2"),
        (
            [{"prompt": [user("p")]}, {"prompt": [{"role": "user"}]}],
            "column 'prompt': expected messages, .*first: row 2",
        ),
        (
            [{"messages": [user("p")]}, {"messages": None}],
            "column 'messages': got NoneType.*first: row 2",
        ),
        ([{"chosen": "a"}], "column 'chosen' is no dialogue, and there is no prompt .first: row 1"),
        ([{"prompt": "p"}], "expected both, so more rows"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_bad_prompts_are_named(rows, message, chat, tmp_path):
    """The last row is bad. Of a few bad ones the run goes on: here they are the most."""
    path = write_jsonl(tmp_path / "a.jsonl", rows + rows[-1:] * 3)
    with pytest.raises(UserError, match=f"^{path}: .*{message}") as error:
        load_prompts(Split(path), chat=chat)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["prompt", "messages", "chosen"])
def test_messages_need_a_chat_template_or_the_plain_format(column, tmp_path):
    talk = [user("p")] + [assistant("a")] * (column == "chosen")
    path = write_jsonl(tmp_path / "a.jsonl", [{column: talk}] * 3)
    with pytest.raises(
        UserError, match=f"^{path}: .*has chat messages, .* --format plain.*first: row 1"
    ):
        load_prompts(Split(path), chat=None)


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_types_that_differ_in_a_column_are_named(name, tmp_path):
    bad = [{"text": "b", "rating": "high"}] * 3
    path, rows = tmp_path / name, [{"text": "a", "rating": 1}, *bad]
    path.write_text(json.dumps(rows) if name == "a.json" else "text,rating\na,1\n" + "b,high\n" * 3)
    message = f"^{path}: .*column 'rating': got str, expected a number .first: row 2"
    with pytest.raises(UserError, match=message) as error:
        load_pairs(Split(str(path)))
    assert "\n" not in str(error.value)


def test_a_row_is_named_with_its_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [PAIR, PAIR])
    write_jsonl(tmp_path / "test.jsonl", [PAIR] + [{**PAIR, "chosen": " "}] * 3)
    with pytest.raises(UserError, match="an empty answer .first: row 2 of test"):
        load_pairs(Split(str(tmp_path), eval_split="test"))


# --- rated pairs


@pytest.mark.parametrize("min_gap", [0.0, 0.25, 1.0, 1.75, 3.0])
def test_rated_pairs_are_those_of_a_double_loop(min_gap):
    rng = random.Random(0)
    texts = [f"text {n}" for n in range(40)]
    ratings = [rng.randrange(12) / 4 for _ in range(40)]  # with ties, exact in binary
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
    for beyond in (156_250_000, 10**9, -1):
        with pytest.raises(IndexError):
            pairs[beyond]


def test_no_pairs_without_a_gap():
    assert len(RatedPairs(["a", "b"], [1.0, 1.0], 0.0)) == len(RatedPairs([], [], 1.0)) == 0


# --- split


def turns(items):
    return {first_turn(item.prompt if isinstance(item, Pair) else item) for item in items}


def test_pairs_and_prompts_are_split_alike_by_prompt(tmp_path):
    """A prompt that the reward model was trained on is never one that the policy is judged on."""
    prompts = [f"prompt {n}" for n in range(1000)]
    rows = [
        {"prompt": p, "chosen": f"good {k}", "rejected": f"bad {k}"}
        for k in range(3)
        for p in prompts
    ]
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.2, seed=3)
    train_pairs, held_pairs = load_pairs(data)
    train_prompts, held_prompts, *_ = load_prompts(data)
    assert {pair.prompt for pair in train_pairs} == set(train_prompts)
    assert {pair.prompt for pair in held_pairs} == set(held_prompts)
    assert set(train_prompts).isdisjoint(held_prompts)
    assert 150 < len(held_prompts) < 250
    assert set(load_prompts(data._replace(seed=4))[1]) != set(held_prompts)


def test_the_split_is_the_same_on_every_machine():
    """Pinned: in another process or version, old runs could be judged on their training data."""
    held = [n for n in range(60) if held_out(f"prompt {n}", seed=0, share=0.1)]
    assert held == [4, 8, 30, 34, 40, 45, 47]
    assert not held_out("prompt", 0, 0.0) and held_out("prompt", 0, 1.0)
    assert held_out("\ud800", 0, 1.0), "half a character, as broken data have it"


def all_grown(n):
    """Form -> row n, which begins with one user's turn, and goes on with others where n is odd."""
    first = f"Why {n}?" + " \n" * (n % 3)
    asked = [user(first)] + [assistant("How so?"), user(f"Just so, {n % 7}.")] * (n % 2)
    brief, talk = [system("Short."), *asked], to_text(asked)
    turns = [f"{message['role'].capitalize()}\n{message['content']}" for message in asked[1:]]
    tagged = "\n<extra_id_1>".join([first, *turns])
    forms = {  # what is beside the answers, and an answer of a text
        "messages": ({}, lambda text: [*asked, assistant(text)]),
        "system": ({}, lambda text: [*brief, assistant(text)]),
        "prompt as messages": ({"prompt": asked}, lambda text: text),
        "prompt with system": ({"prompt": brief}, lambda text: [assistant(text)]),
        "hh-rlhf": ({}, lambda text: f"{talk} {text}"),
        "text of hh-rlhf": ({"prompt": talk}, lambda text: f" {text}"),
        "HelpSteer": ({"prompt": tagged}, lambda text: [user(tagged), assistant(text)]),
        "first turn": ({"prompt": first}, lambda text: text),
    }
    return {
        form: beside | {"chosen": answer(f"Good {n}."), "rejected": answer(f"Bad {n}.")}
        for form, (beside, answer) in forms.items()
    }


GROWN = list(all_grown(0))


def grown(form, n):
    return all_grown(n)[form]


def test_no_form_trains_on_what_another_holds_out(tmp_path):
    """One data set in eight forms, as chat and as text.

    Reward model and policy agree on every first turn.
    """

    def number(item):
        return int(str(item).split("Why ")[1].split("?")[0])

    trained, held = {}, {}
    for form in GROWN:
        path = write_jsonl(tmp_path / f"{form}.jsonl", [grown(form, n) for n in range(120)])
        for chat in (True, False):
            data = Split(path, eval_share=0.3, seed=1)
            pairs, prompts = load_pairs(data, chat=chat), load_prompts(data, chat=chat)
            for name, parts in (("pairs", pairs), ("prompts", prompts)):
                trained[form, chat, name] = {number(item) for item in parts[0]}
                held[form, chat, name] = {number(item) for item in parts[1]}
    assert all(len(part) > 20 for part in held.values())
    for one, part in trained.items():
        leaks = [(one, other) for other in held if part & held[other]]
        assert not leaks, leaks[:4]


def test_later_turns_and_white_space_do_not_divide_a_prompt(tmp_path):
    """Dialogues that begin alike stay together: their beginning was trained on."""
    rows = [
        {"messages": [user(f"Why {n}?" + " " * k), assistant(f"So {k}."), user(f"And {k}?")]}
        for n in range(30)
        for k in range(5)
    ]
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.4)
    train, held, *_ = load_prompts(data, chat=True)
    assert len(train) + len(held) == 150
    assert turns(train).isdisjoint(turns(held))
    assert len(turns(held)) > 5


def test_texts_are_split_as_prompts_are(tmp_path):
    """Reviews train a reward model, their beginnings a policy.

    White space around them makes no difference.
    """
    texts = [" " * (n % 2) + f"film {n}" + " " * (n % 3) for n in range(200)]
    rows = [{"text": text, "label": n // 2 % 2} for n, text in enumerate(texts)]
    data = Split(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3)
    pairs, (train, held, *_) = load_pairs(data), load_prompts(data)
    texts = [{text.strip() for text in texts_of(part)} for part in pairs]
    assert texts[0] == {text.strip() for text in train}
    assert texts[1] == {text.strip() for text in held}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("form", GROWN)
def test_rows_of_the_split_held_out_do_not_train(form, chat, tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", [grown(form, n) for n in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [grown(form, n) for n in range(20, 40)])
    data = Split(str(tmp_path), eval_split="test")
    pairs = load_pairs(data, chat=chat)
    assert (len(pairs[0]), len(pairs[1])) == (20, 20)
    train, held, *_ = load_prompts(data, chat=chat)
    assert (len(train), len(held)) == (20, 20)
    assert capsys.readouterr().out.count("10 rows dropped: in the held-out split, too") == 2
    assert turns(pairs[0]).isdisjoint(turns(held)) and turns(train).isdisjoint(turns(pairs[1]))


def test_texts_of_the_split_held_out_do_not_train(tmp_path, capsys):
    train = [{"text": f"film {n}", "label": n % 2} for n in range(30)]
    test = [{"text": f"film {n} ", "label": n % 2} for n in range(20, 40)]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "test.jsonl", test)
    pairs = load_pairs(Split(str(tmp_path), eval_split="test"))
    assert (len(pairs[0]), len(pairs[1])) == (100, 100)
    assert "10 rows dropped: in the held-out split, too" in capsys.readouterr().out


def test_a_pair_dropped_from_the_split_held_out_does_not_train_either(tmp_path):
    """It is no pair, but its prompt is one that the policy is judged on."""
    dropped = {
        "chosen": "\n\nHuman: Why 3?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: So.",
    }
    empty = {
        "chosen": "\n\nHuman: Why 4?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Why 4?\n\nAssistant: ",
    }
    good = [grown("hh-rlhf", n) for n in range(20, 30)]
    write_jsonl(tmp_path / "train.jsonl", [grown("hh-rlhf", n) for n in range(10)])
    write_jsonl(tmp_path / "test.jsonl", [dropped, empty, *good])
    data = Split(str(tmp_path), eval_split="test")
    assert turns(load_pairs(data)[0]).isdisjoint(turns(load_prompts(data)[1]))


def test_real_dialogues(capsys):
    """hh-rlhf: nearly all rows are pairs.

    The same ones are held out as chat and as text, as pairs and as prompts.
    """
    file = Path(__file__).parents[2] / "shared/data/hh-rlhf/helpful-base-test.jsonl.gz"
    if not file.exists():
        pytest.skip("no hh-rlhf here")
    with gzip.open(file, "rt") as lines:
        count = sum(1 for _ in lines)
    parts = {}
    for chat in (True, False):
        for load in (load_pairs, load_prompts):
            parts[chat, load] = [turns(part) for part in load(Split(str(file)), chat=chat)[:2]]
        train, held = load_pairs(Split(str(file)), chat=chat)
        assert 0.98 < (len(train) + len(held)) / count < 1
        for pair in [*train, *held]:
            if chat:
                assert pair.prompt[-1]["role"] == "user"
                assert pair.chosen == pair.chosen.strip()
                assert pair.rejected
            else:
                assert pair.prompt.endswith("\n\nAssistant:")
                assert "\n\nAssistant:" not in pair.chosen + pair.rejected
    for load in (load_pairs, load_prompts):
        for chat, text in zip(parts[True, load], parts[False, load]):
            # As chat, two rows more are dropped: their prompts end with an answer.
            assert chat <= text and len(text - chat) <= 2
    assert parts[True, load_pairs][0].isdisjoint(parts[False, load_prompts][1])
    assert "rows dropped: chosen and rejected answer different prompts" in capsys.readouterr().out
