"""Several processes, started by torchrun, as one run: what is global, who writes, and the sums between them.

Every rank holds all weights (but see shard.py), draws the same prompts and the same random numbers, and works on its own share
of the rows; rewards and statistics are gathered before a baseline or a log sees them, gradients are summed. So N processes make
the step that one makes, up to the order of additions.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .common import require

if typing.TYPE_CHECKING:
    import torch


@dataclass
class Ranks:
    """Process `index` of `count` that share one run; `group` is torch.distributed's, None for all of them."""

    index: int = 0
    count: int = 1
    group: object = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.index == 0

    def share(self, rows: int) -> slice:
        """This rank's rows of a batch of `rows`. UserError where `count` does not divide it: a row left out would go unnoticed."""
        require(
            rows % self.count == 0, f"--batch-size {rows}: expected a multiple of {self.count}, the processes that share a run"
        )
        each = rows // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors (rows, ...), all of one shape, one below the other in the order of the ranks."""
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
        """Until all ranks are here."""
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
        """Rank 0 goes through the block first: what it writes, the others find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def split(self, groups: int) -> tuple[int, Ranks]:
        """(number of this rank's group, its Ranks) of `groups` groups as equal as can be; as many groups as ranks at most."""
        if self.count == 1:
            return 0, self
        import torch

        groups = min(groups, self.count)
        members = [[rank for rank in range(self.count) if rank * groups // self.count == g] for g in range(groups)]
        handles = [torch.distributed.new_group(ranks) for ranks in members]  # by all ranks, in one order
        mine = self.index * groups // self.count
        return mine, Ranks(members[mine].index(self.index), len(members[mine]), handles[mine])


def processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group(device: torch.device, patience_hours: float = 0.5) -> Iterator[tuple[Ranks, torch.device]]:
    """(Ranks, this rank's device) of a program that torchrun may have started; alone, one rank and the device as it is.

    gloo on a CPU, nccl on CUDA. Ranks other than the first are silent on stdout. A rank that waits for another longer than
    `patience_hours` ends with an error; torchrun ends the others as soon as one dies.
    """
    if processes() == 1:
        yield Ranks(), device
        return
    import torch

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    begun = not torch.distributed.is_initialized()  # a program that runs several trainings makes one group for all
    if begun:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=patience_hours))
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    with contextlib.ExitStack() as stack:
        if not ranks.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield ranks, device
    if begun:
        torch.distributed.destroy_process_group()
