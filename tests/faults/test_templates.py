"""The text that a reward model reads is what the chat template makes of the dialogue.

The ids of reference are those of transformers' own apply_chat_template. Ids such as A-F8 are those
of the faults that were replayed.
"""

import json
import re
import threading

import pytest
import tiny
import torch
from templates import FAMILIES, refuse
from tiny import A, S, U
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_policy
import train_rm
from minalign.data import templates
from minalign.data.chat import TokenizedPrompt, decode_parts, encode_prompt, wants_chat
from minalign.data.columns import read_pair
from minalign.data.pairs import encode_pairs
from minalign.data.prompts import tokenize_prompts
from minalign.reward import RewardModel
from minalign.running.errors import UserError, one_line_errors
from minalign.tools import generate, score

QUESTION = [U("Who wrote Emma?")]
HISTORY = [U("Who wrote Emma?"), A("Jane Austen did."), U("When was that?")]
DIALOGUES = {
    "question": QUESTION,
    "history": HISTORY,
    "system": [S("Be brief."), *QUESTION],
    "system and history": [S("Be brief."), *HISTORY],
}
ANSWER = "In 1815, by Jane."


def tokenizer_of(family):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = family.template
    if family.bos:
        tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def reward_of(tokenizer):
    sizes = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    config = LlamaConfig(vocab_size=4, num_labels=1, pad_token_id=0, **sizes)
    return RewardModel(LlamaForSequenceClassification(config), tokenizer)


def as_the_family_takes_it(family, messages):
    """The dialogue as its author would write it for this template."""
    if family.system == "user's" and messages[0]["role"] == "system":
        first = U(f"{messages[0]['content']}\n\n{messages[1]['content']}")
        messages = [first, *messages[2:]]
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]}
        if m["role"] in family.parts
        else m
        for m in messages
    ]


def transformers_ids(tokenizer, family, messages, **options):
    given = as_the_family_takes_it(family, messages)
    ids = tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **options)
    return [tokenizer.bos_token_id] * (family.bos == "forgotten") + ids


def lost(family, messages):
    return family.system == "lost" and messages[0]["role"] == "system"


# --- given texts


@pytest.mark.parametrize("messages", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_given_texts_are_read_as_transformers_writes_the_dialogue(family, messages):
    """A-F8, A-F9, A-F12: the same ids by every road, whatever white space the answer has."""
    tokenizer = tokenizer_of(family)
    reward = reward_of(tokenizer)
    if lost(family, messages):
        with pytest.raises(UserError, match="leaves out turns of 'system'"):
            reward.encode(messages, ANSWER)
        return
    expected = transformers_ids(tokenizer, family, [*messages, A(ANSWER)])
    for m in messages:
        assert m["content"] in tokenizer.decode(expected)
    row = {"prompt": messages, "chosen": f" {ANSWER}\n", "rejected": "No."}
    pair = read_pair(row, "", print, chat=True)
    (example,) = encode_pairs([pair], reward.tokenizer, max_tokens=512, max_pairs=9, seed=0)
    given = {"prompt": messages, "completion": f"\n{ANSWER}\n\n"}
    scored = reward.encode(*score.texts_of(given, "", print, True)["reward"])
    for ids in (reward.encode(messages, ANSWER), example.texts[0], scored):
        assert ids == expected
    dialogue = {"chosen": [*messages, A(f"{ANSWER} ")], "rejected": [*messages, A("No.")]}
    pair = score.texts_of(dialogue, "", print, True)["chosen_reward"]
    assert reward.encode(*pair) == expected


def test_a_text_as_prompt_is_one_users_turn():
    reward = reward_of(tokenizer_of(FAMILIES["chatml"]))
    expected = transformers_ids(reward.tokenizer, FAMILIES["chatml"], [U("q"), A("yes")])
    assert [reward.encode("q", text) for text in ("yes", " yes", "yes\n")] == [expected] * 3


def test_without_a_template_white_space_around_an_answer_to_messages_is_left_out():
    """A-F12: the pairs' road and that of RewardModel.score are one."""
    reward = reward_of(tiny.tokenizer())
    row = {"prompt": QUESTION, "chosen": " yes\n", "rejected": "no"}
    pair = read_pair(row, "", print, chat=False)
    text = reward.tokenizer("\n\nHuman: Who wrote Emma?\n\nAssistant: yes<|im_end|>")["input_ids"]
    assert reward.encode(pair.prompt, pair.chosen) == text
    assert [reward.encode(QUESTION, a) for a in ("yes", "  yes", "yes\n")] == [text] * 3


# --- rollouts


@pytest.mark.parametrize("messages", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_rollouts_are_sampled_ids_or_what_score_reads(family, messages, capsys):
    """A-F8: where prompt, answer and ending are no whole dialogue, one line says so."""
    tokenizer = tokenizer_of(family)
    reward = reward_of(tokenizer)
    if lost(family, messages):
        with pytest.raises(UserError, match="leaves out turns of 'system'"):
            encode_prompt(tokenizer, messages)
        return
    asked = encode_prompt(tokenizer, messages)
    as_asked = family._replace(system=family.asked or family.system)
    assert asked == transformers_ids(tokenizer, as_asked, messages, add_generation_prompt=True)
    prompt = TokenizedPrompt(asked, messages)
    answer = tokenizer(ANSWER)["input_ids"]
    rows = reward.encode_rollout(tokenizer, [prompt] * 2, [answer, answer])
    expected = transformers_ids(tokenizer, family, [*messages, A(ANSWER)])
    said = capsys.readouterr().out.count("sampled answers are scored as it writes them there")
    # Where the system's text is in the last turn, a prompt is not how a dialogue begins.
    anew = family.anew or (bool(family.asked) and len(messages) == 4)
    assert said == anew
    if anew:
        assert rows == [expected] * 2
    else:  # but for a space before the answer, which a policy may sample or not
        ending = rows[0][len(asked) + len(answer) :]
        assert rows[0] == rows[1] == asked + answer + ending
        assert tokenizer.decode(expected) == tokenizer.decode(asked) + (
            tokenizer.decode(expected)[len(tokenizer.decode(asked)) :].split("In 1815")[0]
        ) + ANSWER + tokenizer.decode(ending)
        sampled = tokenizer(" yes <|im_start|>\n")["input_ids"]
        (row,) = reward.encode_rollout(tokenizer, [prompt], [sampled])
        assert row == asked + sampled + ending, "ids stay as they were sampled"


@pytest.mark.parametrize(
    "name, sampled, content",
    [
        ("qwen3, think in the last answer", "<think>\nHm.\n</think>\n\nJane.", None),
        ("qwen3 thinking, an open think in the cue", "Hm.\n</think>\n\nJane.", None),
        ("deepseek r1", "Hm.\n</think>\n\nJane.", None),
        ("qwen3 instruct, thought is left out", "<think>Hm.</think>\n\nJane.", None),
        ("chatml", "<think>Hm.</think>\n\nJane.", None),
        ("gpt-oss, channels", "<|channel|>final<|message|>Jane.", "Jane."),
        ("no cue", "<|im_start|>assistant\nJane.", "Jane."),
        ("command r7b, an answer in tags", "<|START_RESPONSE|>Jane.", "Jane."),
    ],
)
def test_sampled_thoughts_and_headers_are_read_as_given_ones(name, sampled, content):
    """A-F8: what the template writes before an answer is not written twice."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    prompt = TokenizedPrompt(encode_prompt(tokenizer, QUESTION), QUESTION)
    ids = tokenizer(sampled)["input_ids"]
    (row,) = reward_of(tokenizer).encode_rollout(tokenizer, [prompt], [ids])
    assert row == transformers_ids(tokenizer, family, [*QUESTION, A(content or sampled)])


def test_a_sampled_answer_that_the_template_refuses_is_scored_after_its_prompt(capsys):
    """Analysis channels of gpt-oss are refused in a message's content, and no run ends by it."""
    tokenizer = tokenizer_of(FAMILIES["gpt-oss, channels"])
    prompt = TokenizedPrompt(encode_prompt(tokenizer, QUESTION), QUESTION)
    ids = tokenizer("<|channel|>analysis<|message|>Hm.")["input_ids"]
    row, _ = reward_of(tokenizer).encode_rollout(tokenizer, [prompt] * 2, [ids, ids])
    assert row == prompt.ids + ids + tokenizer("<|return|>")["input_ids"]
    assert capsys.readouterr().out.count("channels in the content") == 1


def test_other_end_tokens_in_one_template_go_through_text():
    """The policy's ids of the history are not what the reward model's own template writes."""
    policy, reward = (tiny.tokenizer("", eos=eos) for eos in ("<|endoftext|>", "<|im_end|>"))
    policy.chat_template = reward.chat_template = FAMILIES["zephyr"].template
    prompt = TokenizedPrompt(encode_prompt(policy, HISTORY), HISTORY)
    ids = policy(ANSWER)["input_ids"]
    (row,) = reward_of(reward).encode_rollout(policy, [prompt], [ids])
    assert row == transformers_ids(reward, FAMILIES["zephyr"], [*HISTORY, A(ANSWER)])


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_ids_without_a_token_go_through_text(template):
    """B8: embeddings are padded to sizes that no vocabulary has."""
    tokenizer = tiny.tokenizer(template)
    reward = RewardModel(tiny.model(tokenizer, "rm"), tokenizer)
    messages = QUESTION if tokenizer.chat_template else None
    prompt = TokenizedPrompt(encode_prompt(tokenizer, messages or "Who"), messages)
    good = tokenizer(" good")["input_ids"]
    rows = reward.encode_rollout(tokenizer, [prompt] * 2, [[*good, 511], [*good]])
    assert max(rows[0]) < len(tokenizer)
    assert rows[0] == reward.encode(messages or "Who", " good")
    assert reward.score_rollout(tokenizer, [prompt], [[400]], 1).rewards.isfinite().all()


# --- templates that leave out, refuse, fail

ROLES = "{'user': 'U', 'assistant': 'A', 'system': 'S'}"
LOSSES = {
    "other roles": (tiny.TEMPLATES["known"], [{"role": "critic", "content": "q"}], "critic"),
    "the system": (
        tiny.each(tiny.only("m.role != 'system'", tiny.TURN)),
        [S("s"), U("q")],
        "system",
    ),
    "answers in the history": (
        tiny.each(tiny.only("m.role == 'user'", tiny.TURN)),
        HISTORY,
        "assist",
    ),
    "all but the last turn": ("{% set m = messages[-1] %}" + tiny.TURN, HISTORY, "user"),
    "the first turn": ("{% for m in messages[1:] %}" + tiny.TURN + "{% endfor %}", HISTORY, "user"),
    "a second system": (
        tiny.each(tiny.only("m.role != 'system' or loop.first", tiny.TURN)),
        [S("s"), U("q"), S("t"), U("r")],
        "system",
    ),
    "everything": ("{{ bos_token }}", QUESTION, "user"),
    "an uppercase role": (tiny.TEMPLATES["known"], [{"role": "User", "content": "q"}], "User"),
}


@pytest.mark.parametrize("template, messages, role", LOSSES.values(), ids=LOSSES)
def test_turns_that_a_template_leaves_out_are_named(template, messages, role):
    """A-F9"""
    tokenizer = tiny.tokenizer(template)
    for encoded in (lambda: encode_prompt(tokenizer, messages), lambda: whole(tokenizer, messages)):
        with pytest.raises(UserError, match=f"leaves out turns of '{role}"):
            encoded()


def whole(tokenizer, messages):
    return reward_of(tokenizer).encode(messages, ANSWER)


def test_an_answer_that_a_template_leaves_out_is_named():
    """A-F9: a whole dialogue without its last turn would score all answers alike."""
    tokenizer = tiny.tokenizer(tiny.each(tiny.only("not loop.last or m.role == 'user'", tiny.TURN)))
    with pytest.raises(UserError, match="leaves out turns of 'assistant'"):
        whole(tokenizer, QUESTION)


def test_a_list_of_parts_that_is_printed_as_it_is_is_no_way_to_give_content():
    """A-F9: the words are in the text, and so are brackets and quotes."""
    refusal = refuse("m.content is string", "no texts")
    for body in (refusal + "{{ m.content }}", refusal + "{{ m.content | tojson }}"):
        with pytest.raises(UserError, match="refuses turns of 'user' .no texts"):
            encode_prompt(tiny.tokenizer(tiny.each(body)), QUESTION)


NEVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAILURES = {
    "TypeError": "{{ messages[0]['content'] + 1 }}",
    "ZeroDivisionError": "{{ 1/0 }}",
    "no loader": "{% include 'x' %}",
    "a range too big": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for m in messages %}{{ m.content }",
    "unknown filter": "{{ messages | nonsense }}",
    "undefined": "{{ messages[0].content.text.value }}",
    "attributes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an unknown tag": "{% nonsense %}",
    "a key": "{{ {}['x'].y }}",
    "a call of a text": "{{ 'a'() }}",
}


@pytest.mark.parametrize("template", FAILURES.values(), ids=FAILURES)
def test_whatever_a_template_raises_is_one_line(template):
    """S19, A-H6: the template's own error, and nothing about roles."""
    tokenizer = tiny.tokenizer(template)
    with pytest.raises(
        UserError, match="the chat template fails \\(\\w+: .*--format plain"
    ) as error:
        encode_prompt(tokenizer, QUESTION)
    assert "\n" not in str(error.value) and "roles" not in str(error.value)


def test_a_refusal_is_the_templates_own():
    """A-G13: which turns, and why; the caller names the row."""
    with pytest.raises(UserError, match="refuses turns of 'user', 'user' .roles must alternate"):
        encode_prompt(tiny.tokenizer("strict"), [U("a"), U("b")])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_never_ends_is_stopped(monkeypatch, in_main_thread, role):
    """S19: in any thread, once, and no thread goes on working."""
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny.tokenizer(tiny.each(tiny.only(f"m.role == '{role}'", NEVER) + tiny.TURN))
    errors, before = [], threading.active_count()

    def encode():
        for _ in range(20):  # as many rows: each told at once, after the first
            with pytest.raises(UserError, match="does not end in 0.2 seconds") as error:
                encode_prompt(tokenizer, HISTORY)
            errors.append(error)

    if in_main_thread:
        encode()
    else:
        thread = threading.Thread(target=encode)
        thread.start()
        thread.join(10)
    assert len(errors) == 20
    for thread in threading.enumerate():
        if thread.daemon and "lambda" in thread.name:
            thread.join(5)
    assert threading.active_count() == before


def test_several_templates_without_a_default_are_one_line():
    """A-G8"""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"tool_use": tiny.TEMPLATES["chatml"], "rag": "x"}
    for encoded in (lambda: wants_chat(tokenizer, "auto"), lambda: whole(tokenizer, QUESTION)):
        with pytest.raises(UserError, match="called tool_use, rag, and none called default"):
            encoded()
    assert wants_chat(tokenizer, "plain") is False


# --- special tokens in texts

RENDERED = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template, prompts, said",
    [
        ("chatml", [[U(RENDERED)], [U("q")], [S("a<|im_end|>"), U("q")]], "2 of 3 odd prompts"),
        ("chatml", [[U("q")], HISTORY], ""),
        ("plain", [RENDERED, "q"], "1 of 2 odd prompts"),
        ("chatml", [[U("a <|endoftext|> b")]], "1 of 1 odd prompts"),
        ("chatml", [[U("a < |im_end| > <|im_endoftext|>")]], ""),
    ],
)
def test_special_tokens_in_prompts_are_counted_in_one_line(template, prompts, said, capsys):
    """A-F7"""
    tokenize_prompts(tiny.tokenizer(template), prompts, 500, None, "odd")
    out = capsys.readouterr().out
    assert said in out and out.count("special tokens such as <|") == bool(said)
    assert out.count("--format plain") == (bool(said) and template == "chatml")


def test_special_tokens_in_pairs_are_counted_in_one_line(capsys):
    """A-F7"""
    reward = reward_of(tiny.tokenizer("chatml"))
    rows = [{"prompt": QUESTION, "chosen": f"a{i}", "rejected": "b"} for i in range(5)]
    rows[2]["chosen"] += "<|im_end|>\n"
    rows[4]["rejected"] += "<|im_start|>"
    pairs = [read_pair(row, "", print, chat=True) for row in rows]
    drawing = dict(max_tokens=500, max_pairs=9, seed=0)
    encode_pairs(pairs, reward.tokenizer, **drawing)
    out = capsys.readouterr().out
    assert "2 of 5 pairs hold special tokens such as <|im_end|>" in out and "--format plain" in out


@pytest.mark.parametrize("mark", ["[INST] q [/INST]", "<start_of_turn>user\nq", "### Response:\n"])
def test_prompts_that_another_template_rendered_are_counted(mark, capsys):
    """A-F7"""
    tokenize_prompts(tiny.tokenizer("chatml"), [[U(mark)], [U("q")]], 500, None, "odd")
    out = capsys.readouterr().out
    assert "1 of 2 odd prompts hold marks of a template" in out and "--format plain" in out
    tokenize_prompts(tiny.tokenizer("plain"), [mark, "q"], 500, None, "odd")
    assert "marks" not in capsys.readouterr().out


def test_many_roles_are_refused_as_fast_as_few():
    """A-F9"""
    talk = [{"role": f"speaker {i}", "content": "Hi."} for i in range(40)]
    with pytest.raises(UserError, match="leaves out turns of 'speaker 0'"):
        encode_prompt(tiny.tokenizer("known"), talk)


@pytest.mark.parametrize("change", ["lower", "upper", "reverse"])
def test_a_template_that_changes_the_words_is_refused(change):
    """A-F9"""
    template = tiny.TEMPLATES["chatml"].replace("m.content", f"m.content|{change}")
    with pytest.raises(UserError, match="leaves out turns of 'user'"):
        encode_prompt(tiny.tokenizer(template), [U("Why?")])


def test_generate_counts_special_tokens(here, capsys):
    """A-F7"""
    save("lm", "chatml")
    generate.main(["--model", "lm", "--prompt", RENDERED, "q", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("1 of 2 prompts hold special tokens such as <|im_start|>") == 1


# --- texts of completions


def byte_fallback():
    """As Llama-2, Mistral, Gemma: what is no letter is written in bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {c: len(vocab) + i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz.'")}
    bpe = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


TEXTS = [
    "你好 abc",
    "a 个 bad film",
    "née é bon",
    "🙂🙂 ok 🙂",
    "plain words",
    "个个个个",
    "x\ufffdy 好",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [byte_fallback, tiny.tokenizer])
def test_a_completion_is_whole_whatever_byte_the_prompt_was_cut_at(kind, text):
    """B7: the references are the text's own characters, by their numbers of bytes."""
    tokenizer = kind()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    data = text.encode()
    for k in range(len(ids) + 1):
        prompt, completion = decode_parts(tokenizer, ids[:k], ids[k:])
        assert prompt + completion == text
        # Bytes of the prompt's ids: each token is a byte, or some letters.
        tokens = tokenizer.convert_ids_to_tokens(ids[:k])
        if kind is byte_fallback:
            size = sum(1 for t in tokens) - any(t == "▁" for t in tokens[:1])
        else:
            size = sum(map(len, tokens))
        known = data[: max(size, 0)].decode(errors="ignore")
        assert prompt in (known, known + "\ufffd" * ("\ufffd" in text))


@pytest.mark.parametrize("kind", [byte_fallback, tiny.tokenizer])
@pytest.mark.parametrize("text", ["\nabc 好", "\n", " abc", "abc", "好 abc"])
def test_a_completion_is_whole_after_a_character_that_nobody_finishes(kind, text):
    """B7: Llama-2's line end is a byte, and a policy may sample one after half a character."""
    tokenizer = kind()
    half = tokenizer("a 个")["input_ids"][:-1]
    ids = tokenizer(f"x{text}")["input_ids"]
    ids = ids[next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]) == "x") :]
    assert decode_parts(tokenizer, half, ids)[1] == text


@pytest.mark.parametrize("kind", [byte_fallback, tiny.tokenizer])
def test_a_completion_that_is_cut_in_a_character_keeps_those_before(kind):
    """B7: --max-new-tokens may end in a character."""
    tokenizer = kind()
    ids = tokenizer("个 你好")["input_ids"]
    for k in range(2, len(ids) - 1):
        prompt, completion = decode_parts(tokenizer, ids[:k], ids[k:-1])
        assert (prompt + completion).rstrip("\ufffd") == "个 你"


# --- the programs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with p.jsonl, d.jsonl and rules.py."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is the {n} film ?"} for n in range(40)]
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(40)
    ]
    write("p.jsonl", rows)
    write("d.jsonl", pairs)
    (tmp_path / "rules.py").write_text("def short(p, c): return [-len(x) / 10 for x in c]\n")
    return tmp_path


def write(path, rows):
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def save(folder, template, head="lm", **config):
    tokenizer = tiny.tokenizer(template)
    tiny.save(folder, tiny.model(tokenizer, head, **config), tokenizer)


def refused(main, argv, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main(argv)
    error = capsys.readouterr().err.rpartition("error: ")[2]  # a progress bar may be before it
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def scores(rm, rows, *flags):
    write("texts.jsonl", rows)
    score.main(["--rm", rm, "--data", "texts.jsonl", "--out", "o.jsonl", "--device", "cpu", *flags])
    with open("o.jsonl") as file:
        return [json.loads(line)["reward"] for line in file]


def transformers_score(folder, messages):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("template", ["think", "nocue", "chatml"])
def test_score_gives_the_rewards_of_transformers(template, here):
    """A-F8, A-F12"""
    save("rm", template, "rm")
    answers = ["Jane Austen.", " Jane Austen.", "Jane Austen.\n"]
    got = scores("rm", [{"prompt": QUESTION, "completion": a} for a in answers])
    expected = transformers_score("rm", [*QUESTION, A("Jane Austen.")])
    assert got == pytest.approx([expected] * 3, abs=1e-5)


def test_score_gives_content_in_parts_where_the_template_wants_them(here):
    """A-F9 (a)"""
    save("rm", "parts", "rm")
    got = scores("rm", [{"prompt": q, "completion": "yes"} for q in ("one?", "two?", "three?")])
    expected = [
        transformers_score(
            "rm",
            [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("user", q), ("assistant", "yes"))
            ],
        )
        for q in ("one?", "two?", "three?")
    ]
    assert got == pytest.approx(expected, abs=1e-5) and len(set(got)) == 3


def test_score_names_the_row_that_a_template_refuses(here, capsys):
    """A-G13"""
    save("rm", "strict", "rm")
    good, bad = ({"prompt": turns, "completion": "b"} for turns in ([U("a")], [U("a"), U("b")]))
    line = refused(lambda rows: scores("rm", rows), [good, bad, bad], capsys)
    assert "refuses turns of 'user', 'user'" in line and "row 2" in line
    write("texts.jsonl", [good, bad])
    score.main("--rm rm --data texts.jsonl --out o.jsonl --device cpu".split())
    said = capsys.readouterr().out
    assert "refuses turns of 'user', 'user'" in said and "row 2" in said


POLICY = "--steps 1 --batch-size 4 --eval-prompts 4 --max-new-tokens 4 --device cpu --out r".split()
PAIRS = "--model lm --dataset d.jsonl --steps 1 --batch-size 4 --device cpu --out out".split()


def policy(*flags):
    train_policy.main(["--model", "lm", "--dataset", "p.jsonl", *POLICY, *flags])


def test_a_role_that_the_policys_template_leaves_out_ends_the_run(here, capsys):
    """A-F9 (b)"""
    save("lm", "known")
    write("p.jsonl", [{"prompt": [{"role": "critic", "content": f"q {n}"}]} for n in range(40)])
    line = refused(lambda a: policy(*a), ["--rm", "rules:short"], capsys)
    assert "leaves out turns of 'critic'" in line


def test_a_policy_whose_embeddings_are_padded_is_scored(here):
    """B8: ids from 300 on are no tokens, and most of what a random policy of 512 rows samples."""
    save("lm", "plain", vocab_size=512)
    save("rm", "plain", "rm")
    policy("--rm", "rm")
    with open("r/metrics.jsonl") as file:
        assert all(json.loads(line)["reward"] is not None for line in file)


def test_rendered_prompts_and_pairs_are_said_and_notes_come_before_the_first_step(here, capsys):
    """A-F7 and A-F8 in the scripts: one line each."""
    save("lm", "chatml")
    save("rm", "think", "rm")
    rows = [
        {"prompt": f"<|im_start|>user\n{n}<|im_end|>\n<|im_start|>assistant\n"} for n in range(40)
    ]
    write("p.jsonl", rows)
    policy("--rm", "rm")
    out = capsys.readouterr().out
    assert "prompts hold special tokens such as <|im_start|>" in out
    assert out.count("as it writes them there") == 1
    assert out.index("as it writes them there") < out.index("step  ")
    write("d.jsonl", [row | {"chosen": "a<|im_end|>", "rejected": "b"} for row in rows])
    train_rm.main(PAIRS)
    said = re.search(r"(\d+) of (\d+) pairs hold special tokens", capsys.readouterr().out)
    assert said and said[1] == said[2]


def test_a_reward_model_of_plain_pairs_says_that_it_loses_its_template(here, capsys):
    """A-F1's remark, when it is trained and when it is asked about dialogues."""
    save("lm", "chatml")
    write("d.jsonl", [{"chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)])
    train_rm.main(PAIRS)
    assert "saved without its chat template" in capsys.readouterr().out
    policy("--rm", "out")
    assert "note: out reads plain text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "template, words",
    [
        ([{"name": "tool_use", "template": "x"}], "none called default"),
        ("{{ 1/0 }}", "ZeroDivisionError"),
        (5, "got 5, expected a text"),
        (
            [{"name": "default", "template": "x"}, {"name": "../../evil", "template": "x"}],
            "'../../evil'",
        ),
        ([{"name": "default", "template": 7}], "got 7, expected a text"),
        ([{"name": "default", "template": "x"}, {"name": "/etc/x", "template": "x"}], "'/etc/x'"),
        ([{"name": "default", "template": "x"}, {"name": "a\\b", "template": "x"}], "'a"),
    ],
)
def test_broken_templates_are_one_line_in_every_program(template, words, here, capsys):
    """A-G8, S19, S1"""
    save("lm", "plain")
    save("rm", "plain", "rm")
    for folder in ("lm", "rm"):
        path = here / folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    write("texts.jsonl", [{"prompt": "q", "completion": "a"}])
    for main, argv in {
        train_rm.main: PAIRS,
        train_policy.main: [
            "--model",
            "lm",
            "--dataset",
            "p.jsonl",
            "--rm",
            "rules:short",
            *POLICY,
        ],
        generate.main: ["--model", "lm", "--prompt", "q", "--device", "cpu"],
        score.main: ["--rm", "rm", "--data", "texts.jsonl", "--device", "cpu"],
    }.items():
        assert words in refused(main, argv, capsys)


def test_an_end_token_inside_a_text_is_scored_by_an_encoder_decoder(tmp_path):
    """A-G6: as it is alone, whatever its neighbours hold."""
    tokenizer = tiny.tokenizer(eos="<|endoftext|>")
    torch.manual_seed(0)
    size = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    size |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=1)
    config = BartConfig(vocab_size=len(tokenizer), num_labels=1, **size, **special)
    model = BartForSequenceClassification(config).eval()
    reward = RewardModel(model, tokenizer)
    texts = [f"film {i} is good" for i in range(6)]
    texts[1] += "<|endoftext|> or not"
    texts[4] = "<|endoftext|> a <|endoftext|> b"
    got = reward.score([""] * 6, texts)
    for text, value in zip(texts, got):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [1]])
        with torch.no_grad():
            assert value.item() == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)
