"""One process or several: their ranks and devices, sums and broadcasts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank under torchrun, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """The number of processes under torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: The rank of this process, from 0.
        count: The number of processes.
        device: The device of this process.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums of the values over all processes; all processes must call it."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copy ``tensor`` of the main process into that of every process."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The group of processes that torchrun started, or this process alone.

    Args:
        device: "auto" takes a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: a CUDA device is wanted and there is none.
        RuntimeError: another process cannot be reached.
    """
    device_here = _device(device)
    starts_group = processes() > 1 and not dist.is_initialized()
    if starts_group:
        if device_here.type == "cuda":
            torch.cuda.set_device(device_here)
        dist.init_process_group("nccl" if device_here.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device_here)
        else:
            yield Processes(0, 1, device_here)
    finally:
        if starts_group:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device here: use 'auto' or 'cpu'.")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
