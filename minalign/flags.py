"""Command-line flags from a dataclass, and the groups of flags that scripts share."""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass

from .common import require
from .ranks import processes


def flag(default, help: str, choices: tuple[str, ...] | None = None, within: str = "", positional: bool = False):
    """A dataclass field that is a command-line flag: `batch_size: int = flag(64, "completions a step", within="[1, inf)")`.

    `within` is an interval that the value must lie in: a bracket includes its end, a parenthesis leaves it out. A list that
    is `positional` is given without the name of a flag before it, and must be given.
    """
    metadata = {"help": help, "choices": choices, "within": within, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DataFlags:
    """Which rows train and which are held out."""

    dataset: str = flag("", "a .jsonl, .csv or .parquet file, a folder or a hub id (default: the toy world)")
    subset: str = flag("", "configuration of a hub data set that has several")
    split: str = flag("train", "split to train on, such as train or train[:5000]")
    eval_split: str = flag("", "split to hold out (default: a share of --split)")
    eval_share: float = flag(0.1, "share of the prompts (or texts) held out, chosen by their hash", within="(0, 1)")
    split_seed: int = flag(0, "seed of that share: keep it, and no script trains on what another holds out")
    format: str = flag("auto", "prompts as the model's chat template or as plain text (auto: chat where it has one)",
                       ("auto", "chat", "plain"))  # fmt: skip


@dataclass
class LoraFlags:
    """Train low-rank adapters instead of all weights."""

    lora_rank: int | None = flag(None, "train adapters of this rank (default: all weights)", within="[1, inf)")
    lora_alpha: float | None = flag(None, "adapters count alpha / rank (default: twice the rank)", within="(0, inf)")
    lora_dropout: float | None = flag(None, "dropout before the adapters, reward models only (default: 0)", within="[0, 1)")
    lora_targets: list[str] | None = flag(None, "names of layers that get adapters (default: every linear one in the body)")
    lora_save: str | None = flag(None, "weights with the adapters added, or PEFT's files (default: merged)",
                                 ("merged", "adapter"))  # fmt: skip


@dataclass
class RunFlags:
    """Nothing lost: checkpoints, --resume, and what happens to a step that goes wrong."""

    save_every: int = flag(50, "steps between checkpoints in <out>/checkpoints", within="[1, inf)")
    keep: int = flag(1, "checkpoints to keep: so many of the last, and the best", within="[1, inf)")
    resume: bool = flag(False, "go on with the run in --out where its last checkpoint was saved, to the same end")
    tensorboard: bool = flag(False, "write the metrics for TensorBoard, too (pip install tensorboard)")
    on_nonfinite: str = flag("stop", "at a reward, loss or gradient that is no number: end, or go on without that step",
                             ("stop", "skip"))  # fmt: skip


@dataclass
class MachineFlags:
    """Where and how it runs: these change time and memory, not the algorithm."""

    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, a third slower")
    shard: bool = flag(False, "spread weights, gradients and optimizer state over torchrun's processes (FSDP2)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "forward precision: auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))


@dataclass
class PolicyFlags(DataFlags, LoraFlags, RunFlags, MachineFlags):
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


def resolve_shared(config):
    """Check DataFlags, LoraFlags, --shard, and fill in what depends on others; UserError for what makes no sense together."""
    for name in ("subset", "eval_split"):
        require(bool(config.dataset) or not getattr(config, name), f"--{name.replace('_', '-')} needs --dataset")
    require(bool(config.dataset) or config.format != "chat", "--format chat needs --dataset: the toy world is plain text")
    for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_save"):
        require(bool(config.lora_rank) or getattr(config, name) is None, f"--{name.replace('_', '-')} needs --lora-rank")
    if config.lora_rank:
        config.lora_alpha = config.lora_alpha or 2.0 * config.lora_rank
        config.lora_save = config.lora_save or "merged"
    if getattr(config, "shard", False):
        require(processes() > 1, "--shard: one process has nobody to share with: start it with torchrun, or leave it out")
        require(not config.lora_rank, "--shard: adapters are small, and there is little to spread: leave it or --lora-rank out")
    return config


def resolve_policy(config: PolicyFlags) -> PolicyFlags:
    """Check PolicyFlags, and fill in what depends on others; UserError for flags that make no sense, alone or together."""
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


def parse_span(name: str, text: str) -> tuple[int, int] | None:
    """(5, 15) from "5-15", (10, 10) from "10", None from "". UserError for anything else."""
    if not text:
        return None
    low, dash, high = text.partition("-")
    high = high if dash else low
    fits = low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)
    require(fits, f"{name} {text}: expected a number or a range, such as 10 or 5-15")
    return int(low), int(high)


def lies_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval.

    >>> lies_within(0, "(0, 1]"), lies_within(1, "(0, 1]"), lies_within(float("nan"), "[0, inf)")
    (False, True, False)
    """
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def parse_flags(config_class: type, description: str, argv: list[str] | None = None):
    """A config dataclass from the command line: strict, dashes for underscores, --help with units and defaults.

    A field of type bool is a switch; a list takes several values and may be given several times; one of type
    `X | None` is None where the flag is not given, so that the script can tell whether it was. An unknown flag or a
    bad value ends the program with status 2 and one line.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"error: {message} (see --help)\n")

    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for owner in config_class.__mro__[:-1]:  # a group of --help for each class: the script's own flags first
        group = parser.add_argument_group(owner.__doc__.strip().rstrip("."))
        for name in owner.__annotations__:
            if name in fields:
                _add_flag(group, fields.pop(name), kinds)
    config = config_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(config_class):
        value, within = getattr(config, field.name), field.metadata["within"]
        if typing.get_origin(_kind(kinds[field.name])) is tuple and value is not None:
            setattr(config, field.name, tuple(value))  # argparse gives a list
        if within and value is not None and not lies_within(value, within):
            parser.error(f"--{field.name.replace('_', '-')} {value}: expected a number in {within}")
    return config


def _kind(hint):
    """X of `X | None`; the type itself otherwise."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _add_flag(group, field: dataclasses.Field, kinds: dict) -> None:
    kind, choices = _kind(kinds[field.name]), field.metadata["choices"]
    values = typing.get_args(kind)  # of a tuple, or a list
    shown = not (field.default is None or field.default is False or field.default == "")
    options = {"help": (field.metadata["help"] + (f" (default: {field.default})" if shown else "")).replace("%", "%%")}
    if kind is bool:
        options |= {"action": "store_true"}
    elif values:
        many = typing.get_origin(kind) is list
        options |= {"type": values[0], "nargs": "+" if many else len(values), "action": "extend" if many else "store"}
        options |= {"default": field.default, "metavar": values[0].__name__.upper()}
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        options |= {"type": kind, "default": field.default, "choices": choices, "metavar": metavar}
    positional = field.metadata["positional"]
    group.add_argument(field.name if positional else "--" + field.name.replace("_", "-"), **options)
