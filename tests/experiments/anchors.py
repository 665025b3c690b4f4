"""Is the front of an EMA anchor above that of a fixed one? (exact world)

And is the EMA anchor only a beta that falls?

    python tests/experiments/anchors.py --seeds 8        resumes; about 80 s per seed on one core
    python tests/experiments/anchors.py --report         table and figure from what is there

Arms, each one run of 240 steps of 8 samples, on the same world and the same random numbers of a
seed:

- a fixed anchor with 4 betas;
- an EMA anchor (mu .05) with 4 betas;
- a fixed anchor whose beta falls as beta / (1 + mu t), with 3 of the EMA's betas. That law is exact
  where every step solves its inner problem. So it should hold the better, the larger beta is.

Primary contrast: expected reward, EMA minus fixed, at KL 1 of the training curves; also at KL .5, 2
and 3. The beta of each kind is the best one of the odd seeds for the even ones and the reverse,
among those that reach the KL on all those seeds.

In the first results reward at a KL rose with beta for both kinds, as far as a beta got there at all
in 240 steps. Added after them: how many steps (of 8 samples) each arm takes to a KL, and the EMA's
reward there minus that of a fixed anchor of the beta that takes as many steps (linear between the
betas of the same seed). KL 2 and 3 are reached by too few to say much.
"""

from collections.abc import Callable

import numpy as np
from exact_world import make_world, optimal_front, reward_at, train
from seeds import bootstrap, main, panels, save, show

KLS = (0.5, 1.0, 2.0, 3.0)
STEPS, EVERY, MU = 240, 20, 0.05
FIXED, EMA, FALLING = (0.0, 0.1, 0.2, 0.4), (0.3, 1.0, 3.0, 10.0), (1.0, 3.0, 10.0)
BETAS = {"fixed": FIXED, "ema": EMA, "falling": FALLING}
ARMS = [f"{kind} {beta:g}" for kind, betas in BETAS.items() for beta in betas]


def falling(beta: float) -> Callable[[int], float]:
    """beta / (1 + mu t) of the step, t = step - 1."""
    return lambda step: beta / (1 + MU * (step - 1))


def work(seed: int) -> dict:
    world = make_world(seed)
    result = {"optimal": [values.tolist() for values in optimal_front(world)]}
    common = dict(seed=1000 * (seed + 1), steps=STEPS, batch_size=8, lr=3e-5, mu=MU, every=EVERY)
    for arm in ARMS:
        kind, beta = arm.split()[0], float(arm.split()[1])
        strength = falling(beta) if kind == "falling" else beta
        anchor = "ema" if kind == "ema" else "fixed"
        _, result[arm] = train(world, beta=strength, anchor=anchor, **common)
    return result


def at(curve: list[dict], kl: float) -> float:
    """Reward at this KL.

    Between points reward is nearly linear in the root of the KL, not in the KL.
    """
    roots = [{"kl": max(0.0, point["kl"]) ** 0.5, "reward": point["reward"]} for point in curve]
    return reward_at(roots, kl**0.5)


def steps_to(curve: list[dict], kl: float) -> float:
    """Steps after which the curve first crosses this KL."""
    return reward_at([{"kl": point["kl"], "reward": point["step"]} for point in curve], kl)


def against_fixed_of_equal_steps(result: dict, arm: str, kl: float) -> float:
    """Reward of `arm` at this KL minus that of the fixed anchor that takes as many steps to it.

    NaN outside the fixed anchors' range of steps.
    """
    curves = [result[f"fixed {beta:g}"] for beta in FIXED]
    fixed = [(steps_to(curve, kl), at(curve, kl)) for curve in curves]
    steps, rewards = zip(*sorted(point for point in fixed if np.isfinite(point[0])))
    taken = steps_to(result[arm], kl)
    return at(result[arm], kl) - np.interp(taken, steps, rewards, left=np.nan, right=np.nan)


def best_of_other_half(results: dict[int, dict], kind: str, kl: float) -> np.ndarray:
    """Reward at this KL of each seed, with the best beta of the seeds of the other parity."""
    names = [arm for arm in ARMS if arm.startswith(kind)]
    # (seeds, betas)
    table = np.array([[at(result[name], kl) for name in names] for result in results.values()])
    odd = np.array(list(results)) % 2 == 1
    values = np.full(len(results), np.nan)
    for half in (odd, ~odd):
        means = table[~half].mean(0)  # NaN where a seed does not get there
        if half.any() and np.isfinite(means).any():
            values[half] = table[half, np.nanargmax(means)]
    return values


def report(results: dict[int, dict]) -> dict:
    print(f"expected reward at each KL (seeds that reach it), {len(results)} seeds")
    print(f"{'':14}" + "".join(f"{k:>12g}" for k in KLS))
    optimal = {kl: np.array([np.interp(kl, *r["optimal"]) for r in results.values()]) for kl in KLS}
    print(f"{'optimal':14}" + "".join(f"{optimal[kl].mean():8.3f} ({len(results)})" for kl in KLS))
    summary = {"rewards": {}, "contrasts": {}}
    for arm in ARMS:
        values = [bootstrap([at(r[arm], kl) for r in results.values()]) for kl in KLS]
        summary["rewards"][arm] = dict(zip(map(str, KLS), values))
        print(f"{arm:14}" + "".join(f"{v['mean']:8.3f} ({v['seeds']})" for v in values))

    contrasts = {}
    for kl in KLS:
        ema, fixed = (best_of_other_half(results, kind, kl) for kind in ("ema", "fixed"))
        contrasts[f"KL {kl:g}: EMA - fixed, each with the other half's best beta"] = ema - fixed
        contrasts[f"KL {kl:g}: optimal - EMA"] = optimal[kl] - ema
        contrasts[f"KL {kl:g}: optimal - fixed"] = optimal[kl] - fixed
    for beta in FALLING:
        pairs = [(r[f"ema {beta:g}"], r[f"falling {beta:g}"]) for r in results.values()]
        for step in (60, 120, STEPS):
            i, name = step // EVERY, f"beta {beta:g}, step {step}: KL"
            contrasts[f"{name}, EMA - falling"] = [a[i]["kl"] - b[i]["kl"] for a, b in pairs]
            contrasts[f"{name}, EMA / falling"] = [a[i]["kl"] / b[i]["kl"] for a, b in pairs]
        differences = [a[-1]["reward"] - b[-1]["reward"] for a, b in pairs]
        contrasts[f"beta {beta:g}, step {STEPS}: reward, EMA - falling"] = differences
        for kl in KLS:
            differences = [at(a, kl) - at(b, kl) for a, b in pairs]
            contrasts[f"beta {beta:g}, KL {kl:g}: reward, EMA - falling"] = differences
    for kl in KLS[:2]:
        for arm in ("ema 0.3", "ema 1", "ema 3"):
            values = [against_fixed_of_equal_steps(r, arm, kl) for r in results.values()]
            contrasts[f"KL {kl:g}: {arm} - fixed of as many steps"] = values
    for name, values in contrasts.items():
        summary["contrasts"][name] = bootstrap(values)
        print(f"{name:62} {show(summary['contrasts'][name])}")
    draw(results)
    return summary


def draw(results: dict[int, dict]) -> None:
    from minalign.tools.figures import BLUE, ORANGE

    figure, (left, right) = panels(2)
    arms = [arm for arm in ARMS[: len(FIXED) + len(EMA)] if arm != "ema 10"]
    looks = {"fixed": dict(color=ORANGE, ls="--", mfc="white"), "ema": dict(color=BLUE)}
    for kl, mark in ((0.5, "o"), (1.0, "s")):
        curves = [[r[arm] for arm in arms] for r in results.values()]
        points = [[(steps_to(curve, kl), at(curve, kl)) for curve in row] for row in curves]
        points = np.array(points)  # (seeds, arms, 2)
        reached = np.isfinite(points).all((1, 2))  # in every arm
        points = points[reached]
        for kind, look in looks.items():
            of_kind = [i for i, arm in enumerate(arms) if arm.startswith(kind)]
            steps, reward = points.mean(0)[of_kind].T
            left.plot(steps, reward, marker=mark, **look)
            beta, above = arms[of_kind[-1]].split()[1], kind == "fixed"
            offset = dict(xytext=(0, 5 if above else -12), textcoords="offset points")
            text = dict(color=look["color"], ha="center")
            left.annotate(f"beta {beta}", (steps[-1], reward[-1]), **offset, **text)
        there = [r for r, reaches in zip(results.values(), reached) if reaches]
        optimal = np.mean([np.interp(kl, *r["optimal"]) for r in there])
        label = f"KL {kl:g}, {len(points)} seeds\n(optimum {optimal:.2f})"
        left.text(190, reward[-1] + 0.06, label, ha="right")
    left.set(xlabel="steps taken to this KL", ylabel="expected reward at this KL")
    left.set(xlim=(20, 190), ylim=(0.4, 1.15))
    left.text(25, 1.11, "EMA anchor", color=BLUE)
    left.text(25, 1.06, "fixed anchor", color=ORANGE)
    for beta in FALLING:
        for kind, colour, style in (("ema", BLUE, "-"), ("falling", ORANGE, "--")):
            curves = [r[f"{kind} {beta:g}"] for r in results.values()]
            steps = [point["step"] for point in curves[0]]
            values = [bootstrap([curve[i]["kl"] for curve in curves]) for i in range(len(steps))]
            mean, low, high = ([v[key] for v in values] for key in ("mean", "low", "high"))
            right.plot(steps, mean, style, color=colour)
            right.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        right.text(STEPS + 4, values[-1]["mean"], f"beta {beta:g}", va="center")
    top = dict(transform=right.transAxes, va="top")
    right.text(0.05, 0.97, "EMA anchor", color=BLUE, **top)
    right.text(0.05, 0.91, "fixed anchor, beta / (1 + mu t)", color=ORANGE, **top)
    right.set(xlabel="steps", ylabel="KL to the start, nats", xlim=(0, STEPS), ylim=(0, None))
    save(figure, "anchors")


if __name__ == "__main__":
    main("anchors", __doc__, work, report, seeds=8)
