"""Rows of mixed lengths without padding, two ways.

Parts of like length, or all in one row with positions that start again.

    python tests/benchmarks/packing.py --shape S

Forward and backward of 16 texts of log-normal lengths (mean about 120 tokens, at most 512) under a
Llama. "parts" is what the loops do (models/padding.py: length_parts). "packed" is one row, and
transformers keeps texts apart by their position ids.
"""

import random
import time

from side_by_side import compare, make_model, peak, report

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
        texts.append(torch.randint(4, len(tokenizer), (length,), generator=draws))
    before, seconds = peak(), []
    for _ in range(REPEATS):
        model.zero_grad()
        began = time.monotonic()
        total = 0.0
        for last in passes(model.model, texts):
            value = last.tanh().sum()
            value.backward()
            total += value.item()
        seconds.append(time.monotonic() - began)
    gradient = sum(p.grad.square().sum().item() for p in model.model.parameters()) ** 0.5
    facts = dict(tokens=sum(lengths), value=round(total, 2), gradient=round(gradient, 2))
    report(seconds, peak() - before, **facts)


def padded(model, texts, parts=None):
    """Each part as a batch of padded rows; one part of all texts unless told."""
    import torch

    from minalign.models.padding import pad

    for part in parts or [range(len(texts))]:
        ids, mask = pad([texts[i].tolist() for i in part], "right")
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        yield hidden[torch.arange(len(ids)), mask.sum(1) - 1]


def in_parts(model, texts):
    """Parts of like length, as many tokens per pass as stay in the cache."""
    from minalign.models.padding import length_parts, tokens_per_pass

    lengths = [len(text) for text in texts]
    yield from padded(model, texts, length_parts(lengths, len(texts), tokens_per_pass(model)))


def packed(model, texts):
    """One row."""
    import torch

    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    output = model(input_ids=row, position_ids=positions, use_cache=False)
    hidden = output.last_hidden_state[0]
    yield hidden[torch.tensor([len(text) for text in texts]).cumsum(0) - 1]


if __name__ == "__main__":
    sides = {
        "parts": lambda shape: run(shape, in_parts),
        "packed": lambda shape: run(shape, packed),
        "padded": lambda shape: run(shape, padded),
    }
    compare(__file__, __doc__, sides, first="parts")
