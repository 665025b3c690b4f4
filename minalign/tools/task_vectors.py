"""What the runs of a merge did to the weights: shares moved, overlap, signs, angles, norms."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from ..merge import group_of

BLOCK = 2**17  # weights, few enough to stay in the processor's cache
ROW = 2**14  # weights, of which a part is looked at


def move_counts(deltas: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many weights each run moved, any moved, several moved, and these all in one direction.

    A run has moved a weight where |d| > threshold.

    Args:
        deltas: task vectors (M, n).
    Returns:
        (M + 3,) int64.

    >>> move_counts(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 2.0, -2.0, 0.0]]), 1e-5).tolist()
    [3, 2, 3, 2, 1]
    """
    signs = torch.nn.functional.hardshrink(deltas, threshold).sign()  # 0 where |d| <= threshold
    moved = signs.abs()
    movers = moved.sum(0)  # (n,)
    several = movers > 1
    agreed = several & (signs.sum(0).abs() == movers)
    return torch.stack([*moved.sum(1), (movers > 0).sum(), several.sum(), agreed.sum()]).long()


@torch.no_grad()
def with_moves(
    report: dict[str, dict],
    init: Mapping[str, torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
    scope: str,
    threshold: float,
    part: int = 1,
) -> dict[str, dict]:
    """The report of `merge_policies` with what each run moved, and with the total of its groups.

    Each group, and first of all "total", also has
    - weights: how many they are;
    - moved: the share that each run moved by more than the threshold;
    - overlap: the share that several runs moved, of what any moved;
    - sign_agreement: the share that all moved in one direction, of what several moved.
    A share of nothing is None.

    Args:
        init, states, scope: what was merged, tied tensors once.
        part: of each 2^14 weights of a larger tensor, one `part`-th is looked at.
    """
    counts = {group: torch.zeros(len(states) + 4, dtype=torch.float64) for group in report}
    for name in (name for name in init if init[name].is_floating_point()):
        size, found, seen = init[name].numel(), 0, 0
        flat = [state[name].reshape(-1) for state in (init, *states)]
        if part > 1 and size > ROW:
            rows = size // ROW
            flat = [one[: rows * ROW].view(rows, ROW)[:, : ROW // part] for one in flat]
        step = BLOCK if flat[0].ndim == 1 else BLOCK // (ROW // part)
        for blocks in zip(*(one.split(step) for one in flat)):
            some = torch.stack([block.flatten().float() for block in blocks])
            found, seen = found + move_counts(some[1:] - some[0], threshold), seen + some.shape[1]
        if seen:
            here = counts[group_of(name, scope)]
            here += torch.cat([found.double().cpu() * size / seen, here.new_tensor([size])])
    norms = torch.tensor([group["norms"] for group in report.values()]).double()  # (groups, M)
    pairs = torch.triu_indices(len(states), len(states), 1)
    angles = [[angle or 0.0 for angle in group["angles"]] for group in report.values()]
    cosines = torch.tensor(angles).double().deg2rad().cos()  # where there is none, a norm is 0
    dots = (cosines * norms[:, pairs[0]] * norms[:, pairs[1]]).sum(0)
    norms = norms.square().sum(0).sqrt()
    angles = (dots / norms[pairs[0]] / norms[pairs[1]]).clamp(-1, 1).acos().rad2deg().tolist()
    found = bool(angles) and all(angle == angle for angle in angles)
    total = {
        "threshold": threshold,
        "angle": statistics.fmean(angles) if found else None,
        "angles": [angle if angle == angle else None for angle in angles],
        "norms": norms.tolist(),
        "norm": math.hypot(*(group["norm"] for group in report.values())),
    }
    report = {"total": total} | report
    counts = {"total": sum(counts.values())} | counts
    return {name: group | _shares(*counts[name].tolist()) for name, group in report.items()}


def _shares(*counts: float) -> dict[str, float | list[float] | None]:
    """From the counts of `move_counts` and the number of weights."""
    *moved, moved_by_any, several, agreed, weights = counts
    return {
        "weights": round(weights),
        "moved": [count / weights if weights else None for count in moved],
        "overlap": several / moved_by_any if moved_by_any else None,
        "sign_agreement": agreed / several if several else None,
    }


def angle_summary(report: dict[str, dict]) -> str:
    """One line on what was merged, from the report of `with_moves`."""
    total, *groups = report.values()
    moved, norms = total["moved"], total["norms"]
    angles = [group["angle"] for group in groups if group["angle"] is not None]
    text = "no angles: fewer than two task vectors that are not zero"
    if angles and total["angle"] is not None:
        text = (
            f"angle {total['angle']:.1f} degrees, of {len(angles)} groups {min(angles):.1f} to "
            f"{max(angles):.1f}, median {statistics.median(angles):.1f}"
        )
    shares = (total["overlap"], total["sign_agreement"])
    overlap, agreement = ("none" if one is None else f"{one:.1%}" for one in shares)
    return (
        f"moved by more than {total['threshold']:g}: {min(moved):.1%} to {max(moved):.1%} of the "
        f"weights, overlap {overlap}, of that one sign {agreement}; {text}; "
        f"norms {min(norms):.3g} to {max(norms):.3g}"
    )
