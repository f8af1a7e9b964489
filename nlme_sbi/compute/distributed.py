"""Training on several processes, as ``torchrun`` starts them: which process is first, the share of each, and what all
agree on.

Every process holds the whole network; of each batch it takes its share, and torch's DistributedDataParallel averages
the gradients. Only the first process writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Team:
    """The processes that train one network; by default this one alone.

    Attributes:
        rank: this process, from 0.
        size: all of them.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """This process's part of a batch; raises ``ValueError`` where the batch cannot be shared evenly."""
        if batch_size % self.size:
            raise ValueError(
                f"training.batch_size={batch_size} cannot be shared by {self.size} processes; take a multiple."
            )
        return batch_size // self.size

    def replica(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over the team; it shares its weights with ``network``."""
        return network if self.size == 1 else nn.parallel.DistributedDataParallel(network)

    def mean(self, value: float) -> float:
        """The mean over the team, the same number in every process, so that all decide alike."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def from_first(self, value: Any) -> Any:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


ALONE = Team()


@contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    """The team that ``torchrun`` started this process for, else this process alone.

    Args:
        device: ``cuda`` without a number becomes a GPU for each process of a machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Team(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
