"""Journal: what is done, so that a killed run goes on where it was and ends as if it had not been killed.

A run works in `.NAME.partial-FINGERPRINT` beside its output. Each unit of work (a block, the tensors outside of
the blocks) ends as one safetensors file, written to a temporary name, flushed and renamed; what is whole is done,
the rest is done again. The last step renames the folder to its final name. The fingerprint covers source,
recipe, data and version, so that another run never takes this one's files.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from wherry import tensorfile
from wherry.errors import BadInput, Corrupt, Exhausted
from wherry.tensorfile import TensorFile

NAME_MOST = 200  # bytes of an output's name: those of its working folder must fit into the usual 255


class Units:
    """Finished units of work in a folder: one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Where the tensors of a unit lie."""
        return self.folder / f"unit-{key}.safetensors"

    def done(self, key: str) -> TensorFile | None:
        """The finished unit of that key, or None when it must be (re)done."""
        if not self.path(key).exists():
            return None
        try:
            return TensorFile(self.path(key))
        except Corrupt:
            return None

    def save(self, key: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> TensorFile:
        """Finish a unit: its tensors, and facts as JSON in the file's metadata."""
        tensorfile.write(self.path(key), tensors, {"facts": json.dumps(facts, sort_keys=True)})
        return TensorFile(self.path(key))

    @staticmethod
    def facts(unit: TensorFile) -> dict[str, Any]:
        """The facts of a finished unit."""
        found: dict[str, Any] = json.loads(unit.metadata["facts"])
        return found


class Journal(Units):
    """The working folder of one run.

    Raises:
        BadInput: the output exists already, or its folder cannot be written.
        Exhausted: less free space than `need` bytes.
    """

    def __init__(self, out: Path, stamp: dict[str, Any], need: int = 0) -> None:
        self.out = out
        text = json.dumps(stamp, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = out.parent / f".{out.name}.partial-{self.fingerprint}"
        self.parents = vacant(out)
        self.resumed = self.folder.exists()
        own = [path for top in (self.folder, self.ready) for path in top.rglob("*") if path.is_file()]
        spent = sum(path.stat().st_size for path in own)
        free = shutil.disk_usage(self.parents[-1].parent if self.parents else out.parent).free
        if need - spent > free:
            raise Exhausted(
                f"no space for {out}: {(need - spent) / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free.\n"
                "Free space, or choose another -o."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remove_empty(self.parents)
            raise BadInput(f"cannot write beside {out}: {error.strerror}.\nChoose another -o.") from error
        for leftover in self.folder.rglob("*.tmp"):
            leftover.unlink()

    def finish(self, result: Path) -> None:
        """Move a folder inside of the journal to the output's name; the last step of a run.

        The result leaves the journal, the journal is removed, the result takes its name: each step is atomic
        or can be done again, so that a kill at any moment leaves either the output or a run that goes on.
        """
        self.ready.parent.mkdir(parents=True, exist_ok=True)
        if not self.ready.exists():
            fd = os.open(result, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            os.rename(result, self.ready)
        shutil.rmtree(self.folder, ignore_errors=True)
        vacant(self.out)
        os.rename(self.ready, self.out)

    @property
    def ready(self) -> Path:
        """Where a whole result waits for its name."""
        return self.out.parent / f".{self.out.name}.partial-{self.fingerprint}.ready"

    def discard(self) -> None:
        """Remove all traces, folders above the output too: used when the run cannot succeed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_empty(self.parents)


def vacant(out: Path) -> list[Path]:
    """See that the output does not exist and could be made; gives the absent folders above it, deepest first.

    Raises:
        BadInput: it exists already, has a name that is too long, or lies where nothing can be written.
    """
    if os.path.lexists(out):  # a link to nowhere exists too
        raise BadInput(f"{out} exists already; wherry overwrites nothing.\nRemove it or choose another -o.")
    if len(os.fsencode(out.name)) > NAME_MOST:
        raise BadInput(f"the output's name is longer than {NAME_MOST} bytes: {out.name[:40]}...\nChoose another -o.")
    parent, absent = out.parent, []
    while not parent.exists():
        absent.append(parent)
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{parent} is not a folder that can be written.\nChoose another -o.")
    return absent


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, deepest first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
