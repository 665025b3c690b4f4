"""The task of a run: prompts that fit, beginnings of texts, the same held-out prompts, rewards."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import new_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import train_policy
from minalign.data.chat import TokenizedPrompt, encode_prompt
from minalign.data.prompts import beginning, parse_span, tokenize_prompts
from minalign.models.functions import load_function
from minalign.models.rewards import RewardSum
from minalign.running.errors import UserError

CONTEXT = 64
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|user|>' + m['content'] + '<|end|>' if m['role'] == 'user' else m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def make_tokenizer(bos="<|bos|>", template=None):
    """One token for each letter."""
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|bot|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = template
    return fast


# --- spans and beginnings


@pytest.mark.parametrize(
    "text, span", [("", None), ("5-15", (5, 15)), ("10", (10, 10)), ("3-3", (3, 3)), ("1", (1, 1))]
)
def test_a_span_is_a_number_or_a_range(text, span):
    assert parse_span("--prompt-tokens", text) == span


@pytest.mark.parametrize(
    "text", ["0", "0-5", "6-5", "-5", "5-", "a", "5-b", "5-6-7", "1.5", "5 - 6", "-", "²"]
)
def test_anything_else_is_no_span(text):
    message = "^--prompt-tokens .*: expected a number or a range, such as 10 or 5-15$"
    with pytest.raises(UserError, match=message):
        parse_span("--prompt-tokens", text)


def test_beginnings_have_every_length_of_the_span():
    rng, prompt = random.Random(0), TokenizedPrompt(list(range(30)))
    drawn = [beginning(prompt, (5, 9), rng) for _ in range(500)]
    assert all(part.ids == prompt.ids[: len(part.ids)] and part.messages is None for part in drawn)
    counts = Counter(len(part.ids) for part in drawn)
    assert set(counts) == {5, 6, 7, 8, 9} and min(counts.values()) > 60
    assert beginning(prompt, None, rng) is prompt and prompt.ids == list(range(30))


# --- prompts as ids


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_prompts_over_the_limit_are_dropped_and_counted(bos, capsys):
    tokenizer, begin = make_tokenizer(bos), int(bos is not None)
    texts = ["a" * n for n in (3, 9, 10, 11, 20)]
    rows = tokenize_prompts(tokenizer, texts, 10 + begin, None, "held-out")
    ids = [encode_prompt(tokenizer, text) for text in texts[:3]]
    assert list(rows) == [TokenizedPrompt(one, row=row) for row, one in enumerate(ids)]
    dropped = f"dropped 2 of 5 held-out prompts: longer than {10 + begin} tokens"
    assert dropped in capsys.readouterr().out
    message = "^no training prompts left: all are longer than 2 tokens: raise --max-prompt-tokens"
    with pytest.raises(UserError, match=message):
        tokenize_prompts(tokenizer, texts, 2, None, "training")


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_texts_under_the_span_are_dropped_and_counted(bos, capsys):
    """The begin token does not count. A long text is no harm: only its beginning is used."""
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
    """The reward model reads them. Ids alone do not say what the template made of them."""
    tokenizer, messages = make_tokenizer(template=TEMPLATE), [{"role": "user", "content": "hi"}]
    (row,) = tokenize_prompts(tokenizer, [messages], 50, None, "training")
    assert row.messages == messages
    assert tokenizer.decode(row.ids) == "<|bos|><|user|>hi<|end|><|bot|>"


# --- a whole task

MODULE = "rewards_of_task_tests"
REWARDS = """
calls = []

def length(prompts, completions):
    calls.append((prompts, completions))
    return [100.0 + len(c) for c in completions]

def letters(prompts, completions):
    return [0.001 * sum(c.count(x) for x in "abcdefgh") for c in completions]

def constant(prompts, completions):
    return [1.0] * len(completions)
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A maker of tasks: of a random GPT-2, and of rewards of which one keeps what it was asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(REWARDS)

    def make(rows, rewards=(f"{MODULE}:length",), bos="<|bos|>", template=None, **flags):
        tokenizer = make_tokenizer(bos, template)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        GPT2LMHeadModel(config).save_pretrained("policy")
        tokenizer.save_pretrained("policy")
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"max_new_tokens": 16, "eval_share": 0.3, **flags}
        given = train_policy.Config(model="policy", rm=list(rewards), dataset="a.jsonl", **flags)
        config = train_policy.resolve(given)
        return train_policy.load(new_run(tmp_path / "run", config, torch.float32))

    return make


FILM = "film, a long one, seen twice by everybody"
TEXTS = [{"text": f"{n} {FILM}" + "!" * (n % 7)} for n in range(100, 180)]
PROMPTS = [{"prompt": "ab " * (n % 20) + str(n)} for n in range(100, 180)]


@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_of_a_column_of_texts_the_policy_gets_5_to_15_tokens(bos, world):
    task, begin = world(TEXTS, bos=bos), int(bos is not None)
    assert task.prompt_tokens == (5 + begin, 15 + begin)
    # whole: a beginning is drawn at each step
    assert all(len(prompt.ids) > 40 for prompt in task.train_prompts)
    rng, prompt = random.Random(0), task.train_prompts[0]
    drawn = [beginning(prompt, task.prompt_tokens, rng) for _ in range(300)]
    assert {len(part.ids) - begin for part in drawn} == set(range(5, 16))
    trained, held = (
        [task.tokenizer.decode(prompt.ids[begin:]) for prompt in part]
        for part in (task.train_prompts, task.eval_prompts)
    )
    for text in held:
        assert any(row["text"].startswith(text) for row in TEXTS) and 5 <= len(text) <= 15
    assert len({len(text) for text in held}) > 5
    assert {text[:3] for text in trained}.isdisjoint({text[:3] for text in held})


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
    for prompt in task.train_prompts:
        assert prompt.messages and task.tokenizer.decode(prompt.ids).endswith("<|bot|>")
    plain = world(PROMPTS, template=TEMPLATE, format="plain")
    assert all(prompt.messages is None for prompt in (*plain.train_prompts, *plain.eval_prompts))
    assert world(TEXTS, template=TEMPLATE).prompt_tokens == (6, 16), "a column of texts is no chat"


def test_prompts_leave_room_for_their_completions(world, capsys):
    """Longer ones are dropped, in both parts: none is cut, none runs over the context."""
    task = world(PROMPTS)
    lengths = [len(prompt.ids) for prompt in (*task.train_prompts, *task.eval_prompts)]
    expected = sorted(n for n in (1 + len(row["prompt"]) for row in PROMPTS) if n <= CONTEXT - 16)
    assert sorted(lengths) == expected and len(expected) < 80
    out = capsys.readouterr().out
    assert "training prompts: longer than 48 tokens" in out
    assert "held-out prompts: longer than 48 tokens" in out
    task = world(PROMPTS, max_prompt_tokens=10)
    assert max(len(prompt.ids) for prompt in (*task.train_prompts, *task.eval_prompts)) == 10
    message = "^--max-new-tokens 64: leaves no room for a prompt in a context of 64"
    with pytest.raises(UserError, match=message):
        world(PROMPTS, max_new_tokens=64)


@pytest.mark.parametrize("rows", [TEXTS, PROMPTS], ids=["beginnings", "prompts"])
def test_rewards_are_standardised_by_the_start_policy(rows, world):
    """Mean 0 and deviation 1 each, on the very samples. The sum has the weights."""
    names = [f"{MODULE}:length", f"{MODULE}:letters"]
    task = world(rows, names, rm_weights=[2.0, -1.0], micro_batch_size=1000)
    functions = SimpleNamespace(**load_function(names[0]).__globals__)
    prompts, completions = functions.calls[-1]
    values = [torch.tensor(f(prompts, completions)) for f in (functions.length, functions.letters)]
    assert len(completions) == len(task.train_prompts), "all of them where there are not 256"
    if rows is TEXTS:
        assert {len(prompt) for prompt in prompts} <= set(range(5, 16))
        assert len({len(prompt) for prompt in prompts}) > 6
    assert isinstance(task.reward, RewardSum)
    for k, value in enumerate(values):
        assert task.reward.means[k] == pytest.approx(value.mean().item(), rel=1e-5)
        assert task.reward.stds[k] == pytest.approx(value.std(correction=0).item(), rel=1e-4)
    texts = task.tokenizer(["abc", "xyz ", ""], add_special_tokens=False)["input_ids"]
    got = task.reward.score_rollout(task.tokenizer, [TokenizedPrompt([0])] * 3, texts, 8)
    lengths, letters = [103.0, 104.0, 100.0], [0.003, 0.0, 0.0]
    z = [
        (torch.tensor(raw) - value.mean()) / value.std(correction=0)
        for raw, value in zip((lengths, letters), values)
    ]
    torch.testing.assert_close(got.rewards, 2 * z[0] - z[1], rtol=1e-3, atol=1e-3)
    assert got.parts[names[0]].tolist() == lengths
    assert got.parts[names[1]].tolist() == pytest.approx(letters)


def test_one_reward_is_itself_unless_it_is_to_be_standardised(world):
    assert not isinstance(world(PROMPTS).reward, RewardSum)
    task = world(PROMPTS, standardize_rewards=True)
    assert isinstance(task.reward, RewardSum)
    assert task.reward.weights == [1.0]
    assert task.reward.means[0] > 100


def test_rewards_that_make_no_sense_are_named(world):
    names = [f"{MODULE}:length", f"{MODULE}:letters"]
    with pytest.raises(UserError, match="^--rm-weights: got 1, expected one for each of 2"):
        world(PROMPTS, names, rm_weights=[1.0])
    with pytest.raises(UserError, match=f"^--rm {MODULE}:constant: .* cannot be standardised"):
        world(PROMPTS, [f"{MODULE}:constant"], standardize_rewards=True)
