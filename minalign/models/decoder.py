"""The decoder-only transformer, from scratch (arXiv 1706.03762, 2302.13971).

    h = E[ids]  (+ P[positions], where positions are learned)
    h = h + Attention(norm(h))
    h = h + MLP(norm(h))                for each layer
    logits = W norm(h)

The weights are those of a transformers model, see `families.read_decoder`; `proof.can_decode` holds
the numbers to transformers' own. Sizes: B rows; n tokens of each that are read; N tokens that they
may see; D width; H heads of queries and H_kv of keys and values, all of size d.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..logprobs import position_ids_from_mask

Function = Callable[[torch.Tensor], torch.Tensor]
Angles = dict[str, tuple[torch.Tensor, torch.Tensor]]  # kind -> see `rotate`
Biases = dict[int | None, torch.Tensor | None]  # window -> see `attend`


class Layer(NamedTuple):
    """One layer's weights, as functions.

    norms: before attention, after it, before the MLP, after it.
    qkv: (B, n, D) -> (B, n, H + 2 H_kv, d), the heads of queries, then of keys, then of values.
    qk_norm: of queries and keys, (B, H + H_kv, n, d), before they are turned.
    out: (B, n, H d) -> (B, n, D).
    mlp: (B, n, D) -> (B, n, D).
    scale: of the scores.
    angle_kind: which angles turn queries and keys; None turns none.
    window: how many tokens one sees, itself included; None is all.
    """

    norms: list[Function]
    qkv: Function
    qk_norm: Function
    out: Function
    mlp: Function
    scale: float
    angle_kind: str | None
    window: int | None


class Decoder(NamedTuple):
    """A model's weights, as functions.

    embed: ids and positions (B, n) -> (B, n, D).
    angles: positions (B, n) -> their angles.
    norm: the last one.
    head: (..., D) -> logits (..., V), float32; None of a body alone.
    parallel: attention and MLP read the same h (GPT-NeoX, arXiv 2204.06745).
    softcap: c of scores c tanh(s / c) (Gemma 2, arXiv 2408.00118).
    dtype: of the matrix products.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    angles: Callable[[torch.Tensor], Angles]
    layers: list[Layer]
    norm: Function
    head: Function | None
    kv_heads: int
    head_size: int
    parallel: bool
    softcap: float | None
    dtype: torch.dtype


def forward(
    decoder: Decoder,
    ids: torch.Tensor,
    positions: torch.Tensor,
    angles: Angles,
    biases: Biases,
    remember: Callable | None = None,
) -> torch.Tensor:
    """Hidden states after the last norm, (B, n, D).

    Args:
        decoder: the weights.
        ids, positions: (B, n) long.
        angles: of these positions.
        biases: for the windows of all layers.
        remember: number of a layer, new keys and new values (B, H_kv, n, d) -> all keys and values
            that are seen, (B, H_kv, N, d); without it, they are the new ones.
    """
    h = decoder.embed(ids, positions)
    for i, layer in enumerate(decoder.layers):
        heads = layer.qkv(layer.norms[0](h)).transpose(1, 2)  # (B, H + 2 H_kv, n, d)
        # Queries and keys are normed and turned together.
        qk, v = heads.split([heads.shape[1] - decoder.kv_heads, decoder.kv_heads], 1)
        qk = layer.qk_norm(qk)
        if layer.angle_kind is not None:
            qk = rotate(qk, *angles[layer.angle_kind]).to(v.dtype)
        q, k = qk.split([qk.shape[1] - decoder.kv_heads, decoder.kv_heads], 1)
        if remember:
            k, v = remember(i, k, v)
        seen = attend(q.to(k.dtype), k, v, biases[layer.window], layer.scale, decoder.softcap)
        attended = layer.norms[1](layer.out(seen.transpose(1, 2).flatten(2)))
        before, h = h, h + attended
        h = h + layer.norms[3](layer.mlp(layer.norms[2](before if decoder.parallel else h)))
    return decoder.norm(h)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention: softmax(scale q k^T + bias) v.

    H / H_kv heads of queries share a head of keys and values (grouped queries, arXiv 2305.13245).

    Args:
        q: (B, H, n, d).
        k, v: (B, H_kv, N, d).
        bias: (B, 1, n, N), 0 where a key is seen and very low elsewhere; None is causal, n = N.
        scale: 1 / sqrt(d), or what a family has in its place.
        softcap: see Decoder; it needs a bias.
    Returns:
        (B, H, n, d).
    """
    groups = q.shape[1] // k.shape[1]
    if softcap:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
        return (scores + bias).float().softmax(-1).to(v.dtype) @ v
    if q.shape[2] == 1:  # the queries that share keys are rows of one product
        rows = q.reshape(len(q), k.shape[1], groups, -1)
        return F.scaled_dot_product_attention(rows, k, v, bias, scale=scale).view(q.shape)
    return F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=bias is None, scale=scale, enable_gqa=groups > 1
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): each pair (x_i, x_{i + r/2}) is turned by its angle.

    Args:
        x: (B, heads, n, d); from dimension r on it stays as it is.
        cos, sin: (B, 1, n, r): cosines twice, sines times -1 and then sines.
    """
    r = cos.shape[-1]
    turning = x if r == x.shape[-1] else x[..., :r]
    turned = torch.addcmul(turning * cos, turning.roll(r // 2, -1), sin)
    return turned if turning is x else torch.cat([turned, x[..., r:].to(turned.dtype)], -1)


def attention_biases(decoder: Decoder, mask: torch.Tensor, dtype: torch.dtype) -> Biases:
    """For whole texts: a token sees itself and the real tokens before it, within its window.

    Args:
        mask: (B, n) bool, true for real tokens; padding may stand on either side.
        dtype: of the scores.
    Returns:
        For each window (B, 1, n, n), or None where it is simply causal.
    """
    n = mask.shape[1]
    columns, whole, biases = torch.arange(n, device=mask.device), bool(mask.all()), {}
    distance = columns[:, None] - columns  # (n, n)
    for window in {layer.window for layer in decoder.layers}:
        if whole and (window or n) >= n and not decoder.softcap:
            biases[window] = None
            continue
        seen = (distance >= 0) & (distance < (window or n)) & mask[:, None]  # (B, n, n)
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
        biases[window] = bias.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    return biases


def read_texts(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, n, D) of whole texts: ids (B, n), mask (B, n) 1 or true for real tokens."""
    positions = position_ids_from_mask(mask)
    biases = attention_biases(decoder, mask.bool(), decoder.dtype)
    with torch.autocast(ids.device.type, enabled=False):  # the decoder rounds by itself
        return forward(decoder, ids, positions, decoder.angles(positions), biases)
