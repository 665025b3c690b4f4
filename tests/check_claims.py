"""Compare what the pages claim (tests/claims.py) with the results, or put the results in.

python tests/check_claims.py            prints where they differ, and numbers that nothing claims
python tests/check_claims.py --write    puts the results into the pages, as they are written there
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NUMBER = r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)|-"  # 2,354 or -.05 or +0.5; - is none
VALUE = rf"({NUMBER})(?:\s+\[({NUMBER}),\s+({NUMBER})\])?"
# What is no result: code (a fence without a language is output), and where a link leads.
CODE = r"^```\w+\n.*?^```|`[^`\n]+`|(?<=\])\([^)\s]+\)"


class Stated(NamedTuple):
    """A number of a page: its place, as it stands, as the result would be written there."""

    start: int
    end: int
    printed: str
    expected: str


class Results(dict):
    """Name -> what a file says: results/NAME.json, or one of PLACES."""

    PLACES = {
        "speed": "docs/speed.json",
        "reference": "tests/experiments/reference/stories260k/results.json",
    }

    def __missing__(self, name: str):
        path = ROOT / self.PLACES.get(name, f"tests/experiments/results/{name}.json")
        self[name] = json.loads(path.read_text())
        return self[name]


def number(printed: str) -> float | None:
    return None if printed == "-" else float(printed.replace(",", ""))


def rounded(value: float | None, printed: str) -> float | None:
    """A result with as many decimals as stand there; None for none, also where "-" stands."""
    if printed == "-" or value is None or value != value:
        return None
    return float(f"{value:.{len(printed.partition('.')[2])}f}")


def written(value: float | None, printed: str, others: list[str]) -> str:
    """A result in the style of what stands there; what that cannot tell, numbers beside it do."""
    if value is None or value != value:
        return "-"
    if printed == "-":
        printed = next((other for other in others if other != "-"), "0.00")
    value = rounded(value, printed) + 0.0  # which is 0 for -0
    text = f"{value:,.{len(printed.partition('.')[2])}f}"
    text = text if "," in "".join(others) else text.replace(",", "")
    if not any(re.match(r"[+-]?0\.", other) for other in others):
        text = re.sub(r"^(-?)0\.", r"\1.", text)
    plus = any(other.startswith("+") for other in others) and printed.startswith(("+", "-"))
    return f"+{text}" if plus and value >= 0 else text


def pattern(text: str) -> str:
    words = (re.escape(word).replace(r"\{\}", VALUE) for word in text.split())
    return r"(?<![\w.])" + r"\s+".join(words) + r"(?!\w|\.\d)"


def longest(text: str, page: str) -> str:
    """A text, with a mark behind what of it the page has."""
    words = text.split()
    there = [n for n in range(1, len(words)) if re.search(pattern(" ".join(words[:n])), page)]
    n = max(there, default=0)
    return " ".join([*words[:n], "<here>", *words[n:]])


def line(page: str, place: int) -> int:
    return page.count("\n", 0, place) + 1


def compare(page: str, claims: Iterable) -> tuple[list[Stated], list[tuple[int, int]], list[str]]:
    """The numbers that claims name, the places of all claims, and the texts that are not there."""
    stated, places, faults = [], [], []
    for text, *values in claims:
        found = list(re.finditer(pattern(text), page))
        if len(found) != 1 or text.count("{}") != len(values):
            faults.append(f"{len(values)} results, found {len(found)} times: {longest(text, page)}")
            continue
        (match,), numbers = found, []
        for value in values:
            of_value = value if isinstance(value, dict) else {"mean": value}
            numbers += [of_value.get(part) for part in ("mean", "low", "high")]
        for group, value in enumerate(numbers, 1):
            if (printed := match[group]) is None:  # no interval is given
                continue
            bound = (group - 1) % 3 > 0
            kind = [match[i] for i in range(1, len(numbers) + 1) if ((i - 1) % 3 > 0) == bound]
            same = rounded(value, printed) == number(printed)
            expected = written(value, printed, [one for one in kind if one])
            stated.append(Stated(*match.span(group), printed, printed if same else expected))
        places.append(match.span())
    return stated, places, faults


def unclaimed(page: str, places: list[tuple[int, int]], not_kept: Iterable[str]) -> list[int]:
    """Where numbers stand outside of these places, of code, and of what is not kept."""
    sections = (rf"^{re.escape(head)}$.*?(?=^## |\Z)" for head in not_kept)
    skip = [match.span() for match in re.finditer(CODE, page, re.M | re.S)]
    skip += [match.span() for one in sections for match in re.finditer(one, page, re.M | re.S)]
    covered = bytearray(len(page))
    for start, end in [*skip, *places]:
        covered[start:end] = b"\1" * (end - start)
    numbers = re.finditer(r"(?<![\w.])(?<!\d,)\.?\d", page)
    return [match.start() for match in numbers if not covered[match.start()]]


def problems(name: str, page: str, claims: Iterable, not_kept: Iterable[str] = ()) -> list[str]:
    """What is wrong with a page, a line each: document, line, text, found and expected."""
    stated, places, faults = compare(page, claims)
    faults = [f"{name}: a claim's text: {fault}" for fault in faults]
    for start, end, printed, expected in stated:
        if printed != expected:
            text = " ".join(page[max(0, start - 60) : end].split())
            where = f"{name}:{line(page, start)}: ...{text}"
            faults.append(f"{where}: found {printed}, expected {expected}")
    there = {line(page, start): start for start in reversed(unclaimed(page, places, not_kept))}
    for row, start in sorted(there.items()):  # the first of each line
        text = " ".join(page[max(0, start - 60) : start + 30].split())
        faults.append(f"{name}:{row}: no claim for the number in: ...{text}...")
    return faults


def refreshed(page: str, claims: Iterable) -> str:
    """The page with the results in the place of what differs."""
    for start, end, _, expected in sorted(compare(page, claims)[0], reverse=True):
        page = page[:start] + expected + page[end:]
    return page


if __name__ == "__main__":
    from claims import NOT_KEPT, claims_of

    found = []
    for name, all_claims in claims_of(Results()).items():
        page = (ROOT / name).read_text()
        if "--write" in sys.argv:
            page = refreshed(page, all_claims)
            (ROOT / name).write_text(page)
        found += problems(name, page, all_claims, NOT_KEPT.get(name, ()))
    print("\n".join(found))
    sys.exit(bool(found))
