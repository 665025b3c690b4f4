"""Figures of runs, with matplotlib (optional: pip install matplotlib)."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy

from ..running.errors import require
from ..running.files import whole_file
from .logged import Group, LoggedRun, at_equal_kl, curve, smooth, thin

matplotlib.use("Agg")  # files only: works without a screen

# Of every figure: sizes in points, as a page prints it, 7 inches wide.
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}

BLUE, ORANGE, GREY = "#1f5fa8", "#d1620c", "#8a8a8a"

# Told apart by most eyes.
COLOURS = "#1f5fa8 #d1620c #2b8a57 #a03a83 #6b5b2e #c9a100 #4aa5c9 #b02a2a".split()

# Line style and marker, another pair for each time through the colours.
LINES = [("-", "o"), ("--", "s"), (":", "^")]

DIRECT_LABELS = 5  # lines; with more, a legend under the figure

LARGEST = 1e100  # what is drawn: an axis of larger numbers overflows

POLICY_PANELS = [  # metric, what the axis says, its scale
    ("reward", "reward, training batch", "linear"),
    ("eval_reward", "reward, held-out prompts", "linear"),
    ("kl_sft", "KL(policy || start)\n(nats per sequence)", "linear"),
    ("kl_peak", "largest KL so far\n(nats per sequence)", "linear"),
    ("beta", "beta (reward per nat)", "linear"),
    ("length", "length (tokens)", "linear"),
    ("entropy", "entropy (nats per token)", "linear"),
    ("grad_norm", "gradient norm", "log"),
]

RM_PANELS = [
    ("eval_loss", "loss, held-out pairs\n(nats per pair)", "linear"),
    ("eval_accuracy", "accuracy, held-out pairs\n(share)", "linear"),
    ("eval_ece", "calibration error (ECE)\nof P(chosen wins)", "linear"),
]

PLANES = [("reward", "reward, held-out prompts"), ("gold", "gold reward (the truth)")]


@plt.rc_context(STYLE)
def plot_front(results: dict, path: Path) -> None:
    """The KL-reward plane of a WARP run: training curves, merges and the front.

    Where gold reward is known, it is drawn beside the reward model's.

    Args:
        results: what front.json holds.
        path: of the figure.
    """
    panels = [("reward", "reward model's score"), ("gold", "gold reward (the truth)")]
    panels = [one for one in panels if _columns(results["front"], one[0])[0]] or panels[:1]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels), 2.9), squeeze=False)
    front = results["front"]
    start = [front[0]] if front[0]["eta"] == 0 else []
    near = {"textcoords": "offset points"}
    for axis, (key, label) in zip(axes[0], panels):
        for i, run in enumerate(results["runs"]):
            points = [*(start if run["iteration"] == 1 else []), *run["curve"]]
            name = "policies in training" if i == 0 else None
            x, y = _columns(points, key)
            look = {"color": GREY, "lw": 1, "alpha": 0.7}
            look["marker"] = "." if len(x) == 1 else ""  # a line of one point is invisible
            axis.plot(x, y, **look, label=name)
        name = "front: start policy to last merge"
        axis.plot(*_columns(front, key), "o-", color=BLUE, ms=3, lw=1.5, label=name)
        for point in front:
            if point["eta"] not in (0, 0.5, 1):
                continue
            # Above the front, where nothing else is.
            name, place, side = f"$\\eta={point['eta']:g}$", (-5, 6), "right"
            if point["eta"] == 0:
                name, place, side = "start policy", (8, -4), "left"
            for where in zip(*_columns([point], key)):
                axis.annotate(name, where, xytext=place, ha=side, color=BLUE, **near)
        for merge in results["merges"]:
            name = "merge of an iteration" if merge["iteration"] == 1 else None
            for where in zip(*_columns([merge], key)):
                axis.plot(*where, "D", color=ORANGE, ms=5, zorder=3, label=name)
                text = f"{merge['iteration']:g}"
                axis.annotate(text, where, xytext=(4, -10), color=ORANGE, **near)
        axis.set_xlabel("KL(policy || start), nats per completion")
        axis.set_ylabel(label)
    axes[0][0].legend(loc="lower right")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    """The file of a figure, in the format that its name ends in."""
    with whole_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix[1:])
    plt.close(figure)


def _columns(points: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """KLs, and values of `key`, of the points that have both."""
    pairs = [(point.get("kl_sft", math.nan), point.get(key, math.nan)) for point in points]
    pairs = [pair for pair in pairs if all(abs(value) < LARGEST for value in pair)]
    return [kl for kl, _ in pairs], [value for _, value in pairs]


@plt.rc_context(STYLE)
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
        for metric, name, scale in of_kind:
            values = [(group, _curve(group, metric, scale)[1]) for group in alike]
            shown = [group for group, of_it in values if numpy.isfinite(of_it).all(0).any()]
            if shown:
                panels.append((_draw_curves, shown, metric, name, scale))
    for metric, name in PLANES:
        shown = [group for group in groups if all(_plane(run, metric) for run in group.runs)]
        if shown:
            panels.append((_draw_plane, shown, metric, name, "linear"))
    names = ", ".join(run.path for group in groups for run in group.runs)
    require(
        bool(panels),
        f"{names}: nothing to draw yet: no evaluation is logged at a step that all of a line's "
        "runs have",
    )
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 2.5 * rows), squeeze=False)
    style = {}
    for i, group in enumerate(groups):
        line, marker = LINES[i // len(COLOURS) % len(LINES)]
        colour = COLOURS[i % len(COLOURS)]
        style[group.label] = {"color": colour, "ls": line, "marker": marker, "lw": 1.5, "ms": 3}
    for axis, (draw, shown, metric, name, scale) in zip(axes.flat, panels):
        axis.set_yscale(scale)
        ends = draw(axis, shown, metric, style)
        if scale == "log":
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.set_ylabel(name)
        axis.locator_params(axis="x", nbins=4, integer=draw is _draw_curves)
        if len(groups) <= DIRECT_LABELS:
            label_ends(axis, ends)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if len(groups) > DIRECT_LABELS:
        lines = [plt.Line2D([], [], label=label, **look) for label, look in style.items()]
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles=lines, **place)
    if any(len(group.runs) > 1 for group in groups):
        note = "n seeds: their mean, in a band from the lowest to the highest"
        figure.supxlabel(note, x=0.99, ha="right", fontsize="medium", color=GREY)
    _save(figure, path)


def _curve(group: Group, metric: str, scale: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Steps (N,), and the runs' values there (runs, N), with nan for what a scale cannot show."""
    steps, values = curve(group, metric)
    values = numpy.array(values)
    shown = (abs(values) < LARGEST) & (values > (0 if scale == "log" else -LARGEST))
    return steps, numpy.where(shown, values, math.nan)


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
        steps, values = _curve(group, metric, axis.get_yscale())
        window = 1 if held_out else 2 * (len(steps) // 40) + 1
        starts, _ = thin(len(steps))
        smoothed = numpy.array([smooth(one, window) for one in values])
        whole = numpy.isfinite(smoothed).all(0)
        x, smoothed = steps[starts][whole], smoothed[:, whole]
        if len(values) == 1 and window > 1:  # lowest and highest of what is one point there
            extremes = [of.reduceat(values[0], starts) for of in (numpy.fmin, numpy.fmax)]
            raw = numpy.stack(extremes, 1).ravel()
            axis.plot(numpy.repeat(steps[starts], 2), raw, color=look["color"], lw=0.5, alpha=0.3)
        mean = smoothed.mean(0)
        _band(axis, x, smoothed, look["color"])
        one_point = len(x) == 1  # as a line, it is invisible
        axis.plot(x, mean, **look | ({} if held_out or one_point else {"marker": None}))
        ends.append((mean[-1], group.label, look["color"]))
    reference = {"eval_loss": "constant model", "eval_accuracy": "chance"}.get(metric)
    if reference:
        floors = {0.5}
        if metric == "eval_loss":
            logged = [_curve(group, "eval_floor", "linear")[1][0] for group in groups]
            floors = {round(one[-1], 4) for one in logged if len(one) and one[-1] == one[-1]}
        for floor in sorted(floors):
            axis.axhline(floor, color=GREY, lw=1, ls="--")
            ends.append((floor, reference, GREY))
    if metric == "eval_ece":
        axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("optimizer steps")
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
        curves = [_plane(run, metric) for run in group.runs]
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
    axis.set_xlabel("KL(policy || start)\n(nats per sequence)")
    return ends


def _band(
    axis: plt.Axes, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str
) -> None:
    """Fill what lies between the lowest and the highest of several curves."""
    if len(curves) > 1:
        low, high = ([of(values) for values in zip(*curves)] for of in (min, max))
        axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _plane(run: LoggedRun, metric: str) -> list[tuple[float, float]]:
    """(KL, value) of each of a run's held-out points that has both."""
    return list(zip(*_columns(run.points, metric)))


def label_ends(axis: plt.Axes, ends: Sequence[tuple[float, str, str]]) -> None:
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
    # A line of text, as a share of the height of the axes.
    inches = axis.get_position().height * axis.figure.get_figheight()
    gap = 1.25 * STYLE["font.size"] / 72 / inches
    taken = []
    heights.sort()
    for height, _, _ in heights:  # from the bottom up, each at least a line above the one before
        taken.append(max(height, taken[-1] + gap if taken else 0.0))
    for i in reversed(range(len(taken))):  # and down again from the top
        taken[i] = min(taken[i], taken[i + 1] - gap if i + 1 < len(taken) else 1.0)
    look = {"xycoords": "axes fraction", "va": "center"}
    for height, (_, text, colour) in zip(taken, heights):
        axis.annotate(text, (1.02, height), color=colour, **look)
