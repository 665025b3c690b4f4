"""`generate`, the fast way of `rollout.sample`.

Keys and values are cached, prompts that are equal share their pass, and rows that have ended leave.
Tests hold it to its plain twin.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .caches import OwnCache, TransformersCache
from .lora import adapters_in_place
from .padding import context_of
from .precision import dropout_off, float64_device
from .proof import can_decode

# (ids of a prompt, of its completion) -> how many of these complete a text that ends it, and the
# ids of what is before that text; None where there is none: see data.stops.
Stop = Callable[[list[int], list[int]], tuple[int, list[int]] | None]


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
    stop: Stop | None = None,
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
        stop: asked every 16 tokens whether a row may end, which saves time: it goes on up to 15
            tokens too far, which `completions_of` cuts.
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
    asked = [row[real].tolist() for row, real in zip(input_ids, attention_mask)] if stop else []
    ends = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    eos = torch.tensor(ends, device=input_ids.device)

    # Samples of one prompt share its pass. `prompts` are the different ones, and `prompt_of` (B,)
    # says which is whose.
    used = attention_mask.any(0)  # columns of padding alone would count as positions
    real_ids = input_ids.masked_fill(~attention_mask, 0)  # a pad id may lie outside the embedding
    ids_and_mask = torch.cat([real_ids[:, used], attention_mask[:, used].long()], dim=1)
    prompts, prompt_of = ids_and_mask.unique(dim=0, return_inverse=True)
    ids, prompt_mask = prompts.chunk(2, dim=1)
    B, shape, like = len(input_ids), (len(input_ids), max_new_tokens), {"device": input_ids.device}
    rows = Rows(
        number=torch.arange(B, **like),
        uniforms=uniforms,
        tokens=torch.zeros(shape, dtype=torch.long, **like),
        mask=torch.zeros(shape, dtype=torch.bool, **like),
        logprobs=torch.zeros(shape, **like),
        ids=torch.zeros(B, 1, dtype=torch.long, **like),
        running=torch.ones(B, 1, dtype=torch.bool, **like),
    )
    result = Rollout(*(torch.empty_like(x) for x in (rows.tokens, rows.mask, rows.logprobs)))
    t = torch.zeros(1, dtype=torch.long, **like)  # column of the next token

    def draw_next(logits: torch.Tensor) -> None:
        """Draw a token of each row into column t; nothing goes to the host."""
        uniform = rows.uniforms.index_select(1, t.to(rows.uniforms.device))
        drawn, logprobs = draw(logits, uniform, temperature)  # (b, 1) each
        rows.tokens.index_copy_(1, t, drawn)
        rows.logprobs.index_copy_(1, t, logprobs)
        rows.mask.index_copy_(1, t, rows.running)
        rows.running.logical_and_((drawn != eos).all(1, keepdim=True))
        rows.ids.copy_(drawn)
        t.add_(1)

    def step() -> None:
        draw_next(cache.next(rows.ids))

    # With dropout, the samples would be those of another policy.
    with dropout_off(model), adapters_in_place(model) as whole:
        if can_decode(whole):  # packing weights costs the time of two tokens
            cache = OwnCache(
                whole, ids, prompt_mask.bool(), max_new_tokens, pack=max_new_tokens > 4
            )
        else:
            cache = TransformersCache(whole, ids, prompt_mask.bool())
        cache.keep(prompt_of)
        draw_next(cache.logits[prompt_of])
        for done in range(1, max_new_tokens):
            if stop and done % 16 == 0:
                for i in rows.running.nonzero()[:, 0].tolist():
                    found = stop(asked[int(rows.number[i])], rows.tokens[i, :done].tolist())
                    rows.running[i] = found is None
            if cache.fixed:
                # A thousand small kernels become one launch. Rows that have ended stay: a step of
                # fewer rows takes as long. Asking whether all have ended is to wait for the GPU.
                if done % 16 == 0 and not rows.running.any():
                    break
                if done == 2 and t.is_cuda:  # the step before was the warm-up
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):  # runs nothing
                        step()
                    step = graph.replay
            else:
                left = int(rows.running.sum())
                if not left:
                    break
                # Rows that have ended leave. A few stay as dead weight: copying costs, too.
                if left <= 0.75 * len(rows.ids):
                    rows.put_into(result)
                    going_on = rows.running.nonzero()[:, 0]
                    rows = Rows(*(x[going_on.to(x.device)] for x in rows))
                    cache.keep(going_on)
            step()
    rows.put_into(result)
    tokens, mask, logprobs = (x[:, : int(result.mask.any(0).sum())] for x in result)
    return Rollout(tokens.masked_fill(~mask, pad_token_id), mask, logprobs.masked_fill(~mask, 0.0))


def completions_of(
    rollout: Rollout,
    prompts: Sequence[list[int]],
    eos_token_ids: list[int],
    stop: Stop | None = None,
) -> tuple[Rollout, list[list[int]], torch.Tensor]:
    """What was sampled, each completion up to its end: an end token, or a text that `stop` finds.

    Tokens up to the one that completes the text are sampled ones like all others, as an end token
    is: they count in the mask.

    Args:
        prompts: B lists of ids.
        eos_token_ids: all end tokens.
    Returns:
        The rollout, cut where a text ends a completion.
        B lists of ids without end token or text.
        ended: (B,) bool, whether a completion ended by itself.
    """
    tokens, mask, logprobs = rollout
    completions, ended = split_end(tokens, mask, eos_token_ids)
    if stop is None:
        return rollout, completions, ended
    mask = mask.clone()
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        if found := stop(prompt, completion):
            count, completions[i] = found
            mask[i, count:] = False
            ended[i] = True
    width = int(mask.any(0).sum())
    cut = Rollout(tokens.masked_fill(~mask, 0), mask, logprobs.masked_fill(~mask, 0.0))
    return Rollout(*(part[:, :width] for part in cut)), completions, ended


def split_end(
    tokens: torch.Tensor, mask: torch.Tensor, eos_token_ids: list[int]
) -> tuple[list[list[int]], torch.Tensor]:
    """Completions of a Rollout as lists of ids without end tokens, and which of them have one.

    Args:
        tokens, mask: (B, T) of a Rollout.
        eos_token_ids: all end tokens.
    Returns:
        completions: B lists of ids.
        ended: (B,) bool, whether a completion ended by itself.

    >>> mask = torch.tensor([[True, True, False], [True, True, True]])
    >>> split_end(torch.tensor([[5, 2, 0], [5, 6, 7]]), mask, [2])
    ([[5], [5, 6, 7]], tensor([ True, False]))
    """
    is_end = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)) & mask
    lengths = (mask & ~is_end).sum(1).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths)], is_end.any(1)


class Rows(NamedTuple):
    """The rows of a batch that have not left: b of B rows.

    number: (b,) long, which they are.
    uniforms, tokens, mask, logprobs: (b, max_new_tokens), as in `generate`.
    ids: (b, 1) long, the tokens drawn last.
    running: (b, 1) bool, which have not ended.
    """

    number: torch.Tensor
    uniforms: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    ids: torch.Tensor
    running: torch.Tensor

    def put_into(self, result: Rollout) -> None:
        """Copy what was drawn to the rows of the whole batch."""
        for whole, part in zip(result, (self.tokens, self.mask, self.logprobs)):
            whole[self.number] = part


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One id per row, by one uniform number and the distribution function; and its log-prob.

        y = the first v with P(id <= v) > u,  P = softmax(z / tau)

    First the block of 128 ids is found, then the id within it. Both sums are float64, since
    rounding would otherwise move the probability of rare ids; over the whole vocabulary they would
    cost a quarter of a small model's step. Not torch.multinomial, which draws a number for each id.

    Args:
        logits: (N, V) float32.
        uniform: (N, 1) float64 in [0, 1); where it lies, float64 is computed.
        temperature: tau > 0.
    Returns:
        ids: (N, 1) long.
        logprobs: (N, 1) float32, nats.
    """
    (N, V), size = logits.shape, 128
    top = logits.amax(1, keepdim=True)
    weights = (logits - top).div_(temperature).exp_()
    if V % size:
        weights = torch.nn.functional.pad(weights, (0, -V % size))
    weights = weights.view(N, -1, size)
    sums = weights.sum(2).to(uniform.device).double()
    cdf = sums.cumsum(1)  # (N, blocks)
    goal = uniform * cdf[:, -1:]
    block = torch.searchsorted(cdf, goal, right=True).clamp(max=cdf.shape[1] - 1)
    chosen = weights.take_along_dim(block[:, :, None].to(logits.device), 1)[:, 0]
    inner = chosen.to(uniform.device).double().cumsum(1)  # (N, 128)
    # What is left within the block; rounding must not take it out of there.
    left = (goal - (cdf - sums).gather(1, block)).clamp(min=0)
    left = torch.minimum(left, (1 - 2**-53) * inner[:, -1:])
    place = torch.searchsorted(inner, left, right=True)
    drawn = (block * size + place).clamp(max=V - 1).to(logits.device)
    total = cdf[:, -1:].log().float().to(logits.device)
    return drawn, (logits.gather(1, drawn) - top) / temperature - total


def draw_uniforms(
    rows: int, columns: int, device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """(rows, columns) float64 in [0, 1): all the chance that `generate` needs.

    They and the generator lie where the device's float64 numbers are kept.
    """
    device = float64_device(device)
    return torch.rand(rows, columns, dtype=torch.double, device=device, generator=generator)
