"""What only a GPU can show; skipped without one.

(The numerical tests run on it, too, by their `device` fixture.)
"""

import json

import pytest
import torch

import train_policy
import train_rm
from minalign.data import toy
from minalign.data.chat import encode
from minalign.models.padding import pad
from minalign.rollout import frozen_logprobs, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_sampling_logprobs_are_scored_again_on_the_gpu():
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=0).cuda()
    prompts = toy.prompts(seed=0, eval_share=0.1, count=64)[0]
    ids, mask = pad([encode(tokenizer, prompt, end=False) for prompt in prompts], "left", "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    how = dict(max_new_tokens=20, temperature=0.7, eos_token_ids=[2], pad_token_id=0)
    tokens, kept, logprobs = generate(model, ids, mask, **how, generator=generator)
    again = frozen_logprobs(model, ids, mask, tokens, kept, temperature=0.7, micro_batch_size=16)
    torch.testing.assert_close(again.masked_fill(~kept, 0.0), logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loops_learn_on_the_gpu(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    gpu = f"--device cuda --dtype {dtype}"
    train_rm.main(f"{gpu} --out rm".split())
    train_policy.main(f"{gpu} --rm rm --steps 70 --out policy".split())
    results = json.loads((tmp_path / "policy/results.json").read_text())
    assert results["after"]["gold"] > results["before"]["gold"] + 1
    first = json.loads((tmp_path / "policy/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl_sft"]) < 1e-3  # in bfloat16, too: both sides come from the same pass


VARIANTS = [
    "--lora-rank 8 --lr 2e-3",
    "--lora-rank 8 --anchor ema --gradient-checkpointing --micro-batch-size 16",
    "--gradient-checkpointing --anchor ema --baseline rloo",
    "--rm rules:short --rm-weights 1 0.5",
]


@pytest.mark.parametrize("flags", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variant_starts_where_the_start_policy_is(tmp_path, monkeypatch, dtype, flags):
    monkeypatch.chdir(tmp_path)
    rule = "def short(p, c):\n    return [-len(text) / 10 for text in c]\n"
    (tmp_path / "rules.py").write_text(rule)
    gpu = f"--device cuda --dtype {dtype}"
    train_rm.main(f"{gpu} --steps 20 --out rm".split())
    train_policy.main(f"{gpu} --rm rm {flags} --steps 3 --out policy".split())
    first = json.loads((tmp_path / "policy/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl_sft"]) < 1e-3
