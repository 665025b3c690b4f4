"""The groups of flags that scripts and tools share, and what makes sense together."""

import math
import os
import typing
from dataclasses import dataclass

from .errors import require
from .flags import SEEDS, TEMPERATURES, dashed, flag
from .ranks import processes


@dataclass
class FormatFlags:
    """The form of a prompt."""

    format: str = flag(
        "auto",
        "prompts as the model's chat template or as plain text (auto: chat where it has one)",
        ("auto", "chat", "plain"),
    )


@dataclass
class ColumnFlags:
    """What the columns of a data set are called."""

    columns: list[str] | None = flag(
        None,
        "columns of the data under other names, as prompt=question,chosen=best (default: prompt, "
        "messages, chosen, rejected, text, rating, ... by their own names)",
    )


@dataclass
class DataFlags(FormatFlags, ColumnFlags):
    """Which rows train and which are held out."""

    dataset: str = flag(
        "", "a .jsonl, .csv or .parquet file, a folder or a hub id (default: the toy world)"
    )
    subset: str = flag("", "configuration of a hub data set that has several")
    split: str = flag("train", "split to train on, such as train or train[:5000]")
    eval_split: str = flag("", "split to hold out (default: a share of --split)")
    eval_share: float = flag(
        0.1, "share of the prompts (or texts) held out, chosen by their hash", "(0, 1)"
    )
    split_seed: int = flag(
        0, "seed of that share: keep it, and no script trains on what another holds out", SEEDS
    )


@dataclass
class PromptFlags:
    """Which prompts, and how much of them."""

    prompt_tokens: str = flag(
        "", "first tokens of each text to take, drawn anew (default for a column text: 5-15)"
    )
    max_prompt_tokens: int | None = flag(
        None,
        "longer prompts are dropped and counted (default: what the context leaves)",
        "[1, inf)",
    )


@dataclass
class RewardFlags:
    """What a completion is worth."""

    rm: list[str] | None = flag(
        None,
        "reward: a run of train_rm.py, a folder, a hub id, or a Python module:function or "
        "file.py:function; may be several (default: a reward model for the toy world)",
    )
    rm_weights: list[float] | None = flag(
        None, "weights of several rewards, each standardised (default: 1 each)"
    )
    rm_combine: str | None = flag(
        None,
        "of several rewards, each standardised: their weighted sum, the lowest, or mean minus "
        "deviation, both pessimistic (default: sum)",
        ("sum", "min", "mean-sd"),
    )
    rm_average: bool = flag(
        False, "of several reward models take one whose weights are their average (WARM)"
    )
    risk: float | None = flag(
        None,
        "ordinal reward models: tau, in scores, of the reward -tau log E[exp(-score / tau)] "
        "(default: inf, the mean score)",
        "(0, inf]",
    )
    standardize_rewards: bool = flag(
        False,
        "by mean and deviation of the start policy's rewards: beta then means the same "
        "for any reward model",
    )


@dataclass
class StopFlags:
    """Where a completion ends."""

    stop: list[str] | None = flag(
        None,
        "texts before which a completion ends, beside end tokens; a shell writes line breaks in "
        "them as $'\\n\\nHuman:'",
    )


@dataclass
class TaskFlags(StopFlags, PromptFlags, RewardFlags, DataFlags):
    """What a policy is asked, and how it answers."""

    eval_prompts: int = flag(128, "held-out prompts, one completion each", "[1, inf)")
    max_new_tokens: int | None = flag(
        None, "tokens of a completion (default: 64, in the toy world 32)", "[1, inf)"
    )
    temperature: float = flag(1.0, "of sampling and of every log-prob", TEMPERATURES)
    seed: int = flag(0, "seed of prompt order and sampling", SEEDS)


@dataclass
class LoraFlags:
    """Train low-rank adapters instead of all weights."""

    lora_rank: int | None = flag(None, "rank of the adapters (default: all weights)", "[1, inf)")
    lora_alpha: float | None = flag(
        None, "adapters count alpha / rank (default: twice the rank)", "(0, inf)"
    )
    lora_dropout: float | None = flag(
        None, "dropout before the adapters, reward models only (default: 0)", "[0, 1)"
    )
    lora_targets: list[str] | None = flag(
        None, "names of layers that get adapters (default: every linear one in the body)"
    )
    lora_save: str | None = flag(
        None,
        "weights with the adapters added, or PEFT's files (default: merged)",
        ("merged", "adapter"),
    )


@dataclass
class OptimizerFlags:
    """How a gradient is made and bounded."""

    micro_batch_size: int | None = flag(
        None, "completions or pairs per pass: memory, not the gradient (default: all)", "[1, inf)"
    )
    max_grad_norm: float = flag(
        1.0, "gradient norm above which the whole batch's gradient is scaled down", "(0, inf)"
    )


@dataclass
class RunFlags:
    """Nothing lost: checkpoints, --resume, and what happens to a step that is not finite."""

    save_every: int = flag(50, "steps between checkpoints in <out>/checkpoints", "[1, inf)")
    keep: int = flag(
        1, "last checkpoints to keep; that of a policy's best step stays, too", "[1, inf)"
    )
    resume: bool = flag(False, "resume the run in --out from its last checkpoint, to the same end")
    report: str | None = flag(
        None, "where metrics go, too, if it is installed", ("tensorboard", "trackio", "wandb")
    )
    on_nonfinite: str = flag(
        "stop",
        "at a reward, loss or gradient that is not finite: end, or leave that step out",
        ("stop", "skip"),
    )


@dataclass
class DeviceFlags:
    """Where it runs."""

    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag(
        "auto",
        "forward precision: auto is bfloat16 on CUDA; float16 with a loss scale",
        ("auto", "float32", "bfloat16", "float16"),
    )


@dataclass
class MachineFlags(DeviceFlags):
    """How it runs: time and memory, not the algorithm."""

    gradient_checkpointing: bool = flag(
        False, "compute activations again in the backward pass: less memory, a third slower"
    )
    shard: bool = flag(
        False, "spread weights, gradients and optimizer state over torchrun's processes (FSDP2)"
    )


def resolve_data(config: DataFlags) -> None:
    """Check DataFlags.

    Raises:
        UserError: flags that make no sense together.
    """
    for name in ("subset", "eval_split", "columns"):
        given = bool(getattr(config, name))
        require(bool(config.dataset) or not given, f"{dashed(name)} needs --dataset")
    one_file = bool(config.subset) and os.path.isfile(config.dataset)
    require(not one_file, f"--subset: {config.dataset} is one file, not several: leave it out")
    require(
        bool(config.dataset) or config.format != "chat",
        "--format chat needs --dataset: the toy world is plain text",
    )


def resolve_rewards(config: RewardFlags) -> None:
    """Check RewardFlags.

    Raises:
        UserError: flags that make no sense together.
    """
    config.risk = None if config.risk == math.inf else config.risk
    require(
        bool(config.rm)
        or not (config.rm_average or config.rm_weights or config.rm_combine or config.risk),
        "--rm-average, --rm-weights, --rm-combine, --risk: need --rm",
    )
    several = len(config.rm or ()) > 1 and not config.rm_average
    require(
        several or not config.rm_combine,
        f"--rm-combine {config.rm_combine}: needs several rewards after --rm, and no --rm-average",
    )
    require(
        config.rm_combine in (None, "sum") or not config.rm_weights,
        f"--rm-combine {config.rm_combine}: takes no --rm-weights: a sum alone is weighted",
    )


def resolve_task(config: TaskFlags) -> None:
    """Check TaskFlags, and fill in what depends on other flags.

    Raises:
        UserError: flags that make no sense together.
    """
    resolve_data(config)
    config.max_new_tokens = config.max_new_tokens or (64 if config.dataset else 32)
    resolve_rewards(config)


def resolve_training(config: typing.Any) -> None:
    """Check DataFlags, LoraFlags and --shard, and fill in what depends on other flags.

    Args:
        config: a dataclass with DataFlags, LoraFlags and MachineFlags.
    Raises:
        UserError: flags that make no sense together.
    """
    resolve_data(config)
    for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_save"):
        given = getattr(config, name) is not None
        require(bool(config.lora_rank) or not given, f"{dashed(name)} needs --lora-rank")
    if config.lora_rank:
        config.lora_alpha = config.lora_alpha or 2.0 * config.lora_rank
        config.lora_save = config.lora_save or "merged"
    if config.shard:
        require(
            config.dtype != "float16",
            "--shard --dtype float16: its loss scale knows no weights in pieces: take bfloat16",
        )
        require(
            processes() > 1,
            "--shard: one process has nobody to share with: start it with torchrun, or leave it "
            "out",
        )
        require(
            not config.lora_rank,
            "--shard: adapters are small, and there is little to spread: leave it or --lora-rank "
            "out",
        )
