"""--dtype bfloat16: rounded weights draw the samples.

What is learned from are the policy's own log-probs.
"""

import copy
import json
import math

import pytest
import torch
from tiny_runs import difference, run_policy, tiny_model

from minalign import reinforce, rollout
from minalign.rollout import generate
from minalign.running.errors import UserError


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VARIANTS = [{}, {"lora_rank": 2}, {"anchor": "ema", "mu": 0.3, "baseline": "rloo"}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_first_kl_is_zero_and_the_weights_stay_near_one(tmp_path, changes):
    """Both sides of the KL come from the same pass.

    Rounded weights of an earlier step would drift off.
    """
    sizes = dict(steps=12, lr=2e-2, batch_size=32, max_new_tokens=8)
    run_policy(tmp_path, dtype=torch.bfloat16, **sizes, **changes)
    rows = rows_of(tmp_path)
    assert rows[0]["kl_sft"] == 0.0 == rows[0]["kl_anchor"] and rows[-1]["kl_sft"] != 0.0
    weights = [row["importance"] for row in rows]
    assert all(0.97 < weight < 1.03 for weight in weights)
    assert any(weight != 1.0 for weight in weights)


def test_in_float32_the_policy_itself_draws(tmp_path):
    run_policy(tmp_path)
    assert "importance" not in rows_of(tmp_path)[0]


def test_the_weights_reach_the_gradient(tmp_path, monkeypatch):
    def nothing(logprobs, *_):
        return torch.zeros(len(logprobs))

    monkeypatch.setattr(reinforce, "importance_weights", nothing)
    run_policy(tmp_path, dtype=torch.bfloat16)
    assert {row["grad_norm"] for row in rows_of(tmp_path)} == {0.0}


def test_samples_may_be_drawn_in_bfloat16_by_a_float32_policy(tmp_path):
    """The KL is then the policy's own, and the share of weights that are cut is in the log."""
    run_policy(tmp_path, sampler_dtype="bfloat16")
    rows = rows_of(tmp_path)
    assert abs(rows[0]["kl_sft"]) < 1e-5 and abs(rows[-1]["kl_sft"]) > 1e-4
    assert all(0.9 < row["importance"] < 1.1 and row["importance"] != 1 for row in rows)
    assert {row["importance_clipped"] for row in rows} == {0.0}


def spoiled(spoil):
    """rollout.generate, whose model has other weights while it draws."""

    def drawing(policy, *args, **kwargs):
        copied = copy.deepcopy(policy)
        for parameter in copied.parameters():
            spoil(parameter.data)
        return generate(copied, *args, **kwargs)

    return drawing


def test_the_ratio_is_that_of_the_policy_to_what_drew(tmp_path, monkeypatch):
    """Weights of zero draw every word alike."""
    seen = []

    def record(logprobs, sampling_logprobs, mask, *how):
        seen.append((logprobs[mask], sampling_logprobs[mask]))
        return torch.ones(len(mask))

    monkeypatch.setattr(reinforce, "importance_weights", record)
    monkeypatch.setattr(rollout, "generate", spoiled(torch.Tensor.zero_))
    run_policy(tmp_path, dtype=torch.bfloat16)
    uniform = torch.tensor(-math.log(len(tiny_model()[1])))
    assert all(not torch.allclose(a, b) and torch.allclose(b, uniform) for a, b in seen)


def test_a_bfloat16_run_resumes(tmp_path):
    policies = [run_policy(tmp_path / "whole", dtype=torch.bfloat16)]
    run_policy(tmp_path / "cut", dtype=torch.bfloat16, steps=3)
    policies.append(run_policy(tmp_path / "cut", dtype=torch.bfloat16, resume=True))
    assert difference(*(policy.state_dict() for policy in policies)) == ""


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_draw_that_is_not_finite_ends_the_run_or_is_skipped(tmp_path, monkeypatch, action):
    """The policy is sound, only the ratio is not: no gradient of it may get through."""
    monkeypatch.setattr(rollout, "generate", spoiled(lambda weights: weights.fill_(math.nan)))
    if action == "stop":
        message = "step 1: a reward, KL or importance weight that is not finite"
        with pytest.raises(UserError, match=message):
            run_policy(tmp_path, dtype=torch.bfloat16)
    else:
        policy = run_policy(tmp_path, dtype=torch.bfloat16, on_nonfinite="skip")
        assert [row["skipped"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert difference(policy.state_dict(), tiny_model()[0].state_dict()) == ""
