"""Flags at their limits: an accepted value never gives a traceback or a hang, an error one line."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
import tiny
import torch

import train_policy
import train_rm
import warp
from minalign.running.errors import UserError, one_line, one_line_errors, visible
from minalign.running.flags import _kind, dashed

ROOT = Path(__file__).parents[2]
TOOLS = {
    name: importlib.import_module(f"minalign.tools.{name}")
    for name in ("generate", "score", "evaluate", "judge", "merge", "plot")
}
PROGRAMS = {"train_policy": train_policy, "train_rm": train_rm, "warp": warp} | TOOLS
TASK = (
    "--model lm --rm rules:short --dataset p.jsonl --steps 1 --batch-size 2 --eval-prompts 2 "
    "--max-new-tokens 2 --out new"
)
ARGUMENTS = {
    "train_policy": TASK,
    "train_rm": "--model lm --dataset d.jsonl --steps 1 --batch-size 4 --max-pairs 8 "
    "--max-eval-pairs 4 --out new",
    "warp": TASK + " --iterations 1 --runs 2 --etas 0,1",
    "generate": "--model lm --prompt what --max-new-tokens 2",
    "score": "--rm rm --data a.jsonl --out new.jsonl",
    "evaluate": "--model lm --start lm --rm rules:short --dataset p.jsonl --eval-prompts 3 "
    "--max-new-tokens 2 --out new",
    "judge": "--a a.jsonl --b a.jsonl --judge lm --judge-tokens 2 --out new",
    "merge": "--init lm --models lm lm --out new",
    "plot": "run --out new.png",
}
# Where a flag needs another one beside it
BESIDE = {
    "mu": "--anchor ema",
    "baseline_decay": "--baseline ema",
    "rm_weights": "--rm rules:short rules:const --rm-weights 1",
    **dict.fromkeys("lora_alpha lora_dropout lora_targets lora_save".split(), "--lora-rank 2"),
    **dict.fromkeys("ties num_scores rating_coef rating_range".split(), "--loss ordinal"),
    **dict.fromkeys("timeout retries".split(), "--judge http://127.0.0.1:9/v1 --judge-model x"),
    **dict.fromkeys("max_new_tokens temperature".split(), ""),
}
INTEGERS = [0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]
INTEGERS = [*map(str, INTEGERS), "9" * 5000, "1.5", "nan", "", "1e3", "\udcff", "5\n5", "٣"]
FLOATS = "0 1 -1 0.5 -0.0 2147483648 18446744073709551616 nan inf -inf 1e30 1e300 1e-300 1e-30 1e38"
FLOATS = [*FLOATS.split(), "1e400", "9" * 400, "9" * 5000, "", "x\ny", "\udcff", "1e-6", "1e6"]
TEXTS = ["", "x", "a" * 5000, "\udcff", "x\ny", "\x1b]0;x\x07", "../x/" * 60, "a\0b", "%s{0}", "-"]
TEXTS += ["ü" * 200, "10-", "1-99999999999", "0.5,nan", "meta", "hpu", "privateuseone", "cpu:7"]


class Hang(BaseException):
    """A case takes too long."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny models, prompts, pairs, answers, rewards and the log of a run."""
    folder = tmp_path_factory.mktemp("world")
    tiny.policy(folder / "lm")
    tiny.reward_model(folder / "rm")
    tiny.rows(folder / "p.jsonl", {"prompt": "what is the {n} film ?"}, 20)
    pair = {"prompt": "What is {n}?", "chosen": "good {n}", "rejected": "bad {n}", "margin": 1.0}
    tiny.rows(folder / "d.jsonl", pair | {"chosen_rating": 3.0, "rejected_rating": 2.0}, 20)
    tiny.rows(folder / "a.jsonl", {"prompt": "what is {n} ?", "completion": "a film"}, 2)
    code = "def short(p, c): return [-len(x) for x in c]\ndef const(p, c): return [1.0] * len(c)\n"
    (folder / "rules.py").write_text(code)
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text('{"batch_size": 4, "beta": 0.1}')
    tiny.rows(folder / "run/metrics.jsonl", {"step": 1, "reward": 0.5, "kl_sft": 0.1}, 1)
    return folder


def cases():
    """(program, command line), endless: a flag of the program with a value from the edges."""
    for number in itertools.count():
        rng = random.Random(number)
        program = rng.choice(list(PROGRAMS))
        config = PROGRAMS[program].Config
        fixed = {"steps", "iterations", "runs", "resume", "shard", "tensorboard", "prompts"}
        fields = [field for field in dataclasses.fields(config) if field.name not in fixed]
        yield program, arguments(program, rng.choice(fields), rng)


def arguments(program, field, rng):
    kind = _kind(typing.get_type_hints(PROGRAMS[program].Config)[field.name])
    parts = typing.get_args(kind)
    edges = {int: INTEGERS, float: FLOATS}.get(parts[0] if parts else kind, TEXTS)
    values = [] if kind is bool else [rng.choice(edges)]
    if typing.get_origin(kind) is tuple:
        values = rng.sample(edges, 2)
    beside = BESIDE.get(field.name, "").split()
    if field.metadata["positional"]:
        return [*values, "--out", "new.png"]
    given = ARGUMENTS[program].split()
    if dashed(field.name) in given:  # it takes the place of the usual value
        start = given.index(dashed(field.name)) + 1
        end = next((i for i in range(start, len(given)) if given[i].startswith("--")), len(given))
        del given[start - 1 : end]
    if field.name == "rm_weights":
        given[given.index("--rm") + 1 : given.index("--rm") + 2] = ["rules:short", "rules:const"]
        return [*given, "--rm-weights", "1", *values]
    return [*given, *beside, dashed(field.name), *values]


def outcome(program, argv, folder, capsys, seconds=20):
    """What a command line comes to: "" for a run or one line; otherwise what is wrong with it."""

    def alarm(*_):
        raise Hang

    handlers = {number: signal.signal(number, alarm) for number in (signal.SIGALRM,)}
    terminated = signal.getsignal(signal.SIGTERM)
    signal.alarm(seconds)
    capsys.readouterr()
    try:
        with contextlib.chdir(folder), one_line_errors():
            PROGRAMS[program].main(argv)
        return ""
    except SystemExit as exit:
        error = capsys.readouterr().err.replace("\r", "\n").splitlines()
        errors = [line for line in error if line.startswith("error: ")]
        short = len(errors) == 1 and len(errors[0]) <= 1100 and errors[0] == error[-1]
        return "" if exit.code in (0, None) or (exit.code == 2 and short) else repr(error)
    except Hang:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        for number, handler in [*handlers.items(), (signal.SIGTERM, terminated)]:
            signal.signal(number, handler)


def cleared(folder, world):
    """The world without what a case before left."""
    for path in folder.iterdir():
        path.unlink()
    for path in world.iterdir():
        (folder / path.name).symlink_to(path)
    return folder
