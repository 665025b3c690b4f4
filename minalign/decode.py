"""What makes one token after another fast: keys and values in one buffer, and weights in the order that the processor reads them.

Each is a few lines beside what transformers does without it (DynamicCache, torch.nn.Linear), and gives the same numbers up to
rounding; the tests hold them against each other.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: its weight is (in, out)


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values (B, H, n, D) as the first n columns of a buffer; DynamicLayer copies all of them for each token."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.buffers = capacity, ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new columns (B, H, k, D) behind the old ones; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A DynamicCache with room for `capacity` columns; layers with a sliding window stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextlib.contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a float32 model on a CPU read a copy of their weights in oneDNN's blocked order.

    With a few rows a time, a product takes half as long; the copy costs the weights' memory once more, and as long as one or two
    tokens. Only for sampling: there are no gradients, and weights that change inside are not seen. Does nothing on other
    devices, in other dtypes, or where torch comes without oneDNN.
    """
    packed = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        for module in model.modules():
            if type(module) in (torch.nn.Linear, Conv1D):
                weight = module.weight.detach() if type(module) is torch.nn.Linear else module.weight.detach().T.contiguous()
                if weight.device.type == "cpu" and weight.dtype == torch.float32:
                    module.forward = _packed_forward(weight, module.bias)  # found before the method of the class
                    packed.append(module)
    try:
        yield
    finally:
        for module in packed:
            del module.forward


def _packed_forward(weight: torch.Tensor, bias: torch.Tensor | None):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
