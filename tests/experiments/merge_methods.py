"""RAM, SLERP or LERP, for 2 to 5 runs, also where few weights move? (exact world)

    python tests/experiments/merge_methods.py --seeds 8      resumes; about 120 s per seed
    python tests/experiments/merge_methods.py --report       table and figure from what is there

RAM (minalign.merge.ram) takes of each weight the mean over the runs that moved it by more than
1e-5. What one run alone moved is kept whole. Where all runs moved everything, RAM is LERP.

From one start come 5 runs of merging.py (200 steps of 4 samples, EMA anchor, other prompts and
samples), once at its learning rate of 5e-5, and once at 1e-6. Arms, at each of the two, for the
first 2, 3, 4 and 5 runs:

- SLERP, one angle per layer;
- LERP;
- RAM at its threshold of 1e-5;
- "ram, half": RAM at the threshold that half of all weights of the 5 runs pass.

Fronts are by LITI. The points of all fronts of M runs lie at the same norms of the merged task
vector. At 1e-6 a whole run is worth about .01 nats, so that its fronts extrapolate to 30 times the
merge. All etas were chosen on seed 100, and so was the number of steps at 1e-6: of 200 and 800
steps of 4, and 400 of 32 and of 128, 200 of 4 move the fewest weights (77%; 93% and more in the
others).

Primary contrast: expected reward at KL .5, RAM minus SLERP, both of 2 runs, at each learning rate.
Beside it: the same for 3, 4, 5 runs and at KL 1; RAM minus LERP; LERP minus SLERP; "ram, half"
minus SLERP; each merge minus the mean of the runs that it merges; reward and KL of each merge
itself (eta 1); the share of weights moved, overlap, agreement of signs, and angles, all at 1e-5.

Expected: nothing at 5e-5, where 99% of the weights move.
"""

import numpy as np
import torch
from anchors import at
from exact_world import make_world, train
from merging import RUN, front, norm
from seeds import bootstrap, main, panels, save, show

from minalign.merge import merge_policies
from minalign.tools.task_vectors import with_moves

KLS, COUNTS, THRESHOLD = (0.5, 1.0), (2, 3, 4, 5), 1e-5
# of each learning rate, for SLERP: those of the others give merges of the same norm
ETAS = {
    "5e-5": (0.15, 0.25, 0.35, 0.5, 0.65, 0.85, 1.1),
    "1e-6": (2.0, 5.0, 8.0, 11.0, 15.0, 20.0, 30.0),
}
METHODS = ("slerp", "lerp", "ram", "ram, half")
PAIRS = (("ram", "slerp"), ("ram", "lerp"), ("lerp", "slerp"), ("ram, half", "slerp"))
MOVES = ("overlap", "sign_agreement", "angle")


def median_move(start: dict[str, torch.Tensor], thetas: list[dict[str, torch.Tensor]]) -> float:
    """The median |d| over all weights of all runs."""
    moves = [(theta[name] - start[name]).abs().flatten() for theta in thetas for name in start]
    return torch.cat(moves).median().item()


def work(seed: int) -> dict:
    world, result = make_world(seed), {}
    start = world.start.state_dict()
    for lr, etas in ETAS.items():
        thetas, cells = [], {"runs": [], "merges": {}, "moves": {}}
        for m in range(5):
            options = RUN | {"lr": float(lr), "every": 10**6}
            policy, _ = train(world, seed=1000 * (seed + 1) + 10 * m, **options)
            thetas.append(policy.state_dict())
            cells["runs"].append(front(world, thetas[m], etas))
        cells["median move"] = median_move(start, thetas)
        for count in COUNTS:
            some = thetas[:count]
            _, slerped = merge_policies(start, some)
            total = with_moves(slerped, start, some, "layer", THRESHOLD)["total"]
            cells["moves"][f"{count}"] = {name: total[name] for name in (*MOVES, "moved", "norms")}
            for method in METHODS:
                threshold = cells["median move"] if method == "ram, half" else THRESHOLD
                how = {"method": method.split(",")[0], "ram_threshold": threshold}
                merged, report = merge_policies(start, some, **how)
                ratio = norm(slerped) / norm(report)
                here = tuple(sorted({1.0, *(eta * ratio for eta in etas)}))
                points = front(world, merged, here)
                cells["merges"][f"{method} {count}"] = {"norm": norm(report), "front": points}
        result[lr] = cells
    return result


def report(results: dict[int, dict]) -> dict:
    seeds, summary = list(results.values()), {"contrasts": {}, "eta 1": {}, "moves": {}}

    def add(part: str, name: str, values: list[float]) -> None:
        summary[part][name] = bootstrap(values)
        print(f"{name:66} {show(summary[part][name])}")

    for lr in ETAS:
        cells = [seed[lr] for seed in seeds]

        def fronts(name: str, kl: float, cells=cells) -> np.ndarray:
            return np.array([at(cell["merges"][name]["front"], kl) for cell in cells])

        for kl in KLS:
            for count in COUNTS:
                here = f"lr {lr}, KL {kl:g}, M = {count}"
                for one, other in PAIRS:
                    difference = fronts(f"{one} {count}", kl) - fronts(f"{other} {count}", kl)
                    add("contrasts", f"{here}: {one} - {other}", difference)
                runs = [np.mean([at(run, kl) for run in cell["runs"][:count]]) for cell in cells]
                for method in METHODS:
                    gain = fronts(f"{method} {count}", kl) - np.array(runs)
                    add("contrasts", f"{here}: {method} - one of these runs", gain)
        for count in COUNTS:
            for method in METHODS:
                merges = [cell["merges"][f"{method} {count}"] for cell in cells]
                ends = [next(p for p in merge["front"] if p["eta"] == 1) for merge in merges]
                for key in ("reward", "kl"):
                    add("eta 1", f"lr {lr}, M = {count}: {method}, {key}", [p[key] for p in ends])
            moves = [cell["moves"][f"{count}"] for cell in cells]
            for name in MOVES:  # a share of nothing is None
                values = [np.nan if move[name] is None else move[name] for move in moves]
                add("moves", f"lr {lr}, M = {count}: {name}", values)
        moved = [np.mean(cell["moves"]["5"]["moved"]) for cell in cells]
        add("moves", f"lr {lr}: share of weights moved", moved)
        norms = [np.mean(cell["moves"]["5"]["norms"]) for cell in cells]
        add("moves", f"lr {lr}: norm of a task vector", norms)
        # in units of the threshold: the median itself has too many zeros to show
        medians = [cell["median move"] / THRESHOLD for cell in cells]
        add("moves", f"lr {lr}: median move over 1e-5", medians)
    draw(summary["contrasts"])
    return summary


def draw(contrasts: dict[str, dict]) -> None:
    figure, axes = panels(2, sharey=True)
    looks = (("slerp", "o-", "black"), ("lerp", "s--", "0.5"), ("ram", "^-", "tab:blue"))
    looks += (("ram, half", "v:", "tab:orange"),)
    for i, (axis, lr) in enumerate(zip(axes, ETAS)):
        for j, (method, look, color) in enumerate(looks):
            names = [f"lr {lr}, KL 0.5, M = {m}: {method} - one of these runs" for m in COUNTS]
            mean, low, high = np.array(
                [[contrasts[name][key] for name in names] for key in ("mean", "low", "high")],
                dtype=float,
            )
            label = method.upper() if "," not in method else "RAM, half of the weights"
            places = np.array(COUNTS) + 0.08 * (j - 1.5)
            around = np.maximum((mean - low, high - mean), 0)  # rounding
            axis.errorbar(places, mean, around, fmt=look, color=color, elinewidth=0.6, label=label)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(title=f"learning rate {lr}", xlabel="runs merged", xticks=COUNTS)
        if not i:
            axis.set(ylabel="reward at KL .5, minus one of these runs")
    axes[1].legend(loc="best")
    save(figure, "merge_methods")


if __name__ == "__main__":
    main("merge_methods", __doc__, work, report, seeds=8)
