"""Sampling 16 completions of 64 tokens from prompts of 32.

rollout.generate against model.generate of transformers.

    python tests/benchmarks/generate.py --shape M --rounds 2
    python tests/benchmarks/generate.py --shape L --device cuda

"early" lets rows end: an eighth of the vocabulary are end tokens, so a completion has 8 tokens on
average. In "bfloat16" ours rounds the weights of a float32 model each time, as a training step
does, and transformers has a model whose weights are rounded already. "prefill" is the time of one
token per completion, and "token" that of each further one, in milliseconds.
"""

import functools
import statistics

from side_by_side import clock, compare, device, make_model, peak, report, sampling_floor

ROWS, PROMPT, NEW, REPEATS = 16, 32, 64, 4


def run(shape: str, sample, early: bool = False, dtype: str = "float32") -> None:
    """Time `sample(model, ids, mask, ends, new)`, which returns how many tokens it drew."""
    import torch

    from minalign.models.precision import autocast, round_

    model, _ = make_model(shape)
    model.eval().requires_grad_(False)
    if sample is theirs:
        model, dtype = round_(model, getattr(torch, dtype)), "float32"
    vocabulary = model.config.vocab_size
    ids = torch.randint(4, vocabulary, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device())
    ends = list(range(4, 4 + vocabulary // 8)) if early else [2]
    before, seconds, tokens = peak(), {NEW: [], 1: []}, []
    for new in seconds:
        for seed in range(REPEATS):
            torch.manual_seed(seed)
            began = clock()
            with autocast(device(), getattr(torch, dtype)):
                drawn = sample(model, ids, torch.ones_like(ids), ends, new)
            seconds[new].append(clock() - began)
            tokens += [drawn] if new == NEW and seed else []
    prefill, whole = (statistics.median(seconds[new][1:]) for new in (1, NEW))
    facts = {"tokens": tokens, "prefill": round(1e3 * prefill, 2)}
    if not early:
        facts["token"] = round(1e3 * (whole - prefill) / (NEW - 1), 3)
    report(seconds[NEW], peak() - before, **facts)


def ours(model, ids, mask, ends, new) -> int:
    """rollout.generate."""
    from minalign.rollout import generate

    how = dict(max_new_tokens=new, temperature=1.0, eos_token_ids=ends, pad_token_id=0)
    return int(generate(model, ids, mask, **how).mask.sum())


def theirs(model, ids, mask, ends, new) -> int:
    """model.generate, sampling from the full softmax."""
    import torch

    from minalign.logprobs import completion_mask

    how = dict(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=ends, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
    return int(completion_mask(out[:, PROMPT:], ends).sum())


def floor(shape: str, work: str) -> list:
    """Nothing for rows that end by chance."""
    return [] if "early" in work else sampling_floor(shape, work, ROWS, ROWS, PROMPT, NEW)


WORKS = {
    "": {},
    "early": {"early": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, early": {"early": True, "dtype": "bfloat16"},
}
SIDES = {
    f"{work}: {who}".removeprefix(": "): functools.partial(run, sample=sample, **how)
    for work, how in WORKS.items()
    for who, sample in (("ours", ours), ("HF generate", theirs))
}

if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, floor, devices=("cpu", "cuda"))
