"""What a reward model is worth: loss, accuracy and calibration on held-out pairs."""

from collections.abc import Sequence

import torch

from ..data.pairs import Example
from ..models.heads import Objective
from ..reward import RewardModel


def expected_calibration_error(probabilities: torch.Tensor, bins: int = 10) -> float:
    """Gap between stated and true certainty of pair predictions, over bins of confidence.

        ECE = sum_b (n_b / n) |accuracy_b - confidence_b|,  confidence = max(p, 1 - p)

    (Guo et al. 2017, eq. 3)

    Args:
        probabilities: (B,) that the chosen text is better, which is the truth. 1/2 is half right.

    >>> expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.25]))
    0.0
    """
    probabilities = probabilities.cpu().double()
    confidence = torch.maximum(probabilities, 1 - probabilities)
    correct = (probabilities > 0.5) + 0.5 * (probabilities == 0.5)
    bin_of = ((confidence - 0.5) * 2 * bins).nan_to_num().long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, bin_of, correct - confidence)  # n_b (accuracy_b - confidence_b)
    return (gaps.abs().sum() / len(probabilities)).item()


def evaluate_pairs(
    objective: Objective, reward_model: RewardModel, examples: Sequence[Example]
) -> dict[str, float]:
    """Loss (that of the order alone), accuracy, margin, rewards and calibration on held-out pairs.

    Args:
        objective: what the model is trained for.
        examples: B pairs.
    """
    logits = reward_model.logits([e.texts[k] for k in range(2) for e in examples])  # (2B, labels)
    rewards = reward_model.read_out(logits)  # (2B,), the chosen texts first
    chosen_rewards, rejected_rewards = rewards.chunk(2)
    gap = chosen_rewards - rejected_rewards
    by_text = torch.stack(logits.chunk(2))  # (2, B, labels)
    return {
        "eval_loss": objective.order_losses(by_text, examples).mean().item(),
        "eval_floor": objective.floor(examples),
        "eval_accuracy": ((gap > 0) + 0.5 * (gap == 0)).float().mean().item(),  # a tie: half right
        "eval_margin": gap.mean().item(),
        "eval_ece": expected_calibration_error(objective.win_probabilities(by_text)),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
    }
