"""What a policy is worth: reward, KL, length and collapse measures on held-out prompts; calibration of a reward model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batches import pad
from .chat import TokenizedPrompt
from .logprobs import exact_kl
from .lora import AdapterView
from .reward import RewardModel
from .rewards import RewardFunction, RewardSum
from .rollout import completion_logits, generate


class Sample(NamedTuple):
    """One completion: prompt and completion as texts (together the whole text), its reward and its KL in nats."""

    prompt: str
    completion: str
    reward: float
    kl: float


@torch.no_grad()
def sample_completions(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenizedPrompt],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_token_ids: list[int],
    seed: int,
    batch_size: int,
) -> tuple[list[tuple[torch.Tensor, ...]], list[list[int]], list[bool]]:
    """One completion a prompt, always the same for a seed: (input_ids, attention_mask, tokens, mask) of each batch,
    completions as ids without their end token, and which of them ended by themselves.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    batches, completions, ended = [], [], []
    for i in range(0, len(prompts), batch_size):
        input_ids, attention_mask = pad([prompt.ids for prompt in prompts[i : i + batch_size]], "left", policy.device)
        tokens, mask, _ = generate(
            policy, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature,
            eos_token_ids=eos_token_ids, pad_token_id=0, generator=generator,
        )  # fmt: skip
        batches.append((input_ids, attention_mask, tokens, mask))
        ids, ends = split_end(tokens, mask, eos_token_ids)
        completions += ids
        ended += ends.tolist()
    return batches, completions, ended


@torch.no_grad()
def evaluate_policy(
    policy: PreTrainedModel,
    start: PreTrainedModel | AdapterView,
    reward: RewardModel | RewardFunction | RewardSum,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenizedPrompt],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_token_ids: list[int],
    seed: int,
    batch_size: int = 64,
    measures: dict[str, Callable[[str], float]] | None = None,
) -> tuple[dict[str, float], list[Sample]]:
    """Sample one completion a prompt, always from the same seed, and measure.

    reward: mean of the reward. kl_sft: KL(policy || start) in nats per sequence, summed over the exact KL of
    each next-token distribution on the sampled prefixes (far less noisy than k1). length: tokens, the end token
    included. ended: share that ended by itself. distinct_2: different bigrams over all bigrams of the completions.
    Of several rewards, each one's mean beside their sum. `measures` adds means of functions of the whole text, such as
    the toy world's gold reward.
    """
    batches, completions, ended = sample_completions(
        policy, tokenizer, prompts, temperature=temperature, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
    kls, lengths = [], []
    for input_ids, attention_mask, tokens, mask in batches:
        kl = exact_kl(
            completion_logits(policy, input_ids, attention_mask, tokens, mask),
            completion_logits(start, input_ids, attention_mask, tokens, mask),
            temperature,
        )
        kls += kl.masked_fill(~mask, 0.0).sum(1).tolist()
        lengths += mask.sum(1).tolist()
    scores = reward.score_rollout(tokenizer, prompts, completions, batch_size)
    samples = [
        Sample(*decode_parts(tokenizer, prompt.ids, completion), r, kl)
        for prompt, completion, r, kl in zip(prompts, completions, scores.rewards.tolist(), kls)
    ]
    bigrams = [bigram for completion in completions for bigram in zip(completion, completion[1:])]
    metrics = {
        "reward": _mean([sample.reward for sample in samples]),
        "kl_sft": _mean([sample.kl for sample in samples]),
        "length": _mean(lengths),
        "ended": _mean(ended),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
    }
    metrics |= {f"reward {name}": values.mean().item() for name, values in scores.parts.items()}
    for name, measure in (measures or {}).items():
        metrics[name] = _mean([measure(sample.prompt + sample.completion) for sample in samples])
    return metrics, samples


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def split_end(tokens: torch.Tensor, mask: torch.Tensor, eos_token_ids: list[int]) -> tuple[list[list[int]], torch.Tensor]:
    """Completions of a Rollout as id lists without their end tokens, and which of them ended by themselves (B,) bool.

    >>> split_end(torch.tensor([[5, 2, 0], [5, 6, 7]]), torch.tensor([[True, True, False], [True] * 3]), [2])
    ([[5], [5, 6, 7]], tensor([ True, False]))
    """
    is_end = torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)) & mask
    lengths = (mask & ~is_end).sum(1).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths)], is_end.any(1)


def decode_parts(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> tuple[str, str]:
    """Prompt and completion as texts that join to the whole text (decoded alone, a completion may lose its first space)."""
    whole = tokenizer.decode(prompt + completion, skip_special_tokens=True)
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return start, whole[len(start) :]


def before_after_table(before: dict[str, float], after: dict[str, float]) -> str:
    """The table that a run ends with.

    >>> print(before_after_table({"reward": 0.5, "kl_sft": 0.0}, {"reward": 1.25, "kl_sft": 2.0}))
    held-out prompts      before     after
    reward                 0.500     1.250
    kl_sft                 0.000     2.000
    """
    width = max(18, 2 + max(map(len, before)))
    lines = [f"{'held-out prompts':{width}}{'before':>10}{'after':>10}"]
    return "\n".join(lines + [f"{name:{width}}{before[name]:10.3f}{after[name]:10.3f}" for name in before])


def show_samples(title: str, samples: Sequence[Sample], count: int = 4) -> None:
    """Print the first samples, each prompt and its completion with a bar between them."""
    print(f"\n{title}")
    for sample in samples[:count]:
        prompt = sample.prompt if len(sample.prompt) <= 80 else "..." + sample.prompt[-77:]
        print(f"  reward {sample.reward:6.2f}   " + f"{prompt} |{sample.completion}".replace("\n", " "))


def expected_calibration_error(probabilities: torch.Tensor, bins: int = 10) -> float:
    """Gap between stated and true certainty of pair predictions, over bins of confidence.

        ECE = sum_b (n_b / n) |accuracy_b - confidence_b|,  confidence = max(p, 1 - p)        (Guo et al. 2017, eq. 3)

    Args:
        probabilities: (B,) that the chosen text is better; the chosen one is the truth, p = 1/2 is half right.

    >>> expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.25]))
    0.0
    """
    probabilities = probabilities.double()
    confidence = torch.maximum(probabilities, 1 - probabilities)
    correct = (probabilities > 0.5) + 0.5 * (probabilities == 0.5)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double, device=probabilities.device)
    gaps.index_add_(0, bin_of, correct - confidence)  # n_b (accuracy_b - confidence_b)
    return gaps.abs().sum().item() / len(probabilities)


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.35 < low < 0.5 < high < 0.65
    True
    """
    values = torch.tensor(values, dtype=torch.double)
    generator = torch.Generator().manual_seed(seed)
    means = [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(resamples)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high
