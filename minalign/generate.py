"""Completions of a policy, from the command line.

python -m minalign.generate --model runs/policy-1 --prompt "overall , the plot is" --rm runs/rm-1
python -m minalign.generate --model runs/policy-1 --data prompts.jsonl --out answers.jsonl
python -m minalign.generate --model runs/policy-1                  asks for prompts; an empty line starts a new dialogue
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .chat import Prompt, TokenizedPrompt, encode_prompt, wants_chat
from .checkpoint import end_token_ids, load_policy
from .common import UserError, autocast, one_line_errors, pick_device, pick_dtype, require
from .data import Dropped, read_prompt
from .evaluate import decode_parts, sample_completions
from .flags import flag, parse_flags
from .rewards import load_rewards
from .rows import read_rows


@dataclass
class Config:
    """Sampling."""

    model: str = flag("", "policy: a run, a folder or a hub id")
    prompt: list[str] | None = flag(None, "one prompt, or several")
    data: str = flag("", "prompts: a .jsonl, .csv or .parquet file, a folder or a hub id (default: ask for them)")
    column: str = flag("prompt", "column of the prompts in --data")
    out: str = flag("", "file for prompts, completions and rewards, one JSON object a line (default: print them)")
    rm: str = flag("", "reward model, or module:function, whose score is shown beside each completion")
    samples: int = flag(1, "completions of each prompt", within="[1, inf)")
    max_new_tokens: int = flag(128, "tokens of a completion, fewer where the context ends", within="[1, inf)")
    temperature: float = flag(1.0, "of sampling; no top-k, no top-p", within="(0, inf)")
    batch_size: int = flag(16, "completions sampled at a time", within="[1, inf)")
    seed: int = flag(0, "seed of sampling")
    format: str = flag("auto", "prompts as the model's chat template or as plain text (auto: chat where it has one)",
                       ("auto", "chat", "plain"))  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "forward precision: auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))


def typed_prompts(chat: bool) -> Iterator[tuple[Prompt, list]]:
    """Prompts from the terminal, each with the list that its answer is to be put into: a chat remembers, a text does not."""
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
    config = parse_flags(Config, __doc__, argv)
    require(bool(config.model), "--model is missing: the policy to sample from")
    require(not (config.prompt and config.data), "--prompt and --data: give one of them")
    require(not config.out or not Path(config.out).exists(), f"--out {config.out}: exists: choose another file")
    device, _ = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    policy, tokenizer = load_policy(config.model)
    policy, eos_token_ids = policy.to(device), end_token_ids(policy, tokenizer)
    reward = next(iter(load_rewards([config.rm], device).values())) if config.rm else None
    chat = wants_chat(tokenizer, config.format)
    seed = config.seed

    def complete(prompts: list[Prompt]) -> list[dict]:
        """Rows of prompt, completion and reward, `samples` of each prompt."""
        nonlocal seed
        asked = [p for p in prompts for _ in range(config.samples)]
        rows = [TokenizedPrompt(encode_prompt(tokenizer, p), p if isinstance(p, list) else None) for p in asked]
        room = (getattr(policy.config, "max_position_embeddings", None) or 10**9) - max(len(row.ids) for row in rows)
        require(
            room > 0, f"a prompt of {max(len(row.ids) for row in rows)} tokens: fills the context of {config.model}: shorten it"
        )
        with autocast(device, dtype):
            _, completions, ended = sample_completions(
                policy, tokenizer, rows, temperature=config.temperature, max_new_tokens=min(config.max_new_tokens, room),
                eos_token_ids=eos_token_ids, seed=seed, batch_size=config.batch_size,
            )  # fmt: skip
            scores = reward.score_rollout(tokenizer, rows, completions, config.batch_size).rewards.tolist() if reward else None
        seed += 1
        texts = [decode_parts(tokenizer, row.ids, completion)[1] for row, completion in zip(rows, completions)]
        answers = [{"prompt": p, "completion": t, "ended": e} for p, t, e in zip(asked, texts, ended)]
        return [answer | ({"reward": scores[i]} if reward else {}) for i, answer in enumerate(answers)]

    def show(row: dict) -> None:
        score = f"[reward {row['reward']:.2f}] " if reward else ""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
        print(f"{score}{prompt}{row['completion']}" + ("" if row["ended"] else " ..."))

    if not config.prompt and not config.data:
        for prompt, answers in typed_prompts(bool(chat)):
            for row in complete([prompt]):
                show(row)
                answers.append(row["completion"])
        return
    if config.data:
        source = enumerate(read_rows(config.data), 1)
        prompts = [read_prompt(row, f"{config.data}: row {number}", config.column, chat) for number, row in source]
    else:
        prompts = [read_prompt({"prompt": p}, "--prompt", "prompt", chat) for p in config.prompt]
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, Dropped):
            raise UserError(f"{config.data or '--prompt'}: row {number}: {prompt.reason}: leave that row out")
    file = open(config.out, "w") if config.out else None
    for i in tqdm(range(0, len(prompts), config.batch_size), desc="completions", unit="batch", disable=not file):
        for row in complete(prompts[i : i + config.batch_size]):
            show(row) if file is None else file.write(json.dumps(row) + "\n")
        if file:
            file.flush()
    if file:
        print(f"{len(prompts) * config.samples} completions in {config.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
