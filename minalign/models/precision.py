"""Forward passes in bfloat16: autocast, and the rounded copy that samples are drawn from."""

import copy

import torch


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
    copied = copy.deepcopy(policy).requires_grad_(False)
    for parameter in copied.parameters():  # not the buffers: rotary angles need float32
        parameter.data = parameter.data.to(dtype)
    return copied


@torch.no_grad()
def refresh_(sampler: torch.nn.Module, policy: torch.nn.Module) -> None:
    """Round the policy's weights into its sampling copy; nothing to do where they are one."""
    if sampler is not policy:
        for rounded, parameter in zip(sampler.parameters(), policy.parameters(), strict=True):
            rounded.copy_(parameter)
