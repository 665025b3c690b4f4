"""One reward-model step, 8 pairs of log-normal lengths (mean about 120 tokens, at most 512): train_rm.py's step against TRL's trainer.

    pip install trl && python tests/benchmarks/reward_step.py --shape S

"TRL" is RewardTrainer at its defaults; "TRL, no checkpointing" does not recompute activations.
"""

import random
import tempfile
import time

from side_by_side import compare, make_model, peak, report

PAIRS, STEPS = 8, 6


def pairs(count: int, vocabulary: int) -> list[dict[str, str]]:
    """Texts of random words, the chosen ones of smaller numbers, so that there is something to learn."""
    rng = random.Random(0)

    def text(low, high):
        length = min(510, max(8, round(rng.lognormvariate(4.6, 0.6))))
        return " ".join(f"w{rng.randrange(low, high)}" for _ in range(length))

    return [{"chosen": text(4, vocabulary // 2), "rejected": text(vocabulary // 2, vocabulary)} for _ in range(count)]


def ours(shape: str) -> None:
    """The step of train_rm.train: both members of the pairs in parts of like length, one backward."""
    import torch

    from minalign.batches import length_grouped_batches
    from minalign.losses import bradley_terry_loss
    from minalign.reward import RewardModel

    policy, tokenizer = make_model(shape)
    reward_model = RewardModel.from_backbone(policy, tokenizer, num_labels=1)
    del policy
    rows = [[reward_model.encode("", pair[side]) for side in ("chosen", "rejected")] for pair in pairs(256, len(tokenizer))]
    batches = length_grouped_batches([max(map(len, row)) for row in rows], PAIRS, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(reward_model.model.parameters(), lr=1e-5)
    before, seconds, tokens = peak(), [], 0
    for _ in range(STEPS):
        began = time.monotonic()
        batch = [rows[i] for i in next(batches)]
        chosen, rejected = reward_model.forward([c for c, _ in batch] + [r for _, r in batch])[:, 0].chunk(2)
        optimizer.zero_grad()
        bradley_terry_loss(chosen, rejected).mean().backward()
        torch.nn.utils.clip_grad_norm_(reward_model.model.parameters(), 1.0).item()
        optimizer.step()
        seconds.append(time.monotonic() - began)
        tokens += sum(len(row) for pair in batch for row in pair)
    report([sum(seconds[1:]) / (STEPS - 1)], peak() - before, tokens_a_step=round(tokens / STEPS))


def trl(shape: str, **settings) -> None:
    """trl.RewardTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.monotonic())

    model, tokenizer = make_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        del model
        config = RewardConfig(
            output_dir=folder, per_device_train_batch_size=PAIRS, max_length=512, learning_rate=1e-5, max_steps=STEPS,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, **settings,
        )  # fmt: skip
        data = Dataset.from_list(pairs(256, len(tokenizer)))
        trainer = RewardTrainer(
            f"{folder}/model", args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
        before = peak()
        trainer.train()
    tokens = next((row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row), None)
    report([(marks[-1] - marks[0]) / (STEPS - 1)], peak() - before, tokens_a_step=tokens and round(tokens / STEPS))


if __name__ == "__main__":
    compare(__file__, __doc__, {
        "ours": ours, "TRL": trl,
        "TRL, no checkpointing": lambda shape: trl(shape, gradient_checkpointing=False),
    })  # fmt: skip
