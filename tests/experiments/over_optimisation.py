"""When does gold reward turn down while the proxy still rises? (toy world)

And which number warns first?

    python tests/experiments/over_optimisation.py --seeds 7
    python tests/experiments/over_optimisation.py --report    table and figure from what is there

It resumes, and takes about 6 minutes per seed on one core.

Reward models (Bradley-Terry, train_rm.train) on 100, 400 and 6400 of the noisy rater's pairs:
one epoch or 50 steps, the best by held-out loss kept. Policies (train_policy.train): 80 steps of 64
with a fixed anchor and beta 0, .1 or .3, evaluated on 100 held-out prompts every 10 steps: 9 runs
per seed. A seed draws pairs, prompts and samples. Gold has turned at the first evaluation that lies
.5 or more under the best one before it.

Signals (SIGNALS; a larger one is more alarming), of each evaluation's held-out completions:

- outside: share whose reward-model features lie beyond the 95% quantile of the Mahalanobis distance
  of the start policy's samples (feature_cloud.py). Those are 1,000 on training prompts: 500 for
  mean and covariance (with Ledoit and Wolf's shrinkage), 500 for the quantile.
- disagreement: mean over the completions of the sd of three reward models' rewards. Each reward is
  standardised by the same 1,000 samples. The policy is trained on the first model; the other two
  saw as many pairs of other draws.
- length: |log of its ratio to the start's|. KL: nats to the start.
- the proxy, and collapse: see SIGNALS. Entropy, repeats, advantage sd and gradient norm are means
  of the ten training steps before. The first ten stand for the start.

An alarm is raised at the first evaluation whose signal exceeds a threshold. Seeds 5 and 6 set the
threshold of each signal, by the same rule: the smallest one that at most 10% of their runs that
never turn exceed. Seeds 0 to 4 are reported, and nothing of 5 and 6 but the thresholds.

Primary contrast: gold lost by stopping at the first alarm (against the run's best evaluation, mean
of a seed's 9 runs), outside minus length, paired by seed. "outside" is called useful if the
interval of that excludes 0 in its favour, and it stops no more of the runs that never turn.

Further, of each signal: turns it warns of before they happen, by how many steps; runs that never
turn which it stops; gold lost minus never stopping's, and minus length's. And without a threshold,
by AUROC over all evaluations of a seed's runs but the start's and the last:

- fallen: gold lies .5 under the best so far now, or at the next evaluation;
- next: it will at the next one for the first time; evaluations after a turn are left out.

An earlier form of this study ran on seeds 0 to 2: without the first two signals, and with
thresholds set on seed 100. These are the second table ("fixed"). The new signals were tried on
seeds above 99 for whether they run, and nothing was chosen there.
"""

import functools
import json
import math
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from feature_cloud import features, fit_cloud, outside
from seeds import bootstrap, main, panels, save, show
from toy_world import at, train_curve, train_reward_model

import train_policy
from minalign.reward import RewardModel, Scores
from minalign.rollout import sample_completions
from minalign.task import Task

SIZES, BETAS, KLS = (100, 400, 6400), (0.0, 0.1, 0.3), (0.5, 1.0, 2.0)
STEPS, EVERY, DROP = 80, 10, 0.5
ENSEMBLE, START_SAMPLES = 3, 1000
CALIBRATION, FALSE_ALARMS = (5, 6), 0.1
# logged at every step, of the samples that train
TRAINING = ("entropy", "repeated", "advantage_std", "grad_norm")


def rise(name: str, sign: int = 1):
    """The log of a number's ratio to the start's; sign -1: how far it fell."""
    return lambda now, start, rm: sign * math.log(max(now[name], 1e-9) / max(start[name], 1e-9))


# a point of the curve, the start's point, the reward model's held-out numbers -> signal; and the
# earlier study's threshold, NaN where it had none
SIGNALS = {
    "outside": (lambda now, start, rm: now["reward outside"], math.nan),
    "disagreement": (lambda now, start, rm: now["reward disagreement"], math.nan),
    "length": (lambda now, start, rm: abs(rise("length")(now, start, rm)), math.log(1.5)),
    "KL": (lambda now, start, rm: now["kl"], 4.0),
    "proxy, in sd of its texts": (
        lambda now, start, rm: (now["reward"] - rm["reward_mean"]) / rm["reward_std"],
        2.0,
    ),
    "entropy falls": (rise("entropy", -1), math.log(2)),
    "repeated": (lambda now, start, rm: now["repeated"], 0.1),
    "not ended": (lambda now, start, rm: 1 - now["ended"], 0.1),
    "distinct_2 falls": (rise("distinct_2", -1), math.log(2)),
    "advantage sd falls": (rise("advantage_std", -1), math.log(2)),
    "gradient norm rises": (rise("grad_norm"), math.log(2)),
}


class Watched:
    """A task's reward model, and two more parts of what it says of each completion.

    outside: 1 where the features lie outside the start policy's cloud. disagreement: sd of its and
    the others' rewards, each in standard deviations of the start policy's samples.
    """

    def __init__(self, task: Task, others: list[RewardModel]) -> None:
        self.models, self.num_labels = [task.reward, *others], task.reward.num_labels
        config = train_policy.resolve(train_policy.Config())
        prompts = random.Random(0).sample(list(task.train_prompts), START_SAMPLES)
        _, completions, _ = sample_completions(
            task.start,
            [prompt.ids for prompt in prompts],
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            eos_token_ids=task.eos_token_ids,
            seed=0,
            batch_size=500,
            stop=task.stop,
        )
        rows = task.reward.encode_rollout(task.tokenizer, prompts, completions)
        self.cloud = fit_cloud(features(task.reward, rows))
        self.start = [model.logits(rows)[:, 0] for model in self.models]

    def score_rollout(self, tokenizer, prompts, completions, batch_size) -> Scores:
        rows = self.models[0].encode_rollout(tokenizer, prompts, completions)
        rewards = [model.logits(rows, batch_size)[:, 0] for model in self.models]
        parts = {
            "outside": outside(features(self.models[0], rows), self.cloud).float(),
            "disagreement": disagreement(rewards, self.start),
        }
        return Scores(rewards[0], None, parts)


def watched(task: Task, others: list[RewardModel]) -> Task:
    """The task with its reward as Watched."""
    return task._replace(reward=Watched(task, others))


def disagreement(rewards: list[torch.Tensor], start: list[torch.Tensor]) -> torch.Tensor:
    """(N,): sd over the models of their rewards (N,), each standardised by its `start` rewards."""
    standardised = [(now - then.mean()) / then.std() for now, then in zip(rewards, start)]
    return torch.stack(standardised).std(0)


def work(seed: int) -> dict:
    result = {"rm": {}, "curves": {}}
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            steps = max(50, -(-size // 32))
            flags = dict(max_pairs=size, max_eval_pairs=500, steps=steps, eval_every=steps // 5)
            folders = [Path(name) / f"rm {size} {i}" for i in range(ENSEMBLE)]
            held_out = [
                train_reward_model(folder, seed + 1000 * i, **flags)
                for i, folder in enumerate(folders)
            ]
            result["rm"][str(size)] = held_out[0]
            others = [RewardModel.from_pretrained(str(folder)) for folder in folders[1:]]
            for beta in BETAS:
                out = Path(name) / f"{size} {beta}"
                curve = train_curve(
                    out,
                    seed,
                    adapt=functools.partial(watched, others=others),
                    rm=[str(folders[0])],
                    beta=beta,
                    steps=STEPS,
                    eval_every=EVERY,
                    eval_prompts=100,
                )
                rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
                result["curves"][f"{size} {beta:g}"] = with_training(curve, rows)
    return result


def with_training(curve: list[dict], rows: Iterable[dict]) -> list[dict[str, float]]:
    """Each evaluation with the means of the steps before it; the start with the first steps'."""
    rows, windows = list(rows), []
    for before, point in zip(curve, curve[1:]):
        steps = rows[before["step"] : point["step"]]
        windows.append({name: np.mean([row[name] for row in steps]).item() for name in TRAINING})
    return [point | window for point, window in zip(curve, windows[:1] + windows)]


def fallen(gold: np.ndarray) -> np.ndarray:
    """Which evaluations lie DROP or more under the best one before them."""
    return np.maximum.accumulate(gold) - gold >= DROP


def turn(gold: np.ndarray) -> int | None:
    """Index of the first evaluation that has fallen."""
    places = np.flatnonzero(fallen(gold))
    return int(places[0]) if len(places) else None


def threshold(signals: list[np.ndarray]) -> float:
    """The smallest that at most FALSE_ALARMS of these runs exceed; NaN where there are none."""
    peaks = sorted(signal.max() for signal in signals)
    allowed = int(FALSE_ALARMS * len(peaks))
    return float(peaks[-1 - allowed]) if peaks else math.nan


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive's value is above a negative's, a tie counting half; NaN without."""
    above, below = values[positive][:, None], values[~positive][None]
    if not above.size or not below.size:
        return math.nan
    return float(((above > below) + (above == below) / 2).mean())


def read(result: dict) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Run -> its gold, and its signals: of each evaluation after the start's."""
    runs = {}
    for name, curve in result["curves"].items():
        rm = result["rm"][name.split()[0]]
        signals = {
            signal: np.array([value(now, curve[0], rm) for now in curve[1:]])
            for signal, (value, _) in SIGNALS.items()
        }
        runs[name] = np.array([point["gold"] for point in curve]), signals
    return runs


def report(results: dict[int, dict]) -> dict:
    reported = {seed: result for seed, result in results.items() if seed not in CALIBRATION}
    summary = {"reported seeds": list(reported)} | ends(list(reported.values()))
    runs = {seed: read(result) for seed, result in reported.items()}
    quiet = [
        signals
        for seed in results
        if seed in CALIBRATION
        for gold, signals in read(results[seed]).values()
        if turn(gold) is None
    ]
    summary["calibration runs that never turn"] = len(quiet)
    calibrated = {name: threshold([signals[name] for signals in quiet]) for name in SIGNALS}
    fixed = {name: before for name, (_, before) in SIGNALS.items() if not math.isnan(before)}
    for title, thresholds in (("calibrated", calibrated), ("fixed", fixed)):
        summary[title] = alarms(title, runs, thresholds)
    summary["AUROC"] = aurocs(runs)
    own, length = (summary["calibrated"][name] for name in ("outside", "length"))
    primary = own["gold lost - length's"]
    no_more = own["stops without need"] <= length["stops without need"]
    summary["primary"] = primary | {"useful": bool(primary["high"] < 0 and no_more)}
    print(f"outside - length, gold lost: {show(primary)}; useful: {summary['primary']['useful']}")
    draw(reported)
    return summary


def ends(seeds: list[dict]) -> dict:
    """Where the runs end, and gold at equal KL."""
    summary = {"end": {}, "gold at KL": {}}
    print(
        "              held-out pairs right   best gold   gold at the end - best   "
        "     proxy, end - at best gold   runs that turn"
    )
    for name in seeds[0]["curves"]:
        size, beta = name.split()
        curves = [seed["curves"][name] for seed in seeds]
        gold = [np.array([point["gold"] for point in curve]) for curve in curves]
        proxy = [np.array([point["reward"] for point in curve]) for curve in curves]
        cells = {
            "accuracy": bootstrap([seed["rm"][size]["eval_accuracy"] for seed in seeds]),
            "best gold": bootstrap([g.max() for g in gold]),
            "gold lost": bootstrap([g[-1] - g.max() for g in gold]),
            "proxy gained": bootstrap([p[-1] - p[g.argmax()] for p, g in zip(proxy, gold)]),
            "turned": sum(turn(g) is not None for g in gold),
        }
        summary["end"][name] = cells
        means = f"{cells['accuracy']['mean']:.3f}   {cells['best gold']['mean']:+.2f}"
        changes = f"{show(cells['gold lost'])}   {show(cells['proxy gained'])}"
        turned = f"{cells['turned']} of {len(gold)}"
        print(f"{size:>5} pairs, beta {beta:4}  {means}   {changes}   {turned}")
    for size in SIZES:
        for kl in KLS:
            gold = {}
            for beta in BETAS:
                curves = [seed["curves"][f"{size} {beta:g}"] for seed in seeds]
                gold[beta] = np.array([at(curve, kl) for curve in curves])
            cells = {f"{beta:g}": bootstrap(values) for beta, values in gold.items()}
            cells["0.1 - 0"] = bootstrap(gold[0.1] - gold[0.0])
            summary["gold at KL"][f"{size} {kl:g}"] = cells
            shown = "   ".join(f"beta {beta}: {show(cell)}" for beta, cell in cells.items())
            print(f"gold at KL {kl:g}, {size:4} pairs:  {shown}")
    return summary


def alarms(title: str, runs: dict[int, dict], thresholds: dict[str, float]) -> dict:
    """What stopping at the first evaluation above each signal's threshold would have done."""
    every = [(seed, *run) for seed in runs for run in runs[seed].values()]
    lost = {name: {seed: [] for seed in runs} for name in ("never", *thresholds)}
    tally = {name: dict.fromkeys(("late or never", "stops without need"), 0) for name in thresholds}
    leads = {name: [] for name in thresholds}
    turns = [turn(gold) for _, gold, _ in every]
    for (seed, gold, signals), when in zip(every, turns):
        lost["never"][seed].append(gold.max() - gold[-1])
        for name, limit in thresholds.items():
            places = np.flatnonzero(signals[name] > limit)
            first = int(places[0]) + 1 if len(places) else None  # gold begins with the start's
            lost[name][seed].append(gold.max() - gold[-1 if first is None else first])
            if when is None:
                tally[name]["stops without need"] += first is not None
            elif first is not None and first < when:
                leads[name].append((when - first) * EVERY)
            else:
                tally[name]["late or never"] += 1
    lost = {name: np.array([np.mean(of[seed]) for seed in runs]) for name, of in lost.items()}
    turned = sum(when is not None for when in turns)
    summary = {"turned": turned, "runs": len(every), "never stopping": bootstrap(lost["never"])}
    never = show(summary["never stopping"])
    print(f"\n{title} thresholds: {turned} of {len(every)} runs turn; never stopping loses {never}")
    for name, counts in tally.items():
        hits, lead = len(leads[name]), float(np.median(leads[name])) if leads[name] else math.nan
        cells = {
            f"gold lost - {other}'s": bootstrap(lost[name] - lost[key])
            for other, key in (("never stopping", "never"), ("length", "length"))
        }
        counts |= {"threshold": thresholds[name], "hits": hits, "median lead, steps": lead}
        summary[name] = counts | cells
        before = f"{hits:2} of {turned} (median {lead:.0f} steps)"
        without = f"{counts['stops without need']:2} of {len(every) - turned}"
        found = "   ".join(f"{key} {show(cell)}" for key, cell in cells.items())
        print(
            f"{name:26} > {thresholds[name]:.3f}   before the turn {before}   "
            f"without need {without}   {found}"
        )
    return summary


def aurocs(runs: dict[int, dict]) -> dict:
    """Signal -> its AUROC for "fallen" and "next", and that minus length's."""
    found = {name: {"fallen": [], "next": []} for name in SIGNALS}
    for of_seed in runs.values():
        down = [fallen(gold) for gold, _ in of_seed.values()]
        now_or_next = np.concatenate([d[1:-1] | d[2:] for d in down])
        unturned = np.concatenate([~np.maximum.accumulate(d)[1:-1] for d in down])
        for name, cells in found.items():
            values = np.concatenate([signals[name][:-1] for _, signals in of_seed.values()])
            cells["fallen"].append(auroc(values, now_or_next))
            cells["next"].append(auroc(values[unturned], now_or_next[unturned]))
    summary = {}
    print("\nAUROC")
    for name, cells in found.items():
        summary[name] = {}
        for kind, values in cells.items():
            summary[name][kind] = bootstrap(values)
            difference = np.array(values) - np.array(found["length"][kind])
            summary[name][f"{kind} - length's"] = bootstrap(difference)
        shown = "   ".join(f"{key} {show(cell)}" for key, cell in summary[name].items())
        print(f"{name:26} {shown}")
    return summary


def draw(results: dict[int, dict]) -> None:
    figure, axes = panels(len(SIZES), sharey=True)
    for axis, size in zip(axes, SIZES):
        for beta, line in zip(BETAS, ("-", "--", ":")):
            curves = [result["curves"][f"{size} {beta:g}"] for result in results.values()]
            steps = [point["step"] for point in curves[0]]
            for column, colour in (("gold", "black"), ("reward", "tab:orange")):
                rewards = np.array([[point[column] for point in curve] for curve in curves])
                values, band = rewards - rewards[:, :1], dict(alpha=0.07, lw=0)
                label = f"beta {beta:g}" if column == "gold" else None
                axis.plot(steps, values.mean(0), line, color=colour, label=label)
                axis.fill_between(steps, values.min(0), values.max(0), color=colour, **band)
        axis.set(title=f"{size} pairs", xlabel="step")
    axes[0].set_ylabel("reward over the start's")
    axes[0].text(0.04, 0.96, "proxy", color="tab:orange", va="top", transform=axes[0].transAxes)
    axes[0].text(0.04, 0.04, "gold", transform=axes[0].transAxes)
    axes[-1].legend(loc="upper left")
    save(figure, "over_optimisation")


if __name__ == "__main__":
    main("over_optimisation", __doc__, work, report, seeds=7)
