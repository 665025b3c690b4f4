"""Measures of completions equal their closed forms, verdicts name a collapse, intervals hold."""

import random

import pytest
import torch

from minalign.measuring.measures import (
    bootstrap_interval,
    collapse_verdict,
    distinct_n,
    paired_bootstrap,
    repetition,
    self_similarity,
    win_scores,
)

HEALTHY = [[rng.randrange(500) for _ in range(20)] for rng in map(random.Random, range(40))]


def test_distinct_n_counts_over_all_completions():
    assert distinct_n([[1, 2, 3], [1, 2]], 1) == 3 / 5
    assert distinct_n([[1, 2, 3], [1, 2]], 2) == 2 / 3  # no bigram across the border
    assert distinct_n([[1, 2], [2, 1]], 2) == 1  # order counts
    assert distinct_n([[1], []], 2) == 0 and distinct_n([], 1) == 0


def test_repetition_is_the_share_of_tokens_that_complete_an_ngram_again():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 8  # 1234 a second time
    assert repetition([[1, 2, 1, 2, 1, 2]]) == 1 / 6  # 1212 a second time
    assert repetition([[1, 2, 3, 1, 2, 3]], n=2) == 2 / 6
    assert repetition([[1, 2, 3, 4, 5]] * 3) == 0  # alike, but none repeats itself
    assert repetition([[7] * 100, [1, 2, 3, 4, 5] * 20][:1]) == 96 / 100
    assert repetition([[7] * 8, [1] * 3, []]) == 4 / 11 and repetition([[], []]) == 0


def test_self_similarity_is_the_mean_overlap_of_bigrams():
    assert self_similarity([[1, 2, 3]] * 4) == 1 and self_similarity([[], []]) == 1
    assert self_similarity([[1], [2]]) == 0 and self_similarity([[1], []]) == 0
    # {b1, 12, 2e} and {b1, 13, 3e}: 1 of 5. {b1, 12, 2e} and {b2, 2e}: 1 of 4.
    # {b1, 13, 3e} and {b2, 2e}: 0.
    assert self_similarity([[1, 2], [1, 3], [2]]) == pytest.approx((1 / 5 + 1 / 4 + 0) / 3)
    # sets: {b1, 12, 21, 2e} and {b1, 12, 2e}
    assert self_similarity([[1, 2, 1, 2], [1, 2]]) == 3 / 4
    assert self_similarity([[1, 2]]) == 0 and self_similarity([]) == 0


def test_of_many_pairs_some_are_drawn():
    mixed = [[1, 2]] * 45 + [[3, 4]] * 15  # of 1770 pairs 990 + 105 are alike
    assert self_similarity(mixed) == pytest.approx(1095 / 1770)
    some = self_similarity(mixed, max_pairs=1000)
    assert some == self_similarity(mixed, max_pairs=1000) != self_similarity(mixed)
    assert some == pytest.approx(1095 / 1770, abs=0.05)


def test_a_healthy_set_has_no_sign_of_collapse():
    assert collapse_verdict(HEALTHY, 3.0) == "no sign of collapse"


SAME_TEXT = [HEALTHY[0]] * 38 + HEALTHY[1:3]
ONE_TOKEN = [c + [7] * 80 for c in HEALTHY]
THREE_TIMES = [(c * 3)[:60] for c in HEALTHY]
CERTAIN = "next tokens are all but certain (0.010 nats per token)"


@pytest.mark.parametrize(
    ("completions", "entropy", "expected"),
    [
        (SAME_TEXT, 3.0, "95% of the completions are the same text"),
        (SAME_TEXT, 3.0, "two completions share 90% of their bigrams on average"),
        ([[]] * 20 + HEALTHY[:20], 3.0, "50% of the completions are empty"),
        (ONE_TOKEN, 3.0, "the most frequent token makes 80% of all tokens"),
        (THREE_TIMES, 3.0, "62% of the tokens repeat a 4-gram of their own completion"),
        (HEALTHY, 0.01, CERTAIN),
    ],
)
def test_each_collapse_is_named(completions, entropy, expected):
    assert expected in collapse_verdict(completions, entropy).split("; ")
    shuffled = random.Random(0).sample(completions, len(completions))
    assert collapse_verdict(shuffled, entropy) == collapse_verdict(completions, entropy)


def test_one_sign_brings_no_other():
    assert collapse_verdict(HEALTHY, 0.01) == CERTAIN
    assert collapse_verdict(THREE_TIMES, 3.0).count(";") == 0


@pytest.mark.parametrize(
    ("completions", "entropy"),
    [
        ([HEALTHY[0]] * 8 + HEALTHY[8:], 3.0),  # one text in five
        # every third token is the same
        ([[x for pair in zip(c, c[1:]) for x in (*pair, 7)] for c in HEALTHY], 3.0),
        ([c + c[:8] for c in HEALTHY], 3.0),  # 5 of 28 tokens complete a 4-gram again
        ([list(range(8)) + c[:5] for c in HEALTHY], 3.0),  # all begin alike: 8 of 20 bigrams
        (HEALTHY, 0.06),
    ],
)
def test_a_little_is_no_collapse(completions, entropy):
    assert collapse_verdict(completions, entropy) == "no sign of collapse"


def test_few_completions_are_no_evidence():
    too_few = "too few completions to tell: 7, at least 8 are needed"
    assert collapse_verdict([[1, 2]] * 7, 0.0) == too_few
    assert "same text" in collapse_verdict([[1, 2]] * 8, 0.0)
    assert collapse_verdict([[]] * 8, 1.0).startswith("100% of the completions are empty")


def test_win_scores_count_ties_half():
    assert win_scores([0.0, 0.0, 0.0], [1.0, 0.0, -1.0]) == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError):
        win_scores([0.0], [1.0, 2.0])


def test_pairing_matters():
    """What the pairs share cancels.

    It does not where they are shuffled, or where each side is resampled for itself.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = 10 * torch.randn(100, generator=generator)
    first = (prompts + torch.randn(100, generator=generator)).tolist()
    second = (prompts + 0.5 + torch.randn(100, generator=generator)).tolist()
    mean, low, high = paired_bootstrap(first, second)
    assert mean == pytest.approx(sum(second) / 100 - sum(first) / 100)
    assert 0.4 < high - low < 0.7 and low < mean < high  # 2 x 1.96 x sqrt(2 / 100) = .55
    shuffled = paired_bootstrap(first, random.Random(0).sample(second, 100))
    assert shuffled.mean == pytest.approx(mean) and shuffled.high - shuffled.low > 4
    assert paired_bootstrap(second, first)[0] == pytest.approx(-mean)
    with pytest.raises(ValueError):
        paired_bootstrap(first, second[:-1])


def test_the_paired_interval_covers_the_difference_in_about_95_of_100():
    generator = torch.Generator().manual_seed(1)
    covered, null = 0, 0
    for seed in range(200):
        prompts = 5 * torch.randn(50, generator=generator)
        first = (prompts + torch.randn(50, generator=generator)).tolist()
        second = prompts + 0.3 + torch.randn(50, generator=generator)
        covered += paired_bootstrap(first, second.tolist(), seed, resamples=200).low < 0.3
        _, low, high = paired_bootstrap(first, (second - 0.3).tolist(), seed, resamples=200)
        null += low < 0 < high
    assert 0.88 < null / 200 < 0.985  # a policy against its like
    assert 0.94 < covered / 200  # one end alone: 97.5


def test_the_bootstrap_interval_covers_the_mean_in_about_95_of_100():
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, []
    for seed in range(200):
        values = (3 + torch.randn(50, generator=generator)).tolist()
        low, high = bootstrap_interval(values, seed, resamples=200)
        covered += low < 3 < high
        widths.append(high - low)
    assert 0.88 < covered / 200 < 0.985
    assert sum(widths) / 200 == pytest.approx(2 * 1.96 / 50**0.5, rel=0.1)
    values = torch.randn(50, generator=generator).tolist()
    intervals = [bootstrap_interval(values, seed, resamples=50) for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]
