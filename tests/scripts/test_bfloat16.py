"""--dtype bfloat16: rounded weights draw the samples.

What is learned from are the policy's own log-probs.
"""

import json
import math

import pytest
import torch
from tiny_runs import difference, run_policy, tiny_model

from minalign import reinforce
from minalign.logprobs import position_ids_from_mask
from minalign.models import precision
from minalign.models.precision import refresh_, sampling_copy
from minalign.running.errors import UserError


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VARIANTS = [{}, {"lora_rank": 2}, {"anchor": "ema", "mu": 0.3, "baseline": "rloo"}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_first_kl_is_zero_and_the_weights_stay_near_one(tmp_path, changes):
    """Both sides of the KL come from the same pass.

    A sampling copy that was not refreshed would drift off.
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


def test_the_ratio_is_that_of_the_policy_to_the_copy(tmp_path, monkeypatch):
    """A copy of zeros draws every word alike."""
    seen = []

    def record(logprobs, sampling_logprobs, mask):
        seen.append((logprobs[mask], sampling_logprobs[mask]))
        return torch.ones(len(mask))

    def zero_(sampler, policy):
        for parameter in sampler.parameters():
            parameter.zero_()

    monkeypatch.setattr(reinforce, "importance_weights", record)
    monkeypatch.setattr(precision, "refresh_", zero_)
    run_policy(tmp_path, dtype=torch.bfloat16)
    uniform = torch.tensor(-math.log(len(tiny_model()[1])))
    assert all(not torch.allclose(a, b) and torch.allclose(b, uniform) for a, b in seen)


def test_a_bfloat16_run_resumes(tmp_path):
    """The copy is made of the resumed weights."""
    policies = [run_policy(tmp_path / "whole", dtype=torch.bfloat16)]
    run_policy(tmp_path / "cut", dtype=torch.bfloat16, steps=3)
    policies.append(run_policy(tmp_path / "cut", dtype=torch.bfloat16, resume=True))
    assert difference(*(policy.state_dict() for policy in policies)) == ""


def test_the_copy_has_rounded_weights_and_whole_angles():
    model = tiny_model()[0]
    assert sampling_copy(model, torch.float32) is model
    copied = sampling_copy(model, torch.bfloat16)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert torch.equal(copied.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight, "tied still"
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    refresh_(copied, model)
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight.bfloat16())
    ids = torch.tensor([[1, 7, 9, 4]])
    positions = position_ids_from_mask(torch.ones_like(ids))
    rounded = copied(ids, position_ids=positions).logits.float()
    torch.testing.assert_close(rounded, model(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_copy_that_is_not_finite_ends_the_run_or_is_skipped(tmp_path, monkeypatch, action):
    """The policy is sound, only the ratio is not: no gradient of it may get through."""

    def spoil_(sampler, policy):
        for parameter in sampler.parameters():
            parameter.fill_(math.nan)

    monkeypatch.setattr(precision, "refresh_", spoil_)
    if action == "stop":
        message = "step 1: a reward, KL or importance weight that is not finite"
        with pytest.raises(UserError, match=message):
            run_policy(tmp_path, dtype=torch.bfloat16)
    else:
        policy = run_policy(tmp_path, dtype=torch.bfloat16, on_nonfinite="skip")
        assert [row["skipped"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert difference(policy.state_dict(), tiny_model()[0].state_dict()) == ""
