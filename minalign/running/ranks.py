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
import platform
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .errors import UserError, require

# How long a process waits for another one: rank 0 evaluates and saves alone, and in warp.py a group
# of processes waits for another's whole run. A process that has ended is noticed at once.
PATIENCE = datetime.timedelta(days=30)

_LAUNCHER = os.getppid()

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

    def gather(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The ranks' tensors (rows, ...), all of one shape, concatenated in the ranks' order.

        What is None on all of them stays None.
        """
        if self.count == 1 or tensor is None:
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
        return bool(self.most(flag, device))

    def most(self, number: int, device: torch.device) -> int:
        """The largest of the ranks' numbers."""
        import torch

        return int(self.gather(torch.tensor([number], device=device)).max())

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier(group=self.group)

    def from_first(
        self, make: Callable[[], typing.Any], device: torch.device | None = None
    ) -> typing.Any:
        """What `make` returns on rank 0, on all ranks. A UserError is raised on all of them.

        Args:
            device: what tensors, in dicts and lists, are sent through, one by one, since they may
                be large. They arrive in main memory.
        """
        if self.count == 1:
            return make()
        import torch
        from torch.utils._pytree import tree_map_only

        found, error = None, ""
        if self.first:
            try:
                found = make()
            except UserError as raised:
                error = str(raised)
        src = torch.distributed.get_global_rank(self.group, 0) if self.group else 0
        sent = [tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), found), error]
        torch.distributed.broadcast_object_list(sent, src, group=self.group)
        require(not sent[1], sent[1])

        def send(tensor: torch.Tensor) -> torch.Tensor:
            buffer = tensor.to(device) if self.first else torch.empty_like(tensor, device=device)
            torch.distributed.broadcast(buffer, src, group=self.group)
            return buffer.cpu()

        return tree_map_only(torch.Tensor, send, found if self.first else sent[0])

    def require_same(self, what: dict[str, typing.Any]) -> None:
        """UserError where a rank has another value than rank 0. Both ranks are named."""
        if self.count == 1:
            return
        import torch

        all_of_them = [None] * self.count
        mine = platform.node(), what
        torch.distributed.all_gather_object(all_of_them, mine, group=self.group)
        here, wanted = all_of_them[0]
        for rank, (there, got) in enumerate(all_of_them):
            for name in wanted | got:
                one, other = wanted.get(name), got.get(name)
                require(
                    one == other,
                    f"{name}: {one} on rank 0 ({here}), {other} on rank {rank} ({there}): all "
                    "processes of a run need the same",
                )

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """One process goes through the block first, so that the others find what it writes.

        The first is rank 0. Then comes one of each other machine, which may not see its files.
        """
        turn = 0 if self.first else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
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
        handles = [torch.distributed.new_group(ranks, PATIENCE) for ranks in members]
        mine = self.index * groups // self.count
        return mine, Ranks(members[mine].index(self.index), len(members[mine]), handles[mine])


def processes() -> int:
    """The number of processes that torchrun started; 1 without it.

    Raises:
        UserError: WORLD_SIZE in the environment is no such number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    fix = "unset it, or start with torchrun"
    require(text.isdecimal() and int(text) > 0, f"WORLD_SIZE={text}: expected a number: {fix}")
    return int(text)


def launcher_is_gone() -> bool:
    """Whether torchrun, which started this process, was killed alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _LAUNCHER


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of a program that torchrun may have started, connected by gloo (CPU) or nccl.

    Ranks other than the first are silent on stdout. All end as soon as one does.

    Returns:
        (Ranks, this rank's device). Without torchrun: one rank, and `device` as it is.
    Raises:
        UserError: torchrun's variables are not there, or another process has ended.
    """
    if processes() == 1:
        yield Ranks(), device
        return
    import torch

    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in needed if not os.environ.get(name))
    require(
        not missing,
        f"WORLD_SIZE={processes()} without {missing} in the environment: start with torchrun, or "
        "unset WORLD_SIZE",
    )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A program that runs several trainings has made one group for all of them.
    begun = not torch.distributed.is_initialized()
    with contextlib.ExitStack() as stack:
        try:
            if begun:  # all must come within half an hour
                backend = "nccl" if device.type == "cuda" else "gloo"
                within = datetime.timedelta(minutes=30)
                torch.distributed.init_process_group(backend, timeout=within)
            group = torch.distributed.new_group(timeout=PATIENCE)
            ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)
            if not ranks.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield ranks, device
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in reason:
                raise
            raise UserError(
                f"rank {os.environ['RANK']}: another process cannot be reached, or has ended "
                f"({reason}): see what it says, and --resume"
            ) from error
    torch.distributed.destroy_process_group(None if begun else group)
