"""Rows of mixed lengths without padding, two ways: parts of like length, or all in one row with positions that start again.

    python tests/benchmarks/packing.py --shape S

Forward and backward of 16 texts of log-normal lengths (mean about 120 tokens, at most 512) under a Llama. "parts" is what the
loops do (batches.length_parts); "packed" is one row, and transformers keeps texts apart by their position ids.
"""

import random
import time

from side_by_side import compare, make_model, peak, report

TEXTS, REPEATS = 16, 5


def run(shape: str, passes) -> None:
    """Time the gradient of the sum over all texts' last hidden states, as `passes(model, texts)` yields them."""
    import torch

    model, tokenizer = make_model(shape)
    rng = random.Random(0)
    lengths = [min(512, max(8, round(rng.lognormvariate(4.6, 0.6)))) for _ in range(TEXTS)]
    texts = [torch.randint(4, len(tokenizer), (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
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
    report(seconds, peak() - before, tokens=sum(lengths), value=round(total, 2), gradient=round(gradient, 2))


def padded(model, texts, parts=None):
    """Each part as a batch of padded rows; one part of all texts unless told."""
    import torch

    from minalign.batches import pad

    for part in parts or [range(len(texts))]:
        ids, mask = pad([texts[i].tolist() for i in part], "right")
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        yield hidden[torch.arange(len(ids)), mask.sum(1) - 1]


def in_parts(model, texts):
    """Parts of like length, as many tokens a pass as stay in the cache."""
    from minalign.batches import length_parts, tokens_a_pass

    yield from padded(model, texts, length_parts([len(text) for text in texts], len(texts), tokens_a_pass(model)))


def packed(model, texts):
    """One row."""
    import torch

    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    hidden = model(input_ids=torch.cat(texts)[None], position_ids=positions, use_cache=False).last_hidden_state[0]
    yield hidden[torch.tensor([len(text) for text in texts]).cumsum(0) - 1]


if __name__ == "__main__":
    compare(__file__, __doc__, {
        "parts": lambda shape: run(shape, in_parts),
        "packed": lambda shape: run(shape, packed),
        "padded": lambda shape: run(shape, padded),
    }, first="parts")  # fmt: skip
