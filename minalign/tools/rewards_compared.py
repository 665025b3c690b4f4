"""Reward models measured on the rows of a benchmark, or of any preference data."""

from __future__ import annotations

import gc
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.benchmarks import (
    PAIRS,
    REWARD_BENCH,
    REWARD_BENCH_2,
    RM_BENCH,
    TIES,
    Answers,
    form_of,
    read_answers,
)
from ..data.cells import report, shown
from ..data.chat import note_special_tokens
from ..data.columns import by_our_names, name_unread, parse_columns, read_items
from ..data.messages import Note
from ..data.rows import read_rows
from ..losses import ordinal_pairwise_loss
from ..measuring import benchmarks
from ..measuring.pairs import expected_calibration_error
from ..models.functions import call
from ..models.precision import autocast
from ..models.rewards import RewardFunction, load_rewards
from ..reward import RewardModel
from ..running.errors import require
from ..running.files import write_json, write_json_lines
from ..running.run import describe
from .policies_compared import headings
from .score import logits_of

if typing.TYPE_CHECKING:
    from .evaluate import Config

MOST_GROUPS = 40  # lines of the table; results.json has all
LONGER = "the longer wins"  # a reward like any other: the characters of the answer


class Scored(NamedTuple):
    """What a reward says of the rows that it can score, by their place in the data.

    scores: row -> scores of its texts, the right ones first.
    wins: row -> P(right beats wrong) of each pair of them; empty where a reward states none.
    lengths: row -> characters of its texts.
    """

    scores: dict[int, list[float]]
    wins: dict[int, list[float]]
    lengths: dict[int, list[float]]


class Item(NamedTuple):
    """What counts once: a row, or the two rows of a prompt of the subset Ties (ref, tied)."""

    rows: tuple[int, ...]
    rights: tuple[int, ...]  # how many texts of each are right
    group: str
    section: str
    prompt: str  # rows of one prompt are drawn together


def compare_rewards(config: Config, device: torch.device, dtype: torch.dtype, out: Path) -> None:
    """Read, score, compare, print and save: the rewards of --rm on the rows of --dataset."""
    twice = [name for name in config.rm if config.rm.count(name) > 1]
    require(not twice, f"--rm {twice[:1]}: given twice")
    source, names = config.dataset, parse_columns(config.columns)
    raw = read_rows(source, config.split, config.subset)
    named, columns = by_our_names(raw, names, source)
    require(
        {"chosen", "rejected"} <= named[0].keys(),
        f"{source}: has columns {shown(columns)}: expected chosen and rejected, as texts or lists "
        "of texts, with a prompt (--columns gives other names)",
    )
    rows = [one | ours for one, ours in zip(raw, named)]
    by = config.by or next((name for name in ("subset", "domain") if name in columns), "")
    require(not by or by in columns, f"--by {by}: {source} has columns {shown(columns)}")
    form = form_of(rows, columns, source)
    print(f"{source}: {len(rows)} rows, read as {form}; all are measured, none is held out")
    used = {"num_correct", "id"} if form == REWARD_BENCH_2 else {"id"} & {*columns}
    name_unread(source, columns, {"prompt", "chosen", "rejected", by, *used}, names)
    write_json(out / "config.json", describe(config, device, dtype))

    scored, average = {}, config.rm_average
    for part in [config.rm] if average else [[name] for name in config.rm]:
        for name, reward in load_rewards(part, device, average).items():
            print(f"reward {name}: {reward.reading}")
            with autocast(device, dtype):
                scored[name] = score_rows(name, reward, rows, source, config.batch_size)
        del reward  # one at a time in memory
        gc.collect()
    kept = sorted(set.intersection(*(set(one.scores) for one in scored.values())))
    require(bool(kept), f"{source}: no row that every reward can score")
    print(f"{len(kept)} of {len(rows)} rows are scored by all of {len(scored)}")
    if config.rm_weights:
        scored = weighted_sum(scored, config.rm_weights, kept)
    first = next(iter(scored.values()))
    lengths = {row: first.lengths[row] for row in kept}
    scored[LONGER] = Scored(lengths, {}, lengths)

    items = items_of(rows, kept, form, by, source)
    results = {"dataset": source, "form": form, "by": by, "rows": len(rows), "measured": len(kept)}
    results |= measures_of(scored, items, form, config.seed)
    print("\n" + rewards_table(results))
    print("\n" + differences_table(results))
    write_json(out / "results.json", results)
    rights = {row: right for item in items for row, right in zip(item.rows, item.rights)}
    said = [
        {"row": row + 1, "id": rows[row].get("id"), "group": group_of(rows[row], by)}
        | {
            name: {"chosen": one.scores[row][:right], "rejected": one.scores[row][right:]}
            for name, one in scored.items()
        }
        for row, right in sorted(rights.items())
    ]
    write_json_lines(out / "scores.jsonl", said)
    print(f"\nsaved {out}/results.json, {out}/scores.jsonl")


def score_rows(
    name: str,
    reward: RewardModel | RewardFunction,
    rows: Sequence[dict],
    source: str,
    batch_size: int,
) -> Scored:
    """Scores of all texts of the rows. Rows that cannot be scored are counted and left out.

    Args:
        name: of the reward.
        rows: by our names.
        source: of the rows.
        batch_size: texts per pass.
    Raises:
        UserError: more than half of the rows cannot be scored, or a score is not finite.
    """
    is_model = isinstance(reward, RewardModel)
    chat = bool(reward.tokenizer.chat_template) if is_model else None

    def read(row: dict, where: str, note: Note) -> tuple[Answers, list[list[int]]]:
        answers = read_answers(row, where, note, chat)
        if not is_model:
            return answers, []
        ids = [reward.encode(answers.prompt, text) for text in (*answers.right, *answers.wrong)]
        longest = f"longer than the context of {name}, {reward.context} tokens"
        require(max(map(len, ids)) <= reward.context, longest)
        return answers, ids

    read_rows = enumerate(read_items(rows, read, source))
    items = {row: item for row, item in read_rows if item is not None}
    texts = [(a.prompt, text) for a, _ in items.values() for text in (*a.right, *a.wrong)]
    if is_model:
        note_special_tokens(reward.tokenizer, [(str(p), text) for p, text in texts], "texts")
        logits = logits_of(
            reward, [ids for _, of_row in items.values() for ids in of_row], batch_size
        )
        values, logits = reward.read_out(logits).tolist(), logits.cpu()
    else:
        values, parts = [], range(0, len(texts), batch_size)
        for part in (texts[i : i + batch_size] for i in parts):
            values += call(name, reward.function, *map(list, zip(*part)))
    scored, start, left_out = Scored({}, {}, {}), 0, []
    for row, (answers, _) in items.items():
        right, wrong = len(answers.right), len(answers.wrong)
        found, end = values[start : start + right + wrong], start + right + wrong
        if None in found:
            left_out.append((f"{name} does not apply", f"row {row + 1}"))
        else:
            odd = [value for value in found if not math.isfinite(value)]
            what = f"--rm {name}: {source}: row {row + 1}: got a score of {odd[:1]}"
            require(not odd, f"{what}: fix the reward, or leave it out")
            scored.scores[row] = found
            scored.lengths[row] = [float(len(t.strip())) for t in (*answers.right, *answers.wrong)]
            if is_model and reward.num_labels != 2:
                of_row = logits[start:end]
                scored.wins[row] = win_probabilities(reward, of_row[:right], of_row[right:])
        start = end
    report(f"{source}: ", "rows left out", left_out, len(rows))
    return scored


def win_probabilities(
    reward_model: RewardModel, right: torch.Tensor, wrong: torch.Tensor
) -> list[float]:
    """P(right beats wrong) of every pair, as training has it: Bradley-Terry's, or the ordinal one.

    Args:
        reward_model: of one label, or of more than two.
        right, wrong: (R, K) and (W, K) logits.
    """
    ones = right[:, reward_model.order].repeat_interleave(len(wrong), 0)
    others = wrong[:, reward_model.order].repeat(len(right), 1)
    if reward_model.num_labels == 1:
        return (ones - others)[:, 0].sigmoid().tolist()
    return (-ordinal_pairwise_loss(ones, others)).exp().tolist()


def weighted_sum(
    scored: dict[str, Scored], weights: Sequence[float], kept: Sequence[int]
) -> dict[str, Scored]:
    """One reward of several: sum_i w_i (r_i - mean_i) / std_i, by mean and std of these texts."""
    require(
        len(weights) == len(scored),
        f"--rm-weights: got {len(weights)}, expected one for each of {len(scored)} rewards",
    )
    parts = []
    for weight, (name, one) in zip(weights, scored.items()):
        texts = torch.tensor([score for row in kept for score in one.scores[row]]).double()
        mean, std = texts.mean().item(), texts.std(correction=0).item()
        print(f"reward {name}: {mean:.6g} +- {std:.4g} on these texts: standardised by these")
        weight /= std if std > 1e-6 * abs(mean) else 1.0
        parts.append({row: [weight * (s - mean) for s in one.scores[row]] for row in kept})
    total = {row: [sum(of_text) for of_text in zip(*(p[row] for p in parts))] for row in kept}
    name = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, scored))
    return {name: Scored(total, {}, next(iter(scored.values())).lengths)}


def group_of(row: dict, by: str) -> str:
    """What a row has in the column of --by, as text."""
    return str(row.get(by)) if by else ""


def items_of(
    rows: Sequence[dict], kept: Sequence[int], form: str, by: str, source: str
) -> list[Item]:
    """What is counted once each, of the rows that are kept.

    A prompt of the subset Ties needs both of its rows; one alone is left out and counted.
    """
    sections = {REWARD_BENCH: benchmarks.REWARD_BENCH, RM_BENCH: benchmarks.RM_BENCH}.get(form, {})
    column = {RM_BENCH: "domain"}.get(form, "subset")
    items, ties = [], {}
    for row in kept:
        chosen = rows[row]["chosen"]
        right = len(chosen) if form in (REWARD_BENCH_2, RM_BENCH) else 1
        part = str(rows[row].get(column)) if form != PAIRS else ""
        section = benchmarks.section_of(part, sections) if sections else part
        prompt = json.dumps(rows[row].get("prompt") or f"row {row}", default=str)
        item = Item((row,), (right,), group_of(rows[row], by), section, prompt)
        if form == REWARD_BENCH_2 and part == "Ties":
            kind, number = TIES.fullmatch(str(rows[row]["id"])).groups()
            ties.setdefault(number, {})[kind] = item
        else:
            items.append(item)
    for number, found in ties.items():
        if len(found) == 2:
            ref, tied = found["ref"], found["tied"]
            both = {"rows": ref.rows + tied.rows, "rights": ref.rights + tied.rights}
            items.append(tied._replace(**both, prompt=f"ties {number}"))
    alone = [one for found in ties.values() if len(found) == 1 for one in found.values()]
    reason = "of Ties, without the other of ref and tied"
    report(f"{source}: ", "rows left out", [(reason, f"row {one.rows[0] + 1}") for one in alone])
    require(bool(items), f"{source}: nothing to count: ref:n and tied:n of Ties belong together")
    if not all(item.section for item in items):  # of other subsets than the benchmark has
        items = [item._replace(section="") for item in items]
    return items


def values_of(scored: Scored, items: Sequence[Item], form: str) -> dict[str, list[float]]:
    """Of each item the accuracy by its form's rule; of RM-Bench easy, normal and hard, too."""
    values = []
    for item in items:
        sides = [
            (scored.scores[r][:n], scored.scores[r][n:]) for r, n in zip(item.rows, item.rights)
        ]
        if len(sides) == 2:
            accuracy = benchmarks.ties_score(*sides)
        elif form == RM_BENCH:
            values.append(benchmarks.by_difficulty(benchmarks.style_matrix(*sides[0])))
            continue
        elif form == REWARD_BENCH_2:
            accuracy = benchmarks.best_of_accuracy(*sides[0])
        else:
            (right,), (wrong,) = sides[0]
            accuracy = benchmarks.pair_accuracy(right, wrong, 0.5 if form == PAIRS else 0.0)
        values.append({"accuracy": accuracy})
    return {name: [value[name] for value in values] for name in values[0]}


def measures_of(
    scored: dict[str, Scored], items: Sequence[Item], form: str, seed: int
) -> dict[str, dict | list]:
    """Rewards and comparisons of results.json: means with 95% intervals over prompts.

    Args:
        seed: of the intervals.
    """
    every = range(len(items))
    places = {"groups": {}, "sections": {}}
    for place, item in enumerate(items):
        for kind, name in (("groups", item.group), ("sections", item.section)):
            places[kind].setdefault(name, []).append(place)
    places = {kind: found for kind, found in places.items() if set(found) != {""}}

    def mean(values: Sequence[float], *parts: Sequence[int]) -> dict[str, float]:
        """Mean of the parts' means, and its interval."""
        means = [math.fsum(values[i] for i in part) / len(part) for part in parts]
        samples = [
            benchmarks.resampled_means(
                [values[i] for i in part], [items[i].prompt for i in part], seed + number
            )
            for number, part in enumerate(parts)
        ]
        ends = torch.stack(samples).mean(0).quantile(torch.tensor([0.025, 0.975]).double())
        return dict(zip(("mean", "low", "high"), [math.fsum(means) / len(means), *ends.tolist()]))

    headline = [*places["sections"].values()] if "sections" in places else [every]
    rewards, accuracy = {}, {}
    for name, one in scored.items():
        values = values_of(one, items, form)
        accuracy[name] = values["accuracy"]
        rewards[name] = {"all": {what: mean(column, every) for what, column in values.items()}}
        for kind, found in places.items():
            rewards[name][kind] = {
                part: {"items": len(of_part)}
                | {what: mean(column, of_part) for what, column in values.items()}
                for part, of_part in found.items()
            }
        if "sections" in places:
            rewards[name]["score"] = mean(values["accuracy"], *headline)
        rows = [row for item in items for row in item.rows]
        wins = torch.tensor([p for row in rows if row in one.wins for p in one.wins[row]])
        both = [[x for row in rows for x in of[row]] for of in (one.scores, one.lengths)]
        rewards[name] |= {
            "ece": expected_calibration_error(wins) if len(wins) else None,
            "length_correlation": torch.tensor(both).double().corrcoef()[0, 1].item(),
        }
    names = list(scored)
    pairs = [(names[0], name) for name in names[1:-1]] + [(LONGER, name) for name in names[:-1]]
    comparisons = [
        {"reward": b, "against": a}
        | {"difference": mean([y - x for x, y in zip(accuracy[a], accuracy[b])], *headline)}
        for a, b in pairs
    ]
    return {"rewards": rewards, "comparisons": comparisons}


def rewards_table(results: dict) -> str:
    """A table with one column per reward: accuracies with their intervals, calibration, length."""
    rewards = results["rewards"]
    first = next(iter(rewards.values()))
    lines = [(what if what != "accuracy" else "all", ("all", what)) for what in first["all"]]
    groups, sections = first.get("groups", {}), first.get("sections", {})
    for kind, names in (("groups", groups), ("sections", sections)):
        if kind == "groups" or set(names) != set(groups):
            what = "section " * (kind == "sections")
            shown = list(names)[:MOST_GROUPS]
            lines += [(f"  {what}{part:.40}", (kind, part, "accuracy")) for part in shown]
    lines += [("score: mean of the parts", ("score",))] if "score" in first else []

    def cell(of_reward: dict, path: tuple[str, ...]) -> str:
        for key in path:
            of_reward = of_reward[key]
        ends = "[{low:.1%}, {high:.1%}]" if of_reward["low"] == of_reward["low"] else ""
        return ("{mean:.1%} " + ends).format(**of_reward)

    rows = [(label, [cell(one, path) for one in rewards.values()]) for label, path in lines]
    for label, key in (("ECE of P(wins)", "ece"), ("corr(reward, length)", "length_correlation")):
        known = [one[key] for one in rewards.values()]
        shown = ["-" if x is None or x != x else f"{x:.3f}" for x in known]
        rows.append((label, shown))
    title = f"{results['measured']} rows of {results['dataset']}"
    width = max(len(text) for text in (title, *(label for label, _ in rows)))
    table = [f"{title:{width}}" + "".join(f"{head:>24}" for head in headings(rewards).values())]
    table += [
        f"{label:{width}}" + "".join(f"{text:>24}" for text in cells) for label, cells in rows
    ]
    hidden = len(groups) - MOST_GROUPS
    table += [f"and {hidden} more groups in results.json"] * (hidden > 0)
    return "\n".join(table)


def differences_table(results: dict) -> str:
    """A table with one line per comparison."""
    heads = headings(results["rewards"])
    names = [
        f"{heads[one['reward']]} minus {heads[one['against']]}" for one in results["comparisons"]
    ]
    title = "paired by prompt, 95% intervals"
    width = max(map(len, [title, *names]))
    lines = [f"{title:{width}}  difference of accuracy"]
    for name, one in zip(names, results["comparisons"]):
        shown = "{mean:+.1%} [{low:+.1%}, {high:+.1%}]".format(**one["difference"])
        lines.append(f"{name:{width}}  {shown}")
    return "\n".join(lines)
