"""Run.steps: what is saved when, what a resumed run repeats, what a second try may hold."""

import dataclasses
import gc
import itertools
import json
import weakref

import pytest
import torch
from tiny_runs import new_run, policy_config, run_policy, run_rm, start_model_folder

from minalign import rollout
from minalign.reward import RewardModel
from minalign.running.checkpoints import load_checkpoint
from minalign.running.errors import UserError


def make(folder, **changes):
    return new_run(folder, policy_config(**changes), torch.float32)


def steps_saved(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def numbers(run, total, state=None, on_step=lambda step: None):
    """(step, batch) of a run whose batches are 0, 1, 2, ..."""
    seen = []
    for step, batch in run.steps(total, itertools.count(), state or {"w": []}):
        seen.append((step, batch))
        on_step(step)
    return seen


def test_steps_count_from_one_and_take_the_batches_in_order(tmp_path):
    assert numbers(make(tmp_path, save_every=9), 3) == [(1, 0), (2, 1), (3, 2)]
    assert steps_saved(tmp_path) == [3]  # the last one always


def test_checkpoints_are_saved_when_due_and_the_best_is_kept(tmp_path):
    run, values = make(tmp_path, save_every=3, keep=1), {1: 0.0, 2: 5.0, 4: 4.0}

    def on_step(step):
        if values.get(step, -1.0) > values.get(run.counts.get("best_step"), -1.0):
            run.counts["best_step"] = step

    numbers(run, 7, on_step=on_step)
    assert steps_saved(tmp_path) == [2, 7]  # the best, and the last


def test_a_run_that_ended_early_is_saved_and_stays_ended(tmp_path, capsys):
    run = make(tmp_path, save_every=9)
    seen = numbers(
        run, 7, on_step=lambda step: run.counts.update({"ended": 3} if step == 3 else {})
    )
    assert [step for step, _ in seen] == [1, 2, 3] and steps_saved(tmp_path) == [3]
    again = make(tmp_path, save_every=9, resume=True)
    assert numbers(again, 9) == [] and again.done == 3
    assert "the run ended at step 3" in capsys.readouterr().out


def test_a_resumed_run_takes_the_batches_from_where_it_stopped(tmp_path):
    weight = torch.zeros(2)
    run = make(tmp_path, save_every=2)
    run.counts["note"] = "kept"

    def grow(step):
        weight.add_(step)
        run.log({"w": weight[0].item()})
        run.log_line("samples", {"at": step})

    numbers(run, 4, {"w": [weight]}, grow)
    assert weight[0] == 10 and run.last["step"] == 4 and run.last["w"] == 10
    again, other = make(tmp_path, save_every=2, resume=True), torch.zeros(2)

    def go_on(step):
        again.log({"w": 0.0})
        again.log_line("samples", {"at": step})

    assert numbers(again, 6, {"w": [other]}, go_on) == [(5, 4), (6, 5)]
    assert other[0] == 10 and again.counts["note"] == "kept"
    for name in ("metrics", "samples"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_asked_to_stop_saves_first(tmp_path):
    run = make(tmp_path, save_every=9)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 5"):
        numbers(run, 5, on_step=lambda step: step == 2 and run.stop.set())
    assert load_checkpoint(tmp_path)[0] == 2


def test_steps_that_are_left_out_are_counted(tmp_path, capsys):
    run = make(tmp_path, on_nonfinite="skip")
    numbers(run, 3, on_step=lambda step: step > 1 and run.skip("a loss that is not finite"))
    assert run.counts["skipped"] == 2
    assert load_checkpoint(tmp_path)[1]["counts"]["skipped"] == 2
    assert "step 3: a loss that is not finite: the step is skipped, 2" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="step 1: a loss that.*keeps the last good model: lower --lr"
    ):
        one = make(tmp_path / "stop")
        numbers(one, 3, on_step=lambda step: one.skip("a loss that is not finite"))


def test_a_part_of_a_run_counts_for_itself_and_stops_with_it(tmp_path):
    """As warp.py makes one for each of its policies."""
    run = make(tmp_path)
    run.counts["skipped"] = 3
    part = dataclasses.replace(run, folder=tmp_path / "part")
    assert part.counts == {"skipped": 0} and part.stop is run.stop and part.logs == {}


def test_training_returns_the_last_row(tmp_path):
    rows = []
    real = rollout.generate
    assert run_policy(tmp_path) is not None and real is rollout.generate
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        rows.append(json.loads(line))
    from tiny_runs import tiny_task

    import train_policy

    run = new_run(tmp_path, policy_config(resume=True), torch.float32)
    task = tiny_task()
    assert train_policy.train(run, task, task.start.requires_grad_(True)) == rows[-1]


class Mark:
    """Lives as long as the node of a graph that holds it."""


class Marked(torch.autograd.Function):
    """The identity; its node holds a mark, and the first backward pass finds no memory."""

    @staticmethod
    def forward(ctx, x, mark, fails):
        ctx.mark, ctx.fails = mark, fails
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return gradient, None, None


@pytest.mark.parametrize("script", ["policy", "rm"])
def test_a_second_try_does_not_hold_the_graph_of_the_first(tmp_path, monkeypatch, script):
    """Memory runs out in a backward pass: the next forward pass begins with that graph gone."""
    alive, marks = [], []
    real, real_rm = rollout.completion_logprobs, RewardModel.forward

    def before():
        """How many graphs of earlier passes are still there."""
        if torch.is_grad_enabled():
            gc.collect()
            alive.append(sum(mark() is not None for mark in marks))

    def marked(result):
        if not torch.is_grad_enabled():
            return result
        mark = Mark()
        marks.append(weakref.ref(mark))
        return Marked.apply(result, mark, len(marks) == 1)

    def policy_pass(*args):
        before()
        return marked(real(*args))

    def reward_pass(*args):
        before()
        return marked(real_rm(*args))

    monkeypatch.setattr(rollout, "completion_logprobs", policy_pass)
    monkeypatch.setattr(RewardModel, "forward", reward_pass)
    if script == "policy":
        run_policy(tmp_path / "run", steps=1, micro_batch_size=4)
    else:
        run_rm(
            tmp_path / "run", start_model_folder(tmp_path / "start"), steps=1, micro_batch_size=4
        )
    assert len(alive) >= 3 and alive[1] == 0, alive
