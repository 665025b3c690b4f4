"""Which baseline: none, cumulative mean, exponential mean or leave-one-out (RLOO)? (exact world)

    python tests/experiments/baselines.py --seeds 8        resumes; about 80 s a seed on one core
    python tests/experiments/baselines.py --report         table and figure from what is there

Arms, each 120 steps of 8 samples of 8 prompts: no baseline; the mean of all earlier rewards; their exponential mean (decay .9);
RLOO with k = 4 at equal samples (4 x 2 prompts) and at equal prompts (4 x 8 prompts: four times the samples). The prompts'
levels have sd 0, 1 or 3 (a reward's sd within a prompt is 1); with sd 1, "none" also runs with 3 added to all rewards, which
changes no other arm (a test holds that). The anchor is the start, beta .1.

The variance of the gradient is measured at the start and after 40 steps of the cumulative arm (sd 1): the exact gradient g of
E[r] - beta KL, and 4,000 batches drawn without repeats from 256 samples of the policy, whose scores' inner products give every
|g_batch - g|^2 without error. Baselines are what 40 batches leave behind. All before clipping and Adam.

Primary contrasts: expected reward at KL 1 (also at .5, 2 and 3), each arm minus the cumulative mean. Expected of theory: an
advantage of RLOO has the lower variance where the variance between prompts is above that within them over k - 1, here a level
sd above .58. Added after the results were seen: the objective E[r] - beta KL where training ends (mean of the last 3
measurements), since variance may cost speed and not the front; and
seeds 5 to 7.
"""

import copy

import numpy as np
import torch
from exact_world import MASK, PROMPTS, SEQUENCES, World, make_world, reward_at, sequence_logprobs, train
from seeds import RESULTS, bootstrap, main, show

from minalign.reinforce import MovingAverageBaseline, leave_one_out_advantages
from minalign.rollout import completion_logprobs

KLS, BETWEEN, OFFSET = (0.5, 1.0, 2.0, 3.0), (0.0, 1.0, 3.0), 3.0
STEPS, BATCH, LR, BETA, K, DECAY = 120, 8, 5e-5, 0.1, 4, 0.9
HISTORY, BANK, BATCHES = 40, 64, 4000  # batches before a variance is measured; samples a prompt; batches to measure with
CONDITIONS = [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, OFFSET)]  # sd of the levels, offset
ARMS = ("none", "cumulative", "exponential", "rloo, same samples", "rloo, same prompts")
OTHERS = [arm for arm in ARMS if arm != "cumulative"]


def arguments(arm: str) -> dict:
    if arm.startswith("rloo"):
        return {"baseline": "rloo", "group_size": K, "batch_size": BATCH * K if "prompts" in arm else BATCH}
    if arm == "exponential":  # of the shaped rewards: what "none" hands on
        history = MovingAverageBaseline(DECAY)
        return {"baseline": "none", "reweight": lambda shaped, place: history.advantages(shaped)}
    return {"baseline": "moving" if arm == "cumulative" else "none"}


def gradient(policy, objective: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, list(policy.parameters()))])


def variances(seed: int, world: World, policy, history: list | None) -> dict[str, dict[str, float]]:
    """Condition -> arm -> E|g_batch - g|^2 / |g|^2. `history`: (shaped rewards of `world`, prompts) of earlier batches."""
    policy = copy.deepcopy(policy).requires_grad_(True)
    draws = torch.Generator().manual_seed(seed)
    logprobs, start = sequence_logprobs(policy), sequence_logprobs(world.start)
    p = logprobs.detach().exp()
    shaped_rewards = (world.rewards - BETA * (logprobs - start)).detach()
    exact = gradient(policy, (logprobs.exp() * (world.rewards - BETA * (logprobs - start))).sum(1).mean())
    if history is None:  # 40 batches of this policy
        history = []
        for _ in range(HISTORY):
            asked = torch.randint(PROMPTS, (BATCH,), generator=draws)
            chosen = torch.multinomial(p[asked], 1, generator=draws)[:, 0]
            history.append((shaped_rewards[asked, chosen].float(), asked))
    bank = torch.multinomial(p, BANK, replacement=True, generator=draws)  # (PROMPTS, BANK)
    places = [
        (torch.tensor([[x]]), torch.ones(1, 1), SEQUENCES[y, None], MASK[y, None]) for x in range(PROMPTS) for y in bank[x]
    ]
    scores = torch.stack([gradient(policy, completion_logprobs(policy, *place, 1.0).sum()) for place in places])
    products, along = scores @ scores.T, scores @ exact  # (PROMPTS * BANK) squared, and each score's product with g
    result = {}
    for between, offset in CONDITIONS:
        shift = (make_world(seed, between, offset).rewards - world.rewards)[:, 0].float()  # the levels alone differ
        shaped = torch.gather(shaped_rewards, 1, bank).float() + shift[:, None]
        baselines = {"cumulative": MovingAverageBaseline(), "exponential": MovingAverageBaseline(DECAY)}
        for earlier, asked in history:
            for baseline in baselines.values():
                baseline.advantages(earlier + shift[asked])
        cells = {}
        for arm in ARMS:
            size, group = arguments(arm).get("batch_size", BATCH), arguments(arm).get("group_size", 1)
            asked = torch.randint(PROMPTS, (BATCHES, size // group), generator=draws).repeat_interleave(group, 1)
            picked = torch.rand(BATCHES, BANK, generator=draws).argsort(1)[:, :size]  # no sample twice in a batch
            advantages = shaped[asked, picked] - (baselines[arm].value if arm in baselines else 0.0)
            if group > 1:
                advantages = leave_one_out_advantages(advantages.flatten(), group).view(BATCHES, size)
            rows, weights = asked * BANK + picked, advantages / size
            length = torch.einsum("bi,bij,bj->b", weights, products[rows[:, :, None], rows[:, None, :]], weights)
            error = length - 2 * (weights * along[rows]).sum(1) + exact @ exact
            cells[arm] = (error.mean() / (exact @ exact)).item()
        result[f"{between:g} {offset:g}"] = cells
    return result


def work(seed: int) -> dict:
    curves = {}
    common = {"seed": seed, "lr": LR, "beta": BETA, "batch_size": BATCH}
    for between, offset in CONDITIONS:
        for arm in ARMS if not offset else ARMS[:1]:
            _, curve = train(make_world(seed, between, offset), steps=STEPS, every=10, **(common | arguments(arm)))
            curves[f"{between:g} {offset:g} {arm}"] = curve

    world, history, baseline = make_world(seed), [], MovingAverageBaseline()

    def record(shaped, place):
        history.append((shaped, place[0]))
        return baseline.advantages(shaped)

    policy, curve = train(world, steps=HISTORY, every=HISTORY, baseline="none", reweight=record, **common)
    measured = {"start": variances(seed, world, world.start, None), "trained": variances(seed, world, policy, history)}
    return {"curves": curves, "kl": curve[-1]["kl"], "variance": measured}


def report(results: dict[int, dict]) -> dict:
    curves = {name: [result["curves"][name] for result in results.values()] for name in results[min(results)]["curves"]}
    values = {f"reward at KL {kl:g}": {name: [reward_at(c, kl) for c in runs] for name, runs in curves.items()} for kl in KLS}
    ends = {name: [[point["reward"] - BETA * point["kl"] for point in c[-3:]] for c in runs] for name, runs in curves.items()}
    values["objective at the end"] = {name: np.mean(end, 1) for name, end in ends.items()}
    summary = {"kl": bootstrap([result["kl"] for result in results.values()]), "variance": {}, "values": {}, "contrasts": {}}
    print(f"relative variance of the gradient, E|g_batch - g|^2 / |g|^2; trained: KL {show(summary['kl'])}")
    for state in ("start", "trained"):
        for between, offset in CONDITIONS:
            condition = f"{between:g} {offset:g}"
            cells = {a: bootstrap([r["variance"][state][condition][a] for r in results.values()]) for a in ARMS}
            summary["variance"][f"{state}, {condition}"] = cells
            print(f"{state:8} sd {between:g} offset {offset:g}  " + "  ".join(f"{a} {c['mean']:.1f}" for a, c in cells.items()))
    print("expected reward (over the start's), and of how many seeds")
    for name in curves:
        cells = summary["values"][name] = {key: bootstrap(row[name]) for key, row in values.items()}
        print(f"{name:24}" + "".join(f"  {key} {cell['mean']:.3f} ({cell['seeds']})" for key, cell in cells.items()))
    for key, row in values.items():
        for between, offset in CONDITIONS:
            for arm in ARMS[:1] if offset else OTHERS:  # an offset changes none but "none"
                differences = np.array(row[f"{between:g} {offset:g} {arm}"]) - np.array(row[f"{between:g} 0 cumulative"])
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
        name = "reward at KL 1, sd {:g}, offset 0: " + f"{arm} - cumulative"
        reward = [summary["contrasts"][name.format(between)] for between in BETWEEN if arm in OTHERS]
        for axes, cells in ((left, variance), (right, reward)):
            mean, low, high = (np.array([cell[key] for cell in cells]) for key in ("mean", "low", "high"))
            axes.errorbar(np.array(BETWEEN)[: len(cells)] + 0.06 * (i - 2), mean, (mean - low, high - mean), **look)
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
