"""Metrics of a policy equal those recomputed by hand, and calibration and intervals equal their definitions."""

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minalign import toy
from minalign.batches import pad
from minalign.chat import TokenizedPrompt, encode
from minalign.evaluate import bootstrap_interval, decode_parts, evaluate_policy, expected_calibration_error, split_end
from minalign.logprobs import exact_kl
from minalign.reward import RewardModel
from minalign.rollout import generate

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
SETTINGS = dict(temperature=0.7, max_new_tokens=12, eos_token_ids=[2, 5])
PROMPTS = ["overall , the plot is", "again , the music is very dull but the cast is", "frankly , the ending is"] * 3
ROWS = [TokenizedPrompt(encode(toy.make_tokenizer(), prompt, end=False)) for prompt in PROMPTS]


def make_policy(seed=0):
    """GPT-2: learned positions, and dropout."""
    torch.manual_seed(seed)
    tokens = len(toy.VOCABULARY)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=tokens, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def world():
    tokenizer = toy.make_tokenizer()
    reward_model = RewardModel.from_backbone(toy.make_model(tokenizer, seed=2), toy.make_tokenizer(), num_labels=5)
    return make_policy(0), make_policy(1), reward_model, tokenizer


def test_metrics_are_those_recomputed_from_the_samples(world):
    policy, start, reward_model, tokenizer = world
    measures = {"words": lambda text: len(text.split())}
    metrics, samples = evaluate_policy(*world, ROWS, seed=3, measures=measures, **SETTINGS)

    rows = [encode(tokenizer, prompt, end=False) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(3)
    rollout = generate(policy, *pad(rows, "left"), pad_token_id=0, generator=generator, **SETTINGS)
    rewards, kls, lengths, ended, bigrams = [], [], [], [], []
    for prompt, row, tokens, mask, sample in zip(PROMPTS, rows, rollout.tokens, rollout.mask, samples, strict=True):
        drawn = tokens[mask].tolist()
        ended.append(drawn[-1] in (2, 5))
        completion = drawn[: len(drawn) - ended[-1]]
        with torch.no_grad():
            logits = [model(torch.tensor([row + drawn])).logits[:, len(row) - 1 : -1] for model in (policy, start)]
        kls.append(exact_kl(*logits, 0.7).sum().item())
        rewards.append(reward_model.read_out(reward_model.logits([row + completion + [2]])).item())
        lengths.append(len(drawn))
        bigrams += zip(completion, completion[1:])
        assert sample.prompt == prompt
        assert sample.prompt + sample.completion == tokenizer.decode(row + completion, skip_special_tokens=True)

    assert 0 < sum(ended) < 9, "the case needs both"
    assert [sample.reward for sample in samples] == pytest.approx(rewards, abs=1e-4)
    assert [sample.kl for sample in samples] == pytest.approx(kls, abs=1e-4)
    assert metrics == pytest.approx({
        "reward": sum(rewards) / 9,
        "kl_sft": sum(kls) / 9,
        "length": sum(lengths) / 9,
        "ended": sum(ended) / 9,
        "distinct_2": len(set(bigrams)) / len(bigrams),
        "words": sum(len((sample.prompt + sample.completion).split()) for sample in samples) / 9,
    }, abs=1e-4)  # fmt: skip
    assert metrics["kl_sft"] > 1


def test_the_batch_size_changes_nothing(world):
    settings = SETTINGS | {"temperature": 1e-4}  # no chance left: other batches draw other random numbers
    metrics, samples = evaluate_policy(*world, ROWS, seed=0, **settings)
    again, in_parts = evaluate_policy(*world, ROWS, seed=0, batch_size=4, **settings)
    assert [sample.prompt for sample in in_parts] == PROMPTS
    assert [sample.completion for sample in in_parts] == [sample.completion for sample in samples]
    assert again == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_start_policy_has_no_kl_to_itself(training, world):
    start = make_policy().train(training)
    metrics, samples = evaluate_policy(start, copy.deepcopy(start), *world[2:], ROWS, seed=0, **SETTINGS)
    assert abs(metrics["kl_sft"]) < 1e-5 and max(abs(sample.kl) for sample in samples) < 1e-5


def test_an_evaluation_repeats_and_its_seed_matters(world):
    first, again, other = (evaluate_policy(*world, ROWS, seed=seed, **SETTINGS) for seed in (0, 0, 1))
    assert first == again and first[1] != other[1]


def test_samples_of_a_prompt_in_two_batches_differ(world):
    """The seed is that of the evaluation, not of each batch."""
    _, samples = evaluate_policy(*world, ROWS, seed=0, batch_size=3, **SETTINGS)
    assert samples[:3] != samples[3:6]


def test_completions_lose_their_end_token_whichever_it_is():
    tokens = torch.tensor([[5, 2, 0, 0], [2, 0, 0, 0], [5, 6, 7, 0], [5, 6, 8, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    completions, ended = split_end(tokens, mask, [2, 7])
    assert completions == [[5], [], [5, 6], [5, 6, 8, 9]] and ended.tolist() == [True, True, True, False]
    mask[3, 2:] = False  # cut by hand, without an end
    completions, ended = split_end(tokens.masked_fill(~mask, 2), mask, [2, 7])  # pad == eos
    assert completions == [[5], [], [5, 6], [5, 6]] and ended.tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["toy", "stories260k"])
def test_prompt_and_completion_join_to_the_whole_text(name):
    """A SentencePiece tokenizer decodes a completion of its own without its first space."""
    if name == "toy":
        tokenizer, text = toy.make_tokenizer(), "overall , the plot is very good ."
    elif STORIES.exists():
        tokenizer, text = AutoTokenizer.from_pretrained(STORIES), "Once upon a time, Tim had a red ball. It was big."
    else:
        pytest.skip(f"needs {STORIES}")
    ids = encode(tokenizer, text, end=True)
    for cut in range(1, len(ids)):
        prompt, completion = decode_parts(tokenizer, ids[:cut], ids[cut:])
        assert prompt + completion == text
        assert prompt == tokenizer.decode(ids[:cut], skip_special_tokens=True)


def test_calibration_error_is_that_of_a_plain_loop():
    rng, bins = random.Random(0), 7
    confidences = [0.5 + rng.random() / 2 for _ in range(300)]
    # Nearly calibrated: bins err in both directions, and coarser ones would cancel them.
    probabilities = [c if rng.random() < c else 1 - c for c in confidences] + [1.0, 0.0, 0.5]
    total = 0.0
    for b in range(bins):
        low, high = 0.5 + b / bins / 2, 0.5 + (b + 1) / bins / 2
        inside = [p for p in probabilities if low <= max(p, 1 - p) < high or (b == bins - 1 and max(p, 1 - p) == 1)]
        accuracy = sum(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in inside) / len(inside)
        confidence = sum(max(p, 1 - p) for p in inside) / len(inside)
        total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    assert total > 0.01
    assert expected_calibration_error(torch.tensor(probabilities), bins) == pytest.approx(total, abs=1e-6)


def test_calibration_error_of_known_predictions(device):
    assert expected_calibration_error(torch.ones(4, device=device)) == 0.0
    assert expected_calibration_error(torch.zeros(4, device=device)) == 1.0  # sure and wrong
    assert expected_calibration_error(torch.full((4,), 0.5, device=device)) == 0.0  # no opinion, half right
    assert expected_calibration_error(torch.full((4,), 0.8, device=device)) == pytest.approx(0.2, abs=1e-6)  # too modest


def test_the_bootstrap_interval_covers_the_mean_in_about_95_of_100():
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, []
    for seed in range(200):
        low, high = bootstrap_interval((3 + torch.randn(50, generator=generator)).tolist(), seed, resamples=200)
        covered += low < 3 < high
        widths.append(high - low)
    assert 0.88 < covered / 200 < 0.985
    assert sum(widths) / 200 == pytest.approx(2 * 1.96 / 50**0.5, rel=0.1)
    values = torch.randn(50, generator=generator).tolist()
    intervals = [bootstrap_interval(values, seed, resamples=50) for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]
