"""Mesh: the processes of a run on a grid pp x dp x fsdp x tp, who sees which data, and how they agree on errors.

One process needs no process group. With several (torchrun), sums are over those that see different samples; the
others of a tensor-parallel group add nothing, nor do pipeline stages before the last.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from wherry import errors
from wherry.errors import BadInput, Error, Exhausted
from wherry.train.job import Job

DIMS = ("pp", "dp", "fsdp", "tp")
T = TypeVar("T")


@dataclass
class World:
    """The processes. places: this one's coordinate on each dimension; sizes: how many there are of each.

    data_rank, data_size: its place among those that see different samples. saver: a group of its own for checkpoints.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    places: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMS, 0))
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMS, 1))
    saver: Any = None

    @property
    def data_size(self) -> int:
        """How many ranks see different samples."""
        return self.sizes["dp"] * self.sizes["fsdp"]

    @property
    def data_rank(self) -> int:
        """This rank's place among them."""
        return self.places["dp"] * self.sizes["fsdp"] + self.places["fsdp"]

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this process has the logits."""
        return self.places["pp"] == self.sizes["pp"] - 1

    @property
    def counted(self) -> bool:
        """Whether this process's sums count: one rank per share of the data."""
        return self.last_stage and self.places["tp"] == 0

    def total(self, values: list[float], flags: tuple[float, ...] = ()) -> list[float]:
        """Sums of the values over the shares of the data, in float64; then sums of the flags over all ranks."""
        if self.size == 1:
            return [*values, *flags]
        mine = torch.tensor([*(values if self.counted else [0.0] * len(values)), *flags], dtype=torch.float64)
        dist.all_reduce(mine)
        return mine.tolist()

    def agree(self, work: Callable[[], T]) -> T:
        """Do it on every rank; when it fails on any, every rank raises that error, the one of the lowest rank."""
        if self.size == 1:
            return work()
        problem: Exception | None = None
        try:
            result = work()
        except Exception as error:  # told to every rank below, whatever it is
            problem = error
        self.check(problem)
        return result

    def check(self, problem: Exception | None) -> None:
        """Raise on every rank the error of the lowest rank that has one. Every rank must call it."""
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        told: list[tuple[str, str] | None] = [None] * self.size
        said = None if problem is None else (type(problem).__name__, str(problem))
        dist.all_gather_object(told, said)
        found = next(((rank, each) for rank, each in enumerate(told) if each), None)
        if found is None:
            return
        rank, (name, text) = found
        if problem is not None and not isinstance(problem, Error) and rank == self.rank:
            raise problem
        kind = getattr(errors, name, None)
        if kind is None:
            raise Agreed(f"rank {rank}: {name}: {text}")
        made = kind(text)
        made.agreed = True
        raise made

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def group(self, name: str) -> Any:
        """The process group of a dimension."""
        return self.mesh[name].get_group()


class Agreed(Error):
    """A fault of wherry on another rank."""

    agreed = True


def layout(job: Job, size: int) -> dict[str, int]:
    """Ranks on each dimension.

    Raises BadInput when they do not multiply to the number of processes.
    """
    fixed = job.fsdp * job.tp * job.pp
    dp = job.dp or max(1, size // fixed)
    if dp * fixed != size:
        said = f"dp {job.dp or 'what is left'} x fsdp {job.fsdp} x tp {job.tp} x pp {job.pp}"
        raise BadInput(
            f"{size} {'process' if size == 1 else 'processes'} cannot be laid out as {said}.\n"
            f"Start {dp * fixed if job.dp else fixed * max(1, size // fixed)} of them (--ranks), or give other sizes."
        )
    if job.batch % (dp * job.fsdp):
        ranks = dp * job.fsdp
        raise BadInput(
            f"a batch of {job.batch} cannot be divided among {ranks} data-parallel ranks.\n"
            f"Use --batch {-(-job.batch // ranks) * ranks}, or another number of ranks."
        )
    return {"pp": job.pp, "dp": dp, "fsdp": job.fsdp, "tp": job.tp}


@contextmanager
def joined(job: Job) -> Iterator[World]:
    """Join the processes that torchrun started; leave them in the end, also after an error.

    Raises BadInput when their number does not fit dp x fsdp x tp x pp. A rank that does not answer for
    `job.timeout` seconds ends the others with Exhausted.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if job.device == "auto" else job.device
    if size == 1:
        layout(job, 1)
        yield World(device=torch.device(kind))
        return
    sizes = _told(job, size)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # advice on speed
    device = torch.device(kind)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    own = not dist.is_initialized()  # several runs of one program share their process group
    if own:
        meet(backend, job.timeout)
    try:
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=DIMS)
        places = dict(zip(DIMS, mesh.get_coordinate() or (), strict=True))
        saver = dist.new_group(backend="gloo", timeout=timedelta(seconds=job.timeout))
        yield World(rank, size, device, mesh, places, sizes, saver)
    except RuntimeError as error:
        if any(word in str(error).lower() for word in ("timed out", "connection closed", "timeout", "reset by peer")):
            raise Exhausted(
                f"rank {rank} lost the others: {' '.join(str(error).split())[:160]}\n"
                "Start the same command again: it goes on from the newest checkpoint."
            ) from error
        raise
    finally:
        if own:
            dist.destroy_process_group()


def meet(backend: str, timeout: float) -> None:
    """Make the process group of the processes that torchrun started.

    On one host each restart has keys of its own in torchrun's store: what the ranks before it left there is stale.
    """
    wait = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


def _told(job: Job, size: int) -> dict[str, int]:
    """The layout; every rank finds the same error, and only the first one says it."""
    try:
        return layout(job, size)
    except BadInput as error:
        error.agreed = True  # type: ignore[attr-defined]
        raise
