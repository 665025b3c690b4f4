"""What a policy is worth: reward, KL, length and collapse measures on held-out prompts; calibration of a reward model.

python -m minalign.evaluate compares policies: see evaluate_cli.py.
"""

if __name__ == "__main__":  # before the heavy imports: --help and a wrong flag answer at once
    from minalign.common import one_line_errors
    from minalign.evaluate_cli import main

    with one_line_errors():
        main()
    raise SystemExit

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batches import Example, pad
from .chat import TokenizedPrompt
from .logprobs import exact_kl
from .losses import bradley_terry_loss, ordinal_pairwise_loss
from .lora import AdapterView
from .measures import bootstrap_interval, distinct_n  # noqa: F401 (the interval is also known from here)
from .reward import RewardModel
from .rewards import RewardFunction, RewardSum
from .rollout import completion_logits, draw_uniforms, generate


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
    uniforms = draw_uniforms(len(prompts), max_new_tokens, policy.device, generator)  # the same whatever the batch size
    batches, completions, ended = [], [], []
    for i in range(0, len(prompts), batch_size):
        input_ids, attention_mask = pad([prompt.ids for prompt in prompts[i : i + batch_size]], "left", policy.device)
        tokens, mask, _ = generate(
            policy, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature,
            eos_token_ids=eos_token_ids, pad_token_id=0, uniforms=uniforms[i : i + batch_size],
        )  # fmt: skip
        batches.append((input_ids, attention_mask, tokens, mask))
        ids, ends = split_end(tokens, mask, eos_token_ids)
        completions += ids
        ended += ends.tolist()
    return batches, completions, ended


@torch.no_grad()
def both_logits(
    policy: PreTrainedModel, start: PreTrainedModel | AdapterView, batches: list[tuple[torch.Tensor, ...]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each batch of `sample_completions`: logits of both models (B, T, V) for its tokens (B, T), and their mask (B, T)."""
    for batch in batches:
        yield completion_logits(policy, *batch), completion_logits(start, *batch), *batch[2:]


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
    for logits, start_logits, _, mask in both_logits(policy, start, batches):
        kls += exact_kl(logits, start_logits, temperature).masked_fill(~mask, 0.0).sum(1).tolist()
        lengths += mask.sum(1).tolist()
    scores = reward.score_rollout(tokenizer, prompts, completions, batch_size)
    samples = [
        Sample(*decode_parts(tokenizer, prompt.ids, completion), r, kl)
        for prompt, completion, r, kl in zip(prompts, completions, scores.rewards.tolist(), kls)
    ]
    metrics = {
        "reward": _mean([sample.reward for sample in samples]),
        "kl_sft": _mean([sample.kl for sample in samples]),
        "length": _mean(lengths),
        "ended": _mean(ended),
        "distinct_2": distinct_n(completions, 2),
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


def evaluate_pairs(config, reward_model: RewardModel, examples: Sequence[Example]) -> dict[str, float]:
    """Loss (the pairwise one alone), accuracy, margin, rewards and calibration over all held-out pairs."""
    logits = reward_model.logits([e.chosen for e in examples] + [e.rejected for e in examples])
    chosen_rewards, rejected_rewards = reward_model.read_out(logits).chunk(2)
    gap = chosen_rewards - rejected_rewards
    if config.loss == "bradley-terry":
        margin = config.margin * torch.tensor([e.pair.gap for e in examples], device=gap.device)
        losses = bradley_terry_loss(chosen_rewards, rejected_rewards, margin)
        floor = torch.nn.functional.softplus(margin).mean()  # what a constant reward gets
        probabilities = gap.sigmoid()
    else:
        losses = ordinal_pairwise_loss(*logits.chunk(2), config.ties)
        floor = -math.log(0.5 if config.ties == "half" else (1 - 1 / config.num_scores) / 2)
        probabilities = (-ordinal_pairwise_loss(*logits.chunk(2), "half")).exp()
    rewards = torch.cat([chosen_rewards, rejected_rewards])
    return {
        "eval_loss": losses.mean().item(),
        "eval_floor": float(floor),
        "eval_accuracy": ((gap > 0) + 0.5 * (gap == 0)).float().mean().item(),  # a tie is half right
        "eval_margin": gap.mean().item(),
        "eval_ece": expected_calibration_error(probabilities),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
    }
