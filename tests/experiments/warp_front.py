"""Does WARP's front lie above what one run of REINFORCE passes through, at equal policy steps? (toy world, gold reward)

    python tests/experiments/warp_front.py --seeds 0 1 2 3 4        resumes; about 15 minutes a seed on one core
    python tests/experiments/warp_front.py --report                 the table from what is there

Arms, each 400 policy steps of 64 samples: WARP (I = 2, M = 2, 100 steps each; its front by LITI); one run with a fixed
anchor; one with an EMA anchor (their curves through training), each for every beta; and one run of 200 steps with twice
the batch. Gold reward is interpolated on each curve at KL 1, 2 and 4. Seeds are paired; start policy and reward model
are the same for all. Of each kind the best beta at each KL is compared, among those that most seeds' curves reach.
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
from minalign.evaluate import bootstrap_interval
from minalign.task import load_task

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
    runs["double batch 0.1"] = train_policy.Config(steps=200, batch_size=128, seed=seed, beta=0.1, **EVALUATION)
    return runs


def run(seed: int, betas: tuple[float, ...], folder: Path) -> None:
    """Every arm of one seed; writes <arm>-<seed>.json with its curve, and skips those that are there."""
    plain = train_policy.resolve(train_policy.Config(**EVALUATION))
    cpu = torch.device("cpu")
    task = load_task(plain, train_policy.rewards_of(plain, cpu, FLOAT32), cpu, FLOAT32)
    start, _ = train_policy.evaluate(plain, task, task.start, FLOAT32)
    for name, config in arms(seed, betas).items():
        result, place = folder / f"{name}-{seed}.json", folder / f"run {name}-{seed}"
        if result.exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        if isinstance(config, warp.Config):
            points = warp.run_warp(warp.resolve(config), task, place, FLOAT32)["front"]
        else:
            policy = copy.deepcopy(task.start).requires_grad_(True)
            train_policy.train(train_policy.resolve(config), task, policy, place, FLOAT32)
            rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            points = [start] + [{"kl_sft": r["eval_kl_sft"], "gold": r["eval_gold"]} for r in rows if "eval_gold" in r]
        result.write_text(json.dumps([(point["kl_sft"], point["gold"]) for point in points]))


def gold_at(curve: list, kl: float) -> float:
    """Gold reward where the curve first crosses this KL; NaN where it never does."""
    for (kl_a, gold_a), (kl_b, gold_b) in zip(curve, curve[1:]):
        if kl_a < kl <= kl_b:
            return gold_a + (gold_b - gold_a) * (kl - kl_a) / (kl_b - kl_a)
    return float("nan")


def report(folder: Path) -> None:
    """Gold at each KL, and WARP minus each kind of arm with a 95% bootstrap interval over seeds."""
    seeds = sorted({int(path.stem.split("-")[-1]) for path in folder.glob("warp *.json")})
    names = [name for name in arms(0, BETAS) if any((folder / f"{name}-{seed}.json").exists() for seed in seeds)]
    gold = {name: np.full((len(seeds), len(KLS)), np.nan) for name in names}
    for name in names:
        for i, seed in enumerate(seeds):
            path = folder / f"{name}-{seed}.json"
            if path.exists():
                gold[name][i] = [gold_at(json.loads(path.read_text()), kl) for kl in KLS]

    rows = [f"seeds {seeds}; mean gold at each KL, and on how many seeds the curve reaches it"]
    rows += [f"{'':18}" + "".join(f"{f'KL {kl:g}':>12}" for kl in KLS)]
    for name, values in gold.items():
        cells = [
            (column[np.isfinite(column)].mean() if np.isfinite(column).any() else np.nan, np.isfinite(column).sum())
            for column in values.T
        ]
        rows.append(f"{name:18}" + "".join(f"{f'{mean:.2f} ({count})':>12}" for mean, count in cells))

    contrasts = {}
    for j, kl in enumerate(KLS):
        best = {}
        for kind in ("warp", "fixed", "ema", "double batch"):
            reached = [n for n in names if n.startswith(kind) and np.isfinite(gold[n][:, j]).sum() > len(seeds) / 2]
            if reached:
                best[kind] = max(reached, key=lambda n: np.nanmean(gold[n][:, j]))
        for kind in ("fixed", "ema", "double batch"):
            if kind in best and "warp" in best:
                difference = gold[best["warp"]][:, j] - gold[best[kind]][:, j]
                difference = difference[np.isfinite(difference)].tolist()
                low, high = bootstrap_interval(difference)
                mean = float(np.mean(difference))
                contrasts[f"KL {kl:g}: {best['warp']} - {best[kind]}"] = {
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "seeds": len(difference),
                }
    rows += [
        f"{name:40} {c['mean']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}] over {c['seeds']} seeds"
        for name, c in contrasts.items()
    ]
    print("\n".join(rows))
    summary = {"seeds": seeds, "gold": {name: values.tolist() for name, values in gold.items()}, "contrasts": contrasts}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1).replace("NaN", "null") + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/warp_front"))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(seed, tuple(arguments.betas), arguments.out)
    if arguments.report or arguments.seeds:
        report(arguments.out)
