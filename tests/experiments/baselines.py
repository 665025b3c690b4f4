"""Which baseline: moving, ema, prompt, shrink or rloo? (exact world and toy world)

    python tests/experiments/baselines.py --seeds 8        resumes
    python tests/experiments/baselines.py --report         table and figure from what is there

It takes about 3 minutes per seed on one core for the exact world, and 3 for the toy world.

Seeds 0 to 7 run the exact world, and 0 to 4 the toy world, too. The baselines are those of
--baseline with its defaults, by the very function that train_policy.py calls: the mean of all
earlier rewards (moving), their exponential mean (ema), that of each prompt (prompt), leave-one-out
of 4 samples per prompt (rloo), and that shrunk to the batch's other prompts (shrink). All take the
same number of samples. Fixed anchor, beta .1.

Exact world: 120 steps of 8 samples at lr 5e-5. The prompts' levels have sd 0, 1 or 3; a reward's sd
within a prompt is 1. With sd 1 also at lr 2e-5 and 1.5e-4. No baseline (none) is held against them
at lr 5e-5, and with 3 added to all rewards, which changes no other arm. There are 4 prompts only,
each asked 240 times, which flatters prompt; and a batch of shrink has 2 prompts.

Toy world: 60 steps of 64 samples at lr 5e-4 and 1e-3, a reward model of each seed's own,
150 held-out prompts every 10 steps. No prompt of its 9,026 comes twice in so short a run, which
starves prompt: it then is ema, sample by sample (a test holds that), and ema's numbers stand for
it.

Measured: the objective that training ascends, E[r] - beta KL, in the toy world also minus 1 for a
text without an end, the KL (drift) and the reward (gold), each as the mean of the last 3
measurements; reward (gold) where the training curve first crosses KL .5, 1 and 2.

The variance of the gradient is measured in the exact world, at the start and after 40 steps of
moving (sd 1). It takes the exact gradient g of E[r] - beta KL, and 4,000 batches drawn without
repeats from 256 samples of the policy, whose scores' inner products give every |g_batch - g|^2
without error. Baselines are what 40 batches leave behind: at the start batches of that policy,
later those of moving's own training, for rloo and shrink those of rloo's. All is before clipping
and Adam.

Primary contrast: the objective at the default lr (exact world: sd 1), rloo minus moving. The same
for each other baseline and condition.

Decision, fixed before the first run: the default of --baseline changes only if another one's
interval of that difference lies above 0 at the default lr (and sd 1) in both worlds, and lies
below 0 in no condition (exact world: sd 0, 1, 3 and three lrs; toy world: two lrs). If several
do, it is the one that is highest in the toy world.

Known before: an earlier form of this file compared none, moving, ema and rloo in the exact world at
lr 5e-5, on the same seeds. New are prompt and shrink, the learning rates and the toy world. Nothing
was tuned; that it runs was tried on seeds 100 and 101, with a quarter of the steps.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import toy_world
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
from seeds import bootstrap, main, panels, save, show

import train_policy
from minalign.rollout import completion_logprobs

ARMS = ("moving", "ema", "prompt", "shrink", "rloo")
OTHERS = ("none", *ARMS[1:])
GROUPS = {"shrink": 4, "rloo": 4}
BETA, STEPS, BATCH, KLS = 0.1, 120, 8, (0.5, 1.0, 2.0)
# name: the world, the learning rate
EXACT = {
    "sd 0": (dict(between=0.0), 5e-5),
    "sd 1": (dict(between=1.0), 5e-5),
    "sd 3": (dict(between=3.0), 5e-5),
    "sd 1, offset 3": (dict(between=1.0, offset=3.0), 5e-5),
    "sd 1, lr 2e-5": (dict(between=1.0), 2e-5),
    "sd 1, lr 1.5e-4": (dict(between=1.0), 1.5e-4),
}
LEVELS, OFFSET = list(EXACT)[:3], "sd 1, offset 3"
TOY, TOY_SEEDS = {"lr 5e-4": 5e-4, "lr 1e-3": 1e-3}, 5
TOY_RUN = dict(steps=60, beta=BETA, eval_every=10, eval_prompts=150)
DEFAULTS = ("exact, sd 1", "toy, lr 5e-4")
HISTORY = 40  # batches before a variance is measured
BANK, BATCHES = 64, 4000  # samples per prompt, and batches of them, to measure it with


def arms(condition: str) -> tuple[str, ...]:
    """Those that run in a condition of the exact world."""
    if condition == OFFSET:
        return ("none",)
    return ("none", *ARMS) if condition in LEVELS else ARMS


def estimator(arm: str) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], object]:
    """--baseline `arm`: (rewards (B,), prompts (B,)) -> advantages (B,), and what remembers."""
    config = train_policy.resolve(train_policy.Config(baseline=arm))
    advantages_of, memory = train_policy.advantage_estimator(config)

    def advantages(rewards, asked):
        prompts = [SimpleNamespace(row=row) for row in asked.tolist()]
        return advantages_of(rewards, prompts, None)

    return advantages, memory


def run(world: World, arm: str, seed: int, lr: float, steps: int, every: int, history: list):
    """The trained policy and its curve; `history` gets (shaped rewards, prompts) of each batch."""
    advantages, _ = estimator(arm)

    def reweight(shaped, place):  # what baseline="none" hands on
        history.append((shaped, place[0]))
        return advantages(shaped, place[0])

    given = dict(lr=lr, beta=BETA, batch_size=BATCH, group_size=GROUPS.get(arm, 1))
    given |= dict(steps=steps, every=every, baseline="none", reweight=reweight)
    return train(world, seed=seed, **given)


def after(arm: str, history: list, rewards: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Advantages (batches, B): each of these batches as if it alone came after `history`."""
    advantages, memory = estimator(arm)
    for batch in history:
        advantages(*batch)
    if arm != "shrink":  # the others read no other prompt of the batch: all at once
        return advantages(rewards.flatten(), asked.flatten()).view_as(rewards)
    state, found = memory.state_dict(), []
    for batch in zip(rewards, asked):
        memory.load_state_dict(state)
        found.append(advantages(*batch))
    return torch.stack(found)


def gradient(policy, objective: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(objective, list(policy.parameters()))
    return torch.cat([part.flatten() for part in parts])


def relative_variance(
    scores: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor, advantages: torch.Tensor
) -> float:
    """E|g_batch - g|^2 / |g|^2, g_batch = mean_i A_i score_i.

    Args:
        scores: (S, W), grad log pi(y|x) of each sample of the bank.
        exact: (W,), g.
        rows, advantages: (batches, B), which samples each batch has, and their advantages.
    """
    products, along, square = scores @ scores.T, scores @ exact, exact @ exact
    weights = advantages / rows.shape[1]
    between_rows = products[rows[:, :, None], rows[:, None, :]]  # (batches, B, B)
    length = torch.einsum("bi,bij,bj->b", weights, between_rows, weights)
    error = length - 2 * (weights * along[rows]).sum(1) + square
    return (error.mean() / square).item()


def variances(seed: int, world: World, policy, histories: dict[int, list]) -> dict[str, dict]:
    """Condition -> arm -> relative variance.

    `histories`: samples per prompt -> (shaped rewards of `world`, prompts) of earlier batches, []
    for batches of `policy`.
    """
    policy = copy.deepcopy(policy).requires_grad_(True)
    draws = torch.Generator().manual_seed(seed)
    logprobs, start = sequence_logprobs(policy), sequence_logprobs(world.start)
    p = logprobs.detach().exp()
    shaped_rewards = world.rewards - BETA * (logprobs - start)
    exact = gradient(policy, (logprobs.exp() * shaped_rewards).sum(1).mean())
    shaped_rewards = shaped_rewards.detach()

    def ask(group, *shape):  # (*shape, BATCH) prompts
        asked = torch.randint(PROMPTS, (*shape, BATCH // group), generator=draws)
        return asked.repeat_interleave(group, -1)

    for group, history in histories.items():
        for _ in range(HISTORY - len(history)):
            asked = ask(group)
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
    result = {}
    for condition in [*LEVELS, OFFSET]:
        # the levels alone differ
        shift = (make_world(seed, **EXACT[condition][0]).rewards - world.rewards)[:, 0].float()
        shaped = torch.gather(shaped_rewards, 1, bank).float() + shift[:, None]
        result[condition] = {}
        for arm in arms(condition):
            group = GROUPS.get(arm, 1)
            earlier = [(rewards + shift[asked], asked) for rewards, asked in histories[group]]
            asked = ask(group, BATCHES)
            # no sample twice in a batch
            picked = torch.rand(BATCHES, BANK, generator=draws).argsort(1)[:, :BATCH]
            advantages = after(arm, earlier, shaped[asked, picked], asked)
            rows = asked * BANK + picked
            result[condition][arm] = relative_variance(scores, exact, rows, advantages)
    return result


def exact_world(seed: int) -> dict:
    curves = {}
    for condition, (given, lr) in EXACT.items():
        for arm in arms(condition):
            _, curve = run(make_world(seed, **given), arm, seed, lr, STEPS, 10, [])
            curves[f"exact, {condition}: {arm}"] = curve
    world, histories = make_world(seed), {1: [], 4: []}
    run(world, "rloo", seed, 5e-5, HISTORY, HISTORY, histories[4])
    policy, curve = run(world, "moving", seed, 5e-5, HISTORY, HISTORY, histories[1])
    measured = {
        "start": variances(seed, world, world.start, {1: [], 4: []}),
        "trained": variances(seed, world, policy, histories),
    }
    return {"curves": curves, "kl": curve[-1]["kl"], "variance": measured}


def toy_curves(seed: int) -> dict[str, list]:
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        rm = Path(name) / "rm"
        toy_world.train_reward_model(rm, seed)
        for condition, lr in TOY.items():
            for arm in ARMS:
                if arm == "prompt":
                    continue
                folder, given = Path(name) / f"{arm} {lr}", dict(lr=lr, baseline=arm)
                curve = toy_world.train_curve(folder, seed, rm=[str(rm)], **given, **TOY_RUN)
                curves[f"toy, {condition}: {arm}"] = curve
            curves[f"toy, {condition}: prompt"] = curves[f"toy, {condition}: ema"]
    return curves


def work(seed: int) -> dict:
    result = exact_world(seed)
    if seed < TOY_SEEDS:
        result["curves"] |= toy_curves(seed)
    return result


def measures(curve: list[dict]) -> dict[str, float]:
    """What is reported of one curve."""
    last = curve[-3:]
    penalised = [point["reward"] - (1 - point.get("ended", 1.0)) for point in last]
    objective = [reward - BETA * point["kl"] for reward, point in zip(penalised, last)]
    name = "gold" if "gold" in last[0] else "reward"
    found = {"objective": np.mean(objective)}
    found |= {key: np.mean([point[key] for point in last]) for key in ("kl", name)}
    return found | {f"{name} at KL {kl:g}": reward_at(curve, kl, name) for kl in KLS}


def decide(contrasts: dict[str, dict]) -> dict[str, dict]:
    """What the rule says of each baseline. `contrasts`: "CONDITION: objective, ARM - moving"."""
    said = {}
    for arm in ARMS[1:]:
        ending = f": objective, {arm} - moving"
        cells = {k.removesuffix(ending): v for k, v in contrasts.items() if k.endswith(ending)}
        better = [name for name in DEFAULTS if name in cells and cells[name]["low"] > 0]
        worse = [name for name, cell in cells.items() if cell["high"] < 0]
        adopted = len(better) == len(DEFAULTS) and not worse
        said[arm] = {"better": better, "worse": worse, "becomes the default": adopted}
    return said


def report(results: dict[int, dict]) -> dict:
    seeds = list(results.values())
    summary = {"kl": bootstrap([seed["kl"] for seed in seeds])}
    summary |= {"variance": {}, "values": {}, "contrasts": {}}
    reached = show(summary["kl"])
    print(f"relative variance of the gradient, E|g_batch - g|^2 / |g|^2; trained: KL {reached}")
    for state in ("start", "trained"):
        for condition in seeds[0]["variance"][state]:
            measured = [seed["variance"][state][condition] for seed in seeds]
            cells = {arm: bootstrap([v[arm] for v in measured]) for arm in measured[0]}
            summary["variance"][f"{state}, {condition}"] = cells
            row = "  ".join(f"{arm} {cell['mean']:.1f}" for arm, cell in cells.items())
            print(f"{state:8} {condition:16} {row}")

    measured = [{name: measures(c) for name, c in seed["curves"].items()} for seed in seeds]
    names = max(measured, key=len)  # a seed with both worlds has most

    def column(name, key):  # of each seed that has it; the toy world has fewer
        return np.array([seed[name][key] for seed in measured if name in seed])

    print("means, and of how many seeds")
    for name, keys in names.items():
        cells = summary["values"][name] = {key: bootstrap(column(name, key)) for key in keys}
        shown = [f"  {key} {cell['mean']:.3f} ({cell['seeds']})" for key, cell in cells.items()]
        print(f"{name:30}" + "".join(shown))
    for name, keys in names.items():
        condition, arm = name.rsplit(": ", 1)
        # an offset changes none but "none"
        moving = f"{condition.removesuffix(', offset 3')}: moving"
        for key in keys if arm != "moving" else ():
            contrast = f"{condition}: {key}, {arm} - moving"
            difference = bootstrap(column(name, key) - column(moving, key))
            summary["contrasts"][contrast] = difference
            if difference["seeds"]:
                print(f"{contrast:62} {show(difference)}")
    summary["decision"] = decide(summary["contrasts"])
    for arm, said in summary["decision"].items():
        print(f"{arm}: {said}")
    draw(summary)
    return summary


def draw(summary: dict) -> None:
    figure, axes = panels(3)
    looks = zip(
        ("none", *ARMS), "osDx^v", ("0.6", "black", "black", "tab:orange", "tab:blue", "tab:blue")
    )
    toy = [f"toy, {condition}" for condition in TOY]
    rates = ["exact, sd 1, lr 2e-5", "exact, sd 1", "exact, sd 1, lr 1.5e-4"]
    for i, (arm, marker, color) in enumerate(looks):
        look = dict(marker=marker, color=color, elinewidth=0.6, label=arm)
        look |= dict(ls="--" if arm in ("ema", "rloo") else "-")
        variance = [summary["variance"][f"trained, {level}"][arm] for level in LEVELS]
        rows = [(axes[0], variance)]
        if arm in ARMS[1:]:
            for ax, conditions in zip(axes[1:], (rates, toy)):
                keys = [f"{condition}: objective, {arm} - moving" for condition in conditions]
                known = [summary["contrasts"][key] for key in keys if key in summary["contrasts"]]
                rows += [(ax, known)]
        for ax, cells in rows:
            columns = [[cell[key] for cell in cells] for key in ("mean", "low", "high")]
            mean, low, high = map(np.array, columns)
            places = np.arange(len(cells)) + 0.06 * (i - 2.5)
            ax.errorbar(places, mean, (mean - low, high - mean), **look)
    axes[0].set(yscale="log", ylabel="variance of the gradient / |g|²", xticks=range(3))
    axes[0].set(xticklabels=["0", "1", "3"], xlabel="sd of the prompts' levels")
    for ax, world, labels in (
        (axes[1], "exact", ("2e-5", "5e-5", "1.5e-4")),
        (axes[2], "toy", ("5e-4", "1e-3")),
    ):
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(title=f"{world} world", xlabel="learning rate", xticks=range(len(labels)))
        ax.set_xticklabels(labels)
    axes[1].set(ylabel="objective, minus moving's")
    axes[0].legend()
    save(figure, "baselines")


if __name__ == "__main__":
    main("baselines", __doc__, work, report, seeds=8)
