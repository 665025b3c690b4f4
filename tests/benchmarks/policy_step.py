"""One policy step, 16 completions of 64 tokens with KL to a reference and a Python reward.

train_policy.py against TRL's RLOO trainer.

    pip install trl && python tests/benchmarks/policy_step.py --shape S

"TRL" is the trainer at its defaults. "TRL, no checkpointing" is its best setting here. "Early":
each token is the end with a chance of about 1/16. Samples differ, so sameness shows on a batch that
is not sampled: "fixed batch" is its sum of log-probs.
"""

import json
import tempfile
from pathlib import Path

from side_by_side import compare, end_often_, forward_flops, make_model, peak, report

ROWS, PROMPT, NEW, STEPS = 16, 32, 64, 4


def prompts(tokenizer, count: int) -> list[str]:
    """Random words."""
    import random

    rng = random.Random(0)

    def text():
        return " ".join(f"w{rng.randrange(4, len(tokenizer))}" for _ in range(PROMPT))

    return [text() for _ in range(count)]


def reward(prompts=None, completions=None, **_) -> list[float]:
    """Cheap, and different for different texts."""
    return [(len(completion) % 7) / 7 for completion in completions]


def fixed_batch(vocabulary: int):
    """Prompt and completion ids (4, 24) and (4, 16), without padding."""
    import torch

    ids = torch.randint(4, vocabulary, (4, 40), generator=torch.Generator().manual_seed(1))
    return ids[:, :24], ids[:, 24:]


def ours(shape: str, early: bool = False) -> None:
    """Four steps of train_policy.train."""
    import copy

    import torch

    import train_policy
    from minalign.data.chat import TokenizedPrompt
    from minalign.models.rewards import RewardFunction
    from minalign.rollout import completion_logprobs
    from minalign.running.run import Run
    from minalign.task import Task

    model, tokenizer = make_model(shape)
    if early:
        end_often_(model)
    rows = [TokenizedPrompt(tokenizer(text)["input_ids"]) for text in prompts(tokenizer, 256)]
    before = peak()
    start, cheap = model.eval().requires_grad_(False), RewardFunction("r", reward)
    task = Task(start, tokenizer, cheap, rows, rows[:1], None, [2], {})
    sizes = dict(steps=STEPS, batch_size=ROWS, group_size=2, max_new_tokens=NEW, eval_prompts=1)
    given = dict(dataset="-", model="-", rm=["-"], baseline="rloo", beta=0.05, lr=1e-6)
    config = train_policy.resolve(train_policy.Config(**sizes, **given))
    train_policy.evaluate = lambda *_: ({"reward": 0.0, "kl_sft": 0.0}, [])
    policy = copy.deepcopy(model).requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), config, torch.device("cpu"), torch.float32)
        train_policy.train(run, task, policy)
        rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    seconds = [b["seconds"] - a["seconds"] for a, b in zip([{"seconds": 0}, *rows], rows)]
    memory = peak() - before
    prompt, completion = fixed_batch(len(tokenizer))
    batch = (prompt, torch.ones_like(prompt), completion, torch.ones_like(completion))
    check = round(completion_logprobs(model, *batch, 1.0).sum().item(), 2)
    report(seconds, memory, tokens_per_row=[row["length"] for row in rows], fixed_batch=check)


def trl(shape: str, early: bool = False, **settings) -> None:
    """Four steps of trl.RLOOTrainer."""
    import torch
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    model, tokenizer = make_model(shape)
    if early:
        end_often_(model)
    data = Dataset.from_dict({"prompt": prompts(tokenizer, 256)})
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        config = RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            num_generations=2,
            max_completion_length=NEW,
            beta=0.05,
            learning_rate=1e-6,
            max_steps=STEPS,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            steps_per_generation=1,
            disable_tqdm=True,
            **settings,
        )
        parts = dict(args=config, train_dataset=data, processing_class=tokenizer)
        trainer = RLOOTrainer(f"{folder}/model", reward_funcs=reward, **parts)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "step_time" in row]
    memory, (prompt, completion) = peak() - before, fixed_batch(len(tokenizer))
    ids = torch.cat([prompt, completion], 1)
    batch = (ids, torch.ones_like(ids), completion.shape[1])
    with torch.no_grad():
        logprobs = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *batch)[0]
    seconds, check = [row["step_time"] for row in rows], round(logprobs.sum().item(), 2)
    lengths = [row["completions/mean_length"] for row in rows]
    report(seconds, memory, tokens_per_row=lengths, fixed_batch=check)


if __name__ == "__main__":
    sides = {
        "ours": ours,
        "TRL": trl,
        "TRL, no checkpointing": lambda shape: trl(shape, gradient_checkpointing=False),
        "ours, early": lambda shape: ours(shape, early=True),
        "TRL, early": lambda shape: trl(shape, early=True),
    }

    def flops(shape):
        return 5 * forward_flops(shape, ROWS * (PROMPT + NEW), ROWS * NEW)

    compare(__file__, __doc__, sides, flops=flops)
