"""What does merging add to one run, and SLERP to LERP? (exact world)

And what makes task vectors orthogonal?

    python tests/experiments/merging.py --seeds 8        resumes; about 110 s per seed on one core
    python tests/experiments/merging.py --report         table and figure from what is there

From one start 5 runs (200 steps of 4 samples, EMA anchor, other prompts and samples). Fronts, all
by LITI:

- of each run;
- of SLERPs of the first 2, 3, 4, 5;
- of their LERP for 2 and 5, with eta up to 2;
- of SLERP with one angle per tensor, or one for all.

A sweep of one thing at a time (batch, steps, learning rate, width) gives the angle of two runs and
what their merge gains.

Primary contrast: expected reward at KL 1, SLERP of 2 minus one run (mean of the 5), both by LITI.
Beside it, at KL .5, 1, 2, 3: LITI of one run minus its own training curve (mean of the 5); M = 3,
4, 5 against 2; SLERP minus LERP; the scopes. Not matched in compute: M runs take M times the
samples (see iterations.py). LERP's etas are SLERP's times the ratio of the merged norms: the points
of both fronts lie at nearly one KL. The learning rate was raised from 3e-5 as anchors.py seldom got
to KL 3.

Added when the first seed was there, as runs differ a lot: each SLERP minus the mean of just the
runs that it merges. Added when five seeds had been seen: three more.
"""

import copy

import numpy as np
import torch
from anchors import at
from exact_world import World, make_world, train, truth
from seeds import bootstrap, main, panels, save, show

from minalign.merge import liti, merge_policies

KLS = (0.5, 1.0, 2.0, 3.0)
RUN = dict(steps=200, batch_size=4, lr=5e-5, beta=0.3, anchor="ema", mu=0.05)
ETAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PAIRS = [(f"slerp {m}", "slerp 2") for m in (3, 4, 5)]
PAIRS += [("slerp 2", "lerp 2"), ("slerp 5", "lerp 5")]
PAIRS += [("slerp 5", "slerp 5, tensor"), ("slerp 5", "slerp 5, model")]
CELLS = {
    "base": {},
    "batch 1": {"batch_size": 1},
    "batch 32": {"batch_size": 32},
    "80 steps": {"steps": 80},
    "lr x 3, steps / 3": {"lr": 1.5e-4, "steps": 67},
    "width 32": {"width": 32},
}


def front(
    world: World, theta: dict[str, torch.Tensor], etas: tuple[float, ...] = ETAS
) -> list[dict[str, float]]:
    """(1 - eta) theta_start + eta theta for each eta, measured.

    Eta 0 comes first, and is 0, 0 by definition.
    """
    policy, points = copy.deepcopy(world.start), [{"eta": 0.0, "kl": 0.0, "reward": 0.0}]
    for eta in etas:
        policy.load_state_dict(liti(world.start.state_dict(), theta, eta))
        points.append({"eta": eta} | truth(world, policy))
    return points


def norm(report: dict[str, dict]) -> float:
    """Norm of the whole merged task vector."""
    return sum(group["norm"] ** 2 for group in report.values()) ** 0.5


def work(seed: int) -> dict:
    world = make_world(seed)
    start = world.start.state_dict()
    thetas, result = [], {"curves": [], "runs": [], "cells": {}}
    for m in range(5):
        policy, curve = train(world, seed=1000 * (seed + 1) + 10 * m, every=20, **RUN)
        thetas.append(policy.state_dict())
        result["curves"].append(curve)
        result["runs"].append(front(world, thetas[m]))
    for count in (2, 3, 4, 5):
        merged, report = merge_policies(start, thetas[:count])
        result[f"slerp {count}"] = front(world, merged)
        if count in (2, 5):
            lerped, lerp_report = merge_policies(start, thetas[:count], method="lerp")
            etas = [eta * norm(report) / norm(lerp_report) for eta in ETAS] + [1.0, 1.5, 2.0]
            result[f"lerp {count}"] = front(world, lerped, tuple(sorted(etas)))
    result["angles"] = {group: values["angle"] for group, values in report.items()}
    for scope in ("tensor", "model"):
        result[f"slerp 5, {scope}"] = front(world, merge_policies(start, thetas, scope=scope)[0])

    for name, changed in CELLS.items():
        options = RUN | changed
        width = options.pop("width", 64)
        other = make_world(seed, width=width) if width != 64 else world
        pair = thetas[:2]
        if name != "base":
            pair = []
            for m in range(2):
                policy, _ = train(other, seed=1000 * (seed + 1) + 10 * m, every=10**6, **options)
                pair.append(policy.state_dict())
        etas = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
        merged, report = merge_policies(other.start.state_dict(), pair)
        _, whole = merge_policies(other.start.state_dict(), pair, scope="model")
        result["cells"][name] = {
            "angle": whole["model"]["angle"],
            "layers": {group: values["angle"] for group, values in report.items()},
            "runs": [front(other, theta, etas) for theta in pair],
            "slerp": front(other, merged, etas),
        }
    return result


def report(results: dict[int, dict]) -> dict:
    everything = list(results.values())

    def one(r, kl, kind="runs", count=5):
        """Mean of several runs; NaN where one of them does not get there."""
        return float(np.mean([at(curve, kl) for curve in r[kind][:count]]))

    def at_eta_1(curve):
        return next(point for point in curve if point["eta"] == 1)

    contrasts = {}
    for kl in KLS:
        difference = [one(r, kl) - one(r, kl, "curves") for r in everything]
        contrasts[f"KL {kl:g}: one run by LITI - its training curve"] = difference
        difference = [at(r["slerp 2"], kl) - one(r, kl) for r in everything]
        contrasts[f"KL {kl:g}: SLERP of 2 - one run, both by LITI"] = difference
        for m in (2, 3, 4, 5):
            difference = [at(r[f"slerp {m}"], kl) - one(r, kl, count=m) for r in everything]
            contrasts[f"KL {kl:g}: SLERP of {m} - one of these {m} runs"] = difference
        for name, other in PAIRS:
            difference = [at(r[name], kl) - at(r[other], kl) for r in everything]
            contrasts[f"KL {kl:g}: {name} - {other}"] = difference
    for m in (2, 5):
        ends = [(r[f"slerp {m}"][-1], at_eta_1(r[f"lerp {m}"])) for r in everything]
        for key in ("reward", "kl"):
            difference = [slerp[key] - lerp[key] for slerp, lerp in ends]
            contrasts[f"M = {m}, eta 1: {key}, SLERP - LERP"] = difference
    for group in everything[0]["angles"]:
        angles = [r["angles"][group] for r in everything]
        contrasts[f"angle of task vectors, 5 runs, degrees: {group}"] = angles
    for name in CELLS:
        cells = [r["cells"][name] for r in everything]
        contrasts[f"{name}: angle of 2 runs, degrees"] = [cell["angle"] for cell in cells]
        kls = [np.mean([run[-1]["kl"] for run in cell["runs"]]) for cell in cells]
        contrasts[f"{name}: KL at the end"] = kls
        for kl in (0.5, 1.0):
            difference = [at(cell["slerp"], kl) - one(cell, kl) for cell in cells]
            contrasts[f"{name}: KL {kl:g}, SLERP of 2 - one run"] = difference
    summary = {name: bootstrap(values) for name, values in contrasts.items()}
    for name, value in summary.items():
        print(f"{name:66} {show(value)}")
    draw(everything, summary)
    return {"contrasts": summary}


def draw(everything: list[dict], summary: dict) -> None:
    from minalign.tools.figures import BLUE, GREY, ORANGE, label_ends

    figure, (left, right) = panels(2)
    kls = np.arange(0.25, 3.01, 0.25)

    def rewards(several):  # (seeds, KLs): mean of each seed's curves
        means = [[np.mean([at(curve, kl) for curve in curves]) for kl in kls] for curves in several]
        return np.array(means)

    ends = []  # of the lines: value, label, colour
    for name, count, style, color in (
        ("training curve", 5, ":", GREY),
        ("slerp 2", 2, "--", ORANGE),
        ("slerp 3", 3, "-.", "black"),
        ("slerp 5", 5, "-", BLUE),
    ):
        curves = [r["curves"] if name == "training curve" else [r[name]] for r in everything]
        values = rewards(curves) - rewards([r["runs"][:count] for r in everything])
        values = [bootstrap(column) for column in values.T]
        mean, low, high = ([v[key] for v in values] for key in ("mean", "low", "high"))
        left.plot(kls, mean, style, color=color)
        left.fill_between(kls, low, high, color=color, alpha=0.15, lw=0)
        ends.append((mean[-1], name.replace("slerp", "SLERP of"), color))
    left.axhline(0, color="black", lw=0.5)
    left.set(xlabel="KL to the start, nats", ylabel="reward minus LITI of one of the same runs")
    left.set(xlim=(0, 3))
    label_ends(left, ends)

    def around(value):  # lengths of the two halves of its interval
        return [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]

    for name in CELLS:
        angle = summary[f"{name}: angle of 2 runs, degrees"]
        gain = summary[f"{name}: KL 0.5, SLERP of 2 - one run"]
        place, look = (
            (angle["mean"], gain["mean"]),
            dict(fmt="o", ms=3, lw=0.6, color="black", ecolor="0.8"),
        )
        right.errorbar(*place, xerr=around(angle), yerr=around(gain), **look)
        right.annotate(name, place, (0, 5), textcoords="offset points", ha="center")
    right.axhline(0, color="black", lw=0.5)
    right.set(xlabel="angle of two runs' task vectors, degrees")
    right.set(ylabel="SLERP of 2 minus one run, at KL 0.5")
    save(figure, "merging")


if __name__ == "__main__":
    main("merging", __doc__, work, report, seeds=8)
