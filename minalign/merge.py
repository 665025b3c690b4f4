"""Weights in motion: EMA, task vectors, SLERP, LERP and LITI (WARP, arXiv 2406.16768).

Everything is taken from task vectors delta = theta - theta_init: full weights are nearly collinear, so that SLERP of
them is just LERP. Functions need nothing but `import torch` and `import math` to be pasted elsewhere. Here are those of
tensors; those of state dicts (task_vector, merge_policies, liti) lie in merge_states.py and are imported from here, too.

    python -m minalign.merge --init A --models B C [D ...] --out E      merges saved models, tensor by tensor
"""

import math

import torch

from .merge_states import liti, merge_policies, task_vector  # noqa: F401  (one place to import all of merging from)


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


def lerp(delta_a: torch.Tensor, delta_b: torch.Tensor, lam: float) -> torch.Tensor:
    """Linear interpolation: weight averaging.

        (1 - lam) a + lam b        (WARP, arXiv 2406.16768: LERP)

    Args:
        delta_a, delta_b: task vectors (or weights) of one shape.
        lam: 0 gives a, 1 gives b, exactly.
    Returns:
        float32, the same shape. Unlike slerp it shortens: the norm falls to cos(angle / 2) at lam = .5.
    Raises:
        ValueError: the shapes differ.

    >>> lerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.5000, 0.5000])
    """
    if delta_a.shape != delta_b.shape:
        raise ValueError(f"got shapes {tuple(delta_a.shape)} and {tuple(delta_b.shape)}, expected one")
    return ((1 - lam) * delta_a.detach().double() + lam * delta_b.detach().double()).float()


def slerp(delta_a: torch.Tensor, delta_b: torch.Tensor, lam: float) -> torch.Tensor:
    """Spherical interpolation of two task vectors: turns without shortening.

        sin((1 - lam) W) / sin W a + sin(lam W) / sin W b,  cos W = a.b / (|a| |b|)        (WARP, arXiv 2406.16768: SLERP)

    One angle W over all elements. The coefficients multiply the raw vectors, so the norm is kept only where |a| = |b|.
    Where the angle does not exist or leads nowhere (a zero vector; vectors opposite to within 1e-6 rad, whose arc has
    no direction) it falls back on LERP, which parallel vectors reach by themselves.

    Args:
        delta_a, delta_b: task vectors of one shape, any shape; never whole weights.
        lam: 0 gives a, 1 gives b, exactly.
    Returns:
        float32, the same shape; computed in float64, finite for any finite input.
    Raises:
        ValueError: the shapes differ.

    >>> slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([1.4142, 1.4142])
    """
    if delta_a.shape != delta_b.shape:
        raise ValueError(f"got shapes {tuple(delta_a.shape)} and {tuple(delta_b.shape)}, expected one")
    a, b = delta_a.detach().double(), delta_b.detach().double()
    norms = a.norm().item() * b.norm().item()
    cosine = (a * b).sum().item() / norms if norms else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))  # rounding takes the cosine of parallel vectors above 1
    if math.sin(angle) < 1e-6:
        weight_a, weight_b = 1 - lam, lam
    else:
        weight_a, weight_b = math.sin((1 - lam) * angle) / math.sin(angle), math.sin(lam * angle) / math.sin(angle)
    return (weight_a * a + weight_b * b).float()


def slerp_many(deltas: list[torch.Tensor]) -> torch.Tensor:
    """SLERP of M task vectors by the paper's recursion: the m-th joins the merge of the earlier ones with lam = 1/m.

        slerp_M = slerp(slerp_{M-1}, delta_M, lam = 1/M)        (WARP, arXiv 2406.16768, eq. 26)

    The order matters: of orthonormal vectors, the first two get weight .612 and the third .5. Singular angles are
    treated as in `slerp`, at every step.

    Args:
        deltas: M >= 1 task vectors of one shape.
    Returns:
        float32, the same shape.
    Raises:
        ValueError: no vector, or shapes that differ.

    >>> slerp_many([torch.eye(3)[0], torch.eye(3)[1], torch.eye(3)[2]])
    tensor([0.6124, 0.6124, 0.5000])
    """
    if not deltas or any(delta.shape != deltas[0].shape for delta in deltas):
        raise ValueError(f"got shapes {[tuple(delta.shape) for delta in deltas]}, expected one or more, all alike")
    merged = deltas[0].detach().double()
    for m, delta in enumerate(deltas[1:], 2):
        lam, b = 1 / m, delta.detach().double()
        norms = merged.norm().item() * b.norm().item()
        cosine = (merged * b).sum().item() / norms if norms else 1.0
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-6:
            merged = (1 - lam) * merged + lam * b
        else:
            merged = (math.sin((1 - lam) * angle) * merged + math.sin(lam * angle) * b) / math.sin(angle)
    return merged.float()


if __name__ == "__main__":
    from minalign.common import one_line_errors
    from minalign.merge_folders import main

    with one_line_errors():
        main()
