"""AdamW over micro-batches and processes: what lies between a loss and an update.

    for rows, weight in optimizer.micro_batches(lengths):
        with optimizer.retry_in_halves():
            (weight * losses(rows).sum() / batch_size).backward()
    grad_norm = optimizer.step()

The loss and its backward pass are the loop's; nothing here knows them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import typing
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models import padding
from ..models.precision import autocast
from . import shard
from .errors import is_out_of_memory, require
from .ranks import Ranks


class Optimizer:
    """AdamW for `parameters` of `model`, whose gradients are made part by part, and by all `ranks`.

    Args:
        parameters: those that are trained. With config.shard they must be all of the model's.
        config: lr; max_grad_norm, to which the whole batch's gradient is scaled down where its norm
            is larger; micro_batch_size, rows per pass at most, halved where memory runs out; shard,
            whether weights, gradients and optimizer state lie in pieces on the ranks, see shard.py.
        weight_decay: AdamW's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: list[torch.nn.Parameter],
        config: typing.Any,
        ranks: Ranks,
        weight_decay: float = 0.0,
    ) -> None:
        self.model, self.ranks, self.sharded = model, ranks, config.shard
        self.max_grad_norm, self.micro_batch_size = config.max_grad_norm, config.micro_batch_size
        # With --shard gradients are made with a copy in pieces, and all else with the model itself,
        # which is whole again after each step.
        self.learner = shard.sharded_copy(model, ranks) if self.sharded else model
        self.parameters = list(self.learner.parameters()) if self.sharded else parameters
        fused = model.device.type in ("cpu", "cuda")
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=weight_decay, fused=fused
        )
        self.scaler, self.overflowed = torch.amp.GradScaler(enabled=False), False
        self._out_of_memory = ""

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.adamw.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        self.adamw.param_groups[0]["lr"] = value

    def forward(self, function: Callable, dtype: torch.dtype) -> Callable:
        """`function` with the trained model as its first argument: what losses are made of.

        It runs in `dtype`. The backward pass lies outside of it, and need not be told. float16 has
        no numbers below 6e-8: losses are then scaled up, and gradients down again.

        Args:
            function: (model, *args) -> a tensor with gradient.
        Returns:
            (*args) -> that tensor.
        """
        if dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.model.device.type)
            self.scaler.scale(torch.ones(1, device=self.model.device))  # makes its scale
        of_learner = functools.partial(function, self.learner)
        if self.sharded:
            of_learner = shard.as_forward(self.learner, of_learner)

        def in_precision(*args: typing.Any) -> torch.Tensor:
            with autocast(self.model.device, dtype):
                return of_learner(*args)

        return in_precision

    def micro_batches(
        self, lengths: Sequence[int], weight: float = 1.0
    ) -> Iterator[tuple[list[int], float]]:
        """(rows, weight): which rows of this process's batch go together, and what they count.

        In float16 the weight has the loss scale in it, which `step` takes out again.

        Rows of like length go together, at most `micro_batch_size` and padding.tokens_per_pass.
        With --shard every pass is a sum over the processes, so a process with fewer passes repeats
        a row, with weight 0. After `retry_in_halves` has seen memory run out, all begins again.

        Args:
            lengths: tokens of each row.
            weight: what each row counts; 0 for a row that stands in for none, see Ranks.rows.
        Raises:
            UserError: one row alone does not fit into memory.
        """
        shard.load_(self.learner, self.model, self.ranks)
        while True:
            self._out_of_memory = ""
            self.adamw.zero_grad()
            tokens = padding.tokens_per_pass(self.learner)
            parts = padding.length_parts(lengths, self.micro_batch_size, tokens)
            passes = [(part, weight * self.scaler.get_scale()) for part in parts]
            if self.sharded:
                idle = self.ranks.most(len(passes), self.model.device) - len(passes)
                passes += [(parts[-1][:1], 0.0)] * idle
            for rows_and_weight in passes:
                yield rows_and_weight
                if self._out_of_memory:
                    break
            else:
                return
            require(
                self.micro_batch_size > 1,
                f"out of memory with one sequence per pass ({self._out_of_memory}): shorten "
                "prompts or completions, or try --gradient-checkpointing, --lora-rank",
            )
            self.micro_batch_size //= 2
            size = f"--micro-batch-size {self.micro_batch_size}"
            tqdm.write(f"out of memory: going on with {size}, which gives the same gradient")

    @contextlib.contextmanager
    def retry_in_halves(self) -> Iterator[None]:
        """Around a pass: where memory runs out, `micro_batches` starts over with half the rows.

        No name in the block may hold the graph, or the second try finds less memory than the first.

        Raises:
            UserError: memory runs out with --shard: the other processes wait within a layer.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._out_of_memory = str(error).splitlines()[0]
            smaller = max(1, self.micro_batch_size // 2)
            require(
                not self.sharded,
                f"out of memory ({self._out_of_memory}): --shard cannot go on with fewer rows: "
                f"--resume with --micro-batch-size {smaller}, or try --gradient-checkpointing",
            )

    def step(self, skip: bool = False) -> float:
        """One update by the gradients, which are summed over the processes and then dropped.

        Args:
            skip: leave weights and state as they are. So they stay where the norm is not finite.
        Returns:
            The gradient's norm before clipping.
        """
        if not self.sharded:
            self.ranks.sum_([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = shard.whole(norm).item()
        # With a scale of 1 the gradient itself is not finite
        self.overflowed = not math.isfinite(norm) and self.scaler.get_scale() > 1
        if math.isfinite(norm) and not skip:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()  # now, so that sampling has their memory
        shard.unshard_(self.model, self.learner)
        return norm

    def state_dict(self) -> dict:
        """AdamW's state, whole tensors, the same with and without --shard.

        Collective. Rank 0 alone gets the tensors. In float16 with the loss scale.
        """
        state = shard.whole_state(self.adamw, keep=self.ranks.first)
        return state | ({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def load_state_dict(self, state: dict) -> None:
        """Resume from `state`, with or without --shard."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        state = {name: value for name, value in state.items() if name != "scaler"}
        shard.load_whole_state_(self.adamw, state)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at `step` (from 1): linear up to `warmup_steps`, then 1.

    >>> [warmup_factor(step, 4) for step in (1, 2, 4, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, step / max(1, warmup_steps))


def warmup_and_decay(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at `step` (from 1).

    It rises over a share `warmup` of the steps, then falls to 0.
    """
    rise, fall = warmup_factor(step, round(warmup * steps)), (steps - step + 1) / steps
    return min(rise, fall / (1 - warmup) if warmup < 1 else 1)
