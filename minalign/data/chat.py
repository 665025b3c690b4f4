r"""The one text format: prompts, as text or as chat messages, and whole texts -> token ids.

A text is taken as it is. Messages go through the tokenizer's chat template, or where it has none
become a dialogue in plain text, "\n\nHuman: ...\n\nAssistant: ...". Training and scoring call the
same functions.
"""

import functools
import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..models.folders import first_line
from ..running.errors import UserError

Messages = list[dict[str, str]]  # [{"role": "user", "content": "Who wrote Emma?"}, ...]

Prompt = str | Messages

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}

DIALOGUE = re.compile(r"\n\n(Human|Assistant|System):")  # hh-rlhf, and to_text()

TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")  # HelpSteer


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
    text = _render(tokenizer, prompt)
    return _one_begin(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_whole(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """What a reward model scores: prompt + completion and the end token.

    With a chat template, what it makes of the dialogue.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, prompt + completion, end=True)
    if not tokenizer.chat_template:
        gap = "" if completion[:1].isspace() else " "
        return encode(tokenizer, to_text(prompt) + gap + completion, end=True)
    gap, ending = answer_frame(tokenizer)
    gap = "" if completion[:1].isspace() else gap
    text = _render(tokenizer, prompt) + gap + completion + ending
    return _one_begin(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache
def answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    r"""What the chat template writes before and after an answer.

    These are ("", "<|im_end|>\n"), or (" ", "</s>") of Mistral. The end token alone where the
    template writes nothing, or another cue than its history has (an open <think>).
    """
    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "answer"}
    before = _render(tokenizer, [question])
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    end_token = tokenizer.eos_token or ""
    if not whole.startswith(before):
        return "", end_token
    gap, found, ending = whole.removeprefix(before).partition("answer")
    if not found or gap.strip():
        return "", end_token
    return gap, ending or end_token


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # What templates raise for roles that they do not know is an error of jinja2.
        if not type(error).__module__.startswith("jinja2"):
            raise
        # The template knows no system turn: its text goes before the user's.
        if len(messages) > 1 and messages[0]["role"] == "system":
            system, user, *rest = messages
            user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
            return _render(tokenizer, [user, *rest])
        roles = ", ".join(repr(message["role"]) for message in messages)
        raise UserError(
            f"the chat template refuses turns of {roles:.60} ({first_line(error)}): expected user "
            "and assistant in turn (--format plain takes any)"
        ) from error


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
        UserError: `format` is "chat", and the tokenizer has no template.
    """
    if format == "plain":
        return False
    if not tokenizer.chat_template and format == "chat":
        raise UserError(
            "--format chat: the model's tokenizer has no chat template: take a model with one, or "
            "--format plain"
        )
    return True if tokenizer.chat_template else None


def decode_parts(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]
) -> tuple[str, str]:
    """Prompt and completion as texts that join to the whole text.

    Decoded alone, a completion may lose its first space.
    """
    whole = tokenizer.decode(prompt + completion, skip_special_tokens=True)
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return start, whole[len(start) :]
