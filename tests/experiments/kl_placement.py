"""Where may the KL penalty stand: k1, k2 or k3, in the reward or as a loss? (exact world)

    python tests/experiments/kl_placement.py --seeds 6      resumes; about 90 s per seed on one core
    python tests/experiments/kl_placement.py --report       table and figure from what is there

The gradient that each placement has in expectation (a sum over all completions, detached where a
training step detaches) against the gradient of KL(policy || start): |g - g_true| / |g_true| and
cosine. Both are taken at policies that REINFORCE without a penalty (batch 32, at most 300 steps in
all: some seeds stay below 5) took past .5, 2 and 5 nats. l = log pi - log start of a token, L of a
sequence. k2 and k3 are sums over tokens where nothing else is said.

The front that each placement reaches: 96 steps of 8 samples, cumulative baseline over what is in
the reward, beta .1, .3 and 1 (k1 as loss: one, its expected gradient is 0 at any beta), the same
random numbers for every arm.

Primary contrast: the objective E[r] - beta KL where training ends (mean of the last 3
measurements), minus k1 in the reward's, at beta .3. Second: expected reward at KL .5, 1 and 2,
minus k1 in the reward's. The beta of each placement is the best one of the odd seeds for the even
ones and the reverse, among those that reach the KL on all those seeds.

Added after three seeds were seen: the objective at beta 1, too; after four: seeds 4 and 5.
"""

import copy

import numpy as np
import torch
from exact_world import (
    END,
    LENGTH,
    MASK,
    PROMPTS,
    World,
    lookup,
    make_world,
    reward_at,
    token_logprobs,
    train,
    truth,
)
from seeds import bootstrap, main, panels, save, show

from minalign.logprobs import kl_k1, kl_k2, kl_k3
from minalign.reinforce import MovingAverageBaseline, kl_penalized_rewards, reinforce_loss
from minalign.rollout import completion_logprobs, frozen_logprobs, generate

LEVELS, KLS, BETAS = (0.5, 2.0, 5.0), (0.5, 1.0, 2.0), (0.1, 0.3, 1.0)
DRAWS = {"max_new_tokens": LENGTH, "temperature": 1.0, "eos_token_ids": END, "pad_token_id": 0}
STEPS, BATCH, LR, EVERY = 96, 8, 5e-5, 12
TRAINED = (
    "k1 in reward",
    "k2 of sequence as loss",
    "k2 as loss",
    "k3 as loss",
    "k2 in reward",
    "k3 in reward",
    "k1 as loss",
)
PLACEMENTS = TRAINED + ("k3 of sequence in reward", "k3 in reward and as loss")
BETAS_OF = {name: BETAS if name != "k1 as loss" else BETAS[1:2] for name in TRAINED}
ARMS = [f"{name}, {beta:g}" for name, betas in BETAS_OF.items() for beta in betas]


def penalty(
    name: str, logprobs: torch.Tensor, anchor: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A completion's penalty in the reward and as a loss, (B,) each.

    Log-probs are (B, T), those of the policy with gradients.
    """
    zero = torch.zeros(len(mask))
    kind, sequence = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[name[:2]], "of sequence" in name
    if sequence:
        logprobs, anchor = logprobs.sum(1, keepdim=True), anchor.sum(1, keepdim=True)
        mask = mask[:, :1]
    if name == "k1 in reward":  # minalign's own
        return -kl_penalized_rewards(zero, logprobs, anchor, mask, 1.0), zero
    value = (kind(logprobs, anchor) * mask).sum(1)
    return value.detach() if "in reward" in name else zero, value if "as loss" in name else zero


def expected_gradients(world: World, policy: torch.nn.Module) -> dict[str, list[float]]:
    """Placement -> error and cosine of its expected gradient to that of KL(policy || start).

    The error is relative to the length of the latter.
    """
    policy = copy.deepcopy(policy).requires_grad_(True)
    logprobs = token_logprobs(policy).flatten(0, 1)  # (PROMPTS * N, LENGTH)
    anchor = token_logprobs(world.start).flatten(0, 1)
    mask = MASK.repeat(PROMPTS, 1)
    p = logprobs.sum(1).exp()

    def gradient(objective: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).double()

    exact = gradient((p * (logprobs - anchor).sum(1)).sum() / PROMPTS)
    result = {}
    for name in PLACEMENTS:
        in_reward, as_loss = penalty(name, logprobs, anchor, mask)
        loss = reinforce_loss(logprobs, mask, -in_reward) + as_loss
        found = gradient((p.detach() * loss).sum() / PROMPTS)
        cosine = (found @ exact / exact.norm() / found.norm()).item()
        if found.norm() / exact.norm() <= 1e-4:
            cosine = float("nan")  # of rounding alone
        result[name] = [((found - exact).norm() / exact.norm()).item(), cosine]
    return result


def train_placement(world: World, *, name: str, beta: float, seed: int) -> list[dict[str, float]]:
    """exact_world.train with the penalty elsewhere; the exact curve."""
    policy = copy.deepcopy(world.start).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    history, sampling = MovingAverageBaseline(), torch.Generator().manual_seed(seed)
    order = torch.Generator().manual_seed(seed + 1)
    curve = [{"step": 0} | truth(world, policy)]
    for step in range(1, STEPS + 1):
        asked = torch.randint(PROMPTS, (BATCH,), generator=order)
        prompts = (asked[:, None], torch.ones(BATCH, 1))
        tokens, mask, _ = generate(policy, *prompts, generator=sampling, **DRAWS)
        rollout = (*prompts, tokens, mask)
        logprobs = completion_logprobs(policy, *rollout, 1.0)
        anchor = frozen_logprobs(world.start, *rollout, 1.0, BATCH)
        in_reward, as_loss = penalty(name, logprobs, anchor, mask)
        rewards = world.rewards[asked, lookup(tokens, mask)].float()
        advantages = history.advantages(rewards - beta * in_reward)
        loss = (reinforce_loss(logprobs, mask, advantages) + beta * as_loss).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0:
            curve.append({"step": step} | truth(world, policy))
    return curve


def work(seed: int) -> dict:
    world = make_world(seed)
    result = {"gradients": [], "curves": {}}
    policy, parts = world.start, 0
    for level in LEVELS:
        while (kl := truth(world, policy)["kl"]) < level and parts < 60:
            # without a penalty the anchor does not matter, so training may go on from where it was
            parts += 1
            free = dict(steps=5, every=5, batch_size=32, lr=LR, beta=0.0)
            policy, _ = train(world, seed=1000 * seed + parts, init=policy, **free)
        result["gradients"].append({"level": level, "kl": kl} | expected_gradients(world, policy))
    for arm in ARMS:
        name, beta = arm.rsplit(", ", 1)
        result["curves"][arm] = train_placement(world, name=name, beta=float(beta), seed=seed)
    return result


def crossfitted(results: dict[int, dict], name: str, kl: float) -> np.ndarray:
    """A seed's reward at this KL with the beta that is best on the other half of the seeds.

    NaN where no beta reaches it.
    """
    arms = [arm for arm in ARMS if arm.rsplit(", ", 1)[0] == name]
    curves = [[result["curves"][arm] for result in results.values()] for arm in arms]
    rewards = np.array([[reward_at(curve, kl) for curve in row] for row in curves])
    chosen, odd = np.full(len(results), np.nan), np.arange(len(results)) % 2 == 1
    for half in (odd, ~odd):
        means = rewards[:, ~half].mean(1)  # NaN where one of those seeds does not reach the KL
        if np.isfinite(means).any():
            chosen[half] = rewards[np.nanargmax(means), half]
    return chosen


def report(results: dict[int, dict]) -> dict:
    summary = {"gradients": [], "ends": {}, "contrasts": {}}
    for i, level in enumerate(LEVELS):
        rows = [result["gradients"][i] for result in results.values()]
        kl, cells = bootstrap([row["kl"] for row in rows]), {}
        for name in PLACEMENTS:
            cells[name] = [bootstrap([row[name][j] for row in rows]) for j in (0, 1)]
        summary["gradients"].append({"level": level, "kl": kl} | cells)
        print(f"policies past {level:g} nats: KL {show(kl)}")
        for name, (error, cosine) in cells.items():
            print(f"    {name:26} error {show(error)}  cosine {show(cosine)}")
    print("where training ends: expected reward (over the start's), KL, objective")
    objectives = {}
    for arm in ARMS:
        name, beta = arm.rsplit(", ", 1)
        ends = [result["curves"][arm][-3:] for result in results.values()]
        reward = np.array([[point["reward"] for point in end] for end in ends]).mean(1)
        kl = np.array([[point["kl"] for point in end] for end in ends]).mean(1)
        objectives[arm] = reward - float(beta) * kl
        cells = [bootstrap(values) for values in (reward, kl, objectives[arm])]
        summary["ends"][arm] = cells
        print(f"    {arm:28}" + "".join(f"{cell['mean']:8.3f}" for cell in cells))
        if float(beta) >= 0.3 and name != "k1 in reward":
            contrast = f"objective at the end, beta {beta}: {name} - k1 in reward"
            difference = objectives[arm] - objectives[f"k1 in reward, {beta}"]
            summary["contrasts"][contrast] = bootstrap(difference)
    for kl in KLS:
        for name in TRAINED[1:]:
            contrast = f"reward at KL {kl:g}: {name} - k1 in reward"
            difference = crossfitted(results, name, kl) - crossfitted(results, "k1 in reward", kl)
            summary["contrasts"][contrast] = bootstrap(difference)
    for name, difference in summary["contrasts"].items():
        print(f"{name:66} {show(difference)}")
    draw(summary)
    return summary


def draw(summary: dict) -> None:
    figure, (left, right) = panels(2, sharey=True)
    rows = range(len(TRAINED))
    for part, marker in zip(summary["gradients"], "os^"):
        errors = [part[name][0]["mean"] for name in TRAINED]
        label = f"KL {part['kl']['mean']:.1f} nats"
        left.plot(errors, rows, marker, color="black", fillstyle="none", label=label)
    for row in rows[1:]:
        contrast = f"objective at the end, beta 0.3: {TRAINED[row]} - k1 in reward"
        cell = summary["contrasts"][contrast]
        right.plot([cell["low"], cell["high"]], [row, row], color="black", lw=1)
        right.plot(cell["mean"], row, "ok")
    left.legend()
    left.set(yticks=rows, yticklabels=TRAINED)
    left.set(xlabel="error of the expected gradient,\n|g - g of KL| / |g of KL|")
    right.axvline(0, color="grey", lw=0.8)
    right.set(xlabel="E[r] - .3 KL at the end,\nminus that of k1 in the reward")
    right.locator_params(axis="x", nbins=5)
    left.invert_yaxis()
    save(figure, "kl_placement")


if __name__ == "__main__":
    main("kl_placement", __doc__, work, report, seeds=6)
