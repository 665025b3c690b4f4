r"""The one text format: prompts, as text or as chat messages, and whole texts -> token ids.

A text is taken as it is. Messages go through the tokenizer's chat template, or where it has none
become a dialogue in plain text, "\n\nHuman: ...\n\nAssistant: ...". Training and scoring call the
same functions. No template is trusted: each is tried with words of our own before it is used.
"""

import ctypes
import functools
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..models.folders import first_line
from ..running.errors import UserError, require

Messages = list[dict[str, str]]  # [{"role": "user", "content": "Who wrote Emma?"}, ...]

Prompt = str | Messages

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}

DIALOGUE = re.compile(r"\n\n(Human|Assistant|System):")  # hh-rlhf, and to_text()

TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")  # HelpSteer

TEMPLATE_SECONDS = 10.0  # in which a template must have written a few words

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character


class TokenizedPrompt(NamedTuple):
    """A prompt as the policy sees it.

    Attributes:
        ids: its token ids; of a plain text, they may be a beginning.
        messages: None where the prompt is plain text.
    """

    ids: list[int]
    messages: Messages | None = None


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
    turns = [
        f"\n\n{SPEAKERS.get(message['role'], message['role'])}: {message['content']}"
        for message in messages
    ]
    return "".join(turns) + "\n\nAssistant:"


def first_turn(prompt: Prompt) -> str:
    """What a data set is split by.

    Prompts that begin with one user's turn stay together, in whatever form they are.
    """
    # By way of the text form, which cannot tell all messages apart.
    messages = to_messages(to_text(to_messages(prompt)))
    asked = (message["content"] for message in messages if message["role"] == "user")
    return next(asked, messages[0]["content"]).strip()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, end: bool) -> list[int]:
    """Token ids of a plain text.

    The begin token is there exactly once where the tokenizer has one, the end token exactly once if
    `end`, else never at the end.
    """
    ids, eos = list(tokenizer(text)["input_ids"]), tokenizer.eos_token_id
    # Some tokenizers add them by themselves, some texts have them already, some both.
    while eos is not None and ids[-1:] == [eos]:
        ids.pop()
    ids = _one_begin(tokenizer, ids)
    return [*ids, eos] if end and eos is not None else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What a policy continues: a text, or messages with the cue of the answer."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, end=False)
    if not tokenizer.chat_template:
        return encode(tokenizer, to_text(prompt), end=False)
    return _rendered_ids(tokenizer, render(tokenizer, prompt, cue=True))


def encode_whole(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """What a reward model scores: prompt + completion and the end token.

    Of messages, it is what the chat template makes of the dialogue with the answer as its last
    turn, no more and no less. White space around that answer is left out.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, prompt + completion, end=True)
    completion = completion.strip()
    if not tokenizer.chat_template:
        return encode(tokenizer, f"{to_text(prompt)} {completion}", end=True)
    answer = {"role": "assistant", "content": completion}
    return _rendered_ids(tokenizer, render(tokenizer, [*prompt, answer], cue=False))


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
    same, opening, ending = answer_frame(tokenizer, _template(tokenizer), _roles(prompt))
    if same and ids and "</think>" not in answer:  # many templates leave thoughts out
        return ids + ending
    try:
        # Without a cue, or with channels, the policy samples the opening by itself.
        return encode_whole(tokenizer, prompt, answer.strip().removeprefix(opening.strip()))
    except UserError as error:
        _say_once(tokenizer, f"cannot take some sampled answers, scored after its cue: {error}")
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return (ids or encode_prompt(tokenizer, prompt) + after) + ending


@functools.lru_cache(1024)
def answer_frame(
    tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]
) -> tuple[bool, str, list[int]]:
    r"""How a chat template frames an answer to turns of these roles.

    Returns:
        Whether prompt, answer and ending in a row are what it makes of the whole dialogue, but for
        white space. If not, a line says so.
        What it writes between prompt and answer, such as "<think>\n\n</think>\n\n".
        Ids of what it writes after an answer, such as those of "<|im_end|>\n".
    """
    turns = _sentinels(roles)
    asked = render(tokenizer, turns, cue=True)
    wholes = [
        render(tokenizer, [*turns, {"role": "assistant", "content": word}], cue=False)
        for word in ("sentinel one", "sentinel two")  # tokens of unlike ends
    ]
    follows = wholes[0].startswith(asked)
    opening = wholes[0].removeprefix(asked).partition("sentinel one")[0] if follows else ""
    same = follows and not opening.strip()
    if not same:
        cue = asked.rpartition(turns[-1]["content"])[2]
        change = f"puts {opening!r:.60} after" if follows else f"has no {cue!r:.60} in"
        _say_once(
            tokenizer,
            f"{change} the prompt where an answer follows: sampled answers are scored as it writes "
            "them there, not by the sampled ids",
        )
    ids = [_rendered_ids(tokenizer, whole)[::-1] for whole in wholes]
    return same, opening, os.path.commonprefix(ids)[::-1]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, cue: bool) -> str:
    """What the chat template makes of messages: a whole dialogue, or a prompt and its cue.

    Raises:
        UserError: the template fails, refuses the turns, leaves one out, or does not end.
    """
    way = _way(tokenizer, _template(tokenizer), _roles(messages), cue)
    text = _apply(tokenizer, _given(messages, *way), cue) if isinstance(way, tuple) else way
    if isinstance(text, UserError):
        raise UserError(str(text))  # anew, since the one that is kept would gather tracebacks
    return text


@functools.lru_cache(1024)
def _way(
    tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...], cue: bool
) -> tuple[bool, tuple[str, ...]] | UserError:
    """How to give turns of these roles to a template so that the words of each are in its text.

    Returns:
        Whether the system's text goes before the user's, and the roles whose content goes in parts.
        An error where there is no such way.
    """
    turns, kinds = _sentinels(roles), sorted(set(roles))
    sizes = sorted({0, 1, len(kinds) - 1, len(kinds)})
    failures = []  # (turns left out, error)
    for folded in (False, True):
        for parts in (c for size in sizes for c in itertools.combinations(kinds, size)):
            text = _in_time(_apply, tokenizer, _given(turns, folded, parts), cue)
            if text is None:
                return UserError(_about(tokenizer, f"does not end in {TEMPLATE_SECONDS:g} seconds"))
            if isinstance(text, UserError):
                failures.append((len(roles) + 1, text))
                continue
            if parts and re.search(r"sentinel\d+x['\"]", text):  # the list is printed as it is
                continue
            lost = [turn["role"] for turn in turns if turn["content"] not in text]
            if not lost:
                if folded:
                    _say_once(tokenizer, "has no system turn: its text goes before the user's")
                return folded, parts
            error = f"leaves out turns of {lost[0]!r:.60}: --format plain takes any"
            failures.append((len(lost), UserError(_about(tokenizer, error))))
        if roles[:2] != ("system", "user"):
            break
        # Mistral's has the system's text in the last turn, which must be the user's.
        known = not cue and isinstance(_way(tokenizer, template, roles[:-1], True), tuple)
        if failures[0][0] <= len(roles) and not known:  # left out, not refused
            break
    return min(failures, key=lambda failure: failure[0])[1]


def _given(messages: Messages, folded: bool, parts: tuple[str, ...]) -> list[dict]:
    if folded:
        system, user, *rest = messages
        messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if turn["role"] in parts
        else turn
        for turn in messages
    ]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict], cue: bool) -> str | UserError:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    except Exception as error:  # a template is a program: anything may come out of it
        kind, reason = type(error).__name__, f"{first_line(error):.200}"
        if kind == "TemplateError":  # of raise_exception() in the template
            roles = ", ".join(map(repr, _roles(messages)))
            message = f"refuses turns of {roles:.60} ({reason}): --format plain takes any"
        else:
            message = f"fails ({kind}: {reason}): mend it, or take --format plain"
        return UserError(_about(tokenizer, message))


def _in_time(work: Callable[..., str | UserError], *arguments: object) -> str | UserError | None:
    """What work(*arguments) returns, or None where it is not done in TEMPLATE_SECONDS."""
    done = []
    # A thread, since a signal would reach the main thread alone.
    thread = threading.Thread(target=lambda: done.append(work(*arguments)), daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if done:
        return done[0]
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    stop(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    return None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    require(
        "default" in template,
        f"{tokenizer.name_or_path}: has chat templates called {', '.join(template):.80}, and none "
        "called default: name one so in tokenizer_config.json, or take --format plain",
    )
    return template["default"]


def _sentinels(roles: tuple[str, ...]) -> Messages:
    return [{"role": role, "content": f"sentinel{i}x"} for i, role in enumerate(roles)]


def _roles(messages: list[dict]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


@functools.lru_cache(1024)
def _say_once(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    print(f"  note: {_about(tokenizer, text)}")


def _about(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return f"{tokenizer.name_or_path or 'tokenizer'}: the chat template {text}"


def _rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids, begin = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if begin is None or ids[:1] == [begin]:
        return ids
    _say_once(tokenizer, f"writes no begin token: {tokenizer.bos_token} is put before its text")
    return [begin, *ids]


def _one_begin(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    begin = tokenizer.bos_token_id
    if begin is None:
        return list(ids)
    start = next((i for i, token in enumerate(ids) if token != begin), len(ids))
    return [begin, *ids[start:]]


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
    return True if tokenizer.chat_template and _template(tokenizer) else None


def require_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where a chat template is no text, or its name a path: it is saved by its name."""
    template = tokenizer.chat_template
    for name, text in (template if isinstance(template, dict) else {"default": template}).items():
        require(
            isinstance(text, str | None) and not re.search(r"[/\\]", str(name)),
            f"chat template {name!r:.40}: got {text!r:.40}, expected a text whose name is no path: "
            "mend tokenizer_config.json",
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Control tokens as a text may spell them, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special}, key=len, reverse=True)


def note_special_tokens(
    tokenizer: PreTrainedTokenizerBase, items: Iterable[tuple[Prompt, ...]], kind: str
) -> None:
    """Print how many items (prompts, or prompts and answers) spell control tokens."""
    items, pattern = list(items), "|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)"
    found = [match for item in items if (match := re.search(pattern, repr(item)))]
    if found:
        chat = any(isinstance(prompt, list) for prompt, *_ in items)
        advice = ", as if rendered already: --format plain takes them as they are" * chat
        print(
            f"  note: {len(found)} of {len(items)} {kind} hold special tokens such as "
            f"{found[0][0]}, which are read as such{advice}"
        )


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
