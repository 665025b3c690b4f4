"""Prompts of a data set, and as token ids."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..running.errors import require
from .batches import shuffled_forever
from .cells import report
from .chat import Text, TokenizedPrompt, encode_prompt, note_special_tokens, prompt_text
from .columns import columns_for, name_unread, prompt_column, read_prompt
from .messages import Note, Prompt, first_turn, place_of
from .splits import Split, both_splits, divide, require_both
from .tokens import TokenItems, tokenised


def load_prompts(
    data: Split, *, chat: bool | None = False
) -> tuple[list[Prompt], list[Prompt], str, tuple[list, list]]:
    """Training and held-out prompts, duplicates once, and the column they come from.

    The split is that of pairs.load_pairs. Recognised columns: prompt, messages, chosen (a dialogue,
    whose prompt is taken), text. Rows of no use, as an empty prompt, are dropped and counted.

    Args:
        data: which rows to read, and which of them are held out.
        chat: what prompts become, see pairs.load_pairs.
    Returns:
        Training prompts, held-out prompts, the column, by our name, and the columns that
        `data.asked` asks for of both, a dict or None for each prompt. Prompts that are equal but
        for these are no duplicates.
    Raises:
        UserError: a column is missing, or more than half of the rows are of no use.
    """
    rows, known, columns = both_splits(data)
    column = prompt_column(known, data.names, columns, data.dataset)
    chat = chat and column != "text"

    def read(row: dict, where: str, note: Note) -> tuple[Prompt, dict | None]:
        return read_prompt(row, where, note, column, chat), columns_for(row, data.asked, column)

    parts = [
        list({different(*item): item for item in part}.values())
        for part in divide(data, rows, read, lambda item: first_turn(item[0]))
    ]
    train, evaluation = map(len, parts)
    form = f"{data.names.get(column, column)!r:.40}, as {'chat' if chat else 'text'}"
    print(f"{data.dataset}: {train} training and {evaluation} held-out prompts from {form}")
    used = {column, "prompt"} if column == "chosen" else {column}
    used |= (columns_for(rows[0][0], data.asked, column) or {}).keys()
    name_unread(data.dataset, columns, used, data.names)
    require_both(data, parts, "prompts")
    (train, of_train), (held_out, of_held_out) = (map(list, zip(*part)) for part in parts)
    return train, held_out, column, (of_train, of_held_out)


def different(prompt: Prompt, columns: dict | None) -> str:
    """A text that tells a prompt and its columns from others."""
    if isinstance(prompt, str) and not columns:
        return prompt
    return json.dumps([prompt, columns] if columns else prompt, default=str)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> TokenizedPrompt:
    """A prompt as the policy sees it."""
    messages = prompt if isinstance(prompt, list) else None
    return TokenizedPrompt(encode_prompt(tokenizer, prompt), messages)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    limit: int,
    span: tuple[int, int] | None,
    kind: str,
    columns: Sequence[dict | None] | None = None,
) -> TokenItems[TokenizedPrompt]:
    """Prompts as token ids.

    Those over `limit` tokens are dropped and counted. With a span, it is those under its lower end.
    So are those that the chat template refuses.

    Args:
        tokenizer: the policy's.
        prompts: of load_prompts.
        limit: tokens per prompt.
        span: (low, high), how many first tokens a prompt will be cut to, see `beginning`.
        kind: which prompts they are, in words.
        columns: what reward functions ask for of each prompt's row.
    Raises:
        UserError: no prompt is left, more than half are refused, or `span` reaches up to `limit`.
    """
    inputs = [(prompt,) for prompt in prompts]
    note_special_tokens(tokenizer, inputs, f"{kind} prompts")

    def texts_of(_: None, prompt: Prompt) -> list[Text]:
        return [prompt_text(tokenizer, prompt)]

    rows, reasons = tokenised(tokenizer, inputs, texts_of, end=False, kind=f"{kind} prompts")
    refused = [(why, place_of(prompts[n])) for n, why in reasons.items()]
    report("  ", f"{kind} prompts dropped", refused, len(prompts))
    taken = np.delete(np.arange(len(rows)), list(reasons))
    lengths = rows.lengths[taken, 0]
    if span is None:
        kept = taken[(0 < lengths) & (lengths <= limit)]
        reason = f"longer than {limit} tokens" + ", or empty" * bool((lengths == 0).any())
        advice = "raise --max-prompt-tokens, or lower --max-new-tokens"
    else:
        begin = [tokenizer.bos_token_id]
        alone = [n for n in taken[lengths == span[0]] if rows[n][0][:1] == begin]
        kept = np.setdiff1d(taken[lengths >= span[0]], alone)
        reason, advice = f"shorter than {span[0]} tokens", "lower --prompt-tokens"
        require(
            span[1] < limit,
            f"--prompt-tokens {span[1]}: expected fewer than {limit}: "
            "shorten it or --max-new-tokens",
        )
    if len(kept) < len(taken):
        print(f"  dropped {len(taken) - len(kept)} of {len(taken)} {kind} prompts: {reason}")
    require(len(kept) > 0, f"no {kind} prompts left: all are {reason}: {advice}")
    messages = [prompts[n] if isinstance(prompts[n], list) else None for n in kept]
    extras = [
        (asked, row, columns[n] if columns else None)
        for row, (n, asked) in enumerate(zip(kept, messages))
    ]
    return replace(
        rows,
        places=rows.places[kept],
        extras=extras,
        make=lambda texts, extra: TokenizedPrompt(*texts, *extra),
    )


def beginning(
    prompt: TokenizedPrompt, span: tuple[int, int] | None, rng: random.Random
) -> TokenizedPrompt:
    """The first ids of a text, low..high of them, drawn by `rng`.

    Without a span, the prompt itself.
    """
    return prompt if span is None else prompt._replace(ids=prompt.ids[: rng.randint(*span)])


def prompt_batches(
    prompts: Sequence[TokenizedPrompt],
    span: tuple[int, int] | None,
    batch_size: int,
    group_size: int,
    seed: int,
) -> Iterator[list[TokenizedPrompt]]:
    """Endless batches of `batch_size` prompts, each `group_size` times in a row.

    Each prompt comes once per epoch, in an order that differs between epochs and seeds. With a span
    it is cut anew each time, see `beginning`.
    """
    order, lengths = shuffled_forever(prompts, seed), random.Random(seed)
    while True:
        count = batch_size // group_size
        different = [beginning(next(order), span, lengths) for _ in range(count)]
        yield [prompt for prompt in different for _ in range(group_size)]


def parse_span(name: str, text: str) -> tuple[int, int] | None:
    """(5, 15) from "5-15", (10, 10) from "10", None from "".

    Raises:
        UserError: anything else; `name` is the flag that it came from.
    """
    if not text:
        return None
    low, dash, high = text.partition("-")
    high = high if dash else low
    short = len(low + high) < 20 and low.isdecimal() and high.isdecimal()
    fits = short and 1 <= int(low) <= int(high) < 2**31
    require(fits, f"{name} {text}: expected a number or a range, such as 10 or 5-15")
    return int(low), int(high)
