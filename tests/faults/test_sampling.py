"""What is sampled and scored is what a bare forward pass of each row says, or is refused at load.

Faults M1, M2, M5, M6, M8 to M11, M14 to M16, B8, B9, T-C and S9, and further members of each kind.
References: transformers' own models, one row at a time, without cache, padding or positions.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3Config, cache_utils

from minalign import logprobs, rollout
from minalign.measuring.pairs import expected_calibration_error
from minalign.models import caches, generation, loading, padding, precision
from minalign.running import device as devices
from minalign.running.errors import UserError, one_line_errors
from minalign.tools import asking
from minalign.tools import generate as generate_tool

CPU = torch.device("cpu")
V, ENDS = 40, [2, 7, 9, 11, 13]
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2)
EXPERTS |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
MAMBA = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_n_groups=1)
MAMBA |= dict(mamba_chunk_size=8)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16)
LINEAR |= dict(linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"])
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, n_group=1)
LATENT |= dict(v_head_dim=16, head_dim=8, num_key_value_heads=4, topk_group=1, n_shared_experts=1)
OLD = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64)
BART = dict(d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)
BART |= dict(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64)
SHORT_CONV = dict(layer_types=["conv", "full_attention"], conv_L_cache=3)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[3.0] * 8)
LONGROPE |= dict(original_max_position_embeddings=12, rope_theta=1e4)
# What a family needs beside SIZES. None: the size is not the family's.
SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "falcon_h1": MAMBA | dict(mamba_d_head=16),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "granitemoehybrid": MAMBA | EXPERTS | dict(layer_types=["mamba", "attention"]),
    "jamba": EXPERTS
    | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    | dict(mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "qwen3_next": LINEAR | EXPERTS,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR | EXPERTS,
    "olmo_hybrid": LINEAR,
    "lfm2": SHORT_CONV,
    "lfm2_moe": EXPERTS | SHORT_CONV | dict(num_dense_layers=1),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    | dict(window_size=4, num_key_value_heads=None),
    "gpt2": OLD,
    "gptj": OLD | dict(rotary_dim=8),
    "codegen": OLD | dict(rotary_dim=8),
    "ctrl": OLD | dict(dff=64),
    "gpt_bigcode": OLD,
    "openai-gpt": OLD,
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=64),
    "xglm": dict(d_model=64, num_layers=2, attention_heads=4, ffn_dim=64),
    "llama4_text": dict(num_local_experts=2, intermediate_size_mlp=64, moe_layers=[1]),
    "deepseek_v3": LATENT | EXPERTS | dict(first_k_dense_replace=1),
    "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "mistral": dict(sliding_window=4),
    "mixtral": EXPERTS,
    "phi3": dict(original_max_position_embeddings=64, rope_parameters=LONGROPE),
    "mamba": dict(state_size=8, time_step_rank=4),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
    "falcon_mamba": dict(state_size=8, time_step_rank=4),
    "rwkv": dict(attention_hidden_size=64),
    "recurrent_gemma": dict(lru_width=64, block_types=["recurrent", "attention"]),
    "xlm": dict(emb_dim=64, n_layers=2, n_heads=4, num_key_value_heads=None),
    "cpmant": dict(dim_head=16, dim_ff=64),
    "minimax": EXPERTS | dict(layer_types=["linear_attention", "full_attention"], block_size=8),
    **dict.fromkeys("bart mbart marian pegasus blenderbot plbart trocr mvp".split(), BART),
    "roberta": dict(is_decoder=True),
    "camembert": dict(is_decoder=True),
    "xlm-roberta": dict(is_decoder=True),
    "data2vec-text": dict(is_decoder=True),
    "roformer": dict(is_decoder=True),
    "bigbird_pegasus": BART,
}
CONFIGS["phi3"] = dict(original_max_position_embeddings=12, rope_parameters=LONGROPE)


def make(family, vocabulary=V, deviation=0.25, **changes):
    """A model with random weights, large enough for every position to matter."""
    torch.manual_seed(0)
    given = dict(vocab_size=vocabulary) | SIZES | CONFIGS.get(family, {})
    given = {name: value for name, value in given.items() if value is not None} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=deviation)
    return model.requires_grad_(False)


def batch(lengths=(3, 9, 1, 6, 14, 2, 9)):
    """Prompts padded on the left, not in order, one twice; and the same as lists."""
    prompts = [torch.randint(3, V, (length,)).tolist() for length in lengths]
    prompts[-1] = list(prompts[1])
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask, prompts


def bare(model, prompt, completion):
    """(T, V) log-probs of the completion's tokens, in one pass over the bare row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(1)


def assert_samples_are_those_of_bare_passes(model, tolerance=1e-3, new_tokens=10):
    ids, mask, prompts = batch()
    uniforms = torch.rand(len(ids), new_tokens, dtype=torch.double)
    settings = dict(max_new_tokens=new_tokens, temperature=1.0, eos_token_ids=ENDS)
    drawn = rollout.generate(model, ids, mask, pad_token_id=0, uniforms=uniforms, **settings)
    scored = rollout.completion_logprobs(model, ids, mask, drawn.tokens, drawn.mask, 1.0)
    assert not drawn.mask.all(1).all() and drawn.mask.shape[1] > 4
    for row, prompt in enumerate(prompts):
        length = int(drawn.mask[row].sum())
        completion = drawn.tokens[row, :length].tolist()
        expected = bare(model, prompt, completion)
        cdf = expected.double().exp().cumsum(1)
        own = torch.searchsorted(cdf, uniforms[row, :length, None] * cdf[:, -1:], right=True)
        assert own.squeeze(1).tolist() == completion
        expected = expected.gather(1, own).squeeze(1)
        for ours in (drawn.logprobs, scored):
            torch.testing.assert_close(ours[row, :length], expected, rtol=0, atol=tolerance)


def ids_of(fault, *families, slow=()):
    """Parametrize ids such as M2-falcon_h1."""
    fast = [pytest.param(family, id=f"{fault}-{family}") for family in families]
    marks = pytest.mark.slow
    return fast + [pytest.param(f, id=f"{fault}-{f}", marks=marks) for f in slow]


# --- caches of more than keys and values


@pytest.mark.parametrize(
    "family",
    ids_of("M2", "falcon_h1")
    + ids_of("M1", "qwen3_5_text", "jamba", "lfm2")
    + ids_of("M1", slow="bamba granitemoehybrid qwen3_next qwen3_5_moe_text olmo_hybrid".split())
    + ids_of("M1", slow=["lfm2_moe"])
    + ids_of("M11", "llama4_text")
    + ids_of("works", "gpt_neo", "gemma3_text", slow="mistral mixtral deepseek_v3 opt mpt".split())
    + ids_of("works", slow="bloom gptj codegen ctrl gpt_bigcode xglm gpt2".split()),
)
def test_samples_and_their_log_probs_are_those_of_bare_passes(family):
    assert_samples_are_those_of_bare_passes(make(family))


# --- the trial at load


def saved(folder, family, **changes):
    """A checkpoint on the disk, with a byte-level tokenizer of its own."""
    tokenizer = tiny.tokenizer()
    model = make(family, vocabulary=len(tokenizer), **changes)
    return tiny.save(folder, model, tokenizer)


NO_POLICIES = (
    ids_of("M10", "mamba", "openai-gpt", slow="mamba2 falcon_mamba rwkv recurrent_gemma".split())
    + ids_of("M10", slow="xlm minimax cpmant bert".split())
    + ids_of("M9", "bart", "roberta", slow="mbart marian pegasus blenderbot plbart trocr".split())
    + ids_of("M9", slow="mvp bigbird_pegasus camembert xlm-roberta data2vec-text roformer".split())
)


@pytest.mark.parametrize("family", NO_POLICIES)
def test_a_family_that_cannot_be_a_policy_is_refused_when_it_is_loaded(family, tmp_path):
    path = saved(tmp_path / "m", family)
    with pytest.raises(UserError, match=f"^--model {path}: got a {family} model, which .*Llama"):
        loading.load_policy(path)


@pytest.mark.parametrize("family", ids_of("M10", "mamba"))
def test_a_tool_ends_in_one_line_on_such_a_model(family, tmp_path, capsys):
    data = tiny.rows(tmp_path / "p.jsonl", {"prompt": "what is the {n} film ?"}, 2)
    arguments = f"--model {saved(tmp_path / 'm', family)} --data {data} --out {tmp_path}/o.jsonl"
    with pytest.raises(SystemExit) as end, one_line_errors():
        generate_tool.main([*arguments.split(), "--device", "cpu"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and f"got a {family} model" in err


@pytest.mark.parametrize(
    "family", ids_of("M2", "falcon_h1") + ids_of("M1", "qwen3_5_text", slow=["jamba", "lfm2"])
)
def test_the_trial_notices_states_that_are_not_moved_with_their_rows(family, tmp_path, monkeypatch):
    """What transformers does for other caches moves keys and values alone."""
    path = saved(tmp_path / "m", family)
    loading.load_policy(path)
    half = cache_utils.Cache.batch_select_indices
    monkeypatch.setattr(cache_utils.Cache, "reorder_cache", half)
    with pytest.raises(UserError, match=f"got a {family} model, which"):
        loading.load_policy(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_when_a_policy_is_loaded(name, value, tmp_path):
    """S9."""
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = value
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        loading.load_policy(tiny.save(tmp_path / "m", model, tokenizer))


@pytest.mark.parametrize("vocabulary, context", [(3, 64), (300, 6)])
def test_the_trial_is_content_with_few_tokens_and_a_short_context(vocabulary, context, tmp_path):
    tokenizer = tiny.tokenizer()
    model = make("gpt2", n_positions=context, vocabulary=max(vocabulary, len(tokenizer)))
    loading.load_policy(tiny.save(tmp_path / "m", model, tokenizer))


def test_the_trial_is_cheap(tmp_path):
    """Few passes over few tokens, and no second copy of the weights."""
    path, seen = saved(tmp_path / "m", "llama"), []
    model, tokenizer = loading.load_policy(path)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda layer, _: seen.append("forward" in vars(layer)))
    loading.check_policy(model, tokenizer, "it")
    passes = [count for count in seen if not isinstance(count, bool)]
    assert len(passes) <= 6 and sum(passes) <= 45 and True not in seen


# --- fixed shapes on a GPU


@pytest.mark.parametrize(
    "family",
    ids_of("M5", "gpt_neo")
    + ids_of("works", "llama", slow="gpt2 gptj codegen ctrl gpt_bigcode opt xglm mixtral".split())
    + ids_of("works", slow="deepseek_v3 llama4_text gemma3_text bloom mpt falcon_h1".split()),
)
def test_whatever_a_gpu_would_do_with_a_family_is_right(family, monkeypatch):
    """The loop of fixed shapes where a GPU would take it: 4 tokens of window, 24 of text."""
    monkeypatch.setattr(generation, "OwnCache", functools.partial(caches.OwnCache, fixed=True))
    assert_samples_are_those_of_bare_passes(make(family))


# --- contexts

INNER = dict(max_position_embeddings=48)
BY_LAYER = dict(full_attention=LONGROPE, sliding_attention=dict(rope_type="default"))


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        pytest.param("mpt", dict(max_seq_len=48), 48, id="M14-mpt"),
        pytest.param("dbrx", dict(max_seq_len=48), 48, id="M14-dbrx"),
        pytest.param("gpt2", dict(n_positions=48), 48, id="M14-gpt2"),
        pytest.param("bailing_hybrid", dict(model_max_length=48), 48, id="M14-bailing_hybrid"),
        pytest.param("bloom", {}, None, id="M14-bloom-has-none"),
        pytest.param("gemma3", dict(text_config=INNER), 48, id="M7-gemma3"),
        pytest.param("llama4", dict(text_config=INNER), 48, id="M7-llama4"),
        pytest.param("phi3", SIZES | CONFIGS["phi3"], 12, id="M6-phi3"),
        pytest.param("llama", dict(rope_parameters=LONGROPE), 12, id="M6-llama"),
        pytest.param("qwen3", dict(rope_parameters=LONGROPE), 12, id="M6-qwen3"),
        pytest.param("gemma3_text", dict(rope_parameters=BY_LAYER), 12, id="M6-one-kind-of-layer"),
        pytest.param(
            "llama",
            dict(max_position_embeddings=99, rope_parameters=dict(rope_type="yarn", factor=4.0)),
            99,
            id="M6-yarn-changes-nothing",
        ),
    ],
)
def test_a_context_is_found_by_any_of_its_names(family, changes, expected):
    if family not in CONFIG_MAPPING:
        pytest.skip("of a later transformers")
    assert padding.context_of(AutoConfig.for_model(family, **changes)) == expected


@pytest.mark.parametrize(
    "family, room, changes",
    [("phi3", 12, {}), ("mpt", 16, dict(max_seq_len=16, max_position_embeddings=None))],
)
def test_what_goes_beyond_it_is_refused_and_what_fits_is_sampled_right(family, room, changes):
    """M6: beyond 12 tokens a batch of longrope has other numbers than its rows. M14."""
    model, (ids, mask, prompts) = make(family, **changes), batch((3, 5, 5))
    how = dict(temperature=1.0, eos_token_ids=[], pad_token_id=0)
    with pytest.raises(ValueError, match=f"at most {room} together"):
        rollout.generate(model, ids, mask, max_new_tokens=room - 4, **how)
    drawn = rollout.generate(model, ids, mask, max_new_tokens=room - 5, **how)
    for row, prompt in enumerate(prompts):
        expected = bare(model, prompt, drawn.tokens[row].tolist())
        expected = expected.gather(1, drawn.tokens[row, :, None]).squeeze(1)
        torch.testing.assert_close(drawn.logprobs[row], expected, rtol=0, atol=1e-4)


def test_a_composite_model_says_how_many_tokens_a_pass_takes():
    """M7."""
    text = dict(hidden_size=64, num_hidden_layers=1, vocab_size=V)
    model = SimpleNamespace(config=Gemma3Config(text_config=text), device=torch.device("cpu"))
    assert padding.tokens_per_pass(model) == 2**18 // 64


# --- bfloat16


@pytest.mark.parametrize(
    "family", ids_of("M8", "xglm") + ids_of("works", "llama", slow=["ctrl", "gptj", "falcon_h1"])
)
def test_rounded_weights_sample(family):
    model, (ids, mask, _) = make(family, deviation=0.1), batch()
    how = dict(max_new_tokens=5, temperature=1.0, eos_token_ids=[], pad_token_id=0)
    with precision.autocast(CPU, torch.bfloat16):
        drawn = rollout.generate(model, ids, mask, **how)
    scored = rollout.completion_logprobs(model, ids, mask, drawn.tokens, drawn.mask, 1.0)
    assert (scored - drawn.logprobs).abs().max() < 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_judge_in_bfloat16_keeps_the_angles_of_its_positions(tmp_path):
    """`model.to(torch.bfloat16)` rounds them: at the 1000th token by radians."""
    path = saved(tmp_path / "m", "llama")
    model = asking.LocalJudge(path, "cpu", "bfloat16", max_new_tokens=4, batch_size=2).model
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, make("llama").model.rotary_emb.inv_freq)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_is_chosen_where_it_is_native(emulated, monkeypatch, capsys):
    """T-C: a T4 says that it supports bfloat16, and emulates it."""

    def supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = torch.float32 if emulated else torch.bfloat16
    assert devices.pick_dtype("auto", torch.device("cuda")) == expected
    assert ("no bfloat16 of its own" in capsys.readouterr().out) == emulated


# --- decisions about a model


SCALES = (1e-4, 1.0, 30.0)


@pytest.mark.parametrize(
    "family, changes, plain",
    [
        pytest.param("gemma2", dict(final_logit_softcapping=30.0), False, id="M16-gemma2"),
        pytest.param("gemma3_text", dict(final_logit_softcapping=30.0), False, id="M16-gemma3"),
        pytest.param("cohere", dict(logit_scale=0.5), False, id="M16-cohere"),
        pytest.param("granite", dict(logits_scaling=4.0), False, id="M16-granite"),
        pytest.param("granite", dict(logits_scaling=1.0), True, id="granite-that-scales-by-1"),
        pytest.param("gptj", {}, False, id="gptj-has-a-bias"),
        pytest.param("llama4_text", {}, False, id="M11-llama4"),
        pytest.param("gemma2", dict(final_logit_softcapping=None), True, id="gemma2-without"),
        pytest.param("llama", {}, True, id="llama"),
        pytest.param("gpt2", {}, True, id="gpt2"),
        pytest.param("qwen3_5_text", {}, True, id="qwen3_5"),
    ],
)
def test_what_a_model_does_to_its_logits_is_seen_whatever_their_size(
    family, changes, plain, capsys
):
    """M16: a softcap of 30 does nothing to logits of .5, as those of a new model are."""
    found = []
    for scale in SCALES:
        model = make(family, **changes)
        model.get_output_embeddings().weight.mul_(scale)
        found.append(rollout.has_plain_head(model))
    assert found == [plain] * len(SCALES)


def test_log_probs_stay_right_when_the_logits_of_a_new_model_grow():
    """M16."""
    model, (ids, mask, prompts) = make("gemma2", deviation=0.02), batch((3, 5, 5))
    tokens = torch.randint(3, V, (3, 4))
    real = torch.ones_like(tokens, dtype=torch.bool)
    rollout.completion_logprobs(model, ids, mask, tokens, real, 1.0)
    model.get_output_embeddings().weight.mul_(100)
    ours = rollout.completion_logprobs(model, ids, mask, tokens, real, 1.0)
    for row, prompt in enumerate(prompts):
        expected = bare(model, prompt, tokens[row].tolist()).gather(1, tokens[row, :, None])
        torch.testing.assert_close(ours[row], expected.squeeze(1), rtol=0, atol=1e-3)


def test_ids_that_are_no_tokens_are_sampled_as_the_model_has_them():
    """B8: embedding rows beyond the tokenizer's last id."""
    assert_samples_are_those_of_bare_passes(make("llama", vocabulary=V + 30))


# --- nothing in, nothing out


def empty(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize("known", [False, True])
def test_no_token_has_no_log_prob_and_no_gradient(known):
    """M15."""
    hidden, weight = empty(2, 0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    tokens = empty(2, 0, dtype=torch.long)
    known_grad = empty(2, 0) if known else None
    found = logprobs.token_logprobs_from_hidden(hidden, weight, tokens, known_grad=known_grad)
    found.sum().backward()
    assert found.shape == (2, 0) and (weight.grad == 0).all() and hidden.grad.shape == (2, 0, 4)


def test_functions_to_be_copied_take_nothing():
    """M15's siblings."""
    logits, tokens = empty(2, 0, 5), empty(2, 0, dtype=torch.long)
    assert logprobs.token_logprobs(logits, tokens).shape == (2, 0)
    assert logprobs.token_entropy(logits).shape == logprobs.exact_kl(logits, logits).shape == (2, 0)
    assert logprobs.completion_mask(tokens, 2).shape == (2, 0)
    assert logprobs.position_ids_from_mask(tokens).shape == (2, 0)
    for kl in (logprobs.kl_k1, logprobs.kl_k2, logprobs.kl_k3):
        assert kl(empty(2, 0), empty(2, 0)).shape == (2, 0)
    error = expected_calibration_error(empty(0))
    assert error != error, "the mean of nothing is no number"


# --- devices without float64


class OnApple(torch.Tensor):
    """A tensor that says it is on an Apple GPU: the CPU's numbers, but no float64."""

    device = torch.device("mps")

    @staticmethod
    def __new__(cls, inner):
        how = dict(dtype=inner.dtype, strides=inner.stride())
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **how)

    def __init__(self, inner):
        if inner.dtype == torch.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        plain = [x for x in tree_leaves((args, kwargs)) if type(x) is torch.Tensor and x.ndim]
        assert not plain or name in ("aten::index", "aten::copy_"), f"{name}: of two devices"
        inner = tree_map(lambda x: x.inner if isinstance(x, OnApple) else x, (args, kwargs))
        found = function(*inner[0], **inner[1])
        if function._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map(lambda x: OnApple(x) if torch.is_tensor(x) else x, found)


class Apple(TorchFunctionMode):
    """What is made on, or taken to, "mps" is an OnApple; what is taken to the CPU is none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = (args, kwargs or {})
        to = [x for x in tree_leaves(given) if isinstance(x, torch.device)]
        leaves = (torch.Tensor.cpu, torch.Tensor.tolist)
        if function in leaves or function is torch.Tensor.to and to == [CPU]:
            given = tree_map(lambda x: x.inner if isinstance(x, OnApple) else x, given)
        if function is torch.device or OnApple.device not in to:
            return function(*given[0], **given[1])
        args, kwargs = tree_map(lambda x: CPU if isinstance(x, torch.device) else x, given)
        found = function(*args, **kwargs)
        return OnApple(found) if type(found) is torch.Tensor else found


def on_apple(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnApple(parameter.data), False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else OnApple(buffer)
    return model


def test_sampling_and_scoring_make_no_float64_on_an_apple_gpu():
    """B9: on a stand-in that refuses it, with the tokens and log-probs of the CPU."""
    model = make("llama", attn_implementation="eager")
    ids, mask, prompts = batch((3, 9, 1, 6))
    how = dict(
        temperature=0.7, max_new_tokens=6, eos_token_ids=[2, 7], seed=3, batch_size=4, stop=None
    )
    expected = rollout.sample_completions(model, prompts, **how)
    (batch_there,) = expected[0]
    scored = rollout.completion_logprobs(model, *batch_there, 0.7)
    there = on_apple(model)
    assert there.device.type == "mps"
    with Apple():
        with pytest.raises(TypeError, match="float64"):
            OnApple(ids).double()
        found = rollout.sample_completions(there, prompts, **how)
        rescored = rollout.completion_logprobs(there, *found[0][0], 0.7)
        uniforms = rollout.draw_uniforms(4, 3, there.device, None)
        plain, _ = rollout.sample(
            there,
            OnApple(ids),
            OnApple(mask),
            uniforms=uniforms,
            temperature=0.7,
            eos_token_ids=[2],
        )
        error = expected_calibration_error(OnApple(torch.tensor([0.75, 0.25])))
    assert found[1:] == expected[1:] and plain.device.type == rescored.device.type == "mps"
    torch.testing.assert_close(rescored.inner, scored)
    assert error == 0.25


def test_an_apple_gpu_is_not_chosen_unasked(monkeypatch):
    """B9: nobody has run minalign on one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, reason = devices.pick_device("auto")
    assert device.type == "cpu" and "--device mps" in reason
