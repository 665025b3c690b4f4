"""Does pessimism protect gold reward from an over-optimised ordinal reward model? (toy world)

    python tests/experiments/risk.py --seeds 5       resumes; about 3 minutes per seed on one core
    python tests/experiments/risk.py --report        table and figure from what is there

Each seed has two ordinal reward models (scores 1..10, ties half), both of the same 400 of the noisy
rater's pairs, 50 steps, the best by held-out loss kept: "pairs" learns of the pairs alone,
"ratings" of the rater's scores, too (weight 1). Policies: 60 steps of 64 with a fixed anchor and
beta .1, evaluated on 150 held-out prompts every 5 steps. Arms:

- mean: the reward is the expected score;
- risk tau: -tau log E[exp(-score / tau)], with tau 1 or .3 scores;
- inverse_std, one_plus_std: the mean, and advantages weighted by 1/sigma or 1/(1 + sigma).

With beta 0, and of "ratings", there are the arms mean and risk 1 alone, for time. All arms have
--standardize-rewards. A pessimistic reward has a smaller scale than the mean: at equal beta its
penalty would count for more, and beta alone moves gold at equal KL (over_optimisation.py). So each
reward has sd 1 on the start policy's samples, and sigma is in these units, too.

Primary contrast: gold at KL 1, risk 1 minus mean, "pairs", beta .1, paired by seed. Further: the
other arms minus mean; KL .5 and 2; beta 0; best and last gold of a run. And of each reward its rank
correlation with gold, and with the mean, on 1,000 held-out reviews.

Chosen on seed 100: 400 pairs and 50 steps (gold turned with beta 0), and the taus. There a tau of
.1 put nearly all rewards at the lowest score, and 3 was as good as the mean. There, too, the
rewards of risk 1 and of the mean had a rank correlation of 1.000 ("pairs") and .996 ("ratings"): if
they order texts alike, a pessimistic reward is the mean with large values compressed.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from ordinal import rank_correlation
from seeds import bootstrap, main, panels, save, show
from toy_world import at, train_curve, train_reward_model

from minalign.data import toy
from minalign.losses import expected_score, risk_adjusted_score, score_variance
from minalign.reward import RewardModel

PAIRS, RM_STEPS, STEPS, EVERY, PROMPTS, REVIEWS = 400, 50, 60, 5, 150, 1000
KLS, TAUS = (0.5, 1.0, 2.0), (1.0, 0.3)
MODELS = {"pairs": 0.0, "ratings": 1.0}  # weight of the ratings
ARMS = {
    "mean": {},
    "risk 1": {"risk": 1.0},
    "risk 0.3": {"risk": 0.3},
    "inverse_std": {"uncertainty": "inverse_std"},
    "one_plus_std": {"uncertainty": "one_plus_std"},
}
RUNS = [("pairs", 0.1, arm) for arm in ARMS]
RUNS += [(*run, arm) for run in (("pairs", 0.0), ("ratings", 0.1)) for arm in ("mean", "risk 1")]


def knows(folder: Path, seed: int) -> dict[str, float]:
    """Rank correlations on held-out reviews of each way to read the reward model, and its sd."""
    reward_model = RewardModel.from_pretrained(str(folder))
    _, pairs = toy.preference_pairs(seed, eval_share=0.1)
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    texts = texts[:REVIEWS]
    gold = [toy.gold_reward(prompt + answer) for prompt, answer in texts]
    logits = reward_model.logits([reward_model.encode(*text) for text in texts])
    logits = logits[:, reward_model.order]
    mean, sd = expected_score(logits), score_variance(logits).sqrt()
    found = {"mean ~ gold": rank_correlation(mean, gold), "sd ~ mean": rank_correlation(sd, mean)}
    for tau in TAUS:
        rewards = risk_adjusted_score(logits, tau)
        found[f"risk {tau:g} ~ gold"] = rank_correlation(rewards, gold)
        found[f"risk {tau:g} ~ mean"] = rank_correlation(rewards, mean)
        scales = (rewards.std() / mean.std()).item()
        found[f"sd of risk {tau:g} over the mean's"] = scales
    error = torch.tensor(gold) - mean
    return found | {"sd ~ |error|": rank_correlation(sd, (error - error.mean()).abs())}


def work(seed: int) -> dict:
    result = {"rm": {}, "knows": {}, "curves": {}}
    with tempfile.TemporaryDirectory() as name:
        for model, weight in MODELS.items():
            folder = Path(name) / model
            flags = dict(max_pairs=PAIRS, max_eval_pairs=500, steps=RM_STEPS, eval_every=10)
            flags |= dict(loss="ordinal", rating_coef=weight)
            result["rm"][model] = train_reward_model(folder, seed, **flags)
            result["knows"][model] = knows(folder, seed)
        for model, beta, arm in RUNS:
            result["curves"][f"{model}, beta {beta:g}, {arm}"] = train_curve(
                Path(name) / f"{model} {arm} {beta:g}",
                seed,
                rm=[str(Path(name) / model)],
                standardize_rewards=True,
                beta=beta,
                steps=STEPS,
                eval_every=EVERY,
                eval_prompts=PROMPTS,
                **ARMS[arm],
            )
    return result


def measures(curve: list[dict[str, float]]) -> dict[str, float]:
    gold = [point["gold"] for point in curve]
    found = {f"gold at KL {kl:g}": at(curve, kl) for kl in KLS}
    return found | {"best gold": max(gold), "last gold": gold[-1], "last KL": curve[-1]["kl"]}


def report(results: dict[int, dict]) -> dict:
    seeds = list(results.values())
    summary = {"knows": {}, "values": {}, "contrasts": {}}
    for model in MODELS:
        columns = seeds[0]["knows"][model]
        cells = {key: bootstrap([seed["knows"][model][key] for seed in seeds]) for key in columns}
        cells["accuracy"] = bootstrap([seed["rm"][model]["eval_accuracy"] for seed in seeds])
        summary["knows"][model] = cells
        print(f"{model}: " + ", ".join(f"{key} {cell['mean']:.3f}" for key, cell in cells.items()))
    values = {  # run -> measure -> one number per seed
        name: [measures(seed["curves"][name]) for seed in seeds] for name in seeds[0]["curves"]
    }
    values = {
        name: {key: np.array([one[key] for one in found]) for key in found[0]}
        for name, found in values.items()
    }
    for name, found in values.items():
        cells = summary["values"][name] = {key: bootstrap(row) for key, row in found.items()}
        shown = (f"  {key} {cell['mean']:+.2f} ({cell['seeds']})" for key, cell in cells.items())
        print(f"{name:32}" + "".join(shown))
    for name, found in values.items():
        where, _, arm = name.rpartition(", ")
        if arm == "mean":
            continue
        mean = values[f"{where}, mean"]
        cells = {key: bootstrap(row - mean[key]) for key, row in found.items()}
        summary["contrasts"][f"{name} - mean"] = cells
        for key, cell in cells.items():
            print(f"{name + ' - mean':40} {key:15} {show(cell)}")
    summary["primary"] = summary["contrasts"]["pairs, beta 0.1, risk 1 - mean"]["gold at KL 1"]
    print(f"primary: {show(summary['primary'])}")
    draw(results)
    return summary


def draw(results: dict[int, dict]) -> None:
    figure, axes = panels(2, sharey=True)
    looks = dict(zip(ARMS, ("black", "tab:blue", "tab:cyan", "tab:orange", "tab:red")))
    kls = np.linspace(0.1, 3, 30)
    for axis, beta in zip(axes, (0.0, 0.1)):
        for model, of_run, arm in RUNS:
            if of_run != beta:
                continue
            name = f"{model}, beta {beta:g}, {arm}"
            golds = [[at(result["curves"][name], kl) for kl in kls] for result in results.values()]
            golds = np.array(golds)
            golds[:, np.isnan(golds).any(0)] = np.nan  # a mean of fewer seeds is of other seeds
            line = "-" if model == "pairs" else ":"
            label = f"{arm}, with ratings" if model == "ratings" else arm
            axis.plot(kls, golds.mean(0), line, color=looks[arm], label=label)
        axis.set(title=f"beta {beta:g}", xlabel="KL to the start, nats")
    axes[0].set_ylabel("gold reward")
    axes[1].legend(loc="lower right")
    save(figure, "risk")


if __name__ == "__main__":
    main("risk", __doc__, work, report, seeds=5)
