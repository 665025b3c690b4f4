"""Reward models: one text format and one forward pass, whatever batch, padding and vocabulary."""

import copy
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_rm
from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, encode
from minalign.data.columns import Pair
from minalign.data.pairs import encode_pairs
from minalign.reward import RewardModel
from minalign.rollout import split_end
from minalign.running.errors import UserError

CONTEXT = 128
TEXTS = {  # prompt -> completion
    "overall , the plot is": " good .",
    "again , the music is very dull but the cast is": (
        " utterly superb and the plot is weak but the camera is odd ."
    ),
    "frankly , the": " ending",
    "tonight , the cast": " is slightly bad .",
}
PROMPTS, COMPLETIONS = list(TEXTS), list(TEXTS.values())


def make_backbone(family, tokenizer):
    torch.manual_seed(0)
    shared = dict(vocab_size=len(tokenizer), initializer_range=0.2)
    if family == "gpt2":
        sizes = dict(n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2)
        ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        config = GPT2Config(resid_pdrop=0.2, embd_pdrop=0.2, **shared, **sizes, **ids)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.2,
        **shared,
    )
    return LlamaForCausalLM(config)


def make_reward_model(family="llama", num_labels=1, tokenizer=None):
    tokenizer = tokenizer or toy.make_tokenizer()
    return RewardModel.from_backbone(make_backbone(family, tokenizer), tokenizer, num_labels)


def make_byte_level_tokenizer():
    """As GPT-2's: begin, end and pad are one token, and there is no unknown token.

    Merges make spellings ambiguous.
    """
    bytes_and_merges = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"]
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *bytes_and_merges])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def make_word_piece_tokenizer():
    """As BERT's: lower case, [CLS] and [SEP] added by itself, neither begin nor end token."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *toy.VOCABULARY[len(toy.SPECIAL) :]]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def make_permuted_tokenizer():
    """The toy world's words under other ids."""
    special, words = toy.VOCABULARY[: len(toy.SPECIAL)], toy.VOCABULARY[len(toy.SPECIAL) :]
    words = special + random.Random(0).sample(words, len(words))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def assert_near(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


@torch.no_grad()
def bare_scores(reward_model, rows):
    """Each row alone, by transformers' parts: the head on the last hidden state."""
    body, head = reward_model.model.base_model.eval(), reward_model.model.score
    last = [body(torch.tensor([row])).last_hidden_state[:, -1] for row in rows]
    return torch.cat([head(hidden)[:, 0] for hidden in last])


def ids_seen(reward_model):
    """A list that collects the ids that enter the embedding, row by row, without pads (id 0)."""
    seen = []

    def collect(module, args, output):
        seen.extend([i for i in row if i != 0] for row in args[0].tolist())

    reward_model.model.get_input_embeddings().register_forward_hook(collect)
    return seen


both_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


# --- pooling and padding


@both_families
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad_token", ["<pad>", "</s>", None])
def test_scores_depend_on_the_text_alone(family, padding_side, pad_token, device):
    """Neither on batch mates nor on the tokenizer's padding.

    It holds where pad == eos, and where there is no pad token.
    """
    reward_model = make_reward_model(family)
    rows = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    expected = bare_scores(reward_model, rows)
    assert expected.unique().numel() == 4
    reward_model.model.to(device)
    reward_model.tokenizer.padding_side, reward_model.tokenizer.pad_token = padding_side, pad_token
    reward_model.model.config.pad_token_id = reward_model.tokenizer.pad_token_id
    assert_near(reward_model.score(PROMPTS, COMPLETIONS).cpu(), expected)
    alone = [reward_model.score([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS)]
    assert_near(torch.cat(alone).cpu(), expected)
    # sorted by length in between
    assert_near(reward_model.logits(rows, batch_size=3)[:, 0].cpu(), expected)


@both_families
def test_an_end_token_inside_the_text_is_no_end(family):
    """Chat prompts hold end tokens: what follows the first of them is read, to the last token."""
    reward_model = make_reward_model(family)
    rows = [[1, 5, 2, 7, 8, 2], [1, 5, 2, 9, 8, 2], [1, 5, 2, 7, 8, 6], [1, 5, 2]]
    scores = reward_model.logits(rows)[:, 0]
    assert_near(scores, bare_scores(reward_model, rows))
    assert scores.unique().numel() == 4


def test_forward_has_gradients_for_head_and_body():
    reward_model = make_reward_model()
    reward_model.forward([[1, 5, 2], [1, 6, 7, 2]]).sum().backward()
    body = reward_model.model.base_model.layers[0].self_attn.q_proj
    assert reward_model.model.score.weight.grad.any() and body.weight.grad.any()


def test_a_text_beyond_the_context_is_an_error():
    reward_model = make_reward_model()
    # with begin and end it just fits
    assert reward_model.score(["good"], [" good" * (CONTEXT - 3)]).isfinite().all()
    message = f"text of {CONTEXT + 1} tokens, expected at most {CONTEXT}.*max-new-tokens"
    with pytest.raises(UserError, match=message):
        reward_model.score(["good"], [" good" * (CONTEXT - 2)])


@pytest.mark.parametrize("prompts, completions", [([], []), (["a"], ["b", "c"])])
def test_prompts_and_completions_must_be_as_many(prompts, completions):
    message = f"{len(prompts)} prompts and {len(completions)} completions"
    with pytest.raises(ValueError, match=message):
        make_reward_model().score(prompts, completions)


# --- dropout and precision


@both_families
def test_dropout_is_off_in_train_mode(family):
    reward_model = make_reward_model(family)
    rows = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    expected = bare_scores(reward_model, rows)
    reward_model.model.train()
    assert_near(reward_model.forward(rows)[:, 0], expected)
    reward_model.model.train()
    assert_near(reward_model.score(PROMPTS, COMPLETIONS), expected)


@both_families
def test_scores_of_a_bfloat16_model_are_float32(family):
    reward_model = make_reward_model(family)
    expected = reward_model.score(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = reward_model.score(PROMPTS, COMPLETIONS)
    reward_model.model.bfloat16()
    for scores in (under_autocast, reward_model.score(PROMPTS, COMPLETIONS)):
        assert scores.dtype == torch.float32
        in_bfloat16 = torch.equal(scores, scores.bfloat16().float())
        assert not in_bfloat16, "a head in bfloat16, only cast afterwards"
        assert_near(scores, expected, atol=0.2)


# --- read-outs


def test_one_label_reads_as_it_is():
    assert make_reward_model().read_out(torch.tensor([[1.5], [-2.0]])).tolist() == [1.5, -2.0]


def test_a_distribution_reads_as_its_expected_score():
    reward_model = make_reward_model(num_labels=5)
    assert_near(reward_model.read_out(100 * torch.eye(5)), torch.arange(1.0, 6.0))
    symmetric = torch.tensor([[0.0] * 5, [9.0, 0.0, 0.0, 0.0, 9.0]])
    assert_near(reward_model.read_out(symmetric), torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize(
    "labels, positive",
    [
        (["LABEL_0", "LABEL_1"], 1),
        (["NEGATIVE", "POSITIVE"], 1),
        (["POSITIVE", "NEGATIVE"], 0),
        (["pos", "neg"], 0),
    ],
)
def test_two_labels_read_as_positive_minus_negative(labels, positive, tmp_path):
    tokenizer = toy.make_tokenizer()
    config = make_backbone("llama", tokenizer).config
    config.num_labels, config.id2label = 2, dict(enumerate(labels))
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward_model = RewardModel.from_pretrained(tmp_path)
    logits = torch.tensor([[0.5, 2.0], [3.0, -1.0]])
    assert_near(reward_model.read_out(logits), logits[:, positive] - logits[:, 1 - positive])


# --- save and load


@both_families
@pytest.mark.parametrize("make_tokenizer", [toy.make_tokenizer, make_byte_level_tokenizer])
@pytest.mark.parametrize("num_labels", [1, 5])
def test_a_saved_model_gives_the_same_scores_everywhere(
    family, make_tokenizer, num_labels, tmp_path
):
    """Here bit by bit, and through transformers' own forward on a padded batch.

    That one pools by the pad token.
    """
    reward_model = make_reward_model(family, num_labels, make_tokenizer())
    logits = reward_model.logits([reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)])
    reward_model.save_pretrained(tmp_path)

    loaded = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.score(PROMPTS, COMPLETIONS), reward_model.read_out(logits))

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    texts = [begin + p + c + end for p, c in zip(PROMPTS, COMPLETIONS)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert not batch["attention_mask"].all()
    assert_near(model(**batch).logits.detach(), logits)


def test_a_tokenizer_whose_pad_is_its_end_gets_a_pad_token():
    tokenizer = make_byte_level_tokenizer()
    tokens = len(tokenizer)
    reward_model = make_reward_model("gpt2", tokenizer=tokenizer)
    model = reward_model.model
    assert reward_model.tokenizer.pad_token_id == model.config.pad_token_id == tokens
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == tokens + 1


def test_the_backbone_is_copied_not_changed():
    tokenizer = make_byte_level_tokenizer()
    backbone = make_backbone("gpt2", tokenizer)
    weights, config = copy.deepcopy(backbone.state_dict()), backbone.config.to_dict()
    reward_model = RewardModel.from_backbone(backbone, tokenizer, num_labels=5)
    body = reward_model.model.base_model
    assert torch.equal(body.h[1].attn.c_attn.weight, backbone.transformer.h[1].attn.c_attn.weight)
    torch.nn.init.zeros_(body.h[1].attn.c_attn.weight)
    assert backbone.config.to_dict() == config
    assert all(torch.equal(weight, weights[name]) for name, weight in backbone.state_dict().items())


def test_a_new_head_is_small_and_float32_whatever_the_backbone_is():
    """N(0, 1 / (D + 1)): a large head would make the first steps noise."""
    tokenizer = toy.make_tokenizer()
    backbone = make_backbone("llama", tokenizer).bfloat16()
    reward_model = RewardModel.from_backbone(backbone, tokenizer, num_labels=200)
    assert {parameter.dtype for parameter in reward_model.model.parameters()} == {torch.float32}
    assert reward_model.model.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.05)


def test_a_language_model_without_a_head_is_refused(tmp_path):
    tokenizer = toy.make_tokenizer()
    make_backbone("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="score.weight missing.*train_rm.py"):
        RewardModel.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"--rm {tmp_path}: cannot be loaded"):
        RewardModel.from_pretrained(tmp_path)


def test_a_bfloat16_checkpoint_loads_in_float32(tmp_path):
    reward_model = make_reward_model()
    reward_model.model.bfloat16()
    reward_model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


# --- text format: training and scoring see the same ids


@pytest.mark.parametrize("make_tokenizer", [toy.make_tokenizer, make_permuted_tokenizer])
def test_training_and_scoring_feed_the_same_ids(make_tokenizer):
    """Caught at the embedding: pairs as in train_rm.py, a rollout as in train_policy.py."""
    reward_model = make_reward_model(tokenizer=make_tokenizer())
    policy_tokenizer = toy.make_tokenizer()
    prompt, chosen, rejected = PROMPTS[0], " good .", " very dull and the music is odd ."
    seen = ids_seen(reward_model)

    pairs = [Pair(prompt, chosen, rejected)]
    examples = encode_pairs(pairs, reward_model.tokenizer, max_tokens=64, max_pairs=9, seed=0)
    logits = reward_model.forward([e.texts[k] for k in range(2) for e in examples])
    objective = train_rm.objective_of(train_rm.resolve(train_rm.Config()))
    train_rm.pair_losses(objective, logits.unflatten(0, (2, -1)), examples).sum().backward()
    in_training = seen.copy()
    seen.clear()

    end = policy_tokenizer.eos_token_id
    sampled = [policy_tokenizer(text)["input_ids"] + [end] for text in (chosen, rejected)]
    width = max(map(len, sampled))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in sampled])
    mask = torch.tensor([[t < len(ids) for t in range(width)] for ids in sampled])
    completions, _ = split_end(tokens, mask, [end])
    rows = [TokenizedPrompt(encode(policy_tokenizer, prompt, end=False))] * 2
    reward_model.logits(reward_model.encode_rollout(policy_tokenizer, rows, completions))
    assert seen == in_training
    seen.clear()

    reward_model.score([prompt] * 2, [chosen, rejected])
    assert seen == in_training


@pytest.mark.parametrize("make_tokenizer", [toy.make_tokenizer, make_permuted_tokenizer])
def test_a_text_begins_and_ends_once(make_tokenizer):
    tokenizer = make_tokenizer()
    reward_model, policy_tokenizer = make_reward_model(tokenizer=tokenizer), toy.make_tokenizer()
    prompts = [TokenizedPrompt(encode(policy_tokenizer, PROMPTS[0], end=False))]
    completions = [policy_tokenizer(COMPLETIONS[0])["input_ids"]]
    (sampled,) = reward_model.encode_rollout(policy_tokenizer, prompts, completions)
    for ids in (reward_model.encode(PROMPTS[0], COMPLETIONS[0]), sampled):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids[1:-1]) == PROMPTS[0] + COMPLETIONS[0]


def test_ids_of_the_same_vocabulary_are_scored_as_sampled():
    """Decoding and encoding again would spell the sampled "t" "h" "e" as one token."""
    policy_tokenizer = make_byte_level_tokenizer()
    reward_model = make_reward_model("gpt2", tokenizer=make_byte_level_tokenizer())
    prompt = encode(policy_tokenizer, "go", end=False)
    spelled = policy_tokenizer.convert_tokens_to_ids(list("the"))
    sampled = [*prompt, *spelled, policy_tokenizer.eos_token_id]
    rows = reward_model.encode_rollout(policy_tokenizer, [TokenizedPrompt(prompt)], [spelled])
    assert rows == [sampled] != [reward_model.encode("go", "the")]


def test_a_policy_with_other_ids_is_scored_by_its_text():
    reward_model = make_reward_model(tokenizer=make_permuted_tokenizer())
    policy_tokenizer = toy.make_tokenizer()
    rows = [TokenizedPrompt(encode(policy_tokenizer, prompt, end=False)) for prompt in PROMPTS]
    completions = [policy_tokenizer(completion)["input_ids"] for completion in COMPLETIONS]
    logits = reward_model.logits(reward_model.encode_rollout(policy_tokenizer, rows, completions))
    assert_near(logits[:, 0], reward_model.score(PROMPTS, COMPLETIONS))


def test_markers_of_a_chat_prompt_are_scored_by_text_too():
    policy_tokenizer, tokenizer = toy.make_tokenizer(), make_permuted_tokenizer()
    for each in (policy_tokenizer, tokenizer):
        each.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    reward_model, prompt = make_reward_model(tokenizer=tokenizer), "<|user|> overall , the plot is"
    prompts = [TokenizedPrompt(encode(policy_tokenizer, prompt, end=False))]
    completions = [policy_tokenizer(" good .")["input_ids"]]
    rows = reward_model.encode_rollout(policy_tokenizer, prompts, completions)
    assert rows == [reward_model.encode(prompt, " good .")]


def encoder_sizes(tokenizer):
    sizes = dict(dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=64)
    return sizes | {"vocab_size": len(tokenizer)}


def test_a_sentiment_classifier_with_its_own_tokenizer_is_a_reward_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_word_piece_tokenizer()
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        **encoder_sizes(tokenizer), initializer_range=0.2, num_labels=2, id2label=labels
    )
    classifier = DistilBertForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS)]
    with torch.no_grad():
        inputs = [tokenizer(t, return_tensors="pt", return_token_type_ids=False) for t in texts]
        logits = torch.cat([classifier(**row).logits for row in inputs])

    reward_model, policy_tokenizer = RewardModel.from_pretrained(tmp_path), toy.make_tokenizer()
    assert_near(reward_model.score(PROMPTS, COMPLETIONS), logits[:, 1] - logits[:, 0])
    rows = [TokenizedPrompt(encode(policy_tokenizer, prompt, end=False)) for prompt in PROMPTS]
    completions = [policy_tokenizer(completion)["input_ids"] for completion in COMPLETIONS]
    encoded = reward_model.encode_rollout(policy_tokenizer, rows, completions)
    assert_near(reward_model.logits(encoded), logits)


def test_a_new_reward_model_takes_the_body_and_an_earlier_head_along(tmp_path):
    """From a language model: a new head, the same whatever the seed.

    From a reward model of as many labels: its own.
    """
    tokenizer = toy.make_tokenizer()
    policy = toy.make_model(tokenizer, seed=3)
    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "policy")
    torch.manual_seed(0)
    fresh = RewardModel.from_base(str(tmp_path / "policy"), num_labels=10)
    assert torch.equal(fresh.model.base_model.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert fresh.model.score.weight.std().item() == pytest.approx(65**-0.5, rel=0.2)
    assert fresh.model.config.id2label[9] == "10"
    fresh.save_pretrained(tmp_path / "rm")
    again = RewardModel.from_base(str(tmp_path / "rm"), num_labels=10)
    assert torch.equal(again.model.score.weight, fresh.model.score.weight)
    with pytest.raises(UserError, match="--model .*rm: cannot be loaded"):
        RewardModel.from_base(str(tmp_path / "rm"), num_labels=1)


def test_an_encoder_gets_a_head_of_its_own_design(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_word_piece_tokenizer()
    encoder = DistilBertForMaskedLM(DistilBertConfig(**encoder_sizes(tokenizer)))
    for part in (encoder, tokenizer):
        part.save_pretrained(tmp_path)
    reward_model = RewardModel.from_base(str(tmp_path), num_labels=1)
    losses = []
    optimizer = torch.optim.AdamW(reward_model.model.parameters(), lr=1e-2)
    rows = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    for _ in range(20):
        scores = reward_model.forward(rows)[:, 0]
        optimizer.zero_grad()
        losses.append((scores[0] - scores[1] - 1).square())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert reward_model.context == 64
    tokenizer.model_max_length = 62  # RoBERTa: 514 positions, of which 512 can be used
    tokenizer.save_pretrained(tmp_path)
    assert RewardModel.from_base(str(tmp_path), num_labels=1).context == 62


def test_rows_split_by_length_change_neither_scores_nor_gradients():
    """Long and short rows go through the model in parts. The twin takes one row at a time."""
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    reward_model = RewardModel.from_backbone(LlamaForCausalLM(config), tokenizer, num_labels=3)
    rows = [torch.randint(4, 43, (length,)).tolist() for length in (5, 700, 9, 650, 300, 2)]

    def run(forward):
        reward_model.model.zero_grad()
        logits = forward(rows)
        (logits * torch.arange(18.0).view(6, 3)).sum().backward()
        return logits.detach(), [p.grad.clone() for p in reward_model.model.parameters()]

    calls = []
    hook = reward_model.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    fast, fast_grads = run(reward_model.forward)
    hook.remove()
    slow, slow_grads = run(lambda rows: torch.cat([reward_model.forward([row]) for row in rows]))
    assert len(calls) == 2
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    for got, want in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
