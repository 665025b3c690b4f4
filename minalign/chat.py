"""The one text format: prompts, as text or as chat messages, and whole texts -> token ids.

A text is taken as it is. Messages go through the tokenizer's chat template, or where it has none become a dialogue in
plain text, "\\n\\nHuman: ...\\n\\nAssistant: ...". Training and scoring call the same functions.
"""

import functools
import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .common import UserError
from .folders import first_line

Messages = list[dict[str, str]]  # [{"role": "user", "content": "Who wrote Emma?"}, ...]
Prompt = str | Messages

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
DIALOGUE = re.compile(r"\n\n(Human|Assistant|System):")  # hh-rlhf, and to_text()
TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")  # HelpSteer


class TokenizedPrompt(NamedTuple):
    """A prompt as the policy sees it; `messages` is None where it is plain text, of which ids may be a beginning."""

    ids: list[int]
    messages: Messages | None = None


def to_messages(prompt: Prompt) -> Messages:
    """Chat messages of a prompt: turns in the text of hh-rlhf or HelpSteer, any other text as one user's turn.

    >>> [m["role"] for m in to_messages("\\n\\nHuman: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: Why?\\n\\nAssistant:")]
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
        if turns and turns[-1]["role"] == role and text:  # some rows have two turns of one speaker in a row
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    is_cue = len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}  # of an answer to come
    return turns[:-1] if is_cue else turns


def to_text(messages: Messages) -> str:
    """Messages as a dialogue in plain text that ends with the cue of the answer.

    >>> to_text([{"role": "user", "content": "Why?"}])
    '\\n\\nHuman: Why?\\n\\nAssistant:'
    """
    turns = [f"\n\n{SPEAKERS.get(message['role'], message['role'])}: {message['content']}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"


def first_turn(prompt: Prompt) -> str:
    """What a data set is split by: prompts that begin with one user's turn stay together, in whatever form they are."""
    messages = to_messages(to_text(to_messages(prompt)))  # through text: it cannot tell all messages apart
    return next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"]).strip()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, end: bool) -> list[int]:
    """Token ids of a plain text: begin token exactly once where the tokenizer has one, end token exactly once if `end`."""
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers add them by themselves, some texts have them already, some both.
    while tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()
    return _one_begin(tokenizer, ids) + [tokenizer.eos_token_id] * (end and tokenizer.eos_token_id is not None)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """What a policy continues: a text, or messages with the cue of the answer."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, end=False)
    if not tokenizer.chat_template:
        return encode(tokenizer, to_text(prompt), end=False)
    return _one_begin(tokenizer, tokenizer(_render(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def encode_whole(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """What a reward model scores: prompt + completion and the end token; with a template, what it makes of the dialogue."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt + completion, end=True)
    if not tokenizer.chat_template:
        gap = "" if completion[:1].isspace() else " "
        return encode(tokenizer, to_text(prompt) + gap + completion, end=True)
    gap, ending = answer_frame(tokenizer)
    text = _render(tokenizer, prompt) + ("" if completion[:1].isspace() else gap) + completion + ending
    return _one_begin(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache
def answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after an answer: ("", "<|im_end|>\\n"), or (" ", "</s>") of Mistral.

    The end token alone where the template writes nothing, or another cue than its history has (an open <think>).
    """
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    before = _render(tokenizer, [question])
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    gap, found, ending = whole.removeprefix(before).partition("answer") if whole.startswith(before) else ("", "", "")
    fits = found and not gap.strip()
    return gap if fits else "", (ending if fits else "") or tokenizer.eos_token or ""


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if not type(error).__module__.startswith("jinja2"):  # what templates raise for roles that they do not know
            raise
        if len(messages) > 1 and messages[0]["role"] == "system":  # no system turn: its text goes before the user's
            system, user, *rest = messages
            return _render(tokenizer, [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])
        roles = ", ".join(repr(message["role"]) for message in messages)
        raise UserError(
            f"the chat template refuses turns of {roles:.60} ({first_line(error)}): expected user and assistant in turn "
            "(--format plain takes any)"
        ) from error


def _one_begin(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    begin = tokenizer.bos_token_id
    if begin is None:
        return list(ids)
    start = next((i for i, token in enumerate(ids) if token != begin), len(ids))
    return [begin, *ids[start:]]


def wants_chat(tokenizer: PreTrainedTokenizerBase, format: str) -> bool | None:
    """Whether prompts become chat messages (--format): None where they cannot, since the tokenizer has no template."""
    if format == "plain":
        return False
    if not tokenizer.chat_template and format == "chat":
        raise UserError("--format chat: the model's tokenizer has no chat template: take a model with one, or --format plain")
    return True if tokenizer.chat_template else None
