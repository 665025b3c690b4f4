"""From the command to the first step: pairs of 2 x ~1,050 tokens, read, tokenised, fingerprinted.

train_rm.py against TRL's RewardTrainer, the first time and again.

    pip install trl && python tests/benchmarks/start_up.py --shape S

S is 10,000 pairs, M is 100,000 (1.2 GB of text); the model is that of S for both. "again" finds
what the run before it left: ours the tokens in runs/tokens, TRL the cache of datasets. "kept" and
"words", tokens but for begin and end, show that all sides prepared the same.
"""

import itertools
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from side_by_side import compare, make_model, peak, report

PAIRS = {"S": 10_000, "M": 100_000}


def prepared(shape: str, again: bool) -> Path:
    """The folder with model and data, made where there is none; and the place to work in.

    What earlier runs left is removed but for `again`.
    """
    folder = Path(tempfile.gettempdir()) / f"minalign-start-up-{shape}"
    if not (folder / "pairs.jsonl").exists():
        folder.mkdir(exist_ok=True)
        model, tokenizer = make_model("S")
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        with open(folder / "part", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in pairs(PAIRS[shape], len(tokenizer)))
        (folder / "part").rename(folder / "pairs.jsonl")
    for name in [] if again else ["runs", "cache"]:
        shutil.rmtree(folder / name, ignore_errors=True)
    os.chdir(folder)
    return folder


def pairs(count: int, vocabulary: int):
    """Rows of texts of random phrases, 35 to 70 of 20 words each."""
    rng = random.Random(0)
    phrases = [" ".join(f"w{rng.randrange(4, vocabulary)}" for _ in range(20)) for _ in range(5000)]
    for _ in range(count):
        texts = (" ".join(rng.choices(phrases, k=rng.randint(35, 70))) for _ in range(2))
        yield dict(zip(("chosen", "rejected"), texts))


def ours(shape: str, again: bool = False) -> None:
    """train_rm.load and the fingerprints."""
    import torch

    import minalign.data.pairs  # the imports do not count, nor do the peer's
    import minalign.models.lora
    import minalign.reward  # noqa: F401
    import train_rm
    from minalign.running.run import Run

    folder = prepared(shape, again)
    config = train_rm.Config(model=str(folder / "model"), dataset="pairs.jsonl", max_tokens=2048)
    config = train_rm.resolve(config)
    before, began = peak(), time.monotonic()
    run = Run(folder, config, torch.device("cpu"), torch.float32)
    _, examples, held_out = train_rm.load(config, run.device)
    run.is_made_of({"training data": examples, "held-out data": held_out}, {})
    seconds = time.monotonic() - began
    lengths = [int((part.lengths - 2).sum()) for part in (examples, held_out)]
    report([seconds], peak() - before, kept=len(examples) + len(held_out), words=sum(lengths))


def trl(shape: str, again: bool = False) -> None:
    """trl.RewardTrainer, up to its first step. The tenth that we hold out, it evaluates on, too."""
    os.environ["HF_DATASETS_CACHE"] = str(prepared(shape, again) / "cache")
    import pyarrow.compute
    from datasets import load_dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        output_dir="trl",
        max_length=2048,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    before, began = peak(), time.monotonic()
    data = load_dataset("json", data_files="pairs.jsonl", split="train")
    parts = data.train_test_split(0.1, seed=0)
    trainer = RewardTrainer(
        "model", args=config, train_dataset=parts["train"], eval_dataset=parts["test"]
    )
    seconds = time.monotonic() - began
    sets = [trainer.train_dataset, trainer.eval_dataset]
    columns = [
        part.data.table[name]
        for part, name in itertools.product(sets, ("chosen_ids", "rejected_ids"))
    ]
    lengths = [pyarrow.compute.list_value_length(column).to_numpy() - 1 for column in columns]
    report([seconds], peak() - before, kept=sum(map(len, sets)), words=int(sum(map(sum, lengths))))


if __name__ == "__main__":
    sides = {
        "ours": ours,
        "again: ours": lambda shape: ours(shape, again=True),
        "TRL": trl,
        "again: TRL": lambda shape: trl(shape, again=True),
    }
    compare(__file__, __doc__, sides)
