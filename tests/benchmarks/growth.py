"""How a policy step grows with the number of completions, their length and the vocabulary.

    python tests/benchmarks/growth.py --shape S

"rows x4" is a batch four times as large, "length x4" has prompts and completions four times as
long, "vocabulary x4" has four times as many tokens. Attention's part grows with the square of the
length, the LM head's and the drawing's with the vocabulary, everything else with the tokens.
"""

import functools

import policy_step
from side_by_side import SHAPES, compare


def grown(shape: str, rows: int = 1, length: int = 1, vocabulary: int = 1) -> None:
    """policy_step's own side at a multiple of its size."""
    SHAPES[shape]["vocab_size"] *= vocabulary
    policy_step.ROWS *= rows
    policy_step.PROMPT *= length
    policy_step.NEW *= length
    policy_step.STEPS = 3
    policy_step.ours(shape)


SIZES = {"rows": (2, 4, 8), "length": (2, 4, 8), "vocabulary": (4, 16)}
SIDES = {"x1": grown} | {
    f"{what} x{n}": functools.partial(grown, **{what: n}) for what in SIZES for n in SIZES[what]
}

if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, devices=("cpu", "cuda"))
