"""Does WARP's front lie above what one run of REINFORCE passes through? (toy world, gold reward)

Both have equal policy steps.

    python tests/experiments/warp_front.py --seeds 0 1 2 3 4
    python tests/experiments/warp_front.py --report            the table from what is there

It resumes, and takes about 15 minutes per seed on one core.

Arms, each 400 policy steps of 64 samples:

- WARP (I = 2, M = 2, 100 steps each), its front by LITI, for every beta from .1 on;
- one run with a fixed anchor, its curve through training, for every beta;
- one with an EMA anchor, its curve through training, for every beta;
- one run of 200 steps with twice the batch.

Gold reward is interpolated on each curve at KL 1, 2 and 4. Seeds are paired. Start policy and
reward model are the same for all. Of each kind the best beta at each KL is compared, among those
that most seeds' curves reach.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_policy
import warp
from minalign.measuring.measures import bootstrap_interval
from minalign.running.run import Run

BETAS = (0.03, 0.1, 0.3)
KLS = (1.0, 2.0, 4.0)
EVALUATION = dict(eval_prompts=400, eval_every=20)
FLOAT32 = torch.float32


def arms(seed: int, betas: tuple[float, ...]) -> dict[str, train_policy.Config]:
    """Name -> flags of every arm."""
    runs = {}
    for beta in betas:
        common = dict(seed=seed, beta=beta, **EVALUATION)
        runs[f"fixed {beta}"] = train_policy.Config(steps=400, anchor="fixed", **common)
        runs[f"ema {beta}"] = train_policy.Config(steps=400, anchor="ema", **common)
        if beta >= 0.1:
            runs[f"warp {beta}"] = warp.Config(**(common | dict(eval_every=100)))
    double = dict(steps=200, batch_size=128, seed=seed, beta=0.1)
    runs["double batch 0.1"] = train_policy.Config(**double, **EVALUATION)
    return runs


def run(seed: int, betas: tuple[float, ...], folder: Path) -> None:
    """Every arm of one seed: <arm>-<seed>.json with its curve. Those that are there are skipped."""
    plain = train_policy.resolve(train_policy.Config(**EVALUATION))
    cpu = torch.device("cpu")
    one = Run(folder, plain, cpu, FLOAT32)
    task = train_policy.load(one)
    start = train_policy.evaluate(one, task, task.start).metrics
    for name, config in arms(seed, betas).items():
        result, place = folder / f"{name}-{seed}.json", folder / f"run {name}-{seed}"
        if result.exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        if isinstance(config, warp.Config):
            one = Run(place, warp.resolve(config), cpu, FLOAT32)
            front = warp.run_warp(one, task)["front"]
            curve = [(point["kl_sft"], point["gold"]) for point in front]
        else:
            policy = copy.deepcopy(task.start).requires_grad_(True)
            one = Run(place, train_policy.resolve(config), cpu, FLOAT32)
            train_policy.train(one, task, policy)
            rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            curve = [(start["kl_sft"], start["gold"])]
            curve += [(row["eval_kl_sft"], row["eval_gold"]) for row in rows if "eval_gold" in row]
        result.write_text(json.dumps(curve))


def gold_at(curve: list, kl: float) -> float:
    """Gold reward where the curve first crosses this KL; NaN where it never does."""
    for (kl_a, gold_a), (kl_b, gold_b) in zip(curve, curve[1:]):
        if kl_a < kl <= kl_b:
            return gold_a + (gold_b - gold_a) * (kl - kl_a) / (kl_b - kl_a)
    return float("nan")


def report(folder: Path) -> None:
    """Gold at each KL, and WARP minus each kind of arm with a 95% bootstrap interval over seeds."""
    seeds = sorted({int(path.stem.split("-")[-1]) for path in folder.glob("warp *.json")})
    gold = {}  # name -> (seeds, KLs)
    for name in arms(0, BETAS):
        paths = [folder / f"{name}-{seed}.json" for seed in seeds]
        if not any(path.exists() for path in paths):
            continue
        gold[name] = np.full((len(seeds), len(KLS)), np.nan)
        for i, path in enumerate(paths):
            if path.exists():
                gold[name][i] = [gold_at(json.loads(path.read_text()), kl) for kl in KLS]

    rows = [f"seeds {seeds}; mean gold at each KL, and on how many seeds the curve reaches it"]
    rows += [f"{'':18}" + "".join(f"{f'KL {kl:g}':>12}" for kl in KLS)]
    for name, values in gold.items():
        reached = [column[np.isfinite(column)] for column in values.T]
        means = [column.mean() if len(column) else np.nan for column in reached]
        cells = [f"{mean:.2f} ({len(column)})" for mean, column in zip(means, reached)]
        rows.append(f"{name:18}" + "".join(f"{cell:>12}" for cell in cells))

    contrasts = {}
    for j, kl in enumerate(KLS):
        at_kl = {name: values[:, j] for name, values in gold.items()}
        most = [n for n in gold if np.isfinite(at_kl[n]).sum() > len(seeds) / 2]
        means, best = {name: np.nanmean(at_kl[name]) for name in most}, {}
        for kind in ("warp", "fixed", "ema", "double batch"):
            reached = [name for name in most if name.startswith(kind)]
            if reached:
                best[kind] = max(reached, key=means.get)
        for kind in ("fixed", "ema", "double batch"):
            if kind in best and "warp" in best:
                difference = at_kl[best["warp"]] - at_kl[best[kind]]
                difference = difference[np.isfinite(difference)].tolist()
                low, high = bootstrap_interval(difference)
                found = dict(mean=float(np.mean(difference)), low=low, high=high)
                name = f"KL {kl:g}: {best['warp']} - {best[kind]}"
                contrasts[name] = found | {"seeds": len(difference)}
                interval = f"{found['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
                rows.append(f"{name:40} {interval} over {len(difference)} seeds")
    print("\n".join(rows))
    values = {name: values.tolist() for name, values in gold.items()}
    summary = json.dumps({"seeds": seeds, "gold": values, "contrasts": contrasts}, indent=1)
    (folder / "summary.json").write_text(summary.replace("NaN", "null") + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/warp_front"))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(seed, tuple(arguments.betas), arguments.out)
    if arguments.report or arguments.seeds:
        report(arguments.out)
