"""The columns of a data set -> preference pairs and prompts, one row at a time."""

from typing import NamedTuple

from ..running.errors import UserError, require
from .chat import DIALOGUE, TURN, Messages, Prompt, to_messages, to_text
from .rows import number_cell, require_characters, text_cell

UNDERSTOOD = {
    "pairs": 'chosen and rejected, as {"prompt": "Who wrote Emma?", "chosen": " Jane Austen.", '
    '"rejected": " No idea."}, or text and rating (or label), as {"text": "Fun for all ages.", '
    '"rating": 2.4}',
    "prompts": 'prompt, messages, chosen (a dialogue) or text, as {"prompt": "Who wrote Emma?"}',
}

CHOSEN_RATINGS = ("chosen_rating", "rating_chosen", "chosen_score", "score_chosen")


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


class Dropped(NamedTuple):
    """A row that is no item, and why."""

    reason: str
    prompt: Prompt = ""  # held out all the same, where the row is of the held-out split


def read_pair(row: dict, where: str, ratings: tuple[str, ...], chat: bool | None) -> Pair | Dropped:
    """The pair in one row of chosen and rejected.

    Args:
        row: column -> value.
        where: the row in words, for errors.
        ratings: the columns of the chosen and the rejected rating, or ().
        chat: what the prompt becomes, see pairs.load_pairs.
    """
    prompt, chosen = _dialogue(row, "chosen", where)
    other, rejected = _dialogue(row, "rejected", where)
    if prompt != other:
        return Dropped("chosen and rejected answer different prompts", prompt)
    if not chosen.strip() or not rejected.strip():
        return Dropped("an empty answer", prompt)
    numbers = [number_cell(row, name, where) for name in ratings] or [None, None]
    margin = number_cell(row, "margin", where) if "margin" in row else None
    if isinstance(prompt, str) and TURN.search(prompt):
        prompt = to_messages(prompt)  # with chat None, no error: text it was
        if chat is None:
            chat = False
    if isinstance(prompt, list) and not chat:  # in text, the answer follows "Assistant:"
        chosen, rejected = f" {chosen.strip()}", f" {rejected.strip()}"
    elif chat and prompt:
        chosen, rejected = chosen.strip(), rejected.strip()
    asked = _as_asked(prompt, where, chat)
    if isinstance(asked, list) and asked[-1]["role"] == "assistant":
        return Dropped("the prompt ends with an answer", prompt)
    return Pair(asked, chosen, rejected, *numbers, margin)


def read_prompt(row: dict, where: str, column: str, chat: bool | None) -> Prompt | Dropped:
    """The prompt in one row, as messages or as text (see prompts.load_prompts)."""
    if column == "chosen":
        prompt, _ = _dialogue(row, column, where)
        require(bool(prompt), f"{where}: column 'chosen' is no dialogue, and there is no prompt")
    elif isinstance(row.get(column), list):
        prompt = _messages(row[column], column, where)
        # Of a whole dialogue, the prompt is what was asked last.
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if not prompt:
            return Dropped("nothing is asked")
    else:
        prompt = text_cell(row, column, where)
    asked = _as_asked(prompt, where, chat)
    if isinstance(asked, list) and asked[-1]["role"] == "assistant":
        return Dropped("the prompt ends with an answer", prompt)
    return asked


def _dialogue(row: dict, column: str, where: str) -> tuple[Prompt, str]:
    """The prompt and the completion in row[column].

    It holds messages, a dialogue in text, or the completion of row["prompt"].
    """
    value = row.get(column)
    if isinstance(value, list):
        *before, last = _messages(value, column, where)
        require(
            last["role"] == "assistant",
            f"{where}: column {column!r}: ends with a turn of {last['role']!r:.40}, expected "
            "assistant",
        )
        answer = last["content"]
        if len(before) == 1:  # HelpSteer's holds a whole dialogue in one user's turn
            return to_messages(before[0]["content"]), answer
        if before:
            return before, answer
        given = row.get("prompt")
        require(
            bool(given), f"{where}: column {column!r} is an answer alone, and there is no prompt"
        )
        if isinstance(given, list):
            return _messages(given, "prompt", where), answer
        return to_messages(text_cell(row, "prompt", where)), answer
    text = text_cell(row, column, where)
    if DIALOGUE.match(text) and not row.get("prompt"):
        end = text.rfind("\n\nAssistant:") + len("\n\nAssistant:")
        require(
            end > len("\n\nAssistant:"),
            f"{where}: column {column!r}: a dialogue without a turn of the assistant",
        )
        return text[:end], text[end:]
    if isinstance(row.get("prompt"), list):
        return _messages(row["prompt"], "prompt", where), text
    return (text_cell(row, "prompt", where, may_be_empty=True) if "prompt" in row else ""), text


def _messages(value: list, column: str, where: str) -> Messages:
    """Checked messages, role and content alone."""
    fits = bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not fits:
        expected = '[{"role": "user", "content": "..."}, ...]'
        raise UserError(
            f"{where}: column {column!r}: got {value!r:.60}, expected messages: {expected}"
        )
    for message in value:
        require_characters(message["role"] + message["content"], f"{where}: column {column!r}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _as_asked(prompt: Prompt, where: str, chat: bool | None) -> Prompt:
    """The prompt as messages, or as text."""
    if chat:
        return to_messages(prompt) if prompt else ""
    if isinstance(prompt, list) and chat is None:
        raise UserError(
            f"{where}: has chat messages, and the model's tokenizer has no chat template: take a "
            "model with one, or --format plain (turns as Human: and Assistant: in plain text)"
        )
    if isinstance(prompt, str) and "<extra_id_1>" in prompt:
        prompt = to_messages(prompt)
    return to_text(prompt) if isinstance(prompt, list) else prompt
