"""Prompts + reward model -> policy, by REINFORCE.

    python train_policy.py                                  the toy review world: makes its reward model, too
    python train_policy.py --rm runs/rm-1                   ... with a reward model of train_rm.py
    python train_policy.py --rm path --model path-or-id --dataset prompts.jsonl

One step: sample completions, score them, subtract beta times the KL to the anchor, subtract a baseline, follow
advantage x grad log pi. The run's folder holds config.json, metrics.jsonl, samples.jsonl, results.json, model/ and
checkpoints/, from which `--out that-folder --resume` goes on as if nothing had happened.

Where papers leave a choice: the baseline is a moving average (WARP does not say which it uses); one gradient step per
batch of samples, so there is no ratio and nothing to clip; AdamW without weight decay.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minalign.common import (
    UserError, autocast, checkpoint_activations_, halving, one_line_errors, pick_device, pick_dtype, require, show_config,
    stop_after_step, warmup_factor,
)  # fmt: skip
from minalign.flags import DataFlags, LoraFlags, MachineFlags, RunFlags, flag, parse_flags, resolve_shared
from minalign.ranks import Ranks, process_group
from minalign.runs import JsonLines, MetricsLog, open_run, write_config, write_whole

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch


@dataclass
class Config(DataFlags, LoraFlags, RunFlags, MachineFlags):
    """Policy training."""

    model: str = flag("", "start policy: a run, a folder or a hub id (default: the toy world's)")
    rm: list[str] | None = flag(None, "reward: a run of train_rm.py, a folder, a hub id, or a Python module:function; may be "
                                "several (default: a reward model for the toy world)")  # fmt: skip
    rm_weights: list[float] | None = flag(None, "weights of several rewards, each standardised (default: 1 each)")
    rm_average: bool = flag(False, "of several reward models take one whose weights are their average (WARM)")
    standardize_rewards: bool = flag(False, "by mean and deviation of the start policy's rewards: beta then means the same "
                                     "for any reward model")  # fmt: skip
    prompt_column: str = flag("", "column of the prompts (default: prompt, messages, chosen or text)")
    prompt_tokens: str = flag("", "so many first tokens of each text, drawn anew each time (default for a column text: 5-15)")
    max_prompt_tokens: int | None = flag(None, "longer prompts are dropped and counted (default: what the context leaves)",
                                         within="[1, inf)")  # fmt: skip
    out: str = flag("", "folder of the run (default: the next free runs/policy-N)")
    seed: int = flag(0, "seed of prompt order and sampling")
    steps: int = flag(200, "optimizer steps, one batch of fresh samples each", within="[1, inf)")
    batch_size: int = flag(64, "completions a step", within="[1, inf)")
    group_size: int | None = flag(None, "completions a prompt, side by side (default: 4 for rloo, else 1)", within="[1, inf)")
    micro_batch_size: int | None = flag(None, "completions a pass: memory, not the gradient (default: all)", within="[1, inf)")
    lr: float | None = flag(None, "peak learning rate of AdamW (default: 1e-5, in the toy world 5e-4)", within="(0, inf)")
    warmup_steps: int = flag(10, "steps over which the learning rate rises; then it is constant", within="[0, inf)")
    max_grad_norm: float = flag(1.0, "gradient norm above which the whole batch's gradient is scaled down", within="(0, inf)")
    temperature: float = flag(1.0, "of sampling and of every log-prob", within="(0, inf)")
    max_new_tokens: int | None = flag(None, "tokens of a completion (default: 64, in the toy world 32)", within="[1, inf)")
    beta: float = flag(0.1, "weight of KL(policy || anchor) in the reward, reward units per nat", within="[0, inf)")
    anchor: str = flag("fixed", "what the KL is measured from: the start, or an average of the policy", ("fixed", "ema"))
    mu: float | None = flag(None, "ema anchor: its rate, ema <- (1 - mu) ema + mu theta (default: 0.01)", within="(0, 1]")
    baseline: str = flag("moving", "mean of all earlier rewards, exponential, of the group", ("moving", "ema", "rloo", "none"))
    baseline_decay: float | None = flag(None, "ema baseline: decay of the average (default: 0.9)", within="[0, 1)")
    uncertainty: str = flag("none", "weight by score variance", ("none", "inverse_std", "inverse_variance", "one_plus_std"))
    missing_eos_penalty: float = flag(1.0, "subtracted where a completion did not end, reward units", within="[0, inf)")
    reward_clip: float | None = flag(None, "clamp rewards to [-c, c], before penalty and KL", within="(0, inf)")
    eval_prompts: int = flag(128, "held-out prompts, scored before, during and after", within="[1, inf)")
    eval_every: int = flag(50, "steps between evaluations", within="[1, inf)")


COLUMNS = {  # of the printed table: metric -> heading
    "reward": "reward", "kl_sft": "kl_sft", "kl_anchor": "kl_anch", "shaped_reward": "shaped", "baseline": "base",
    "advantage_std": "adv_sd", "entropy": "entropy", "length": "length", "ended": "ended", "grad_norm": "grad",
    "tokens_per_second": "tok/s",
}  # fmt: skip


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense, alone or together."""
    require(config.anchor == "ema" or config.mu is None, "--mu needs --anchor ema")
    require(config.baseline == "ema" or config.baseline_decay is None, "--baseline-decay needs --baseline ema")
    toy_world = not config.dataset
    config.lr = (5e-4 if toy_world else 1e-5) if config.lr is None else config.lr
    config.max_new_tokens = (32 if toy_world else 64) if config.max_new_tokens is None else config.max_new_tokens
    config.group_size = (4 if config.baseline == "rloo" else 1) if config.group_size is None else config.group_size
    config.micro_batch_size = config.batch_size if config.micro_batch_size is None else config.micro_batch_size
    if config.anchor == "ema":
        config.mu = 0.01 if config.mu is None else config.mu
    if config.baseline == "ema":
        config.baseline_decay = 0.9 if config.baseline_decay is None else config.baseline_decay
    require(config.baseline != "rloo" or config.group_size > 1, "--baseline rloo needs --group-size 2 or more")
    require(config.batch_size % config.group_size == 0,
            f"--batch-size {config.batch_size}: expected a multiple of --group-size {config.group_size}")  # fmt: skip
    require(not toy_world or not config.model, f"--model {config.model}: needs --dataset, too: the prompts")
    require(toy_world or bool(config.model and config.rm), f"--dataset {config.dataset}: needs --model and --rm, too")
    require(bool(config.rm) or not (config.rm_average or config.rm_weights), "--rm-average, --rm-weights: need --rm")
    require(
        not config.lora_dropout, "--lora-dropout: for reward models alone: with it, sampling and log-probs are of two policies"
    )
    return resolve_shared(config)


def train(
    config: Config, task, policy: torch.nn.Module, out: Path, dtype: torch.dtype, stop: threading.Event | None = None,
    ranks: Ranks = Ranks(),
) -> dict[str, float]:  # fmt: skip
    """Train `policy` in place by `config` on a minalign.task.Task, log into `out`; returns the last step's metrics.

    With config.resume, goes on from the newest checkpoint in `out`, if there is one: `policy` must be as it was at the start.
    Raises UserError on a reward or gradient that is not finite (the policy then is that of the step before), and
    KeyboardInterrupt after the step in which `stop` was set, with a checkpoint of it.
    """
    import torch

    from minalign.batches import length_parts, pad, shuffled_forever, tokens_a_pass
    from minalign.checkpoint import load_checkpoint, save_checkpoint
    from minalign.evaluate import decode_parts, split_end
    from minalign.logprobs import kl_k1
    from minalign.lora import AdapterView, adapter_parameters
    from minalign.merge import ema_update_
    from minalign.reinforce import (
        MovingAverageBaseline, kl_penalized_rewards, leave_one_out_advantages, reinforce_loss, uncertainty_weights,
    )  # fmt: skip
    from minalign.rollout import completion_logprobs, draw_uniforms, frozen_logprobs, generate
    from minalign.task import beginning

    device, tokenizer = policy.device, task.tokenizer
    if config.lora_rank:  # the anchor is this very model with its adapters off, or with an average of them
        trained = adapter_parameters(policy)
        anchor = AdapterView(policy, None if config.anchor == "fixed" else [p.detach().clone() for p in trained])
        shares_start = config.anchor == "fixed" and isinstance(task.start, AdapterView)
    else:
        trained = list(policy.parameters())
        at_start = all(torch.equal(a, b) for a, b in zip(trained, task.start.parameters()))
        shares_start = config.anchor == "fixed" and at_start  # then no second copy is needed
        anchor = task.start if shares_start else copy.deepcopy(policy).requires_grad_(False)
    moving_anchor = list(anchor.parameters()) if config.anchor == "ema" else []
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    baseline = MovingAverageBaseline(config.baseline_decay)
    sampling = torch.Generator(device).manual_seed(config.seed)
    prompts, lengths = shuffled_forever(task.train_prompts, config.seed), random.Random(config.seed)
    done, best_step, best, skipped = 0, None, -math.inf, 0
    if config.resume and (found := load_checkpoint(out)):
        done, saved = found
        with torch.no_grad():
            for tensor, value in zip([*trained, *moving_anchor], saved["policy"] + saved["anchor"], strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        baseline.load_state_dict(saved["baseline"])
        if saved["sampling"].numel() == sampling.get_state().numel():
            sampling.set_state(saved["sampling"])
        else:  # another --device has another kind of generator
            sampling.manual_seed(config.seed + done)
        best_step, best, skipped = saved["best_step"], saved["best"], saved["skipped"]
    if ranks.first:
        log, samples_log = MetricsLog(out, done, config.tensorboard), JsonLines(out / "samples.jsonl", done)
    metrics = log.lines.last if ranks.first else None
    mine = ranks.share(config.batch_size)  # this process's rows of the batch; all of them without torchrun

    def next_prompts():
        count = config.batch_size // config.group_size
        return [beginning(next(prompts), task.prompt_tokens, lengths) for _ in range(count)]

    for _ in range(done):
        next_prompts()

    for step in tqdm(
        range(done + 1, config.steps + 1), desc="policy", unit="step", initial=done, total=config.steps, disable=not ranks.first
    ):
        began = time.monotonic()
        optimizer.param_groups[0]["lr"] = config.lr * warmup_factor(step, config.warmup_steps)

        # x: prompts, each group_size times in a row; y ~ pi_theta(.|x)
        asked = [prompt for prompt in next_prompts() for _ in range(config.group_size)][mine]
        uniforms = draw_uniforms(config.batch_size, config.max_new_tokens, device, sampling)[mine]
        input_ids, attention_mask = pad([prompt.ids for prompt in asked], "left", device)  # (B, P)
        with torch.no_grad(), autocast(device, dtype):
            tokens, mask, sampling_logprobs = generate(
                policy, input_ids, attention_mask, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                eos_token_ids=task.eos_token_ids, pad_token_id=0, uniforms=uniforms,
            )  # fmt: skip

            # r(x, y), in the text format that the reward model was trained on
            completions, ended = split_end(tokens, mask, task.eos_token_ids)
            rewards, score_variance, parts = task.reward.score_rollout(tokenizer, asked, completions, config.micro_batch_size)

            # log pi(y|x) of the start policy (for the x axis) and of the anchor (for the penalty)
            rollout = (input_ids, attention_mask, tokens, mask)
            start_logprobs = anchor_logprobs = frozen_logprobs(
                task.start, *rollout, config.temperature, config.micro_batch_size
            )
            if not shares_start:
                anchor_logprobs = frozen_logprobs(anchor, *rollout, config.temperature, config.micro_batch_size)

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)): k1 in the reward, summed over the sequence, detached
        scores = rewards if config.reward_clip is None else rewards.clamp(-config.reward_clip, config.reward_clip)
        scores = scores - config.missing_eos_penalty * ~ended
        shaped = ranks.gather(kl_penalized_rewards(scores, sampling_logprobs, anchor_logprobs, mask, config.beta))  # all ranks'
        finite = bool(shaped.isfinite().all())
        if not finite and config.on_nonfinite == "stop":
            raise UserError(
                f"step {step}: a reward or KL that is not finite: the policy of step {step - 1} is the last good one"
            )

        # A = r_beta - b, with b from rewards other than the sample's own
        baseline_before = baseline.value
        if not finite:
            advantages = torch.zeros_like(shaped)
        elif config.baseline == "rloo":
            advantages = leave_one_out_advantages(shaped, config.group_size)
        elif config.baseline == "none":
            advantages = shaped
        else:
            advantages = baseline.advantages(shaped)
        if finite and config.uncertainty != "none":
            advantages = advantages * uncertainty_weights(ranks.gather(score_variance), config.uncertainty)
        own_advantages = advantages[mine]

        # theta <- theta + lr A grad log pi_theta(y|x): summed over tokens, averaged over the whole batch
        known_grad = -own_advantages[:, None] * mask / config.batch_size  # (B, T): d loss / d logprobs, before the pass
        row_lengths = (attention_mask.sum(1) + mask.sum(1)).tolist()

        def gradient_pass(micro_batch_size):
            optimizer.zero_grad()
            for part in length_parts(row_lengths, micro_batch_size, tokens_a_pass(policy)):
                with autocast(device, dtype):
                    logprobs = completion_logprobs(policy, *(x[part] for x in rollout), config.temperature, known_grad[part])
                (reinforce_loss(logprobs, mask[part], own_advantages[part]).sum() / config.batch_size).backward()

        config.micro_batch_size = halving(config.micro_batch_size, gradient_pass)
        ranks.sum_([parameter.grad for parameter in trained if parameter.grad is not None])
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        finite = finite and bool(grad_norm.isfinite())
        if finite:
            optimizer.step()
            if config.anchor == "ema":  # ema <- (1 - mu) ema + mu theta, after the policy's own update
                ema_update_(moving_anchor, trained, config.mu)
        elif config.on_nonfinite == "stop":
            raise UserError(
                f"step {step}: a gradient that is not finite: the policy of step {step - 1} is the last good one: lower --lr"
            )
        else:
            skipped += 1
            tqdm.write(f"step {step}: a reward, KL or gradient that is not finite: the step is skipped, {skipped} so far")
        optimizer.zero_grad()  # now, so that no gradients lie about while the next completions are sampled

        def over_tokens(values):
            return values.masked_fill(~mask, 0.0).sum(1)  # (b,)

        rows = {
            "reward": rewards,
            "kl_sft": over_tokens(kl_k1(sampling_logprobs, start_logprobs)),  # nats a sequence; one noisy k1 each
            "kl_anchor": over_tokens(kl_k1(sampling_logprobs, anchor_logprobs)),
            "entropy": over_tokens(-sampling_logprobs),
            "length": mask.sum(1),
            "ended": ended,
        } | {f"reward {name}": scores for name, scores in parts.items()}
        means = dict(zip(rows, ranks.gather(torch.stack([row.float() for row in rows.values()], 1)).mean(0).tolist()))
        texts = torch.tensor([hash((*prompt.ids, -1, *ids)) for prompt, ids in zip(asked, completions)])
        metrics = means | {
            "entropy": means["entropy"] / means["length"],  # nats a token, from the samples
            "shaped_reward": shaped.mean().item(),
            "baseline": baseline_before,
            "advantage_std": advantages.std(correction=0).item(),
            "repeated": 1 - len(ranks.gather(texts.to(device)).unique()) / config.batch_size,
            "grad_norm": grad_norm.item(),
            "lr": optimizer.param_groups[0]["lr"],
            "skipped": skipped,
            "tokens_per_second": means["length"] * config.batch_size / (time.monotonic() - began),
        }
        if ranks.first:
            if step % config.eval_every == 0 or step == config.steps:
                held_out, _ = evaluate(config, task, policy, dtype)
                metrics |= {f"eval_{name}": value for name, value in held_out.items()}
                objective = held_out["reward"] - config.beta * held_out["kl_sft"]
                best_step, best = max((best_step, best), (step, objective), key=lambda pair: pair[1])
            log.write(step, metrics, COLUMNS)
            if "eval_reward" in metrics:
                tqdm.write("held out: " + "  ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
            prompt, completion = decode_parts(tokenizer, asked[0].ids, completions[0])
            sample = {"reward": rewards[0].item(), "kl": rows["kl_sft"][0].item()}
            samples_log.append({"step": step, "prompt": prompt, "completion": completion} | sample)

        stopping = stop is not None and ranks.any(stop.is_set(), device)
        if ranks.first and (step % config.save_every == 0 or step in (config.steps, best_step) or stopping):
            state = {
                "policy": [tensor.detach() for tensor in trained], "anchor": moving_anchor, "optimizer": optimizer.state_dict(),
                "baseline": baseline.state_dict(), "sampling": sampling.get_state(), "best_step": best_step, "best": best,
                "skipped": skipped,
            }  # fmt: skip
            save_checkpoint(out, step, state, config.keep, best_step)
        if stopping and step < config.steps:
            raise KeyboardInterrupt(f"after step {step} of {config.steps}")
    return metrics


def evaluate(config: Config, task, policy: torch.nn.Module, dtype: torch.dtype) -> tuple[dict[str, float], list]:
    """Metrics and samples of `policy` on the held-out prompts, always with the same random numbers."""
    from minalign.evaluate import evaluate_policy

    with autocast(policy.device, dtype):
        return evaluate_policy(
            policy, task.start, task.reward, task.tokenizer, task.eval_prompts, temperature=config.temperature,
            max_new_tokens=config.max_new_tokens, eos_token_ids=task.eos_token_ids, seed=12345,
            batch_size=config.micro_batch_size, measures=task.measures,
        )  # fmt: skip


def rewards_of(config: Config, device: torch.device, dtype: torch.dtype) -> list[str]:
    """--rm, or the toy world's reward model, which is trained on first use."""
    from train_rm import toy_reward_model

    return config.rm or [toy_reward_model(device, dtype)]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run, as one process or as one of torchrun's."""
    config = resolve(parse_flags(Config, __doc__, argv))
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with process_group(device) as (ranks, device):
        run(config, device, reason, dtype, ranks)


def run(config: Config, device: torch.device, reason: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Load what is asked for, train, show before and after, save."""
    import torch

    from minalign import toy
    from minalign.checkpoint import save_policy
    from minalign.evaluate import before_after_table, show_samples
    from minalign.lora import AdapterView, add_lora_
    from minalign.task import load_task

    require(config.batch_size % (config.group_size * ranks.count) == 0,
            f"--batch-size {config.batch_size}: expected a multiple of {ranks.count} processes x --group-size {config.group_size}")  # fmt: skip
    out = Path(ranks.from_first(lambda: str(open_run(config, "policy"))))
    show_config(config, device, reason, dtype)
    with ranks.first_before_others():
        task = load_task(config, rewards_of(config, device, dtype), device, dtype)
    if ranks.first:
        write_config(out, config, device, dtype)
    if config.lora_rank:  # one model in memory: the start policy is what it is with its adapters off
        policy = task.start
        torch.manual_seed(config.seed)
        add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
        task = task._replace(start=AdapterView(policy, None))
    else:
        policy = copy.deepcopy(task.start).requires_grad_(True)
    if config.gradient_checkpointing:
        checkpoint_activations_(policy)
    if ranks.first:
        before, samples_before = evaluate(config, task, policy, dtype)
        show_samples("before", samples_before)
        print()
    try:
        with stop_after_step(out) as stop:
            train(config, task, policy, out, dtype, stop, ranks)
    finally:  # also after Ctrl-C or a reward that is not finite: what was learned is kept
        if ranks.first:
            base = config.model or toy.start_policy_folder()
            save_policy(policy, task.tokenizer, out / "model", adapter_of=base if config.lora_save == "adapter" else "")
    if not ranks.first:
        return
    after, samples_after = evaluate(config, task, policy, dtype)
    show_samples("after", samples_after)
    print("\n" + before_after_table(before, after))
    write_whole(out / "results.json", json.dumps({"before": before, "after": after}, indent=2) + "\n")
    print(f"\nsaved {out}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
