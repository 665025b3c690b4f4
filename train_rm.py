"""Preference pairs -> reward model.

    python train_rm.py                                      the toy review world, made on first use
    python train_rm.py --loss ordinal                       a distribution over the scores 1..10 instead of one number
    python train_rm.py --model path-or-id --dataset pairs.jsonl

A data set has the columns chosen and rejected (and prompt, chosen_rating, rejected_rating, margin), or text and rating
(or label). Prompts and answers may be chat messages.
The run's folder holds config.json, metrics.jsonl, model/, a standard sequence classifier (the best by held-out loss), and
checkpoints/, from which `--out that-folder --resume` goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import sys
import threading
import typing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minalign.common import (
    UserError, autocast, checkpoint_activations_, halving, one_line_errors, pick_device, pick_dtype, require, show_config,
    stop_after_step, warmup_factor,
)  # fmt: skip
from minalign.flags import DataFlags, LoraFlags, MachineFlags, RunFlags, flag, parse_flags, parse_span, resolve_shared
from minalign.ranks import Ranks, process_group
from minalign.runs import MetricsLog, open_run, write_config

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch


@dataclass
class Config(DataFlags, LoraFlags, RunFlags, MachineFlags):
    """Reward-model training."""

    model: str = flag("", "language model to start from: a run, a folder or a hub id (default: the toy world's)")
    out: str = flag("", "folder of the run (default: the next free runs/rm-N)")
    seed: int = flag(0, "seed of which pairs are drawn and of their order; the head always starts alike")
    loss: str = flag("bradley-terry", "one number, or a distribution over scores", ("bradley-terry", "ordinal"))
    ties: str | None = flag(None, "ordinal: a tie counts half, or as lost (default: half)", ("half", "strict"))
    num_scores: int | None = flag(None, "ordinal: scores 1..K (default: 10)", within="[3, inf)")
    rating_coef: float | None = flag(None, "ordinal: weight of the loss against ratings in the data (default: 0)",
                                     within="[0, inf)")  # fmt: skip
    rating_range: tuple[float, float] | None = flag(None, "ratings' scale in the data, mapped to 1..K (default: 1 K)")
    margin: float | None = flag(None, "bradley-terry: weight of the margin (column margin, or rating gap) (default: 0)",
                                within="[0, inf)")  # fmt: skip
    center_coef: float | None = flag(None, "bradley-terry: weight of (r_c + r_r)^2 (default: 0.01)", within="[0, inf)")
    steps: int | None = flag(None, "optimizer steps (default: one epoch)", within="[1, inf)")
    batch_size: int = flag(32, "pairs a step", within="[1, inf)")
    micro_batch_size: int | None = flag(None, "pairs a forward pass; changes memory, not the gradient (default: all)",
                                        within="[1, inf)")  # fmt: skip
    lr: float | None = flag(None, "peak learning rate of AdamW (default: 1e-5, in the toy world 2e-3)", within="(0, inf)")
    warmup: float = flag(
        0.1, "share of the steps over which the learning rate rises; then it falls linearly to 0", within="[0, 1]"
    )
    weight_decay: float = flag(0.01, "AdamW weight decay", within="[0, inf)")
    max_grad_norm: float = flag(1.0, "gradient norm above which the whole batch's gradient is scaled down", within="(0, inf)")
    max_tokens: int = flag(512, "tokens of a text; a pair with a longer one is dropped and counted", within="[1, inf)")
    max_pairs: int = flag(100_000, "training pairs drawn where the data has more", within="[1, inf)")
    max_eval_pairs: int = flag(2_000, "held-out pairs drawn where the data has more", within="[1, inf)")
    min_rating_gap: float = flag(1.0, "text + rating data: smallest difference that makes a pair", within="[0, inf)")
    crop_words: str = flag("", "keep only so many first words of each completion, drawn anew: a range such as 5-60, for a reward "
                           "model that will score short continuations")  # fmt: skip
    eval_every: int = flag(50, "steps between evaluations on all held-out pairs", within="[1, inf)")


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense, alone or together."""
    ordinal = config.loss == "ordinal"
    for name in ("ties", "num_scores", "rating_coef", "rating_range"):
        require(ordinal or getattr(config, name) is None, f"--{name.replace('_', '-')} needs --loss ordinal")
    for name in ("margin", "center_coef"):
        require(not ordinal or getattr(config, name) is None, f"--{name.replace('_', '-')} needs --loss bradley-terry")
    if ordinal:
        config.ties = config.ties or "half"
        config.num_scores = 10 if config.num_scores is None else config.num_scores
        config.rating_coef = config.rating_coef or 0.0
        config.rating_range = config.rating_range or (1.0, float(config.num_scores))
        require(config.rating_range[0] < config.rating_range[1], "--rating-range: expected the lower end first")
    else:
        config.margin = config.margin or 0.0
        config.center_coef = 0.01 if config.center_coef is None else config.center_coef
    config.lr = (1e-5 if config.dataset else 2e-3) if config.lr is None else config.lr
    config.micro_batch_size = config.micro_batch_size or config.batch_size
    require(bool(config.dataset) or not config.model, f"--model {config.model}: needs --dataset, too")
    return resolve_shared(config)


def pair_losses(config: Config, logits: torch.Tensor, examples: list) -> torch.Tensor:
    """The training loss of each pair (B,): logits (2B, K), the chosen texts first."""
    import torch

    from minalign.losses import bradley_terry_loss, centering_penalty, ordinal_pairwise_loss, ordinal_rating_loss

    chosen, rejected = logits.chunk(2)  # (B, K) each
    if config.loss == "bradley-terry":
        chosen, rejected = chosen[:, 0], rejected[:, 0]
        margin = config.margin * torch.tensor([e.pair.gap for e in examples], device=logits.device)
        return bradley_terry_loss(chosen, rejected, margin) + config.center_coef * centering_penalty(chosen, rejected)
    losses = ordinal_pairwise_loss(chosen, rejected, config.ties)
    if config.rating_coef:
        low, high = config.rating_range
        ratings = torch.tensor([[e.pair.chosen_rating, e.pair.rejected_rating] for e in examples], device=logits.device)
        scores = 1 + (ratings - low) / (high - low) * (config.num_scores - 1)  # (B, 2), on 1..K
        losses = losses + config.rating_coef * (
            ordinal_rating_loss(chosen, scores[:, 0]) + ordinal_rating_loss(rejected, scores[:, 1])
        )
    return losses


def train(
    config: Config, out: Path, device: torch.device, dtype: torch.dtype, stop: threading.Event | None = None,
    ranks: Ranks = Ranks(),
) -> dict[str, float]:  # fmt: skip
    """Train by `config` into the folder `out`; returns the metrics of the saved model.

    With config.resume, goes on from the newest checkpoint in `out`, if there is one. KeyboardInterrupt after the step in which
    `stop` was set, with a checkpoint of it.
    """
    import torch

    from minalign import toy
    from minalign.batches import (
        encode_pairs, length_grouped_batches, length_parts, require_rating_range, require_ratings, tokens_a_pass,
    )  # fmt: skip
    from minalign.chat import wants_chat
    from minalign.checkpoint import resume_, save_checkpoint
    from minalign.data import Split, load_pairs
    from minalign.evaluate import evaluate_pairs
    from minalign.folders import whole_folder
    from minalign.lora import add_lora_
    from minalign.reward import RewardModel
    from minalign.shard import as_forward, gather_, one_size, sharded_copy, spread_, whole

    require(bool(config.model) or not config.dataset,
            f"--dataset {config.dataset}: needs --model, too: the model to start from")  # fmt: skip
    base = config.model or toy.start_policy_folder()
    torch.manual_seed(0)  # one head for all seeds: weights of reward models with different heads could not be averaged
    reward_model = RewardModel.from_base(base, num_labels=config.num_scores or 1)
    model = reward_model.model.to(device)
    print(f"{type(model).__name__} on {base}: {reward_model.reading}")
    if config.dataset:
        data = Split(config.dataset, config.split, config.eval_split, config.eval_share, config.split_seed, config.subset)
        chat = wants_chat(reward_model.tokenizer, config.format)
        train_pairs, eval_pairs = load_pairs(data, chat=chat, min_rating_gap=config.min_rating_gap)
    else:
        train_pairs, eval_pairs = toy.preference_pairs(config.seed, config.eval_share, config.split_seed)
    if isinstance(train_pairs[0].prompt, str):
        reward_model.tokenizer.chat_template = None  # trained on plain text, it reads plain text
    require_ratings(config, train_pairs[0], eval_pairs[0])

    crop = parse_span("--crop-words", config.crop_words)
    drawing = dict(max_tokens=min(config.max_tokens, reward_model.context), seed=config.seed, crop_words=crop)
    examples = encode_pairs(train_pairs, reward_model.encode, max_pairs=config.max_pairs, **drawing)
    held_out = encode_pairs(eval_pairs, reward_model.encode, max_pairs=config.max_eval_pairs, **drawing)
    require(bool(examples and held_out), "no pairs left to train or evaluate on: raise --max-tokens")
    require_rating_range(config, examples + held_out)
    lengths = [max(len(e.chosen), len(e.rejected)) for e in examples]
    order = torch.Generator().manual_seed(config.seed)
    batches = length_grouped_batches(lengths, config.batch_size, order)
    steps = config.steps or math.ceil(len(examples) / config.batch_size)

    if config.lora_rank:
        torch.manual_seed(config.seed)
        add_lora_(model, config.lora_rank, config.lora_alpha, config.lora_dropout or 0.0, config.lora_targets)
    if config.gradient_checkpointing:
        checkpoint_activations_(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner, learned, forward = model, trained, reward_model.forward
    if config.shard:  # gradients are made with a copy in pieces; evaluated and saved is the model, whole again after each step
        learner = sharded_copy(model, ranks)
        forward = as_forward(learner, RewardModel(learner, reward_model.tokenizer).one_pass)
        learned = list(learner.parameters())
    optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))
    if ranks.first:
        write_config(out, config, device, dtype)
    counts = {"best": None, "skipped": 0}  # metrics of the kept model; steps left out
    state = {"trained": trained, "optimizer": optimizer, "dropout": torch.default_generator, "counts": counts}
    if device.type == "cuda":  # of --lora-dropout: the only chance but the order of the pairs
        state["dropout_cuda"] = torch.cuda.default_generators[device.index or 0]
    done = resume_(out, state) if config.resume else 0
    if ranks.first:
        log = MetricsLog(out, done, config.tensorboard)

    def save():
        with whole_folder(out / "model") as folder:
            reward_model.save_pretrained(folder, adapter_of=base if config.lora_save == "adapter" else "")

    for _ in range(done):
        next(batches)

    remaining = range(done + 1, steps + 1)
    for step in tqdm(remaining, desc="reward model", unit="step", initial=done, total=steps, disable=not ranks.first or None):
        whole_batch = next(batches)
        share = whole_batch[ranks.index :: ranks.count]  # this process's rows; all of them without torchrun
        batch = [examples[i] for i in share or whole_batch[:1]]  # an epoch's last batch may have fewer than there are processes
        weight = bool(share) / len(whole_batch)  # the whole batch divides, whatever the split
        rise, fall = warmup_factor(step, round(config.warmup * steps)), (steps - step + 1) / steps
        optimizer.param_groups[0]["lr"] = config.lr * min(rise, fall / (1 - config.warmup) if config.warmup < 1 else 1)

        lengths, losses = [len(e.chosen) + len(e.rejected) for e in batch], torch.zeros(len(batch), device=device)

        def gradient_pass(micro_batch_size):
            optimizer.zero_grad()
            passes = [(part, weight) for part in length_parts(lengths, micro_batch_size, tokens_a_pass(learner))]
            idle = ranks.most(len(passes), device) - len(passes) if config.shard else 0  # each is a sum over all processes
            for part, counted in passes + [(passes[-1][0][:1], 0.0)] * idle:
                micro = [batch[i] for i in part]
                with autocast(device, dtype):  # both members of a pair in one forward
                    logits = forward([e.chosen for e in micro] + [e.rejected for e in micro])
                micro_losses = pair_losses(config, logits, micro)
                (micro_losses.sum() * counted).backward()
                losses[part] = micro_losses.detach()

        spread_(model, learner, ranks)  # with --shard, a part of the weights on each process
        if config.shard:
            one_size(config.micro_batch_size, gradient_pass)
        else:
            config.micro_batch_size = halving(config.micro_batch_size, gradient_pass)
            ranks.sum_([parameter.grad for parameter in trained if parameter.grad is not None])
        loss = ranks.gather((losses.sum() * weight)[None]).sum().item()
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm)).item()
        good = math.isfinite(loss + grad_norm)
        if good:
            optimizer.step()
        gather_(model, learner)
        if not good and config.on_nonfinite == "stop":
            if counts["best"] is None and ranks.first:
                save()
            raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}: {out} keeps the last good model: lower --lr")
        if not good:
            counts["skipped"] += 1
            tqdm.write(f"step {step}: loss {loss}, gradient norm {grad_norm}: the step is skipped, {counts['skipped']} so far")

        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "skipped": counts["skipped"]}
        if ranks.first and (step % config.eval_every == 0 or step == steps):
            metrics |= evaluate_pairs(config, reward_model, held_out)
            tqdm.write(
                f"step {step:4d}/{steps}  loss {loss:.4f}  held out: loss {metrics['eval_loss']:.4f} (constant "
                f"{metrics['eval_floor']:.4f})  accuracy {metrics['eval_accuracy']:.3f}  margin {metrics['eval_margin']:.2f}  "
                f"ece {metrics['eval_ece']:.3f}  reward {metrics['reward_mean']:.2f} +- {metrics['reward_std']:.2f}"
            )
            if counts["best"] is None or metrics["eval_loss"] < counts["best"]["eval_loss"]:
                counts["best"] = {"step": step} | metrics
                save()
        if ranks.first:
            log.write(step, metrics)

        stopping = stop is not None and ranks.any(stop.is_set(), device)
        if step % config.save_every == 0 or step == steps or stopping:
            save_checkpoint(out, step, state, config.keep, writing=ranks.first)
        if stopping and step < steps:
            raise KeyboardInterrupt(f"after step {step} of {steps}")
    if not ranks.first:
        return {}
    best = counts["best"]
    print(
        f"kept the model of step {best['step']} ({reward_model.reading}): accuracy {best['eval_accuracy']:.3f} on "
        f"{len(held_out)} held-out pairs"
    )
    return best


def toy_reward_model(device: torch.device, dtype: torch.dtype) -> str:
    """The toy world's reward model, trained with the default flags on first use: what a run without --rm gets."""
    from minalign import toy
    from minalign.folders import whole_folder

    folder = toy.folder() / "reward-model"
    if not folder.exists():
        print("no --rm: training the toy world's reward model first, as `python train_rm.py` does")
        with whole_folder(folder) as new:
            train(resolve(Config()), new, device, dtype)
    return str(folder)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, open the run, train."""
    config = resolve(parse_flags(Config, __doc__, argv))
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with process_group(device) as (ranks, device):
        out = Path(ranks.from_first(lambda: str(open_run(config, "rm"))))
        show_config(config, device, reason, dtype)
        with stop_after_step(out) as stop:
            train(config, out, device, dtype, stop, ranks)
        print(f"saved {out}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
