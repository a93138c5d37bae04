"""Save: checkpoints of a run: sharded, written beside the training, resumed on any number of ranks.

    checkpoints/update-00000120/   __0_0.distcp ... one file per rank    .metadata, written last: it makes it whole
                                   state.json: what the run is, and where it was

torch.distributed.checkpoint writes what each rank has and reads what each rank needs, so 2 ranks may go on as 3 or 1.
Names are those of the whole model. A copy of the state is taken at once; writing goes on in a thread with a process
group of its own. The newest whole checkpoints are kept; one that failed is removed, and what was whole before stays.
"""

import errno
import json
import logging
import pickletools
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from wherry.errors import BadInput, Corrupt, Error, Exhausted
from wherry.report import read_object, write_atomic
from wherry.train.mesh import World

State = dict[str, torch.Tensor]
Rename = Callable[[str], str]


def state_of(
    module: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], rename: Rename = lambda name: name
) -> State:
    """Parameters, buffers and the optimizers' state under the whole model's names; the tensors are those in use."""
    named = {id(p): rename(name) for name, p in module.named_parameters()}
    state: State = {f"model.{rename(name)}": p.detach() for name, p in module.named_parameters()}
    kept = set(module.state_dict(keep_vars=True)) if not hasattr(module, "_fsdp_state") else None
    for name, buffer in module.named_buffers():
        if kept is None or name in kept:
            state[f"model.{rename(name)}"] = buffer
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor):
                        state[f"optim.{named[id(p)]}.{key}"] = value
    return state


def wake(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Make the optimizers' state, zero, so that it can be read into: an update with no gradient at rate 0."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Saver:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, world: World, keep: int, stamp: str) -> None:
        self.folder, self.world, self.keep, self.stamp = folder, world, keep, stamp
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.newest = -1
        for name in ("torch.distributed.checkpoint", "c10d-NullHandler-dcp_logger"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def path(self, step: int) -> Path:
        """Where the checkpoint after so many updates lies."""
        return self.folder / f"update-{step:08d}"

    def whole(self) -> list[int]:
        """Updates of the whole checkpoints, oldest first."""
        found = self.folder.glob("update-*/.metadata")
        return sorted(int(file.parent.name.removeprefix("update-")) for file in found)

    def drop(self, step: int) -> None:
        """Remove the checkpoint after so many updates, if there is one."""
        shutil.rmtree(self.path(step), ignore_errors=True)

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Begin to write; the one before must have ended. Cost: a copy of this rank's part; the rest in a thread."""
        self.wait()
        copy = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.pending = self.thread.submit(self._write, step, copy, facts)

    def _write(self, step: int, state: State, facts: dict[str, Any]) -> None:
        path, world = self.path(step), self.world
        try:
            path.mkdir(parents=True, exist_ok=True)
            if world.first:
                said = json.dumps({"update": step, "stamp": self.stamp, **facts})
                write_atomic(path / "state.json", said)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                save(
                    state, checkpoint_id=path, process_group=world.saver, no_dist=world.size == 1,
                )  # fmt: skip
        except BaseException as error:  # the file system's, or torch's around it
            if world.first:
                shutil.rmtree(path, ignore_errors=True)
            last = self.whole()[-1:]
            kept = f"that of update {last[0]} is whole" if last else "there is none before it"
            raise Exhausted(
                f"the checkpoint of update {step} could not be written ({reason(error)}); {kept}.\n"
                "Mend it, and start the same command again."
            ) from error
        if world.first:
            for old in self.whole()[: -self.keep]:
                if old < step:
                    shutil.rmtree(self.path(old), ignore_errors=True)

    def problem(self) -> Error | None:
        """What went wrong with a checkpoint that has ended, if anything."""
        if self.pending is None or not self.pending.done():
            return None
        error = self.pending.exception()
        self.pending = None
        return error if isinstance(error, Error) else None

    def wait(self) -> None:
        """Until what is being written is whole. Raises what went wrong on any rank, on all; every rank must call it."""
        pending, self.pending = self.pending, None
        problem: Any = pending.exception() if pending is not None else None
        self.world.check(problem)

    def read(self, state: State, path: Path) -> dict[str, Any]:
        """Read a checkpoint into the tensors of `state`, in place; gives its facts.

        Raises:
            BadInput: it belongs to another model. Corrupt: damaged.
        """
        facts = read_object(path / "state.json")
        harmless(path / ".metadata")
        reader = FileSystemReader(path)
        try:
            stored = reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever unpickling damaged bytes gives
            raise Corrupt(f"{path}: damaged metadata ({error}).\nRemove this checkpoint.") from error
        for name, tensor in state.items():
            found = stored.get(name)
            if found is None:
                raise BadInput(f"{path} is a checkpoint of another model or optimizer: it has no {name}")
            size = getattr(found, "size", None)
            if size is not None and tuple(size) != tuple(tensor.shape):
                raise BadInput(
                    f"{path} is a checkpoint of another model: {name} is {tuple(size)}, here {tuple(tensor.shape)}"
                )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(
                    state, checkpoint_id=path, process_group=self.world.saver, no_dist=self.world.size == 1
                )  # fmt: skip
        except (Exception, CheckpointException) as error:  # torch gathers all ranks' in the latter
            raise Corrupt(f"{path} cannot be read: {reason(error)}.\nRemove this checkpoint.") from error
        return facts

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(wait=True)


ALLOWED = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.serialization",
           "collections", "pathlib", "torch")  # fmt: skip
PLAIN = {"torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "strided",
                   "contiguous_format", "preserve_format"},
         "collections": {"OrderedDict"}, "torch.serialization": {"_get_layout"},
         "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}}  # fmt: skip


def harmless(file: Path) -> None:
    """See that torch's pickled metadata name nothing but torch's own plain classes; nothing is unpickled here.

    Raises Corrupt, with the name, when they do.
    """
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for code, value, _ in pickletools.genops(file.read_bytes()):
            name = code.name
            if isinstance(value, str) and name != "GLOBAL":
                strings.append(value)
            elif name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[value or 0] = strings[-1] if strings else ""
            elif name in ("BINGET", "LONG_BINGET"):
                strings.append(memo.get(value or 0, ""))
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                owner, what = str(value).split(" ") if name == "GLOBAL" else strings[-2:]
                if owner not in ALLOWED or what not in PLAIN.get(owner, {what}):
                    raise Corrupt(f"{file} names {owner}.{what}, which no checkpoint of torch does: it is not read")
            elif name in ("POP", "POP_MARK", "DUP", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"):
                raise Corrupt(f"{file} holds the pickle operation {name}, which torch does not write: it is not read")
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise Corrupt(f"{file.parent}: damaged metadata ({error}).\nRemove this checkpoint.") from error


def reason(error: BaseException) -> str:
    """The cause at the bottom of an error, in a few words."""
    inner: BaseException | None = error
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        inner = next(iter(failures.values()))[0]
    while inner is not None and (inner.__cause__ or inner.__context__) and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    text = str(inner)
    if getattr(inner, "errno", None) == errno.ENOSPC or "No space left" in text or "unexpected pos" in text:
        return "no space left on the disk"
    return f"{type(inner).__name__}: {' '.join(text.split())[:160]}"
