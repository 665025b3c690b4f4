"""--dtype float16: a loss scale, found by halving where gradients overflow."""

import json

import pytest
import torch
from tiny_runs import difference, new_run, run_policy, run_rm, start_model_folder

import train_rm
from minalign.running.errors import UserError
from minalign.running.optimizer import Optimizer

SIZES = dict(steps=8, batch_size=8, lr=1e-2)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder, step):
    path = folder / f"checkpoints/step-{step:07d}/state.pt"
    return torch.load(path, weights_only=True)


def test_it_learns_as_in_float32_but_for_overflows(tmp_path, capsys):
    run_policy(tmp_path / "half", dtype=torch.float16, **SIZES)
    run_policy(tmp_path / "single", **SIZES)
    half, single = rows_of(tmp_path / "half"), rows_of(tmp_path / "single")
    assert half[0]["kl_sft"] == 0.0 and half[-1]["kl_sft"] != 0.0
    kept = [
        row
        for row, before in zip(half, [{"skipped": 0}, *half])
        if row["skipped"] == before["skipped"]
    ]
    assert kept and all(0 < row["grad_norm"] < 100 for row in kept)
    if not half[0]["skipped"]:  # the same samples, but for rounding
        assert half[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=0.02)
    assert (
        state_of(tmp_path / "half", 8)["optimizer"]["scaler"]["scale"]
        == 65536 / 2 ** half[-1]["skipped"]
    )
    assert "scaler" not in state_of(tmp_path / "single", 8)["optimizer"]


def test_an_overflow_is_a_skipped_step_and_halves_the_scale(tmp_path, monkeypatch, capsys):
    """Also with --on-nonfinite stop. The weights stay; a scale of 1 is no reason any more."""
    forward = Optimizer.forward

    def scaled(self, function, dtype):
        found = forward(self, function, dtype)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        self.scaler.scale(torch.ones(1))
        return found

    monkeypatch.setattr(Optimizer, "forward", scaled)
    policy = run_policy(tmp_path, dtype=torch.float16, steps=2)
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [1, 2] and rows[0]["kl_sft"] == 0 == rows[1][
        "kl_sft"
    ]
    assert "beyond float16, whose loss scale is halved" in capsys.readouterr().out
    state = state_of(tmp_path, 2)
    assert state["optimizer"]["scaler"]["scale"] == 2.0**118
    assert all(torch.equal(a, b) for a, b in zip(state["policy"], policy.parameters()))


def test_an_overflow_does_not_end_a_reward_model_either(tmp_path, monkeypatch, capsys):
    """One step overflows, the others train; a loss that is not finite ends the run at once."""
    forward = Optimizer.forward

    def scaled(self, function, dtype):
        found = forward(self, function, torch.float16)
        self.scaler.update(2.0**120)
        self.scaler.set_backoff_factor(2.0**-110)
        return found

    monkeypatch.setattr(Optimizer, "forward", scaled)
    model = start_model_folder(tmp_path / "lm")
    run_rm(tmp_path / "rm", model)
    assert rows_of(tmp_path / "rm")[-1]["skipped"] == 1
    assert "loss scale is halved" in capsys.readouterr().out
    monkeypatch.setattr(
        train_rm, "pair_losses", lambda objective, logits, examples: logits.sum((0, 2)) * torch.nan
    )
    with pytest.raises(UserError, match="step 1: loss nan"):
        run_rm(tmp_path / "broken", model)


def test_a_float16_run_resumes_with_its_scale(tmp_path):
    policies = [run_policy(tmp_path / "whole", dtype=torch.float16, **SIZES)]
    run_policy(tmp_path / "cut", dtype=torch.float16, **SIZES | {"steps": 3})
    policies.append(run_policy(tmp_path / "cut", dtype=torch.float16, resume=True, **SIZES))
    assert difference(*(policy.state_dict() for policy in policies)) == ""
    states = [state_of(tmp_path / name, 8)["optimizer"] for name in ("whole", "cut")]
    assert difference(*states) == ""


def test_a_gradient_that_is_not_finite_at_a_scale_of_one_ends_the_run(tmp_path):
    run = new_run(tmp_path, None, torch.float16)
    weight = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.Module()
    model.device, model.w = torch.device("cpu"), weight
    config = train_rm.Config(lr=1.0, micro_batch_size=1)
    optimizer = Optimizer(model, [weight], config, run.ranks)
    optimizer.forward(lambda learner: None, torch.float16)
    for expected in (True, False):
        weight.grad = torch.tensor([torch.inf, 1.0])
        assert optimizer.step() == torch.inf and optimizer.overflowed is expected
        assert torch.equal(weight.detach(), torch.ones(2))
        optimizer.scaler.update(1.0)
    weight.grad = torch.tensor([3.0, 4.0]) * optimizer.scaler.get_scale()
    assert optimizer.step() == pytest.approx(5.0) and not optimizer.overflowed
    assert not torch.equal(weight.detach(), torch.ones(2))


def test_a_reward_model_trains_in_float16(tmp_path):
    model = start_model_folder(tmp_path / "lm")
    found = [run_rm(tmp_path / name, model, dtype=name) for name in ("float32", "float16")]
    assert abs(found[0]["eval_loss"] - found[1]["eval_loss"]) < 0.05


def test_float16_and_shard_are_refused():
    with pytest.raises(UserError, match="--shard --dtype float16"):
        train_rm.resolve(train_rm.Config(dtype="float16", shard=True))


@pytest.mark.parametrize("kind", ["sequence", "token", "mask"])
def test_each_importance_is_logged_with_its_effective_sample_size(tmp_path, kind):
    run_policy(tmp_path, sampler_dtype="float16", importance=kind, importance_limit=1.0, lr=0.05)
    for row in rows_of(tmp_path):
        assert 0 <= row["importance_ess"] <= 1 + 1e-6 and 0 <= row["importance"] <= 1
        assert 0 <= row["importance_clipped"] <= 1


def test_fading_weights_are_told_once(tmp_path, monkeypatch, capsys):
    from minalign import reinforce

    real = reinforce.importance_weights
    monkeypatch.setattr(reinforce, "importance_weights", lambda *args: 0.8 * real(*args))
    run_policy(tmp_path, dtype=torch.bfloat16)
    assert capsys.readouterr().out.count("importance weights are 0.80 on average") == 1
    assert rows_of(tmp_path)[0]["importance_ess"] == pytest.approx(1.0)
