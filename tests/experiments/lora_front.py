"""LoRA against full fine-tuning: gold reward at fixed KL in the toy world, and what each trains.

    python tests/experiments/lora_front.py --seeds 0 1 2 3 4        resumes; about 4 minutes a seed on one core

Arms, each 200 steps of 64 samples with a fixed anchor and beta 0.1: all weights; all but the (tied) embedding, which LoRA
never trains; adapters of rank 8 and 32 on every linear layer of the body. Gold is interpolated where each curve first
crosses KL 0.5, 1 and 2. Learning rates of adapters were chosen on seed 5 from 1e-3, 2e-3, 3e-3, 5e-3 and 2e-2: the
highest ones collapse into the shortest answers.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import train_policy
from minalign.evaluate import bootstrap_interval
from minalign.lora import AdapterView, add_lora_
from minalign.task import load_task
from warp_front import EVALUATION, FLOAT32, gold_at

KLS = (0.5, 1.0, 2.0)
ARMS = {
    "all weights": {},
    "embedding frozen": {},
    "rank 8": dict(lora_rank=8, lr=2e-3),
    "rank 32": dict(lora_rank=32, lr=1e-3),
}


def run(seed: int, folder: Path) -> None:
    """Every arm of one seed; writes <arm>-<seed>.json with its curve, and skips those that are there."""
    cpu = torch.device("cpu")
    for name, flags in ARMS.items():
        result, place = folder / f"{name}-{seed}.json", folder / f"run {name}-{seed}"
        if result.exists():
            continue
        config = train_policy.resolve(train_policy.Config(seed=seed, **EVALUATION, **flags))
        task = load_task(config, train_policy.rewards_of(config, cpu, FLOAT32), cpu, FLOAT32)
        start, _ = train_policy.evaluate(config, task, task.start, FLOAT32)
        policy = copy.deepcopy(task.start).requires_grad_(True)
        if config.lora_rank:
            torch.manual_seed(seed)
            add_lora_(policy, config.lora_rank, config.lora_alpha)
            task = task._replace(start=AdapterView(policy, None))
        if name == "embedding frozen":
            policy.get_input_embeddings().requires_grad_(False)
        place.mkdir(parents=True, exist_ok=True)
        train_policy.train(config, task, policy, place, FLOAT32)
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        points = [start] + [{"kl_sft": r["eval_kl_sft"], "gold": r["eval_gold"]} for r in rows if "eval_gold" in r]
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        curve = [(point["kl_sft"], point["gold"]) for point in points]
        result.write_text(json.dumps({"curve": curve, "trained": trained}))


def report(folder: Path) -> None:
    """Gold at each KL, and LoRA minus full fine-tuning with a 95% bootstrap interval over seeds."""
    seeds = sorted({int(path.stem.split("-")[-1]) for path in folder.glob("rank*.json")})
    results = {name: [json.loads((folder / f"{name}-{seed}.json").read_text()) for seed in seeds] for name in ARMS}
    gold = {name: np.array([[gold_at(r["curve"], kl) for kl in KLS] for r in rows]) for name, rows in results.items()}
    print(f"seeds {seeds}; gold at KL {', '.join(f'{kl:g}' for kl in KLS)}; last point of the curve")
    for name, rows in results.items():
        last = np.array([r["curve"][-1] for r in rows]).mean(0)
        means = "  ".join(f"{value:.2f}" for value in np.nanmean(gold[name], 0))
        print(f"{name:16} {rows[0]['trained']:7d} trained  {means}   KL {last[0]:.2f} gold {last[1]:.2f}")
    for name in list(ARMS)[1:]:
        for j, kl in enumerate(KLS):
            difference = gold[name][:, j] - gold["all weights"][:, j]
            difference = difference[np.isfinite(difference)].tolist()
            if not difference:
                continue
            low, high = bootstrap_interval(difference)
            print(
                f"KL {kl:g}: {name} - all weights {np.mean(difference):+.2f} [{low:+.2f}, {high:+.2f}], {len(difference)} seeds"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/lora_front"))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run(seed, arguments.out)
    report(arguments.out)
