"""The arithmetic of tests/experiments/scale.py.

It is compared with the products that torch counts, and with the bytes that are summed over ranks.
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "experiments"))

from memory import Shape
from scale import forward_operations, summed_bytes, wire_bytes

from minalign.running.ranks import Ranks

SHAPE = Shape(layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocabulary=50)


def make_model():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def products(counter):
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "mm" in str(operation))


def test_operations_of_a_forward_pass_and_of_its_backward():
    model, ids = make_model(), torch.randint(0, 50, (3, 7))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, logits_to_keep=4).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    # Q K^T and its product with V, where they are counted as products
    attention = 2 * 2 * (3 * 4 * 7 * 7 * 8) * SHAPE.layers
    rotary = 2 * 7 * 4  # the angles: a product in older transformers
    expected = forward_operations(SHAPE, 21, 12)
    assert products(forward) - expected in (0, attention, rotary, attention + rotary)
    assert 2 * expected <= products(backward) + 1e-9 <= 2 * (expected + attention)


def test_bytes_that_are_summed(monkeypatch):
    model, sent = make_model(), []
    model(torch.randint(0, 50, (1, 5))).logits.sum().backward()

    def all_reduce(tensor, group=None):
        sent.append(tensor.nbytes)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    Ranks(0, 8).sum_([parameter.grad for parameter in model.parameters()])
    norms = 4 * 32 * (2 * SHAPE.layers + 1)  # scale.py counts matrices alone
    assert sum(sent) == summed_bytes(SHAPE) + norms
    assert wire_bytes(SHAPE, 8) == 2 * 7 / 8 * summed_bytes(SHAPE)
