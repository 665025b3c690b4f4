"""Activation checkpoints change no gradient and no sample."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from minalign.data import toy
from minalign.logprobs import token_logprobs
from minalign.models.activations import checkpoint_activations_
from minalign.rollout import completion_logits, generate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_activations_change_no_gradient_and_no_sample(kind):
    """Dropout stays off, and the layers run again in the backward pass.

    The key-value cache is filled once.
    """
    torch.manual_seed(0)
    if kind == "llama":
        model = toy.make_model(toy.make_tokenizer(), seed=0)
    else:
        config = GPT2Config(vocab_size=43, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config)
    ids = torch.randint(4, 43, (3, 9))
    inputs = ids[:, :4], torch.ones(3, 4), ids[:, 4:], torch.ones(3, 5, dtype=torch.bool)

    def gradient_and_samples(model):
        calls = []
        mlp = (model.base_model.layers if kind == "llama" else model.base_model.h)[0].mlp
        hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model.zero_grad()
        (-token_logprobs(completion_logits(model.train(), *inputs), ids[:, 4:])).mean().backward()
        hook.remove()
        assert all(module.training for module in model.modules())
        drawn = generate(
            model,
            ids,
            torch.ones_like(ids),
            max_new_tokens=6,
            temperature=1.0,
            eos_token_ids=2,
            pad_token_id=0,
            generator=torch.Generator().manual_seed(0),
        )
        return [p.grad.clone() for p in model.parameters()], drawn.tokens, len(calls)

    gradients, tokens, calls = gradient_and_samples(model)
    checkpoint_activations_(model)
    again, tokens_again, calls_again = gradient_and_samples(model)
    assert (calls, calls_again) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert torch.equal(tokens, tokens_again)

    # What the moving anchor is made by: it must not run the layers of the first.
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert completion_logits(twin, *inputs).abs().max() == 0 and twin is not model
    assert completion_logits(model, *inputs).abs().max() > 0
