"""Checked cells of rows, and what is said of rows that are of no use."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

from ..running.errors import UserError, require

HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def shown(names: Collection[str]) -> str:
    """Names of columns for a message."""
    more = f" and {len(names) - 20} more" * (len(names) > 20)
    return "[" + ", ".join(f"{name!r:.40}" for name in sorted(names)[:20]) + "]" + more


def report(
    source: str, what: str, found: Sequence[tuple[str, str]], total: int | None = None
) -> None:
    """Print how many are `found`, (kind, place), of each kind, with the place of the first.

    Raises:
        UserError: they are more than half of `total`.

    >>> report("a.csv: ", "rows dropped", [("no answer", "row 3"), ("no answer", "row 8")], 40)
    a.csv: 2 rows dropped: no answer (first: row 3)
    """
    counts, first = Counter(kind for kind, _ in found).most_common(), dict(reversed(found))
    lines = [f"{n} {what}: {kind} (first: {first[kind]})" for kind, n in counts[:8]]
    lines += [f"{sum(n for _, n in counts[8:])} {what}: other kinds"] * (len(counts) > 8)
    require(
        total is None or 2 * len(found) <= total,
        f"{source.lstrip()}{len(found)} of {total} are of no use: {'; '.join(lines[:3])}",
    )
    for line in lines:
        print(f"{source}{line}")


def text_cell(row: dict, column: str, may_be_empty: bool = False) -> str:
    """row[column] if it is a text, else a UserError. Its row is named by the caller."""
    value = row.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        got = "an empty text" if isinstance(value, str) else type(value).__name__
        raise UserError(f"column {column!r}: got {got}, expected a text")
    require_characters(value, column)
    return value


def require_characters(text: str, column: str) -> None:
    r"""UserError where a text has half a character, as "\ud83d" alone is in JSON."""
    half = not text.isascii() and HALF_CHARACTER.search(text)
    require(not half, f"column {column!r}: has half a character (a lone surrogate)")


def number_cell(row: dict, column: str, may_be_none: bool = False) -> float | None:
    """row[column] if it is a finite number, or a text that is one, else None or a UserError."""
    value, number = row.get(column), math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(value, bool) else float(value)
    got = str(value) if isinstance(value, float) else type(value).__name__
    fits = math.isfinite(number)
    require(fits or may_be_none, f"column {column!r}: got {got}, expected a number")
    return number if fits else None
