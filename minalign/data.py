"""Preference pairs and prompts: a local file or a hub id in, token ids out. One text format, by `encode`."""

import bisect
import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .common import UserError

FILE_TYPES = (".jsonl", ".gz", ".json", ".csv", ".parquet")


class Pair(NamedTuple):
    """One preference: two completions of a prompt (which may be ""), ratings and margin where the data has them."""

    prompt: str
    chosen: str
    rejected: str
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    margin: float | None = None


class RatedPairs:
    """All pairs of rated texts whose ratings differ by at least `min_gap`, made when asked for.

    Twelve thousand positive and as many negative reviews are 156 million pairs; here they cost one list. With texts
    in order of rating, text j beats exactly the first `beaten[j]` texts.

    >>> pairs = RatedPairs(["bad", "good", "fine"], [0.0, 2.0, 1.0], min_gap=1.0)
    >>> [(pair.chosen, pair.rejected) for pair in pairs]
    [('fine', 'bad'), ('good', 'bad'), ('good', 'fine')]
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], min_gap: float):
        order = sorted(range(len(texts)), key=lambda i: ratings[i])
        self.texts = [texts[i] for i in order]
        self.ratings = [ratings[i] for i in order]
        # The difference itself is compared (a bound r - min_gap would round), and at min_gap 0 equal ratings are no pair.
        beaten = [
            min(
                bisect.bisect_right(self.ratings, -min_gap, key=lambda other: other - rating),  # noqa: B023
                bisect.bisect_left(self.ratings, rating),
            )
            for rating in self.ratings
        ]
        self.end = list(itertools.accumulate(beaten))  # pairs won by the texts up to and including this one

    def __len__(self) -> int:
        return self.end[-1] if self.end else 0

    def __getitem__(self, k: int) -> Pair:
        if not 0 <= k < len(self):
            raise IndexError(k)
        winner = bisect.bisect_right(self.end, k)
        loser = k - (self.end[winner - 1] if winner else 0)
        return Pair("", self.texts[winner], self.texts[loser], self.ratings[winner], self.ratings[loser])


def read_rows(dataset: str, split: str = "train") -> list[dict]:
    """Rows of a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet), a saved datasets folder, or a hub id."""
    path = Path(dataset)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = list(_read_jsonl(path))
    elif path.exists() or (
        dataset.count("/") <= 1 and path.suffix not in FILE_TYPES and not dataset.startswith((".", "/", "~"))
    ):
        rows = _read_with_datasets(path, dataset, split)
    else:
        raise UserError(f"{dataset}: no such file: give --dataset a .jsonl, .csv or .parquet file, a folder or a hub id")
    if not rows:
        raise UserError(f"{dataset}: no rows: expected at least one")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict]:
    # Not with datasets: its error for a broken row does not name the row.
    number = 0  # of rows, as everywhere: blank lines do not count
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    number += 1
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f'{path}: row {number}: got {line.strip()[:40]}, expected {{"column": value, ...}}')
                    yield row
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: row {number}: not JSON ({error}): one object a line") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_with_datasets(path: Path, dataset: str, split: str) -> Sequence[dict]:
    import datasets  # here: seconds to import, and not everywhere installed

    formats = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_file():
            if path.suffix not in formats:
                raise UserError(f"{dataset}: unknown file type {path.suffix!r}: expected .jsonl, .json, .csv or .parquet")
            return datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train")
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(dataset, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets says what went wrong only there
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{dataset} (split {split}): cannot be loaded: {reason}") from error


def _text(row: dict, column: str, where: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        got = "an empty text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{where}: column {column!r}: got {got}, expected a text: mend or remove the row")
    return value


def _number(row: dict, column: str, where: str) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise UserError(f"{where}: column {column!r}: got {value!r:.40}, expected a number: mend or remove the row")
    return float(value)


def held_out(text: str, seed: int, share: float) -> bool:
    """Whether this text belongs to the held-out share: by its hash, so that every script splits alike.

    A prompt that the reward model was trained on is therefore never a held-out prompt of the policy (same seed).
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def load_pairs(
    dataset: str, split: str = "train", *, eval_share: float = 0.1, seed: int = 0, min_rating_gap: float = 1.0
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Training and held-out pairs, split by prompt (by text where there are no prompts); the reading is printed.

    Two kinds of data are recognised from their columns:
    - chosen, rejected (and prompt; chosen_rating, rejected_rating; margin, where there);
    - text, rating (or label): all pairs with a gap of at least `min_rating_gap`, see RatedPairs.

    Raises UserError for missing columns, and for a row with an empty text or a non-string, with its number.
    """
    rows = read_rows(dataset, split)
    columns = set(rows[0])
    rating = next((name for name in ("rating", "label") if name in columns), None)
    if {"chosen", "rejected"} <= columns:
        parts = ([], [])
        for number, row in enumerate(rows, 1):
            where = f"{dataset}: row {number}"
            pair = Pair(
                _text(row, "prompt", where, may_be_empty=True) if "prompt" in columns else "",
                _text(row, "chosen", where),
                _text(row, "rejected", where),
                *(
                    _number(row, name, where) if name in columns else None
                    for name in ("chosen_rating", "rejected_rating", "margin")
                ),
            )
            parts[held_out(pair.prompt or pair.chosen, seed, eval_share)].append(pair)
        reading = "prompt + chosen / rejected" if "prompt" in columns else "chosen / rejected"
    elif "text" in columns and rating:
        rated = ([], [])
        for number, row in enumerate(rows, 1):
            where = f"{dataset}: row {number}"
            text = _text(row, "text", where)
            rated[held_out(text, seed, eval_share)].append((text, _number(row, rating, where)))
        parts = [RatedPairs([t for t, _ in part], [r for _, r in part], min_rating_gap) for part in rated]
        reading = f"text by {rating}, gap >= {min_rating_gap:g}"
    else:
        raise UserError(f"{dataset}: has columns {sorted(columns)}: expected chosen and rejected, or text and rating")
    print(f"{dataset}: {len(rows)} rows read as {reading}: {len(parts[0])} training and {len(parts[1])} held-out pairs")
    if not len(parts[0]) or not len(parts[1]):
        raise UserError(
            f"{dataset}: {len(parts[0])} training and {len(parts[1])} held-out pairs: expected both, so more rows "
            "(or another --eval-share or --seed)"
        )
    return parts[0], parts[1]


def load_prompts(dataset: str, split: str = "train", *, eval_share: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and held-out prompts: the column `prompt`, or `text` where there is none; duplicates once."""
    rows = read_rows(dataset, split)
    column = next((name for name in ("prompt", "text") if name in rows[0]), None)
    if column is None:
        raise UserError(f"{dataset}: has columns {sorted(rows[0])}: expected prompt (or text)")
    prompts = dict.fromkeys(_text(row, column, f"{dataset}: row {number}") for number, row in enumerate(rows, 1))
    train = [prompt for prompt in prompts if not held_out(prompt, seed, eval_share)]
    evaluation = [prompt for prompt in prompts if held_out(prompt, seed, eval_share)]
    print(f"{dataset}: {len(rows)} rows: {len(train)} training and {len(evaluation)} held-out prompts from {column!r}")
    if not train or not evaluation:
        raise UserError(
            f"{dataset}: {len(train)} training and {len(evaluation)} held-out prompts: expected both, so more "
            "rows (or another --eval-share or --seed)"
        )
    return train, evaluation


def encode(tokenizer, text: str, end: bool) -> list[int]:
    """Token ids of a text: begin token exactly once where the tokenizer has one, end token exactly once if `end`.

    The one formatter: prompts of the policy (end=False), texts of the reward model in training and scoring (end=True).
    """
    begin, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers add them by themselves, some templates write them into the text, some do both.
    while begin is not None and ids[:1] == [begin]:
        ids.pop(0)
    while eos is not None and ids[-1:] == [eos]:
        ids.pop()
    return [begin] * (begin is not None) + ids + [eos] * (end and eos is not None)


def pad(rows: Sequence[list[int]], side: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> input_ids (B, T) and attention_mask (B, T); id 0 fills up, since the mask alone says what is real.

    >>> pad([[5, 6], [7]], side="left")
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    join = (lambda row, gap: gap + row) if side == "left" else (lambda row, gap: row + gap)
    ids = torch.tensor([join(list(row), gap) for row, gap in zip(rows, fill)])
    mask = torch.tensor([join(one, gap) for one, gap in zip(ones, fill)])
    return ids.to(device), mask.to(device)


class Example(NamedTuple):
    """A pair as token ids, ready for the reward model."""

    chosen: list[int]
    rejected: list[int]
    pair: Pair


def encode_pairs(
    pairs: Sequence[Pair], encode_text: Callable[[str, str], list[int]], *, max_tokens: int, max_pairs: int, seed: int
) -> list[Example]:
    """At most `max_pairs` pairs, drawn by `seed`, as token ids; identical and over-long ones dropped and counted."""
    indices = range(len(pairs))
    if max_pairs < len(pairs):
        indices = random.Random(seed).sample(indices, max_pairs)
    examples, identical, too_long = [], 0, 0
    for i in indices:
        pair = pairs[i]
        chosen, rejected = encode_text(pair.prompt, pair.chosen), encode_text(pair.prompt, pair.rejected)
        if max(len(chosen), len(rejected)) > max_tokens:  # never cut: what is cut off may hold the difference
            too_long += 1
        elif chosen == rejected:
            identical += 1
        else:
            examples.append(Example(chosen, rejected, pair))
    print(
        f"  kept {len(examples)} of {len(indices)} pairs: {identical} identical and {too_long} longer than "
        f"{max_tokens} tokens dropped"
    )
    return examples


def length_grouped_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices, each item once an epoch; items of like length together, so that little is padding.

    Each epoch is shuffled, cut into groups of 50 batches, and only within a group sorted by length; the last batch of
    an epoch may be smaller.
    """
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        groups = [order[i : i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
        batches = []
        for group in groups:
            group.sort(key=lambda i: lengths[i])
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def shuffled_forever(items: Sequence, seed: int) -> Iterator:
    """Each item once an epoch, in an order that differs between epochs and seeds."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(items, len(items))
