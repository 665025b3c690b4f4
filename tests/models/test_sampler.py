"""What a Sampler draws is what rollout.generate draws, and shares make up the whole batch."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch

from minalign import rollout
from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, encode
from minalign.models.padding import pad
from minalign.models.sampler import Sampler

TOKENIZER = toy.make_tokenizer()
CONFIG = SimpleNamespace(
    seed=3,
    temperature=0.8,
    max_new_tokens=7,
    micro_batch_size=3,
    sampler_dtype="auto",
    importance="sequence",
    importance_limit=2.0,
)


@pytest.fixture
def policy():
    return toy.make_model(TOKENIZER, seed=0)


def prompts(count=6):
    rng = random.Random(0)
    return [
        TokenizedPrompt(encode(TOKENIZER, toy.write_prompt(rng), end=False)) for _ in range(count)
    ]


def test_samples_are_those_of_generate_with_the_policys_own_logprobs(policy):
    samples = Sampler(policy, [2, 9], CONFIG, torch.float32).sample(prompts())
    ids, mask = pad([prompt.ids for prompt in prompts()], "left")
    uniforms = rollout.draw_uniforms(6, 7, policy.device, torch.Generator().manual_seed(3))
    tokens, real, logprobs = rollout.generate(
        policy,
        ids,
        mask,
        max_new_tokens=7,
        temperature=0.8,
        eos_token_ids=[2, 9],
        pad_token_id=0,
        uniforms=uniforms,
    )
    assert torch.equal(samples.tokens, tokens) and torch.equal(samples.mask, real)
    assert torch.equal(samples.logprobs, logprobs) and (samples.importance == 1).all()
    again = rollout.sequence_logprobs(policy, *samples.rows(), 0.8)
    torch.testing.assert_close(samples.logprobs, again.detach(), rtol=0, atol=1e-5)
    for row, completion, ended in zip(tokens, samples.completions, samples.ended):
        drawn = row[: len(completion) + 1].tolist()
        assert completion == drawn[: len(completion)] and (drawn[-1] in (2, 9)) == bool(ended)
        assert not {2, 9} & set(completion)
    assert samples.lengths == [len(p.ids) + n for p, n in zip(prompts(), real.sum(1).tolist())]
    two = samples.rows([4, 1])
    assert torch.equal(two[2], tokens[[4, 1]]) and len(two) == 4


def test_the_next_batch_has_other_numbers_and_the_same_seed_the_same(policy):
    sampler = Sampler(policy, [2], CONFIG, torch.float32)
    first, second = sampler.sample(prompts()), sampler.sample(prompts())
    again = Sampler(policy, [2], CONFIG, torch.float32).sample(prompts())
    assert first.completions == again.completions != second.completions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shares_of_two_processes_make_up_the_batch(policy, dtype):
    whole = Sampler(policy, [2], CONFIG, dtype).sample(prompts())
    parts = [
        Sampler(policy, [2], CONFIG, dtype, mine).sample(prompts())
        for mine in (slice(0, 3), slice(3, 6))
    ]
    assert [p for part in parts for p in part.prompts] == whole.prompts
    assert [c for part in parts for c in part.completions] == whole.completions


@pytest.mark.parametrize("dtypes", [("auto", "bfloat16"), ("bfloat16", "float32")])
def test_rounded_weights_draw_and_the_policy_says_how_likely(policy, dtypes):
    """Weights are rounded anew for each batch."""
    config = SimpleNamespace(**vars(CONFIG) | {"sampler_dtype": dtypes[0]})
    dtype = getattr(torch, dtypes[1])
    sampler = Sampler(policy, [2], config, dtype)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    samples = sampler.sample(prompts())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = rollout.frozen_logprobs(policy, *samples.rows(), 0.8, 3)
    assert torch.equal(samples.logprobs, expected)
    assert (samples.importance != 1).any() and (samples.importance.log().abs() < 0.5).all()
    assert not samples.logprobs.requires_grad
    copied = copy.deepcopy(policy)
    for parameter in copied.parameters():
        parameter.data = parameter.data.bfloat16().float()
    drawn = rollout.frozen_logprobs(copied, *samples.rows(), 0.8, 3)
    ratio = (samples.logprobs - drawn).sum(1).exp()
    assert (ratio.log() - samples.importance[:, 0].log()).abs().max() < 0.2
