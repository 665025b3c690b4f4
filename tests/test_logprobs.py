"""Log-probs, masks, entropy and KL against double precision, tables by hand and exact sums."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minalign.logprobs import (
    completion_mask,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    position_ids_from_mask,
    token_entropy,
    token_logprobs,
    token_logprobs_from_hidden,
)

close = partial(
    torch.testing.assert_close, rtol=1e-5, atol=2e-6, check_dtype=False, check_device=False
)
INF, NAN = math.inf, math.nan


def reference_logprobs(logits, tokens, temperature=1.0):
    """Double precision throughout, one token at a time."""
    log_softmax = (logits.double() / temperature).log_softmax(2)
    B, T = tokens.shape
    rows = [[log_softmax[b, t, tokens[b, t]] for t in range(T)] for b in range(B)]
    return torch.stack([torch.stack(row) for row in rows])


# --- token log-probs


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_token_logprobs_and_their_gradient_equal_double_precision(device, temperature):
    """With sampling at .7 and log-probs at 1, every KL and gradient belongs to another policy."""
    logits, tokens, weights = 3 * torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.randn(2, 3)
    ours = logits.to(device, copy=True).requires_grad_()
    reference = logits.double().requires_grad_()
    logprobs = token_logprobs(ours, tokens.to(device), temperature)
    expected = reference_logprobs(reference, tokens, temperature)
    close(logprobs, expected)
    (weights.to(device) * logprobs).sum().backward()
    (weights * expected).sum().backward()
    close(ours.grad, reference.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_of_a_large_vocabulary_are_exact(device, dtype):
    """A log-softmax in bfloat16 would be off by .05 nats per token: a sequence sums hundreds."""
    logits, tokens = (3 * torch.randn(2, 4, 5000)).to(dtype), torch.randint(5000, (2, 4))
    logprobs = token_logprobs(logits.to(device), tokens.to(device))
    assert logprobs.dtype == torch.float32
    close(logprobs, reference_logprobs(logits, tokens), rtol=0, atol=1e-5)


def test_a_nan_position_does_not_touch_the_others(device):
    logits, tokens = torch.randn(1, 3, 5, device=device), torch.randint(5, (1, 3), device=device)
    broken = logits.clone()
    broken[0, 2] = NAN
    expected = token_logprobs(logits.requires_grad_(), tokens)[:, :2]
    logprobs = token_logprobs(broken.requires_grad_(), tokens)[:, :2]
    close(logprobs, expected)
    expected.sum().backward()
    logprobs.sum().backward()
    close(broken.grad[:, :2], logits.grad[:, :2])


# --- token log-probs from hidden states


# of 6 tokens: 4 does not divide them, 100 is larger
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 6, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_equals_the_full_way_forward_and_backward(device, dtype, chunk_size):
    hidden, weight = torch.randn(2, 4, 5).to(dtype), torch.randn(11, 5).to(dtype)
    tokens, weights = torch.randint(11, (2, 3)), torch.randn(2, 3)
    hidden_in, weight_in = (x.to(device, copy=True).requires_grad_() for x in (hidden, weight))
    logprobs = token_logprobs_from_hidden(
        hidden_in[:, :-1], weight_in, tokens.to(device), 0.7, chunk_size
    )
    (weights.to(device) * logprobs).sum().backward()

    full_hidden, full_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference_logprobs(full_hidden[:, :-1] @ full_weight.T, tokens, temperature=0.7)
    (weights * expected).sum().backward()
    close(logprobs, expected)
    assert logprobs.dtype == torch.float32 and hidden_in.grad.dtype == weight_in.grad.dtype == dtype
    # one rounding to bfloat16, at the end
    rounding = {} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    close(hidden_in.grad, full_hidden.grad, **rounding)
    close(weight_in.grad, full_weight.grad, **rounding)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("chunked", [True, False])
def test_from_hidden_never_holds_the_logits_of_the_whole_batch(device, chunked):
    """B T V floats are 20 GB for 64 sequences of 512 tokens and 152k words.

    The full way shows that the test would see them.
    """
    B, T, D, V, chunk_size = 4, 16, 8, 97, 8
    hidden = torch.randn(B, T, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    tokens = torch.randint(V, (B, T), device=device)
    saved = []  # what the backward keeps: many small pieces would be a (B, T, V) tensor in disguise
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        if chunked:
            logprobs = token_logprobs_from_hidden(hidden, weight, tokens, chunk_size=chunk_size)
        else:
            logprobs = token_logprobs(hidden @ weight.T, tokens)
        logprobs.sum().backward()
    assert (largest.numel <= max(chunk_size * V, V * D)) == chunked
    assert (sum(tensor.numel() for tensor in saved) < B * T * V) == chunked


def test_from_hidden_serves_a_frozen_head_and_a_frozen_trunk():
    """LoRA freezes the head, linear probing the trunk."""
    hidden, weight, tokens = torch.randn(1, 3, 4), torch.randn(5, 4), torch.randint(5, (1, 3))
    for trained, frozen in [(hidden, weight), (weight, hidden)]:
        trained.requires_grad_()
        frozen.requires_grad_(False)
        logprobs = token_logprobs_from_hidden(hidden, weight, tokens)
        expected = token_logprobs(hidden @ weight.T, tokens)
        gradients = [torch.autograd.grad(x.sum(), trained)[0] for x in (logprobs, expected)]
        close(*gradients)


def test_autocast_does_not_reach_the_logits(device):
    hidden, weight, tokens = torch.randn(1, 3, 64), torch.randn(50, 64), torch.randint(50, (1, 3))
    inputs = [x.to(device) for x in (hidden, weight, tokens)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logprobs = token_logprobs_from_hidden(*inputs)
    close(logprobs, reference_logprobs(hidden @ weight.T, tokens), atol=1e-5)


# --- masks and positions


@pytest.mark.parametrize(
    "tokens, eos, expected",
    [
        ([5, 2, 0, 0], 2, [1, 1, 0, 0]),
        # pad == eos: with a mask by value the policy would never learn to stop
        ([5, 2, 2, 2], 2, [1, 1, 0, 0]),
        ([5, 7, 6, 2], [2, 7], [1, 1, 0, 0]),  # whichever comes first ...
        ([5, 7, 6, 2], [7, 2], [1, 1, 0, 0]),  # ... not whichever is listed first
        ([5, 7, 6, 2], 2, [1, 1, 1, 1]),
        ([2, 5, 5, 5], 2, [1, 0, 0, 0]),  # an empty answer still has its end token
        ([5, 6, 5, 6], [2, 7], [1, 1, 1, 1]),  # unfinished
    ],
)
def test_completion_mask_ends_with_the_first_end_token(device, tokens, eos, expected):
    mask = completion_mask(torch.tensor([tokens], device=device), eos)
    assert mask.dtype == torch.bool
    assert mask[0].tolist() == [bool(m) for m in expected]


@pytest.mark.parametrize("eos", [[0], [0, 2]])
def test_completion_mask_of_every_row_of_a_small_vocabulary(eos):
    rows = list(itertools.product(range(3), repeat=4))
    expected = [[not set(row[:t]) & set(eos) for t in range(4)] for row in rows]
    assert completion_mask(torch.tensor(rows), eos).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_positions_count_real_tokens_whatever_the_padding(device, dtype):
    """A left-padded GPT-2 row with shifted positions is off by .1 nat per token."""
    masks = list(itertools.product([0, 1], repeat=4))
    position_ids = position_ids_from_mask(torch.tensor(masks, dtype=dtype, device=device))
    assert position_ids.dtype == torch.long
    assert position_ids.min() >= 0  # a pad needs a valid index, too
    for mask, positions in zip(masks, position_ids.tolist()):
        assert [p for p, real in zip(positions, mask) if real] == list(range(sum(mask)))


# --- entropy


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_entropy_and_its_gradient_equal_the_definition(device, temperature):
    logits = 2 * torch.randn(2, 3, 6)
    ours = logits.to(device, copy=True).requires_grad_()
    reference = logits.double().requires_grad_()
    p = torch.softmax(reference / temperature, dim=2)
    entropy, expected = token_entropy(ours, temperature), -(p * p.log()).sum(2)
    close(entropy, expected)
    entropy.sum().backward()
    expected.sum().backward()
    close(ours.grad, reference.grad)


def test_forbidden_tokens_add_no_entropy_and_no_nan(device):
    rows = [[0.0, -INF, 0.0, -INF], [0.0, -INF, -1e4, -INF]]
    logits = torch.tensor([rows], device=device, requires_grad=True)
    entropy = token_entropy(logits)
    entropy.sum().backward()
    close(entropy, torch.tensor([[math.log(2), 0.0]]))
    # a uniform and a sure distribution are both stationary
    close(logits.grad, torch.zeros(1, 2, 4))


# --- KL

# KL(policy || reference) = 2.95, and 2.24 the other way
POLICY = [0.70, 0.20, 0.05, 0.04, 0.01]
REFERENCE = [0.01, 0.09, 0.20, 0.30, 0.40]
KL = sum(p * math.log(p / q) for p, q in zip(POLICY, REFERENCE))


@pytest.mark.parametrize("estimator, is_unbiased", [(kl_k1, True), (kl_k2, False), (kl_k3, True)])
def test_expectation_of_each_estimator(device, estimator, is_unbiased):
    """Summed over the whole vocabulary.

    A reversed log-ratio gives -KL, or the KL of the other direction.
    """
    p, q = torch.tensor(POLICY, device=device), torch.tensor(REFERENCE, device=device)
    expectation = (p * estimator(p.log()[None], q.log()[None])).sum().item()
    k2 = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(POLICY, REFERENCE))
    assert expectation == pytest.approx(KL if is_unbiased else k2, rel=1e-5)
    assert abs(k2 - KL) > 1  # k2 is close to the KL only where the two policies are


def test_one_k1_may_be_negative_and_no_k2_or_k3_is():
    logprobs, ref_logprobs = torch.tensor([POLICY]).log(), torch.tensor([REFERENCE]).log()
    assert (kl_k1(logprobs, ref_logprobs) < 0).tolist() == [[False, False, True, True, True]]
    assert (kl_k2(logprobs, ref_logprobs) > 0).all() and (kl_k3(logprobs, ref_logprobs) > 0).all()


def test_k1_is_never_clamped():
    """A cap of 10 would hide that the policy has left its reference."""
    k1 = kl_k1(torch.tensor([[-1.0, -21.0]]), torch.tensor([[-21.0, -1.0]]))
    assert k1.tolist() == [[20.0, -20.0]]


def test_k3_keeps_its_digits_near_zero():
    """exp(-l) - 1 + l cancels to l^2/2 - l^3/6: 2% wrong in float32 at l = .001 without expm1."""
    k3 = kl_k3(torch.tensor([[1e-3, -1e-3]]), torch.zeros(1, 2))
    close(k3, torch.tensor([[1e-6 / 2 - 1e-9 / 6, 1e-6 / 2 + 1e-9 / 6]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_exact_kl_and_its_gradient_equal_the_definition(device, temperature):
    logits, ref_logits = 3 * torch.randn(2, 2, 3, 6)
    ours = logits.to(device, copy=True).requires_grad_()
    reference = logits.double().requires_grad_()
    p, q = (reference / temperature).softmax(2), (ref_logits.double() / temperature).softmax(2)
    kl, expected = exact_kl(ours, ref_logits.to(device), temperature), (p * (p / q).log()).sum(2)
    close(kl, expected)
    kl.sum().backward()
    expected.sum().backward()
    close(ours.grad, reference.grad)


def test_exact_kl_is_zero_to_itself_and_positive_to_anything_else():
    logits = torch.randn(50, 4, 6)
    assert torch.equal(exact_kl(logits, logits.clone()), torch.zeros(50, 4))
    assert (exact_kl(logits, torch.randn(50, 4, 6)) > 0).all()


def test_a_token_forbidden_in_both_is_as_if_it_were_not_there(device):
    logits, ref_logits = torch.randn(2, 2, 3, 6)
    short, long = (logits[:, :, :n].to(device, copy=True) for n in (4, 6))
    ref_long = ref_logits.to(device, copy=True)
    long[:, :, 4:] = ref_long[:, :, 4:] = -INF
    short_kl = exact_kl(short.requires_grad_(), ref_long[:, :, :4])
    long_kl = exact_kl(long.requires_grad_(), ref_long)
    close(long_kl, short_kl)
    short_kl.sum().backward()
    long_kl.sum().backward()
    close(long.grad, torch.nn.functional.pad(short.grad, (0, 2)))


def test_a_token_forbidden_in_one_costs_nothing_or_everything():
    """Forbidden by the policy: 0 log 0 = 0, and the other token is twice as likely.

    Forbidden by the reference: no finite KL exists.
    """
    both, one = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, -INF]]])
    assert exact_kl(one, both).item() == pytest.approx(math.log(2))
    assert exact_kl(both, one).item() == INF


# --- what holds for all

LOGITS = torch.linspace(-3, 2, 24).sin().view(2, 3, 4)
LOGPROBS = torch.linspace(-2, -0.1, 6).view(2, 3)
TOKENS = torch.tensor([[0, 1, 2], [3, 2, 1]])
CALLS = [
    (token_logprobs, (LOGITS, TOKENS)),
    (token_logprobs_from_hidden, (LOGITS, LOGITS[0] + 1, TOKENS.clamp(max=2))),
    (token_entropy, (LOGITS,)),
    (kl_k1, (LOGPROBS, 2.3 * LOGPROBS)),
    (kl_k2, (LOGPROBS, 2.3 * LOGPROBS)),
    (kl_k3, (LOGPROBS, 2.3 * LOGPROBS)),
    (exact_kl, (LOGITS, -1.7 * LOGITS)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("function, arguments", CALLS)
def test_any_dtype_is_computed_in_float32_and_inputs_stay_as_they_were(
    device, function, arguments, dtype
):
    arguments = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in arguments]
    before = [argument.clone() for argument in arguments]
    result = function(*arguments)
    assert result.dtype == torch.float32 and result.shape == (2, 3)
    in_float32 = [x.float() if x.is_floating_point() else x for x in arguments]
    assert torch.equal(result, function(*in_float32))
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before))


HIDDEN, HEAD = torch.zeros(2, 3, 5), torch.zeros(4, 5)


@pytest.mark.parametrize(
    "function, arguments, got",
    [
        (token_logprobs, (LOGITS[0], TOKENS[0]), r"\(3, 4\)"),
        (token_logprobs, (LOGITS, TOKENS[:, :2]), r"\(2, 3, 4\) .* \(2, 2\)"),  # forgot to shift
        (token_logprobs, (LOGITS, TOKENS, 0.0), "temperature=0"),
        (token_logprobs, (LOGITS, TOKENS, NAN), "temperature=nan"),
        (token_logprobs, (LOGITS, TOKENS + 1), "1 to 4"),  # 4 words: ids 0 to 3
        # a label that means "ignore" elsewhere
        (token_logprobs, (LOGITS, TOKENS - 100), "-100 to -97"),
        (token_logprobs_from_hidden, (HIDDEN[0], HEAD, TOKENS[0]), r"\(3, 5\)"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD.T, TOKENS), r"\(5, 4\)"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS[:, :2]), r"\(2, 2\)"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS, -1.0), "temperature=-1"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS, NAN), "temperature=nan"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS, 1.0, 0), "chunk_size=0"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS + 1), "1 to 4"),
        (token_logprobs_from_hidden, (HIDDEN, HEAD, TOKENS - 1), "-1 to 2"),
        (completion_mask, (TOKENS[0], 2), r"\(3,\)"),
        (completion_mask, (TOKENS, []), r"\[\]"),
        (position_ids_from_mask, (TOKENS[0],), r"\(3,\)"),
        (token_entropy, (LOGITS[0],), r"\(3, 4\)"),
        (token_entropy, (LOGITS, 0.0), "temperature=0"),
        (token_entropy, (LOGITS, NAN), "temperature=nan"),
        (kl_k1, (LOGPROBS, LOGPROBS[:1]), r"\(2, 3\) .* \(1, 3\)"),
        (kl_k2, (LOGPROBS, LOGPROBS[:1]), r"\(2, 3\) .* \(1, 3\)"),
        (kl_k3, (LOGPROBS, LOGPROBS[:1]), r"\(2, 3\) .* \(1, 3\)"),
        (exact_kl, (LOGITS, LOGITS[:, :, :3]), r"\(2, 3, 4\) .* \(2, 3, 3\)"),  # another vocabulary
        (exact_kl, (LOGITS[0], LOGITS[0]), r"\(3, 4\)"),
        (exact_kl, (LOGITS, LOGITS, -0.5), "temperature=-0.5"),
        (exact_kl, (LOGITS, LOGITS, NAN), "temperature=nan"),
    ],
)
def test_errors_say_what_was_got_and_expected(function, arguments, got):
    with pytest.raises(ValueError, match=f"got .*{got}.*expected"):
        function(*arguments)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_a_gradient_known_beforehand_gives_the_same_gradients(chunk_size, needs, device):
    hidden, weight, tokens = torch.randn(3, 5, 6), torch.randn(11, 6), torch.randint(0, 11, (3, 5))
    known = torch.randn(3, 5).to(device)
    results = []
    for given in (None, known):
        inputs = [x.clone().to(device) for x in (hidden, weight)]
        for tensor, need in zip(inputs, needs):
            tensor.requires_grad_(need)
        logprobs = token_logprobs_from_hidden(
            *inputs, tokens.to(device), 0.7, chunk_size, known_grad=given
        )
        (logprobs * known).sum().backward()
        results.append([logprobs.detach(), *(x.grad for x, need in zip(inputs, needs) if need)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_another_gradient_than_the_known_one_is_an_error():
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4)
    tokens, known = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    logprobs = token_logprobs_from_hidden(hidden, weight, tokens, known_grad=known)
    with pytest.raises(ValueError, match="another gradient than known_grad"):
        logprobs.mean().backward()
    with torch.no_grad():  # no gradient will come
        logprobs = token_logprobs_from_hidden(hidden, weight, tokens, known_grad=known)
    assert not logprobs.requires_grad


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_log_probs_from_hidden_states_of_huge_logits_are_finite(device, scale):
    """exp() of a logit above 88 is infinite in float32.

    The largest is taken off first, as log_softmax does it.
    """
    torch.manual_seed(0)
    hidden = (scale * torch.randn(2, 3, 4, device=device)).requires_grad_()
    weight = torch.randn(7, 4, device=device)
    tokens = torch.randint(0, 7, (2, 3), device=device)
    logprobs = token_logprobs_from_hidden(hidden, weight, tokens, chunk_size=4)
    expected = token_logprobs(hidden @ weight.T, tokens)
    torch.testing.assert_close(logprobs, expected)
    gradients = [torch.autograd.grad(values.sum(), hidden)[0] for values in (logprobs, expected)]
    torch.testing.assert_close(*gradients)
