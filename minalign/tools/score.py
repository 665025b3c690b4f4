"""Rewards of texts in a file, from the command line.

    python -m minalign score --rm runs/rm-1 --data answers.jsonl --out scored.jsonl

Rows with prompt and completion (or text alone) get a column reward; rows with chosen and rejected
get chosen_reward and rejected_reward. Prompts may be chat messages.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.columns import Dropped, read_pair
from ..data.rows import read_rows, text_cell
from ..models.precision import autocast
from ..reward import RewardModel
from ..running.device import pick_device, pick_dtype
from ..running.errors import require
from ..running.flags import DeviceFlags, flag, parse_flags
from ..running.logs import to_json


@dataclass
class Config(DeviceFlags):
    """Scoring."""

    rm: str = flag("", "reward model: a run of train_rm.py, a folder or a hub id")
    data: str = flag("", "texts: a .jsonl, .csv or .parquet file, a folder or a hub id")
    split: str = flag("train", "split of a hub data set")
    out: str = flag("scored.jsonl", "file for the rows and their rewards, one JSON object per line")
    batch_size: int = flag(64, "texts scored at a time", "[1, inf)")


def texts_of(row: dict, where: str, chat: bool) -> dict[str, tuple]:
    """What to score in a row: the new column's name -> (prompt, completion).

    Empty for a pair that is dropped.

    Args:
        where: file and row, for error messages.
        chat: whether the reward model reads chat.
    Raises:
        UserError: the row has no columns of texts.
    """
    if "chosen" in row and "rejected" in row:
        pair = read_pair(row, where, (), chat)
        if isinstance(pair, Dropped):
            return {}
        sides = {"chosen_reward": pair.chosen, "rejected_reward": pair.rejected}
        return {name: (pair.prompt, completion) for name, completion in sides.items()}
    if "completion" in row:
        prompt = row.get("prompt", "")
        if not isinstance(prompt, list):
            prompt = text_cell(row, "prompt", where, True)
        return {"reward": (prompt, text_cell(row, "completion", where, True))}
    require(
        "text" in row,
        f"{where}: has columns {sorted(row)}: expected prompt and completion, text, or chosen and "
        "rejected",
    )
    return {"reward": ("", text_cell(row, "text", where))}


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, score, write."""
    config = parse_flags(Config, __doc__, argv, "minalign score")
    given = bool(config.rm and config.data)
    require(given, "--rm and --data are needed: what scores, and what is scored")
    require(not Path(config.out).exists(), f"--out {config.out}: exists: choose another file")
    device, _ = pick_device(config.device)
    reward_model = RewardModel.from_pretrained(config.rm, device)
    chat = bool(reward_model.tokenizer.chat_template)
    rows = read_rows(config.data, config.split)
    texts = [texts_of(row, f"{config.data}: row {n}", chat) for n, row in enumerate(rows, 1)]
    encoded = [reward_model.encode(*text) for row in texts for text in row.values()]

    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))  # like lengths together
    scores = [0.0] * len(encoded)
    with autocast(device, pick_dtype(config.dtype, device)):
        for i in tqdm(range(0, len(order), config.batch_size), desc="scores", unit="batch"):
            batch = order[i : i + config.batch_size]
            logits = reward_model.logits([encoded[j] for j in batch], config.batch_size)
            for j, reward in zip(batch, reward_model.read_out(logits).tolist()):
                scores[j] = reward
    found, column = iter(scores), torch.tensor(scores)
    with open(config.out, "w") as file:
        for row, names in zip(rows, texts):
            file.write(to_json(dict(row) | {name: next(found) for name in names}) + "\n")
    unscored = sum(not names for names in texts)
    without = f"; {unscored} rows without" if unscored else ""
    print(
        f"{len(scores)} texts ({reward_model.reading}): mean {column.mean():.3f}, deviation "
        f"{column.std(correction=0):.3f}{without}; written to {config.out}"
    )
