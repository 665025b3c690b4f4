"""Policies compared on the same held-out prompts with the same random numbers, by a reward model.

    # the toy world
    python -m minalign evaluate --model runs/policy-1 runs/policy-2 --rm runs/rm-1
    # other prompts
    python -m minalign evaluate --model runs/my-policy --start path-or-id --rm runs/my-rm \\
        --dataset prompts.jsonl

Of runs, the flags of the data, --eval-prompts, the start policy, the rewards, --temperature,
--max-new-tokens and --format are those that the runs had, where none are given: the held-out
prompts then are the same.
Every policy is set against the start policy, and against the first of --model. As a control, the
start policy is set against itself with other random numbers: differences no larger than that are
noise. The folder gets results.json and samples.jsonl.
"""

from __future__ import annotations

import gc
import math
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from ..running.device import pick_device, pick_dtype
from ..running.errors import require
from ..running.files import write_json, write_json_lines
from ..running.flag_groups import DeviceFlags, TaskFlags, resolve_task
from ..running.flags import SEEDS, flag
from ..running.run import describe, show_config
from ..running.run_folder import claimed_folder
from .settings import DATA, REWARD, SAMPLING, parse_flags_of_runs

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch
    from transformers import PreTrainedModel

    from ..measuring.policies import Measured
    from ..models.lora import AdapterView
    from ..task import Task


@dataclass
class Config(TaskFlags, DeviceFlags):
    """Evaluation."""

    model: list[str] | None = flag(
        None, "policies: runs, folders or hub ids; the first is what the others are compared with"
    )
    start: str = flag("", "policy that the KL is measured to (default: the toy world's)")
    eval_prompts: int = flag(128, "held-out prompts, one completion each", "[2, inf)")
    batch_size: int = flag(16, "completions per pass: memory, not the result", "[1, inf)")
    seed: int = flag(
        0, "seed of sampling and of the intervals; the control has the next one", SEEDS
    )
    out: str = flag("", "folder of the results (default: the next free runs/evaluation-N)")


TABLE = {  # metric -> what the table calls it; what is not listed follows under its own name
    "reward": "reward",
    "kl_sft": "kl_sft, exact (nats per completion)",
    "kl_sft_se": "  its standard error",
    "kl_k1": "kl_sft, sampled k1",
    "kl_k1_se": "  its standard error",
    "length": "length (tokens)",
    "ended": "ended by itself (share)",
    "entropy": "entropy (nats per token)",
    "distinct_1": "distinct_1",
    "distinct_2": "distinct_2",
    "repetition": "repetition",
    "self_similarity": "self_similarity",
}


def measure(
    policy: PreTrainedModel | AdapterView, task: Task, config: Config, seed: int
) -> Measured:
    """All measures of a policy.

    Args:
        seed: of sampling.
    Raises:
        UserError: a reward is not finite.
    """
    from ..measuring.policies import measure_policy

    measured = measure_policy(
        policy,
        task,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        batch_size=config.batch_size,
        full=True,
    )
    count = len(measured.samples)
    broken = sum(not math.isfinite(sample.reward or 0.0) for sample in measured.samples)
    require(
        not broken,
        f"--rm: {broken} of {count} rewards are not finite: fix the reward, or leave it out",
    )
    return measured


def compare(first: Measured, second: Measured, seed: int) -> dict:
    """The second against the first by reward, prompt by prompt: mean difference and win rate.

    Both have 95% intervals. Prompts where the reward does not apply to both are left out.

    Args:
        seed: of the bootstrap.
    Raises:
        UserError: fewer than two prompts are left.
    """
    from ..measuring.measures import paired_bootstrap, win_scores

    pairs = zip(*([sample.reward for sample in one.samples] for one in (first, second)))
    known = [pair for pair in pairs if None not in pair]
    require(
        len(known) > 1,
        f"--rm: applies to both completions of {len(known)} of {len(first.samples)} prompts: "
        "expected two or more, for an interval",
    )
    rewards = list(map(list, zip(*known)))
    wins = win_scores(*rewards)
    return {
        "reward_difference": paired_bootstrap(*rewards, seed)._asdict(),
        "win_rate": paired_bootstrap([0.0] * len(wins), wins, seed)._asdict(),
    }


def load_policies(
    config: Config, task: Task, device: torch.device
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The policies of --model, one after the other, by name.

    Raises:
        UserError: one cannot be compared with the start policy.
    """
    from ..models.loading import load_policy
    from ..models.padding import context_of

    longest = max(len(prompt.ids) for prompt in task.eval_prompts) + config.max_new_tokens
    for name in tqdm(config.model, desc="policies", unit="policy", leave=False, disable=None):
        policy, tokenizer = load_policy(name)
        require(
            tokenizer.get_vocab() == task.tokenizer.get_vocab(),
            f"--model {name}: its vocabulary is not that of --start: a KL needs the same tokens",
        )
        context = context_of(policy.config) or longest
        require(
            longest <= context,
            f"--model {name}: a context of {context} tokens, {longest} are needed: lower "
            "--max-new-tokens or --max-prompt-tokens",
        )
        yield name, policy.to(device).requires_grad_(False)
        del policy  # one at a time in memory, beside the start policy
        gc.collect()


def headings(names: Iterable[str]) -> dict[str, str]:
    """Name -> heading of its column: the end of a long path; numbered, where two are alike.

    >>> list(headings(["runs/policy-1", "experiments/2026-11/fixed-0.3-seed-4"]).values())
    ['runs/policy-1', '...xed-0.3-seed-4']
    >>> list(headings(["start", "a/experiments/policy-1", "b/experiments/policy-1"]).values())
    ['0 start', '1 ments/policy-1', '2 ments/policy-1']
    """
    found = {name: name if len(name) <= 17 else f"...{name[-14:]}" for name in names}
    if len(set(found.values())) == len(found):
        return found
    return {name: f"{number} {head[-14:]}" for number, (name, head) in enumerate(found.items())}


def measures_table(measured: dict[str, Measured], count: int) -> str:
    """A table with one line per measure and one column per policy.

    Args:
        count: of held-out prompts.
    """
    columns = list(measured)
    metrics = measured[columns[0]].metrics
    label = TABLE | {name: name for name in metrics if name not in TABLE}
    width = 2 + max(map(len, label.values()))
    title = f"{count} held-out prompts"
    lines = [f"{title:{width}}" + "".join(f"{head:>19}" for head in headings(columns).values())]
    for name, text in label.items():
        values = "".join(f"{measured[column].metrics[name]:z19.3f}" for column in columns)
        lines.append(f"{text:{width}}{values}")
    return "\n".join(lines)


def comparison_line(name: str, comparison: dict) -> str:
    """`name`, mean difference of rewards and win rate, each with its interval."""
    difference, wins = comparison["reward_difference"], comparison["win_rate"]
    return (
        f"{name}  {difference['mean']:+z.3f} "
        f"[{difference['low']:+z.3f}, {difference['high']:+z.3f}]  "
        f"{wins['mean']:.1%} [{wins['low']:.1%}, {wins['high']:.1%}]"
    )


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags.

    Raises:
        UserError: flags that make no sense together.
    """
    require(bool(config.model), "--model is missing: one or more policies to evaluate")
    for name in config.model:
        require(config.model.count(name) == 1, f"--model {name}: given twice")
    require("start" not in config.model, "--model start: is a name of the table: write ./start")
    if not config.dataset:
        require(not config.start, f"--start {config.start}: needs --dataset, too: the prompts")
    else:
        given = bool(config.start and config.rm)
        require(given, f"--dataset {config.dataset}: needs --start and --rm, too")
    resolve_task(config)
    return config


def toy_rewards() -> list[str]:
    """The toy world's reward model.

    Raises:
        UserError: there is none yet.
    """
    from ..data import toy

    folder = toy.folder() / "reward-model"
    require(
        folder.exists(),
        "--rm is missing, and the toy world has no reward model yet: give one, or run "
        "train_policy.py first",
    )
    return [str(folder)]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, load, measure, compare, print and save."""
    take = SAMPLING | {name: name for name in (*DATA, *REWARD, "eval_prompts")}
    take["start"], prog = "model", "minalign evaluate"
    config = parse_flags_of_runs(Config, __doc__, argv, prog, lambda c: c.model or [], take)
    resolve(config)
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)

    from ..models.functions import check_functions
    from ..models.precision import autocast
    from ..task import load_task

    rewards = config.rm or toy_rewards()
    check_functions(rewards, config.dataset)
    with claimed_folder(config, "evaluation") as (out, _):
        show_config(config, device, reason, dtype)
        task = load_task(config, config.start, rewards, device, dtype, config.batch_size)
        count = len(task.eval_prompts)
        require(count > 1, f"{count} held-out prompt: expected two or more, for an interval")
        write_json(out / "config.json", describe(config, device, dtype))

        with autocast(device, dtype):
            measured = {"start": measure(task.start, task, config, config.seed)}
            control = measure(task.start, task, config, config.seed + 1)
            for name, policy in load_policies(config, task, device):
                measured[name] = measure(policy, task, config, config.seed)
                del policy  # one at a time in memory, beside the start policy
        results = results_of(config, measured, control)
        print("\n" + measures_table(measured, len(task.eval_prompts)))
        print("\n" + comparisons_table(results))
        print("\ncollapse")
        for name, heading in headings(measured).items():
            print(f"  {heading:17}  {results['models'][name]['verdict']}")
        write_json(out / "results.json", results)
        rows = [{"model": name} | s._asdict() for name in measured for s in measured[name].samples]
        write_json_lines(out / "samples.jsonl", rows)
        print(f"\nsaved {out}/results.json, {out}/samples.jsonl")


def results_of(config: Config, measured: dict[str, Measured], control: Measured) -> dict:
    """What results.json holds: every policy against the start policy and the first of --model.

    Args:
        measured: policies by name, the start policy among them.
        control: the start policy with other random numbers.
    """
    from ..measuring.measures import collapse_verdict

    first, *others = config.model
    pairs = [("start", name) for name in config.model] + [(first, name) for name in others]
    comparisons = [
        {"model": b, "against": a} | compare(measured[a], measured[b], config.seed)
        for a, b in pairs
    ]
    models = {}
    for name, one in measured.items():
        verdict = collapse_verdict(one.completions, one.metrics["entropy"])
        models[name] = one.metrics | {"verdict": verdict}
    null = compare(measured["start"], control, config.seed)
    difference = null["reward_difference"]
    return {
        "prompts": len(control.samples),
        "models": models,
        "comparisons": comparisons,
        "control": null | {"covers_zero": difference["low"] <= 0 <= difference["high"]},
    }


def comparisons_table(results: dict) -> str:
    """A table with one line per comparison, and one for the control."""
    heads = headings(results["models"])
    rows = {f"{heads[c['model']]} minus {heads[c['against']]}": c for c in results["comparisons"]}
    rows["control: start minus start"] = control = results["control"]
    title = "paired by prompt, 95% intervals"
    width = max(map(len, [title, *rows]))
    lines = [f"{title:{width}}  reward difference, share of prompts won"]
    lines += [comparison_line(f"{name:{width}}", one) for name, one in rows.items()]
    says = "covers 0, as it should"
    if not control["covers_zero"]:
        says = "does not cover 0, as in one evaluation of twenty: try another --seed"
    lines.append(f"the control, the start policy with other random numbers, {says}")
    return "\n".join(lines)
