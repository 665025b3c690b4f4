"""Flags at their limits: an accepted value never gives a traceback or a hang, an error one line."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import tiny

import train_policy
import train_rm
import warp
from minalign.measuring.policies import Sample, before_after_table, show_samples
from minalign.running.errors import UserError, one_line_errors, visible
from minalign.running.files import to_json
from minalign.running.flags import SEEDS, _kind, dashed

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
    "timeout": "--judge http://127.0.0.1:9/v1 --judge-model x --retries 0",
}
INTEGERS = [0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]
INTEGERS = [*map(str, INTEGERS), "9" * 5000, "1.5", "nan", "", "1e3", "\udcff", "5\n5", "٣"]
FLOATS = "0 1 -1 0.5 -0.0 2147483648 18446744073709551616 nan inf -inf 1e30 1e300 1e-300 1e-30 1e38"
FLOATS = [*FLOATS.split(), "1e400", "9" * 400, "9" * 5000, "", "x\ny", "\udcff", "1e-6", "1e6"]
TEXTS = ["", "x", "a" * 5000, "\udcff", "x\ny", "\x1b]0;x\x07", "../x/" * 60, "a\0b", "%s{0}", "-"]
NAMES = "a b init models model rm start judge data dataset lora_targets prompt_column".split()
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
        fixed = {"retries", "steps", "iterations", "runs", "resume", "shard", "report", "prompts"}
        fields = [field for field in dataclasses.fields(config) if field.name not in fixed]
        yield program, arguments(program, rng.choice(fields), rng)


def arguments(program, field, rng):
    kind = _kind(typing.get_type_hints(PROGRAMS[program].Config)[field.name])
    parts = typing.get_args(kind)
    edges = {int: INTEGERS, float: FLOATS}.get(parts[0] if parts else kind, TEXTS)
    if field.name in NAMES:  # a hub could have what is left out
        edges = [text for text in edges if not text.isalnum()]
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


def outcome(program, argv, folder, capsys, seconds=60):
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


@pytest.fixture
def place(tmp_path, world, no_waiting):
    return cleared(tmp_path, world)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 50), pytest.param(50, 450, marks=pytest.mark.slow)]
)
def test_a_fuzz_of_flags_meets_no_traceback_and_no_hang(place, world, capsys, first, count):
    """S17: of all programs, in a world of tiny models, with values from the edges."""
    wrong = {}
    for program, argv in itertools.islice(cases(), first, first + count):
        if problem := outcome(program, argv, place, capsys):
            wrong[f"{program} {argv!r:.300}"] = problem
        shutil.rmtree(place)
        place.mkdir()
        cleared(place, world)
    assert wrong == {}


REFUSED = [  # program, flags, what the line must say
    ("train_policy", "--seed 18446744073709551616", "--seed 18446744073709551616"),
    ("train_policy", "--seed -9223372036854775809", "[0, 9223372036854775808)"),
    ("train_rm", "--seed -1", "--seed -1"),
    ("warp", "--split-seed 9223372036854775808", "--split-seed"),
    ("generate", "--seed 1" + 400 * "0", "--seed 1000"),
    ("evaluate", "--seed " + 5000 * "9", "--seed"),
    ("judge", "--seed -2", "--seed -2"),
    ("train_rm", "--crop-words 1-99999999999", "--crop-words 1-99999999999"),
    ("train_rm", "--crop-words " + 5000 * "9", "--crop-words"),
    ("train_policy", "--prompt-tokens 5-2147483648", "--prompt-tokens"),
    ("train_rm", "--loss ordinal --num-scores 2147483647", "--num-scores 2147483647"),
    ("train_policy", "--eval-prompts 1" + 400 * "0", "--eval-prompts 1000"),
    ("train_policy", "--steps 2147483648", "[-2147483647, 2147483647]"),
    ("train_policy", "--batch-size 2147483647", "--batch-size"),
    ("warp", "--runs 2147483647", "--runs"),
    ("warp", "--iterations 1001", "--iterations 1001"),
    ("generate", "--samples 2147483647", "--samples"),
    ("train_policy", "--reward-clip 1e300", "--reward-clip 1e+300"),
    ("train_policy", "--lora-rank 2 --lora-alpha 1e300", "--lora-alpha 1e+300"),
    ("train_policy", "--lora-rank 100000", "--lora-rank 100000: no layer"),
    ("train_rm", "--lora-rank 100000", "--lora-rank 100000: no layer"),
    ("train_policy", "--beta inf", "--beta inf"),
    ("train_policy", "--missing-eos-penalty nan", "--missing-eos-penalty nan"),
    ("train_policy", "--temperature 1e-300", "--temperature 1e-300"),
    ("generate", "--temperature 1e30", "--temperature 1e+30"),
    ("train_rm", "--lr 1e38", "--lr 1e+38"),
    ("train_rm", "--weight-decay 1e300", "--weight-decay"),
    ("train_rm", "--loss ordinal --rating-range 0 1e300", "--rating-range 1e+300"),
    ("train_rm", "--loss ordinal --rating-range nan 1", "--rating-range nan"),
    ("train_policy", "--rm rules:short rules:const --rm-weights 1 inf", "--rm-weights inf"),
    ("merge", "--lam nan", "--lam nan"),
    ("judge", "--retries 21 --judge http://x/v1 --judge-model x", "--retries 21"),
    ("judge", "--timeout 1e30 --judge http://x/v1 --judge-model x", "--timeout"),
    ("train_policy", "--device meta", "--device meta: cannot be used"),
    ("train_rm", "--device hpu", "--device hpu: cannot be used"),
    ("generate", "--device privateuseone", "--device privateuseone: cannot be used"),
    ("score", "--device xla", "--device xla: cannot be used"),
    ("evaluate", "--device cuda:99", "--device cuda:99: cannot be used"),
    ("train_policy", "--device " + 5000 * "x", "cannot be used"),
    ("train_policy", "--out " + 300 * "a", "File name too long"),
    ("train_rm", "--out " + 300 * "a", "File name too long"),
    ("generate", "--out " + 300 * "a", "File name too long"),
    ("score", "--out " + 300 * "a", "File name too long"),
    ("merge", "--out " + 300 * "a", "File name too long"),
    ("plot", "--out " + 300 * "a" + ".png", "File name too long"),
    ("evaluate", "--out x\udcff", "x\\udcff: expected UTF-8"),
    ("generate", "--prompt a\0b", "expected UTF-8 without zero bytes"),
    ("train_policy", "--format " + 5000 * "x", "invalid choice"),
    ("train_policy", "--no-such-flag=" + 5000 * "x", "unrecognized arguments"),
    ("train_policy", "--batch-size " + 5000 * "x", "invalid int value"),
    ("train_policy", "stray\x1b]0;x\x07", "stray\\x1b]0;x\\x07"),
    ("train_policy", "--lr -1e-05", "--lr -1e-05: expected a number in (0, inf)"),
    ("train_policy", "--subset x", "is one file"),
]


@pytest.mark.parametrize(("program", "flags", "said"), REFUSED)
def test_what_a_flag_cannot_mean_is_one_short_line(place, capsys, program, flags, said):
    """S17, S15, S26, S8, B26."""
    argv = ARGUMENTS[program].split() + flags.split(" ")
    if program == "plot":
        argv = ["run", *flags.split(" ")]
    error = ended(place, program, argv, capsys)
    assert error.startswith("error: ") and said in error, error
    assert error.count("\n") == 1 and len(error) <= 1100
    assert not (place / "new").exists() or not (place / "new/metrics.jsonl").exists()


def ended(place, program, argv, capsys):
    with pytest.raises(SystemExit) as exit, contextlib.chdir(place), one_line_errors():
        PROGRAMS[program].main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err.split("\r")[-1].strip(" ").lstrip("\n ")


def test_a_line_end_in_a_flag_stays_in_one_line(place, capsys):
    """S26: in errors, and in the header that shows all flags."""
    error = ended(place, "train_policy", ["--format", "x\ny"], capsys)
    assert error.count("\n") == 1
    argv = [*ARGUMENTS["train_policy"].split()[:-1], "n\nw", "--on-nonfinite", "skip"]
    assert outcome("train_policy", argv, place, capsys) == ""
    header = [line for line in capsys.readouterr().out.splitlines() if "on_nonfinite" in line]
    assert len(header) == 1 and " out n w " in header[0]


GOOD = [
    ("train_policy", "--seed 9223372036854775807"),
    ("train_rm", "--seed 9223372036854775807 --split-seed 9223372036854775807"),
    ("warp", "--seed 9223372036854775807"),
    ("evaluate", "--seed 9223372036854775807"),
    ("train_policy", "--temperature 1e-6"),
    ("train_policy", "--temperature 1e6"),
    ("train_policy", "--save-every 2147483647 --keep 2147483647 --eval-every 2147483647"),
    ("train_policy", "--lora-rank 32 --lora-alpha 1e-30"),
    ("train_policy", "--micro-batch-size 2147483647 --max-grad-norm 1e30 --reward-clip 1e30"),
    ("train_policy", "--rm rules:short rules:const --rm-weights -1 0"),
    ("train_policy", "--rm rules:short rules:const --rm-weights -1e-05 -.5"),
    ("train_rm", "--loss ordinal --num-scores 1000"),
    ("train_rm", "--crop-words 1-2147483647 --max-pairs 2147483647 --max-tokens 2147483647"),
    ("generate", "--prompt ü\n\t " + 300 * "long"),
    ("generate", "--max-new-tokens 3 --temperature 1e-6 --seed 0 --samples 3"),
]


@pytest.mark.parametrize(("program", "flags"), GOOD)
def test_the_ends_of_the_intervals_work(place, capsys, program, flags):
    argv = ARGUMENTS[program].split() + flags.split(" ")
    assert outcome(program, argv, place, capsys) == ""


def shell(command, **environment):
    """Exit status, stdout and stderr of `python -c`, with a loop that writes much, in a shell."""
    code = (
        "from minalign.running.errors import one_line_errors\nwith one_line_errors():\n"
        "    for i in range(10**4): print('line \\xfc', i)"
    )
    command = command.replace("PROGRAM", f'{sys.executable} -c "{code}"')
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_pipe_that_is_closed_ends_a_program_as_control_c_does():
    """S16, B26."""
    status, out, error = shell("PROGRAM | head -2")
    assert (status, error) == (130, "stopped: nobody reads the output\n")
    assert out == "line ü 0\nline ü 1\n"


def test_a_full_disk_under_the_output_is_one_line():
    """S16."""
    status, _, error = shell("PROGRAM > /dev/full")
    assert status == 2 and error.count("\n") == 1 and "No space left on device" in error
    status, _, error = shell("PROGRAM > /dev/full 2> /dev/full")
    assert status == 2


def test_an_output_that_is_closed_is_no_error():
    status, _, error = shell("PROGRAM >&-")
    assert (status, error) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8:strict"])
def test_an_output_that_cannot_spell_a_letter_shows_it_escaped(encoding):
    """S15, B26."""
    status, out, error = shell("PROGRAM | tail -1 | iconv -f latin1", PYTHONIOENCODING=encoding)
    spelled = {"utf-8": "Ã¼", "latin-1": "ü"}.get(encoding.split(":")[0], "\\xfc")
    assert (status, out, error) == (0, f"line {spelled} 9999\n", "")


def test_errors_of_the_system_are_one_line_and_bugs_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        open("/no/such/folder/x", "w")
    line = "error: /no/such/folder/x: No such file or directory: choose another name or place\n"
    assert exit.value.code == 2 and capsys.readouterr().err == line
    for bug in (KeyError("x"), OSError("a library's own"), RuntimeError("shape"), IndexError()):
        with pytest.raises(type(bug)), one_line_errors():
            raise bug
    with pytest.raises(SystemExit), one_line_errors():
        raise MemoryError
    assert capsys.readouterr().err.startswith("error: out of memory")


TERMINAL = "\x1b]0;title\x07 \x9b2J \r over \u202e back \ud83d"


def test_what_steers_a_terminal_is_made_visible(place, capsys):
    """S11: in samples, completions and errors; letters of all scripts stay."""
    letters = "grüße 日本語 👩\u200d👩 \u00a0 \tx\ny"
    assert visible(letters) == letters and visible(TERMINAL).isprintable()
    show_samples("before", [Sample(TERMINAL, TERMINAL, 0.0, 0.0)])
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    assert str(UserError(f"column {TERMINAL}\nx")).isprintable()
    assert outcome("generate", ["--model", "lm", "--prompt", TERMINAL[:-1]], place, capsys) == ""
    tiny.rows(place / "t.jsonl", {"prompt": "what {n} \x1b]0;x\x07 ?"}, 20)
    argv = ARGUMENTS["train_policy"].replace("p.jsonl", "t.jsonl").split()
    with contextlib.chdir(place):
        train_policy.main(argv)
    shown = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in shown and not set("\x1b\x07") & set(shown)


def test_a_zero_has_no_sign(capsys):
    """B26: `kl_sft -0.000`."""
    tiny_values = {"reward": -1e-9, "kl_sft": -1e-9}
    assert "-0" not in before_after_table(tiny_values, tiny_values)
    show_samples("x", [Sample("a", "b", -1e-9, 0.0)])
    assert "-0" not in capsys.readouterr().out


def test_json_has_no_numbers_that_are_not_finite():
    """B21: at any depth."""
    values = {"a": [math.nan, {"b": (math.inf, -math.inf, 1.5)}], "c": None, "d": "NaN", "e": True}
    text = to_json(values)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, {"b": [None, None, 1.5]}],
        "c": None,
        "d": "NaN",
        "e": True,
    }


def test_every_number_has_an_interval():
    """S17: by the type's own, and seeds by what all generators take."""
    for program, module in PROGRAMS.items():
        for field in dataclasses.fields(module.Config):
            if field.name.endswith("seed"):
                assert field.metadata["allowed"] == SEEDS, (program, field.name)
