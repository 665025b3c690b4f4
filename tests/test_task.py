"""The task of a run: prompts that fit, beginnings of texts, the same held-out prompts each time, standardised rewards."""

import json
import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import train_policy
from minalign.chat import TokenizedPrompt, encode_prompt
from minalign.common import UserError
from minalign.flags import parse_span
from minalign.rewards import RewardSum
from minalign.task import beginning, load_task, tokenize_prompts

CONTEXT = 64
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' if m['role'] == 'user' else m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def make_tokenizer(bos="<|bos|>", template=None):
    """One token for each letter."""
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|bot|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = template
    return fast


# --- spans and beginnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, span", [("", None), ("5-15", (5, 15)), ("10", (10, 10)), ("3-3", (3, 3)), ("1", (1, 1))])
def test_a_span_is_a_number_or_a_range(text, span):
    assert parse_span("--prompt-tokens", text) == span


@pytest.mark.parametrize("text", ["0", "0-5", "6-5", "-5", "5-", "a", "5-b", "5-6-7", "1.5", "5 - 6", "-", "²"])
def test_anything_else_is_no_span(text):
    with pytest.raises(UserError, match="^--prompt-tokens .*: expected a number or a range, such as 10 or 5-15$"):
        parse_span("--prompt-tokens", text)


def test_beginnings_have_every_length_of_the_span():
    rng, prompt = random.Random(0), TokenizedPrompt(list(range(30)))
    drawn = [beginning(prompt, (5, 9), rng) for _ in range(500)]
    assert all(part.ids == prompt.ids[: len(part.ids)] and part.messages is None for part in drawn)
    counts = Counter(len(part.ids) for part in drawn)
    assert set(counts) == {5, 6, 7, 8, 9} and min(counts.values()) > 60
    assert beginning(prompt, None, rng) is prompt and prompt.ids == list(range(30))


# --- prompts as ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_prompts_over_the_limit_are_dropped_and_counted(bos, capsys):
    tokenizer, begin = make_tokenizer(bos), int(bos is not None)
    texts = ["a" * n for n in (3, 9, 10, 11, 20)]
    rows = tokenize_prompts(tokenizer, texts, 10 + begin, None, "held-out")
    assert rows == [TokenizedPrompt(encode_prompt(tokenizer, text)) for text in texts[:3]]
    assert f"dropped 2 of 5 held-out prompts: longer than {10 + begin} tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="^no training prompts left: all are longer than 2 tokens: raise --max-prompt-tokens"):
        tokenize_prompts(tokenizer, texts, 2, None, "training")


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_texts_under_the_span_are_dropped_and_counted(bos, capsys):
    """The begin token does not count; a long text is no harm, since only its beginning is used."""
    tokenizer = make_tokenizer(bos)
    texts = ["a" * n for n in (3, 4, 5, 6, 100)]
    rows = tokenize_prompts(tokenizer, texts, 11, (5, 10), "training")
    assert [tokenizer.decode(row.ids).count("a") for row in rows] == [5, 6, 100]
    assert "dropped 2 of 5 training prompts: shorter than 5 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="^no training prompts left: all are shorter than 5 tokens"):
        tokenize_prompts(tokenizer, ["aaa"], 11, (5, 10), "training")
    with pytest.raises(UserError, match="^--prompt-tokens 10: expected fewer than 10"):
        tokenize_prompts(tokenizer, texts, 10, (5, 10), "training")


def test_chat_prompts_keep_their_messages():
    """The reward model reads them; ids alone do not say what the template made of them."""
    tokenizer, messages = make_tokenizer(template=TEMPLATE), [{"role": "user", "content": "hi"}]
    (row,) = tokenize_prompts(tokenizer, [messages], 50, None, "training")
    assert row.messages == messages and tokenizer.decode(row.ids) == "<|bos|><|user|>hi<|end|><|bot|>"


# --- a whole task ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A random GPT-2, two rewards that keep what they were asked, and a maker of tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_task_tests.py").write_text(
        "calls = []\n"
        "def length(prompts, completions):\n    calls.append((prompts, completions))\n    return [100.0 + len(c) for c in completions]\n"
        "def spaces(prompts, completions):\n    return [0.001 * sum(c.count(x) for x in 'abcdefgh') for c in completions]\n"
        "def constant(prompts, completions):\n    return [1.0] * len(completions)\n"
    )

    def make(rows, rewards=("rewards_of_task_tests:length",), bos="<|bos|>", template=None, **flags):
        tokenizer = make_tokenizer(bos, template)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained("policy")
        tokenizer.save_pretrained("policy")
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"max_new_tokens": 16, "eval_share": 0.3, **flags}
        config = train_policy.resolve(train_policy.Config(model="policy", rm=list(rewards), dataset="a.jsonl", **flags))
        return load_task(config, list(rewards), torch.device("cpu"), torch.float32)

    return make


TEXTS = [{"text": f"{n} film, a long one, seen twice by everybody" + "!" * (n % 7)} for n in range(100, 180)]
PROMPTS = [{"prompt": "ab " * (n % 20) + str(n)} for n in range(100, 180)]


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_of_a_column_of_texts_the_policy_gets_5_to_15_tokens(bos, world):
    task, begin = world(TEXTS, bos=bos), int(bos is not None)
    assert task.prompt_tokens == (5 + begin, 15 + begin)
    assert all(len(prompt.ids) > 40 for prompt in task.train_prompts), "whole: a beginning is drawn at each step"
    rng = random.Random(0)
    drawn = {len(beginning(task.train_prompts[0], task.prompt_tokens, rng).ids) - begin for _ in range(300)}
    assert drawn == set(range(5, 16))
    held = [task.tokenizer.decode(prompt.ids[begin:]) for prompt in task.eval_prompts]
    assert all(any(row["text"].startswith(text) for row in TEXTS) and 5 <= len(text) <= 15 for text in held)
    assert len({len(text) for text in held}) > 5
    numbers = [{task.tokenizer.decode(p.ids[begin:])[:3] for p in part} for part in (task.train_prompts, task.eval_prompts)]
    assert numbers[0].isdisjoint(numbers[1])


def test_held_out_beginnings_are_the_same_for_every_run(world):
    one, other = world(TEXTS, seed=0), world(TEXTS, seed=1, standardize_rewards=True)
    assert one.eval_prompts == other.eval_prompts and 10 < len(one.eval_prompts) < 40
    assert len(world(TEXTS, eval_prompts=7).eval_prompts) == 7


def test_a_span_given_counts_for_any_column_of_text(world):
    task = world(PROMPTS, prompt_tokens="4")
    assert task.prompt_tokens == (5, 5) and {len(prompt.ids) for prompt in task.eval_prompts} == {5}
    assert world(PROMPTS).prompt_tokens is None, "prompts are asked whole"


def test_chat_prompts_cannot_be_cut(world):
    with pytest.raises(UserError, match="^--prompt-tokens: chat prompts cannot be cut"):
        world(PROMPTS, template=TEMPLATE, prompt_tokens="4-5")
    task = world(PROMPTS, template=TEMPLATE)
    assert all(prompt.messages and task.tokenizer.decode(prompt.ids).endswith("<|bot|>") for prompt in task.train_prompts)
    plain = world(PROMPTS, template=TEMPLATE, format="plain")
    assert all(prompt.messages is None for prompt in plain.train_prompts + plain.eval_prompts)
    assert world(TEXTS, template=TEMPLATE).prompt_tokens == (6, 16), "a column of texts is no chat"


def test_prompts_leave_room_for_their_completions(world, capsys):
    """Longer ones are dropped, in both parts: none is cut, none runs over the context."""
    task = world(PROMPTS)
    lengths = [len(prompt.ids) for part in (task.train_prompts, task.eval_prompts) for prompt in part]
    expected = sorted(n for n in (1 + len(row["prompt"]) for row in PROMPTS) if n <= CONTEXT - 16)
    assert sorted(lengths) == expected and len(expected) < 80
    out = capsys.readouterr().out
    assert "training prompts: longer than 48 tokens" in out and "held-out prompts: longer than 48 tokens" in out
    task = world(PROMPTS, max_prompt_tokens=10)
    assert max(len(prompt.ids) for prompt in task.train_prompts + task.eval_prompts) == 10
    with pytest.raises(UserError, match="^--max-new-tokens 64: leaves no room for a prompt in a context of 64"):
        world(PROMPTS, max_new_tokens=64)


@pytest.mark.parametrize("rows", [TEXTS, PROMPTS], ids=["beginnings", "prompts"])
def test_rewards_are_standardised_by_the_start_policy(rows, world):
    """Mean 0 and deviation 1 each, on the very samples; the sum has the weights."""
    import importlib

    names = ["rewards_of_task_tests:length", "rewards_of_task_tests:spaces"]
    task = world(rows, names, rm_weights=[2.0, -1.0], micro_batch_size=1000)
    functions = importlib.import_module("rewards_of_task_tests")
    prompts, completions = functions.calls[-1]
    values = [torch.tensor(f(prompts, completions)) for f in (functions.length, functions.spaces)]
    assert len(completions) == len(task.train_prompts), "all of them where there are not 256"
    if rows is TEXTS:
        assert {len(prompt) for prompt in prompts} <= set(range(5, 16)) and len({len(prompt) for prompt in prompts}) > 6
    assert isinstance(task.reward, RewardSum)
    for k, value in enumerate(values):
        assert task.reward.means[k] == pytest.approx(value.mean().item(), rel=1e-5)
        assert task.reward.stds[k] == pytest.approx(value.std(correction=0).item(), rel=1e-4)
    tokens = [task.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("abc", "xyz ", "")]
    got = task.reward.score_rollout(task.tokenizer, [TokenizedPrompt([0])] * 3, tokens, 8)
    z = [(torch.tensor(x) - v.mean()) / v.std(correction=0) for x, v in zip(([103.0, 104.0, 100.0], [0.003, 0.0, 0.0]), values)]
    torch.testing.assert_close(got.rewards, 2 * z[0] - z[1], rtol=1e-3, atol=1e-3)
    assert [got.parts[name].tolist() for name in names] == [[103.0, 104.0, 100.0], pytest.approx([0.003, 0.0, 0.0])]


def test_one_reward_is_itself_unless_it_is_to_be_standardised(world):
    assert not isinstance(world(PROMPTS).reward, RewardSum)
    task = world(PROMPTS, standardize_rewards=True)
    assert isinstance(task.reward, RewardSum) and task.reward.weights == [1.0] and task.reward.means[0] > 100


def test_rewards_that_make_no_sense_are_named(world):
    names = ["rewards_of_task_tests:length", "rewards_of_task_tests:spaces"]
    with pytest.raises(UserError, match="^--rm-weights: got 1, expected one for each of 2"):
        world(PROMPTS, names, rm_weights=[1.0])
    with pytest.raises(UserError, match="^--rm rewards_of_task_tests:constant: .* cannot be standardised"):
        world(PROMPTS, ["rewards_of_task_tests:constant"], standardize_rewards=True)
    with pytest.raises(UserError, match="^--uncertainty inverse_std: --rm .* no distribution over scores"):
        world(PROMPTS, uncertainty="inverse_std")
