"""Ordinal or Bradley-Terry reward models from the same pairs, and does the predicted variance mean anything? (toy world)

    python tests/experiments/ordinal.py --seeds 5        resumes; about 70 s a seed on one core
    python tests/experiments/ordinal.py --report         table and figure from what is there

Reward models on the start policy's body (86 thousand weights, scores 1..10), each 100 steps of 32 of the noisy rater's pairs,
one epoch, lr 2e-3 as in train_rm.py, the last model taken: Bradley-Terry, ordinal with ties half or strict, and half plus the
rating loss (weight 1; ratings are the rater's, and stay with their texts). Of the training pairs a share of 0, .25, .5 or 1 has
a label that a coin decides; the held-out pairs and their labels (about 950, rater's noise alone) are the same for all arms of a
seed. "untrained" is the ordinal model before its first step. P(chosen better) of ordinal models counts ties half, whatever the
loss. "free": 64 pairs of items whose logits are the parameters themselves, a fresh coin for every label: the strict loss can
tell the two apart there, which an encoder that sees noise alone does not (tried on seed 100 first: it stays at the uniform
distribution).

Primary contrasts: ordinal (half) minus Bradley-Terry at no random labels, in pair accuracy, NLL and rank correlation with gold;
strict minus half at .5 random labels, in mean predicted sd and share of bimodal score distributions (less than .2 of the mass
within 1.5 of the mean; a uniform one has .3 or more; on seed 100 counting peaks had called the ripples of the random head
peaks). Does variance track error: rank correlation of the predicted variance with the squared error of the reward, mapped to
gold by least squares; with its distance from the middle of the scale, which lowers a variance by itself; with ratings also mean
variance over mean squared error against the rater's ratings, 1 where the variance is right.
"""

import math
import random

import numpy as np
import torch
from seeds import RESULTS, bootstrap, main, show

import train_rm
from minalign import toy
from minalign.batches import Example, encode_pairs
from minalign.evaluate import expected_calibration_error
from minalign.losses import expected_score, ordinal_pairwise_loss, score_variance
from minalign.reward import RewardModel

PAIRS, BATCH, LR = 3200, 32, 2e-3
HALF = dict(loss="ordinal", ties="half")
LOSSES = {  # flags, and shares of random labels
    "bradley-terry": ({}, (0, 0.25, 0.5)),
    "half": (HALF, (0, 0.25, 0.5, 1)),
    "strict": (HALF | dict(ties="strict"), (0, 0.25, 0.5, 1)),
    "half + ratings": (HALF | dict(rating_coef=1.0), (0, 0.5)),
}
COLUMNS = ("accuracy", "NLL", "ECE", "gold", "sd", "bimodal", "var~error", "var~distance", "var/rating error")


def swapped(example: Example) -> Example:
    """The pair with the other label; a text keeps its rating."""
    chosen, rejected, pair = example
    ratings = dict(chosen_rating=pair.rejected_rating, rejected_rating=pair.chosen_rating)
    return Example(rejected, chosen, pair._replace(chosen=pair.rejected, rejected=pair.chosen, **ratings))


def fit(config, reward_model: RewardModel, examples: list) -> None:
    """train_rm.py's loop without all that files need."""
    parameters = list(reward_model.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    steps = len(examples) // BATCH
    for step in range(steps):
        batch = examples[step * BATCH : (step + 1) * BATCH]
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1)
        logits = reward_model.forward([e.chosen for e in batch] + [e.rejected for e in batch])
        optimizer.zero_grad()
        train_rm.pair_losses(config, logits, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def bimodal(logits: torch.Tensor) -> float:
    distance = (torch.arange(1, logits.shape[1] + 1) - expected_score(logits)[:, None]).abs()
    return ((logits.softmax(1) * (distance <= 1.5)).sum(1) < 0.2).float().mean().item()


def free_logits(ties: str, seed: int) -> dict:
    draws = torch.Generator().manual_seed(seed)
    logits = (0.1 * torch.randn(2, 64, 10, generator=draws)).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for _ in range(2000):
        coin = torch.rand(64, 1, generator=draws) < 0.5
        a, b = logits
        loss = ordinal_pairwise_loss(torch.where(coin, a, b), torch.where(coin, b, a), ties).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = logits.detach()
    sd = score_variance(logits.flatten(0, 1)).sqrt().view(2, 64)
    loss = (ordinal_pairwise_loss(*logits, ties) + ordinal_pairwise_loss(*logits.flip(0), ties)).mean() / 2
    shown = logits[:, sd.amax(0).argsort()[32]].softmax(1).tolist()
    cells = {"loss": loss, "narrower sd": sd.amin(0).mean(), "wider sd": sd.amax(0).mean()}
    return {name: value.item() for name, value in cells.items()} | {"bimodal": bimodal(logits.flatten(0, 1)), "pair": shown}


def rank_correlation(a, b) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values):
        _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def measures(config, reward_model: RewardModel, held_out: list) -> dict[str, float]:
    pairs = [e.pair for e in held_out]
    gold = [toy.gold_reward(p.prompt + p.chosen) for p in pairs] + [toy.gold_reward(p.prompt + p.rejected) for p in pairs]
    ratings = np.array([p.chosen_rating for p in pairs] + [p.rejected_rating for p in pairs])
    logits = reward_model.logits([e.chosen for e in held_out] + [e.rejected for e in held_out])
    rewards = reward_model.read_out(logits)
    gap = torch.sub(*rewards.chunk(2))
    ordinal = config.loss == "ordinal"
    log_p = -ordinal_pairwise_loss(*logits.chunk(2), "half") if ordinal else torch.nn.functional.logsigmoid(gap)
    accuracy = ((gap > 0) + 0.5 * (gap == 0)).float().mean().item()
    values = [accuracy, -log_p.mean().item(), expected_calibration_error(log_p.exp()), rank_correlation(rewards, gold)]
    if ordinal:
        variance, rewards = score_variance(logits).numpy(), rewards.numpy()
        error = (np.polyval(np.polyfit(rewards, gold, 1), rewards) - gold) ** 2
        values += [float(np.sqrt(variance).mean()), bimodal(logits), rank_correlation(variance, error)]
        values += [
            rank_correlation(variance, np.abs(rewards - 5.5)),
            float(variance.mean() / np.mean((rewards - ratings) ** 2)),
        ]
    return dict(zip(COLUMNS, values))


def work(seed: int) -> dict:
    training, held_out = toy.preference_pairs(seed, eval_share=0.1)
    result = {f"free {ties}": free_logits(ties, seed) for ties in ("half", "strict")}
    for loss, (flags, shares) in LOSSES.items():
        config = train_rm.resolve(train_rm.Config(**flags))
        for share in shares:
            torch.manual_seed(0)  # one head for all, as in train_rm.py
            reward_model = RewardModel.from_base(toy.start_policy_folder(), num_labels=config.num_scores or 1)
            drawn = dict(max_tokens=reward_model.context, seed=seed)
            examples = encode_pairs(training, reward_model.encode, max_pairs=PAIRS + 64, **drawn)[:PAIRS]  # some are dropped
            held = encode_pairs(held_out, reward_model.encode, max_pairs=len(held_out), **drawn)
            if loss == "half" and not share:
                result["untrained"] = measures(config, reward_model, held)
            coins = random.Random(seed)  # two a pair: a larger share holds the smaller ones
            examples = [swapped(e) if (coins.random() < share) & (coins.random() < 0.5) else e for e in examples]
            fit(config, reward_model, examples)
            result[f"{loss}, {share:g}"] = measures(config, reward_model, held)
    return result


def report(results: dict[int, dict]) -> dict:
    summary = {"arms": {}, "contrasts": {}}
    print(f"{'loss, random labels':22}" + "".join(f"{column:>24}" for column in COLUMNS))
    for arm in ["untrained"] + [f"{loss}, {share:g}" for loss, (_, shares) in LOSSES.items() for share in shares]:
        cells = summary["arms"][arm] = {c: bootstrap([r[arm].get(c, math.nan) for r in results.values()]) for c in COLUMNS}
        shown = [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells.values()]
        print(f"{arm:22}" + "".join(f"{text:>24}" for text in shown))
    for ties in ("half", "strict"):
        names = ("loss", "narrower sd", "wider sd", "bimodal")
        cells = summary["arms"][f"free {ties}"] = {
            n: bootstrap([r[f"free {ties}"][n] for r in results.values()]) for n in names
        }
        print(f"free {ties:17}" + "   ".join(f"{name} {show(cell)}" for name, cell in cells.items()))
    wanted = [(f"half, {s:g}", f"bradley-terry, {s:g}", COLUMNS[:4]) for s in (0, 0.25, 0.5)]
    wanted += [(f"strict, {s:g}", f"half, {s:g}", COLUMNS[:7]) for s in (0, 0.25, 0.5, 1)]
    wanted += [(f"half + ratings, {s:g}", f"half, {s:g}", COLUMNS) for s in (0, 0.5)]
    for one, other, columns in wanted:
        for c in columns:
            difference = bootstrap([r[one][c] - r[other][c] for r in results.values()])
            summary["contrasts"][f"{one} - {other}: {c}"] = difference
            print(f"{one} - {other}: {c:18} {show(difference)}")
    draw(results, summary["arms"])
    return summary


def draw(results: dict[int, dict], arms: dict) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(7, 3), layout="constrained")
    looks = dict(zip(LOSSES, (("o:", "grey"), ("s-", "black"), ("^--", "tab:orange"), ("D-.", "tab:blue"))))
    for axis, column, title in zip(axes, ("gold", "sd"), ("rank correlation with gold", "mean predicted sd, scores")):
        for loss, (line, colour) in looks.items():
            shares = LOSSES[loss][1]
            cells = [arms[f"{loss}, {share:g}"][column] for share in shares]
            axis.plot(shares, [c["mean"] for c in cells], line, color=colour, markersize=4, lw=1.2, label=loss)
            axis.fill_between(shares, [c["low"] for c in cells], [c["high"] for c in cells], color=colour, alpha=0.12, lw=0)
        axis.set(xlabel="share of random labels", ylabel=title)
    axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    for distribution in next(iter(results.values()))["free strict"]["pair"]:
        axes[2].plot(range(1, 11), distribution, looks["strict"][0], color=looks["strict"][1], markersize=4, lw=1.2)
    axes[2].set(xlabel="score", ylabel="probability", xticks=(1, 4, 7, 10), ylim=(0, None))
    axes[2].set_title("strict, coins for labels:\na pair of free distributions", fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "ordinal.png", dpi=100)


if __name__ == "__main__":
    main("ordinal", __doc__, work, report, seeds=5)
