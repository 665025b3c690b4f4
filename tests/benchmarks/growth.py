"""How a policy step grows with the number of completions and with their length.

Seconds and memory per token.

    python tests/benchmarks/growth.py --shape S

"rows x4" is a batch four times as large, "length x4" has prompts and completions four times as
long. Attention's part grows with the square of the length, everything else with the tokens.
"""

import functools

import policy_step
from side_by_side import compare


def grown(shape: str, rows: int = 1, length: int = 1) -> None:
    """policy_step's own side at a multiple of its size."""
    policy_step.ROWS *= rows
    policy_step.PROMPT *= length
    policy_step.NEW *= length
    policy_step.STEPS = 3
    policy_step.ours(shape)


if __name__ == "__main__":
    sizes = {f"{what} x{n}": {what: n} for what in ("rows", "length") for n in (2, 4, 8)}
    sides = {name: functools.partial(grown, **size) for name, size in sizes.items()}
    compare(__file__, __doc__, {"x1": grown} | sides, first="x1")
