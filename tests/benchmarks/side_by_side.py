"""What the benchmarks share: shapes, floors, and runs of ours and the peer in turn.

Each run is a fresh process: a benchmark file runs itself with `--once SIDE --shape SHAPE`. Such a
run prints one line of JSON: seconds (the median of its steps, the first left out), peak (bytes
above what the imports took) and whatever shows that both did the same work.

A side is named "WORK: WHO", or WHO alone. The first side of a work is what the others of it are
held against. `all.py` runs every benchmark and writes the table of docs/speed.md.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import machine, spread, store

sys.path.insert(0, str(Path(__file__).parents[2]))

SHAPES = {  # S: small enough to repeat often; M: SmolLM2-135M; L: SmolLM2-1.7B
    "S": dict(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "M": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "L": dict(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}

_device = "cpu"  # of this process; `compare` sets it


def device():
    """The torch.device that this process measures."""
    import torch

    return torch.device(_device)


def clock() -> float:
    """Seconds; on a GPU once all that was begun is done."""
    if _device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def make_model(shape: str):
    """A Llama with random weights and a tokenizer of one word per id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    words = [*special.values(), *(f"w{i}" for i in range(4, SHAPES[shape]["vocab_size"]))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    other = dict(tie_word_embeddings=True, max_position_embeddings=2048)
    with device():  # a GPU draws the weights of L in a second, a CPU in half a minute
        return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **ids, **other)), tokenizer


def end_often_(model, chance: float = 1 / 16) -> None:
    """Change a random model's weights so that token 2, the end, comes with about this chance.

    With 1/16 completions have 16 tokens.
    """
    import torch

    embedding = model.get_input_embeddings().weight.data
    shift = torch.randn_like(embedding[0]) / embedding.shape[1] ** 0.5
    # now every hidden state has a part along `shift`, and every logit the same constant
    embedding += shift
    with torch.no_grad():
        ids = torch.arange(4, 68, device=model.device)[None]
        hidden = model.base_model(ids).last_hidden_state[0]
        others = (hidden @ embedding.T).logsumexp(1).mean()
    wanted = others + torch.tensor(chance / (1 - chance)).log()
    embedding[2] = shift * wanted / (hidden @ shift).mean()


def peak() -> int:
    """The process's highest resident memory so far, or that of its tensors on a GPU, bytes."""
    if _device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(seconds: list[float], memory: int, **facts) -> None:
    """The line of JSON of one run."""
    middle = statistics.median(seconds[1:] or seconds)
    print("RESULT " + json.dumps({"seconds": middle, "peak": memory, **facts}))


def forward_flops(shape: str, tokens: int, predicted: int) -> int:
    """Multiplications and additions of the matrix products of one forward pass.

    With logits for `predicted` of the tokens.
    """
    sizes = SHAPES[shape]
    body = (weights(shape) - sizes["vocab_size"] * sizes["hidden_size"]) * tokens
    return 2 * (body + sizes["vocab_size"] * sizes["hidden_size"] * predicted)


def weights(shape: str) -> int:
    """Numbers in the matrices of a model, the LM head's among them."""
    sizes = SHAPES[shape]
    width, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    attention = 2 * width**2 + 2 * width * head * sizes["num_key_value_heads"]
    layer = attention + 3 * width * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * layer + sizes["vocab_size"] * width


def sampling_floor(shape: str, work: str, prompts: int, rows: int, prompt: int, new: int) -> list:
    """Phases of a floor, see `compare`: one pass over the prompts, then one for each token.

    Every pass reads all weights, and the first token of a completion comes from the prompt's.
    """
    size = weights(shape) * (2 if "bfloat16" in work else 4)
    prefill = forward_flops(shape, prompts * prompt, prompts)
    decode = forward_flops(shape, rows * (new - 1), rows * (new - 1))
    return [(prefill, size), (decode, size * (new - 1))]


@functools.cache
def rates(dtype: str, block: int) -> tuple[float, float]:
    """Measured on this machine: operations per second of large matrix products in `dtype`.

    And bytes per second of reading and writing `block` bytes again and again: weights that stay in
    the processor's cache are read faster than others. The best of nine: it is a floor.
    """
    import torch

    def best(work, times):
        samples = []
        for _ in range(9):
            began = clock()
            for _ in range(times):
                work()
            samples.append((clock() - began) / times)
        return min(samples)

    size = 8192 if _device == "cuda" else 1024
    block = min(block, 2**28) // 2  # bytes
    with device():
        a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
        source, target = (torch.zeros(block // 4) for _ in range(2))
    per_copy = best(lambda: target.copy_(source), 1 + 2**26 // block)
    return 2 * size**3 / best(lambda: a @ b, 1), 2 * block / per_copy


def run_side(file: str, side: str, shape: str) -> dict | None:
    """The line of JSON of one run in a fresh process; None, and why on stderr, where it failed."""
    command = [sys.executable, file, "--once", side, "--shape", shape, "--device", _device]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT ") and done.returncode == 0:
            return json.loads(line.removeprefix("RESULT "))
    print(f"{side} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return None


def in_turn(file: str, sides: list[str], shape: str, rounds: int) -> list[dict]:
    """Run the sides in turn, `rounds` times; one that fails takes no further part.

    Returns:
        One record per side that ran, see `all.py`.
    """
    runs = {side: [] for side in sides}
    for _ in range(rounds):
        for side in list(runs):
            result = run_side(file, side, shape)
            if result is None:
                del runs[side]
            else:
                runs[side].append(result)
    where = {
        "benchmark": Path(file).stem,
        "device": _device,
        "shape": shape,
        "machine": machine(_device),
    }
    records = []
    for side, results in runs.items():
        work, _, who = side.rpartition(": ")
        first = next(other for other in sides if other.rpartition(": ")[0] == work)
        facts = {key: value for key, value in results[0].items() if key not in ("seconds", "peak")}
        numbers = {
            "seconds": statistics.median(result["seconds"] for result in results),
            "peak": statistics.median(result["peak"] for result in results),
            "ratios": sorted(
                a["seconds"] / b["seconds"] for a, b in zip(results, runs.get(first, []))
            ),
            "rounds": len(results),
        }
        records.append(where | {"work": work, "who": who} | numbers | {"facts": facts})
    return records


def add_floors(records: list[dict], floor) -> None:
    """Give the first record of each work that has a floor its seconds, and print their parts."""
    seen = set()
    for record in records:
        work, shape = record["work"], record["shape"]
        phases = floor(shape, work) if work not in seen else []
        seen.add(work)
        for operations, size in phases:
            dtype = "bfloat16" if "bfloat16" in work else "float32"
            block = weights(shape) * (2 if dtype == "bfloat16" else 4)
            per_second = rates(dtype, block)
            parts = [operations / per_second[0], size / per_second[1]]
            record["floor"] = record.get("floor", 0.0) + max(parts)
            print(
                f"floor{work and ' of '}{work}: {operations:.3g} operations at "
                f"{per_second[0]:.3g} per second: {parts[0]:.3f} s; {size:.3g} bytes at "
                f"{per_second[1]:.3g} per second: {parts[1]:.3f} s"
            )


def compare(
    file: str, description: str, sides: dict, floor=None, shape: str = "S", devices=("cpu",)
) -> None:
    """Parse the command line, and run one side, or all of them in turn.

    Then seconds, memory and ratios to the first side of the same work are printed, with their
    range. The exit status is 1 where a side failed.

    Args:
        sides: name -> function of the shape, which measures and calls `report`.
        floor: (shape, work) -> what the work cannot do without, phase by phase: pairs of operations
            and bytes. A phase takes as long as the slower of the two. No phases: not known.
        shape: the one that is measured unless told.
        devices: those that the sides can be measured on.
    """
    global _device
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--results", help="JSON file that takes the figures, see all.py")
    parser.add_argument("--once", choices=sides, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected 1 or more")
    _device = arguments.device
    if _device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU here")
    if arguments.once:
        sides[arguments.once](arguments.shape)
        return
    records = in_turn(file, list(sides), arguments.shape, arguments.rounds)
    print(f"shape {arguments.shape}, {arguments.rounds} rounds, {machine(_device)}")
    for record in records:
        name = f"{record['work']}: {record['who']}".removeprefix(": ")
        memory, ratio = f"{record['peak'] / 2**20:7.0f} MiB", spread(record["ratios"])
        print(f"{name:32} {record['seconds']:8.3f} s  {memory}  {ratio:18}  {record['facts']}")
    if floor:
        add_floors(records, floor)
    if arguments.results and records:
        store(records, Path(arguments.results))
    if len(records) < len(sides):
        raise SystemExit(1)
