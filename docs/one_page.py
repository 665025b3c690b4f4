"""REINFORCE on one page, in the toy review world.

Run `python docs/one_page.py` from the repository's root. These are the plain functions with nothing
hidden: no cache, no micro-batches, no checkpoints. train_policy.py takes the same step with all of
them.
"""

import copy
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone, not installed
from minalign.data import toy
from minalign.data.chat import encode
from minalign.models.loading import load_policy
from minalign.models.padding import pad
from minalign.reinforce import MovingAverageBaseline, kl_penalized_rewards, reinforce_loss
from minalign.rollout import sample, sequence_logprobs


def train(steps: int = 60, batch_size: int = 16, beta: float = 0.1, seed: int = 0) -> list[float]:
    """Train a policy with REINFORCE; returns the mean true reward of each step's samples.

    Args:
        steps: updates of the policy.
        batch_size: completions per step.
        beta: weight of KL(policy || anchor) in the reward, reward units per nat.
        seed: of prompts and samples.
    """
    policy, tokenizer = load_policy(toy.start_policy_folder())
    anchor = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    baseline = MovingAverageBaseline()
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    curve = []

    for step in range(1, steps + 1):
        # x: prompts, padded on the left
        texts = [toy.write_prompt(rng) for _ in range(batch_size)]
        prompts = pad([encode(tokenizer, text, end=False) for text in texts], "left")

        # y ~ pi_theta(.|x), and log pi_theta(y|x), token by token
        uniforms = torch.rand(batch_size, 24, generator=generator, dtype=torch.double)
        end = tokenizer.eos_token_id
        tokens, mask = sample(
            policy, *prompts, uniforms=uniforms, temperature=1.0, eos_token_ids=end
        )
        logprobs = sequence_logprobs(policy, *prompts, tokens, mask, temperature=1.0)

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)), detached
        answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rewards = torch.tensor([toy.gold_reward(f"{x} {y}") for x, y in zip(texts, answers)])
        with torch.no_grad():
            anchor_logprobs = sequence_logprobs(anchor, *prompts, tokens, mask, temperature=1.0)
        shaped = kl_penalized_rewards(rewards, logprobs, anchor_logprobs, mask, beta)

        # theta <- theta + lr (r_beta - b) grad log pi_theta(y|x)
        advantages = baseline.advantages(shaped)
        loss = reinforce_loss(logprobs, mask, advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(rewards.mean().item())
        print(f"step {step:3d}  reward {curve[-1]:6.2f}")
    return curve


if __name__ == "__main__":
    train()
