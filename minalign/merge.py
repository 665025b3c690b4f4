"""Weights in motion: the exponential moving average that anchors a policy."""

import torch


@torch.no_grad()
def ema_update_(ema_parameters: list[torch.Tensor], parameters: list[torch.Tensor], mu: float) -> None:
    """Move the averaged weights a step towards the policy's, in place.

        ema <- (1 - mu) ema + mu theta        (WARP, arXiv 2406.16768, Algorithm 1; after the policy's own update)

    Args:
        ema_parameters: float32 tensors, changed in place. In bfloat16 a step of mu = .01 mostly rounds to nothing.
        parameters: the policy's tensors in the same order, any floating dtype; not changed.
        mu: in (0, 1].
    Raises:
        ValueError: mu outside (0, 1], different counts or shapes, an average that is not float32, or one that shares
            its storage with the policy (then there is no average).

    A tensor that is listed twice (tied embeddings) moves once; integer tensors are left alone.

    >>> ema, theta = torch.zeros(2), torch.ones(2)
    >>> ema_update_([ema], [theta], mu=0.25)
    >>> ema
    tensor([0.2500, 0.2500])
    """
    if not 0 < mu <= 1:
        raise ValueError(f"got mu={mu}, expected a rate in (0, 1]")
    ema_parameters, parameters = list(ema_parameters), list(parameters)
    if len(ema_parameters) != len(parameters):
        raise ValueError(f"got {len(ema_parameters)} averaged tensors and {len(parameters)}, expected the same model twice")
    moved = set()
    for i, (ema, parameter) in enumerate(zip(ema_parameters, parameters)):
        if not ema.is_floating_point() or ema.data_ptr() in moved:
            continue
        if ema.shape != parameter.shape:
            raise ValueError(f"got shapes {tuple(ema.shape)} and {tuple(parameter.shape)} at tensor {i}, expected one")
        if ema.dtype != torch.float32:
            raise ValueError(f"got an average in {ema.dtype} at tensor {i}, expected float32: call .float() on its model")
        if ema.numel() and ema.data_ptr() == parameter.data_ptr():
            raise ValueError(f"got one storage for average and policy at tensor {i}, expected a copy: use deepcopy")
        ema.lerp_(parameter.to(ema), mu)
        moved.add(ema.data_ptr())
