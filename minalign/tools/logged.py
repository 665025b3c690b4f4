"""What runs have logged, put into lines of a figure: steps, values, seeds that belong together."""

from __future__ import annotations

import collections
import functools
import json
import math
import os.path
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from ..running.errors import UserError, require
from ..running.files import read_json
from ..running.run_folder import FREE_TO_CHANGE

# Entries of config.json. Runs that differ in nothing else are one group.
NOT_A_SETTING = {*FREE_TO_CHANGE, "seed", "git", "machine", "versions"}
NOT_A_SETTING |= {"argv", "given", "script", "fingerprints"}

MOST_POINTS = 2000  # of a curve: more than a figure's pixels show nothing more


class LoggedRun(NamedTuple):
    """What a run logged.

    A point has held-out means: kl_sft (nats per completion), reward and, in the toy world, gold. A
    policy has them from the start on. Of WARP they are the points of its front, of best of n one
    for each n, with the bound of its KL.
    """

    path: str
    kind: str  # policy, rm, warp or best_of
    config: dict  # config.json, or {}
    columns: dict[str, tuple[array, array]]  # metric -> steps and values, nan for null
    points: list[dict]  # in the KL-reward plane, in order
    results: dict  # front.json of WARP, or {}


def read_run(path: str) -> LoggedRun:
    """Read a run's folder.

    Raises:
        UserError: what a figure needs is not there. The folder is named.
    """
    folder = Path(path)
    require(folder.is_dir(), f"{path}: no such folder: give the folder of a run")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / "front.json").is_file():
        front = read_json(folder / "front.json")
        try:
            for run in front["runs"]:
                run |= {"iteration": int(run["iteration"]), "curve": _points(run["curve"])}
            front |= {name: _points(front[name]) for name in ("merges", "front")}
            whole = all({"eta", "kl_sft", "reward"} <= set(point) for point in front["front"])
            whole &= all("iteration" in merge for merge in front["merges"])
            whole &= any(math.isfinite(p["kl_sft"] + p["reward"]) for p in front["front"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            whole = False
        require(whole, f"{path}/front.json: no front in it: not written by warp.py, or all null")
        return LoggedRun(path, "warp", config, {}, front["front"], front)
    require(
        not any(folder.glob("iteration-*")),
        f"{path}: no front.json: warp.py has not come to its end: resume it with --resume",
    )
    log, results = folder / "metrics.jsonl", folder / "results.json"
    if results.is_file() and not log.is_file():
        best = read_json(results).get("best_of")
        require(bool(best), f"{results}: no best_of in it: evaluate draws with --best-of alone")
        points = _points([{"kl_sft": one["kl_bound"]} | one for one in best])
        return LoggedRun(path, "best_of", config, {}, points, {})
    require(log.is_file(), f"{path}: no metrics.jsonl and no front.json: not the folder of a run")
    columns = read_log(log)
    require(
        bool(columns),
        f"{path}: metrics.jsonl has no whole line: the run has not come to its first step",
    )
    if "kl_sft" not in columns:
        require(
            "loss" in columns,
            f"{path}: metrics.jsonl has neither kl_sft nor loss: not written by a script of "
            "minalign",
        )
        return LoggedRun(path, "rm", config, columns, [], {})
    start = read_json(results).get("before") if results.is_file() else None
    try:
        points = _points([start] if start else []) + _held_out(columns)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{results}: 'before' holds no numbers: fix or remove the file") from error
    return LoggedRun(path, "policy", config, columns, points, {})


def read_log(path: Path) -> dict[str, tuple[array, array]]:
    """What a metrics.jsonl logged: metric -> steps and values, with nan for null.

    A torn last line is ignored: the run has not ended, or was killed. A column of texts alone is
    ignored, too.

    Raises:
        UserError: another line is broken.
    """
    columns = collections.defaultdict(lambda: (array("d"), array("d")))
    broken, odd = 0, {}  # last line, if broken; name -> first line where it is no number
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            fix = "no JSON object with a step: fix or remove it"
            require(not broken, f"{path}: line {broken}: {fix}")
            try:
                row = json.loads(line)
                step = float(row["step"])
                broken = 0 if math.isfinite(step) else number
            except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
                broken = number
            for name, value in () if broken else row.items():
                steps, values = columns[name]
                try:
                    values.append(math.nan if value is None else value)
                    steps.append(step)
                except (TypeError, OverflowError):
                    odd.setdefault(name, number)
    columns = {name: column for name, column in columns.items() if column[0]}
    for name in odd.keys() & columns.keys():
        raise UserError(f"{path}: line {odd[name]}: {name!r:.40} is no number: fix or remove it")
    return columns


def _points(rows: Sequence[dict]) -> list[dict[str, float]]:
    """Points of numbers, with nan for null."""
    return [{k: math.nan if v is None else float(v) for k, v in row.items()} for row in rows]


def _held_out(columns: dict[str, tuple[array, array]]) -> list[dict[str, float]]:
    """The means on held-out prompts, by step; of very many, points spread evenly over the run."""
    steps = sorted(
        {step for name in columns if name.startswith("eval_") for step in columns[name][0]}
    )
    kept = numpy.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int)
    points = {steps[i]: {} for i in kept}
    for name, column in columns.items():
        if name.startswith("eval_"):
            for step, value in zip(*column):
                if step in points:
                    points[step][name.removeprefix("eval_")] = value
    return list(points.values())


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
            seed = str(run.config.get("seed"))
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
    what = "best of n: " * (runs[0].kind == "best_of")
    names = ["/".join(Path(run.path).resolve().parts[-depth:]) for run in runs]
    if len(names) == 1:
        return what + names[0]
    common = os.path.commonprefix(names).rstrip(" -_.").removesuffix("seed").rstrip(" -_.")
    return f"{what}{common or names[0]} (n={len(names)})"


def curve(group: Group, metric: str) -> tuple[numpy.ndarray, list[numpy.ndarray]]:
    """Steps at which every run of a group logged `metric`, and each run's values there."""
    logged = []
    for run in group.runs:
        steps, values = map(numpy.asarray, run.columns.get(metric, ((), ())))
        # Of a step that was logged twice, the last.
        steps, last = numpy.unique(steps[::-1], return_index=True)
        logged.append((steps, values[::-1][last]))
    shared = functools.reduce(numpy.intersect1d, [steps for steps, _ in logged])
    return shared, [values[numpy.isin(steps, shared)] for steps, values in logged]


def smooth(values: Sequence[float], window: int, most: int = MOST_POINTS) -> list[float]:
    """Mean of the finite ones of the `window` values around each value.

    At both ends, the mean is over those that are there. Where none is finite it is nan. Of more
    than `most` values, as many at a time become one that there are not more, see `thin`.

    Args:
        window: an odd number.

    >>> smooth([0.0, 3.0, 0.0, 3.0, 6.0], 3), smooth([1.0, math.nan, 2.0], 3)
    ([1.5, 1.0, 2.0, 3.0, 4.5], [1.0, 1.5, 2.0])
    """
    values = numpy.asarray(values, dtype=float)
    starts, size = thin(len(values), most)
    finite = numpy.isfinite(values)
    # Sums of short pieces, not differences of running sums: one value of 1e30 would stay in those.
    sums = numpy.add.reduceat(numpy.where(finite, values, 0.0), starts)
    counts = numpy.add.reduceat(finite.astype(float), starts)
    half = window // 2 // size
    parts = [slice(max(0, i - half), i + half + 1) for i in range(len(starts))]
    weights = [counts[part].sum() for part in parts]
    return [float(sums[p].sum() / n) if n else math.nan for p, n in zip(parts, weights)]


def thin(count: int, most: int = MOST_POINTS) -> tuple[numpy.ndarray, int]:
    """Where pieces of equal size begin, at most `most` of them, and their size.

    >>> thin(5, most=3)[0].tolist()
    [0, 2, 4]
    """
    size = max(1, math.ceil(count / most))
    return numpy.arange(0, count, size), size


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
    curves = [sorted(points) for points in curves]
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    grid = numpy.linspace(low, high, count) if low < high else numpy.empty(0)
    return grid.tolist(), [numpy.interp(grid, *zip(*points)).tolist() for points in curves]
