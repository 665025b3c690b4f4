"""README and docs/experiments.md say what the files of results say, and nothing else.

Numbers that were changed by hand, results that have changed, and sentences that no claim covers
are each found. `python tests/check_claims.py --write` puts new results into the pages.
"""

import copy
import re

import check_claims
import pytest
from claims import NOT_KEPT, STUDIES, claims_of

PAGES = {name: (check_claims.ROOT / name).read_text() for name in STUDIES}
PAGE = """# Found

| arm | gain | seeds |
|---|---|---|
| A, beta .3 | +.12 [-.01, .20] | 8 |
| B | 1,250 of 3,906 | 8 |

Of `--beta 0.1` it is 0.50, [as planned](files/page-2.md).

```bash
python run.py --seeds 3
```

## Earlier

Then it was 7.
"""
GAIN = dict(mean=0.1234, low=-0.0123, high=0.2049)
FOUND = [
    ("| A, beta .3 | {} | {} |", GAIN, 8),
    ("| B | {} of 3,906 | 8 |", 1250.2),
    ("it is {}, [as", 0.496),
]
OLD = ["## Earlier"]


@pytest.fixture(scope="module")
def results():
    return check_claims.Results()


@pytest.fixture(scope="module")
def claims(results):
    return claims_of(results)


def problems(page=PAGE, claims=FOUND):
    return check_claims.problems("page.md", page, claims, OLD)


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_say_what_the_results_say(name, claims):
    found = check_claims.problems(name, PAGES[name], claims[name], NOT_KEPT.get(name, ()))
    assert not found, "\n".join(found)


def other_digit(printed):
    return re.sub(r"\d$", lambda digit: str((int(digit[0]) + 5) % 10), printed)


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_the_pages_is_missed_when_it_is_another_and_is_put_back(name, claims):
    stated, _, _ = check_claims.compare(PAGES[name], claims[name])
    stated = [one for one in stated if one.printed != "-"]  # no digit to change
    assert len(stated) > 20
    page = PAGES[name]
    for start, end, printed, _ in stated:  # as long as before, so that all places stay
        page = page[:start] + other_digit(printed) + page[end:]
    missed = {one.start for one in check_claims.compare(page, claims[name])[0] if one[2] != one[3]}
    assert missed == {one.start for one in stated}
    assert check_claims.refreshed(page, claims[name]) == PAGES[name]


def test_a_result_that_has_changed_is_named(results):
    claims_of(results)  # reads all
    changed = copy.deepcopy(dict(results))
    key = "KL 1: SLERP of 3 - one of these 3 runs"
    changed["merging"]["contrasts"][key]["low"] -= 0.001
    name = "docs/experiments.md"
    (found,) = check_claims.problems(
        name, PAGES[name], claims_of(changed)[name], NOT_KEPT.get(name, ())
    )
    assert re.search(
        r"^docs/experiments.md:\d+: .* 3 \+\.\d+ \[(\.\d+): found \1, expected ", found
    )


def test_a_page_that_says_what_was_found_has_no_problems():
    assert problems() == []


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("+.12 [", "+.13 [", "page.md:5: ...{}+.13: found +.13, expected +.12"),
        (".20]", ".21]", "page.md:5: ...{}.21: found .21, expected .20"),
        ("-.01", ".01", "page.md:5: ...{}.01: found .01, expected -.01"),
        ("1,250", "1,205", "page.md:6: ...{}1,205: found 1,205, expected 1,250"),
        ("] | 8 |", "] | 7 |", "page.md:5: ...{}7: found 7, expected 8"),
        (", .20] | 8 |\n", ", .20] | 8 |\n| C | .07 | 8 |\n", "page.md:6: no claim for {}"),
        ("page-2.md).", "page-2.md). Or 12% less.", "page.md:8: no claim for {}"),
        ("Then", "Then, [.1, .2]", None),
        ("--seeds 3", "--seeds 4", None),
        ("+.12 [-.01, .20]", ".1", None),
    ],
)
def test_what_is_changed_in_a_page_is_found(old, new, message):
    assert PAGE.count(old) == 1
    found = problems(PAGE.replace(old, new))
    if message is None:
        assert found == []
    else:
        start, end = message.split("{}")
        assert found[0].startswith(start) and found[0].endswith(end)


def test_a_claim_whose_text_has_gone_says_how_far_it_is_there():
    lost, row = problems(PAGE.replace("A, beta .3", "A, beta .4"))
    assert "found 0 times: | A, beta <here> .3 | {} | {} |" in lost
    assert row.startswith("page.md:5: no claim for the number in: ")
    assert "found 2 times" in problems(PAGE + "\n| B | 1 of 3,906 | 8 |\n")[0]


@pytest.mark.parametrize(
    "value, printed, others, expected",
    [
        (0.0414, ".040", [".040"], ".041"),
        (-0.0414, ".040", [".040"], "-.041"),
        (-0.0002, ".010", [".010"], ".000"),
        (0.0414, "-.040", ["-.040", "+.01"], "+.041"),
        (0.0414, "-.040", ["-.040", ".01"], ".041"),
        (0.93, "1.10", ["1.10", "0.85"], "0.93"),
        (0.93, "1.10", ["1.10"], ".93"),
        (1234.5, "2,354", ["2,354"], "1,234"),
        (1234.5, "17", ["17"], "1234"),
        (None, "1.10", ["1.10"], "-"),
        (float("nan"), "1.10", ["1.10"], "-"),
        (1.104, "-", ["-", "2.35"], "1.10"),
    ],
)
def test_a_result_is_written_as_the_page_writes(value, printed, others, expected):
    assert check_claims.written(value, printed, others) == expected
