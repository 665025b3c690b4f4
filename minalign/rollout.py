"""Sampling completions, and scoring them again in one pass: y ~ pi(.|x), and log pi(y|x).

`sample` and `sequence_logprobs` are the plain functions. `generate` and `completion_logprobs` are
the fast ones, which lie in models/generation.py
and models/scoring.py. Tests hold the fast ones to the plain ones.

Prompts are padded on the left, so that every completion starts at the same column. Positions come
from the mask, so that padding shifts nobody. What is sampled is the full softmax of logits /
temperature: what the log-probs describe.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .logprobs import position_ids_from_mask, token_logprobs
from .models.generation import Rollout, Stop, completions_of, draw_uniforms, generate, split_end
from .models.padding import pad
from .models.precision import dropout_off, float64_device
from .models.scoring import completion_logits, completion_logprobs, frozen_logprobs, has_plain_head

__all__ = [
    "Rollout",
    "completion_logits",
    "completion_logprobs",
    "completions_of",
    "draw_uniforms",
    "frozen_logprobs",
    "generate",
    "has_plain_head",
    "sample",
    "sample_completions",
    "sequence_logprobs",
    "split_end",
]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    uniforms: torch.Tensor,
    temperature: float,
    eos_token_ids: int | list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one completion per row, the plain way: a whole forward pass for each token.

        y_t = the first v with P(y <= v | x, y_<t) > u_t,  P = softmax(z_t / tau) summed up to v

    This is what `generate` computes, without a cache: equal uniforms give equal tokens. Dropout is
    off, and the model's mode is put back.

    Args:
        model: a transformers causal language model.
        input_ids: (B, P) long, prompts padded on the left (any ids there).
        attention_mask: (B, P), 1 or true for real tokens; each row has one at its end.
        uniforms: (B, N) float64 in [0, 1), one number for each token, so at most N tokens.
        temperature: tau > 0.
        eos_token_ids: the end token, or all of them; the one drawn stays in the completion.
    Returns:
        tokens: (B, T) long, 0 after an end, with T the length of the longest completion.
        mask: (B, T) bool, true up to and including the end token.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> prompt, uniforms = torch.tensor([[3, 4]]), torch.zeros(1, 5, dtype=torch.double)
    >>> tokens, mask = sample(GPT2LMHeadModel(config), prompt, torch.ones_like(prompt),
    ...                       uniforms=uniforms, temperature=1.0, eos_token_ids=2)
    >>> tokens, mask.all()
    (tensor([[0, 0, 0, 0, 0]]), tensor(True))
    """
    ends = torch.tensor(eos_token_ids, device=input_ids.device).flatten()
    real = attention_mask.bool()
    ids = input_ids.masked_fill(~real, 0)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    with dropout_off(model):
        for uniform in uniforms.T:  # (B,)
            positions = position_ids_from_mask(real)
            logits = model(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
            logprobs = (logits[:, -1].float() / temperature).log_softmax(1)  # (B, V)
            cdf = logprobs.to(uniform.device).double().exp().cumsum(1)
            drawn = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1).clamp(max=cdf.shape[1] - 1)
            drawn = drawn.to(ids.device).masked_fill(~running, 0)
            ids = torch.cat([ids, drawn[:, None]], 1)
            real = torch.cat([real, running[:, None]], 1)
            running = running & ~torch.isin(drawn, ends)
            if not running.any():
                break
    start = input_ids.shape[1]
    return ids[:, start:], real[:, start:]


def sequence_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probs of sampled completions in one pass with gradients, the plain way: over full logits.

        log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)

    `completion_logprobs` computes the same with less memory. Dropout is off, and the model's mode
    is put back.

    Args:
        model: a transformers causal language model.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T), as `sample` returns them.
        temperature: tau > 0, the one that the tokens were sampled at.
    Returns:
        (B, T) float32, nats, one for each token, 0 outside the mask.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> model, ids = GPT2LMHeadModel(config), torch.tensor([[3, 4, 5, 6]])
    >>> ones = torch.ones(1, 2, dtype=torch.bool)
    >>> sequence_logprobs(model, ids[:, :2], ones, ids[:, 2:], ones, temperature=1.0).shape
    torch.Size([1, 2])
    """
    real = torch.cat([attention_mask.bool(), mask.bool()], 1)  # (B, P + T)
    ids = torch.cat([input_ids, tokens], 1).masked_fill(~real, 0)
    with dropout_off(model):
        positions = position_ids_from_mask(real)
        logits = model(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    start = input_ids.shape[1]  # each token is predicted by the logits one column earlier
    logprobs = token_logprobs(logits[:, start - 1 : -1], ids[:, start:], temperature)
    return logprobs.masked_fill(~mask.bool(), 0.0)


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_token_ids: list[int],
    seed: int,
    batch_size: int,
    stop: Stop | None,
) -> tuple[list[tuple[torch.Tensor, ...]], list[list[int]], list[bool]]:
    """One completion per prompt, always the same for a seed, whatever the batch size.

    Args:
        policy: a causal language model, as in `generate`.
        prompts: token ids of each.
        temperature, max_new_tokens, eos_token_ids: as in `generate`.
        seed: of all draws.
        batch_size: prompts per pass.
        stop: what finds a text that ends a completion, see data.stops; None where there is none.
    Returns:
        batches: (input_ids, attention_mask, tokens, mask) of each batch.
        completions: ids of each, without its end token or text.
        ended: which of them ended by themselves.
    """
    generator = torch.Generator(float64_device(policy.device)).manual_seed(seed)
    uniforms = draw_uniforms(len(prompts), max_new_tokens, policy.device, generator)
    batches, completions, ended = [], [], []
    for i in range(0, len(prompts), batch_size):
        rows = slice(i, i + batch_size)
        input_ids, attention_mask = pad(prompts[rows], "left", policy.device)
        sampled = generate(
            policy,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_ids=eos_token_ids,
            pad_token_id=0,
            uniforms=uniforms[rows],
            stop=stop,
        )
        (tokens, mask, _), ids, ends = completions_of(sampled, prompts[rows], eos_token_ids, stop)
        batches.append((input_ids, attention_mask, tokens, mask))
        completions += ids
        ended += ends.tolist()
    return batches, completions, ended
