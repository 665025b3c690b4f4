"""The arithmetic of the studies of baselines and of a KL target, each by a second way."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import baselines
import exact_world
import kl_target
from exact_world import make_world, train, truth

from minalign.reinforce import ShrinkageBaseline


@pytest.fixture(scope="module")
def world():
    return make_world(3, between=2.0, width=16)


# --- baselines


def test_relative_variance_is_that_of_each_batch_by_hand():
    torch.manual_seed(0)
    scores, exact = torch.randn(6, 3), torch.randn(3)
    rows, advantages = torch.tensor([[0, 1], [2, 5], [4, 3]]), torch.randn(3, 2)
    errors = []
    for row, a in zip(rows.tolist(), advantages.tolist()):
        g = (a[0] * scores[row[0]] + a[1] * scores[row[1]]) / 2
        errors.append(((g - exact) ** 2).sum().item())
    expected = sum(errors) / 3 / (exact**2).sum().item()
    found = baselines.relative_variance(scores, exact, rows, advantages)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arm", ["none", *baselines.ARMS])
def test_each_batch_is_measured_as_if_it_alone_came_after_the_history(arm):
    torch.manual_seed(1)
    asked = torch.randint(4, (9, 2)).repeat_interleave(4, 1)
    rewards = torch.randn(9, 8) + 3 * asked
    history = list(zip(rewards[:4], asked[:4]))
    found = baselines.after(arm, history, rewards[4:], asked[4:])
    for row, batch in zip(found, zip(rewards[4:], asked[4:])):
        advantages, _ = baselines.estimator(arm)
        alone = [advantages(*one) for one in [*history, batch]][-1]
        torch.testing.assert_close(row, alone)


def test_prompt_is_ema_where_no_prompt_comes_twice():
    """As in the toy world: ema's numbers may stand for it."""
    (ema, _), (prompt, _) = (baselines.estimator(arm) for arm in ("ema", "prompt"))
    for step in range(5):
        rewards, asked = torch.randn(8) + 3, torch.arange(8) + 8 * step
        torch.testing.assert_close(prompt(rewards, asked), ema(rewards, asked))
    # one that comes twice has a baseline of its own
    rewards = torch.randn(8)
    assert not torch.allclose(prompt(rewards, torch.arange(8)), ema(rewards, torch.arange(8)))


def test_each_arm_trains_by_its_own_baseline_in_groups_of_its_own(world, monkeypatch):
    monkeypatch.setattr(exact_world, "truth", lambda world, policy: {})
    for arm in ("none", *baselines.ARMS):
        history, (advantages, _) = [], baselines.estimator(arm)
        baselines.run(world, arm, 0, 1e-3, 3, 3, history)
        assert len(history) == 3
        grouped = [asked.view(-1, 4) for _, asked in history]
        together = all((rows == rows[:, :1]).all() for rows in grouped)
        assert together == (arm in ("rloo", "shrink"))
        found = [advantages(*batch) for batch in history][-1]
        shaped = history[-1][0]
        if arm == "none":
            assert torch.equal(found, shaped)
        elif arm == "shrink":
            other = ShrinkageBaseline(4)
            by_hand = [other.advantages(rewards) for rewards, _ in history][-1]
            assert 0 < other.value < 1 and torch.equal(found, by_hand)
        else:
            assert not torch.allclose(found, shaped)


def test_objective_is_the_mean_of_the_last_three_and_counts_texts_without_an_end():
    points = [(9, 9, 1), (1, 2, 1), (2, 4, 0.5), (6, 3, 1)]
    curve = [{"reward": r, "kl": k, "ended": e} for r, k, e in points]
    found = baselines.measures([{**point, "gold": 7.0} for point in curve])
    assert found["objective"] == pytest.approx((0.8 + 1.1 + 5.7) / 3)
    assert found["kl"] == 3 and found["gold"] == 7 and math.isnan(found["gold at KL 1"])


@pytest.mark.parametrize(
    "exact, toy, other, adopted",
    [(0.1, 0.1, 0.0, True), (0.1, -0.1, 0.0, False), (0.1, 0.1, -2.0, False), (0.1, 0, 0, False)],
)
def test_the_default_changes_only_for_a_gain_in_both_worlds_that_hurts_nowhere(
    exact, toy, other, adopted
):
    lows = dict(zip((*baselines.DEFAULTS, "exact, sd 0"), (exact, toy, other)))
    ending = ": objective, rloo - moving"
    contrasts = {k + ending: {"low": low, "high": low + 1} for k, low in lows.items()}
    contrasts["exact, sd 3: reward, rloo - moving"] = {"low": -9, "high": -8}  # not the objective
    assert baselines.decide(contrasts)["rloo"]["becomes the default"] == adopted
    del contrasts[baselines.DEFAULTS[1] + ending]  # a world that did not run
    assert not baselines.decide(contrasts)["rloo"]["becomes the default"]


# --- a KL target


def test_adapt_gets_the_mean_kl_of_the_batch_and_sets_the_next_beta(world):
    seen = []

    def adapt(beta, kl):
        seen.append((beta, kl))
        return beta + 1

    settings = dict(seed=5, batch_size=600, lr=5e-3, beta=0.5)
    policy, _ = train(world, steps=3, **settings, adapt=adapt)
    assert [beta for beta, _ in seen] == [0.5, 1.5, 2.5]
    assert seen[0][1] == pytest.approx(0.0, abs=1e-5)  # policy and anchor are the same
    two, _ = train(world, steps=2, **settings, adapt=lambda beta, kl: beta + 1)
    assert seen[2][1] == pytest.approx(truth(world, two)["kl"], rel=0.15)
    by_step, _ = train(world, steps=3, **(settings | {"beta": lambda step: step - 0.5}))
    for a, b in zip(policy.parameters(), by_step.parameters()):
        torch.testing.assert_close(a, b)


def test_where_a_run_ends_is_the_mean_of_its_last_third():
    curve = [{"step": 10 * i, "kl": float(i), "reward": 2.0 * i} for i in range(7)]
    found = kl_target.end(curve)  # steps 50 and 60
    assert found == {"kl": 5.5, "swing": 0.5, "reward": 11.0}


def test_front_of_the_sweep_is_linear_between_its_ends_and_nothing_outside():
    ends = [(3.0, 10.0), (1.0, 2.0), (2.0, 4.0)]
    found = [kl_target.front_at(ends, kl) for kl in (1.0, 1.5, 2.5)]
    assert found == pytest.approx([2.0, 3.0, 7.0])
    assert math.isnan(kl_target.front_at(ends, 0.9)) and math.isnan(kl_target.front_at(ends, 3.1))


def test_a_targeted_run_is_held_against_front_curves_and_target():
    def curve(kl, reward):  # rises to its peak, then stays at `kl`
        kls, rewards = (0, 2 * kl, kl, kl), (0, reward + 1, reward, reward)
        return [dict(step=s, kl=k, reward=r) for s, k, r in zip((0, 3, 8, 9), kls, rewards)]

    curves = {"beta 0.1": curve(3, 9), "beta 0.4": curve(1, 3), "target 2": curve(2.5, 8)}
    found = kl_target.measures(curves)
    assert found["target 2: reward - front of the sweep"] == pytest.approx(8 - 7.5)
    # the first crossing of 2.5 lies 2.5/6 of the way to the peak
    expected = 8 - 10 * 2.5 / 6
    assert found["target 2: reward - curve of beta 0.1"] == pytest.approx(expected)
    assert math.isnan(found["target 2: reward - curve of beta 0.4"])
    assert found["target 2: KL at the end / target"] == 1.25
    assert found["target 2: peak KL / target"] == 2.5
    assert found["target 2: swing of the KL / target"] == 0
    assert found["beta 0.4: reward at the end"] == 3
