"""Best of n: the estimates equal their enumeration, and are unbiased."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import exact_world

from minalign.measuring.measures import best_of_n, best_of_n_kl, best_of_n_wins

TABLES = [  # rewards of five samples, and what they are worth
    ([0.3, -1.0, 2.0, 0.5, 1.5], [4.0, 1.0, -2.0, 7.0, 0.0]),
    ([1.0, 1.0, 0.0, 2.0, 2.0], [5.0, -1.0, 3.0, 2.0, 8.0]),
    ([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]),
]


def worth(rewards, values):
    """Of one set of samples: the mean value of those with the highest reward."""
    best = [v for r, v in zip(rewards, values) if r == max(rewards)]
    return sum(best) / len(best)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize(("rewards", "values"), TABLES)
def test_best_of_n_is_the_mean_over_all_subsets(rewards, values, n):
    subsets = list(itertools.combinations(range(5), n))
    for given in (rewards, values):
        by_hand = [worth([rewards[i] for i in s], [given[i] for i in s]) for s in subsets]
        found = best_of_n(torch.tensor([rewards]), n, torch.tensor([given]))
        assert found.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
    assert best_of_n(torch.tensor([rewards]), n).item() == pytest.approx(
        best_of_n(torch.tensor([rewards]), n, torch.tensor([rewards])).item()
    )


@pytest.mark.parametrize("n", range(1, 5))
@pytest.mark.parametrize("rewards", [table[0] for table in TABLES])
def test_wins_are_the_mean_over_all_subsets_and_another_sample(rewards, n):
    won = []
    for other in range(5):
        rest = [r for i, r in enumerate(rewards) if i != other]
        for subset in itertools.combinations(rest, n):
            won.append((max(subset) > rewards[other]) + (max(subset) == rewards[other]) / 2)
    found = best_of_n_wins(torch.tensor([rewards]), n).item()
    assert found == pytest.approx(sum(won) / len(won))
    if len(set(rewards)) == 5:
        assert found == pytest.approx(n / (n + 1))


def truth(probabilities, rewards, values, n):
    """E[value of the best of n draws], exactly: P(all n <= r) - P(all n < r) for each reward r."""
    total = 0.0
    for r in set(rewards.tolist()):
        at, below = probabilities[rewards == r].sum(), probabilities[rewards < r].sum()
        mean = (probabilities * values)[rewards == r].sum() / at
        total += mean * ((below + at) ** n - below**n)
    return total.item()


def test_the_estimate_is_unbiased():
    """The mean over all 4^5 draws of five samples from four completions, two of equal reward."""
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.double)
    rewards, gold = torch.tensor([[3.0, 1.0, 1.0, 2.0], [-1.0, 5.0, 2.0, 0.0]]).double()
    draws = torch.cartesian_prod(*[torch.arange(4)] * 5)
    chance = p[draws].prod(1)
    for n in (1, 2, 3, 5):
        for values in (rewards, gold):
            mean = (chance * best_of_n(rewards[draws], n, values[draws])).sum().item()
            assert mean == pytest.approx(truth(p, rewards, values, n), abs=1e-12)
        if n < 5:  # P(best > other) + P(equal) / 2
            levels = [(p[rewards == r].sum(), p[rewards < r].sum()) for r in (1.0, 2.0, 3.0)]
            won = sum(((b + a) ** n - b**n) * (b + a / 2) for a, b in levels)
            mean = (chance * best_of_n_wins(rewards[draws], n)).sum().item()
            assert mean == pytest.approx(won.item(), abs=1e-12)


@pytest.mark.slow
def test_it_meets_the_exact_world_where_all_completions_are_enumerated():
    """Sampled means lie within 4 standard errors of the truth, and the KL below its bound."""
    world = exact_world.make_world(3, width=16)
    with torch.no_grad():
        p = exact_world.sequence_logprobs(world.start).exp()  # (4, 3906)
    draws = p.multinomial(400 * 9, replacement=True).view(4, 400, 9)
    for n in (1, 4, 8):
        for prompt in range(4):
            rewards = world.rewards[prompt].double()
            found = best_of_n(rewards[draws[prompt]], n)
            exact = truth(p[prompt], rewards, rewards, n)
            assert abs(found.mean() - exact) < 4 * found.std() / 20
            order = rewards.argsort()
            upto = p[prompt][order].cumsum(0)
            best = upto**n - (upto - p[prompt][order]) ** n  # P(y is the best of n)
            kl = (best * (best / p[prompt][order]).log()).nansum().item()
            assert -1e-9 <= kl <= best_of_n_kl(n) + 1e-9
            assert n == 1 or kl > 0.8 * best_of_n_kl(n)  # no completion is likely


def test_the_bound_is_reached_by_many_equally_likely_completions():
    k = torch.arange(1, 100_001, dtype=torch.double)
    best = (k / 1e5) ** 16 - ((k - 1) / 1e5) ** 16
    assert (best * (best * 1e5).log()).sum().item() == pytest.approx(best_of_n_kl(16), abs=1e-3)
    assert best_of_n_kl(16) == math.log(16) - 15 / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_are_apart_and_large_n_is_exact(dtype):
    rewards = torch.tensor([table[0] for table in TABLES], dtype=dtype)
    alone = [best_of_n(row[None], 3).item() for row in rewards]
    assert best_of_n(rewards, 3).tolist() == alone
    many = torch.arange(2001, dtype=dtype)[None]
    assert best_of_n(many, 2001).item() == pytest.approx(2000)
    assert best_of_n(many, 1000).item() == pytest.approx(1000 * 2002 / 1001 - 1)  # E[max of n]
    assert best_of_n_wins(many, 1000).item() == pytest.approx(1000 / 1001)


@pytest.mark.parametrize("n", [0, -1, 4])
def test_what_has_no_best_of_n_is_refused(n):
    with pytest.raises(ValueError, match="1..3"):
        best_of_n(torch.tensor([[1.0, 2.0, 3.0]]), n)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            best_of_n(torch.tensor([[1.0, broken]]), 1)
    with pytest.raises(ValueError, match="1..2"):
        best_of_n_wins(torch.tensor([[1.0, 2.0, 3.0]]), 3)
