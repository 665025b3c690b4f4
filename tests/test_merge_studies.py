"""What the studies of merges and of samples in 16 bits compute, a second way."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import diverse_rewards
import merge_methods
import sampling_precision
from exact_world import sequence_logprobs, truth
from seeds import bootstrap

from minalign.data.chat import TokenizedPrompt
from minalign.merge import merge_policies
from minalign.models.sampler import Samples
from minalign.tools.task_vectors import with_moves


def test_half_of_the_weights_pass_the_median():
    draws = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(30, 40, generator=draws), "b": torch.randn(50, generator=draws)}
    scales = (1.0, 0.3)
    thetas = [
        {name: w + scale * torch.randn(w.shape, generator=draws) for name, w in start.items()}
        for scale in scales
    ]
    threshold = merge_methods.median_move(start, thetas)
    _, report = merge_policies(start, thetas)
    moved = with_moves(report, start, thetas, "layer", threshold)["total"]["moved"]
    assert sum(moved) / 2 == pytest.approx(0.5, abs=1e-3)
    assert moved[0] > 0.6 > 0.4 > moved[1]


@pytest.fixture(scope="module")
def scene():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diverse_rewards, "PROXIES", 2)
        yield diverse_rewards.scene(100)


def test_proxies_are_truth_and_noise_of_its_size(scene):
    world, proxies = scene
    p = sequence_logprobs(world.start).exp()

    def covariance(a, b):
        a, b = (x - (p * x).sum(1, keepdim=True) for x in (a, b))
        return (p * a * b).sum(1)  # of each prompt

    noises = proxies - world.rewards
    for noise in noises:
        torch.testing.assert_close((p * noise).sum(1), torch.zeros(4).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(covariance(noise, noise), torch.ones(4).double())
        aside = covariance(noise, world.rewards)
        torch.testing.assert_close(aside, torch.zeros(4).double(), atol=1e-5, rtol=0)
    assert covariance(*noises).abs().max() < 0.7  # other noises


def test_front_by_truth_and_by_each_proxy(scene, monkeypatch):
    world, proxies = scene
    monkeypatch.setattr(diverse_rewards, "ETAS", (1.0,))
    away = copy.deepcopy(world.start)
    draws = torch.Generator().manual_seed(0)
    for weight in away.parameters():
        weight.data += weight.data.std() * torch.randn(weight.shape, generator=draws)
    nothing, point = diverse_rewards.front(world, proxies, away.state_dict())
    assert nothing["proxies"] == [0.0, 0.0] and nothing["kl"] == 0.0
    expected = truth(world, away)
    assert point["kl"] == pytest.approx(expected["kl"], rel=1e-6) and point["kl"] > 0.1
    assert point["reward"] == pytest.approx(expected["reward"], rel=1e-6)
    p, p_start = sequence_logprobs(away).exp(), sequence_logprobs(world.start).exp()
    for proxy, found in zip(proxies, point["proxies"]):
        by_prompt = [(p[x] - p_start[x]) @ proxy[x].double() for x in range(4)]
        assert found == pytest.approx(sum(by_prompt).item() / 4, rel=1e-6)
    judged = diverse_rewards.by([nothing, point], [0, 1])
    assert judged[1]["reward"] == pytest.approx(sum(point["proxies"]) / 2)


ENDS = [5, 6]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, eos_token_id=ENDS, **sizes)).eval()
    model.lm_head.weight.data *= 20
    return model.requires_grad_(False)


def samples_of(tokens, mask):
    count = len(tokens)
    begin = torch.ones(count, 1, dtype=torch.long)
    rest = (torch.zeros(count), torch.zeros(count), torch.zeros(count))
    return Samples(
        [TokenizedPrompt([1])] * count, [], rest[0], begin, begin, tokens, mask, *rest[1:]
    )


def test_scores_are_derivatives_of_the_logprob(model, monkeypatch):
    tokens = torch.tensor([[3, 2, 3, 6], [3, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    monkeypatch.setattr(sampling_precision, "COUNT", 2)
    found = sampling_precision.tokens_of(model, samples_of(tokens, mask), 3, ENDS)
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), tokens], 1)
    logits = model(input_ids=ids).logits[:, :-1].double()  # (2, 4, V)
    directions = {"log-prob": logits, "word": torch.zeros(9), "end": torch.zeros(9)}
    directions["word"][3] = directions["end"][5] = directions["end"][6] = 1
    for name, direction in directions.items():

        def logprob(theta, direction=direction):
            moved = (logits + theta * direction).log_softmax(2)
            return moved.gather(2, tokens[:, :, None])[:, :, 0] * mask

        derivative = (logprob(1e-4) - logprob(-1e-4)) / 2e-4
        torch.testing.assert_close(found[name][1].double(), derivative, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["log-prob"][0].double(), logprob(0.0), atol=1e-5, rtol=1e-4)
    assert found["word"][0].tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert found["end"][0].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_weights_have_the_bias_that_their_equations_say():
    log_ratio = torch.tensor([[1.0, 0.5], [-0.4, 9.0], [0.8, -0.1], [0.8, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    found = sampling_precision.weights(log_ratio, mask)
    e = torch.tensor([1.5, -0.4, 0.7, 0.8]).exp()
    torch.testing.assert_close(found["exact"][:, 0], e)
    torch.testing.assert_close(found["sequence"][:, 0], e.clamp(max=2))
    torch.testing.assert_close(found["mask"][:, 0], torch.tensor([0.0, *e[1:]]))
    torch.testing.assert_close(found["token"][0], torch.tensor([2.0, 0.5]).exp().clamp(max=2))
    assert found["none"].tolist() == [[1.0]] * 4
    facts = sampling_precision.facts(log_ratio.masked_fill(~mask, 0), mask, found)
    assert facts["sequence: cut"] == pytest.approx(3 / 4)
    assert facts["mask: cut"] == pytest.approx(1 / 4)
    assert facts["token: cut"] == pytest.approx(3 / 7)
    assert facts["tokens"] == pytest.approx(7 / 4)
    w = found["sequence"][:, 0]
    assert facts["sequence: ESS"] == pytest.approx((w.sum() ** 2 / (w @ w) / 4).item(), rel=1e-6)


def test_the_drawn_ratio_is_that_of_float32_to_bfloat16(model, monkeypatch):
    """mu sums to 1 over the vocabulary, so that the mean ratio under it is 1."""
    for name, value in {"COUNT": 1000, "LENGTHS": (2,)}.items():
        monkeypatch.setattr(sampling_precision, name, value)
    monkeypatch.setattr(sampling_precision, "encode", lambda *_, **__: [1])
    monkeypatch.setattr(sampling_precision, "end_token_ids", lambda *_: ENDS)
    samples, log_ratio = sampling_precision.draw(model, None, "bfloat16", 0)
    assert 1e-4 < log_ratio.abs().mean() < 0.05
    ratio = bootstrap(log_ratio.sum(1).exp().tolist(), draws=200)
    assert ratio["low"] - 1e-3 < 1 < ratio["high"] + 1e-3
    assert (log_ratio[~samples.mask] == 0).all()
    _, same = sampling_precision.draw(model, None, "float32", 0)
    assert (same == 0).all()
