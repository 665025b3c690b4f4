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
    form_of,
    read_answers,
)
from ..data.cells import report, shown
from ..data.chat import note_special_tokens
from ..data.columns import by_our_names, columns_for, name_unread, parse_columns, read_items
from ..data.messages import Note
from ..data.rows import read_rows
from ..losses import ordinal_pairwise_loss
from ..measuring import benchmarks
from ..measuring.measures import resampled_means
from ..measuring.pairs import expected_calibration_error
from ..models.functions import call, columns_asked
from ..models.precision import autocast
from ..models.rewards import RewardFunction, combine, load_rewards
from ..reward import RewardModel
from ..running.errors import require
from ..running.files import write_json, write_json_lines
from ..running.run import describe
from .policies_compared import headings
from .score import logits_of

if typing.TYPE_CHECKING:
    from .evaluate import Config

MOST_PARTS = 60  # lines of the table; results.json has all
LONGER = "the longer wins"  # a reward like any other
CHARACTERS = RewardFunction(LONGER, lambda prompts, texts: [len(text.strip()) for text in texts])


class Scored(NamedTuple):
    """What a reward says of the rows that it can score, by their place in the data.

    scores: row -> those of its right and of its wrong texts.
    wins: row -> P(right beats wrong) of each pair of them; empty where a reward states none.
    """

    scores: dict[int, tuple[list[float], list[float]]]
    wins: dict[int, list[float]]


class Item(NamedTuple):
    """What counts once: a row, or the rows ref and tied of a prompt of the subset Ties."""

    rows: tuple[int, ...]
    prompt: str  # items of one prompt are drawn together
    group: str  # the column of --by and its value
    section: str


def compare_rewards(config: Config, device: torch.device, dtype: torch.dtype, out: Path) -> None:
    """Read, score, compare, print and save: the rewards of --rm on the rows of --dataset."""
    twice = [name for name in config.rm if config.rm.count(name) > 1]
    require(not twice, f"--rm {twice[:1]}: given twice")
    count = len(config.rm_weights or config.rm)
    expected = f"expected one for each of {len(config.rm)} rewards"
    require(count == len(config.rm), f"--rm-weights: got {count}, {expected}")
    asked = columns_asked(config.rm)
    source, names = config.dataset, parse_columns(config.columns, asked)
    raw = read_rows(source, config.split, config.subset)
    named, columns = by_our_names(raw, names, source)
    by = config.by or next((name for name in ("subset", "domain") if name in columns), "")
    has = f"{source}: has columns {shown(columns)}"
    require(not by or by in columns, f"{has}: expected {by!r:.40} (--by)")
    require(
        {"chosen", "rejected"} <= named[0].keys(),
        f"{has}: expected chosen and rejected, texts or lists of texts (--columns gives other "
        "names)",
    )
    rows = [one | ours for one, ours in zip(raw, named)]
    form = form_of(rows, columns, source)
    print(f"{source}: {len(rows)} rows, read as {form}; all are measured, none is held out")
    used = {"prompt", "chosen", "rejected", by, "id", "num_correct", *asked}
    used |= {*columns} if "**" in asked else set()
    name_unread(source, columns, used, names)

    scored = {}
    for part in [config.rm] if config.rm_average else [[name] for name in config.rm]:
        for name, reward in load_rewards(part, device, config.rm_average, config.risk).items():
            print(f"reward {name}: {reward.reading}")
            with autocast(device, dtype):
                scored[name] = score_rows(name, reward, rows, source, config.batch_size)
        del reward  # one at a time in memory
        gc.collect()
    lengths = score_rows(LONGER, CHARACTERS, rows, source, len(rows))
    kept = sorted(set.intersection(*(set(one.scores) for one in (*scored.values(), lengths))))
    print(f"{len(kept)} of {len(rows)} rows can be scored")
    require(bool(kept), f"{source}: expected rows that every reward can score")
    if config.rm_weights or config.rm_combine:
        how, weights = config.rm_combine or "sum", config.rm_weights or [1.0] * len(config.rm)
        scored = combined(scored, how, weights, kept)
    scored[LONGER] = lengths

    items = items_of(rows, kept, form, by, source)
    results = {"dataset": source, "form": form, "by": by, "rows": len(rows), "measured": len(kept)}
    results |= measures_of(scored, items, form, config.seed)
    print("\n" + rewards_table(results))
    write_json(out / "config.json", describe(config, device, dtype))
    write_json(out / "results.json", results)
    said = [
        {"row": row + 1, "id": rows[row].get("id"), "group": item.group}
        | {"chosen": {name: one.scores[row][0] for name, one in scored.items()}}
        | {"rejected": {name: one.scores[row][1] for name, one in scored.items()}}
        for item in items
        for row in item.rows
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
    asked = columns_asked([] if is_model or reward is CHARACTERS else [name])
    chat = bool(reward.tokenizer.chat_template) if is_model else None

    def read(row: dict, where: str, note: Note) -> tuple:
        prompt, *sides = read_answers(row, where, note, chat)
        texts = [text for side in sides for text in side]
        ids = [reward.encode(prompt, text) for text in texts] if is_model else []
        longest = f"longer than the context of {reward.context} tokens" if is_model else ""
        require(not is_model or max(map(len, ids)) <= reward.context, longest)
        return len(sides[0]), [(prompt, text) for text in texts], ids

    found = read_items(rows, read, f"{source}, {name}")
    items = {row: item for row, item in enumerate(found) if item is not None}
    texts = [text for _, of_row, _ in items.values() for text in of_row]
    if is_model:
        said = [(str(prompt), text) for prompt, text in texts]
        note_special_tokens(reward.tokenizer, said, "texts")
        every = [ids for _, _, of_row in items.values() for ids in of_row]
        logits = logits_of(reward, every, batch_size)
        values, logits = reward.read_out(logits).tolist(), logits[:, reward.order].cpu()
    else:
        starts = range(0, len(texts), batch_size)
        columns = [columns_for(rows[row], asked, "") or {} for row in items]
        columns = [c for c, (_, of_row, _) in zip(columns, items.values()) for _ in of_row]
        values = []
        for i in starts:
            part, of_part = texts[i : i + batch_size], columns[i : i + batch_size]
            by_name = {n: [one[n] for one in of_part] for n in of_part[0]}
            values += call(name, reward.function, *map(list, zip(*part)), by_name)
    scored, end, left_out = Scored({}, {}), 0, []
    for row, (right, of_row, _) in items.items():
        start, end = end, end + len(of_row)
        scores, middle = values[start:end], start + right
        if None in scores:
            left_out.append(("it does not apply", f"row {row + 1}"))
            continue
        odd = [score for score in scores if not math.isfinite(score)]
        what = f"--rm {name}: {source}: row {row + 1}: got a score of {odd[:1]}"
        require(not odd, f"{what}: fix the reward, or leave it out")
        scored.scores[row] = scores[:right], scores[right:]
        if is_model and reward.num_labels != 2:
            scored.wins[row] = win_probabilities(logits[start:middle], logits[middle:end])
    report(f"{source}, {name}: ", "rows left out", left_out)
    return scored


def win_probabilities(right: torch.Tensor, wrong: torch.Tensor) -> list[float]:
    """P(right beats wrong) of every pair, by Bradley-Terry for one label, else the ordinal one.

    Args:
        right, wrong: (R, K) and (W, K) logits, the lowest score first.
    """
    ones, others = right.repeat_interleave(len(wrong), 0), wrong.repeat(len(right), 1)
    if ones.shape[1] == 1:
        return (ones - others)[:, 0].sigmoid().tolist()
    return (-ordinal_pairwise_loss(ones, others)).exp().tolist()


def combined(
    scored: dict[str, Scored], how: str, weights: Sequence[float], kept: Sequence[int]
) -> dict[str, Scored]:
    """One reward of several, standardised by their mean and deviation on these texts.

    Args:
        how: see models.rewards.combine.
        weights: of a sum.
    """
    counts = [len(side) for row in kept for side in next(iter(scored.values())).scores[row]]
    parts = []
    for name, one in scored.items():
        texts = [score for row in kept for side in one.scores[row] for score in side]
        texts = torch.tensor(texts, dtype=torch.double)
        mean, std = texts.mean().item(), texts.std(correction=0).item()
        print(f"reward {name}: {mean:.6g} +- {std:.4g} on these texts: standardised by these")
        parts.append((texts - mean) / (std if std > 1e-6 * abs(mean) else 1.0))
    parts = torch.stack(parts)
    total = combine(parts, torch.ones_like(parts).bool(), how, parts.new_tensor(weights))
    sides = iter(total.split(counts))
    name = " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, scored))
    name = name if how == "sum" else f"{how} of {', '.join(scored)}"
    return {name: Scored({r: (next(sides).tolist(), next(sides).tolist()) for r in kept}, {})}


def items_of(
    rows: Sequence[dict], kept: Sequence[int], form: str, by: str, source: str
) -> list[Item]:
    """What counts once each, of the rows that are kept.

    A prompt of the subset Ties needs both of its rows; one alone is left out and counted.
    """
    sections = {REWARD_BENCH: benchmarks.REWARD_BENCH, RM_BENCH: benchmarks.RM_BENCH}.get(form, {})
    items, ties = [], {}
    for row in kept:
        part = str(rows[row].get("domain" if form == RM_BENCH else "subset", ""))
        section = benchmarks.section_of(part, sections) if sections else part * (form != PAIRS)
        prompt = json.dumps(rows[row].get("prompt") or f"row {row}", default=str)
        group = f"{by}: {rows[row].get(by)}" if by else ""
        item = Item((row,), prompt, group, section)
        if form == REWARD_BENCH_2 and part == "Ties":
            kind, number = TIES.fullmatch(str(rows[row]["id"])).groups()
            ties.setdefault(number, {})[kind] = item
        else:
            items.append(item)
    for number, found in ties.items():
        if len(found) == 2:
            both = found["ref"].rows + found["tied"].rows
            items.append(found["tied"]._replace(rows=both, prompt=f"ties {number}"))
    alone = [
        one.rows[0] + 1 for found in ties.values() if len(found) == 1 for one in found.values()
    ]
    reason = "of Ties, without the other of ref:N and tied:N"
    report(f"{source}: ", "rows left out", [(reason, f"row {row}") for row in alone])
    require(bool(items), f"{source}: nothing to count: expected ref:N and tied:N of a prompt")
    known = all(item.section for item in items)  # else these are other subsets
    return items if known else [item._replace(section="") for item in items]


def values_of(scored: Scored, items: Sequence[Item], form: str) -> list[dict[str, float]]:
    """Of each item the accuracy by its form's rule; of RM-Bench easy, normal and hard, too."""
    values = []
    for item in items:
        sides = [scored.scores[row] for row in item.rows]
        if form == RM_BENCH:
            values.append(benchmarks.by_difficulty(*sides[0]))
        elif len(sides) == 2:
            values.append({"accuracy": benchmarks.ties_score(*sides)})
        else:
            accuracy = benchmarks.best_of_accuracy(*sides[0], strict=form == REWARD_BENCH)
            values.append({"accuracy": accuracy})
    return values


def measures_of(
    scored: dict[str, Scored], items: Sequence[Item], form: str, seed: int
) -> dict[str, dict | list]:
    """Rewards and comparisons of results.json: means with 95% intervals over prompts.

    Args:
        seed: of the intervals.
    """
    parts, sections = {"all": [*range(len(items))]}, {}
    for place, item in enumerate(items):
        if item.group:
            parts.setdefault(item.group, []).append(place)
        if item.section:
            sections.setdefault(f"section: {item.section}", []).append(place)
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)

    def mean(values: Sequence[float], *places: Sequence[int]) -> dict[str, float]:
        """Mean of the parts' means, and its interval."""
        means, samples = [], []
        for number, part in enumerate(places):
            of_part, prompts = [values[i] for i in part], [items[i].prompt for i in part]
            means.append(math.fsum(of_part) / len(part))
            alone = math.nan if len(set(prompts)) < 2 else 0.0  # it says nothing of other prompts
            samples.append(alone + resampled_means(of_part, prompts, seed + number))
        low, high = torch.stack(samples).mean(0).quantile(ends).tolist()
        return {"mean": math.fsum(means) / len(means), "low": low, "high": high}

    headline = list(sections.values()) or [parts["all"]]
    rows = [row for item in items for row in item.rows]
    rewards, accuracy = {}, {}
    for name, one in scored.items():
        values = values_of(one, items, form)
        accuracy[name] = [value["accuracy"] for value in values]
        wins = torch.tensor([p for row in rows if one.wins for p in one.wins[row]])
        rewards[name] = {
            "score": mean(accuracy[name], *headline),
            "ece": expected_calibration_error(wins) if len(wins) else None,
            "parts": {
                part: {"items": len(of_part)}
                | {what: mean([v[what] for v in values], of_part) for what in values[0]}
                for part, of_part in (parts | sections).items()
            },
        }
    names = list(scored)
    pairs = [(names[0], name) for name in names[1:-1]] + [(LONGER, name) for name in names[:-1]]
    comparisons = []
    for a, b in pairs:
        difference = [y - x for x, y in zip(accuracy[a], accuracy[b])]
        comparisons.append({"reward": b, "against": a, "difference": mean(difference, *headline)})
    return {"rewards": rewards, "comparisons": comparisons}


def rewards_table(results: dict) -> str:
    """Two tables: each reward's accuracies and calibration, and their differences."""
    rewards, heads = results["rewards"], headings(results["rewards"])
    parts = next(iter(rewards.values()))["parts"]
    lines = {}
    for part, of_part in list(parts.items())[:MOST_PARTS]:
        for what in [what for what in of_part if what != "items"][: None if part == "all" else 1]:
            name = what if what != "accuracy" else f"{part:.40}"
            lines[name] = [share(one["parts"][part][what]) for one in rewards.values()]
    if any(part.startswith("section: ") for part in parts):
        lines["score: mean of the sections"] = [share(one["score"]) for one in rewards.values()]
    eces = [one["ece"] for one in rewards.values()]
    lines["calibration error (ECE)"] = ["-" if ece is None else f"{ece:.3f}" for ece in eces]
    title = f"{results['measured']} rows of {results['dataset']}"
    width = max(map(len, (title, *lines)))
    table = [f"{title:{width}}" + "".join(f"{head:>25}" for head in heads.values())]
    table += [f"{name:{width}}" + "".join(f"{c:>25}" for c in row) for name, row in lines.items()]
    if len(parts) > MOST_PARTS:
        table.append(f"and {len(parts) - MOST_PARTS} more in results.json")
    table += ["", "paired by prompt, 95% intervals"]
    pairs = {f"{heads[c['reward']]} minus {heads[c['against']]}": c for c in results["comparisons"]}
    width = 2 + max(map(len, pairs))
    table += [f"{pair:{width}}{share(one['difference'], '+')}" for pair, one in pairs.items()]
    return "\n".join(table)


def share(interval: dict[str, float], sign: str = "") -> str:
    """A mean and its interval in percent; of a single prompt, the mean alone."""
    mean, low, high = (f"{interval[end]:{sign}z.1%}" for end in ("mean", "low", "high"))
    return mean if math.isnan(interval["low"]) else f"{mean} [{low}, {high}]"
