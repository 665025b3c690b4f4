"""The rules of RewardBench, RewardBench 2 and RM-Bench on tables worked by hand."""

import math
import random

import numpy
import pytest
import torch

from minalign.measuring.benchmarks import (
    REWARD_BENCH,
    RM_BENCH,
    best_of_accuracy,
    by_difficulty,
    section_of,
    ties_score,
)
from minalign.measuring.measures import bootstrap_interval, resampled_means


@pytest.mark.parametrize(
    ("right", "wrong", "expected", "strict"),
    [
        ([2.0], [1.0], 1, 1),
        ([1.0], [2.0], 0, 0),
        ([1.0], [1.0], 1 / 2, 0),
        ([3.0], [1.0, 2.0, 0.0], 1, 1),
        ([3.0], [3.0, 2.0, 3.0], 1 / 3, 0),
        ([3.0], [3.0, 4.0, 3.0], 0, 0),
        ([3.0, 3.0], [3.0, 1.0], 2 / 3, 0),
        ([-1.0, 5.0], [4.0], 1, 1),
        ([0.0], [-0.0], 1 / 2, 0),
    ],
)
def test_best_of(right, wrong, expected, strict):
    assert best_of_accuracy(right, wrong) == pytest.approx(expected)
    assert best_of_accuracy(right, wrong, strict=True) == strict


def test_rm_bench_compares_every_style_with_every_style():
    # rows: right concise 2, detailed 4, markdown 6; columns: wrong 1, 4, 5
    #   1 0 0
    #   1 0 0   (4 > 4 is no win)
    #   1 1 1
    assert by_difficulty([2.0, 4.0, 6.0], [1.0, 4.0, 5.0]) == pytest.approx(
        {"accuracy": 5 / 9, "easy": 3 / 3, "normal": 2 / 3, "hard": 0}
    )
    # a reward of length alone: all easy ones right, all hard ones wrong
    length = by_difficulty([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert length == pytest.approx({"accuracy": 1 / 3, "easy": 1, "normal": 0, "hard": 0})


def official(ref, tied):
    """The authors' formula, over all prompts at once, in numpy."""
    right, wrong = 0, 1
    gap = [numpy.array([min(x[right]) - max(x[wrong]) for x in side]) for side in (ref, tied)]
    spread = numpy.array([max(x[right]) - min(x[right]) for x in tied])
    with numpy.errstate(divide="ignore", invalid="ignore"):
        tanh = numpy.nan_to_num(numpy.tanh(numpy.minimum(*gap) / spread - 1), nan=0.0)
    return (
        0.3 * (gap[1] > 0).mean()
        + 0.3 * (gap[0] > 0).mean()
        + 0.2 * (gap[1] > spread).mean()
        + 0.2 * (numpy.minimum(*gap) > spread).mean()
        + 0.01 * tanh.mean()
    )


def test_ties_by_hand():
    # gap_ref 2 - 1 = 1, gap_tied 4 - 1 = 3, spread 6 - 4 = 2: all but the hard margin
    score = ties_score(([2.0], [1.0, 0.0]), ([4.0, 6.0, 5.0], [1.0, 0.0]))
    assert score == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * math.tanh(1 / 2 - 1))
    # gap_ref -1, gap_tied 1, spread 0
    score = ties_score(([0.0], [1.0]), ([2.0, 2.0], [1.0]))
    assert score == pytest.approx(0.3 + 0.2 - 0.01)
    assert ties_score(([1.0], [1.0]), ([1.0, 1.0], [1.0])) == 0  # 0 / 0 counts 0
    assert ties_score(([9.0], [1.0]), ([2.0, 2.0], [1.0])) == pytest.approx(1.01)


def test_the_mean_of_ties_is_the_official_score():
    rng = random.Random(0)

    def texts(count):
        return [float(rng.randint(0, 3)) for _ in range(count)]  # many are equal

    for _ in range(20):
        ref = [(texts(1), texts(3)) for _ in range(30)]
        tied = [(texts(rng.randint(1, 4)), texts(3)) for _ in range(30)]
        mean = sum(map(ties_score, ref, tied)) / 30
        assert mean == pytest.approx(official(ref, tied), abs=1e-12)


def test_every_subset_has_its_section():
    subsets = {  # as the authors' table has them
        "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
        "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
        "llmbar-adver-GPTOut llmbar-adver-manual",
        "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse "
        "xstest-should-respond donotanswer",
        "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
    }
    for section, names in subsets.items():
        assert {section_of(name, REWARD_BENCH) for name in names.split()} == {section}
    assert section_of("helpful", REWARD_BENCH) == ""
    assert section_of("safety-response", RM_BENCH) == section_of("safety-refuse", RM_BENCH)


def test_rows_of_one_prompt_are_drawn_together():
    values = [0.0, 1.0, 1.0, 0.0, 1.0] * 20
    alone = resampled_means(values, range(100), seed=3)
    ends = alone.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert bootstrap_interval(values, seed=3) == tuple(ends)
    # each value ten times for one prompt: as wide as the tenth of them
    many = resampled_means(
        [v for v in values for _ in range(10)], [i // 10 for i in range(1000)], 3
    )
    assert torch.allclose(many, alone)
    # prompts of different sizes: a mean over rows, not over prompts
    found = resampled_means([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], seed=0)
    assert {round(x, 6) for x in found.tolist()} == {0.0, 0.75, 1.0}
