"""A world whose truth is exact: 6 words (one is the end), at most 5 per completion, 4 prompts.

All 3,906 completions of a prompt are enumerated, so that expected reward, KL and their gradients
have no sampling error. The best front that any policy could reach is known, too:

    pi_start(y|x) exp(r(x, y) / b) / Z(x), for b in (0, inf)

What is trained is a Llama of 10^5 weights, by minalign's own functions. Only the measuring is
exact.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from minalign.logprobs import completion_mask
from minalign.merge import ema_update_
from minalign.reinforce import (
    MovingAverageBaseline,
    kl_penalized_rewards,
    leave_one_out_advantages,
    reinforce_loss,
)
from minalign.rollout import completion_logprobs, frozen_logprobs, generate

WORDS, END, LENGTH, PROMPTS = 6, 5, 5, 4
_every = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)  # (6^5, 5)
_mask = completion_mask(_every, END)
# (N, 5), by rows; what follows an end is 0, as in a Rollout
SEQUENCES = _every.masked_fill(~_mask, 0).unique(dim=0)
MASK = completion_mask(SEQUENCES, END)  # (N, 5)
# (5^4, 4): everything that a next word can follow
INPUTS = torch.cartesian_prod(*[torch.arange(END)] * (LENGTH - 1))
# (N,): where a sequence lies in INPUTS
_POWERS = END ** torch.arange(LENGTH - 2, -1, -1)
ROWS = (SEQUENCES[:, :-1].masked_fill(SEQUENCES[:, :-1] == END, 0) * _POWERS).sum(1)


class World(NamedTuple):
    """The start policy, and the true reward of each completion (PROMPTS, N).

    Under the start policy it has mean 0 and sd 1, plus the prompt's own level.
    """

    start: LlamaForCausalLM
    rewards: torch.Tensor


def make_world(seed: int, between: float = 1.0, offset: float = 0.0, width: int = 64) -> World:
    """Another start policy and another reward for each seed.

    `between`: sd of the prompts' levels. `offset`: added to all rewards.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    start = LlamaForCausalLM(config).eval().requires_grad_(False)
    start.lm_head.weight.mul_(4.0)  # probabilities of words from some percent to about a half
    # Words are worth something by themselves, by their place, and by the word before: each prompt
    # has a taste of its own in part.
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = ((WORDS,), (LENGTH, WORDS), (WORDS, WORDS))
    word, place, pair = (normal(PROMPTS, *shape) + normal(1, *shape) for shape in shapes)
    tokens, real = SEQUENCES, MASK.float()
    of_words = (word[:, tokens] * real).sum(2)  # (PROMPTS, N), as the next two
    of_places = (place[:, torch.arange(LENGTH), tokens] * real).sum(2)
    of_pairs = (pair[:, tokens[:, :-1], tokens[:, 1:]] * real[:, 1:]).sum(2)
    rewards = of_words + of_places + of_pairs
    probabilities = sequence_logprobs(start).exp()
    rewards = rewards - (probabilities * rewards).sum(1, keepdim=True)
    rewards = rewards / (probabilities * rewards**2).sum(1, keepdim=True).sqrt()
    return World(start, rewards + offset + between * torch.randn(PROMPTS, 1, generator=generator))


def token_logprobs(model: LlamaForCausalLM, temperature: float = 1.0) -> torch.Tensor:
    """log pi(y_t|x, y_<t) of every completion's tokens, with gradients.

    (PROMPTS, N, LENGTH) float64, nats, 0 after the end.
    """
    prompts = torch.arange(PROMPTS).repeat_interleave(len(INPUTS))[:, None]
    input_ids = torch.cat([prompts, INPUTS.repeat(PROMPTS, 1)], 1)
    logits = model(input_ids=input_ids, use_cache=False).logits
    logprobs = (logits.double() / temperature).log_softmax(-1)
    logprobs = logprobs.view(PROMPTS, len(INPUTS), LENGTH, WORDS)
    return logprobs[:, ROWS[:, None], torch.arange(LENGTH), SEQUENCES] * MASK


def sequence_logprobs(model: LlamaForCausalLM, temperature: float = 1.0) -> torch.Tensor:
    """log pi(y|x) of every completion, (PROMPTS, N) float64, nats, with gradients."""
    return token_logprobs(model, temperature).sum(2)


@torch.no_grad()
def truth(world: World, policy: LlamaForCausalLM) -> dict[str, float]:
    """Expected reward (over its level under the start), KL to the start in nats, expected length.

    Each is the mean of the prompts.
    """
    logprobs, start = sequence_logprobs(policy), sequence_logprobs(world.start)
    p, p_start = logprobs.exp(), start.exp()
    return {
        "reward": ((p - p_start) * world.rewards).sum(1).mean().item(),
        "kl": (p * (logprobs - start)).sum(1).mean().item(),
        "length": (p * MASK.sum(1)).sum(1).mean().item(),
    }


@torch.no_grad()
def optimal_front(world: World, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """KL and expected reward of pi_start exp(r / b) / Z, for b from large to small.

    The reward is that over its level under the start. No policy lies above this front.
    """
    start = sequence_logprobs(world.start)
    kls, rewards = [0.0], [0.0]
    for b in np.geomspace(100, 0.02, points):
        tilted = (start + world.rewards / b).log_softmax(1)
        kls.append((tilted.exp() * (tilted - start)).sum(1).mean().item())
        rewards.append(((tilted.exp() - start.exp()) * world.rewards).sum(1).mean().item())
    return np.array(kls), np.array(rewards)


def reward_at(curve: list[dict[str, float]], kl: float, name: str = "reward") -> float:
    """Reward, or what else is named, where a curve's "kl" first crosses this one, linearly.

    NaN where it never does.
    """
    for a, b in zip(curve, curve[1:]):
        if a["kl"] < kl <= b["kl"]:
            return a[name] + (b[name] - a[name]) * (kl - a["kl"]) / (b["kl"] - a["kl"])
    return float("nan")


def lookup(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of SEQUENCES that sampled completions (B, T) are."""
    padded = torch.nn.functional.pad(tokens.masked_fill(~mask, 0), (0, LENGTH - tokens.shape[1]))
    powers = WORDS ** torch.arange(LENGTH - 1, -1, -1)
    return torch.searchsorted((SEQUENCES * powers).sum(1), (padded * powers).sum(1))


def train(
    world: World,
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 8,
    lr: float = 3e-5,
    beta: float | Callable[[int], float] = 0.1,
    adapt: Callable[[float, float], float] | None = None,
    anchor: str = "fixed",
    mu: float = 0.01,
    baseline: str = "moving",
    group_size: int = 1,
    init: torch.nn.Module | None = None,
    every: int = 20,
    sampling_temperature: float = 1.0,
    observed: torch.Tensor | None = None,
    reweight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """train_policy.py's loop without all that files and flags need.

    Args:
        beta: may be a function of the step (1, 2, ...).
        adapt: maps a batch's beta and mean k1 to the anchor, in nats, to the next batch's beta.
        init: starts policy and anchor elsewhere than at world.start.
        sampling_temperature: of the sampling alone, not of the log-probs: the classic mistake.
        observed: (PROMPTS, N), the rewards that training sees in place of the true ones.
        reweight: maps advantages (B,) and the completions' places in (PROMPTS, N), (2, B), to other
            advantages.

    Returns the policy and its exact curve.
    """
    policy = copy.deepcopy(init or world.start).requires_grad_(True)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    history, sampling = MovingAverageBaseline(), torch.Generator().manual_seed(seed)
    order = torch.Generator().manual_seed(seed + 1)  # of the prompts
    rewards = world.rewards if observed is None else observed
    curve = [{"step": 0} | truth(world, policy)]
    for step in range(1, steps + 1):
        asked = torch.randint(PROMPTS, (batch_size // group_size,), generator=order)
        asked = asked.repeat_interleave(group_size)
        prompts = (asked[:, None], torch.ones(batch_size, 1))
        tokens, mask, logprobs = generate(
            policy,
            *prompts,
            max_new_tokens=LENGTH,
            temperature=sampling_temperature,
            eos_token_ids=END,
            pad_token_id=0,
            generator=sampling,
        )
        rollout = (*prompts, tokens, mask)
        if sampling_temperature != 1.0:
            logprobs = frozen_logprobs(policy, *rollout, 1.0, batch_size)
        place = torch.stack([asked, lookup(tokens, mask)])
        strength = beta(step) if callable(beta) else beta
        anchor_logprobs = frozen_logprobs(reference, *rollout, 1.0, batch_size)
        scores = rewards[place[0], place[1]].float()
        shaped = kl_penalized_rewards(scores, logprobs, anchor_logprobs, mask, strength)
        if baseline == "rloo":
            advantages = leave_one_out_advantages(shaped, group_size)
        else:
            advantages = shaped if baseline == "none" else history.advantages(shaped)
        if reweight is not None:
            advantages = reweight(advantages, place)
        loss = reinforce_loss(completion_logprobs(policy, *rollout, 1.0), mask, advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if adapt is not None:
            kls = (logprobs - anchor_logprobs).masked_fill(~mask, 0.0).sum(1)
            beta = adapt(strength, kls.mean().item())
        if anchor == "ema":
            ema_update_(list(reference.parameters()), list(policy.parameters()), mu)
        if step % every == 0 or step == steps:
            curve.append({"step": step} | truth(world, policy))
    return policy.requires_grad_(False), curve
