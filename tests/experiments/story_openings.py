"""Openings of stories, drawn from a language model itself, as prompts for train_policy.py.

python tests/experiments/story_openings.py --model path --count 600 --out openings.jsonl
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from minalign.data.chat import encode
from minalign.models.loading import end_token_ids, load_policy
from minalign.models.padding import pad
from minalign.rollout import generate, split_end

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", required=True)
parser.add_argument("--count", type=int, default=600)
parser.add_argument("--out", type=Path, required=True)
arguments = parser.parse_args()

model, tokenizer = load_policy(arguments.model)
ends = end_token_ids(model, tokenizer)
begin = [encode(tokenizer, "", end=False) or [tokenizer.bos_token_id]] * arguments.count
special = dict(eos_token_ids=ends, pad_token_id=tokenizer.pad_token_id)
how = dict(max_new_tokens=24, temperature=1.0, generator=torch.Generator().manual_seed(0))
tokens, mask, _ = generate(model, *pad(begin, "left"), **special, **how)
rng = random.Random(0)
openings = {}
for ids in split_end(tokens, mask, ends)[0]:
    words = tokenizer.decode(ids, skip_special_tokens=True).split()[:-1]  # the last word may be cut
    openings[" ".join(words[: rng.randint(4, 9)])] = None
rows = [{"prompt": opening} for opening in openings if opening]
arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
print(f"{len(rows)} different openings in {arguments.out}, such as {rows[0]['prompt']!r}")
