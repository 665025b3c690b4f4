"""Runs in the toy world for the studies: a start policy for all, a reward model of each seed's own.

Gold reward is known there, and the reward model sees a noisy rater alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from exact_world import reward_at

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_policy
import train_rm
from minalign.running.run import Run
from minalign.task import Task

CPU, FLOAT32 = torch.device("cpu"), torch.float32


def train_reward_model(folder: Path, seed: int, **flags) -> dict[str, float]:
    """train_rm.py into `folder`; returns what its held-out pairs say.

    The seed draws the pairs, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, train_rm.resolve(train_rm.Config(seed=seed, **flags)), CPU, FLOAT32)
    return train_rm.train(run, *train_rm.load_run(run))


def train_curve(
    folder: Path,
    seed: int,
    prepare_: Callable[[torch.nn.Module], None] | None = None,
    adapt: Callable[[Task], Task] | None = None,
    **flags,
) -> list[dict[str, float]]:
    """train_policy.py into `folder`; returns its evaluations, the start's first.

    Each has "step", "kl" (to the start, nats), "reward", "gold" and whatever else is measured on
    held-out prompts. The policy itself is not saved.

    Args:
        prepare_: changes the policy in place before training.
        adapt: changes the task; the parts of its reward's scores are measured, too ("reward NAME").
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = train_policy.resolve(train_policy.Config(seed=seed, save_every=10**6, **flags))
    run = Run(folder, config, CPU, FLOAT32)
    task = train_policy.load(run) if adapt is None else adapt(train_policy.load(run))
    policy, task = train_policy.policy_of(config, task)
    if prepare_ is not None:
        prepare_(policy)
    start = train_policy.evaluate(run, task, policy).metrics
    train_policy.train(run, task, policy)
    points = [{"step": 0} | start]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        held_out = {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
        points += [{"step": row["step"]} | held_out] if held_out else []
    return [{"kl": point["kl_sft"], **point} for point in points]


def at(curve: list[dict[str, float]], kl: float) -> float:
    """Gold reward where a curve first crosses this KL."""
    return reward_at(curve, kl, "gold")
