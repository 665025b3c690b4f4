"""Prompts + reward model -> policy, by REINFORCE.

    python train_policy.py                                  the toy review world: makes its reward model, too
    python train_policy.py --rm runs/rm-1                   ... with a reward model of train_rm.py
    python train_policy.py --rm path --model path-or-id --dataset prompts.jsonl

One step: sample completions, score them, subtract beta times the KL to the anchor, subtract a baseline, follow
advantage x grad log pi. The run's folder holds config.json, metrics.jsonl, samples.jsonl, results.json and model/.

Where papers leave a choice: the baseline is a moving average (WARP does not say which it uses); one gradient step per
batch of samples, so there is no ratio and nothing to clip; AdamW without weight decay.
"""

import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minalign.common import (
    JsonLines, MetricsLog, UserError, autocast, flag, new_run, one_line_errors, parse_flags, pick_device, pick_dtype, require,
    show_config, warmup_factor, write_config, write_whole,
)  # fmt: skip
from minalign.logprobs import kl_k1, token_entropy, token_logprobs
from minalign.losses import score_variance
from minalign.merge import ema_update_
from minalign.reinforce import (
    MovingAverageBaseline, kl_penalized_rewards, leave_one_out_advantages, reinforce_loss, uncertainty_weights,
)  # fmt: skip


@dataclass
class Config:
    """The flags of a policy run."""

    model: str = flag("", "start policy: a run, a folder or a hub id (default: the toy world's)")
    rm: str = flag("", "reward model: a run of train_rm.py, a folder or a hub id (default: one for the toy world)")
    dataset: str = flag("", "prompts: .jsonl, .csv, .parquet, folder or hub id (default: the toy world's)")
    split: str = flag("train", "split of a hub data set")
    out: str = flag("", "folder of the run (default: the next free runs/policy-N)")
    seed: int = flag(0, "seed of prompt order, sampling and the held-out split")
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
    eval_share: float = flag(0.1, "share of the prompts held out, chosen by their hash", within="(0, 1)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "forward precision: auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))


COLUMNS = {  # of the printed table: metric -> heading
    "reward": "reward", "kl_sft": "kl_sft", "kl_anchor": "kl_anch", "shaped_reward": "shaped", "baseline": "base",
    "advantage_std": "adv_sd", "entropy": "entropy", "length": "length", "ended": "ended", "grad_norm": "grad",
    "tokens_per_second": "tok/s",
}  # fmt: skip


class Task(NamedTuple):
    """What policies are trained on: the same for every run of one program."""

    start: torch.nn.Module  # the policy that kl_sft is measured from; never changed
    tokenizer: object
    reward_model: object
    train_prompts: list[str]
    eval_prompts: list[str]
    eos_token_ids: list[int]
    measures: dict  # further functions of a whole text, by name: the toy world's gold reward


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
    return config


def train(config: Config, task: Task, policy: torch.nn.Module, out: Path, dtype: torch.dtype) -> dict[str, float]:
    """Train `policy` in place by `config`, log into `out`; returns the last step's metrics.

    Raises UserError on a reward, loss or gradient that is not finite; the policy then is that of the step before.
    """
    from minalign.data import encode, pad, shuffled_forever
    from minalign.evaluate import decode_parts, split_end
    from minalign.rollout import completion_logits, completion_logprobs, generate

    device, tokenizer, reward_model = policy.device, task.tokenizer, task.reward_model
    # A policy that starts at the start policy needs no second copy as its fixed anchor.
    at_start = all(torch.equal(a, b) for a, b in zip(policy.parameters(), task.start.parameters()))
    anchor = task.start if config.anchor == "fixed" and at_start else copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    baseline = MovingAverageBaseline(config.baseline_decay)
    sampling = torch.Generator(device).manual_seed(config.seed)
    prompts = shuffled_forever([encode(tokenizer, prompt, end=False) for prompt in task.train_prompts], config.seed)
    log, samples_log = MetricsLog(out), JsonLines(out / "samples.jsonl")

    for step in tqdm(range(1, config.steps + 1), desc="policy", unit="step"):
        began = time.monotonic()
        optimizer.param_groups[0]["lr"] = config.lr * warmup_factor(step, config.warmup_steps)

        # x: prompts, each group_size times in a row; y ~ pi_theta(.|x)
        rows = [row for _ in range(config.batch_size // config.group_size) for row in [next(prompts)] * config.group_size]
        input_ids, attention_mask = pad(rows, "left", device)  # (B, P)
        with torch.no_grad(), autocast(device, dtype):
            tokens, mask, sampling_logprobs = generate(
                policy, input_ids, attention_mask, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                eos_token_ids=task.eos_token_ids, pad_token_id=0, generator=sampling,
            )  # fmt: skip

            # r(x, y), in the text format that the reward model was trained on
            completions, ended = split_end(tokens, mask, task.eos_token_ids)
            reward_rows = reward_model.encode_rollout(tokenizer, rows, completions)
            reward_logits = reward_model.logits(reward_rows, config.micro_batch_size)  # (B, K)
            rewards = reward_model.read_out(reward_logits)  # (B,)

            # log pi(y|x) of the start policy (for the x axis) and of the anchor (for the penalty)
            drawn = (input_ids, attention_mask, tokens, mask)
            start_logprobs = anchor_logprobs = completion_logprobs(
                task.start, *drawn, config.temperature, config.micro_batch_size
            )
            if anchor is not task.start:
                anchor_logprobs = completion_logprobs(anchor, *drawn, config.temperature, config.micro_batch_size)

        # r_beta = r - beta log(pi_theta(y|x) / pi_anchor(y|x)): k1 in the reward, summed over the sequence, detached
        scores = rewards if config.reward_clip is None else rewards.clamp(-config.reward_clip, config.reward_clip)
        scores = scores - config.missing_eos_penalty * ~ended
        shaped = kl_penalized_rewards(scores, sampling_logprobs, anchor_logprobs, mask, config.beta)
        if not shaped.isfinite().all():
            raise UserError(f"step {step}: a reward or KL that is not finite: {out} has the policy of step {step - 1}")

        # A = r_beta - b, with b from rewards other than the sample's own
        baseline_before = baseline.value
        if config.baseline == "rloo":
            advantages = leave_one_out_advantages(shaped, config.group_size)
        elif config.baseline == "none":
            advantages = shaped
        else:
            advantages = baseline.advantages(shaped)
        if config.uncertainty != "none":
            advantages = advantages * uncertainty_weights(score_variance(reward_logits), config.uncertainty)

        # theta <- theta + lr A grad log pi_theta(y|x): summed over tokens, averaged over the whole batch
        optimizer.zero_grad()
        entropies = []
        for i in range(0, config.batch_size, config.micro_batch_size):
            part = slice(i, i + config.micro_batch_size)
            with autocast(device, dtype):
                logits = completion_logits(policy, *(tensor[part] for tensor in drawn))  # (b, T, V)
            logprobs = token_logprobs(logits, tokens[part], config.temperature)
            (reinforce_loss(logprobs, mask[part], advantages[part]).sum() / config.batch_size).backward()
            entropies.append(token_entropy(logits.detach(), config.temperature))
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not grad_norm.isfinite():
            raise UserError(f"step {step}: a gradient that is not finite: {out} has the policy of step {step - 1}: lower --lr")
        optimizer.step()

        # ema <- (1 - mu) ema + mu theta, after the policy's own update
        if config.anchor == "ema":
            ema_update_(list(anchor.parameters()), list(policy.parameters()), config.mu)

        def per_sequence(values):  # mean over sequences of the sum over tokens
            return values.masked_fill(~mask, 0.0).sum(1).mean().item()

        tokens_sampled = mask.sum().item()
        metrics = {
            "reward": rewards.mean().item(),
            "kl_sft": per_sequence(kl_k1(sampling_logprobs, start_logprobs)),  # nats a sequence; one noisy k1 each
            "kl_anchor": per_sequence(kl_k1(sampling_logprobs, anchor_logprobs)),
            "shaped_reward": shaped.mean().item(),
            "baseline": baseline_before,
            "advantage_std": advantages.std(correction=0).item(),
            "entropy": per_sequence(torch.cat(entropies)) * len(rows) / tokens_sampled,  # nats a token
            "length": tokens_sampled / len(rows),
            "ended": ended.float().mean().item(),
            "repeated": 1 - len({(*p, -1, *c) for p, c in zip(rows, completions)}) / len(rows),
            "grad_norm": grad_norm.item(),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens_sampled / (time.monotonic() - began),
        }
        if step % config.eval_every == 0 or step == config.steps:
            held_out, _ = evaluate(config, task, policy, dtype)
            metrics |= {f"eval_{name}": value for name, value in held_out.items()}
        log.write(step, metrics, COLUMNS)
        if "eval_reward" in metrics:
            tqdm.write("held out: " + "  ".join(f"{name} {value:.3f}" for name, value in held_out.items()))
        texts = dict(zip(("prompt", "completion"), decode_parts(tokenizer, rows[0], completions[0])))
        samples_log.append({"step": step, **texts, "reward": rewards[0].item()})
    return metrics


def evaluate(config: Config, task: Task, policy: torch.nn.Module, dtype: torch.dtype) -> tuple[dict[str, float], list]:
    """Metrics and samples of `policy` on the held-out prompts, always with the same random numbers."""
    from minalign.evaluate import evaluate_policy

    with autocast(policy.device, dtype):
        return evaluate_policy(
            policy, task.start, task.reward_model, task.tokenizer, task.eval_prompts, temperature=config.temperature,
            max_new_tokens=config.max_new_tokens, eos_token_ids=task.eos_token_ids, seed=12345,
            batch_size=config.micro_batch_size, measures=task.measures,
        )  # fmt: skip


def load_task(config: Config, device: torch.device, dtype: torch.dtype) -> Task:
    """Start policy, reward model and prompts; in the toy world, made on first use and kept."""
    from minalign import toy
    from minalign.checkpoint import end_token_ids, load_policy
    from minalign.data import encode, load_prompts
    from minalign.reward import RewardModel
    from train_rm import toy_reward_model

    start, tokenizer = load_policy(config.model or toy.start_policy_folder())
    reward_model = RewardModel.from_pretrained(config.rm or toy_reward_model(device, dtype), device)
    print(f"reward model {config.rm or 'of the toy world'}: {reward_model.reading}")
    require(config.uncertainty == "none" or reward_model.num_labels > 2,
            f"--uncertainty {config.uncertainty}: --rm {config.rm} has {reward_model.num_labels} label(s), expected a "
            "distribution over scores: train one with --loss ordinal")  # fmt: skip
    if config.dataset:
        train_prompts, eval_prompts = load_prompts(config.dataset, config.split, eval_share=config.eval_share, seed=config.seed)
        measures = {}
    else:
        train_prompts, eval_prompts = toy.prompts(seed=config.seed, eval_share=config.eval_share)
        measures = {"gold": toy.gold_reward, "grammatical": lambda text: float(toy.parse(text) is not None)}
    context = getattr(start.config, "max_position_embeddings", None)
    longest = max(train_prompts + eval_prompts, key=lambda prompt: len(encode(tokenizer, prompt, end=False)))
    length = len(encode(tokenizer, longest, end=False))
    require(context is None or length + config.max_new_tokens <= context,
            f"prompt {longest[:40]!r} has {length} tokens, and --max-new-tokens {config.max_new_tokens}: expected at most "
            f"{context} together (the context of {config.model or 'the toy policy'}): shorten one of them")  # fmt: skip
    return Task(
        start.to(device).requires_grad_(False), tokenizer, reward_model, train_prompts,
        eval_prompts[: config.eval_prompts], end_token_ids(start, tokenizer), measures,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, load what is asked for, train, show before and after, save."""
    config = resolve(parse_flags(Config, __doc__, argv))
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    out = new_run(config.out, "policy")
    show_config(config, device, reason, dtype)

    from minalign.checkpoint import whole_folder
    from minalign.evaluate import before_after_table, show_samples

    task = load_task(config, device, dtype)
    write_config(out, config, device, dtype)
    policy = copy.deepcopy(task.start).requires_grad_(True)
    before, samples_before = evaluate(config, task, policy, dtype)
    show_samples("before", samples_before)
    print()
    try:
        train(config, task, policy, out, dtype)
    finally:  # also after Ctrl-C or a reward that is not finite: what was learned is kept
        with whole_folder(out / "model") as folder:
            policy.save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)
    after, samples_after = evaluate(config, task, policy, dtype)
    show_samples("after", samples_after)
    print("\n" + before_after_table(before, after))
    write_whole(out / "results.json", json.dumps({"before": before, "after": after}, indent=2) + "\n")
    print(f"\nsaved {out}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
