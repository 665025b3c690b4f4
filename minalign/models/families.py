"""Which transformers models are the transformer of decoder.py, and with which weights."""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .decoder import Angles, Decoder, Function, Layer
from .lora import LoraLinear


class Family(NamedTuple):
    """What differs between families, and what their modules are called.

    norms: before attention, after it, before the MLP, after it; "" where there is none.
    interleaved: queries, keys and values of a head lie side by side.
    up: one matrix, or gate and up: MLP(x) = down(f(gate(x)) up(x)) (arXiv 2002.05202).
    activation: the setting that names f.
    rms_offset: what is added to the weights of an RMS norm.
    windows: which layers have config.sliding_window: "", "all", or "layer_types", as that says.
    angles_by_layer: angles go by layer_types, too.
    softcaps: config may cap the scores of attention, and the logits.
    """

    embedding: str = "embed_tokens"
    positions: str = ""
    layers: str = "layers"
    last_norm: str = "norm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    interleaved: bool = False
    out: str = "o_proj"
    norms: tuple[str, ...] = ("input_layernorm", "", "post_attention_layernorm", "")
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    down: str = "down_proj"
    activation: str = "hidden_act"
    rms_offset: float = 0.0
    windows: str = ""
    angles_by_layer: bool = False
    softcaps: bool = False


LLAMA = Family()
BY_LAYER = Family(windows="layer_types")
GEMMA = BY_LAYER._replace(
    norms=tuple(
        f"{place}_layernorm"
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ),
    activation="hidden_activation",
    rms_offset=1.0,
    softcaps=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA._replace(windows="all"),
    "qwen2": BY_LAYER,
    "qwen3": BY_LAYER,
    "smollm3": BY_LAYER,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA._replace(angles_by_layer=True),
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
        gated=False,
        down="c_proj",
        activation="activation_function",
    ),
    "gpt_neox": Family(
        embedding="embed_in",
        last_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        interleaved=True,
        out="dense",
        up=("dense_h_to_4h",),
        gated=False,
        down="dense_4h_to_h",
    ),
}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh (arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh)


def read_decoder(model: PreTrainedModel, pack: bool = False) -> Decoder:
    """The decoder that a transformers model is.

    Its weights are not copied, unless packed. Under autocast the matrices are rounded to its dtype
    once, here. What is not a matrix product stays as it is, as autocast has it: the sum h, norms
    and angles.

    Args:
        model: one of FAMILIES: a language model, or a classifier, whose head is left out.
        pack: on a CPU, copy the matrices in the order in which the processor reads them. A product
            with few rows then takes half as long.
    """
    body, config = model.base_model, model.config
    family, dtype = FAMILIES[config.model_type], body.dtype
    if torch.is_autocast_enabled(body.device.type):
        dtype = torch.get_autocast_dtype(body.device.type)
    kinds = getattr(config, "layer_types", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activation = ACTIVATIONS[getattr(config, family.activation)]

    def product(parent: torch.nn.Module, *names: str) -> Function:
        return linear([getattr(parent, name) for name in names], dtype, pack)

    def norm(parent: torch.nn.Module, name: str) -> Function:
        return norm_of([getattr(parent, name)], family.rms_offset) if name else same

    def read_layer(i: int, block: torch.nn.Module) -> Layer:
        attention = getattr(block, family.attention)
        if not attention.is_causal:
            raise ValueError("its attention sees later tokens")
        qkv, out = product(attention, *family.qkv), product(attention, family.out)
        up, down = product(block.mlp, *family.up), product(block.mlp, family.down)

        def heads(x: torch.Tensor) -> torch.Tensor:
            if family.interleaved:  # (B, n, H, 3, d) -> (B, n, 3 H, d)
                return qkv(x).unflatten(-1, (-1, 3, size)).transpose(-2, -3).flatten(-3, -2)
            return qkv(x).unflatten(-1, (-1, size))

        def mlp(x: torch.Tensor) -> torch.Tensor:
            if not family.gated:
                return down(activation(up(x)))
            gate, x = up(x).chunk(2, -1)
            return down(activation(gate) * x)

        qk_norm = same
        if hasattr(attention, "q_norm"):
            counts = (config.num_attention_heads, config.num_key_value_heads)
            qk_norm = norm_of([attention.q_norm, attention.k_norm], family.rms_offset, counts)
        windowed = family.windows == "layer_types" and kinds[i] == "sliding_attention"
        turns = not family.positions and getattr(attention, "use_rope", True)
        return Layer(
            norms=[norm(block, name) for name in family.norms],
            qkv=heads,
            qk_norm=qk_norm,
            out=out,
            mlp=mlp,
            scale=attention.scaling,
            angle_kind=(kinds[i] if family.angles_by_layer else "") if turns else None,
            window=config.sliding_window if windowed or family.windows == "all" else None,
        )

    def embed(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        h = getattr(body, family.embedding)(ids)  # Gemma's multiplies by sqrt(D) itself
        return h + getattr(body, family.positions)(positions) if family.positions else h

    def angles(positions: torch.Tensor) -> Angles:
        like, tables = body.get_input_embeddings().weight, {}
        for kind in {layer.angle_kind for layer in layers} - {None}:
            given = [kind] if family.angles_by_layer else []
            cos, sin = body.rotary_emb(like, positions, *given)  # (B, n, r)
            first, second = sin.chunk(2, -1)
            tables[kind] = (cos[:, None], torch.cat([-first, second], -1)[:, None])
        return tables

    def capped(name: str) -> float | None:
        return getattr(config, name, None) if family.softcaps else None

    layers = [read_layer(i, block) for i, block in enumerate(getattr(body, family.layers))]
    # Gemma 3's attention has no cap, whatever its config says; nor has sdpa (transformers 5.10).
    caps_scores = not family.angles_by_layer and config._attn_implementation != "sdpa"
    head, cap = model.get_output_embeddings(), capped("final_logit_softcapping")
    scores = head and linear([head], dtype, pack)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        z = scores(hidden).float()
        return cap * torch.tanh(z / cap) if cap else z

    return Decoder(
        embed=embed,
        angles=angles,
        layers=layers,
        norm=norm(body, family.last_norm),
        head=logits if head else None,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=size,
        parallel=family.interleaved and config.use_parallel_residual,
        softcap=capped("attn_logit_softcapping") if caps_scores else None,
        dtype=dtype,
    )


def same(x: torch.Tensor) -> torch.Tensor:
    """The norm of layers that have none."""
    return x


def norm_of(modules: list[torch.nn.Module], offset: float, heads: tuple[int, ...] = ()) -> Function:
    """Layer norm (arXiv 1607.06450), or RMS norm: (c + w) x / sqrt(mean(x^2) + eps) (1910.07467).

    Args:
        modules: one norm. With `heads`, two RMS norms, of so many heads each: (B, heads, n, d).
        offset: c.
    """
    weight = modules[0].weight
    if isinstance(modules[0], torch.nn.LayerNorm):
        return lambda x: F.layer_norm(x, weight.shape, weight, modules[0].bias, modules[0].eps)
    name = "variance_epsilon" if hasattr(modules[0], "variance_epsilon") else "eps"
    eps = getattr(modules[0], name)  # 0 is one, too
    if not offset and not heads:
        return lambda x: F.rms_norm(x, weight.shape, weight, eps)
    scale = offset + weight.float()
    if heads:
        parts = [(offset + m.weight.float()).expand(n, -1) for m, n in zip(modules, heads)]
        scale = torch.cat(parts)[:, None]  # (H + H_kv, 1, d)
    # In float32: 1 + w in bfloat16 would be rounded.
    return lambda x: (F.rms_norm(x.float(), weight.shape, None, eps) * scale).to(x.dtype)


def linear(layers: list[torch.nn.Module], dtype: torch.dtype, pack: bool) -> Function:
    """x -> W x + b of linear layers that read the same x, side by side, computed in `dtype`."""
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
    multiply, rest = F.linear, ()
    known = weights[0].device.type == "cpu" and torch.backends.mkldnn.is_available()
    if known and dtype != torch.float32:
        known = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Without gradients oneDNN may multiply, which is faster than what torch takes (MKL).
    if known and not torch.is_grad_enabled():
        multiply, rest = torch.ops.mkldnn._linear_pointwise, ("none", [], "")
        if pack:
            whole = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
            weights = [torch.ops.mkldnn._reorder_linear_weight(whole, None)]
            biases = [None if biases[0] is None else torch.cat(biases)]
    parts = [(weight, bias, *rest) for weight, bias in zip(weights, biases)]
    if len(parts) == 1:
        return lambda x: multiply(x.to(dtype), *parts[0])
    return lambda x: torch.cat([multiply(x.to(dtype), *part) for part in parts], -1)


def adapted(layer: torch.nn.Module, dtype: torch.dtype, pack: bool) -> Function:
    """W x + b + alpha/r B A x (LoRA, arXiv 2106.09685); W x + b of a layer without an adapter."""
    base = linear([getattr(layer, "base", layer)], dtype, pack)
    if not isinstance(layer, LoraLinear) or not layer.on:
        return base
    A, B = layer.lora_A.to(dtype), (layer.scaling * layer.lora_B).to(dtype)
    return lambda x: base(x) + F.linear(F.linear(x.to(dtype), A), B)
