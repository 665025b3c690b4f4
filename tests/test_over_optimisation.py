"""The arithmetic of tests/experiments/over_optimisation.py and feature_cloud.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from feature_cloud import features, fit_cloud, outside, shrunk_covariance
from over_optimisation import alarms, auroc, disagreement, fallen, threshold, turn, with_training

from minalign.data import toy
from minalign.reward import RewardModel


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_of_a_standard_normal_the_limit_is_the_quantile_of_chi():
    cloud = fit_cloud(5 + 3 * normal(40_000, 4))
    torch.testing.assert_close(cloud.limit.item() ** 2, 9.488, rtol=0.03, atol=0)  # 4 dof, 95%
    torch.testing.assert_close(cloud.whitening, torch.eye(4).double() / 3, rtol=0, atol=0.02)
    share = outside(5 + 3 * normal(40_000, 4, seed=1), cloud).double().mean().item()
    assert abs(share - 0.05) < 0.005


def test_outside_is_the_mahalanobis_distance_of_numpy():
    mixed = normal(400, 6) @ normal(6, 6, seed=1) + normal(6, seed=2)
    cloud, others = fit_cloud(mixed, 0.8), 2 * mixed[:50]
    first, second = mixed[:200].numpy(), mixed[200:].numpy()
    covariance = shrunk_covariance(torch.tensor(first - first.mean(0))).numpy()

    def squares(rows):
        off = rows - first.mean(0)
        return np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off)

    limit = np.quantile(np.sqrt(squares(second)), 0.8)
    assert cloud.limit.item() == pytest.approx(limit)
    expected = np.sqrt(squares(others.numpy())) > limit
    assert outside(others, cloud).tolist() == expected.tolist()
    assert 0 < expected.sum() < 50


def test_shrinkage_is_that_of_ledoit_and_wolf():
    rows = normal(30, 5) @ normal(5, 5, seed=1)
    rows = rows - rows.mean(0)
    S = rows.T @ rows / 30
    target = S.trace() / 5 * torch.eye(5)
    apart = sum((torch.outer(row, row) - S).square().sum() for row in rows) / 30**2
    weight = (apart / (S - target).square().sum()).item()
    assert 0 < weight < 1
    torch.testing.assert_close(shrunk_covariance(rows), (1 - weight) * S + weight * target)


def test_fewer_samples_than_features_still_give_a_cloud():
    cloud = fit_cloud(normal(20, 50))
    assert cloud.whitening.isfinite().all()
    assert outside(100 * normal(5, 50, seed=1), cloud).all()


def test_the_head_of_the_features_is_the_reward():
    tokenizer = toy.make_tokenizer()
    model = RewardModel.from_backbone(toy.make_model(tokenizer, 0), tokenizer, 1)
    texts = [" good .", " very dull and the cast is fine .", " bad ."]
    rows = [model.encode("overall , the plot is", text) for text in texts]
    found = features(model, rows, batch_size=2)
    torch.testing.assert_close(found @ model.model.score.weight.T, model.logits(rows))


def test_disagreement_is_the_deviation_of_standardised_rewards():
    start = [torch.tensor([0.0, 2.0]), torch.tensor([10.0, 30.0])]  # sd sqrt 2 and sqrt 200
    rewards = [torch.tensor([1.0, 3.0]), torch.tensor([20.0, 20.0])]  # 0, sqrt 2; 0, 0
    # the sd of sqrt 2 and 0 is 1
    torch.testing.assert_close(disagreement(rewards, start), torch.tensor([0.0, 1.0]))


def test_gold_turns_where_it_first_lies_half_under_its_best():
    gold = np.array([0.0, 1.0, 0.75, 0.5, 1.5, 0.9])
    assert fallen(gold).tolist() == [False, False, False, True, False, True]
    assert turn(gold) == 3
    assert turn(np.arange(3.0)) is None


def test_a_threshold_is_exceeded_by_a_tenth_of_the_runs_at_most():
    runs = [np.array([0.0, float(peak), 1.0]) for peak in range(1, 21)]
    limit = threshold(runs)
    assert limit == 18.0
    assert sum(run.max() > limit for run in runs) == 2
    assert threshold(runs[:9]) == 9.0
    assert np.isnan(threshold([]))


def test_auroc_counts_pairs_and_halves_of_ties():
    values, positive = np.array([3.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert auroc(values, positive) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(auroc(values, positive & False))


def test_an_alarm_is_judged_by_where_it_stops(capsys):
    gold, rises = np.array([0.0, 1.0, 2.0, 0.0]), np.array([0.0, 1.0, 2.0])
    quiet = np.array([0.0, 1.0, 2.0, 3.0])
    signals = {"length": rises, "early": rises + 2, "late": rises - 2}
    runs = {0: {"turns": (gold, signals), "rises": (quiet, signals)}}
    found = alarms("test", runs, {"length": 0.5, "early": 0.5, "late": 0.5})
    assert (found["turned"], found["runs"], found["never stopping"]["mean"]) == (1, 2, 1.0)
    lost = {name: found[name]["gold lost - never stopping's"]["mean"] for name in signals}
    # of both runs, at evaluations 2, 1 and never: (0 + 1) / 2, (1 + 2) / 2 and (2 + 0) / 2
    assert lost == {"length": -0.5, "early": 0.5, "late": 0.0}
    assert found["early"]["gold lost - length's"]["mean"] == 1.0
    hits = [(found[name]["hits"], found[name]["median lead, steps"]) for name in signals]
    assert hits[:2] == [(1, 10.0), (1, 20.0)]
    assert hits[2][0] == 0
    assert [found[name]["stops without need"] for name in signals] == [1, 1, 0]
    assert [found[name]["late or never"] for name in signals] == [0, 0, 1]


def test_an_evaluation_has_the_means_of_the_steps_before_it():
    names = ("entropy", "repeated", "advantage_std", "grad_norm")
    rows = [dict.fromkeys(names, float(step)) for step in (1, 2, 3, 4)]
    curve = with_training([{"step": 0}, {"step": 2}, {"step": 4}], rows)
    assert [point["entropy"] for point in curve] == [1.5, 1.5, 3.5]
