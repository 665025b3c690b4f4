"""What the benchmarks share: shapes, and runs of ours and the peer in turn.

Each run is a fresh process: a benchmark file runs itself with `--once NAME --shape SHAPE`. Such a
run prints one line of JSON: seconds (the median of its steps, the first left out), peak (bytes
above what the imports took) and whatever shows that both did the same work.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

SHAPES = {  # S: small enough to repeat often; M: SmolLM2-135M
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
}


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
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], **ids, **other)), tokenizer


def end_often_(model, chance: float = 1 / 16) -> None:
    """Change a random model's weights so that token 2, the end, comes with about this chance.

    With 1/16 completions have 16 tokens.
    """
    import torch

    embedding = model.get_input_embeddings().weight.data
    shift = torch.randn(embedding.shape[1]) / embedding.shape[1] ** 0.5
    # now every hidden state has a part along `shift`, and every logit the same constant
    embedding += shift
    with torch.no_grad():
        hidden = model.base_model(torch.arange(4, 68)[None]).last_hidden_state[0]
        others = (hidden @ embedding.T).logsumexp(1).mean()
    wanted = others + torch.tensor(chance / (1 - chance)).log()
    embedding[2] = shift * wanted / (hidden @ shift).mean()


def peak() -> int:
    """The process's highest resident memory so far, bytes."""
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
    width, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    attention = 2 * width**2 + 2 * width * head * sizes["num_key_value_heads"]
    layer = attention + 3 * width * sizes["intermediate_size"]
    body = sizes["num_hidden_layers"] * layer * tokens
    return 2 * (body + sizes["vocab_size"] * width * predicted)


def rates() -> tuple[float, float]:
    """Measured on this machine.

    float32 operations per second of large matrix products, and bytes per second of a copy (read +
    written).
    """
    import torch

    a, b, big = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(2**26)
    seconds = [[], []]
    for _ in range(9):
        for kind, work in enumerate((lambda: a @ b, lambda: big.clone())):
            began = time.monotonic()
            work()
            seconds[kind].append(time.monotonic() - began)
    return 2 * 1024**3 / statistics.median(seconds[0]), 8 * 2**26 / statistics.median(seconds[1])


def compare(
    file: str, description: str, once: dict, first: str = "ours", flops=None, bytes_moved=None
) -> None:
    """Parse the command line, and run one side, or all of them in turn.

    Then ratios to `first` are printed, with their range. `flops` and `bytes_moved` (shape ->
    number) are what the work cannot do without: the floor that is printed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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

    print(
        f"shape {arguments.shape}, {arguments.rounds} rounds, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for name, results in runs.items():
        peer = first + ", early" * name.endswith("early")
        ratios = sorted(r["seconds"] / ours["seconds"] for r, ours in zip(results, runs[peer]))
        middle = statistics.median(r["seconds"] for r in results)
        memory = statistics.median(r["peak"] for r in results)
        facts = {key: value for key, value in results[0].items() if key not in ("seconds", "peak")}
        ratio = f"{statistics.median(ratios):5.2f} x {peer} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"{name:28} {middle:8.3f} s  {memory / 2**20:7.0f} MiB  {ratio}  {facts}")
    work = {"operations": flops, "bytes": bytes_moved}
    for (kind, amount), rate in zip(work.items(), rates()):
        if amount:
            needed = amount(arguments.shape)
            per_second = f"{kind} at {rate:.3g} per second"
            print(f"floor: {needed:.3g} {per_second}: {needed / rate:.3f} s")
