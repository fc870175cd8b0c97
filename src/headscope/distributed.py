"""One process or several: who this one is, on which device, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "joined", "processes", "rank"]


def rank() -> int:
    """This process's number under torchrun, from 0; 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: This one's number.
        count: How many there are.
        device: Where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums of these numbers over all processes; all must ask for it."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def share(self, tensor: Tensor) -> Tensor:
        """What the main process has in ``tensor``, written into everybody's."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: "auto" takes a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: a CUDA device is wanted and there is none.
        RuntimeError: another process cannot be reached.
    """
    chosen = _device(device)
    own = processes() > 1 and not dist.is_initialized()
    if own:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
        else:
            yield Processes(0, 1, chosen)
    finally:
        if own:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device here: use 'auto' or 'cpu'.")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
