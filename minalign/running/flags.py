"""Command-line flags from a dataclass, and the groups of flags that scripts and tools share."""

import argparse
import dataclasses
import os
import re
import types
import typing
from dataclasses import dataclass

from .errors import one_line, require
from .ranks import processes

SEEDS = "[0, 9223372036854775808)"  # what Python's and torch's generators both take
TEMPERATURES = "[1e-06, 1e+06]"  # logits divided by it stay float32 numbers
# What no flag goes beyond that says nothing else: loops end, and float32 holds it.
LARGEST = {int: "[-2147483647, 2147483647]", float: "[-1e+30, 1e+30]"}


def flag(
    default: object,
    help: str,
    allowed: str | tuple[str, ...] | None = None,
    positional: bool = False,
) -> typing.Any:
    """A dataclass field that is a command-line flag: `steps: int = flag(64, "steps", "[1, inf)")`.

    Args:
        help: what --help says of it. The default is added.
        allowed: a tuple of words, or an interval that the value must lie in. A bracket includes its
            end, a parenthesis leaves it out. An end of inf is that of LARGEST.
        positional: for a list: it is given without a flag's name before it, and must be given.
    """
    metadata = {"help": help, "allowed": allowed, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


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
    rm_average: bool = flag(
        False, "of several reward models take one whose weights are their average (WARM)"
    )
    standardize_rewards: bool = flag(
        False,
        "by mean and deviation of the start policy's rewards: beta then means the same "
        "for any reward model",
    )


@dataclass
class TaskFlags(PromptFlags, RewardFlags, DataFlags):
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
    tensorboard: bool = flag(
        False, "write the metrics for TensorBoard, too (pip install tensorboard)"
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
        "auto", "forward precision: auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
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


def resolve_task(config: TaskFlags) -> None:
    """Check TaskFlags, and fill in what depends on other flags.

    Raises:
        UserError: flags that make no sense together.
    """
    resolve_data(config)
    config.max_new_tokens = config.max_new_tokens or (64 if config.dataset else 32)
    require(
        bool(config.rm) or not (config.rm_average or config.rm_weights),
        "--rm-average, --rm-weights: need --rm",
    )


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
            processes() > 1,
            "--shard: one process has nobody to share with: start it with torchrun, or leave it "
            "out",
        )
        require(
            not config.lora_rank,
            "--shard: adapters are small, and there is little to spread: leave it or --lora-rank "
            "out",
        )


def fill_in(config: typing.Any, **defaults: typing.Any) -> None:
    """Give each of these fields its default where the flag was not given, and is None."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def dashed(name: str) -> str:
    """A field's name as a flag.

    >>> dashed("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def lies_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval.

    >>> lies_within(0, "(0, 1]"), lies_within(1, "(0, 1]"), lies_within(float("nan"), "[0, inf)")
    (False, True, False)
    """
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def parse_flags(
    config_class: type, description: str, argv: list[str] | None = None, prog: str | None = None
) -> typing.Any:
    """A config dataclass from the command line: strict, with dashes for underscores.

    A field of type bool is a switch. A list takes several values, and may be given several times.
    A field of type `X | None` is None where the flag is not given, so that the script can tell
    whether it was. An unknown flag or a bad value ends the program with exit status 2 and one line.

    Args:
        config_class: a dataclass whose fields are made by `flag`. The docstring of each class that
            it inherits from is the title of a group of --help.
        description: what --help says of the program.
        argv: the command line; None is sys.argv[1:].
        prog: the program's name in --help; None is the script's.
    Returns:
        An instance of `config_class`.
    """
    from .. import __version__

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            self.exit(2, f"error: {one_line(message)} (see --help)\n")

    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=formatter
    )
    parser.add_argument("--version", action="version", version=f"minalign {__version__}")
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own knows no -1e-05
    kinds = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    # A group of --help for each class, the script's own flags first.
    for owner in config_class.__mro__[:-1]:
        group = parser.add_argument_group(owner.__doc__.strip().rstrip("."))
        for name in owner.__annotations__:
            if name in fields:
                _add_flag(group, fields.pop(name), kinds)
    config = config_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(config_class):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if typing.get_origin(_kind(kinds[field.name])) is tuple and value is not None:
            setattr(config, field.name, tuple(value))  # argparse gives a list
        for one in value if isinstance(value, list) else [value]:
            if expected := _expected(one, allowed):
                parser.error(f"{dashed(field.name)} {one}: expected {expected}")
    return config


def _expected(value: object, allowed: str | tuple[str, ...] | None) -> str:
    """What a flag's value should have been, in words; "" for a good one."""
    if isinstance(value, str):  # "ignore" leaves out bytes of the shell that are no UTF-8
        same = value == value.encode(errors="ignore").decode().replace("\0", "")
        return "" if same else "UTF-8 without zero bytes"
    if type(value) not in LARGEST:
        return ""
    open_ended = not allowed or "inf" in allowed
    intervals = [allowed or LARGEST[type(value)]] + [LARGEST[type(value)]] * open_ended
    return next((f"a number in {one}" for one in intervals if not lies_within(value, one)), "")


def _kind(hint: typing.Any) -> typing.Any:
    """X of `X | None`; the type itself otherwise."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field, kinds: dict[str, typing.Any]
) -> None:
    """Add the flag of one field to a group of --help."""
    kind, allowed = _kind(kinds[field.name]), field.metadata["allowed"]
    choices = allowed if isinstance(allowed, tuple) else None
    values = typing.get_args(kind)  # of a tuple, or a list
    shown = not (field.default is None or field.default is False or field.default == "")
    help = field.metadata["help"] + (f" (default: {field.default})" if shown else "")
    options = {"help": help.replace("%", "%%")}
    if kind is bool:
        options |= {"action": "store_true"}
    elif values:
        many = typing.get_origin(kind) is list
        options |= {
            "type": values[0],
            "nargs": "+" if many else len(values),
            "action": "extend" if many else "store",
            "default": field.default,
            "metavar": values[0].__name__.upper(),
        }
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        options |= {"type": kind, "default": field.default, "choices": choices, "metavar": metavar}
    positional = field.metadata["positional"]
    options |= {"metavar": field.name.upper()} if positional else {}
    group.add_argument(field.name if positional else dashed(field.name), **options)
