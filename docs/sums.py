"""A task whose answers can be checked: sums of two numbers, by a policy that is often wrong.

    python docs/sums.py
    python train_policy.py --model runs/sums/start --dataset runs/sums/sums.jsonl \\
        --rm docs/sums.py:exact --max-new-tokens 4 --steps 400 --batch-size 256 --lr 5e-4 \\
        --beta 0.02 --eval-prompts 300 --out runs/sums/policy

The first command writes all sums of two numbers below 50 with their answers, and a start policy: a
Llama of 0.1 million parameters that knows sums, but answers noisily. The second one trains it by
the reward `exact`. Sums that train_policy.py holds out are in neither's training data.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone, not installed
from minalign.data.splits import held_out


def exact(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """The reward: 1 for the answer and nothing else, 0 for all others."""
    return [float(given == right) for given, right in zip(completions, answer)]


def slip(answer: str, rng: random.Random) -> str:
    """An answer with one digit changed."""
    place = rng.randrange(len(answer))
    other = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
    return answer[:place] + other + answer[place + 1 :]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=16
    )


def make_start_policy(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict], steps: int, seed: int = 0
) -> LlamaForCausalLM:
    """A policy that read sums with their answers, in the last fifth every second one with a slip.

    Args:
        rows: of prompt and answer.
        steps: of AdamW, on 128 sums each.
        seed: of weights, sums and slips.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    policy = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        share = 0.5 if step >= 0.8 * steps else 0.0
        batch = [(row["prompt"], row["answer"]) for row in rng.choices(rows, k=128)]
        texts = [
            text + (slip(right, rng) if rng.random() < share else right) + "<end>"
            for text, right in batch
        ]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # (128, 9): all are as long
        labels = ids.clone()
        labels[:, : len("12+34=")] = -100
        optimizer.zero_grad()
        policy(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def main(folder: str = "runs/sums", steps: int = 800) -> None:
    """Write sums.jsonl and start/ into a folder."""
    rows = [
        {"prompt": f"{a:02}+{b:02}=", "answer": f"{a + b:02}"} for a in range(50) for b in range(50)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = [row for row in rows if not held_out(row["prompt"], seed=0, share=0.1)]
    tokenizer = make_tokenizer()
    policy = make_start_policy(tokenizer, seen, steps)
    policy.save_pretrained(f"{folder}/start")
    tokenizer.save_pretrained(f"{folder}/start")
    print(f"{folder}: {len(rows)} sums; start/ has read {len(seen)} of them in {steps} steps")


if __name__ == "__main__":
    main()
