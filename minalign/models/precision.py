"""How a forward pass runs: without dropout, in 16 bits."""

import contextlib
from collections.abc import Iterator

import torch

from ..running.errors import UserError
from .folders import first_line


@contextlib.contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards each module has its own mode back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; off for float32.

    Log-probs, losses and scores leave it for float32 by themselves.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def round_(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Round a model's parameters in place, and its buffers where it does not run without (XGLM).

    Rotary angles need float32: `model.to` would turn the 1000th token by radians.
    """
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
            return model
        except RuntimeError as error:
            reason = first_line(error)
    family = model.config.model_type
    raise UserError(f"--dtype: a {family} model does not run in bfloat16 ({reason}): use float32")


def float64_device(device: torch.device) -> torch.device:
    """Where the float64 numbers of a device are kept: an Apple GPU has none, so the CPU."""
    return torch.device("cpu") if torch.device(device).type == "mps" else device
