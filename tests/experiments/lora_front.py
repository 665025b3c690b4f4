"""LoRA against full fine-tuning: gold reward at fixed KL, and what each trains. (toy world)

    python tests/experiments/lora_front.py --seeds 5       resumes; about 4 minutes per seed
    python tests/experiments/lora_front.py --report        table from what is there

The time is of one core. A seed draws the reward model's pairs, the prompts and the samples.

Arms, each 200 steps of 64 samples with a fixed anchor and beta 0.1:

- all weights;
- all but the (tied) embedding, which LoRA never trains;
- adapters of rank 8 and 32 on every linear layer of the body.

Primary contrast: gold where a curve first crosses KL .5, rank 8 minus all weights; also at KL 1 and
2, and for each other arm. Learning rates of adapters were chosen on an earlier version of this
study, on a seed of its own, from 1e-3, 2e-3, 3e-3, 5e-3 and 2e-2: the highest ones collapse into
the shortest answers.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from seeds import bootstrap, main, panels, save, show
from toy_world import at, train_curve, train_reward_model

KLS = (0.5, 1.0, 2.0)
ARMS = {
    "all weights": {},
    "embedding frozen": {},
    "rank 8": dict(lora_rank=8, lr=2e-3),
    "rank 32": dict(lora_rank=32, lr=1e-3),
}


def prepare_(arm: str, trained: dict[str, int], policy: torch.nn.Module) -> None:
    """Freeze what the arm freezes; its count of trained weights goes to `trained`."""
    if arm == "embedding frozen":
        policy.get_input_embeddings().requires_grad_(False)
    trained[arm] = sum(p.numel() for p in policy.parameters() if p.requires_grad)


def work(seed: int) -> dict:
    curves, trained = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_reward_model(folder / "rm", seed)
        for arm, flags in ARMS.items():
            common = dict(rm=[str(folder / "rm")], steps=200, eval_every=20, eval_prompts=300)
            prepared_ = functools.partial(prepare_, arm, trained)
            curves[arm] = train_curve(folder / arm, seed, prepared_, **common, **flags)
    return {"curves": curves, "trained": trained}


def report(results: dict[int, dict]) -> dict:
    curves = [result["curves"] for result in results.values()]
    summary = {"gold": {}, "contrasts": {}, "trained": next(iter(results.values()))["trained"]}
    for arm in ARMS:
        cells = {f"KL {kl:g}": bootstrap([at(c[arm], kl) for c in curves]) for kl in KLS}
        for key in ("kl", "gold"):
            cells[f"end {key}"] = bootstrap([c[arm][-1][key] for c in curves])
        summary["gold"][arm] = cells
        shown = (f"{key} {cell['mean']:6.2f} ({cell['seeds']})" for key, cell in cells.items())
        print(f"{arm:18}{summary['trained'][arm]:8} trained   " + "   ".join(shown))
    for arm in list(ARMS)[1:]:
        for kl in KLS:
            difference = [at(c[arm], kl) - at(c["all weights"], kl) for c in curves]
            name = f"KL {kl:g}: {arm} - all weights"
            summary["contrasts"][name] = bootstrap(difference)
            print(f"{name:42} {show(summary['contrasts'][name])}")
    draw(curves)
    return summary


def draw(curves: list[dict]) -> None:
    figure, axes = panels(2)
    looks = zip(ARMS, ("black", "tab:orange", "tab:blue", "tab:green"), ("-", "--", "-.", ":"))
    for arm, colour, line in looks:
        for axis, x in zip(axes, ("step", "kl")):
            points = np.array([[(p[x], p["gold"]) for p in c[arm]] for c in curves])
            axis.plot(*points.mean(0).T, line, color=colour, label=arm)
    axes[0].set(xlabel="step", ylabel="gold reward")
    axes[1].set(xlabel="KL to the start, nats")
    axes[0].legend()
    save(figure, "lora_front")


if __name__ == "__main__":
    main("lora_front", __doc__, work, report, seeds=5)
