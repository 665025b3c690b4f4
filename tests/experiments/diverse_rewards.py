"""Should the runs of a merge follow different reward models, or all their mean? (exact world)

    python tests/experiments/diverse_rewards.py --seeds 8      resumes; about 100 s per seed
    python tests/experiments/diverse_rewards.py --report       table and figure from what is there

As in WARP over reward diversity (WARP, arXiv 2406.16768, appendix E), with one iteration. Each of 4
proxy rewards is truth + noise. The noises are of the truth's make (uncertainty.py), with its sd of
1 within a prompt under the start, uncorrelated with it, and drawn one by one. So a proxy's
correlation with the truth is .71.

Arms, each M runs of merging.py (200 steps of 4 samples, EMA anchor, lr 5e-5) merged by SLERP, for M
= 2 and 4:

- diverse: run m follows proxy m;
- mean: all follow the mean of the first M proxies (other prompts and samples for each run);
- one: all follow proxy 1;
- truth (M = 2 alone): all follow the truth.

All arms of an M take as many samples, and run m has the same random numbers in all. Fronts are by
LITI. Noise and runs were fixed before the first run; the etas were made denser where seed 100 gets
to KL 1.

Primary contrast: true reward at KL 1, diverse minus mean, M = 2. Beside it: at KL .5; M = 4; minus
one; one proxy against the mean of them; each arm's merge by every proxy (the mean of the M, and the
lowest of them); a diverse merge against the M runs it merges, by the truth, by the proxy that a
run followed, and by the other proxies.

Without training: the true reward of the policies that are best for one proxy, for the mean of 2
and of 4 and for the truth, pi_start exp(r / b) / Z.

Expected: no difference between diverse and mean. As far as weights move in proportion to rewards,
the mean of the runs' task vectors is that of a run on the mean.
"""

import copy

import numpy as np
import torch
from anchors import at
from exact_world import World, make_world, sequence_logprobs, train
from merging import RUN
from seeds import bootstrap, main, panels, save, show
from uncertainty import best_for, standardised

from minalign.merge import liti, merge_policies

KLS, COUNTS, PROXIES = (0.5, 1.0), (2, 4), 4
ETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
ARMS = {2: ("diverse", "mean", "one", "truth"), 4: ("diverse", "mean", "one")}
PAIRS = (("diverse", "mean"), ("diverse", "one"), ("mean", "one"), ("truth", "mean"))


def scene(seed: int) -> tuple[World, torch.Tensor]:
    """World, and its proxies (PROXIES, PROMPTS, N)."""
    world = make_world(seed)
    p = sequence_logprobs(world.start).exp()
    truth, proxies = standardised(world.rewards, p), []
    for k in range(1, PROXIES + 1):
        noise = standardised(make_world(1000 * k + seed).rewards, p)
        noise = noise - (p * noise * truth).sum(1, keepdim=True) * truth
        proxies.append(world.rewards + standardised(noise, p))
    return world, torch.stack(proxies)


@torch.no_grad()
def front(world: World, proxies: torch.Tensor, theta: dict[str, torch.Tensor]) -> list[dict]:
    """merging.front, with each proxy's expectation over that under the start, too."""
    policy, start = copy.deepcopy(world.start), sequence_logprobs(world.start)
    scores = torch.cat([world.rewards[None], proxies])  # (1 + PROXIES, PROMPTS, N)
    points = []
    for eta in (0.0, *ETAS):
        policy.load_state_dict(liti(world.start.state_dict(), theta, eta))
        logprobs = sequence_logprobs(policy)
        kl = (logprobs.exp() * (logprobs - start)).sum(1).mean().item()
        gained = ((logprobs.exp() - start.exp()) * scores).sum(2).mean(1).tolist()
        points.append({"eta": eta, "kl": kl, "reward": gained[0], "proxies": gained[1:]})
    return points


def work(seed: int) -> dict:
    world, proxies = scene(seed)
    start = world.start.state_dict()
    result = {"merges": {}, "runs": []}

    def run(m: int, observed: torch.Tensor) -> dict[str, torch.Tensor]:
        options = RUN | {"every": 10**6, "observed": observed}
        return train(world, seed=1000 * (seed + 1) + 10 * m, **options)[0].state_dict()

    diverse = [run(m, proxies[m]) for m in range(PROXIES)]
    one = [diverse[0]] + [run(m, proxies[0]) for m in range(1, PROXIES)]
    for count in COUNTS:
        mean = proxies[:count].mean(0)
        thetas = {"diverse": diverse[:count], "one": one[:count]}
        thetas["mean"] = [run(m, mean) for m in range(count)]
        if "truth" in ARMS[count]:
            thetas["truth"] = [run(m, world.rewards) for m in range(count)]
        for arm in ARMS[count]:
            merged, report = merge_policies(start, thetas[arm])
            angles = [group["angle"] for group in report.values()]
            points = front(world, proxies, merged)
            result["merges"][f"{arm} {count}"] = {"front": points, "angle": np.median(angles)}
    result["runs"] = [front(world, proxies, theta) for theta in diverse]

    logprobs = sequence_logprobs(world.start).detach()
    scores = {"one": proxies[0], "truth": world.rewards}
    scores |= {f"mean {count}": proxies[:count].mean(0) for count in COUNTS}
    level = {name: (logprobs.exp() * score).sum(1, keepdim=True) for name, score in scores.items()}
    ideal = {name: best_for(score - level[name], world, logprobs) for name, score in scores.items()}
    result["ideal"] = {name: {f"{kl:g}": best[kl] for kl in KLS} for name, best in ideal.items()}
    return result


def by(points: list[dict], judges: list[int]) -> list[dict[str, float]]:
    """The front with the mean of some proxies in place of the true reward."""
    proxies = [np.mean([point["proxies"][judge] for judge in judges]) for point in points]
    return [{"kl": point["kl"], "reward": r} for point, r in zip(points, proxies)]


def report(results: dict[int, dict]) -> dict:
    seeds, summary = list(results.values()), {"rewards": {}, "contrasts": {}, "ideal": {}}
    nan = float("nan")

    def add(part: str, name: str, values: list[float]) -> None:
        summary[part][name] = bootstrap([nan if value is None else value for value in values])
        print(f"{name:72} {show(summary[part][name])}")

    for kl in KLS:
        for count in COUNTS:
            here, all_judges = f"KL {kl:g}, M = {count}", list(range(count))
            fronts = {
                arm: [seed["merges"][f"{arm} {count}"]["front"] for seed in seeds]
                for arm in ARMS[count]
            }
            judged = {arm: {} for arm in ARMS[count]}  # arm -> judge -> a value for each seed
            for arm, points in fronts.items():
                proxies = [[at(by(f, [judge]), kl) for judge in all_judges] for f in points]
                judged[arm]["truth"] = np.array([at(f, kl) for f in points])
                judged[arm]["mean of the proxies"] = np.mean(proxies, 1)
                judged[arm]["lowest proxy"] = np.min(proxies, 1)  # NaN stays
                for judge, values in judged[arm].items():
                    add("rewards", f"{here}: {arm}, by {judge}", values)
            for one, other in PAIRS:
                for judge in judged[one] if one in judged else ():
                    difference = judged[one][judge] - judged[other][judge]
                    add("contrasts", f"{here}: {one} - {other}, by {judge}", difference)
            gains = {"truth": [], "the proxy that the run followed": [], "the other proxies": []}
            for seed, merged in zip(seeds, fronts["diverse"]):
                rows = []
                for m, run in enumerate(seed["runs"][:count]):
                    others = [judge for judge in all_judges if judge != m]
                    rows.append([at(merged, kl) - at(run, kl)])
                    for judges in ([m], others):
                        rows[m].append(at(by(merged, judges), kl) - at(by(run, judges), kl))
                for judge, value in zip(gains, np.mean(rows, 0)):
                    gains[judge].append(value)
            for judge, values in gains.items():
                add("contrasts", f"{here}: diverse - one of its runs, by {judge}", values)
        for name in seeds[0]["ideal"]:
            values = [seed["ideal"][name][f"{kl:g}"] for seed in seeds]
            add("ideal", f"KL {kl:g}: best policy for {name}, by truth", values)
    for name in seeds[0]["merges"]:
        angles = [seed["merges"][name]["angle"] for seed in seeds]
        add("rewards", f"angle between runs, degrees: {name}", angles)
    draw(summary)
    return summary


def draw(summary: dict) -> None:
    figure, (left, right) = panels(2)
    looks = {"diverse": ("o", "black"), "mean": ("s", "tab:blue"), "one": ("^", "0.5")}
    looks["truth"] = ("*", "tab:green")
    for arm, (marker, color) in looks.items():
        for place, count in enumerate(COUNTS):
            cell = summary["rewards"].get(f"KL 1, M = {count}: {arm}, by truth")
            if cell is not None:
                where = place + 0.12 * (list(looks).index(arm) - 1.5)
                left.plot([where] * 2, [cell["low"], cell["high"]], color=color, lw=0.8)
                label = None if place else arm
                left.plot(where, cell["mean"], marker, color=color, ls="none", label=label)
    left.set(xticks=range(len(COUNTS)), xticklabels=[f"M = {count}" for count in COUNTS])
    left.set(ylabel="true reward at KL 1", xlim=(-0.5, 1.8))
    left.legend(title="all runs follow", title_fontsize=7)
    judges = ("truth", "mean of the proxies", "lowest proxy")
    for j, count in enumerate(COUNTS):
        for i, judge in enumerate(judges):
            cell = summary["contrasts"][f"KL 1, M = {count}: diverse - mean, by {judge}"]
            where, color = i + 0.15 * (2 * j - 1), ("black", "tab:blue")[j]
            right.plot([where] * 2, [cell["low"], cell["high"]], color=color, lw=0.8)
            label = None if i else f"M = {count}"
            right.plot(where, cell["mean"], "os"[j], color=color, ls="none", label=label)
    right.axhline(0, color="grey", lw=0.8)
    right.set(xticks=range(3), xticklabels=[judge.replace(" of", "\nof") for judge in judges])
    right.set(ylabel="diverse minus mean, at KL 1", xlabel="judged by", xlim=(-0.5, 2.5))
    right.legend(loc="best")
    save(figure, "diverse_rewards")


if __name__ == "__main__":
    main("diverse_rewards", __doc__, work, report, seeds=8)
