"""What the studies of WARP, one run and the best of n compute: laws, crossings, picked betas."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import best_of_n
import toy_world
import warp_front


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_law_of_the_best_of_n_is_that_of_all_draws(n):
    """Two prompts, four completions, two of equal reward; of equal ones a draw decides."""
    start = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.1, 0.4]]).double()
    rewards = torch.tensor([[3.0, 1.0, 1.0, 2.0], [-1.0, 5.0, 2.0, 5.0]]).double()
    expected = torch.zeros_like(start)
    for prompt in range(2):
        for draw in itertools.product(range(4), repeat=n):
            chance = start[prompt, list(draw)].prod()
            highest = max(rewards[prompt, i] for i in draw)
            best = [i for i in draw if rewards[prompt, i] == highest]
            for i in best:
                expected[prompt, i] += chance / len(best)
    found = best_of_n.best_of_law(start, rewards, n)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_crossing_is_the_first_one_and_linear():
    curve = [{"kl": kl, "gold": gold} for kl, gold in ((0, 0), (2, 4), (1, 9), (3, 1))]
    assert toy_world.at(curve, 1.5) == 3 and toy_world.at(curve, 2) == 4
    assert toy_world.at(curve, 2.5) == 3 and math.isnan(toy_world.at(curve, 3.5))


def test_a_beta_is_picked_by_the_other_seeds_alone():
    nan = math.nan
    rewards = {0.1: np.array([9.0, 1.0, 1.0]), 0.3: np.array([2.0, 2.0, nan])}
    # seed 0: the others say 1 and 2, from one of two each: half is not most
    assert warp_front.picked(rewards)[0] == 9
    assert warp_front.picked(rewards)[1:].tolist() == [1, 1]
    rewards = {0.1: np.array([9.0, 1.0, 1.0]), 0.3: np.array([2.0, 2.0, 2.0])}
    assert warp_front.picked(rewards).tolist() == [2, 1, 1]
    assert np.isnan(warp_front.picked({0.1: np.full(3, nan)})).all()
