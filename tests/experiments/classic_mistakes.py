"""What do two classic mistakes cost? (exact world)

The mistakes are token-mean log-probs, and a temperature in the sampling alone.

    python tests/experiments/classic_mistakes.py --seeds 5   resumes; about 40 s per seed on a core
    python tests/experiments/classic_mistakes.py --report    table and figure from what is there

Arms, each 80 steps of 8 samples, anchor the start, beta .3, the same random numbers:

- the sum of the tokens' log-probs (right);
- their mean over each completion, which weights a completion by 1 / length;
- both without a baseline and with 3 added to, or taken from, all rewards, which changes nothing in
  the right objective;
- samples of temperature .7 or 1.4 whose log-probs are taken at 1.

A mean is multiplied by the start's expected length, so that only the weighting differs.

Primary contrasts, each minus the right arm: E[r] - beta KL where training ends (mean of the last 3
measurements), and, for the means, expected length there. An arm with an offset is compared with the
right one of that offset.

Also: expected reward at KL .5 and 1; cosine of the expected gradient to the exact one at the start
policy; and for the temperatures the KL that training reports, the samples' mean of log pi - log
start, minus the true KL.
"""

import copy

import numpy as np
import torch
from exact_world import MASK, World, make_world, reward_at, sequence_logprobs, train, truth
from seeds import bootstrap, main, panels, save, show

KLS, STEPS, BATCH, LR, BETA = (0.5, 1.0), 80, 8, 5e-5, 0.3
LENGTHS = MASK.sum(1)
# name -> offset of the rewards, baseline, whether the mean of the tokens, sampling temperature
ARMS = {
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
    """Cosine of an arm's expected gradient to that of E[r] - beta KL, at the start.

    The arm's is that of its first step, with a baseline at its mean.
    """
    policy = copy.deepcopy(world.start).requires_grad_(True)
    logprobs = sequence_logprobs(policy)
    sampled = sequence_logprobs(world.start, temperature).exp()

    def gradient(objective: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    level = (sampled * world.rewards).sum(1).mean() if baseline == "moving" else 0.0
    # KL is 0 here, and so is its gradient
    weights = sampled * (world.rewards - level) / (LENGTHS if mean else 1)
    wrong = gradient((weights * logprobs).sum())
    right = gradient((logprobs.exp() * world.rewards).sum())
    return torch.nn.functional.cosine_similarity(wrong, right, dim=0).item()


def work(seed: int) -> dict:
    result = {"curves": {}, "cosine": {}, "reported": {}}
    for name, (offset, baseline, mean, temperature) in ARMS.items():
        world = make_world(seed, offset=offset)
        usual = truth(world, world.start)["length"]

        def by_length(advantages, place, usual=usual):
            return advantages * usual / LENGTHS[place[1]]

        given = dict(baseline=baseline, sampling_temperature=temperature)
        given |= dict(seed=seed, steps=STEPS, batch_size=BATCH, lr=LR, beta=BETA, every=10)
        policy, curve = train(world, reweight=by_length if mean else None, **given)
        result["curves"][name] = curve
        result["cosine"][name] = expected_cosine(world, baseline, mean, temperature)
        with torch.no_grad():
            ratio = sequence_logprobs(policy) - sequence_logprobs(world.start)
            reported = (sequence_logprobs(policy, temperature).exp() * ratio).sum(1).mean().item()
        result["reported"][name] = reported - curve[-1]["kl"]
    return result


def report(results: dict[int, dict]) -> dict:
    keys, seeds = ("reward", "kl", "length"), list(results.values())

    def end(curve):
        return [np.mean([point[key] for point in curve[-3:]]) for key in keys]

    # arm -> (seeds, 3): reward, KL, length
    ends = {name: np.array([end(seed["curves"][name]) for seed in seeds]) for name in ARMS}
    objectives = {name: values @ [1, -BETA, 0] for name, values in ends.items()}
    lengths = bootstrap([seed["curves"]["sum"][0]["length"] for seed in seeds])
    summary = {"start length": lengths, "ends": {}, "contrasts": {}}
    print(f"length of the start's completions {show(lengths)}; where training ends:")
    for name in ARMS:
        cells = {key: bootstrap(ends[name][:, i]) for i, key in enumerate(keys)}
        cells["objective"] = bootstrap(objectives[name])
        cells["cosine at the start"] = bootstrap([seed["cosine"][name] for seed in seeds])
        cells["reported KL - KL"] = bootstrap([seed["reported"][name] for seed in seeds])
        summary["ends"][name] = cells
        print(f"{name:22}" + "  ".join(f"{key} {cell['mean']:.2f}" for key, cell in cells.items()))
    for name in ARMS:
        if (right := right_arm(name)) != name:
            differences = {
                "objective at the end": objectives[name] - objectives[right],
                "length at the end": ends[name][:, 2] - ends[right][:, 2],
            }
            for kl in KLS:
                own = np.array([reward_at(seed["curves"][name], kl) for seed in seeds])
                theirs = np.array([reward_at(seed["curves"][right], kl) for seed in seeds])
                differences[f"reward at KL {kl:g}"] = own - theirs
            for key, difference in differences.items():
                summary["contrasts"][f"{key}: {name} - {right}"] = bootstrap(difference)
                print(f"{f'{key}: {name} - {right}':72} {show(bootstrap(difference))}")
    for name in ("sampling at 0.7", "sampling at 1.4"):
        print(f"reported KL - KL: {name:53}  {show(summary['ends'][name]['reported KL - KL'])}")
    draw(results, summary)
    return summary


def draw(results: dict[int, dict], summary: dict) -> None:
    from minalign.tools.figures import BLUE, GREY, ORANGE, label_ends

    figure, (left, right) = panels(2)
    labels = {
        "sum": "sum",
        "mean": "mean",
        "mean, no baseline, +3": "mean, rewards + 3",
        "mean, no baseline, -3": "mean, rewards - 3",
    }
    ends, looks = [], zip(("-", "--", ":", "-."), (BLUE, ORANGE, "black", GREY))
    for (name, label), (line, colour) in zip(labels.items(), looks):
        curves = [result["curves"][name] for result in results.values()]
        lengths = np.array([[point["length"] for point in curve] for curve in curves])
        steps = [point["step"] for point in curves[0]]
        intervals = [bootstrap(column) for column in lengths.T]
        low, high = ([interval[key] for interval in intervals] for key in ("low", "high"))
        left.plot(steps, lengths.mean(0), line, color=colour)
        left.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        ends.append((lengths.mean(0)[-1], label, colour))
    left.set(xlabel="steps", ylabel="expected length, tokens")
    left.set(xlim=(0, STEPS), xticks=range(0, STEPS + 1, 20))
    label_ends(left, ends)
    names = [name for name in ARMS if right_arm(name) != name]
    for row, name in enumerate(names):
        cell = summary["contrasts"][f"objective at the end: {name} - {right_arm(name)}"]
        right.plot([cell["low"], cell["high"]], [row, row], color="black", lw=1)
        right.plot(cell["mean"], row, "o", color="black")
    right.axvline(0, color="grey", lw=0.8)
    labels = [name.replace(", no", ",\nno") for name in names]
    right.set(yticks=range(len(names)), yticklabels=labels)
    right.set(xlabel=f"E[r] - {BETA:g} KL at the end,\nminus that of the right arm")
    right.invert_yaxis()
    save(figure, "classic_mistakes")


if __name__ == "__main__":
    main("classic_mistakes", __doc__, work, report, seeds=5)
