"""What a reward model is worth: loss, accuracy, calibration and length on held-out pairs."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..data.pairs import Example
from ..models.heads import Objective, by_place
from ..reward import RewardModel


class _Pairs(NamedTuple):
    """All pairs of B lists whose texts lie one list after another, (P,) each.

    better, worse: places of the two texts.
    weight: 1 over the pairs of the list: each list counts the same.
    probability: that the first is the better one.
    """

    better: torch.Tensor
    worse: torch.Tensor
    weight: torch.Tensor
    probability: torch.Tensor

    def won(self, values: torch.Tensor) -> torch.Tensor:
        """(P,) 1 where the better text has the larger value, 1/2 for a tie, on either side."""
        gap = (values[self.better] - values[self.worse]) * (self.probability > 0.5)
        return (gap > 0) + 0.5 * (gap == 0)


def _pairs_of(examples: Sequence[Example]) -> _Pairs:
    rows, start = [], 0
    for example in examples:
        count = len(example.texts)
        pairs = list(itertools.combinations(range(start, start + count), 2))
        rows += [(*pair, 1 / len(pairs), example.probability) for pair in pairs]
        start += count
    better, worse, *numbers = zip(*rows)
    return _Pairs(torch.tensor(better), torch.tensor(worse), *map(torch.tensor, numbers))


def _lengths_of(examples: Sequence[Example]) -> torch.Tensor:
    return torch.tensor([len(text) for example in examples for text in example.texts]).float()


def _mean(values: torch.Tensor, weight: torch.Tensor) -> float:
    return ((values * weight).sum() / weight.sum()).item()


def length_baseline(examples: Sequence[Example]) -> str:
    """How often the longer text is the better one, in words: what knows no more gets so far."""
    pairs, lengths = _pairs_of(examples), _lengths_of(examples)
    longer = _mean(pairs.won(lengths), pairs.weight)
    return f"held out: the longer text is the better one in {longer:.3f} (a tie: half)"


def expected_calibration_error(
    probabilities: torch.Tensor,
    bins: int = 10,
    truth: torch.Tensor | float = 1.0,
    weight: torch.Tensor | float = 1.0,
) -> float:
    """Gap between stated and true certainty of pair predictions, over bins of confidence.

        ECE = sum_b (n_b / n) |accuracy_b - confidence_b|,  confidence = max(p, 1 - p)

    (Guo et al. 2017, eq. 3)

    Args:
        probabilities: (B,) that the chosen text is better. 1/2 is half right.
        truth: (B,) or a number, the true probability of that. A soft label is right in part.
        weight: (B,) or a number, what each pair counts.

    >>> expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.25]))
    0.0
    """
    probabilities = probabilities.cpu().double()
    truth, weight = (torch.as_tensor(x).double().expand_as(probabilities) for x in (truth, weight))
    confidence = torch.maximum(probabilities, 1 - probabilities)
    correct = torch.where(probabilities > 0.5, truth, 1 - truth)
    correct = correct.where(probabilities != 0.5, 0.5)
    bin_of = ((confidence - 0.5) * 2 * bins).nan_to_num().long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, bin_of, weight * (correct - confidence))  # n_b (accuracy_b - confidence_b)
    return (gaps.abs().sum() / weight.sum()).item()


def evaluate_pairs(
    objective: Objective, reward_model: RewardModel, examples: Sequence[Example]
) -> dict[str, float]:
    """Loss (that of the order alone), accuracy, margin, rewards, calibration and length, held out.

    Of a list, accuracy, margin and calibration are means over its pairs, and each list counts the
    same. A pair of probability 1/2 is half right whatever its rewards. Length is in tokens:
    - eval_longer_wins: the accuracy of "the longer wins";
    - eval_accuracy_shorter: accuracy where the better text is the shorter one, if it ever is;
    - eval_length_corr: correlation of reward and length, both less the mean of their list, so that
      prompts drop out; left out where all lengths of each list, or all rewards, are equal.

    Args:
        objective: what the model is trained for.
        examples: B pairs or lists.
    """
    examples = list(examples)
    logits = reward_model.logits([text for e in examples for text in e.texts]).cpu()  # (N, labels)
    rewards, lengths = reward_model.read_out(logits), _lengths_of(examples)  # (N,)
    by_text = by_place(logits, examples)
    better, worse, weight, probability = pairs = _pairs_of(examples)
    right, longer = pairs.won(rewards), pairs.won(lengths)
    gap = (rewards[better] - rewards[worse]) * (probability > 0.5)
    wins = objective.win_probabilities(logits[better], logits[worse])
    metrics = {
        "eval_loss": objective.order_losses(by_text, examples).mean().item(),
        "eval_floor": objective.order_losses(torch.zeros_like(by_text), examples).mean().item(),
        "eval_accuracy": _mean(right, weight),
        "eval_margin": _mean(gap, weight),
        "eval_ece": expected_calibration_error(wins, truth=probability, weight=weight),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "eval_longer_wins": _mean(longer, weight),
    }
    if (longer == 0).any():
        metrics["eval_accuracy_shorter"] = _mean(right, weight * (longer == 0))
    counts = [len(example.texts) for example in examples]
    centred = [
        torch.cat([part - part.mean() for part in values.double().split(counts)])
        for values in (rewards, lengths)
    ]
    norms = [values.norm().item() for values in centred]
    if min(norms) > 0:
        metrics["eval_length_corr"] = (centred[0] @ centred[1]).item() / (norms[0] * norms[1])
    return metrics
