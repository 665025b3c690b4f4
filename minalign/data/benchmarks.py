"""Rows that reward models are measured on: right and wrong answers to a prompt, in four forms.

- RewardBench: prompt, chosen, rejected (texts), subset, id.
- RewardBench 2: chosen, rejected (lists of texts), subset, num_correct, id.
- RM-Bench: chosen, rejected (lists of three texts, from plain to rich in style), domain.
- pairs: chosen and rejected, as train_rm.py reads them.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..running.errors import require
from .cells import require_characters
from .columns import prompt_cell, read_dialogue, read_pair
from .messages import Note, Prompt, as_asked

PAIRS, REWARD_BENCH, REWARD_BENCH_2, RM_BENCH = "pairs", "RewardBench", "RewardBench 2", "RM-Bench"
TIES = re.compile(r"(ref|tied):(.+)")  # ids of RewardBench 2's subset Ties


class Answers(NamedTuple):
    """The texts of a row, as one reward reads them."""

    prompt: Prompt
    right: list[str]
    wrong: list[str]


def form_of(rows: Sequence[dict], columns: Collection[str], source: str) -> str:
    """Which of the four forms these rows have, by their columns and the kinds of their cells.

    Args:
        rows: with chosen and rejected by our names.
        columns: of the data.
        source: of the rows, for errors.
    Raises:
        UserError: a row is of another form than the first, or its lists cannot be right.
    """
    if not isinstance(rows[0]["chosen"], list) or _are_messages(rows[0]["chosen"]):
        for name in ("chosen", "rejected"):
            cells = [row[name] for row in rows]
            odd = [n for n, cell in enumerate(cells, 1) if cell and _are_texts(cell)]
            expected = "got a list of texts, expected one answer, as in row 1"
            require(not odd, f"{source}: row {odd[:1]}: column {name!r}: {expected}")
            lists = all(isinstance(cell, str) and cell.startswith(('["', "['")) for cell in cells)
            fix = "lists written into texts: give a .jsonl or .parquet file"
            require(not lists, f"{source}: column {name!r}: {fix}")
        return REWARD_BENCH if {"prompt", "subset", "id"} <= set(columns) else PAIRS
    form = RM_BENCH if "domain" in columns and "num_correct" not in columns else REWARD_BENCH_2
    ids = {}
    for number, row in enumerate(rows, 1):
        for name in ("chosen", "rejected"):
            what = f"{source}: row {number}: column {name!r}"
            texts = row[name]
            require(_are_texts(texts), f"{what}: expected a list of texts, as in row 1")
            require(bool(texts), f"{what}: got an empty list, expected at least one text")
            three = form != RM_BENCH or len(texts) == 3
            require(
                three, f"{what}: got {len(texts)} texts, expected 3 in RM-Bench's form (domain)"
            )
        right, given = len(row["chosen"]), row.get("num_correct")
        same = given is None or (not isinstance(given, bool) and given == right)
        wrong = f"{source}: row {number}: num_correct {given!r:.40}, but {right} texts in 'chosen'"
        require(same, f"{wrong}: expected as many: fix one of them")
        if form == REWARD_BENCH_2 and row.get("subset") == "Ties":
            which = f"{source}: row {number}: id {row.get('id')!r:.40} of the subset Ties"
            fits = bool(TIES.fullmatch(str(row.get("id"))))
            require(fits, f"{which}: expected ref:NUMBER or tied:NUMBER")
            require(row["id"] not in ids, f"{which}: is that of row {ids.get(row['id'])}, too")
            ids[row["id"]] = number
    return form


def _are_messages(cell: object) -> bool:
    return isinstance(cell, list) and any(isinstance(part, dict) for part in cell)


def _are_texts(cell: object) -> bool:
    return isinstance(cell, list) and all(isinstance(part, str) for part in cell)


def read_answers(row: dict, where: str, note: Note, chat: bool | None) -> Answers:
    """The prompt of a row with its right and wrong answers.

    Args:
        row: by our names, of a form that `form_of` knows.
        where, note: see columns.read_items.
        chat: whether prompts become messages, or text; None: they stay what they are.
    Raises:
        UserError: the row cannot be scored.
    """
    lists = _are_texts(row["chosen"])
    if chat is None:
        told = prompt_cell(row, note) if lists else read_dialogue(row, "chosen", lambda _: None)[0]
        chat = isinstance(told, list)
    if not lists:
        pair = read_pair(row, where, note, chat=chat)
        return Answers(pair.prompt, [pair.chosen], [pair.rejected])
    prompt = prompt_cell(row, note)
    require(bool(prompt), "no prompt")
    asked = as_asked(prompt, where, chat)
    for text in (*row["chosen"], *row["rejected"]):
        require(bool(text.strip()), "an empty answer")
        require_characters(text, "chosen or rejected")

    def answer(text: str) -> str:  # as read_pair has it: in text, it follows "Assistant:"
        if isinstance(asked, list):
            return text.strip()
        return text if asked == prompt else f" {text.strip()}"

    return Answers(asked, *([answer(text) for text in row[n]] for n in ("chosen", "rejected")))
