"""Does WARP's front lie above what one run of REINFORCE passes through, at equal policy steps? (toy world, gold reward)

    python tests/experiments/warp_front.py --seeds 0 1 2 3 4        resumes; about 8 minutes a seed on one core
    python tests/experiments/warp_front.py --report                 the table from what is there

Arms, each 400 policy steps of 64 samples: WARP (I = 2, M = 2, 100 steps each; its front by LITI); one run with a fixed
anchor; one with an EMA anchor (both for beta .03, .1, .3: their curves through training); one run of 200 steps with
twice the batch. Gold reward is interpolated on each curve at KL 1, 2 and 4; seeds are paired; one reward model for all.
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

BETAS = (0.03, 0.1, 0.3)
KLS = (1.0, 2.0, 4.0)
EVALUATION = dict(eval_prompts=400, eval_every=20)


def arms(seed: int) -> dict[str, train_policy.Config]:
    """Name -> flags of every single-run arm."""
    runs = {}
    for beta in BETAS:
        common = dict(seed=seed, beta=beta, **EVALUATION)
        runs[f"fixed {beta}"] = train_policy.Config(steps=400, anchor="fixed", **common)
        runs[f"ema {beta}"] = train_policy.Config(steps=400, anchor="ema", **common)
    runs["double batch"] = train_policy.Config(steps=200, batch_size=128, anchor="fixed", seed=seed, beta=0.1, **EVALUATION)
    return runs


def run(seed: int, folder: Path) -> None:
    """Every arm of one seed; writes <arm>-<seed>.json with its curve, and skips those that are there."""
    cpu = torch.device("cpu")
    task = train_policy.load_task(train_policy.resolve(train_policy.Config(**EVALUATION)), cpu, torch.float32)
    start = train_policy.evaluate(train_policy.resolve(train_policy.Config(**EVALUATION)), task, task.start, torch.float32)[0]
    for name, config in arms(seed).items():
        result, place = folder / f"{name}-{seed}.json", folder / f"run {name}-{seed}"
        if not result.exists():
            place.mkdir(parents=True, exist_ok=True)
            policy = copy.deepcopy(task.start).requires_grad_(True)
            train_policy.train(train_policy.resolve(config), task, policy, place, torch.float32)
            rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            curve = [(row["eval_kl_sft"], row["eval_gold"]) for row in rows if "eval_gold" in row]
            result.write_text(json.dumps([(start["kl_sft"], start["gold"]), *curve]))
    result = folder / f"warp-{seed}.json"
    if not result.exists():
        config = warp.resolve(warp.Config(seed=seed, **(EVALUATION | dict(eval_every=100))))
        results = warp.run_warp(config, task, folder / f"run warp-{seed}", torch.float32)
        result.write_text(json.dumps([(point["kl_sft"], point["gold"]) for point in results["front"]]))


def gold_at(curve: list, kl: float) -> float:
    """Gold reward where the curve first crosses this KL; NaN where it never does."""
    for (kl_a, gold_a), (kl_b, gold_b) in zip(curve, curve[1:]):
        if kl_a < kl <= kl_b:
            return gold_a + (gold_b - gold_a) * (kl - kl_a) / (kl_b - kl_a)
    return float("nan")


def report(folder: Path) -> None:
    """Gold at each KL, and WARP minus each arm with a 95% bootstrap interval over seeds."""
    seeds = sorted(int(path.stem.split("-")[-1]) for path in folder.glob("warp-*.json"))
    gold = {
        name: np.array(
            [[gold_at(json.loads((folder / f"{name}-{seed}.json").read_text()), kl) for kl in KLS] for seed in seeds]
        )
        for name in ["warp", *arms(0)]
    }
    rows = [f"seeds {seeds}", f"{'gold at KL':16}" + "".join(f"{kl:>10g}" for kl in KLS)]
    for name, values in gold.items():
        reached = np.isfinite(values).sum(0)
        rows.append(
            f"{name:16}" + "".join(f"{np.nanmean(v):8.2f}/{n}" if n else f"{'-':>10}" for v, n in zip(values.T, reached))
        )
    rows.append("(behind the bar: how many seeds reach that KL)")
    best = {
        kind: max((f"{kind} {beta}" for beta in BETAS), key=lambda name: np.nanmean(gold[name])) for kind in ("fixed", "ema")
    }
    contrasts = {}
    for name in (best["fixed"], best["ema"], "double batch"):
        cells = []
        for j, kl in enumerate(KLS):
            difference = gold["warp"][:, j] - gold[name][:, j]
            difference = difference[np.isfinite(difference)].tolist()
            low, high = bootstrap_interval(difference) if len(difference) > 1 else (float("nan"),) * 2
            mean = float(np.mean(difference)) if difference else float("nan")
            contrasts[f"{name} at {kl:g}"] = {"mean": mean, "low": low, "high": high, "seeds": len(difference)}
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] n={len(difference)}")
        rows.append(f"warp - {name:14}" + "   ".join(cells))
    print("\n".join(rows))
    summary = {"seeds": seeds, "gold": {name: values.tolist() for name, values in gold.items()}, "contrasts": contrasts}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/warp_front"))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        arguments.out.mkdir(parents=True, exist_ok=True)
        run(seed, arguments.out)
    if arguments.report or arguments.seeds:
        report(arguments.out)
