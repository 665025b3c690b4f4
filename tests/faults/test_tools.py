"""Tools: a run's own flags, whole files, endpoints as they answer today, clear verdicts, plots."""

import contextlib
import csv
import datetime
import decimal
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from minalign.measuring.policies import before_after_table
from minalign.running.errors import UserError, one_line_errors
from minalign.running.run_folder import claimed_folder
from minalign.tools import asking, evaluate, generate, judge, plot, policies_compared, score
from minalign.tools.verdicts import parse_verdict

CPU, OUT = ["--device", "cpu"], ["--out", "o"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {"lm": tiny.policy(folder / "lm"), "rm": tiny.reward_model(folder / "rm")}
    return made | {"other": tiny.policy(folder / "other", seed=1)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in open(path)]


def refusal(main, argv, capsys):
    """The one line that a tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error, one_line_errors():
        main(argv)
    said = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("tool", ["judge", "evaluate"])
def test_a_second_process_in_the_folder_of_a_tool_is_refused(here, models, tool, capsys):
    tiny.rows("c.jsonl", {"prompt": "q", "completion": "a"}, 2)
    argv = {
        "judge": ["--a", "c.jsonl", "--b", "c.jsonl", "--judge", models["lm"]],
        "evaluate": ["--model", a_run(here / "run", models["lm"], dataset="c.jsonl")],
    }[tool]
    argv += ["--rm", models["rm"]] if tool == "evaluate" else []
    with claimed_folder(SimpleNamespace(out="o"), tool):
        said = refusal({"judge": judge, "evaluate": evaluate}[tool].main, [*argv, *OUT], capsys)
    assert "is running there" in said and not Path("o").exists()


BROKEN = {
    "pairs gone": ("pairs.jsonl", None),
    "pairs cut": ("pairs.jsonl", '{"prompt": "x"'),
    "pairs without b": ("pairs.jsonl", '{"prompt": "x", "a": "y"}\n'),
    "pairs too deep": ("pairs.jsonl", "[" * 5000),
    "answers too deep": ("answers.jsonl", "[" * 5000 + "\n"),
    "answers of numbers": ("answers.jsonl", "1\n"),
    "config too deep": ("config.json", '{"a":' * 5000),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_folder_of_a_judge_is_one_line(endpoint, damage, capsys):
    endpoint(lambda body: "Verdict: 1")
    url, (name, content) = json.loads(Path("out/config.json").read_text())["judge"], BROKEN[damage]
    Path("out", name).unlink() if content is None else Path("out", name).write_text(content)
    flags = ["--a", "a.jsonl", "--b", "b.jsonl", "--judge", url, "--judge-model", "j"]
    assert name in refusal(judge.main, [*flags, "--out", "out", "--resume"], capsys)


# ---- a run's own flags ----


def a_run(path, model, **settings):
    """The folder of a run of `model`, as train_policy.py leaves it."""
    path.mkdir(parents=True)
    (path / "model").symlink_to(model)
    had = dict(model=model, rm=None, dataset="", subset="", split="train", eval_split="")
    had |= dict(eval_share=0.1, split_seed=0, prompt_column="", prompt_tokens="", eval_prompts=4)
    had |= dict(max_prompt_tokens=None, rm_weights=None, rm_average=False, lr=1e-5, seed=3)
    had |= dict(standardize_rewards=False, format="auto", max_new_tokens=5, temperature=0.5)
    had |= dict(argv=["train_policy.py"], versions={})
    (path / "config.json").write_text(json.dumps(had | settings))
    return str(path)


@pytest.fixture
def sampled(monkeypatch):
    """What each call of sample_completions was asked for, in any tool."""
    calls = []

    def spy(real):
        def call(policy, prompts, **words):
            calls.append(words | {"prompts": prompts})
            return real(policy, prompts, **words)

        return call

    import minalign.measuring.policies
    import minalign.rollout

    for module in (minalign.rollout, minalign.measuring.policies, generate):
        real = module.sample_completions
        monkeypatch.setattr(module, "sample_completions", spy(real))
    return calls


@pytest.mark.parametrize("inside", ["", "/model"])
def test_generate_takes_temperature_and_length_of_the_run(here, models, sampled, capsys, inside):
    path = a_run(here / "run", models["lm"], max_new_tokens=3, temperature=0.25) + inside
    generate.main(["--model", path, "--prompt", "what", *CPU])
    assert (sampled[0]["temperature"], sampled[0]["max_new_tokens"]) == (0.25, 3)
    said = capsys.readouterr().out
    assert "run" in said and "--temperature=0.25" in said and "--max-new-tokens=3" in said
    generate.main(["--model", path, "--prompt", "what", *CPU, "--temperature=1.0"])
    assert (sampled[1]["temperature"], sampled[1]["max_new_tokens"]) == (1.0, 3)
    assert "--temperature" not in capsys.readouterr().out
    generate.main(["--model", models["lm"], "--prompt", "what", *CPU, "--max-new-tokens", "2"])
    assert (sampled[2]["temperature"], sampled[2]["max_new_tokens"]) == (1.0, 2)


def test_generate_takes_the_format_of_the_run(here, models, sampled):
    path = a_run(here / "run", models["lm"], format="plain")
    generate.main(["--model", path, "--prompt", "what", *CPU])
    generate.main(["--model", path, "--prompt", "what", "--format", "chat", *CPU])
    plain, chat = (len(call["prompts"][0]) for call in sampled)
    assert plain < chat  # the template's tokens


@pytest.fixture
def prompts(here):
    return tiny.rows(here / "p.jsonl", {"id": "{n}", "question": "q", "prompt": "what is {n} then"})


def test_generate_with_out_alone_answers_what_the_run_held_out(here, models, prompts):
    path = a_run(here / "run", models["lm"], dataset=prompts, eval_share=0.5, eval_prompts=6)
    generate.main(["--model", path, "--out", "o.jsonl", *CPU])
    evaluate.main(["--model", path, "--rm", models["rm"], "--out", "e", "--eval-prompts=6", *CPU])
    held_out = {row["prompt"] for row in lines("e/samples.jsonl")}
    rows = lines("o.jsonl")
    asked = {row["prompt"][-1]["content"] for row in rows}
    assert len(rows) == len(asked) == len(held_out) == 6
    assert all(any(text in whole for whole in held_out) for text in asked)
    message = "--data is missing"
    with pytest.raises(UserError, match=message):
        generate.main(["--model", models["lm"], "--out", "x.jsonl", *CPU])


def test_evaluate_takes_data_start_length_and_temperature_of_its_runs(
    here, models, prompts, sampled, capsys
):
    settings = dict(dataset=prompts, eval_share=0.4, split_seed=7, temperature=0.5)
    runs = [a_run(here / f"run-{i}", models["lm"], seed=i, **settings) for i in (1, 2)]
    flags = ["--rm", models["rm"], *CPU]
    evaluate.main(["--model", *runs, *flags, "--out", "e"])
    config = json.loads(Path("e/config.json").read_text())
    assert config["dataset"] == prompts and config["start"] == models["lm"]
    assert (config["eval_share"], config["split_seed"], config["eval_prompts"]) == (0.4, 7, 4)
    assert {(c["temperature"], c["max_new_tokens"]) for c in sampled} == {(0.5, 5)}
    assert f"as {runs[0]}, {runs[1]} ran: " in capsys.readouterr().out
    # typed by hand, it is the same
    by_hand = f"--dataset {prompts} --start {models['lm']} --eval-share 0.4 --split-seed 7"
    by_hand += " --temperature 0.5 --max-new-tokens 5 --eval-prompts 4 --out f"
    evaluate.main(["--model", *runs, *flags, *by_hand.split()])
    results = [json.loads(Path(f"{name}/results.json").read_text()) for name in "ef"]
    assert results[0] == results[1]


def test_policies_whose_paths_end_alike_are_told_apart(here, models, prompts, capsys):
    """None of their comparisons is lost."""
    names = [here / name / "a-long-name-of-a-run" for name in "ab"]
    runs = [a_run(name, models["lm"], dataset=prompts, eval_share=0.4) for name in names]
    evaluate.main(["--model", *runs, "--rm", models["rm"], *CPU, *OUT])
    said = capsys.readouterr().out
    assert re.findall(r"^(\d) [^ ]+ minus (\d)", said, re.M) == [("1", "0"), ("2", "0"), ("2", "1")]


def test_one_held_out_prompt_has_no_interval(here, models, prompts, capsys):
    run = a_run(here / "run", models["lm"], dataset=prompts, max_prompt_tokens=None)
    argv = ["--model", run, "--rm", models["rm"], "--eval-split", "train[:1]", *CPU, *OUT]
    assert "1 held-out prompt" in refusal(evaluate.main, argv, capsys)


def test_a_flag_wins_and_of_other_data_no_split_is_taken(here, models, prompts):
    path = a_run(here / "run", models["lm"], dataset=prompts, split_seed=7, eval_share=0.4)
    other = tiny.rows(here / "q.jsonl", {"prompt": "other {n}"})
    flags = ["--model", path, "--rm", models["rm"], "--eval-prompts", "2", *CPU]
    evaluate.main([*flags, "--dataset", other, "--out", "e"])
    config = json.loads(Path("e/config.json").read_text())
    assert (config["dataset"], config["split_seed"], config["eval_share"]) == (other, 0, 0.1)
    assert (config["temperature"], config["start"]) == (0.5, models["lm"])
    evaluate.main([*flags, "--dataset", prompts, "--split-seed", "1", "--out", "f"])
    config = json.loads(Path("f/config.json").read_text())
    assert (config["split_seed"], config["eval_share"]) == (1, 0.4)  # the run's own data


def test_runs_that_differ_in_what_is_taken_are_refused_by_name(here, models, prompts, capsys):
    runs = [
        a_run(here / f"run-{i}", models["lm"], dataset=prompts, rm=[models["rm"]], temperature=t)
        for i, t in ((1, 0.5), (2, 0.7))
    ]
    line = refusal(evaluate.main, ["--model", *runs, "--out", "e", *CPU], capsys)
    for word in (*runs, "--temperature", "0.5", "0.7"):
        assert word in line
    judged = ["--a", runs[0], "--b", runs[1], "--prompts", prompts, "--judge", models["lm"]]
    assert "give --temperature" in refusal(judge.main, [*judged, *CPU], capsys)


@pytest.mark.parametrize("broken", ["{", "[]", "[" * 5000, '"x"'])
def test_a_damaged_config_of_a_run_is_one_line(here, models, broken, capsys):
    path = a_run(here / "run", models["lm"])
    (here / "run/config.json").write_text(broken)
    line = refusal(generate.main, ["--model", path, "--prompt", "x", *CPU], capsys)
    assert "run/config.json" in line


@pytest.mark.parametrize("value", ["hot", -1, [1, 2], {"a": 1}, 1e400, True])
def test_a_damaged_value_of_a_run_is_refused(here, models, value, capsys):
    path = a_run(here / "run", models["lm"], temperature=value)
    line = refusal(generate.main, ["--model", path, "--prompt=x"], capsys)
    assert "--temperature" in line or "unrecognized arguments: 2" in line


# ---- files: whole or not at all ----


@pytest.fixture
def answers(here):
    """A parquet file with a column of each type that JSON lacks."""
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "at": when,
        "day": when.date(),
        "raw": b"\xff\x00",
        "price": decimal.Decimal("1.50"),
        "lasts": datetime.timedelta(seconds=90),
        "gap": math.nan,
        "nested": {"at": [when], "blob": b"x"},
    }
    table = {"prompt": ["q"] * 3, "completion": ["yes", "no", "why not"]}
    table |= {name: pyarrow.array([value] * 3) for name, value in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), "a.parquet")
    return "a.parquet"


@pytest.mark.parametrize("tool", ["score", "generate"])
def test_any_column_type_goes_through(here, models, answers, tool):
    """A-G5, S7."""
    if tool == "score":
        score.main(["--rm", models["rm"], "--data", answers, "--out", "o.jsonl", *CPU])
    else:
        flags = ["--model", models["lm"], "--data", answers, "--max-new-tokens", "2"]
        generate.main([*flags, "--out", "o.jsonl", *CPU])
    rows = lines("o.jsonl")
    assert len(rows) == 3 and not Path("o.jsonl.part").exists()
    for row in rows:
        assert row["at"] == "2026-01-02T03:04:05" and row["day"] == "2026-01-02"
        assert row["raw"] == "/wA=" and row["price"] == "1.50" and row["gap"] is None
        assert row["lasts"] == "0:01:30"
        assert row["nested"] == {"at": ["2026-01-02T03:04:05"], "blob": "eA=="}


def test_values_of_any_type_become_json():
    from minalign.running.files import to_json

    cases = [
        (numpy.float32(1.5), 1.5),
        (numpy.int64(3), 3),
        (numpy.bool_(True), True),
        (numpy.array([[1, 2]]), [[1, 2]]),
        (numpy.array(["2026-01-02"], dtype="datetime64[ns]"), ["2026-01-02T00:00:00.000000000"]),
        (numpy.datetime64("2026-01-02"), "2026-01-02"),
        (math.inf, None),
        ({1: {"a"}, (2, 3): None}, {"1": ["a"], "[2, 3]": None}),
        (bytearray(b"hi"), "aGk="),
        (Path("x/y"), "x/y"),
        (datetime.time(1, 2), "01:02:00"),
        ("\ud83d", "\ud83d"),
        (decimal.Decimal("NaN"), None),
        (2**70, 2**70),
    ]
    for value, expected in cases:
        assert json.loads(to_json({"x": value}), parse_constant=pytest.fail) == {"x": expected}


BAD_OUT = ["no/such/dir/x.{}", "folder.{}", "n" * 300 + ".{}", "file.txt/x.{}", "\0.{}"]


@pytest.mark.parametrize("out", BAD_OUT)
@pytest.mark.parametrize("tool", ["score", "generate", "plot"])
def test_an_out_that_cannot_be_written_is_refused_before_any_work(here, tool, out, capsys):
    """S6. The models do not exist: nothing was loaded."""
    Path("file.txt").write_text("")
    main, flags, ending = {
        "score": (score.main, ["--rm", "no-rm", "--data", "no.jsonl"], "jsonl"),
        "generate": (generate.main, ["--model", "no-lm", "--prompt", "x"], "jsonl"),
        "plot": (plot.main, ["no-run"], "png"),
    }[tool]
    Path(f"folder.{ending}").mkdir()
    out = out.format(ending)
    assert "--out" in refusal(main, [*flags, "--out", out], capsys)
    assert not [path for path in here.rglob("*.part")]


def test_half_a_file_is_never_taken_for_a_whole_one(here, models, capsys, monkeypatch):
    """Killed in the middle: what was done is in .part, and the next try works."""
    real, calls = generate.sample_completions, []

    def stops(*args, **words):
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **words)

    monkeypatch.setattr(generate, "sample_completions", stops)
    data = tiny.rows(here / "p.jsonl", {"prompt": "what {n}"}, 8)
    flags = ["--model", models["lm"], "--data", data, "--max-new-tokens", "2", *CPU]
    flags += ["--batch-size", "2", "--out", "o.jsonl"]
    with pytest.raises(KeyboardInterrupt):
        generate.main(flags)
    assert not Path("o.jsonl").exists() and len(lines("o.jsonl.part")) == 4
    generate.main(flags)
    assert len(lines("o.jsonl")) == 8 and not Path("o.jsonl.part").exists()
    assert "o.jsonl.part: left by" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["score", "generate", "plot"])
def test_a_full_disk_is_one_line(here, models, tool, capsys):
    """No file may grow beyond 200 bytes."""
    data = tiny.rows(here / "p.jsonl", {"prompt": "what {n}", "completion": "x" * 20}, 8)
    write_log(here / "run")
    main, flags, out = {
        "score": (score.main, ["--rm", models["rm"], "--data", data, *CPU], "o.jsonl"),
        "generate": (generate.main, ["--model", models["lm"], "--data", data, *CPU], "o.jsonl"),
        "plot": (plot.main, ["run"], "o.png"),
    }[tool]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        line = refusal(main, [*flags, "--out", out], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert out in line and "File too large" in line and not Path(out).exists()


def test_one_row_beyond_the_context_does_not_end_a_tool(here, models, capsys):
    """It is dropped and counted, and does not shorten the completions beside it."""
    texts = ["a", "b", "long " * 160 + "x", "c" * 2000, "d"]
    with open("d.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": t, "completion": "good"}) + "\n" for t in texts)
    data = ["--data", "d.jsonl", *CPU]
    score.main(["--rm", models["rm"], *data, "--out", "s.jsonl"])
    assert ["reward" in row for row in lines("s.jsonl")] == [True, True, True, False, True]
    assert "context of 1024" in capsys.readouterr().out
    argv = ["--model", models["lm"], *data, "--max-new-tokens", "300"]
    generate.main([*argv, "--out", "g.jsonl"])
    assert "fills the context" in capsys.readouterr().out
    with open("d.jsonl", "w") as file:  # without the long ones
        file.writelines(json.dumps({"prompt": t}) + "\n" for t in ("a", "b", "d"))
    generate.main([*argv, "--out", "h.jsonl"])
    long, short = lines("g.jsonl"), lines("h.jsonl")
    assert [row["completion"] for row in long[:2]] == [row["completion"] for row in short[:2]]


@pytest.mark.parametrize("tool", ["score", "generate"])
def test_an_out_that_is_a_folder_is_said_once(here, models, tool, capsys):
    argv = {
        "score": ["--rm", models["rm"], "--data", "d.jsonl"],
        "generate": ["--model", models["lm"], "--prompt", "x"],
    }[tool]
    said = refusal({"score": score, "generate": generate}[tool].main, [*argv, "--out", "."], capsys)
    assert said == "error: --out .: is a folder: give a file in it"


def test_a_second_scoring_says_that_it_replaces_the_first(here, models, capsys):
    data = tiny.rows(here / "a.jsonl", {"prompt": "q", "completion": "yes", "reward": 99.0}, 3)
    score.main(["--rm", models["rm"], "--data", data, "--out", "o.jsonl", *CPU])
    assert "3 earlier rewards replaced" in capsys.readouterr().out
    assert all(row["reward"] != 99.0 for row in lines("o.jsonl"))


def test_the_reward_of_an_earlier_completion_is_not_that_of_a_new_one(here, models, capsys):
    row = {"id": "{n}", "prompt": "q", "completion": "old", "ended": True, "reward": 99.0}
    data = tiny.rows(here / "a.jsonl", row, 3)
    flags = ["--model", models["lm"], "--data", data, "--max-new-tokens", "2", "--samples", "2"]
    generate.main([*flags, "--out", "o.jsonl", *CPU])
    rows = lines("o.jsonl")
    assert [row["id"] for row in rows] == list("001122")  # other columns go through
    assert all("reward" not in row and row["completion"] != "old" for row in rows)
    assert "completion, ended, reward" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["generate", "judge"])
@pytest.mark.parametrize("row", [{"question": "q"}, {"a": "b", "c": 1}])
def test_a_column_that_is_not_there_is_named_beside_those_that_are(here, models, tool, row, capsys):
    """A-H4."""
    data = tiny.rows(here / "d.jsonl", row, 3)
    line = {
        "generate": lambda: refusal(generate.main, ["--model", "x", "--data", data], capsys),
        "judge": lambda: refusal(
            judge.main,
            ["--a", models["lm"], "--b", models["lm"], "--prompts", data, "--judge", models["lm"]],
            capsys,
        ),
    }[tool]()
    assert str(list(row)) in line and "expected prompt" in line


@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_generate_reads_the_columns_that_training_reads(here, models, column):
    """A-H4: train_policy.py reads them by themselves."""
    dialogue = [tiny.U("what {n}"), tiny.A("so")]
    data = tiny.rows(here / "d.jsonl", {column: dialogue}, 3)
    flags = ["--model", models["lm"], "--data", data, "--max-new-tokens", "2"]
    generate.main([*flags, "--out", "o.jsonl", *CPU])
    assert [row["prompt"] for row in lines("o.jsonl")] == [[tiny.U(f"what {n}")] for n in range(3)]


# ---- verdicts ----

CLEAR = {
    **dict.fromkeys(
        [
            "**Verdict:** 1",
            "**Verdict**: 1",
            "Verdict: **1**",
            "### Verdict: 1",
            "- Verdict: 1",
            '"Verdict: 1"',
            "`Verdict: 1`",
            "> **Verdict:** 1",
            "***Verdict: 1***",
            "__Verdict__: __1__",
            "* Verdict: _1_.",
            "“Verdict: 1”",
            "1. Verdict: 1",
            "Verdict: [1]",
            "Verdict: (1)",
            "Verdict: [[1]]",
            "Verdict: $\\boxed{1}$",
            "<b>Verdict: 1</b>",
            '{"verdict": "1"}',
            "```\nVerdict: 1\n```",
            "## Verdict\n\n1",
            "**Verdict:**\n**1**",
            "Verdict: 1\n\n---",
            "Verdict\uff1a\uff11",
            "Verdict:\u00a01",
            "Verdict \u2014 1",
            "Final verdict: 1",
            "Verdict: Answer 1",
            "Verdict: 1 (clearly)",
            "**Verdict:** 1 (slightly better).",
            "<answer>Verdict: 1</answer>",
            "Verdict: 1<|im_end|>",
            "\u2705 Verdict: 1",
            "Here is my verdict:\n\n1. It is short.\n2. It is clear.\n\nVerdict: 1",
            "<think>Verdict: 2? Or Verdict: tie</think>\nVerdict: 1",
            "I think so.\nVerdict: 2\n</think>\n\n**Verdict: 1**",
            "<think>a</think> no <think>Verdict: 2</think>Verdict: 1",
            "[THINK]Verdict: 2[/THINK]Verdict: 1",
        ],
        "1",
    ),
    "**Verdict:** Tie": "tie",
    "### Verdict: **TIE**.": "tie",
    "> Verdict: 2": "2",
}
UNCLEAR = [
    "**Verdict:** 1 or 2",
    "Verdict: 1 (perhaps)",
    "Verdict: 1 (clearly not 2)",
    "<s>Verdict: 1</s>",
    "**Verdict:** 1, perhaps",
    "**Verdict:** 1?",
    "**Verdict:** 1/2",
    "**Verdict:** 1.5",
    "**Verdict:** -1",
    "**Verdict:** 1\n**Verdict:** 2",
    "## Verdict\n1\n## Verdict\n2",
    "Verdict: 1\nOn reflection:\n### Verdict: tie",
    "~~Verdict: 1~~",
    "Verdict: 1\n~~Verdict: 2~~",
    "Verdict: (1) or (2)",
    "Verdict: 1 [2]",
    "Verdict: [1, 2]",
    "Verdict: 12",
    "Verdict: **1**2",
    "Verdict: not 1",
    "<think>Verdict: 1",
    "<think>\nwell\n\nVerdict: 1",
    "Verdict: 1</think>",
    "Verdict: 1</think>I am not sure.",
    "The verdict is not 1",
    "1",
    "**1**",
    "Answer **1** is better.",
    "Verdict: 1 \u2713 Verdict: 2",
    "Verdict: \u0661",
]


@pytest.mark.parametrize("answer", CLEAR)
def test_a_clear_verdict_counts_whatever_markdown_is_around_it(answer):
    """A-G18."""
    assert parse_verdict(answer) == CLEAR[answer]


@pytest.mark.parametrize("answer", UNCLEAR)
def test_an_unclear_verdict_or_two_of_them_count_for_nothing(answer):
    assert parse_verdict(answer) is None


def test_an_endpoint_may_be_spelled_in_capitals():
    assert judge.is_endpoint("HTTP://host/v1") and not judge.is_endpoint("http-judge")


def test_long_answers_are_read_in_linear_time():
    start = time.monotonic()
    for unit in ("verdict ", "\n", "verdict:\n", "*", "-", " ", "</think", "verdict 1 ", "["):
        parse_verdict(unit * 200_000 + "x")
    assert time.monotonic() - start < 5


# ---- endpoints ----


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(body)
        answer = server.reply(body)
        if answer is None:
            return server.drip(self)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        if not isinstance(content, bytes):
            choice = {"message": {"role": "assistant", "content": content}}
            content = json.dumps({"choices": [choice]} if status == 200 else content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(here, monkeypatch):
    """endpoint(reply, *flags) judges two files of four pairs; returns (results, requests)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(asking, "FIRST_DELAY", 0.01)
    tiny.rows("a.jsonl", {"prompt": "q{n}", "completion": "a{n}"}, 4)
    tiny.rows("b.jsonl", {"prompt": "q{n}", "completion": "b{n}"}, 4)
    servers = []

    def start(reply, *flags, drip=None, out="out"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        server.reply, server.drip, server.requests = reply, drip, []
        server.lock = threading.Lock()
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        argv = ["--a", "a.jsonl", "--b", "b.jsonl", "--judge", url, "--judge-model", "j"]
        try:
            judge.main([*argv, "--out", out, *flags])
        except UserError as error:
            assert "no pair was scored" in str(error), error
        return json.loads(Path(out, "results.json").read_text()), server.requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refuses(name, message, **more):
    """Refuses a parameter; `message` may be what FastAPI, OpenAI or a Go server writes."""

    def reply(body):
        if name in body:
            return more.get("status", 400), message
        return "Verdict: 1"

    return reply


OPENAI = "Unsupported parameter: '{}' is not supported with this model."
INSTEAD = "Use 'max_completion_tokens' instead."
OTHER = "Unsupported value: 'temperature' does not support 0 with this model. "
DEFAULT = "Only the default (1) value is supported."
EXTRA = {"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}
REFUSED = {  # parameter, what the server says, and the name that it wants instead
    "openai": (
        "max_tokens",
        {"error": {"message": f"{OPENAI.format('max_tokens')} {INSTEAD}", "param": "max_tokens"}},
        "max_completion_tokens",
    ),
    "another name": (
        "max_tokens",
        {"error": "max_tokens is deprecated, use `max_output_tokens`"},
        "max_output_tokens",
    ),
    "no other name": ("max_tokens", {"error": 'json: unknown field "max_tokens"'}, None),
    "temperature": ("temperature", {"error": {"message": OTHER + DEFAULT}}, None),
    "pydantic": ("temperature", {"detail": [EXTRA]}, None),
    "in plain text": ("temperature", b"property temperature is unsupported", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_that_the_server_refuses_by_name_is_asked_as_it_wants(case, endpoint, capsys):
    """A-G17."""
    name, message, other = REFUSED[case]
    status = 422 if case == "pydantic" else 400
    results, requests = endpoint(refuses(name, message, status=status), "--batch-size", "1")
    assert results["scored"] == 4 and len(requests) == 9  # refused once, then known
    last = requests[-1]
    assert name not in last and (other is None or last[other] == 512)
    assert len(last) == 3 + bool(other) and {"model", "messages"} < set(last)
    said = capsys.readouterr().out
    assert said.count(f"refuses {name}") == 1


def test_two_refused_parameters(endpoint):
    def reply(body):
        for name in ("temperature", "max_tokens"):
            if name in body:
                return 400, {"error": {"message": OPENAI.format(name)}}
        return "Verdict: 1"

    assert endpoint(reply)[0]["scored"] == 4


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context "
        "length is 128 tokens and your request has 90 input tokens",
        "no such thing",
        "temperature: everything is wrong, whatever is left out",
        "max_tokens: use max_{n}_tokens",
    ],
)
def test_a_question_that_stays_refused_has_failed_after_few_requests(endpoint, message):
    count = iter(range(10**6))
    reply = lambda body: (400, {"error": message.replace("{n}", f"x{next(count)}")})  # noqa: E731
    results, requests = endpoint(reply)
    assert results["failed_answers"] == 8 and len(requests) <= 8 * 5
    if "too large" in message or "no such" in message:
        assert len(requests) == 8


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Verdict: 1"}],
        [{"type": "text", "text": "So.\nVerd"}, {"type": "text", "text": "ict: 1"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "2"}]}, {"text": "Verdict: 1"}],
        ["Verdict: 1"],
        [{"type": "output_text", "text": "**Verdict:** 1", "annotations": []}],
    ],
)
def test_content_in_parts_is_joined(endpoint, content):
    """A-G18."""
    assert endpoint(lambda body: content)[0]["scored"] == 4


BOMBS = {
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "in a choice": b'{"choices": ' + b"[" * 100_000,
    "closed": b"[" * 50_000 + b"]" * 50_000,
    "long number": b'{"choices": ' + b"9" * 100_000 + b"}",
    "number as content": b'{"choices": [{"message": {"content": [3]}}]}',
    "message is a text": b'{"choices": [{"message": "x"}]}',
    "text is null": b'{"choices": [{"message": {"content": [{"text": null}]}}]}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_body_that_is_no_answer_has_failed(endpoint, bomb):
    """S10."""
    assert endpoint(lambda body: BOMBS[bomb])[0]["failed_answers"] == 8


def test_a_reply_without_end_has_failed(endpoint, monkeypatch):
    monkeypatch.setattr(asking, "LONGEST_REPLY", 1000)
    good = json.dumps({"choices": [{"message": {"content": "Verdict: 1" + " " * 2**20}}]})
    results, _ = endpoint(lambda body: good.encode(), "--retries", "0")
    assert results["failed_answers"] == 8


def byte_by_byte(text, closed):
    def drip(handler):
        with contextlib.suppress(OSError):
            for byte in text:
                handler.connection.sendall(bytes([byte]))
                if closed.wait(0.05):
                    return

    return drip


DRIPS = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n",
    "body without a length": b"HTTP/1.1 200 OK\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\nX-A: ",
    "status line": b"HTTP/1.1 200 ",
    "an error's body": b"HTTP/1.1 400 Bad\r\nContent-Length: 5000\r\n\r\n",
}


@pytest.mark.parametrize("where", DRIPS)
def test_a_server_that_sends_byte_by_byte_has_timed_out(endpoint, where):
    """S2."""
    closed = threading.Event()
    head = b"" if where in ("headers", "status line") else DRIPS[where]

    def drip(handler):
        handler.connection.sendall(head)
        byte_by_byte((DRIPS[where] if not head else b"") + b" " * 5000, closed)(handler)

    start = time.monotonic()
    flags = ["--timeout", "0.3", "--retries", "0", "--batch-size", "8"]
    results, _ = endpoint(lambda body: None, *flags, drip=drip)
    closed.set()
    assert results["failed_answers"] == 8 and time.monotonic() - start < 5
    with open("out/answers.csv", newline="") as file:
        assert all("timed out" in row["error"] for row in csv.DictReader(file))


def test_ctrl_c_ends_a_judge_that_waits(here):
    """S2: its threads do not keep the process."""
    tiny.rows("a.jsonl", {"prompt": "q", "completion": "a{n}"}, 4)
    tiny.rows("b.jsonl", {"prompt": "q", "completion": "b{n}"}, 4)
    listener = socket.create_server(("127.0.0.1", 0))  # answers nobody
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    flags = ["--a", "a.jsonl", "--b", "b.jsonl", "--judge", url, "--judge-model", "j"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "no_proxy": "*"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minalign", "judge", *flags, "--out", "o"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    listener.settimeout(60)
    listener.accept()  # it asks
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said == "stopped\n" and time.monotonic() - start < 10
    listener.close()


@pytest.mark.parametrize("reply", [lambda _: "I cannot say.", lambda _: (400, {"error": "no"})])
def test_nothing_scored_is_not_exit_status_0(endpoint, reply, capsys):
    """A-G17."""
    endpoint(reply)  # starts a server; the UserError is looked at here:
    server_flags = json.loads(Path("out/config.json").read_text())
    argv = ["--a", "a.jsonl", "--b", "b.jsonl", "--judge", server_flags["judge"]]
    line = refusal(judge.main, [*argv, "--judge-model", "j", "--out", "again"], capsys)
    assert "no pair was scored" in line and Path("again/answers.csv").exists()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r="])
def test_a_formula_in_a_text_is_quoted_for_spreadsheets(endpoint, start):
    """S12."""
    formula = start + 'HYPERLINK("http://x","y")'
    for name in "ab":
        tiny.rows(f"{name}.jsonl", {"prompt": f"{name}", "completion": "x"}, 1)
    with open("a.jsonl", "w") as a, open("b.jsonl", "w") as b:
        a.write(json.dumps({"prompt": formula, "completion": formula}) + "\n")
        b.write(json.dumps({"prompt": formula, "completion": "-1 is " + formula}) + "\n")
    endpoint(lambda body: f"{formula}\nVerdict: 1")
    with open("out/answers.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in row.values())
            assert row["completion_a"] == f"'{formula}" and row["pair"] == "1"
    assert lines("out/pairs.jsonl")[0]["a"] == formula  # the files to compute with are as given


def test_judge_takes_sampling_and_held_out_prompts_of_its_runs(here, models, prompts, sampled):
    settings = dict(dataset=prompts, eval_share=0.5, eval_prompts=3, temperature=0.5)
    runs = [
        a_run(here / name, models[model], max_new_tokens=4, **settings)
        for name, model in (("run-1", "lm"), ("run-2", "other"))
    ]
    flags = ["--a", runs[0], "--b", runs[1], "--judge", models["lm"], "--judge-tokens", "2"]
    with contextlib.suppress(UserError):  # a model of random weights says nothing
        judge.main([*flags, "--out", "j", *CPU])
    assert {(c["temperature"], c["max_new_tokens"]) for c in sampled[:2]} == {(0.5, 4)}
    evaluate.main(["--model", runs[0], "--rm", models["rm"], "--eval-prompts=3", "--out=e", *CPU])
    asked = [row["prompt"] for row in lines("j/pairs.jsonl")]
    held_out = [row["prompt"] for row in lines("e/samples.jsonl")][:3]
    assert len(asked) == 3 and all(text in whole for text, whole in zip(asked, held_out))


# ---- plots ----


def write_log(folder, steps=40, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "reward": 1.0, "kl_sft": 0.5, "length": 9.0, "grad_norm": 2.0}
            row |= {name: column(step) for name, column in columns.items()}
            file.write(json.dumps({k: v for k, v in row.items() if v != "absent"}) + "\n")
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """drawn(argv) -> axis of each panel by its label."""
    figures = pytest.importorskip("minalign.tools.figures")
    kept = []
    monkeypatch.setattr(figures.plt, "close", kept.append)

    def draw(*argv):
        plot.main([*argv])
        return {axis.get_ylabel().split("\n")[0]: axis for axis in kept[-1].axes}

    yield draw
    monkeypatch.undo()
    for figure in kept:
        figures.plt.close(figure)


def points(axis, which=-1):
    """x and y of a line that was drawn, without what nobody sees."""
    x, y = (numpy.asarray(values, float) for values in axis.lines[which].get_data())
    seen = numpy.isfinite(x + y)
    return x[seen], y[seen]


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_missing_value_costs_one_point_in_every_panel(here, drawn, seeds):
    """B27."""

    def held_out(step, value):
        return "absent" if step % 50 else value

    columns = {
        "reward": lambda step: 1.0 + step / 400 if step % 20 else None,
        "grad_norm": lambda step: 2.0 if step % 20 else 0.0,
        "eval_reward": lambda step: held_out(step, None if step == 200 else step / 400),
        "eval_kl_sft": lambda step: held_out(step, step / 100),
    }
    runs = [write_log(here / f"s-{seed}", 400, **columns) for seed in range(seeds)]
    for seed, run in enumerate(runs):
        Path(run, "config.json").write_text(json.dumps({"seed": seed}))
    axes = drawn(*runs, "--out", "f.png")
    for label, count in (("reward, training batch", 380), ("gradient norm", 380)):
        x, y = points(axes[label])
        assert len(x) >= count and x[-1] >= 399 and axes[label].texts
    x, y = points(axes["reward, training batch"])
    assert numpy.abs(y - (1 + x / 400)).max() < 0.03
    assert points(axes["gradient norm"])[1].min() > 1.9  # a skipped step's 0 is no value
    for line in axes["gradient norm"].lines:
        y = numpy.asarray(line.get_ydata(), float)
        assert (y[numpy.isfinite(y)] > 0).all()
    plane = [axis for axis in axes.values() if "KL" in axis.get_xlabel()][0]
    assert plane.lines and len(points(plane)[0]) >= 7


def test_the_label_stands_at_the_last_value_that_is_one(here, drawn):
    axes = drawn(
        write_log(here / "s", 100, reward=lambda step: None if step > 90 else float(step)),
        "--out",
        "f.png",
    )
    axis = axes["reward, training batch"]
    assert axis.texts and points(axis)[1][-1] > 80


def test_huge_values_do_not_spoil_what_comes_after_them():
    from minalign.tools.logged import smooth

    values = [1.0] * 10 + [1e30] + [1.0] * 30
    assert smooth(values, 3)[:9] == [1.0] * 9 and smooth(values, 3)[13:] == [1.0] * 28
    values = [1.0] * 5000 + [math.inf] + [1.0] * 5000
    assert set(smooth(values, 101)) == {1.0}


def test_a_run_of_one_step_can_be_seen(here, drawn):
    axes = drawn(write_log(here / "s", 1), "--out", "f.png")
    for label in ("reward, training batch", "gradient norm", "length (tokens)"):
        (line,) = axes[label].lines
        assert line.get_marker() not in (None, "None", "") and len(line.get_xdata()) == 1


def test_a_run_with_one_value_among_gaps_can_be_seen(here, drawn):
    axes = drawn(
        write_log(here / "s", 30, reward=lambda step: 1.0 if step == 7 else None), "--out", "f.png"
    )
    assert len(points(axes["reward, training batch"])[0]) >= 1


BROKEN_LINES = {
    "no JSON": "{",
    "a number": "17",
    "no step": '{"reward": 1.0}',
    "step is a text": '{"step": "x", "reward": 1.0}',
    "step is nan": '{"step": NaN, "reward": 1.0}',
    "step is null": '{"step": null}',
    "too deep": "[" * 100_000,
    "reward is a text": '{"step": 3, "reward": "x"}',
    "reward is a list": '{"step": 3, "reward": [1]}',
    "reward has 400 digits": '{"step": 3, "reward": 1' + "0" * 400 + "}",
    "half a line": '{"step": 3, "rew',
}


@pytest.mark.parametrize("broken", BROKEN_LINES)
def test_a_broken_line_is_named_by_file_and_number(here, broken, capsys):
    folder = write_log(here / "s", 5)
    log = here / "s/metrics.jsonl"
    rows = log.read_text().splitlines()
    log.write_text("\n".join([*rows[:2], BROKEN_LINES[broken], *rows[2:]]) + "\n")
    assert f"{log}: line 3" in refusal(plot.main, [folder, "--out", "f.png"], capsys)
    assert not Path("f.png").exists()


POINT = '{"eta": 0, "kl_sft": 0, "reward": 1}'
DAMAGED = {
    "front is a text": ("front.json", '"x"'),
    "front is a list": ("front.json", "[]"),
    "front too deep": ("front.json", "[" * 5000),
    "front of texts": ("front.json", '{"front": ["x"], "runs": [], "merges": []}'),
    "front empty": ("front.json", '{"front": [], "runs": [], "merges": []}'),
    "front all null": (
        "front.json",
        '{"front": [{"eta": 0, "kl_sft": 0, "reward": null}], "runs": [], "merges": []}',
    ),
    "front without KL": ("front.json", '{"front": [{"eta": 0}], "runs": [], "merges": []}'),
    "runs of numbers": ("front.json", f'{{"front": [{POINT}], "runs": [3], "merges": []}}'),
    "merges null": ("front.json", f'{{"front": [{POINT}], "runs": [], "merges": null}}'),
    "results is a list": ("results.json", "[]"),
    "results of texts": ("results.json", '{"before": {"kl_sft": "x", "reward": "y"}}'),
    "before is a list": ("results.json", '{"before": [1]}'),
    "results too deep": ("results.json", '{"before":' * 5000),
    "config is a list": ("config.json", "[1]"),
    "config too deep": ("config.json", '{"a":' * 5000),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_line(here, damage, capsys):
    """S20."""
    name, content = DAMAGED[damage]
    folder = write_log(here / "s", 5, eval_reward=lambda s: 1.0, eval_kl_sft=lambda s: 0.1)
    (here / "s" / name).write_text(content)
    assert f"s/{name}" in refusal(plot.main, [folder, "--out", "f.png"], capsys)


@pytest.mark.parametrize("huge", [1e308, -1e200])
def test_a_value_beyond_every_axis_costs_one_point(here, drawn, huge):
    folder = write_log(here / "s", 9, reward=lambda s: 1.0 if s % 2 else huge * (-1) ** (s // 2))
    assert set(points(drawn(folder, "--out", "f.png")["reward, training batch"])[1]) == {1.0}


@pytest.mark.parametrize("before", [{"reward": 1.0}, {"reward": None, "kl_sft": 0.0}])
def test_results_without_a_kl_cost_the_first_point_alone(here, drawn, before):
    """S20."""
    folder = write_log(here / "s", 5, eval_reward=lambda s: s / 5, eval_kl_sft=lambda s: s / 9)
    (here / "s/results.json").write_text(json.dumps({"before": before}))
    axes = drawn(folder, "--out", "f.png")
    plane = [axis for axis in axes.values() if "KL" in axis.get_xlabel()][0]
    assert len(points(plane)[0]) == 5


def test_a_missing_value_in_a_front_costs_one_point(here, drawn):
    front = [{"eta": e, "kl_sft": 9 * e, "reward": None if e == 0.5 else e} for e in (0, 0.5, 1)]
    merges = [{"iteration": 1, "kl_sft": None, "reward": 1.0}]
    curve = [{"step": 1, "kl_sft": 1.0, "reward": None}, {"step": 2, "kl_sft": 2.0, "reward": 0.4}]
    runs = [{"iteration": 2, "run": 1, "curve": curve}]
    (here / "w").mkdir()
    content = {"front": front, "merges": merges, "runs": runs}
    (here / "w/front.json").write_text(json.dumps(content))
    axis = drawn("w", "--out", "f.png")["reward model's score"]
    one_point, front_line = axis.lines
    assert one_point.get_marker() == "." and len(one_point.get_xdata()) == 1
    assert len(front_line.get_xdata()) == 2


def test_a_long_log_is_drawn_in_linear_time_with_few_points(here, drawn):
    """S3, at 12,000 lines here; 10^6 lines are below."""
    noise = numpy.random.default_rng(0).normal(size=12_001)
    folder = write_log(here / "s", 12_000, reward=lambda step: float(noise[step]))
    start = time.process_time()
    axes = drawn(folder, "--out", "f.png")
    assert time.process_time() - start < 10
    raw, bold = axes["reward, training batch"].lines
    assert len(bold.get_xdata()) <= 2000 and len(raw.get_xdata()) <= 4000
    assert raw.get_ydata().max() == noise[1:].max() and raw.get_ydata().min() == noise[1:].min()
    window = 2 * (12_000 // 40) + 1
    middle = noise[6_000 - window // 2 : 6_000 + window // 2 + 1].mean()
    at = numpy.interp(6_000, *bold.get_data())
    assert abs(at - middle) < 0.02


@pytest.mark.slow
def test_a_million_lines_take_seconds_and_less_than_a_gigabyte(here):
    """S3."""
    folder = write_log(here / "s", 10**6, eval_reward=lambda s: 1.0, eval_kl_sft=lambda s: s / 1e6)
    code = (
        "import resource; from minalign.tools import plot; plot.main(['s', '--out', 'f.pdf']); "
        "print(resource.getrusage(resource.RUSAGE_SELF))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    used = dict(pair.split("=") for pair in done.stdout.split("(")[1].split(")")[0].split(", "))
    assert float(used["ru_utime"]) < 60 and int(used["ru_maxrss"]) < 10**6  # kB
    assert Path(folder).exists() and Path("f.pdf").stat().st_size < 3_000_000


# ---- the terminal ----


def test_tables_have_no_negative_zero():
    table = before_after_table({"kl_sft": 0.0, "a": -0.00049}, {"kl_sft": -1e-7, "a": -0.0})
    assert "-0.000" not in table and "0.000" in table
    comparison = {
        "reward_difference": {"mean": -1e-9, "low": -1e-5, "high": -0.0},
        "win_rate": {"mean": 0.5, "low": 0.4, "high": 0.6},
    }
    assert "-0.000" not in policies_compared.comparison_line("x", comparison)


def test_no_progress_bars_where_there_is_no_terminal(here, models, capsys):
    data = tiny.rows(here / "a.jsonl", {"prompt": "q", "completion": "yes"}, 3)
    flags = ["--model", models["lm"], "--data", data, "--max-new-tokens", "2", "--out", "g.jsonl"]
    generate.main([*flags, *CPU])
    score.main(["--rm", models["rm"], "--data", data, "--out", "o.jsonl", *CPU])
    said = capsys.readouterr().err
    assert "completions:" not in said and "scores:" not in said
