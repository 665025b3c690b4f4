"""Reward functions with the data's columns, None where one does not apply, and several as one."""

import functools
import json
import math
import random

import pytest
import tiny
import torch

import train_policy
from minalign.data.chat import TokenizedPrompt
from minalign.data.prompts import beginning, tokenize_prompts
from minalign.models.functions import asked_of, call, columns_asked
from minalign.models.rewards import RewardFunction, RewardSum, combine
from minalign.running.errors import UserError
from minalign.running.files import read_json_lines
from minalign.tools import evaluate, generate

P, C = ["p1", "p2"], ["c1", "c2"]
ANSWERS = {"answer": [1, None], "scale": [7, 8], "other": [[], {}]}


class Scorer:
    def __call__(self, prompts, completions, answer):
        return method(prompts, completions, answer)

    def method(self, prompts, completions, *, answer):
        return method(prompts, completions, answer)


class Layer(torch.nn.Module):
    def forward(self, prompts, completions, answer):
        return method(prompts, completions, answer)


def method(prompts, completions, answer):
    return [seen.append((prompts, completions, answer)), 0][1:] * 2


def trl(completions, answer, **kwargs):
    assert kwargs == {"prompts": P, "scale": [7, 8], "other": [[], {}]}
    return method(kwargs["prompts"], completions, answer)


def anything(*args, **kwargs):
    assert kwargs == ANSWERS
    return method(*args, kwargs["answer"])


def given(prompts, completions, answer, scale=2):
    assert scale == 3
    return method(prompts, completions, answer)


seen = []
FORMS = {
    "third": method,
    "third of any names": lambda p, c, answer: method(p, c, answer),
    "keyword alone": lambda p, c, *, answer: method(p, c, answer),
    "after positional ones": lambda p, c, /, answer: method(p, c, answer),
    "positional alone": lambda p, c, answer, /: method(p, c, answer),
    "after others": lambda p, c, missing=5, answer=0: method(p, c, answer) * (missing == 5),
    "in the place of completions": lambda prompts, answer, completions: method(
        prompts, completions, answer
    ),
    "keywords": lambda *, answer, completions, prompts: method(prompts, completions, answer),
    "completions first": lambda completions, prompts, answer: method(prompts, completions, answer),
    "trl": trl,
    "anything": anything,
    "partial": functools.partial(given, scale=3),
    "object": Scorer(),
    "bound method": Scorer().method,
    "torch module": Layer(),
    "wraps": functools.wraps(method)(lambda *args, **kwargs: method(*args, **kwargs)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_gets_the_columns_that_it_names(form):
    """Whatever its form, prompts and completions are what they are."""
    seen.clear()
    assert call("f", FORMS[form], P, C, ANSWERS) == [0.0, 0.0]
    assert seen == [(P, C, [1, None])]


def test_what_a_function_asks_for_is_what_it_names():
    assert asked_of(lambda p, c: 0) == asked_of(max) == asked_of(lambda *args: 0) == {}
    assert asked_of(method) == {"answer": True} and asked_of(anything) == {"**": False}
    assert asked_of(trl) == {"answer": True, "**": False}
    assert asked_of(functools.partial(given, scale=3)) == {"answer": True}
    assert asked_of(given) == {"answer": True, "scale": False}
    message = "--rm f: names column 'completion_ids': the prompts have none"
    with pytest.raises(UserError, match=message):  # of trl, not given here
        call("f", lambda completions, completion_ids, **kwargs: [0, 0], P, C, ANSWERS)
    with pytest.raises(UserError, match="^--rm f: TypeError"):  # a decorator that hides names
        call("f", lambda *args, **kwargs: method(*args, **kwargs), P, C, ANSWERS)


# --- from the data to the function

RULES = """
import json
calls = []
def exact(prompts, completions, answer):
    calls.append((list(prompts), list(answer)))
    answer.clear() if isinstance(answer[0], list) else None
    return [float(len(c)) if a is None or a % 3 else None for c, a in zip(completions, answer)]
def every(prompts, completions, **columns):
    calls.append(columns)
    return [1.0] * len(completions)
def changes(prompts, completions, meta):
    assert min(one["n"] for one in meta) >= 0, "changed before"
    for one in meta: one["n"] = -1
    return [0.0] * len(completions)
def never(prompts, completions): return [None] * len(completions)
def short(prompts, completions): return [-len(c) / 10 for c in completions]
def needs_ids(completions, completion_ids, **kwargs): return [0.0] * len(completions)
"""
ARGV = (
    "--model lm --dataset d.jsonl --steps 3 --batch-size 4 --eval-prompts 6 --eval-every 2 "
    "--max-new-tokens 2 --device cpu --eval-share 0.3"
).split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A policy, and rows whose answer is the prompt's own number, among other columns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    tiny.policy(tmp_path / "lm")
    write(tmp_path / "d.jsonl", range(40))
    return tmp_path


def write(path, numbers, **other):
    rows = [
        {"prompt": f"what is {n} ?", "answer": n, "meta": {"n": n}, "note": None} | other
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def calls_of(name="rules.py:exact"):
    from minalign.models.functions import load_function

    return load_function(name).__globals__["calls"]


def train(*argv):
    train_policy.main([*ARGV, *argv])


def test_each_prompt_comes_with_its_own_answer(here, capsys):
    """In training, on held-out prompts, in evaluate and generate; None is left out and counted."""
    train("--rm", "rules.py:exact", "--out", "run")
    calls = calls_of()
    assert len(calls) == 3 + 4  # steps; before, at steps 2 and 3, after
    for prompts, answers in calls:
        assert all(f"what is {answer} ?" in str(p) for p, answer in zip(prompts, answers))
    held_out = calls[0][1]
    assert held_out == calls[-1][1] and not {*held_out} & {n for _, a in calls[1:3] for n in a}
    rows = read_json_lines(here / "run/metrics.jsonl")
    assert rows[0]["applies"] == sum(n % 3 > 0 for n in calls[1][1]) / 4
    said = capsys.readouterr().out
    assert "columns not read: ['meta', 'note']" in said
    del calls[:]
    evaluate.main(["--model", "run", "--out", "e", "--device", "cpu"])
    assert calls[0][1] == held_out
    result = json.loads((here / "e/results.json").read_text())["models"]["run"]
    samples = [row for row in read_json_lines(here / "e/samples.jsonl") if row["model"] == "run"]
    known = [row["reward"] for row in samples if row["reward"] is not None]
    assert [row["reward"] is None for row in samples] == [n % 3 == 0 for n in held_out]
    assert result["reward"] == pytest.approx(sum(known) / len(known))
    assert result["applies"] == pytest.approx(len(known) / len(samples))
    del calls[:]
    generate.main("--model run --rm rules.py:exact --out g.jsonl --samples 2 --device cpu".split())
    assert calls[0][1] == [n for n in held_out for _ in (0, 1)]
    given = read_json_lines(here / "g.jsonl")
    assert [row["answer"] for row in given] == calls[0][1]
    assert [row["reward"] is None for row in given] == [n % 3 == 0 for n in calls[0][1]]


def test_a_dropped_prompt_moves_no_columns():
    tokenizer = tiny.tokenizer()
    texts = [letter * n for n, letter in enumerate("abcdefgh", 1)]
    columns = [{"answer": text} for text in texts]
    rows = tokenize_prompts(tokenizer, texts[::-1], 5, None, "odd", columns[::-1])
    assert [(tokenizer.decode(p.ids), p.columns["answer"]) for p in rows] == [
        (text, text) for text in texts[4::-1]
    ]
    assert [p.row for p in rows] == list(range(5)) == [p.row for p in [*rows[:2], *rows[2:]]]
    cut = beginning(rows[1], (2, 2), random.Random(0))
    assert cut.ids == rows[1].ids[:2] and cut[1:] == rows[1][1:] and cut.row == 1


def test_all_columns_but_the_prompt_and_only_what_is_asked_for(here):
    train("--rm", "rules.py:every", "--out", "run", "--columns", "solution=answer")
    (columns, *_) = calls_of()
    assert {*columns} == {"solution", "meta", "note"} and columns["note"] == [None] * 6
    train("--rm", "rules.py:changes", "--out", "other")  # its own copies, each time anew


def test_a_column_has_another_name_in_the_data(here):
    write(here / "d.jsonl", range(40))
    text = (here / "d.jsonl").read_text().replace('"answer"', '"solution"')
    (here / "d.jsonl").write_text(text)
    message = r"^--rm rules.py:exact: names column 'answer': d.jsonl has columns \['meta', 'note'"
    with pytest.raises(UserError, match=message):
        train("--rm", "rules.py:exact", "--out", "bad")
    train("--rm", "rules.py:exact", "--columns", "answer=solution", "--out", "run")
    prompts, answers = calls_of()[0]
    assert all(f"what is {n} ?" in str(prompt) for prompt, n in zip(prompts, answers))
    generate.main("--model run --out g.jsonl --device cpu".split())  # without the reward
    with pytest.raises(UserError, match="^--columns solution=answer: expected"):
        train("--rm", "rules.py:exact", "--columns", "solution=answer", "--out", "bad")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rm rules.py:needs_ids", "names column 'completion_ids': d.jsonl has columns"),
        ("--rm rules.py:short rules.py:never", "rules.py:never: applies to none of 2"),
        ("--rm rules.py:never --standardize-rewards", "applies to none of 2"),
        ("--rm rules.py:short --rm-combine min", "--rm-combine min: needs several rewards"),
        ("--rm rules.py:short --rm-combine sum", "--rm-combine sum: needs several rewards"),
        (
            "--rm rules.py:short rules.py:every --rm-combine min --rm-weights 1 2",
            "--rm-combine min: takes no --rm-weights",
        ),
        ("--rm a b --rm-average --rm-combine mean-sd", "needs several rewards after --rm, and no"),
    ],
)
def test_what_does_not_go_is_one_line(here, argv, message):
    with pytest.raises(UserError, match=message):
        train(*argv.split(), "--out", "bad")


def test_the_toy_world_has_no_columns(here):
    with pytest.raises(UserError, match="names column 'answer': needs --dataset"):
        train_policy.main(["--rm", "rules.py:exact", "--out", "bad", "--device", "cpu"])
    for argv in (["--prompt", "what"], []):
        with pytest.raises(UserError, match="^--rm rules.py:exact: names column 'answer': "):
            generate.main(["--model", "lm", "--rm", "rules.py:exact", "--device", "cpu", *argv])


def test_equal_prompts_with_other_answers_are_other_items(here, capsys):
    """The split goes by the prompt. A changed answer alone is other data for --resume."""
    rows = [
        {"prompt": f"what is {n % 20} ?", "answer": n // 20, "meta": {}, "note": 0}
        for n in range(40)
    ] * 2
    (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--rm", "rules.py:short", "--out", "plain")
    plain = capsys.readouterr().out
    train("--rm", "rules.py:exact", "--out", "run")
    asked = capsys.readouterr().out

    def counts(out):
        line = next(one for one in out.splitlines() if one.startswith("d.jsonl: "))
        return [int(word) for word in line.split() if word.isdigit()]

    assert [2 * n for n in counts(plain)] == counts(asked) and sum(counts(plain)) == 20
    train("--rm", "rules.py:exact", "--out", "run", "--resume")
    rows[3]["answer"] = 100
    rows[43]["answer"] = 100
    (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="data"):
        train("--rm", "rules.py:exact", "--out", "run", "--resume")
    train("--rm", "rules.py:short", "--out", "plain", "--resume")  # asks for no answer


# --- several as one

A = [[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, 1.5, 1.0], [2.0, 1.0, 4.0, -1.0]]
ALL = torch.ones(3, 4, dtype=torch.bool)
PART = torch.tensor(
    [[True, True, True, False], [True, False, True, False], [True, False, False, False]]
)


def by_hand(values, how, weights):
    if not values:
        return 0.0
    if how == "sum":
        return sum(w * v for w, v in zip(weights, values))
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return min(values) if how == "min" else mean - deviation


@pytest.mark.parametrize("how", ["sum", "min", "mean-sd"])
@pytest.mark.parametrize("applies", [ALL, PART], ids=["all", "some"])
def test_rewards_are_combined_over_those_that_apply(how, applies):
    weights = [1.0, -0.5, 2.0]
    expected = []
    for n in range(4):
        rows = [m for m in range(3) if applies[m, n]]
        known = [weights[m] for m in rows]
        expected.append(by_hand([A[m][n] for m in rows], how, known))
    got = combine(torch.tensor(A), applies, how, torch.tensor(weights))
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    hidden = torch.tensor(A).masked_fill(~applies, torch.nan)  # changes nothing
    assert combine(hidden, applies, how, torch.tensor(weights)).tolist() == got.tolist()
    for broken in (torch.nan, torch.inf, -torch.inf):
        scores = torch.tensor(A)
        scores[1, 0] = broken
        got = combine(scores, applies, how, torch.ones(3))
        assert not got[0].isfinite() and got[1:].isfinite().all()


def of(values):
    """A reward function that returns these for as many completions."""
    return RewardFunction("f", lambda prompts, completions: values)


def scored(reward):
    rows = [TokenizedPrompt([5])] * 3
    return reward.score_rollout(tiny.tokenizer(), rows, [[6]] * 3, 2)


def test_none_is_no_zero():
    scores = scored(of([2.0, None, math.nan]))
    assert scores.applies.tolist() == [True, False, True]
    assert scores.rewards[:2].tolist() == [2.0, 0.0] and scores.rewards[2].isnan()
    assert scored(of([1, 0, False])).applies.all()
    rewards = {"a": of([2.0, None, None]), "b": of([10.0, 30.0, None])}
    both = RewardSum(rewards, [1.0, 2.0])
    both.fit({"a": torch.tensor([0.0, 2.0, torch.nan]), "b": torch.tensor([10.0, 30.0, 20.0])})
    assert both.means == [1.0, 20.0] and both.stds == pytest.approx([1.0, math.sqrt(200 / 3)])
    scores, sd = scored(both), math.sqrt(200 / 3)
    assert scores.rewards.tolist() == pytest.approx([1 - 2 * 10 / sd, 2 * 10 / sd, 0.0])
    assert scores.applies.tolist() == [True, True, False]
    assert scores.parts["a"].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("how", ["min", "mean-sd"])
def test_a_run_is_trained_on_the_pessimistic_reward(here, how):
    names = ["rules.py:short", "rules.py:exact", "rules.py:every"]
    if how == "min":
        train("--rm", *names, "--rm-combine", how, "--out", "run")
        row = read_json_lines(here / "run/metrics.jsonl")[-1]
        assert {f"reward {name}" for name in names} <= {*row}
        evaluate.main(["--model", "run", "--out", "e", "--device", "cpu"])
        assert json.loads((here / "e/config.json").read_text())["rm_combine"] == how
    with pytest.raises(UserError, match="no distribution over scores"):
        train("--rm", *names, "--rm-combine", how, "--out", "u", "--uncertainty", "inverse_std")
    assert columns_asked([*names, "rm"]) == {"answer": "rules.py:exact", "**": ""}
