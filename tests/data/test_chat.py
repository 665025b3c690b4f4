"""Prompts and whole texts become ids in one way: what is scored is what was trained on."""

import gzip
import json
from pathlib import Path

import pytest
from messages import assistant, system, user
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from minalign.data.chat import (
    TokenizedPrompt,
    answer_frame,
    encode,
    encode_prompt,
    encode_whole,
    wants_chat,
)
from minalign.data.messages import first_turn, to_messages, to_text
from minalign.reward import RewardModel, same_ids
from minalign.running.errors import UserError

QUESTION = [user("Who wrote Emma?")]
DIALOGUE = [user("Who wrote Emma?"), assistant("Jane Austen."), user("When?")]

# --- tokenizers

SMOL = (  # SmolLM2's: a system prompt of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (  # no system role; roles alternate; writes the begin token
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' "
    "+ message['content'] | trim + '<turn_end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
LLAMA = (  # writes the begin token; no text after the end of a turn
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<turn>' + message['role'] + '\n\n' + message['content'] + '<turn_end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n\n' }}{% endif %}"
)
# a cue that the history has not
THINK = SMOL.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
OPEN = (  # no ending
    "{% for m in messages %}"
    "{{ '\nQ: ' + m['content'] + '\nA:\n' if m['role'] == 'user' else m['content'] }}{% endfor %}"
)

TEXT = (
    "Who wrote Emma? Jane Austen wrote it in 1815, and When she wrote, Human and Assistant were "
    "user and assistant. "
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<turn>", "<turn_end>", "<bos>", "<eos>", "[CLS]", "[SEP]"]


def make_tokenizer(bos=None, eos=None, adds="$A", template=None, extra=(), shuffled=False):
    """Byte-level BPE, as GPT-2's.

    Args:
        adds: what the tokenizer puts around a text by itself.
        extra: further special tokens.
        shuffled: whether the same tokens have other ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reserved = ["<reserved>"] * shuffled
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=reserved, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    special = [*SPECIAL, *extra]
    added = [AddedToken(token, normalized=False, special=True) for token in special]
    tokenizer.add_special_tokens(added)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )
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


# --- plain texts


@pytest.mark.parametrize(
    "adds", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<bos> <bos> $A <eos> <eos>"]
)
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
        begin = [tokenizer.bos_token_id] * (bos is not None)
        end = [tokenizer.eos_token_id] * (eos is not None)
        assert encode(tokenizer, "Who wrote", end=True) == begin + bare + end
        assert encode(tokenizer, "Who wrote", end=False) == begin + bare


def test_an_encoder_keeps_its_own_frame():
    """BERT has neither begin nor end token, but [CLS] and [SEP] around the whole text, once."""
    tokenizer = make_tokenizer(adds="[CLS] $A [SEP]")
    assert tokenizer.decode(encode_whole(tokenizer, "Who", " wrote")) == "[CLS]Who wrote[SEP]"
    text = tokenizer.decode(encode_whole(tokenizer, QUESTION, "Jane"))
    assert text == "[CLS]\n\nHuman: Who wrote Emma?\n\nAssistant: Jane[SEP]"


@pytest.mark.parametrize("adds", ["$A", "<bos> $A <eos>"])
def test_special_tokens_written_in_the_text_are_not_doubled(adds):
    """Text from a chat template holds them already."""
    tokenizer = make_tokenizer("<bos>", "<eos>", adds)
    framed, inside = "<bos>Who wrote<eos>", "<bos>Who<eos> wrote<bos>"
    assert tokenizer.decode(encode(tokenizer, framed, end=True)) == framed
    assert tokenizer.decode(encode(tokenizer, inside, end=False)) == inside, "those inside stay"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_prompt_and_completion_begin_once_and_end_once(name):
    tokenizer = tokenizer_like(name)
    prompt = encode_prompt(tokenizer, "Who wrote")
    whole = encode_whole(tokenizer, "Who wrote", " Emma?")
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    assert tokenizer.decode(prompt) == f"{begin}Who wrote"
    assert tokenizer.decode(whole) == f"{begin}Who wrote Emma?{end}"
    assert whole[: len(prompt)] == prompt


# --- chat

SMOL_SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
SMOL_TURN = "<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\n"


LLAMA_TURN = "<turn>user\n\nWho wrote Emma?<turn_end><turn>assistant\n\n"


@pytest.mark.parametrize(
    "name, prompt, ending",
    [
        ("smol", SMOL_SYSTEM + SMOL_TURN, "<|im_end|>\n"),
        ("no bos", SMOL_SYSTEM + SMOL_TURN, "<|im_end|>\n"),
        ("gemma", "<bos><turn>user\nWho wrote Emma?<turn_end>\n<turn>model\n", "<turn_end>\n"),
        ("llama", "<bos>" + LLAMA_TURN, "<turn_end>"),
        ("both added", "<bos>" + LLAMA_TURN, "<turn_end>"),
        ("open", "<bos>\nQ: Who wrote Emma?\nA:\n", ""),
        ("plain", "<bos>\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
        ("gpt2", "<eos>\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
        ("gpt2 without bos", "\n\nHuman: Who wrote Emma?\n\nAssistant:", "<eos>"),
    ],
)
def test_what_a_model_sees_of_a_question(name, prompt, ending):
    """Spelled out: the begin token once, the cue last, the end token once."""
    tokenizer = tokenizer_like(name)
    answer = "Jane Austen." if tokenizer.chat_template else " Jane Austen."
    whole = encode_whole(tokenizer, QUESTION, "Jane Austen.")
    assert tokenizer.decode(encode_prompt(tokenizer, QUESTION)) == prompt
    assert tokenizer.decode(whole) == prompt + answer + ending
    assert whole == encode_whole(tokenizer, QUESTION, answer)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "think"])
@pytest.mark.parametrize("messages", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
@pytest.mark.parametrize("completion", ["Jane Austen.", "1815", "it\n\nwrote", "é…"])
def test_a_prompt_is_the_beginning_of_its_whole(name, messages, completion):
    tokenizer = tokenizer_like(name)
    prompt = encode_prompt(tokenizer, messages)
    whole = encode_whole(tokenizer, messages, completion)
    assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    assert completion in tokenizer.decode(whole[len(prompt) :])


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize(
    "messages",
    [QUESTION, DIALOGUE, [system("Be brief."), *DIALOGUE]],
    ids=["question", "dialogue", "system"],
)
def test_a_whole_is_what_the_template_makes_of_the_dialogue(name, messages):
    """The reward model sees what its template writes, and its ids, not those of parts.

    What the template writes has the begin token, or it is put before.
    """
    if name == "gemma" and messages[0]["role"] == "system":
        pytest.skip("refused")
    tokenizer = tokenizer_like(name)
    text = tokenizer.apply_chat_template([*messages, assistant("In 1815.")], tokenize=False)
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if name == "open":
        ids = [bos, *ids]
    assert encode_whole(tokenizer, messages, "In 1815.") == ids
    assert name in ("smol", "think") or bos is None or ids.count(bos) == 1


@pytest.mark.parametrize("template", [LLAMA, LLAMA.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("adds", ["$A", "<bos> $A"])
def test_begin_is_written_once_whoever_writes_it(template, adds):
    tokenizer = make_tokenizer("<bos>", "<eos>", adds, template)
    for ids in (encode_prompt(tokenizer, DIALOGUE), encode_whole(tokenizer, DIALOGUE, "Jane")):
        assert tokenizer.decode(ids).startswith("<bos><turn>")
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_a_system_role_has_its_text_before_the_users():
    tokenizer = tokenizer_like("gemma")
    messages = [system("Be brief."), *QUESTION]
    expected = "<bos><turn>user\nBe brief.\n\nWho wrote Emma?<turn_end>\n<turn>model\n"
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == expected
    whole = tokenizer.decode(encode_whole(tokenizer, messages, "Jane."))
    assert whole == expected + "Jane.<turn_end>\n"
    assert messages == [system("Be brief."), *QUESTION]


def test_a_system_text_replaces_the_templates_own():
    tokenizer = tokenizer_like("smol")
    text = tokenizer.decode(encode_prompt(tokenizer, [system("Be brief."), *QUESTION]))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + SMOL_TURN


@pytest.mark.parametrize(
    "messages", [[user("a"), user("b")], [system("a"), user("b"), user("c")], [system("a")]]
)
def test_roles_that_a_template_refuses_are_named(messages):
    message = "the chat template refuses turns of .*user|system"
    with pytest.raises(UserError, match=message) as error:
        encode_prompt(tokenizer_like("gemma"), messages)
    assert "\n" not in str(error.value)


def test_other_errors_of_a_template_are_no_users_errors():
    with pytest.raises(KeyError):
        encode_prompt(tokenizer_like("plain"), [{"role": "user"}])


def test_a_template_without_ending_of_a_tokenizer_without_end_token():
    tokenizer = make_tokenizer("<bos>", None, template=OPEN)
    assert answer_frame(tokenizer, OPEN, ("user",)) == (True, "", [])
    text = tokenizer.decode(encode_whole(tokenizer, QUESTION, "Jane."))
    assert text == "<bos>\nQ: Who wrote Emma?\nA:\nJane."


def test_plain_dialogue_takes_one_space_before_the_answer():
    tokenizer = tokenizer_like("plain")
    rows = [encode_whole(tokenizer, QUESTION, completion) for completion in ("Jane", " Jane")]
    assert rows[0] == rows[1] and tokenizer.decode(rows[0]).endswith("Assistant: Jane<eos>")
    assert encode_whole(tokenizer, QUESTION, "\nJane\n") == rows[0]


def test_format_is_what_the_tokenizer_allows():
    chat, plain = tokenizer_like("smol"), tokenizer_like("plain")
    assert [wants_chat(chat, name) for name in ("auto", "chat", "plain")] == [True, True, False]
    assert wants_chat(plain, "auto") is None and wants_chat(plain, "plain") is False
    with pytest.raises(UserError, match="--format chat: .*--format plain"):
        wants_chat(plain, "chat")


# --- the one text format of policy and reward model


def reward_like(tokenizer):
    sizes = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    config = LlamaConfig(vocab_size=4, num_labels=1, pad_token_id=0, **sizes)
    return RewardModel(LlamaForSequenceClassification(config), tokenizer)


@pytest.mark.parametrize(
    "policy, reward",
    [
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
        # a policy without a template, asked by messages
        (dict(TOKENIZERS["plain"]), dict(TOKENIZERS["llama"])),
    ],
)
@pytest.mark.parametrize(
    "messages",
    [QUESTION, DIALOGUE, [system("Be brief."), *DIALOGUE]],
    ids=["question", "dialogue", "system"],
)
def test_chat_rollouts_are_scored_as_their_texts(policy, reward, messages):
    """Ids or templates that differ, or no template: what is scored is what was trained on."""
    policy, reward = make_tokenizer(**policy), reward_like(make_tokenizer(**reward))
    completion = "Jane Austen, 1815."
    ids = policy(completion, add_special_tokens=False)["input_ids"]
    prompt = TokenizedPrompt(encode_prompt(policy, messages), messages)
    got = reward.encode_rollout(policy, [prompt], [ids])
    assert got == [reward.encode(messages, completion)]


@pytest.mark.parametrize(
    "policy, reward",
    [
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
    ],
)
@pytest.mark.parametrize("prompt", ["Who wrote", "\n\nHuman: Who wrote Emma?\n\nAssistant:", "é…"])
def test_plain_rollouts_are_scored_as_their_texts(policy, reward, prompt):
    policy, reward = make_tokenizer(**policy), reward_like(make_tokenizer(**reward))
    completion = " Emma, 1815."
    ids = policy(completion, add_special_tokens=False)["input_ids"]
    got = reward.encode_rollout(policy, [TokenizedPrompt(encode_prompt(policy, prompt))], [ids])
    assert got == [reward.encode(prompt, completion)] and len(got[0]) > 4


def test_a_token_that_the_reward_model_lacks_goes_through_text():
    """Its id is outside the reward model's embedding, or is another token there.

    The other way round, ids serve.
    """
    policy = make_tokenizer("<bos>", "<eos>", extra=["<a>", "<b>"])
    reward = make_tokenizer("<bos>", "<eos>", extra=["<a>"])
    assert same_ids(reward, policy) and not same_ids(policy, reward)
    ids = policy("<b> wrote")["input_ids"]
    prompt = TokenizedPrompt(encode_prompt(policy, "Who"))
    (got,) = reward_like(reward).encode_rollout(policy, [prompt], [ids])
    assert got == reward_like(reward).encode("Who", "<b> wrote")
    assert max(ids) >= len(reward) > max(got)


# --- dialogues in text


THREE_TURNS = [user("Hi!"), assistant("Hello."), user("Why?")]
TAGGED = "Hi!\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?"


@pytest.mark.parametrize(
    "text, turns",
    [
        ("Why?", [user("Why?")]),
        ("  Why?\n", [user("  Why?\n")]),
        ("Say:\n\nHuman: hi", [user("Say:\n\nHuman: hi")]),  # does not begin as a dialogue
        ("\n\nHuman: Hi!\n\nAssistant:", [user("Hi!")]),
        ("\n\nHuman: Hi!", [user("Hi!")]),
        (
            "\n\nHuman: Hi!\n\nYes?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
            [user("Hi!\n\nYes?"), assistant("Hello."), user("Why?")],
        ),
        ("\n\nHuman: Hi!\n\nAssistant: Hello.", [user("Hi!"), assistant("Hello.")]),
        (TAGGED, THREE_TURNS),
        (TAGGED + "\n<extra_id_1>Assistant\n", THREE_TURNS),
        ("<extra_id_1>User\n" + TAGGED, THREE_TURNS),
        (
            "Two\nlines\n\n<extra_id_1>Assistant\nA\n\nB\n<extra_id_1>User\n\nWhy?",
            [user("Two\nlines"), assistant("A\n\nB"), user("Why?")],
        ),
    ],
)
def test_turns_of_a_text(text, turns):
    """The flattened turns of hh-rlhf and HelpSteer are turns again, in alternating roles."""
    assert to_messages(text) == turns


def test_messages_stay_as_they_are_and_come_back_from_their_text():
    assert to_messages(DIALOGUE) is DIALOGUE
    assert to_messages(to_text(DIALOGUE)) == DIALOGUE
    asked = "\n\nHuman: Who wrote Emma?\n\nAssistant:"
    assert to_text(DIALOGUE) == asked + " Jane Austen.\n\nHuman: When?\n\nAssistant:"
    assert to_text([system("Be brief."), *QUESTION]) == "\n\nSystem: Be brief." + asked


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi!",
        " Hi!\n",
        [user("Hi! ")],
        [system("Be brief."), user("Hi!")],
        [user("Hi!"), assistant("Yes?"), user("Why?")],
        "\n\nHuman: Hi!\n\nAssistant:",
        "\n\nHuman:  Hi!\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:",
        TAGGED,
        "<extra_id_1>User\nHi!\n<extra_id_1>Assistant\nHello.",
        to_text([system("Be brief."), user("Hi!")]),
        to_text([system("Be brief."), user("Hi!"), assistant("Yes?"), user("Why?")]),
    ],
)
def test_every_form_of_a_prompt_has_the_same_first_turn(prompt):
    """Or one form would be trained on where another is held out."""
    assert first_turn(prompt) == "Hi!"


@pytest.mark.parametrize(
    "content",
    ["Hi!", "Say:\n\nHuman: hi\n\nAssistant: ho", "a <extra_id_1>User\nb", "\n\nHuman: Hi!"],
)
def test_the_first_turn_is_the_same_as_text_and_as_messages(content):
    more = [assistant("Yes?"), user("Why?")]
    for messages in ([user(content)], [user(content), *more], [system("Be brief."), user(content)]):
        assert first_turn(messages) == first_turn(to_text(messages))


def test_a_prompt_without_a_user_has_a_first_turn():
    assert first_turn([system("Write.")]) == "Write."


def hh_rows():
    files = sorted((Path(__file__).parents[2] / "shared/data/hh-rlhf").glob("*.jsonl.gz"))
    if not files:
        pytest.skip("no hh-rlhf here")
    for file in files:
        with gzip.open(file, "rt") as lines:
            yield from map(json.loads, lines)


def test_real_dialogues_alternate_and_come_back():
    alternate = total = 0
    cue = "\n\nAssistant:"
    for row in hh_rows():
        prompt = row["chosen"].rpartition(cue)[0] + cue
        messages = to_messages(prompt)
        roles = [message["role"] for message in messages]
        total += 1
        alternate += roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all("\n\nHuman:" not in message["content"] for message in messages)
        assert to_messages(to_text(messages)) == messages
        assert first_turn(prompt) == first_turn(messages)
    assert total > 4000 and alternate / total > 0.99
