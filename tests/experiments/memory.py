"""Memory of one policy step: computed for any shape and flags, and measured on this machine.

    python tests/experiments/memory.py                 the computed table
    python tests/experiments/memory.py --measure       measured peaks beside the computed ones
    python tests/experiments/memory.py --reference     computed, of docs/reference_runs.md

Measured is the peak of a fresh process for each set of flags, at the shape of SmolLM2-135M.

Counted, in bytes:

- weights, gradients and AdamW's two moments of what is trained (4 each: float32);
- the start policy (4), unless adapters switched off are it;
- an EMA anchor (4);
- a reward model (4);
- activations of a micro-batch in the forward precision (in bfloat16 also autocast's copy of the
  weights and the one that samples);
- four tensors of float32 logits of its completion tokens.

Samples and caches are smaller and left out.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

PROMPT, COMPLETION, BATCH = 64, 64, 8


class Shape(NamedTuple):
    """A Llama with tied embeddings: its layers, widths and vocabulary."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int

    def parameters(self) -> int:
        kv = self.width * self.kv_heads // self.heads
        layer = 2 * self.width * (self.width + kv) + 3 * self.width * self.ffn
        return self.vocabulary * self.width + self.layers * layer

    def adapter_parameters(self, rank: int) -> int:
        kv = self.width * self.kv_heads // self.heads
        sides = 2 * (self.width + self.width) + 2 * (self.width + kv) + 3 * (self.width + self.ffn)
        return self.layers * rank * sides


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 49152),
    "SmolLM2-360M": Shape(32, 960, 2560, 15, 5, 49152),
    "SmolLM2-1.7B": Shape(24, 2048, 8192, 32, 32, 49152),
}
QWEN = Shape(24, 896, 4864, 14, 2, 151936)  # Qwen2.5-0.5B, without its biases
FLAGS = {  # name -> micro-batch size, LoRA rank, activation checkpoints, EMA anchor
    "--micro-batch-size 8": (8, 0, False, False),
    "--micro-batch-size 2": (2, 0, False, False),
    "--micro-batch-size 2 --gradient-checkpointing": (2, 0, True, False),
    "--micro-batch-size 2 --anchor ema": (2, 0, False, True),
    "--micro-batch-size 2 --lora-rank 16": (2, 16, False, False),
    "--micro-batch-size 2 --lora-rank 16 --gradient-checkpointing": (2, 16, True, False),
}


def computed(
    shape: Shape, flags: tuple, prompt: int, completion: int, act_bytes: int, reward_model: bool
) -> float:
    """Bytes, by the docstring's count."""
    rows, rank, checkpoints, ema = flags
    n = shape.parameters()
    trained = shape.adapter_parameters(rank) if rank else n
    start = 0 if rank else 4 * n
    weights = 4 * n + 12 * trained + start + 4 * trained * ema + 4 * n * reward_model
    # the copy that samples; and autocast keeps one until the backward pass is over
    weights += 4 * n * (act_bytes == 2)
    kv = shape.width * shape.kv_heads // shape.heads
    # numbers per token, kept for the backward pass
    layer = 8 * shape.width + 2 * kv + 4 * shape.ffn
    kept = shape.layers * shape.width + layer if checkpoints else shape.layers * layer
    activations = rows * (prompt + completion) * act_bytes * kept
    return weights + activations + rows * completion * 16 * shape.vocabulary


def run_once(flags: tuple) -> None:
    """Two steps of train_policy.train at the shape of SmolLM2-135M with random weights.

    Prints peak bytes and seconds per step.
    """
    import copy
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import train_policy
    from minalign.data import toy
    from minalign.data.chat import TokenizedPrompt
    from minalign.models.activations import checkpoint_activations_
    from minalign.models.lora import AdapterView, add_lora_
    from minalign.models.rewards import RewardFunction
    from minalign.running.run import Run
    from minalign.task import Task

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, rank, checkpoints, ema = flags
    shape = SHAPES["SmolLM2-135M"]
    llama = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(llama).requires_grad_(False)

    def lengths(prompts, completions):
        return [float(len(text)) for text in completions]

    reward, tokenizer = RewardFunction("length", lengths), toy.make_tokenizer()
    prompts = [TokenizedPrompt(torch.randint(0, 40, (PROMPT,)).tolist()) for _ in range(BATCH)]
    task = Task(model, tokenizer, reward, prompts, prompts[:1], None, [-1], {})
    given = dict(dataset="-", model="-", rm=["-"], steps=2, batch_size=BATCH)
    given |= dict(micro_batch_size=rows, max_new_tokens=COMPLETION)
    given |= dict(lora_rank=rank or None, anchor="ema" if ema else "fixed")
    config = train_policy.resolve(train_policy.Config(**given))
    if rank:
        policy = model
        add_lora_(policy, rank)
        task = task._replace(start=AdapterView(policy, None))
    else:
        policy = copy.deepcopy(model).requires_grad_(True)
    if checkpoints:
        checkpoint_activations_(policy)
    task.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
    train_policy.evaluate = lambda *_: ({"reward": 0.0, "kl_sft": 0.0}, [])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), config, torch.device("cpu"), torch.float32)
        train_policy.train(run, task, policy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"RESULT {(peak - before) * 1024} {(time.monotonic() - began) / 2}")


def print_measured() -> None:
    """A row for each set of flags: measured and computed peak in GiB, and seconds per step."""
    print(
        f"SmolLM2-135M's shape, batch {BATCH}, {PROMPT} + {COMPLETION} tokens, float32, "
        "Python reward: GiB measured, computed, s per step"
    )
    for name, flags in FLAGS.items():
        command = [sys.executable, __file__, f"--once={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        peak = seconds = float("nan")
        if done.returncode == 0:
            peak, seconds = map(float, done.stdout.split("RESULT")[1].split())
        expected = computed(SHAPES["SmolLM2-135M"], flags, PROMPT, COMPLETION, 4, False)
        sizes = f"{peak / 2**30:6.2f} {expected / 2**30:6.2f}"
        print(f"{name:62} {sizes} {seconds:6.1f}", flush=True)


def print_computed() -> None:
    """A row for each shape and set of flags, in GiB."""
    print("bfloat16 autocast, 128 + 128 tokens, a reward model of the policy's size: GiB computed")
    for shape_name, shape in SHAPES.items():
        for name, flags in FLAGS.items():
            size = computed(shape, flags, 128, 128, 2, reward_model=True)
            print(f"{shape_name:14} {name:62} {size / 2**30:6.1f}")


def print_reference() -> None:
    """Of a seed of the reference run's larger sizes: the largest step in GiB, and FLOPs.

    A pass costs two FLOPs per weight and token, a backward pass four. A token of REINFORCE is
    sampled, scored by the start policy and the reward model, and trained on; in WARP also scored by
    the anchor. Texts are as long as they may be: 80 tokens, and 15 + 48.
    """
    print("computed, of one seed: GiB of WARP's step in bfloat16; 10^15 FLOPs of each stage")
    for name, shape, rows in (
        ("SmolLM2-135M", SHAPES["SmolLM2-135M"], 16),
        ("Qwen2.5-0.5B", QWEN, 8),
    ):
        size = computed(shape, (rows, 0, False, True), 15, 48, 2, reward_model=True)
        tokens = {  # of a stage: passes, tokens
            "reward model": (3, 600 * 2 * 32 * 80),
            "REINFORCE": (1 + 1 + 1 + 3, 200 * 64 * 63),
            "WARP": (1 + 1 + 1 + 1 + 3, 4 * 100 * 64 * 63),
        }
        flops = {stage: 2 * shape.parameters() * n * m / 1e15 for stage, (n, m) in tokens.items()}
        of_stages = ", ".join(f"{stage} {count:.1f}" for stage, count in flops.items())
        print(f"{name:14} {shape.parameters() / 1e6:4.0f}M {size / 2**30:6.1f} GiB  {of_stages}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        run_once(FLAGS[arguments.once])
    elif arguments.reference:
        print_reference()
    elif arguments.measure:
        print_measured()
    else:
        print_computed()
