"""What a policy step costs on N GPUs, computed, not measured.

Memory, bytes between the GPUs, seconds of each stage.

    python tests/experiments/scale.py

A step: 256 prompts, 256 + 256 tokens, one completion each, a start policy as anchor and a reward
model of the policy's size. It is data parallel as torchrun runs it: every GPU holds all weights,
gradients are summed.

Counted in matrix products: 2 operations per weight and token forwards, 4 backwards. Sampling reads
all weights (in bfloat16) once per token.

With --shard gradients and optimizer state are in pieces, and so are weights while gradients are
made. Putting them together, twice per micro-batch and once after the step, is more to send, and not
counted here.

tests/test_scale.py holds the counts against torch's own counter and against the bytes that really
go through the sum over ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from memory import SHAPES, Shape, computed

PROMPTS, PROMPT, COMPLETION, MICRO = 256, 256, 256, 4
PEAK = 989e12  # operations per second of an H200 in bfloat16
USED = 0.4  # share of PEAK that a training pass is taken to reach
READ = 4.8e12  # bytes per second of its memory
LINK, NETWORK = 450e9, 50e9  # bytes per second between the GPUs of a node (8), and between nodes
LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)


def forward_operations(shape: Shape, tokens: int, predicted: int) -> int:
    """Of the matrix products of one forward pass, with logits for `predicted` of the tokens.

    Attention's own products are left out.
    """
    body = shape.parameters() - shape.vocabulary * shape.width
    return 2 * (body * tokens + shape.vocabulary * shape.width * predicted)


def summed_bytes(shape: Shape) -> int:
    """Gradients of one step, float32: what goes into the sum over ranks."""
    return 4 * shape.parameters()


def wire_bytes(shape: Shape, gpus: int) -> float:
    """What a ring sends from each GPU for that sum: 2 (n - 1) / n of it."""
    return 2 * (gpus - 1) / gpus * summed_bytes(shape)


def sharded_bytes(shape: Shape, gpus: int) -> float:
    """What a GPU holds with --shard.

    The larger one of what sampling and scoring need, and of what the gradients need.
    """
    n, frozen = shape.parameters(), 8 * shape.parameters()  # start policy and reward model
    # whole and rounded; pieces of the weights and AdamW's state
    sampling = 4 * n + 2 * n + 12 * n / gpus
    outside = shape.vocabulary * shape.width  # embeddings and head: whole, with their gradient
    everything = computed(shape, (MICRO, 0, True, False), PROMPT, COMPLETION, 2, True)
    gathered = 8 * (outside + (n - outside) / shape.layers)
    learning = everything - frozen - 16 * n + 16 * n / gpus + gathered
    return frozen + max(sampling, learning)


def seconds(shape: Shape, gpus: int) -> dict[str, float]:
    """Of the stages of one step."""
    rows = PROMPTS / gpus
    forward = forward_operations(shape, (PROMPT + COMPLETION) * rows, COMPLETION * rows)
    wire = LINK if gpus <= 8 else NETWORK
    return {
        "sample": max(COMPLETION * 2 * shape.parameters() / READ, forward / (PEAK * USED)),
        "start + reward": 2 * forward / (PEAK * USED),
        "train": 3 * forward / (PEAK * USED),
        "sum gradients": wire_bytes(shape, gpus) / wire,
    }


def main() -> None:
    """Print the table."""
    memory, sent = "GiB per GPU | GiB with --shard", "GB sent per GPU and step"
    stages = " | ".join(seconds(LLAMA_8B, 1))
    print(f"| policy | GPUs | {memory} | {sent} | {stages} | step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, shape in (SHAPES | {"8B": LLAMA_8B}).items():
        memory = computed(shape, (MICRO, 0, True, False), PROMPT, COMPLETION, 2, True) / 2**30
        for gpus in (1, 8, 64):
            stages = seconds(shape, gpus)
            sharded = f"{sharded_bytes(shape, gpus) / 2**30:.0f}" if gpus > 1 else ""
            cells = [name, str(gpus), f"{memory:.0f}", sharded]
            cells += [f"{wire_bytes(shape, gpus) / 1e9:.1f}"]
            cells += [f"{value:.2f}" for value in (*stages.values(), sum(stages.values()))]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
