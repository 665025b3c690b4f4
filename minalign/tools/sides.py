"""What judge.py compares: prompts, and both sides' completions of them, read or sampled."""

import functools
import typing
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from ..data.cells import text_cell
from ..data.rows import read_rows
from ..running.device import pick_device, pick_dtype
from ..running.errors import require
from .settings import held_out_rows

SAMPLED_TOGETHER = 64  # prompts between two steps of the progress bar


class Pair(NamedTuple):
    """A prompt as text, and the completions of both sides."""

    prompt: str
    a: str
    b: str


def is_file(path: str) -> bool:
    """Whether a side is a file of completions, not a policy."""
    return path.endswith((".jsonl", ".jsonl.gz"))


def load_pairs(config: typing.Any) -> list[Pair]:
    """The prompts and both sides' completions, read or sampled.

    Args:
        config: of judge.py.
    Raises:
        UserError: a file has other prompts than the first.
    """
    from ..data.columns import parse_columns, prompt_rows, read_items

    names, files = parse_columns(config.columns), [s for s in (config.a, config.b) if is_file(s)]
    given = files or [config.prompts] * bool(config.prompts)
    rows = {file: prompt_rows(read_rows(file), names, file) for file in given}
    if rows:
        source = given[0]
        asked, column = rows[source]
    else:
        asked, source, column = held_out_rows([config.a, config.b], "prompts")
    prompts = read_prompts(asked, source, column, False)
    if not files:  # a row of no use is asked of neither policy
        asked = [row for row, prompt in zip(asked, prompts) if prompt is not None]
        prompts = [prompt for prompt in prompts if prompt is not None]
    sides = []
    for name, side, seed in (("--a", config.a, config.seed), ("--b", config.b, config.seed + 1)):
        if not is_file(side):
            sides.append(sample(side, name, asked, source, column, config, seed))
            continue
        same = read_prompts(*rows[side][:1], side, rows[side][1], False)
        different = (i for i, (x, y) in enumerate(zip(prompts, same), 1) if x != y)
        difference = next(different, min(len(prompts), len(same)) + 1)
        require(
            prompts == same,
            f"{side}: row {difference}: its prompt is not that of {source}: expected the same, in "
            "order",
        )
        answers = rows[side][0]
        sides.append(read_items(answers, lambda row, *_: text_cell(row, "completion", True), side))
    for number, parts in enumerate(zip(prompts, *sides), 1):
        require(None not in parts, f"{source}: row {number}: of no use: fix or remove the row")
    return list(map(Pair, prompts, *sides))


def read_prompts(rows: Sequence[dict], source: str, column: str, chat: bool | None) -> list:
    """The prompts in rows, as messages or as text, see data.prompts.load_prompts.

    None for a row of no use.

    Args:
        rows: by our names.
        source: of the rows, for what is printed.
        column: of the prompts.
        chat: whether as messages; None: as text, and messages are of no use.
    """
    from ..data.columns import read_items, read_prompt

    return read_items(rows, functools.partial(read_prompt, column=column, chat=chat), source)


def sample(
    path: str,
    flag_name: str,
    rows: Sequence[dict],
    source: str,
    column: str,
    config: typing.Any,
    seed: int,
) -> list[str]:
    """A policy's completions of the prompts in rows, as texts.

    Args:
        path: of the policy.
        flag_name: the flag that names it, for error messages.
        source: of the rows, for error messages.
        column: of the prompts.
        seed: of sampling.
    Raises:
        UserError: a prompt and its completion do not fit into the policy's context.
    """
    from ..data.chat import decode_parts, encode_prompt, note_special_tokens, wants_chat
    from ..data.stops import stop_at
    from ..models.loading import end_token_ids, load_policy
    from ..models.padding import context_of
    from ..models.precision import autocast
    from ..rollout import sample_completions

    device, _ = pick_device(config.device)
    policy, tokenizer = load_policy(path, flag_name)
    prompts = read_prompts(rows, source, column, wants_chat(tokenizer, config.format))
    require(None not in prompts, f"{flag_name} {path}: cannot be asked every prompt of {source}")
    stop = stop_at(tokenizer, config.stop)
    note_special_tokens(tokenizer, [(prompt,) for prompt in prompts], "prompts")
    rows_of_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows_of_ids))
    context = context_of(policy.config)
    require(
        not context or longest + config.max_new_tokens <= context,
        f"{flag_name} {path}: prompts of up to {longest} tokens and --max-new-tokens "
        f"{config.max_new_tokens} exceed its context of {context}: shorten one of them",
    )
    policy, dtype = policy.to(device), pick_dtype(config.dtype, device)
    texts = []
    starts = range(0, len(rows_of_ids), SAMPLED_TOGETHER)
    for i in tqdm(starts, desc=f"completions of {flag_name}", unit="batch", disable=None):
        part = rows_of_ids[i : i + SAMPLED_TOGETHER]
        with autocast(device, dtype):
            _, completions, _ = sample_completions(
                policy,
                part,
                temperature=config.temperature,
                max_new_tokens=config.max_new_tokens,
                eos_token_ids=end_token_ids(policy, tokenizer),
                seed=seed + 2 * i,
                batch_size=config.batch_size,
                stop=stop,
            )
        for ids, completion in zip(part, completions):
            texts.append(decode_parts(tokenizer, ids, completion)[1])
    return texts
