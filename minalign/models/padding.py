"""Rows of token ids -> tensors: padding, parts of like length, and how long a row may be."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def pad(
    rows: Sequence[list[int]], side: str, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> input_ids (B, T) and attention_mask (B, T), both long.

    Id 0 fills up, since the mask alone says what is real.

    >>> pad([[5, 6], [7]], side="left")
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    width = max(map(len, rows))
    padded_ids, padded_mask = [], []
    for row in rows:
        ids, ones, gap = list(row), [1] * len(row), [0] * (width - len(row))
        padded_ids.append(gap + ids if side == "left" else ids + gap)
        padded_mask.append(gap + ones if side == "left" else ones + gap)
    return torch.tensor(padded_ids).to(device), torch.tensor(padded_mask).to(device)


def length_parts(
    lengths: Sequence[int], max_rows: int, max_tokens: float = math.inf
) -> list[list[int]]:
    """Indices in parts, longest first.

    A part is cut, too, where padding would cost more than another pass: a row under 3/4 of its
    part's longest opens a new part once the part holds 1,024 tokens.

    Args:
        lengths: tokens of each row.
        max_rows: rows per part.
        max_tokens: tokens per part, with padding; a longer row goes alone.

    >>> length_parts([300, 10, 1100, 280, 20], max_rows=8)
    [[2], [0, 3, 4, 1]]
    >>> length_parts([300, 10, 1100, 280, 20], max_rows=8, max_tokens=600)
    [[2], [0, 3], [4, 1]]
    """
    parts = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = parts[-1] if parts else []
        longest = lengths[part[0]] if part else 0
        full = len(part) == max_rows or (len(part) + 1) * longest > max_tokens
        if not part or full or (len(part) * longest >= 1024 and lengths[i] < 0.75 * longest):
            parts.append([])
        parts[-1].append(i)
    return parts


def tokens_per_pass(model: PreTrainedModel) -> float:
    """`max_tokens` of a pass.

    On a CPU, hidden states of 1 MiB: more of them leave its cache, cost memory, and are no faster.
    """
    size = model.config.get_text_config().hidden_size
    return 2**18 // size if model.device.type == "cpu" else math.inf


def context_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model takes, prompt and completion; None where nothing limits them.

    With longrope it is original_max_position_embeddings: one longer text gives all rows of its
    batch other angles, and the keys in a cache keep their old ones.

    >>> from transformers import GPT2Config
    >>> context_of(GPT2Config(n_positions=8))
    8
    """
    config = config.get_text_config()  # of composite ones, such as Gemma 3's
    names = "max_position_embeddings n_positions n_ctx max_seq_len model_max_length".split()
    names += ["max_sequence_length", "max_target_positions"]
    sizes = [size for name in names if (size := getattr(config, name, None))][:1]
    rope = getattr(config, "rope_parameters", None) or {}
    for angles in (rope, *rope.values()):  # some have one entry for each kind of layer
        if isinstance(angles, dict) and angles.get("rope_type") == "longrope":
            sizes.append(angles["original_max_position_embeddings"])
    return min(sizes, default=None)
