"""What runs have logged, put into lines of a figure: steps, values, seeds that belong together."""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..running.errors import UserError, require
from ..running.run_folder import FREE_TO_CHANGE

# Entries of config.json. Runs that differ in nothing else are one group.
NOT_A_SETTING = {*FREE_TO_CHANGE, "seed", "argv", "versions", "fingerprints"}


class LoggedRun(NamedTuple):
    """What a run logged.

    A point has held-out means: kl_sft (nats per completion), reward and, in the toy world, gold. A
    policy has them from the start on. Of WARP they are the points of its front.
    """

    path: str
    kind: str  # policy, rm or warp
    config: dict  # config.json, or {}
    rows: list[dict]  # one per step
    points: list[dict]  # in the KL-reward plane, in order
    results: dict  # front.json of WARP, or {}


def read_run(path: str) -> LoggedRun:
    """Read a run's folder.

    Raises:
        UserError: what a figure needs is not there. The folder is named.
    """
    folder = Path(path)
    require(folder.is_dir(), f"{path}: no such folder: give the folder of a run")
    config = _read(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / "front.json").is_file():
        front = _read(folder / "front.json")
        whole = "front" in front and "runs" in front
        require(whole, f"{path}/front.json: no front in it: not written by warp.py")
        return LoggedRun(path, "warp", config, [], front["front"], front)
    require(
        not any(folder.glob("iteration-*")),
        f"{path}: no front.json: warp.py has not come to its end: resume it with --resume",
    )
    log = folder / "metrics.jsonl"
    require(log.is_file(), f"{path}: no metrics.jsonl and no front.json: not the folder of a run")
    rows = read_log(log)
    require(
        bool(rows),
        f"{path}: metrics.jsonl has no whole line: the run has not come to its first step",
    )
    if "kl_sft" not in rows[0]:
        require(
            "loss" in rows[0],
            f"{path}: metrics.jsonl has neither kl_sft nor loss: not written by a script of "
            "minalign",
        )
        return LoggedRun(path, "rm", config, rows, [], {})
    results = folder / "results.json"
    start = _read(results).get("before") if results.is_file() else None
    held_out = [
        {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
        for row in rows
    ]
    points = [point for point in [start, *held_out] if point]
    return LoggedRun(path, "policy", config, rows, points, {})


def read_log(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, with nan for null.

    A torn last line is ignored: the run has not ended, or was killed.

    Raises:
        UserError: another line is broken.
    """
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
        else:
            require(
                number == len(lines),
                f"{path}: line {number}: no JSON object with a step: fix or remove it",
            )
    return rows


def _read(path: Path) -> dict:
    """The content of a JSON file; UserError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


class Group(NamedTuple):
    """Runs of one kind that differ in their seed alone, and the label of their line."""

    label: str
    runs: list[LoggedRun]


def group_runs(runs: Sequence[LoggedRun]) -> list[Group]:
    """Put runs of one kind with the same settings together, in the order given.

    A run without config.json stays alone.

    Raises:
        UserError: two runs of a group have the same seed.
    """
    groups: dict[object, list[LoggedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in NOT_A_SETTING}
        same = (run.kind, json.dumps(settings, sort_keys=True)) if run.config else run.path
        groups.setdefault(same, []).append(run)
    for members in groups.values():
        seeds = {}
        for run in members:
            seed = run.config.get("seed")
            require(
                seed not in seeds,
                f"{run.path} and {seeds.get(seed)}: the same flags and the same seed: give one of "
                "them",
            )
            seeds[seed] = run.path
    # As many last parts of the paths as it takes to tell the groups apart.
    for depth in range(1, 20):
        labels = [label(members, depth) for members in groups.values()]
        if len(set(labels)) == len(labels):
            break
    return [Group(text, members) for text, members in zip(labels, groups.values())]


def label(runs: Sequence[LoggedRun], depth: int = 1) -> str:
    """The last `depth` parts of a run's path; of several, what they begin with, and how many."""
    names = ["/".join(Path(run.path).resolve().parts[-depth:]) for run in runs]
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(names).rstrip(" -_.").removesuffix("seed").rstrip(" -_.")
    return f"{common or names[0]} (n={len(names)})"


def curve(group: Group, metric: str) -> tuple[list[int], list[list[float]]]:
    """Steps at which every run of a group logged `metric`, and each run's values there."""
    logged = [{row["step"]: row[metric] for row in run.rows if metric in row} for run in group.runs]
    steps = sorted(set.intersection(*map(set, logged)))
    return steps, [[values[step] for step in steps] for values in logged]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each value.

    At both ends, the mean is over those that are there.

    Args:
        window: an odd number.

    >>> smooth([0.0, 3.0, 0.0, 3.0, 6.0], 3)
    [1.5, 1.0, 2.0, 3.0, 4.5]
    """
    parts = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def at_equal_kl(
    curves: Sequence[Sequence[tuple[float, float]]], count: int = 50
) -> tuple[list[float], list[list[float]]]:
    """Curves of (KL, reward), interpolated linearly on one grid of KLs.

    The grid goes from the largest first KL to the smallest last KL. Points are sorted by rising KL,
    whatever order they were measured in.

    Args:
        count: points of the grid.
    Returns:
        The grid, and each curve's rewards on it. Empty where the curves have no KL in common.

    >>> at_equal_kl([[(0, 0), (2, 4)], [(0, 1), (1, 2)]], count=3)
    ([0.0, 0.5, 1.0], [[0.0, 1.0, 2.0], [1.0, 1.5, 2.0]])
    """
    import numpy

    curves = [sorted(points) for points in curves]
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    grid = numpy.linspace(low, high, count) if low < high else numpy.empty(0)
    return grid.tolist(), [numpy.interp(grid, *zip(*points)).tolist() for points in curves]
