"""The decoder-only transformer, from scratch, over the weights of a transformers model.

    h = E[ids] (+ P[positions], where positions are learned)
    h = h + Attention(norm(h)) and h = h + MLP(norm(h)) in each layer    (pre-norm residuals)
    logits = W norm(h)

It computes what transformers computes, in fewer and larger steps, and with a cache whose shape
never changes. `proof.can_decode` says of a model whether it does. Sizes: B rows, n new tokens of
each, N tokens that they see, D width, H heads of size d for queries, H_kv for keys and values.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..logprobs import position_ids_from_mask
from .lora import LoraLinear

Function = Callable[[torch.Tensor], torch.Tensor]


class Family(NamedTuple):
    """What differs between families, and what their modules are called.

    norms: before attention, after it, before the MLP, after it; "" where there is none.
    up: one matrix, or two where the MLP is gated.
    windows: which layers have config.sliding_window: "", "all" or "layer_types" (as that says).
    rms_offset: what is added to the weight of an RMS norm.
    softcaps: whether config may squash the scores of attention and the logits.
    rotary: whether positions are angles.
    """

    embedding: str = "embed_tokens"
    positions: str = ""
    layers: str = "layers"
    last_norm: str = "norm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    norms: tuple[str, ...] = ("input_layernorm", "", "post_attention_layernorm", "")
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "hidden_act"
    windows: str = ""
    rms_offset: float = 0.0
    softcaps: bool = False
    rotary: bool = True


LLAMA = Family()
GEMMA = Family(
    norms=tuple(
        f"{name}_layernorm"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ),
    activation="hidden_activation",
    windows="layer_types",
    rms_offset=1.0,
    softcaps=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA._replace(windows="all"),
    "qwen2": LLAMA._replace(windows="layer_types"),
    "qwen3": LLAMA._replace(windows="layer_types"),
    "smollm3": LLAMA._replace(windows="layer_types"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": LLAMA._replace(qkv=("qkv_proj",), up=("gate_up_proj",), windows="all"),
    "gpt2": Family(
        embedding="wte",
        positions="wpe",
        layers="h",
        last_norm="ln_f",
        attention="attn",
        qkv=("c_attn",),
        out="c_proj",
        norms=("ln_1", "", "ln_2", ""),
        up=("c_fc",),
        down="c_proj",
        activation="activation_function",
        rotary=False,
    ),
    "gpt_neox": Family(
        embedding="embed_in",
        last_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
    ),
}
GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": F.relu,
}


class Layer(NamedTuple):
    """One block, as functions of (B, n, D).

    qkv: -> (B, n, H + 2 H_kv, d), the heads of queries, then of keys, then of values.
    qk_norms: of each head, before it is turned (Qwen 3, Gemma 3).
    kind: which angles turn its queries and keys; None where nothing does.
    window: how many tokens it sees, its own included; None is all.
    """

    norms: list[Function]
    qkv: Function
    qk_norms: tuple[Function, Function] | None
    out: Function
    mlp: Function
    kind: str | None
    window: int | None
    scale: float


class Decoder(NamedTuple):
    """A model's weights as functions, see `read_decoder`."""

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids and positions (B, n)
    angles: Callable[[torch.Tensor], dict]  # of positions (B, n): kind -> (cos, sin)
    layers: list[Layer]
    last_norm: Function
    head: Function | None  # -> logits (..., V), float32; None of a body alone
    kv_heads: int
    size: int  # of a head
    dtype: torch.dtype  # of the products
    parallel: bool  # attention and MLP read the same h (GPT-NeoX)
    softcap: float | None


def read_decoder(model: PreTrainedModel, pack: bool = False) -> Decoder:
    """The decoder that a transformers model is.

    Under autocast the products' weights are rounded to its dtype once, here. All else stays as it
    is: the residual stream, norms and angles in float32, as autocast has it.

    Args:
        model: one of FAMILIES: a language model, or a classifier, whose head is left out.
        pack: copy the weights on a CPU into oneDNN's blocked order, for few rows at a time. A
            product then takes half as long. Weights that change later are not seen.
    """
    body, config = model.base_model, model.config
    family, device = FAMILIES[config.model_type], body.device
    dtype = body.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activation = ACTIVATIONS[getattr(config, family.activation)]

    def product(parent: torch.nn.Module, *names: str) -> Function:
        return linear([getattr(parent, name) for name in names], dtype, pack)

    def norm(parent: torch.nn.Module, name: str) -> Function:
        return norm_of(getattr(parent, name), family.rms_offset) if name else lambda x: x

    def layer(i: int, block: torch.nn.Module) -> Layer:
        attention, mlp = getattr(block, family.attention), block.mlp
        if not attention.is_causal:
            raise ValueError("its attention sees later tokens")
        qkv, up, down = (
            product(parent, *names)
            for parent, names in ((attention, family.qkv), (mlp, family.up), (mlp, [family.down]))
        )

        def heads(x: torch.Tensor) -> torch.Tensor:
            if config.model_type == "gpt_neox":  # q, k and v of a head lie side by side
                return qkv(x).unflatten(-1, (-1, 3, size)).transpose(-2, -3).flatten(-3, -2)
            return qkv(x).unflatten(-1, (-1, size))

        def feed_forward(x: torch.Tensor) -> torch.Tensor:
            if family.up in (LLAMA.up, ("gate_up_proj",)):  # gated (arXiv 2002.05202)
                gate, linear_part = up(x).chunk(2, -1)
                return down(activation(gate) * linear_part)
            return down(activation(up(x)))

        kinds = getattr(config, "layer_types", None)
        windowed = family.windows == "all"
        windowed |= family.windows == "layer_types" and kinds[i] == "sliding_attention"
        turns = family.rotary and getattr(attention, "use_rope", True)
        qk_norms = None
        if hasattr(attention, "q_norm"):
            qk_norms = (norm(attention, "q_norm"), norm(attention, "k_norm"))
        return Layer(
            [norm(block, name) for name in family.norms],
            heads,
            qk_norms,
            product(attention, family.out),
            feed_forward,
            (kinds[i] if config.model_type == "gemma3_text" else "") if turns else None,
            config.sliding_window if windowed else None,
            attention.scaling,
        )

    def embed(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded = getattr(body, family.embedding)(ids)
        return embedded + body.wpe(positions) if family.positions else embedded

    layers = [layer(i, block) for i, block in enumerate(getattr(body, family.layers))]
    kinds = {layer.kind for layer in layers} - {None}

    def angles(positions: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        like = body.get_input_embeddings().weight
        return {kind: body.rotary_emb(like, positions, *[kind] * bool(kind)) for kind in kinds}

    head, cap = model.get_output_embeddings(), None
    if family.softcaps:
        cap = getattr(config, "final_logit_softcapping", None)
    to_logits = head and linear([head], dtype, pack)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = to_logits(hidden).float()
        return cap * torch.tanh(scores / cap) if cap else scores

    return Decoder(
        embed,
        angles,
        layers,
        norm(body, family.last_norm),
        logits if head else None,
        kv_heads,
        size,
        dtype,
        getattr(config, "use_parallel_residual", False) and config.model_type == "gpt_neox",
        # Gemma 3's configuration has one, too, but its attention none.
        config.attn_logit_softcapping if config.model_type == "gemma2" else None,
    )


def linear(layers: list[torch.nn.Module], dtype: torch.dtype, pack: bool) -> Function:
    """x -> W x + b of linear layers that read the same x, side by side, in `dtype`."""
    if any(isinstance(layer, LoraLinear) for layer in layers):
        parts = [adapted(layer, dtype, pack) for layer in layers]
        return lambda x: torch.cat([part(x) for part in parts], -1)
    for layer in layers:
        if type(layer) not in (torch.nn.Linear, Conv1D):  # quantised, say, or another's adapter
            raise TypeError(f"a {type(layer).__name__} in a linear layer's place")
    if len({layer.bias is None for layer in layers}) > 1:
        raise TypeError("a bias on some of the layers that read the same x")
    weights = [
        (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).to(dtype)
        for layer in layers
    ]
    biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
    on_cpu = weights[0].device.type == "cpu" and torch.backends.mkldnn.is_available()
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if on_cpu and not torch.is_grad_enabled() and (dtype == torch.float32 or bfloat16):
        multiply = torch.ops.mkldnn._linear_pointwise
        if pack:
            weights = [torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), None)]
            biases = [torch.cat(biases) if biases[0] is not None else None]
        parts = [(weight, bias, "none", [], "") for weight, bias in zip(weights, biases)]
    else:
        multiply, parts = F.linear, list(zip(weights, biases))
    if len(parts) == 1:
        return lambda x: multiply(x.to(dtype), *parts[0])
    return lambda x: torch.cat([multiply(x.to(dtype), *part) for part in parts], -1)


def adapted(layer: torch.nn.Module, dtype: torch.dtype, pack: bool) -> Function:
    """W x + b + alpha/r B A x (LoRA, arXiv 2106.09685); of other layers W x + b."""
    if not isinstance(layer, LoraLinear):
        return linear([layer], dtype, pack)
    base = linear([layer.base], dtype, pack)
    if not layer.on:
        return base
    A, B = layer.lora_A.to(dtype), (layer.scaling * layer.lora_B).to(dtype)
    return lambda x: base(x) + F.linear(F.linear(x.to(dtype), A), B)


def norm_of(module: torch.nn.Module, offset: float) -> Function:
    """Layer norm (arXiv 1607.06450), or RMS norm: w x / sqrt(mean(x^2) + eps) (1910.07467)."""
    weight = module.weight
    if isinstance(module, torch.nn.LayerNorm):
        return lambda x: F.layer_norm(x, weight.shape, weight, module.bias, module.eps)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if offset:
        weight = offset + weight.float()  # 1 + w, not rounded
    return lambda x: F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + r/2}) by its angle: rotary positions (arXiv 2104.09864).

    Args:
        x: (B, n, heads, d).
        cos, sin: (B, n, r), r <= d: dimensions from r on stay as they are.
    """
    r = cos.shape[-1]
    cos, sin, turned = cos[:, :, None], sin[:, :, None], x[..., :r]
    a, b = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-b, a], -1) * sin
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:].to(turned.dtype)], -1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias) v; H / H_kv heads of queries share keys (arXiv 2305.13245).

    Args:
        q: (B, H, n, d).
        k, v: (B, H_kv, N, d).
        bias: (B, 1, n, N), see `attention_biases`; None is causal, with n = N.
        softcap: scores s become c tanh(s / c) (Gemma 2, arXiv 2408.00118).
    Returns:
        (B, H, n, d).
    """
    B, H, n, d = q.shape
    groups = H // k.shape[1]
    if softcap:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
        return (scores + bias).float().softmax(-1).to(v.dtype) @ v
    if n == 1:  # the queries that share keys become rows of one product
        q = q.reshape(B, k.shape[1], groups, d)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).view(B, H, 1, d)
    return F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=groups > 1
    )


def attention_biases(
    decoder: Decoder, mask: torch.Tensor, dtype: torch.dtype
) -> dict[int | None, torch.Tensor | None]:
    """What is added to the scores of attention: 0 where a token sees another, else very little.

    A token sees itself and the real ones before it, the nearest `window` of all columns.

    Args:
        mask: (B, n) bool, true for real tokens.
        dtype: of the scores.
    Returns:
        By window, (B, 1, n, n), or None where it is simply causal.
    """
    n = mask.shape[1]
    columns, biases = torch.arange(n, device=mask.device), {}
    before = columns[:, None] - columns  # (n, n)
    for window in {layer.window for layer in decoder.layers}:
        if bool(mask.all()) and (window is None or window >= n) and not decoder.softcap:
            biases[window] = None
            continue
        seen = (before >= 0) & (before < (window or n)) & mask[:, None]  # (B, n, n)
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
        biases[window] = bias.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    return biases


def forward(
    decoder: Decoder,
    ids: torch.Tensor,
    positions: torch.Tensor,
    angles: dict[str, tuple[torch.Tensor, torch.Tensor]],
    biases: dict[int | None, torch.Tensor | None],
    remember: Callable | None = None,
) -> torch.Tensor:
    """Hidden states after the last norm.

    Args:
        decoder: of `read_decoder`.
        ids, positions: (B, n).
        angles: of the positions, by kind.
        biases: of attention, by window, see `attend`.
        remember: (layer's number, its new keys, its new values, (B, H_kv, n, d) each) -> all keys
            and values that are seen; None sees the new ones alone.
    Returns:
        (B, n, D).
    """
    h = decoder.embed(ids, positions)
    for i, layer in enumerate(decoder.layers):
        heads = layer.qkv(layer.norms[0](h))  # (B, n, H + 2 H_kv, d)
        qk, v = heads[:, :, : -decoder.kv_heads], heads[:, :, -decoder.kv_heads :]
        if layer.qk_norms:
            q, k = qk[:, :, : -decoder.kv_heads], qk[:, :, -decoder.kv_heads :]
            qk = torch.cat([norm(x) for norm, x in zip(layer.qk_norms, (q, k))], 2)
        if layer.kind is not None:
            qk = rotate(qk, *angles[layer.kind]).to(v.dtype)
        q, k, v = (
            x.transpose(1, 2)
            for x in (qk[:, :, : -decoder.kv_heads], qk[:, :, -decoder.kv_heads :], v)
        )
        if remember:
            k, v = remember(i, k, v)
        seen = attend(q.to(k.dtype), k, v, biases[layer.window], layer.scale, decoder.softcap)
        change = layer.norms[1](layer.out(seen.transpose(1, 2).flatten(2)))
        if decoder.parallel:
            h = h + change + layer.mlp(layer.norms[2](h))
        else:
            h = h + change
            h = h + layer.norms[3](layer.mlp(layer.norms[2](h)))
    return decoder.last_norm(h)


def read_texts(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, n, D) of whole texts.

    Args:
        decoder: of `read_decoder`.
        ids: (B, n) long.
        mask: (B, n), 1 or true for real tokens; padding may stand on either side.
    """
    positions = position_ids_from_mask(mask)
    biases = attention_biases(decoder, mask.bool(), decoder.dtype)
    return forward(decoder, ids, positions, decoder.angles(positions), biases)
