"""The fast ways of rollout.py: `generate` is `sample`, `completion_logprobs` `sequence_logprobs`.

Keys and values are cached, prompts that are equal share their pass, rows that have ended leave, and
nobody multiplies out logits that nobody needs. Tests hold each function to its plain twin.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..logprobs import position_ids_from_mask, token_logprobs, token_logprobs_from_hidden
from .decode import can_be_fixed, decode_fixed, draw, packed_linears, preallocated_cache
from .padding import context_of, length_parts, tokens_per_pass
from .precision import float64_device


@contextlib.contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards each module has its own mode back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Rollout(NamedTuple):
    """Completions without their prompts, T = tokens of the longest of them.

    tokens: (B, T) long, pad_token_id after the end.
    mask: (B, T) bool, true up to and including the end token.
    logprobs: (B, T) float32, nats, at the sampling temperature, 0 where the mask is false.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor


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
    """Sample one completion per row with a key-value cache, until an end token.

        y_t ~ softmax(z_t / tau), over the whole vocabulary

    No top-k, no top-p, no penalties. The checkpoint's own generation config is ignored. Dropout is
    off, and the model's mode is put back. The log-probs are those of the very draws. `sample` is
    the plain version.

    Args:
        model: a transformers causal language model with a key-value cache (not Mamba, not the
            first GPT).
        input_ids: (B, P) long, prompts padded on the left (any ids there).
        attention_mask: (B, P), 1 or true for real tokens; each row has one at its end.
        max_new_tokens: >= 1; T is smaller where every row has ended before.
        temperature: tau > 0.
        eos_token_ids: the end token, or all of them; the one drawn stays in the completion.
        pad_token_id: fills the columns after the end.
        generator: source of the draws, on the model's device; None is torch's own.
        uniforms: (B, max_new_tokens) float64 in [0, 1), the draws themselves, instead of a
            generator. What a row samples then depends on its own numbers alone, not on the rows
            beside it.
    Returns:
        Rollout(tokens, mask, logprobs), each (B, T), without a graph.
    Raises:
        ValueError: a prompt that is empty or padded on the right, max_new_tokens < 1,
            temperature <= 0, prompt and completion together longer than the model's context,
            uniforms of another shape, or a model without a key-value cache.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> prompt, generator = torch.tensor([[3, 4]]), torch.Generator().manual_seed(0)
    >>> rollout = generate(GPT2LMHeadModel(config), prompt, torch.ones_like(prompt),
    ...                    max_new_tokens=5, temperature=1.0, eos_token_ids=2, pad_token_id=0,
    ...                    generator=generator)
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
            f"got input_ids {tuple(input_ids.shape)} and attention_mask "
            f"{tuple(attention_mask.shape)}, expected the same (B, P) with a real token at the end "
            "of each row: pad prompts on the left, and give each at least one token"
        )
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"got max_new_tokens={max_new_tokens}, temperature={temperature}, expected >= 1 and > 0"
        )
    context = context_of(model.config)
    longest = int(attention_mask.sum(1).max())
    if context and longest + max_new_tokens > context:
        raise ValueError(
            f"got a prompt of {longest} tokens and max_new_tokens={max_new_tokens}, expected at "
            f"most {context} together (the model's context): shorten one of them"
        )
    if uniforms is None:
        uniforms = draw_uniforms(len(input_ids), max_new_tokens, input_ids.device, generator)
    if uniforms.shape != (len(input_ids), max_new_tokens):
        raise ValueError(
            f"got uniforms {tuple(uniforms.shape)}, expected {(len(input_ids), max_new_tokens)}: "
            "one per row and token"
        )
    uniforms = uniforms.to(float64_device(input_ids.device))
    ends = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    eos = torch.tensor(ends, device=input_ids.device)

    cache = preallocated_cache(model.config, input_ids.shape[1] + max_new_tokens)
    # Samples of one prompt share its pass. `prompts` are the different ones, and `prompt_of` (B,)
    # says which is whose.
    real_ids = input_ids.masked_fill(~attention_mask, 0)  # a pad id may lie outside the embedding
    ids_and_mask = torch.cat([real_ids, attention_mask.long()], dim=1)
    prompts, prompt_of = ids_and_mask.unique(dim=0, return_inverse=True)
    next_ids, prompt_mask = prompts.chunk(2, dim=1)
    next_positions = position_ids_from_mask(prompt_mask)
    # The rows of the batch that are still in the cache, and which of them have not ended.
    rows = torch.arange(len(input_ids), device=input_ids.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    tokens = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logprobs = torch.zeros_like(tokens, dtype=torch.float32)
    # With dropout, the samples would be those of another policy.
    # Packing costs the time of two tokens, and the weights' memory.
    packed = packed_linears(model) if max_new_tokens > 4 else contextlib.nullcontext()
    with dropout_off(model), packed:
        for t in range(max_new_tokens):
            output = model(
                input_ids=next_ids,
                attention_mask=attention_mask.long() if t else prompt_mask,
                position_ids=next_positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            # Such a model would forget the prompt, and nothing would show it.
            if getattr(output, "past_key_values", None) is not cache:
                raise ValueError(
                    f"got a {model.config.model_type} model, which fills no key-value cache: "
                    "expected a transformer"
                )
            logits, positions = output.logits[:, -1], next_positions[:, -1:]
            if t == 0:  # from the different prompts to the rows of the batch
                cache.reorder_cache(prompt_of)
                logits, positions = logits[prompt_of], positions[prompt_of]
            distribution = (logits.float() / temperature).log_softmax(1)  # (rows, V)
            drawn = draw(distribution, uniforms[rows.to(uniforms.device), t, None])  # (rows, 1)
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
                first = (next_ids, next_positions, running)  # the tokens just drawn
                columns = (uniforms, tokens, mask, logprobs)  # (B, max_new_tokens) each
                decode_fixed(
                    model, cache, attention_mask, *first, *columns, temperature=temperature, eos=eos
                )
                break
            new_column = torch.ones_like(attention_mask[:, :1])
            attention_mask = torch.cat([attention_mask, new_column], dim=1)
            # Rows that have ended leave. A few stay as dead weight: copying the cache costs, too.
            if left <= 0.75 * len(rows):
                rows, next_ids, next_positions, attention_mask = (
                    x[running] for x in (rows, next_ids, next_positions, attention_mask)
                )
                cache.reorder_cache(running.nonzero().squeeze(1))
                running = running[running]
    length = int(mask.any(0).sum())  # of the longest completion
    return Rollout(tokens[:, :length], mask[:, :length], logprobs[:, :length])


def draw_uniforms(
    rows: int, columns: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """(rows, columns) float64 in [0, 1): all the chance that `generate` needs.

    They and the generator lie where the device's float64 numbers are kept.
    """
    device = float64_device(device)
    return torch.rand(rows, columns, dtype=torch.double, device=device, generator=generator)


def completion_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Logits that predict each token of sampled completions, aligned, in one pass with gradients.

    The result's [:, t] is the distribution that tokens[:, t] was drawn from: the logits one column
    earlier. So the first comes from the last column of the prompt, whose width (not length) is the
    same for all rows.

    Args:
        model: a causal language model; dropout is off, and its mode is put back.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T) of a Rollout.
    Returns:
        (B, T, V) in the model's dtype. Positions outside the mask hold anything.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[3, 4, 5, 6]])
    >>> ones = torch.ones(1, 2)
    >>> logits = completion_logits(model, ids[:, :2], ones, ids[:, 2:], ones)
    >>> torch.equal(logits, model(ids).logits[:, 1:3])
    True
    """
    inputs = _inputs(input_ids, attention_mask, tokens, mask)
    with dropout_off(model):
        logits = model(**inputs, logits_to_keep=tokens.shape[1] + 1).logits  # (B, T + 1, V)
    return logits[:, -tokens.shape[1] - 1 : -1]  # some models keep all of them


def _inputs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor | bool]:
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
    """Log-probs of sampled completions in one pass with gradients, without full logits.

        log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)

    Equals `token_logprobs(completion_logits(...), tokens, temperature)` inside the mask. Columns
    that are padding in every row are left out. The vocabulary is multiplied out for the tokens
    inside the mask alone, a chunk at a time. `sequence_logprobs` is the plain version.

    Args:
        model: a causal language model; dropout is off, and its mode is put back.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T) of a Rollout.
        temperature: tau > 0, the one that the tokens were sampled at.
        known_grad: (B, T) or None, see `token_logprobs_from_hidden`.
    Returns:
        (B, T) float32, nats, 0 outside the mask.
    """
    mask = mask.bool()
    prompt_columns, width = attention_mask.bool().any(0), int(mask.any(0).sum())
    prompts = (input_ids[:, prompt_columns], attention_mask[:, prompt_columns])
    real = mask[:, :width]
    real_tokens = tokens[:, :width].masked_fill(~real, 0)
    if has_plain_head(model):
        with dropout_off(model):
            inputs = _inputs(*prompts, real_tokens, real)
            hidden = model.base_model(**inputs).last_hidden_state[:, -width - 1 : -1]  # (B, T, D)
        logprobs = token_logprobs_from_hidden(
            hidden[real][None],
            model.get_output_embeddings().weight,
            tokens[mask][None],
            temperature,
            known_grad=None if known_grad is None else known_grad[mask][None],
        )
    else:
        logits = completion_logits(model, *prompts, real_tokens, real)
        logprobs = token_logprobs(logits, real_tokens, temperature)[real]
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
    """`completion_logprobs` under a frozen model, without a graph.

    At most `micro_batch_size` rows of like length go through the model at a time.
    """
    logprobs = torch.zeros_like(mask, dtype=torch.float32)
    lengths = (attention_mask.sum(1) + mask.sum(1)).tolist()
    for part in length_parts(lengths, micro_batch_size, tokens_per_pass(model)):
        rows = (tensor[part] for tensor in (input_ids, attention_mask, tokens, mask))
        logprobs[part] = completion_logprobs(model, *rows, temperature)
    return logprobs


_PLAIN_HEADS: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are hidden states times the LM head's weight and nothing else.

    Some models scale their logits, squash them or add a bias: those take the way over full logits.
    It is tried out once for each model.
    """
    if model not in _PLAIN_HEADS:
        head = model.get_output_embeddings()
        ids = torch.tensor([[0, 1, 1]], device=model.device)
        plain = isinstance(head, torch.nn.Linear) and head.bias is None
        if plain := plain and model.base_model is not model:
            # The head's logits are replaced: a softcap, say, does nothing to small ones.
            large = torch.linspace(-1e3, 1e3, len(head.weight), device=ids.device).to(head.weight)
            read = []
            hook = head.register_forward_hook(
                lambda _, args, logits: read.append(args[0]) or large.expand_as(logits)
            )
            with hook, dropout_off(model), torch.autocast(model.device.type, enabled=False):
                hidden = model.base_model(input_ids=ids).last_hidden_state
                logits = model(input_ids=ids).logits
            plain = torch.equal(logits, large.expand_as(logits).to(logits))
            plain = plain and not (read[-1] - hidden).abs().max() > 1e-3 * hidden.abs().max()
        if not plain:
            print(
                f"  note: {model.config.model_type} does more to its logits than the LM head's "
                "product: log-probs take the way over full logits, which needs more memory"
            )
        _PLAIN_HEADS[model] = plain
    return _PLAIN_HEADS[model]
