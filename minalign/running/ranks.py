"""Several processes, started by torchrun, as one run: what is global, who writes, what is summed.

Every rank holds all weights (but see shard.py), draws the same prompts and the same random numbers,
and works on its own share of the rows. Rewards and statistics are gathered before a baseline or a
log sees them. Gradients are summed. So N processes make the step that one makes, up to the order of
additions.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .errors import require

if typing.TYPE_CHECKING:
    import torch


@dataclass
class Ranks:
    """Process `index` of the `count` processes that share one run.

    Args:
        group: torch.distributed's; None for all processes.
    """

    index: int = 0
    count: int = 1
    group: object = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.index == 0

    def share(self, rows: int) -> slice:
        """This rank's rows of a batch of `rows`.

        Raises:
            UserError: `count` does not divide it. A row left out would go unnoticed.
        """
        require(
            rows % self.count == 0,
            f"--batch-size {rows}: expected a multiple of {self.count}, the processes that share "
            "a run",
        )
        each = rows // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def rows(self, batch: Sequence) -> tuple[Sequence, float]:
        """(this rank's rows, 1.0) of a batch of any size; (one row, 0.0) where it has none."""
        mine = batch[self.index :: self.count]
        return (mine, 1.0) if mine else (batch[:1], 0.0)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors (rows, ...), all of one shape, concatenated in the ranks' order."""
        if self.count == 1:
            return tensor
        import torch

        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes its sum over the ranks, in place."""
        if self.count > 1:
            import torch

            for tensor in tensors:
                torch.distributed.all_reduce(tensor, group=self.group)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on some rank."""
        import torch

        return bool(self.gather(torch.tensor([flag], device=device)).any())

    def most(self, number: int, device: torch.device) -> int:
        """The largest of the ranks' numbers."""
        import torch

        return int(self.gather(torch.tensor([number], device=device)).max())

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier(group=self.group)

    def from_first(self, make: Callable[[], str]) -> str:
        """What `make` returns on rank 0, on all ranks."""
        if self.count == 1:
            return make()
        import torch

        box = [make() if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 goes through the block first, so that the others find what it writes."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def split(self, groups: int) -> tuple[int, Ranks]:
        """Divide the ranks into `groups` groups as equal as can be, at most one per rank.

        Returns:
            (number of this rank's group, from 0; the Ranks of that group).
        """
        if self.count == 1:
            return 0, self
        import torch

        groups = min(groups, self.count)
        members = [
            [rank for rank in range(self.count) if rank * groups // self.count == g]
            for g in range(groups)
        ]
        # Every rank makes every group, in one order.
        handles = [torch.distributed.new_group(ranks) for ranks in members]
        mine = self.index * groups // self.count
        return mine, Ranks(members[mine].index(self.index), len(members[mine]), handles[mine])


def processes() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group(
    device: torch.device, patience_hours: float = 0.5
) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of a program that torchrun may have started, connected by gloo (CPU) or nccl.

    Ranks other than the first are silent on stdout. torchrun ends the others as soon as one dies.

    Args:
        patience_hours: a rank that waits longer for another ends with an error.
    Returns:
        (Ranks, this rank's device). Without torchrun: one rank, and `device` as it is.
    """
    if processes() == 1:
        yield Ranks(), device
        return
    import torch

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A program that runs several trainings has made one group for all of them.
    begun = not torch.distributed.is_initialized()
    if begun:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend, timeout=datetime.timedelta(hours=patience_hours)
        )
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    with contextlib.ExitStack() as stack:
        if not ranks.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield ranks, device
    if begun:
        torch.distributed.destroy_process_group()
