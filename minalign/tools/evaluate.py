"""Policies, the best of n samples, or reward models, measured on the same rows.

    # policies in the toy world
    python -m minalign evaluate --model runs/policy-1 runs/policy-2 --rm runs/rm-1
    # policies on other prompts
    python -m minalign evaluate --model runs/my-policy --start path-or-id --rm runs/my-rm \\
        --dataset prompts.jsonl
    # the best of n samples of the start policy
    python -m minalign evaluate --best-of 1 2 4 8 16
    # reward models: no --model
    python -m minalign evaluate --rm runs/rm-1 runs/rm-2 --dataset allenai/reward-bench \\
        --split filtered

Policies: of runs, the flags of the data, --eval-prompts, the start policy, the rewards,
--temperature, --max-new-tokens and --format are those that the runs had, where none are given: the
held-out prompts then are the same.
Every policy is set against the start policy, and against the first of --model. As a control, the
start policy is set against itself with other random numbers: differences no larger than that are
noise. The folder gets results.json and samples.jsonl.

Reward models: rows of RewardBench, RewardBench 2, RM-Bench or any chosen and rejected texts, all of
them, none held out. The first of --rm is what the others are compared with. With --rm-weights,
--rm-combine or --rm-average they are one reward. The folder gets results.json and scores.jsonl.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..running.device import pick_device, pick_dtype
from ..running.errors import require
from ..running.flag_groups import (
    DeviceFlags,
    TaskFlags,
    resolve_data,
    resolve_rewards,
    resolve_task,
)
from ..running.flags import SEEDS, dashed, flag
from ..running.run import show_config
from ..running.run_folder import claimed_folder
from .settings import DATA, REWARD, SAMPLING, parse_flags_of_runs

OF_REWARDS = ("by",)  # the other flags below are for both, or for policies
OF_POLICIES = (
    "start eval_prompts format max_new_tokens temperature stop prompt_tokens eval_split".split()
)
OF_POLICIES += "max_prompt_tokens eval_share split_seed standardize_rewards".split()


@dataclass
class Config(TaskFlags, DeviceFlags):
    """Evaluation."""

    model: list[str] | None = flag(
        None, "policies: runs, folders or hub ids; the first is what the others are compared with"
    )
    start: str = flag("", "policy that the KL is measured to (default: the toy world's)")
    best_of: list[int] | None = flag(
        None, "also the best of n samples of the start policy, for each of these n", "[1, 10000]"
    )
    by: str = flag(
        "",
        "of reward models: column of the data whose values are measured apart, too (default: "
        "subset or domain, where there is one)",
    )
    eval_prompts: int = flag(128, "held-out prompts, one completion each", "[2, inf)")
    batch_size: int = flag(16, "completions per pass: memory, not the result", "[1, inf)")
    seed: int = flag(
        0, "seed of sampling and of the intervals; the control has the next one", SEEDS
    )
    out: str = flag("", "folder of the results (default: the next free runs/evaluation-N)")


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags.

    Raises:
        UserError: flags that make no sense together.
    """
    for name in ("model", "best_of"):
        values = getattr(config, name) or []
        for value in values:
            require(values.count(value) == 1, f"{dashed(name)} {value}: given twice")
    if not (config.model or config.best_of):
        require(
            bool(config.rm and config.dataset),
            "--model is missing: policies (or --best-of), or --rm and --dataset: reward models",
        )
        resolve_data(config)
        resolve_rewards(config)
        for name in OF_POLICIES:  # config.json and the header have what counts
            setattr(config, name, None)
        return config
    require("start" not in (config.model or ()), "--model start: is a name of the table: ./start")
    if not config.dataset:
        require(not config.start, f"--start {config.start}: needs --dataset, too: the prompts")
    else:
        given = bool(config.start and config.rm)
        require(given, f"--dataset {config.dataset}: needs --start and --rm, too")
    resolve_task(config)
    return config


def require_fitting(config: Config, given: set[str]) -> None:
    """UserError where a flag was `given` that the other kind of evaluation has."""
    policies = bool(config.model or config.best_of)
    others = [name for name in (OF_REWARDS if policies else OF_POLICIES) if dashed(name) in given]
    which, fix = "policies", "--model or --best-of"
    if policies:
        which, fix = "reward models", "--rm and --dataset, and neither --model nor --best-of"
    named = ", ".join(map(dashed, others))
    require(not others, f"{named}: for {which} alone: give {fix}, or leave it out")


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, measure, print and save."""
    take = SAMPLING | {name: name for name in (*DATA, *REWARD, "eval_prompts")}
    take["start"], prog = "model", "minalign evaluate"
    config = parse_flags_of_runs(Config, __doc__, argv, prog, lambda c: c.model or [], take)
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    resolve(config)
    require_fitting(config, given)
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)

    from ..models.functions import check_functions

    check_functions(config.rm, config.dataset)
    with claimed_folder(config, "evaluation") as (out, _):
        show_config(config, device, reason, dtype)
        if config.model or config.best_of:
            from .policies_compared import compare_policies

            compare_policies(config, device, dtype, out)
        else:
            from .rewards_compared import compare_rewards

            compare_rewards(config, device, dtype, out)
