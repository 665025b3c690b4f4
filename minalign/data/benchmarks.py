"""Rows that reward models are measured on: right and wrong answers to a prompt, in four forms.

- RewardBench: prompt, chosen, rejected (texts), subset, id.
- RewardBench 2: chosen, rejected (lists of texts), subset, num_correct, id.
- RM-Bench: chosen, rejected (lists of three texts, from plain to rich in style), domain.
- pairs: chosen and rejected, as train_rm.py reads them.
"""

import re
from collections.abc import Collection, Sequence

from ..running.errors import require
from .cells import require_characters
from .columns import prompt_cell, read_dialogue, read_pair
from .messages import Note, Prompt, as_asked

PAIRS, REWARD_BENCH, REWARD_BENCH_2, RM_BENCH = "pairs", "RewardBench", "RewardBench 2", "RM-Bench"
TIES = re.compile(r"(ref|tied):(.+)")  # ids of RewardBench 2's subset Ties


def form_of(rows: Sequence[dict], columns: Collection[str], source: str) -> str:
    """Which of the four forms these rows have, by their columns and the kinds of their cells.

    Args:
        rows: with chosen and rejected by our names.
        columns: of the data.
        source: of the rows, for errors.
    Raises:
        UserError: a row is of another form than the first, or its lists cannot be right.
    """
    lists, ids = are_texts(rows[0]["chosen"]), {}
    form = REWARD_BENCH if {"prompt", "subset", "id"} <= set(columns) else PAIRS
    if lists:
        is_rm_bench = "domain" in columns and "num_correct" not in columns
        form = RM_BENCH if is_rm_bench else REWARD_BENCH_2
    cells = [row[name] for row in rows for name in ("chosen", "rejected")]
    written = all(isinstance(cell, str) and re.match(r"""\[\s*["']""", cell) for cell in cells)
    fix = "give a .jsonl or .parquet file"
    require(not written, f"{source}: chosen and rejected are lists written into texts: {fix}")
    for number, row in enumerate(rows, 1):
        where = f"{source}: row {number}"
        for name in ("chosen", "rejected"):
            cell = row[name]
            got = f"{where}: column {name!r}: got {len(cell) if are_texts(cell) else 'no'} texts"
            require(not (are_texts(cell) and not lists), f"{got}, expected one text, as in row 1")
            enough = len(cell) == 3 if form == RM_BENCH and lists and cell else bool(cell)
            kind = "3 texts, in RM-Bench's form (domain)" if form == RM_BENCH else "texts"
            fits = not lists or are_texts(cell) and enough
            require(fits, f"{got}, expected a list of {kind}")
        right, given = row["chosen"], row.get("num_correct") if lists else None
        same = given is None or not isinstance(given, bool) and given == len(right)
        require(same, f"{where}: num_correct {given!r:.40}, but {len(right or ())} texts in chosen")
        if form == REWARD_BENCH_2 and row.get("subset") == "Ties":
            name = row.get("id")
            fits = bool(TIES.fullmatch(str(name))) and name not in ids
            also = f", which row {ids.get(name)} has" * (name in ids)
            require(fits, f"{where}: id {name!r:.40}{also}: expected ref:N and tied:N once in Ties")
            ids[name] = number
    return form


def are_texts(cell: object) -> bool:
    """Whether a cell is a list of texts, and not of messages."""
    return isinstance(cell, list) and all(isinstance(part, str) for part in cell)


def read_answers(
    row: dict, where: str, note: Note, chat: bool | None
) -> tuple[Prompt, list[str], list[str]]:
    """The prompt of a row, its right and its wrong answers.

    Args:
        row: by our names, of a form that `form_of` knows.
        where, note: see columns.read_items.
        chat: whether prompts become messages, or text; None: they stay what they are.
    Raises:
        UserError: the row cannot be scored.
    """
    lists = are_texts(row["chosen"])
    if chat is None:
        told = prompt_cell(row, note) if lists else read_dialogue(row, "chosen", lambda _: None)[0]
        chat = isinstance(told, list)
    if not lists:
        pair = read_pair(row, where, note, chat=chat)
        return pair.prompt, [pair.chosen], [pair.rejected]
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

    return asked, *(list(map(answer, row[name])) for name in ("chosen", "rejected"))
