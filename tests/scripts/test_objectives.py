"""The objectives of train_rm.py: losses, what a constant model gets, probabilities."""

import itertools
import math

import pytest
import torch

import train_rm
from minalign.data.pairs import Example
from minalign.losses import (
    bradley_terry_loss,
    centering_penalty,
    expected_score,
    ordinal_pairwise_loss,
    ordinal_rating_loss,
)
from minalign.measuring.pairs import evaluate_pairs
from minalign.models.heads import by_place

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


RANKED = [  # of 4, 2 and 3 texts
    Example([[1], [2, 3], [4], [5]], (9.0, 7.0, 4.0, 2.0), 0.0),
    Example([[6], [7]], (5.0, 4.0), 0.0),
    Example([[8], [9], [10, 11, 12]], (8.0, 3.0, 1.0), 0.0),
]
SOFT = [one._replace(probability=p) for one, p in zip(EXAMPLES, (0.5, 0.75, 1.0))]
FLOORS = [  # what a constant model gets, by hand
    ({}, EXAMPLES, math.log(2)),
    ({}, SOFT, math.log(2)),
    ({"margin": 0.5}, EXAMPLES, sum(math.log1p(math.exp(0.5 * gap)) for gap in (3, 0, 8)) / 3),
    ({}, RANKED, (math.log(24) + math.log(2) + math.log(6)) / 3),
    ({"loss": "ordinal"}, EXAMPLES, math.log(2)),
    ({"loss": "ordinal"}, RANKED, math.log(2)),
    ({"loss": "ordinal", "ties": "strict", "num_scores": 5}, SOFT, -math.log(0.4)),
    ({"loss": "ordinal", "ties": "strict"}, RANKED, -math.log(0.45)),
]


@pytest.mark.parametrize("case, examples, floor", FLOORS, ids=str)
def test_the_floor_is_what_a_constant_model_gets(case, examples, floor):
    _, one = objective(case)
    table = Table({n: [0.5] * one.labels for n in range(13)}, ordinal=one.labels > 1)
    metrics = evaluate_pairs(one, table, examples)
    assert metrics["eval_floor"] == pytest.approx(floor, rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(floor, rel=1e-6)
    assert metrics["eval_accuracy"] == 0.5 and metrics["eval_margin"] == 0
    assert "eval_length_corr" not in metrics, "all rewards are equal"


@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("loss", ["bradley-terry", "ordinal"])
def test_lists_of_any_length_train_together_as_each_would_alone(loss, coef):
    """By hand: Plackett-Luce, or the mean over pairs; a list's penalties are those of a pair."""
    flag = {"center_coef": coef} if loss == "bradley-terry" else {"rating_coef": coef}
    config, one = objective({"loss": loss, **flag})
    logits = torch.randn(9, one.labels, requires_grad=True)
    got = train_rm.pair_losses(one, by_place(logits, RANKED), RANKED)
    got.sum().backward()
    assert (logits.grad != 0).any(1).all()
    expected = []
    for rows, example in zip(logits.detach().split([4, 2, 3]), RANKED):
        count = len(rows)
        if loss == "bradley-terry":
            r = rows[:, 0].double()
            order = sum((r[k:].logsumexp(0) - r[k]).item() for k in range(count))
            penalty = 4 * r.mean().item() ** 2
        else:
            pairs = list(itertools.combinations(rows.split(1), 2))
            order = sum(ordinal_pairwise_loss(*pair).item() for pair in pairs) / len(pairs)
            ratings = torch.tensor(example.ratings)
            penalty = 2 * ordinal_rating_loss(rows, ratings).mean().item()
        expected.append(order + coef * penalty)
    torch.testing.assert_close(got, torch.tensor(expected), check_dtype=False)
    for n, rows in enumerate(logits.detach().split([4, 2, 3])):
        alone = train_rm.pair_losses(one, by_place(rows, RANKED[n : n + 1]), RANKED[n : n + 1])
        torch.testing.assert_close(alone, got[n : n + 1].detach())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_soft_label_is_the_mixture_of_both_orders(case):
    _, one = objective(case)
    logits = torch.randn(2, 3, one.labels)
    swapped = [e._replace(gap=-e.gap) for e in EXAMPLES]
    orders = one.order_losses(logits, EXAMPLES), one.order_losses(logits.flip(0), swapped)
    p = torch.tensor([0.5, 0.75, 1.0])
    torch.testing.assert_close(
        one.order_losses(logits, SOFT), p * orders[0] + (1 - p) * orders[1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_winning_and_losing_are_certain_together(case):
    _, one = objective(case)
    logits = torch.randn(2, 3, one.labels)
    wins, losses = one.win_probabilities(*logits), one.win_probabilities(*logits.flip(0))
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

    def __init__(self, rows, ordinal=False):
        self.rows, self.ordinal = rows, ordinal

    def logits(self, texts):
        return torch.tensor([self.rows[text[0]] for text in texts])

    def read_out(self, logits):
        return expected_score(logits) if self.ordinal else logits[:, 0]


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


def test_each_list_counts_the_same_whatever_its_pairs():
    """By hand: a list of 3 with its last two exchanged (2 of 3 pairs), and a pair that is right."""
    _, one = objective({})
    lists = [Example([[1], [2], [3]], None, 0.0), Example([[4], [5]], None, 0.0)]
    table = Table({1: [2.0], 2: [-1.0], 3: [0.0], 4: [1.0], 5: [0.5]})
    metrics = evaluate_pairs(one, table, lists)
    assert metrics["eval_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["eval_margin"] == pytest.approx(((3 + 2 - 1) / 3 + 0.5) / 2)
    rewards = [2.0, -1.0, 0.0]
    order = sum(math.log(sum(math.exp(r) for r in rewards[k:])) - rewards[k] for k in range(3))
    assert metrics["eval_loss"] == pytest.approx((order + math.log1p(math.exp(-0.5))) / 2)


def test_lengths_are_measured_within_each_list():
    """Four pairs, by hand; a prompt of 100 tokens of one of them changes nothing."""
    _, one = objective({})
    shape = [(3, 2, 1.0, 0.0), (2, 4, 0.5, 0.0), (1, 3, 0.0, 2.0), (2, 2, 1.0, 0.0)]
    rewards = {10 * n + k: [row[2 + k]] for n, row in enumerate(shape) for k in (0, 1)}
    for prompt in (0, 100):
        pairs = [
            Example(
                [[10 * n + k] + [0] * (row[k] - 1 + prompt * (n == 2)) for k in (0, 1)], None, 0.0
            )
            for n, row in enumerate(shape)
        ]
        metrics = evaluate_pairs(one, Table(rewards), pairs)
        assert metrics["eval_longer_wins"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
        assert metrics["eval_accuracy_shorter"] == pytest.approx(1 / 2)
        gaps, lengths = [1, 0.5, -2, 1], [1, -2, -2, 0]
        products = [
            sum(a * b for a, b in zip(x, y))
            for x, y in ((gaps, lengths), (gaps, gaps), (lengths, lengths))
        ]
        assert metrics["eval_length_corr"] == pytest.approx(
            products[0] / math.sqrt(products[1] * products[2])
        )
    never = evaluate_pairs(one, Table(rewards), [pairs[0], pairs[3]])
    assert "eval_accuracy_shorter" not in never and never["eval_longer_wins"] == 0.75
    alike = evaluate_pairs(one, Table(rewards), [pairs[3]])
    assert "eval_length_corr" not in alike and alike["eval_longer_wins"] == 0.5


def test_calibration_and_accuracy_against_soft_labels():
    """A model that says each label's probability is calibrated; one half is half right for all."""
    _, one = objective({})
    soft = [0.5, 0.6, 0.75, 0.9]
    pairs = [Example([[2 * n], [2 * n + 1]], None, 0.0, p) for n, p in enumerate(soft)]
    table = Table(
        {2 * n: [math.log(p / (1 - p))] for n, p in enumerate(soft)}
        | {k: [0.0] for k in (1, 3, 5, 7)}
    )
    metrics = evaluate_pairs(one, table, pairs)
    assert metrics["eval_ece"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx((0.5 + 3) / 4)
    entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in soft) / 4
    assert metrics["eval_loss"] == pytest.approx(entropy)
    wrong = Table({2 * n: [-1.0] for n in range(4)} | {k: [0.0] for k in (1, 3, 5, 7)})
    metrics = evaluate_pairs(one, wrong, pairs)
    assert metrics["eval_accuracy"] == pytest.approx(0.5 / 4)
    says = 1 / (1 + math.exp(-1))  # that the second is better: true with .5, .4, .25, .1
    assert metrics["eval_ece"] == pytest.approx(says - (0.5 + 0.4 + 0.25 + 0.1) / 4)
