"""What the three scripts share: one-line errors, device, header, metrics log. torch is imported where it is first needed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

if typing.TYPE_CHECKING:
    import torch


class UserError(ValueError):
    """Bad input from outside; its message is one line that says what, where and how to mend it."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with exit status 2 and one line on a UserError, with 130 and one line when it is stopped; everything else keeps
    its traceback.
    """

    def terminated(*_):
        raise KeyboardInterrupt("by SIGTERM")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # as Ctrl-C, also while models load
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"stopped{f': {stop}' if stop.args else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({str(error).splitlines()[0]}): lower --batch-size or --max-new-tokens", file=sys.stderr)
        raise SystemExit(2) from None
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on a GPU or a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def halving(micro_batch_size: int, gradient_pass: Callable[[int], None]) -> int:
    """gradient_pass(micro_batch_size), again with half as many rows where memory runs out: the gradient is the same.

    `gradient_pass` begins with empty gradients. Returns the size that fitted; UserError where a single row does not fit.
    """
    while True:
        try:
            gradient_pass(micro_batch_size)
            return micro_batch_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            require(micro_batch_size > 1, f"out of memory with one sequence a pass ({str(error).splitlines()[0]}): "
                    "shorten prompts or completions, or try --gradient-checkpointing, --lora-rank")  # fmt: skip
        micro_batch_size //= 2
        tqdm.write(f"out of memory: going on with --micro-batch-size {micro_batch_size}, which gives the same gradient")


@contextlib.contextmanager
def stop_after_step(out: Path) -> Iterator[threading.Event]:
    """Inside, SIGINT (Ctrl-C) or SIGTERM sets the event, and the loop ends after the step that runs; a second one ends it at once.

    Either way it leaves by a KeyboardInterrupt that says how to go on.
    """
    asked = threading.Event()

    def ask(*_):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{str(stopped) or 'at once'}: go on with the same flags and --out {out} --resume") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def show_config(config, device: torch.device, reason: str, dtype: torch.dtype) -> None:
    """Print the run's header: device and why, precision, and every flag as resolved."""
    import torch

    print(f"device {device} ({reason}), {str(dtype).removeprefix('torch.')}, torch {torch.__version__}")
    given = {
        name: value for name, value in dataclasses.asdict(config).items() if value not in ("", None) and value is not False
    }
    print("  " + "  ".join(f"{name} {value}" for name, value in given.items()))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at `step` (from 1): linear up to `warmup_steps`, then 1."""
    return min(1.0, step / max(1, warmup_steps))
