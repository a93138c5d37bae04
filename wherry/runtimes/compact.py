"""compact: unpacks a compact artifact into a temporary folder, and runs it by the runtime of what it was made of."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from wherry import shelf
from wherry.artifact import Artifact
from wherry.formats.compact import restore
from wherry.session import Session

RUNTIME_OF = {"onnx": "onnxruntime", "safetensors": "torch", "compressed_tensors": "torch"}


def available() -> dict[str, str]:
    """The version of the entropy coder."""
    from importlib.metadata import version

    return {"constriction": version("constriction")}


def accepts(artifact: Artifact) -> bool:
    """Folders of the format `compact`."""
    return artifact.format == "compact"


def load(artifact: Artifact, device: str = "cpu", threads: int = 0, **options: Any) -> Session:
    """Unpack and load; what was unpacked is removed when the session is gone."""
    folder = tempfile.mkdtemp(prefix="wherry-compact-")
    try:
        inner = restore(artifact, Path(folder))
        found: Session = shelf.find("runtimes", RUNTIME_OF[inner.format]).load(inner, device, threads, **options)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found
