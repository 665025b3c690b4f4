"""The objectives of train_rm.py: losses, what a constant model gets, probabilities."""

import math

import pytest
import torch

import train_rm
from minalign.data.pairs import Example
from minalign.losses import (
    bradley_terry_loss,
    centering_penalty,
    ordinal_pairwise_loss,
    ordinal_rating_loss,
)
from minalign.measuring.pairs import evaluate_pairs

EXAMPLES = [
    Example([[1, 2], [3]], (7.0, 4.0), 3.0),
    Example([[4], [5, 6]], (2.0, 2.0), 0.0),
    Example([[7], [8]], (9.0, 1.0), 8.0),
]
CASES = [
    {},
    {"margin": 0.5, "center_coef": 0.2},
    {"loss": "ordinal"},
    {"loss": "ordinal", "ties": "strict", "num_scores": 5},
    {"loss": "ordinal", "rating_coef": 0.7},
    {"loss": "ordinal", "rating_coef": 0.7, "rating_range": (1.0, 9.0), "num_scores": 4},
]


def objective(case):
    config = train_rm.resolve(train_rm.Config(**case))
    return config, train_rm.objective_of(config)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_those_of_the_equations(case):
    config, one = objective(case)
    logits = torch.randn(2, 3, one.labels)
    total = train_rm.pair_losses(one, logits, EXAMPLES)
    if config.loss == "bradley-terry":
        chosen, rejected = logits[0, :, 0], logits[1, :, 0]
        gaps = torch.tensor([3.0, 0.0, 8.0])
        order = bradley_terry_loss(chosen, rejected, config.margin * gaps)
        expected = order + config.center_coef * centering_penalty(chosen, rejected)
        assert one.labels == 1
    else:
        chosen, rejected = logits
        order = expected = ordinal_pairwise_loss(chosen, rejected, config.ties)
        low, high = config.rating_range
        scale = (config.num_scores - 1) / (high - low)
        for text, place in ((chosen, 0), (rejected, 1)):
            if config.rating_coef:
                ratings = torch.tensor([e.ratings[place] for e in EXAMPLES])
                on_scale = 1 + (ratings - low) * scale
                expected = expected + config.rating_coef * ordinal_rating_loss(text, on_scale)
        assert one.labels == config.num_scores
    torch.testing.assert_close(one.order_losses(logits, EXAMPLES), order)
    torch.testing.assert_close(total, expected)
    assert total.shape == (3,)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_floor_is_what_a_constant_model_gets(case):
    _, one = objective(case)
    constant = torch.zeros(2, 3, one.labels)  # of all scores, the uniform distribution is the best
    got = one.order_losses(constant, EXAMPLES).mean().item()
    assert one.floor(EXAMPLES) == pytest.approx(got, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_winning_and_losing_are_certain_together(case):
    _, one = objective(case)
    logits = torch.randn(2, 3, one.labels)
    wins, losses = one.win_probabilities(logits), one.win_probabilities(logits.flip(0))
    torch.testing.assert_close(wins + losses, torch.ones(3))
    if one.labels == 1:
        torch.testing.assert_close(wins, (logits[0, :, 0] - logits[1, :, 0]).sigmoid())
    else:  # ties count half, whatever --ties says
        p, q = logits.double().softmax(2)
        higher = torch.tril(torch.ones(one.labels, one.labels, dtype=torch.double), -1)
        ties = 0.5 * torch.eye(one.labels, dtype=torch.double)
        expected = torch.einsum("bi,ij,bj->b", p, higher + ties, q)
        torch.testing.assert_close(wins.double(), expected, rtol=1e-5, atol=1e-6)


class Table:
    """A reward model that has the logits of each text in a table, by its first token."""

    def __init__(self, rows):
        self.rows = rows

    def logits(self, texts):
        return torch.tensor([self.rows[text[0]] for text in texts])

    def read_out(self, logits):
        return logits[:, 0]


def test_evaluation_takes_the_texts_in_order():
    """By hand: gaps of 2, 0 and -1; a tie is half right."""
    _, one = objective({"margin": 0.25})
    table = Table({1: [1.0], 3: [-1.0], 4: [0.5], 5: [0.5], 7: [0.0], 8: [1.0]})
    metrics = evaluate_pairs(one, table, EXAMPLES)
    gaps, margins = [2.0, 0.0, -1.0], [0.75, 0.0, 2.0]
    losses = [math.log1p(math.exp(m - g)) for g, m in zip(gaps, margins)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3)
    floors = [math.log1p(math.exp(m)) for m in margins]
    assert metrics["eval_floor"] == pytest.approx(sum(floors) / 3)
    assert metrics["eval_accuracy"] == pytest.approx(0.5)
    assert metrics["eval_margin"] == pytest.approx(1 / 3)
    assert metrics["reward_mean"] == pytest.approx(2.0 / 6)
