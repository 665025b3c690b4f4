"""Nothing is lost: a run that was stopped or killed ends bit for bit as one that was left alone.

Faults end with one line.
"""

import dataclasses
import errno
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import content, difference, policy_config, reward, run_policy, run_rm, run_warp

import train_policy
import train_rm
import warp
from minalign import rollout
from minalign.data import toy
from minalign.models.folders import atomic_folder
from minalign.reward import RewardModel
from minalign.running.checkpoints import load_checkpoint, save_checkpoint
from minalign.running.errors import UserError
from minalign.running.logs import JsonLines, rows_until
from minalign.running.optimizer import Optimizer
from minalign.running.ranks import Ranks
from minalign.running.run import stop_after_step
from minalign.running.run_folder import FREE_TO_CHANGE, claimed_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """What a kill leaves does not depend on it; on a busy disk hundreds of syncs take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.start_model_folder(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def forkserver():
    """Processes that start at once: torch and the scripts are imported in their parent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context


def stopping(call):
    """A reward, and the event that it sets in its `call`-th batch.

    A batch has four completions, evaluation three.
    """
    stop, calls = threading.Event(), []

    def function(prompts, completions):
        calls.extend([1] * (len(completions) == 4))
        if len(calls) == call:
            stop.set()
        return reward(prompts, completions)

    return dict(stop=stop, function=function)


def counted():
    """A reward, and a list with one item per batch that it scored: what a resumed run did."""
    batches = []

    def function(prompts, completions):
        batches.extend([1] * (len(completions) == 4))
        return reward(prompts, completions)

    return function, batches


def resumed_run(out, config):
    """The folder in which --resume goes on."""
    config = dataclasses.replace(config, out=out, resume=True)
    with claimed_folder(config, "") as (folder, _):
        return folder


def stop_policy(out, call, **changes):
    with pytest.raises(KeyboardInterrupt, match="after step"):
        run_policy(out, **stopping(call), **changes)


def stop_rm(out, model, step, monkeypatch, **changes):
    stop, calls, real = threading.Event(), [], train_rm.pair_losses

    def losses(objective, logits, examples):
        calls.append(1)
        if len(calls) == step:
            stop.set()
        return real(objective, logits, examples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step"):
        patch.setattr(train_rm, "pair_losses", losses)
        run_rm(out, model, stop, **changes)


def steps_saved(out):
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


def state_path(out, step):
    return out / f"checkpoints/step-{step:07d}/state.pt"


def states_of(out, *steps):
    """What the checkpoints of these steps hold."""
    return [torch.load(state_path(out, step), weights_only=True) for step in steps]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(a, b, **options):
    assert difference(content(a), content(b), **options) == ""


ANCHORS = [{}, {"anchor": "ema", "mu": 0.2}]
VARIANTS = [{"baseline": b} | a for b in ("moving", "ema", "rloo", "none") for a in ANCHORS]
VARIANTS += [{"lora_rank": 2} | anchor for anchor in ANCHORS]
VARIANTS += [{"on_nonfinite": "skip", "gradient_checkpointing": True}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_policy_resumes_as_if_nothing_had_happened(tmp_path, changes):
    """The last checkpoints, every line of both logs, and the policy itself, bit for bit."""
    whole = run_policy(tmp_path / "whole", **changes)
    stop_policy(tmp_path / "cut", 3, save_every=50, **changes)
    assert steps_saved(tmp_path / "cut") == [3] and len(lines(tmp_path / "cut/metrics.jsonl")) == 3
    state = load_checkpoint(tmp_path / "cut")[1]
    assert state["optimizer"]["state"]
    assert not changes.get("mu") or any(t.any() for t in state["anchor"])
    function, batches = counted()
    resumed = run_policy(tmp_path / "cut", resume=True, function=function, **changes)
    assert len(batches) == 3  # the other three are not done again
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert [row["step"] for row in lines(tmp_path / "cut/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in lines(tmp_path / "cut/samples.jsonl")] == [1, 2, 3, 4, 5, 6]
    seconds = [row["seconds"] for row in lines(tmp_path / "cut/metrics.jsonl")]
    assert seconds == sorted(seconds)  # time goes on, too


def test_what_a_checkpoint_holds_is_not_what_the_run_began_with(tmp_path):
    """The variants above prove something: all parts of the state move between steps 3 and 6."""
    run_policy(tmp_path / "run", anchor="ema", mu=0.2, keep=6)
    three, six = states_of(tmp_path / "run", 3, 6)
    for name in ("policy", "anchor", "optimizer", "baseline", "sampling"):
        assert difference(three[name], six[name]) != "", name
    assert difference(six["policy"], six["anchor"]) != ""


def test_micro_batches_may_change_on_the_way(tmp_path):
    run_policy(tmp_path / "whole")
    stop_policy(tmp_path / "cut", 3)
    run_policy(tmp_path / "cut", resume=True, micro_batch_size=1)
    assert_same(tmp_path / "whole", tmp_path / "cut", tolerance=1e-5)


REWARD_MODELS = [
    {},
    {"loss": "ordinal", "rating_coef": 0.5},
    {"lora_rank": 2, "lora_dropout": 0.3},
    {"micro_batch_size": 3},
]


@pytest.mark.parametrize("changes", REWARD_MODELS, ids=str)
@pytest.mark.parametrize("eval_every", [2, 4])
def test_a_reward_model_resumes_as_if_nothing_had_happened(
    tmp_path, model, changes, eval_every, monkeypatch
):
    """Dropout, too, draws what it would have drawn; the best model so far stays the best."""
    changes = changes | {"eval_every": eval_every}
    best = run_rm(tmp_path / "whole", model, **changes)
    last = 3 if "micro_batch_size" not in changes else 6
    stop_rm(tmp_path / "cut", model, last, monkeypatch, save_every=50, **changes)
    assert steps_saved(tmp_path / "cut") == [3]
    torch.manual_seed(99)  # another process has other numbers
    batches, real = [], torch.nn.utils.clip_grad_norm_

    def counted_clip(*args):
        batches.append(1)
        return real(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted_clip)
    assert run_rm(tmp_path / "cut", model, resume=True, **changes) == best
    assert len(batches) == 3  # the other three are not done again
    for run in ("whole", "cut"):
        (tmp_path / run / "config.json").unlink()  # names --save-every
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert [row["step"] for row in lines(tmp_path / "cut/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_an_epoch_may_end_on_either_side_of_the_stop(tmp_path, model, monkeypatch):
    """Thirty pairs by four: eight steps per epoch."""
    run_rm(tmp_path / "whole", model, steps=12)
    stop_rm(tmp_path / "cut", model, 9, monkeypatch, steps=12)
    run_rm(tmp_path / "cut", model, resume=True, steps=12)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def whole_warp(tmp_path_factory):
    out = tmp_path_factory.mktemp("warp") / "whole"
    run_warp(out)
    return out


@pytest.mark.parametrize("call", [1, 5, 6, 8, 11], ids="in run {}".format)
def test_warp_resumes_in_the_middle_of_a_run(tmp_path, whole_warp, call):
    """Three steps per run, two runs per iteration.

    Batch 5 is in iteration 1, run 2. Batch 6 is its last one. Batch 8 is in iteration 2.
    """
    with pytest.raises(KeyboardInterrupt):
        run_warp(tmp_path / "cut", **stopping(call))
    assert not (tmp_path / "cut/front.json").exists()
    function, batches = counted()
    run_warp(tmp_path / "cut", resume=True, function=function)
    assert len(batches) == 12 - call
    assert_same(whole_warp, tmp_path / "cut")


def test_warp_with_adapters_resumes_in_the_middle_of_a_run(tmp_path):
    run_warp(tmp_path / "whole", lora_rank=2, lora_alpha=4.0)
    with pytest.raises(KeyboardInterrupt):
        run_warp(tmp_path / "cut", **stopping(5), lora_rank=2, lora_alpha=4.0)
    run_warp(tmp_path / "cut", resume=True, lora_rank=2, lora_alpha=4.0)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("evaluation", [1, 2, 3, 5, 10, 12])
def test_warp_resumes_between_training_merge_and_front(
    tmp_path, whole_warp, evaluation, monkeypatch
):
    """Stopped while it measures a policy, a merge or a point of the front.

    It obeys there, too, and measures nothing twice.
    """
    stop, real, calls = threading.Event(), train_policy.evaluate, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == evaluation:
            stop.set()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_policy, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_warp(tmp_path / "cut", stop)
    assert len(calls) == evaluation and not (tmp_path / "cut/front.json").exists()
    run_warp(tmp_path / "cut", resume=True)
    assert_same(whole_warp, tmp_path / "cut")


def test_a_run_may_stop_often_and_resume_from_an_earlier_checkpoint(tmp_path):
    run_policy(tmp_path / "whole", anchor="ema")
    stop_policy(tmp_path / "cut", 2, anchor="ema")
    stop_policy(tmp_path / "cut", 3, anchor="ema", resume=True)  # three more: steps 3, 4, 5
    assert steps_saved(tmp_path / "cut") == [4, 5]
    shutil.rmtree(tmp_path / "cut/checkpoints/step-0000005")
    run_policy(tmp_path / "cut", resume=True, anchor="ema")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_resuming_what_has_ended_changes_nothing(tmp_path, model):
    run_policy(tmp_path / "policy", keep=1)
    run_rm(tmp_path / "rm", model)
    run_warp(tmp_path / "warp")
    before = {name: content(tmp_path / name) for name in ("policy", "rm", "warp")}
    run_policy(tmp_path / "policy", resume=True, keep=1)
    run_rm(tmp_path / "rm", model, resume=True)
    run_warp(tmp_path / "warp", resume=True)
    for name, was in before.items():
        assert difference(was, content(tmp_path / name)) == ""


def test_stopping_in_the_last_step_ends_the_run(tmp_path, model):
    run_policy(tmp_path / "whole")
    run_policy(tmp_path / "last", **stopping(6))
    assert_same(tmp_path / "whole", tmp_path / "last")


# checkpoints


BREAKS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("hello\n"),
    "two bytes": lambda path: path.write_bytes(
        path.read_bytes()[:20000] + b"\x77\x12" + path.read_bytes()[20002:]
    ),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_of_a_broken_checkpoint_the_one_before_is_taken(tmp_path, kind, capsys):
    run_policy(tmp_path / "whole")
    stop_policy(tmp_path / "cut", 4)
    BREAKS[kind](state_path(tmp_path / "cut", 4))
    capsys.readouterr()
    run_policy(tmp_path / "cut", resume=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert len(said) == 1 and "step-0000004" in said[0]
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_flipped_bytes_never_end_with_a_traceback(tmp_path):
    """A checkpoint on a bad disk is read as it was, or passed over."""
    torch.manual_seed(0)
    state = {
        "policy": [torch.randn(50), torch.randn(3)],
        "best": -math.inf,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    }
    save_checkpoint(tmp_path, 1, state, keep=1)
    path, rng = state_path(tmp_path, 1), random.Random(0)
    good, read = path.read_bytes(), 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 5, 50])):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad[: rng.choice([len(bad), len(bad), rng.randrange(len(bad))])])
        found = load_checkpoint(tmp_path)
        read += found is not None
        tensors = found[1].get("policy") if found and isinstance(found[1], dict) else None
        if isinstance(tensors, list) and all(isinstance(t, torch.Tensor) for t in tensors):
            assert difference(tensors, state["policy"]) == ""
    assert read < 250


def test_where_no_checkpoint_can_be_read_the_run_begins_anew(tmp_path, capsys):
    """The logs, too: no line of the lost steps stays, and none comes twice."""
    run_policy(tmp_path / "whole")
    stop_policy(tmp_path / "cut", 4)
    for step in steps_saved(tmp_path / "cut"):
        BREAKS["truncated"](state_path(tmp_path / "cut", step))
    capsys.readouterr()
    run_policy(tmp_path / "cut", resume=True)
    assert "beginning from the start" in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_broken_checkpoint_of_a_later_step_crowds_out_no_good_one(tmp_path):
    """Resumed from step 2 with 4 and 5 broken: what is saved at step 3 is now the newest."""
    run_policy(tmp_path / "whole", keep=1)
    stop_policy(tmp_path / "cut", 5, keep=4)
    for step in (3, 4, 5):
        BREAKS["truncated"](state_path(tmp_path / "cut", step))
    stop_policy(tmp_path / "cut", 1, keep=1, resume=True)
    assert load_checkpoint(tmp_path / "cut")[0] == 3
    run_policy(tmp_path / "cut", resume=True, keep=1)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2, best_step=3 if step > 2 else None)
    assert steps_saved(tmp_path) == [3, 6, 7]
    save_checkpoint(tmp_path, 8, {"step": 8}, keep=2, best_step=7)
    assert steps_saved(tmp_path) == [7, 8]
    save_checkpoint(tmp_path, 9, {"step": 9}, keep=1, best_step=None)
    assert steps_saved(tmp_path) == [9] and load_checkpoint(tmp_path) == (9, {"step": 9})


def test_leftovers_of_a_kill_do_not_stay(tmp_path):
    """Half a checkpoint of a step that is never saved again would take its room for ever.

    The step of a Ctrl-C is such a one.
    """
    save_checkpoint(tmp_path, 1, {}, keep=1)
    (tmp_path / "checkpoints/step-0000002.new").mkdir()
    assert load_checkpoint(tmp_path)[0] == 1
    save_checkpoint(tmp_path, 3, {}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000003"]


# logs


TAILS = [
    b'{"step": 3, "sec',
    b"\0" * 40,
    b"\xff\xfe\n",
    b'{"step": 3, "seconds": 9.0}\n{"step"',
    b"3",
    b"null\n",
    b'{"a": 1}\n',
]


@pytest.mark.parametrize("tail", TAILS)
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "seconds": 1.0}\n{"step": 2, "seconds": 2.0}\n' + tail)
    log = JsonLines(path, rows_until(path, 2))
    assert log.last == {"step": 2, "seconds": 2.0}
    log.append({"step": 3, "seconds": math.inf})
    assert lines(path) == [
        {"step": 1, "seconds": 1.0},
        {"step": 2, "seconds": 2.0},
        {"step": 3, "seconds": None},
    ]


def test_torn_logs_of_a_killed_run(tmp_path):
    """Killed after step 4 was logged and before it was saved, amid the line of step 5."""
    run_policy(tmp_path / "whole")
    stop_policy(tmp_path / "cut", 3)
    for name in ("metrics", "samples"):
        with open(tmp_path / f"cut/{name}.jsonl", "a") as file:
            file.write('{"step": 4, "seconds": 1.5, "reward": null}\n{"step": 5, "rew')
    run_policy(tmp_path / "cut", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_log_on_a_full_disk_ends_with_one_line(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(UserError, match="log.jsonl.*No space left"):
        log.append({"step": 1})
    with pytest.raises(UserError, match="log.jsonl.*No space left"):
        log.append({"step": 2})


# other flags


def changed(value, field):
    allowed = field.metadata["allowed"]  # a tuple of words, or an interval
    choices = allowed if isinstance(allowed, tuple) else ()
    others = [choice for choice in choices if choice != value]
    if others:
        return others[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, "more"]
    return (0.0, 9.0) if field.name == "rating_range" else f"{value}x"


SCRIPTS = [train_policy, train_rm, warp]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_only_what_may_change_may_change(tmp_path, script):
    """Every flag of every script: the error names it, with both values."""
    config = script.resolve(script.Config())
    tiny_runs.new_run(tmp_path, config, torch.float32).write_config()
    assert resumed_run(str(tmp_path), config) == tmp_path
    for field in dataclasses.fields(config):
        value = changed(getattr(config, field.name), field)
        other = dataclasses.replace(config, **{field.name: value})
        if field.name in FREE_TO_CHANGE:
            assert resumed_run(str(tmp_path), other) == tmp_path
        else:
            name = field.name.replace("_", "-")
            with pytest.raises(UserError, match=f"ran with --{name} .*, now "):
                resumed_run(str(tmp_path), other)


def test_nothing_that_changes_what_is_learned_may_change():
    free = "out resume device dtype save_every keep on_nonfinite micro_batch_size report shard"
    free += " gradient_checkpointing eval_every"
    assert set(FREE_TO_CHANGE) == set(free.split())


def test_a_tuple_is_a_list_in_json(tmp_path):
    config = train_rm.resolve(train_rm.Config(loss="ordinal"))
    tiny_runs.new_run(tmp_path, config, torch.float32).write_config()
    given = train_rm.resolve(train_rm.Config(loss="ordinal", rating_range=(1.0, 10.0)))
    assert resumed_run(str(tmp_path), given) == tmp_path


@pytest.mark.parametrize("text", ["", "{", "3", "\0\0\0"])
def test_a_config_that_cannot_be_read_is_an_error_of_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        resumed_run(str(tmp_path), policy_config())


def test_a_folder_without_config_starts_anew(tmp_path, capsys):
    config = policy_config()
    assert resumed_run(f"{tmp_path}/new", config) == tmp_path / "new"
    assert "starting it" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()  # nothing ran
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json.new").write_text('{"half')  # killed while it wrote that
    assert resumed_run(f"{tmp_path}/new", config) == tmp_path / "new"
    (tmp_path / "new/slurm.log").touch()  # no file of a run
    assert resumed_run(f"{tmp_path}/new", config) == tmp_path / "new"
    (tmp_path / "new/metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds another run"):
        resumed_run(f"{tmp_path}/new", config)
    with pytest.raises(UserError, match="--out"):
        resumed_run("", config)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        resumed_run(f"{tmp_path}/file/run", config)


# kills


class Crash(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def crash_at(patch, number):
    """At the `number`-th change of the file system everything ends: half done, where it can be.

    Returns the changes.
    """
    done = []

    def dies(name):
        done.append(name)
        if len(done) >= number:  # also what a `finally` would still do
            raise Crash(name)

    def wrap(owner, name, halfway=None, counts=lambda *args: True):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if not counts(*args):
                return real(*args, **kwargs)
            if halfway and len(done) + 1 == number:
                halfway(real, *args)
            dies(f"{name} {args[0]}")
            return real(*args, **kwargs)

        patch.setattr(owner, name, wrapped)

    def half_file(real, state, path):
        real(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def half_folder(real, path, **_):
        next(p for p in Path(path).rglob("*") if p.is_file()).unlink()

    def has_files(path, **_):
        return any(p.is_file() for p in Path(path).rglob("*"))

    def half_line(real, log, row):
        log.file.write(json.dumps(row)[:20].encode())

    wrap(os, "fsync")
    wrap(torch, "save", half_file)
    wrap(JsonLines, "append", half_line)
    wrap(shutil, "rmtree", half_folder, has_files)
    for name in ("rename", "replace", "mkdir"):
        wrap(Path, name)
    return done


def crashing_policy(out, model, **changes):
    run_policy(out, steps=3, keep=1, anchor="ema", mu=0.2, **changes)


def crashing_policy_of_two_checkpoints(out, model, **changes):
    run_policy(out, steps=4, save_every=2, keep=2, **changes)


def crashing_rm(out, model, **changes):
    run_rm(out, model, steps=3, keep=1, eval_every=1, lr=3e-2, **changes)


def crashing_warp(out, model, **changes):
    run_warp(out, steps=2, iterations=1, keep=1, **changes)


CRASHES = {  # the run, and at how many of its changes it crashes
    "policy": (crashing_policy, 12),
    "policy, two": (crashing_policy_of_two_checkpoints, 8),
    "rm": (crashing_rm, 10),
    "warp": (crashing_warp, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CRASHES)
def test_a_crash_at_any_change_of_a_file_costs_nothing(tmp_path, model, case, monkeypatch):
    """Also twice in one run.

    What lies in the folder at the end is the same to the last file: no leftovers.
    """
    run, tries = CRASHES[case]
    with monkeypatch.context() as patch:
        changes = crash_at(patch, 10**9)
        run(tmp_path / "whole", model)
    total = len(changes)
    assert total > 20
    for number in sorted({1 + i * total // tries for i in range(tries)}):
        out = tmp_path / f"crash-{number}"
        for attempt, at in enumerate((number, 1 + number % 7)):
            with monkeypatch.context() as patch, pytest.raises(Crash) as where:
                crash_at(patch, at)
                run(out, model, resume=attempt > 0)
        run(out, model, resume=True)
        found = difference(content(tmp_path / "whole"), content(out))
        assert found == "", (number, str(where.value))
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_policy", "train_rm"])
def test_sigkill_at_random_instants_costs_nothing(tmp_path, model, script, forkserver):
    for name in ("first", "whole"):  # the forkserver's first process waits for its imports
        args = (script, str(tmp_path / name), model)
        process = forkserver.Process(target=tiny_runs.child, args=args)
        began = time.monotonic()
        process.start()
        process.join()
        seconds = time.monotonic() - began
    rng = random.Random(1)
    tiny_runs.kill_and_resume(forkserver, script, tmp_path / "killed", model, 4, rng, seconds)
    assert_same(tmp_path / "whole", tmp_path / "killed")


# faults


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, error, monkeypatch):
    stop_policy(tmp_path / "run", 3)
    before = content(tmp_path / "run")["checkpoints/step-0000003/state.pt"]

    def full(state, path):
        path.write_bytes(b"half")
        raise error

    message = "step-0000004: cannot be written .*make room"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(torch, "save", full)
        run_policy(tmp_path / "run", resume=True)
    assert steps_saved(tmp_path / "run") == [2, 3]  # and no .new
    assert difference(load_checkpoint(tmp_path / "run"), (3, before)) == ""
    run_policy(tmp_path / "run", resume=True)
    run_policy(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("script", ["train_policy", "train_rm"])
def test_a_really_full_disk_ends_with_status_2_and_one_line(
    tmp_path, model, script, forkserver, monkeypatch
):
    out = tmp_path / "run"
    if script == "train_policy":
        stop_policy(out, 3, anchor="ema", mu=0.1, steps=12)
    else:
        stop_rm(out, model, 3, monkeypatch, steps=12, lora_rank=2, lora_dropout=0.3)
        (out / "checkpoints/step-0000002/more").write_bytes(bytes(9))
    before = content(out / "checkpoints")
    process = forkserver.Process(target=tiny_runs.full_disk, args=(script, str(out), model))
    process.start()
    process.join(60)
    errors = Path(f"{out}.err").read_text().splitlines()
    said = [line for line in errors if line.strip() and "%|" not in line]
    assert process.exitcode == 2, said
    assert len(said) == 1 and said[0].startswith("error: ")
    assert "step-0000004: cannot be written" in said[0]
    assert difference(before, content(out / "checkpoints")) == ""


def test_a_folder_that_cannot_be_written_ends_with_one_line(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="step-0000001: cannot be written"):
        run_policy(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "checkpoints", 1, {}, 1)


def nan_in_batch(number, value=math.nan):
    calls = []

    def function(prompts, completions):
        calls.extend([1] * (len(completions) == 4))
        bad = len(completions) == 4 and len(calls) == number
        return [value if bad and i == 1 else r for i, r in enumerate(reward(prompts, completions))]

    return function


@pytest.mark.parametrize(
    ("baseline", "value"),
    [("moving", math.nan), ("ema", math.inf), ("rloo", math.nan), ("none", math.inf)],
)
def test_a_step_with_a_reward_that_is_not_finite_is_skipped(tmp_path, baseline, value, capsys):
    """Policy, anchor, optimizer and baseline are those of the step before.

    The step is counted and said. Afterwards all is finite.
    """
    changes = dict(anchor="ema", mu=0.2, baseline=baseline, on_nonfinite="skip", keep=9)
    policy = run_policy(tmp_path / "run", function=nan_in_batch(3, value), **changes)
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    two, three, four = states_of(tmp_path / "run", 2, 3, 4)
    for state in (two, three):
        state["optimizer"] = state["optimizer"]["state"]  # without the learning rate
    for name in ("policy", "anchor", "optimizer", "baseline"):
        assert difference(two[name], three[name]) == "", name
    for name in ("policy", "anchor"):
        assert difference(two[name], four[name]) != "", name
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert four["counts"]["skipped"] == 1
    assert all(row["reward"] is not None for row in rows)  # the mean of the others
    assert [row["not_finite"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert all(math.isfinite(value) for row in rows[3:] for value in row.values())
    problem = "a reward, KL or importance weight that is not finite"
    assert f"step 3: {problem}: the step is skipped, 1 so far" in capsys.readouterr().out
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:07d}")
    run_policy(tmp_path / "cut", resume=True, **changes)  # the count, too, is resumed
    assert_same(tmp_path / "run", tmp_path / "cut")


def test_a_skipped_step_may_have_no_variance_either(tmp_path, monkeypatch):
    """An ordinal reward model of NaN logits: the weights by its variance are not finite either."""

    class Ordinal(tiny_runs.RewardFunction):
        def score_rollout(self, *args):
            scores = super().score_rollout(*args)
            return scores._replace(variance=scores.rewards.abs())

    monkeypatch.setattr(tiny_runs, "RewardFunction", Ordinal)
    changes = dict(on_nonfinite="skip", uncertainty="one_plus_std")
    run_policy(tmp_path / "run", function=nan_in_batch(3), **changes)
    assert [row["skipped"] for row in lines(tmp_path / "run/metrics.jsonl")] == [0, 0, 1, 1, 1, 1]


def test_a_reward_that_is_not_finite_ends_the_run_by_default(tmp_path):
    message = "step 3: a reward, KL or importance weight that is not finite"
    with pytest.raises(UserError, match=message):
        run_policy(tmp_path / "run", function=nan_in_batch(3))
    assert steps_saved(tmp_path / "run") == [1, 2]
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2
    run_policy(tmp_path / "whole")
    run_policy(tmp_path / "run", resume=True)  # with a reward that was fixed
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_gradient_that_is_not_finite(tmp_path, on_nonfinite, monkeypatch):
    calls, real = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, *args):
        calls.append(1)
        if len(calls) == 3:
            parameters[1].grad[0] = math.inf
        return real(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    changes = dict(anchor="ema", mu=0.2, on_nonfinite=on_nonfinite, keep=9)
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match="step 3: a gradient that is not finite.*--lr"):
            run_policy(tmp_path / "run", **changes)
        assert steps_saved(tmp_path / "run") == [1, 2]
        return
    policy = run_policy(tmp_path / "run", **changes)
    two, three = states_of(tmp_path / "run", 2, 3)
    for state in (two, three):
        state["optimizer"] = state["optimizer"]["state"]  # without the learning rate
    for name in ("policy", "anchor", "optimizer"):
        assert difference(two[name], three[name]) == "", name
    assert difference(two["baseline"], three["baseline"]) != ""  # the rewards were good
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["grad_norm"] is None for row in rows][:4] == [False, False, True, False]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_reward_models_loss_that_is_not_finite(tmp_path, model, on_nonfinite, monkeypatch):
    calls, real = [], train_rm.pair_losses

    def losses(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train_rm, "pair_losses", losses)
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match="step 3: loss nan"):
            run_rm(tmp_path / "run", model, keep=9)
        (state,) = states_of(tmp_path / "run", 2)  # of the step before
        kept = RewardModel.from_pretrained(str(tmp_path / "run")).model
        assert difference(state["trained"], [p.detach() for p in kept.parameters()]) == ""
        return
    run_rm(tmp_path / "run", model, on_nonfinite="skip", keep=9)
    two, three = states_of(tmp_path / "run", 2, 3)
    assert difference(two["trained"], three["trained"]) == ""
    assert difference(two["optimizer"]["state"], three["optimizer"]["state"]) == ""
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["loss"] is None and math.isfinite(rows[5]["loss"])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_rows_per_pass_and_not_the_gradient(
    tmp_path, model, error, monkeypatch, capsys
):
    """Memory runs out in the second pass, when there are gradients already: none counts twice."""
    real, real_rm, calls = rollout.completion_logprobs, RewardModel.forward, []

    def fails_at_first(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise error

    def policy_pass(policy, input_ids, *rest):
        if torch.is_grad_enabled():
            fails_at_first(len(input_ids))
        return real(policy, input_ids, *rest)

    def reward_pass(self, rows, *rest):
        if torch.is_grad_enabled():
            fails_at_first(len(rows) // 2)
        return real_rm(self, rows, *rest)

    def policy(out, **changes):
        run_policy(out, steps=1, batch_size=8, **changes)

    def rm(out, **changes):
        run_rm(out, model, steps=1, batch_size=8, **changes)

    for run in (policy, rm):
        whole, halved = tmp_path / f"{run.__name__}-whole", tmp_path / run.__name__
        run(whole, micro_batch_size=8)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "completion_logprobs", policy_pass)
            patch.setattr(RewardModel, "forward", reward_pass)
            calls.clear()
            run(halved, micro_batch_size=4)
        assert calls == [4, 4, 2, 2, 2, 2]
        assert "going on with --micro-batch-size 2" in capsys.readouterr().out
        # after one step: a tenth of the gradient, and a thousandth of its square
        states = [load_checkpoint(out)[1]["optimizer"]["state"] for out in (halved, whole)]
        assert difference(*states, tolerance=1e-6) == ""
        assert max(moments["exp_avg"].abs().max() for moments in states[0].values()) > 1e-3


def test_where_one_row_does_not_fit_the_run_ends_with_one_line(tmp_path, monkeypatch):
    sizes, real = [], rollout.completion_logprobs

    def never(policy, input_ids, *rest):
        if torch.is_grad_enabled():
            sizes.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(policy, input_ids, *rest)

    monkeypatch.setattr(rollout, "completion_logprobs", never)
    message = "one sequence per pass .*Tried to allocate 2 GiB.*--gradient-checkpointing"
    with pytest.raises(UserError, match=message) as error:
        run_policy(tmp_path / "run")
    assert sizes == [4, 2, 1] and "\n" not in str(error.value)


def test_what_is_no_lack_of_memory_is_not_tried_again():
    net, _ = tiny_runs.tiny_model()
    config = policy_config(batch_size=14, group_size=1, micro_batch_size=7)
    optimizer = Optimizer(net, list(net.parameters()), config, Ranks())
    tries = []
    with pytest.raises(RuntimeError, match="device-side assert"):
        for rows, _ in optimizer.micro_batches([5] * 14):
            with optimizer.retry_in_halves():
                tries.append(rows)
                raise RuntimeError("CUDA error: device-side assert triggered")
    assert len(tries) == 1
    sizes = [len(rows) for rows, _ in optimizer.micro_batches([5] * 14)]
    assert sizes == [7, 7] and optimizer.micro_batch_size == 7


def test_out_of_memory_is_no_full_disk(tmp_path):
    """The toy world's reward model is trained inside of atomic_folder."""
    with pytest.raises(torch.OutOfMemoryError), atomic_folder(tmp_path / "model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not list(tmp_path.iterdir())


# signals


def test_signals_are_those_of_before_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=f"after step 1: .* --out {tmp_path} --resume"):
        with stop_after_step(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
            raise KeyboardInterrupt("after step 1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_second_signal_ends_at_once(tmp_path, forkserver):
    process = forkserver.Process(target=tiny_runs.stuck, args=(str(tmp_path),))
    process.start()
    wait_for((tmp_path / "started").exists)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5)
    assert process.is_alive()  # the first one waits for the step
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 130
    said = f"stopped: at once: go on with the same flags and --out {tmp_path} --resume"
    assert said in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_sigterm_ends_the_script_after_its_step(tmp_path, monkeypatch, capsys):
    """A process of its own, as a cluster ends it; then --resume, to the same end as without it."""
    monkeypatch.chdir(tmp_path)
    tiny_runs.start_model_folder(toy.folder() / "start-policy")
    Path("slow_reward.py").write_text(
        "import os, time\n"
        "def f(prompts, completions):\n"
        "    time.sleep(0 if os.path.exists('fast') else 0.1)\n"
        "    return [len(c) / 100 for c in completions]\n"
    )
    argv = (
        "--rm slow_reward:f --steps 20 --batch-size 4 --eval-prompts 4 --max-new-tokens 6 "
        "--out run --device cpu"
    ).split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "train_policy.py", *argv]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True, env=env)
    log = Path("run/metrics.jsonl")

    def has_two_steps():
        return log.exists() and log.read_text().count("\n") >= 2

    wait_for(lambda: process.poll() is not None or has_two_steps())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = [line for line in errors.splitlines() if line.startswith("stopped")]
    step = len(lines(log))
    assert 2 <= step < 20 and steps_saved(Path("run")) == [step] and Path("run/model").exists()
    how = "go on with the same flags and --out run --resume"
    assert last == [f"stopped: after step {step} of 20: {how}"]
    Path("fast").touch()
    torch.set_num_threads(1)
    train_policy.main([*argv, "--resume"])
    train_policy.main([*argv[:-3], "whole", *argv[-2:]])
    assert [row["step"] for row in lines(log)] == list(range(1, 21))
    a, b = content("run"), content("whole")
    for found in (a, b):
        del found["config.json"], found["checkpoints/step-0000020/state.pt"]["counts"]["best"]
        found.pop(f"checkpoints/step-{step:07d}/state.pt", None)
    assert difference(a, b) == ""
