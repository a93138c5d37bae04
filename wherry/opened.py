"""Opened: a model that answers, whatever lies at a path: one session, or a Writer over an encoder and a decoder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wherry.artifact import MANIFEST, Artifact
from wherry.choose import open_session
from wherry.errors import Missing
from wherry.report import Report, read_object
from wherry.task import WRITES, Task
from wherry.writer import Writer

HALVES = ("encoder", "decoder")


@dataclass(frozen=True)
class Opened:
    """A model that answers: a Session, or a Writer over two. artifact: None for a Writer."""

    session: Any
    task: Task
    name: str
    bytes: int
    artifact: Artifact | None
    chosen: Report


def opened(path: str | Path, runtime: str = "auto", threads: int = 0) -> Opened:
    """Open an artifact, a graph model or a checkpoint on a runtime; a folder of a task that writes as a Writer.

    Raises:
        Missing: nothing of that kind there. Others as `choose.open_session`.
    """
    halves = _halves(Path(path))
    if not halves:
        session, artifact, chosen = open_session(path, runtime, threads)
        return Opened(session, artifact.task, artifact.name, size(artifact), artifact, chosen)
    task = Task.of(Path(path), {}) if (Path(path) / "task.json").exists() else None
    sessions, chosen, total = [], Report("choice of runtime"), 0
    for half in halves:
        session, artifact, report = open_session(half, runtime, threads)
        sessions.append(session)
        chosen.extend(Report("", [replace(row, where=f"{half.stem}: {row.where}") for row in report]))
        total += size(artifact)
        task = task or artifact.task
        masked = "encoder_attention_mask" in _inputs(artifact)
    assert task is not None
    return Opened(Writer(sessions[0], sessions[1], task, masked), task, Path(path).name, total, None, chosen)


def whole(found: Opened, path: Path) -> Artifact:
    """The artifact of a model; the two halves of one that writes as one, for a server's facts."""
    if found.artifact is not None:
        return found.artifact
    fields = {"format": "onnx", "main": ".", "model": found.name, "plan": [], "task": found.task.to_dict()}
    return Artifact(path, {**fields, "files": {".": {"bytes": found.bytes, "sha256": ""}}})


def _halves(path: Path) -> list[Path]:
    """The encoder and the decoder of a folder for a task that writes; empty for any other."""
    file = path / "task.json"
    if not path.is_dir() or (path / MANIFEST).exists() or (path / "config.json").exists() and not file.exists():
        return []
    folders = [path / half for half in HALVES]
    files = [path / f"{half}_model.onnx" for half in HALVES]
    if file.exists() and read_object(file).get("kind") not in WRITES:
        return []
    if all(folder.is_dir() for folder in folders):
        return folders
    if all(file.is_file() for file in files):
        return files
    if file.exists():
        raise Missing(
            f"{path} is for a task that writes, but has no encoder and decoder:\n"
            f"encoder_model.onnx and decoder_model.onnx, or folders encoder/ and decoder/, are wanted."
        )
    return []


def _inputs(artifact: Artifact) -> list[str]:
    """Names of a graph's inputs; of other formats, what the task says."""
    if artifact.format != "onnx":
        return list(artifact.task.inputs)
    import onnx

    return [value.name for value in onnx.load(artifact.main, load_external_data=False).graph.input]


def size(artifact: Artifact) -> int:
    """Bytes of what is loaded."""
    if artifact.manifest["files"]:
        return artifact.bytes
    if artifact.format == "onnx":
        return sum(file.stat().st_size for file in artifact.path.glob(f"{artifact.main.name}*"))
    return sum(file.stat().st_size for file in artifact.path.glob("*.safetensors"))
