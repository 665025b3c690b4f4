"""WARP, one run, or the best of n samples: which has more gold reward at equal KL? (toy world)

    python tests/experiments/warp_front.py --seeds 5       resumes; about 13 minutes per seed
    python tests/experiments/warp_front.py --report        table and figure from what is there

The time is of one core. A seed draws the reward model's pairs, the prompts and the samples. The
start policy is the same for all.

Arms, each 25,600 samples, beta .1 and .3, gold on 300 held-out prompts:

- WARP (I = 2, M = 2, 100 steps of 64 each), its front by LITI;
- one run with a fixed anchor, 400 steps of 64, its curve through training;
- one with an EMA anchor, 400 steps of 64, its curve;
- one with an EMA anchor, 200 steps of 128, its curve;
- the best of n samples of the start policy by the reward model, n = 1, 2, 4, ... 64. Its KL is the
  bound log n - (n-1)/n: it may be less. No training, n samples per answer.

Gold is interpolated where a curve first crosses KL 1, 2 and 4. Of each kind that has two betas, the
beta at each KL is the one with the best mean over the *other* seeds, among those that most of them
reach.

Primary contrast: gold at KL 2, WARP minus one run with a fixed anchor. Then the same minus each
other arm, at all three KLs. At equal samples: after how many answers training has cost less than
the best of n that is as good, 25,600 / (n - 1), with the smallest n above whose gold is that of the
last EMA policy with beta .3; never, where no n has as much.
"""

import tempfile
from pathlib import Path

import numpy as np
from seeds import bootstrap, main, panels, save, show
from toy_world import CPU, FLOAT32, at, train_curve, train_reward_model

import train_policy
import warp
from minalign.running.run import Run
from minalign.tools import evaluate
from minalign.tools.policies_compared import measure_best_of

BETAS, KLS, SAMPLES = (0.1, 0.3), (1.0, 2.0, 4.0), 25_600
N = [1, 2, 4, 8, 16, 32, 64]
KINDS = {  # label -> flags
    "one run, fixed anchor": dict(steps=400, anchor="fixed"),
    "one run, EMA anchor": dict(steps=400, anchor="ema"),
    "one run, EMA anchor, twice the batch": dict(steps=200, anchor="ema", batch_size=128),
}
HELD_OUT = dict(eval_prompts=300)


def work(seed: int) -> dict:
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_reward_model(folder / "rm", seed)
        common = dict(rm=[str(folder / "rm")], **HELD_OUT)
        for beta in BETAS:
            for kind, flags in KINDS.items():
                place = folder / f"{kind} {beta}"
                flags = dict(beta=beta, eval_every=20, **flags, **common)
                curves[f"{kind} {beta}"] = train_curve(place, seed, **flags)
            config = warp.Config(seed=seed, beta=beta, eval_every=100, **common)
            (folder / f"warp {beta}").mkdir()
            run = Run(folder / f"warp {beta}", warp.resolve(config), CPU, FLOAT32)
            front = warp.run_warp(run, train_policy.load(run))["front"]
            curves[f"WARP {beta}"] = [{"kl": point["kl_sft"], **point} for point in front]
        task = train_policy.load(run)
        given = dict(best_of=N, temperature=1.0, max_new_tokens=run.config.max_new_tokens)
        best = measure_best_of(task, evaluate.Config(seed=seed, batch_size=64, **given))["best_of"]
        curves["best of n"] = [{"kl": point["kl_bound"], **point} for point in best]
    return {"curves": curves}


def picked(rewards: dict[float, np.ndarray]) -> np.ndarray:
    """Each seed's value of the beta whose mean over the other seeds is best.

    Betas whose values are finite on more than half of the others count. Where none is, the seed has
    NaN.
    """
    count, values = len(next(iter(rewards.values()))), []
    for seed in range(count):
        others = np.arange(count) != seed
        means = {}
        for beta, of_seeds in rewards.items():
            finite = of_seeds[others][np.isfinite(of_seeds[others])]
            if 2 * len(finite) > others.sum():
                means[beta] = finite.mean()
        values.append(rewards[max(means, key=means.get)][seed] if means else np.nan)
    return np.array(values)


def report(results: dict[int, dict]) -> dict:
    curves = [result["curves"] for result in results.values()]
    kinds, summary = [*KINDS, "WARP"], {"gold": {}, "contrasts": {}, "equal samples": {}}
    for name in curves[0]:
        cells = {f"KL {kl:g}": bootstrap([at(c[name], kl) for c in curves]) for kl in KLS}
        cells |= {"end KL": bootstrap([c[name][-1]["kl"] for c in curves])}
        summary["gold"][name] = cells | {"end": bootstrap([c[name][-1]["gold"] for c in curves])}
        shown = (f"{label} {cell['mean']:6.2f} ({cell['seeds']})" for label, cell in cells.items())
        print(f"{name:42}" + "   ".join(shown))
    for kl in KLS:
        best = {"best of n": np.array([at(c["best of n"], kl) for c in curves])}
        for kind in kinds:
            of_betas = {beta: [at(c[f"{kind} {beta}"], kl) for c in curves] for beta in BETAS}
            best[kind] = picked({beta: np.array(values) for beta, values in of_betas.items()})
        for kind in best:
            summary["gold"].setdefault(f"{kind}, picked", {})[f"KL {kl:g}"] = bootstrap(best[kind])
        pairs = [("WARP", kind) for kind in best if kind != "WARP"]
        pairs += [("one run, EMA anchor", kind) for kind in ("one run, fixed anchor", "best of n")]
        for a, b in pairs:
            name, difference = f"KL {kl:g}: {a} - {b}", bootstrap(best[a] - best[b])
            summary["contrasts"][name] = difference
            print(f"{name:70} {show(difference)}")
        for beta in BETAS:  # the same beta on both sides
            warps, emas = ([at(c[f"{k} {beta}"], kl) for c in curves] for k in ("WARP", kinds[1]))
            name = f"KL {kl:g}, beta {beta}: WARP - one run, EMA anchor"
            summary["contrasts"][name] = bootstrap(np.array(warps) - np.array(emas))
            print(f"{name:70} {show(summary['contrasts'][name])}")
    answers = []
    for c in curves:
        gold = c[f"{kinds[1]} 0.3"][-1]["gold"]
        enough = [
            point["n"] for point in c["best of n"] if point["gold"] >= gold and point["n"] > 1
        ]
        answers.append(SAMPLES / (enough[0] - 1) if enough else np.nan)
    summary["equal samples"]["answers until training is cheaper"] = bootstrap(answers)
    print(f"answers until training has cost less than the best of n: {show(bootstrap(answers))}")
    draw(curves)
    return summary


def draw(curves: list[dict]) -> None:
    figure, axes = panels(2, sharey=True)
    looks = {
        "one run, fixed anchor": ("tab:orange", "--"),
        "one run, EMA anchor": ("tab:green", "-."),
        "WARP": ("tab:blue", "-"),
    }
    kls = np.arange(0.25, 6.01, 0.25)
    for axis, beta in zip(axes, BETAS):
        names = {kind: f"{kind} {beta}" for kind in looks} | {"best of n": "best of n"}
        for kind, name in names.items():
            colour, line = looks.get(kind, ("black", ":"))
            gold = np.array([[at(c[name], kl) for kl in kls] for c in curves])
            most = np.isfinite(gold).sum(0) > len(curves) / 2
            cells = [bootstrap(column) for column in gold[:, most].T]
            mean, low, high = ([cell[key] for cell in cells] for key in ("mean", "low", "high"))
            axis.plot(kls[most], mean, line, color=colour, label=kind)
            axis.fill_between(kls[most], low, high, color=colour, alpha=0.12, lw=0)
        axis.set(title=f"beta {beta}", xlabel="KL to the start, nats")
    axes[0].set_ylabel("gold reward")
    axes[0].legend(loc="lower right")
    save(figure, "warp_front")


if __name__ == "__main__":
    main("warp_front", __doc__, work, report, seeds=5)
