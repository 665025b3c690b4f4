"""Preference pairs of a data set, and as token ids."""

import bisect
import functools
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..running.errors import UserError, require
from .cells import number_cell, report, shown, text_cell
from .chat import Text, note_special_tokens, whole_text
from .columns import CHOSEN_RATINGS, Pair, Ranking, name_unread, read_pair, read_ranking
from .messages import Note, Prompt, first_turn, place_of
from .splits import Split, both_splits, divide, require_both
from .tokens import TokenItems, tokenised


class RatedPairs:
    """All pairs of rated texts whose ratings differ by at least `min_gap`, made when asked for.

    Twelve thousand positive and as many negative reviews are 156 million pairs. Here they cost one
    list. With texts in order of rating, text j beats exactly the first `beaten(ratings[j])` texts.

    Args:
        texts, ratings: one of each per text.
        min_gap: >= 0, in units of the ratings.

    >>> pairs = RatedPairs(["bad", "good", "fine"], [0.0, 2.0, 1.0], min_gap=1.0)
    >>> [(pair.chosen, pair.rejected) for pair in pairs]
    [('fine', 'bad'), ('good', 'bad'), ('good', 'fine')]
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], min_gap: float) -> None:
        order = sorted(range(len(texts)), key=lambda i: ratings[i])
        self.texts = [texts[i] for i in order]
        self.ratings = [ratings[i] for i in order]

        def beaten(rating: float) -> int:
            # The difference itself is compared: a bound r - min_gap would round.
            by_gap = bisect.bisect_right(self.ratings, -min_gap, key=lambda other: other - rating)
            # At min_gap 0 equal ratings are no pair.
            return min(by_gap, bisect.bisect_left(self.ratings, rating))

        # Pairs won by the texts up to this one.
        self.end = list(itertools.accumulate(map(beaten, self.ratings)))

    def __len__(self) -> int:
        return self.end[-1] if self.end else 0

    def __getitem__(self, k: int) -> Pair:
        if not 0 <= k < len(self):
            raise IndexError(k)
        winner = bisect.bisect_right(self.end, k)
        loser = k - (self.end[winner - 1] if winner else 0)
        return Pair(
            "", self.texts[winner], self.texts[loser], self.ratings[winner], self.ratings[loser]
        )


def load_pairs(
    data: Split, *, chat: bool | None = False, min_rating_gap: float = 1.0, needs: str = ""
) -> tuple[Sequence[Pair | Ranking], Sequence[Pair | Ranking]]:
    """Training and held-out pairs or rankings, split by prompt (by text where there are none).

    How the columns are read is printed. Three kinds of data are recognised by them:
    - chosen, rejected: completions of `prompt`, or whole dialogues (messages, or the text of
      hh-rlhf) that share their prompt. There may be ratings (chosen_rating and rejected_rating, or
      score_chosen and score_rejected; see columns.CHOSEN_RATINGS), a margin, or a probability that
      chosen is better.
    - ranked: a list of such completions, the best first; or responses and their ratings. A row with
      equal ratings becomes the pairs whose ratings differ.
    - text, rating (or label): all pairs with a gap of at least `min_rating_gap`, see RatedPairs.

    Rows of no use, as one with an empty answer, are dropped and counted.

    Args:
        data: which rows to read, and which of them are held out.
        chat: what prompts become. True: messages. False: text. None: text, but messages are an
            error.
        min_rating_gap: in units of the ratings.
        needs: "ratings" or "margin", where a loss needs them of every pair.
    Returns:
        Training pairs and held-out pairs.
    Raises:
        UserError: columns are missing, or more than half of the rows are of no use.
    """
    rows, known, columns = both_splits(data)
    rating = next((name for name in ("rating", "label") if name in known), None)
    are_rated = "text" in known and rating
    lists = [name for name in ("ranked", "responses") if name in known]
    lists = [name for name in lists if name == "ranked" or "ratings" in known]
    are_pairs = {"chosen", "rejected"} <= known
    twice = [*lists, *["chosen"] * are_pairs]
    require(len(twice) < 2, f"{data.dataset}: has both {' and '.join(twice)}: expected one of them")
    if lists:
        parts, read, reading = _ready_lists(data, rows, known, chat, needs, lists[0])
    elif are_pairs and not (are_rated and "text" in data.names):
        parts, read, reading = _ready_pairs(data, rows, known, chat, needs)
    elif are_rated:
        parts, read = _rated_pairs(data, rows, rating, min_rating_gap), {"text", rating}
        reading = f"text by {rating}, gap >= {min_rating_gap:g}"
    else:
        raise UserError(
            f"{data.dataset}: has columns {shown(columns)}: expected chosen and rejected, as "
            '{"prompt": "Who wrote Emma?", "chosen": " Jane Austen.", "rejected": " No idea."}, '
            "ranked (a list of texts, the best first), responses and ratings, or "
            'text and rating (or label), as {"text": "Fun for all ages.", "rating": 2.4} '
            "(--columns gives other names)"
        )
    train, evaluation = map(len, parts)
    what = "lists" if lists else "pairs"
    print(f"{data.dataset}: read as {reading}: {train} training and {evaluation} held-out {what}")
    name_unread(data.dataset, columns, read, data.names)
    require_both(data, parts, what)
    return parts[0], parts[1]


def _ready_pairs(
    data: Split, rows: list[list[dict]], known: set[str], chat: bool | None, needs: str
) -> tuple[tuple[list[Pair], list[Pair]], set[str], str]:
    """(training, held-out) pairs of chosen and rejected, the columns read, and how."""
    ratings = ((name, name.replace("chosen", "rejected")) for name in CHOSEN_RATINGS)
    ratings = next((names for names in ratings if known.issuperset(names)), ())
    require(
        bool(ratings) or not needs or needs == "margin" and "margin" in known,
        f"{data.dataset}: no chosen_rating and rejected_rating{', no margin' * (needs == 'margin')}"
        f": {_needed_by(needs)} needs them",
    )
    reading = "chosen / rejected"
    reading += f" rated by {ratings[0]}" if ratings else ""
    soft = "probability" in known
    reading += ", margin" * ("margin" in known) + ", probability" * soft
    read = functools.partial(read_pair, ratings=ratings, needs=needs, chat=chat, soft=soft)
    parts, how = _in_one_format(data, divide(data, rows, read, _key, _texts), chat)
    pairs = [*parts[0], *parts[1]]
    gaps = [pair.ratings[0] - pair.ratings[1] for pair in pairs if pair.ratings]
    if gaps:
        above, equal = (count / len(gaps) for count in (sum(g > 0 for g in gaps), gaps.count(0)))
        reading += f" (above the rejected one's in {above:.1%}, equal in {equal:.1%})"
    used = {"prompt", "chosen", "rejected", "margin", "probability", *ratings} & known
    return parts, used, reading + how


def _needed_by(needs: str) -> str:
    return "--rating-coef" if needs == "ratings" else "--margin"


def _ready_lists(
    data: Split, rows: list[list[dict]], known: set[str], chat: bool | None, needs: str, column: str
) -> tuple[tuple[list, list], set[str], str]:
    """(training, held-out) rankings, and pairs, of `column`, the columns read, and how."""
    rated = column == "responses"
    require(
        not needs or rated,
        f"{data.dataset}: ranked texts have no ratings: {_needed_by(needs)} needs responses and "
        "ratings",
    )
    require(
        "probability" not in known,
        f"{data.dataset}: a column probability beside {column}: it is of pairs, chosen and "
        "rejected: leave it out",
    )
    read = functools.partial(read_ranking, column=column, chat=chat)
    found, how = _in_one_format(data, divide(data, rows, read, _key, _texts), chat)
    parts = tuple([item for ranking in part for item in ranking.parts()] for part in found)
    tied = [r for part in found for r in part if rated and len(set(r.ratings)) < len(r.ratings)]
    if tied:
        equal = sum(math.comb(len(r.answers), 2) - len(r.parts()) for r in tied)
        print(
            f"{data.dataset}: {equal} pairs of equal ratings dropped: {len(tied)} rows with them "
            f"train as their {sum(len(r.parts()) for r in tied)} other pairs"
        )
    counts = sorted({len(ranking.answers) for part in found for ranking in part}) or [0]
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    reading = f"{column}{' ranked by ratings' * rated}, {many} texts each{how}"
    return parts, {"prompt", column, *["ratings"] * rated} & known, reading


def _texts(item: Pair | Ranking) -> list[str]:
    """What a split keeps on one side: the prompt, or every text of an item that has none."""
    return [first_turn(text) for text in ([item.prompt] if item.prompt else item.answers)]


def _key(item: Pair | Ranking) -> str:
    """What a split goes by: the prompt, or the best text."""
    return first_turn(item.prompt or item.answers[0])


def _in_one_format(
    data: Split, parts: tuple[list, list], chat: bool | None
) -> tuple[tuple[list, list], str]:
    """Training and held-out items, in chat only those with a prompt if any has one; and how."""
    items = [*parts[0], *parts[1]]
    bare = [item for item in items if not item.prompt]
    if not chat or len(bare) == len(items):
        return parts, f", {len(bare)} of {len(items)} without a prompt" * bool(bare)
    reason = "no prompt, where others have one"
    dropped = [(reason, place_of(item.answers[0])) for item in bare]
    report(f"{data.dataset}: ", "rows dropped", dropped, len(items))
    return tuple([item for item in part if item.prompt] for part in parts), ", as chat"


def _rated_pairs(
    data: Split, rows: list[list[dict]], column: str, min_gap: float
) -> list[RatedPairs]:
    """Training and held-out pairs of texts with ratings in `column`."""

    def read(row: dict, where: str, note: Note) -> tuple[str, float]:
        return text_cell(row, "text"), number_cell(row, column)

    parts = []
    for rated in divide(data, rows, read, lambda item: first_turn(item[0])):
        texts, ratings = [text for text, _ in rated], [rating for _, rating in rated]
        which = "held-out " * len(parts)
        parts.append(RatedPairs(texts, ratings, min_gap))
        low, high = min(ratings, default=0), max(ratings, default=0)
        require(
            len(parts[-1]) > 0 or not ratings,
            f"{data.dataset}: {which}column {column!r} lies in {low:g} to {high:g}, and no two "
            f"differ by --min-rating-gap {min_gap:g}",
        )
    return parts


class Example(NamedTuple):
    """Texts in order, the best first, as token ids, ready for the reward model.

    Attributes:
        texts: token ids; a pair has two texts.
        ratings: one per text, or None where the data has none.
        gap: by how much the first text of a pair is better.
        probability: that it is, in training and in evaluation.
    """

    texts: list[list[int]]
    ratings: tuple[float, ...] | None
    gap: float
    probability: float = 1.0


def encode_pairs(
    pairs: Sequence[Pair | Ranking],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    max_pairs: int,
    seed: int,
    crop_words: tuple[int, int] | None = None,
    label_smoothing: float = 0.0,
) -> TokenItems[Example]:
    """At most `max_pairs` pairs or rankings, drawn by `seed`, as token ids.

    Those that are identical, over-long, or refused by the chat template are dropped and counted.

    Args:
        pairs: of load_pairs.
        tokenizer: the reward model's.
        max_tokens: per text.
        max_pairs: how many are drawn where there are more.
        seed: of that draw and of the crops.
        crop_words: (low, high) keeps the beginning of each completion, low..high words drawn anew
            each time: for a reward model that will score short continuations, not whole reviews.
        label_smoothing: e, the share of labels taken to be wrong. A probability p that the first
            text is better becomes (1 - e) p + e (1 - p).
    Raises:
        UserError: more than half are refused.
    """
    rng = random.Random(seed)
    indices = range(len(pairs))
    if max_pairs < len(pairs):
        indices = rng.sample(indices, max_pairs)
    words = [(pair.prompt, *pair.answers) for pair in map(pairs.__getitem__, indices)]
    kind = "lists" if max(map(len, words), default=3) > 3 else "pairs"

    def texts_of(rng: random.Random, prompt: Prompt, *answers: str) -> Iterator[Text]:
        for answer in answers:
            if crop_words:
                answer = re.match(rf"(?:\s*\S+){{0,{rng.randint(*crop_words)}}}", answer)[0]
            yield whole_text(tokenizer, prompt, answer)

    drawing = {"rng": rng, "settings": crop_words} if crop_words else {}
    rows, reasons = tokenised(tokenizer, words, texts_of, end=True, kind=kind, **drawing)
    lengths, fits = rows.lengths, np.ones(len(rows), bool)
    fits[list(reasons)] = False
    too_long = fits & (lengths.max(1) > max_tokens)  # never cut: the difference may lie there
    fits &= ~too_long
    alike = (np.diff(np.sort(lengths, 1), axis=1) == 0).any(1)  # in length: two may be one text
    alike = np.flatnonzero(fits & alike)
    identical = [n for n in alike if len(set(map(tuple, rows[n]))) < len(rows[n])]
    fits[identical] = False
    note_special_tokens(tokenizer, words, kind)
    refused = [(why, place_of(words[n][0] or words[n][1])) for n, why in reasons.items()]
    report("  ", f"{kind} dropped", refused, len(words))
    print(
        f"  kept {fits.sum()} of {len(words)} {kind}: {len(identical)} identical and "
        f"{too_long.sum()} longer than {max_tokens} tokens dropped"
    )
    kept = np.flatnonzero(fits)
    certain = 1 - 2 * label_smoothing
    others = [
        (pair.ratings, pair.gap, label_smoothing + certain * pair.probability)
        for pair in (pairs[indices[n]] for n in kept)
    ]
    return replace(
        rows,
        places=rows.places[kept],
        extras=others,
        make=lambda texts, other: Example(texts, *other),
    )


def require_rating_range(
    where: str, ratings: Iterable[tuple[float, ...]], low: float, high: float
) -> None:
    """UserError where a rating lies outside [low, high]."""
    ratings = [rating for of_item in ratings for rating in of_item]
    require(
        low <= min(ratings) and max(ratings) <= high,
        f"{where}: ratings from {min(ratings):g} to {max(ratings):g}, outside --rating-range "
        f"{low:g} {high:g}: give the scale of the data",
    )
