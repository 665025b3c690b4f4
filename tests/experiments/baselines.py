"""Which baseline: none, cumulative mean, exponential mean or leave-one-out (RLOO)? (exact world)

    python tests/experiments/baselines.py --seeds 8        resumes; about 80 s per seed on one core
    python tests/experiments/baselines.py --report         table and figure from what is there

Arms, each 120 steps of 8 samples of 8 prompts:

- no baseline;
- the mean of all earlier rewards;
- their exponential mean (decay .9);
- RLOO with k = 4 at equal samples (4 x 2 prompts);
- RLOO with k = 4 at equal prompts (4 x 8 prompts: four times the samples).

The prompts' levels have sd 0, 1 or 3; a reward's sd within a prompt is 1. With sd 1, "none" also
runs with 3 added to all rewards, which changes no other arm (a test holds that). The anchor is the
start, beta .1.

The variance of the gradient is measured at the start and after 40 steps of the cumulative arm (sd
1). It takes the exact gradient g of E[r] - beta KL, and 4,000 batches drawn without repeats from
256 samples of the policy, whose scores' inner products give every |g_batch - g|^2 without error.
Baselines are what 40 batches leave behind. All is before clipping and Adam.

Primary contrasts: expected reward at KL 1 (also at .5, 2 and 3), each arm minus the cumulative
mean. Expected of theory: an advantage of RLOO has the lower variance where the variance between
prompts is above that within them over k - 1, here a level sd above .58.

Added after the results were seen: the objective E[r] - beta KL where training ends (mean of the
last 3 measurements), since variance may cost speed and not the front; and seeds 5 to 7.
"""

import copy

import numpy as np
import torch
from exact_world import (
    MASK,
    PROMPTS,
    SEQUENCES,
    World,
    make_world,
    reward_at,
    sequence_logprobs,
    train,
)
from seeds import RESULTS, bootstrap, main, show

from minalign.reinforce import MovingAverageBaseline, leave_one_out_advantages
from minalign.rollout import completion_logprobs

KLS, BETWEEN, OFFSET = (0.5, 1.0, 2.0, 3.0), (0.0, 1.0, 3.0), 3.0
STEPS, BATCH, LR, BETA, K, DECAY = 120, 8, 5e-5, 0.1, 4, 0.9
HISTORY = 40  # batches before a variance is measured
BANK, BATCHES = 64, 4000  # samples per prompt, and batches of them, to measure it with
CONDITIONS = [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, OFFSET)]  # sd of the levels, offset
ARMS = ("none", "cumulative", "exponential", "rloo, same samples", "rloo, same prompts")
OTHERS = [arm for arm in ARMS if arm != "cumulative"]


def arguments(arm: str) -> dict:
    if arm.startswith("rloo"):
        size = BATCH * K if "prompts" in arm else BATCH
        return {"baseline": "rloo", "group_size": K, "batch_size": size}
    if arm == "exponential":  # of the shaped rewards: what "none" hands on
        history = MovingAverageBaseline(DECAY)
        return {"baseline": "none", "reweight": lambda shaped, place: history.advantages(shaped)}
    return {"baseline": "moving" if arm == "cumulative" else "none"}


def gradient(policy, objective: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(objective, list(policy.parameters()))
    return torch.cat([part.flatten() for part in parts])


def variances(seed: int, world: World, policy, history: list | None) -> dict[str, dict[str, float]]:
    """Condition -> arm -> E|g_batch - g|^2 / |g|^2.

    `history`: (shaped rewards of `world`, prompts) of earlier batches.
    """
    policy = copy.deepcopy(policy).requires_grad_(True)
    draws = torch.Generator().manual_seed(seed)
    logprobs, start = sequence_logprobs(policy), sequence_logprobs(world.start)
    p = logprobs.detach().exp()
    shaped_rewards = world.rewards - BETA * (logprobs - start)
    exact = gradient(policy, (logprobs.exp() * shaped_rewards).sum(1).mean())
    shaped_rewards = shaped_rewards.detach()
    if history is None:  # 40 batches of this policy
        history = []
        for _ in range(HISTORY):
            asked = torch.randint(PROMPTS, (BATCH,), generator=draws)
            chosen = torch.multinomial(p[asked], 1, generator=draws)[:, 0]
            history.append((shaped_rewards[asked, chosen].float(), asked))
    bank = torch.multinomial(p, BANK, replacement=True, generator=draws)  # (PROMPTS, BANK)
    places = [
        (torch.tensor([[x]]), torch.ones(1, 1), SEQUENCES[y, None], MASK[y, None])
        for x in range(PROMPTS)
        for y in bank[x]
    ]
    logprob_sums = (completion_logprobs(policy, *place, 1.0).sum() for place in places)
    scores = torch.stack([gradient(policy, logprob_sum) for logprob_sum in logprob_sums])
    products = scores @ scores.T  # (PROMPTS * BANK, PROMPTS * BANK)
    along = scores @ exact  # (PROMPTS * BANK,)
    result = {}
    for between, offset in CONDITIONS:
        # the levels alone differ
        shift = (make_world(seed, between, offset).rewards - world.rewards)[:, 0].float()
        shaped = torch.gather(shaped_rewards, 1, bank).float() + shift[:, None]
        exponential = MovingAverageBaseline(DECAY)
        baselines = {"cumulative": MovingAverageBaseline(), "exponential": exponential}
        for earlier, asked in history:
            for baseline in baselines.values():
                baseline.advantages(earlier + shift[asked])
        cells = {}
        for arm in ARMS:
            given = arguments(arm)
            size, group = given.get("batch_size", BATCH), given.get("group_size", 1)
            asked = torch.randint(PROMPTS, (BATCHES, size // group), generator=draws)
            asked = asked.repeat_interleave(group, 1)
            # no sample twice in a batch
            picked = torch.rand(BATCHES, BANK, generator=draws).argsort(1)[:, :size]
            advantages = shaped[asked, picked] - (baselines[arm].value if arm in baselines else 0.0)
            if group > 1:
                flat = leave_one_out_advantages(advantages.flatten(), group)
                advantages = flat.view(BATCHES, size)
            rows, weights = asked * BANK + picked, advantages / size
            between_rows = products[rows[:, :, None], rows[:, None, :]]
            length = torch.einsum("bi,bij,bj->b", weights, between_rows, weights)
            error = length - 2 * (weights * along[rows]).sum(1) + exact @ exact
            cells[arm] = (error.mean() / (exact @ exact)).item()
        result[f"{between:g} {offset:g}"] = cells
    return result


def work(seed: int) -> dict:
    curves = {}
    common = {"seed": seed, "lr": LR, "beta": BETA, "batch_size": BATCH}
    for between, offset in CONDITIONS:
        for arm in ARMS if not offset else ARMS[:1]:
            given = common | arguments(arm)
            _, curve = train(make_world(seed, between, offset), steps=STEPS, every=10, **given)
            curves[f"{between:g} {offset:g} {arm}"] = curve

    world, history, baseline = make_world(seed), [], MovingAverageBaseline()

    def record(shaped, place):
        history.append((shaped, place[0]))
        return baseline.advantages(shaped)

    policy, curve = train(
        world, steps=HISTORY, every=HISTORY, baseline="none", reweight=record, **common
    )
    measured = {
        "start": variances(seed, world, world.start, None),
        "trained": variances(seed, world, policy, history),
    }
    return {"curves": curves, "kl": curve[-1]["kl"], "variance": measured}


def report(results: dict[int, dict]) -> dict:
    def last_objectives(curve):
        return [point["reward"] - BETA * point["kl"] for point in curve[-3:]]

    seeds, names = list(results.values()), results[min(results)]["curves"]
    curves = {name: [seed["curves"][name] for seed in seeds] for name in names}
    values = {}
    for kl in KLS:
        rewards = {name: [reward_at(c, kl) for c in runs] for name, runs in curves.items()}
        values[f"reward at KL {kl:g}"] = rewards
    ends = {name: [last_objectives(c) for c in runs] for name, runs in curves.items()}
    values["objective at the end"] = {name: np.mean(end, 1) for name, end in ends.items()}
    summary = {"kl": bootstrap([seed["kl"] for seed in seeds])}
    summary |= {"variance": {}, "values": {}, "contrasts": {}}
    reached = show(summary["kl"])
    print(f"relative variance of the gradient, E|g_batch - g|^2 / |g|^2; trained: KL {reached}")
    for state in ("start", "trained"):
        for between, offset in CONDITIONS:
            condition = f"{between:g} {offset:g}"
            measured = [seed["variance"][state][condition] for seed in seeds]
            cells = {arm: bootstrap([variance[arm] for variance in measured]) for arm in ARMS}
            summary["variance"][f"{state}, {condition}"] = cells
            row = "  ".join(f"{arm} {cell['mean']:.1f}" for arm, cell in cells.items())
            print(f"{state:8} sd {between:g} offset {offset:g}  {row}")
    print("expected reward (over the start's), and of how many seeds")
    for name in curves:
        cells = summary["values"][name] = {key: bootstrap(row[name]) for key, row in values.items()}
        shown = [f"  {key} {cell['mean']:.3f} ({cell['seeds']})" for key, cell in cells.items()]
        print(f"{name:24}" + "".join(shown))
    for key, row in values.items():
        for between, offset in CONDITIONS:
            for arm in ARMS[:1] if offset else OTHERS:  # an offset changes none but "none"
                own = np.array(row[f"{between:g} {offset:g} {arm}"])
                differences = own - np.array(row[f"{between:g} 0 cumulative"])
                name = f"{key}, sd {between:g}, offset {offset:g}: {arm} - cumulative"
                summary["contrasts"][name] = bootstrap(differences)
                print(f"{name:76} {show(summary['contrasts'][name])}")
    draw(summary)
    return summary


def draw(summary: dict) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
    for i, (arm, marker, line) in enumerate(zip(ARMS, "osx^v", (":", "-", "--", "-", "-"))):
        color = "tab:blue" if "rloo" in arm else "black"
        look = dict(marker=marker, ls=line, color=color, ms=4, lw=1.2, elinewidth=0.6, label=arm)
        variance = [summary["variance"][f"trained, {between:g} 0"][arm] for between in BETWEEN]
        contrast = "reward at KL 1, sd {:g}, offset 0: " + f"{arm} - cumulative"
        names = [contrast.format(between) for between in BETWEEN if arm in OTHERS]
        reward = [summary["contrasts"][name] for name in names]
        for axes, cells in ((left, variance), (right, reward)):
            columns = [[cell[key] for cell in cells] for key in ("mean", "low", "high")]
            mean, low, high = map(np.array, columns)
            places = np.array(BETWEEN)[: len(cells)] + 0.06 * (i - 2)
            axes.errorbar(places, mean, (mean - low, high - mean), **look)
    left.set(yscale="log", ylabel="variance of the gradient / |g|²")
    right.set(ylabel="reward at KL 1, minus cumulative's")
    right.axhline(0, color="grey", lw=0.8)
    for axes in (left, right):
        axes.set(xlabel="sd of the prompts' levels", xticks=BETWEEN)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "baselines.png", dpi=100)


if __name__ == "__main__":
    main("baselines", __doc__, work, report, seeds=8)
