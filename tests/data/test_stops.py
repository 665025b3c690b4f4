"""Texts that end a completion: where, what rewards see, and that nothing else changes."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import train_policy
from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, decode_parts
from minalign.data.stops import find_stop, stop_at
from minalign.models.functions import load_function
from minalign.models.sampler import Sampler
from minalign.rollout import (
    completion_logprobs,
    completions_of,
    draw_uniforms,
    generate,
    sequence_logprobs,
)
from minalign.running.errors import UserError
from minalign.running.files import read_json_lines
from minalign.tools import evaluate
from minalign.tools import generate as generate_tool

PIECES = [".\n\n", "\n\nHu", "man:", "Human", " Hu", "é", "héllo", "a.", "\n"]


def wrapped(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level():
    """Bytes, and longer tokens that a stop text may begin or end in."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [spell.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    vocabulary = {token: i for i, token in enumerate([*letters, *pieces, "<end>"])}  # 0 is "!"
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = spell, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return wrapped(tokenizer, eos_token="<end>", pad_token="<end>")


def metaspace():
    """As Llama 2 has it: a space before every text, and every space a part of a word."""
    pieces = ["<end>", "\u2581", *"abcHumn:.\n", "\u2581ab", "\u2581a", "an:", ".\n", "\u2581Hum"]
    vocabulary = [(piece, 0.0 if i == 0 else -1.0 - i / 100) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<end>"])
    return wrapped(tokenizer, eos_token="<end>", pad_token="<end>")


def slowly(tokenizer, texts, prompt, ids):
    """The first beginning of the ids that has a text, and what is before it, one by one."""
    for count in range(len(ids) + 1):
        text = decode_parts(tokenizer, prompt, ids[:count])[1]
        places = [text.find(one) for one in texts if one in text]
        if places:
            return count, text[: min(places)]
    return None


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("texts", [["\n\nHuman:"], ["Hu", "man"], [".", "\n"], ["é"], ["an:", "a"]])
def test_a_completion_ends_before_the_first_text_whatever_its_tokens(make, texts):
    """Also where it begins or ends within one: by brute force over random ids."""
    tokenizer, rng, hits = make(), random.Random(0), 0
    usual = [i for i in range(len(tokenizer)) if tokenizer.decode([i], True).strip("\ufffd")]
    many = [i for i in usual if set(tokenizer.decode([i])) & set("Human:.\né")]
    for _ in range(150):
        prompt = rng.choices(usual, k=rng.randint(1, 3))
        ids = rng.choices(many, k=rng.randint(0, 9))
        found = find_stop(tokenizer, texts, prompt, ids)
        expected = slowly(tokenizer, texts, prompt, ids)
        assert (found is None) == (expected is None)
        if found:
            hits += 1
            assert found[0] == expected[0]
            assert decode_parts(tokenizer, prompt, found[1])[1] == expected[1], (prompt, ids)
    assert hits > 20 or texts == ["\n\nHuman:"] or make is metaspace


def test_a_stop_text_that_begins_within_a_token_by_hand():
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids
    prompt, (a, stop, hu, man) = ids(["a"]), ids(["a.", ".ĊĊ", "ĊĊHu", "man:"])
    assert find_stop(tokenizer, ["\n\nHuman:"], prompt, [a, hu, man, a]) == (3, [a])
    dot = ids(["."])
    assert find_stop(tokenizer, ["\n\n"], prompt, [a, stop, a]) == (2, [a, *dot])
    assert find_stop(tokenizer, ["\n\nHuman:"], prompt, [hu, man]) == (2, [])
    assert find_stop(tokenizer, ["\n\nHuman:"], prompt, [hu]) is None
    assert find_stop(tokenizer, ["x"], prompt, []) is None
    across = [*tokenizer("\n")["input_ids"]]  # the prompt's own line break is none of its
    assert find_stop(tokenizer, ["\n\n"], across, across) is None


def test_part_of_a_word_that_has_no_token_is_left_out():
    tokenizer = toy.make_tokenizer()
    ids = tokenizer(" very good .")["input_ids"]
    assert find_stop(tokenizer, ["od"], [5], ids) == (2, ids[:1])
    assert find_stop(tokenizer, [" good"], [5], ids) == (2, ids[:1])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "^--stop '': expected different texts"),
        (["x", "x"], "^--stop 'x': expected different texts"),
        (["<end>"], "^--stop '<end>': the policy's tokenizer does not write it"),
    ],
)
def test_a_text_of_no_use_is_one_line(texts, message):
    with pytest.raises(UserError, match=message):
        stop_at(byte_level(), texts)


def test_what_a_tokenizer_cannot_write(capsys):
    with pytest.raises(UserError, match="Human:': the policy's tokenizer does not write it"):
        stop_at(toy.make_tokenizer(), ["\n\nHuman:"])
    assert stop_at(toy.make_tokenizer(), ["plot", " ."]) and stop_at(byte_level(), None) is None
    assert stop_at(byte_level(), ["\n", " ", "é", "日本", "🙂", "\n\nHuman:", " x "])
    assert stop_at(metaspace(), ["Hum", " Hum", "an:\n"])
    assert capsys.readouterr().out == ""
    assert stop_at(byte_level(), ["\\n"]) and "a backslash as it is" in capsys.readouterr().out


# --- sampling


def policy_and_tokenizer(vocabulary=None, **config):
    tokenizer = byte_level()
    made = tiny.model(tokenizer, pad_token_id=0, initializer_range=0.3, **config)
    return made.eval().requires_grad_(False), tokenizer


@pytest.mark.parametrize("family", ["own cache", "transformers' cache"])
def test_stopping_early_changes_no_token(family, monkeypatch):
    """What is sampled with a stop is what is sampled without one, cut."""
    policy, tokenizer = policy_and_tokenizer()
    if family != "own cache":
        monkeypatch.setattr("minalign.models.generation.can_decode", lambda _: False)
    find, called, texts = stop_at(tokenizer, ["é", "a", "!"]), [], ["é", "a", "!"]

    def stop(prompt, ids):
        called.append((prompt, ids))
        return find(prompt, ids)

    prompts = [[5, 6], [7], [9, 9, 9]] * 4
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ends = [tokenizer.eos_token_id, 3]
    how = dict(max_new_tokens=60, temperature=1.0, eos_token_ids=ends, pad_token_id=0)
    how["uniforms"] = draw_uniforms(12, 60, "cpu", torch.Generator().manual_seed(0))
    whole = generate(policy, ids, mask, **how)
    early = generate(policy, ids, mask, stop=stop, **how)
    assert early.mask.sum() < whole.mask.sum()
    drawn = [tokens[mask].tolist() for tokens, mask in zip(whole.tokens, whole.mask)]
    for prompt, ids in called:  # each row's own, whoever has left
        assert any(p == prompt and d[: len(ids)] == ids for p, d in zip(prompts, drawn))
    assert {len(ids) for _, ids in called} == {16, 32, 48}
    expected = completions_of(whole, prompts, ends, stop)
    found = completions_of(early, prompts, ends, stop)
    for one, other in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert expected[1] == found[1] and expected[2].tolist() == found[2].tolist()
    stopped = 0
    for row, (prompt, completion) in enumerate(zip(prompts, found[1])):
        text = decode_parts(tokenizer, prompt, completion)[1]
        assert not any(one in text for one in texts)
        hit = slowly(tokenizer, texts, prompt, [i for i in drawn[row] if i not in ends])
        stopped += hit is not None
        kept = found[0].tokens[row][found[0].mask[row]].tolist()
        assert kept == (drawn[row][: hit[0]] if hit else drawn[row])
        assert not hit or hit[1] == text
        assert bool(found[2][row]) == (hit is not None or bool({*ends} & {*drawn[row]}))
    assert 3 < stopped


def test_all_completions_that_end_at_a_text_or_the_limit_have_probability_1():
    """Enumerated: the cut sequences are a tree's leaves, and their log-probs are the policy's."""
    pieces = ["<end>", "a", "b", "ab", "ba"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<end>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer = wrapped(tokenizer, eos_token="<end>", pad_token="<end>")
    policy = tiny.model(tokenizer, pad_token_id=0, initializer_range=0.5).eval()
    every = torch.tensor(list(itertools.product(range(5), repeat=4)))  # (625, 4)
    ends = (every == 0).cumsum(1)
    mask = (ends - (every == 0).long()) == 0
    rollout = SimpleNamespace()
    prompt = torch.full((len(every), 1), 1)
    tokens = every.masked_fill(~mask, 0)
    from minalign.rollout import Rollout

    rollout = Rollout(tokens, mask, torch.zeros(mask.shape))
    stop = lambda prompt, ids: find_stop(tokenizer, ["ba", "bb"], prompt, ids)  # noqa: E731
    (tokens, mask, _), completions, ended = completions_of(rollout, [[1]] * 625, [0], stop)
    logprobs = sequence_logprobs(policy, prompt, torch.ones_like(prompt), tokens, mask, 1.0)
    leaves = {}
    for row, real, logprob in zip(tokens, mask, logprobs.sum(1).double()):
        leaves[tuple(row[real].tolist())] = logprob.exp().item()
    assert sum(leaves.values()) == pytest.approx(1.0, abs=1e-5) and len(leaves) < 300
    texts = [tokenizer.decode(ids) for ids in completions]
    assert not any("ba" in text or "bb" in text for text in texts)
    assert ended.sum() > 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_stops_and_its_log_probs_are_of_what_is_left(dtype):
    policy, tokenizer = policy_and_tokenizer()
    config = SimpleNamespace(
        seed=0,
        temperature=1.0,
        max_new_tokens=20,
        micro_batch_size=4,
        sampler_dtype="auto",
        importance="sequence",
        importance_limit=2.0,
    )
    prompts = [TokenizedPrompt([5 + n]) for n in range(8)]
    stop = stop_at(tokenizer, ["é", "a", "\n"])
    samples = Sampler(policy, [0], config, dtype, stop=stop).sample(prompts)
    plain = Sampler(policy, [0], config, dtype).sample(prompts)
    assert samples.mask.sum() < plain.mask.sum() and samples.ended.sum() > plain.ended.sum()
    assert samples.mask.shape[1] == samples.mask.sum(1).max()
    logprobs = completion_logprobs(policy, *samples.rows(), 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(samples.logprobs, logprobs, rtol=0, atol=tolerance)
    halves = [
        Sampler(policy, [0], config, dtype, mine, stop).sample(prompts)
        for mine in (slice(0, 4), slice(4, 8))
    ]
    assert halves[0].completions + halves[1].completions == samples.completions


RULES = """
calls = []
def seen(prompts, completions):
    calls.extend(completions)
    return [float(len(c)) for c in completions]
"""


def test_a_run_and_what_looks_at_it_stop_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    tiny.policy(tmp_path / "lm")
    tiny.rows(tmp_path / "d.jsonl", {"prompt": "what is {n} ?"})
    texts = ["t", "-", "\n", " ", "e"]
    train_policy.main(
        [
            *"--model lm --rm rules.py:seen --dataset d.jsonl --steps 2 --batch-size 8".split(),
            *"--max-new-tokens 40 --eval-prompts 8 --device cpu --eval-share 0.4".split(),
            *"--out run --stop t -".split(),
            "--stop=\n",
            "--stop",
            " ",
            "e",
        ]
    )
    calls = load_function("rules.py:seen").__globals__["calls"]
    assert len(calls) == 8 * 5 and not any(text in c for c in calls for text in texts)
    rows = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert rows[0]["ended"] > 0.5 and rows[0]["length"] < 35
    samples = read_json_lines(tmp_path / "run/samples.jsonl")
    assert not any(text in row["completion"] for row in samples for text in texts)
    assert json.loads((tmp_path / "run/config.json").read_text())["stop"] == texts
    del calls[:]
    capsys.readouterr()
    evaluate.main(["--model", "run", "--out", "e", "--device", "cpu"])
    assert "--stop=t --stop=- --stop=" in capsys.readouterr().out
    assert len(calls) == 24 and not any(text in c for c in calls for text in texts)
    generate_tool.main("--model run --out g.jsonl --device cpu".split())
    answers = read_json_lines(tmp_path / "g.jsonl")
    assert not any(text in row["completion"] for row in answers for text in texts)
    assert sum(row["ended"] for row in answers) > 4
    generate_tool.main("--model run --prompt what --samples 8 --stop zzz --device cpu".split())
    assert "..." in capsys.readouterr().out  # another text was given: the run's are not taken
