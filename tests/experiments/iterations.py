"""Does iterating WARP improve its front, and does it beat plain runs? (exact world)

The plain runs have the same number of samples.

    python tests/experiments/iterations.py --seeds 7        resumes; about 70 s per seed on one core
    python tests/experiments/iterations.py --report         table and figure from what is there

WARP with M = 2 runs of 75 steps of 4 samples per iteration, I = 1, 2, 3, eta .3 or .5 between
iterations, SLERP per layer, the EMA anchor reset. The front of each iteration's merge is made by
LITI to the start.

Controls with the 1,800 samples of I = 3:

- a merge of 6 runs (I = 1);
- one run of a batch 6 times as large;
- one of 6 times the steps, with the same learning rate and with a sixth of it (and of mu).

A plain run has two fronts: its training curve, and LITI from its end. Both are compared.

Primary contrast: expected reward at KL 1, WARP (I = 3, eta .5) minus LITI of the 6-fold batch. Also
at KL .5, 2, 3; against each control; I = 2 and 3 against 1 (not matched: more samples); and eta .3
against .5.

For want of time 100 steps became 75 before any result; seeds 5 and 6 were added after the first
five had been looked at.
"""

import copy

import numpy as np
from exact_world import make_world, train
from merging import at, front
from seeds import bootstrap, main, panels, save, show

from minalign.merge import liti, merge_policies

KLS = (0.5, 1.0, 2.0, 3.0)
M, ITERATIONS, STEPS, LR, MU = 2, 3, 75, 7e-5, 0.05
RUN = dict(beta=0.3, anchor="ema")
MATCHED = M * ITERATIONS
LONG = dict(steps=STEPS * MATCHED, batch_size=4)
PLAIN = {
    "6x batch": dict(steps=STEPS, batch_size=4 * MATCHED, lr=LR, mu=MU, every=10),
    "6x steps": dict(**LONG, lr=LR, mu=MU, every=40),
    "6x steps, lr / 6": dict(**LONG, lr=LR / MATCHED, mu=MU / MATCHED, every=30),
}
FRONTS = ["I=1", "I=2, eta 0.3", "I=3, eta 0.3", "I=2, eta 0.5", "I=3, eta 0.5", "merge of 6"]
FRONTS += [f"{name}, {kind}" for name in PLAIN for kind in ("LITI", "curve")]


def work(seed: int) -> dict:
    world, result = make_world(seed), {}
    theta_sft = world.start.state_dict()
    # other prompts and samples for every run
    streams = iter(range(1000 * (seed + 1), 1000 * (seed + 2), 10))

    def runs_from(theta_init, count):
        init = copy.deepcopy(world.start)
        init.load_state_dict(theta_init)
        options = dict(steps=STEPS, batch_size=4, lr=LR, mu=MU, every=STEPS, **RUN)
        policies = (train(world, seed=next(streams), init=init, **options) for _ in range(count))
        return [policy.state_dict() for policy, _ in policies]

    first = runs_from(theta_sft, MATCHED)
    result["merge of 6"] = front(world, merge_policies(theta_sft, first)[0])
    for eta in (0.3, 0.5):
        theta_init = theta_sft
        for i in range(1, ITERATIONS + 1):
            # the anchor starts at theta_init, too
            thetas = first[:M] if i == 1 else runs_from(theta_init, M)
            theta_slerp, _ = merge_policies(theta_init, thetas)
            name = "I=1" if i == 1 else f"I={i}, eta {eta}"
            if name not in result:
                result[name] = front(world, theta_slerp)
            theta_init = liti(theta_init, theta_slerp, eta)
    for name, options in PLAIN.items():
        policy, result[f"{name}, curve"] = train(world, seed=next(streams), **options, **RUN)
        result[f"{name}, LITI"] = front(world, policy.state_dict())
    return result


def report(results: dict[int, dict]) -> dict:
    everything = list(results.values())

    def rewards_of(name):
        return np.array([[at(r[name], kl) for kl in KLS] for r in everything])  # (seeds, KLs)

    reward = {name: rewards_of(name) for name in FRONTS}
    print("expected reward at each KL (seeds that reach it)")
    print(f"{'':24}" + "".join(f"{kl:>13g}" for kl in KLS) + "   KL at the end")
    summary = {"rewards": {}, "contrasts": {}}
    for name in FRONTS:
        values = [bootstrap(column) for column in reward[name].T]
        summary["rewards"][name] = dict(zip(map(str, KLS), values))
        cells = "".join(f"{v['mean']:9.3f} ({v['seeds']})" for v in values)
        print(f"{name:24}{cells}{np.mean([r[name][-1]['kl'] for r in everything]):12.2f}")
    pairs = [("I=3, eta 0.5", name) for name in FRONTS if name != "I=3, eta 0.5"]
    pairs += [
        ("I=2, eta 0.5", "I=1"),
        ("I=3, eta 0.3", "I=1"),
        ("I=3, eta 0.3", "6x batch, LITI"),
        ("merge of 6", "6x batch, LITI"),
    ]
    pairs += [("merge of 6", "I=1"), ("I=2, eta 0.3", "I=2, eta 0.5")]
    for a, b in pairs:
        for j, kl in enumerate(KLS):
            value = bootstrap(reward[a][:, j] - reward[b][:, j])
            summary["contrasts"][f"KL {kl:g}: {a} - {b}"] = value
            print(f"{f'KL {kl:g}: {a} - {b}':48} {show(value)}")
    draw(everything)
    return summary


def draw(everything: list[dict]) -> None:
    control = "6x batch, LITI"
    names = [name for name in FRONTS if name != control][::-1]
    figure, columns = panels(3, sharey=True)
    for axes, kl in zip(columns, KLS):
        for row, name in enumerate(names):
            value = bootstrap([at(r[name], kl) - at(r[control], kl) for r in everything])
            axes.plot([value["low"], value["high"]], [row, row], color="0.5")
            axes.plot(value["mean"], row, "ko", ms=4)
        axes.axvline(0, color="black", lw=0.5)
        reached = sum(all(np.isfinite(at(r[name], kl)) for name in FRONTS) for r in everything)
        axes.set_title(f"KL {kl:g}, {reached} seeds or more")
        axes.set_yticks(range(len(names)), names)
        axes.locator_params(axis="x", nbins=4)
    minus = f"that of one run of a batch 6 times as large ({control})"
    figure.supxlabel(f"expected reward minus {minus}, 95% interval", fontsize="medium")
    save(figure, "iterations")


if __name__ == "__main__":
    main("iterations", __doc__, work, report, seeds=7)
