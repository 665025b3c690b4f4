"""Preference pairs and prompts from the columns of a data set, and which of them are held out."""

import bisect
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .chat import DIALOGUE, TURN, Messages, Prompt, first_turn, to_messages, to_text
from .common import UserError, require
from .rows import number_cell, read_rows, require_characters, text_cell

UNDERSTOOD = {
    "pairs": 'chosen and rejected, as {"prompt": "Who wrote Emma?", "chosen": " Jane Austen.", "rejected": " No idea."}, '
    'or text and rating (or label), as {"text": "Fun for all ages.", "rating": 2.4}',
    "prompts": 'prompt, messages, chosen (a dialogue) or text, as {"prompt": "Who wrote Emma?"}',
}
CHOSEN_RATINGS = ("chosen_rating", "rating_chosen", "chosen_score", "score_chosen")


class Pair(NamedTuple):
    """One preference: two completions of a prompt (which may be ""), ratings and margin where the data has them."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    margin: float | None = None

    @property
    def gap(self) -> float:
        """By how much the chosen text is better: the data's margin, or the gap of its ratings; 0 where it says neither."""
        rated = self.chosen_rating is not None and self.rejected_rating is not None
        return self.margin if self.margin is not None else self.chosen_rating - self.rejected_rating if rated else 0.0


class RatedPairs:
    """All pairs of rated texts whose ratings differ by at least `min_gap`, made when asked for.

    Twelve thousand positive and as many negative reviews are 156 million pairs; here they cost one list. With texts
    in order of rating, text j beats exactly the first `beaten[j]` texts.

    >>> pairs = RatedPairs(["bad", "good", "fine"], [0.0, 2.0, 1.0], min_gap=1.0)
    >>> [(pair.chosen, pair.rejected) for pair in pairs]
    [('fine', 'bad'), ('good', 'bad'), ('good', 'fine')]
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], min_gap: float):
        order = sorted(range(len(texts)), key=lambda i: ratings[i])
        self.texts = [texts[i] for i in order]
        self.ratings = [ratings[i] for i in order]
        # The difference itself is compared (a bound r - min_gap would round), and at min_gap 0 equal ratings are no pair.
        beaten = [
            min(
                bisect.bisect_right(self.ratings, -min_gap, key=lambda other: other - rating),  # noqa: B023
                bisect.bisect_left(self.ratings, rating),
            )
            for rating in self.ratings
        ]
        self.end = list(itertools.accumulate(beaten))  # pairs won by the texts up to and including this one

    def __len__(self) -> int:
        return self.end[-1] if self.end else 0

    def __getitem__(self, k: int) -> Pair:
        if not 0 <= k < len(self):
            raise IndexError(k)
        winner = bisect.bisect_right(self.end, k)
        loser = k - (self.end[winner - 1] if winner else 0)
        return Pair("", self.texts[winner], self.texts[loser], self.ratings[winner], self.ratings[loser])


def held_out(text: str, seed: int, share: float) -> bool:
    """Whether this text belongs to the held-out share: by its hash, so that every script splits alike.

    A prompt that the reward model was trained on is therefore never a held-out prompt of the policy (same seed).
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Split(NamedTuple):
    """Which rows to read, and which of them are held out."""

    dataset: str
    split: str = "train"
    eval_split: str = ""  # held out; without it, a share of `split`
    eval_share: float = 0.1
    seed: int = 0
    subset: str = ""


def load_pairs(data: Split, *, chat: bool | None = False, min_rating_gap: float = 1.0) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Training and held-out pairs, split by prompt (by text where there are no prompts); the reading is printed.

    Two kinds of data are recognised from their columns:
    - chosen, rejected: completions of `prompt`, or whole dialogues (messages, or the text of hh-rlhf) that share their
      prompt; with ratings (chosen_rating and rejected_rating, or score_chosen and score_rejected) or margin;
    - text, rating (or label): all pairs with a gap of at least `min_rating_gap`, see RatedPairs.

    `chat` says what prompts become: messages (True), text (False), text but messages are an error (None).

    Raises UserError for missing columns, and for a row with an empty text, a non-string or a NaN, with its number.
    """
    rows, columns = _both_splits(data)
    rating = next((name for name in ("rating", "label") if name in columns), None)
    if {"chosen", "rejected"} <= columns:
        ratings = next(((c, c.replace("chosen", "rejected")) for c in CHOSEN_RATINGS if c in columns), ())
        reading = "chosen / rejected" + (f" rated by {ratings[0]}" if ratings else "") + (", margin" * ("margin" in columns))
        read = functools.partial(read_pair, ratings=ratings, chat=chat)
        parts = _divide(data, rows, read, lambda pair: first_turn(pair.prompt) if pair.prompt else pair.chosen)
        if ratings:
            pairs = [*parts[0], *parts[1]]
            right = sum(pair.chosen_rating >= pair.rejected_rating for pair in pairs) / max(1, len(pairs))
            reading += f" (at least as high as the rejected one in {right:.1%})"
        reading += ", as chat" * bool(chat)
    elif "text" in columns and rating:
        read = lambda row, where: (text_cell(row, "text", where), number_cell(row, rating, where))  # noqa: E731
        rated = _divide(data, rows, read, lambda item: first_turn(item[0]))
        for part in rated:
            values = {value for _, value in part}
            which = "held-out " * (part is rated[1])
            require(
                len(values) != 1,
                f"{data.dataset}: {which}column {rating!r} is always {next(iter(values), 0):g}: expected several",
            )
        parts = [RatedPairs([t for t, _ in part], [r for _, r in part], min_rating_gap) for part in rated]
        reading = f"text by {rating}, gap >= {min_rating_gap:g}"
    else:
        raise UserError(f"{data.dataset}: has columns {sorted(columns)}: expected {UNDERSTOOD['pairs']}")
    print(f"{data.dataset}: read as {reading}: {len(parts[0])} training and {len(parts[1])} held-out pairs")
    _require_both(data, parts, "pairs")
    return parts[0], parts[1]


def load_prompts(data: Split, *, chat: bool | None = False, column: str = "") -> tuple[list[Prompt], list[Prompt], str]:
    """Training and held-out prompts, duplicates once, and the column they come from; the split is that of load_pairs.

    Recognised columns: prompt, messages, chosen (a dialogue, whose prompt is taken), text; or the one named.
    """
    rows, columns = _both_splits(data)
    column = column or next((name for name in ("prompt", "messages", "chosen", "text") if name in columns), "")
    require(column in columns, f"{data.dataset}: has columns {sorted(columns)}: expected {column or UNDERSTOOD['prompts']}")
    parts = []
    for part in _divide(data, rows, functools.partial(read_prompt, column=column, chat=chat and column != "text"), first_turn):
        parts.append(list({json.dumps(prompt): prompt for prompt in part}.values()))
    form = "as chat" if chat and column != "text" else "as text"
    print(f"{data.dataset}: {len(parts[0])} training and {len(parts[1])} held-out prompts from {column!r}, {form}")
    _require_both(data, parts, "prompts")
    return parts[0], parts[1], column


def _both_splits(data: Split) -> tuple[list[Sequence[dict]], set[str]]:
    """Rows of the split (and of the split to hold out), and the columns that they have."""
    splits = [data.split] + [data.eval_split] * bool(data.eval_split)
    rows = [read_rows(data.dataset, split, data.subset) for split in splits]
    return rows, set.intersection(*(set(part[0]) for part in rows))


def _divide(data: Split, rows: list[Sequence[dict]], read, key) -> tuple[list, list]:
    """Items (training, held out) read from rows; one whose key is held out never trains. Drops are counted and printed."""
    dropped, parts, held = Counter(), [], set()
    for split, part in zip((data.split, data.eval_split), rows):
        parts.append([])
        for number, row in enumerate(part, 1):
            item = read(row, f"{data.dataset}: row {number}" + (f" of {split}" if len(rows) > 1 else ""))
            if isinstance(item, Dropped):
                dropped[item.reason] += 1
                if item.prompt and split == data.eval_split:
                    held.add(first_turn(item.prompt))
            else:
                parts[-1].append(item)
    if len(parts) == 1:
        is_held = [held_out(key(item), data.seed, data.eval_share) for item in parts[0]]
        train = [item for item, held in zip(parts[0], is_held) if not held]
        evaluation = [item for item, held in zip(parts[0], is_held) if held]
    else:
        evaluation = parts[1]
        held |= {key(item) for item in evaluation}
        train = [item for item in parts[0] if key(item) not in held]
        dropped["in the held-out split, too"] = len(parts[0]) - len(train)
    for reason, count in dropped.items():
        if count:
            print(f"{data.dataset}: {count} rows dropped: {reason}")
    return train, evaluation


class Dropped(NamedTuple):
    """A row that is no item, and why."""

    reason: str
    prompt: Prompt = ""  # held out all the same, where the row is of the held-out split


def read_pair(row: dict, where: str, ratings: tuple[str, ...], chat: bool | None) -> Pair | Dropped:
    """The pair in one row of chosen and rejected, its prompt as messages or as text (see load_pairs)."""
    (prompt, chosen), (other, rejected) = (_dialogue(row, name, where) for name in ("chosen", "rejected"))
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
        chosen, rejected = f" {chosen}", f" {rejected}"
    elif chat and prompt:
        chosen, rejected = chosen.strip(), rejected.strip()
    asked = _as_asked(prompt, where, chat)
    if isinstance(asked, list) and asked[-1]["role"] == "assistant":
        return Dropped("the prompt ends with an answer", prompt)
    return Pair(asked, chosen, rejected, *numbers, margin)


def read_prompt(row: dict, where: str, column: str, chat: bool | None) -> Prompt | Dropped:
    """The prompt in one row, as messages or as text (see load_prompts)."""
    if column == "chosen":
        prompt, _ = _dialogue(row, column, where)
        require(bool(prompt), f"{where}: column 'chosen' is no dialogue, and there is no prompt")
    elif isinstance(row.get(column), list):
        prompt = _messages(row[column], column, where)
        while prompt and prompt[-1]["role"] == "assistant":  # a whole dialogue: what is asked last, is the prompt
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
    """The prompt and the completion in row[column]: messages, a dialogue in text, or the completion of row["prompt"]."""
    value = row.get(column)
    if isinstance(value, list):
        *before, answer = _messages(value, column, where)
        require(
            answer["role"] == "assistant",
            f"{where}: column {column!r}: ends with a turn of {answer['role']!r:.40}, expected assistant",
        )
        if before:  # HelpSteer's holds a whole dialogue in one user's turn
            return (to_messages(before[0]["content"]) if len(before) == 1 else before), answer["content"]
        given = row.get("prompt")
        require(bool(given), f"{where}: column {column!r} is an answer alone, and there is no prompt")
        return (
            _messages(given, "prompt", where) if isinstance(given, list) else to_messages(text_cell(row, "prompt", where))
        ), answer["content"]
    text = text_cell(row, column, where)
    if DIALOGUE.match(text) and not row.get("prompt"):
        end = text.rfind("\n\nAssistant:") + len("\n\nAssistant:")
        require(end > len("\n\nAssistant:"), f"{where}: column {column!r}: a dialogue without a turn of the assistant")
        return text[:end], text[end:]
    if isinstance(row.get("prompt"), list):
        return _messages(row["prompt"], "prompt", where), text
    return (text_cell(row, "prompt", where, may_be_empty=True) if "prompt" in row else ""), text


def _messages(value: list, column: str, where: str) -> Messages:
    """Checked messages, role and content alone."""
    fits = bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not fits:
        expected = '[{"role": "user", "content": "..."}, ...]'
        raise UserError(f"{where}: column {column!r}: got {value!r:.60}, expected messages: {expected}")
    for message in value:
        require_characters(message["role"] + message["content"], f"{where}: column {column!r}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _as_asked(prompt: Prompt, where: str, chat: bool | None) -> Prompt:
    """The prompt as messages, or as text."""
    if chat:
        return to_messages(prompt) if prompt else ""
    if isinstance(prompt, list) and chat is None:
        raise UserError(
            f"{where}: has chat messages, and the model's tokenizer has no chat template: take a model with one, or "
            "--format plain (turns as Human: and Assistant: in plain text)"
        )
    if isinstance(prompt, str) and "<extra_id_1>" in prompt:
        prompt = to_messages(prompt)
    return to_text(prompt) if isinstance(prompt, list) else prompt


def _require_both(data: Split, parts: Sequence[Sequence], what: str) -> None:
    require(
        len(parts[0]) > 0 and len(parts[1]) > 0,
        f"{data.dataset}: {len(parts[0])} training and {len(parts[1])} held-out {what}: expected both, so more rows "
        "(or another --eval-share or --split-seed)",
    )
