"""Dialogues: chat messages, and the texts and cells that stand for them.

What is wrong in a row is a UserError. The row is named by the caller.
"""

import json
import re
from collections.abc import Callable

from ..running.errors import require
from .cells import require_characters, shown

Messages = list[dict[str, str]]  # [{"role": "user", "content": "Who wrote Emma?"}, ...]

Prompt = str | Messages

Note = Callable[[str], None]  # takes what is to be said of a row; it is counted over all rows

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}

DIALOGUE = re.compile(r"\n\n(Human|Assistant|System):")  # hh-rlhf, and to_text()

TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")  # HelpSteer

# Messages that were written into a text.
SERIALISED = re.compile(r"""\s*(\[\s*)?\{.*?["'](role|from)["']\s*:""", re.DOTALL)


def to_messages(prompt: Prompt) -> Messages:
    r"""Chat messages of a prompt.

    A text of hh-rlhf or HelpSteer is taken apart into its turns. Any other text is one user's turn.

    >>> dialogue = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    >>> [message["role"] for message in to_messages(dialogue)]
    ['user', 'assistant', 'user']
    >>> to_messages("Why?")
    [{'role': 'user', 'content': 'Why?'}]
    """
    if not isinstance(prompt, str):
        return prompt
    if DIALOGUE.match(prompt):
        parts = DIALOGUE.split(prompt)
    elif TURN.search(prompt):
        parts = TURN.split(prompt if TURN.match(prompt.lstrip()) else f"<extra_id_1>User\n{prompt}")
    else:
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
    turns = []
    for role, text in zip(map(roles.get, parts[1::2]), map(str.strip, parts[2::2])):
        # Some rows have two turns of one speaker in a row.
        if turns and turns[-1]["role"] == role and text:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    # The cue of an answer to come is no turn.
    is_cue = len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if is_cue else turns


def to_text(messages: Messages) -> str:
    r"""Messages as a dialogue in plain text that ends with the cue of the answer.

    >>> to_text([{"role": "user", "content": "Why?"}])
    '\n\nHuman: Why?\n\nAssistant:'
    """
    turns = (f"\n\n{SPEAKERS.get(m['role'], m['role'])}: {m['content']}" for m in messages)
    return "".join(turns) + "\n\nAssistant:"


def first_turn(prompt: Prompt) -> str:
    """What a data set is split by.

    Prompts that begin with one user's turn stay together, in whatever form they are.
    """
    # By way of the text form, which cannot tell all messages apart.
    messages = to_messages(to_text(to_messages(prompt)))
    asked = (message["content"] for message in messages if message["role"] == "user")
    return next(asked, messages[0]["content"]).strip()


def turns_of(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, words) of each turn that has words, to compare."""
    turns = [(m["role"], m["content"].strip()) for m in to_messages(prompt)]
    return [turn for turn in turns if turn[1]]


def messages_in(value: object, column: str, note: Note) -> Messages | None:
    """The messages in a cell, checked, with role and content alone; None where it has none.

    Understood are those of ShareGPT, those written into a text as JSON, a single one, a struct of
    lists, and contents in parts of text.
    """
    if isinstance(value, str) and SERIALISED.match(value):
        value = _parsed(value, column)
    expected = (
        f'column {column!r}: expected messages, as [{{"role": "user", "content": "..."}}, ...]'
    )
    if keys := _keys(value):
        value = _listed(value, expected) if isinstance(value[keys[0]], list) else [value]
    if not isinstance(value, list):
        return None
    require(bool(value), f"{expected}: got []")
    messages = []
    for message in value:
        require(bool(keys := _keys(message)), expected)
        role, content = message[keys[0]], _joined_parts(message[keys[1]], column)
        unread = sorted(key for key in message if key not in keys and _holds(message[key]))
        tools = [key for key in unread if re.match("tool|function", key)]
        require(not tools, f"column {column!r}: a message with {tools[:1]}: tool use is not read")
        if unread:
            note(f"keys of messages not read: {shown(unread)}")
        require(isinstance(role, str) and isinstance(content, str), expected)
        require_characters(role + content, column)
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        fits = keys[0] == "role" or role in SPEAKERS
        require(fits, f"column {column!r}: from {role!r:.40}, expected human, gpt or system")
        messages.append({"role": role, "content": content})
    return messages


def _keys(message: object) -> tuple[str, str] | None:
    """The keys of a message's role and content."""
    for keys in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and keys[0] in message and keys[1] in message:
            return keys
    return None


def _listed(columns: dict, expected: str) -> list[dict]:
    """Messages of {"role": [...], "content": [...]}, as datasets stores a sequence of them."""
    counts = {len(column) if isinstance(column, list) else None for column in columns.values()}
    require(len(counts) == 1, expected)
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _joined_parts(content: object, column: str) -> object:
    """The text of a content in parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        held = (
            {key: part[key] for key in part if _holds(part[key])} if isinstance(part, dict) else {}
        )
        texts.append(held.pop("text", ""))
        fits = held == {"type": "text"} and isinstance(texts[-1], str)
        kind = held.get("type", type(part).__name__)
        require(fits, f"column {column!r}: a part {kind!r:.40} of a content: only text is read")
    return "".join(texts)


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
        is_list = text.lstrip().startswith("[")
        require(not is_list, f"column {column!r}: messages that are not JSON")
        return text
    return value if any(map(_keys, value if isinstance(value, list) else [value])) else text


def joined(given: Prompt, told: Prompt, note: Note) -> Prompt:
    """One prompt of a prompt's column and of what precedes the answer in a dialogue."""
    if not given or not told:
        return given or told
    first, second = turns_of(given), turns_of(told)
    require(bool(first and second), "a prompt without a word")
    starts = range(len(second) - len(first) + 1)
    if any(second[i : i + len(first)] == first for i in starts):
        note("the answers repeat the prompt, which is read once")
        return told
    if first[-len(second) :] == second:
        note("the answers repeat the prompt's end, which is read once")
        return given
    last, is_answered = first[-1][0], second[0][0] == "assistant"
    follows = last == "system" or (last == "assistant") != is_answered
    require(follows, "the prompt is another than that of the answers")
    return to_messages(given) + to_messages(told)


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


class Dialogue(list):
    """Messages that know the row they come from, for errors."""

    where = ""


def place_of(prompt: Prompt) -> str:
    """The row that a prompt comes from, or how it begins."""
    return getattr(prompt, "where", "") or repr(prompt)[:40]


def as_asked(prompt: Prompt, where: str, chat: bool | None) -> Prompt:
    """The prompt as messages that know their place, or as text, see pairs.load_pairs."""
    if isinstance(prompt, list):
        require(
            chat is not None,
            "has chat messages, and the model's tokenizer has no chat template: take a model with "
            "one, or --format plain (turns as Human: and Assistant: in plain text)",
        )
        require(bool(prompt[-1]["content"].strip()), "the prompt ends with an empty turn")
    if chat and prompt:
        asked = Dialogue(to_messages(prompt))
        asked.where = where
        require(asked[-1]["role"] != "assistant", "the prompt ends with an answer")
        return asked
    is_text = isinstance(prompt, str) and not TURN.search(prompt)
    return prompt if is_text else to_text(to_messages(prompt))
