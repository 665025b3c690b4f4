"""Figures of runs, with matplotlib (optional: pip install matplotlib)."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker

from ..running.errors import require
from .logged import Group, LoggedRun, at_equal_kl, curve, smooth

matplotlib.use("Agg")  # files only: works without a screen

BLUE, ORANGE, GREY = "#1f5fa8", "#d1620c", "#8a8a8a"

# Told apart by most eyes.
COLOURS = "#1f5fa8 #d1620c #2b8a57 #a03a83 #6b5b2e #c9a100 #4aa5c9 #b02a2a".split()

# Line style and marker, another pair for each time through the colours.
LINES = [("-", "o"), ("--", "s"), (":", "^")]

DIRECT_LABELS = 5  # lines; with more, a legend under the figure

SMALL = 8  # points

POLICY_PANELS = [  # metric, what the axis says, whether it is logarithmic
    ("reward", "reward, training batch", False),
    ("eval_reward", "reward, held-out prompts", False),
    ("kl_sft", "KL(policy || start)\n(nats per sequence)", False),
    ("length", "length (tokens)", False),
    ("entropy", "entropy (nats per token)", False),
    ("grad_norm", "gradient norm", True),
]

RM_PANELS = [
    ("eval_loss", "loss, held-out pairs\n(nats per pair)", False),
    ("eval_accuracy", "accuracy, held-out pairs\n(share)", False),
    ("eval_ece", "calibration error (ECE)\nof P(chosen wins)", False),
]

PLANES = [("reward", "reward, held-out prompts"), ("gold", "gold reward (the truth)")]


def plot_front(results: dict, path: Path) -> None:
    """The KL-reward plane of a WARP run: training curves, merges and the front.

    Where gold reward is known, it is drawn beside the reward model's.

    Args:
        results: what front.json holds.
        path: of the figure.
    """
    panels = [("reward", "reward model's score")]
    if "gold" in results["front"][0]:
        panels.append(("gold", "gold reward (the truth)"))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    front = results["front"]
    start = [front[0]] if front[0]["eta"] == 0 else []
    near = {"textcoords": "offset points", "fontsize": 9}
    for axis, (key, label) in zip(axes[0], panels):
        for i, run in enumerate(results["runs"]):
            points = [*(start if run["iteration"] == 1 else []), *run["curve"]]
            name = "policies in training" if i == 0 else None
            axis.plot(*_columns(points, key), color=GREY, lw=1, alpha=0.7, label=name)
        name = "front: start policy to last merge"
        axis.plot(*_columns(front, key), "o-", color=BLUE, ms=4, lw=2, label=name)
        for point in front:
            if point["eta"] not in (0, 0.5, 1):
                continue
            # Above the front, where nothing else is.
            name, place, side = f"$\\eta={point['eta']:g}$", (-5, 6), "right"
            if point["eta"] == 0:
                name, place, side = "start policy", (8, -4), "left"
            where = (point["kl_sft"], point[key])
            axis.annotate(name, where, xytext=place, ha=side, color=BLUE, **near)
        for merge in results["merges"]:
            name = "merge of an iteration" if merge["iteration"] == 1 else None
            where = (merge["kl_sft"], merge[key])
            axis.plot(*where, "D", color=ORANGE, ms=7, zorder=3, label=name)
            axis.annotate(f"{merge['iteration']}", where, xytext=(5, -12), color=ORANGE, **near)
        axis.set_xlabel("KL(policy || start), nats per completion")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _columns(points: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """KLs, and values of `key`, of some points."""
    return [point["kl_sft"] for point in points], [point[key] for point in points]


def plot_groups(groups: Sequence[Group], path: Path) -> None:
    """Every panel for which these runs logged something, into one file.

    First curves against steps, then reward against KL.

    Args:
        groups: one line each.
        path: of the figure.
    Raises:
        UserError: there is nothing to draw.
    """
    panels = []
    for kind, of_kind in (("policy", POLICY_PANELS), ("rm", RM_PANELS)):
        alike = [group for group in groups if group.runs[0].kind == kind]
        for metric, name, logarithmic in of_kind:
            shown = [group for group in alike if curve(group, metric)[0]]
            if shown:
                panels.append((_draw_curves, shown, metric, name, logarithmic))
    for metric, name in PLANES:
        shown = [group for group in groups if all(_points(run, metric) for run in group.runs)]
        if shown:
            panels.append((_draw_plane, shown, metric, name, False))
    names = ", ".join(run.path for group in groups for run in group.runs)
    require(
        bool(panels),
        f"{names}: nothing to draw yet: no evaluation is logged at a step that all of a line's "
        "runs have",
    )
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.5 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    style = {}
    for i, group in enumerate(groups):
        line, marker = LINES[i // len(COLOURS) % len(LINES)]
        colour = COLOURS[i % len(COLOURS)]
        style[group.label] = {"color": colour, "ls": line, "marker": marker, "lw": 1.5, "ms": 3}
    for axis, (draw, shown, metric, name, logarithmic) in zip(axes.flat, panels):
        ends = draw(axis, shown, metric, style)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.set_ylabel(name, fontsize=SMALL + 1)
        axis.tick_params(which="both", labelsize=SMALL)
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(axis="x", nbins=4, integer=draw is _draw_curves)
        if len(groups) <= DIRECT_LABELS:
            _label_ends(axis, ends)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if len(groups) > DIRECT_LABELS:
        lines = [plt.Line2D([], [], label=label, **look) for label, look in style.items()]
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles=lines, **place, frameon=False, fontsize=SMALL)
    if any(len(group.runs) > 1 for group in groups):
        note = "n seeds: their mean, in a band from the lowest to the highest"
        figure.supxlabel(note, x=0.99, ha="right", fontsize=SMALL, color=GREY)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _draw_curves(
    axis: plt.Axes, groups: Sequence[Group], metric: str, style: dict
) -> list[tuple[float, str, str]]:
    """A metric against steps.

    Returns:
        (last value, label, colour) of each line, and of a reference line.
    """
    ends = []
    held_out = metric.startswith("eval_")
    for group in groups:
        look = style[group.label]
        steps, values = curve(group, metric)
        window = 1 if held_out else 2 * (len(steps) // 40) + 1
        smoothed = [smooth(one, window) for one in values]
        if len(values) == 1 and window > 1:
            axis.plot(steps, values[0], color=look["color"], lw=0.5, alpha=0.3)
        mean = [sum(at_step) / len(at_step) for at_step in zip(*smoothed)]
        _band(axis, steps, smoothed, look["color"])
        axis.plot(steps, mean, **look | ({} if held_out else {"marker": None}))
        ends.append((mean[-1], group.label, look["color"]))
    reference = {"eval_loss": "constant model", "eval_accuracy": "chance"}.get(metric)
    if reference:
        floors = {0.5}
        if metric == "eval_loss":
            floors = {round(curve(group, "eval_floor")[1][0][-1], 4) for group in groups}
        for floor in sorted(floors):
            axis.axhline(floor, color=GREY, lw=1, ls="--")
            ends.append((floor, reference, GREY))
    if metric == "eval_ece":
        axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("optimizer steps", fontsize=SMALL + 1)
    return ends


def _draw_plane(
    axis: plt.Axes, groups: Sequence[Group], metric: str, style: dict
) -> list[tuple[float, str, str]]:
    """Held-out reward against KL.

    Of one run its points, in order. Of several seeds all points, and mean and band at equal KL.

    Returns:
        (last value, label, colour) of each line.
    """
    ends = []
    for group in groups:
        look = style[group.label]
        curves = [_points(run, metric) for run in group.runs]
        if len(curves) == 1:
            axis.plot(*zip(*curves[0]), **look)
            ends.append((curves[0][-1][1], group.label, look["color"]))
            continue
        for points in curves:
            axis.plot(*zip(*points), **look | {"ls": "", "ms": 2, "mew": 0, "alpha": 0.5})
        kls, values = at_equal_kl(curves)
        mean = [sum(at_kl) / len(at_kl) for at_kl in zip(*values)]
        _band(axis, kls, values, look["color"])
        axis.plot(kls, mean, **look | {"marker": None})
        ends.append((mean[-1] if mean else curves[0][-1][1], group.label, look["color"]))
    axis.set_xlabel("KL(policy || start)\n(nats per sequence)", fontsize=SMALL + 1)
    return ends


def _band(
    axis: plt.Axes, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str
) -> None:
    """Fill what lies between the lowest and the highest of several curves."""
    if len(curves) > 1:
        low, high = ([of(values) for values in zip(*curves)] for of in (min, max))
        axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _points(run: LoggedRun, metric: str) -> list[tuple[float, float]]:
    """(KL, value) of each of a run's held-out points that has both."""
    points = [(point.get("kl_sft"), point.get(metric)) for point in run.points]
    return [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(x + y)]


def _label_ends(axis: plt.Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the axes, at the heights where their lines end.

    They are moved apart, so that none covers another.
    """
    axis.set_ylim(axis.get_ylim())  # labels do not move the limits
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = [
        (to_axes.transform((1, value))[1], text, colour)
        for value, text, colour in ends
        if math.isfinite(value)
    ]
    # A line of text, as a share of the 1.7 inches of a panel's axes.
    gap = 1.25 * SMALL / 72 / 1.7
    taken = []
    heights.sort()
    for height, _, _ in heights:  # from the bottom up, each at least a line above the one before
        taken.append(max(height, taken[-1] + gap if taken else 0.0))
    for i in reversed(range(len(taken))):  # and down again from the top
        taken[i] = min(taken[i], taken[i + 1] - gap if i + 1 < len(taken) else 1.0)
    look = {"xycoords": "axes fraction", "fontsize": SMALL, "va": "center"}
    for height, (_, text, colour) in zip(taken, heights):
        axis.annotate(text, (1.02, height), color=colour, **look)
