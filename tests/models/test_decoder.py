"""Our decoder against transformers' models, family by family.

Each model has large weights, and no norm or bias as it is initialised: a wrong position, mask,
scale, norm or bias shows. Texts are longer than the windows and than the proof at first use.
"""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from minalign.logprobs import position_ids_from_mask
from minalign.models import proof
from minalign.models.caches import OwnCache, TransformersCache
from minalign.models.decoder import read_texts
from minalign.models.families import read_decoder
from minalign.models.generation import draw
from minalign.models.lora import AdapterView, adapter_parameters, add_lora_
from minalign.models.proof import can_decode
from minalign.rollout import completion_logprobs, generate, sequence_logprobs
from minalign.rollout import sample as plain_sample

VOCABULARY, LAYERS = 150, 3  # more than one block of 128 in `draw`
LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(
    vocab_size=VOCABULARY,
    n_positions=64,
    n_embd=32,
    n_layer=LAYERS,
    n_head=4,
    bos_token_id=1,
    eos_token_id=2,
)
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GEMMA = LLAMA | dict(head_dim=12, query_pre_attn_scalar=7, sliding_window=4)
GEMMA3 = GEMMA | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
MIXED = ["full_attention", "sliding_attention", "full_attention"]


def rope(kind, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1000.0, **parameters))


LONGROPE = dict(
    short_factor=[1.0, 1.5, 2.0, 2.5],
    long_factor=[2.0, 4.0, 6.0, 8.0],
    original_max_position_embeddings=32,
)
# name: family, config
CASES = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | dict(tie_word_embeddings=True)),
    "llama-mqa": ("llama", LLAMA | dict(num_key_value_heads=1)),
    "llama-mha": ("llama", LLAMA | dict(num_key_value_heads=4)),
    "llama-biases": ("llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("llama", LLAMA | dict(head_dim=12, hidden_act="gelu")),
    "llama-linear": ("llama", LLAMA | rope("linear", factor=3.0)),
    "llama-llama3": (
        "llama",
        LLAMA
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-yarn": ("llama", LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": (
        "llama",
        LLAMA
        | rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.5, mscale_all_dim=0.5
        ),
    ),
    "llama-yarn-factor": (
        "llama",
        LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.7),
    ),
    "llama-dynamic": ("llama", LLAMA | rope("dynamic", factor=4.0)),
    "llama-longrope": ("llama", LLAMA | rope("longrope", factor=2.0, **LONGROPE)),
    "mistral": ("mistral", LLAMA | dict(sliding_window=None)),
    "mistral-window": ("mistral", LLAMA | dict(sliding_window=4)),
    "mistral-window-9": ("mistral", LLAMA | dict(sliding_window=9, head_dim=16)),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-windows": (
        "qwen2",
        LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen2-types": (
        "qwen2",
        LLAMA | dict(use_sliding_window=True, sliding_window=5, layer_types=MIXED),
    ),
    "qwen3": ("qwen3", LLAMA | dict(head_dim=12, tie_word_embeddings=True)),
    "qwen3-windows": (
        "qwen3",
        LLAMA
        | dict(use_sliding_window=True, sliding_window=4, max_window_layers=2, attention_bias=True),
    ),
    "smollm3": ("smollm3", LLAMA | dict(no_rope_layer_interval=2)),
    "smollm3-windows": (
        "smollm3",
        LLAMA
        | dict(
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=4,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0)),
    "gemma2-attention": (
        "gemma2",
        GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=None, attention_bias=True),
    ),
    "gemma2-logits": (
        "gemma2",
        GEMMA | dict(attn_logit_softcapping=None, final_logit_softcapping=4.0),
    ),
    "gemma2-plain": (
        "gemma2",
        GEMMA
        | dict(attn_logit_softcapping=None, final_logit_softcapping=None, num_key_value_heads=1),
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA3
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
            ),
            final_logit_softcapping=4.0,
            attention_bias=True,
        ),
    ),
    "phi3": ("phi3", LLAMA | dict(sliding_window=None)),
    "phi3-window": (
        "phi3",
        LLAMA | dict(sliding_window=4) | rope("default", partial_rotary_factor=0.5),
    ),
    "phi3-longrope": (
        "phi3",
        LLAMA
        | dict(original_max_position_embeddings=32)
        | rope(
            "longrope",
            short_factor=LONGROPE["short_factor"],
            long_factor=LONGROPE["long_factor"],
            original_max_position_embeddings=32,
        ),
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-scales": (
        "gpt2",
        GPT2
        | dict(
            scale_attn_by_inverse_layer_idx=True,
            scale_attn_weights=False,
            n_inner=24,
            activation_function="relu",
            tie_word_embeddings=False,
        ),
    ),
    "gpt2-eager": (
        "gpt2",
        GPT2
        | dict(
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
            attn_implementation="eager",
        ),
    ),
    "neox": ("gpt_neox", NEOX),
    "neox-serial": (
        "gpt_neox",
        NEOX
        | dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new")
        | rope("default", partial_rotary_factor=1.0),
    ),
    # what these families do not have changes nothing
    "llama-stray": (
        "llama",
        LLAMA
        | dict(
            sliding_window=4,
            layer_types=MIXED,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=2.0,
            use_parallel_residual=True,
            query_pre_attn_scalar=3,
            scale_attn_by_inverse_layer_idx=True,
            partial_rotary_factor=0.5,
        ),
    ),
    "mistral-stray": (
        "mistral",
        LLAMA | dict(sliding_window=4, layer_types=MIXED, final_logit_softcapping=2.0),
    ),
}
STRAY = ["llama-stray", "mistral-stray"]
cases = pytest.mark.parametrize("name", CASES)
ALIKE = "llama-tied llama-mha llama-linear llama-llama3 llama-yarn llama-yarn-factor mistral qwen2"
ALIKE = (ALIKE + " gemma2-plain phi3 gpt2-eager neox-serial").split()  # once in a while is enough


def seldom(names, slow):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


def new_model(name, kind=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    family, given = CASES.get(name, (name, {}))
    config = AutoConfig.for_model(family, **given | changes)
    return randomised(kind.from_config(config))


def randomised(model):
    """In place: matrices large, nothing that is not a matrix as it was initialised."""
    for parameter in model.parameters():
        size = 0.25 if parameter.ndim > 1 else 0.4
        parameter.data += size * torch.randn_like(parameter)
    return model.eval()


made = functools.lru_cache(None)(new_model)  # for tests that change nothing


def texts(n=14, start=(0, 5, 0, 4, 13), end=(14, 14, 8, 11, 14)):
    """Ids and mask (B, n): whole, padded on the left, on the right, on both sides; one token."""
    ids = torch.randint(3, VOCABULARY, (len(start), n), generator=torch.Generator().manual_seed(3))
    columns = torch.arange(n)
    mask = (columns >= torch.tensor(start)[:, None]) & (columns < torch.tensor(end)[:, None])
    return ids.masked_fill(~mask, 0), mask


def prompts():
    """Padded on the left, two of them equal."""
    ids, mask = texts(9, (0, 5, 0, 4, 8), (9,) * 5)
    ids[3], mask[3] = ids[1], mask[1]
    return ids, mask


def close(ours, theirs, allowed=1e-4):
    """Off by at most `allowed` of the largest number."""
    assert ours.isfinite().all() and ours.shape == theirs.shape
    gap = (ours - theirs).abs().max() / theirs.abs().max()
    assert gap <= allowed, f"off by {gap:.1e}"


def decoded(model, ids, mask):
    """Our logits, (B, n, V)."""
    decoder = read_decoder(model)
    return decoder.head(read_texts(decoder, ids, mask))


def inputs_of(ids, mask):
    positions = position_ids_from_mask(mask)
    return dict(input_ids=ids, attention_mask=mask.long(), position_ids=positions)


def assert_samples_alike(model, ids, mask, count=13):
    """`generate` draws what the plain twin draws by the same numbers; a row ends at its sixth."""
    uniforms = torch.rand(len(ids), count, generator=torch.Generator().manual_seed(1)).double()
    settings = dict(uniforms=uniforms, temperature=0.9)
    tokens, _ = plain_sample(model, ids, mask, eos_token_ids=[], **settings)
    end = tokens[0, 5].item()
    real = ((tokens == end).cumsum(1) - (tokens == end).long()) == 0
    tokens, real = (tokens * real)[:, real.any(0)], real[:, real.any(0)]
    fast = generate(
        model, ids, mask, max_new_tokens=count, eos_token_ids=end, pad_token_id=0, **settings
    )
    assert torch.equal(fast.tokens, tokens) and torch.equal(fast.mask, real)
    with torch.no_grad():
        logprobs = sequence_logprobs(model, ids, mask, tokens, real, 0.9)
    torch.testing.assert_close(fast.logprobs, logprobs, rtol=0, atol=1e-4)


# --- families


@cases
@torch.no_grad()
def test_texts_are_read_as_transformers_reads_them(name):
    """In a batch without padding, in one padded on either side; in float64, too, as bare rows."""
    model = made(name)
    assert can_decode(model)
    for ids, mask in (texts(start=(0, 0), end=(14, 14)), texts()):
        ours = decoded(model, ids, mask)
        close(ours[mask], model(**inputs_of(ids, mask)).logits[mask])
    exact = copy.deepcopy(model)
    exact = exact if name == "gpt2-eager" else exact.double()  # that attention is float32
    close(ours[mask], torch.cat([exact(row[real][None]).logits[0] for row, real in zip(ids, mask)]))


@pytest.mark.parametrize("name", seldom(CASES, ALIKE))
@torch.no_grad()
def test_cached_tokens_are_read_as_transformers_reads_them(name):
    """14 tokens beyond the prompts; rows are moved, doubled and dropped on the way."""
    model, (ids, mask) = made(name), prompts()
    caches = [
        OwnCache(model, ids, mask, 14, pack=pack, fixed=fixed)
        for pack, fixed in ((False, False), (True, True))
    ]
    if name not in STRAY:  # for transformers' cache, windows that its masks do not have
        caches.append(TransformersCache(model, ids, mask))
    rows = [row[real].tolist() for row, real in zip(ids, mask)]
    logits = [cache.logits for cache in caches]
    draws = torch.Generator().manual_seed(4)
    for step in range(15):
        for other in logits[1:]:
            close(other, logits[0])
        if step in (0, 4, 9, 14):
            bare = [model(torch.tensor([row])).logits[0, -1] for row in rows]
            close(logits[0], torch.stack(bare))
        if step == 14:
            break
        if step in (0, 4, 9):
            kept = {0: [0, 1, 2, 1, 4], 4: [4, 0, 0, 1], 9: [3, 1]}[step]
            rows = [list(rows[i]) for i in kept]
            for cache in caches:
                cache.keep(torch.tensor(kept))
        token = torch.randint(3, VOCABULARY, (len(rows), 1), generator=draws)
        for row, new in zip(rows, token[:, 0].tolist()):
            row.append(new)
        logits = [cache.next(token) for cache in caches]


@pytest.mark.parametrize("name", seldom(CASES, ALIKE))
def test_samples_are_those_of_the_plain_twin(name):
    assert_samples_alike(made(name), *prompts())


@pytest.mark.parametrize(
    "name", ["llama-biases", "qwen3", "gemma2", "gemma3-scaled", "phi3-window", "gpt2", "neox"]
)
@torch.no_grad()
def test_bfloat16_under_autocast_is_as_exact_as_transformers(name):
    """Rounding moves these large weights' logits by 2%, ours no more than transformers'."""
    model, (ids, mask) = made(name), texts()
    exact = model(**inputs_of(ids, mask)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = model(**inputs_of(ids, mask)).logits.float(), decoded(model, ids, mask)
        last = OwnCache(model, ids[:2, :-1], mask[:2, :-1], 1).next(ids[:2, -1:])
    close(ours[mask], theirs[mask], 0.04)
    close(last, theirs[:2, -1], 0.04)
    rounding = (theirs - exact)[mask].abs().max()
    assert (ours - exact)[mask].abs().max() <= 1.25 * rounding


CLASSIFIERS = ["llama", "mistral-window", "qwen2-types", "qwen3", "smollm3-windows", "gemma2"]
CLASSIFIERS += ["gemma3", "phi3-longrope", "gpt2", "neox"]


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_bodies_of_classifiers(name):
    """A reward model's hidden states; it has no LM head."""
    model = new_model(name, AutoModelForSequenceClassification, num_labels=1)
    ids, mask = texts()
    assert can_decode(model)
    decoder = read_decoder(model)
    assert decoder.head is None
    hidden = model.base_model(**inputs_of(ids, mask)).last_hidden_state
    close(read_texts(decoder, ids, mask)[mask], hidden[mask])


@pytest.mark.parametrize(
    "name", seldom(["llama-biases", "gemma3", "gpt2", "phi3", "neox"], ["phi3", "neox"])
)
def test_adapters_and_views_of_them(name):
    """Proved with B = 0, which changes nothing; then on, off, with other weights, and on again."""
    model, (ids, mask) = new_model(name), prompts()
    add_lora_(model, 4, dropout=0.5)
    assert can_decode(model)
    for weight in adapter_parameters(model):
        weight.data = 0.2 * torch.randn_like(weight)
    others = [0.2 * torch.randn_like(weight) for weight in adapter_parameters(model)]
    found = []
    for view in (model, AdapterView(model, None), AdapterView(model, others), model):
        assert_samples_alike(view, ids, mask, count=7)
        texts_of = (ids, mask, *texts(6, (0,) * 5, (6, 6, 4, 5, 1)))
        theirs = completion_logprobs(view, *texts_of, 0.9).detach()
        with torch.no_grad():
            ours = completion_logprobs(view, *texts_of, 0.9)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        found.append(ours)
    assert torch.equal(found[0], found[3])
    assert (found[0] - found[1]).abs().max() > 0.1 < (found[0] - found[2]).abs().max()


# --- angles that depend on the length of a text


SHORT = dict(max_position_embeddings=12)
LENGTHS = {
    "dynamic": LLAMA | SHORT | rope("dynamic", factor=4.0),
    "longrope": LLAMA
    | rope("longrope", factor=2.0, **LONGROPE | dict(original_max_position_embeddings=12)),
}


@pytest.mark.parametrize("kind", LENGTHS)
@torch.no_grad()
def test_angles_follow_the_longest_text_of_a_batch(kind, monkeypatch):
    """Longer than the original length, short again, longer still: as transformers has it."""
    monkeypatch.setitem(CASES, kind, ("llama", LENGTHS[kind]))
    model = new_model(kind)
    assert can_decode(model)
    seen = []
    for n in (10, 20, 10, 30):
        ids, mask = texts(n, (0, 3), (n - 2, n))
        ours = decoded(model, ids, mask)
        close(ours[mask], model(**inputs_of(ids, mask)).logits[mask])
        short = ids[:, :8], mask[:, :8]
        seen.append((ours[:, 3:8] - decoded(model, *short)[:, 3:8]).abs().max())
    assert seen[0] < 1e-4 and seen[2] < 1e-4
    if kind == "dynamic" and seen[1] < 0.01:
        pytest.skip("this transformers has the same angles again")
    assert seen[1] > 0.01 < seen[3]


@pytest.mark.parametrize("kind", LENGTHS)
def test_columns_of_padding_alone_turn_nothing(kind, monkeypatch):
    """Prompts fit the original length, their columns do not."""
    monkeypatch.setitem(CASES, kind, ("llama", LENGTHS[kind]))
    ids, mask = texts(20, (16, 18, 17), (20,) * 3)
    assert_samples_alike(new_model(kind), ids, mask, count=8)


# --- what the decoder does not run

OTHERS = {
    "olmo2": LLAMA,
    "granite": LLAMA | dict(logits_scaling=3.0, residual_multiplier=0.5),
    "cohere": LLAMA,
    "starcoder2": LLAMA | dict(sliding_window=4),
    "mixtral": LLAMA | dict(num_local_experts=2, num_experts_per_tok=1),
    "qwen3_moe": LLAMA | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24),
    "gemma": LLAMA | dict(head_dim=8),
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),
    "gptj": dict(GPT2, rotary_dim=4),
    "opt": dict(LLAMA, ffn_dim=40, word_embed_proj_dim=32),
    "falcon": dict(NEOX, new_decoder_architecture=True, num_kv_heads=2),
    "stablelm": LLAMA,
    "phi": LLAMA,
    "nemotron": LLAMA,
    "ministral": LLAMA | dict(head_dim=8, sliding_window=4, layer_types=MIXED),
    "gemma3": dict(
        text_config=GEMMA3,
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        mm_tokens_per_image=4,
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_go_transformers_way(family, capsys, monkeypatch):
    monkeypatch.setattr(proof, "_SAID", set())
    monkeypatch.setitem(CASES, family, (family, OTHERS[family]))
    model = new_model(family)
    assert not can_decode(model)
    assert_samples_alike(model, *prompts(), count=7)
    lines = [line for line in capsys.readouterr().out.splitlines() if "decoder" in line]
    assert len(lines) == 1 and family in lines[0] and "transformers' own passes" in lines[0]


def halve(module):
    """Another class with the same weights, as other people's adapters and quantisers make."""
    real = type(module)
    forward = lambda self, *inputs: 0.5 * real.forward(self, *inputs)  # noqa: E731
    module.__class__ = type(f"Half{real.__name__}", (real,), {"forward": forward})


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *inputs: 0.5 * forward(*inputs)


def set_all(model, name, value):
    for layer in model.model.layers:
        setattr(layer.self_attn, name, value)


def drop_layer(model):
    del model.model.layers[1]


# name: case, what happens to the model, whether the decoder goes on
CHANGES = {
    "activation": ("llama", lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.ReLU()), False),
    "activation's name": ("llama", lambda m: setattr(m.config, "hidden_act", "relu"), False),
    "no norm": ("llama", lambda m: setattr(m.model, "norm", nn.Identity()), False),
    "layer norm": ("llama", lambda m: setattr(m.model, "norm", nn.LayerNorm(32)), True),
    "eps": (
        "llama",
        lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 0.5),
        True,
    ),
    "no eps": ("llama", lambda m: setattr(m.model.norm, "variance_epsilon", 0), True),
    "scale": ("llama", lambda m: set_all(m, "scaling", 0.1), True),
    "sees the future": ("llama", lambda m: set_all(m, "is_causal", False), False),
    "layer gone": ("llama", drop_layer, True),
    "layers not used": ("llama", lambda m: setattr(m.config, "num_hidden_layers", 2), False),
    "window": ("mistral", lambda m: setattr(m.config, "sliding_window", 3), True),
    "no window": ("mistral-window", lambda m: setattr(m.config, "sliding_window", None), True),
    "rope": ("smollm3", lambda m: setattr(m.model.layers[1].self_attn, "use_rope", 1), True),
    "cap": ("gemma2", lambda m: setattr(m.config, "attn_logit_softcapping", 0.5), False),
    "last cap": ("gemma2", lambda m: setattr(m.config, "final_logit_softcapping", 1.0), True),
    "serial": ("neox", lambda m: setattr(m.config, "use_parallel_residual", False), False),
    "hook": (
        "llama",
        lambda m: m.model.layers[0].register_forward_hook(
            lambda module, inputs, output: output / 2
        ),
        False,
    ),
    "forward": ("llama", lambda m: replace_forward(m.model.layers[0].mlp), False),
    "linear class": ("llama", lambda m: halve(m.model.layers[0].mlp.down_proj), False),
    "class": ("llama", lambda m: halve(m.model.layers[0].mlp), False),
    "head": ("llama", lambda m: setattr(m, "lm_head", nn.Linear(32, VOCABULARY)), True),
    "untied": (
        "llama-tied",
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.randn(VOCABULARY, 32))),
        True,
    ),
    "weights": ("gpt2", randomised, True),
    "vocabulary": ("llama", lambda m: m.resize_token_embeddings(170), True),
    "spectral norm": (
        "llama",
        lambda m: torch.nn.utils.parametrizations.spectral_norm(m.model.layers[0].mlp.up_proj),
        False,
    ),
    "training": ("gpt2-dropout", lambda m: m.train(), True),
    "eager": ("qwen2-windows", lambda m: m.set_attn_implementation("eager"), True),
    "double": ("phi3-window", lambda m: m.double(), True),
}


@pytest.mark.parametrize("after", seldom([True, False], [False]))
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_decoded_rightly_or_not_at_all(change, after, monkeypatch):
    """Before the proof and after it. The texts are of one length: nothing needs a mask."""
    dropout = dict(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    monkeypatch.setitem(CASES, "gpt2-dropout", ("gpt2", GPT2 | dropout))
    name, happen, goes_on = CHANGES[change]
    model = new_model(name)
    if after:
        assert can_decode(model)
    happen(model)
    if change != "sees the future":  # which no cache can show
        assert_samples_alike(model, *texts(5, (0, 0, 0), (5, 5, 5)), count=7)
    if change == "cap":  # goes on where sdpa, which has no cap, is the family's attention
        goes_on = model.config._attn_implementation == "sdpa"
    assert can_decode(model) == goes_on


def test_a_hook_that_goes_gives_the_decoder_back():
    model = new_model("llama")
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: output / 2)
    assert not can_decode(model)
    hook.remove()
    assert can_decode(model)


def test_gemma_3_has_no_softcap_in_attention_whatever_its_configuration_says(monkeypatch):
    """One so high that a proof on small scores would not show it."""
    monkeypatch.setitem(CASES, "capped", ("gemma3_text", GEMMA3 | dict(attn_logit_softcapping=2e3)))
    model = new_model("capped")
    assert can_decode(model) and read_decoder(model).softcap is None


# --- draws


def exact_draw(logits, uniform):
    """The first id whose distribution function exceeds u, and how near the next edge is."""
    cdf = logits.double().softmax(1).cumsum(1)
    edge = (cdf - uniform).abs().amin(1)
    return (cdf <= uniform).sum(1).clamp(max=logits.shape[1] - 1), edge


@pytest.mark.parametrize("V", [1, 3, 127, 128, 129, 300, 1000])
def test_draws_are_those_of_the_exact_distribution_function(V):
    draws = torch.Generator().manual_seed(V)
    rows = min(20_000, 2_000_000 // V)
    logits = torch.randn(rows, V, generator=draws) * 8 * torch.rand(rows, 1, generator=draws)
    logits[::3] = logits[::3].masked_fill(
        torch.rand(logits[::3].shape, generator=draws) < 0.5, -1e9
    )
    uniform = torch.rand(rows, 1, dtype=torch.double, generator=draws)
    ids, logprobs = draw(logits, uniform)
    expected, edge = exact_draw(logits, uniform)
    assert torch.equal(ids[edge > 1e-6, 0], expected[edge > 1e-6])
    assert (edge > 1e-6).float().mean() > 0.98
    exact = logits.double().log_softmax(1).gather(1, ids)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


def test_ids_are_drawn_as_often_as_they_are_likely():
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * 2
    uniform = torch.rand(20_000, 1, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    ids, _ = draw(logits.expand(20_000, -1), uniform)
    expected = 20_000 * logits.softmax(1)[0]
    seen = torch.bincount(ids[:, 0], minlength=200)
    often = expected > 5
    distance = ((seen - expected)[often] ** 2 / expected[often]).sum()  # chi squared
    assert distance < often.sum() + 4 * (2 * often.sum()).sqrt()


def test_extreme_draws():
    inf, V = float("inf"), 300
    low, middle, high = torch.tensor([0, 0.5, 1 - 2**-53], dtype=torch.double).view(3, 1, 1)
    for only in (0, 1, 127, 128, 255, 256, V - 1):
        for rest in (-inf, -1e30):
            logits = torch.full((1, V), rest)
            logits[0, only] = 3.0
            for uniform in (low, middle, high):
                ids, logprobs = draw(logits, uniform)
                assert ids.item() == only and logprobs.item() == 0.0
    flat = torch.zeros(1, V)
    flat[0, :2] = flat[0, -3:] = -inf  # what cannot come does not, at either end
    assert draw(flat, low)[0].item() == 2 and draw(flat, high)[0].item() == V - 4
    huge = torch.tensor([[3e38, -3e38, 3e38]])
    assert draw(huge, low)[0].item() == 0 and draw(huge, high)[0].item() == 2
    assert draw(huge, low)[1].item() == pytest.approx(math.log(0.5))
    for broken in (torch.full((1, V), float("nan")), torch.full((1, V), -inf), flat + float("nan")):
        ids, logprobs = draw(broken, high)
        assert 0 <= ids.item() < V and logprobs.isnan().all()
    one = torch.zeros(2, V)
    one[0, 7] = float("nan")  # a broken row leaves the others alone
    ids, logprobs = draw(one, torch.tensor([[0.5], [0.5]]).double())
    assert logprobs[0].isnan() and ids[1].item() == V // 2 and 0 <= ids[0].item() < V
