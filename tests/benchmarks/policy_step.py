"""One policy step, 16 completions of 64 tokens with KL to a reference and a Python reward.

train_policy.py against TRL's RLOO trainer.

    pip install trl && python tests/benchmarks/policy_step.py --shape S

"TRL" is the trainer at its defaults. "TRL, no checkpointing" is its best setting here. "Early":
each token is the end with a chance of about 1/16. "bfloat16" is --dtype bfloat16 of ours and bf16
of TRL. Samples differ, so sameness shows on a batch that is not sampled: "fixed_batch" is its sum
of log-probs. "spent" is where the seconds of a step of ours go, in hundredths of it.
"""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

from side_by_side import (
    clock,
    compare,
    device,
    end_often_,
    forward_flops,
    make_model,
    peak,
    report,
    sampling_floor,
)

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
    ids = ids.to(device())
    return ids[:, :24], ids[:, 24:]


@contextlib.contextmanager
def timed(parts: dict):
    """Inside, functions keep a list of the seconds that each call of them took.

    Args:
        parts: name -> where the function lies, and what it is called there.
    Yields:
        name -> that list.
    """
    spent = {name: [] for name in parts}

    def with_timer(function, seconds):
        @functools.wraps(function)
        def call(*args, **kwargs):
            began = clock()
            result = function(*args, **kwargs)
            seconds.append(clock() - began)
            return result

        return call

    plain = {name: getattr(*place) for name, place in parts.items()}
    for name, place in parts.items():
        setattr(*place, with_timer(plain[name], spent[name]))
    try:
        yield spent
    finally:
        for name, place in parts.items():
            setattr(*place, plain[name])


def ours(shape: str, early: bool = False, dtype: str = "float32", **settings) -> None:
    """Four steps of train_policy.train."""
    import copy

    import torch

    import train_policy
    from minalign import rollout
    from minalign.data.chat import TokenizedPrompt
    from minalign.models.precision import autocast
    from minalign.models.rewards import RewardFunction
    from minalign.running.optimizer import Optimizer
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
    given = dict(dataset="-", model="-", rm=["-"], baseline="rloo", beta=0.05, lr=1e-6, dtype=dtype)
    config = train_policy.resolve(train_policy.Config(**sizes, **given, **settings))
    train_policy.evaluate = lambda *_: ({"reward": 0.0, "kl_sft": 0.0}, [])
    policy, precision = copy.deepcopy(model).requires_grad_(True), getattr(torch, dtype)
    parts = {
        "sampling": (rollout, "generate"),
        "frozen passes": (rollout, "frozen_logprobs"),
        "forward": (rollout, "completion_logprobs"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (Optimizer, "step"),
    }
    with tempfile.TemporaryDirectory() as folder, timed(parts) as spent:
        run = Run(Path(folder), config, device(), precision)
        train_policy.train(run, task, policy)
        rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    seconds = [b["seconds"] - a["seconds"] for a, b in zip([{"seconds": 0}, *rows], rows)]
    shares = {  # of all steps but the first; each calls a function equally often, or nearly
        name: round(100 * sum(times[len(times) // STEPS :]) / sum(seconds[1:]))
        for name, times in spent.items()
    }
    memory = peak() - before
    prompt, completion = fixed_batch(len(tokenizer))
    batch = (prompt, torch.ones_like(prompt), completion, torch.ones_like(completion))
    with torch.no_grad(), autocast(device(), precision):
        check = round(rollout.completion_logprobs(model, *batch, 1.0).sum().item(), 2)
    facts = dict(tokens_per_row=[row["length"] for row in rows], fixed_batch=check)
    for name in ("importance", "importance_clipped"):  # where samples are drawn in bfloat16
        if name in rows[0]:
            facts[name] = round(sum(row[name] for row in rows) / len(rows), 4)
    report(seconds, memory, **facts, spent=shares)


def trl(shape: str, early: bool = False, dtype: str = "float32", **settings) -> None:
    """Four steps of trl.RLOOTrainer."""
    import torch
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from minalign.models.precision import autocast

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
            use_cpu=device().type == "cpu",
            bf16=dtype == "bfloat16",
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
    with torch.no_grad(), autocast(device(), getattr(torch, dtype)):
        logprobs = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *batch)[0]
    seconds, check = [row["step_time"] for row in rows], round(logprobs.sum().item(), 2)
    lengths = [row["completions/mean_length"] for row in rows]
    report(seconds, memory, tokens_per_row=lengths, fixed_batch=check)


def floor(shape: str, work: str) -> list:
    """Sampling, the start's pass, and forward and backward. Two completions share a prompt's pass.

    Nothing for rows that end by chance.
    """
    passes = 4 * forward_flops(shape, ROWS * (PROMPT + NEW), ROWS * NEW)
    sampling = sampling_floor(shape, work, ROWS // 2, ROWS, PROMPT, NEW)
    return [] if "early" in work else [*sampling, (passes, 0)]


half = functools.partial(trl, dtype="bfloat16")
SIDES = {
    "ours": ours,
    "TRL": trl,
    "TRL, no checkpointing": functools.partial(trl, gradient_checkpointing=False),
    "early: ours": functools.partial(ours, early=True),
    "early: TRL": functools.partial(trl, early=True),
    "bfloat16: ours": functools.partial(ours, dtype="bfloat16"),
    "bfloat16: TRL": half,
    "bfloat16: TRL, no checkpointing": functools.partial(half, gradient_checkpointing=False),
    "bfloat16, early: ours": functools.partial(ours, dtype="bfloat16", early=True),
    "bfloat16, early: TRL": functools.partial(half, early=True),
    "float32, sampled in bfloat16: ours": functools.partial(ours, sampler_dtype="bfloat16"),
}

if __name__ == "__main__":
    compare(__file__, __doc__, SIDES, floor, devices=("cpu", "cuda"))
