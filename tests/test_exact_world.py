"""The world that the experiments measure in, and what they share: is the truth true?

All is checked against a second way to compute it: sampling, minalign's own functions on every
completion, or brute force.
"""

import copy
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import exact_world
import seeds
from exact_world import (
    END,
    LENGTH,
    MASK,
    PROMPTS,
    SEQUENCES,
    WORDS,
    lookup,
    make_world,
    optimal_front,
    reward_at,
    sequence_logprobs,
    token_logprobs,
    train,
    truth,
)

from minalign.reinforce import kl_penalized_rewards, reinforce_loss
from minalign.rollout import completion_logprobs, frozen_logprobs, generate

WIDTH = 32  # smaller than in the experiments, for speed
SLOPES = np.geomspace(100, 0.02, 200)  # the temperatures b of optimal_front's points


@pytest.fixture(scope="module")
def world():
    return make_world(3, between=2.0, width=WIDTH)


@pytest.fixture(scope="module")
def away(world):
    """A policy some nats from the start that no training made."""
    policy = copy.deepcopy(world.start)
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        weight.data += 1.5 * weight.data.std() * torch.randn(weight.shape, generator=generator)
    assert truth(world, policy)["kl"] > 0.5
    return policy.requires_grad_(True)


def every(prompt):
    """All completions of a prompt as a Rollout's functions take them."""
    return torch.full((len(SEQUENCES), 1), prompt), torch.ones(len(SEQUENCES), 1), SEQUENCES, MASK


def likely(rows, p):
    """Whether sampled places (B,) may come from p (N,), by chi squared in three groupings.

    Chi squared must lie within 5 standard deviations of its mean. Rare outcomes count together.
    """
    groupings = (
        torch.arange(len(p)),
        SEQUENCES[:, 0] * WORDS + SEQUENCES[:, 1],
        SEQUENCES[:, 2] * WORDS + SEQUENCES[:, 4],
    )
    for group in groupings:
        expected = torch.zeros(len(p), dtype=torch.double).index_add(0, group, p) * len(rows)
        counts, common = group[rows].bincount(minlength=len(p)).double(), expected >= 10
        counts = torch.cat([counts[common], counts[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None] + 1e-9])
        chi_squared, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
        assert freedom >= 4
        if abs(chi_squared - freedom) > 5 * math.sqrt(2 * freedom):
            return False
    return True


# --- the enumeration


def test_every_completion_is_there_once():
    lengths, count = MASK.sum(1), sum(END**t for t in range(LENGTH)) + END**LENGTH
    assert len(SEQUENCES) == count == len(SEQUENCES.unique(dim=0)) == 3906
    ended = (SEQUENCES == END).any(1)
    assert (SEQUENCES[ended, lengths[ended] - 1] == END).all() and (lengths[~ended] == LENGTH).all()
    assert (SEQUENCES[~MASK] == 0).all()
    assert ((SEQUENCES == END).sum(1) <= 1).all()
    assert SEQUENCES.max() < WORDS


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_probabilities_sum_to_one(world, away, temperature):
    for policy in (world.start, away):
        total = sequence_logprobs(policy, temperature).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_logprobs_are_those_that_minalign_computes(world, away):
    for policy, temperature in ((world.start, 1.0), (away, 0.6)):
        ours = token_logprobs(policy, temperature).detach()
        for prompt in (0, PROMPTS - 1):
            theirs = frozen_logprobs(policy, *every(prompt), temperature, len(SEQUENCES)).double()
            torch.testing.assert_close(ours[prompt], theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sequence_logprobs(policy, temperature), ours.sum(2))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_have_the_enumerated_frequencies(world, temperature):
    for prompt in range(PROMPTS):
        rollout = generate(
            world.start,
            torch.full((3000, 1), prompt),
            torch.ones(3000, 1),
            max_new_tokens=LENGTH,
            temperature=temperature,
            eos_token_ids=END,
            pad_token_id=0,
            generator=torch.Generator().manual_seed(prompt),
        )
        logprobs = sequence_logprobs(world.start, temperature)[prompt]
        rows = lookup(rollout.tokens, rollout.mask)
        assert likely(rows, logprobs.exp())
        torch.testing.assert_close(
            rollout.logprobs.sum(1).double(), logprobs[rows], rtol=1e-4, atol=1e-4
        )


def test_lookup_finds_every_completion():
    rows = torch.arange(len(SEQUENCES))
    assert torch.equal(lookup(SEQUENCES, MASK), rows)
    # whatever stands after the end
    assert torch.equal(lookup(SEQUENCES.masked_fill(~MASK, 3), MASK), rows)
    for width in range(1, LENGTH):  # a batch whose longest completion is shorter
        short = MASK.sum(1) <= width
        assert torch.equal(lookup(SEQUENCES[short, :width], MASK[short, :width]), rows[short])
    shuffled = torch.randperm(len(rows))
    assert torch.equal(lookup(SEQUENCES[shuffled], MASK[shuffled]), shuffled)


# --- rewards and the truth


def test_rewards_have_mean_0_and_sd_1_under_the_start():
    plain = make_world(5, between=0.0, width=WIDTH)
    shifted = make_world(5, between=3.0, offset=7.0, width=WIDTH)
    p = sequence_logprobs(plain.start).exp()
    means, squares = (p * plain.rewards).sum(1), (p * plain.rewards**2).sum(1)
    torch.testing.assert_close(means, torch.zeros(PROMPTS, dtype=torch.double), atol=1e-6, rtol=0)
    torch.testing.assert_close(squares, torch.ones(PROMPTS, dtype=torch.double), atol=1e-6, rtol=0)
    levels = (shifted.rewards - plain.rewards).float() - 7.0
    torch.testing.assert_close(levels, levels[:, :1].expand_as(levels))
    third = make_world(5, between=1.0, width=WIDTH)
    torch.testing.assert_close((third.rewards - plain.rewards).float() * 3, levels)
    many = [
        make_world(i, 3.0, width=8).rewards - make_world(i, 0.0, width=8).rewards for i in range(6)
    ]
    assert 2.0 < torch.stack([level[:, 0] for level in many]).std().item() < 4.0
    assert torch.equal(sequence_logprobs(shifted.start), sequence_logprobs(plain.start))


def test_another_seed_is_another_world_and_the_same_one_the_same(world):
    other, again = make_world(4, between=2.0, width=WIDTH), make_world(3, between=2.0, width=WIDTH)
    assert torch.equal(world.rewards, again.rewards)
    assert not torch.allclose(world.rewards, other.rewards)
    assert not torch.allclose(sequence_logprobs(world.start), sequence_logprobs(other.start))
    prompts = sequence_logprobs(world.start)
    assert not torch.allclose(prompts[0], prompts[1])  # and prompts matter


def test_truth_by_brute_force(world, away):
    reward = kl = length = 0.0
    for prompt in range(PROMPTS):
        p, q = (
            frozen_logprobs(m, *every(prompt), 1.0, len(SEQUENCES)).sum(1).double().numpy()
            for m in (away, world.start)
        )
        r = world.rewards[prompt].double().numpy()
        reward += (np.exp(p) @ r - np.exp(q) @ r) / PROMPTS
        kl += np.exp(p) @ (p - q) / PROMPTS
        length += np.exp(p) @ np.array([len(row[m]) for row, m in zip(SEQUENCES, MASK)]) / PROMPTS
    expected = {"reward": reward, "kl": kl, "length": length}
    assert truth(world, away) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    at_start = truth(world, world.start)
    assert at_start["reward"] == 0 and at_start["kl"] == 0


# --- the optimal front


@pytest.fixture(scope="module")
def front(world):
    return optimal_front(world)


def bound(front, kl):
    """The largest reward at this KL that the tangents of the front allow: their slopes are b."""
    kls, rewards = front
    return (rewards[1:] + SLOPES * (kl - kls[1:])).min()


def test_front_by_brute_force(world, front):
    kls, rewards = front
    assert len(kls) == len(rewards) == len(SLOPES) + 1 and kls[0] == rewards[0] == 0
    for i in (40, 150):
        kl = reward = 0.0
        for prompt in range(PROMPTS):
            logprobs = frozen_logprobs(world.start, *every(prompt), 1.0, len(SEQUENCES))
            start = logprobs.sum(1).double().exp().numpy()
            r = world.rewards[prompt].double().numpy()
            unnormalised = start * np.exp((r - r.max()) / SLOPES[i])
            p = unnormalised / unnormalised.sum()
            reward += (p @ r - start @ r) / PROMPTS
            kl += sum(a * math.log(a / b) for a, b in zip(p, start) if a > 0) / PROMPTS
        assert kls[i + 1] == pytest.approx(kl, rel=1e-3)
        assert rewards[i + 1] == pytest.approx(reward, rel=1e-3)


def test_slope_of_the_front_is_b(front):
    kls, rewards = front
    slopes = np.diff(rewards)[1:] / np.diff(kls)[1:]  # of the chords between neighbours
    part = slice(20, 180)  # elsewhere the differences are of rounding
    assert (slopes[part] <= SLOPES[:-1][part] * 1.001).all()
    assert (slopes[part] >= SLOPES[1:][part] * 0.999).all()
    assert (np.diff(kls) > 0).all() and (np.diff(rewards) > 0).all()


def test_nothing_lies_above_the_front(world, away, front):
    start = sequence_logprobs(world.start)
    closest = math.inf
    for i in range(40):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randn(start.shape, generator=generator) * torch.rand(1, generator=generator)
        own = 4 * torch.rand(*([PROMPTS, 1] if i % 2 else [1]), generator=generator)
        tilted = (start + own * world.rewards + (noise if i % 4 > 1 else 0)).log_softmax(1)
        kl = (tilted.exp() * (tilted - start)).sum(1).mean().item()
        reward = ((tilted.exp() - start.exp()) * world.rewards).sum(1).mean().item()
        assert reward <= bound(front, kl) + 1e-6
        closest = min(closest, bound(front, kl) - reward)
    assert closest < 1e-2  # one b for all prompts is on it
    _, curve = train(world, seed=0, steps=20, batch_size=32, lr=5e-4, beta=0.1, every=10)
    for point in [*curve[1:], truth(world, away)]:
        assert point["reward"] <= bound(front, point["kl"])
    assert curve[-1]["reward"] > 0.3 * bound(front, curve[-1]["kl"])


# --- gradients and training


def gradient(policy, objective, again=False):
    parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=again)
    return torch.cat([part.flatten() for part in parts])


def test_expected_reinforce_gradient_is_that_of_the_objective(world, away):
    beta, prompt = 0.3, 2
    anchor = token_logprobs(world.start)[prompt]
    logprobs = sequence_logprobs(away)[prompt]
    reward, kl = logprobs.exp() @ world.rewards[prompt], logprobs.exp() @ (logprobs - anchor.sum(1))
    g_reward, g_kl = gradient(away, reward, True), gradient(away, kl)

    # ALL completions, each weighted by its probability
    logprobs = completion_logprobs(away, *every(prompt), 1.0)
    shaped = kl_penalized_rewards(world.rewards[prompt].float(), logprobs, anchor, MASK, beta)
    p = logprobs.detach().double().sum(1).exp()
    found = -gradient(away, p @ reinforce_loss(logprobs, MASK, shaped - shaped.mean()).double())
    exact = g_reward - beta * g_kl
    assert ((found - exact).norm() / exact.norm()).item() < 1e-3
    assert (beta * g_kl.norm() / exact.norm()).item() > 0.05  # the penalty does show


def test_train_improves_its_objective_and_leaves_the_start_alone(world):
    before = sequence_logprobs(world.start)
    ends = {}
    for beta in (0.2, 1.0):
        policy, curve = train(world, seed=1, steps=24, batch_size=32, lr=3e-4, beta=beta, every=12)
        assert [point["step"] for point in curve] == [0, 12, 24]
        assert curve[0] | {"step": 24} | truth(world, policy) == curve[-1]
        objective = [point["reward"] - beta * point["kl"] for point in curve]
        ends[beta] = curve[-1]
        assert objective[-1] > (0.3 if beta < 1 else 0.1)
    assert ends[0.2]["kl"] > 1.5 * ends[1.0]["kl"] and ends[0.2]["reward"] > ends[1.0]["reward"]
    assert torch.equal(sequence_logprobs(world.start), before)
    assert not world.start.lm_head.weight.requires_grad


@pytest.fixture
def unmeasured(monkeypatch):
    """Training without the enumeration, which most of its time goes to."""
    monkeypatch.setattr(exact_world, "truth", lambda world, policy: {})


def weights(world, **changes):
    policy, _ = train(world, **({"seed": 7, "steps": 2, "lr": 1e-3, "beta": 0.5} | changes))
    return torch.cat([weight.flatten() for weight in policy.parameters()])


def test_train_twice_is_the_same(world):
    policy, curve = train(world, seed=7, steps=6, lr=1e-3, every=3)
    again, same = train(world, seed=7, steps=6, lr=1e-3, every=3)
    assert curve == same
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))


def test_each_argument_matters(world, unmeasured):
    base = weights(world)

    def equal(**changes):
        return torch.allclose(weights(world, **changes), base, rtol=0, atol=1e-6)

    assert equal(beta=lambda step: 0.5) and not equal(beta=lambda step: 0.5 + 5.0 * (step == 2))
    assert equal(anchor="ema", mu=1e-9) and not equal(anchor="ema", mu=0.5)
    assert equal(observed=world.rewards) and not equal(observed=-world.rewards)
    assert equal(init=world.start) and equal(reweight=lambda advantages, place: advantages)
    assert not equal(seed=8)
    assert not equal(baseline="none")
    assert not equal(baseline="rloo", group_size=4)
    assert not equal(sampling_temperature=0.7) and not equal(batch_size=4) and not equal(beta=0.1)


def test_an_offset_changes_nothing_with_a_baseline(unmeasured):
    worlds = [make_world(2, between=1.0, offset=offset, width=WIDTH) for offset in (0.0, 3.0)]
    for arguments in ({"baseline": "moving"}, {"baseline": "rloo", "group_size": 4}):
        plain, shifted = (weights(world, **arguments) for world in worlds)
        # lr 1e-3: a step of Adam is up to 1e-3
        torch.testing.assert_close(plain, shifted, rtol=0, atol=2e-4)
    plain, shifted = (weights(world, baseline="none") for world in worlds)
    assert (plain - shifted).abs().max() > 5e-4


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_train_draws_from_the_policy_at_the_sampling_temperature_and_scores_at_one(
    world, temperature, unmeasured
):
    seen = []

    def record(shaped, place):
        seen.append((shaped, place))
        return shaped

    settings = dict(steps=1, batch_size=6000, lr=0.0, beta=2.0, baseline="none", reweight=record)
    train(world, seed=5, sampling_temperature=temperature, **settings)
    ((shaped, (asked, rows)),) = seen
    # At the start policy the log-ratio is 0 at one temperature. What is left is the reward, that of
    # the right place.
    torch.testing.assert_close(shaped, world.rewards[asked, rows].float(), rtol=0, atol=1e-4)
    p = sequence_logprobs(world.start, temperature).exp()
    assert all(likely(rows[asked == prompt], p[prompt]) for prompt in range(PROMPTS))


def test_the_penalty_is_that_of_the_samples_log_ratio(world, away, unmeasured):
    """The anchor is `init`, and stays there.

    From the second step on the shaped reward holds beta times the log-ratio to it.
    """
    seen, policies = [], []

    def record(shaped, place):
        seen.append((shaped, place))
        return torch.ones_like(shaped)

    settings = dict(seed=5, lr=1e-3, beta=0.7, baseline="none", reweight=record, init=away)
    for steps in (1, 2):
        policies.append(train(world, steps=steps, **settings)[0])
    shaped, (asked, rows) = seen[-1]
    ratio = (sequence_logprobs(policies[0]) - sequence_logprobs(away).detach())[asked, rows]
    expected = (world.rewards[asked, rows] - 0.7 * ratio).double()
    torch.testing.assert_close(shaped.double(), expected, rtol=1e-3, atol=1e-4)
    assert ratio.abs().max() > 1e-2


def test_each_step_has_its_own_gradient(world, unmeasured):
    """A second step without advantages moves by Adam's momentum alone.

    It is .9 / 1.9 / sqrt(.999 / 1.999) = .67 of the first.
    """
    seen = []

    def first_only(advantages, place):
        seen.append(place)
        return advantages * (len(seen) == 1)

    after = []
    for steps in (1, 2):
        seen.clear()
        policy, _ = train(world, seed=7, steps=steps, lr=1e-3, beta=0.0, reweight=first_only)
        after.append(policy.lm_head.weight - world.start.lm_head.weight)
    moved = after[0].abs() > 0.9e-3  # where the gradient is not 0
    assert moved.sum() > 50
    ratios = (after[1] / after[0])[moved]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1.67), atol=0.02, rtol=0)


def test_rloo_asks_each_prompt_group_size_times(world, unmeasured):
    seen = []

    def record(advantages, place):
        seen.append((advantages, place[0]))
        return advantages

    train(world, seed=0, steps=3, batch_size=8, baseline="rloo", group_size=4, reweight=record)
    for advantages, asked in seen:
        assert (asked.view(2, 4) == asked.view(2, 4)[:, :1]).all()
        torch.testing.assert_close(advantages.view(2, 4).sum(1), torch.zeros(2), rtol=0, atol=1e-4)


# --- what the experiments share


def test_reward_at_interpolates_the_first_crossing():
    points = ((0, 0), (1, 2), (3, 3), (2, 9), (4, 10))
    curve = [{"kl": kl, "reward": reward} for kl, reward in points]
    found = [reward_at(curve, kl) for kl in (0.5, 1.0, 2.0, 3.5)]
    assert found == pytest.approx([1.0, 2.0, 2.5, 9.75])
    assert math.isnan(reward_at(curve, 4.5))
    assert math.isnan(reward_at(curve[:1], 0.5))
    assert math.isnan(reward_at(curve, 0.0))


def test_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 50)
    found = seeds.bootstrap([*values, float("nan")])
    half = 1.96 * values.std() / math.sqrt(50)
    assert found["mean"] == pytest.approx(values.mean()) and found["seeds"] == 50
    ends = (values.mean() - half, values.mean() + half)
    assert (found["low"], found["high"]) == pytest.approx(ends, abs=0.1 * half)
    assert seeds.bootstrap([1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "seeds": 2}
    nothing = seeds.bootstrap([float("nan")])
    assert nothing["seeds"] == 0 and math.isnan(nothing["mean"])
    shown = seeds.show({"mean": 0.12345, "low": -1, "high": 2, "seeds": 3})
    assert shown == "+0.123 [-1.000, +2.000] (3 seeds)"


def test_main_runs_each_seed_once_and_reports_all(tmp_path, monkeypatch):
    ran, reported = [], []

    def work(seed):
        ran.append(seed)
        return {"square": seed**2}

    def report(results):
        reported.append(results)
        return {"sum": sum(result["square"] for result in results.values())}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiment", "--out", str(tmp_path / "out"), *arguments])
        seeds.main("experiment", "question", work, report, seeds=3)
        return json.loads((tmp_path / "results" / "experiment.json").read_text())

    threads = torch.get_num_threads()
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", ThreadPoolExecutor)
    assert run() == {"seeds": [0, 1, 2], "sum": 5} and ran == [0, 1, 2]
    # those that were missing, and 10 after 9
    assert run("--seeds", "12")["seeds"] == list(range(12)) and ran == list(range(12))
    assert run("--seeds", "2") == {"seeds": [0, 1], "sum": 1} and len(ran) == 12
    (tmp_path / "out" / "1.json").unlink()
    assert run("--report", "--seeds", "2") == {"seeds": [0, 2], "sum": 4} and len(ran) == 12
    assert list(reported[-1].items()) == [(0, {"square": 0}), (2, {"square": 4})]
    assert not list((tmp_path / "out").glob("*.part"))
    torch.set_num_threads(threads)
