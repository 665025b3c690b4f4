"""Prompts + reward model -> policy, by REINFORCE.

    python train_policy.py                         the toy review world; makes its reward model, too
    python train_policy.py --rm runs/rm-1          ... with a reward model of train_rm.py
    python train_policy.py --rm path --model path-or-id --dataset prompts.jsonl

One step: sample completions, score them, subtract beta times the KL to the anchor, subtract a
baseline, follow advantage x grad log pi. The run's folder holds config.json, metrics.jsonl,
samples.jsonl, results.json, model/ and checkpoints/, from which `--out that-folder --resume` goes
on as if nothing had happened.

Where papers leave a choice: the baseline is a moving average (WARP does not say which it uses); one
gradient step per batch of samples, so there is no ratio and nothing to clip; AdamW without weight
decay.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from minalign.models.functions import check_functions
from minalign.running.errors import one_line_errors, require
from minalign.running.files import write_json
from minalign.running.flag_groups import (
    LoraFlags,
    MachineFlags,
    OptimizerFlags,
    RunFlags,
    TaskFlags,
    resolve_task,
    resolve_training,
)
from minalign.running.flags import fill_in, flag, parse_flags
from minalign.running.ranks import processes
from minalign.running.run import Run, open_run

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch

    from minalign.measuring.policies import Measured
    from minalign.reinforce import MovingAverageBaseline
    from minalign.task import Task


@dataclass
class Config(TaskFlags, OptimizerFlags, LoraFlags, RunFlags, MachineFlags):
    """Policy training."""

    model: str = flag("", "start policy: a run, a folder or a hub id (default: the toy world's)")
    out: str = flag("", "folder of the run (default: the next free runs/policy-N)")
    steps: int = flag(200, "optimizer steps, one batch of fresh samples each", "[1, inf)")
    batch_size: int = flag(64, "completions per step", "[1, 100000]")
    group_size: int | None = flag(
        None, "completions per prompt, side by side (default: 4 for rloo, else 1)", "[1, inf)"
    )
    lr: float | None = flag(
        None, "peak learning rate of AdamW (default: 1e-5, in the toy world 5e-4)", "(0, inf)"
    )
    warmup_steps: int = flag(
        10, "steps over which the learning rate rises; then it is constant", "[0, inf)"
    )
    beta: float = flag(
        0.1, "weight of KL(policy || anchor) in the reward, reward units per nat", "[0, inf)"
    )
    anchor: str = flag(
        "fixed",
        "what the KL is measured from: the start, or an average of the policy",
        ("fixed", "ema"),
    )
    mu: float | None = flag(
        None, "ema anchor: its rate, ema <- (1 - mu) ema + mu theta (default: 0.01)", "(0, 1]"
    )
    baseline: str = flag(
        "moving",
        "mean of all earlier rewards, exponential, of the group",
        ("moving", "ema", "rloo", "none"),
    )
    baseline_decay: float | None = flag(
        None, "ema baseline: decay of the average (default: 0.9)", "[0, 1)"
    )
    uncertainty: str = flag(
        "none",
        "weight by score variance",
        ("none", "inverse_std", "inverse_variance", "one_plus_std"),
    )
    missing_eos_penalty: float = flag(
        1.0, "subtracted where a completion did not end, reward units", "[0, inf)"
    )
    reward_clip: float | None = flag(
        None, "clamp rewards to [-c, c], before penalty and KL", "(0, inf)"
    )
    sampler_dtype: str = flag(
        "auto",
        "precision that samples are drawn in: auto is --dtype's; importance weights make up for it",
        ("auto", "float32", "bfloat16"),
    )
    eval_every: int = flag(50, "steps between evaluations on held-out prompts", "[1, inf)")


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense together."""
    require(config.anchor == "ema" or config.mu is None, "--mu needs --anchor ema")
    require(
        config.baseline == "ema" or config.baseline_decay is None,
        "--baseline-decay needs --baseline ema",
    )
    toy_world, rloo = not config.dataset, config.baseline == "rloo"
    fill_in(config, lr=5e-4 if toy_world else 1e-5, micro_batch_size=config.batch_size)
    fill_in(config, group_size=4 if rloo else 1)
    if config.anchor == "ema":
        fill_in(config, mu=0.01)
    if config.baseline == "ema":
        fill_in(config, baseline_decay=0.9)
    require(not rloo or config.group_size > 1, "--baseline rloo needs --group-size 2 or more")
    require(
        config.batch_size % config.group_size == 0,
        f"--batch-size {config.batch_size}: expected a multiple of --group-size "
        f"{config.group_size}",
    )
    require(
        not toy_world or not config.model,
        f"--model {config.model}: needs --dataset, too: the prompts",
    )
    require(
        toy_world or bool(config.model and config.rm),
        f"--dataset {config.dataset}: needs --model and --rm, too",
    )
    resolve_task(config)
    require(
        not config.lora_dropout,
        "--lora-dropout: for reward models alone: with it, sampling and log-probs are of two "
        "policies",
    )
    resolve_training(config)
    return config


def train(run: Run, task: Task, policy: torch.nn.Module) -> dict[str, float]:
    """Train `policy` in place by run.config; returns the last row of the log.

    With --resume, goes on from the newest checkpoint in the run's folder, if there is one: `policy`
    must be as it was at the start. Raises UserError on a reward or gradient that is not finite (the
    policy then is that of the step before), and KeyboardInterrupt after the step in which
    `run.stop` was set, with a checkpoint of it.
    """
    import torch

    from minalign import merge, rollout
    from minalign.data.prompts import prompt_batches
    from minalign.measuring.batches import finite_mean, measures
    from minalign.models.anchors import trained_and_anchor
    from minalign.models.precision import autocast
    from minalign.models.sampler import Sampler
    from minalign.reinforce import (
        MovingAverageBaseline,
        kl_penalized_rewards,
        reinforce_loss,
        uncertainty_weights,
    )
    from minalign.running.optimizer import Optimizer, warmup_factor

    config, gather = run.config, run.ranks.gather  # what all processes have, one below the other
    mine = run.ranks.share(config.batch_size)  # this process's rows of it
    trained, anchor = trained_and_anchor(policy, task.start, config.anchor)
    moving = list(anchor.parameters()) if config.anchor == "ema" else []
    sampler = Sampler(policy, task.eos_token_ids, config, run.dtype, mine, task.stop)
    optimizer = Optimizer(policy, trained, config, run.ranks)
    score, size = task.reward.score_rollout, config.micro_batch_size
    log_pi = optimizer.forward(rollout.completion_logprobs, run.dtype)
    baseline = MovingAverageBaseline(config.baseline_decay)
    advantages_of, clip = advantage_estimator(config, baseline), config.reward_clip or math.inf
    batches = prompt_batches(
        task.train_prompts, task.prompt_tokens, config.batch_size, config.group_size, config.seed
    )
    state = {"policy": trained, "anchor": moving, "optimizer": optimizer, "baseline": baseline}
    state["sampling"] = sampler.generator

    for step, prompts in run.steps(config.steps, batches, state, "policy"):
        optimizer.lr = config.lr * warmup_factor(step, config.warmup_steps)

        # y ~ pi_theta(.|x), and log pi_theta(y|x)
        samples = sampler.sample(prompts)
        with torch.no_grad(), autocast(run.device, run.dtype):
            # r(x, y), in the text format that the reward model was trained on
            scores = score(task.tokenizer, samples.prompts, samples.completions, size)
            # log pi(y|x) of the start policy, for the x axis, and of the anchor, for the penalty
            passes = (*samples.rows(), config.temperature, size)
            start_logprobs = anchor_logprobs = rollout.frozen_logprobs(task.start, *passes)
            if anchor is not task.start:
                anchor_logprobs = rollout.frozen_logprobs(anchor, *passes)

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)): k1 in the reward, summed, detached
        rewards = scores.rewards.clamp(-clip, clip) - config.missing_eos_penalty * ~samples.ended
        logprobs = (samples.logprobs, anchor_logprobs, samples.mask)
        shaped = gather(kl_penalized_rewards(rewards, *logprobs, config.beta))
        importance = gather(samples.importance)  # all 1 where the policy itself drew
        metrics, sample = measures(run, task, samples, scores, start_logprobs, anchor_logprobs)
        metrics |= {"shaped_reward": finite_mean(shaped).item(), "baseline": baseline.value}
        if not (shaped + importance).isfinite().all():
            run.skip("a reward, KL or importance weight that is not finite")
            write_logs(run, task, policy, metrics | {"lr": optimizer.lr}, sample)
            continue

        # A = r_beta - b, with b from rewards other than the sample's own
        advantages = advantages_of(shaped)
        if config.uncertainty != "none":
            weights = uncertainty_weights(gather(scores.variance), config.uncertainty)
            advantages = advantages * weights
        A = (advantages * importance)[mine]

        # theta <- theta + lr A grad log pi_theta(y|x): summed over tokens, averaged over the batch
        known_grad = -A[:, None] * samples.mask / config.batch_size  # (B, T): d loss / d logprobs
        for rows, weight in optimizer.micro_batches(samples.lengths):
            with optimizer.retry_in_halves():
                loss = None  # a second try must not hold the graph of the first
                batch = (*samples.rows(rows), config.temperature, weight * known_grad[rows])
                loss = reinforce_loss(log_pi(*batch), samples.mask[rows], A[rows])
                (weight * loss.sum() / config.batch_size).backward()
        grad_norm = optimizer.step()

        # ema <- (1 - mu) ema + mu theta, after the policy's own update
        if not math.isfinite(grad_norm):
            run.skip("a gradient that is not finite")
        elif config.anchor == "ema":
            merge.ema_update_(moving, trained, config.mu)
        metrics |= {"advantage_std": advantages.std(correction=0).item(), "grad_norm": grad_norm}
        write_logs(run, task, policy, metrics | {"lr": optimizer.lr}, sample)
    return run.last or {}


def advantage_estimator(
    config: Config, baseline: MovingAverageBaseline
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The one that --baseline names: rewards (B,) of the whole batch -> advantages (B,)."""
    from minalign.reinforce import leave_one_out_advantages

    return {
        "moving": baseline.advantages,
        "ema": baseline.advantages,
        "rloo": functools.partial(leave_one_out_advantages, group_size=config.group_size),
        "none": lambda rewards: rewards,
    }[config.baseline]


COLUMNS = {  # of the printed table: metric -> heading
    "reward": "reward",
    "kl_sft": "kl_sft",
    "kl_anchor": "kl_anch",
    "shaped_reward": "shaped",
    "baseline": "base",
    "advantage_std": "adv_sd",
    "entropy": "entropy",
    "length": "length",
    "ended": "ended",
    "grad_norm": "grad",
    "tokens_per_second": "tok/s",
}


def write_logs(
    run: Run, task: Task, policy: torch.nn.Module, metrics: dict[str, float], sample: dict
) -> None:
    """The step's row and sample; every --eval-every steps also what held-out prompts say."""
    if not run.first:
        return
    config, metrics = run.config, metrics | {"skipped": run.counts["skipped"]}
    evaluating = run.step % config.eval_every == 0 or run.step == config.steps
    if evaluating:
        held_out = evaluate(run, task, policy)[0]
        metrics |= {f"eval_{name}": value for name, value in held_out.items()}
        run.is_best(held_out["reward"] - config.beta * held_out["kl_sft"])
    run.log(metrics, COLUMNS)
    if evaluating:
        said = "  ".join(f"{name} {value:z.3f}" for name, value in held_out.items())
        tqdm.write(f"held out: {said}")
    run.log_line("samples", sample)


def evaluate(run: Run, task: Task, policy: torch.nn.Module) -> Measured:
    """`policy` on the held-out prompts, always with the same random numbers."""
    from minalign.measuring.policies import measure_policy
    from minalign.models.precision import autocast

    config = run.config
    with autocast(run.device, run.dtype):
        return measure_policy(
            policy,
            task,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=12345,
            batch_size=config.micro_batch_size,
        )


def load(run: Run) -> Task:
    """The task that the flags name.

    Without --rm it has the toy world's reward model, which is made on first use.
    """
    from minalign.data import toy
    from minalign.models.saving import try_save
    from minalign.task import load_task
    from train_rm import toy_reward_model

    config = run.config
    with run.ranks.first_before_others():
        model = config.model or toy.start_policy_folder()
        rewards = config.rm or [toy_reward_model(run.device, run.dtype)]
    task = load_task(config, config.model, rewards, run.device, run.dtype, config.micro_batch_size)
    try_save(task.start, task.tokenizer)
    run.is_made_of(
        {"training data": task.train_prompts, "held-out data": task.eval_prompts},
        {f"start model {model}": model} | {f"reward {name}": name for name in rewards},
    )
    require(
        config.uncertainty == "none" or task.reward.num_labels > 2,
        f"--uncertainty {config.uncertainty}: --rm {' '.join(rewards)}: no distribution over "
        "scores: train one with --loss ordinal",
    )
    return task


def policy_of(config: Config, task: Task) -> tuple[torch.nn.Module, Task]:
    """The policy to train, which begins as the start policy, and the task as it is beside it.

    With adapters there is one model in memory: the start policy is what it is with its adapters
    off.
    """
    import torch

    from minalign.models.activations import checkpoint_activations_
    from minalign.models.lora import AdapterView, add_lora_

    if config.lora_rank:
        policy = task.start
        torch.manual_seed(config.seed)
        add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
        task = task._replace(start=AdapterView(policy, None))
    else:
        policy = copy.deepcopy(task.start).requires_grad_(True)
    if config.gradient_checkpointing:
        checkpoint_activations_(policy)
    return policy, task


def save(run: Run, task: Task, policy: torch.nn.Module) -> None:
    """<run's folder>/model, the policy as it is, and best/, that of the best step so far."""
    from minalign.data import toy
    from minalign.models.lora import adapter_parameters
    from minalign.models.saving import save_policy
    from minalign.running.checkpoints import checkpoint_folder, read_checkpoint

    run.require_in_place()
    base = run.config.model or toy.start_policy_folder()
    adapter_of = base if run.config.lora_save == "adapter" else ""
    save_policy(policy, task.tokenizer, run.folder / "model", adapter_of=adapter_of)
    best_step = run.counts.get("best_step")
    best = best_step and read_checkpoint(checkpoint_folder(run.folder, best_step), "no new best/")
    if not best:
        return
    trained = adapter_parameters(policy) or list(policy.parameters())
    last = [parameter.detach().cpu().clone() for parameter in trained]
    for weights in (best["policy"], last):
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.data.copy_(weight)
        if weights is not last:
            save_policy(policy, task.tokenizer, run.folder / "best", adapter_of=adapter_of)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, load, train, show before and after, save."""
    config = resolve(parse_flags(Config, __doc__, argv))
    require(
        config.batch_size % (config.group_size * processes()) == 0,
        f"--batch-size {config.batch_size}: expected a multiple of {processes()} processes x "
        f"--group-size {config.group_size}",
    )
    check_functions(config.rm, config.dataset)
    with open_run(config, "policy") as run:
        from minalign.measuring.policies import before_after_table, show_samples

        policy, task = policy_of(config, load(run))
        if run.first:
            before, samples, _ = evaluate(run, task, policy)
            show_samples("before", samples)
            print()
        try:
            with run.begun():
                train(run, task, policy)
        finally:  # also after Ctrl-C or a reward that is not finite: what was learned is kept
            if run.first and run.step + run.done:
                save(run, task, policy)
        if not run.first:
            return
        after, samples, _ = evaluate(run, task, policy)
        show_samples("after", samples)
        print("\n" + before_after_table(before, after))
        write_json(run.folder / "results.json", {"before": before, "after": after})
        last = after["reward"] - config.beta * after["kl_sft"]
        best, best_step = (run.counts.get(name) for name in ("best", "best_step"))
        if best_step and not last >= best:
            print(
                f"\nheld-out reward - beta KL: {last:.3f} at the last step, worse than {best:.3f} "
                f"at step {best_step}, which is {run.folder}/best"
            )
        print(f"\nsaved {run.folder}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
