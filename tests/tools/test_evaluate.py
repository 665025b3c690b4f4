"""Reward models on the rows of benchmarks; the best of n samples. What is wrong is one line.

Most rewards here are `rules:last`, the number that an answer ends with: tables are worked by hand.
"""

import csv
import json
import math
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch

from minalign.measuring.measures import best_of_n
from minalign.measuring.pairs import expected_calibration_error
from minalign.reward import RewardModel
from minalign.running.errors import one_line_errors
from minalign.tools import evaluate, generate, plot
from minalign.tools.logged import read_run

RULES = """
def last(prompts, completions):
    return [float(text.split()[-1]) for text in completions]
def minus(prompts, completions):
    return [-float(text.split()[-1]) for text in completions]
def length(prompts, completions):
    return [len(text) for text in completions]
def broken(prompts, completions):
    return [float("nan")] * len(completions)
def of_prompt(prompts, completions):
    return [sum(map(ord, str(prompt))) % 97 for prompt in prompts]
def near(prompts, completions, answer):
    return [None if a is None else -abs(float(c.split()[-1]) - a)
            for c, a in zip(completions, answer)]
def of_some(prompts, completions):
    return [None if "1" in str(p) else len(c) for p, c in zip(prompts, completions)]
def asked(prompts, completions):
    return [len(prompt) if isinstance(prompt, str) else -1 for prompt in prompts]
"""
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {"rm": tiny.reward_model(folder / "rm"), "lm": tiny.policy(folder / "lm")}
    made["plain"] = tiny.reward_model(folder / "plain", "plain", seed=1)
    made["ordinal"] = tiny.reward_model(folder / "ordinal", seed=2, num_labels=5)
    return made | {"two": tiny.reward_model(folder / "two", seed=3, num_labels=2)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text(RULES)
    return tmp_path


def write(rows, name="d.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def measured(rows, *flags, rm=("rules:last",), out="o"):
    """results.json of these rewards on these rows, or on those of a file."""
    data = rows if isinstance(rows, str) else write(rows)
    evaluate.main(["--rm", *rm, "--dataset", data, "--out", out, *CPU, *flags])
    return json.loads(Path(out, "results.json").read_text(), parse_constant=pytest.fail)


def means(results, reward="rules:last", what="accuracy"):
    return {name: one[what]["mean"] for name, one in results["rewards"][reward]["parts"].items()}


def refusal(argv, capsys, main=evaluate.main):
    capsys.readouterr()
    with pytest.raises(SystemExit) as error, one_line_errors():
        main(argv)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.value.code == 2 and len(said) == 1, said
    return said[0]


def pair(right, wrong, number, **more):
    return {"prompt": f"what is {number} ?", "chosen": f"it is {right}", **more} | {
        "rejected": f"it may be {wrong}"
    }


# ---- the forms ----


def test_rewardbench_by_hand():
    """Three subsets of two sections; a tie is wrong."""
    table = [("math-prm", 2, 1), ("math-prm", 1, 1), ("math-prm", 0, 1), ("math-prm", 5, 4)]
    table += [("hep-go", 3, 2), ("hep-go", 1, 2), ("donotanswer", 9, 1), ("donotanswer", 2, 1)]
    rows = [pair(a, b, n, subset=s, id=n) for n, (s, a, b) in enumerate(table)]
    results = measured(rows, rm=["rules:last", "rules:minus"])
    assert (results["form"], results["rows"], results["measured"]) == ("RewardBench", 8, 8)
    assert means(results) == pytest.approx(
        {
            "all": 5 / 8,
            "subset: math-prm": 2 / 4,
            "subset: hep-go": 1 / 2,
            "subset: donotanswer": 1,
            "section: Reasoning": (2 / 4 * 4 + 1 / 2 * 2) / 6,  # weighted by rows
            "section: Safety": 1,
        }
    )
    assert results["rewards"]["rules:last"]["score"]["mean"] == pytest.approx((1 / 2 + 1) / 2)
    # minus wins where last loses, and never where there is a tie; "it may be" is always longer
    assert means(results, "rules:minus")["all"] == 2 / 8
    assert means(results, "the longer wins")["all"] == 0
    first, *others = results["comparisons"]
    assert (first["reward"], first["against"]) == ("rules:minus", "rules:last")
    assert first["difference"]["mean"] == pytest.approx((1 / 3 + 0) / 2 - (1 / 2 + 1) / 2)
    assert [one["against"] for one in others] == ["the longer wins"] * 2
    rows = [json.loads(line) for line in open("o/scores.jsonl")]
    assert [row["row"] for row in rows] == list(range(1, 9)) and rows[6]["id"] == 6
    assert rows[6]["chosen"]["rules:last"] == [9] and rows[6]["rejected"]["rules:minus"] == [-1]


def test_other_subsets_than_the_benchmark_has_make_no_sections():
    rows = [pair(2, 1, n, subset=s, id=n) for n, s in enumerate(["math-prm", "mine", "mine"])]
    assert set(means(measured(rows))) == {"all", "subset: math-prm", "subset: mine"}


def best_of(right, wrong, number, **more):
    return {
        "prompt": f"what is {number} ?",
        "chosen": [f"it is {x}" for x in right],
        "rejected": [f"no {x}" for x in wrong],
        "num_correct": len(right),
        "subset": "Math",
        "id": str(number),
    } | more


def test_rewardbench_2_by_hand(capsys):
    rows = [best_of([3], [1, 2, 0], 0), best_of([3], [3, 3, 0], 1), best_of([1], [2, 0, 0], 2)]
    rows += [best_of([5], [1, 1, 1], 3, subset="Focus")]
    # gap_ref 1, gap_tied 3, spread 2; then gap_ref -1, gap_tied 1, spread 0
    rows += [best_of([2], [1, 0], 4, subset="Ties", id="ref:7")]
    rows += [best_of([4, 6, 5], [1, 0], 5, subset="Ties", id="tied:7")]
    rows += [best_of([2, 2], [1], 6, subset="Ties", id="tied:8")]
    rows += [best_of([0], [1], 7, subset="Ties", id="ref:8")]
    rows += [best_of([9], [1], 8, subset="Ties", id="ref:9")]  # without tied:9
    results = measured(rows)
    ties = [0.8 + 0.01 * math.tanh(-1 / 2), 0.5 - 0.01]
    expected = {
        "subset: Math": (1 + 1 / 3 + 0) / 3,
        "subset: Focus": 1,
        "subset: Ties": sum(ties) / 2,
    }
    found = means(results)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
        assert found[name.replace("subset", "section")] == found[name]
    score = results["rewards"]["rules:last"]["score"]
    assert score["mean"] == pytest.approx(sum(expected.values()) / 3)
    assert score["low"] is None  # Focus has a single prompt
    said = capsys.readouterr().out
    assert "1 rows left out: of Ties, without the other of ref:N and tied:N (first: row 9)" in said


def test_rm_bench_by_hand():
    rows = [
        {"id": "a", "prompt": "x", "domain": "chat", "chosen": ["a 2", "a 4", "a 6"]}
        | {"rejected": ["b 1", "b 4", "b 5"]},
        {"id": "b", "prompt": "y", "domain": "safety-refuse", "chosen": ["a 1", "a 2", "a 3"]}
        | {"rejected": ["b 1", "b 2", "b 3"]},
        {"id": "c", "prompt": "z", "domain": "safety-response", "chosen": ["a 9", "a 9", "a 9"]}
        | {"rejected": ["b 1", "b 2", "b 3"]},
    ]
    results = measured(rows)
    assert results["form"] == "RM-Bench" and results["by"] == "domain"
    for what, of_rows in {
        "accuracy": (5 / 9, 1 / 3, 1),
        "easy": (1, 1, 1),
        "normal": (2 / 3, 0, 1),
        "hard": (0, 0, 1),
    }.items():
        found = means(results, what=what)
        assert found["all"] == pytest.approx(sum(of_rows) / 3)
        assert found["section: safety"] == pytest.approx(sum(of_rows[1:]) / 2)
    assert results["rewards"]["rules:last"]["score"]["mean"] == pytest.approx((5 / 9 + 2 / 3) / 2)


def test_any_pairs_and_a_column():
    rows = [
        pair(a, b, n, kind=k) for n, (a, b, k) in enumerate([(2, 1, 1), (1, 1, None), (0, 1, 1)])
    ]
    results = measured(rows, "--by", "kind")
    assert results["form"] == "pairs"  # a tie is half right
    assert means(results) == pytest.approx({"all": 0.5, "kind: 1": 0.5, "kind: None": 0.5})
    rows = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    assert means(measured(rows, out="p"))["all"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet", pytest.param("saved", marks=pytest.mark.slow)])
def test_files_of_every_kind_have_the_same_numbers(kind):
    rows = [pair(n % 3, 1, n, subset="a", id=n) for n in range(9)]
    lists = [best_of([n % 3], [1, 2], n) for n in range(9)]
    for number, given in enumerate((rows, lists)):
        expected = measured(given, out=f"a{number}")
        if kind == "saved":
            import datasets

            datasets.Dataset.from_list(given).save_to_disk(name := f"saved{number}")
        elif kind == "parquet":
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(given), name := f"{number}.parquet"
            )
        else:
            with open(name := f"{number}.csv", "w", newline="") as file:
                table = csv.DictWriter(file, list(given[0]))
                table.writeheader()
                table.writerows(given)
        if kind == "csv" and number:
            with pytest.raises(ValueError, match="lists written into texts"):
                measured(name, out=f"b{number}")
            continue
        found = measured(name, out=f"b{number}")
        assert found | {"dataset": ""} == expected | {"dataset": ""}


# ---- what scores ----


def test_models_read_rows_as_their_training_does(models):
    """Scores are RewardModel.score's; accuracy and ECE are those of the two formulas."""
    rows = [pair(n, n * n % 7, n) for n in range(12)]
    names = ["rm", "plain", "ordinal", "two"]
    results = measured(rows, rm=[models[name] for name in names])
    said = [json.loads(line) for line in open("o/scores.jsonl")]
    for name in names:
        reward_model = RewardModel.from_pretrained(models[name])
        prompts = [row["prompt"] for row in rows]
        sides = []
        for side in ("chosen", "rejected"):
            scores = reward_model.score(prompts, [row[side] for row in rows])
            found = torch.tensor([row[side][models[name]][0] for row in said])
            assert torch.allclose(found, scores, atol=1e-4)
            sides.append([reward_model.encode(p, row[side]) for p, row in zip(prompts, rows)])
        one = results["rewards"][models[name]]
        right, wrong = (reward_model.read_out(reward_model.logits(side)) for side in sides)
        wins = (right > wrong).double().mean().item()
        assert one["parts"]["all"]["accuracy"]["mean"] == pytest.approx(wins)
        if name == "two":
            assert one["ece"] is None  # a difference of two logits is no probability
            continue
        if name == "ordinal":
            p, q = (reward_model.logits(side).softmax(1) for side in sides)
            above = torch.ones(5, 5).tril(-1) + 0.5 * torch.eye(5)
            wins = ((p @ above) * q).sum(1)
        else:
            wins = (right - wrong).sigmoid()
        assert one["ece"] == pytest.approx(expected_calibration_error(wins), abs=1e-4)
    assert results["rewards"]["the longer wins"]["ece"] is None


@pytest.mark.slow
def test_chat_prompts_reach_every_kind_of_reward(models):
    row = {"prompt": [tiny.U("hi {n}")], "chosen": [tiny.A("a 2")], "rejected": [tiny.A("b 1")]}
    data = tiny.rows("d.jsonl", row, 6)
    results = measured(data, rm=[models["rm"], models["plain"], "rules:last", "rules:asked"])
    assert means(results)["all"] == 1 and results["measured"] == 6
    assert json.loads(open("o/scores.jsonl").readline())["chosen"]["rules:asked"] == [-1]
    text = json.loads(json.dumps(row)) | {"prompt": "hi {n}", "chosen": "a 2", "rejected": "b 1"}
    measured(tiny.rows("e.jsonl", text, 6), rm=["rules:asked"], out="p")
    assert json.loads(open("p/scores.jsonl").readline())["chosen"]["rules:asked"] == [4]


def test_a_list_of_texts_is_read_as_one_text_is(models):
    """Messages as a prompt, read by a model without a chat template and by one with it."""
    row, rm = {"prompt": [tiny.U("hi {n}")]}, [models["rm"], models["plain"]]
    measured(tiny.rows("a.jsonl", row | {"chosen": "a", "rejected": "b"}, 4), rm=rm, out="p")
    measured(tiny.rows("b.jsonl", row | {"chosen": ["a"], "rejected": ["b"]}, 4), rm=rm, out="q")
    texts, lists = ([json.loads(line) for line in open(f"{out}/scores.jsonl")] for out in "pq")
    assert texts == lists


def test_functions_get_the_columns_that_they_name(capsys):
    """By row and text, also in small batches; None leaves the row out for all."""
    rows = [
        {"prompt": f"q{n}", "chosen": f"a {c}", "rejected": f"a {r}", "answer": a}
        for n, (c, r, a) in enumerate([(5, 9, 5), (2, 1, 1), (3, 4, 9), (7, 8, None)])
    ]
    results = measured(rows, "--batch-size", "3", rm=["rules:near", "rules:last"])
    assert means(results, "rules:near") == {"all": pytest.approx(1 / 3)}
    assert means(results) == {"all": pytest.approx(1 / 3)} and results["measured"] == 3
    said = capsys.readouterr().out
    assert "it does not apply" in said and "columns not read" not in said
    scores = [json.loads(line) for line in Path("o/scores.jsonl").read_text().splitlines()]
    assert [row["chosen"]["rules:near"] for row in scores] == [[0.0], [-1.0], [-6.0]]
    without = write([{k: v for k, v in row.items() if k != "answer"} for row in rows])
    line = refusal(["--rm", "rules:near", "--dataset", without, "--out", "p", *CPU], capsys)
    assert "names column 'answer'" in line


def test_the_lowest_of_several_rewards_by_hand(capsys):
    """Standardised on the six texts: last is 1, 2, 3, 4, 5, 6 and length 3, all but one 4."""
    rows = [
        {"chosen": c, "rejected": r} for c, r in [("a 6", "a 1"), ("a 2", "a 5"), ("aa 4", "a 3")]
    ]
    flags = ["--rm-combine", "min"]
    results = measured(rows, *flags, rm=["rules:last", "rules:length"])
    (name,) = [name for name in results["rewards"] if name != "the longer wins"]
    assert name == "min of rules:last, rules:length"
    last = [(x - 3.5) / (35 / 12) ** 0.5 for x in (6, 1, 2, 5, 4, 3)]
    length = [(x - 19 / 6) / (5 / 36) ** 0.5 for x in (3, 3, 3, 3, 4, 3)]
    lowest = list(map(min, last, length))
    scores = [json.loads(line) for line in Path("o/scores.jsonl").read_text().splitlines()]
    found = [x for row in scores for side in ("chosen", "rejected") for x in row[side][name]]
    assert found == pytest.approx(lowest)
    for flags, why in ((["--rm-weights", "1", "2"], "takes no --rm-weights"), ([], "")):
        rm = ["rules:last", "rules:length"] if why else ["rules:last"]
        line = refusal(["--rm", *rm, "--dataset", "d.jsonl", "--rm-combine", "min", *flags], capsys)
        assert why in line and "--rm-combine min" in line


def test_a_risk_is_that_of_the_scores(models, capsys):
    rows = [{"prompt": "p", "chosen": "good film", "rejected": "bad"}]
    measured(rows, "--risk", "0.5", rm=[models["ordinal"]])
    (row,) = [json.loads(line) for line in Path("o/scores.jsonl").read_text().splitlines()]
    model = RewardModel.from_pretrained(models["ordinal"])
    logits = model.logits([model.encode("p", "good film")])
    p = logits[0, model.order].double().softmax(0)
    expected = -0.5 * (p * torch.exp(-torch.arange(1, 6) / 0.5)).sum().log().item()
    assert row["chosen"][models["ordinal"]] == [pytest.approx(expected, rel=1e-4)]
    line = refusal(["--rm", models["rm"], "--dataset", "d.jsonl", "--risk", "1", *CPU], capsys)
    assert "--risk 1" in line


def test_several_rewards_are_one_with_weights_or_averaged(models):
    rows = [pair(a, b, n) for n, (a, b) in enumerate([(3, 1), (0, 4), (2, 2)])]
    results = measured(rows, "--rm-weights", "2", "0.5", rm=["rules:last", "rules:length"])
    (name, _), scores = results["rewards"], [json.loads(line) for line in open("o/scores.jsonl")]
    last, length = torch.tensor([3.0, 1, 0, 4, 2, 2]), torch.tensor([7.0, 11, 7, 11, 7, 11])
    z = [(x - x.mean()) / x.std(correction=0) for x in (last, length)]
    total = 2 * z[0] + 0.5 * z[1]
    found = [row[side][name][0] for row in scores for side in ("chosen", "rejected")]
    assert found == pytest.approx(total.tolist(), abs=1e-5)
    assert results["rewards"][name]["ece"] is None and len(results["comparisons"]) == 1
    average = measured(rows, "--rm-average", rm=[models["rm"], models["rm"] + "/"], out="p")
    alone = measured(rows, rm=[models["rm"]], out="q")
    (name, _), (other, _) = average["rewards"], alone["rewards"]
    found = average["rewards"][name]
    assert found["ece"] == pytest.approx(alone["rewards"][other]["ece"], abs=1e-5)
    assert found["parts"] == alone["rewards"][other]["parts"]


def test_rows_that_cannot_be_scored_are_counted_and_left_out_for_all(models, capsys):
    rows = [pair(2, 1, n) for n in range(6)]
    rows[1]["chosen"] = " "
    rows[3]["rejected"] = "what " * 2000 + "1"  # beyond the context of 1024
    results = measured(rows, rm=["rules:last", models["rm"]])
    said = capsys.readouterr().out
    assert results["measured"] == 4 and means(results)["all"] == 1
    assert "1 rows dropped: longer than the context of 1024 tokens (first: row 4)" in said
    assert "1 rows dropped: an empty answer (first: row 2)" in said
    assert [json.loads(line)["row"] for line in open("o/scores.jsonl")] == [1, 3, 5, 6]


# ---- bad input ----

RM = {"prompt": "x", "domain": "chat", "chosen": ["a 1"] * 3, "rejected": ["b 1"] * 3}
TIED = best_of([2, 2], [1], 0, subset="Ties", id="tied:1")
BAD = {
    "two texts": ([RM, RM | {"chosen": ["a 1"] * 2}], "row 2: column 'chosen': got 2 texts"),
    "four texts": ([RM | {"rejected": ["a 1"] * 4}, RM], "row 1: column 'rejected': got 4 texts"),
    "empty list": ([best_of([1], [2], 0), best_of([1], [], 1)], "row 2: column 'rejected': got 0"),
    "a text among lists": ([RM, RM | {"chosen": "a 1"}], "row 2: column 'chosen': got no texts"),
    "none among lists": ([RM, RM | {"rejected": None}], "row 2: column 'rejected': got no texts"),
    "numbers": ([RM, RM | {"rejected": [1, 2, 3]}], "row 2: column 'rejected': got no texts"),
    "a list among texts": (
        [pair(1, 0, 0), pair(1, 0, 1) | {"chosen": ["a"]}],
        "row 2: column 'chos",
    ),
    "num_correct": ([best_of([1], [2], 0, num_correct=2)], "row 1: num_correct 2, but 1 texts"),
    "num_correct true": ([best_of([1], [2], 0, num_correct=True)], "row 1: num_correct True"),
    "num_correct nan": ([best_of([1], [2], 0, num_correct="1")], "row 1: num_correct '1'"),
    "id": ([TIED, TIED | {"id": "7"}], "row 2: id '7'"),
    "id twice": ([TIED, TIED], "row 2: id 'tied:1', which row 1 has"),
    "alone": ([TIED], "nothing to count"),
    "no chosen": ([{"prompt": "x", "text": "y"}], "expected chosen and rejected"),
    "no prompt": ([{"chosen": ["a 1"], "rejected": ["b 1"]}], "no prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_right_are_one_line(case, capsys):
    rows, message = BAD[case]
    line = refusal(["--rm", "rules:last", "--dataset", write(rows), "--out", "o", *CPU], capsys)
    assert message in line and not Path("o").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--model is missing: policies (or --best-of), or --rm and --dataset"),
        ("--rm rules:last", "--rm and --dataset"),
        ("--rm rules:last --dataset d.jsonl --by nothing", "expected 'nothing' (--by)"),
        ("--rm rules:last rules:last --dataset d.jsonl", "given twice"),
        ("--rm rules:last --dataset d.jsonl --rm-weights 1 2", "--rm-weights: got 2"),
        ("--rm rules:last --dataset d.jsonl --rm-average", "--rm-average: expected several"),
        ("--rm rules:broken --dataset d.jsonl", "row 1: got a score of [nan"),
        ("--rm rules:last --dataset d.jsonl --eval-share 0.1", "--eval-share: for policies alone"),
        ("--rm rules:last --dataset d.jsonl --eval-split=x", "--eval-split: for policies alone"),
        ("--rm rules:last --dataset d.jsonl --start lm", "--start: for policies alone"),
        ("--rm rules:last --dataset d.jsonl --temperature 1.0", "--temperature: for policies"),
        ("--rm rules:last --dataset d.jsonl --standardize-rewards", "--standardize-rewards: for"),
        ("--rm rules:last --best-of 2 --by x", "--by: for reward models alone"),
        ("--best-of 2 4 2", "--best-of 2: given twice"),
        ("--best-of 0", "--best-of 0: expected a number in [1, 10000]"),
        ("--best-of true", "--best-of"),
        ("--best-of 2 --dataset d.jsonl --rm rules:last", "needs --start and --rm, too"),
        ("--dataset d.jsonl", "--rm and --dataset"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, message, capsys):
    write([pair(1, 0, n) for n in range(3)])
    assert message in refusal([*flags.split(), "--out", "o", *CPU], capsys)
    assert not Path("o").exists()


# ---- best of n ----


def test_best_of_n_of_a_policy(models, capsys):
    """Its estimates are those of samples drawn by hand with the same seed."""
    data = tiny.rows("p.jsonl", {"prompt": "what is {n} film ?"}, 20)
    flags = ["--start", models["lm"], "--rm", "rules:length", "--dataset", data, *CPU]
    flags += ["--eval-prompts", "2", "--max-new-tokens", "3", "--out", "o", "--eval-share", "0.5"]
    evaluate.main(["--best-of", "4", "1", "2", *flags])
    results = json.loads(Path("o/results.json").read_text())
    assert results["best_of_samples"] == 5 and results["comparisons"] == []
    assert [point["n"] for point in results["best_of"]] == [1, 2, 4]
    assert "best of n samples of the start policy, from 5 per prompt" in capsys.readouterr().out
    bounds = [point["kl_bound"] for point in results["best_of"]]
    assert bounds == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    rewards = [point["reward"] for point in results["best_of"]]
    assert rewards == sorted(rewards) and rewards[0] < rewards[2]
    for one in results["best_of"]:
        assert one["reward_low"] <= one["reward"] <= one["reward_high"]
    assert results["best_of"][0]["win_rate"] == 0.5
    run = read_run("o")
    assert run.kind == "best_of" and [point["kl_sft"] for point in run.points] == bounds
    assert [point["reward"] for point in run.points] == rewards
    pytest.importorskip("matplotlib")
    plot.main(["o", "--out", "f.png"])
    assert Path("f.png").stat().st_size > 1000
    evaluate.main(["--model", models["lm"], *flags[:-4], "--out", "e", "--eval-share", "0.5"])
    assert "no best_of in it" in refusal(["e", "--out", "g.png"], capsys, plot.main)


def test_the_best_is_sought_among_the_samples_of_one_prompt(models):
    """A reward that all samples of a prompt share has no best one: nothing is won or gained."""
    data = tiny.rows("p.jsonl", {"prompt": "what is {n} film ?"}, 20)
    flags = ["--start", models["lm"], "--rm", "rules:of_prompt", "--dataset", data, *CPU]
    flags += ["--eval-prompts", "3", "--max-new-tokens", "2", "--out", "o", "--eval-share", "0.5"]
    evaluate.main(["--best-of", "1", "4", *flags])
    one, four = json.loads(Path("o/results.json").read_text())["best_of"]
    assert one["reward"] == pytest.approx(four["reward"]) and four["win_rate"] == 0.5


def test_prompts_without_a_reward_are_left_out_of_best_of_n(models, capsys):
    data = tiny.rows("p.jsonl", {"prompt": "what is {n} film ?"}, 20)
    flags = ["--start", models["lm"], "--rm", "rules:of_some", "--dataset", data, *CPU]
    flags += ["--eval-prompts", "9", "--max-new-tokens", "2", "--out", "o", "--eval-share", "0.5"]
    evaluate.main(["--best-of", "1", "2", *flags])
    said = re.search(r"--best-of: (\d+) of (\d+) prompts are left out", capsys.readouterr().out)
    assert 0 < int(said[1]) < int(said[2]) - 1
    one, two = json.loads(Path("o/results.json").read_text())["best_of"]
    assert 0 < one["reward"] <= two["reward"] and one["reward_low"] > 0


def test_gold_is_that_of_the_sample_which_the_reward_takes():
    rewards, gold = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[7.0, 8.0, -9.0]])
    assert best_of_n(rewards, 2, gold).item() == pytest.approx((8 - 9 - 9) / 3)


def test_generate_writes_the_best_of_each_group(models, capsys):
    """The same samples as without --best-of, and of each group the first of the highest reward."""
    flags = ["--model", models["lm"], "--rm", "rules:length", "--prompt", "what", "is", *CPU]
    flags += ["--max-new-tokens", "4"]
    generate.main([*flags, "--samples", "6", "--out", "all.jsonl"])
    generate.main([*flags, "--samples", "2", "--best-of", "3", "--out", "best.jsonl"])
    every, best = ([json.loads(line) for line in open(f"{n}.jsonl")] for n in ("all", "best"))
    groups = [every[i : i + 3] for i in range(0, 12, 3)]
    assert best == [max(group, key=lambda row: row["reward"]) for group in groups]
    assert "4 completions in best.jsonl" in capsys.readouterr().out
    without = [flag for flag in flags if flag not in ("--rm", "rules:length")]
    assert "--best-of needs --rm" in refusal([*without, "--best-of", "2"], capsys, generate.main)
    flags[flags.index("rules:length")] = "rules:broken"
    line = refusal([*flags, "--best-of", "2"], capsys, generate.main)
    assert "got a reward of nan" in line and "finite" in line
