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
from collections.abc import Callable, Sequence
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
from minalign.running.flags import dashed, fill_in, flag, parse_flags
from minalign.running.ranks import processes
from minalign.running.run import Run, open_run

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch

    from minalign.data.chat import TokenizedPrompt
    from minalign.measuring.policies import Measured
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
        0.1,
        "weight of KL(policy || anchor) in the reward, reward units per nat; with --target-kl its "
        "first value and its floor",
        "[0, inf)",
    )
    target_kl: float | None = flag(
        None, "beta rises and falls to keep KL(policy || start) at so many nats", "(0, inf)"
    )
    kl_horizon: int | None = flag(
        None, "completions over which beta may move by a fifth (default: 5 batches)", "[1, inf)"
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
        "mean of all earlier rewards; exponential; of each prompt; of the group; that shrunk to "
        "the batch's",
        ("moving", "ema", "prompt", "rloo", "shrink", "none"),
    )
    baseline_decay: float | None = flag(
        None, "ema, prompt, shrink baselines: decay of their averages (default: 0.9)", "[0, 1)"
    )
    standardize_advantages: bool = flag(
        False, "divide by their deviation in the batch: lr then does not depend on reward scales"
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
        ("auto", "float32", "bfloat16", "float16"),
    )
    importance: str = flag(
        "sequence",
        "those weights: one ratio per completion, one per token, or none above the limit",
        ("sequence", "token", "mask"),
    )
    importance_limit: float | None = flag(
        None, "largest of those weights (default: 2, for mask 3)", "(0, inf)"
    )
    eval_every: int = flag(50, "steps between evaluations on held-out prompts", "[1, inf)")
    stop_on_decline: bool = flag(
        False, "end where held-out reward - beta KL falls twice below its best, beyond its error"
    )


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense together."""
    require(config.anchor == "ema" or config.mu is None, "--mu needs --anchor ema")
    averaged = config.baseline in ("ema", "prompt", "shrink")
    require(
        averaged or config.baseline_decay is None,
        "--baseline-decay needs --baseline ema, prompt or shrink",
    )
    require(bool(config.target_kl) or not config.kl_horizon, "--kl-horizon needs --target-kl")
    require(
        not config.target_kl or config.anchor == "fixed",
        "--target-kl needs --anchor fixed: no beta pulls back a policy whose anchor follows it",
    )
    require(
        not config.target_kl or config.beta > 0,
        "--target-kl: expected --beta above 0: it moves by factors",
    )
    toy_world, grouped = not config.dataset, config.baseline in ("rloo", "shrink")
    fill_in(config, lr=5e-4 if toy_world else 1e-5, micro_batch_size=config.batch_size)
    fill_in(config, group_size=4 if grouped else 1)
    fill_in(config, importance_limit=3.0 if config.importance == "mask" else 2.0)
    if config.target_kl:
        fill_in(config, kl_horizon=5 * config.batch_size)
        require(
            config.kl_horizon >= config.batch_size,
            f"--kl-horizon {config.kl_horizon}: expected --batch-size {config.batch_size} or more",
        )
    if config.anchor == "ema":
        fill_in(config, mu=0.01)
    if averaged:
        fill_in(config, baseline_decay=0.9)
    require(
        not grouped or config.group_size > 1,
        f"--baseline {config.baseline} needs --group-size 2 or more",
    )
    require(
        config.baseline != "shrink" or config.batch_size > config.group_size,
        f"--baseline shrink: expected --batch-size above --group-size {config.group_size}: it "
        "leans on other prompts",
    )
    require(
        not config.standardize_advantages or config.batch_size > 1,
        "--standardize-advantages: expected --batch-size 2 or more: one has no deviation",
    )
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
    from minalign.models.anchors import start_and_anchor_logprobs, trained_and_anchor
    from minalign.models.precision import autocast
    from minalign.models.sampler import Sampler
    from minalign.reinforce import (
        adapted_beta,
        kl_penalized_rewards,
        reinforce_loss,
        standardized_advantages,
        uncertainty_weights,
    )
    from minalign.running.optimizer import Optimizer, warmup_factor

    config, gather = run.config, run.ranks.gather  # what all processes have, one below the other
    mine = run.ranks.share(config.batch_size)  # this process's rows of it
    trained, anchor = trained_and_anchor(policy, task.start, config.anchor)
    moving = list(anchor.parameters()) if config.anchor == "ema" else []
    frozen = functools.partial(start_and_anchor_logprobs, task.start, anchor)
    sampler = Sampler(policy, task.eos_token_ids, config, run.dtype, mine, task.stop)
    optimizer = Optimizer(policy, trained, config, run.ranks)
    score, size = task.reward.score_rollout, config.micro_batch_size
    log_pi = optimizer.forward(rollout.completion_logprobs, run.dtype)
    advantages_of, baseline = advantage_estimator(config)
    clip, run.counts["beta"] = config.reward_clip or math.inf, config.beta
    target = (config.target_kl, config.batch_size / (config.kl_horizon or 1), config.beta)
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
            start_logprobs, anchor_logprobs = frozen(samples.rows(), config.temperature, size)

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)): k1 in the reward, summed, detached
        rewards = scores.rewards.clamp(-clip, clip) - config.missing_eos_penalty * ~samples.ended
        logprobs = (samples.logprobs, anchor_logprobs, samples.mask)
        shaped = gather(kl_penalized_rewards(rewards, *logprobs, run.counts["beta"]))
        applies = gather(scores.applies)  # which samples have a reward; None where all have
        metrics, sample = measures(run, task, samples, scores, start_logprobs, anchor_logprobs)
        shaped_mean = finite_mean(shaped, applies).item()
        metrics |= {"shaped_reward": shaped_mean, "baseline": baseline.value}
        if not (shaped + gather(samples.importance.sum(1))).isfinite().all():
            run.skip("a reward, KL or importance weight that is not finite")
            write_logs(run, task, policy, metrics | {"lr": optimizer.lr}, sample)
            continue

        # A = r_beta - b, with b from rewards other than the sample's own
        advantages = advantages_of(shaped, prompts, applies)
        if config.standardize_advantages:
            advantages = standardized_advantages(advantages, applies)
        if config.uncertainty != "none":
            advantages *= uncertainty_weights(gather(scores.variance), config.uncertainty)
        A = advantages[mine, None] * samples.importance  # (B, T): all 1 where the policy drew

        # theta <- theta + lr A grad log pi_theta(y|x): summed over tokens, averaged over the batch
        known_grad = -A * samples.mask / config.batch_size  # (B, T): d loss / d logprobs
        for rows, weight in optimizer.micro_batches(samples.lengths):
            with optimizer.retry_in_halves():
                loss = None  # a second try must not hold the graph of the first
                batch = (*samples.rows(rows), config.temperature, weight * known_grad[rows])
                loss = reinforce_loss(log_pi(*batch), samples.mask[rows], A[rows])
                (weight * loss.sum() / config.batch_size).backward()
        grad_norm = optimizer.step()

        # ema <- (1 - mu) ema + mu theta, after the policy's own update
        if not math.isfinite(grad_norm):
            run.skip("a gradient that is not finite", overflow=optimizer.overflowed)
        elif config.anchor == "ema":
            merge.ema_update_(moving, trained, config.mu)
        elif config.target_kl:  # beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)
            run.counts["beta"] = adapted_beta(run.counts["beta"], metrics["kl_anchor"], *target)
        metrics |= {"advantage_std": advantages.std(correction=0).item(), "grad_norm": grad_norm}
        write_logs(run, task, policy, metrics | {"lr": optimizer.lr}, sample)
    return run.last or {}


def advantage_estimator(config: Config) -> tuple[Callable[..., torch.Tensor], typing.Any]:
    """What --baseline names, and the part of it that remembers earlier batches.

    The first is a function of the whole batch: (rewards (B,), B prompts, (B,) bool which of them
    have a reward, None for all) -> advantages (B,), 0 where there is none.
    """
    import torch

    from minalign import reinforce

    decay, group_size = config.baseline_decay, config.group_size
    baseline = reinforce.MovingAverageBaseline(decay)
    if config.baseline == "prompt":
        baseline = reinforce.PromptBaseline(decay)
    if config.baseline == "shrink":
        baseline = reinforce.ShrinkageBaseline(group_size, decay)
    grouped = {
        "rloo": functools.partial(reinforce.leave_one_out_advantages, group_size=group_size),
        "shrink": baseline.advantages,
    }

    def advantages_of(
        rewards: torch.Tensor, prompts: Sequence[TokenizedPrompt], applies: torch.Tensor | None
    ) -> torch.Tensor:
        if config.baseline in grouped:
            return grouped[config.baseline](rewards, applies=applies)
        applies = torch.ones_like(rewards, dtype=torch.bool) if applies is None else applies
        advantages, kept = torch.zeros_like(rewards), rewards[applies]
        if not len(kept):
            return advantages
        if config.baseline == "prompt":
            rows = [prompt.row for prompt, one in zip(prompts, applies.tolist()) if one]
            kept = baseline.advantages(kept, rows)
        elif config.baseline != "none":
            kept = baseline.advantages(kept)
        advantages[applies] = kept
        return advantages

    return advantages_of, baseline


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
    from minalign.measuring.progress import judge

    if not run.first:
        return
    config, metrics = run.config, metrics | {"skipped": run.counts["skipped"]}
    evaluating = run.step % config.eval_every == 0 or run.step == config.steps
    if evaluating:
        measured = evaluate(run, task, policy)
        metrics |= {f"eval_{name}": value for name, value in measured.metrics.items()}
    run.log(metrics, COLUMNS | ({"beta": "beta"} if config.target_kl else {}))
    if evaluating:
        said = "  ".join(f"{name} {value:z.3f}" for name, value in measured.metrics.items())
        tqdm.write(f"held out: {said}")
        judge(run, measured)
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
    given = {"importance", "importance_limit"} & (getattr(config, "given", None) or {}).keys()
    if given and str(run.dtype) == "torch.float32" and config.sampler_dtype in ("auto", "float32"):
        named = ", ".join(map(dashed, sorted(given)))
        print(f"note: {named}: in float32 the policy itself draws: all weights are 1")
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


def save(run: Run, task: Task, policy: torch.nn.Module, before: dict[str, float]) -> None:
    """<run's folder>/model, the policy as it is, and best/, that of the best step so far.

    Each with its card, which tells what held-out prompts said `before` training, too.
    """
    from minalign.data import toy
    from minalign.models.lora import adapter_parameters
    from minalign.models.saving import save_policy
    from minalign.running.card import policy_card
    from minalign.running.checkpoints import checkpoint_folder, read_checkpoint

    run.require_in_place()
    base = run.config.model or toy.start_policy_folder()
    adapter_of = base if run.config.lora_save == "adapter" else ""

    def save_as(name: str, step: int) -> None:
        title = f"Policy after {step} steps of REINFORCE"
        card = policy_card(run.ran, title, run.folder, step, {"start policy": before})
        save_policy(policy, task.tokenizer, run.folder / name, adapter_of, card)

    save_as("model", (run.last or {"step": 0})["step"])
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
            save_as("best", best_step)


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
        from minalign.measuring.progress import judge, objective, of_these_prompts

        policy, task = policy_of(config, load(run))
        if run.first:
            before, samples, _ = measured = evaluate(run, task, policy)
            judge(run, measured)
            show_samples("before", samples)
            print()
        try:
            with run.begun():
                train(run, task, policy)
        finally:  # also after Ctrl-C or a reward that is not finite: what was learned is kept
            if run.first and run.step + run.done:
                save(run, task, policy, before)
        if not run.first:
            return
        after, samples, _ = evaluate(run, task, policy)
        show_samples("after", samples)
        best, results = of_these_prompts(run, "best"), {"before": before, "after": after}
        if best and run.last and best["step"] == run.last["step"]:
            best = None
        if best:
            results["best"] = {"step": best["step"]} | best["metrics"]
        write_json(run.folder / "results.json", results)
        between = (best["step"], best["metrics"]) if best else None
        print("\n" + before_after_table(before, after, between))
        if best:
            last, value = objective(after, run), objective(best["metrics"], run)
            why = "worse than" if last < value else f"with a KL above 1.2 x {config.target_kl}, and"
            print(
                f"\nheld-out reward - beta KL: {last:.3f} at the last step, {why} {value:.3f} at "
                f"step {best['step']}, which is {run.folder}/best"
            )
        print(f"\nsaved {run.folder}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
