"""Several reward models, or another kind: Python functions, weighted sums, averaged weights."""

from __future__ import annotations

import copy
import random
import typing
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..data.chat import Prompt, TokenizedPrompt, decode_parts
from ..data.prompts import beginning
from ..reward import RewardModel, Scores
from ..rollout import sample_completions
from ..running.errors import require
from .functions import call, is_function, load_function

if typing.TYPE_CHECKING:
    from ..running.flag_groups import TaskFlags
    from ..task import Task


class RewardFunction:
    """A Python function as a reward: f(prompts, completions) -> one number for each.

    It is called with two lists of equal length, without gradients and in full precision. Prompts
    are texts (or lists of messages where the prompts are chat). Completions are texts without their
    end token.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[list[Prompt], list[str]], Sequence[float]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.function, self.device = name, function, device
        self.reading, self.num_labels = "Python function", 1

    @classmethod
    def from_name(cls, name: str, device: torch.device | str = "cpu") -> RewardFunction:
        """From "module:function" or "file.py:function", see functions.load_function."""
        return cls(name, load_function(name), device)

    def score_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
        batch_size: int,
    ) -> Scores:
        """As RewardModel.score_rollout. The texts are those of the rollout, decoded.

        Raises:
            UserError: the function fails, or does not return one number for each completion.
        """
        texts = [
            decode_parts(tokenizer, prompt.ids, completion)
            for prompt, completion in zip(prompts, completions)
        ]
        # Copies: what the function does with its arguments stays its own affair
        asked = [copy.deepcopy(p.messages) or text for p, (text, _) in zip(prompts, texts)]
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
            values = call(self.name, self.function, asked, [answer for _, answer in texts])
        rewards = torch.tensor(values, dtype=torch.float32, device=self.device)
        return Scores(rewards, None, {})


class RewardSum:
    """A weighted sum of several rewards, each standardised by its own scores of the start policy.

        r = sum_i w_i (r_i - mean_i) / std_i

    So every part has the same say, and beta means the same whatever the scale of a reward model.
    `fit` sets mean and std.
    """

    def __init__(
        self, rewards: dict[str, RewardModel | RewardFunction], weights: Sequence[float]
    ) -> None:
        self.rewards, self.weights = rewards, list(weights)
        self.means, self.stds = [0.0] * len(rewards), [1.0] * len(rewards)
        self.num_labels = min(reward.num_labels for reward in rewards.values())
        self.reading = " + ".join(
            f"{weight:g} {name} ({reward.reading})"
            for weight, (name, reward) in zip(self.weights, rewards.items())
        )

    def alone(self, name: str) -> RewardSum:
        """One of the rewards by itself, standardised as in the sum."""
        i, one = list(self.rewards).index(name), RewardSum({name: self.rewards[name]}, [1.0])
        one.means, one.stds = [self.means[i]], [self.stds[i]]
        return one

    def score_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
        batch_size: int,
    ) -> Scores:
        """As RewardModel.score_rollout. Variances add up as those of independent scores."""
        total, variance, parts = 0.0, 0.0, {}
        scales = zip(self.weights, self.means, self.stds)
        for (name, reward), (weight, mean, std) in zip(self.rewards.items(), scales):
            scores = reward.score_rollout(tokenizer, prompts, completions, batch_size)
            parts[name] = scores.rewards
            total = total + weight * (scores.rewards - mean) / std
            if variance is None or scores.variance is None:
                variance = None
            else:
                variance = variance + (weight / std) ** 2 * scores.variance
        return Scores(total, variance, parts if len(parts) > 1 else {})

    def fit(self, parts: dict[str, torch.Tensor]) -> None:
        """Set mean and standard deviation of each reward from its scores of the start policy.

        They are those of the finite scores. Of several, one that is the same everywhere is
        only centred.

        Args:
            parts: name -> scores (N,), in the order of the rewards.
        Raises:
            UserError: no score of a reward is finite, or those of the only one are all equal.
        """
        for i, (name, scores) in enumerate(parts.items()):
            finite = scores[scores.isfinite()]
            require(len(finite) > 0, f"--rm {name}: no score of the start policy is finite")
            mean, std = finite.mean().item(), finite.std(correction=0).item()
            constant = std <= 1e-6 * abs(mean)  # also where float32 rounds it
            require(
                len(parts) > 1 or not constant,
                f"--rm {name}: scores of the start policy have mean {mean:g} and deviation "
                f"{std:g}: cannot be standardised",
            )
            self.means[i], self.stds[i] = mean, 1.0 if constant else std
            how = "all alike: only centred by it" if constant else "standardised by these"
            print(
                f"reward {name}: {mean:.6g} +- {std:.4g} on {len(finite)} of {len(scores)} samples "
                f"of the start policy: {how}"
            )


def average_weights(models: Sequence[RewardModel]) -> RewardModel:
    """One reward model whose weights are the mean of several.

        theta = 1/M sum_m theta_m        (WARM, Rame et al. 2024, arXiv 2401.12187, eq. 1)

    They must share their architecture, and should have started from one body and one head: those
    that train_rm.py makes from one --model with different --seed do. Overwrites the first.

    Raises:
        UserError: they differ in architecture or vocabulary.
    """
    states = [dict(reward.model.named_parameters()) for reward in models]
    shapes = [{name: weight.shape for name, weight in state.items()} for state in states]
    vocabulary = models[0].tokenizer.get_vocab()
    for other, its_shapes in zip(models[1:], shapes[1:]):
        require(
            its_shapes == shapes[0] and other.tokenizer.get_vocab() == vocabulary,
            "--rm-average: the reward models differ in architecture or vocabulary: "
            "average those of one --model",
        )
    with torch.no_grad():
        for name, parameter in states[0].items():
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))
    return models[0]


def load_rewards(
    names: Sequence[str], device: torch.device, average: bool = False
) -> dict[str, RewardModel | RewardFunction]:
    """Each reward by its name.

    Args:
        names: each module:function, file.py:function, or a reward model.
        device: where they score.
        average: return one reward model instead, the mean of all.
    Raises:
        UserError: a name is given twice or cannot be loaded, or `average` finds fewer than two
            reward models, or a function among them.
    """
    rewards = {}
    for name in names:
        require(name not in rewards, f"--rm {name}: given twice")
        kind = RewardFunction.from_name if is_function(name) else RewardModel.from_pretrained
        rewards[name] = kind(name, device)
    if not average:
        return rewards
    require(
        len(rewards) > 1 and all(isinstance(reward, RewardModel) for reward in rewards.values()),
        "--rm-average: expected several reward models after --rm",
    )
    return {f"average of {len(rewards)}": average_weights(list(rewards.values()))}


def standardised_sum(
    parts: dict[str, RewardModel | RewardFunction],
    weights: Sequence[float],
    task: Task,
    flags: TaskFlags,
    batch_size: int,
) -> RewardSum:
    """Weighted sum of rewards, each standardised by its scores of the start policy.

    The scores are those of one completion for each of 256 training prompts.
    """
    reward = RewardSum(parts, weights)
    lengths = random.Random("standardise")
    count = min(256, len(task.train_prompts))
    prompts = random.Random(flags.seed).sample(task.train_prompts, count)
    prompts = [beginning(prompt, task.prompt_tokens, lengths) for prompt in prompts]
    _, completions, _ = sample_completions(
        task.start,
        [prompt.ids for prompt in prompts],
        temperature=flags.temperature,
        max_new_tokens=flags.max_new_tokens,
        eos_token_ids=task.eos_token_ids,
        seed=flags.seed,
        batch_size=batch_size,
    )
    batch = (task.tokenizer, prompts, completions, batch_size)
    reward.fit({name: part.score_rollout(*batch).rewards for name, part in parts.items()})
    return reward
