"""Mesh: the processes of a run, who holds what, and how they agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from wherry.errors import BadInput
from wherry.train.job import Job


@dataclass
class World:
    """The processes. data_rank, data_size: this one's place among those that see different samples."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    data_rank: int = 0
    data_size: int = 1

    def total(self, values: list[float]) -> list[float]:
        """Sums over the ranks that see different samples."""
        return values

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0


@contextmanager
def joined(job: Job) -> Iterator[World]:
    """Join the processes that torchrun started; one process needs nothing.

    Raises BadInput when their number does not fit dp x fsdp x tp x pp.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != 1:
        raise BadInput("several processes are not there yet")
    if job.threads:
        torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield World(device=torch.device(device if job.device == "auto" else job.device))
