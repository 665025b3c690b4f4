"""When does gold reward turn down while the proxy still rises, and which logged number warns first? (toy world)

    python tests/experiments/over_optimisation.py --seeds 3        resumes; about 4 minutes a seed on one core
    python tests/experiments/over_optimisation.py --report         table and figure from what is there

Reward models (Bradley-Terry, train_rm.train) on 100, 400, 1600 and 6400 of the noisy rater's pairs: one epoch or 50 steps, the
best by held-out loss kept. Policies (train_policy.train): 80 steps of 64 with a fixed anchor and beta 0, .1 or .3 (.03 was left
out for time), evaluated on 100 held-out prompts every 10 steps. A seed draws pairs, prompts and samples; the third was
added after the first two had been seen.

Gold has turned at the first evaluation that lies .5 or more under the best one before it. The numbers that might warn, and
their thresholds, fixed on seed 100 before any run that is reported: see WARNINGS. Those logged at each training step are means
of 10 steps. A number is judged by what stopping at its first crossing costs (primary: gold lost against the run's best
evaluation, mean of all runs of a seed, minus what is lost by never stopping), by how many runs that turn it warns before the
turn, and by how many runs that never turn it stops, too.
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from exact_world import reward_at
from seeds import RESULTS, bootstrap, main, show

import train_policy
import train_rm
from minalign.task import load_task

SIZES, BETAS, KLS = (100, 400, 1600, 6400), (0.0, 0.1, 0.3), (0.5, 1.0, 2.0)
STEPS, EVERY, DROP = 80, 10, 0.5
TRAINING = ("entropy", "repeated", "advantage_std", "grad_norm")  # logged at every step, of the samples that train
WARNINGS = {  # a point of the curve, the start's point, the reward model's held-out numbers -> alarm?
    "proxy over its texts' mean + 2 sd": lambda now, start, rm: now["reward"] > rm["reward_mean"] + 2 * rm["reward_std"],
    "KL over 4 nats": lambda now, start, rm: now["kl"] > 4,
    "entropy under half": lambda now, start, rm: now["entropy"] < start["entropy"] / 2,
    "a tenth repeated": lambda now, start, rm: now["repeated"] > 0.1,
    "length off by half": lambda now, start, rm: not 2 / 3 < now["length"] / start["length"] < 3 / 2,
    "ended under .9": lambda now, start, rm: now["ended"] < 0.9,
    "distinct_2 under half": lambda now, start, rm: now["distinct_2"] < start["distinct_2"] / 2,
    "advantage sd under half": lambda now, start, rm: now["advantage_std"] < start["advantage_std"] / 2,
    "gradient norm doubled": lambda now, start, rm: now["grad_norm"] > 2 * start["grad_norm"],
}


def work(seed: int) -> dict:
    cpu, dtype, result = torch.device("cpu"), torch.float32, {"rm": {}, "curves": {}}
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            rm = Path(name) / f"rm {size}"
            rm.mkdir()
            steps = max(50, -(-size // 32))
            config = train_rm.Config(seed=seed, max_pairs=size, max_eval_pairs=500, steps=steps, eval_every=steps // 5)
            result["rm"][size] = train_rm.train(train_rm.resolve(config), rm, cpu, dtype)
            for beta in BETAS:
                config = train_policy.Config(seed=seed, rm=[str(rm)], beta=beta, steps=STEPS, eval_every=EVERY, eval_prompts=100, save_every=10**6)  # fmt: skip
                config, out = train_policy.resolve(config), Path(name) / f"{size} {beta}"
                out.mkdir()
                task = load_task(config, config.rm, cpu, dtype)
                start, _ = train_policy.evaluate(config, task, task.start, dtype)
                train_policy.train(config, task, copy.deepcopy(task.start).requires_grad_(True), out, dtype)
                rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                windows = [{n: np.mean([r[n] for r in rows[i : i + EVERY]]).item() for n in TRAINING} for i in range(0, STEPS, EVERY)]  # fmt: skip
                evaluated = [start | windows[0] | {"step": 0}]  # the first ten steps stand for the start
                for row, window in zip(rows[EVERY - 1 :: EVERY], windows):
                    held_out = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
                    evaluated.append(held_out | window | {"step": row["step"]})
                result["curves"][f"{size} {beta:g}"] = [{**point, "kl": point["kl_sft"]} for point in evaluated]
    return result


def turn(gold: np.ndarray) -> int | None:
    """Index of the first evaluation that lies DROP under the best one before it."""
    fallen = np.flatnonzero(np.maximum.accumulate(gold) - gold >= DROP)
    return int(fallen[0]) if len(fallen) else None


def report(results: dict[int, dict]) -> dict:
    summary = {"end": {}, "gold at KL": {}, "warnings": {}}
    print(
        "              held-out pairs right   best gold   gold at the end - best        proxy, end - at best gold   runs that turn"
    )
    for name in next(iter(results.values()))["curves"]:
        size, beta = name.split()
        gold = [np.array([point["gold"] for point in result["curves"][name]]) for result in results.values()]
        proxy = [np.array([point["reward"] for point in result["curves"][name]]) for result in results.values()]
        cells = summary["end"][name] = {
            "accuracy": bootstrap([result["rm"][size]["eval_accuracy"] for result in results.values()]),
            "best gold": bootstrap([g.max() for g in gold]),
            "gold lost": bootstrap([g[-1] - g.max() for g in gold]),
            "proxy gained": bootstrap([p[-1] - p[g.argmax()] for p, g in zip(proxy, gold)]),
            "turned": sum(turn(g) is not None for g in gold),
        }
        print(f"{size:>5} pairs, beta {beta:4}  {cells['accuracy']['mean']:.3f}   {cells['best gold']['mean']:+.2f}   "
              f"{show(cells['gold lost'])}   {show(cells['proxy gained'])}   {cells['turned']} of {len(gold)}")  # fmt: skip
    for size in SIZES:
        for kl in KLS:
            renamed = {  # reward_at reads "reward": gold, here
                beta: [reward_at([{"kl": p["kl"], "reward": p["gold"]} for p in r["curves"][f"{size} {beta:g}"]], kl) for r in results.values()]
                for beta in BETAS
            }  # fmt: skip
            cells = {f"{beta:g}": bootstrap(values) for beta, values in renamed.items()}
            cells["0.1 - 0"] = bootstrap(np.array(renamed[0.1]) - np.array(renamed[0.0]))
            summary["gold at KL"][f"{size} {kl:g}"] = cells
            print(f"gold at KL {kl:g}, {size:4} pairs:  " + "   ".join(f"beta {b}: {show(c)}" for b, c in cells.items()))

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
            at = next((i for i, point in enumerate(curve) if i and alarm(point, curve[0], rm)), None)
            lost[rule][seed].append(gold.max() - gold[-1 if at is None else at])
            if when is None:
                tally[rule]["stops without need"] += at is not None
            elif at is not None and at < when:
                tally[rule]["leads"].append((when - at) * EVERY)
            else:
                tally[rule]["late or never"] += 1
    summary["turned"], summary["runs"] = turned, len(runs)
    print(
        f"{turned} of {len(runs)} runs turn; gold lost by never stopping: {show(bootstrap([np.mean(v) for v in lost['never'].values()]))}"
    )
    for rule, counts in tally.items():
        difference = bootstrap([np.mean(lost[rule][seed]) - np.mean(lost["never"][seed]) for seed in results])
        lead = float(np.median(counts["leads"])) if counts["leads"] else float("nan")
        summary["warnings"][rule] = counts | {"median lead, steps": lead, "gold lost - never stopping's": difference}
        print(f"{rule:36} before the turn {len(counts['leads']):2} of {turned} (median {lead:.0f} steps)   without need "
              f"{counts['stops without need']:2} of {len(runs) - turned}   gold lost, minus never stopping's {show(difference)}")  # fmt: skip
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
                values = np.array([[point[column] - curve[0][column] for point in curve] for curve in curves])
                axis.plot(
                    steps, values.mean(0), line, color=colour, lw=1.2, label=f"beta {beta:g}" if column == "gold" else None
                )
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.07, lw=0)
        axis.set(title=f"{size} pairs", xlabel="step")
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward over the start's")
    axes[0].text(0.04, 0.96, "proxy", color="tab:orange", transform=axes[0].transAxes, va="top", fontsize=8)
    axes[0].text(0.04, 0.04, "gold", transform=axes[0].transAxes, fontsize=8)
    axes[-1].legend(frameon=False, fontsize=7, loc="lower right")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "over_optimisation.png", dpi=100)


if __name__ == "__main__":
    main("over_optimisation", __doc__, work, report, seeds=3)
