"""Sampling and scoring: what sampling recorded is what one pass over the whole text gives.

Models have dropout, and weights so large that a wrong position, mask or temperature shows.
"""

import copy
import functools
import math
from collections import Counter

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from minalign.logprobs import exact_kl, kl_k1, token_logprobs
from minalign.models import generation
from minalign.models.caches import OwnCache, TransformersCache
from minalign.rollout import (
    completion_logits,
    completion_logprobs,
    draw_uniforms,
    frozen_logprobs,
    generate,
    has_plain_head,
    sequence_logprobs,
)
from minalign.rollout import sample as plain_sample

VOCABULARY, CONTEXT, EOS = 24, 32, 2
PAD = VOCABULARY + 7  # outside the embedding on purpose


def make_model(family, device="cpu", vocabulary=VOCABULARY):
    """A random model of two layers.

    GPT-2 has learned positions: padding that shifts them shows. Bloom has its positions (ALiBi)
    from the mask alone, where transformers guesses other models' masks from positions.
    """
    torch.manual_seed(0)
    shared = dict(vocab_size=vocabulary, initializer_range=0.3)
    if family == "gpt2":
        sizes = dict(n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2)
        dropout = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        config = GPT2Config(bos_token_id=EOS, eos_token_id=EOS, **shared, **sizes, **dropout)
        model = GPT2LMHeadModel(config)
    elif family == "bloom":
        sizes = dict(hidden_size=32, n_layer=2, n_head=2)
        model = BloomForCausalLM(BloomConfig(hidden_dropout=0.2, **shared, **sizes))
    else:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            attention_dropout=0.2,
            **shared,
        )
        model = LlamaForCausalLM(config)
    return model.to(device).eval()


def left_padded(lengths, device="cpu", extra=0, vocabulary=VOCABULARY):
    """Random prompts, padded on the left by PAD to the longest and `extra` columns more."""
    width, generator = max(lengths) + extra, torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, PAD).to(device), mask.to(device)


def sample(model, ids, mask, seed=2, **changes):
    """In every case below, this seed ends some rows and not others."""
    settings = dict(max_new_tokens=10, temperature=0.7, eos_token_ids=[EOS], pad_token_id=PAD)
    generator = torch.Generator(ids.device).manual_seed(seed)
    return generate(model, ids, mask, generator=generator, **(settings | changes))


def rescored(model, ids, mask, rollout, temperature=0.7):
    logits = completion_logits(model, ids, mask, rollout.tokens, rollout.mask)
    tokens = rollout.tokens.masked_fill(~rollout.mask, 0)
    return token_logprobs(logits, tokens, temperature).masked_fill(~rollout.mask, 0.0)


def bare_logprobs(model, prompt, completion, temperature):
    """Log-probs of one completion, from the model's plain forward on the bare ids."""
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(1).gather(1, completion[:, None]).squeeze(1)


def shapes_read(monkeypatch):
    """The shapes (rows, columns) of all ids that are read while sampling."""
    shapes = []
    for kind in (OwnCache, TransformersCache):
        real = kind._logits
        monkeypatch.setattr(
            kind,
            "_logits",
            lambda self, ids, *args, real=real: shapes.append(ids.shape) or real(self, ids, *args),
        )
    return shapes


families = pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])


@families
def test_sampling_logprobs_are_those_of_the_scoring_pass(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 4, device)
    rollout = sample(model, ids, mask)
    assert not rollout.mask.all(), "the case needs rows of unequal length"
    again = rescored(model, ids, mask, rollout)
    torch.testing.assert_close(again, rollout.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_frozen_logprobs_do_not_depend_on_the_micro_batch(micro_batch_size, device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9, 1, 6] * 4, device)
    rollout = sample(model, ids, mask, pad_token_id=0)
    completions = (rollout.tokens, rollout.mask)
    logprobs = frozen_logprobs(model, ids, mask, *completions, 0.7, micro_batch_size)
    real = logprobs.masked_fill(~rollout.mask, 0.0)
    torch.testing.assert_close(real, rollout.logprobs, atol=1e-5, rtol=0)
    assert not logprobs.requires_grad


def test_frozen_logprobs_with_a_pad_id_outside_the_vocabulary():
    model, (ids, mask) = make_model("gpt2"), left_padded([3, 9, 1, 6] * 4)
    rollout = sample(model, ids, mask)
    frozen_logprobs(model, ids, mask, rollout.tokens, rollout.mask, 0.7, 16)


@families
def test_logprobs_of_a_padded_row_are_those_of_the_bare_row(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6], device, extra=2)
    rollout = sample(model, ids, mask)
    for row in range(4):
        prompt, completion = ids[row][mask[row]], rollout.tokens[row][rollout.mask[row]]
        bare = bare_logprobs(model, prompt, completion, 0.7)
        recorded = rollout.logprobs[row][rollout.mask[row]]
        torch.testing.assert_close(recorded, bare, atol=1e-5, rtol=0)


@families
def test_completion_logits_are_those_one_column_earlier(family, device):
    model, (ids, _) = make_model(family, device), left_padded([8, 8], device)
    ones = torch.ones_like(ids)
    logits = completion_logits(model, ids[:, :5], ones[:, :5], ids[:, 5:], ones[:, 5:])
    torch.testing.assert_close(logits, model(ids).logits[:, 4:7], atol=1e-5, rtol=0)
    assert logits.requires_grad


@families
def test_a_row_is_independent_of_its_batch_mates(family):
    model, (ids, mask) = make_model(family), left_padded([3, 9, 1, 6])
    # no chance left, so that rows can be compared alone
    together = sample(model, ids, mask, temperature=1e-4)
    for row in range(4):
        prompt = ids[row][mask[row]][None]
        alone = sample(model, prompt, torch.ones_like(prompt).bool(), temperature=1e-4)
        expected = together.tokens[row][together.mask[row]]
        assert alone.tokens[0][alone.mask[0]].tolist() == expected.tolist()


@families
def test_extra_left_padding_changes_nothing(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6], device, extra=4)
    wide, narrow = sample(model, ids, mask), sample(model, ids[:, 4:], mask[:, 4:])
    assert torch.equal(narrow.tokens, wide.tokens) and torch.equal(narrow.mask, wide.mask)
    torch.testing.assert_close(narrow.logprobs, wide.logprobs, atol=1e-5, rtol=0)


def test_ids_under_the_padding_change_nothing(device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9], device)
    rollout, other = sample(model, ids, mask), sample(model, ids.masked_fill(~mask, 5), mask)
    assert all(torch.equal(a, b) for a, b in zip(rollout, other))


def test_completions_come_as_often_as_the_model_says(device):
    """Chi squared over all completions of up to two tokens.

    The checkpoint asks for greedy decoding, which must not count.
    """
    vocabulary, temperature, draws = 6, 1.5, 20_000
    model = make_model("gpt2", device, vocabulary)
    model.generation_config.update(
        do_sample=False,
        top_k=1,
        top_p=0.1,
        repetition_penalty=3.0,
        eos_token_id=4,
        min_new_tokens=2,
    )
    prompt = torch.tensor([3, 1, 5], device=device)
    ids = torch.cat([torch.full((2,), PAD, device=device), prompt]).repeat(draws, 1)
    rollout = sample(model, ids, ids != PAD, temperature=temperature, max_new_tokens=2)

    pairs = [(a, b) for a in range(vocabulary) if a != EOS for b in range(vocabulary)]
    completions = [(EOS,), *pairs]
    rows, lengths = rollout.tokens.tolist(), rollout.mask.sum(1).tolist()
    drawn = Counter(tuple(row[:length]) for row, length in zip(rows, lengths))
    expected = []
    for completion in completions:
        tokens = torch.tensor(completion, device=device)
        with torch.no_grad():
            logprob = bare_logprobs(model, prompt, tokens, temperature).sum().item()
        expected.append(draws * math.exp(logprob))
    assert sum(expected) == pytest.approx(draws, rel=1e-4) and min(expected) > 5
    chi_square = sum((drawn[c] - e) ** 2 / e for c, e in zip(completions, expected))
    freedom = len(completions) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_completion_ends_with_its_first_end_token(device):
    model = make_model("llama", device, vocabulary=8)
    (ids, mask) = left_padded([2] * 64, device, vocabulary=8)
    tokens, kept, logprobs = sample(model, ids, mask, eos_token_ids=[2, 7], temperature=2.0)
    last = []
    for row in range(64):
        drawn = tokens[row].tolist()
        length = next((t + 1 for t, token in enumerate(drawn) if token in (2, 7)), len(drawn))
        assert kept[row].tolist() == [t < length for t in range(len(drawn))]
        assert set(drawn[length:]) <= {PAD}
        assert (logprobs[row, :length] < 0).all() and (logprobs[row, length:] == 0).all()
        last.append(drawn[length - 1])
    assert {2, 7} <= set(last)


def test_garbage_after_the_end_changes_nothing(device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9, 1, 6] * 4, device)
    rollout = sample(model, ids, mask)
    garbage = rollout._replace(tokens=rollout.tokens.masked_fill(~rollout.mask, -100))
    assert torch.equal(rescored(model, ids, mask, garbage), rescored(model, ids, mask, rollout))


def test_sampling_stops_when_all_rows_have_ended(device):
    model, (ids, mask) = make_model("llama", device), left_padded([3, 5, 1], device)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert sample(model, ids, mask, eos_token_ids=list(range(VOCABULARY))).tokens.shape == (3, 1)
    assert len(calls) == 1
    rollout = sample(model, ids, mask, eos_token_ids=[2, 3, 4, 5, 6, 7], max_new_tokens=20)
    assert rollout.tokens.shape[1] == rollout.mask.sum(1).max() < 20


@families
def test_dropout_is_off_in_train_mode(family):
    model, (ids, mask) = make_model(family), left_padded([3, 9])
    rollout, again = sample(model.eval(), ids, mask), sample(model.train(), ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(rollout, again))
    in_train_mode = rescored(model.train(), ids, mask, rollout)
    assert torch.equal(in_train_mode, rescored(model.eval(), ids, mask, rollout))


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_and_tensors_are_as_before(training):
    model, (ids, mask) = make_model("gpt2").train(training), left_padded([3, 9])
    generation_config = copy.deepcopy(model.generation_config.to_dict())
    before = (ids.clone(), mask.clone())
    rollout = sample(model, ids, mask)
    completion_logits(model, ids, mask, rollout.tokens, rollout.mask)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert model.generation_config.to_dict() == generation_config
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def test_sampling_keeps_no_graph():
    model, (ids, mask) = make_model("gpt2"), left_padded([3, 9])
    assert not sample(model, ids, mask).logprobs.requires_grad and torch.is_grad_enabled()


@families
def test_kl_of_a_policy_to_its_copy_is_zero(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6], device)
    reference = copy.deepcopy(model)
    rollout = sample(model, ids, mask)
    k1 = kl_k1(rollout.logprobs, rescored(reference, ids, mask, rollout)).sum(1)
    texts = (ids, mask, rollout.tokens, rollout.mask)
    logits = [completion_logits(each, *texts) for each in (model, reference)]
    assert k1.abs().max() < 1e-5 and exact_kl(*logits, 0.7).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@families
def test_gradient_checkpointing_changes_nothing(family):
    """Transformers switches the cache off where checkpointing is on in train mode."""
    model, (ids, mask) = make_model(family), left_padded([3, 9])
    plain = sample(model, ids, mask)
    model.gradient_checkpointing_enable()
    again = sample(model.train(), ids, mask)
    assert torch.equal(again.tokens, plain.tokens)
    torch.testing.assert_close(again.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def test_draws_follow_the_generator(device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9, 1, 6], device)
    first, again, other = (sample(model, ids, mask, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not (first.shape == other.shape and torch.equal(first, other))
    settings = dict(max_new_tokens=10, temperature=0.7, eos_token_ids=EOS, pad_token_id=PAD)
    free = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)  # without a generator, torch's own
        free.append(generate(model, ids, mask, **settings).tokens.tolist())
    assert free[0] == free[1] != free[2]


def test_samples_of_one_prompt_differ(device):
    model, ids = make_model("gpt2", device), torch.tensor([[3, 4, 5]] * 8, device=device)
    tokens = sample(model, ids, torch.ones_like(ids)).tokens
    assert len({tuple(row) for row in tokens.tolist()}) == 8


def test_logprobs_of_a_bfloat16_model_are_float32():
    model, (ids, mask) = make_model("gpt2").bfloat16(), left_padded([3, 9])
    logprobs = sample(model, ids, mask).logprobs
    assert logprobs.dtype == torch.float32
    in_bfloat16 = torch.equal(logprobs, logprobs.bfloat16().float())
    assert not in_bfloat16, "a log-softmax in bfloat16, only cast afterwards"


def test_prompt_and_completion_may_fill_the_context():
    model, (ids, mask) = make_model("gpt2"), left_padded([CONTEXT - 2, 3])
    assert sample(model, ids, mask, max_new_tokens=2, eos_token_ids=[]).tokens.shape == (2, 2)
    message = f"prompt of {CONTEXT - 2} tokens and max_new_tokens=3, expected at most {CONTEXT}"
    with pytest.raises(ValueError, match=message):
        sample(model, ids, mask, max_new_tokens=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(make_model("gpt2"), *left_padded([3, 9]), **changes)


@pytest.mark.parametrize(
    "ids, mask",
    [
        ([[1, 2, 0]], [[1, 1, 0]]),  # padded on the right
        ([[1, 2], [0, 0]], [[1, 1], [0, 0]]),  # an empty prompt
        ([[1, 2]], [[1, 1, 1]]),
        ([1, 2], [1, 1]),
        ([[], []], [[], []]),
    ],
)
def test_prompts_not_padded_on_the_left_are_refused(ids, mask):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        sample(make_model("gpt2"), torch.tensor(ids).long(), torch.tensor(mask))


def test_a_model_without_a_key_value_cache_is_refused():
    """Mamba takes the cache, ignores it and forgets the prompt.

    Its log-probs would be those of another text, without a sign.
    """
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="mamba model, which fills no key-value cache"):
        sample(model, torch.tensor([[1, 2]]), torch.ones(1, 2))


def test_an_error_leaves_each_module_in_its_mode():
    model = make_model("gpt2").train()
    model.transformer.drop.eval()
    with pytest.raises(IndexError):
        sample(model, torch.tensor([[10_000]]), torch.ones(1, 1))
    assert model.training and not model.transformer.drop.training


# --- the fast way and its slow twin


@families
@pytest.mark.parametrize("known", [False, True])
def test_logprobs_of_real_tokens_alone_are_those_of_full_logits(family, known, device):
    """Values and all gradients. Columns of padding on both sides are left out by the fast way."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 4, device, extra=2)
    drawn = sample(model, ids, mask, pad_token_id=0)
    tokens, kept = (torch.nn.functional.pad(x, (0, 2)) for x in (drawn.tokens, drawn.mask))
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5)).to(device)

    def run(logprobs):
        model.zero_grad()
        logprobs = logprobs.masked_fill(~kept, 0.0)
        (logprobs * weights).sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    texts, known_grad = (ids, mask, tokens, kept), weights if known else None
    slow, slow_grads = run(token_logprobs(completion_logits(model, *texts), tokens, 0.7))
    fast, fast_grads = run(completion_logprobs(model, *texts, 0.7, known_grad))
    assert has_plain_head(model)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    for got, want in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    "model_class, config",
    [
        # a bias
        (
            GPTJForCausalLM,
            GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, rotary_dim=4),
        ),
        # a softcap
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0)),
        # a scale
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0)),
    ],
)
def test_models_that_do_more_to_their_logits_take_the_slow_way(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids, mask = left_padded([3, 5])
    drawn = sample(model, ids, mask, pad_token_id=0, max_new_tokens=6)
    assert not has_plain_head(model)
    again = completion_logprobs(model, ids, mask, drawn.tokens, drawn.mask, 0.7)
    torch.testing.assert_close(again, drawn.logprobs, atol=1e-4, rtol=0)


@families
def test_rows_that_have_ended_leave_the_batch(family, monkeypatch):
    model, (ids, mask) = make_model(family), left_padded([3, 9, 1, 6] * 8)
    ends = [EOS, 5, 9, 11]
    sample(model, ids[:1], mask[:1], max_new_tokens=1)  # the decoder's proof
    shapes = shapes_read(monkeypatch)
    drawn = sample(model, ids, mask, max_new_tokens=20, eos_token_ids=ends)
    rows = [shape[0] for shape in shapes]
    ended = torch.isin(drawn.tokens, torch.tensor(ends))
    running = [32, *(drawn.mask & ~ended)[:, :-1].sum(0).tolist()]
    assert rows == sorted(rows, reverse=True) and rows[0] == 32 and rows[-1] < 24
    for row, run in zip(rows, running, strict=True):
        assert run <= row and (row == run or run > 0.75 * row)
    torch.testing.assert_close(rescored(model, ids, mask, drawn), drawn.logprobs, atol=1e-5, rtol=0)
    assert (drawn.tokens[~drawn.mask] == PAD).all()


def test_a_row_samples_by_its_own_numbers_whatever_rows_are_beside_it():
    model, (ids, mask) = make_model("gpt2", "cpu"), left_padded([3, 9, 1, 6] * 2, "cpu")
    uniforms = draw_uniforms(8, 10, ids.device, torch.Generator().manual_seed(2))
    whole = sample(model, ids, mask, uniforms=uniforms)
    by_seed = sample(model, ids, mask)
    assert torch.equal(whole.tokens, by_seed.tokens), "a generator of this seed draws the same"
    for rows in (slice(0, 3), slice(3, 8), slice(7, 8)):
        part = sample(model, ids[rows], mask[rows], uniforms=uniforms[rows])
        width = part.tokens.shape[1]
        assert torch.equal(part.tokens, whole.tokens[rows, :width])
        assert not whole.mask[rows, width:].any()
    with pytest.raises(ValueError, match="uniforms"):
        sample(model, ids, mask, uniforms=uniforms[:, :9])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_our_cache_gives_what_transformers_gives(family, dtype, pack, fixed):
    """Prompts, single tokens, rows that leave and one that is doubled, with packed weights, too."""
    model = make_model(family, "cpu").eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model: a lost one would not show
            torch.nn.init.normal_(parameter)
    exact = copy.deepcopy(model).float()  # of the same, perhaps rounded, weights
    ids, mask = left_padded([3, 5, 2, 5], "cpu")
    with torch.no_grad():
        texts = (ids.masked_fill(~mask, 0), mask)
        ours = OwnCache(model, *texts, room=7, pack=pack, fixed=fixed)
        theirs, truth = TransformersCache(model, *texts), TransformersCache(exact, *texts)
        token = theirs.logits.argmax(1, keepdim=True)
        errors = [[(x.logits - truth.logits).abs().max() for x in (ours, theirs)]]
        for step in range(5):
            if step == 2:
                stay = torch.tensor([3, 0, 3])
                for cache in (ours, theirs, truth):
                    cache.keep(stay)
                token = token[stay]
            logits, expected, true = (cache.next(token) for cache in (ours, theirs, truth))
            errors.append([(x - true).abs().max() for x in (logits, expected)])
            token = expected.argmax(1, keepdim=True)
    ours, theirs = torch.tensor(errors).T
    assert ours.max() < 2e-5 if dtype == torch.float32 else ours.max() < 1.5 * theirs.max()


@families
def test_samples_of_one_prompt_share_its_pass_and_are_those_of_separate_passes(
    family, device, monkeypatch
):
    """Repeated prompts of different lengths, not in order. The slow twin samples each row alone."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 5, 2], device)
    order = torch.tensor([1, 1, 0, 2, 1, 0], device=device)
    uniforms = draw_uniforms(6, 10, device, torch.Generator(device).manual_seed(4))
    sample(model, ids[:1], mask[:1], max_new_tokens=1)  # the decoder's proof
    widths = shapes_read(monkeypatch)
    together = sample(model, ids[order], mask[order], uniforms=uniforms)
    assert widths[0] == (3, 5) and widths[1][0] > 3 and not mask.all()
    for i, row in enumerate(order):
        alone = sample(model, ids[row, None], mask[row, None], uniforms=uniforms[i, None])
        length = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], together.tokens[i, :length])
        assert together.mask[i].sum() == alone.mask.sum()
        logprobs = together.logprobs[i, :length]
        torch.testing.assert_close(alone.logprobs[0], logprobs, rtol=1e-4, atol=1e-5)


def test_weights_that_change_between_samplings_are_seen():
    model, (ids, mask) = make_model("llama", "cpu"), left_padded([3, 3], "cpu")
    before = sample(model, ids, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sample(model, ids, mask)
    assert not torch.equal(before.logprobs[:, :1], after.logprobs[:, :1])
    again = rescored(model, ids, mask, after)
    torch.testing.assert_close(again, after.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_with_fixed_shapes_samples_as_the_loop(family, device, monkeypatch):
    """What a CUDA graph replays, against the loop that lets rows leave."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 3, device)
    own = functools.partial(OwnCache, fixed=False)
    monkeypatch.setattr(generation, "OwnCache", own)
    loop = sample(model, ids, mask, max_new_tokens=20)
    assert not loop.mask.all(1).all() and loop.mask.shape[1] > 2
    monkeypatch.setattr(generation, "OwnCache", functools.partial(OwnCache, fixed=True))
    fixed = sample(model, ids, mask, max_new_tokens=20)
    assert torch.equal(fixed.tokens, loop.tokens) and torch.equal(fixed.mask, loop.mask)
    torch.testing.assert_close(fixed.logprobs, loop.logprobs, rtol=0, atol=1e-5)


def test_fixed_decoding_stops_soon_after_the_last_row(monkeypatch):
    model, (ids, mask) = make_model("llama"), left_padded([2] * 16)
    sample(model, ids[:1], mask[:1], max_new_tokens=1)  # the decoder's proof
    shapes = shapes_read(monkeypatch)
    monkeypatch.setattr(generation, "OwnCache", functools.partial(OwnCache, fixed=True))
    drawn = sample(model, ids, mask, max_new_tokens=30, eos_token_ids=list(range(12)))
    assert 2 < drawn.tokens.shape[1] == int(drawn.mask.sum(1).max()) <= 16 and len(shapes) == 16


# --- the plain twins


@pytest.fixture(params=["gpt2", "llama"])
def twins(request, device):
    """A model in training mode (dropout must not act), prompts padded on the left, uniforms."""
    model = make_model(request.param, device).train()
    ids = torch.randint(3, VOCABULARY, (6, 7), device=device)
    pads = torch.tensor([0, 4, 6, 2, 4, 1], device=device)
    mask = torch.arange(7, device=device) >= pads[:, None]
    ids = ids.masked_fill(~mask, PAD)
    ids[4], mask[4] = ids[1], mask[1]  # the fast way shares the pass of equal prompts
    return model, ids, mask, draw_uniforms(6, 9, device, torch.Generator(device).manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_and_fast_sampling_draw_the_same_tokens(twins, temperature):
    model, ids, mask, uniforms = twins
    settings = dict(uniforms=uniforms, temperature=temperature, eos_token_ids=[EOS, 5, 6])
    tokens, real = plain_sample(model, ids, mask, **settings)
    fast = generate(model, ids, mask, max_new_tokens=9, pad_token_id=0, **settings)
    assert torch.equal(tokens, fast.tokens) and torch.equal(real, fast.mask)
    lengths = real.sum(1)
    assert lengths.min() < lengths.max() == tokens.shape[1], "the case needs rows that end early"
    assert (tokens[~real] == 0).all() and model.training


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_and_fast_logprobs_and_gradients_are_equal(twins, temperature):
    model, ids, mask, uniforms = twins
    tokens, real = plain_sample(
        model, ids, mask, uniforms=uniforms, temperature=temperature, eos_token_ids=[EOS, 5, 6]
    )
    garbage = tokens.masked_fill(~real, PAD)
    weights = torch.randn(real.shape, device=ids.device)
    results = []
    for function in (sequence_logprobs, completion_logprobs):
        model.zero_grad()
        logprobs = function(model, ids, mask, garbage, real, temperature)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
        assert (logprobs[~real] == 0).all() and logprobs.dtype == torch.float32
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-5, atol=1e-5)


def test_plain_logprobs_are_those_of_each_row_alone(twins):
    """Without padding, one row at a time, in float64: what both ways are held to."""
    model, ids, mask, uniforms = twins
    tokens, real = plain_sample(
        model, ids, mask, uniforms=uniforms, temperature=0.7, eos_token_ids=EOS
    )
    got = sequence_logprobs(model, ids, mask, tokens, real, 0.7)
    model.eval()
    for row in range(len(ids)):
        prompt, completion = ids[row][mask[row]], tokens[row][real[row]]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits.double() / 0.7).log_softmax(1)
        expected = expected[torch.arange(len(completion)), completion]
        torch.testing.assert_close(got[row][real[row]].double(), expected, rtol=0, atol=1e-5)


def test_plain_samples_have_the_frequencies_of_the_softmax(device):
    """20,000 draws of one token, against the probabilities of a bare forward."""
    model = make_model("gpt2", device)
    prompt = torch.tensor([[3, 4, 5]], device=device)
    count = 20_000
    uniforms = torch.rand(count, 1, device=device, dtype=torch.double)
    ids = prompt.expand(count, 3)
    tokens, _ = plain_sample(
        model, ids, torch.ones_like(ids), uniforms=uniforms, temperature=0.7, eos_token_ids=EOS
    )
    expected = (model(prompt).logits[0, -1] / 0.7).softmax(0)
    share = torch.bincount(tokens[:, 0], minlength=VOCABULARY) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((share - expected).abs() < 4.5 * error + 1e-9).all()


def test_uniforms_at_both_ends_draw_tokens_that_can_be_drawn(device):
    model = make_model("llama", device)
    ids = torch.tensor([[3, 4], [3, 4]], device=device)
    uniforms = torch.tensor([[0.0], [1 - 2**-53]], device=device, dtype=torch.double)
    tokens, _ = plain_sample(
        model, ids, torch.ones_like(ids), uniforms=uniforms, temperature=1.0, eos_token_ids=EOS
    )
    assert tokens.flatten().tolist() == [0, VOCABULARY - 1]
