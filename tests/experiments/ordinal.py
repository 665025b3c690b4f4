"""Ordinal or Bradley-Terry reward models from the same pairs? (toy world)

And does the predicted variance mean anything?

    python tests/experiments/ordinal.py --seeds 5        resumes; about 70 s per seed on one core
    python tests/experiments/ordinal.py --report         table and figure from what is there

Reward models on the start policy's body (86 thousand weights, scores 1..10), each 100 steps of 32
of the noisy rater's pairs, one epoch, lr 2e-3 as in train_rm.py, the last model taken:

- Bradley-Terry;
- ordinal with ties half or strict;
- half plus the rating loss (weight 1). Ratings are the rater's, and stay with their texts.

Of the training pairs a share of 0, .25, .5 or 1 has a label that a coin decides. The held-out pairs
and their labels (about 950, rater's noise alone) are the same for all arms of a seed. "untrained"
is the ordinal model before its first step. P(chosen better) of ordinal models counts ties half,
whatever the loss.

"free": 64 pairs of items whose logits are the parameters themselves, a fresh coin for every label.
The strict loss can tell the two apart there. An encoder that sees noise alone does not (tried on
seed 100 first: it stays at the uniform distribution).

Primary contrasts: ordinal (half) minus Bradley-Terry at no random labels, in pair accuracy, NLL and
rank correlation with gold; strict minus half at .5 random labels, in mean predicted sd and share of
bimodal score distributions. Bimodal is one with less than .2 of the mass within 1.5 of the mean; a
uniform one has .3 or more. On seed 100 counting peaks had called the ripples of the random head
peaks.

Does variance track error? Rank correlation of the predicted variance

- with the squared error of the reward, mapped to gold by least squares;
- with the reward's distance from the middle of the scale, which lowers a variance by itself.

With ratings also mean variance over mean squared error against the rater's ratings: 1 where the
variance is right.
"""

import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from seeds import bootstrap, main, panels, save, show

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_rm
from minalign.data import toy
from minalign.data.pairs import Example, encode_pairs
from minalign.losses import expected_score, ordinal_pairwise_loss, score_variance
from minalign.measuring.pairs import expected_calibration_error
from minalign.reward import RewardModel

PAIRS, BATCH, LR = 3200, 32, 2e-3
HALF = dict(loss="ordinal", ties="half")
LOSSES = {  # flags, and shares of random labels
    "bradley-terry": ({}, (0, 0.25, 0.5)),
    "half": (HALF, (0, 0.25, 0.5, 1)),
    "strict": (HALF | dict(ties="strict"), (0, 0.25, 0.5, 1)),
    "half + ratings": (HALF | dict(rating_coef=1.0), (0, 0.5)),
}
COLUMNS = "accuracy,NLL,ECE,gold,sd,bimodal,var~error,var~distance,var/rating error".split(",")


def swapped(example: Example) -> Example:
    """The pair with the other label; a text keeps its rating."""
    ratings = example.ratings and example.ratings[::-1]
    return Example(example.texts[::-1], ratings, -example.gap)


def fit(config, reward_model: RewardModel, examples: list) -> None:
    """train_rm.py's loop without all that files need."""
    parameters, objective = list(reward_model.model.parameters()), train_rm.objective_of(config)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    steps = len(examples) // BATCH
    for step in range(steps):
        batch = examples[step * BATCH : (step + 1) * BATCH]
        rise, fall = (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
        optimizer.param_groups[0]["lr"] = LR * min(rise, fall, 1)
        logits = reward_model.forward([e.texts[k] for k in range(2) for e in batch])
        optimizer.zero_grad()
        logits = logits.unflatten(0, (2, -1))
        train_rm.pair_losses(objective, logits, batch).mean().backward()
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
    one, other = (ordinal_pairwise_loss(*pair, ties) for pair in (logits, logits.flip(0)))
    cells = {"loss": (one + other).mean() / 2}
    cells |= {"narrower sd": sd.amin(0).mean(), "wider sd": sd.amax(0).mean()}
    numbers = {name: value.item() for name, value in cells.items()}
    shown = logits[:, sd.amax(0).argsort()[32]].softmax(1).tolist()
    return numbers | {"bimodal": bimodal(logits.flatten(0, 1)), "pair": shown}


def rank_correlation(a, b) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values):
        _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def measures(config, reward_model: RewardModel, held_out: list) -> dict[str, float]:
    texts = [example.texts[k] for k in range(2) for example in held_out]
    decode = reward_model.tokenizer.decode
    gold = [toy.gold_reward(decode(ids, skip_special_tokens=True)) for ids in texts]
    ratings = np.array([example.ratings[k] for k in range(2) for example in held_out])
    logits = reward_model.logits(texts)
    rewards = reward_model.read_out(logits)
    gap = torch.sub(*rewards.chunk(2))
    ordinal = config.loss == "ordinal"
    if ordinal:
        log_p = -ordinal_pairwise_loss(*logits.chunk(2), "half")
    else:
        log_p = torch.nn.functional.logsigmoid(gap)
    values = {  # the names are COLUMNS
        "accuracy": ((gap > 0) + 0.5 * (gap == 0)).float().mean().item(),
        "NLL": -log_p.mean().item(),
        "ECE": expected_calibration_error(log_p.exp()),
        "gold": rank_correlation(rewards, gold),
    }
    if ordinal:
        variance, rewards = score_variance(logits).numpy(), rewards.numpy()
        error = (np.polyval(np.polyfit(rewards, gold, 1), rewards) - gold) ** 2
        values |= {
            "sd": float(np.sqrt(variance).mean()),
            "bimodal": bimodal(logits),
            "var~error": rank_correlation(variance, error),
            "var~distance": rank_correlation(variance, np.abs(rewards - 5.5)),
            "var/rating error": float(variance.mean() / np.mean((rewards - ratings) ** 2)),
        }
    return values


def work(seed: int) -> dict:
    training, held_out = toy.preference_pairs(seed, eval_share=0.1)
    result = {f"free {ties}": free_logits(ties, seed) for ties in ("half", "strict")}
    for loss, (flags, shares) in LOSSES.items():
        config = train_rm.resolve(train_rm.Config(**flags))
        for share in shares:
            torch.manual_seed(0)  # one head for all, as in train_rm.py
            base, labels = toy.start_policy_folder(), config.num_scores or 1
            reward_model = RewardModel.from_base(base, num_labels=labels)
            drawn = dict(max_tokens=reward_model.context, seed=seed)
            # 64 more than needed: some are dropped
            examples = encode_pairs(training, reward_model.tokenizer, max_pairs=PAIRS + 64, **drawn)
            held = encode_pairs(held_out, reward_model.tokenizer, max_pairs=len(held_out), **drawn)
            if loss == "half" and not share:
                result["untrained"] = measures(config, reward_model, held)
            coins = random.Random(seed)  # two per pair: a larger share holds the smaller ones
            labelled = []
            for example in examples[:PAIRS]:
                by_coin, tails = coins.random() < share, coins.random() < 0.5
                labelled.append(swapped(example) if by_coin and tails else example)
            fit(config, reward_model, labelled)
            result[f"{loss}, {share:g}"] = measures(config, reward_model, held)
    return result


def report(results: dict[int, dict]) -> dict:
    summary = {"arms": {}, "contrasts": {}}
    seeds = list(results.values())
    print(f"{'loss, random labels':22}" + "".join(f"{column:>24}" for column in COLUMNS))
    arms = [f"{loss}, {share:g}" for loss, (_, shares) in LOSSES.items() for share in shares]
    for arm in ["untrained", *arms]:
        cells = {c: bootstrap([seed[arm].get(c, math.nan) for seed in seeds]) for c in COLUMNS}
        summary["arms"][arm] = cells
        shown = [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells.values()]
        print(f"{arm:22}" + "".join(f"{text:>24}" for text in shown))
    for ties in ("half", "strict"):
        names, arm = ("loss", "narrower sd", "wider sd", "bimodal"), f"free {ties}"
        cells = {name: bootstrap([seed[arm][name] for seed in seeds]) for name in names}
        summary["arms"][arm] = cells
        shown = "   ".join(f"{name} {show(cell)}" for name, cell in cells.items())
        print(f"free {ties:17}{shown}")
    wanted = [(f"half, {s:g}", f"bradley-terry, {s:g}", COLUMNS[:4]) for s in (0, 0.25, 0.5)]
    wanted += [(f"strict, {s:g}", f"half, {s:g}", COLUMNS[:7]) for s in (0, 0.25, 0.5, 1)]
    wanted += [(f"half + ratings, {s:g}", f"half, {s:g}", COLUMNS) for s in (0, 0.5)]
    for one, other, columns in wanted:
        for c in columns:
            difference = bootstrap([seed[one][c] - seed[other][c] for seed in seeds])
            summary["contrasts"][f"{one} - {other}: {c}"] = difference
            print(f"{one} - {other}: {c:18} {show(difference)}")
    draw(results, summary["arms"])
    return summary


def draw(results: dict[int, dict], arms: dict) -> None:
    from minalign.tools.figures import BLUE, GREY, ORANGE

    figure, axes = panels(3, height=2.8)
    looks = (("o:", GREY), ("s-", "black"), ("^--", ORANGE), ("D-.", BLUE))
    looks = dict(zip(LOSSES, looks))
    titles = {"gold": "rank correlation with gold", "sd": "mean predicted sd, scores"}
    for axis, (column, title) in zip(axes, titles.items()):
        for loss, (line, colour) in looks.items():
            shares = LOSSES[loss][1]
            cells = [arms[f"{loss}, {share:g}"][column] for share in shares]
            mean, low, high = ([cell[key] for cell in cells] for key in ("mean", "low", "high"))
            axis.plot(shares, mean, line, color=colour, label=loss)
            axis.fill_between(shares, low, high, color=colour, alpha=0.12, lw=0)
        axis.set(xlabel="share of random labels", ylabel=title)
    axes[0].legend(loc="lower left")
    line, colour = looks["strict"]
    for distribution in next(iter(results.values()))["free strict"]["pair"]:
        axes[2].plot(range(1, 11), distribution, line, color=colour)
    axes[2].set(xlabel="score", ylabel="probability", xticks=(1, 4, 7, 10), ylim=(0, None))
    axes[2].set_title("strict, coins for labels:\na pair of free distributions")
    save(figure, "ordinal")


if __name__ == "__main__":
    main("ordinal", __doc__, work, report, seeds=5)
