"""Artifact: an exported folder that can ship, with a manifest of every file in it (`wherry.json`)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wherry.errors import BadInput, Corrupt, Missing
from wherry.report import write_atomic
from wherry.task import Task

MANIFEST = "wherry.json"
# files that describe an artifact and are written after it; not part of what is hashed
BESIDE = {MANIFEST, "report.json", "report.html", "README.md"}


def sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A folder and its manifest.

    manifest keys:
        wherry: version that wrote it        format: a name on the `formats` shelf
        task: Task as a dict                 files: {relative name: {"bytes": int, "sha256": str}}
        main: the file that a runtime opens  model: name of the model
        recipe, source: how it was made      license: as declared by the source, or ""
        params: number of parameters         inputs: of a graph, {name: [dtype, shape]}, free axes as names
        checks: figures of the export's own  plan: [{name, shape, scheme, bytes, ...}], one per source tensor
    """

    path: Path
    manifest: dict[str, Any]
    side: Path | None = None  # folder of tokenizer files, where they are not in `path`: a bare GGUF file's

    @property
    def format(self) -> str:
        """The name of its format on the `formats` shelf."""
        return self.manifest["format"]

    @property
    def task(self) -> Task:
        """What the model is for, and how raw examples go in and out."""
        return Task.from_dict(self.manifest["task"], self.side or self.path)

    @property
    def main(self) -> Path:
        """The file that a runtime opens."""
        return self.path / self.manifest["main"]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.get("model", self.path.name)

    @property
    def bytes(self) -> int:
        """Size of all hashed files together, in bytes."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def example(self, rows: int = 1, length: int = 32) -> dict[str, np.ndarray]:
        """Seeded random inputs of a graph: normal numbers, small whole numbers; the first free axis is the batch.

        A second input of whole numbers (a mask) is ones.
        """
        random, out = np.random.default_rng(0), {}
        for i, (name, (kind, shape)) in enumerate(self.manifest["inputs"].items()):
            extents = [n if isinstance(n, int) else rows if axis == 0 else length for axis, n in enumerate(shape)]
            dtype = np.dtype(kind)
            if dtype.kind == "f":
                out[name] = random.standard_normal(extents).astype(dtype)
            else:
                out[name] = np.ones(extents, dtype) if i else random.integers(0, 10, extents).astype(dtype)
        return out

    @classmethod
    def open(cls, path: Path | str) -> "Artifact":
        """Read a folder's manifest. A bare `.gguf` file is an artifact of its own without a manifest.

        Raises:
            Missing: no such path, or no manifest in the folder.
            Corrupt: the manifest cannot be read, or names a file outside of the folder.
        """
        path = Path(path)
        if path.is_file() and path.suffix == ".gguf":
            return cls(path.parent, bare_gguf(path))
        if not path.exists():
            raise Missing(f"no such artifact: {path}")
        file = path / MANIFEST
        if not file.exists():
            raise Missing(
                f"{path} has no {MANIFEST}: not an artifact of wherry.\nMake one: wherry export {path} -o OUT"
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf8"))
            names = [manifest["main"], *manifest["files"]]
            manifest["format"], manifest["task"]["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{file} is not a manifest of wherry: {type(error).__name__}: {error}") from error
        for name in names:
            if not (path / name).resolve().is_relative_to(path.resolve()):
                raise Corrupt(f"{file} names a file outside of the artifact: {name}")
        return cls(path, manifest)

    @classmethod
    def seal(cls, path: Path, **manifest: Any) -> "Artifact":
        """Hash every file below `path` and write the manifest. Folders that are artifacts themselves are left out."""
        inner = [file.parent for file in path.rglob(MANIFEST) if file.parent != path]
        files = {}
        for file in sorted(path.rglob("*")):
            nested = any(file.is_relative_to(folder) for folder in inner)
            if file.is_file() and not nested and file.name not in BESIDE:
                files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        if manifest["main"] not in files:
            raise BadInput(f"{path} lacks its main file {manifest['main']}")
        manifest = {**manifest, "files": files}
        write_atomic(path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        return cls(path, manifest)

    def verify(self) -> None:
        """Recompute every hash. Raises Corrupt naming the first file that differs, is missing or is new."""
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if not file.exists():
                raise Corrupt(f"{self.path} lacks {name}, which its manifest lists")
            if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                raise Corrupt(f"{file} differs from its manifest (sha256 or size); restore it or export again")


def bare_gguf(path: Path) -> dict[str, Any]:
    """A manifest for a GGUF file by somebody else: what can be said without reading it."""
    return {
        "wherry": "", "format": "gguf", "main": path.name, "model": path.stem, "recipe": "", "source": str(path),
        "license": "", "params": 0, "plan": [], "task": {"kind": "text-generation"},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": ""}},
    }  # fmt: skip
