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
    pairs = torch.triu_indices(len(states), len(states), 1)
    squares, dots = torch.zeros(len(states)).double(), torch.zeros(pairs.shape[1]).double()
    for group in report.values():
        norms = torch.tensor(group["norms"], dtype=torch.float64)
        cosines = torch.tensor([math.cos(math.radians(a or 0)) for a in group["angles"]]).double()
        squares += norms**2
        dots += cosines * norms[pairs[0]] * norms[pairs[1]]  # 0 where a norm, and so no angle, is
    norms = squares.sqrt()
    angles = (dots / norms[pairs[0]] / norms[pairs[1]]).clamp(-1, 1).acos().rad2deg().tolist()
    whole = not any(map(math.isnan, angles))
    total = {
        "threshold": threshold,
        "angle": statistics.fmean(angles) if angles and whole else None,
        "angles": [None if math.isnan(angle) else angle for angle in angles],
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

    def shown(values: Sequence[float | None], form: str) -> str:
        """Values; of many, the range."""
        values = ["none" if value is None else format(value, form) for value in values]
        low, high = min(values, key=len), max(values)
        return ", ".join(values) if len(values) < 6 else f"{low} to {high}"

    total, *groups = report.values()
    angles = [group["angle"] for group in groups if group["angle"] is not None]
    text = "no angles: fewer than two task vectors that are not zero"
    if angles:
        text = (
            f"angle {shown([total['angle']], '.1f')} degrees, of {len(angles)} groups "
            f"{min(angles):.1f} to {max(angles):.1f}, median {statistics.median(angles):.1f}"
        )
    overlap, agreement = ([total[name]] for name in ("overlap", "sign_agreement"))
    return (
        f"moved by more than {total['threshold']:g}: {shown(total['moved'], '.1%')} of the weights,"
        f" overlap {shown(overlap, '.1%')}, of that one sign {shown(agreement, '.1%')}; {text}; "
        f"norms {shown(total['norms'], '.3g')}"
    )
