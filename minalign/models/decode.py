"""What makes one token after another fast.

- Keys and values lie in one buffer.
- On a CPU, weights lie in the order that the processor reads them.
- On a GPU, a step is captured once and replayed.

Each is a few lines beside what transformers does without it (DynamicCache, torch.nn.Linear, a loop
in Python), and gives the same numbers up to rounding. The tests hold them against each other.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values (B, H, n, D) as the first n columns of a buffer.

    DynamicLayer copies all of them for each token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.buffers, self.column = capacity, (), None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new columns (B, H, k, D) behind the old ones.

        Returns:
            All keys and all values, (B, H, n, D): of a fixed layer, the whole buffers.
        """
        if self.column is not None:
            for buffer, new in zip(self.buffers, (key_states, value_states)):
                buffer.index_copy_(2, self.column, new)
            return self.buffers
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
                for new in (key_states, value_states)
            ]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def fix_(self, column: torch.Tensor) -> None:
        """From now on one token at a time goes to `column`: nothing moves or grows any more.

        Args:
            column: (1,) long, on the device.
        """
        end = self.get_seq_length()
        for buffer in self.buffers:
            buffer[:, :, end:] = 0.0  # nobody looks there, but 0 times a NaN is a NaN
        self.column = column

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    reorder_cache = batch_select_indices


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A DynamicCache with room for `capacity` columns.

    Layers with a sliding window stay as transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def can_be_fixed(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether `decode_fixed` is worth it and possible.

    It is on CUDA, where every layer has a buffer, attention adds a mask of our own, and positions
    are given, not counted from that mask (as ALiBi's are). Some families compute a mask from the
    length of the cache (GPT-Neo's windows) or ask the host in a step: transformers says so.
    """
    if model.device.type != "cuda" or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if not model._can_compile_fullgraph:
        return False
    buffers = all(type(layer) is PreallocatedLayer for layer in cache.layers)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return buffers and takes_positions and not getattr(model.config, "alibi", False)


def decode_fixed(
    model: PreTrainedModel,
    cache: DynamicCache,
    attention_mask: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    running: torch.Tensor,
    uniforms: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    temperature: float,
    eos: torch.Tensor,
) -> None:
    """The rest of `rollout.generate` after its first token.

    No shape changes, and no number goes to the host. On CUDA one step is captured as a graph and
    replayed: a thousand small kernels are then one launch, and Python is out of the way. Every 16
    tokens the host asks whether all rows have ended. Rows that have ended stay: a step of fewer
    rows takes as long.

    Args:
        model: as in `generate`, with dropout off.
        cache: filled with the prompts (B, P).
        attention_mask: (B, P) bool, the prompts'.
        ids: (B, 1) long, the first tokens drawn; overwritten.
        positions: (B, 1) long, where they stand; overwritten.
        running: (B,) bool, which rows have not ended; overwritten.
        uniforms: (B, T) float64, as in `generate`.
        tokens, mask, logprobs: (B, T), as in `generate`; they get columns 1 and up.
        temperature: > 0.
        eos: (E,) long, the end tokens.
    """
    B, P, T = len(tokens), attention_mask.shape[1], tokens.shape[1]
    column = torch.full((1,), P, device=tokens.device)  # of `ids` in the cache
    t = torch.full((1,), 1, device=tokens.device)  # column of the next token in `tokens`
    for layer in cache.layers:
        layer.fix_(column)
    dtype = cache.layers[0].dtype
    lowest = torch.finfo(dtype).min
    # Added to attention's scores.
    visible = torch.full((B, 1, 1, P + T), lowest, dtype=dtype, device=tokens.device)
    visible[:, 0, 0, :P].masked_fill_(attention_mask, 0.0)

    def step() -> None:
        visible.index_fill_(3, column, 0.0)
        output = model(
            input_ids=ids,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        distribution = (output.logits[:, -1].float() / temperature).log_softmax(1)  # (B, V)
        drawn = draw(distribution, uniforms.index_select(1, t))  # (B, 1)
        kept = running[:, None]
        pads = tokens.index_select(1, t)  # they are there already
        tokens.index_copy_(1, t, torch.where(kept, drawn, pads))
        mask.index_copy_(1, t, kept)
        logprobs.index_copy_(1, t, distribution.gather(1, drawn).masked_fill(~kept, 0.0))
        running.logical_and_((drawn != eos).all(1))
        ids.copy_(drawn)
        for number in (positions, column, t):
            number.add_(1)

    for done in range(1, T):
        if done == 2 and tokens.is_cuda:  # the step before was the warm-up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # runs nothing
                step()
            step = graph.replay
        step()
        if done % 16 == 0 and not running.any():
            break


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One id per row, by one uniform number per row and the distribution function.

    Not torch.multinomial, which draws a number for every word of the vocabulary: a sixth of a CPU
    step. In float64, since rounding would otherwise move the probability of rare words.

    Args:
        logprobs: (N, V), nats.
        uniform: (N, 1) float64 in [0, 1); where it lies, it is computed.
    Returns:
        (N, 1) long.
    """
    cdf = logprobs.to(uniform.device).double().exp().cumsum(1)
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return drawn.clamp(max=logprobs.shape[1] - 1).to(logprobs.device)


@contextlib.contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Inside, linear layers on a CPU read a copy of their weights in oneDNN's blocked order.

    With a few rows at a time, a product takes half as long. The copy costs the weights' memory once
    more, and the time of one or two tokens. Only for sampling: there are no gradients, and weights
    that change inside are not seen. Does nothing on other devices, in other dtypes than float32 and
    (where the processor has it) bfloat16, under autocast, or without oneDNN.
    """
    packed = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for module in model.modules():
            if type(module) not in (torch.nn.Linear, Conv1D):
                continue
            weight = module.weight.detach()
            if weight.device.type != "cpu" or weight.dtype not in dtypes:
                continue
            if type(module) is Conv1D:
                weight = weight.T.contiguous()
            # Python finds it before the method of the class.
            module.forward = _packed_forward(weight, module.bias)
            packed.append(module)
    try:
        yield
    finally:
        for module in packed:
            del module.forward


def _packed_forward(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
