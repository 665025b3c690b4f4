"""Which rows train and which are held out."""

from __future__ import annotations

import hashlib
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..running.errors import require
from .chat import first_turn
from .columns import Dropped
from .rows import read_rows

if typing.TYPE_CHECKING:
    from ..running.flags import DataFlags

Item = typing.TypeVar("Item")


class Split(NamedTuple):
    """Which rows to read, and which of them are held out."""

    dataset: str
    split: str = "train"
    eval_split: str = ""  # held out; without it, a share of `split`
    eval_share: float = 0.1
    seed: int = 0
    subset: str = ""

    @classmethod
    def from_flags(cls, flags: DataFlags) -> Split:
        """What the flags of a script or tool say."""
        share, seed = flags.eval_share, flags.split_seed
        return cls(flags.dataset, flags.split, flags.eval_split, share, seed, flags.subset)


def held_out(text: str, seed: int, share: float) -> bool:
    """Whether this text belongs to the held-out share.

        sha256(seed:text), first 8 bytes, < share 2^64

    The hash decides, so that all scripts split alike. With the same seed, a prompt that the reward
    model was trained on is therefore never a held-out prompt of the policy.
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def both_splits(data: Split) -> tuple[list[Sequence[dict]], set[str]]:
    """Rows of the split (and of the split to hold out), and the columns that they have."""
    splits = [data.split] + [data.eval_split] * bool(data.eval_split)
    rows = [read_rows(data.dataset, split, data.subset) for split in splits]
    return rows, set.intersection(*(set(part[0]) for part in rows))


def divide(
    data: Split,
    rows: list[Sequence[dict]],
    read: Callable[[dict, str], Item | Dropped],
    key: Callable[[Item], str],
) -> tuple[list[Item], list[Item]]:
    """Items (training, held out) read from rows.

    One whose key is held out never trains. Rows that are dropped are counted and printed.

    Args:
        data: what the rows were read from.
        rows: of both_splits.
        read: (row, its place in words) -> an item, or Dropped.
        key: item -> the text that a split goes by.
    """
    dropped, parts, held = Counter(), [], set()
    for split, part in zip((data.split, data.eval_split), rows):
        parts.append([])
        for number, row in enumerate(part, 1):
            of_split = f" of {split}" if len(rows) > 1 else ""
            item = read(row, f"{data.dataset}: row {number}{of_split}")
            if isinstance(item, Dropped):
                dropped[item.reason] += 1
                if item.prompt and split == data.eval_split:
                    held.add(first_turn(item.prompt))
            else:
                parts[-1].append(item)
    if len(parts) == 1:
        is_held = [held_out(key(item), data.seed, data.eval_share) for item in parts[0]]
        train = [item for item, is_out in zip(parts[0], is_held) if not is_out]
        evaluation = [item for item, is_out in zip(parts[0], is_held) if is_out]
    else:
        evaluation = parts[1]
        held |= {key(item) for item in evaluation}
        train = [item for item in parts[0] if key(item) not in held]
        dropped["in the held-out split, too"] = len(parts[0]) - len(train)
    for reason, count in dropped.items():
        if count:
            print(f"{data.dataset}: {count} rows dropped: {reason}")
    return train, evaluation


def require_both(data: Split, parts: Sequence[Sequence], what: str) -> None:
    """UserError where the training or the held-out part is empty."""
    train, evaluation = map(len, parts)
    require(
        train > 0 and evaluation > 0,
        f"{data.dataset}: {train} training and {evaluation} held-out {what}: expected both, so "
        "more rows (or another --eval-share or --split-seed)",
    )
