"""Metrics of a policy equal those recomputed by hand, calibration equals its definition."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, decode_parts, encode
from minalign.logprobs import exact_kl, kl_k1, token_entropy, token_logprobs
from minalign.measuring.measures import distinct_n, repetition, self_similarity
from minalign.measuring.pairs import expected_calibration_error
from minalign.measuring.policies import measure_policy
from minalign.models.padding import pad
from minalign.reward import RewardModel
from minalign.rollout import generate, sample_completions, split_end
from minalign.running.errors import one_line_errors
from minalign.task import Task
from minalign.tools import evaluate, policies_compared

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
SETTINGS = dict(temperature=0.7, max_new_tokens=12, eos_token_ids=[2, 5])
PROMPTS = [
    "overall , the plot is",
    "again , the music is very dull but the cast is",
    "frankly , the ending is",
] * 3
ROWS = [TokenizedPrompt(encode(toy.make_tokenizer(), prompt, end=False)) for prompt in PROMPTS]


def make_policy(seed=0):
    """GPT-2: learned positions, and dropout."""
    torch.manual_seed(seed)
    sizes = dict(n_positions=48, n_embd=32, n_layer=2, n_head=2)
    config = GPT2Config(vocab_size=len(toy.VOCABULARY), initializer_range=0.3, **sizes)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def world():
    tokenizer = toy.make_tokenizer()
    backbone = toy.make_model(tokenizer, seed=2)
    reward_model = RewardModel.from_backbone(backbone, toy.make_tokenizer(), num_labels=5)
    return make_policy(0), make_policy(1), reward_model, tokenizer


def measure(policy, start, reward, tokenizer, rows, *, eos_token_ids, measures=None, **settings):
    task = Task(start, tokenizer, reward, [], rows, None, eos_token_ids, measures or {})
    return measure_policy(policy, task, **settings)[:2]


@torch.no_grad()
def logits_by_hand(models, prompt, completion):
    """Those that each model's plain forward gives for the completion of one row, (1, T, V)."""
    ids = torch.tensor([prompt + completion])
    return [model(ids).logits[:, len(prompt) - 1 : -1] for model in models]


def test_metrics_are_those_recomputed_from_the_samples(world):
    policy, start, reward_model, tokenizer = world
    measures = {"words": lambda text: len(text.split())}
    metrics, samples = measure(*world, ROWS, seed=3, measures=measures, **SETTINGS)

    rows = [encode(tokenizer, prompt, end=False) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(3)
    rollout = generate(policy, *pad(rows, "left"), pad_token_id=0, generator=generator, **SETTINGS)
    rewards, kls, lengths, ended, bigrams = [], [], [], [], []
    for prompt, row, tokens, mask, sample in zip(
        PROMPTS, rows, rollout.tokens, rollout.mask, samples, strict=True
    ):
        drawn = tokens[mask].tolist()
        ended.append(drawn[-1] in (2, 5))
        completion = drawn[: len(drawn) - ended[-1]]
        logits = logits_by_hand((policy, start), row, drawn)
        kls.append(exact_kl(*logits, 0.7).sum().item())
        rewards.append(reward_model.read_out(reward_model.logits([row + completion + [2]])).item())
        lengths.append(len(drawn))
        bigrams += zip(completion, completion[1:])
        assert sample.prompt == prompt
        text = tokenizer.decode(row + completion, skip_special_tokens=True)
        assert sample.prompt + sample.completion == text

    assert 0 < sum(ended) < 9, "the case needs both"
    assert [sample.reward for sample in samples] == pytest.approx(rewards, abs=1e-4)
    assert [sample.kl for sample in samples] == pytest.approx(kls, abs=1e-4)
    words = [len((sample.prompt + sample.completion).split()) for sample in samples]
    expected = {
        "reward": sum(rewards) / 9,
        "kl_sft": sum(kls) / 9,
        "length": sum(lengths) / 9,
        "ended": sum(ended) / 9,
        "distinct_2": len(set(bigrams)) / len(bigrams),
        "words": sum(words) / 9,
    }
    assert metrics == pytest.approx(expected, abs=1e-4)
    assert metrics["kl_sft"] > 1


def test_the_batch_size_changes_nothing(world):
    # no chance left: other batches draw other random numbers
    settings = SETTINGS | {"temperature": 1e-4}
    metrics, samples = measure(*world, ROWS, seed=0, **settings)
    again, in_parts = measure(*world, ROWS, seed=0, batch_size=4, **settings)
    assert [sample.prompt for sample in in_parts] == PROMPTS
    assert [sample.completion for sample in in_parts] == [sample.completion for sample in samples]
    assert again == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_the_start_policy_has_no_kl_to_itself(training, world):
    start = make_policy().train(training)
    metrics, samples = measure(start, copy.deepcopy(start), *world[2:], ROWS, seed=0, **SETTINGS)
    assert abs(metrics["kl_sft"]) < 1e-5 and max(abs(sample.kl) for sample in samples) < 1e-5


def test_an_evaluation_repeats_and_its_seed_matters(world):
    first, again, other = (measure(*world, ROWS, seed=seed, **SETTINGS) for seed in (0, 0, 1))
    assert first == again and first[1] != other[1]


def test_samples_of_a_prompt_in_two_batches_differ(world):
    """The seed is that of the evaluation, not of each batch."""
    _, samples = measure(*world, ROWS, seed=0, batch_size=3, **SETTINGS)
    assert samples[:3] != samples[3:6]


def test_completions_lose_their_end_token_whichever_it_is():
    tokens = torch.tensor([[5, 2, 0, 0], [2, 0, 0, 0], [5, 6, 7, 0], [5, 6, 8, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    completions, ended = split_end(tokens, mask, [2, 7])
    assert completions == [[5], [], [5, 6], [5, 6, 8, 9]]
    assert ended.tolist() == [True, True, True, False]
    mask[3, 2:] = False  # cut by hand, without an end
    completions, ended = split_end(tokens.masked_fill(~mask, 2), mask, [2, 7])  # pad == eos
    assert completions == [[5], [], [5, 6], [5, 6]] and ended.tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["toy", "stories260k"])
def test_prompt_and_completion_join_to_the_whole_text(name):
    """A SentencePiece tokenizer decodes a completion of its own without its first space."""
    if name == "toy":
        tokenizer, text = toy.make_tokenizer(), "overall , the plot is very good ."
    elif STORIES.exists():
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        text = "Once upon a time, Tim had a red ball. It was big."
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
        if b == bins - 1:
            high = 1.1  # the last bin has the sure ones, too
        inside = [p for p in probabilities if low <= max(p, 1 - p) < high]
        accuracy = sum(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in inside) / len(inside)
        confidence = sum(max(p, 1 - p) for p in inside) / len(inside)
        total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    assert total > 0.01
    found = expected_calibration_error(torch.tensor(probabilities), bins)
    assert found == pytest.approx(total, abs=1e-6)


def test_calibration_error_of_known_predictions(device):
    def error(probability):
        return expected_calibration_error(torch.full((4,), probability, device=device))

    assert error(1.0) == 0.0
    assert error(0.0) == 1.0  # sure and wrong
    assert error(0.5) == 0.0  # no opinion, half right
    assert error(0.8) == pytest.approx(0.2, abs=1e-6)  # too modest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the toy world, a reward function, and two policies, of which one loops.

    The toy world's start policy is not fitted.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer = toy.make_tokenizer()
        loop, other = toy.make_model(tokenizer, seed=0), toy.make_model(tokenizer, seed=0)
        with torch.no_grad():
            # No layer does anything, and every token is followed by one of its likes.
            for layer in loop.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            loop.model.embed_tokens.weight.zero_()[:, 0] = 0.1
            loop.model.embed_tokens.weight[10, 0] = 10.0
            for parameter in other.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
        start = toy.make_model(tokenizer, seed=0)
        paths = {toy.folder() / "start-policy": start, "other": other, "loop": loop}
        for path, model in paths.items():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    (folder / "rules_of_evaluate.py").write_text(
        "def words(prompts, completions):\n"
        "    return [len(p.split()) + 0.1 * len(c.split()) for p, c in zip(prompts, completions)]\n"
    )
    return folder


FLAGS = "--rm rules_of_evaluate:words --device cpu --eval-prompts 24 --max-new-tokens 12".split()


def run_cli(folder, monkeypatch, flags):
    monkeypatch.chdir(folder)
    evaluate.main([*FLAGS, *flags.split()])


def test_the_command_line_compares_policies(folders, monkeypatch, capsys):
    run_cli(folders, monkeypatch, "--model other loop --out both")
    output = capsys.readouterr().out
    results = json.loads(Path("both/results.json").read_text())
    rows = [json.loads(line) for line in Path("both/samples.jsonl").read_text().splitlines()]
    names = ("start", "other", "loop")
    of = {name: [row for row in rows if row["model"] == name] for name in names}
    assert [len(samples) for samples in of.values()] == [24] * 3
    assert list(results["models"]) == list(of)
    for name, samples in of.items():
        metrics = results["models"][name]
        assert [row["prompt"] for row in samples] == [row["prompt"] for row in of["start"]]
        reward, kl = (sum(row[key] for row in samples) / 24 for key in ("reward", "kl"))
        assert metrics["reward"] == pytest.approx(reward, abs=1e-6)
        assert metrics["kl_sft"] == pytest.approx(kl, abs=1e-6)
        assert abs(metrics["kl_k1"] - metrics["kl_sft"]) <= 5 * metrics["kl_k1_se"] + 1e-6
    start, loop = results["models"]["start"], results["models"]["loop"]
    assert start["kl_sft"] == 0
    assert start["kl_k1"] == 0
    assert results["models"]["other"]["kl_sft"] > 0.1
    assert start["verdict"] == "no sign of collapse"
    assert loop["distinct_1"] < 0.1
    assert start["distinct_1"] > 0.1
    assert "100% of the completions are the same text" in loop["verdict"]
    assert loop["verdict"] in output
    assert "the most frequent token makes 100% of all tokens" in loop["verdict"]
    assert loop["length"] == 12

    compared = [(c["model"], c["against"]) for c in results["comparisons"]]
    assert compared == [("other", "start"), ("loop", "start"), ("loop", "other")]
    for comparison in results["comparisons"]:
        pairs = zip(of[comparison["against"]], of[comparison["model"]])
        differences = [second["reward"] - first["reward"] for first, second in pairs]
        difference, wins = comparison["reward_difference"], comparison["win_rate"]
        assert difference["mean"] == pytest.approx(sum(differences) / 24, abs=1e-6)
        won = [(d > 1e-6) + 0.5 * (abs(d) < 1e-6) for d in differences]
        assert wins["mean"] == pytest.approx(sum(won) / 24)
        assert difference["low"] <= difference["mean"] <= difference["high"]
        assert wins["low"] <= wins["mean"] <= wins["high"]
        # Prompts have 4 to 20 words: their rewards differ more than those of one prompt's samples.
        spread = torch.tensor([row["reward"] for row in of["start"]]).std().item()
        assert difference["high"] - difference["low"] < 2 * 1.96 * spread * (2 / 24) ** 0.5 / 2
    control = results["control"]["reward_difference"]
    assert control["low"] < 0 < control["high"]
    assert control["mean"] != 0
    assert results["control"]["covers_zero"]
    assert "control: start minus start" in output and "covers 0" in output
    config = json.loads(Path("both/config.json").read_text())
    assert config["model"] == ["other", "loop"] and config["max_new_tokens"] == 12


@pytest.mark.slow
def test_policies_meet_the_same_random_numbers_whatever_is_beside_them(folders, monkeypatch):
    """The start policy under another name samples what it samples as start.

    Batches and other policies change nothing.
    """
    same = str(toy.folder() / "start-policy")
    run_cli(folders, monkeypatch, f"--model {same} --out alone --batch-size 5")
    run_cli(folders, monkeypatch, f"--model loop {same} --out beside")
    run_cli(folders, monkeypatch, "--model loop --out other-seed --seed 1")
    texts = {}
    for out in ("alone", "beside", "other-seed"):
        for line in Path(f"{out}/samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            texts.setdefault((out, row["model"]), []).append(row["completion"])
    assert texts["alone", same] == texts["beside", same] == texts["alone", "start"]
    assert texts["alone", "start"] != texts["other-seed", "start"]
    comparison = json.loads(Path("alone/results.json").read_text())["comparisons"][0]
    assert comparison["reward_difference"] == {"mean": 0, "low": 0, "high": 0}
    assert comparison["win_rate"]["mean"] == 0.5


def test_measured_kls_and_entropy_are_those_of_each_row_alone(world):
    """Without padding: k1 and exact KL with their errors over prompts, entropy over tokens."""
    policy, start, reward_model, tokenizer = world
    task = Task(start, tokenizer, reward_model, [], ROWS, None, SETTINGS["eos_token_ids"], {})
    config = evaluate.Config(temperature=0.7, max_new_tokens=12, batch_size=4)
    measured = policies_compared.measure(policy, task, config, seed=3)
    sampling = SETTINGS | {"seed": 3, "batch_size": 4, "stop": None}
    batches, completions, ended = sample_completions(policy, [row.ids for row in ROWS], **sampling)
    drawn = [tokens[mask].tolist() for _, _, *batch in batches for tokens, mask in zip(*batch)]
    k1s, kls, entropies = [], [], []
    for row, tokens in zip(ROWS, drawn, strict=True):
        logits = logits_by_hand((policy, start), row.ids, tokens)
        logprobs = [token_logprobs(each, torch.tensor([tokens]), 0.7) for each in logits]
        k1s.append(kl_k1(*logprobs).sum().item())
        kls.append(exact_kl(*logits, 0.7).sum().item())
        entropies += token_entropy(logits[0], 0.7)[0].tolist()
    expected = {
        "kl_k1": sum(k1s) / 9,
        "kl_k1_se": torch.tensor(k1s).std().item() / 3,
        "kl_sft": sum(kls) / 9,
        "kl_sft_se": torch.tensor(kls).std().item() / 3,
        "entropy": sum(entropies) / len(entropies),
        "length": sum(map(len, drawn)) / 9,
        "ended": sum(ended) / 9,
        "repetition": repetition(completions),
        "self_similarity": self_similarity(completions),
        "distinct_1": distinct_n(completions, 1),
        "distinct_2": distinct_n(completions, 2),
        "reward": sum([sample.reward for sample in measured.samples]) / 9,
    }
    assert measured.metrics == pytest.approx(expected, abs=1e-4) and 0 < sum(ended) < 9
    # what a training run reports
    evaluated, samples = measure(*world, ROWS, seed=3, **SETTINGS)
    assert [sample[:2] for sample in samples] == [sample[:2] for sample in measured.samples]
    shared = {name: measured.metrics[name] for name in evaluated}
    assert shared == pytest.approx(evaluated, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--model is missing"),
        ("--model a a", "--model a: given twice"),
        ("--model nowhere", "--model nowhere: cannot be loaded"),
        ("--model other --start x", "--start x: needs --dataset"),
        ("--model other --dataset x.jsonl", "needs --start and --rm"),
        ("--model other --eval-split test", "--eval-split needs --dataset"),
        ("--model other --rm rules_of_evaluate:nothing", "cannot be imported"),
        ("--model other --eval-prompts 1", "--eval-prompts 1: expected a number in [2, inf)"),
        ("--model foreign", "--model foreign: its vocabulary is not that of --start"),
        ("--model brief", "--model brief: a context of 16 tokens"),
    ],
)
def test_errors_are_one_line(flags, expected, folders, monkeypatch, capsys, no_waiting):
    monkeypatch.chdir(folders)
    flags = flags.split()
    if flags[-1:] in (["foreign"], ["brief"]):
        tokenizer = toy.make_tokenizer()
        if flags[-1] == "foreign":
            tokenizer.add_tokens(["new"])
        model = toy.make_model(tokenizer, seed=0)
        model.config.max_position_embeddings = 16 if flags[-1] == "brief" else 64
        model.save_pretrained(flags[-1])
        tokenizer.save_pretrained(flags[-1])
    with pytest.raises(SystemExit) as error, one_line_errors():
        evaluate.main([*FLAGS, *flags] if "--dataset" not in flags else flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert error.value.code == 2 and len(lines) == 1 and expected in lines[0]


def test_help_imports_nothing_heavy():
    """In a fresh interpreter: torch takes seconds."""
    code = (
        "import runpy, sys; sys.argv = ['minalign', 'evaluate', '--help']\n"
        "try:\n    runpy.run_module('minalign', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules"
    )
    settings = dict(capture_output=True, text=True, cwd=Path(__file__).parents[2])
    ran = subprocess.run([sys.executable, "-c", code], **settings)
    assert ran.returncode == 0, ran.stderr
    assert "--start" in ran.stdout
    command = [sys.executable, *"-m minalign evaluate --model a a".split()]
    ran = subprocess.run(command, **settings)
    assert ran.returncode == 2 and ran.stderr == "error: --model a: given twice\n"
