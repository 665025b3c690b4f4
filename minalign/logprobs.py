"""Token log-probs, masks, entropy and KL on plain tensors.

Shapes: B sequences, T tokens, V vocabulary, D hidden. Logits are *already aligned*: `logits[:, t]`
is the distribution that `tokens[:, t]` was drawn from. One temperature throughout: pass the one
that the tokens were sampled with, or the log-probs are those of another policy. Everything computes
and returns float32 (nats), and leaves its inputs alone. It needs nothing but `import torch` to be
pasted elsewhere.
"""

import torch


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each token under its own distribution.

        log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)

    Args:
        logits: (B, T, V), any floating dtype. The arithmetic is float32: in bfloat16 it would be
            off by up to .07 nats.
        tokens: (B, T) long; at masked positions any id inside the vocabulary.
        temperature: tau > 0.
    Returns:
        (B, T) float32, nats, <= 0; differentiable in the logits.
    Raises:
        ValueError: shapes do not fit, temperature <= 0, or a token id outside [0, V).

    >>> token_logprobs(torch.tensor([[[0.0, 0.0], [0.0, 100.0]]]), torch.tensor([[1, 1]]))
    tensor([[-0.6931,  0.0000]])
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)}, expected "
            "(B, T, V) and (B, T): shift them against each other first, logits[:, t] must predict "
            "tokens[:, t]"
        )
    if not temperature > 0:
        raise ValueError(f"got temperature={temperature}, expected a number above 0")
    if tokens.numel() and not 0 <= tokens.min().item() <= tokens.max().item() < logits.shape[2]:
        raise ValueError(
            f"got token ids from {tokens.min().item()} to {tokens.max().item()}, expected 0 to "
            f"{logits.shape[2] - 1}: put any valid id at masked positions"
        )
    return (logits.float() / temperature).log_softmax(2).gather(2, tokens[:, :, None]).squeeze(2)


def token_logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 256,
    known_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """`token_logprobs` from hidden states, without ever holding a (B, T, V) tensor.

        log pi(y) = z[y] / tau - logsumexp(z / tau),  z = hidden @ lm_head_weight.T
        d log pi(y) / d z = (onehot(y) - softmax(z / tau)) / tau

    Forward and backward walk over `chunk_size` tokens at a time. The backward computes the logits
    once more, so memory beyond the gradients is a few (chunk_size, V) blocks. Sometimes the
    gradient that will arrive is known beforehand, as in REINFORCE once the advantages are there
    (-A mask / batch size). With `known_grad` the forward makes the backward's products, too.

    Args:
        hidden: (B, T, D) last hidden states (after the final norm), any floating dtype.
        lm_head_weight: (V, D).
        tokens: (B, T) long; at masked positions any id inside the vocabulary.
        temperature: tau > 0.
        chunk_size: tokens per block, >= 1.
        known_grad: (B, T) or None. The backward pass raises ValueError if another gradient arrives.
    Returns:
        (B, T) float32, nats; differentiable once, in hidden and lm_head_weight.
    Raises:
        ValueError: shapes do not fit, temperature <= 0, chunk_size < 1, or a token id outside
            [0, V).

    >>> hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    >>> tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    >>> full = token_logprobs(hidden @ weight.T, tokens)
    >>> chunked = token_logprobs_from_hidden(hidden, weight, tokens, chunk_size=4)
    >>> torch.allclose(chunked, full, atol=1e-6)
    True
    """
    if (
        hidden.ndim != 3
        or tokens.shape != hidden.shape[:2]
        or lm_head_weight.shape[1:] != hidden.shape[2:]
    ):
        raise ValueError(
            f"got hidden {tuple(hidden.shape)}, lm_head_weight {tuple(lm_head_weight.shape)}, "
            f"tokens {tuple(tokens.shape)}, expected (B, T, D), (V, D) and (B, T)"
        )
    if not temperature > 0:
        raise ValueError(f"got temperature={temperature}, expected a number above 0")
    if chunk_size < 1:
        raise ValueError(f"got chunk_size={chunk_size}, expected 1 or more tokens")
    if tokens.numel() and not 0 <= tokens.min().item() <= tokens.max().item() < len(lm_head_weight):
        raise ValueError(
            f"got token ids from {tokens.min().item()} to {tokens.max().item()}, expected 0 to "
            f"{len(lm_head_weight) - 1}: put any valid id at masked positions"
        )

    def walk(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        grad: torch.Tensor | None,
        hidden_needs: bool,
        weight_needs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probs (N,) and, where there is a `grad` (N,), the gradients of their weighted sum.

        One buffer serves all blocks, and everything happens in place.
        """
        logprobs = torch.empty(len(tokens), device=hidden.device)
        hidden_grad = weight_grad = None
        if grad is not None and hidden_needs:
            hidden_grad = torch.empty_like(hidden)
        if grad is not None and weight_needs:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        buffer = torch.empty(min(chunk_size, len(tokens)), len(weight), device=hidden.device)
        for i in range(0, len(tokens), chunk_size):
            part = slice(i, i + chunk_size)
            chosen = tokens[part, None]
            scaled = hidden[part].float() / temperature
            logits = torch.mm(scaled, weight.float().T, out=buffer[: len(scaled)])  # (chunk, V)
            logits -= logits.amax(1, keepdim=True)
            chosen_logits = logits.gather(1, chosen)
            sums = logits.exp_().sum(1, keepdim=True)
            logprobs[part] = (chosen_logits - sums.log()).squeeze(1)
            if grad is not None:
                # (onehot - softmax) grad / tau
                part_grad = grad[part, None] / temperature
                logits_grad = logits.mul_(-part_grad / sums).scatter_add_(1, chosen, part_grad)
            if hidden_grad is not None:
                hidden_grad[part] = logits_grad @ weight.float()
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, hidden[part].float())
        return logprobs, hidden_grad, weight_grad

    # In here, so that the function can be copied whole.
    class ChunkedLogprobs(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx,
            hidden: torch.Tensor,  # (N, D)
            weight: torch.Tensor,  # (V, D)
            tokens: torch.Tensor,  # (N,)
            known: torch.Tensor | None,  # (N,): what `grad` will be in the backward pass
        ) -> torch.Tensor:
            logprobs, *grads = walk(hidden, weight, tokens, known, *ctx.needs_input_grad[:2])
            ctx.save_for_backward(hidden, weight, tokens, known, *grads)
            return logprobs

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(
            ctx: torch.autograd.function.FunctionCtx,
            grad: torch.Tensor,  # (N,)
        ) -> tuple[torch.Tensor | None, ...]:
            hidden, weight, tokens, known, *grads = ctx.saved_tensors
            if known is None:
                with torch.autocast(hidden.device.type, enabled=False):
                    _, *grads = walk(hidden, weight, tokens, grad, *ctx.needs_input_grad[:2])
            elif not torch.allclose(grad, known, rtol=1e-4, atol=1e-6 * known.abs().max().item()):
                raise ValueError(
                    "got another gradient than known_grad, expected d loss / d logprobs: "
                    "leave known_grad out"
                )
            hidden_grad, weight_grad = grads
            if weight_grad is not None:
                weight_grad = weight_grad.to(weight.dtype)
            return hidden_grad, weight_grad, None, None

    known = None
    if known_grad is not None and known_grad.numel() and torch.is_grad_enabled():
        known = known_grad.flatten().float()
    # Autocast would take the products to bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        flat = (hidden.flatten(0, 1), lm_head_weight, tokens.flatten())  # (N, D), (V, D), (N,)
        return ChunkedLogprobs.apply(*flat, known).view(tokens.shape)


def completion_mask(tokens: torch.Tensor, eos_token_ids: int | list[int]) -> torch.Tensor:
    """True for every token of a completion up to and including its first end token, false after it.

    By position, never by value alone. Where pad == eos, the end token still counts, and the pads
    after it do not.

    Args:
        tokens: (B, T) long, completions without their prompts.
        eos_token_ids: the end token, or all of them.
    Returns:
        (B, T) bool.
    Raises:
        ValueError: tokens are not (B, T), or no end token is given.

    >>> completion_mask(torch.tensor([[5, 2, 2], [5, 7, 6], [5, 5, 5]]), [2, 7])
    tensor([[ True,  True, False],
            [ True,  True, False],
            [ True,  True,  True]])
    """
    eos_token_ids = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or [])
    if tokens.ndim != 2 or not eos_token_ids:
        raise ValueError(
            f"got tokens {tuple(tokens.shape)} and end tokens {eos_token_ids}, "
            "expected (B, T) and 1 or more"
        )
    is_end = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)).long()
    return is_end.cumsum(1) - is_end == 0  # no end token strictly before this position


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only.

        position_t = (number of real tokens up to t) - 1; pads before the first real token get 0

    So left padding does not shift a model with learned positions.

    Args:
        attention_mask: (B, T), 1 or true for real tokens.
    Returns:
        (B, T) long.
    Raises:
        ValueError: the mask is not (B, T).

    >>> position_ids_from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 3]])
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"got attention_mask {tuple(attention_mask.shape)}, expected (B, T)")
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def token_entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy of each next-token distribution.

        H(pi_t) = - sum_v pi_t(v) log pi_t(v),  pi_t = softmax(z_t / tau)

    Args:
        logits: (B, T, V), any floating dtype; -inf (a forbidden token) is fine.
        temperature: tau > 0.
    Returns:
        (B, T) float32, nats, between 0 and log V; differentiable.
    Raises:
        ValueError: logits are not (B, T, V), or temperature <= 0.

    >>> token_entropy(torch.zeros(1, 1, 8)), torch.tensor(8.0).log()
    (tensor([[2.0794]]), tensor(2.0794))
    """
    if logits.ndim != 3:
        raise ValueError(f"got logits {tuple(logits.shape)}, expected (B, T, V)")
    if not temperature > 0:
        raise ValueError(f"got temperature={temperature}, expected a number above 0")
    logprobs = (logits.float() / temperature).log_softmax(2)
    probabilities = logprobs.exp()
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(2)  # 0 log 0 = 0


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k1 estimate of KL(policy || reference) from samples of the policy.

        k1 = l,  l = log pi(y) - log ref(y)        (Schulman, "Approximating KL divergence", 2020)

    Unbiased, and may be negative. Its place is in the reward, detached: as a loss its expected
    gradient is zero.

    Args:
        logprobs, ref_logprobs: (B, T) of the same sampled tokens, at one temperature, in nats.
    Returns:
        (B, T) float32, nats.
    Raises:
        ValueError: shapes differ.

    >>> kl_k1(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.5000]])
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}, expected one shape"
        )
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k2 estimate of KL(policy || reference) from samples of the policy.

        k2 = l^2 / 2,  l = log pi(y) - log ref(y)
        (Schulman, "Approximating KL divergence", 2020)

    Biased, never negative, of low variance. For reporting: in the reward it gives a wrong gradient.

    Args:
        logprobs, ref_logprobs: (B, T) of the same sampled tokens, at one temperature, in nats.
    Returns:
        (B, T) float32, nats.
    Raises:
        ValueError: shapes differ.

    >>> kl_k2(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.1250]])
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}, expected one shape"
        )
    return (logprobs.float() - ref_logprobs.float()).square() / 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) from samples of the policy.

        k3 = exp(-l) - 1 + l,  l = log pi(y) - log ref(y)
        (Schulman, "Approximating KL divergence", 2020)

    Unbiased and never negative. For reporting: its variance explodes where the reference is far
    likelier than the policy. As a loss (GRPO) its gradient is that of the forward KL.

    Args:
        logprobs, ref_logprobs: (B, T) of the same sampled tokens, at one temperature, in nats.
    Returns:
        (B, T) float32, nats.
    Raises:
        ValueError: shapes differ.

    >>> kl_k3(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    tensor([[0.1065]])
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}, expected one shape"
        )
    log_ratio = logprobs.float() - ref_logprobs.float()
    return torch.expm1(-log_ratio) + log_ratio


def exact_kl(
    logits: torch.Tensor, ref_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(policy || reference) of each next-token distribution, over the whole vocabulary.

        KL_t = sum_v pi_t(v) [log pi_t(v) - log ref_t(v)],  both softmax(z_t / tau)

    Summed over the tokens of completions that the policy sampled, its mean is the sequence KL, with
    far less noise than k1.

    Args:
        logits, ref_logits: (B, T, V), any floating dtype; -inf (a forbidden token) is fine where
            both have it.
        temperature: tau > 0, for both.
    Returns:
        (B, T) float32, nats, >= 0 up to rounding; differentiable.
    Raises:
        ValueError: shapes differ or are not (B, T, V), or temperature <= 0.

    >>> exact_kl(torch.tensor([[[100.0, 0.0]]]), torch.zeros(1, 1, 2))
    tensor([[0.6931]])
    """
    if logits.ndim != 3 or logits.shape != ref_logits.shape:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)}, "
            "expected the same (B, T, V)"
        )
    if not temperature > 0:
        raise ValueError(f"got temperature={temperature}, expected a number above 0")
    logprobs = (logits.float() / temperature).log_softmax(2)
    ref_logprobs = (ref_logits.float() / temperature).log_softmax(2)
    probabilities = logprobs.exp()
    log_ratio = (logprobs - ref_logprobs).masked_fill(probabilities == 0, 0.0)  # 0 log 0/0 = 0
    return (probabilities * log_ratio).sum(2)
