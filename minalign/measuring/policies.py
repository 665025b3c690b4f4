"""What a policy is worth: reward, KL, length and collapse measures on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..data.chat import decode_parts
from ..logprobs import exact_kl, kl_k1, token_entropy, token_logprobs
from ..models.lora import AdapterView
from ..models.rewards import known_rewards
from ..rollout import completion_logits, sample_completions
from ..running.errors import visible
from ..task import Task
from .measures import distinct_n, repetition, self_similarity


class Sample(NamedTuple):
    """One completion and what it is worth. The two texts join to the whole text."""

    prompt: str
    completion: str
    reward: float | None  # None where it does not apply
    kl: float  # KL(policy || start), nats


class Measured(NamedTuple):
    """What `measure_policy` finds of one policy."""

    metrics: dict[str, float]  # means, by name
    samples: list[Sample]  # one per prompt
    completions: list[list[int]]  # token ids, one per prompt


@torch.no_grad()
def both_logits(
    policy: PreTrainedModel,
    start: PreTrainedModel | AdapterView,
    batches: list[tuple[torch.Tensor, ...]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each batch of `sample_completions`: logits of both models, tokens and mask.

    Returns:
        (policy's logits (B, T, V), start policy's logits (B, T, V), tokens (B, T), mask (B, T)).
    """
    for batch in batches:
        yield completion_logits(policy, *batch), completion_logits(start, *batch), *batch[2:]


@torch.no_grad()
def measure_policy(
    policy: PreTrainedModel,
    task: Task,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 64,
    full: bool = False,
) -> Measured:
    """Sample one completion for each of the task's held-out prompts, and measure.

    The metrics, means over the completions (over those whose number is finite; `not_finite` counts
    the others, where there are any):
    - reward, and each part of several; where one may not apply, over those where it does, and
      applies: the share where any does;
    - kl_sft: KL(policy || start), nats per completion: the exact KL of each next-token
      distribution, summed over the sampled prefixes (far less noisy than k1);
    - length: tokens, the end token or stop text included;
    - ended: share that ended by itself;
    - distinct_2: different bigrams over all bigrams of all completions;
    - the task's own measures of a whole text, such as the toy world's gold reward.

    With `full` also:
    - kl_k1: log pi(y|x) - log pi_start(y|x) of the sample itself: the same mean with more noise;
    - kl_sft_se, kl_k1_se: the standard errors of both KLs, deviation / sqrt(prompts);
    - entropy of the next-token distributions, nats per token;
    - distinct_1, repetition, self_similarity: see measures.py.

    Args:
        temperature: of sampling and of every log-prob.
        max_new_tokens: of a completion.
        seed: of the samples. The same seed and prompts give the same random numbers to each policy.
        batch_size: completions per pass.
    """
    batches, completions, ended = sample_completions(
        policy,
        [prompt.ids for prompt in task.eval_prompts],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        eos_token_ids=task.eos_token_ids,
        seed=seed,
        batch_size=batch_size,
        stop=task.stop,
    )
    kls, k1s, entropies, lengths = [], [], [], []  # of each completion, summed over its tokens
    for logits, start_logits, tokens, mask in both_logits(policy, task.start, batches):
        kls += _over_tokens(exact_kl(logits, start_logits, temperature), mask)
        lengths += mask.sum(1).tolist()
        if full:
            logprobs = (token_logprobs(z, tokens, temperature) for z in (logits, start_logits))
            k1s += _over_tokens(kl_k1(*logprobs), mask)
            entropies += _over_tokens(token_entropy(logits, temperature), mask)
    scores = task.reward.score_rollout(task.tokenizer, task.eval_prompts, completions, batch_size)
    texts = [
        decode_parts(task.tokenizer, prompt.ids, completion)
        for prompt, completion in zip(task.eval_prompts, completions)
    ]
    rewards = scores.rewards.tolist()
    applies = [True] * len(rewards) if scores.applies is None else scores.applies.tolist()
    metrics = {
        "reward": _mean(known_rewards(scores).tolist()),
        "kl_sft": _mean(kls),
        "length": _mean(lengths),
        "ended": _mean(ended),
        "distinct_2": distinct_n(completions, 2),
    }
    if full:
        metrics |= {
            "kl_sft_se": _standard_error(kls),
            "kl_k1": _mean(k1s),
            "kl_k1_se": _standard_error(k1s),
            "entropy": sum(entropies) / sum(lengths),
            "distinct_1": distinct_n(completions, 1),
            "repetition": repetition(completions),
            "self_similarity": self_similarity(completions),
        }
    metrics |= {f"reward {name}": _mean(values.tolist()) for name, values in scores.parts.items()}
    broken = sum(not math.isfinite(reward + kl) for reward, kl in zip(rewards, kls))
    metrics |= {"not_finite": broken} if broken else {}
    metrics |= {"applies": _mean(applies)} if scores.applies is not None else {}
    for name, measure in task.measures.items():
        metrics[name] = _mean([measure(prompt + completion) for prompt, completion in texts])
    rewards = [reward if known else None for reward, known in zip(rewards, applies)]
    samples = [Sample(*text, reward, kl) for text, reward, kl in zip(texts, rewards, kls)]
    return Measured(metrics, samples, completions)


def _over_tokens(values: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Sums over the tokens of each completion; values and mask are (B, T)."""
    return values.masked_fill(~mask, 0.0).sum(1).tolist()


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _standard_error(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.double).std().item() / len(values) ** 0.5


def before_after_table(
    before: dict[str, float], after: dict[str, float], best: tuple[int, dict] | None = None
) -> str:
    """The table that a run ends with.

    Args:
        best: a step and its metrics, which stand between.

    >>> print(before_after_table({"reward": 0.5, "kl_sft": 0.0}, {"reward": 1.25, "kl_sft": 2.0}))
    held-out prompts      before     after
    reward                 0.500     1.250
    kl_sft                 0.000     2.000
    """
    columns = {"before": before} | ({f"step {best[0]}": best[1]} if best else {})
    columns["after"] = after
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    width = max(18, 2 + max(map(len, names)))
    lines = [f"{'held-out prompts':{width}}" + "".join(f"{head:>10}" for head in columns)]
    for name in names:  # the count of what is not finite may be in one alone
        values = "".join(f"{metrics.get(name, 0):z10.3f}" for metrics in columns.values())
        lines.append(f"{name:{width}}{values}")
    return "\n".join(lines)


def show_samples(title: str, samples: Sequence[Sample], count: int = 4) -> None:
    """Print the first samples, each prompt and its completion with a bar between them."""
    print(f"\n{title}")
    for sample in samples[:count]:
        prompt = sample.prompt if len(sample.prompt) <= 80 else "..." + sample.prompt[-77:]
        text = visible(f"{prompt} |{sample.completion}".replace("\n", " "))
        reward = "  none" if sample.reward is None else f"{sample.reward:z6.2f}"
        print(f"  reward {reward}   {text}")
