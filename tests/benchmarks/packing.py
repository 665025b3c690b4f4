"""Rows of mixed lengths without padding, two ways.

Parts of like length, or all in one row with positions that start again.

    python tests/benchmarks/packing.py --shape S

Forward and backward of 16 texts of log-normal lengths (mean about 120 tokens, at most 512) under a
Llama. "parts" is what the loops do (models/padding.py: length_parts). "packed" is one row, and
transformers keeps texts apart by their position ids.
"""

import functools
import random

from side_by_side import clock, compare, device, make_model, peak, report

TEXTS, REPEATS = 16, 5


def run(shape: str, passes) -> None:
    """Time the gradient of the sum over all texts' last hidden states.

    `passes(model, texts)` yields them.
    """
    import torch

    model, tokenizer = make_model(shape)
    rng = random.Random(0)
    lengths = [min(512, max(8, round(rng.lognormvariate(4.6, 0.6)))) for _ in range(TEXTS)]
    texts = []
    for length in lengths:
        draws = torch.Generator().manual_seed(length)
        text = torch.randint(4, len(tokenizer), (length,), generator=draws)
        texts.append(text.to(device()))
    before, seconds = peak(), []
    for _ in range(REPEATS):
        model.zero_grad()
        began = clock()
        total = 0.0
        for last in passes(model.model, texts):
            value = last.tanh().sum()
            value.backward()
            total += value.item()
        seconds.append(clock() - began)
    gradient = sum(p.grad.square().sum().item() for p in model.model.parameters()) ** 0.5
    facts = dict(tokens=sum(lengths), value=round(total, 2), gradient=round(gradient, 2))
    report(seconds, peak() - before, **facts)


def padded(model, texts, parts=None):
    """Each part as a batch of padded rows; one part of all texts unless told."""
    import torch

    from minalign.models.padding import pad

    for part in parts or [range(len(texts))]:
        ids, mask = pad([texts[i].tolist() for i in part], "right", device())
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        yield hidden[torch.arange(len(ids), device=device()), mask.sum(1) - 1]


def in_parts(model, texts):
    """Parts of like length, as many tokens per pass as stay in the cache."""
    from minalign.models.padding import length_parts, tokens_per_pass

    lengths = [len(text) for text in texts]
    yield from padded(model, texts, length_parts(lengths, len(texts), tokens_per_pass(model)))


def packed(model, texts):
    """One row."""
    import torch

    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text), device=device()) for text in texts])[None]
    output = model(input_ids=row, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state[0]
    yield hidden[torch.tensor([len(text) for text in texts]).cumsum(0) - 1]


SIDES = {
    "parts": functools.partial(run, passes=in_parts),
    "packed": functools.partial(run, passes=packed),
    "padded": functools.partial(run, passes=padded),
}

if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, devices=("cpu", "cuda"))
