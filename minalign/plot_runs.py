"""Figures of runs, from the command line (with matplotlib: pip install matplotlib).

    python -m minalign.plot runs/policy-1 runs/policy-2 --out fig.png      training curves, and reward against KL
    python -m minalign.plot runs/rm-1 runs/rm-2 --out rm.pdf               loss, accuracy and calibration
    python -m minalign.plot runs/warp-1 --out front.png                    the KL-reward plane of one WARP run
    python -m minalign.plot runs/warp-1 runs/warp-2 runs/policy-1 --out fronts.png

Runs that share all flags but the seed become one line, their mean, in a band from the lowest to the highest of them. In the
KL-reward plane both are taken at equal KL, over the KLs that all of them reach.
"""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .common import UserError, require
from .flags import flag, parse_flags
from .runs import FREE_TO_CHANGE

NOT_A_SETTING = {*FREE_TO_CHANGE, "seed", "argv", "versions"}  # in config.json; runs that differ in nothing else are one group


@dataclass
class Config:
    """Which runs, and where to."""

    runs: list[str] | None = flag(None, "folders of train_policy.py, train_rm.py or warp.py", positional=True)
    out: str = flag("figure.png", "file for the figure, .png, .pdf or .svg; an older one is overwritten")


class Run(NamedTuple):
    """What a run logged: kind (policy, rm or warp), its config.json (or {}), a row a step, and KL-reward points in order.

    A point has kl_sft (nats a completion), reward and, in the toy world, gold: held-out means. Of a policy, from the start on;
    of WARP, the points of its front.
    """

    path: str
    kind: str
    config: dict
    rows: list[dict]
    points: list[dict]
    results: dict


def read_run(path: str) -> Run:
    """Read a run's folder; UserError, naming it, where what a figure needs is not there."""
    folder = Path(path)
    require(folder.is_dir(), f"{path}: no such folder: give the folder of a run")
    config = _read(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / "front.json").is_file():
        front = _read(folder / "front.json")
        require("front" in front and "runs" in front, f"{path}/front.json: no front in it: not written by warp.py")
        return Run(path, "warp", config, [], front["front"], front)
    require(not any(folder.glob("iteration-*")), f"{path}: no front.json: warp.py has not come to its end: go on with --resume")
    log = folder / "metrics.jsonl"
    require(log.is_file(), f"{path}: no metrics.jsonl and no front.json: not the folder of a run")
    rows = read_log(log)
    require(bool(rows), f"{path}: metrics.jsonl has no whole line: the run has not come to its first step")
    if "kl_sft" not in rows[0]:
        require("loss" in rows[0], f"{path}: metrics.jsonl has neither kl_sft nor loss: not written by a script of minalign")
        return Run(path, "rm", config, rows, [], {})
    start = _read(folder / "results.json").get("before") if (folder / "results.json").is_file() else None
    held_out = [{k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")} for row in rows]
    points = [point for point in [start, *held_out] if point]
    return Run(path, "policy", config, rows, points, {})


def read_log(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a torn last line (the run is going on, or was killed) is ignored, null becomes nan."""
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
        else:
            require(number == len(lines), f"{path}: line {number}: no JSON object with a step: mend or remove it")
    return rows


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


class Group(NamedTuple):
    """Runs of one kind that differ in their seed alone, and the label of their line."""

    label: str
    runs: list[Run]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs of one kind with the same settings together, in the order given; a run without config.json stays alone."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in NOT_A_SETTING}
        groups.setdefault((run.kind, json.dumps(settings, sort_keys=True)) if run.config else run.path, []).append(run)
    for members in groups.values():
        seeds = {}
        for run in members:
            seed = run.config.get("seed")
            require(seed not in seeds, f"{run.path} and {seeds.get(seed)}: the same flags and the same seed: give one of them")
            seeds[seed] = run.path
    for depth in range(1, 20):  # as many last parts of the paths as it takes to tell the groups apart
        labels = [label(members, depth) for members in groups.values()]
        if len(set(labels)) == len(labels):
            break
    return [Group(text, members) for text, members in zip(labels, groups.values())]


def label(runs: Sequence[Run], depth: int = 1) -> str:
    """The last `depth` parts of a run's path; of several, what theirs begin with, and how many there are."""
    names = ["/".join(Path(run.path).resolve().parts[-depth:]) for run in runs]
    if len(names) == 1:
        return names[0]
    return f"{os.path.commonprefix(names).rstrip(' -_.').removesuffix('seed').rstrip(' -_.') or names[0]} (n={len(names)})"


def curve(group: Group, metric: str) -> tuple[list[int], list[list[float]]]:
    """Steps at which every run of a group logged `metric`, and each run's values there."""
    logged = [{row["step"]: row[metric] for row in run.rows if metric in row} for run in group.runs]
    steps = sorted(set.intersection(*map(set, logged)))
    return steps, [[values[step] for step in steps] for values in logged]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each (an odd number); at both ends, over those that are there.

    >>> smooth([0.0, 3.0, 0.0, 3.0, 6.0], 3)
    [1.5, 1.0, 2.0, 3.0, 4.5]
    """
    parts = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def at_equal_kl(curves: Sequence[Sequence[tuple[float, float]]], count: int = 50) -> tuple[list[float], list[list[float]]]:
    """Curves of (KL, reward) on one grid of KLs, from the largest first to the smallest last KL; between points, linearly.

    Points go by rising KL, whatever order they were measured in. Empty where the curves have no KL in common.

    >>> at_equal_kl([[(0, 0), (2, 4)], [(0, 1), (1, 2)]], count=3)
    ([0.0, 0.5, 1.0], [[0.0, 1.0, 2.0], [1.0, 1.5, 2.0]])
    """
    import numpy

    curves = [sorted(points) for points in curves]
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    grid = numpy.linspace(low, high, count) if low < high else numpy.empty(0)
    return grid.tolist(), [numpy.interp(grid, *zip(*points)).tolist() for points in curves]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, read the runs, draw."""
    config = parse_flags(Config, __doc__, argv)
    out = Path(config.out)
    require(out.suffix in (".png", ".pdf", ".svg"), f"--out {out}: expected a name that ends in .png, .pdf or .svg")
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}: make it first")
    runs = [read_run(path) for path in config.runs]
    groups = group_runs(runs)
    try:
        from .plot import plot_front, plot_groups
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error}): pip install matplotlib") from error
    if len(runs) == 1 and runs[0].kind == "warp":
        plot_front(runs[0].results, out)
    else:
        plot_groups(groups, out)
    print(f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(groups)} line{'s' * (len(groups) > 1)}: {out}")
