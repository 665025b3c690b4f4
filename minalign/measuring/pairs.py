"""What a reward model is worth: loss, accuracy, calibration and length on held-out pairs."""

import itertools
from collections.abc import Sequence

import torch

from ..data.pairs import Example
from ..models.heads import Objective, by_place
from ..reward import RewardModel


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
    rewards = reward_model.read_out(logits)  # (N,)
    lengths = torch.tensor([len(text) for e in examples for text in e.texts]).float()
    by_text = by_place(logits, examples)
    better, worse, weight, probability = pairs_of(examples)  # (P,) each

    def gaps(values: torch.Tensor) -> torch.Tensor:
        return (values[better] - values[worse]) * (probability > 0.5)

    def share_won(gap: torch.Tensor, weight: torch.Tensor = weight) -> float:
        return (((gap > 0) + 0.5 * (gap == 0)) * weight).sum().item() / weight.sum().item()

    gap, shorter = gaps(rewards), weight * (gaps(lengths) < 0)
    wins = objective.win_probabilities(logits[better], logits[worse])
    metrics = {
        "eval_loss": objective.order_losses(by_text, examples).mean().item(),
        "eval_floor": objective.order_losses(torch.zeros_like(by_text), examples).mean().item(),
        "eval_accuracy": share_won(gap),
        "eval_margin": ((gap * weight).sum() / weight.sum()).item(),
        "eval_ece": expected_calibration_error(wins, truth=probability, weight=weight),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "eval_longer_wins": share_won(gaps(lengths)),
    }
    if shorter.any():
        metrics["eval_accuracy_shorter"] = share_won(gap, shorter)
    lists = [
        values.double().split([len(e.texts) for e in examples]) for values in (rewards, lengths)
    ]
    one, other = (torch.cat([part - part.mean() for part in parts]) for parts in lists)
    if (scale := (one.norm() * other.norm()).item()) > 1e-9:
        metrics["eval_length_corr"] = (one @ other).item() / scale
    return metrics


def pairs_of(examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """All P pairs of lists whose texts lie one list after another.

    Returns:
        Places of the better and of the worse text; 1 over the pairs of their list, so that each
        list counts the same; the probability that the better one is it. (P,) each.
    """
    rows, start = [], 0
    for example in examples:
        places = range(start, start := start + len(example.texts))
        pairs = list(itertools.combinations(places, 2))
        rows += [(*pair, 1 / len(pairs), example.probability) for pair in pairs]
    return tuple(map(torch.tensor, zip(*rows)))
