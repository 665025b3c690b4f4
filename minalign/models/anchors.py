"""The models that a KL is measured from."""

import copy

import torch

from .. import rollout
from .lora import AdapterView, adapter_parameters, lora_layers


def trained_and_anchor(
    policy: torch.nn.Module, start: torch.nn.Module | AdapterView, kind: str
) -> tuple[list[torch.nn.Parameter], torch.nn.Module | AdapterView]:
    """What is trained of a policy, and its anchor, which begins as the policy is now.

    With adapters the anchor is the policy itself with its adapters off, or with an average of them.
    A fixed anchor that would be a second copy of `start` is `start`.

    Args:
        policy: the model to be trained.
        start: the policy that kl_sft is measured from.
        kind: "fixed", or "ema" for an anchor whose parameters will be moved.
    Returns:
        The parameters to be trained, and the anchor.
    """
    if lora_layers(policy):
        trained = adapter_parameters(policy)
        if kind == "fixed":
            return trained, start if isinstance(start, AdapterView) else AdapterView(policy, None)
        return trained, AdapterView(policy, [parameter.detach().clone() for parameter in trained])
    trained = list(policy.parameters())
    if kind == "fixed" and all(torch.equal(a, b) for a, b in zip(trained, start.parameters())):
        return trained, start
    return trained, copy.deepcopy(policy).requires_grad_(False)


def start_and_anchor_logprobs(
    start: torch.nn.Module | AdapterView,
    anchor: torch.nn.Module | AdapterView,
    samples: tuple[torch.Tensor, ...],
    temperature: float,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(y_t|x, y_<t) of both models (B, T), nats; in one pass where they are the same.

    Args:
        samples: input_ids, attention_mask, tokens, mask, see rollout.frozen_logprobs.
        batch_size: rows per pass, at most.
    """
    found = rollout.frozen_logprobs(start, *samples, temperature, batch_size)
    if anchor is start:
        return found, found
    return found, rollout.frozen_logprobs(anchor, *samples, temperature, batch_size)
