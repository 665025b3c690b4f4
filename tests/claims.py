"""What README and docs/experiments.md claim to have measured, and where each number is kept.

A claim is a text of the page, with {} where a result stands, and the results in their order:
numbers, or means with an interval, as the files of tests/experiments/results/ have them. The page
decides how many digits stand there, whether a sign, a leading 0 and an interval do. Line breaks
are spaces. tests/check_claims.py compares, and puts new results into the pages.

FIXED are texts whose numbers were chosen, counted or cited, and not measured. NOT_KEPT are those
sections whose results are in no file, by their headings.
"""

import math
import statistics

FIXED = {
    "README.md": [
        "(50 s on 2 idle cores; others come near)",  # what a clock said, once
        "before step 150 after",
        "| after 200 steps |",
        "on 2 CPU cores;",
        "Python 3.11",
        "2406.16768",
        "2402.14740",
        "ema <- (1 - mu) ema + mu theta; SLERP; (1 - eta) theta_init",
        "95% over five seeds",
        "At KL 2 WARP",
        "At KL 4 one EMA-anchor",
    ],
    "docs/reference_runs.md": [
        "a really pretrained language model of 260,032 parameters",
        "Of seed 0, by reward",
    ],
    "docs/experiments.md": [
        "No loss was found at the default horizon of 5 batches;",
        """6 words, at most 5 per completion. All 3,906 completions of 4 prompts are enumerated, and
        a Llama of 10^5 weights""",
        "In brackets are 95% bootstrap intervals",
        "reward models of 100 to 6400 pairs",  # below a figure
        "(toy world; thresholds from two other seeds, for at most a tenth of their good runs)",
        "at equal policy steps (400 of 64 samples), five seeds",
        "| KL 1 | KL 2 | KL 4 |",
        "and ties at KL 4.",
        "- At beta .1, where all curves are lower",
        "200 steps, five seeds, gold reward",
        "| gold at KL .5 | at KL 1 | after 200 steps: KL, gold | minus all weights at KL .5 |",
        "With the embedding of its 43 words frozen",
    ],
}
NOT_KEPT = {
    "docs/reference_runs.md": [
        "## Repeat it",
        "## What comes in",
        "## What comes out",
        "## Is it the same?",
        "## Models and data of a hub",
        "## On a GPU",
    ]
}


def minus(result):
    """A - B of what is kept as B - A."""
    low, high = -result["high"], -result["low"]
    return result | dict(mean=-result["mean"], low=low, high=high)


def largest(results):
    """The mean that is farthest from 0, without its sign."""
    return max(abs(result["mean"]) for result in results if result["mean"] is not None)


def anchors(r):
    found, seeds = r["anchors"]["contrasts"], len(r["anchors"]["seeds"])
    yield (
        """| EMA anchor or fixed, beta swept for both? | EMA is higher at KL 1 by {}, with beta
        picked on other seeds. Against a fixed anchor that takes as many steps to that KL: {}, so
        it is a gentler way there, not a better front. The gap to the optimum at KL 1 is {} (EMA)
        and {} (fixed) | {} |""",
        found["KL 1: EMA - fixed, each with the other half's best beta"],
        found["KL 1: ema 0.3 - fixed of as many steps"],
        found["KL 1: optimal - EMA"],
        found["KL 1: optimal - fixed"],
        seeds,
    )
    shares = [found[f"beta {beta}, step 240: KL, EMA / falling"]["mean"] for beta in (1, 3, 10)]
    yield (
        """| Is an EMA anchor a fixed one with beta / (1 + mu t)? | Nearly: reward at KL 1 differs
        by {} at beta 1; its KL lags by {} to {}% after 240 steps | {} |""",
        found["beta 1, KL 1: reward, EMA - falling"],
        100 - 100 * max(shares),
        100 - 100 * min(shares),
        seeds,
    )


def merging(r):
    found, seeds = r["merging"]["contrasts"], len(r["merging"]["seeds"])
    yield (
        """| Does merging M runs beat one? | At KL 1, against the same runs: M = 2 {}, 3 {}, 5 {}.
        As planned, two runs against the mean of all five: {} | {} |""",
        *[found[f"KL 1: SLERP of {m} - one of these {m} runs"] for m in (2, 3, 5)],
        found["KL 1: SLERP of 2 - one run, both by LITI"],
        seeds,
    )
    yield (
        """| SLERP or LERP? One angle per layer, tensor or model? | At matched KL no difference: {}
        for two runs, {} for five; the scopes lie within {}. At equal eta SLERP goes further: {}
        reward, {} nats | {} |""",
        found["KL 1: slerp 2 - lerp 2"],
        found["KL 1: slerp 5 - lerp 5"],
        largest(one for key, one in found.items() if ": slerp 5 - slerp 5, " in key),
        found["M = 2, eta 1: reward, SLERP - LERP"],
        found["M = 2, eta 1: kl, SLERP - LERP"],
        seeds,
    )
    yield (
        "| LITI of one run against its training curve? | {} at KL 1 | {} |",
        found["KL 1: one run by LITI - its training curve"],
        seeds,
    )
    yield (
        """batch 32 gives {} degrees, batch 4 {}, batch 1 {}, three times the learning rate for a
        third of the steps {}. Merging gains more where the angle is wide | {} |""",
        *[
            found[f"{arm}: angle of 2 runs, degrees"]
            for arm in ("batch 32", "base", "batch 1", "lr x 3, steps / 3")
        ],
        seeds,
    )


def iterations(r):
    found, rewards = r["iterations"]["contrasts"], r["iterations"]["rewards"]
    seeds = len(r["iterations"]["seeds"])
    yield (
        """| WARP (I = 3, M = 2), or its samples spent otherwise? | At KL 1: minus one run of six
        times the batch {}; minus one merge of six runs {}; minus six times the steps {}, at a sixth
        of the learning rate {} | {} |""",
        *[
            found[f"KL 1: I=3, eta 0.5 - {other}"]
            for other in (
                "6x batch, LITI",
                "merge of 6",
                "6x steps, LITI",
                "6x steps, lr / 6, LITI",
            )
        ],
        seeds,
    )
    yield (
        """| Do iterations help? eta .3 or .5? | I = 3 minus I = 1 at KL 1: {}, for three times the
        samples; they reach further (KL 3 in {} worlds against {}). eta at I = 3, .5 minus .3: {}
        | {} |""",
        found["KL 1: I=3, eta 0.5 - I=1"],
        rewards["I=3, eta 0.5"]["3.0"]["seeds"],
        rewards["I=1"]["3.0"]["seeds"],
        found["KL 1: I=3, eta 0.5 - I=3, eta 0.3"],
        seeds,
    )


def baselines(r):
    found, spread = r["baselines"]["contrasts"], r["baselines"]["variance"]
    values, seeds = r["baselines"]["values"], len(r["baselines"]["seeds"])
    levels, toy = ("exact, sd 0", "exact, sd 1", "exact, sd 3"), "toy, lr 5e-4"
    toy_seeds = values[f"{toy}: moving"]["objective"]["seeds"]

    def objective(arm, *conditions):
        return [found[f"{condition}: objective, {arm} - moving"] for condition in conditions]

    yield (
        """where prompts differ by 0 / 1 / 3 standard deviations: none {} / {} / {}, moving average
        {} / {} / {}, exponential {} / {} / {}, of each prompt {} / {} / {}, RLOO {} / {} / {},
        shrunk RLOO {} / {} / {} | {} |""",
        *[
            spread[f"trained, sd {sd}"][arm]
            for arm in ("none", "moving", "ema", "prompt", "rloo", "shrink")
            for sd in (0, 1, 3)
        ],
        seeds,
    )
    yield (
        """Exact world, where prompts differ by 0 / 1 / 3: RLOO {}, {}, {}; shrunk {}, {}, {};
        exponential {}, {}, {}; of each prompt {}, {}, {}. Toy world: RLOO {}, shrunk {},
        exponential {} | {}; {} |""",
        *[one for arm in ("rloo", "shrink", "ema", "prompt") for one in objective(arm, *levels)],
        *[one for arm in ("rloo", "shrink", "ema") for one in objective(arm, toy)],
        *(seeds, toy_seeds),
    )
    high = "exact, sd 1, lr 1.5e-4", "toy, lr 1e-3"
    yield (
        """Exact world, three times the rate: moving average {} nats, RLOO {}, shrunk {}; objective
        minus the moving average's: RLOO {}, shrunk {}. Toy world, twice the rate: {}, {}, {}; {},
        {} | {}; {} |""",
        *[
            one
            for condition in high
            for one in (
                *[
                    values[f"{condition}: {arm}"]["kl"]["mean"]
                    for arm in ("moving", "rloo", "shrink")
                ],
                *objective("rloo", condition),
                *objective("shrink", condition),
            )
        ],
        *(seeds, toy_seeds),
    )
    yield (
        """at KL 1, minus the moving average's, it is {} where prompts differ by 1 and {} by 3.""",
        *[found[f"exact, sd {sd}: reward at KL 1, rloo - moving"] for sd in (1, 3)],
    )
    yield (
        """| What if 3 is added to all rewards? | Nothing with a baseline. Without one the
        variance is {} instead of {}, and the objective is {} below the moving average's, instead
        of {} | {} |""",
        spread["trained, sd 1, offset 3"]["none"],
        spread["trained, sd 1"]["none"],
        minus(found["exact, sd 1, offset 3: objective, none - moving"]),
        minus(found["exact, sd 1: objective, none - moving"]),
        seeds,
    )


def kl_target(r):
    values, seeds = r["kl_target"]["values"], len(r["kl_target"]["seeds"])
    what = ("reward - front of the sweep", "KL at the end / target", "peak KL / target")
    yield (
        """Where targets .5 / 1 / 2 end, reward minus that of the sweep's final points: {}, {}, {}.
        KL ends at {}, {}, {} of its target, after a peak of {}, {}, {} times. Target 1
        with a horizon of 1 batch {}, of 20 {} | {} |""",
        *[values[f"target {target:g}: {one}"] for one in what for target in (0.5, 1, 2)],
        *[values[f"target 1, horizon {n}: {what[0]}"] for n in (1, 20)],
        seeds,
    )


def best_of_n(r):
    study, seeds = r["best_of_n"], len(r["best_of_n"]["seeds"])
    spent = study["equal samples"]
    yield (
        """Reward at KL 1: best policy that there is {}, best of n {}, one run {}, WARP {}; WARP
        minus best of n {}. The run's last policy is worth the best of {}, and has cost less after
        {} answers | {} |""",
        *[
            study["rewards"][name]["KL 1"]["mean"]
            for name in ("best policy", "best of n", "one run, LITI", "WARP")
        ],
        study["contrasts"]["KL 1: WARP - best of n"],
        spent["n as good as the run's end"],
        spent["answers until the run is cheaper"],
        seeds,
    )


def kl_placement(r):
    gradients, found = r["kl_placement"]["gradients"], r["kl_placement"]["contrasts"]
    end = "objective at the end, beta {}: {} - k1 in reward".format
    errors = ("k2 as loss", "k3 as loss", "k2 in reward", "k3 in reward")
    both = ("k1 in reward", "k2 of sequence as loss")
    yield (
        """Error of the expected gradient at {} / {} / {} nats: k1 in the reward, and k2 of the
        sequence as a loss, {} / {} / {}; token losses k2 {} / {} / {}, k3 {} / {} / {}; k2 and k3
        in the reward {} / {} / {} and {} / {} / {}; k1 as a loss {}. Objective of trained policies,
        minus k1 in the reward: at beta .3, k3 loss {}, k3 in the reward {}; at beta 1, {} and {} |
        {} |""",
        *[at["kl"] for at in gradients],
        *[largest(at[way][0] for way in both) for at in gradients],
        *[at[way][0] for way in errors for at in gradients],
        largest(at["k1 as loss"][0] for at in gradients),
        *[found[end(beta, f"k3 {how}")] for beta in (0.3, 1) for how in ("as loss", "in reward")],
        len(r["kl_placement"]["seeds"]),
    )


def over_optimisation(r):
    study = r["over_optimisation"]
    sizes, seeds = (100, 400, 6400), len(study["reported seeds"])
    turned = [sum(study["end"][f"{n} {beta}"]["turned"] for n in sizes) for beta in (0, 0.1, 0.3)]
    of_each = seeds * len(sizes)
    found, ranks = study["calibrated"], study["AUROC"]
    alarms = ("outside", "disagreement", "length", "KL", "not ended")
    ranked = ("outside", "length", "KL", "gradient norm rises")
    yield (
        """With beta 0 in {} of {} runs, by leaving the grammar; with .1 in {} of {}, with .3 in {}.
        Best gold at beta .1: {}, {}, {} with 100, 400, 6400 pairs | {} |""",
        *(turned[0], of_each, turned[1], of_each, turned[2]),
        *[study["end"][f"{n} 0.1"]["best gold"] for n in sizes],
        seeds,
    )
    yield (
        """Before the turn are warned, of {}: features of the reward model outside the start's cloud
        (Mahalanobis) {}, disagreement of three reward models {}, length {}, KL {}, texts without an
        end {}; of {} runs that never turn are stopped {}, {}, {}, {}, {}. Gold lost by stopping at
        the alarm, features minus length: {}. Never stopping loses {}; KL saves {} of it, gradient
        norm {}, mostly after the turn | {} |""",
        *(found["turned"], *[found[alarm]["hits"] for alarm in alarms]),
        found["runs"] - found["turned"],
        *[found[alarm]["stops without need"] for alarm in alarms],
        study["primary"],
        found["never stopping"],
        minus(found["KL"]["gold lost - never stopping's"]),
        minus(found["gradient norm rises"]["gold lost - never stopping's"]),
        seeds,
    )
    yield (
        """AUROC of "gold has fallen": features outside {}, length {}, KL {}, gradient norm {}; of
        "it will at the next evaluation, for the first time": {}, {}, {}, {} (.5 is chance) | {}
        |""",
        *[ranks[signal][what] for what in ("fallen", "next") for signal in ranked],
        seeds,
    )
    yield (
        """gold at KL 1 with 400 pairs and beta 0 / .1 / .3 is {} / {} / {} (five seeds)""",
        *[study["gold at KL"]["400 1"][beta] for beta in ("0", "0.1", "0.3")],
    )


def ordinal(r):
    arms, found = r["ordinal"]["arms"], r["ordinal"]["contrasts"]
    seeds = len(r["ordinal"]["seeds"])
    yield (
        """Spearman correlation with gold {} against {}: {}. With half of the labels random, ties
        counted half: {}, and strict as Bradley-Terry. With ratings: {} over ties counted half alone
        | {} |""",
        arms["half, 0"]["gold"],
        arms["bradley-terry, 0"]["gold"],
        found["half, 0 - bradley-terry, 0: gold"],
        found["half, 0.5 - bradley-terry, 0.5: gold"],
        found["half + ratings, 0 - half, 0: gold"],
        seeds,
    )
    yield ("A shared encoder does not: it becomes uniform | {} |", seeds)
    yield (
        "rank correlation {} with ties counted half, {} with ratings | {} |",
        arms["half, 0"]["var~error"],
        arms["half + ratings, 0"]["var~error"],
        seeds,
    )


def uncertainty(r):
    worlds = r["uncertainty"]["unrelated"], r["uncertainty"]["good is uncertain"]
    ways = ("inverse_std", "inverse_variance", "one_plus_std")
    trained = worlds[0]["trained - none"]
    yield (
        """cosine with the gradient of E[r] {} (1/sigma), {} (1/sigma^2), {} (1/(1+sigma)), and b
        matters. True reward at KL 1 of the policies that are best for it, if sigma says nothing of
        quality: {}, {}, {}; if good answers are the uncertain ones: {}, {}, {}. Trained, at KL
        .5: no mean differs by more than {} | {}; {} |""",
        *[worlds[0]["gradient"][way]["cosine with E[r]"] for way in ways],
        *[world["ideal - none"][f"{way} 0"] for world in worlds for way in ways],
        largest(world["trained - none"][f"{way}, KL 0.5"] for world in worlds for way in ways),
        len(r["uncertainty"]["seeds"]),
        trained["none, KL 0.5"]["seeds"],
    )


def classic_mistakes(r):
    study, seeds = r["classic_mistakes"], len(r["classic_mistakes"]["seeds"])
    found, ends = study["contrasts"], study["ends"]
    longer = "length at the end: mean, no baseline, {0} - sum, no baseline, {0}".format
    yield (
        """| Mean of a completion's log-probs instead of the sum? | Objective {}. Without a baseline
        lengths follow the sign of the rewards (+3: {} tokens of {}, -3: {}) | {} |""",
        found["objective at the end: mean - sum"],
        found[longer("+3")],
        study["start length"],
        found[longer("-3")],
        seeds,
    )
    yield (
        """At .7 the logged KL is {} nats too high, objective {}; at 1.4 it is {} too low | {} |""",
        ends["sampling at 0.7"]["reported KL - KL"],
        found["objective at the end: sampling at 0.7 - sum"],
        minus(ends["sampling at 1.4"]["reported KL - KL"]),
        seeds,
    )


def warp_front(r):
    gold, found = r["warp_front"]["gold"], r["warp_front"]["contrasts"]
    kls = ("KL 1", "KL 2", "KL 4")
    fixed, ema, double = (
        f"one run, {kind}" for kind in ("fixed anchor", "EMA anchor", "EMA anchor, twice the batch")
    )
    rows = [
        (f"{label}, beta {beta[1:]}", f"{kind} {beta}")
        for label, kind in (
            ("one run, fixed anchor", fixed),
            ("one run, EMA anchor", ema),
            ("one EMA run of 200 steps, twice the batch", double),
            ("WARP (I = 2, M = 2)", "WARP"),
        )
        for beta in ("0.1", "0.3")
    ]
    rows.append(("best of n samples of the start policy, no training", "best of n"))
    for label, name in rows:
        cells = [gold[name][kl] for kl in kls]
        numbers = [value for cell in cells for value in (cell["mean"], cell["seeds"])]
        yield (f"| {label} | {{}} ({{}}) | {{}} ({{}}) | {{}} ({{}}) |", *numbers)
    for label, other in (
        ("one run, fixed anchor", fixed),
        ("one run, EMA anchor", ema),
        ("one EMA run, twice the batch", double),
        ("best of n", "best of n"),
    ):
        yield (
            f"| WARP minus {label} | {{}} | {{}} | {{}} |",
            *[found[f"{kl}: WARP - {other}"] for kl in kls],
        )
    yield (
        "the EMA run of the same beta at each KL: {}, {}, {}.",
        *[found[f"{kl}, beta 0.1: WARP - {ema}"] for kl in kls],
    )
    yield ("as far as 64 samples reach ({} nats at most", gold["best of n"]["end KL"]["mean"])
    last = gold[f"{ema} 0.3"]
    yield (
        """No n up to 64 is as good as the last policy of the EMA run with beta .3 (gold {} at {}
        nats)""",
        last["end"]["mean"],
        last["end KL"]["mean"],
    )


def lora_front(r):
    study = r["lora_front"]
    gold, found, trained = (study[part] for part in ("gold", "contrasts", "trained"))
    labels = {
        "all weights": "all weights",
        "embedding frozen": "all but the tied embedding",
        "rank 8": "`--lora-rank 8`",
        "rank 32": "`--lora-rank 32`",
    }
    for arm, label in labels.items():
        of, difference = gold[arm], found.get(f"KL 0.5: {arm} - all weights")
        yield (
            f"| {label} | {{}} | {{}} | {{}} ({{}}) | {{}}, {{}} | {'{} ' * bool(difference)}|",
            trained[arm],
            *[of[key]["mean"] for key in ("KL 0.5", "KL 1")],
            of["KL 1"]["seeds"],
            *[of[key]["mean"] for key in ("end kl", "end gold")],
            *([difference] if difference else []),
        )


def first_run(r):
    runs = r["first_run"]["beta 0.1"], r["first_run"]["beta 0"]
    start, best, after = (runs[0][when] for when in ("before", "best", "after"))
    for name in ("reward", "kl_sft", "gold", "grammatical"):
        yield (f"{name} {{}} {{}} {{}} ", *[at[name] for at in (start, best, after)])
    rows = ("| start policy |", "| `--beta 0.1` |", "| `--beta 0` |")
    for row, at in zip(rows, (start, after, runs[1]["after"])):
        numbers = at["reward"], at["gold"], at["kl_sft"], 100 * at["grammatical"]
        form = " {} | {} | {} | {}% |"
        form = " {} | **{}** | {} | {}% |" if row == rows[1] else form
        form = " **{}** | {} | {} | {}% |" if row == rows[2] else form
        yield (row + form, *numbers)


def warp_pays(r):
    found = r["warp_front"]["contrasts"]
    yield ("has {} more gold reward than", found["KL 2: WARP - one run, fixed anchor"])
    yield ("is as good ({}).", found["KL 4: WARP - one run, EMA anchor"])


def speed(r):
    works = {(x["benchmark"], x["shape"], x["work"], x["who"]): x for x in r["speed"]}
    ratios = works["policy_step", "S", "", "TRL"]["ratios"]
    yield ("[{} times as long](docs/speed.md)", statistics.median(ratios))


def over_seeds(values):
    """Mean, lowest and highest of a few seeds."""
    return dict(mean=statistics.mean(values), low=min(values), high=max(values))


def reference(r):
    seeds = r["reference"]["seeds"].values()

    def of(name):
        return over_seeds([seed["measured"][name] for seed in seeds])

    def took(stage, unit):
        return statistics.mean(seed["took"][stage][unit] for seed in seeds)

    yield ("| held-out pair accuracy of the reward model | {} |", of("rm: accuracy"))
    yield ("| start policy | {} | 0 |", of("policy: reward, step 0"))
    for label, name in (
        ("REINFORCE, step 20", "policy: {}, step 20"),
        ("REINFORCE, step 100", "policy: {}, step 100"),
        ("WARP, eta .3", "warp: {}, eta 0.3"),
        ("WARP, eta .5", "warp: {}, eta 0.5"),
        ("WARP, eta 1", "warp: {}, eta 1"),
    ):
        yield (f"| {label} | {{}} | {{}} |", of(name.format("reward")), of(name.format("kl_sft")))
    for n in (4, 16):
        name = f"best of n: reward, n = {n}"
        yield (f"| best of {n} | {{}} | {{}} |", of(name), math.log(n) - (n - 1) / n)
    for stage in ("rm", "policy", "warp", "evaluation"):
        units = ("seconds", "cpu_seconds", "peak_mib")
        yield (f"| {stage} | {{}} | {{}} | {{}} |", *[took(stage, unit) for unit in units])


STUDIES = {
    "README.md": [first_run, warp_pays, speed],
    "docs/reference_runs.md": [reference],
    "docs/experiments.md": [
        anchors,
        merging,
        iterations,
        baselines,
        kl_target,
        best_of_n,
        kl_placement,
        over_optimisation,
        ordinal,
        uncertainty,
        classic_mistakes,
        warp_front,
        lora_front,
    ],
}


def claims_of(results):
    """Page -> its claims, with the numbers that `results` (name -> what the file says) has."""
    return {
        page: [(text,) for text in FIXED[page]]
        + [one for study in studies for one in study(results)]
        for page, studies in STUDIES.items()
    }
