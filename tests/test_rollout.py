"""Sampling and scoring again: what was recorded while sampling is what one pass over the whole text gives.

Models have dropout, and weights large enough that a wrong position, mask or temperature shows."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
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
)  # fmt: skip

import minalign.rollout as rollout_module
from minalign.decode import can_be_fixed, packed_linears, preallocated_cache
from minalign.logprobs import exact_kl, kl_k1, position_ids_from_mask, token_logprobs
from minalign.rollout import completion_logits, completion_logprobs, draw_uniforms, frozen_logprobs, generate, has_plain_head

VOCABULARY, CONTEXT, EOS = 24, 32, 2
PAD = VOCABULARY + 7  # outside the embedding on purpose


def make_model(family, device="cpu", vocabulary=VOCABULARY):
    torch.manual_seed(0)
    if family == "gpt2":  # learned positions: padding that shifts them shows
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
                resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=EOS, eos_token_id=EOS,
            )
        ).to(device).eval()  # fmt: skip
    if family == "bloom":  # positions (ALiBi) from the mask alone; transformers guesses other models' masks from positions
        return BloomForCausalLM(
            BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3, hidden_dropout=0.2)
        ).to(device).eval()  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, attention_dropout=0.2,
        )
    ).to(device).eval()  # fmt: skip


def left_padded(lengths, device="cpu", extra=0, vocabulary=VOCABULARY):
    """Random prompts, padded on the left by PAD to the longest and `extra` columns more."""
    width = max(lengths) + extra
    ids = torch.randint(0, vocabulary, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, PAD).to(device), mask.to(device)


def sample(model, ids, mask, seed=2, **changes):  # a seed that ends some rows and not others in every case below
    settings = dict(max_new_tokens=10, temperature=0.7, eos_token_ids=[EOS], pad_token_id=PAD) | changes
    return generate(model, ids, mask, generator=torch.Generator(ids.device).manual_seed(seed), **settings)


def rescored(model, ids, mask, rollout, temperature=0.7):
    logits = completion_logits(model, ids, mask, rollout.tokens, rollout.mask)
    return token_logprobs(logits, rollout.tokens.masked_fill(~rollout.mask, 0), temperature).masked_fill(~rollout.mask, 0.0)


def bare_logprobs(model, prompt, completion, temperature):
    """Log-probs of one completion, from the model's plain forward on the bare ids."""
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(1).gather(1, completion[:, None]).squeeze(1)


families = pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])


@families
def test_sampling_logprobs_are_those_of_the_scoring_pass(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 4, device)
    rollout = sample(model, ids, mask)
    assert not rollout.mask.all(), "the case needs rows of unequal length"
    torch.testing.assert_close(rescored(model, ids, mask, rollout), rollout.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_frozen_logprobs_do_not_depend_on_the_micro_batch(micro_batch_size, device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9, 1, 6] * 4, device)
    rollout = sample(model, ids, mask, pad_token_id=0)
    logprobs = frozen_logprobs(model, ids, mask, rollout.tokens, rollout.mask, 0.7, micro_batch_size)
    torch.testing.assert_close(logprobs.masked_fill(~rollout.mask, 0.0), rollout.logprobs, atol=1e-5, rtol=0)
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
        torch.testing.assert_close(rollout.logprobs[row][rollout.mask[row]], bare, atol=1e-5, rtol=0)


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
    together = sample(model, ids, mask, temperature=1e-4)  # no chance left, so that rows can be compared alone
    for row in range(4):
        alone = sample(model, ids[row : row + 1][:, mask[row]], mask[row : row + 1][:, mask[row]], temperature=1e-4)
        assert alone.tokens[0][alone.mask[0]].tolist() == together.tokens[row][together.mask[row]].tolist()


@families
def test_extra_left_padding_changes_nothing(family, device):
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6], device, extra=4)
    wide, narrow = sample(model, ids, mask), sample(model, ids[:, 4:], mask[:, 4:])
    assert torch.equal(narrow.tokens, wide.tokens) and torch.equal(narrow.mask, wide.mask)
    torch.testing.assert_close(narrow.logprobs, wide.logprobs, atol=1e-5, rtol=0)


def test_ids_under_the_padding_change_nothing(device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9], device)
    other = ids.masked_fill(~mask, 5)
    assert all(torch.equal(a, b) for a, b in zip(sample(model, ids, mask), sample(model, other, mask)))


def test_completions_come_as_often_as_the_model_says(device):
    """Chi-square over all completions of up to two tokens, for a checkpoint that asks for greedy decoding."""
    vocabulary, temperature, draws = 6, 1.5, 20_000
    model = make_model("gpt2", device, vocabulary)
    model.generation_config.update(
        do_sample=False, top_k=1, top_p=0.1, repetition_penalty=3.0, eos_token_id=4, min_new_tokens=2
    )
    prompt = torch.tensor([3, 1, 5], device=device)
    ids = torch.cat([torch.full((2,), PAD, device=device), prompt]).repeat(draws, 1)
    rollout = sample(model, ids, ids != PAD, temperature=temperature, max_new_tokens=2)

    completions = [(EOS,)] + [(a, b) for a in range(vocabulary) if a != EOS for b in range(vocabulary)]
    drawn = Counter(tuple(row[:n]) for row, n in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist()))
    with torch.no_grad():
        logprobs = [bare_logprobs(model, prompt, torch.tensor(c, device=device), temperature).sum().item() for c in completions]
    expected = [draws * math.exp(logprob) for logprob in logprobs]
    assert sum(expected) == pytest.approx(draws, rel=1e-4) and min(expected) > 5
    chi_square = sum((drawn[c] - e) ** 2 / e for c, e in zip(completions, expected))
    freedom = len(completions) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_completion_ends_with_its_first_end_token(device):
    model, (ids, mask) = make_model("llama", device, vocabulary=8), left_padded([2] * 64, device, vocabulary=8)
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
    assert torch.equal(rescored(model.train(), ids, mask, rollout), rescored(model.eval(), ids, mask, rollout))


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_and_tensors_are_as_before(training):
    model, (ids, mask) = make_model("gpt2").train(training), left_padded([3, 9])
    generation_config, before = copy.deepcopy(model.generation_config.to_dict()), (ids.clone(), mask.clone())
    rollout = sample(model, ids, mask)
    completion_logits(model, ids, mask, rollout.tokens, rollout.mask)
    assert model.training is training and all(module.training is training for module in model.modules())
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
    logits = [completion_logits(m, ids, mask, rollout.tokens, rollout.mask) for m in (model, reference)]
    assert k1.abs().max() < 1e-5 and exact_kl(*logits, 0.7).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@families
def test_gradient_checkpointing_changes_nothing(family):
    """Transformers switches the cache off where it is on in train mode (C13)."""
    model, (ids, mask) = make_model(family), left_padded([3, 9])
    plain = sample(model, ids, mask)
    model.gradient_checkpointing_enable()
    assert torch.equal(sample(model.train(), ids, mask).logprobs, plain.logprobs)


def test_draws_follow_the_generator(device):
    model, (ids, mask) = make_model("gpt2", device), left_padded([3, 9, 1, 6], device)
    first, again, other = (sample(model, ids, mask, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again) and not (first.shape == other.shape and torch.equal(first, other))
    settings = dict(max_new_tokens=10, temperature=0.7, eos_token_ids=EOS, pad_token_id=PAD)
    free = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)  # without a generator, torch's own
        free.append(generate(model, ids, mask, **settings).tokens.tolist())
    assert free[0] == free[1] != free[2]


def test_samples_of_one_prompt_differ(device):
    model, ids = make_model("gpt2", device), torch.tensor([[3, 4, 5]] * 8, device=device)
    assert len({tuple(row) for row in sample(model, ids, torch.ones_like(ids)).tokens.tolist()}) == 8


def test_logprobs_of_a_bfloat16_model_are_float32():
    model, (ids, mask) = make_model("gpt2").bfloat16(), left_padded([3, 9])
    logprobs = sample(model, ids, mask).logprobs
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, logprobs.bfloat16().float()), "a log-softmax in bfloat16, only cast afterwards"


def test_prompt_and_completion_may_fill_the_context():
    model, (ids, mask) = make_model("gpt2"), left_padded([CONTEXT - 2, 3])
    assert sample(model, ids, mask, max_new_tokens=2, eos_token_ids=[]).tokens.shape == (2, 2)
    with pytest.raises(ValueError, match=f"prompt of {CONTEXT - 2} tokens and max_new_tokens=3, expected at most {CONTEXT}"):
        sample(model, ids, mask, max_new_tokens=3)


@pytest.mark.parametrize("changes, message", [
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": float("nan")}, "temperature=nan"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(make_model("gpt2"), *left_padded([3, 9]), **changes)


@pytest.mark.parametrize("ids, mask", [
    ([[1, 2, 0]], [[1, 1, 0]]),  # padded on the right
    ([[1, 2], [0, 0]], [[1, 1], [0, 0]]),  # an empty prompt
    ([[1, 2]], [[1, 1, 1]]),
    ([1, 2], [1, 1]),
    ([[], []], [[], []]),
])  # fmt: skip
def test_prompts_not_padded_on_the_left_are_refused(ids, mask):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        sample(make_model("gpt2"), torch.tensor(ids).long(), torch.tensor(mask))


def test_a_model_without_a_key_value_cache_is_refused():
    """Mamba takes the cache, ignores it and forgets the prompt: log-probs of another text, without a sign."""
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


# --- the fast way and its slow twin ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("known", [False, True])
def test_logprobs_of_real_tokens_alone_are_those_of_full_logits(family, known, device):
    """Values and all gradients; columns of padding on both sides, which the fast way leaves out."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 4, device, extra=2)
    drawn = sample(model, ids, mask, pad_token_id=0)
    tokens, kept = (torch.cat([x, torch.zeros_like(x[:, :2])], 1) for x in (drawn.tokens, drawn.mask))  # and two columns more
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5)).to(device)

    def run(logprobs):
        model.zero_grad()
        (logprobs.masked_fill(~kept, 0.0) * weights).sum().backward()
        return logprobs.detach().masked_fill(~kept, 0.0), [p.grad.clone() for p in model.parameters()]

    slow, slow_grads = run(token_logprobs(completion_logits(model, ids, mask, tokens, kept), tokens, 0.7))
    fast, fast_grads = run(completion_logprobs(model, ids, mask, tokens, kept, 0.7, weights if known else None))
    assert has_plain_head(model)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    for got, want in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("make", [
    lambda: GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, rotary_dim=4)),  # a bias
    lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0, pad_token_id=0)),
    lambda: GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=8.0, pad_token_id=0)),
])  # fmt: skip
def test_models_that_do_more_to_their_logits_take_the_slow_way(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids, mask = left_padded([3, 5])
    drawn = sample(model, ids, mask, pad_token_id=0, max_new_tokens=6)
    assert not has_plain_head(model)
    again = completion_logprobs(model, ids, mask, drawn.tokens, drawn.mask, 0.7)
    torch.testing.assert_close(again, drawn.logprobs, atol=1e-4, rtol=0)


def test_rows_that_have_ended_leave_the_batch():
    model, (ids, mask) = make_model("gpt2"), left_padded([3, 9, 1, 6] * 8)
    rows = []
    hook = model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    ends = [EOS, 5, 9, 11]
    drawn = sample(model, ids, mask, max_new_tokens=20, eos_token_ids=ends)
    hook.remove()
    running = [32] + drawn.mask[:, :-1].logical_and(~torch.isin(drawn.tokens[:, :-1], torch.tensor(ends))).sum(0).tolist()
    assert rows == sorted(rows, reverse=True) and rows[0] == 32 and rows[-1] < 16
    assert all(run <= row and (row == run or run > 0.75 * row) for row, run in zip(rows, running, strict=True))
    torch.testing.assert_close(rescored(model, ids, mask, drawn), drawn.logprobs, atol=1e-5, rtol=0)
    assert (drawn.tokens[~drawn.mask] == PAD).all()


def test_a_row_samples_by_its_own_numbers_whatever_rows_are_beside_it():
    model, (ids, mask) = make_model("gpt2", "cpu"), left_padded([3, 9, 1, 6] * 2, "cpu")
    uniforms = draw_uniforms(8, 10, ids.device, torch.Generator().manual_seed(2))
    whole = sample(model, ids, mask, uniforms=uniforms)
    assert torch.equal(whole.tokens, sample(model, ids, mask).tokens), "a generator of this seed draws the same"
    for rows in (slice(0, 3), slice(3, 8), slice(7, 8)):
        part = sample(model, ids[rows], mask[rows], uniforms=uniforms[rows])
        width = part.tokens.shape[1]
        assert torch.equal(part.tokens, whole.tokens[rows, :width]) and not whole.mask[rows, width:].any()
    with pytest.raises(ValueError, match="uniforms"):
        sample(model, ids, mask, uniforms=uniforms[:, :9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_weights_and_the_buffer_give_what_transformers_gives(family, dtype):
    """The fast twins against Linear and DynamicCache: prefill, single tokens, rows that leave, and everything put back."""
    model, (ids, mask) = make_model(family, "cpu").eval().to(dtype), left_padded([3, 5, 2, 5], "cpu")
    ids = ids.masked_fill(~mask.bool(), 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero in a new model: a lost one would not show
            torch.nn.init.normal_(parameter)
    forwards = [module.forward for module in model.modules()]
    fast, slow = preallocated_cache(model.config, 12), DynamicCache(config=model.config)
    with torch.no_grad():
        for step in range(5):
            inputs = dict(
                input_ids=ids, attention_mask=mask.long(), position_ids=position_ids_from_mask(mask)[:, -ids.shape[1] :]
            )
            expected = model(**inputs, past_key_values=slow, use_cache=True).logits
            with packed_linears(model):
                logits = model(**inputs, past_key_values=fast, use_cache=True).logits
                if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
                    assert any("forward" in vars(module) for module in model.modules())
            exact = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
            torch.testing.assert_close(logits[:, -1], expected[:, -1], **exact)
            ids = expected[:, -1:].argmax(2)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if step == 2:
                stay = torch.tensor([0, 3])
                fast.batch_select_indices(stay)
                slow.batch_select_indices(stay)
                ids, mask = ids[stay], mask[stay]
    assert [module.forward for module in model.modules()] == forwards
    assert fast.layers[0].keys.shape == slow.layers[0].keys.shape and fast.layers[0].buffers[0].shape[2] == 12


@families
def test_samples_of_one_prompt_share_its_pass_and_are_those_of_separate_passes(family, device):
    """Repeated prompts of different lengths, not in order; the slow twin samples each row by itself."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 5, 2], device)
    order = torch.tensor([1, 1, 0, 2, 1, 0], device=device)
    uniforms = draw_uniforms(6, 10, device, torch.Generator(device).manual_seed(4))
    widths = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    together = sample(model, ids[order], mask[order], uniforms=uniforms)
    hook.remove()
    assert widths[0] == (3, 5) and widths[1][0] > 3 and not mask.all()
    for i, row in enumerate(order):
        alone = sample(model, ids[row, None], mask[row, None], uniforms=uniforms[i, None])
        length = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], together.tokens[i, :length]) and together.mask[i].sum() == alone.mask.sum()
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i, :length], rtol=1e-4, atol=1e-5)


def test_weights_that_change_between_samplings_are_seen():
    model, (ids, mask) = make_model("llama", "cpu"), left_padded([3, 3], "cpu")
    before = sample(model, ids, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sample(model, ids, mask)
    assert not torch.equal(before.logprobs[:, :1], after.logprobs[:, :1])
    torch.testing.assert_close(rescored(model, ids, mask, after), after.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_with_fixed_shapes_samples_as_the_loop_does(family, attention, device, monkeypatch):
    """What a CUDA graph replays, against the loop that grows its mask and lets rows leave."""
    model, (ids, mask) = make_model(family, device), left_padded([3, 9, 1, 6] * 3, device)
    model.set_attn_implementation(attention)
    monkeypatch.setattr(rollout_module, "can_be_fixed", lambda model, cache: False)
    loop = sample(model, ids, mask, max_new_tokens=20)
    assert not loop.mask.all(1).all() and loop.mask.shape[1] > 2
    monkeypatch.setattr(rollout_module, "can_be_fixed", lambda model, cache: True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new buffers hold NaN
    try:
        fixed = sample(model, ids, mask, max_new_tokens=20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(fixed.tokens, loop.tokens) and torch.equal(fixed.mask, loop.mask)
    torch.testing.assert_close(fixed.logprobs, loop.logprobs, rtol=0, atol=1e-5)


def test_fixed_decoding_stops_soon_after_the_last_row(monkeypatch):
    model, (ids, mask) = make_model("llama"), left_padded([2] * 16)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(rollout_module, "can_be_fixed", lambda model, cache: True)
    drawn = sample(model, ids, mask, max_new_tokens=30, eos_token_ids=list(range(12)))
    assert 2 < drawn.tokens.shape[1] == int(drawn.mask.sum(1).max()) <= 16 and len(calls) == 17


def test_only_a_gpu_and_plain_layers_decode_with_fixed_shapes():
    model, bloom = make_model("llama", "cpu"), make_model("bloom", "cpu")
    cache = preallocated_cache(model.config, 12)
    assert not can_be_fixed(model, cache)

    def on_gpu(model):
        return SimpleNamespace(device=torch.device("cuda"), config=model.config, forward=model.forward)

    assert can_be_fixed(on_gpu(model), cache)
    assert not can_be_fixed(on_gpu(bloom), preallocated_cache(bloom.config, 12)), (
        "its positions come from a mask of two dimensions"
    )
    cache.layers[0] = DynamicCache(config=model.config).layers[0]
    assert not can_be_fixed(on_gpu(model), cache)
