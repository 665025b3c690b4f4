"""Reward-model steps on 8 pairs of log-normal lengths (mean about 120 tokens, at most 512).

train_rm.py against TRL's trainer.

    pip install trl && python tests/benchmarks/reward_step.py --shape S

Two epochs of the same 48 pairs, the second one timed, so that all sides see the same tokens. Heads
start alike, and the learning rate is next to nothing, so that "loss", the first epoch's mean, shows
that they compute the same. "TRL" is RewardTrainer at its defaults. "TRL, sorted" gets the pairs in
order of length and does not recompute activations: its best setting here.
"""

import functools
import json
import random
import tempfile
from pathlib import Path

from side_by_side import clock, compare, device, forward_flops, make_model, peak, report

PAIRS, EPOCH = 8, 6  # pairs per batch, steps per epoch


def save_start(shape: str, folder: Path) -> int:
    """A sequence classifier whose head is not zero, and its tokenizer, into `folder`.

    Returns the size of its vocabulary.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = make_model(shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return len(tokenizer)


def pairs(count: int, vocabulary: int) -> list[dict[str, str]]:
    """Texts of random words, the chosen ones of smaller numbers: there is something to learn."""
    rng = random.Random(0)

    def text(low, high):
        length = min(510, max(8, round(rng.lognormvariate(4.6, 0.6))))
        return " ".join(f"w{rng.randrange(low, high)}" for _ in range(length))

    half = vocabulary // 2
    return [{"chosen": text(4, half), "rejected": text(half, vocabulary)} for _ in range(count)]


def ours(shape: str) -> None:
    """train_rm.train itself, on files."""
    import torch

    import train_rm
    from minalign.running.run import Run

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = pairs(EPOCH * PAIRS, save_start(shape, folder / "model"))
        (folder / "data").mkdir()
        for split, part in (("train", rows), ("test", [{"chosen": "w5", "rejected": "w6"}])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / "data" / f"{split}.jsonl").write_text(lines)
        # The step after the second epoch is there because the last one evaluates and saves.
        sizes = dict(batch_size=PAIRS, steps=2 * EPOCH + 1, lr=1e-12, center_coef=0.0)
        data = dict(dataset=str(folder / "data"), eval_split="test")
        config = train_rm.Config(model=str(folder / "model"), **data, **sizes)
        config = train_rm.resolve(config)
        before = peak()
        run = Run(folder, config, device(), torch.float32)
        train_rm.train(run, *train_rm.load(config, run.device))
        steps = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    seconds = (steps[2 * EPOCH - 1]["seconds"] - steps[EPOCH - 1]["seconds"]) / EPOCH
    loss = round(sum(step["loss"] for step in steps[:EPOCH]) / EPOCH, 4)
    report([seconds], peak() - before, words=words(rows), loss=loss)


def words(rows) -> int:
    """All that a side reads per epoch."""
    return sum(len(text.split()) for row in rows for text in row.values())


def trl(shape: str, best: bool = False) -> None:
    """trl.RewardTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = save_start(shape, Path(folder) / "model")
        settings = {}
        if best:
            settings = {"train_sampling_strategy": "sequential", "gradient_checkpointing": False}
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_length=512,
            learning_rate=1e-12,
            logging_steps=1,
            max_steps=2 * EPOCH + 1,
            report_to="none",
            save_strategy="no",
            use_cpu=device().type == "cpu",
            bf16=False,
            disable_tqdm=True,
            **settings,
        )
        rows = pairs(EPOCH * PAIRS, vocabulary)
        if best:
            rows.sort(key=lambda row: max(len(text.split()) for text in row.values()))
        before = peak()
        data = [{key: f"<s> {text} </s>" for key, text in row.items()} for row in rows]
        parts = dict(args=config, train_dataset=Dataset.from_list(data), callbacks=[Clock()])
        trainer = RewardTrainer(f"{folder}/model", **parts)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row][:EPOCH]
    loss = round(sum(losses) / EPOCH, 4)
    report([(marks[-1] - marks[EPOCH - 1]) / EPOCH], peak() - before, words=words(rows), loss=loss)


def floor(shape: str, work: str) -> list:
    """Forward and backward of all that a step reads."""
    return [(3 * forward_flops(shape, words(pairs(EPOCH * PAIRS, 4096)) // EPOCH, 0), 0)]


SIDES = {"ours": ours, "TRL": trl, "TRL, sorted": functools.partial(trl, best=True)}

if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, floor, devices=("cpu", "cuda"))
