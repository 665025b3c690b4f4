"""More than one reward model, or another kind: Python functions, weighted sums, averaged weights."""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .chat import TokenizedPrompt
from .common import UserError, require
from .reward import RewardModel, Scores


class RewardFunction:
    """A Python function as a reward: f(prompts, completions) -> one number each.

    It is called with two lists of equal length: prompts as texts (or as lists of messages where the prompts are chat),
    completions as texts without their end token.
    """

    def __init__(self, name: str, function: Callable[[list, list[str]], Sequence[float]], device: torch.device | str = "cpu"):
        self.name, self.function, self.device = name, function, device
        self.reading, self.num_labels = "Python function", 1

    @classmethod
    def from_name(cls, name: str, device: torch.device | str = "cpu") -> "RewardFunction":
        """From "module:function", looked for in the current folder, too."""
        module, _, function = name.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            return cls(name, getattr(importlib.import_module(module), function), device)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--rm {name}: cannot be imported ({error}): expected module:function") from error
        finally:
            sys.path.pop(0)

    def score_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
        batch_size: int,
    ) -> Scores:
        """As RewardModel.score_rollout; the texts are those of the rollout, decoded."""
        from .evaluate import decode_parts

        texts = [decode_parts(tokenizer, prompt.ids, completion) for prompt, completion in zip(prompts, completions)]
        asked = [prompt.messages or text for prompt, (text, _) in zip(prompts, texts)]
        values = list(self.function(asked, [answer for _, answer in texts]))
        require(
            len(values) == len(texts) and all(isinstance(v, (int, float)) for v in values),
            f"--rm {self.name}: got {values!r:.60} for {len(texts)} completions, expected one number for each",
        )
        return Scores(torch.tensor([float(value) for value in values], device=self.device), None, {})


class RewardSum:
    """Sum of weight (r - mean) / std over several rewards: each standardised by its own scores of the start policy.

    So every part has the same say, and beta means the same whatever the scale of a reward model. `fit` sets mean and std.
    """

    def __init__(self, rewards: dict[str, RewardModel | RewardFunction], weights: Sequence[float]):
        self.rewards, self.weights = rewards, list(weights)
        self.means, self.stds = [0.0] * len(rewards), [1.0] * len(rewards)
        self.num_labels = min(reward.num_labels for reward in rewards.values())
        self.reading = " + ".join(
            f"{weight:g} {name} ({r.reading})" for weight, (name, r) in zip(self.weights, rewards.items())
        )

    def score_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
        batch_size: int,
    ) -> Scores:
        """As RewardModel.score_rollout; variances add up as those of independent scores."""
        total, variance, parts = 0.0, 0.0, {}
        for (name, reward), weight, mean, std in zip(self.rewards.items(), self.weights, self.means, self.stds):
            scores = reward.score_rollout(tokenizer, prompts, completions, batch_size)
            parts[name] = scores.rewards
            total = total + weight * (scores.rewards - mean) / std
            if variance is not None:
                variance = None if scores.variance is None else variance + (weight / std) ** 2 * scores.variance
        return Scores(total, variance, parts if len(parts) > 1 else {})

    def fit(self, parts: dict[str, torch.Tensor]) -> None:
        """Set mean and standard deviation of each reward from its scores of the start policy; UserError where all are equal."""
        for i, (name, scores) in enumerate(parts.items()):
            self.means[i], self.stds[i] = scores.mean().item(), scores.std(correction=0).item()
            require(
                math.isfinite(self.stds[i]) and self.stds[i] > 0,
                f"--rm {name}: scores of the start policy have mean {self.means[i]:g} and deviation {self.stds[i]:g}: "
                "cannot be standardised",
            )


def average_weights(models: Sequence[RewardModel]) -> RewardModel:
    """One reward model whose weights are the mean of several: WARM (Rame et al. 2024, arXiv 2401.12187), eq. 1.

    They must share their architecture, and should have started from one body and one head: those that train_rm.py makes
    from one --model with different --seed do. Overwrites the first. UserError naming the weight that differs.
    """
    states = [dict(reward.model.named_parameters()) for reward in models]
    for other, state in zip(models[1:], states[1:]):
        same = {n: p.shape for n, p in states[0].items()} == {n: p.shape for n, p in state.items()}
        require(
            same and other.tokenizer.get_vocab() == models[0].tokenizer.get_vocab(),
            "--rm-average: the reward models differ in architecture or vocabulary: average those of one --model",
        )
    with torch.no_grad():
        for name, parameter in states[0].items():
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))
    return models[0]


def load_rewards(names: Sequence[str], device: torch.device, average: bool = False) -> dict[str, RewardModel | RewardFunction]:
    """Each reward by its name: module:function, or a reward model; with `average`, one that is the mean of all."""
    rewards = {}
    for name in names:
        require(name not in rewards, f"--rm {name}: given twice")
        is_function = re.fullmatch(r"[A-Za-z_][\w.]*:\w+", name) and not Path(name).exists()
        rewards[name] = RewardFunction.from_name(name, device) if is_function else RewardModel.from_pretrained(name, device)
    if not average:
        return rewards
    require(
        len(rewards) > 1 and all(isinstance(reward, RewardModel) for reward in rewards.values()),
        "--rm-average: expected several reward models after --rm",
    )
    return {f"average of {len(rewards)}": average_weights(list(rewards.values()))}
