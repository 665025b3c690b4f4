r"""The one text format: prompts, as text or as chat messages, and whole texts -> token ids.

A text is taken as it is. Messages go through the tokenizer's chat template, or where it has none
become a dialogue in plain text, "\n\nHuman: ...\n\nAssistant: ...". Training and scoring call the
same functions.
"""

import contextlib
import itertools
import os
import re
import typing
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..running.errors import UserError, require
from .messages import Messages, Prompt, to_text
from .templates import answer_frame, begun, default_template, render, roles_of, say_once

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character

# What other chat templates write.
MARKS = r"\[/?INST\]|<\|(im_start|start_header_id|user|assistant)\|>|<start_of_turn>|### Response:"


class TokenizedPrompt(NamedTuple):
    """A prompt as the policy sees it.

    Attributes:
        ids: its token ids; of a plain text, they may be a beginning.
        messages: None where the prompt is plain text.
        row: which prompt of the data it is: what a baseline per prompt goes by.
        columns: what else its row of the data has, by name: what reward functions ask for.
    """

    ids: list[int]
    messages: Messages | None = None
    row: int = 0
    columns: dict[str, typing.Any] | None = None


class Text(NamedTuple):
    """What is tokenised: a plain text, or what a chat template wrote."""

    text: str
    rendered: bool


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Text:
    """What a policy continues: a text, or messages with the cue of the answer."""
    if isinstance(prompt, list) and tokenizer.chat_template:
        return Text(render(tokenizer, prompt, cue=True), True)
    return Text(to_text(prompt) if isinstance(prompt, list) else prompt, False)


def whole_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> Text:
    """What a reward model scores: prompt + completion, without the end token.

    Of messages, it is what the chat template makes of the dialogue with the answer as its last
    turn, no more and no less. White space around that answer is left out.
    """
    if isinstance(prompt, str):
        return Text(prompt + completion, False)
    completion = completion.strip()
    if not tokenizer.chat_template:
        return Text(f"{to_text(prompt)} {completion}", False)
    answer = {"role": "assistant", "content": completion}
    return Text(render(tokenizer, [*prompt, answer], cue=False), True)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], end: bool
) -> Iterator[list[int]]:
    """Token ids of each text, all tokenised in one call: fast tokenizers take all cores.

    In a plain text the begin token is there exactly once where the tokenizer has one, the end token
    exactly once if `end`, else never at the end. What a template wrote gets a begin token at most.
    """
    begin, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for rendered, group in itertools.groupby(texts, key=lambda text: text.rendered):
        for ids in _rows(tokenizer, [text.text for text in group], not rendered):
            if rendered:
                yield begun(tokenizer, ids)
                continue
            # Some tokenizers add them by themselves, some texts have them already, some both.
            while eos is not None and ids[-1:] == [eos]:
                ids.pop()
            if begin is not None:
                first = next((i for i, one in enumerate(ids) if one != begin), len(ids))
                ids[:first] = [begin]
            yield [*ids, eos] if end and eos is not None else ids


def _rows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool
) -> list[list[int]]:
    """Token ids as tokenizer(text) has them, text by text."""
    options = {} if add_special_tokens else {"add_special_tokens": False}
    first = list(tokenizer(texts[0], **options)["input_ids"])  # and truncation is off, in Rust, too
    with contextlib.suppress(Exception):  # what is wrong with a text is raised below, as always
        names, plain = ("__call__", "_encode_plus"), PreTrainedTokenizerFast
        alike = (getattr(type(tokenizer), name) is getattr(plain, name) for name in names)
        if len(texts) > 1 and all(alike):
            # A quarter of the time of tokenizer(texts), which makes lists of masks and offsets
            encode_all = tokenizer.backend_tokenizer.encode_batch_fast
            rows = [row.ids for row in encode_all(texts, add_special_tokens=add_special_tokens)]
            if rows[0] == first:
                return rows
    return [first, *(list(tokenizer(text, **options)["input_ids"]) for text in texts[1:])]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, end: bool) -> list[int]:
    """Token ids of one plain text, see `encode_batch`."""
    return next(encode_batch(tokenizer, [Text(text, False)], end))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, see `prompt_text`."""
    return next(encode_batch(tokenizer, [prompt_text(tokenizer, prompt)], end=False))


def encode_whole(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """Token ids of prompt, completion and the end token, see `whole_text`."""
    return next(encode_batch(tokenizer, [whole_text(tokenizer, prompt, completion)], end=True))


def encode_sampled(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str, ids: list[int] | None
) -> list[int]:
    """What a reward model scores of a sampled answer to messages.

    The sampled ids and what the template writes after an answer, if that is what it makes of the
    whole dialogue. If not (think blocks, channels, no cue, an answer with a thought), the dialogue
    is written anew by `encode_whole`, as it is for a given answer.

    Args:
        tokenizer: the reward model's.
        prompt: what was asked.
        answer: as text.
        ids: prompt and answer as sampled; None where they are not this tokenizer's ids.
    """
    if not tokenizer.chat_template:
        return encode_whole(tokenizer, prompt, answer)
    same, opening, ending = answer_frame(tokenizer, default_template(tokenizer), roles_of(prompt))
    if same and ids and "</think>" not in answer:  # many templates leave thoughts out
        return ids + ending
    try:
        # Without a cue, or with channels, the policy samples the opening by itself.
        return encode_whole(tokenizer, prompt, answer.strip().removeprefix(opening.strip()))
    except UserError as error:
        say_once(tokenizer, f"cannot take some sampled answers, scored after its cue: {error}")
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return (ids or encode_prompt(tokenizer, prompt) + after) + ending


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control tokens as a text may spell them, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special}, key=len, reverse=True)


def note_special_tokens(
    tokenizer: PreTrainedTokenizerBase, items: Iterable[tuple[Prompt, ...]], kind: str
) -> None:
    """Print how many items (prompts, or prompts and answers) spell control tokens.

    In chat, it is also said of the marks of other templates.
    """
    items, own = list(items), special_tokens(tokenizer)
    chat = any(isinstance(prompt, list) for prompt, *_ in items)
    advice = ", as if rendered already: --format plain takes them as they are" * chat
    looks = [("|".join(map(re.escape, own)) or "(?!)", {token[:1] for token in own})]
    readings = ["special tokens such as {}, which are read as such"]
    if chat:
        looks.append((MARKS, "[<#"))
        readings.append("marks of a template such as {}, which are words here")
    for look, reading in zip(looks, readings):
        found = [match for item in items if (match := _first_match(*look, item))]
        if found:
            said = reading.format(found[0][0])
            print(f"  note: {len(found)} of {len(items)} {kind} hold {said}{advice}")
            return


def _first_match(pattern: str, starts: Iterable[str], item: tuple[Prompt, ...]) -> re.Match | None:
    """Where one of the item's texts has `pattern`, whose matches begin with one of `starts`."""
    for part in item:
        texts = [part] if isinstance(part, str) else (t for m in part for t in m.values())
        for text in texts:  # most have no such character, which is seen in no time
            if any(map(text.__contains__, starts)) and (match := re.search(pattern, text)):
                return match
    return None


def wants_chat(tokenizer: PreTrainedTokenizerBase, format: str) -> bool | None:
    """Whether prompts become chat messages, by the flag --format.

    None where they cannot, since the tokenizer has no template.

    Raises:
        UserError: `format` is "chat", and the tokenizer has no template. Or it has several, and
            none is the default.
    """
    if format == "plain":
        return False
    require(
        bool(tokenizer.chat_template) or format != "chat",
        "--format chat: the model's tokenizer has no chat template: take a model with one, or "
        "--format plain",
    )
    return True if tokenizer.chat_template and default_template(tokenizer) else None


def decode_parts(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]
) -> tuple[str, str]:
    """Prompt and completion as texts that join to the whole text.

    Decoded alone, a completion may lose its first space. A character that the prompt was cut in is
    the completion's.
    """
    whole, start = _decode(tokenizer, prompt + completion), _decode(tokenizer, prompt)
    if not whole.startswith(start):
        start = os.path.commonprefix([start.rstrip(UNFINISHED), whole])
    rest = whole[len(start) :]
    # Where bytes are tokens, a character that stays unfinished spoils the bytes after it ...
    own = _decode(tokenizer, completion) if UNFINISHED in whole else rest
    return start, max(rest, own, key=lambda text: len(text.replace(UNFINISHED, "")))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not text.endswith(UNFINISHED):
        return text
    # ... and those before it.
    cuts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in (-1, -2, -3)]
    best = max((cut.rstrip(UNFINISHED) for cut in cuts), key=len)
    return best + UNFINISHED if len(best) > len(text.rstrip(UNFINISHED)) else text
