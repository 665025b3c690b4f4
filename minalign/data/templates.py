"""Chat templates: none is trusted, each is tried with words of our own before it is used."""

import ctypes
import functools
import itertools
import os
import re
import threading
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from ..models.folders import first_line
from ..running.errors import UserError, require
from .messages import Messages

TEMPLATE_SECONDS = 10.0  # in which a template must have written a few words


def require_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where a chat template is no text, or its name a path: it is saved by its name."""
    template = tokenizer.chat_template
    for name, text in (template if isinstance(template, dict) else {"default": template}).items():
        require(
            isinstance(text, str | None) and not re.search(r"[/\\]", str(name)),
            f"chat template {name!r:.40}: got {text!r:.40}, expected a text whose name is no path: "
            "fix tokenizer_config.json",
        )


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
        say_once(
            tokenizer,
            f"{change} the prompt where an answer follows: sampled answers are scored as it writes "
            "them there, not by the sampled ids",
        )
    ids = [rendered_ids(tokenizer, whole)[::-1] for whole in wholes]
    return same, opening, os.path.commonprefix(ids)[::-1]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, cue: bool) -> str:
    """What the chat template makes of messages: a whole dialogue, or a prompt and its cue.

    Raises:
        UserError: the template fails, refuses the turns, leaves one out, or does not end.
    """
    way = _way(tokenizer, default_template(tokenizer), roles_of(messages), cue)
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
    subsets = [some for size in sizes for some in itertools.combinations(kinds, size)]
    failures = []  # (turns left out, error)
    for folded in (False, True):
        for parts in subsets:
            text = _in_time(_apply, tokenizer, _given(turns, folded, parts), cue)
            if text is None:
                return UserError(_about(tokenizer, f"does not end in {TEMPLATE_SECONDS:g} seconds"))
            if isinstance(text, UserError):
                failures.append((len(roles) + 1, text))
                continue
            if parts and re.search(r"Sentinel\d+X['\"]", text):  # the list is printed as it is
                continue
            lost = [turn["role"] for turn in turns if turn["content"] not in text]
            if not lost:
                if folded:
                    say_once(tokenizer, "has no system turn: its text goes before the user's")
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
            roles = ", ".join(map(repr, roles_of(messages)))
            message = f"refuses turns of {roles:.60} ({reason}): --format plain takes any"
        else:
            message = f"fails ({kind}: {reason}): fix it, or take --format plain"
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


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several the one called default, without which it is a UserError."""
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
    return [{"role": role, "content": f"Sentinel{i}X"} for i, role in enumerate(roles)]


def roles_of(messages: list[dict]) -> tuple[str, ...]:
    """Who speaks, turn by turn."""
    return tuple(message["role"] for message in messages)


def rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of what a template wrote, see `begun`."""
    return begun(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def begun(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Token ids of what a template wrote, with a begin token where the tokenizer has one."""
    begin = tokenizer.bos_token_id
    if begin is None or ids[:1] == [begin]:
        return ids
    say_once(tokenizer, f"writes no begin token: {tokenizer.bos_token} is put before its text")
    return [begin, *ids]


@functools.lru_cache(1024)
def say_once(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Print a note about the tokenizer's chat template."""
    print(f"  note: {_about(tokenizer, text)}")


def _about(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return f"{tokenizer.name_or_path or 'tokenizer'}: the chat template {text}"
