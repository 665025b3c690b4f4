"""Texts that end a completion, beside end tokens."""

import bisect
import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..models.generation import Stop
from ..running.errors import require
from .chat import decode_parts


def stop_at(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None) -> Stop | None:
    """What finds the first of these texts in a completion; None where there are none.

    Raises:
        UserError: a text is empty, given twice, or one that the tokenizer cannot write.
    """
    for text in texts or ():
        shown = f"--stop {text!r:.60}"
        require(bool(text) and texts.count(text) == 1, f"{shown}: expected different texts")
        written = [
            tokenizer.decode(tokenizer(one)["input_ids"], skip_special_tokens=True)
            for one in (text, f"a{text}a")
        ]
        require(
            any(text.strip(" ") in one for one in written),
            f"{shown}: the policy's tokenizer does not write it: of {text!r:.60} it makes "
            f"{written[0]!r:.60} (special tokens are no text)",
        )
        if "\\" in text:
            print(
                f"  note: {shown}: a backslash as it is: $'...' makes \\n a line break in a shell"
            )
    return functools.partial(find_stop, tokenizer, texts) if texts else None


def find_stop(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: list[int], ids: list[int]
) -> tuple[int, list[int]] | None:
    """Where a completion ends: before the first of `texts` that its text has.

    The text is what `decode_parts` gives, special tokens left out. A stop text may begin within a
    token. What that token writes before it is then tokenised anew.

    Args:
        prompt, ids: of a prompt and its completion.
    Returns:
        How many of its ids the text is complete with, and ids of what is before it; or None.
    """

    def read(count: int) -> str:
        return decode_parts(tokenizer, prompt, ids[:count])[1]

    def stops(count: int) -> bool:
        return any(text in read(count) for text in texts)

    if not stops(len(ids)):
        return None
    count = bisect.bisect_left(range(len(ids)), True, key=stops)
    text = read(count)
    before = text[: min(text.index(one) for one in texts if one in text)]
    kept = next(n for n in range(count, -1, -1) if before.startswith(read(n)))
    rest = before[len(read(kept)) :]
    if not rest:
        return count, ids[:kept]
    # Where a tokenizer puts a space before every text, its pieces are spelled one by one
    spelled = [tokenizer(rest, add_special_tokens=False)["input_ids"]]
    spelled.append(tokenizer.convert_tokens_to_ids(list(rest.replace(" ", "\u2581"))))
    for more in spelled:
        if None not in more and decode_parts(tokenizer, prompt, ids[:kept] + more)[1] == before:
            return count, ids[:kept] + more
    return count, ids[:kept]  # a tokenizer of whole words has no part of one
