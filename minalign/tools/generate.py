"""Completions of a policy, from the command line.

    python -m minalign generate --model runs/policy-1 --prompt "overall , the plot is" \\
        --rm runs/rm-1
    python -m minalign generate --model runs/policy-1 --data prompts.jsonl --out answers.jsonl
    python -m minalign generate --model runs/policy-1

The last one asks for prompts. An empty line starts a new dialogue.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.chat import Prompt, decode_parts, wants_chat
from ..data.columns import Dropped, read_prompt
from ..data.prompts import tokenize
from ..data.rows import read_rows
from ..models.loading import end_token_ids, load_policy
from ..models.precision import autocast
from ..models.rewards import load_rewards
from ..rollout import sample_completions
from ..running.device import pick_device, pick_dtype
from ..running.errors import UserError, require, visible
from ..running.flags import SEEDS, TEMPERATURES, DeviceFlags, FormatFlags, flag, parse_flags
from ..running.logs import to_json


@dataclass
class Config(FormatFlags, DeviceFlags):
    """Sampling."""

    model: str = flag("", "policy: a run, a folder or a hub id")
    prompt: list[str] | None = flag(None, "one prompt, or several")
    data: str = flag(
        "", "prompts: a .jsonl, .csv or .parquet file, a folder or a hub id (default: ask for them)"
    )
    column: str = flag("prompt", "column of the prompts in --data")
    out: str = flag(
        "",
        "file for prompts, completions and rewards, one JSON object per line (default: print them)",
    )
    rm: str = flag(
        "", "reward model, or module:function, whose score is shown beside each completion"
    )
    samples: int = flag(1, "completions per prompt", "[1, 100000]")
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


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Parse the flags, sample, show or save."""
    config = parse_flags(Config, __doc__, argv, "minalign generate")
    require(bool(config.model), "--model is missing: the policy to sample from")
    require(not (config.prompt and config.data), "--prompt and --data: give one of them")
    require(
        not config.out or not Path(config.out).exists(),
        f"--out {config.out}: exists: choose another file",
    )
    device, _ = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    policy, tokenizer = load_policy(config.model)
    policy, eos_token_ids = policy.to(device), end_token_ids(policy, tokenizer)
    reward = next(iter(load_rewards([config.rm], device).values())) if config.rm else None
    chat = wants_chat(tokenizer, config.format)
    seed = config.seed

    def complete(prompts: list[Prompt]) -> list[dict]:
        """Rows of prompt, completion and reward, --samples per prompt."""
        nonlocal seed
        asked = [p for p in prompts for _ in range(config.samples)]
        rows = [tokenize(tokenizer, prompt) for prompt in asked]
        longest = max(len(row.ids) for row in rows)
        room = (getattr(policy.config, "max_position_embeddings", None) or 10**9) - longest
        require(
            room > 0,
            f"a prompt of {longest} tokens: fills the context of {config.model}: shorten it",
        )
        with autocast(device, dtype):
            _, completions, ended = sample_completions(
                policy,
                [row.ids for row in rows],
                temperature=config.temperature,
                max_new_tokens=min(config.max_new_tokens, room),
                eos_token_ids=eos_token_ids,
                seed=seed,
                batch_size=config.batch_size,
            )
            if reward:
                scores = reward.score_rollout(tokenizer, rows, completions, config.batch_size)
        seed += 1
        answers = []
        for prompt, row, completion, by_itself in zip(asked, rows, completions, ended):
            text = decode_parts(tokenizer, row.ids, completion)[1]
            answers.append({"prompt": prompt, "completion": text, "ended": by_itself})
        if reward:
            for answer, value in zip(answers, scores.rewards.tolist()):
                answer["reward"] = value
        return answers

    def show(row: dict) -> None:
        """Print a row. Of a chat, the prompt is left out."""
        score = f"[reward {row['reward']:.2f}] " if reward else ""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
        print(visible(f"{score}{prompt}{row['completion']}") + ("" if row["ended"] else " ..."))

    if not config.prompt and not config.data:
        for prompt, answers in typed_prompts(bool(chat)):
            for row in complete([prompt]):
                show(row)
                answers.append(row["completion"])
        return
    if config.data:
        prompts = [
            read_prompt(row, f"{config.data}: row {number}", config.column, chat)
            for number, row in enumerate(read_rows(config.data), 1)
        ]
    else:
        prompts = [read_prompt({"prompt": p}, "--prompt", "prompt", chat) for p in config.prompt]
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, Dropped):
            source = config.data or "--prompt"
            raise UserError(f"{source}: row {number}: {prompt.reason}: leave that row out")
    file = open(config.out, "w") if config.out else None
    starts = range(0, len(prompts), config.batch_size)
    for i in tqdm(starts, desc="completions", unit="batch", disable=not file):
        for row in complete(prompts[i : i + config.batch_size]):
            if file:
                file.write(to_json(row) + "\n")
            else:
                show(row)
        if file:
            file.flush()
    if file:
        print(f"{len(prompts) * config.samples} completions in {config.out}")
