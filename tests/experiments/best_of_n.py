"""The best of n samples, one run, or WARP: reward at equal KL and at equal samples. (exact world)

    python tests/experiments/best_of_n.py --seeds 8        resumes; about 25 s per seed on one core
    python tests/experiments/best_of_n.py --report         table and figure from what is there

The best of n is chosen by the true reward, and its law is exact, so are its reward and its KL. The
others have 1,800 samples each, as in iterations.py, with the EMA anchor and beta .3:

- one run of 75 steps of 24: its training curve, and LITI from its end;
- WARP, I = 3, M = 2, 75 steps of 4 each, eta .5: LITI from its last merge.

Primary contrast: expected reward at KL 1, WARP minus the best of n (also at KL .5, 2, 3, for the
run, and for the best policy that there is at that KL). At equal samples: the smallest n whose
reward is that of the run's last policy, and after how many answers the run has cost less than the
best of that n, 1,800 / (n - 1).
"""

import copy

import numpy as np
import torch
from anchors import at
from exact_world import World, make_world, optimal_front, sequence_logprobs, train
from iterations import ITERATIONS, LR, MATCHED, MU, RUN, STEPS, M
from merging import front
from seeds import bootstrap, main, panels, save, show

from minalign.measuring.measures import best_of_n_kl
from minalign.merge import liti, merge_policies

KLS, N, SAMPLES = (0.5, 1.0, 2.0, 3.0), range(1, 513), MATCHED * STEPS * 4
FRONTS = ("best of n", "one run, curve", "one run, LITI", "WARP", "best policy")


def best_of_law(start: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """P(y is the best of n samples of the start policy): exact.

        P(y) (F(r(y))^n - F(r(y)-)^n) / (F(r(y)) - F(r(y)-)),  F(r) = P(reward <= r)

    Completions of equal reward share what they win in proportion to P(y).

    Args:
        start: (PROMPTS, N) probabilities.
        rewards: (PROMPTS, N).
    """
    ordered, order = rewards.sort(1)
    cumulative = torch.nn.functional.pad(start.gather(1, order).cumsum(1), (1, 0))
    below = cumulative.gather(1, torch.searchsorted(ordered, rewards))
    upto = cumulative.gather(1, torch.searchsorted(ordered, rewards, right=True))
    return start * (upto**n - below**n) / (upto - below)


@torch.no_grad()
def best_of_front(world: World) -> list[dict[str, float]]:
    start = sequence_logprobs(world.start).exp()
    points = []
    for n in N:
        p = best_of_law(start, world.rewards.double(), n)
        kl = torch.where(p > 0, p * (p / start).log(), 0.0).sum(1).mean().item()
        reward = ((p - start) * world.rewards).sum(1).mean().item()
        points.append({"n": n, "kl": kl, "reward": reward})
    return points


def work(seed: int) -> dict:
    world = make_world(seed)
    theta_sft = world.start.state_dict()
    streams = iter(range(1000 * (seed + 1), 1000 * (seed + 2), 10))
    common = dict(steps=STEPS, lr=LR, mu=MU, **RUN)
    theta_init = theta_sft
    for _ in range(ITERATIONS):
        init = copy.deepcopy(world.start)
        init.load_state_dict(theta_init)
        options = dict(batch_size=4, init=init, every=STEPS, **common)
        thetas = [train(world, seed=next(streams), **options)[0].state_dict() for _ in range(M)]
        theta_slerp, _ = merge_policies(theta_init, thetas)
        theta_init = liti(theta_init, theta_slerp, 0.5)
    one = dict(batch_size=4 * MATCHED, every=5, **common)
    policy, curve = train(world, seed=next(streams), **one)
    best = [{"kl": kl, "reward": reward} for kl, reward in zip(*optimal_front(world))]
    return {
        "best of n": best_of_front(world),
        "one run, curve": curve,
        "one run, LITI": front(world, policy.state_dict()),
        "WARP": front(world, theta_slerp),
        "best policy": best,
    }


def report(results: dict[int, dict]) -> dict:
    everything = list(results.values())
    reward = {f: np.array([[at(r[f], kl) for kl in KLS] for r in everything]) for f in FRONTS}
    summary = {"rewards": {}, "contrasts": {}, "exact KL": {}, "equal samples": {}}
    for name in FRONTS:
        cells = {f"KL {kl:g}": bootstrap(column) for kl, column in zip(KLS, reward[name].T)}
        ends = {"kl": [r[name][-1]["kl"] for r in everything]}
        ends["reward"] = [r[name][-1]["reward"] for r in everything]
        cells |= {f"end {key}": bootstrap(values) for key, values in ends.items()}
        summary["rewards"][name] = cells
        shown = (f"{key} {cell['mean']:.3f} ({cell['seeds']})" for key, cell in cells.items())
        print(f"{name:16}" + "   ".join(shown))
    for name in FRONTS[1:]:
        for j, kl in enumerate(KLS):
            difference = bootstrap(reward[name][:, j] - reward["best of n"][:, j])
            summary["contrasts"][f"KL {kl:g}: {name} - best of n"] = difference
            print(f"{f'KL {kl:g}: {name} - best of n':42} {show(difference)}")
    for n in (2, 4, 16, 64):
        summary["exact KL"][f"n {n}"] = bootstrap([r["best of n"][n - 1]["kl"] for r in everything])
        print(f"best of {n}: KL {show(summary['exact KL'][f'n {n}'])}, bound {best_of_n_kl(n):.3f}")
    ns = []
    for r in everything:
        end = r["one run, curve"][-1]["reward"]
        ns.append(next((p["n"] for p in r["best of n"] if p["reward"] >= end), np.nan))
    summary["equal samples"]["n as good as the run's end"] = bootstrap(ns)
    answers = [SAMPLES / (n - 1) for n in ns if n > 1]
    summary["equal samples"]["answers until the run is cheaper"] = bootstrap(answers)
    for name, value in summary["equal samples"].items():
        print(f"{name:36} {show(value)}")
    draw(everything)
    return summary


def draw(everything: list[dict]) -> None:
    figure, axes = panels(1)
    kls = np.arange(0.1, 4.01, 0.1)
    colours = ("black", "tab:orange", "tab:orange", "tab:blue", "0.6")
    for name, colour, line in zip(FRONTS, colours, (":", "--", "-", "-", "-")):
        values = np.array([[at(r[name], kl) for kl in kls] for r in everything])
        all_there = np.isfinite(values).all(0)  # a mean of fewer seeds is of other worlds
        axes.plot(kls[all_there], values[:, all_there].mean(0), line, color=colour, label=name)
    axes.set(xlabel="KL to the start, nats", ylabel="expected reward over the start's")
    axes.legend(loc="lower right")
    save(figure, "best_of_n")


if __name__ == "__main__":
    main("best_of_n", __doc__, work, report, seeds=8)
