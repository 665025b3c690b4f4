"""The reward-model losses against plain loops over scores, closed forms and known floors."""

import itertools
import math
from functools import partial

import pytest
import torch

from minalign.losses import (
    bradley_terry_loss,
    centering_penalty,
    expected_score,
    ordinal_pairwise_loss,
    ordinal_rating_loss,
    plackett_luce_loss,
    risk_adjusted_score,
    score_variance,
)

close = partial(
    torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False, check_device=False
)
FLOAT_MAX = torch.finfo(torch.float32).max
TIE_WEIGHT = {"half": 0.5, "strict": 0.0}


def softmax(logits):
    """A row of logits as a list of Python floats (double precision), for the loops below."""
    return logits.double().softmax(0).tolist()


def one_hot(scores, num_scores=10, sharpness=100.0):
    """Logits that put all mass on the given scores (1..K)."""
    return sharpness * torch.nn.functional.one_hot(torch.tensor(scores) - 1, num_scores).float()


# --- Bradley-Terry


@pytest.mark.parametrize(
    "margin", [None, 0.76, torch.tensor(0.76), torch.tensor([0.0, 1.0, -2.0, 3.0])]
)
def test_bradley_terry_is_log1p_exp_of_minus_the_difference(device, margin):
    chosen, rejected = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 0.5, -3.0])
    margins = torch.as_tensor(0.0 if margin is None else margin).expand(4).tolist()
    rows = zip(chosen.tolist(), rejected.tolist(), margins)
    expected = [math.log1p(math.exp(-(c - r - m))) for c, r, m in rows]
    margin = margin.to(device) if isinstance(margin, torch.Tensor) else margin
    losses = bradley_terry_loss(chosen.to(device), rejected.to(device), margin)
    close(losses, torch.tensor(expected))


def test_bradley_terry_gradient_is_the_probability_of_the_wrong_order():
    chosen = torch.tensor([1.0, -2.0, 200.0, -200.0], requires_grad=True)
    rejected = torch.zeros(4, requires_grad=True)
    bradley_terry_loss(chosen, rejected, margin=0.5).sum().backward()
    wrong = torch.tensor([1 / (1 + math.exp(c - 0.5)) for c in chosen.tolist()])
    close(chosen.grad, -wrong)
    close(rejected.grad, wrong)


def test_bradley_terry_is_linear_in_the_worst_mistakes(device):
    """log(1 + exp(-x)) is infinite here. The last difference does not even fit into float32."""
    chosen = torch.tensor([-200.0, 200.0, -FLOAT_MAX, FLOAT_MAX, -FLOAT_MAX], device=device)
    rejected = torch.tensor([0.0, 0.0, 0.0, -FLOAT_MAX, FLOAT_MAX], device=device)
    losses = bradley_terry_loss(chosen, rejected).tolist()
    assert losses == pytest.approx([200.0, 0.0, FLOAT_MAX, 0.0, FLOAT_MAX])


def test_a_margin_raises_the_floor_of_a_constant_reward():
    """Losses of different margins cannot be compared with each other, only with their own floor."""
    constant = torch.zeros(1)
    assert bradley_terry_loss(constant, constant).item() == pytest.approx(0.6931, abs=1e-4)
    with_margin = bradley_terry_loss(constant, constant, margin=0.76)
    assert with_margin.item() == pytest.approx(1.144, abs=1e-3)


def test_a_soft_label_mixes_the_losses_of_both_orders(device):
    """Cross-entropy: its gradient is the model's probability less the label's."""
    difference = torch.tensor([1.0, -2.0, 0.5, 30.0, -30.0], device=device, requires_grad=True)
    p, margin = torch.tensor([0.7, 0.2, 0.5, 1.0, 0.0]), 0.25
    zero = torch.zeros(5, device=device)
    losses = bradley_terry_loss(difference, zero, margin, p)
    losses.sum().backward()
    for loss, grad, d, q in zip(losses, difference.grad, difference.tolist(), p.tolist()):
        d -= margin
        by_hand = q * math.log1p(math.exp(-d)) + (1 - q) * math.log1p(math.exp(d))
        assert loss.item() == pytest.approx(by_hand, rel=1e-6)
        assert grad.item() == pytest.approx(1 / (1 + math.exp(-d)) - q, abs=1e-6)
    for number in (0.3, 1.0, 0.0):
        swapped = bradley_terry_loss(-difference, zero, -margin, 1 - number)
        close(bradley_terry_loss(difference, zero, margin, number), swapped)
    # certain, and up to the largest numbers: the loss without it, bit for bit
    far = torch.tensor([FLOAT_MAX, -FLOAT_MAX, 3.0], device=device)
    assert torch.equal(bradley_terry_loss(far, -far, None, 1.0), bradley_terry_loss(far, -far))
    assert bradley_terry_loss(far, -far, None, 0.4).isfinite().all()


@pytest.mark.parametrize("p", [62, -0.1, float("nan"), torch.tensor([0.5, 1.5])])
def test_a_probability_is_none_beyond_0_and_1(p):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), probability=p)
    with pytest.raises(ValueError, match="one probability per pair"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), probability=torch.ones(3))


# --- Plackett-Luce


def ranking_probability(scores):
    """By drawing the best, then the best of the others, and so on, in double precision."""
    probability = 1.0
    for k in range(len(scores)):
        weights = [math.exp(score) for score in scores[k:]]
        probability *= weights[0] / sum(weights)
    return probability


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_probabilities_of_all_rankings_sum_to_1(count, device):
    scores = 2 * torch.randn(count)
    orders = list(itertools.permutations(range(count)))
    ranked = torch.stack([scores[list(order)] for order in orders], 1).to(device)  # (K, K!)
    losses = plackett_luce_loss(ranked)
    expected = [ranking_probability([scores[i].item() for i in order]) for order in orders]
    close(losses.neg().exp(), torch.tensor(expected))
    assert losses.double().neg().exp().sum().item() == pytest.approx(1, abs=1e-6)
    constant = plackett_luce_loss(torch.full((count, 1), 3.0, device=device))
    assert constant.item() == pytest.approx(math.log(math.factorial(count)))


def test_two_ranked_texts_are_a_pair_of_bradley_terry(device):
    scores = torch.tensor([[1.0, -300.0, FLOAT_MAX, 0.0, 40.0], [0.5, 200.0, -1.0, 0.0, -40.0]])
    one, other = (scores.to(device).requires_grad_() for _ in range(2))
    losses = plackett_luce_loss(one)
    assert torch.equal(losses, bradley_terry_loss(*other))
    losses.sum().backward()
    bradley_terry_loss(*other).sum().backward()
    assert torch.equal(one.grad, other.grad)


def test_the_gradient_of_a_ranking_is_that_of_the_closed_form():
    """d L / d r_j = sum over the draws that j is in of P(j is drawn), less 1 where it was."""
    scores = torch.randn(4, 3, requires_grad=True)
    plackett_luce_loss(scores).sum().backward()
    expected = torch.zeros(4, 3)
    for k in range(3):
        expected[k:] += scores.detach()[k:].softmax(0)
        expected[k] -= 1
    close(scores.grad, expected)


def test_beyond_a_shorter_ranking_anything_changes_nothing(device):
    scores = torch.randn(4, 3)
    mask = torch.arange(4)[:, None] < torch.tensor([4, 2, 3])
    expected = [plackett_luce_loss(scores[:n, b : b + 1]).item() for b, n in enumerate([4, 2, 3])]
    for filler in (0.0, 1e9, float("nan"), float("inf")):
        padded = scores.masked_fill(~mask, filler).to(device).requires_grad_()
        losses = plackett_luce_loss(padded, mask.to(device))
        losses.sum().backward()
        close(losses, torch.tensor(expected))
        assert (padded.grad.cpu()[~mask] == 0).all() and padded.grad.isfinite().all()
    half = plackett_luce_loss(scores.half(), mask)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_what_is_no_ranking_is_refused():
    one, gap = torch.tensor([[True], [False]]), torch.tensor([[True], [True], [False], [True]])
    for scores, mask in (
        (torch.zeros(1, 3), None),
        (torch.zeros(3), None),
        (torch.zeros(2, 1), one),
        (torch.zeros(4, 1), gap),
        (torch.zeros(4, 1), gap[:3]),
    ):
        with pytest.raises(ValueError, match="^got "):
            plackett_luce_loss(scores, mask)


def test_centering_penalty_pulls_the_sum_of_a_pair_to_zero(device):
    chosen = torch.tensor([2.0, 1.0, -3.0], device=device, requires_grad=True)
    rejected = torch.tensor([1.0, -1.0, 1.0], device=device, requires_grad=True)
    penalty = centering_penalty(chosen, rejected)
    penalty.sum().backward()
    assert penalty.tolist() == [9.0, 0.0, 4.0]
    assert chosen.grad.tolist() == rejected.grad.tolist() == [6.0, 0.0, -4.0]


# --- ordinal, pairs


@pytest.mark.parametrize("ties", ["half", "strict"])
@pytest.mark.parametrize("num_scores", [2, 3, 10])
def test_ordinal_loss_equals_a_double_loop_over_scores(device, num_scores, ties):
    chosen, rejected = 2 * torch.randn(2, 5, num_scores)
    expected = []
    for p, q in zip(map(softmax, chosen), map(softmax, rejected)):
        win = 0.0
        for i in range(num_scores):
            for j in range(num_scores):
                win += p[i] * q[j] * (1.0 if i > j else TIE_WEIGHT[ties] if i == j else 0.0)
        expected.append(-math.log(win))
    losses = ordinal_pairwise_loss(chosen.to(device), rejected.to(device), ties)
    close(losses, torch.tensor(expected))


def test_ties_count_half_unless_told_otherwise():
    chosen, rejected = torch.randn(2, 4, 5)
    half = ordinal_pairwise_loss(chosen, rejected, ties="half")
    assert torch.equal(ordinal_pairwise_loss(chosen, rejected), half)
    # one of the two wins
    close(half.neg().exp() + ordinal_pairwise_loss(rejected, chosen).neg().exp(), torch.ones(4))


@pytest.mark.parametrize("ties", ["half", "strict"])
def test_ordinal_loss_is_small_only_if_the_winner_scores_higher(ties):
    """With the mask inverted, winner 10 against loser 1 costs the most instead of nothing."""
    loss = ordinal_pairwise_loss(one_hot([10, 6, 5, 1]), one_hot([1, 5, 6, 10]), ties)
    close(loss[:2], torch.zeros(2))
    assert (loss[2:] > 90).all()


def test_floors_of_a_head_that_knows_nothing(device):
    """A strict loss above .7985, or a half-tie loss above .6931, is worse than a uniform head."""
    uniform = torch.zeros(1, 10, device=device)
    strict = ordinal_pairwise_loss(uniform, uniform, ties="strict")
    half = ordinal_pairwise_loss(uniform, uniform, ties="half")
    assert strict.item() == pytest.approx(0.7985, abs=1e-4)
    assert half.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("ties", ["half", "strict"])
@pytest.mark.parametrize("gap", [0.0, 70.0, 200.0])
def test_ordinal_gradient_is_exact_even_where_the_probability_underflows(device, gap, ties):
    """P is about 1 (random heads), 1e-30 and 1e-87 (not a float32).

    An epsilon inside the log would make the last two gradients zero.
    """
    sure_of_1, sure_of_5 = gap * torch.eye(5)[:1], gap * torch.eye(5)[-1:]
    chosen = (torch.randn(1, 5) + sure_of_1).to(device).requires_grad_()
    rejected = (torch.randn(1, 5) + sure_of_5).to(device).requires_grad_()
    loss = ordinal_pairwise_loss(chosen, rejected, ties)
    loss.sum().backward()

    p, q = softmax(chosen[0].detach()), softmax(rejected[0].detach())
    # P(the rejected one loses to score k) and P(the chosen one beats score k)
    beats = [sum(q[:k]) + TIE_WEIGHT[ties] * q[k] for k in range(5)]
    loses = [sum(p[k + 1 :]) + TIE_WEIGHT[ties] * p[k] for k in range(5)]
    win = sum(p[k] * beats[k] for k in range(5))
    chosen_grad = torch.tensor([-p[k] * (beats[k] - win) / win for k in range(5)])
    rejected_grad = torch.tensor([-q[k] * (loses[k] - win) / win for k in range(5)])
    close(loss, torch.tensor([-math.log(win)]))
    close(chosen.grad[0], chosen_grad, rtol=1e-4)
    close(rejected.grad[0], rejected_grad, rtol=1e-4)
    assert chosen.grad.abs().max() > 0.01


# --- ordinal, ratings


def test_rating_loss_equals_a_loop_and_splits_fractional_ratings(device):
    ratings = [1.0, 2.0, 5.0, 3.25, 4.9, 1.5]
    logits = 2 * torch.randn(len(ratings), 5)
    expected = []
    for p, rating in zip(map(softmax, logits), ratings):
        # One for each score 0..6. 6.25 would be score 6 with .75 and score 7 with .25.
        target = [0.0] * 7
        target[math.floor(rating)] += 1 - rating % 1
        target[math.floor(rating) + 1] += rating % 1
        expected.append(sum((sum(p[:k]) - sum(target[: k + 1])) ** 2 for k in range(1, 6)))
    losses = ordinal_rating_loss(logits.to(device), torch.tensor(ratings, device=device))
    close(losses, torch.tensor(expected))


def test_rating_loss_knows_that_seven_is_near_eight():
    loss = ordinal_rating_loss(one_hot([8, 7, 5, 1, 1]), torch.tensor([8, 8, 8, 8, 10]))
    # a sure head pays its distance from the rating
    close(loss, torch.tensor([0.0, 1.0, 3.0, 7.0, 9.0]))


def test_rating_loss_is_proper():
    """The truth minimises its own expected loss.

    sum_k truth(k) dL(z, k)/dz = 0 at softmax(z) = truth.
    """
    logits = torch.randn(1, 6, requires_grad=True)
    truth = logits.detach().softmax(1)[0]
    (truth * ordinal_rating_loss(logits.expand(6, 6), torch.arange(1, 7))).sum().backward()
    close(logits.grad, torch.zeros(1, 6))


# --- read-outs


def test_a_sure_head_reads_its_score_without_variance(device):
    """A mean of sigmoids over the ten logits, say, would never move."""
    logits = one_hot(list(range(1, 11))).to(device)
    close(expected_score(logits), torch.arange(1.0, 11.0))
    close(score_variance(logits), torch.zeros(10))


def test_read_outs_equal_loops_over_scores(device):
    logits = 2 * torch.randn(4, 5)
    mean = [sum(k * p for k, p in enumerate(softmax(z), start=1)) for z in logits]
    variance = [
        sum((k - m) ** 2 * p for k, p in enumerate(softmax(z), start=1))
        for z, m in zip(logits, mean)
    ]
    close(expected_score(logits.to(device)), torch.tensor(mean))
    close(score_variance(logits.to(device)), torch.tensor(variance))


def test_a_head_that_knows_nothing_reads_the_middle():
    uniform = torch.zeros(1, 10)
    assert expected_score(uniform).item() == pytest.approx(5.5)
    assert score_variance(uniform).item() == pytest.approx((10**2 - 1) / 12)


# --- what holds for all

REWARDS, RATINGS = torch.tensor([0.3, -1.2, 2.1]), torch.tensor([1.0, 2.5, 4.0])
SCORES = torch.linspace(-2, 3, 12).view(3, 4)
CALLS = [
    (bradley_terry_loss, (REWARDS, 2.3 * REWARDS, REWARDS.abs())),
    (centering_penalty, (REWARDS, 2.3 * REWARDS)),
    (ordinal_pairwise_loss, (SCORES, -1.7 * SCORES)),
    (ordinal_rating_loss, (SCORES, RATINGS)),
    (expected_score, (SCORES,)),
    (score_variance, (SCORES,)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("function, arguments", CALLS)
def test_any_dtype_is_computed_in_float32_and_inputs_stay_as_they_were(
    device, function, arguments, dtype
):
    """In bfloat16 arithmetic half of all scores near 5 would be ties."""
    arguments = [argument.to(device, dtype) for argument in arguments]
    before = [argument.clone() for argument in arguments]
    result = function(*arguments)
    assert result.dtype == torch.float32 and result.shape == (3,)
    assert torch.equal(result, function(*(argument.float() for argument in arguments)))
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before))


@pytest.mark.parametrize(
    "function, arguments, got",
    [
        # would broadcast against a margin
        (bradley_terry_loss, (torch.zeros(3, 1), torch.zeros(3, 1)), r"\(3, 1\)"),
        (bradley_terry_loss, (torch.zeros(3), torch.zeros(1)), r"\(3,\) .* \(1,\)"),
        (bradley_terry_loss, (torch.zeros(3), torch.zeros(3), torch.zeros(2)), r"\(2,\)"),
        (centering_penalty, (torch.zeros(3), torch.zeros(2)), r"\(3,\) .* \(2,\)"),
        (centering_penalty, (torch.zeros(3, 1), torch.zeros(3, 1)), r"\(3, 1\)"),
        (ordinal_pairwise_loss, (torch.zeros(3), torch.zeros(3)), r"\(3,\)"),
        (ordinal_pairwise_loss, (torch.zeros(3, 4), torch.zeros(3, 5)), r"\(3, 4\) .* \(3, 5\)"),
        # K = 1 orders nothing
        (ordinal_pairwise_loss, (torch.zeros(3, 1), torch.zeros(3, 1)), r"\(3, 1\)"),
        (ordinal_pairwise_loss, (torch.zeros(3, 4), torch.zeros(3, 4), "drop"), "'drop'"),
        (ordinal_rating_loss, (torch.zeros(4), torch.zeros(4)), r"\(4,\)"),
        (ordinal_rating_loss, (torch.zeros(3, 4), torch.ones(3, 1)), r"\(3, 1\)"),
        # scores start at 1
        (ordinal_rating_loss, (torch.zeros(2, 4), torch.tensor([0.5, 4.0])), "0.5 to 4"),
        (ordinal_rating_loss, (torch.zeros(2, 4), torch.tensor([1.0, 4.5])), "1 to 4.5"),
        (ordinal_rating_loss, (torch.zeros(2, 4), torch.tensor([1.0, math.nan])), "nan"),
        (expected_score, (torch.zeros(3),), r"\(3,\)"),
        (score_variance, (torch.zeros(3),), r"\(3,\)"),
    ],
)
def test_errors_say_what_was_got_and_expected(function, arguments, got):
    with pytest.raises(ValueError, match=f"got .*{got}.*expected"):
        function(*arguments)


# --- risk


def exact_risk(logits, tau):
    """In double precision, with the lowest exponent taken out."""
    p = softmax(logits)
    inner = sum(q * math.expm1(-k / tau) for k, q in enumerate(p)) / sum(p)
    return 1 - tau * math.log1p(inner)


@pytest.mark.parametrize("num_scores", [2, 10, 200])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 9.99, 10.0, 1e3, 1e6])
def test_risk_is_the_certainty_equivalent(device, tau, num_scores):
    logits = 2 * torch.randn(6, num_scores)
    got = risk_adjusted_score(logits.to(device), tau)
    close(got, torch.tensor([exact_risk(row, tau) for row in logits]))
    assert got.dtype == torch.float32


def test_risk_goes_from_the_lowest_score_to_the_mean(device):
    logits = (3 * torch.randn(8, 10)).to(device)
    mean, variance = expected_score(logits), score_variance(logits)
    assert torch.equal(risk_adjusted_score(logits, math.inf), mean)
    for tau in (1e12, 1e30, 1e300):
        close(risk_adjusted_score(logits, tau), mean)
    close(risk_adjusted_score(logits, 1e3), mean - variance / 2e3, atol=2e-6)
    for tau in (1e-9, 1e-45, 5e-324):
        close(risk_adjusted_score(logits, tau), torch.ones(8))
    taus = [1e-3, 1e-2, 0.1, 1, 3, 9.9, 10.1, 30, 1e3, 1e6]
    ladder = torch.stack([risk_adjusted_score(logits, tau) for tau in taus])
    assert (
        (ladder.diff(dim=0) > -1e-5).all() and (ladder >= 1).all() and (ladder <= mean + 1e-5).all()
    )


def test_risk_by_hand():
    """p = .9 at 8 and .1 at 2: the mean is 7.4, and at tau .1 nearly the lower one is left."""
    logits = torch.full((1, 10), -1e4)
    logits[0, 7], logits[0, 1] = math.log(0.9), math.log(0.1)
    assert expected_score(logits).item() == pytest.approx(7.4, abs=1e-5)
    assert risk_adjusted_score(logits, 0.1).item() == pytest.approx(2.2303, abs=1e-4)
    certain = one_hot([4], sharpness=1e4)
    for tau in (1e-3, 1.0, 1e6):
        assert risk_adjusted_score(certain, tau).item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), -math.inf])
def test_no_risk_but_above_0(tau):
    with pytest.raises(ValueError, match="expected a number above 0"):
        risk_adjusted_score(torch.zeros(1, 3), tau)


@pytest.mark.parametrize("tau", [0.5, 20.0])
def test_the_gradient_of_risk_is_that_of_finite_differences(tau):
    logits = torch.randn(1, 10, requires_grad=True)
    risk_adjusted_score(logits, tau).backward()
    for k in range(10):
        step = torch.zeros(1, 10, dtype=torch.double)
        step[0, k] = 1e-5
        up, down = (exact_risk((logits.detach() + s * step)[0], tau) for s in (1, -1))
        assert logits.grad[0, k].item() == pytest.approx((up - down) / 2e-5, abs=2e-4)
