"""Which rows train and which are held out."""

from __future__ import annotations

import contextlib
import hashlib
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..running.errors import UserError, require
from .columns import KNOWN, PROMPT_COLUMNS, by_our_names, parse_columns, read_items, read_prompt
from .messages import Note, first_turn
from .rows import read_rows

if typing.TYPE_CHECKING:
    from ..running.flag_groups import DataFlags

Item = typing.TypeVar("Item")


class Split(NamedTuple):
    """Which rows to read, and which of them are held out."""

    dataset: str
    split: str = "train"
    eval_split: str = ""  # held out; without it, a share of `split`
    eval_share: float = 0.1
    seed: int = 0
    subset: str = ""
    names: dict[str, str] = {}  # of columns: ours -> the data's
    asked: dict[str, str] = {}  # further columns, see models.functions.columns_asked

    @classmethod
    def from_flags(cls, flags: DataFlags, asked: dict[str, str] | None = None) -> Split:
        """What the flags of a script or tool say."""
        data = flags.dataset, flags.split, flags.eval_split, flags.eval_share, flags.split_seed
        return cls(*data, flags.subset, parse_columns(flags.columns, asked or ()), asked or {})


def held_out(text: str, seed: int, share: float) -> bool:
    """Whether this text belongs to the held-out share.

        sha256(seed:text), first 8 bytes, < share 2^64

    The hash decides, so that all scripts split alike. With the same seed, a prompt that the reward
    model was trained on is therefore never a held-out prompt of the policy.
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def both_splits(data: Split) -> tuple[list[list[dict]], set[str], list[str]]:
    """Rows of the split (and of the split to hold out), by our names.

    Returns:
        The rows; the columns that they have, by our names; all columns of the data.
    """
    splits = [data.split] + [data.eval_split] * bool(data.eval_split)
    wanted = {data.names.get(name, name) for name in (*KNOWN, *data.asked)}
    wanted = None if "**" in data.asked else wanted
    read = (read_rows(data.dataset, split, data.subset, wanted) for split in splits)
    parts = [by_our_names(rows, data.names, data.dataset, data.asked) for rows in read]
    known = set.intersection(*(set(rows[0]) for rows, _ in parts))
    every = list(dict.fromkeys(name for _, columns in parts for name in columns))
    return [rows for rows, _ in parts], known, every


def divide(
    data: Split,
    rows: list[list[dict]],
    read: Callable[[dict, str, Note], Item],
    key: Callable[[Item], str],
    texts: Callable[[Item], Sequence[str]] | None = None,
) -> tuple[list[Item], list[Item]]:
    """Items (training, held out) read from rows.

    The hash of an item's key decides, or the split that it is of. An item that shares a text with
    one that is held out never trains: no text is on both sides. Rows that are dropped are counted
    and printed.

    Args:
        data: what the rows were read from.
        rows: of both_splits.
        read: see columns.read_items.
        key: item -> the text that a split goes by.
        texts: item -> all that must not be on both sides; None where it is the key alone.
    """
    texts = texts or (lambda item: [key(item)])
    of_split = [f" of {split}" * (len(rows) > 1) for split in (data.split, data.eval_split)]
    parts = [read_items(part, read, data.dataset, name) for part, name in zip(rows, of_split)]
    train = [item for item in parts[0] if item is not None]
    if len(parts) == 1:
        is_held = [held_out(key(item), data.seed, data.eval_share) for item in train]
        evaluation = [item for item, is_out in zip(train, is_held) if is_out]
        train = [item for item, is_out in zip(train, is_held) if not is_out]
    else:
        evaluation = [item for item in parts[1] if item is not None]
    held = {text for item in evaluation for text in texts(item)}
    if len(parts) > 1:  # a row that is no pair has a prompt that a policy is judged on all the same
        held |= {_asked_in(row) for row, item in zip(rows[1], parts[1]) if item is None}
    kept = [item for item in train if held.isdisjoint(texts(item))]
    if len(kept) < len(train):
        where = "in the held-out split, too" if len(parts) > 1 else "a text of theirs is held out"
        print(f"{data.dataset}: {len(train) - len(kept)} rows dropped: {where}")
    whole = f"all of --split {data.split}"
    require(
        bool(kept) or not train,
        f"{data.dataset}: {whole} is in --eval-split {data.eval_split}, too: expected others"
        if data.eval_split
        else f"{data.dataset}: {whole} shares texts with the pairs held out: expected others, or a "
        "smaller --eval-share",
    )
    return kept, evaluation


def _asked_in(row: dict) -> str:
    for column in PROMPT_COLUMNS:
        with contextlib.suppress(UserError):
            return first_turn(read_prompt(row, "", lambda _: None, column, False))
    return ""


def require_both(data: Split, parts: Sequence[Sequence], what: str) -> None:
    """UserError where the training or the held-out part is empty."""
    train, evaluation = map(len, parts)
    require(
        train > 0 and evaluation > 0,
        f"{data.dataset}: {train} training and {evaluation} held-out {what}: expected both, so "
        "more rows with other prompts (or another --eval-share or --split-seed)",
    )
