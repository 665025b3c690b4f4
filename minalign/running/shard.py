"""--shard: weights, gradients and optimizer state spread over processes, by torch's own FSDP2.

The model that a loop samples with, scores with, evaluates and saves stays a plain one. Gradients
are made with a copy of it that is in pieces: an N-th of every weight on each of torchrun's N
processes. Meanwhile the whole weights are gone from the device:

    load_(learner, policy, ranks)        every process has its piece of the weights, and no more
    forward and backward passes, AdamW   with the pieces; a layer is put together while it runs
    unshard_(policy, learner)            the policy is whole again, with the new weights

Outside of these lines the processes need not run the same number of passes: rank 0 evaluates alone.
Inside of them every backward pass is a sum over the processes, of which all must make as many.

What one of N processes holds on its device, in bytes for P weights:

    always                       4P/N of weights, 8P/N of AdamW's state, and what is never trained:
                                 start policy, anchor, reward model
    while gradients are made     4P/N of gradients, the whole weights and gradients of one layer and
                                 of embeddings and head, and in bfloat16 what autocast has rounded
                                 (2P)
    while samples are drawn      the whole policy (4P, and 2P rounded)
    and scored

Rank 0 moves the whole weights to main memory, and takes new ones at each step.
"""

import copy
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import require
from .ranks import Ranks


def sharded_copy(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """A copy of `model` in pieces, whose backward passes sum the gradients over the ranks.

    Collective, as is everything that runs it. `model` keeps its weights. The copy is never whole on
    a device.

    Raises:
        UserError: torch is too old.
    """
    require(
        hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
        f"--shard: torch {torch.__version__} is too old for it: take a newer one",
    )
    same_storage = {
        id(parameter): torch.nn.Parameter(parameter.detach()) for parameter in model.parameters()
    }
    sharded = copy.deepcopy(model, same_storage)
    mesh = init_device_mesh(model.device.type, (ranks.count,))
    layers = [m for m in sharded.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)  # what is left: embeddings, last norm, head
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            # The sum, not the mean: the loops' losses are divided by the whole batch. The division
            # by 1 comes after the sum, since gloo cannot multiply before it.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return sharded


def as_forward(sharded: PreTrainedModel, function: Callable) -> Callable:
    """`function` as a forward pass of `sharded`.

    Inside, and until the backward pass, what lies outside of the layers is whole. FSDP2 does this
    for `sharded(...)` by itself, but the loops call the body, and multiply by the head themselves.
    """
    sharded.pass_of_its_own = function
    register_fsdp_forward_method(sharded, "pass_of_its_own")
    return sharded.pass_of_its_own


@torch.no_grad()
def load_(sharded: PreTrainedModel, model: PreTrainedModel, ranks: Ranks) -> None:
    """Copy the weights of `model` into the pieces of `sharded`.

    The whole weights leave the device until `unshard_`. Rank 0 keeps them in main memory: a run
    that ends in between saves them without waiting for the others. Nothing to do without --shard,
    where the two models are one.
    """
    if sharded is model:
        return
    for parameter, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        shard.copy_(_piece(parameter.detach(), shard))
        parameter.data = parameter.data.cpu() if ranks.first else parameter.data.new_empty(0)


@torch.no_grad()
def unshard_(model: PreTrainedModel, sharded: PreTrainedModel) -> None:
    """Put the whole weights of `sharded` into `model`, on all ranks.

    Collective. Nothing to do without --shard.
    """
    if sharded is model:
        return
    for parameter, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        parameter.data = whole(shard)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor in pieces, on all ranks (collective); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict:
    """optimizer.state_dict() as it is without --shard: whole tensors, in main memory.

    Collective. One tensor is put together after the other, so that no device holds them all.

    Args:
        keep: whether this rank gets the tensors.
    """
    saved = optimizer.state_dict()
    state = {i: {} for i in saved["state"]}
    for i, values in saved["state"].items():
        for name, value in values.items():
            value = value.full_tensor().cpu() if isinstance(value, DTensor) else value
            if keep:
                state[i][name] = value
    return saved | {"state": state}


def load_whole_state_(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load what `whole_state` returned, on all ranks, with or without --shard.

    Raises:
        ValueError: it is of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, values in saved["state"].items():
        for name, value in values.items():
            if value.numel() > 1 and value.shape != parameters[i].shape:
                raise ValueError(f"{name} of another shape")
    state = {
        i: {name: _piece(value, parameters[i]) for name, value in values.items()}
        for i, values in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})


def _piece(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, cut as the parameter `like` is.

    A number of steps stays as it is, and so does everything without --shard. Every rank has the
    whole, so that nothing is sent.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
