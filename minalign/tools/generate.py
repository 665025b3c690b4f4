"""Completions of a policy, from the command line.

    python -m minalign generate --model runs/policy-1 --prompt "overall , the plot is" \\
        --rm runs/rm-1
    python -m minalign generate --model runs/policy-1 --data prompts.jsonl --out answers.jsonl
    python -m minalign generate --model runs/policy-1
    python -m minalign generate --model runs/policy-1 --rm runs/rm-1 --best-of 16 --out best.jsonl

The third one asks for prompts. An empty line starts a new dialogue. Of a run, --temperature,
--max-new-tokens and --format are those that it had, and with --out alone it answers the prompts
that it held out.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..data.chat import Prompt, decode_parts, note_special_tokens, wants_chat
from ..data.columns import Note, columns_for, parse_columns, prompt_rows, read_items, read_prompt
from ..data.prompts import tokenize
from ..data.rows import read_rows
from ..data.stops import stop_at
from ..models.functions import columns_asked
from ..models.loading import end_token_ids, load_policy
from ..models.padding import context_of
from ..models.precision import autocast
from ..models.rewards import load_rewards
from ..rollout import sample_completions
from ..running.device import pick_device, pick_dtype
from ..running.errors import require, visible
from ..running.files import require_writable, to_json, whole_file
from ..running.flag_groups import ColumnFlags, DeviceFlags, FormatFlags, StopFlags
from ..running.flags import SEEDS, TEMPERATURES, flag
from .settings import SAMPLING, held_out_rows, parse_flags_of_runs


@dataclass
class Config(StopFlags, FormatFlags, ColumnFlags, DeviceFlags):
    """Sampling."""

    model: str = flag("", "policy: a run, a folder or a hub id")
    prompt: list[str] | None = flag(None, "one prompt, or several")
    data: str = flag(
        "", "prompts: a .jsonl, .csv or .parquet file, a folder or a hub id (default: ask for them)"
    )
    out: str = flag(
        "",
        "file for prompts, completions and rewards, one JSON object per line (default: print them)",
    )
    rm: str = flag(
        "", "reward model, or module:function, whose score is shown beside each completion"
    )
    samples: int = flag(1, "completions per prompt", "[1, 100000]")
    best_of: int = flag(
        1,
        "each completion is the best of this many, by --rm; of equal ones the first",
        "[1, 10000]",
    )
    max_new_tokens: int = flag(
        128, "tokens of a completion, fewer where the context ends", "[1, inf)"
    )
    temperature: float = flag(1.0, "of sampling; no top-k, no top-p", TEMPERATURES)
    batch_size: int = flag(16, "completions sampled at a time", "[1, inf)")
    seed: int = flag(0, "seed of sampling", SEEDS)


def typed_prompts(chat: bool) -> Iterator[tuple[Prompt, list]]:
    """Prompts from the terminal, each with a list that the caller appends the answers to.

    Of a chat, the next prompt holds all turns so far. Of plain text, it is the line alone.
    """
    history = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            history = []
        elif chat:
            history.append({"role": "user", "content": line})
            answers = []
            yield list(history), answers
            history += [{"role": "assistant", "content": answer} for answer in answers[:1]]
        else:
            yield line, []


def rows_to_answer(
    config: Config, asked: dict[str, str]
) -> tuple[list[dict], list[dict], str, str]:
    """Rows, the same by our names, where they are from, and the column of their prompts.

    No rows: prompts are asked for.

    Args:
        asked: columns that --rm asks for, see models.functions.columns_asked.
    """
    if config.out and not (config.data or config.prompt):
        rows, source, column = held_out_rows([config.model], "data", asked)
        return rows, rows, source, column
    source = config.data or "--prompt"
    rows = read_rows(source) if config.data else [{"prompt": p} for p in config.prompt or []]
    if not rows:
        for column, function in asked.items():
            require(not function, f"--rm {function}: names column {column!r}: give --data with it")
        return rows, rows, source, "prompt"
    named, column = prompt_rows(rows, parse_columns(config.columns, asked), source, asked)
    return rows, named, source, column


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Parse the flags, sample, show or save."""
    prog = "minalign generate"
    config = parse_flags_of_runs(Config, __doc__, argv, prog, lambda c: [c.model], SAMPLING)
    require(bool(config.model), "--model is missing: the policy to sample from")
    require(not (config.prompt and config.data), "--prompt and --data: give one of them")
    require(bool(config.data) or not config.columns, "--columns needs --data")
    require(bool(config.rm) or config.best_of == 1, "--best-of needs --rm: what the best is")
    if config.out:
        require_writable(config.out)
    asked_for = columns_asked([config.rm])
    rows, named, source, column = rows_to_answer(config, asked_for)
    device, _ = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    policy, tokenizer = load_policy(config.model)
    policy, eos_token_ids = policy.to(device), end_token_ids(policy, tokenizer)
    reward = next(iter(load_rewards([config.rm], device).values())) if config.rm else None
    chat, stop = wants_chat(tokenizer, config.format), stop_at(tokenizer, config.stop)
    seed = config.seed

    def room_for(prompt: list[int]) -> int:
        """Tokens that a completion may have. UserError where there is no room for one."""
        context = context_of(policy.config) or 10**9
        full = f"the prompt fills the context of {config.model}, {context} tokens: shorten it"
        require(len(prompt) < context, full)
        return context - len(prompt)

    def complete(prompts: list[Prompt], columns: list[dict | None]) -> list[dict]:
        """Rows of prompt, completion and reward, --samples per prompt."""
        nonlocal seed
        count = config.samples * config.best_of
        asked = [p for p in prompts for _ in range(count)]
        columns = [one for one in columns for _ in range(count)]
        rows = [tokenize(tokenizer, p)._replace(columns=c) for p, c in zip(asked, columns)]
        limits = [min(config.max_new_tokens, room_for(row.ids)) for row in rows]
        found = {}  # number of a row -> (its completion, whether it ended by itself)
        with autocast(device, dtype):
            for limit in set(limits):  # a long prompt cuts no other's completion
                part = [i for i, one in enumerate(limits) if one == limit]
                _, completions, ended = sample_completions(
                    policy,
                    [rows[i].ids for i in part],
                    temperature=config.temperature,
                    max_new_tokens=limit,
                    eos_token_ids=eos_token_ids,
                    seed=seed,
                    batch_size=config.batch_size,
                    stop=stop,
                )
                found |= dict(zip(part, zip(completions, ended)))
            completions, ended = zip(*(found[i] for i in range(len(rows))))
            if reward:
                scores = reward.score_rollout(tokenizer, rows, completions, config.batch_size)
        seed += 1
        answers = []
        for prompt, row, completion, by_itself in zip(asked, rows, completions, ended):
            text = decode_parts(tokenizer, row.ids, completion)[1]
            answers.append({"prompt": prompt, "completion": text, "ended": by_itself})
        if reward:
            for i, answer in enumerate(answers):
                known = scores.applies is None or scores.applies[i]
                answer["reward"] = scores.rewards[i].item() if known else None
        if config.best_of == 1:
            return answers
        groups = [answers[i : i + config.best_of] for i in range(0, len(answers), config.best_of)]
        return [max(group, key=reward_of) for group in groups]  # of equal ones the first

    def reward_of(answer: dict) -> float:
        """UserError where it is not finite; one that does not apply is below all others."""
        value, text = answer["reward"], answer["completion"]
        what = f"--rm {config.rm}: got a reward of {value} for {text!r:.60}"
        require(value is None or math.isfinite(value), f"{what}: --best-of needs finite ones")
        return -math.inf if value is None else value

    def show(row: dict) -> None:
        """Print a row. Of a chat, the prompt is left out."""
        value = row.get("reward")
        score = f"[reward {'none' if value is None else f'{value:z.2f}'}] " if reward else ""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
        print(visible(f"{score}{prompt}{row['completion']}") + ("" if row["ended"] else " ..."))

    if not rows:
        for prompt, answers in typed_prompts(bool(chat)):
            for row in complete([prompt], [None]):
                show(row)
                answers.append(row["completion"])
        return

    def read(row: dict, where: str, note: Note) -> Prompt:
        """The prompt in a row, if the model can be asked it."""
        prompt = read_prompt(row, where, note, column, chat)
        room_for(tokenize(tokenizer, prompt).ids)
        return prompt

    asked = read_items(named, read, source)
    columns = [columns_for(row, asked_for, column) for row, p in zip(named, asked) if p is not None]
    rows = [row for row, prompt in zip(rows, asked) if prompt is not None]
    prompts = [prompt for prompt in asked if prompt is not None]
    note_special_tokens(tokenizer, [(prompt,) for prompt in prompts], "prompts")
    stale = sorted({"completion", "ended", "reward"} & set(rows[0]))
    if config.out and stale:
        print(f"{source}: {', '.join(stale)}: of earlier completions: replaced or left out")
    starts = range(0, len(prompts), config.batch_size)
    with whole_file(config.out) if config.out else contextlib.nullcontext() as file:
        for i in tqdm(starts, desc="completions", unit="batch", disable=None if file else True):
            part = slice(i, i + config.batch_size)
            answers = complete(prompts[part], columns[part])
            for j, answer in enumerate(answers):
                if file:  # with the row's other columns
                    row = dict(rows[i + j // config.samples])
                    row = {name: row[name] for name in row if name not in stale}
                    file.write(to_json(row | answer) + "\n")
                else:
                    show(answer)
    if file:
        print(f"{len(prompts) * config.samples} completions in {config.out}")
