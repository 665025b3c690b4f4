"""Prompts and whole texts become ids in one way: begin and end once, and what is scored is what was trained on."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minalign.chat import (
    TokenizedPrompt,
    answer_frame,
    encode,
    encode_prompt,
    encode_whole,
    first_turn,
    to_messages,
    to_text,
    wants_chat,
)  # fmt: skip
from minalign.common import UserError
from minalign.reward import RewardModel, same_ids

USER, ASSISTANT = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
SYSTEM = lambda text: {"role": "system", "content": text}
QUESTION = [USER("Who wrote Emma?")]
DIALOGUE = [USER("Who wrote Emma?"), ASSISTANT("Jane Austen."), USER("When?")]

# --- tokenizers ------------------------------------------------------------------------------------------------------

SMOL = (  # SmolLM2's: a system prompt of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (  # no system role; roles alternate; writes the begin token
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] | trim + '<turn_end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
LLAMA = (  # writes the begin token; no text after the end of a turn
    "{{ bos_token }}{% for message in messages %}{{ '<turn>' + message['role'] + '\n\n' + message['content'] + '<turn_end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n\n' }}{% endif %}"
)
THINK = SMOL.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")  # a cue that the history has not
OPEN = "{% for m in messages %}{{ '\nQ: ' + m['content'] + '\nA:\n' if m['role'] == 'user' else m['content'] }}{% endfor %}"  # no ending

TEXT = "Who wrote Emma? Jane Austen wrote it in 1815, and When she wrote, Human and Assistant were user and assistant. "


def make_tokenizer(bos=None, eos=None, adds="$A", template=None, extra=(), shuffled=False):
    """Byte-level BPE as GPT-2's; `adds`: what it puts around a text by itself; `shuffled`: the same tokens with other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reserved = ["<reserved>"] * shuffled
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=reserved, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    special = ["<|im_start|>", "<|im_end|>", "<turn>", "<turn_end>", "<bos>", "<eos>", "[CLS]", "[SEP]", *extra]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


TOKENIZERS = {
    "smol": {"bos": "<|im_start|>", "eos": "<|im_end|>", "template": SMOL},
    "gemma": {"bos": "<bos>", "eos": "<eos>", "adds": "<bos> $A", "template": GEMMA},
    "llama": {"bos": "<bos>", "eos": "<turn_end>", "adds": "<bos> $A", "template": LLAMA},
    "both added": {"bos": "<bos>", "eos": "<eos>", "adds": "<bos> $A <eos>", "template": LLAMA},
    "no bos": {"eos": "<|im_end|>", "template": SMOL},  # Qwen's
    "think": {"bos": "<|im_start|>", "eos": "<|im_end|>", "template": THINK},
    "open": {"bos": "<bos>", "eos": "<eos>", "template": OPEN},
    "plain": {"bos": "<bos>", "eos": "<eos>"},
    "gpt2": {"bos": "<eos>", "eos": "<eos>"},
    "gpt2 without bos": {"eos": "<eos>"},
}
CHAT = [name for name, options in TOKENIZERS.items() if "template" in options]


def tokenizer_like(name):
    return make_tokenizer(**TOKENIZERS[name])


# --- plain texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <bos> $A <eos> <eos>"])
def test_a_text_begins_once_and_ends_once_or_not_at_all(adds):
    tokenizer = make_tokenizer("<bos>", "<eos>", adds)
    bare = tokenizer("Who wrote", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len({bos, eos, *bare}) > 3
    assert encode(tokenizer, "Who wrote", end=True) == [bos, *bare, eos]
    assert encode(tokenizer, "Who wrote", end=False) == [bos, *bare]
    assert encode(tokenizer, "", end=True) == [bos, eos]
    assert encode(tokenizer, "", end=False) == [bos]


@pytest.mark.parametrize("adds", ["$A", "<eos> $A"])
def test_one_token_that_is_begin_and_end(adds):
    tokenizer = make_tokenizer("<eos>", "<eos>", adds)
    bare, eos = tokenizer("Who", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    assert encode(tokenizer, "Who", end=True) == [eos, *bare, eos]
    assert encode(tokenizer, "Who", end=False) == [eos, *bare]
    assert encode(tokenizer, "", end=False) == [eos]


def test_tokens_that_a_tokenizer_lacks_are_left_out():
    for bos, eos in ((None, "<eos>"), ("<bos>", None), (None, None)):
        tokenizer = make_tokenizer(bos, eos)
        bare = tokenizer("Who wrote")["input_ids"]
        begin, end = ([tokenizer.bos_token_id] * (bos is not None), [tokenizer.eos_token_id] * (eos is not None))
        assert encode(tokenizer, "Who wrote", end=True) == begin + bare + end
        assert encode(tokenizer, "Who wrote", end=False) == begin + bare


def test_an_encoder_keeps_its_own_frame():
    """BERT has neither begin nor end token, but [CLS] and [SEP] around the whole text, once."""
    tokenizer = make_tokenizer(adds="[CLS] $A [SEP]")
    assert tokenizer.decode(encode_whole(tokenizer, "Who", " wrote")) == "[CLS]Who wrote[SEP]"
    assert (
        tokenizer.decode(encode_whole(tokenizer, QUESTION, "Jane")) == "[CLS]\n\nHuman: Who wrote Emma?\n\nAssistant: Jane[SEP]"
    )


@pytest.mark.parametrize("adds", ["$A", "<bos> $A <eos>"])
def test_special_tokens_written_in_the_text_are_not_doubled(adds):
    """Text from a chat template holds them already (A2)."""
    tokenizer = make_tokenizer("<bos>", "<eos>", adds)
    assert tokenizer.decode(encode(tokenizer, "<bos>Who wrote<eos>", end=True)) == "<bos>Who wrote<eos>"
    assert tokenizer.decode(encode(tokenizer, "<bos>Who<eos> wrote<bos>", end=False)) == "<bos>Who<eos> wrote<bos>", (
        "those inside stay"
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_prompt_and_completion_begin_once_and_end_once(name):
    tokenizer = tokenizer_like(name)
    prompt, whole = encode_prompt(tokenizer, "Who wrote"), encode_whole(tokenizer, "Who wrote", " Emma?")
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    assert tokenizer.decode(prompt) == f"{begin}Who wrote"
    assert tokenizer.decode(whole) == f"{begin}Who wrote Emma?{end}"
    assert whole[: len(prompt)] == prompt


# --- chat ------------------------------------------------------------------------------------------------------------

SMOL_SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
SMOL_TURN = "<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name, prompt, ending", [
    ("smol", SMOL_SYSTEM + SMOL_TURN, "<|im_end|>\n"),
    ("no bos", SMOL_SYSTEM + SMOL_TURN, "<|im_end|>\n"),
    ("gemma", "<bos><turn>user\nWho wrote Emma?<turn_end>\n<turn>model\n", "<turn_end>\n"),
    ("llama", "<bos><turn>user\n\nWho wrote Emma?<turn_end><turn>assistant\n\n", "<turn_end>"),
    ("both added", "<bos><turn>user\n\nWho wrote Emma?<turn_end><turn>assistant\n\n", "<turn_end>"),
    ("think", SMOL_SYSTEM + SMOL_TURN + "<think>\n", "<|im_end|>"),
    ("open", "<bos>\nQ: Who wrote Emma?\nA:\n", "<eos>"),
    ("plain", "<bos>\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
    ("gpt2", "<eos>\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
    ("gpt2 without bos", "\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
])  # fmt: skip
def test_what_a_model_sees_of_a_question(name, prompt, ending):
    """Spelled out: begin once, the cue last, the end once (A2, A3, A9)."""
    tokenizer = tokenizer_like(name)
    answer = "Jane Austen." if tokenizer.chat_template else " Jane Austen."
    assert tokenizer.decode(encode_prompt(tokenizer, QUESTION)) == prompt
    assert tokenizer.decode(encode_whole(tokenizer, QUESTION, "Jane Austen.")) == prompt + answer + ending
    assert encode_whole(tokenizer, QUESTION, "Jane Austen.") == encode_whole(tokenizer, QUESTION, answer)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("messages", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
@pytest.mark.parametrize("completion", ["Jane Austen.", " Jane", "1815", "it\n\nwrote", "é…"])
def test_a_prompt_is_the_beginning_of_its_whole(name, messages, completion):
    tokenizer = tokenizer_like(name)
    prompt, whole = encode_prompt(tokenizer, messages), encode_whole(tokenizer, messages, completion)
    assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    assert completion in tokenizer.decode(whole[len(prompt) :])


@pytest.mark.parametrize("name", [name for name in CHAT if name not in ("think", "open")])
@pytest.mark.parametrize(
    "messages", [QUESTION, DIALOGUE, [SYSTEM("Be brief."), *DIALOGUE]], ids=["question", "dialogue", "system"]
)
def test_a_whole_is_what_the_template_makes_of_the_dialogue(name, messages):
    """The reward model sees what its template writes (A3), and its ids, not those of parts."""
    if name == "gemma" and messages[0]["role"] == "system":
        pytest.skip("refused")
    tokenizer = tokenizer_like(name)
    text = tokenizer.apply_chat_template([*messages, ASSISTANT("In 1815.")], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_whole(tokenizer, messages, "In 1815.") == ids
    assert name == "smol" or tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template, expected", [(LLAMA, "<bos><turn>"), (LLAMA.replace("{{ bos_token }}", ""), "<bos><turn>")])
@pytest.mark.parametrize("adds", ["$A", "<bos> $A"])
def test_begin_is_written_once_whoever_writes_it(template, expected, adds):
    tokenizer = make_tokenizer("<bos>", "<eos>", adds, template)
    for ids in (encode_prompt(tokenizer, DIALOGUE), encode_whole(tokenizer, DIALOGUE, "Jane")):
        assert tokenizer.decode(ids).startswith(expected) and ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_a_system_role_has_its_text_before_the_users():
    tokenizer = tokenizer_like("gemma")
    messages = [SYSTEM("Be brief."), *QUESTION]
    expected = "<bos><turn>user\nBe brief.\n\nWho wrote Emma?<turn_end>\n<turn>model\n"
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == expected
    assert tokenizer.decode(encode_whole(tokenizer, messages, "Jane.")) == expected + "Jane.<turn_end>\n"
    assert messages == [SYSTEM("Be brief."), *QUESTION]


def test_a_system_text_replaces_the_templates_own():
    text = tokenizer_like("smol").decode(encode_prompt(tokenizer_like("smol"), [SYSTEM("Be brief."), *QUESTION]))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + SMOL_TURN


@pytest.mark.parametrize("messages", [[USER("a"), USER("b")], [SYSTEM("a"), USER("b"), USER("c")], [SYSTEM("a")]])
def test_roles_that_a_template_refuses_are_named(messages):
    with pytest.raises(UserError, match="the chat template refuses turns of .*user|system") as error:
        encode_prompt(tokenizer_like("gemma"), messages)
    assert "\n" not in str(error.value)


def test_other_errors_of_a_template_are_no_users_errors():
    with pytest.raises(KeyError):
        encode_prompt(tokenizer_like("plain"), [{"role": "user"}])


def test_a_template_without_ending_of_a_tokenizer_without_end_token():
    tokenizer = make_tokenizer("<bos>", None, template=OPEN)
    assert answer_frame(tokenizer) == ("", "")
    assert tokenizer.decode(encode_whole(tokenizer, QUESTION, "Jane.")) == "<bos>\nQ: Who wrote Emma?\nA:\nJane."


def test_plain_dialogue_takes_one_space_before_the_answer():
    tokenizer = tokenizer_like("plain")
    rows = [encode_whole(tokenizer, QUESTION, completion) for completion in ("Jane", " Jane")]
    assert rows[0] == rows[1] and tokenizer.decode(rows[0]).endswith("Assistant: Jane<eos>")
    assert tokenizer.decode(encode_whole(tokenizer, QUESTION, "\nJane")).endswith("Assistant:\nJane<eos>")


def test_format_is_what_the_tokenizer_allows():
    chat, plain = tokenizer_like("smol"), tokenizer_like("plain")
    assert [wants_chat(chat, name) for name in ("auto", "chat", "plain")] == [True, True, False]
    assert wants_chat(plain, "auto") is None and wants_chat(plain, "plain") is False
    with pytest.raises(UserError, match="--format chat: .*--format plain"):
        wants_chat(plain, "chat")


# --- the one text format of policy and reward model ------------------------------------------------------------------


def reward_like(tokenizer):
    config = SimpleNamespace(num_labels=1, max_position_embeddings=512)
    return RewardModel(SimpleNamespace(config=config), tokenizer)


@pytest.mark.parametrize("policy, reward", [
    (dict(TOKENIZERS["smol"]), dict(TOKENIZERS["smol"])),
    (dict(TOKENIZERS["llama"]), dict(TOKENIZERS["llama"])),
    (dict(TOKENIZERS["think"]), dict(TOKENIZERS["think"])),
    (dict(TOKENIZERS["open"]), dict(TOKENIZERS["open"])),
    (dict(TOKENIZERS["smol"]), dict(TOKENIZERS["smol"], shuffled=True)),
    (dict(TOKENIZERS["smol"], shuffled=True), dict(TOKENIZERS["gemma"])),
    (dict(TOKENIZERS["gemma"]), dict(TOKENIZERS["llama"])),  # one vocabulary, two templates
    (dict(TOKENIZERS["gemma"]), dict(TOKENIZERS["plain"])),  # ... and none
    (dict(TOKENIZERS["smol"]), dict(TOKENIZERS["gpt2"], shuffled=True)),
    (dict(TOKENIZERS["smol"]), {"adds": "[CLS] $A [SEP]"}),
    (dict(TOKENIZERS["plain"]), dict(TOKENIZERS["llama"])),  # a policy without a template, asked by messages
])  # fmt: skip
@pytest.mark.parametrize(
    "messages", [QUESTION, DIALOGUE, [SYSTEM("Be brief."), *DIALOGUE]], ids=["question", "dialogue", "system"]
)
def test_chat_rollouts_are_scored_as_their_texts(policy, reward, messages):
    """Ids that differ, templates that differ or lack: what is scored is what was trained on (A3, A6)."""
    policy, reward = make_tokenizer(**policy), reward_like(make_tokenizer(**reward))
    completion = " Jane Austen, 1815."
    ids = policy(completion, add_special_tokens=False)["input_ids"]
    got = reward.encode_rollout(policy, [TokenizedPrompt(encode_prompt(policy, messages), messages)], [ids])
    assert got == [reward.encode(messages, completion)]


@pytest.mark.parametrize("policy, reward", [
    (dict(TOKENIZERS["plain"]), dict(TOKENIZERS["plain"])),
    (dict(TOKENIZERS["plain"]), dict(TOKENIZERS["plain"], shuffled=True)),
    (dict(TOKENIZERS["gpt2"]), dict(TOKENIZERS["plain"])),
    (dict(TOKENIZERS["plain"]), dict(TOKENIZERS["gpt2 without bos"])),
    (dict(TOKENIZERS["gpt2 without bos"]), dict(TOKENIZERS["plain"], adds="<bos> $A <eos>")),
    (dict(TOKENIZERS["plain"]), {"adds": "[CLS] $A [SEP]", "shuffled": True}),
    (dict(TOKENIZERS["smol"]), dict(TOKENIZERS["smol"], template=None)),  # --format plain
    (dict(TOKENIZERS["llama"]), dict(TOKENIZERS["llama"], template=None, shuffled=True)),
    (dict(TOKENIZERS["plain"], extra=["<a>"]), dict(TOKENIZERS["plain"], extra=["<a>", "<b>"])),
    (dict(TOKENIZERS["plain"], extra=["<a>", "<b>"]), dict(TOKENIZERS["plain"], extra=["<a>"])),
])  # fmt: skip
@pytest.mark.parametrize("prompt", ["Who wrote", "\n\nHuman: Who wrote Emma?\n\nAssistant:", "é…"])
def test_plain_rollouts_are_scored_as_their_texts(policy, reward, prompt):
    policy, reward = make_tokenizer(**policy), reward_like(make_tokenizer(**reward))
    completion = " Emma, 1815."
    ids = policy(completion, add_special_tokens=False)["input_ids"]
    got = reward.encode_rollout(policy, [TokenizedPrompt(encode_prompt(policy, prompt))], [ids])
    assert got == [reward.encode(prompt, completion)] and len(got[0]) > 4


def test_a_token_that_the_reward_model_lacks_goes_through_text():
    """Its id is outside the reward model's embedding, or another token there (A6); the other way round, ids serve."""
    policy, reward = make_tokenizer("<bos>", "<eos>", extra=["<a>", "<b>"]), make_tokenizer("<bos>", "<eos>", extra=["<a>"])
    assert same_ids(reward, policy) and not same_ids(policy, reward)
    ids = policy("<b> wrote")["input_ids"]
    (got,) = reward_like(reward).encode_rollout(policy, [TokenizedPrompt(encode_prompt(policy, "Who"))], [ids])
    assert got == reward_like(reward).encode("Who", "<b> wrote") and max(ids) >= len(reward) > max(got)


# --- dialogues in text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, turns", [
    ("Why?", [USER("Why?")]),
    ("  Why?\n", [USER("  Why?\n")]),
    ("Say:\n\nHuman: hi", [USER("Say:\n\nHuman: hi")]),  # does not begin as a dialogue
    ("\n\nHuman: Hi!\n\nAssistant:", [USER("Hi!")]),
    ("\n\nHuman: Hi!", [USER("Hi!")]),
    ("\n\nHuman: Hi!\n\nYes?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:", [USER("Hi!\n\nYes?"), ASSISTANT("Hello."), USER("Why?")]),
    ("\n\nHuman: Hi!\n\nAssistant: Hello.", [USER("Hi!"), ASSISTANT("Hello.")]),
    ("Hi!\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?", [USER("Hi!"), ASSISTANT("Hello."), USER("Why?")]),
    ("Hi!\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n", [USER("Hi!"), ASSISTANT("Hello."), USER("Why?")]),
    ("<extra_id_1>User\nHi!\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?", [USER("Hi!"), ASSISTANT("Hello."), USER("Why?")]),
    ("Two\nlines\n\n<extra_id_1>Assistant\nA\n\nB\n<extra_id_1>User\n\nWhy?", [USER("Two\nlines"), ASSISTANT("A\n\nB"), USER("Why?")]),
])  # fmt: skip
def test_turns_of_a_text(text, turns):
    """The flattened turns of hh-rlhf and HelpSteer are turns again, in alternating roles (A14)."""
    assert to_messages(text) == turns


def test_messages_stay_as_they_are_and_come_back_from_their_text():
    assert to_messages(DIALOGUE) is DIALOGUE
    assert to_messages(to_text(DIALOGUE)) == DIALOGUE
    assert to_text(DIALOGUE) == "\n\nHuman: Who wrote Emma?\n\nAssistant: Jane Austen.\n\nHuman: When?\n\nAssistant:"
    assert to_text([SYSTEM("Be brief."), *QUESTION]) == "\n\nSystem: Be brief.\n\nHuman: Who wrote Emma?\n\nAssistant:"


@pytest.mark.parametrize("prompt", [
    "Hi!", " Hi!\n", [USER("Hi! ")], [SYSTEM("Be brief."), USER("Hi!")], [USER("Hi!"), ASSISTANT("Yes?"), USER("Why?")],
    "\n\nHuman: Hi!\n\nAssistant:", "\n\nHuman:  Hi!\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
    "Hi!\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?", "<extra_id_1>User\nHi!\n<extra_id_1>Assistant\nHello.",
    to_text([SYSTEM("Be brief."), USER("Hi!")]), to_text([SYSTEM("Be brief."), USER("Hi!"), ASSISTANT("Yes?"), USER("Why?")]),
])  # fmt: skip
def test_every_form_of_a_prompt_has_the_same_first_turn(prompt):
    """Or one form would be trained on where another is held out."""
    assert first_turn(prompt) == "Hi!"


@pytest.mark.parametrize("content", ["Hi!", "Say:\n\nHuman: hi\n\nAssistant: ho", "a <extra_id_1>User\nb", "\n\nHuman: Hi!"])
def test_the_first_turn_is_the_same_as_text_and_as_messages(content):
    for messages in ([USER(content)], [USER(content), ASSISTANT("Yes?"), USER("Why?")], [SYSTEM("Be brief."), USER(content)]):
        assert first_turn(messages) == first_turn(to_text(messages))


def test_a_prompt_without_a_user_has_a_first_turn():
    assert first_turn([SYSTEM("Write.")]) == "Write."


def hh_rows():
    files = sorted((Path(__file__).parents[2] / "shared/data/hh-rlhf").glob("*.jsonl.gz"))
    if not files:
        pytest.skip("no hh-rlhf here")
    for file in files:
        with gzip.open(file, "rt") as lines:
            yield from map(json.loads, lines)


def test_real_dialogues_alternate_and_come_back():
    alternate = total = 0
    for row in hh_rows():
        prompt = row["chosen"][: row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")]
        messages = to_messages(prompt)
        roles = [message["role"] for message in messages]
        total += 1
        alternate += roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all("\n\nHuman:" not in message["content"] for message in messages)
        assert to_messages(to_text(messages)) == messages
        assert first_turn(prompt) == first_turn(messages)
    assert total > 4000 and alternate / total > 0.99
