"""Forward passes in bfloat16: autocast, and the rounded copy that samples are drawn from."""

import copy

import torch

from ..running.errors import UserError
from .folders import first_line


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; off for float32.

    Log-probs, losses and scores leave it for float32 by themselves.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def sampling_copy(policy: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model to sample with: the policy itself in float32, a rounded copy of it in bfloat16.

    Under autocast the policy would read its float32 weights for every token, round them, and read
    the result: three to five times the bytes, which are all that a small batch's token costs.
    """
    if dtype == torch.float32:
        return policy
    return round_(copy.deepcopy(policy).requires_grad_(False), dtype)


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


@torch.no_grad()
def refresh_(sampler: torch.nn.Module, policy: torch.nn.Module) -> None:
    """Round the policy's weights into its sampling copy; nothing to do where they are one."""
    if sampler is not policy:
        for rounded, parameter in zip(sampler.parameters(), policy.parameters(), strict=True):
            rounded.copy_(parameter)
