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
import functools
import json
import math
import random
import sys
import threading
import time
import typing
from pathlib import Path

from tqdm import tqdm

from minalign.common import (
    UserError, autocast, checkpoint_activations_, halving, one_line_errors, pick_device, pick_dtype, require, show_config,
    stop_after_step, warmup_factor,
)  # fmt: skip
from minalign.flags import PolicyFlags as Config, parse_flags, resolve_policy as resolve
from minalign.ranks import Ranks, process_group
from minalign.runs import POLICY_COLUMNS, JsonLines, MetricsLog, open_run, write_config, write_whole

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch


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
    from minalign.checkpoint import resume_, save_checkpoint
    from minalign.decode import refresh_, sampling_copy
    from minalign.evaluate import decode_parts, split_end
    from minalign.logprobs import kl_k1
    from minalign.merge import ema_update_
    from minalign.reinforce import (
        MovingAverageBaseline, importance_weights, kl_penalized_rewards, leave_one_out_advantages, reinforce_loss,
        uncertainty_weights,
    )  # fmt: skip
    from minalign.rollout import completion_logprobs, draw_uniforms, frozen_logprobs, generate
    from minalign.shard import as_forward, gather_, one_size, sharded_copy, spread_, whole
    from minalign.task import beginning, trained_and_anchor

    device, tokenizer = policy.device, task.tokenizer
    trained, anchor = trained_and_anchor(policy, task.start, config)  # where the KL starts at zero, the anchor is task.start
    sampler = sampling_copy(policy, dtype)
    moving_anchor = list(anchor.parameters()) if config.anchor == "ema" else []
    learner, learned, logprobs_of = policy, trained, functools.partial(completion_logprobs, policy)
    if config.shard:  # gradients are made with a copy in pieces, all else with the policy, which is whole again after each step
        learner = sharded_copy(policy, ranks)
        learned, logprobs_of = list(learner.parameters()), as_forward(learner, functools.partial(completion_logprobs, learner))
    optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    baseline = MovingAverageBaseline(config.baseline_decay)
    sampling = torch.Generator(device).manual_seed(config.seed)
    prompts, lengths = shuffled_forever(task.train_prompts, config.seed), random.Random(config.seed)
    counts = {"best_step": None, "best": -math.inf, "skipped": 0}
    state = {"policy": trained, "anchor": moving_anchor, "optimizer": optimizer, "baseline": baseline, "sampling": sampling,
             "counts": counts}  # fmt: skip
    done = resume_(out, state) if config.resume else 0
    if ranks.first:
        log, samples_log = MetricsLog(out, done, config.tensorboard), JsonLines(out / "samples.jsonl", done)
    metrics = log.lines.last if ranks.first else None
    mine = ranks.share(config.batch_size)  # this process's rows of the batch; all of them without torchrun

    def next_prompts():
        return [beginning(next(prompts), task.prompt_tokens, lengths) for _ in range(config.batch_size // config.group_size)]

    for _ in range(done):
        next_prompts()

    steps = range(done + 1, config.steps + 1)
    for step in tqdm(steps, desc="policy", unit="step", initial=done, total=config.steps, disable=not ranks.first or None):
        began = time.monotonic()
        optimizer.param_groups[0]["lr"] = config.lr * warmup_factor(step, config.warmup_steps)

        # x: prompts, each group_size times in a row; y ~ pi_theta(.|x)
        asked = [prompt for prompt in next_prompts() for _ in range(config.group_size)][mine]
        uniforms = draw_uniforms(config.batch_size, config.max_new_tokens, device, sampling)[mine]
        input_ids, attention_mask = pad([prompt.ids for prompt in asked], "left", device)  # (B, P)
        refresh_(sampler, policy)
        tokens, mask, logprobs = generate(
            sampler, input_ids, attention_mask, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            eos_token_ids=task.eos_token_ids, pad_token_id=0, uniforms=uniforms,
        )  # fmt: skip

        with torch.no_grad(), autocast(device, dtype):
            # r(x, y), in the text format that the reward model was trained on
            completions, ended = split_end(tokens, mask, task.eos_token_ids)
            rewards, score_variance, parts = task.reward.score_rollout(tokenizer, asked, completions, config.micro_batch_size)

            # log pi(y|x) of the start policy (for the x axis) and of the anchor (for the penalty)
            rollout = (input_ids, attention_mask, tokens, mask)
            again = functools.partial(frozen_logprobs, temperature=config.temperature, micro_batch_size=config.micro_batch_size)
            start_logprobs = again(task.start, *rollout)
            anchor_logprobs = start_logprobs if anchor is task.start else again(anchor, *rollout)
            # What is learned from are the policy's own log-probs, also where a rounded copy drew: its samples count by their ratio
            sampling_logprobs, logprobs = logprobs, logprobs if sampler is policy else again(policy, *rollout)
            importance = ranks.gather(importance_weights(logprobs, sampling_logprobs, mask))  # all 1 where the policy drew

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)): k1 in the reward, summed over the sequence, detached
        scores = rewards if config.reward_clip is None else rewards.clamp(-config.reward_clip, config.reward_clip)
        scores = scores - config.missing_eos_penalty * ~ended
        shaped = ranks.gather(kl_penalized_rewards(scores, logprobs, anchor_logprobs, mask, config.beta))  # all ranks'
        finite = bool((shaped + importance).isfinite().all())

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
        own_advantages = (advantages * importance if finite else advantages)[mine]

        # theta <- theta + lr A grad log pi_theta(y|x): summed over tokens, averaged over the whole batch
        known_grad = -own_advantages[:, None] * mask / config.batch_size  # (B, T): d loss / d logprobs, before the pass
        row_lengths = (attention_mask.sum(1) + mask.sum(1)).tolist()

        def gradient_pass(micro_batch_size):
            optimizer.zero_grad()
            passes = [(part, 1.0) for part in length_parts(row_lengths, micro_batch_size, tokens_a_pass(learner))]
            idle = ranks.most(len(passes), device) - len(passes) if config.shard else 0  # each is a sum over all processes
            for part, counted in passes + [(passes[-1][0][:1], 0.0)] * idle:
                with autocast(device, dtype):
                    graph = logprobs_of(*(x[part] for x in rollout), config.temperature, known_grad[part] * counted)
                (reinforce_loss(graph, mask[part], own_advantages[part]).sum() * counted / config.batch_size).backward()

        spread_(policy, learner, ranks)  # with --shard, a part of the weights on each process
        if config.shard:
            one_size(config.micro_batch_size, gradient_pass)
        else:
            config.micro_batch_size = halving(config.micro_batch_size, gradient_pass)
            ranks.sum_([parameter.grad for parameter in trained if parameter.grad is not None])
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm))
        good = finite and bool(grad_norm.isfinite())
        if good:
            optimizer.step()
        gather_(policy, learner)
        if good and config.anchor == "ema":  # ema <- (1 - mu) ema + mu theta, after the policy's own update
            ema_update_(moving_anchor, trained, config.mu)
        if not good:
            problem = f"step {step}: a {'gradient' if finite else 'reward, KL or importance weight'} that is not finite"
            if config.on_nonfinite == "stop":
                raise UserError(f"{problem}: the policy of step {step - 1} is the last good one: lower --lr")
            counts["skipped"] += 1
            tqdm.write(f"{problem}: the step is skipped, {counts['skipped']} so far")
        optimizer.zero_grad()  # now, so that no gradients lie about while the next completions are sampled

        def over_tokens(values):
            return values.masked_fill(~mask, 0.0).sum(1)  # (b,)

        rows = {
            "reward": rewards,
            "kl_sft": over_tokens(kl_k1(logprobs, start_logprobs)),  # nats a sequence; one noisy k1 each
            "kl_anchor": over_tokens(kl_k1(logprobs, anchor_logprobs)),
            "entropy": over_tokens(-logprobs),
            "length": mask.sum(1),
            "ended": ended,
        } | {f"reward {name}": scores for name, scores in parts.items()}
        rows |= {} if sampler is policy else {"importance": importance[mine]}
        means = ranks.gather(torch.stack([row.float() for row in rows.values()], 1)).mean(0)
        numbers = torch.stack([shaped.mean(), advantages.std(correction=0), grad_norm])
        values = torch.cat([means, numbers]).tolist()  # numbers leave the device once a step
        metrics = dict(zip([*rows, "shaped_reward", "advantage_std", "grad_norm"], values))
        texts = torch.tensor([hash((*prompt.ids, -1, *ids)) for prompt, ids in zip(asked, completions)])
        metrics |= {
            "entropy": metrics["entropy"] / metrics["length"],  # nats a token, from the samples
            "baseline": baseline_before,
            "repeated": 1 - len(ranks.gather(texts.to(device)).unique()) / config.batch_size,
            "lr": optimizer.param_groups[0]["lr"],
            "skipped": counts["skipped"],
            "tokens_per_second": metrics["length"] * config.batch_size / (time.monotonic() - began),
        }
        if ranks.first:
            if step % config.eval_every == 0 or step == config.steps:
                held_out, _ = evaluate(config, task, policy, dtype)
                metrics |= {f"eval_{name}": value for name, value in held_out.items()}
                if (objective := held_out["reward"] - config.beta * held_out["kl_sft"]) > counts["best"]:
                    counts |= {"best_step": step, "best": objective}
            log.write(step, metrics, POLICY_COLUMNS)
            if "eval_reward" in metrics:
                tqdm.write("held out: " + "  ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
            sample = dict(zip(("prompt", "completion"), decode_parts(tokenizer, asked[0].ids, completions[0])))
            samples_log.append({"step": step} | sample | {"reward": rewards[0].item(), "kl": rows["kl_sft"][0].item()})

        stopping = stop is not None and ranks.any(stop.is_set(), device)
        saving = step % config.save_every == 0 or step in (config.steps, counts["best_step"]) or stopping  # best: rank 0 knows
        if ranks.any(ranks.first and saving, device):
            save_checkpoint(out, step, state, config.keep, counts["best_step"], writing=ranks.first)
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
    with process_group(device) as (ranks, device):
        run(config, device, reason, pick_dtype(config.dtype, device), ranks)


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
