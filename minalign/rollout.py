"""Sampling completions with a key-value cache, and scoring them again in one pass.

Prompts are padded on the left, so that every completion starts at the same column; positions come from the mask, so
that padding shifts nobody. What is sampled is the full softmax of logits / temperature: what the log-probs describe.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .batches import length_parts, tokens_a_pass
from .decode import can_be_fixed, decode_fixed, draw, packed_linears, preallocated_cache
from .logprobs import position_ids_from_mask, token_logprobs, token_logprobs_from_hidden


class Rollout(NamedTuple):
    """Completions without their prompts, T = tokens of the longest of them.

    tokens (B, T) long, pad_token_id after the end; mask (B, T) bool, true up to and including the end token;
    logprobs (B, T) float32, nats, at the sampling temperature, 0 where the mask is false.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor


@contextlib.contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: int | list[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
    uniforms: torch.Tensor | None = None,
) -> Rollout:
    """Sample one completion per row: y_t ~ softmax(z_t / temperature), the whole vocabulary, until an end token.

    No top-k, no top-p, no penalties; the checkpoint's own generation config is ignored. Dropout is off, and the
    model's mode is put back. The log-probs are those of the very draws.

    Args:
        model: a transformers causal language model with a key-value cache (not Mamba, not the first GPT).
        input_ids: (B, P) long, prompts padded on the left (any ids there).
        attention_mask: (B, P), 1 or true for real tokens; each row has one at its end.
        max_new_tokens: >= 1; T is smaller where every row has ended before.
        temperature: > 0.
        eos_token_ids: the end token, or all of them; the one drawn stays in the completion.
        pad_token_id: fills the columns after the end.
        generator: source of the draws, on the model's device; None is torch's own.
        uniforms: (B, max_new_tokens) float64 in [0, 1), the draws themselves, instead of a generator: what a row samples then
            depends on its own numbers alone, not on the rows beside it.
    Returns:
        Rollout(tokens, mask, logprobs), each (B, T), without a graph.
    Raises:
        ValueError: a prompt that is empty or padded on the right, max_new_tokens < 1, temperature <= 0, prompt and
            completion together longer than the model's context, or a model without a key-value cache.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    >>> prompt = torch.tensor([[3, 4]])
    >>> rollout = generate(model, prompt, torch.ones_like(prompt), max_new_tokens=5, temperature=1.0,
    ...                    eos_token_ids=2, pad_token_id=0, generator=torch.Generator().manual_seed(0))
    >>> rollout.tokens.shape == rollout.mask.shape == rollout.logprobs.shape
    True
    """
    attention_mask = attention_mask.bool()
    if (
        input_ids.ndim != 2
        or input_ids.shape != attention_mask.shape
        or not input_ids.numel()
        or not attention_mask[:, -1].all()
    ):
        raise ValueError(
            f"got input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)}, expected the same "
            "(B, P) with a real token at the end of each row: pad prompts on the left, and give each at least one token"
        )
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(f"got max_new_tokens={max_new_tokens}, temperature={temperature}, expected >= 1 and > 0")
    context = getattr(model.config, "max_position_embeddings", None)
    longest = int(attention_mask.sum(1).max())
    if context and longest + max_new_tokens > context:
        raise ValueError(
            f"got a prompt of {longest} tokens and max_new_tokens={max_new_tokens}, expected at most {context} together "
            "(the model's context): shorten one of them"
        )
    if uniforms is None:
        uniforms = draw_uniforms(len(input_ids), max_new_tokens, input_ids.device, generator)
    if uniforms.shape != (len(input_ids), max_new_tokens):
        raise ValueError(
            f"got uniforms {tuple(uniforms.shape)}, expected {(len(input_ids), max_new_tokens)}: one a row and token"
        )
    eos = torch.tensor([eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids), device=input_ids.device)

    cache = preallocated_cache(model.config, input_ids.shape[1] + max_new_tokens)
    # Samples of one prompt share its pass: `prompts` are the different ones, `prompt_of` (B,) says which is whose
    real_ids = input_ids.masked_fill(~attention_mask, 0)  # a pad id may lie outside the embedding
    prompts, prompt_of = torch.cat([real_ids, attention_mask.long()], 1).unique(dim=0, return_inverse=True)
    next_ids, prompt_mask = prompts.chunk(2, dim=1)
    next_positions = position_ids_from_mask(prompt_mask)
    rows = torch.arange(len(input_ids), device=input_ids.device)  # of the batch that are still in the cache
    running = torch.ones_like(rows, dtype=torch.bool)
    tokens = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logprobs = torch.zeros_like(tokens, dtype=torch.float32)
    with dropout_off(model), packed_linears(model):  # with dropout, the samples would be those of another policy
        for t in range(max_new_tokens):
            output = model(
                input_ids=next_ids,
                attention_mask=attention_mask.long() if t else prompt_mask,
                position_ids=next_positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if getattr(output, "past_key_values", None) is not cache:  # it would forget the prompt, and nothing would show it
                raise ValueError(
                    f"got a {model.config.model_type} model, which fills no key-value cache: expected a transformer"
                )
            logits, positions = output.logits[:, -1], next_positions[:, -1:]
            if t == 0:
                cache.batch_select_indices(prompt_of)
                logits, positions = logits[prompt_of], positions[prompt_of]
            distribution = (logits.float() / temperature).log_softmax(1)  # (rows, V)
            drawn = draw(distribution, uniforms[rows, t, None])  # (rows, 1)
            tokens[rows, t] = drawn.squeeze(1).masked_fill(~running, pad_token_id)
            mask[rows, t] = running
            logprobs[rows, t] = distribution.gather(1, drawn).squeeze(1).masked_fill(~running, 0.0)
            running = running & ~torch.isin(drawn.squeeze(1), eos)
            left = int(running.sum())
            if left == 0:
                break
            next_ids = drawn
            next_positions = positions + 1
            if t == 0 and can_be_fixed(model, cache):
                decode_fixed(
                    model, cache, attention_mask, next_ids, next_positions, running, uniforms, tokens, mask, logprobs,
                    temperature=temperature, eos=eos,
                )  # fmt: skip
                t = int(mask.any(0).sum()) - 1
                break
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
            # Rows that have ended leave. A few go on as dead weight: copying the cache costs, too.
            if left <= 0.75 * len(rows):
                rows, next_ids, next_positions, attention_mask = (
                    x[running] for x in (rows, next_ids, next_positions, attention_mask)
                )
                cache.batch_select_indices(running.nonzero().squeeze(1))
                running = running[running]
    return Rollout(tokens[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1])


def draw_uniforms(rows: int, columns: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """(rows, columns) float64 in [0, 1): all the chance that `generate` needs."""
    return torch.rand(rows, columns, dtype=torch.double, device=device, generator=generator)


def completion_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Logits that predict each token of sampled completions, in one pass with gradients, already aligned.

    The result's [:, t] is the distribution that tokens[:, t] was drawn from: the logits one column earlier, so the
    first comes from the last column of the prompt, whose width (not length) is the same for all rows.

    Args:
        model: a causal language model; dropout is off, and its mode is put back.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T) of a Rollout.
    Returns:
        (B, T, V) in the model's dtype. Positions outside the mask hold anything.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)).eval()
    >>> ids = torch.tensor([[3, 4, 5, 6]])
    >>> logits = completion_logits(model, ids[:, :2], torch.ones(1, 2), ids[:, 2:], torch.ones(1, 2))
    >>> torch.equal(logits, model(ids).logits[:, 1:3])
    True
    """
    with dropout_off(model):
        output = model(**_inputs(input_ids, attention_mask, tokens, mask), logits_to_keep=tokens.shape[1] + 1)
    return output.logits[:, :-1]


def _inputs(input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
    """Prompts and completions side by side, as a model takes them."""
    full_mask = torch.cat([attention_mask.bool(), mask.bool()], dim=1)  # (B, P + T)
    return {
        "input_ids": torch.cat([input_ids, tokens], dim=1).masked_fill(~full_mask, 0),
        "attention_mask": full_mask.long(),
        "position_ids": position_ids_from_mask(full_mask),
        "use_cache": False,
    }


def completion_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    known_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probs (B, T) of sampled completions in one pass with gradients, 0 outside the mask.

    `token_logprobs(completion_logits(...), tokens, temperature)`, but columns that are padding in every row are left out, and
    the vocabulary is multiplied out for the tokens inside the mask alone, a chunk at a time (`known_grad` (B, T): see
    token_logprobs_from_hidden). The arguments are those of `completion_logits`.
    """
    mask = mask.bool()
    prompt_columns, width = attention_mask.bool().any(0), int(mask.any(0).sum())
    real = mask[:, :width]
    narrow = (input_ids[:, prompt_columns], attention_mask[:, prompt_columns], tokens[:, :width].masked_fill(~real, 0), real)
    if has_plain_head(model):
        with dropout_off(model):
            hidden = model.base_model(**_inputs(*narrow)).last_hidden_state[:, -width - 1 : -1]  # (B, T, D), one column earlier
        logprobs = token_logprobs_from_hidden(
            hidden[real][None], model.get_output_embeddings().weight, tokens[mask][None], temperature,
            known_grad=None if known_grad is None else known_grad[mask][None],
        )  # fmt: skip
    else:
        logprobs = token_logprobs(completion_logits(model, *narrow), narrow[2], temperature)[real]
    return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logprobs)


@torch.no_grad()
def frozen_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    micro_batch_size: int,
) -> torch.Tensor:
    """`completion_logprobs` under a frozen model, without a graph, at most `micro_batch_size` rows of like length at a time."""
    logprobs = torch.zeros_like(mask, dtype=torch.float32)
    for part in length_parts((attention_mask.sum(1) + mask.sum(1)).tolist(), micro_batch_size, tokens_a_pass(model)):
        rows = (tensor[part] for tensor in (input_ids, attention_mask, tokens, mask))
        logprobs[part] = completion_logprobs(model, *rows, temperature)
    return logprobs


_PLAIN_HEADS = weakref.WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are hidden states times the LM head's weight and nothing else; tried out once for each model.

    Some models scale their logits, squash them or add a bias: those take the way over full logits.
    """
    if model not in _PLAIN_HEADS:
        head, ids = model.get_output_embeddings(), torch.tensor([[0, 1, 1]], device=model.device)
        plain = isinstance(head, torch.nn.Linear) and head.bias is None
        if plain:
            with dropout_off(model), torch.autocast(model.device.type, enabled=False):
                hidden, logits = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
                plain = torch.allclose(hidden @ head.weight.T, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
        if not plain:
            print(f"  note: {model.config.model_type} does more to its logits than the LM head's product: log-probs take the way over "
                  "full logits, which needs more memory")  # fmt: skip
        _PLAIN_HEADS[model] = plain
    return _PLAIN_HEADS[model]
