"""Texts that grow token by token, with their keys and values kept.

`OwnCache` reads them with our decoder, `TransformersCache` with a model's own forward pass.
"""

import torch
from transformers import DynamicCache, PreTrainedModel

from ..logprobs import position_ids_from_mask
from .decoder import attention_biases, forward
from .families import read_decoder


class OwnCache:
    """Keys and values of each layer in buffers (B, H_kv, N, d), which are never moved.

    On a GPU, shapes never change, either: each token looks at all N columns, and a bias hides those
    that are not there. Such a step can be captured as a CUDA graph.

    Args:
        model: one that `proof.can_decode`.
        ids, mask: (B, P), prompts padded on the left.
        room: tokens that may follow.
        pack: see `read_decoder`.
        fixed: whether shapes never change; by default on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        mask: torch.Tensor,
        room: int,
        *,
        pack: bool = False,
        fixed: bool | None = None,
    ) -> None:
        self.decoder, device = read_decoder(model, pack), ids.device
        (B, P), self.columns = ids.shape, torch.arange(ids.shape[1] + room, device=device)
        self.fixed = device.type == "cuda" if fixed is None else fixed
        dtype = self.decoder.dtype
        if device.type == "cpu":  # which multiplies short rows in bfloat16 more slowly
            dtype = torch.promote_types(dtype, torch.float32)
        shape = (B, self.decoder.kv_heads, len(self.columns), self.decoder.head_size)
        self.buffers = [  # of each layer, keys and values
            tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            for _ in self.decoder.layers
        ]
        self.lowest = torch.finfo(dtype).min
        self.bias = torch.zeros(B, 1, 1, len(self.columns), dtype=dtype, device=device)
        self.bias.masked_fill_(
            ~torch.nn.functional.pad(mask, (0, room))[:, None, None], self.lowest
        )
        positions = position_ids_from_mask(mask)
        self.angles = self.decoder.angles(self.columns[None])
        self.end, self.column = P, torch.full((1,), P, device=device)  # of the next token
        self.positions = positions[:, -1:] + 1
        biases = attention_biases(self.decoder, mask, dtype)
        self.logits = self._logits(ids, positions, biases, slice(0, P))

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), float32, after one more token of each row, ids (B, 1)."""
        self.bias.index_fill_(3, self.column, 0.0)
        end = len(self.columns) if self.fixed else self.end + 1
        biases = {}
        for window in {layer.window for layer in self.decoder.layers}:
            biases[window] = self.bias[..., :end]
            if window:
                hidden = self.columns[:end] <= self.column - window
                biases[window] = biases[window].masked_fill(hidden, self.lowest)
        logits = self._logits(ids, self.positions, biases, slice(self.end, end))
        self.positions.add_(1)
        self.column.add_(1)
        self.end += 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows, (B,) long, alone; a row may be there more than once."""

        def of_rows(buffer: torch.Tensor) -> torch.Tensor:
            # On a CPU, zeros take no memory before they are written.
            kept = buffer.new_zeros(len(rows), *buffer.shape[1:])
            kept[:, :, : self.end] = buffer[:, :, : self.end].index_select(0, rows)
            return kept

        self.buffers = [tuple(map(of_rows, of_layer)) for of_layer in self.buffers]
        self.bias, self.positions = self.bias[rows], self.positions[rows]

    def _logits(
        self, ids: torch.Tensor, positions: torch.Tensor, biases: dict, new: slice
    ) -> torch.Tensor:
        """Of each row's last token; keys and values go to the columns `new` of the buffer."""

        def remember(
            i: int, new_keys: torch.Tensor, new_values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self.buffers[i]
            if self.fixed and len(self.columns) == new.stop:
                keys.index_copy_(2, self.column, new_keys.to(keys.dtype))
                values.index_copy_(2, self.column, new_values.to(values.dtype))
                return keys, values
            keys[:, :, new], values[:, :, new] = new_keys, new_values
            return keys[:, :, : new.stop], values[:, :, : new.stop]

        angles = {  # (B, 1, n, r)
            kind: tuple(table[0, 0][positions[:, None]] for table in tables)
            for kind, tables in self.angles.items()
        }
        with torch.autocast(ids.device.type, enabled=False):  # the decoder rounds by itself
            hidden = forward(self.decoder, ids, positions, angles, biases, remember)
        return self.decoder.head(hidden[:, -1])


class TransformersCache:
    """The same with transformers' forward pass and growing cache, for every other model.

    Raises:
        ValueError: the model fills no key-value cache.
    """

    fixed = False

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.mask = model, mask
        self.cache = DynamicCache(config=model.config)
        positions = position_ids_from_mask(mask)
        self.logits = self._logits(ids, positions)
        self.positions = positions[:, -1:] + 1

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """As OwnCache's."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        logits = self._logits(ids, self.positions)
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """As OwnCache's."""
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # Such a model would forget the prompt, and nothing would show it.
        if getattr(output, "past_key_values", None) is not self.cache:
            raise ValueError(
                f"got a {self.model.config.model_type} model, which fills no key-value cache: "
                "expected a transformer"
            )
        return output.logits[:, -1].float()
