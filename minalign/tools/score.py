"""Rewards of texts in a file, from the command line.

    python -m minalign score --rm runs/rm-1 --data answers.jsonl --out scored.jsonl

Rows with prompt and completion (or text alone) get a column reward; rows with chosen and rejected
get chosen_reward and rejected_reward. Prompts may be chat messages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..data.cells import shown, text_cell
from ..data.chat import note_special_tokens
from ..data.columns import (
    by_our_names,
    name_unread,
    parse_columns,
    prompt_cell,
    read_dialogue,
    read_items,
    read_pair,
)
from ..data.messages import SERIALISED, Note, Prompt, as_asked, without_prompt
from ..data.rows import read_rows
from ..models.precision import autocast
from ..reward import RewardModel
from ..running.device import pick_device, pick_dtype
from ..running.errors import require
from ..running.files import require_writable, to_json, whole_file
from ..running.flag_groups import ColumnFlags, DeviceFlags
from ..running.flags import flag, parse_flags


@dataclass
class Config(ColumnFlags, DeviceFlags):
    """Scoring."""

    rm: str = flag("", "reward model: a run of train_rm.py, a folder or a hub id")
    data: str = flag("", "texts: a .jsonl, .csv or .parquet file, a folder or a hub id")
    split: str = flag("train", "split of a hub data set")
    out: str = flag("scored.jsonl", "file for the rows and their rewards, one JSON object per line")
    batch_size: int = flag(64, "texts scored at a time", "[1, inf)")


def texts_of(row: dict, where: str, note: Note, chat: bool) -> dict[str, tuple[Prompt, str]]:
    """What to score in a row: the new column's name -> (prompt, completion).

    Args:
        where: file and row.
        note: see columns.read_items.
        chat: whether the reward model reads chat.
    Raises:
        UserError: the row is of no use.
    """
    if "chosen" in row and "rejected" in row:
        pair = read_pair(row, where, note, chat=chat)
        sides = {"chosen_reward": pair.chosen, "rejected_reward": pair.rejected}
        return {name: (pair.prompt, completion) for name, completion in sides.items()}
    if "completion" not in row:
        return {"reward": ("", text_cell(row, "text"))}
    completion = row["completion"]
    if isinstance(completion, str) and not SERIALISED.match(completion):
        # What a policy wrote is taken as it is.
        prompt, completion = prompt_cell(row, note), text_cell(row, "completion", True)
        require(bool(prompt or completion.strip()), "neither a prompt nor a completion")
        said = "completions begin with their prompt, and are scored as they are"
        without_prompt(prompt, [completion], lambda _: note(said))
    else:
        prompt, completion = read_dialogue(row, "completion", note)
    return {"reward": (as_asked(prompt, where, chat or isinstance(prompt, list)), completion)}


def logits_of(
    reward_model: RewardModel, rows: Sequence[list[int]], batch_size: int
) -> torch.Tensor:
    """Logits (N, K), float32, of N token rows, those of like length together, with a bar."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    starts = range(0, len(order), batch_size)
    parts = [
        reward_model.logits([rows[j] for j in order[i : i + batch_size]], batch_size)
        for i in tqdm(starts, desc="scores", unit="batch", disable=None)
    ]
    return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, score, write."""
    config = parse_flags(Config, __doc__, argv, "minalign score")
    given = bool(config.rm and config.data)
    require(given, "--rm and --data are needed: what scores, and what is scored")
    require_writable(config.out)
    device, _ = pick_device(config.device)
    reward_model = RewardModel.from_pretrained(config.rm, device)
    chat = bool(reward_model.tokenizer.chat_template)
    rows, names = read_rows(config.data, config.split), parse_columns(config.columns)
    named, columns = by_our_names(rows, names, config.data)
    forms = ({"chosen", "rejected", "prompt"}, {"completion", "prompt"}, {"text"})
    read_columns = next((f for f in forms if named[0].keys() >= f - {"prompt"}), set())
    require(
        bool(read_columns),
        f"{config.data}: has columns {shown(columns)}: expected prompt and completion, text, or "
        "chosen and rejected (--columns gives other names)",
    )
    name_unread(config.data, columns, read_columns, names)

    said = []

    def read(row: dict, where: str, note: Note) -> dict[str, list[int]]:
        """The new column's name -> token ids."""
        texts = texts_of(row, where, note, chat)
        rows = {name: reward_model.encode(*text) for name, text in texts.items()}
        longest = max(map(len, rows.values()))
        limit = f"the reward model's context of {reward_model.context}"
        require(longest <= reward_model.context, f"longer than {limit} tokens")
        said.extend((str(prompt), completion) for prompt, completion in texts.values())
        return rows

    texts = [item or {} for item in read_items(named, read, config.data)]
    note_special_tokens(reward_model.tokenizer, said, "texts")
    encoded = [ids for row in texts for ids in row.values()]

    with autocast(device, pick_dtype(config.dtype, device)):
        logits = logits_of(reward_model, encoded, config.batch_size)
    scores = reward_model.read_out(logits).tolist()
    found, column = iter(scores), torch.tensor(list(filter(math.isfinite, scores)))
    with whole_file(config.out) as file:
        for row, names in zip(rows, texts):
            file.write(to_json(row | {name: next(found) for name in names}) + "\n")
    notes = {
        "rows without": sum(not names for names in texts),
        "not finite": len(scores) - len(column),
        "earlier rewards replaced": sum(
            name in row for row, new in zip(rows, texts) for name in new
        ),
    }
    said = "".join(f"; {count} {note}" for note, count in notes.items() if count)
    print(
        f"{len(scores)} texts ({reward_model.reading}): mean {column.mean():z.3f}, deviation "
        f"{column.std(correction=0):.3f}{said}; written to {config.out}"
    )
