"""--shard: weights, gradients and optimizer state spread over torchrun's processes, by torch's own FSDP2 (fully_shard).

The model that a loop samples with, scores with, evaluates and saves stays a plain one. Gradients are made with a copy of it that
is in pieces, an N-th of every weight on each of N processes; meanwhile the whole weights are gone from the device:

    spread_(policy, learner, ranks)                every process has its piece of the weights, and no more
    forward and backward passes, optimizer.step()  with the pieces; a layer's weights are put together while it runs
    gather_(policy, learner)                       the policy is whole again, by the new weights

So the processes need not run the same number of passes outside of these lines (rank 0 evaluates alone), and every backward pass
inside of them is a sum over the processes, of which all must make as many.

What one of N processes holds on its device, in bytes for P weights: 4P/N of weights, 8P/N of AdamW's state, and while gradients
are made 4P/N of those, one layer's whole weights and gradients, those of embeddings and head, and in bfloat16 what autocast has
rounded (2P). While samples are drawn and scored, the whole policy (4P, and 2P rounded), and always what is never trained: start
policy, anchor, reward model. Rank 0 moves the whole weights to main memory and takes new ones at each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .common import is_out_of_memory, require
from .ranks import Ranks


def sharded_copy(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """A copy of `model` in pieces, whose backward passes sum the gradients over the ranks; collective, as all that runs it.

    `model` keeps its weights; the copy is never whole on a device. Raises UserError where torch is too old.
    """
    require(hasattr(FSDPModule, "set_force_sum_reduction_for_comms"), f"--shard: torch {torch.__version__} is too old for it: "
            "take a newer one")  # fmt: skip
    same_storage = {id(parameter): torch.nn.Parameter(parameter.detach()) for parameter in model.parameters()}
    sharded = copy.deepcopy(model, same_storage)
    mesh = init_device_mesh(model.device.type, (ranks.count,))
    for layer in [module for module in sharded.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)  # what is left: embeddings, last norm, head
    for module in sharded.modules():
        if isinstance(module, FSDPModule):  # the sum, not the mean: the loops' losses are divided by the whole batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the division by 1 comes after it: gloo cannot multiply before
    return sharded


def as_forward(sharded: PreTrainedModel, function: Callable) -> Callable:
    """`function`, as a forward pass of `sharded`: what lies outside of the layers is whole inside, and until the backward pass.

    FSDP2 does this for `sharded(...)` by itself; the loops call the body, and multiply by the head themselves.
    """
    sharded.pass_of_its_own = function
    register_fsdp_forward_method(sharded, "pass_of_its_own")
    return sharded.pass_of_its_own


@torch.no_grad()
def spread_(model: PreTrainedModel, sharded: PreTrainedModel, ranks: Ranks) -> None:
    """The pieces of `sharded` become those of `model`, whose whole weights leave the device until `gather_`.

    Rank 0 keeps them in main memory: a run that ends in between saves them without waiting for the others. Nothing to do without
    --shard, where the two are one.
    """
    if sharded is model:
        return
    for parameter, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        shard.copy_(_piece(parameter.detach(), shard))
        parameter.data = parameter.data.cpu() if ranks.first else parameter.data.new_empty(0)


@torch.no_grad()
def gather_(model: PreTrainedModel, sharded: PreTrainedModel) -> None:
    """The weights of `model` become those of `sharded`, whole, on all ranks; collective. Nothing to do without --shard."""
    if sharded is model:
        return
    for parameter, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        parameter.data = whole(shard)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor in pieces, on all ranks, collective; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict:
    """optimizer.state_dict() as it is without --shard: whole tensors, in main memory, of the ranks that `keep` it; collective.

    One tensor after the other, so that no device holds them all.
    """
    saved = optimizer.state_dict()
    state = {i: {} for i in saved["state"]}
    for i, values in saved["state"].items():
        for name, value in values.items():
            value = value.full_tensor().cpu() if isinstance(value, DTensor) else value
            state[i] |= {name: value} if keep else {}
    return saved | {"state": state}


def load_whole_state_(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """optimizer.load_state_dict of what `whole_state` gave, with or without --shard, on all ranks."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {name: _piece(value, parameters[i]) for name, value in values.items()} for i, values in saved["state"].items()}
    optimizer.load_state_dict(saved | {"state": state})


def _piece(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, cut as the parameter `like` is; a number of steps, or without --shard, as it is.

    Every rank has the whole, so that nothing is sent.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def one_size(micro_batch_size: int, gradient_pass: Callable[[int], None]) -> None:
    """common.halving's place: a rank that is out of memory cannot begin anew, since the others wait for it within a layer."""
    try:
        gradient_pass(micro_batch_size)
    except RuntimeError as error:
        smaller = max(1, micro_batch_size // 2)
        require(not is_out_of_memory(error), f"out of memory ({str(error).splitlines()[0]}): --shard cannot go on with fewer rows: "
                f"--resume with --micro-batch-size {smaller}, or try --gradient-checkpointing")  # fmt: skip
        raise
