"""Where and in which precision a program runs."""

from __future__ import annotations

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
            return torch.device("mps"), "auto: Apple GPU"
        return torch.device("cpu"), "auto: no GPU found"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # on meta, a tensor has no numbers
        torch.Generator(device)
    except Exception as error:  # of any kind: each backend has its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"--device {name}: cannot be used ({reason}): try auto or cpu") from error
    return device, "as asked"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the forward passes: "auto" is bfloat16 where CUDA has it, else float32.

    Weights stay float32.

    Args:
        name: "auto", "float32" or "bfloat16".
    """
    import torch

    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
