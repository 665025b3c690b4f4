"""What makes one token after another fast: keys and values in one buffer; on a CPU, weights in the order that the processor reads
them; on a GPU, a step that is captured once and replayed.

Each is a few lines beside what transformers does without it (DynamicCache, torch.nn.Linear, a loop in Python), and gives the same
numbers up to rounding; the tests hold them against each other.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer: its weight is (in, out)


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values (B, H, n, D) as the first n columns of a buffer; DynamicLayer copies all of them for each token."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.buffers, self.column = capacity, (), None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new columns (B, H, k, D) behind the old ones; returns all of them: of a fixed layer, the whole buffers."""
        if self.column is not None:
            for buffer, new in zip(self.buffers, (key_states, value_states)):
                buffer.index_copy_(2, self.column, new)
            return self.buffers
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [new.new_empty(*new.shape[:2], self.capacity, new.shape[3]) for new in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def fix_(self, column: torch.Tensor) -> None:
        """From now on one token a time goes to `column` (1,), a number that lies on the device: nothing moves or grows any more."""
        end = self.get_seq_length()
        for buffer in self.buffers:
            buffer[:, :, end:] = 0.0  # nobody looks there, but 0 times a NaN is a NaN
        self.column = column

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


def can_be_fixed(model: torch.nn.Module, cache: DynamicCache) -> bool:
    """Whether `decode_fixed` is worth it and possible: on CUDA, where every layer has a buffer, attention adds a mask of our own, and
    positions are given, not counted from that mask (as ALiBi's are).
    """
    if model.device.type != "cuda" or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    buffers = all(type(layer) is PreallocatedLayer for layer in cache.layers)
    positions = "position_ids" in inspect.signature(model.forward).parameters and not getattr(model.config, "alibi", False)
    return buffers and positions


def decode_fixed(
    model: torch.nn.Module, cache: DynamicCache, attention_mask: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor,
    running: torch.Tensor, uniforms: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, logprobs: torch.Tensor, *,
    temperature: float, eos: torch.Tensor,
) -> None:  # fmt: skip
    """The rest of `rollout.generate` after its first token, without a shape that changes or a number that goes to the host.

    On CUDA one step is captured as a graph and replayed: a thousand small kernels are then one launch, and Python is out of the
    way. Every 16 tokens the host asks whether all rows have ended. Rows that have ended stay: a step of fewer rows takes as long.

    Args:
        cache: filled with the prompts (B, P); attention_mask (B, P) bool, the prompts'.
        ids, positions, running: (B, 1), (B, 1), (B,) bool: the first tokens drawn, where they stand, and who has not ended.
        uniforms, tokens, mask, logprobs: (B, T), as in `generate`; the last three get columns 1 and up.
    """
    B, P, T = len(tokens), attention_mask.shape[1], tokens.shape[1]
    column, t = (torch.full((1,), n, device=tokens.device) for n in (P, 1))  # of `ids` in the cache; of the next token
    for layer in cache.layers:
        layer.fix_(column)
    dtype = cache.layers[0].dtype
    visible = torch.full(
        (B, 1, 1, P + T), torch.finfo(dtype).min, dtype=dtype, device=tokens.device
    )  # added to attention's scores
    visible[:, 0, 0, :P].masked_fill_(attention_mask, 0.0)

    def step():
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
        tokens.index_copy_(1, t, torch.where(kept, drawn, tokens.index_select(1, t)))  # pad tokens are there already
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
    """One id a row (N, 1) from log-probs (N, V), by one uniform number a row (N, 1) and the distribution function.

    Not torch.multinomial, which draws a number for every word of the vocabulary: a sixth of a CPU step. In float64, since
    rounding would otherwise move the probability of rare words.
    """
    cdf = logprobs.double().exp().cumsum(1)
    return torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp(max=logprobs.shape[1] - 1)


def sampling_copy(policy: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model to sample with: the policy itself in float32, a copy with rounded weights in bfloat16.

    Under autocast the policy would read its float32 weights for every token, round them, and read the result: three to five
    times the bytes, which are all that a small batch's token costs.
    """
    if dtype == torch.float32:
        return policy
    copied = copy.deepcopy(policy).requires_grad_(False)
    for parameter in copied.parameters():  # not the buffers: angles of rotary positions need float32
        parameter.data = parameter.data.to(dtype)
    return copied


@torch.no_grad()
def refresh_(sampler: torch.nn.Module, policy: torch.nn.Module) -> None:
    """Round the policy's weights into its sampling copy; nothing to do where they are one."""
    if sampler is not policy:
        for rounded, parameter in zip(sampler.parameters(), policy.parameters(), strict=True):
            rounded.copy_(parameter)


@contextlib.contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a model on a CPU read a copy of their weights in oneDNN's blocked order.

    With a few rows a time, a product takes half as long; the copy costs the weights' memory once more, and as long as one or two
    tokens. Only for sampling: there are no gradients, and weights that change inside are not seen. Does nothing on other
    devices, in other dtypes than float32 and (where the processor has it) bfloat16, under autocast, or without oneDNN.
    """
    packed = []
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for module in model.modules():
            if type(module) in (torch.nn.Linear, Conv1D):
                weight = module.weight.detach() if type(module) is torch.nn.Linear else module.weight.detach().T.contiguous()
                if weight.device.type == "cpu" and weight.dtype in dtypes:
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
