"""What the three scripts share: one-line errors, device, header, metrics log. torch is imported where it is first needed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import platform
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

if typing.TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """Bad input from outside; its message is one line that says what, where and how to mend it."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with exit status 2 and one line on a UserError; everything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def pick_device(name: str) -> tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda", "cuda:1", "mps", with the reason in words. UserError if it is not there."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"auto: {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "auto: Apple GPU"
        return torch.device("cpu"), "auto: no GPU found"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}): try auto or cpu") from error
    return device, "as asked"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the forward passes: "auto" is bfloat16 where CUDA has it, else float32. Weights stay float32."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; off for float32. Log-probs, losses and scores leave it for float32 by themselves."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def checkpoint_activations_(model: torch.nn.Module) -> None:
    """Make each transformer layer forget its activations and compute them again in the backward pass.

    Not transformers' own switch: that works in training mode alone, where dropout is on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    require(bool(layers), f"--gradient-checkpointing: {model.config.model_type} has no layers that support it: leave it out")
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer, layer.forward)


def _checkpointed(layer: torch.nn.Module, forward, *args, **kwargs):
    import torch.utils.checkpoint
    from transformers import Cache

    if not torch.is_grad_enabled():  # sampling and scoring: nothing to save, and a key-value cache must be filled once
        return forward(*args, **kwargs)
    args = [None if isinstance(value, Cache) else value for value in args]  # the second pass would fill it twice
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    modes = [(module, module.training) for module in layer.modules()]

    def in_the_same_mode(*args, **kwargs):  # the backward pass may find the model in another mode, with dropout on
        modes_now = [(module, module.training) for module in layer.modules()]
        for module, training in modes:
            module.training = training
        try:
            return forward(*args, **kwargs)
        finally:  # torch leaves the second pass by an exception, once it has what it needs
            for module, training in modes_now:
                module.training = training

    return torch.utils.checkpoint.checkpoint(in_the_same_mode, *args, use_reentrant=False, **kwargs)


def new_run(out: str, kind: str) -> Path:
    """The folder of a new run: `out`, or the next free runs/<kind>-<number>. UserError if it holds another run."""
    if not out:
        taken = (int(p.name.rpartition("-")[2]) for p in Path("runs").glob(f"{kind}-*") if p.name.rpartition("-")[2].isdigit())
        out = f"runs/{kind}-{max(taken, default=0) + 1}"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be used ({error.strerror}): choose another folder") from error
    require(not occupied, f"--out {out}: holds another run: choose another folder or remove that one")
    return folder


def resumed_run(out: str, config) -> Path:
    """The folder of a run to go on with. UserError if there is none, or it ran with other flags (they are named)."""
    path = Path(out) / "config.json"
    require(path.is_file(), f"--resume: no run at --out {out!r} (no config.json there): give the folder of the run")
    ran = json.loads(path.read_text())
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in given.items():
        if name not in ("out", "resume", "device", "dtype") and ran.get(name) != value:
            flag_name = "--" + name.replace("_", "-")
            raise UserError(
                f"--resume: {out} ran with {flag_name} {ran.get(name)}, now {value}: give the same, or another --out"
            )
    return Path(out)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it: killed in between, the old file or none is there."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def write_config(folder: Path, config, device: torch.device, dtype: torch.dtype) -> None:
    """Write what runs to <folder>/config.json: every flag as resolved, versions, device, command."""
    import torch
    import transformers

    ran = dataclasses.asdict(config) | {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(folder / "config.json", json.dumps(ran, indent=2) + "\n")


def show_config(config, device: torch.device, reason: str, dtype: torch.dtype) -> None:
    """Print the run's header: device and why, precision, and every flag as resolved."""
    import torch

    print(f"device {device} ({reason}), {str(dtype).removeprefix('torch.')}, torch {torch.__version__}")
    given = {
        name: value for name, value in dataclasses.asdict(config).items() if value not in ("", None) and value is not False
    }
    print("  " + "  ".join(f"{name} {value}" for name, value in given.items()))


class JsonLines:
    """A file of one JSON object a line, flushed line by line: a killed run keeps what it had."""

    def __init__(self, path: Path):
        self.file = open(path, "w")

    def append(self, row: dict) -> None:
        """Write one line; a number that is not finite becomes null, since JSON has none."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class MetricsLog:
    """<folder>/metrics.jsonl, and a printed table of some of it."""

    def __init__(self, folder: Path):
        self.lines = JsonLines(folder / "metrics.jsonl")
        self.start = time.monotonic()
        self.printed = 0

    def write(self, step: int, metrics: dict[str, float], columns: dict[str, str] | None = None) -> None:
        """Append {"step": step, "seconds": since the start, **metrics}; print `columns` of it (metric -> heading)."""
        self.lines.append({"step": step, "seconds": round(time.monotonic() - self.start, 3), **metrics})
        if columns:
            if self.printed % 25 == 0:
                tqdm.write(" step" + "".join(f"{heading:>8}" for heading in columns.values()))
            tqdm.write(f"{step:5d}" + "".join(f"{_short(metrics[name]):>8}" for name in columns))
            self.printed += 1


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at `step` (from 1): linear up to `warmup_steps`, then 1."""
    return min(1.0, step / max(1, warmup_steps))
