"""Preference pairs -> reward model.

    python train_rm.py                                      the toy review world, made on first use
    python train_rm.py --loss ordinal                       a distribution over the scores 1..10
    python train_rm.py --model path-or-id --dataset pairs.jsonl

A data set has the columns chosen and rejected (and prompt, chosen_rating, rejected_rating, margin,
probability), ranked (the best text first), responses and ratings, or text and rating (or label).
Prompts and answers may be chat messages. The run's folder holds
config.json, metrics.jsonl, model/, a standard sequence classifier (the best by held-out loss), and
checkpoints/, from which `--out that-folder --resume` goes on as if nothing had happened.
"""

from __future__ import annotations

import itertools
import math
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from minalign.running.errors import one_line_errors, require
from minalign.running.flag_groups import (
    DataFlags,
    LoraFlags,
    MachineFlags,
    OptimizerFlags,
    RunFlags,
    resolve_training,
)
from minalign.running.flags import SEEDS, dashed, fill_in, flag, parse_flags
from minalign.running.run import Run, open_run

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch

    from minalign.data.pairs import Example
    from minalign.data.tokens import TokenItems
    from minalign.models.heads import Objective
    from minalign.reward import RewardModel


@dataclass
class Config(DataFlags, OptimizerFlags, LoraFlags, RunFlags, MachineFlags):
    """Reward-model training."""

    model: str = flag(
        "", "language model to start from: a run, a folder or a hub id (default: the toy world's)"
    )
    out: str = flag("", "folder of the run (default: the next free runs/rm-N)")
    seed: int = flag(
        0, "seed of which pairs are drawn and of their order; the head always starts alike", SEEDS
    )
    loss: str = flag(
        "bradley-terry", "one number, or a distribution over scores", ("bradley-terry", "ordinal")
    )
    ties: str | None = flag(
        None, "ordinal: a tie counts half, or as lost (default: half)", ("half", "strict")
    )
    num_scores: int | None = flag(None, "ordinal: scores 1..K (default: 10)", "[3, 1000]")
    rating_coef: float | None = flag(
        None, "ordinal: weight of the loss against ratings in the data (default: 0)", "[0, inf)"
    )
    rating_range: tuple[float, float] | None = flag(
        None, "ratings' scale in the data, mapped to 1..K (default: 1 K)"
    )
    margin: float | None = flag(
        None,
        "bradley-terry: weight of the margin (column margin, or rating gap) (default: 0)",
        "[0, inf)",
    )
    center_coef: float | None = flag(
        None,
        "bradley-terry: weight of (r_c + r_r)^2, of a list 4 mean(r)^2 (default: 0.01)",
        "[0, inf)",
    )
    label_smoothing: float = flag(
        0.0,
        "share e of the labels taken to be wrong: a pair trains as (1 - e) p + e (1 - p) certain, "
        "p being the column probability, or 1",
        "[0, 0.5)",
    )
    steps: int | None = flag(None, "optimizer steps (default: one epoch)", "[1, inf)")
    batch_size: int = flag(32, "pairs, or lists, per step", "[1, inf)")
    lr: float | None = flag(
        None, "peak learning rate of AdamW (default: 1e-5, in the toy world 2e-3)", "(0, inf)"
    )
    warmup: float = flag(
        0.1,
        "share of the steps over which the learning rate rises; then it falls linearly to 0",
        "[0, 1]",
    )
    weight_decay: float = flag(0.01, "AdamW weight decay", "[0, inf)")
    max_tokens: int = flag(
        512, "tokens of a text; a pair with a longer one is dropped and counted", "[1, inf)"
    )
    max_pairs: int = flag(100_000, "training pairs drawn where the data has more", "[1, inf)")
    max_eval_pairs: int = flag(2_000, "held-out pairs drawn where the data has more", "[1, inf)")
    min_rating_gap: float = flag(
        1.0, "text + rating data: smallest difference that makes a pair", "[0, inf)"
    )
    crop_words: str = flag(
        "",
        "keep only so many first words of each completion, drawn anew: a range such as 5-60, for a "
        "reward model that will score short continuations",
    )
    eval_every: int = flag(50, "steps between evaluations on all held-out pairs", "[1, inf)")


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense together."""
    ordinal = config.loss == "ordinal"
    for name in ("ties", "num_scores", "rating_coef", "rating_range"):
        require(ordinal or getattr(config, name) is None, f"{dashed(name)} needs --loss ordinal")
    for name in ("margin", "center_coef"):
        require(
            not ordinal or getattr(config, name) is None,
            f"{dashed(name)} needs --loss bradley-terry",
        )
    if ordinal:
        fill_in(config, ties="half", num_scores=10, rating_coef=0.0)
        fill_in(config, rating_range=(1.0, float(config.num_scores)))
        low, high = config.rating_range
        require(low < high, "--rating-range: expected the lower end first")
    else:
        fill_in(config, margin=0.0, center_coef=0.01)
    fill_in(config, lr=1e-5 if config.dataset else 2e-3, micro_batch_size=config.batch_size)
    dataset, model = config.dataset, config.model
    require(bool(dataset) or not model, f"--model {model}: needs --dataset, too")
    require(bool(model) or not dataset, f"--dataset {dataset}: needs --model, too: where it starts")
    resolve_training(config)
    return config


def objective_of(config: Config) -> Objective:
    """The one that --loss names."""
    return {"bradley-terry": bradley_terry, "ordinal": ordinal}[config.loss](config)


def bradley_terry(config: Config) -> Objective:
    """-log sigmoid(r_c - r_r - margin) + center_coef (r_c + r_r)^2; r is the head's one output.

    Of a list of K > 2 texts: -sum_k log(e^r_k / sum_{j >= k} e^r_j) + center_coef 4 mean(r)^2.
    """
    import torch

    from minalign.losses import bradley_terry_loss, centering_penalty, plackett_luce_loss
    from minalign.models.heads import Objective, place_mask

    def order_losses(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        rewards = logits[:, :, 0]  # (K, B)
        if len(rewards) > 2:
            return plackett_luce_loss(rewards, place_mask(logits, examples))
        gaps = torch.tensor([example.gap for example in examples], device=logits.device)
        return bradley_terry_loss(*rewards, config.margin * gaps, probabilities(examples))

    def centering(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        mean = logits[:, :, 0].sum(0) / place_mask(logits, examples).sum(0)
        return config.center_coef * centering_penalty(mean, mean)

    return Objective(
        labels=1,
        order_losses=order_losses,
        penalties=centering,
        win_probabilities=lambda one, other: (one[:, 0] - other[:, 0]).sigmoid(),
    )


def probabilities(examples: Sequence[Example]) -> torch.Tensor | None:
    """(B,) that the first text of each pair is the better one; None where all are certain."""
    import torch

    soft = [example.probability for example in examples]
    return torch.tensor(soft) if min(soft) < 1 else None


def ordinal(config: Config) -> Objective:
    """-log[P(S_c > S_r) + P(S_c = S_r) / 2] + rating_coef RPS; S ~ softmax(head).

    Of a list of K > 2 texts: the mean over its pairs; the ratings' loss is twice the mean over its
    texts, which is the sum of a pair's.
    """
    import torch

    from minalign.losses import ordinal_pairwise_loss, ordinal_rating_loss
    from minalign.models.heads import Objective, place_mask

    def order_losses(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        pairs = list(itertools.combinations(range(len(logits)), 2))  # (better, worse)
        losses = [ordinal_pairwise_loss(logits[i], logits[j], config.ties) for i, j in pairs]
        soft = probabilities(examples)
        if soft is not None:  # these are pairs
            soft, other = (
                soft.to(logits.device),
                ordinal_pairwise_loss(*logits.flip(0), config.ties),
            )
            losses = [soft * losses[0] + (1 - soft) * other]
        there = place_mask(logits, examples)[[j for _, j in pairs]]  # (pairs, B)
        return torch.stack(losses).where(there, 0.0).sum(0) / there.sum(0)

    def rating_losses(logits: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor | float:
        if not config.rating_coef:
            return 0.0
        low, high = config.rating_range
        ratings = [torch.tensor(example.ratings, device=logits.device) for example in examples]
        ratings = torch.nn.utils.rnn.pad_sequence(ratings, padding_value=low)  # (K, B)
        scores = 1 + (ratings - low) / (high - low) * (config.num_scores - 1)  # 1..num_scores
        losses = torch.stack(list(map(ordinal_rating_loss, logits, scores)))
        there = place_mask(logits, examples)
        return 2 * config.rating_coef * losses.where(there, 0.0).sum(0) / there.sum(0)

    return Objective(
        labels=config.num_scores,
        order_losses=order_losses,
        penalties=rating_losses,
        win_probabilities=lambda one, other: (-ordinal_pairwise_loss(one, other, "half")).exp(),
    )


def train(
    run: Run,
    reward_model: RewardModel,
    examples: TokenItems[Example],
    held_out: TokenItems[Example],
) -> dict[str, float]:
    """Train `reward_model` in place by run.config; returns the metrics of the model that was kept.

    With --resume, goes on from the newest checkpoint in the run's folder, if there is one. Raises
    KeyboardInterrupt after the step in which `run.stop` was set, with a checkpoint of it.
    """
    import torch

    from minalign.data.batches import length_grouped_batches
    from minalign.models.heads import by_place
    from minalign.reward import RewardModel
    from minalign.running.optimizer import Optimizer, warmup_and_decay

    config, model, objective = run.config, reward_model.model, objective_of(run.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Optimizer(model, trained, config, run.ranks, weight_decay=config.weight_decay)
    # With --shard a pass is a sum over the processes, which must all make as many
    read = RewardModel.one_pass if config.shard else RewardModel.forward
    logits_of = optimizer.forward(
        lambda learner, texts: read(reward_model.of(learner), texts), run.dtype
    )
    order = torch.Generator().manual_seed(config.seed)
    lengths = examples.lengths.max(1).tolist()
    batches = length_grouped_batches(lengths, config.batch_size, order)
    steps = config.steps or math.ceil(len(examples) / config.batch_size)
    state = {"trained": trained, "optimizer": optimizer} | dropout_generators(run.device)

    for step, batch in run.steps(steps, batches, state, "reward model"):
        optimizer.lr = config.lr * warmup_and_decay(step, steps, config.warmup)

        # This process's pairs; one that counts 0 where an epoch's last batch has too few for all
        mine, counts = run.ranks.rows(batch)
        pairs = [examples[i] for i in mine]
        losses = torch.zeros(len(pairs), device=run.device)
        # -log P(the chosen text is better) + penalties, averaged over the whole batch
        lengths = [sum(map(len, pair.texts)) for pair in pairs]
        for rows, weight in optimizer.micro_batches(lengths, counts):
            with optimizer.retry_in_halves():
                loss = None  # a second try must not hold the graph of the first
                micro = [pairs[i] for i in rows]
                texts = [text for pair in micro for text in pair.texts]  # all in one forward
                loss = pair_losses(objective, by_place(logits_of(texts), micro), micro)
                (weight * loss.sum() / len(batch)).backward()
                losses[rows] = loss.detach()
        loss = run.ranks.gather((losses.sum() * (counts / len(batch)))[None]).sum().item()
        grad_norm = optimizer.step(skip=not math.isfinite(loss))
        if not math.isfinite(loss + grad_norm):
            kept = keep_last(run, reward_model, held_out)
            overflow = optimizer.overflowed and math.isfinite(loss)
            run.skip(f"loss {loss}, gradient norm {grad_norm}", kept, overflow)
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": optimizer.lr}
        write_logs(run, reward_model, objective, held_out, steps, metrics)
    best = run.counts.get("best") or {}
    if run.first:
        print(
            f"kept the model of step {best['step']} ({reward_model.reading}): accuracy "
            f"{best['eval_accuracy']:.3f} on {len(held_out)} held-out examples"
        )
    return best


def pair_losses(
    objective: Objective, logits: torch.Tensor, examples: Sequence[Example]
) -> torch.Tensor:
    """The training loss of each example (B,): logits (K, B, labels)."""
    return objective.order_losses(logits, examples) + objective.penalties(logits, examples)


def dropout_generators(device: torch.device) -> dict[str, torch.Generator]:
    """Of --lora-dropout: the only chance but the order of the pairs."""
    import torch

    generators = {"dropout": torch.default_generator}
    if device.type == "cuda":
        generators["dropout_cuda"] = torch.cuda.default_generators[device.index or 0]
    return generators


def write_logs(
    run: Run,
    reward_model: RewardModel,
    objective: Objective,
    held_out: Sequence[Example],
    steps: int,
    metrics: dict,
) -> None:
    """The step's row; every --eval-every steps with metrics on the held-out pairs.

    The best model so far is saved.
    """
    from minalign.measuring.pairs import evaluate_pairs

    metrics = metrics | {"skipped": run.counts["skipped"]}
    if run.first and (run.step % run.config.eval_every == 0 or run.step == steps):
        measured = evaluate_pairs(objective, reward_model, held_out)
        best = run.counts.get("best")
        kept = f"model/ is that of step {best['step']}" if best else "no model is kept"
        bad = ", ".join(name for name, value in measured.items() if not math.isfinite(value))
        require(not bad, f"step {run.step}: not finite: {bad}: {kept}: lower --lr")
        metrics |= measured
        tqdm.write(
            "step {step:4d}/{steps}  loss {loss:.4f}  held out: loss {eval_loss:.4f} (constant "
            "{eval_floor:.4f})  accuracy {eval_accuracy:.3f} (longer wins {eval_longer_wins:.3f}, "
            "where shorter is better {eval_accuracy_shorter:.3f})  margin {eval_margin:.2f}  ece "
            "{eval_ece:.3f}  reward {reward_mean:.2f} +- {reward_std:.2f}  corr with length "
            "{eval_length_corr:.2f}".format_map(
                {"step": run.step, "steps": steps}
                | dict.fromkeys(("eval_accuracy_shorter", "eval_length_corr"), math.nan)
                | metrics
            )
        )
        if best is None or metrics["eval_loss"] < best["eval_loss"]:
            run.counts["best"] = {"step": run.step} | metrics
            save(run, reward_model, held_out)
    run.log(metrics)


def keep_last(run: Run, reward_model: RewardModel, held_out: Sequence[Example]) -> str:
    """Save the model where none is kept yet and its scores are finite. Says what is kept."""
    best, texts = run.counts.get("best"), [text for pair in held_out for text in pair.texts]
    if best is None and run.first:
        if not reward_model.logits(texts).isfinite().all():
            return "no model is kept"
        save(run, reward_model, held_out)
    return f"{run.folder}/model is that of step {best['step'] if best else run.step - 1}"


def save(run: Run, reward_model: RewardModel, held_out: Sequence[Example]) -> None:
    """<run's folder>/model, with a card that shows the scores of some held-out texts."""
    from minalign.data import toy
    from minalign.models.folders import atomic_folder
    from minalign.running.card import model_card
    from minalign.running.logs import rows_until

    run.require_in_place()
    base = run.config.model or toy.start_policy_folder()
    step = (run.counts.get("best") or {"step": run.step - 1})["step"]
    curve = rows_until(run.folder / "metrics.jsonl", run.step - 1)
    curve += filter(None, [run.counts.get("best")])  # it is logged after it is saved
    ids = [text for i in range(min(2, len(held_out))) for text in held_out[i].texts]
    scored = zip(ids, reward_model.read_out(reward_model.logits(ids)).tolist())
    samples = [{"text": reward_model.tokenizer.decode(i), "reward": reward} for i, reward in scored]
    title, tags = f"Reward model ({run.config.loss}) after {step} steps", ["reward-model"]
    card = model_card(run.ran, title, "text-classification", tags, {}, curve, samples)
    with atomic_folder(run.folder / "model") as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        adapter_of = base if run.config.lora_save == "adapter" else ""
        reward_model.save_pretrained(folder, adapter_of=adapter_of)


def load(
    config: Config, device: torch.device
) -> tuple[RewardModel, TokenItems[Example], TokenItems[Example]]:
    """The reward model to train, training pairs and held-out pairs, as token ids.

    How the data are read is printed.
    """
    import torch

    from minalign.data import pairs, toy
    from minalign.data.chat import wants_chat
    from minalign.data.prompts import parse_span
    from minalign.data.splits import Split
    from minalign.models.activations import checkpoint_activations_
    from minalign.models.lora import add_lora_
    from minalign.models.saving import try_save
    from minalign.reward import RewardModel

    data = Split.from_flags(config)
    base = config.model or toy.start_policy_folder()
    torch.manual_seed(0)  # one head for all seeds: others could not be averaged
    reward_model = RewardModel.from_base(base, num_labels=config.num_scores or 1)
    model = reward_model.model.to(device)
    print(f"{type(model).__name__} on {base}: {reward_model.reading}")
    if config.dataset:
        chat = wants_chat(reward_model.tokenizer, config.format)
        train_pairs, eval_pairs = pairs.load_pairs(
            data,
            chat=chat,
            min_rating_gap=config.min_rating_gap,
            needs="ratings" if config.rating_coef else "margin" if config.margin else "",
        )
    else:
        train_pairs, eval_pairs = toy.preference_pairs(
            config.seed, config.eval_share, config.split_seed
        )
    if isinstance(train_pairs[0].prompt, str) and reward_model.tokenizer.chat_template:
        print("  note: trained on plain texts, it is saved without its chat template")
        reward_model.tokenizer.chat_template = None  # so that it reads plain text
    try_save(model, reward_model.tokenizer)

    drawing = dict(
        max_tokens=min(config.max_tokens, reward_model.context),
        seed=config.seed,
        crop_words=parse_span("--crop-words", config.crop_words),
    )
    tokenizer = reward_model.tokenizer
    drawing["max_pairs"], smoothing = config.max_pairs, config.label_smoothing
    examples = pairs.encode_pairs(train_pairs, tokenizer, label_smoothing=smoothing, **drawing)
    drawing["max_pairs"] = config.max_eval_pairs
    held_out = pairs.encode_pairs(eval_pairs, tokenizer, **drawing)
    require(
        bool(examples and held_out),
        "no pairs left to train or evaluate on: all are identical, or longer than --max-tokens",
    )
    longest = max(part.places.shape[1] for part in (examples, held_out))
    for name in ("margin", "label_smoothing"):
        require(
            longest == 2 or not getattr(config, name),
            f"{dashed(name)}: is of pairs, and {config.dataset} ranks up to {longest} texts: leave "
            "it out",
        )
    if config.rating_coef:
        ratings = [ratings for part in (examples, held_out) for ratings, *_ in part.extras]
        pairs.require_rating_range(config.dataset or "toy world", ratings, *config.rating_range)

    if config.lora_rank:
        torch.manual_seed(config.seed)
        dropout = config.lora_dropout or 0.0
        add_lora_(model, config.lora_rank, config.lora_alpha, dropout, config.lora_targets)
    if config.gradient_checkpointing:
        checkpoint_activations_(model)
    return reward_model, examples, held_out


def load_run(run: Run) -> tuple[RewardModel, TokenItems[Example], TokenItems[Example]]:
    """As `load`, and the run takes the fingerprints of data and start model."""
    from minalign.data import toy

    with run.ranks.first_before_others():
        model = run.config.model or toy.start_policy_folder()
    parts = load(run.config, run.device)
    data = {"training data": parts[1], "held-out data": parts[2]}
    run.is_made_of(data, {f"start model {model}": model})
    return parts


def toy_reward_model(device: torch.device, dtype: torch.dtype) -> str:
    """The toy world's reward model: what a run without --rm gets.

    It is trained on first use, with the default flags.
    """
    from minalign.data import toy
    from minalign.models.folders import atomic_folder

    folder = toy.folder() / "reward-model"
    if not folder.exists():
        print("no --rm: training the toy world's reward model first, as `python train_rm.py` does")
        with atomic_folder(folder) as new:
            where = ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
            run = Run(new, resolve(parse_flags(Config, "", where)), device, dtype)
            parts = load_run(run)
            run.write_config()
            train(run, *parts)
    return str(folder)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, open the run, train."""
    config = resolve(parse_flags(Config, __doc__, argv))
    with open_run(config, "rm") as run:
        parts = load_run(run)
        with run.begun():
            train(run, *parts)
        print(f"saved {run.folder}/model")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
