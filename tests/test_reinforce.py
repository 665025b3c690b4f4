"""REINFORCE by exact enumeration: where every completion can be listed, expectations are sums.

The policy is a table of logits, one row per prefix, over the words 0, 1 and the end token 2. The
estimators see what a training step sees: tokens, log-probs, mask, rewards. The truth is autograd
of E[r] - beta KL, in double precision.
"""

import math
from functools import partial

import pytest
import torch

from minalign.logprobs import completion_mask, kl_k1, kl_k2, kl_k3, token_logprobs
from minalign.reinforce import (
    MovingAverageBaseline,
    PromptBaseline,
    ShrinkageBaseline,
    adapted_beta,
    importance_weights,
    kl_penalized_rewards,
    leave_one_out_advantages,
    reinforce_loss,
    standardized_advantages,
    uncertainty_weights,
)

close = partial(
    torch.testing.assert_close, rtol=1e-4, atol=1e-5, check_dtype=False, check_device=False
)
INF, NAN = math.inf, math.nan

# --- a world that can be enumerated

VOCABULARY, END, MAX_TOKENS, TEMPERATURE, BETA = 3, 2, 3, 0.7, 0.5


def complete(prefix=()):
    """Every completion of a prefix: it stops at the end token or at MAX_TOKENS."""
    if len(prefix) == MAX_TOKENS or END in prefix:
        return [prefix]
    return [completion for token in range(VOCABULARY) for completion in complete(prefix + (token,))]


COMPLETIONS = complete()  # 15, of lengths 1, 2 and 3
PREFIXES = sorted({c[:t] for c in COMPLETIONS for t in range(len(c))})  # 7

random = torch.Generator().manual_seed(0)
THETA = torch.randn(len(PREFIXES), VOCABULARY, generator=random)
ANCHOR = torch.randn(len(PREFIXES), VOCABULARY, generator=random)
# an offset, or no baseline would matter
REWARDS = 2 + torch.randn(len(COMPLETIONS), generator=random)

TOKENS = torch.tensor([c + (END,) * (MAX_TOKENS - len(c)) for c in COMPLETIONS])  # pad == eos
ROWS = torch.tensor(
    [[PREFIXES.index(c[:t]) if t < len(c) else 0 for t in range(MAX_TOKENS)] for c in COMPLETIONS]
)
MASK = completion_mask(TOKENS, END)
NUMBERS = torch.arange(len(COMPLETIONS))
PAIRS = torch.cartesian_prod(NUMBERS, NUMBERS)  # (225, 2)


def completion_logprobs(theta):
    """log pi(y) of every completion, token by token in double precision."""
    table = (theta.double() / TEMPERATURE).log_softmax(1)
    return torch.stack(
        [sum(table[PREFIXES.index(c[:t]), c[t]] for t in range(len(c))) for c in COMPLETIONS]
    )


def true_gradient(beta=BETA, rewards=REWARDS):
    """Autograd of E[r] - beta KL(policy || anchor).

    It is sum_y pi(y) [r(y) - beta log(pi(y) / anchor(y))].
    """
    theta = THETA.double().requires_grad_()
    logprobs, anchor_logprobs = completion_logprobs(theta), completion_logprobs(ANCHOR)
    objective = (logprobs.exp() * (rewards - beta * (logprobs - anchor_logprobs))).sum()
    return torch.autograd.grad(objective, theta)[0]


def expected_gradient(advantages_of, shaped=None, loss=reinforce_loss):
    """E[-gradient of the mean loss] of a batch of two samples.

    The expectation is over all 225 batches that the policy can draw.
    """
    theta = THETA.clone().requires_grad_()
    logprobs = token_logprobs(theta[ROWS], TOKENS, TEMPERATURE)
    anchor_logprobs = token_logprobs(ANCHOR[ROWS], TOKENS, TEMPERATURE)
    if shaped is None:
        shaped = kl_penalized_rewards(REWARDS, logprobs, anchor_logprobs, MASK, BETA)
    batches = PAIRS.flatten()
    advantages = torch.cat([advantages_of(shaped[pair]) for pair in PAIRS])
    losses = loss(logprobs[batches], MASK[batches], advantages).view(-1, 2).mean(1)
    probability = completion_logprobs(THETA).exp()[PAIRS].prod(1)  # of drawing the two
    return -torch.autograd.grad((probability * losses).sum(), theta)[0]


def log_ratios():
    """(15, 3) log pi - log anchor of each token, 0 at the pads."""
    policy, anchor = (token_logprobs(theta[ROWS], TOKENS, TEMPERATURE) for theta in (THETA, ANCHOR))
    return (policy - anchor).masked_fill(~MASK, 0.0)


def relative_error(gradient):
    return ((gradient - true_gradient()).norm() / true_gradient().norm()).item()


def moving_average(rewards, decay=None, history=((4.0, 0.0), (2.0,))):
    """Advantages of one batch after the batches in `history`."""
    baseline = MovingAverageBaseline(decay)
    for earlier in history:
        baseline.advantages(torch.tensor(earlier))
    return baseline.advantages(rewards)


def plain(rewards):
    """No baseline."""
    return rewards


# --- the gradient is exact


def test_the_enumeration_is_complete():
    assert len(COMPLETIONS) == 15 and MASK.sum(1).unique().tolist() == [1, 2, 3]
    close(completion_logprobs(THETA).exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "advantages_of",
    [
        pytest.param(plain, id="none"),
        pytest.param(moving_average, id="moving"),
        pytest.param(partial(moving_average, decay=0.9), id="ema"),
        pytest.param(partial(moving_average, history=()), id="moving, first batch"),
        pytest.param(partial(moving_average, history=(), decay=0.9), id="ema, first batch"),
        pytest.param(partial(leave_one_out_advantages, group_size=2), id="rloo"),
    ],
)
def test_expected_gradient_is_that_of_reward_minus_beta_kl(advantages_of):
    """With any baseline, variable lengths, a tempered policy and KL in the reward.

    Not a percent of it is lost.
    """
    close(expected_gradient(advantages_of), true_gradient())


@pytest.mark.parametrize("limit, exact", [(INF, True), (2.0, False)])
def test_samples_of_another_policy_count_by_their_ratio(limit, exact):
    """Drawn by the anchor and weighted to the policy: the same expected gradient.

    It is another as soon as ratios are cut.
    """
    theta = THETA.clone().requires_grad_()
    logprobs, drawn_by = (token_logprobs(x[ROWS], TOKENS, TEMPERATURE) for x in (theta, ANCHOR))
    garbage = logprobs.masked_fill(~MASK, NAN)
    weights = importance_weights(garbage, drawn_by, MASK, limit)
    ratios = (completion_logprobs(THETA) - completion_logprobs(ANCHOR)).exp()
    close(weights, ratios.clamp(max=limit))
    assert ratios.max() > 2 and not weights.requires_grad
    shaped = kl_penalized_rewards(REWARDS, logprobs, drawn_by, MASK, BETA)
    losses = completion_logprobs(ANCHOR).exp() * reinforce_loss(logprobs, MASK, weights * shaped)
    error = relative_error(-torch.autograd.grad(losses.sum(), theta)[0])
    assert error < 1e-5 if exact else error > 0.05


# --- the classic mistakes are not


def test_a_baseline_that_holds_the_sample_shrinks_the_gradient():
    """By 1 - 1/N of all N that it holds, so that the step size depends on batch and history."""

    def updated_too_early(rewards):
        return rewards - (4.0 + 0.0 + 2.0 + rewards.sum()) / 5

    including_itself = expected_gradient(lambda rewards: rewards - rewards.mean())
    close(including_itself, (1 - 1 / 2) * true_gradient())
    close(expected_gradient(updated_too_early), (1 - 1 / 5) * true_gradient())


def test_k1_as_a_loss_regularises_nothing():
    """Its expected gradient is E[grad log pi] = 0, whatever the anchor, which has no gradient."""
    gradient = expected_gradient(plain, loss=lambda logprobs, mask, _: (logprobs * mask).sum(1))
    close(gradient, torch.zeros_like(THETA))


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
def test_k2_and_k3_do_not_belong_in_the_reward(estimator):
    penalty = estimator(log_ratios(), torch.zeros(MASK.shape)).sum(1)
    assert relative_error(expected_gradient(plain, shaped=REWARDS - BETA * penalty)) > 0.1


def test_a_token_pays_for_the_kl_of_all_that_it_leads_to():
    """Token by token, k1 needs its future sum (reward-to-go). A token's own k1 is not enough."""

    def error(k1_of_token):  # (15, 3)
        advantages = (REWARDS[:, None] - BETA * k1_of_token)[PAIRS.flatten()]

        def loss(logprobs, mask, _):
            return -(advantages * logprobs * mask).sum(1)

        return relative_error(expected_gradient(plain, loss=loss))

    k1 = log_ratios()
    assert error(k1.flip(1).cumsum(1).flip(1)) < 1e-4
    assert error(k1) > 0.1


def divided_by_length(logprobs, mask, advantages):
    """Favours short good and long bad completions."""
    return reinforce_loss(logprobs, mask, advantages) / mask.sum(1)


def with_pads(logprobs, mask, advantages):
    """As if what stands after the end had been chosen."""
    return reinforce_loss(logprobs, torch.ones_like(mask), advantages)


def with_gradient_through_the_kl(logprobs, mask, advantages):
    """Pushes every sample down."""
    sums = (logprobs * mask).sum(1)
    return -(advantages - BETA * (sums - sums.detach())) * sums


@pytest.mark.parametrize("loss", [divided_by_length, with_pads, with_gradient_through_the_kl])
def test_classic_mistakes_have_another_gradient(loss):
    assert relative_error(expected_gradient(plain, loss=loss)) > 0.1


@pytest.mark.parametrize("kind", ["inverse_std", "inverse_variance", "one_plus_std"])
def test_uncertainty_weights_change_the_objective(kind):
    """The gradient becomes that of E[w(y) (r(y) - b)], and b matters."""
    weights = uncertainty_weights(torch.linspace(0.1, 3, len(COMPLETIONS)), kind)

    def gradient(b):
        def loss(logprobs, mask, advantages):
            return reinforce_loss(logprobs, mask, weights[PAIRS.flatten()] * advantages)

        return expected_gradient(plain, shaped=REWARDS - b, loss=loss)

    for b in (0.0, 2.0):
        close(gradient(b), true_gradient(beta=0, rewards=weights * (REWARDS - b)))
    assert (gradient(0.0) - gradient(2.0)).norm() > 0.1 * gradient(0.0).norm()


# --- moving average baseline


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_value_from_before_the_batch_is_subtracted(device, decay):
    """With the batch in its own baseline the gradient would be too small."""
    baseline = MovingAverageBaseline(decay)
    assert baseline.value == 0.0
    baseline.advantages(torch.tensor([1.0, 3.0], device=device))
    assert isinstance(baseline.value, float) and baseline.value == pytest.approx(2.0)
    advantages = baseline.advantages(torch.tensor([5.0, 2.0, 12.0], device=device))
    close(advantages, torch.tensor([3.0, 0.0, 10.0]))
    assert baseline.value != pytest.approx(2.0)


def test_the_first_batch_has_only_the_others_to_compare_with(device):
    """A lone first sample has nobody: its reward is its advantage."""
    rewards = torch.tensor([3.0, 1.0, 2.0, 10.0], device=device)
    others = torch.tensor([13 / 3, 15 / 3, 14 / 3, 6 / 3])
    close(MovingAverageBaseline().advantages(rewards), rewards.cpu() - others)
    close(MovingAverageBaseline(0.9).advantages(rewards), rewards.cpu() - others)
    assert MovingAverageBaseline().advantages(rewards[:1]).tolist() == [3.0]


def test_cumulative_mean_counts_samples_not_batches():
    baseline, seen = MovingAverageBaseline(), []
    for size in (3, 1, 5, 2):
        rewards = torch.randn(size)
        baseline.advantages(rewards)
        seen += rewards.tolist()
        assert baseline.value == pytest.approx(sum(seen) / len(seen), abs=1e-6)


def test_exponential_average_is_free_of_the_zero_that_it_started_from():
    """sum_j (1 - d) d^(n-j) mean_j / (1 - d^n).

    A constant reward is its own average from the first batch on.
    """
    d, batches = 0.9, [torch.randn(4) for _ in range(5)]
    means = [batch.mean().item() for batch in batches]
    baseline, constant = MovingAverageBaseline(d), MovingAverageBaseline(d)
    for n in range(1, 6):
        baseline.advantages(batches[n - 1])
        weighted = sum((1 - d) * d ** (n - j) * means[j - 1] for j in range(1, n + 1))
        assert baseline.value == pytest.approx(weighted / (1 - d**n), abs=1e-6)
        constant.advantages(torch.tensor([7.0, 7.0]))
        assert constant.value == pytest.approx(7.0)


@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
def test_a_restored_baseline_resumes_exactly_where_it_was(decay):
    """A resumed run is the same run."""
    baseline, restored = MovingAverageBaseline(decay), MovingAverageBaseline(decay)
    baseline.advantages(torch.randn(3))
    state = baseline.state_dict()
    restored.load_state_dict(state)
    for rewards in torch.randn(3, 4):
        assert torch.equal(restored.advantages(rewards), baseline.advantages(rewards))
        assert restored.value == baseline.value
    again = MovingAverageBaseline(decay)
    again.load_state_dict(state)  # the saved state has not moved on with its owner
    assert again.value != restored.value


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_is_refused_and_leaves_no_trace(bad):
    """It would stay in the mean for ever."""
    baseline = MovingAverageBaseline()
    baseline.advantages(torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="got .*not finite.*expected"):
        baseline.advantages(torch.tensor([1.0, bad]))
    assert baseline.value == 2.0


# --- leave-one-out


def test_leave_one_out_subtracts_the_mean_of_the_others(device):
    """With the sample in its own mean the advantages would be [1, -1, 0]."""
    rewards = torch.tensor([3.0, 1.0, 2.0], device=device)
    for offset in (0.0, 1e7):  # an offset takes no digits
        assert leave_one_out_advantages(rewards + offset, 3).tolist() == [1.5, -1.5, 0.0]


def test_samples_of_a_prompt_lie_next_to_each_other():
    """The layout is that of repeat_interleave, never of repeat."""
    rewards = torch.tensor([0.0, 2.0, 10.0, 30.0])
    assert leave_one_out_advantages(rewards, 2).tolist() == [-2.0, 2.0, -20.0, 20.0]


def test_leave_one_out_equals_a_loop_over_groups(device):
    rewards = torch.randn(4, 5)
    expected = [r - (sum(group) - r) / 4 for group in rewards.tolist() for r in group]
    close(leave_one_out_advantages(rewards.flatten().to(device), 5), torch.tensor(expected))


# --- the shaped reward


def test_shaped_reward_pays_beta_for_each_nat_of_the_whole_completion(device):
    """What is likelier under the policy than under the anchor costs.

    The log-ratio is summed over tokens, not averaged. It is signed and not clamped.
    """
    rewards = torch.tensor([10.0, 10.0], device=device)
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -21.0, -3.0]], device=device)
    ref_logprobs = torch.tensor([[-2.0, -4.0, -9.0], [-21.0, -1.0, -4.0]], device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    shaped = kl_penalized_rewards(rewards, logprobs, ref_logprobs, mask, beta=0.5)
    close(shaped, torch.tensor([10.0 - 0.5 * (1 + 2), 10.0 - 0.5 * 20]))  # 20 nats are 20 nats
    unchanged = kl_penalized_rewards(rewards, logprobs, ref_logprobs, mask, beta=0.0)
    assert unchanged.tolist() == [10.0, 10.0]


def test_k1_in_the_shaped_reward_is_kl_k1():
    logprobs, ref_logprobs, mask = torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 4) > 0.3
    shaped = kl_penalized_rewards(torch.zeros(2), logprobs, ref_logprobs, mask, beta=1.0)
    close(shaped, -(kl_k1(logprobs, ref_logprobs) * mask).sum(1))


def test_nothing_flows_through_a_shaped_reward_or_an_advantage():
    """A gradient through either would push every sample down."""
    rewards, logprobs, ref_logprobs = torch.randn(4), torch.randn(4, 3), torch.randn(4, 3)
    for tensor in (rewards, logprobs, ref_logprobs):
        tensor.requires_grad_()
    first, later = MovingAverageBaseline(), MovingAverageBaseline()
    later.advantages(torch.zeros(1))
    kinds = ("none", "inverse_std", "inverse_variance", "one_plus_std")
    for result in [
        kl_penalized_rewards(rewards, logprobs, ref_logprobs, torch.ones(4, 3), beta=0.1),
        leave_one_out_advantages(rewards, 2),
        first.advantages(rewards),
        MovingAverageBaseline().advantages(rewards[:1]),
        later.advantages(rewards),
        *(uncertainty_weights(rewards.square(), kind) for kind in kinds),
    ]:
        assert not result.requires_grad


# --- the loss


def test_loss_is_minus_the_advantage_times_the_sum_of_the_logprobs(device):
    """Its gradient is -A for every token of the completion, whatever the length.

    Nothing else has a gradient.
    """
    rows = [[-2.0, -1.0, -4.0], [-0.5, -7.0, -7.0]]
    logprobs = torch.tensor(rows, device=device, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device)
    advantages = torch.tensor([3.0, -1.0], device=device, requires_grad=True)
    loss = reinforce_loss(logprobs, mask, advantages)
    assert loss.tolist() == [21.0, -0.5]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-3.0, -3.0, -3.0], [1.0, 0.0, 0.0]]
    assert advantages.grad is None


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 99.0])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
def test_positions_outside_the_mask_change_nothing(device, garbage, mask_dtype):
    """Multiplying by the mask would not do: 0 * NaN is NaN."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=mask_dtype, device=device)
    clean = torch.randn(2, 4, device=device).masked_fill(~mask.bool(), 0.0)
    dirty = clean.masked_fill(~mask.bool(), garbage).requires_grad_()
    rewards, ref_logprobs = torch.randn(2, device=device), torch.randn(2, 4, device=device)
    dirty_ref = ref_logprobs.masked_fill(~mask.bool(), garbage)
    shaped = kl_penalized_rewards(rewards, dirty, dirty_ref, mask, beta=0.3)
    close(shaped, kl_penalized_rewards(rewards, clean, ref_logprobs, mask, beta=0.3))
    loss = reinforce_loss(dirty, mask, shaped)
    close(loss, reinforce_loss(clean, mask, shaped))
    loss.sum().backward()
    close(dirty.grad, -shaped.cpu()[:, None] * mask.cpu())


def test_a_completion_that_is_all_masked_has_no_loss_and_no_gradient(device):
    """Dividing by its length would be 0/0."""
    logprobs = torch.full((2, 3), NAN, device=device, requires_grad=True)
    loss = reinforce_loss(logprobs, torch.zeros(2, 3, device=device), torch.ones(2, device=device))
    loss.sum().backward()
    assert loss.abs().tolist() == [0.0, 0.0]
    assert logprobs.grad.abs().sum() == 0.0


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 15])
def test_micro_batches_leave_the_gradient_as_it_is(micro_batch_size):
    """Completions of unequal length, each divided by the whole batch's size."""
    theta = THETA.clone().requires_grad_()
    for part in torch.arange(len(COMPLETIONS)).split(micro_batch_size):
        logprobs = token_logprobs(theta[ROWS[part]], TOKENS[part], TEMPERATURE)
        (reinforce_loss(logprobs, MASK[part], REWARDS[part]).sum() / len(COMPLETIONS)).backward()
    reference = THETA.double().requires_grad_()
    (-(REWARDS * completion_logprobs(reference)).mean()).backward()
    close(theta.grad, reference.grad)


# --- uncertainty weights


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("none", [1.0, 1.0, 1.0]),
        ("inverse_std", [1.0, 0.5, 1e3]),
        ("inverse_variance", [1.0, 0.25, 1e6]),
        ("one_plus_std", [0.5, 1 / 3, 1.0]),
    ],
)
def test_uncertainty_weights_of_variance_one_four_and_zero(device, kind, expected):
    """A saturated head has variance 0: its weight is large, not infinite."""
    variance = torch.tensor([1.0, 4.0, 0.0], device=device)
    close(uncertainty_weights(variance, kind), torch.tensor(expected))


# --- what holds for all

LOGPROBS, ONES = torch.linspace(-3, -0.1, 12).view(4, 3), torch.ones(4, 3, dtype=torch.bool)
CALLS = [
    (lambda rewards: moving_average(rewards, history=()), (REWARDS[:4],)),
    (lambda rewards: moving_average(rewards, history=()), (REWARDS[:1],)),
    (lambda rewards: moving_average(rewards, decay=0.5), (REWARDS[:4],)),
    (partial(leave_one_out_advantages, group_size=2), (REWARDS[:4],)),
    (partial(kl_penalized_rewards, beta=0.3), (REWARDS[:4], LOGPROBS, 2.3 * LOGPROBS, ONES)),
    (importance_weights, (LOGPROBS, 1.1 * LOGPROBS, ONES)),
    (partial(uncertainty_weights, kind="inverse_variance"), (REWARDS[:4].square(),)),
    (partial(uncertainty_weights, kind="none"), (REWARDS[:4].square(),)),
    (partial(uncertainty_weights, kind="one_plus_std"), (REWARDS[:4].square(),)),
    (reinforce_loss, (LOGPROBS, ONES, REWARDS[:4])),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("function, arguments", CALLS)
def test_any_dtype_is_computed_in_float32_and_inputs_stay_as_they_were(
    device, function, arguments, dtype
):
    arguments = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in arguments]
    before = [argument.clone() for argument in arguments]
    result = function(*arguments)
    assert result.dtype == torch.float32 and result.shape == arguments[0].shape[:1]
    in_float32 = [x.float() if x.is_floating_point() else x for x in arguments]
    assert torch.equal(result, function(*in_float32))
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before))
    assert all(result.data_ptr() != argument.data_ptr() for argument in arguments)


STATE_OF_ANOTHER, FIRST = MovingAverageBaseline().state_dict(), LOGPROBS[:, 0]


@pytest.mark.parametrize(
    "function, arguments, got",
    [
        (MovingAverageBaseline, (1.0,), "decay=1.0"),  # would never move
        (MovingAverageBaseline, (-0.1,), "decay=-0.1"),
        (MovingAverageBaseline, (NAN,), "decay=nan"),
        (MovingAverageBaseline(0.9).load_state_dict, (STATE_OF_ANOTHER,), "decay=None"),
        (MovingAverageBaseline().advantages, (torch.zeros(2, 1),), r"\(2, 1\)"),
        (MovingAverageBaseline().advantages, (torch.zeros(0),), r"\(0,\)"),
        (leave_one_out_advantages, (torch.zeros(4), 1), "group_size=1"),  # alone: 0 for ever
        (leave_one_out_advantages, (torch.zeros(4), 3), r"\(4,\)"),
        (leave_one_out_advantages, (torch.zeros(2, 2), 2), r"\(2, 2\)"),
        (kl_penalized_rewards, (torch.zeros(3), LOGPROBS, LOGPROBS, ONES, 0.1), r"\(3,\)"),
        (kl_penalized_rewards, (torch.zeros(4), LOGPROBS, LOGPROBS[:, :2], ONES, 0.1), r"\(4, 2\)"),
        (kl_penalized_rewards, (torch.zeros(4), LOGPROBS, LOGPROBS, ONES[:, :1], 0.1), r"\(4, 1\)"),
        (kl_penalized_rewards, (torch.zeros(4), FIRST, FIRST, ONES[:, 0], 0.1), r"\(4,\)"),
        (kl_penalized_rewards, (torch.zeros(4), LOGPROBS, LOGPROBS, ONES, -0.1), "beta=-0.1"),
        (kl_penalized_rewards, (torch.zeros(4), LOGPROBS, LOGPROBS, ONES, NAN), "beta=nan"),
        (importance_weights, (LOGPROBS, LOGPROBS[:, :2], ONES), r"\(4, 2\)"),
        (importance_weights, (LOGPROBS, LOGPROBS, ONES[:1]), r"\(1, 3\)"),
        (importance_weights, (LOGPROBS[0], LOGPROBS[0], ONES[0]), r"\(3,\)"),
        (uncertainty_weights, (torch.ones(2), "variance"), "'variance'"),
        (uncertainty_weights, (torch.tensor([1.0, -0.5]), "none"), "-0.5"),
        (uncertainty_weights, (torch.tensor([1.0, NAN]), "inverse_std"), "nan"),
        (reinforce_loss, (LOGPROBS[0], ONES[0], torch.zeros(3)), r"\(3,\)"),
        (reinforce_loss, (LOGPROBS, ONES[:, :1], torch.zeros(4)), r"\(4, 1\)"),
        # would broadcast to (4, 4)
        (reinforce_loss, (LOGPROBS, ONES, torch.zeros(4, 1)), r"\(4, 1\)"),
    ],
)
def test_errors_say_what_was_got_and_expected(function, arguments, got):
    with pytest.raises(ValueError, match=f"got .*{got}.*expected"):
        function(*arguments)


# --- baselines over several prompts, in a world of two prompts and three answers

ANSWERS = torch.tensor([[0.2, -0.4, 0.9], [-1.1, 0.3, 0.5]])  # logits
WORTH = torch.tensor([[3.0, 1.0, -2.0], [10.0, 8.0, 12.5]])  # rewards
DRAWS = torch.cartesian_prod(*[torch.arange(3)] * 4)  # two answers to each prompt: 81 batches
ASKED = torch.tensor([0, 0, 1, 1])


def expected_bandit_gradient(advantages_of, rewards=WORTH):
    """E[-gradient of the mean loss] over all batches; `advantages_of` has its past already."""
    logits = ANSWERS.double().requires_grad_()
    logprobs = logits.log_softmax(1)[ASKED, DRAWS]  # (81, 4)
    batches = rewards[ASKED, DRAWS]
    advantages = torch.stack([advantages_of()(batch) for batch in batches]).double()
    objective = (logprobs.detach().sum(1).exp() * (advantages * logprobs).mean(1)).sum()
    return torch.autograd.grad(objective, logits)[0]


def true_bandit_gradient(rewards=WORTH):
    logits = ANSWERS.double().requires_grad_()
    return torch.autograd.grad((logits.softmax(1) * rewards).sum() / 2, logits)[0]


PAST = [torch.tensor([1.0, 3.0, 7.0, 12.0]), torch.tensor([2.0, 2.5, 9.0, 8.0])]


def shrunk():
    baseline = ShrinkageBaseline(2, 0.5)
    for batch in PAST:
        baseline.advantages(batch)
    assert 0.01 < baseline.value < 0.99
    return baseline.advantages


def by_prompt():
    baseline = PromptBaseline(0.5)
    for batch in PAST:
        baseline.advantages(batch, ["x", "x", "x", "y"])
    return lambda rewards: baseline.advantages(rewards, ["x", "x", "z", "z"])


@pytest.mark.parametrize(
    "advantages_of", [shrunk, by_prompt, lambda: ShrinkageBaseline(2).advantages]
)
def test_expected_gradient_over_prompts_is_that_of_the_reward(advantages_of):
    close(expected_bandit_gradient(advantages_of), true_bandit_gradient(), rtol=1e-6, atol=1e-6)


def test_shrinkage_that_knows_this_batch_is_biased():
    """Variances of the batch itself hold the sample."""

    def advantages_of():
        def of_this_batch(rewards):
            shrunk = ShrinkageBaseline(2, 0.0)
            shrunk.advantages(rewards)
            return shrunk.advantages(rewards)

        return of_this_batch

    assert (expected_bandit_gradient(advantages_of) - true_bandit_gradient()).abs().max() > 0.02


def test_a_prompts_own_mean_leans_on_all_by_its_count():
    """By hand: decay .5; g is the exponential mean of batch means, b = (S + g) / (W + 1)."""
    baseline = PromptBaseline(0.5)
    close(baseline.advantages(torch.tensor([4.0, 0.0]), ["a", "b"]), torch.tensor([4.0, -4.0]))
    # g = 2; a: (4 + 2) / 2 = 3; c is new: 2
    close(baseline.advantages(torch.tensor([5.0, 5.0]), ["a", "c"]), torch.tensor([2.0, 3.0]))
    # g = (.5 * 1 + .5 * 5) / .75 = 4; a: (.5 * 4 + 5 + 4) / (1.5 + 1) = 4.4
    close(baseline.advantages(torch.tensor([0.0]), ["a"]), torch.tensor([-4.4]))
    with pytest.raises(ValueError, match="got 1 prompts for 2 rewards"):
        baseline.advantages(torch.tensor([0.0, 1.0]), ["a"])


def test_shrinkage_by_hand():
    """Decay 0: the last batch alone. Rewards 1, 3 | 7, 12: within (2 + 12.5) / 2 = 7.25."""
    baseline = ShrinkageBaseline(2, 0.0)
    first = torch.tensor([1.0, 3.0, 7.0, 12.0])
    close(baseline.advantages(first), leave_one_out_advantages(first, 2))
    error, between = 7.25, (9.5 - 2.0) ** 2 / 2 - 7.25 / 2
    lean = error / (error + between)
    assert baseline.value == pytest.approx(lean)
    second = torch.tensor([2.0, 4.0, 6.0, 8.0])
    expected = [
        2 - (1 - lean) * 4 - lean * 7,
        4 - (1 - lean) * 2 - lean * 7,
        6 - (1 - lean) * 8 - lean * 3,
        8 - (1 - lean) * 6 - lean * 3,
    ]
    close(baseline.advantages(second), torch.tensor(expected))
    offset = ShrinkageBaseline(2, 0.0)
    offset.advantages(first + 1e5)
    close(offset.advantages(second + 1e5), torch.tensor(expected), atol=0.02)


def test_shrinkage_has_less_variance_than_both_that_it_mixes():
    """64 prompts, 4 samples, variance 1 within and .1 between: b = .33 b_rloo + ... (2511.03710)"""
    random = torch.Generator().manual_seed(0)
    shrunk, moving = ShrinkageBaseline(4), MovingAverageBaseline()
    squares = torch.zeros(3)
    for step in range(300):
        levels = 0.1**0.5 * torch.randn(64, 1, generator=random)
        rewards = (levels + torch.randn(64, 4, generator=random)).flatten()
        found = [shrunk.advantages(rewards), leave_one_out_advantages(rewards, 4)]
        found.append(moving.advantages(rewards))
        if step >= 20:
            squares += torch.stack(found).square().mean(1) / 280
    a, b2 = 1 / 3, 0.1
    close(squares, torch.tensor([1 + a * b2 / (a + b2), 1 + a, 1 + b2]), rtol=0.02)


@pytest.mark.parametrize("make", [lambda: PromptBaseline(0.7), lambda: ShrinkageBaseline(2, 0.7)])
def test_a_restored_baseline_of_prompts_resumes_exactly(make):
    baseline, other = make(), make()
    asked = [["a", "a", "b", "b"]] * isinstance(baseline, PromptBaseline)
    for batch in PAST:
        baseline.advantages(batch, *asked)
    other.load_state_dict(baseline.state_dict())
    for batch in PAST:
        assert torch.equal(baseline.advantages(batch, *asked), other.advantages(batch, *asked))
    with pytest.raises(ValueError, match="decay"):
        type(baseline)(*[2] * isinstance(baseline, ShrinkageBaseline), 0.2).load_state_dict(
            other.state_dict()
        )


def test_left_out_samples_are_nobodys_others():
    rewards, applies = torch.tensor([1.0, 1e9, 4.0, NAN]), torch.tensor([1, 0, 1, 0]).bool()
    close(
        leave_one_out_advantages(torch.cat([rewards, rewards]), 4, torch.cat([applies] * 2)),
        torch.tensor([-3.0, 0.0, 3.0, 0.0] * 2),
    )
    # alone in its group: no others, no advantage
    close(leave_one_out_advantages(rewards, 2, applies), torch.zeros(4))
    shrunk = ShrinkageBaseline(4, 0.0)
    for _ in range(2):
        found = shrunk.advantages(torch.cat([rewards, rewards + 4]), torch.cat([applies] * 2))
        assert found.isfinite().all() and not found[[1, 3, 5, 7]].any()
    # within 4.5 (4.5 / 2 of a mean), between 8 - 2.25: each leans on the other prompt's mean
    error = 4.5 / 3
    lean = error / (error + 8 - 2.25)
    close(found[0], torch.tensor(1 - (1 - lean) * 4 - lean * 6.5))


# --- scale, KL target, importance


def test_standardized_advantages_do_not_know_the_rewards_scale(device):
    advantages = torch.tensor([3.0, -1.0, 0.5, 0.0], device=device)
    for scale in (1e-6, 1.0, 1e6):
        found = standardized_advantages(scale * advantages)
        close(found, standardized_advantages(advantages))
        close(found.std(correction=0), torch.tensor(1.0))
        close(found / found[0], advantages / 3.0)  # not centred
    for equal in (0.0, 0.1, -1e5):
        assert not standardized_advantages(torch.full((7,), equal, device=device)).any()


def test_samples_without_a_reward_have_no_say_in_the_deviation(device):
    """How many they are changes nothing for the others; where all are such, all is 0."""
    advantages = torch.tensor([3.0, 0.0, -1.0, 0.0, 0.0], device=device)
    applies = torch.tensor([1, 0, 1, 0, 0], device=device).bool()
    found = standardized_advantages(advantages, applies)
    close(found, torch.tensor([1.5, 0.0, -0.5, 0.0, 0.0]))  # deviation 2
    nobody = torch.zeros_like(applies)
    assert not standardized_advantages(torch.zeros_like(advantages), nobody).any()


def test_beta_follows_the_kl_by_the_equation():
    assert adapted_beta(0.1, 2.0, 2.0, 1.0) == 0.1
    assert adapted_beta(0.1, 2.2, 2.0, 0.5) == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    assert adapted_beta(0.1, 100.0, 2.0, 0.5) == pytest.approx(0.1 * 1.1)  # clipped
    assert adapted_beta(0.1, -5.0, 2.0, 0.5) == pytest.approx(0.1 * 0.9)  # a noisy k1
    assert adapted_beta(0.1, 0.0, 2.0, 1.0, floor=0.09) == 0.09
    beta = 0.1
    for _ in range(100):  # a policy whose KL is .3 / beta
        beta = adapted_beta(beta, 0.3 / beta, 1.5, 0.5)
    assert beta == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.1, NAN, 1, 1),
        (0.1, INF, 1, 1),
        (0.1, 1, 0, 1),
        (0.1, 1, NAN, 1),
        (0.1, 1, 1, 0),
        (0.1, 1, 1, 1.1),
        (0.1, 1, 1, 1, 0.2),
        (INF, 1, 1, 1),
        (0.1, 1, 1, 1, -1),
    ],
)
def test_a_beta_that_means_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="got .*expected"):
        adapted_beta(*arguments)


def test_three_kinds_of_importance_by_hand(device):
    log_ratio = torch.tensor([[math.log(2), math.log(3)], [math.log(0.5), NAN]], device=device)
    mask = torch.tensor([[True, True], [True, False]], device=device)
    zero = torch.zeros_like(log_ratio)
    for kind, limit, expected in (
        ("sequence", 4.0, [4.0, 0.5]),
        ("mask", 4.0, [0.0, 0.5]),
        ("mask", 6.5, [6.0, 0.5]),
        ("token", 2.5, [[2.0, 2.5], [0.5, 1.0]]),
    ):
        close(importance_weights(log_ratio, zero, mask, limit, kind), torch.tensor(expected))


def test_weights_of_tokens_have_their_gradient():
    """(B, T) advantages: d loss / d logprobs = -A_t, 0 outside the mask whatever stands there."""
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights = torch.tensor([[1.0, 2.0, NAN], [0.5, INF, NAN]])
    losses = reinforce_loss(logprobs, mask, weights)
    losses.sum().backward()
    x = logprobs.detach()
    close(losses, torch.stack([-x[0, 0] - 2 * x[0, 1], -0.5 * x[1, 0]]))
    close(logprobs.grad, -torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]]))
    same = torch.tensor([[3.0] * 3, [-1.0] * 3])
    close(reinforce_loss(logprobs, mask, same), reinforce_loss(logprobs, mask, same[:, 0]))


def test_token_weights_are_exact_for_one_token_and_sequence_weights_for_all():
    """E_mu[w f] over all completions; of the first token alone both are exact."""
    policy, drawn = completion_logprobs(THETA), completion_logprobs(ANCHOR)
    logprobs, sampling = (token_logprobs(t[ROWS], TOKENS, TEMPERATURE) for t in (THETA, ANCHOR))
    value = (policy.exp() * REWARDS).sum()
    whole = importance_weights(logprobs, sampling, MASK, INF)
    close((drawn.exp() * whole * REWARDS).sum(), value)
    first = MASK & (torch.arange(MAX_TOKENS) == 0)
    tokens = importance_weights(logprobs, sampling, first, INF, "token")[:, 0]
    start = torch.tensor([c[0] for c in COMPLETIONS]).double()
    close((drawn.exp() * tokens * start).sum(), (policy.exp() * start).sum())
