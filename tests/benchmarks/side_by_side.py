"""What the benchmarks share: shapes, and runs of ours and the peer in turn, each in a fresh process.

A benchmark file runs itself with `--once NAME SHAPE`; such a run prints one line of JSON: seconds (the median of its steps, the
first left out), peak (bytes above what the imports took) and whatever shows that both did the same work.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

SHAPES = {  # S: small enough to repeat often; M: SmolLM2-135M
    "S": dict(vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4),
    "M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
}  # fmt: skip


def make_model(shape: str):
    """A Llama with random weights and a tokenizer of one word an id."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3", padding_side="left"
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(
        LlamaConfig(**SHAPES[shape], **ids, tie_word_embeddings=True, max_position_embeddings=2048)
    ), tokenizer


def peak() -> int:
    """The process's highest resident memory so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(seconds: list[float], memory: int, **facts) -> None:
    """The line of JSON of one run."""
    print("RESULT " + json.dumps({"seconds": statistics.median(seconds[1:] or seconds), "peak": memory, **facts}))


def compare(file: str, description: str, once: dict, first: str = "ours") -> None:
    """Parse the command line; run one side, or all of them in turn and print ratios to `first` with their range."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--once", choices=once, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        once[arguments.once](arguments.shape)
        return
    runs = {name: [] for name in once}
    for _ in range(arguments.rounds):
        for name in once:
            command = [sys.executable, file, "--once", name, "--shape", arguments.shape]
            done = subprocess.run(command, capture_output=True, text=True)
            line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not line:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            runs[name].append(json.loads(line[0].removeprefix("RESULT ")))
    import torch
    import transformers

    print(f"shape {arguments.shape}, {arguments.rounds} rounds, {platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    for name, results in runs.items():
        ratios = sorted(r["seconds"] / ours["seconds"] for r, ours in zip(results, runs[first]))
        middle = statistics.median(r["seconds"] for r in results)
        memory = statistics.median(r["peak"] for r in results)
        facts = {key: value for key, value in results[0].items() if key not in ("seconds", "peak")}
        print(
            f"{name:28} {middle:8.3f} s  {memory / 2**20:7.0f} MiB  {statistics.median(ratios):5.2f} x {first} [{ratios[0]:.2f}, {ratios[-1]:.2f}]  {facts}"
        )
