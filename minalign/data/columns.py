"""The columns of a data set -> preference pairs and prompts, one row at a time.

What is wrong in a row is a UserError, by which `read_items` drops and counts it.
"""

import itertools
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from ..running.errors import UserError, require
from .cells import number_cell, report, shown, text_cell
from .messages import (
    DIALOGUE,
    Note,
    Prompt,
    as_asked,
    joined,
    messages_in,
    to_messages,
    turns_of,
    without_prompt,
)

PROMPT_COLUMNS = ("prompt", "messages", "chosen", "text")  # the first that is there is read

CHOSEN_RATINGS = ("chosen_rating", "rating_chosen", "chosen_score", "score_chosen")

KNOWN = (
    *PROMPT_COLUMNS,
    *("rejected", "completion", "rating", "label", "margin"),
    *("probability", "ranked", "responses", "ratings"),
    *CHOSEN_RATINGS,
    *(name.replace("chosen", "rejected") for name in CHOSEN_RATINGS),
)


Item = typing.TypeVar("Item")


class Pair(NamedTuple):
    """One preference: two completions of a prompt, ratings and margin where the data has them.

    The prompt may be "". The probability is that of chosen being the better one, .5 to 1.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    margin: float | None = None
    probability: float = 1.0

    @property
    def answers(self) -> tuple[str, str]:
        """The better one first."""
        return self.chosen, self.rejected

    @property
    def ratings(self) -> tuple[float, float] | None:
        """(chosen's, rejected's) where the data has both."""
        ratings = (self.chosen_rating, self.rejected_rating)
        return None if None in ratings else ratings

    @property
    def gap(self) -> float:
        """By how much the chosen text is better: the data's margin, or the gap of its ratings.

        0 where the data says neither.
        """
        if self.margin is not None:
            return self.margin
        return self.ratings[0] - self.ratings[1] if self.ratings else 0.0


class Ranking(NamedTuple):
    """Completions of a prompt (which may be ""), the best first; ratings where the data has them.

    Gap and probability are those of a pair that says nothing of them.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    ratings: tuple[float, ...] | None = None
    gap: float = 0.0
    probability: float = 1.0

    def parts(self) -> list["Ranking | Pair"]:
        """What it says: itself, or pairs, where it is one or has equal ratings: those that differ.

        >>> ranking = Ranking("", ("a", "b", "c"), (2.0, 1.0, 1.0))
        >>> [(pair.chosen, pair.rejected) for pair in ranking.parts()]
        [('a', 'b'), ('a', 'c')]
        """
        ratings = self.ratings or (None,) * len(self.answers)
        if len(self.answers) > 2 and (not self.ratings or len(set(ratings)) == len(ratings)):
            return [self]
        pairs = itertools.combinations(zip(self.answers, ratings), 2)
        return [Pair(self.prompt, a, b, r, s) for (a, r), (b, s) in pairs if r is None or r > s]


def parse_columns(given: Sequence[str] | None, asked: Collection[str] = ()) -> dict[str, str]:
    """--columns as our name -> the data's.

    Args:
        asked: further names of ours: columns that reward functions ask for, "**" being any.

    >>> parse_columns(["prompt=question,chosen=best", "rejected=worst, of two"])
    {'prompt': 'question', 'chosen': 'best', 'rejected': 'worst, of two'}
    """
    names = {}
    for part in re.split(r",(?=\w+=)", ",".join(given)) if given else ():
        ours, _, theirs = part.partition("=")
        require(
            ("**" in asked or ours in (*KNOWN, *asked)) and bool(theirs) and ours not in names,
            f"--columns {part:.60}: expected each of {', '.join(KNOWN[:13])}, chosen_rating or a "
            "column that a reward function names at most once, with a column of the data, as "
            "prompt=question",
        )
        names[ours] = theirs
    return names


def by_our_names(
    rows: Sequence[dict], names: dict[str, str], source: str, asked: Mapping[str, str] | None = None
) -> tuple[list[dict], list[str]]:
    """Rows of the known columns by our names, None in every gap; and all columns of the data.

    Args:
        asked: further columns, see models.functions.columns_asked.
    Raises:
        UserError: a column that `names`, of parse_columns, says, or that a function cannot do
            without is not there.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for ours, theirs in names.items():
        require(
            theirs in columns,
            f"{source}: has columns {shown(columns)}: expected {theirs!r:.40} (--columns {ours}=)",
        )
    asked = asked or {}
    for name, function in asked.items():
        require(
            not function or name in names or name in columns,
            f"--rm {function}: names column {name!r:.40}: {source} has columns {shown(columns)}: "
            f"expected it among them (--columns {name}=other reads another)",
        )
    wanted = [*KNOWN, *asked, *columns * ("**" in asked)]
    free = {*columns} - ({*names.values()} - {*asked})
    found = {name: name for name in wanted if name in free} | names
    return [{ours: row.get(theirs) for ours, theirs in found.items()} for row in rows], columns


def columns_for(row: dict, asked: Collection[str], column: str) -> dict[str, typing.Any] | None:
    """What reward functions ask for of a row by our names; None where they ask for nothing.

    All that there is ("**") is without `column`, the prompt's own.
    """
    names = [name for name in row if name in asked or "**" in asked and name != column]
    return {name: row[name] for name in names} if asked else None


def name_unread(
    source: str, columns: Collection[str], read: Collection[str], names: dict[str, str]
) -> None:
    """Print which columns of the data are not `read`; that has our names."""
    unread = set(columns) - {names.get(name, name) for name in read}
    if unread:
        print(f"{source}: columns not read: {shown(unread)} (--columns prompt=question reads one)")


def prompt_column(
    known: Collection[str], names: dict[str, str], columns: Collection[str], source: str
) -> str:
    """Of the `known` columns that of the prompts; one that --columns names goes first.

    Raises:
        UserError: none of `columns` is one.
    """
    found = [name for name in (*names, *PROMPT_COLUMNS) if name in PROMPT_COLUMNS and name in known]
    require(
        bool(found),
        f"{source}: has columns {shown(columns)}: expected prompt, messages, chosen (a dialogue) "
        'or text, as {"prompt": "Who wrote Emma?"} (--columns prompt=question gives another name)',
    )
    return found[0]


def prompt_rows(
    rows: Sequence[dict], names: dict[str, str], source: str, asked: Mapping[str, str] | None = None
) -> tuple[list[dict], str]:
    """Rows by our names, and the column of their prompts. Which are not read is printed."""
    rows, columns = by_our_names(rows, names, source, asked)
    column = prompt_column(rows[0], names, columns, source)
    read = columns_for(rows[0], asked or {}, column) or {}
    name_unread(source, columns, {column, "prompt", "completion", *read}, names)
    return rows, column


def read_items(
    rows: Sequence[dict], read: Callable[[dict, str, Note], Item], source: str, of_split: str = ""
) -> list[Item | None]:
    """What is read from each row; None for one of no use, which is counted and printed.

    Args:
        read: (row, its place in words, note) -> an item, or UserError.
        source: of the rows.
        of_split: follows a row's number, as " of test".
    Raises:
        UserError: more than half of the rows are of no use.
    """
    items, dropped, notes = [], [], []
    for number, row in enumerate(rows, 1):
        place, said = f"row {number}{of_split}", []
        try:
            items.append(read(row, f"{source}: {place}", said.append))
            notes += [(text, place) for text in dict.fromkeys(said)]
        except UserError as error:
            items.append(None)
            dropped.append((" ".join(str(error).split()), place))
    report(f"{source}: ", "rows dropped", dropped, len(rows))
    report(f"{source}: ", "rows", notes)
    return items


def read_pair(
    row: dict,
    where: str,
    note: Note,
    ratings: tuple[str, ...] = (),
    needs: str = "",
    chat: bool | None = False,
    soft: bool = False,
) -> Pair:
    """The pair in one row of chosen and rejected.

    Args:
        row, where, note: see read_items.
        ratings: the columns of the chosen and the rejected rating, or ().
        needs, chat: see pairs.load_pairs.
        soft: whether there is a column probability, that chosen is the better one. Where it is
            below .5 the two are exchanged, so that the likelier better one is first.
    """
    told = [read_dialogue(row, column, note) for column in ("chosen", "rejected")]
    asked, answers = _one_prompt(told, "chosen and rejected", where, note, chat)
    # A gap is an error only where the number is needed.
    numbers = [number_cell(row, name, may_be_none=True) for name in ratings] or [None, None]
    margin = number_cell(row, "margin", may_be_none=True)
    has = not needs or None not in numbers or needs == "margin" and margin is not None
    require(has, f"no two ratings that are numbers{', no margin' * (needs == 'margin')}")
    probability = number_cell(row, "probability") if soft else 1.0
    require(
        0 <= probability <= 1,
        f"column 'probability': got {probability:g}, expected P(chosen is better), from 0 to 1",
    )
    if probability < 0.5:
        note("probability below .5: rejected is taken for the better one")
        answers, numbers, probability = answers[::-1], numbers[::-1], 1 - probability
        margin = None if margin is None else -margin
    return Pair(asked, *answers, *numbers, margin, probability)


def read_ranking(
    row: dict, where: str, note: Note, column: str, chat: bool | None = False
) -> Ranking:
    """The completions in one row of ranked, or of responses and ratings.

    Args:
        row, where, note: see read_items.
        column: of the completions.
        chat: see pairs.load_pairs.
    """
    texts, ratings = row[column], None
    got = f"a list of {len(texts)}" if isinstance(texts, list) else type(texts).__name__
    fits = isinstance(texts, list) and len(texts) > 1
    require(fits, f"column {column!r}: got {got}, expected a list of two texts or more")
    told = [read_dialogue(row | {column: text}, column, note) for text in texts]
    asked, answers = _one_prompt(told, f"those of {column!r}", where, note, chat)
    require(len(set(answers)) == len(answers), f"column {column!r}: a text twice")
    if column == "responses":
        cells = row["ratings"]
        got = f"{len(cells)} ratings" if isinstance(cells, list) else type(cells).__name__
        fits = isinstance(cells, list) and len(cells) == len(texts)
        require(fits, f"column 'ratings': got {got}, expected one for each of {len(texts)} texts")
        ratings = [number_cell({"ratings": cell}, "ratings") for cell in cells]
        require(len(set(ratings)) > 1, "column 'ratings': all are equal")
        order = sorted(range(len(texts)), key=lambda i: -ratings[i])
        answers, ratings = [answers[i] for i in order], tuple(ratings[i] for i in order)
    return Ranking(asked, tuple(answers), ratings)


def _one_prompt(
    told: list[tuple[Prompt, str]], what: str, where: str, note: Note, chat: bool | None
) -> tuple[Prompt, list[str]]:
    """The prompt of several (prompt, answer), which must be the same, and the answers, as asked."""
    prompt, answers = told[0][0], [answer for _, answer in told]
    turns = turns_of(prompt)
    require(
        all(turns_of(other) == turns for other, _ in told[1:]), f"{what} answer different prompts"
    )
    require(all(map(str.strip, answers)), "an empty answer")
    answers = without_prompt(prompt, answers, note)
    asked = as_asked(prompt, where, chat)
    if isinstance(asked, list):
        answers = [answer.strip() for answer in answers]
    elif asked != prompt:  # in text, the answer follows "Assistant:"
        answers = [f" {answer.strip()}" for answer in answers]
    return asked, answers


def read_prompt(row: dict, where: str, note: Note, column: str, chat: bool | None) -> Prompt:
    """The prompt in one row, as messages or as text (see prompts.load_prompts)."""
    if column == "chosen":
        prompt, _ = read_dialogue(row, column, note)
        require(bool(prompt), "column 'chosen' is no dialogue, and there is no prompt")
    elif (prompt := messages_in(row.get(column), column, note)) is None:
        prompt = text_cell(row, column)
    else:  # of a whole dialogue, the prompt is what was asked last
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
            note(f"column {column!r} ends with an answer, which is not read")
        require(bool(prompt), "nothing is asked")
    return as_asked(prompt, where, chat)


def read_dialogue(row: dict, column: str, note: Note) -> tuple[Prompt, str]:
    """The prompt and the completion in row[column].

    It holds messages, a dialogue in text, or the completion of row["prompt"]. Where that holds the
    dialogue's beginning, they are joined.
    """
    messages = messages_in(row.get(column), column, note)
    if messages is None:
        told, answer = "", text_cell(row, column, may_be_empty=True)
        if DIALOGUE.match(answer):
            start, cue, answer = answer.rpartition("\n\nAssistant:")
            require(bool(cue), f"column {column!r}: a dialogue without a turn of the assistant")
            told = start + cue if turns_of(start) else ""  # not the cue of an answer alone
    else:
        *told, last = messages
        require(
            last["role"] == "assistant",
            f"column {column!r}: ends with a turn of {last['role']!r:.40}, expected assistant",
        )
        answer = last["content"]
        if len(told) == 1 and told[0]["role"] == "user":
            told = to_messages(told[0]["content"])  # HelpSteer's holds a whole dialogue in it
    given = "" if told and not row.get("prompt") else prompt_cell(row, note)
    if messages is not None:
        require(
            bool(told or given),
            f"column {column!r} is an answer alone, and there is no prompt (--columns names it)",
        )
        given = to_messages(given) if given else given
    return joined(given, told, note), answer


def prompt_cell(row: dict, note: Note) -> Prompt:
    """row["prompt"] as messages or as text; "" where there is no such column."""
    messages = messages_in(row.get("prompt"), "prompt", note)
    if messages is None and "prompt" in row:
        return text_cell(row, "prompt", may_be_empty=True)
    return messages or ""
