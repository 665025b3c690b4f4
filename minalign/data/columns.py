"""The columns of a data set -> preference pairs and prompts, one row at a time."""

import json
import re
import typing
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from ..running.errors import UserError, require
from .chat import DIALOGUE, TURN, Messages, Prompt, to_messages, to_text
from .rows import number_cell, report, require_characters, shown, text_cell

UNDERSTOOD = {
    "pairs": 'chosen and rejected, as {"prompt": "Who wrote Emma?", "chosen": " Jane Austen.", '
    '"rejected": " No idea."}, or text and rating (or label), as {"text": "Fun for all ages.", '
    '"rating": 2.4}',
    "prompts": 'prompt, messages, chosen (a dialogue) or text, as {"prompt": "Who wrote Emma?"}',
}

PROMPT_COLUMNS = ("prompt", "messages", "chosen", "text")  # the first that is there is read

CHOSEN_RATINGS = ("chosen_rating", "rating_chosen", "chosen_score", "score_chosen")

KNOWN = (
    *PROMPT_COLUMNS,
    *("rejected", "completion", "rating", "label", "margin"),
    *CHOSEN_RATINGS,
    *(name.replace("chosen", "rejected") for name in CHOSEN_RATINGS),
)

MESSAGES = '[{"role": "user", "content": "..."}, ...]'

# Messages that were written into a text.
SERIALISED = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")

Item = typing.TypeVar("Item")

Note = Callable[[str], None]  # takes what is to be said of a row; it is counted over all rows


class Pair(NamedTuple):
    """One preference: two completions of a prompt, ratings and margin where the data has them.

    The prompt may be "".
    """

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    margin: float | None = None

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


class Dialogue(list):
    """Messages that know the row they come from, for errors."""

    where = ""


def place_of(prompt: Prompt) -> str:
    """The row that a prompt comes from, or how it begins."""
    return getattr(prompt, "where", "") or repr(prompt)[:40]


def parse_columns(given: Sequence[str] | None) -> dict[str, str]:
    """--columns as our name -> the data's.

    >>> parse_columns(["prompt=question,chosen=best", "rejected=worst, of two"])
    {'prompt': 'question', 'chosen': 'best', 'rejected': 'worst, of two'}
    """
    names = {}
    for part in re.split(r",(?=\w+=)", ",".join(given)) if given else ():
        ours, _, theirs = part.partition("=")
        require(
            ours in KNOWN and bool(theirs) and ours not in names,
            f"--columns {part:.60}: expected each of {', '.join(KNOWN[:9])} or chosen_rating at "
            "most once, with a column of the data, as prompt=question",
        )
        names[ours] = theirs
    return names


def by_our_names(
    rows: Sequence[dict], names: dict[str, str], source: str
) -> tuple[list[dict], list[str]]:
    """Rows of the columns that are known, under the names that they are known by.

    Args:
        names: of parse_columns; they go before the data's own.
        source: of the rows, for error messages.
    Returns:
        The rows, None in every gap, and the names of all columns of the data.
    Raises:
        UserError: a column that is named is not there.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for ours, theirs in names.items():
        there = f"{source}: has columns {shown(columns)}"
        require(theirs in columns, f"{there}: expected {theirs!r:.40} (--columns {ours}=...)")
    known = [name for name in KNOWN if name in columns and name not in names.values()]
    found = {name: name for name in known} | names
    return [{ours: row.get(theirs) for ours, theirs in found.items()} for row in rows], columns


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
    there = f"{source}: has columns {shown(columns)}: expected {UNDERSTOOD['prompts']}"
    require(bool(found), f"{there} (--columns prompt=question gives another name)")
    return found[0]


def prompt_rows(rows: Sequence[dict], names: dict[str, str], source: str) -> tuple[list[dict], str]:
    """Rows by our names, and the column of their prompts. Which are not read is printed."""
    rows, columns = by_our_names(rows, names, source)
    column = prompt_column(rows[0], names, columns, source)
    name_unread(source, columns, {column, "prompt", "completion"}, names)
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
) -> Pair:
    """The pair in one row of chosen and rejected.

    Args:
        row: column -> value.
        where: the row in words.
        note: for what is to be said of it.
        ratings: the columns of the chosen and the rejected rating, or ().
        needs: "ratings" or "margin", where there is no use of a pair without.
        chat: what the prompt becomes, see pairs.load_pairs.
    Raises:
        UserError: the row is of no use.
    """
    prompt, chosen = read_dialogue(row, "chosen", note)
    other, rejected = read_dialogue(row, "rejected", note)
    require(
        prompt == other or bool(prompt and other) and _turns(prompt) == _turns(other),
        "chosen and rejected answer different prompts",
    )
    require(bool(chosen.strip() and rejected.strip()), "an empty answer")
    chosen, rejected = without_prompt(prompt, [chosen, rejected], note)
    # A gap is an error only where the number is needed.
    numbers = [number_cell(row, name, may_be_none=True) for name in ratings] or [None, None]
    margin = number_cell(row, "margin", may_be_none=True)
    has = None not in numbers or needs == "margin" and margin is not None
    require(
        has or not needs, f"no two ratings that are numbers{', no margin' * (needs == 'margin')}"
    )
    if isinstance(prompt, str) and TURN.search(prompt):
        prompt = to_messages(prompt)  # with chat None, no error: text it was
        if chat is None:
            chat = False
    if isinstance(prompt, list) and not chat:  # in text, the answer follows "Assistant:"
        chosen, rejected = f" {chosen.strip()}", f" {rejected.strip()}"
    elif chat and prompt:
        chosen, rejected = chosen.strip(), rejected.strip()
    return Pair(as_asked(prompt, where, chat), chosen, rejected, *numbers, margin)


def read_prompt(row: dict, where: str, note: Note, column: str, chat: bool | None) -> Prompt:
    """The prompt in one row, as messages or as text (see prompts.load_prompts).

    Raises:
        UserError: the row is of no use.
    """
    if column == "chosen":
        prompt, _ = read_dialogue(row, column, note)
        require(bool(prompt), "column 'chosen' is no dialogue, and there is no prompt")
    elif (prompt := _messages(row.get(column), column, note)) is not None:
        # Of a whole dialogue, the prompt is what was asked last.
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        require(bool(prompt), "nothing is asked")
    else:
        prompt = text_cell(row, column)
    return as_asked(prompt, where, chat)


def read_dialogue(row: dict, column: str, note: Note) -> tuple[Prompt, str]:
    """The prompt and the completion in row[column].

    It holds messages, a dialogue in text, or the completion of row["prompt"]. Where that holds the
    dialogue's beginning, they are joined.

    Raises:
        UserError: it holds none of these, or another dialogue than row["prompt"].
    """
    messages = _messages(row.get(column), column, note)
    if messages is None:
        told, answer = "", text_cell(row, column, may_be_empty=True)
        if DIALOGUE.match(answer):
            end = answer.rfind("\n\nAssistant:") + len("\n\nAssistant:")
            require(
                end > len("\n\nAssistant:") or answer.startswith("\n\nAssistant:"),
                f"column {column!r}: a dialogue without a turn of the assistant",
            )
            told, answer = answer[:end], answer[end:]
            told = told if _turns(told) else ""  # the cue of an answer alone
    else:
        *told, last = messages
        require(
            last["role"] == "assistant",
            f"column {column!r}: ends with a turn of {last['role']!r:.40}, expected assistant",
        )
        answer = last["content"]
        if len(told) == 1 and told[0]["role"] == "user":
            told = to_messages(told[0]["content"])  # HelpSteer's holds a whole dialogue in it
    given = "" if told and row.get("prompt") is None else prompt_cell(row, note)
    require(
        messages is None or bool(told or given),
        f"column {column!r} is an answer alone, and there is no prompt",
    )
    return _joined(given, told, messages is not None, note), answer


def prompt_cell(row: dict, note: Note) -> Prompt:
    """row["prompt"] as messages or as text; "" where there is no such column.

    Raises:
        UserError: it is neither.
    """
    messages = _messages(row.get("prompt"), "prompt", note)
    if messages is None and "prompt" in row:
        return text_cell(row, "prompt", may_be_empty=True)
    return messages or ""


def _joined(given: Prompt, told: Prompt, as_messages: bool, note: Note) -> Prompt:
    """One prompt of the prompt's column and of what precedes the answer in a dialogue."""
    if not given or not told:
        return to_messages(given) if given and as_messages else given or told
    first, second = _turns(given), _turns(told)
    require(bool(first and second), "a prompt without a word")
    starts = range(len(second) - len(first) + 1)
    if any(second[i : i + len(first)] == first for i in starts):
        note("the answers repeat the prompt, which is read once")
        return told
    if first[-len(second) :] == second:
        note("the answers repeat the prompt's end, which is read once")
        return given
    follows = first[-1][0] == "system" or (first[-1][0] == "assistant") != (
        second[0][0] == "assistant"
    )
    require(follows, "the prompt is another than that of the answers")
    return to_messages(given) + to_messages(told)


def _turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, words) of each turn, to compare."""
    turns = [(m["role"], m["content"].strip()) for m in to_messages(prompt)] if prompt else []
    return [turn for turn in turns if turn[1]]


def without_prompt(prompt: Prompt, answers: list[str], note: Note) -> list[str]:
    """Answers without the prompt, where all begin with it."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    start = asked if all(answer.startswith(asked) for answer in answers) else asked.strip()
    rests = [answer[len(start) :] for answer in answers if answer.startswith(start)]
    if not start or len(rests) < len(answers) or not all(map(str.strip, rests)):
        return answers
    # A word that goes on is no repetition: "art" and "artist".
    if any((start[-1] + rest[0]).isalnum() and rest[0] < "\u2e80" for rest in rests):
        return answers
    note("the answers repeat the prompt, which is cut off")
    return rests


def _messages(value: object, column: str, note: Note) -> Messages | None:
    """Checked messages, role and content alone; None where the cell does not hold messages.

    Those of ShareGPT are taken, and those in a text.
    """
    if isinstance(value, str) and SERIALISED.match(value):
        value = _parsed(value, column)
    if not isinstance(value, list) and not _keys(value):
        return None
    expected = f"column {column!r}: expected messages, as {MESSAGES}"
    require(bool(value), f"{expected}: got []")
    messages = []
    for message in value if isinstance(value, list) else [value]:
        keys = _keys(message)
        require(bool(keys), expected)
        role, content = (message[key] for key in keys)
        unread = sorted(key for key in message if key not in keys and _holds(message[key]))
        tools = [key for key in unread if re.match("tool|function", key)]
        require(not tools, f"column {column!r}: a message with {tools[:1]}: tool use is not read")
        if unread:
            note(f"keys of messages not read: {shown(unread)}")
        require(isinstance(role, str) and isinstance(content, str), expected)
        require_characters(role + content, column)
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        fits = keys[0] == "role" or role in ("user", "assistant", "system")
        require(fits, f"column {column!r}: from {role!r:.40}, expected human, gpt or system")
        messages.append({"role": role, "content": content})
    return messages


def _keys(message: object) -> tuple[str, str] | None:
    """The keys of a message's role and content."""
    for keys in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and keys[0] in message and keys[1] in message:
            return keys
    return None


def _holds(value: object) -> bool:
    """Whether there is anything in it: what a column lacks comes as None, at any depth."""
    if isinstance(value, dict | list):
        return any(map(_holds, value.values() if isinstance(value, dict) else value))
    return value is not None and value != ""


def _parsed(text: str, column: str) -> object:
    """Messages that were written into a text as JSON; the text where it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    is_list = text.lstrip().startswith("[")
    require(value is not None or not is_list, f"column {column!r}: messages that are not JSON")
    is_messages = any(map(_keys, value)) if isinstance(value, list) else _keys(value)
    return value if is_messages else text


def as_asked(prompt: Prompt, where: str, chat: bool | None) -> Prompt:
    """The prompt as messages that know their place, or as text.

    Raises:
        UserError: chat is None, and it is messages; or the prompt ends with an answer.
    """
    if chat and prompt:
        asked = Dialogue(to_messages(prompt))
        asked.where = where
        require(asked[-1]["role"] != "assistant", "the prompt ends with an answer")
        return asked
    if isinstance(prompt, list) and chat is None:
        raise UserError(
            "has chat messages, and the model's tokenizer has no chat template: take a model with "
            "one, or --format plain (turns as Human: and Assistant: in plain text)"
        )
    if isinstance(prompt, str) and "<extra_id_1>" in prompt:
        prompt = to_messages(prompt)
    return to_text(prompt) if isinstance(prompt, list) else prompt
