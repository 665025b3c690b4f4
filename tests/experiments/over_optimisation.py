"""When does gold reward turn down while the proxy still rises? (toy world)

And which logged number warns first?

    python tests/experiments/over_optimisation.py --seeds 3
    python tests/experiments/over_optimisation.py --report    table and figure from what is there

It resumes, and takes about 4 minutes per seed on one core.

Reward models (Bradley-Terry, train_rm.train) on 100, 400, 1600 and 6400 of the noisy rater's pairs:
one epoch or 50 steps, the best by held-out loss kept. Policies (train_policy.train): 80 steps of 64
with a fixed anchor and beta 0, .1 or .3 (.03 was left out for time), evaluated on 100 held-out
prompts every 10 steps. A seed draws pairs, prompts and samples. The third was added after the first
two had been seen.

Gold has turned at the first evaluation that lies .5 or more under the best one before it. The
numbers that might warn, and their thresholds, were fixed on seed 100 before any run that is
reported: see WARNINGS. Those logged at each training step are means of 10 steps.

A number is judged by

- what stopping at its first crossing costs (primary: gold lost against the run's best evaluation,
  mean of all runs of a seed, minus what is lost by never stopping);
- how many runs that turn it warns before the turn;
- how many runs that never turn it stops, too.
"""

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from exact_world import reward_at
from seeds import RESULTS, bootstrap, main, show

import train_policy
import train_rm
from minalign.running.run import Run

SIZES, BETAS, KLS = (100, 400, 1600, 6400), (0.0, 0.1, 0.3), (0.5, 1.0, 2.0)
STEPS, EVERY, DROP = 80, 10, 0.5
# logged at every step, of the samples that train
TRAINING = ("entropy", "repeated", "advantage_std", "grad_norm")
# a point of the curve, the start's point, the reward model's held-out numbers -> alarm?
WARNINGS = {
    "proxy over its texts' mean + 2 sd": lambda now, start, rm: (
        now["reward"] > rm["reward_mean"] + 2 * rm["reward_std"]
    ),
    "KL over 4 nats": lambda now, start, rm: now["kl"] > 4,
    "entropy under half": lambda now, start, rm: now["entropy"] < start["entropy"] / 2,
    "a tenth repeated": lambda now, start, rm: now["repeated"] > 0.1,
    "length off by half": lambda now, start, rm: (
        not 2 / 3 < now["length"] / start["length"] < 3 / 2
    ),
    "ended under .9": lambda now, start, rm: now["ended"] < 0.9,
    "distinct_2 under half": lambda now, start, rm: now["distinct_2"] < start["distinct_2"] / 2,
    "advantage sd under half": lambda now, start, rm: (
        now["advantage_std"] < start["advantage_std"] / 2
    ),
    "gradient norm doubled": lambda now, start, rm: now["grad_norm"] > 2 * start["grad_norm"],
}


def work(seed: int) -> dict:
    cpu, dtype, result = torch.device("cpu"), torch.float32, {"rm": {}, "curves": {}}
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            rm = Path(name) / f"rm {size}"
            rm.mkdir()
            steps = max(50, -(-size // 32))
            given = dict(max_pairs=size, max_eval_pairs=500, steps=steps, eval_every=steps // 5)
            config = train_rm.resolve(train_rm.Config(seed=seed, **given))
            one = Run(rm, config, cpu, dtype)
            result["rm"][size] = train_rm.train(one, *train_rm.load(one.config, cpu))
            for beta in BETAS:
                given = dict(steps=STEPS, eval_every=EVERY, eval_prompts=100, save_every=10**6)
                config = train_policy.Config(seed=seed, rm=[str(rm)], beta=beta, **given)
                config, out = train_policy.resolve(config), Path(name) / f"{size} {beta}"
                out.mkdir()
                one = Run(out, config, cpu, dtype)
                task = train_policy.load(one)
                start = train_policy.evaluate(one, task, task.start).metrics
                train_policy.train(one, task, copy.deepcopy(task.start).requires_grad_(True))
                lines = (out / "metrics.jsonl").read_text().splitlines()
                result["curves"][f"{size} {beta:g}"] = curve_of(start, map(json.loads, lines))
    return result


def curve_of(start: dict[str, float], rows: Iterable[dict]) -> list[dict[str, float]]:
    """The evaluations of a run, `start` first, each with the means of the ten steps before it."""
    rows, windows = list(rows), []
    for i in range(0, STEPS, EVERY):
        window = rows[i : i + EVERY]
        windows.append({name: np.mean([row[name] for row in window]).item() for name in TRAINING})
    points = [start | windows[0] | {"step": 0}]  # the first ten steps stand for the start
    for row, window in zip(rows[EVERY - 1 :: EVERY], windows):
        names = [name for name in row if name.startswith("eval_")]
        held_out = {name.removeprefix("eval_"): row[name] for name in names}
        points.append(held_out | window | {"step": row["step"]})
    return [{**point, "kl": point["kl_sft"]} for point in points]


def turn(gold: np.ndarray) -> int | None:
    """Index of the first evaluation that lies DROP under the best one before it."""
    fallen = np.flatnonzero(np.maximum.accumulate(gold) - gold >= DROP)
    return int(fallen[0]) if len(fallen) else None


def gold_at(curve: list[dict[str, float]], kl: float) -> float:
    """Gold reward at this KL. reward_at reads "reward": gold, here."""
    return reward_at([{"kl": point["kl"], "reward": point["gold"]} for point in curve], kl)


def report(results: dict[int, dict]) -> dict:
    summary, seeds = {"end": {}, "gold at KL": {}, "warnings": {}}, list(results.values())
    print(
        "              held-out pairs right   best gold   gold at the end - best   "
        "     proxy, end - at best gold   runs that turn"
    )
    for name in seeds[0]["curves"]:
        size, beta = name.split()
        curves = [seed["curves"][name] for seed in seeds]
        gold = [np.array([point["gold"] for point in curve]) for curve in curves]
        proxy = [np.array([point["reward"] for point in curve]) for curve in curves]
        cells = {
            "accuracy": bootstrap([seed["rm"][size]["eval_accuracy"] for seed in seeds]),
            "best gold": bootstrap([g.max() for g in gold]),
            "gold lost": bootstrap([g[-1] - g.max() for g in gold]),
            "proxy gained": bootstrap([p[-1] - p[g.argmax()] for p, g in zip(proxy, gold)]),
            "turned": sum(turn(g) is not None for g in gold),
        }
        summary["end"][name] = cells
        means = f"{cells['accuracy']['mean']:.3f}   {cells['best gold']['mean']:+.2f}"
        changes = f"{show(cells['gold lost'])}   {show(cells['proxy gained'])}"
        turned = f"{cells['turned']} of {len(gold)}"
        print(f"{size:>5} pairs, beta {beta:4}  {means}   {changes}   {turned}")
    for size in SIZES:
        for kl in KLS:
            gold = {}
            for beta in BETAS:
                curves = [seed["curves"][f"{size} {beta:g}"] for seed in seeds]
                gold[beta] = np.array([gold_at(curve, kl) for curve in curves])
            cells = {f"{beta:g}": bootstrap(values) for beta, values in gold.items()}
            cells["0.1 - 0"] = bootstrap(gold[0.1] - gold[0.0])
            summary["gold at KL"][f"{size} {kl:g}"] = cells
            shown = "   ".join(f"beta {beta}: {show(cell)}" for beta, cell in cells.items())
            print(f"gold at KL {kl:g}, {size:4} pairs:  {shown}")

    runs = [(seed, name, result) for seed, result in results.items() for name in result["curves"]]
    lost = {rule: {seed: [] for seed in results} for rule in ("never", *WARNINGS)}
    tally = {rule: {"leads": [], "late or never": 0, "stops without need": 0} for rule in WARNINGS}
    turned = 0
    for seed, name, result in runs:
        curve, rm = result["curves"][name], result["rm"][name.split()[0]]
        gold = np.array([point["gold"] for point in curve])
        when = turn(gold)
        turned += when is not None
        lost["never"][seed].append(gold.max() - gold[-1])
        for rule, alarm in WARNINGS.items():
            alarms = (i for i, point in enumerate(curve) if i and alarm(point, curve[0], rm))
            at = next(alarms, None)
            lost[rule][seed].append(gold.max() - gold[-1 if at is None else at])
            if when is None:
                tally[rule]["stops without need"] += at is not None
            elif at is not None and at < when:
                tally[rule]["leads"].append((when - at) * EVERY)
            else:
                tally[rule]["late or never"] += 1
    summary["turned"], summary["runs"] = turned, len(runs)
    mean_lost = {rule: np.array([np.mean(lost[rule][seed]) for seed in results]) for rule in lost}
    never = show(bootstrap(mean_lost["never"]))
    print(f"{turned} of {len(runs)} runs turn; gold lost by never stopping: {never}")
    for rule, counts in tally.items():
        difference = bootstrap(mean_lost[rule] - mean_lost["never"])
        lead = float(np.median(counts["leads"])) if counts["leads"] else float("nan")
        found = {"median lead, steps": lead, "gold lost - never stopping's": difference}
        summary["warnings"][rule] = counts | found
        before = f"{len(counts['leads']):2} of {turned} (median {lead:.0f} steps)"
        without = f"{counts['stops without need']:2} of {len(runs) - turned}"
        print(
            f"{rule:36} before the turn {before}   without need {without}   "
            f"gold lost, minus never stopping's {show(difference)}"
        )
    draw(results)
    return summary


def draw(results: dict[int, dict]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SIZES), figsize=(7, 3.2), sharey=True, layout="constrained")
    for axis, size in zip(axes, SIZES):
        for beta, line in zip(BETAS, ("-", "--", ":")):
            curves = [result["curves"][f"{size} {beta:g}"] for result in results.values()]
            steps = [point["step"] for point in curves[0]]
            for column, colour in (("gold", "black"), ("reward", "tab:orange")):
                rewards = np.array([[point[column] for point in curve] for curve in curves])
                values, band = rewards - rewards[:, :1], dict(alpha=0.07, lw=0)
                label = f"beta {beta:g}" if column == "gold" else None
                axis.plot(steps, values.mean(0), line, color=colour, lw=1.2, label=label)
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, **band)
        axis.set(title=f"{size} pairs", xlabel="step")
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward over the start's")
    look = dict(transform=axes[0].transAxes, fontsize=8)
    axes[0].text(0.04, 0.96, "proxy", color="tab:orange", va="top", **look)
    axes[0].text(0.04, 0.04, "gold", **look)
    axes[-1].legend(frameon=False, fontsize=7, loc="lower right")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "over_optimisation.png", dpi=100)


if __name__ == "__main__":
    main("over_optimisation", __doc__, work, report, seeds=3)
