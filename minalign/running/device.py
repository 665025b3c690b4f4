"""Where and in which precision a program runs."""

from __future__ import annotations

import contextlib
import typing

from .errors import UserError

if typing.TYPE_CHECKING:
    import torch


def pick_device(name: str) -> tuple[torch.device, str]:
    """The device that `name` stands for, and the reason in words.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1" or "mps".
    Raises:
        UserError: the device is not there.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"auto: {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            # minalign has not been run on one.
            return torch.device("cpu"), "auto: an Apple GPU is used with --device mps alone"
        return torch.device("cpu"), "auto: no GPU found"
    try:
        device = torch.device(name)
        # on meta a tensor has no numbers, and some devices have no generator
        torch.zeros(1, device=device).item()
        torch.Generator(device)
    except Exception as error:  # of any kind: each backend has its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"--device {name}: cannot be used ({reason}): try auto or cpu") from error
    return device, "as asked"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the forward passes: "auto" is bfloat16 where the GPU has it, else float32.

    Weights stay float32. GPUs before Ampere emulate bfloat16, more slowly than float32: it is said.

    Args:
        name: "auto", "float32", "bfloat16" or "float16".
    """
    import torch

    if name == "auto" and device.type == "cuda":
        with torch.cuda.device(device) if device.index else contextlib.nullcontext():
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
        print("--dtype auto: this GPU has no bfloat16 of its own: float32 (float16 is faster)")
    return torch.float32 if name == "auto" else getattr(torch, name)
