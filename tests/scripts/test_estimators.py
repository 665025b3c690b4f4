"""--baseline names the estimator that runs."""

import json

import pytest
import torch
from tiny_runs import run_policy

import train_policy
from minalign.data.chat import TokenizedPrompt
from minalign.reinforce import ShrinkageBaseline, leave_one_out_advantages

FIRST, SECOND = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([4.0, 0.0, 8.0, 5.0])
PROMPTS = [TokenizedPrompt([1, 2], row=row) for row in (7, 7, 9, 9)]


def shrunk():
    baseline = ShrinkageBaseline(2)
    baseline.advantages(FIRST)
    return baseline.advantages(SECOND)


def estimate(name, applies=None, **flags):
    """Advantages of the second batch, when those with a memory have a past."""
    config = train_policy.Config(baseline=name, batch_size=4, **flags)
    advantages_of, baseline = train_policy.advantage_estimator(train_policy.resolve(config))
    advantages_of(FIRST, PROMPTS, None)
    return advantages_of(SECOND, PROMPTS, applies), baseline


@pytest.mark.parametrize("name", ["moving", "ema", "rloo", "none", "prompt", "shrink"])
def test_each_baseline_is_the_function_of_its_name(name):
    """Means of the first batch are 3 and, with decay .9, 3, too; by prompt 3.7 / 1.9, 7.8 / 1.9."""
    group = {"group_size": 4 if name == "rloo" else 2} if name in ("rloo", "shrink") else {}
    advantages, baseline = estimate(name, **group)
    of_prompt = torch.tensor([(0.9 + 3 + 3) / 2.9, (0.9 * 2 + 6 + 3) / 2.9])
    expected = {
        "moving": SECOND - 3.0,
        "ema": SECOND - 3.0,
        "rloo": leave_one_out_advantages(SECOND, 4),
        "none": SECOND,
        "prompt": SECOND - of_prompt.repeat_interleave(2),
    }
    torch.testing.assert_close(advantages, expected[name] if name in expected else shrunk())
    past = {"moving": 29 / 8} | dict.fromkeys(["ema", "prompt"], (0.09 * 3.0 + 0.1 * 4.25) / 0.19)
    if name != "shrink":
        assert baseline.value == pytest.approx(past.get(name, 0.0))  # decay .9, bias-corrected


@pytest.mark.parametrize("name", ["moving", "ema", "rloo", "none", "prompt", "shrink"])
def test_samples_without_a_reward_are_left_out(name):
    """They get 0, and what their rewards are changes nothing, now and later."""
    group = {"group_size": 2} if name in ("rloo", "shrink") else {}
    config = train_policy.Config(baseline=name, batch_size=4, **group)
    applies = torch.tensor([True, False, True, True])
    found = []
    for rubbish in (0.0, 1e6):
        advantages_of, _ = train_policy.advantage_estimator(train_policy.resolve(config))
        first = torch.tensor([4.0, rubbish, 8.0, 5.0])
        found.append((advantages_of(first, PROMPTS, applies), advantages_of(SECOND, PROMPTS, None)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    assert found[0][0][1] == 0 and (found[0][0][2:] != 0).all()
    nobody = advantages_of(SECOND, PROMPTS, torch.zeros(4, dtype=torch.bool))
    assert not nobody.any()


def some(prompts, completions):
    """None for texts that begin like half of them."""
    return [None if len(text) % 2 else 3.0 + len(text) for text in completions]


def test_a_run_averages_the_samples_that_have_a_reward(tmp_path):
    """Of the log, of shaped rewards, and of the baseline that the next batch gets."""
    run_policy(tmp_path, function=some, beta=0.0, missing_eos_penalty=0.0, steps=2, batch_size=16)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 < first["applies"] < 1 and first["reward"] >= 3
    assert first["shaped_reward"] == pytest.approx(first["reward"])
    assert second["baseline"] == pytest.approx(first["reward"])


def test_a_run_standardises_by_the_samples_that_have_a_reward(tmp_path):
    """Advantages of deviation 1 among them, and 0 elsewhere: less than 1 over all."""
    flags = dict(beta=0.0, missing_eos_penalty=0.0, steps=1, batch_size=16)
    run_policy(tmp_path, function=some, standardize_advantages=True, **flags)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0 < row["applies"] < 1
    assert row["advantage_std"] == pytest.approx(row["applies"] ** 0.5)  # their mean is 0
