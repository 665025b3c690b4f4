"""Activation checkpoints: less memory, a third more time."""

import functools
from collections.abc import Callable

import torch
import torch.utils.checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..running.errors import require


def checkpoint_activations_(model: PreTrainedModel) -> None:
    """Make each transformer layer forget its activations and recompute them in the backward pass.

    Not transformers' own switch: that works in training mode alone, where dropout is on.

    Raises:
        UserError: the model has no layers that support it.
    """
    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    require(
        bool(layers),
        f"--gradient-checkpointing: {model.config.model_type} has no layers that support it: "
        "leave it out",
    )
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer, layer.forward)


def is_checkpointed(layer: torch.nn.Module) -> bool:
    """Whether `checkpoint_activations_` changed this layer; without gradients it is as before."""
    return getattr(vars(layer).get("forward"), "func", None) is _checkpointed


def _checkpointed(
    layer: torch.nn.Module, forward: Callable, *args: object, **kwargs: object
) -> torch.Tensor | tuple:
    # Sampling and scoring: there is nothing to save, and a key-value cache must be filled once.
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The second pass would fill a cache twice.
    args = [None if isinstance(value, Cache) else value for value in args]
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    modes = [(module, module.training) for module in layer.modules()]

    # The backward pass may find the model in another mode, with dropout on.
    def in_the_same_mode(*args: object, **kwargs: object) -> torch.Tensor | tuple:
        modes_now = [(module, module.training) for module in layer.modules()]
        for module, training in modes:
            module.training = training
        try:
            return forward(*args, **kwargs)
        finally:  # torch leaves the second pass by an exception, once it has what it needs
            for module, training in modes_now:
                module.training = training

    return torch.utils.checkpoint.checkpoint(in_the_same_mode, *args, use_reentrant=False, **kwargs)
