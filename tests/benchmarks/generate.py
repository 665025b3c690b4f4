"""Sampling 16 completions of 64 tokens from prompts of 32.

rollout.generate against model.generate of transformers.

    python tests/benchmarks/generate.py --shape M

"early" lets rows end: an eighth of the vocabulary are end tokens, so a completion has 8 tokens on
average.
"""

import time

from side_by_side import compare, forward_flops, make_model, peak, report

ROWS, PROMPT, NEW, REPEATS = 16, 32, 64, 4


def run(shape: str, sample, early: bool) -> None:
    """Time `sample(model, ids, mask, ends)`, which returns how many tokens it drew."""
    import torch

    model, _ = make_model(shape)
    vocabulary = model.config.vocab_size
    ids = torch.randint(4, vocabulary, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    ends = list(range(4, 4 + vocabulary // 8)) if early else [2]
    before, seconds, tokens = peak(), [], []
    model.eval()
    for seed in range(REPEATS):
        torch.manual_seed(seed)
        began = time.monotonic()
        tokens.append(sample(model, ids, torch.ones_like(ids), ends))
        seconds.append(time.monotonic() - began)
    report(seconds, peak() - before, tokens=tokens[1:])


def ours(model, ids, mask, ends) -> int:
    """rollout.generate."""
    from minalign.rollout import generate

    how = dict(max_new_tokens=NEW, temperature=1.0, eos_token_ids=ends, pad_token_id=0)
    return int(generate(model, ids, mask, **how).mask.sum())


def theirs(model, ids, mask, ends) -> int:
    """model.generate, sampling from the full softmax."""
    import torch

    from minalign.logprobs import completion_mask

    how = dict(do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
    return int(completion_mask(out[:, PROMPT:], ends).sum())


if __name__ == "__main__":
    sides = {
        "ours": lambda shape: run(shape, ours, False),
        "HF generate": lambda shape: run(shape, theirs, False),
        "ours, early": lambda shape: run(shape, ours, True),
        "HF generate, early": lambda shape: run(shape, theirs, True),
    }

    def flops(shape):
        return forward_flops(shape, ROWS * (PROMPT + NEW), ROWS * NEW)

    compare(__file__, __doc__, sides, flops=flops)
