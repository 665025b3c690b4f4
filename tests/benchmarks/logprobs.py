"""Token log-probs with backward, 8 x 512 tokens.

Full logits against token_logprobs_from_hidden, and the products alone.

    python tests/benchmarks/logprobs.py --shape M           width 576, vocabulary 49152

"ours" knows the gradient beforehand, as REINFORCE does; "gradient not known" is what other losses
get. "products" is what no way can avoid: hidden @ weight.T once, and the two products of the
backward pass.
"""

import functools

from side_by_side import SHAPES, clock, compare, device, peak, report

ROWS, TOKENS, REPEATS = 8, 512, 3


def run(shape: str, method) -> None:
    """Time `method(hidden, weight, tokens, grad)`.

    It returns the log-probs after their backward pass.
    """
    import torch

    torch.manual_seed(0)
    width, vocabulary = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    with device():
        hidden = torch.randn(ROWS, TOKENS, width, requires_grad=True)
        weight = (0.05 * torch.randn(vocabulary, width)).requires_grad_()
        tokens, grad = torch.randint(0, vocabulary, (ROWS, TOKENS)), torch.randn(ROWS, TOKENS)
    before, seconds = peak(), []
    for _ in range(REPEATS):
        hidden.grad = weight.grad = None
        began = clock()
        logprobs = method(hidden, weight, tokens, grad)
        seconds.append(clock() - began)
    facts = {}
    if logprobs is not None:
        facts["loss"] = round((logprobs.detach() * grad).sum().item(), 2)
        facts["gradient"] = round(weight.grad.norm().item(), 2)
    report(seconds, peak() - before, **facts)


def full(hidden, weight, tokens, grad):
    """token_logprobs of all logits."""
    from minalign.logprobs import token_logprobs

    logprobs = token_logprobs(hidden @ weight.T, tokens)
    logprobs.backward(grad)
    return logprobs


def chunked(hidden, weight, tokens, grad, known=False):
    """token_logprobs_from_hidden."""
    from minalign.logprobs import token_logprobs_from_hidden

    known_grad = grad if known else None
    logprobs = token_logprobs_from_hidden(hidden, weight, tokens, known_grad=known_grad)
    logprobs.backward(grad)
    return logprobs


def products(hidden, weight, tokens, grad):
    """Three products, in chunks, and nothing else."""
    import torch

    with torch.no_grad():
        for h in hidden.flatten(0, 1).split(1024):
            logits = h @ weight.T
            torch.matmul(logits, weight)
            torch.matmul(logits.T, h)


SIDES = {
    "ours": functools.partial(run, method=functools.partial(chunked, known=True)),
    "full logits": functools.partial(run, method=full),
    "products": functools.partial(run, method=products),
    "gradient not known: ours": functools.partial(run, method=chunked),
    "gradient not known: full logits": functools.partial(run, method=full),
}


def floor(shape: str, work: str) -> list:
    """The three products, as operations."""
    return [(6 * ROWS * TOKENS * SHAPES[shape]["hidden_size"] * SHAPES[shape]["vocab_size"], 0)]


if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, floor, shape="M", devices=("cpu", "cuda"))
