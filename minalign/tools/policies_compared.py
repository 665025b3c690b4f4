"""Policies compared on the same held-out prompts with the same random numbers, and best of n."""

from __future__ import annotations

import gc
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..measuring.measures import (
    best_of_n,
    best_of_n_kl,
    best_of_n_wins,
    bootstrap_interval,
    collapse_verdict,
    paired_bootstrap,
    win_scores,
)
from ..measuring.policies import Measured, measure_policy
from ..models.loading import load_policy
from ..models.padding import context_of
from ..models.precision import autocast
from ..running.errors import require
from ..running.files import write_json, write_json_lines
from ..running.run import describe
from ..task import Task, load_task

if typing.TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.lora import AdapterView
    from .evaluate import Config

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
    policy: PreTrainedModel | AdapterView, task: Task, config: Config, seed: int, full: bool = True
) -> Measured:
    """All measures of a policy.

    Args:
        seed: of sampling.
        full: see measure_policy.
    Raises:
        UserError: a reward is not finite.
    """
    measured = measure_policy(
        policy,
        task,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        batch_size=config.batch_size,
        full=full,
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
    longest = max(len(prompt.ids) for prompt in task.eval_prompts) + config.max_new_tokens
    for name in tqdm(config.model or (), desc="policies", unit="policy", leave=False, disable=None):
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


def compare_policies(config: Config, device: torch.device, dtype: torch.dtype, out: Path) -> None:
    """Load, measure, compare, print and save: the start policy, those of --model, --best-of."""
    rewards = config.rm or toy_rewards()
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
        best = measure_best_of(task, config) if config.best_of else {}
    results = results_of(config, measured, control) | best
    print("\n" + measures_table(measured, count))
    print("\n" + comparisons_table(results))
    if best:
        print("\n" + best_of_table(best["best_of"], best["best_of_samples"]))
    print("\ncollapse")
    for name, heading in headings(measured).items():
        print(f"  {heading:17}  {results['models'][name]['verdict']}")
    write_json(out / "results.json", results)
    rows = [{"model": name} | s._asdict() for name in measured for s in measured[name].samples]
    write_json_lines(out / "samples.jsonl", rows)
    print(f"\nsaved {out}/results.json, {out}/samples.jsonl")


def measure_best_of(task: Task, config: Config) -> dict:
    """The best of n samples of the start policy, for each n of --best-of: results.json's best_of.

    One sample more is drawn for each prompt than the largest n has, so that each best of n has
    another one to be compared with. Prompts that the reward does not always apply to are left out.
    """
    samples = max(config.best_of) + 1
    asked = [prompt for prompt in task.eval_prompts for _ in range(samples)]
    drawn = measure(task.start, task._replace(eval_prompts=asked), config, config.seed + 2, False)
    groups = [drawn.samples[i : i + samples] for i in range(0, len(asked), samples)]
    known = [group for group in groups if all(one.reward is not None for one in group)]
    left_out = f"--best-of: {len(groups) - len(known)} of {len(groups)} prompts are left out: "
    left_out += "the reward does not apply to all of their samples"
    require(len(known) > 1, f"{left_out}: expected two or more, for an interval")
    if len(known) < len(groups):
        print(left_out)
    values = {"reward": [[one.reward for one in group] for group in known]}
    for name, of_text in task.measures.items():
        texts = [[one.prompt + one.completion for one in group] for group in known]
        values[name] = [list(map(of_text, group)) for group in texts]
    values = {name: torch.tensor(found) for name, found in values.items()}  # (prompts, samples)
    points = []
    for n in sorted(config.best_of):
        means = {name: best_of_n(values["reward"], n, found) for name, found in values.items()}
        point = {"n": n, "kl_bound": best_of_n_kl(n)}
        for name, found in (means | {"win_rate": best_of_n_wins(values["reward"], n)}).items():
            low, high = bootstrap_interval(found.tolist(), config.seed)
            point |= {name: found.mean().item(), f"{name}_low": low, f"{name}_high": high}
        points.append(point)
    return {"best_of_samples": samples, "best_of": points}


def best_of_table(points: Sequence[dict], samples: int) -> str:
    """A table with one line for each n: the bound of its KL, and means with their intervals.

    Args:
        points: of measure_best_of.
        samples: per prompt.
    """
    names = [name for name in points[0] if f"{name}_low" in points[0]]
    lines = [f"best of n samples of the start policy, from {samples} per prompt, 95% intervals"]
    lines += [f"{'n':>6}{'KL at most':>12}" + "".join(f"{name:>26}" for name in names)]
    for point in points:
        cells = (
            f"{point[name]:z.3f} [{point[f'{name}_low']:z.3f}, {point[f'{name}_high']:z.3f}]"
            for name in names
        )
        cells = "".join(f"{cell:>26}" for cell in cells)
        lines.append(f"{point['n']:6}{point['kl_bound']:12.3f}{cells}")
    return "\n".join(lines)


def results_of(config: Config, measured: dict[str, Measured], control: Measured) -> dict:
    """What results.json holds: every policy against the start policy and the first of --model.

    Args:
        measured: policies by name, the start policy among them.
        control: the start policy with other random numbers.
    """
    models = config.model or []
    pairs = [("start", name) for name in models] + [(models[0], name) for name in models[1:]]
    comparisons = [
        {"model": b, "against": a} | compare(measured[a], measured[b], config.seed)
        for a, b in pairs
    ]
    metrics = {}
    for name, one in measured.items():
        verdict = collapse_verdict(one.completions, one.metrics["entropy"])
        metrics[name] = one.metrics | {"verdict": verdict}
    null = compare(measured["start"], control, config.seed)
    difference = null["reward_difference"]
    return {
        "prompts": len(control.samples),
        "models": metrics,
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
