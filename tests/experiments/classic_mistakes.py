"""What do two classic mistakes cost: token-mean log-probs, and a temperature in the sampling alone? (exact world)

    python tests/experiments/classic_mistakes.py --seeds 5        resumes; about 40 s a seed on one core
    python tests/experiments/classic_mistakes.py --report         table and figure from what is there

Arms, each 80 steps of 8 samples, anchor the start, beta .3, the same random numbers: the sum of the tokens' log-probs (right);
their mean over each completion, which weights a completion by 1 / length; both without a baseline and with 3 added to, or taken
from, all rewards, which changes nothing in the right objective; and samples of temperature .7 or 1.4 whose log-probs are taken
at 1. A mean is multiplied by the start's expected length, so that only the weighting differs.

Primary contrasts, each minus the right arm: E[r] - beta KL where training ends (mean of the last 3 measurements), and, for the
means, expected length there; an arm with an offset is compared with the right one of that offset. Also: expected reward at KL .5
and 1; cosine of the expected gradient to the exact one at the start policy; and for the temperatures the KL that training
reports, the samples' mean of log pi - log start, minus the true KL.
"""

import copy

import numpy as np
import torch
from exact_world import MASK, World, make_world, reward_at, sequence_logprobs, train, truth
from seeds import RESULTS, bootstrap, main, show

KLS, STEPS, BATCH, LR, BETA = (0.5, 1.0), 80, 8, 5e-5, 0.3
LENGTHS = MASK.sum(1)
ARMS = {  # name -> offset of the rewards, baseline, whether the mean of the tokens, sampling temperature
    "sum": (0.0, "moving", False, 1.0),
    "mean": (0.0, "moving", True, 1.0),
    "sum, no baseline, +3": (3.0, "none", False, 1.0),
    "mean, no baseline, +3": (3.0, "none", True, 1.0),
    "sum, no baseline, -3": (-3.0, "none", False, 1.0),
    "mean, no baseline, -3": (-3.0, "none", True, 1.0),
    "sampling at 0.7": (0.0, "moving", False, 0.7),
    "sampling at 1.4": (0.0, "moving", False, 1.4),
}


def right_arm(name: str) -> str:
    return "sum" + name[name.index(",") :] if "," in name else "sum"


def expected_cosine(world: World, baseline: str, mean: bool, temperature: float) -> float:
    """Cosine of an arm's expected gradient (first step, a baseline at its mean) to that of E[r] - beta KL, at the start."""
    policy = copy.deepcopy(world.start).requires_grad_(True)
    logprobs = sequence_logprobs(policy)
    sampled = sequence_logprobs(world.start, temperature).exp()

    def gradient(objective: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    level = (sampled * world.rewards).sum(1).mean() if baseline == "moving" else 0.0
    weights = sampled * (world.rewards - level) / (LENGTHS if mean else 1)  # KL is 0 here, and so is its gradient
    wrong, right = gradient((weights * logprobs).sum()), gradient((logprobs.exp() * world.rewards).sum())
    return torch.nn.functional.cosine_similarity(wrong, right, dim=0).item()


def work(seed: int) -> dict:
    result = {"curves": {}, "cosine": {}, "reported": {}}
    for name, (offset, baseline, mean, temperature) in ARMS.items():
        world = make_world(seed, offset=offset)
        usual = truth(world, world.start)["length"]
        policy, curve = train(
            world, seed=seed, steps=STEPS, batch_size=BATCH, lr=LR, beta=BETA, every=10, baseline=baseline,
            sampling_temperature=temperature,
            reweight=(lambda advantages, place: advantages * usual / LENGTHS[place[1]]) if mean else None,
        )  # fmt: skip
        result["curves"][name] = curve
        result["cosine"][name] = expected_cosine(world, baseline, mean, temperature)
        with torch.no_grad():
            ratio = sequence_logprobs(policy) - sequence_logprobs(world.start)
            reported = (sequence_logprobs(policy, temperature).exp() * ratio).sum(1).mean().item()
        result["reported"][name] = reported - curve[-1]["kl"]
    return result


def report(results: dict[int, dict]) -> dict:
    ends = {  # arm -> (seeds, 3): reward, KL, length
        name: np.array([[np.mean([point[key] for point in result["curves"][name][-3:]]) for key in ("reward", "kl", "length")] for result in results.values()])
        for name in ARMS
    }  # fmt: skip
    objectives = {name: values @ [1, -BETA, 0] for name, values in ends.items()}
    summary = {
        "start length": bootstrap([r["curves"]["sum"][0]["length"] for r in results.values()]),
        "ends": {},
        "contrasts": {},
    }
    print(f"length of the start's completions {show(summary['start length'])}; where training ends:")
    for name in ARMS:
        cells = {key: bootstrap(ends[name][:, i]) for i, key in enumerate(("reward", "kl", "length"))}
        cells["objective"] = bootstrap(objectives[name])
        cells["cosine at the start"] = bootstrap([result["cosine"][name] for result in results.values()])
        cells["reported KL - KL"] = bootstrap([result["reported"][name] for result in results.values()])
        summary["ends"][name] = cells
        print(f"{name:22}" + "  ".join(f"{key} {cell['mean']:.2f}" for key, cell in cells.items()))
    for name in ARMS:
        if (right := right_arm(name)) != name:
            differences = {"objective at the end": objectives[name] - objectives[right], "length at the end": ends[name][:, 2] - ends[right][:, 2]}  # fmt: skip
            for kl in KLS:
                at = [[reward_at(result["curves"][arm], kl) for result in results.values()] for arm in (name, right)]
                differences[f"reward at KL {kl:g}"] = np.array(at[0]) - np.array(at[1])
            for key, difference in differences.items():
                summary["contrasts"][f"{key}: {name} - {right}"] = bootstrap(difference)
                print(f"{f'{key}: {name} - {right}':72} {show(bootstrap(difference))}")
    for name in ("sampling at 0.7", "sampling at 1.4"):
        print(f"reported KL - KL: {name:53}  {show(summary['ends'][name]['reported KL - KL'])}")
    draw(results, summary)
    return summary


def draw(results: dict[int, dict], summary: dict) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
    labels = {
        "sum": "sum",
        "mean": "mean",
        "mean, no baseline, +3": "mean, rewards + 3",
        "mean, no baseline, -3": "mean, rewards - 3",
    }
    for (name, label), line in zip(labels.items(), ("-", "--", ":", "-.")):
        lengths = np.array([[point["length"] for point in result["curves"][name]] for result in results.values()])
        steps = [point["step"] for point in results[next(iter(results))]["curves"][name]]
        low, high = np.transpose([[bootstrap(column)[key] for key in ("low", "high")] for column in lengths.T])
        left.plot(steps, lengths.mean(0), line, color="black", lw=1.2)
        left.fill_between(steps, low, high, color="black", alpha=0.08, lw=0)
        left.annotate(
            label,
            (steps[-1], lengths.mean(0)[-1]),
            (4, {"sum": 5, "mean": -5}.get(name, 0)),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    left.set(xlabel="steps", ylabel="expected length, tokens", xlim=(0, 1.45 * STEPS), xticks=range(0, STEPS + 1, 20))
    names = [name for name in ARMS if right_arm(name) != name]
    for row, name in enumerate(names):
        cell = summary["contrasts"][f"objective at the end: {name} - {right_arm(name)}"]
        right.plot([cell["low"], cell["high"]], [row, row], color="black", lw=1)
        right.plot(cell["mean"], row, "o", color="black", markersize=4)
    right.axvline(0, color="grey", lw=0.8)
    right.set(yticks=range(len(names)), yticklabels=[name.replace(", no", ",\nno") for name in names])
    right.set(xlabel=f"E[r] - {BETA:g} KL at the end,\nminus that of the right arm")
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "classic_mistakes.png", dpi=100)


if __name__ == "__main__":
    main("classic_mistakes", __doc__, work, report, seeds=5)
