"""LoRA against full fine-tuning: gold reward at fixed KL in the toy world, and what each trains.

    python tests/experiments/lora_front.py --seeds 0 1 2 3 4

It resumes, and takes about 4 minutes per seed on one core.

Arms, each 200 steps of 64 samples with a fixed anchor and beta 0.1:

- all weights;
- all but the (tied) embedding, which LoRA never trains;
- adapters of rank 8 and 32 on every linear layer of the body.

Gold is interpolated where each curve first crosses KL 0.5, 1 and 2. Learning rates of adapters were
chosen on seed 5 from 1e-3, 2e-3, 3e-3, 5e-3 and 2e-2: the highest ones collapse into the shortest
answers.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from warp_front import EVALUATION, FLOAT32, gold_at

import train_policy
from minalign.measuring.measures import bootstrap_interval
from minalign.models.lora import AdapterView, add_lora_
from minalign.running.run import Run

KLS = (0.5, 1.0, 2.0)
ARMS = {
    "all weights": {},
    "embedding frozen": {},
    "rank 8": dict(lora_rank=8, lr=2e-3),
    "rank 32": dict(lora_rank=32, lr=1e-3),
}


def run(seed: int, folder: Path) -> None:
    """Every arm of one seed: <arm>-<seed>.json with its curve. Those that are there are skipped."""
    cpu = torch.device("cpu")
    for name, flags in ARMS.items():
        result, place = folder / f"{name}-{seed}.json", folder / f"run {name}-{seed}"
        if result.exists():
            continue
        config = train_policy.resolve(train_policy.Config(seed=seed, **EVALUATION, **flags))
        one = Run(place, config, cpu, FLOAT32)
        task = train_policy.load(one)
        start = train_policy.evaluate(one, task, task.start).metrics
        policy = copy.deepcopy(task.start).requires_grad_(True)
        if config.lora_rank:
            torch.manual_seed(seed)
            add_lora_(policy, config.lora_rank, config.lora_alpha)
            task = task._replace(start=AdapterView(policy, None))
        if name == "embedding frozen":
            policy.get_input_embeddings().requires_grad_(False)
        place.mkdir(parents=True, exist_ok=True)
        train_policy.train(one, task, policy)
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        curve = [(start["kl_sft"], start["gold"])]
        curve += [(row["eval_kl_sft"], row["eval_gold"]) for row in rows if "eval_gold" in row]
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        result.write_text(json.dumps({"curve": curve, "trained": trained}))


def report(folder: Path) -> None:
    """Gold at each KL, and LoRA minus full fine-tuning with a 95% bootstrap interval over seeds."""
    seeds = sorted({int(path.stem.split("-")[-1]) for path in folder.glob("rank*.json")})
    results, gold = {}, {}
    for name in ARMS:
        paths = [folder / f"{name}-{seed}.json" for seed in seeds]
        results[name] = [json.loads(path.read_text()) for path in paths]
        gold[name] = np.array([[gold_at(r["curve"], kl) for kl in KLS] for r in results[name]])
    levels = ", ".join(f"{kl:g}" for kl in KLS)
    print(f"seeds {seeds}; gold at KL {levels}; last point of the curve")
    for name, rows in results.items():
        kl, reward = np.array([r["curve"][-1] for r in rows]).mean(0)
        means = "  ".join(f"{value:.2f}" for value in np.nanmean(gold[name], 0))
        trained = f"{rows[0]['trained']:7d} trained"
        print(f"{name:16} {trained}  {means}   KL {kl:.2f} gold {reward:.2f}")
    for name in list(ARMS)[1:]:
        for j, kl in enumerate(KLS):
            difference = gold[name][:, j] - gold["all weights"][:, j]
            difference = difference[np.isfinite(difference)].tolist()
            if not difference:
                continue
            low, high = bootstrap_interval(difference)
            found = f"{np.mean(difference):+.2f} [{low:+.2f}, {high:+.2f}]"
            print(f"KL {kl:g}: {name} - all weights {found}, {len(difference)} seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/lora_front"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(seed, arguments.out)
    report(arguments.out)
