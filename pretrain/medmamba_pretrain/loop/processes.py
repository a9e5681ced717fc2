"""The processes of a run, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from medmamba.command import CommandError


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: of this one; 0 writes and reports.
        count: of all.
        device: that this one computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, content: Any) -> Any:
        """What process 0 gives, an object that can be pickled; what the others give is ignored."""
        if self.count == 1:
            return content
        box = [content]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


@contextmanager
def join_processes(device: str | None = None) -> Iterator[Processes]:
    """Meet the processes that torchrun started with this one, or be alone.

    Args:
        device: "cpu" or "cuda"; default: a GPU if there is one, of the process's number on its machine.

    Raises:
        CommandError: a GPU is asked for and there is none, or fewer than processes on this machine.
    """
    rank, count, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    here = _device(device, local)
    if count == 1:
        yield Processes(0, 1, here)
        return
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, here)
    finally:
        dist.destroy_process_group()


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _device(wanted: str | None, local: int) -> torch.device:
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cuda":
        return torch.device(name)
    there = torch.cuda.device_count()
    if local >= there:
        raise CommandError(
            f"process {local} of this machine has no GPU: torch sees {there}; start fewer, or use --device cpu"
        )
    return torch.device("cuda", local)
