"""Measures of completions (diversity, repetition, collapse), paired intervals, best of n.

Completions are token ids without their end tokens.
"""

import collections
import itertools
import math
import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

# Thresholds from which on a measure is a sign of collapse. They lie far outside what fluent text
# shows, so that nobody is alarmed for nothing.
FEWEST_COMPLETIONS = 8  # with fewer, two alike would already be a quarter of all
SAME_TEXT = 0.25  # share of the completions that are one text
# "the" and "," reach .05 in English, "the" .2 in the toy world.
SAME_TOKEN = 0.4  # share of all tokens that are one token
REPEATED = 0.3  # `repetition`
SIMILAR = 0.5  # `self_similarity`
SURE = 0.05  # entropy of the next-token distributions, nats per token


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of all completions; 0 where there is none.

        |{n-grams of all y_i}| / sum_i (number of n-grams of y_i)          (Li et al. 2016)

    It falls with the number of tokens: compare sets of like size only.

    Args:
        completions: token ids without their end tokens.

    >>> distinct_n([[1, 2, 1], [1, 2]], 1), distinct_n([[1, 2, 1, 2]], 2)
    (0.4, 0.6666666666666666)
    """
    grams = [gram for completion in completions for gram in _ngrams(completion, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(completions: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of all tokens that complete an n-gram which their own completion has had before.

        sum_i (number of n-grams of y_i - number of different n-grams of y_i) / sum_i |y_i|

    Returns:
        A number in [0, 1). 0 where no n-gram comes twice in one completion, whatever the other
        completions say. Near 1 for long loops.

    >>> repetition([[7, 7, 7, 7, 7, 7, 7, 7], [1, 2, 3, 4]])
    0.3333333333333333
    """
    repeats = sum(max(0, len(c) - n + 1) - len(set(_ngrams(c, n))) for c in completions)
    return repeats / max(1, sum(map(len, completions)))


def self_similarity(completions: Sequence[Sequence[int]], max_pairs: int = 100_000) -> float:
    """Mean over pairs of completions of the overlap of their sets of bigrams.

        mean_{i<j} |B_i & B_j| / |B_i | B_j|          (Jaccard), B_i: bigrams of [begin] y_i [end]

    Begin and end count as tokens, so that completions of one token, or none, have bigrams, too.

    Args:
        max_pairs: of more pairs, this many are drawn at random, the same ones each time.
    Returns:
        A number in [0, 1]. 1 where all are one text, 0 with fewer than two completions.

    >>> sets = [[1, 2], [1, 2]], [[1, 2], [3, 4]], [[1, 2], [1, 3]]
    >>> tuple(map(self_similarity, sets))
    (1.0, 0.0, 0.2)
    """
    sets = [set(itertools.pairwise(["begin", *completion, "end"])) for completion in completions]
    count = len(sets) * (len(sets) - 1) // 2
    if count <= max_pairs:
        pairs = itertools.combinations(sets, 2)
    else:
        rng, count = random.Random(0), max_pairs
        pairs = (rng.sample(sets, 2) for _ in range(max_pairs))
    return sum(len(a & b) / len(a | b) for a, b in pairs) / max(1, count)


def collapse_verdict(completions: Sequence[Sequence[int]], entropy: float) -> str:
    """What speaks for a collapse, in words. The thresholds are at the top of this file.

    Args:
        entropy: mean of the next-token distributions, nats per token.

    >>> collapse_verdict([[5, 6]] * 9 + [[7, 8]], entropy=1.0)
    '90% of the completions are the same text; two completions share 80% of their bigrams on \
average; the most frequent token makes 45% of all tokens'
    >>> collapse_verdict([[i, i + 1] for i in range(10)], entropy=1.0)
    'no sign of collapse'
    """
    count = len(completions)
    if count < FEWEST_COMPLETIONS:
        return f"too few completions to tell: {count}, at least {FEWEST_COMPLETIONS} are needed"
    signs = []
    text, alike = collections.Counter(map(tuple, completions)).most_common(1)[0]
    if alike / count >= SAME_TEXT:
        what = "the same text" if text else "empty"
        signs.append(f"{alike / count:.0%} of the completions are {what}")
    similarity = self_similarity(completions)
    if similarity >= SIMILAR:
        signs.append(f"two completions share {similarity:.0%} of their bigrams on average")
    tokens = collections.Counter(itertools.chain.from_iterable(completions))
    most = max(tokens.values(), default=0) / max(1, tokens.total())
    if most >= SAME_TOKEN:
        signs.append(f"the most frequent token makes {most:.0%} of all tokens")
    repeated = repetition(completions)
    if repeated >= REPEATED:
        signs.append(f"{repeated:.0%} of the tokens repeat a 4-gram of their own completion")
    if entropy < SURE:
        signs.append(f"next tokens are all but certain ({entropy:.3f} nats per token)")
    return "; ".join(signs) or "no sign of collapse"


def win_scores(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """For each pair 1 where the second is larger, 0 where the first is, and 1/2 for a tie.

    Their mean is the second's win rate.

    >>> win_scores([1.0, 1.0, 1.0], [2.0, 1.0, 0.0])
    [1.0, 0.5, 0.0]
    """
    return [(b > a) + 0.5 * (b == a) for a, b in zip(first, second, strict=True)]


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = 2000
) -> Interval:
    """Mean of second - first, and its 95% percentile bootstrap interval.

    Both are resampled together, by prompt. What a prompt gives to both (an easy prompt, the same
    random numbers) cancels: the interval is far narrower than that of two separate means. Prompts
    are the units: it says nothing of another training seed.

    Args:
        first, second: one value per prompt, in the same order.

    >>> paired_bootstrap([0.0, 10.0, 20.0], [1.0, 11.0, 21.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    return Interval(mean, *bootstrap_interval(differences, seed, resamples))


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.35 < low < 0.5 < high < 0.65
    True
    """
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = resampled_means(values, range(len(values)), seed, resamples).quantile(ends).tolist()
    return low, high


def resampled_means(
    values: Sequence[float], prompts: Sequence[Hashable], seed: int, resamples: int = 2000
) -> torch.Tensor:
    """Means of a bootstrap over prompts: the values of one prompt are drawn together.

    Args:
        values: one or more for each prompt.
        prompts: the prompt of each value.
        seed: of the draws.
    Returns:
        (resamples,) float64.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    of_value, count = torch.tensor([numbers[prompt] for prompt in prompts]), len(numbers)
    rows = torch.tensor([[value, 1.0] for value in values], dtype=torch.double)
    sums = torch.zeros(count, 2, dtype=torch.double).index_add_(0, of_value, rows)
    generator, at_once = torch.Generator().manual_seed(seed), max(1, 100_000 // count)
    drawn = [
        sums[torch.randint(count, (min(at_once, resamples - i), count), generator=generator)].sum(1)
        for i in range(0, resamples, at_once)
    ]
    total, size = torch.cat(drawn).T
    return total / size


def best_of_n(rewards: torch.Tensor, n: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """Unbiased estimate of what the best of n samples is worth, from N >= n samples per prompt.

        sum_i C(i-1, n-1) / C(N, n) r_(i),  r_(1) <= ... <= r_(N)    (WebGPT, arXiv 2112.09332)

    The weight is the share of all subsets of n samples whose best one is sample i. Samples of equal
    reward share their weights.

    Args:
        rewards: (prompts, N), finite: what the best is chosen by.
        n: 1 <= n <= N.
        values: (prompts, N), what the chosen sample is worth; None: its reward.
    Returns:
        (prompts,) float64.
    Raises:
        ValueError: n lies outside 1..N, or a reward is not finite.

    >>> best_of_n(torch.tensor([[3.0, 1.0, 2.0]]), 2)  # the best of (3, 1), (3, 2) and (1, 2)
    tensor([2.6667], dtype=torch.float64)
    """
    below, upto, share = _ranks(rewards, n, rewards.shape[1])
    weights = (share[upto] - share[below]) / (upto - below)  # (prompts, N)
    return (weights * (rewards if values is None else values).double()).sum(1)


def best_of_n_wins(rewards: torch.Tensor, n: int) -> torch.Tensor:
    """Unbiased estimate of how often the best of n samples beats another sample; a tie is half.

    It is n / (n + 1) where no two rewards are equal, and less where some are.

    Args:
        rewards: (prompts, N), finite.
        n: 1 <= n < N.
    Returns:
        (prompts,) float64.
    Raises:
        ValueError: n lies outside 1..N - 1, or a reward is not finite.

    >>> best_of_n_wins(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 2)
    tensor([0.6667, 0.5000], dtype=torch.float64)
    """
    below, upto, share = _ranks(rewards, n, rewards.shape[1] - 1)
    # Of the others, all n lie below this sample, or at most beside it.
    return 1 - (share[below] + share[upto - 1]).mean(1) / 2


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best of n || policy), nats: log n - (n-1)/n (arXiv 2401.01879).

    It is exact where no completion can be drawn twice, and far above the KL where one is likely.

    >>> best_of_n_kl(1), round(best_of_n_kl(4), 3)
    (0.0, 0.636)
    """
    return math.log(n) - (n - 1) / n


def _ranks(
    rewards: torch.Tensor, n: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many of its prompt's rewards lie below each reward, and how many not above it.

    Beside them, C(k, n) / C(count, n) for k = 0..count: of `count` samples, the share of subsets of
    n that lie within given k of them.
    """
    if rewards.ndim != 2 or not 1 <= n <= count or not rewards.isfinite().all():
        raise ValueError(
            f"got n = {n} and rewards {tuple(rewards.shape)}, expected finite rewards (prompts, N) "
            f"and n in 1..{count}"
        )
    rewards = rewards.contiguous()
    ordered = rewards.sort(1).values
    below, upto = (torch.searchsorted(ordered, rewards, right=right) for right in (False, True))
    every = math.comb(count, n)
    share = [math.comb(k, n) / every for k in range(count + 1)]
    return below, upto, torch.tensor(share, dtype=torch.double, device=rewards.device)


def _ngrams(completion: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The n-grams of a completion, in order."""
    return list(zip(*(completion[i:] for i in range(n))))
