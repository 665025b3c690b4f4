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
    """A Python function as a reward: f(prompts, completions, **columns) -> one number for each.

    It is called with lists of equal length, without gradients and in full precision. Prompts
    are texts (or lists of messages where the prompts are chat). Completions are texts without their
    end token. Columns are those of the data that its parameters name. None in place of a number
    says that it does not apply.
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
            UserError: see functions.call.
        """
        texts = [
            decode_parts(tokenizer, prompt.ids, completion)
            for prompt, completion in zip(prompts, completions)
        ]
        # Copies: what the function does with its arguments stays its own affair
        asked = [copy.deepcopy(p.messages) or text for p, (text, _) in zip(prompts, texts)]
        rows = [copy.deepcopy(prompt.columns) or {} for prompt in prompts]
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
            values = call(self.name, self.function, asked, [answer for _, answer in texts], columns)
        applies = torch.tensor([value is not None for value in values], device=self.device)
        numbers = [value or 0.0 for value in values]
        rewards = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        return Scores(rewards, None, {}, applies)


def combine(
    scores: torch.Tensor, applies: torch.Tensor, how: str, weights: torch.Tensor
) -> torch.Tensor:
    """One reward of M, over those that apply to a completion; 0 where none does.

        sum:      r = sum_i w_i z_i
        min:      r = min_i z_i
        mean-sd:  r = m - sqrt(mean_i (z_i - m)^2),  m = mean_i z_i

    min is the worst-case optimisation of Coste et al. 2023 (arXiv 2310.02743). Their
    uncertainty-weighted one subtracts lambda times the variance, mean-sd the deviation itself.

    Args:
        scores: (M, N), standardised: z_i.
        applies: (M, N) bool.
        how: "sum", "min" or "mean-sd".
        weights: (M,), of the sum.
    Returns:
        (N,); not finite where one that applies is not.

    >>> scores = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    >>> combine(scores, torch.tensor([[True, True], [True, False]]), "mean-sd", torch.ones(2))
    tensor([1., 4.])
    """
    known = scores.masked_fill(~applies, 0.0)
    if how == "sum":
        return (weights[:, None] * known).sum(0)
    if how == "min":
        lowest = scores.masked_fill(~applies, torch.inf).amin(0)
        # inf that is not the lowest stays no number: 0 x inf is NaN
        return lowest.where(applies.any(0), 0.0) + 0.0 * known.sum(0)
    count = applies.sum(0).clamp(min=1)
    mean = known.sum(0) / count
    squares = (known - mean).square().masked_fill(~applies, 0.0)
    return mean - (squares.sum(0) / count).sqrt()


def known_rewards(scores: Scores) -> torch.Tensor:
    """The rewards (B,) of Scores, NaN where they do not apply."""
    if scores.applies is None:
        return scores.rewards
    return scores.rewards.masked_fill(~scores.applies, torch.nan)


class RewardSum:
    """Several rewards as one, each standardised by its own scores of the start policy.

        r = sum_i w_i (r_i - mean_i) / std_i        (or min, or mean-sd: see `combine`)

    So every part has the same say, and beta means the same whatever the scale of a reward model.
    `fit` sets mean and std.
    """

    def __init__(
        self,
        rewards: dict[str, RewardModel | RewardFunction],
        weights: Sequence[float],
        how: str = "sum",
    ) -> None:
        self.rewards, self.weights, self.how = rewards, list(weights), how
        self.means, self.stds = [0.0] * len(rewards), [1.0] * len(rewards)
        # Only a sum of scores has a variance that follows from theirs
        self.num_labels = min(r.num_labels for r in rewards.values()) if how == "sum" else 1
        parts = [f"{name} ({reward.reading})" for name, reward in rewards.items()]
        self.reading = f"{how} of {', '.join(parts)}"
        if how == "sum":
            self.reading = " + ".join(f"{w:g} {part}" for w, part in zip(self.weights, parts))

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
        """As RewardModel.score_rollout. Variances add up as those of independent scores.

        Parts are NaN where they do not apply.
        """
        batch = (tokenizer, prompts, completions, batch_size)
        every = [reward.score_rollout(*batch) for reward in self.rewards.values()]
        parts = {}
        for name, one in zip(self.rewards, every):
            parts |= {name: known_rewards(one)}
            parts |= {f"{name} {part}": values for part, values in one.parts.items()}
        rewards = torch.stack([one.rewards for one in every])  # (M, B)
        known = [one.applies for one in every]
        applies = torch.stack([torch.ones_like(rewards[0]) > 0 if k is None else k for k in known])
        numbers = self.means, self.stds, self.weights
        means, stds, weights = (rewards.new_tensor(one)[:, None] for one in numbers)
        total = combine((rewards - means) / stds, applies, self.how, weights[:, 0])
        variance = None
        if self.how == "sum" and all(one.variance is not None for one in every):
            variance = ((weights / stds) ** 2 * torch.stack([s.variance for s in every])).sum(0)
        some = applies.any(0) if any(k is not None for k in known) else None
        return Scores(total, variance, parts if len(parts) > 1 else {}, some)

    def fit(self, parts: dict[str, torch.Tensor]) -> None:
        """Set mean and standard deviation of each reward from its scores of the start policy.

        They are those of the finite scores. Of several, one that is the same everywhere is
        only centred.

        Args:
            parts: name -> scores (N,), in the order of the rewards, NaN where one does not apply.
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
    names: Sequence[str], device: torch.device, average: bool = False, risk: float | None = None
) -> dict[str, RewardModel | RewardFunction]:
    """Each reward by its name.

    Args:
        names: each module:function, file.py:function, or a reward model.
        device: where they score.
        average: return one reward model instead, the mean of all.
        risk: see losses.risk_adjusted_score; None is the mean score.
    Raises:
        UserError: a name is given twice or cannot be loaded, `average` finds fewer than two reward
            models, or a function among them, or `risk` one without a distribution over scores.
    """
    rewards = {}
    for name in names:
        require(name not in rewards, f"--rm {name}: given twice")
        kind = RewardFunction.from_name if is_function(name) else RewardModel.from_pretrained
        rewards[name] = kind(name, device)
        if risk is not None:
            require(
                rewards[name].num_labels > 2,
                f"--risk {risk:g}: --rm {name}: no distribution over scores "
                f"({rewards[name].reading}): train one with --loss ordinal, or leave --risk out",
            )
            rewards[name].risk = risk
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
    """One reward of several, each standardised by its scores of the start policy.

    The scores are those of one completion for each of 256 training prompts.
    """
    reward = RewardSum(parts, weights, flags.rm_combine or "sum")
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
        stop=task.stop,
    )
    batch = (task.tokenizer, prompts, completions, batch_size)
    found = {}
    for name, part in parts.items():
        scores = part.score_rollout(*batch)
        found[name] = known_rewards(scores)
        require(
            scores.applies is None or bool(scores.applies.any()),
            f"--rm {name}: applies to none of {count} samples of the start policy: cannot be "
            "standardised",
        )
    reward.fit(found)
    return reward
