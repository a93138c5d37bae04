"""OpenVINO on the CPU: graphs of the formats `openvino` and `onnx` that are run once, no language models. No torch.

Idea:   it reads our ONNX files as they are, QuantizeLinear and DequantizeLinear included, and fuses them itself; which
        layers really run in 8 bits is read from the compiled model and stands in the facts.
Cost:   memory: the file once, and what OpenVINO repacks.
"""

import threading
from typing import Any

import numpy as np
import openvino as ov

from wherry.artifact import Artifact
from wherry.errors import BadInput
from wherry.formats.openvino import compiled, core, executed, sparse_rate
from wherry.session import NoGenerate, Session, Signature


def available() -> dict[str, str]:
    """Version, and what the CPU plugin says it can compute with."""
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"openvino": ov.__version__, "isa": " ".join(sorted(able))}


def accepts(artifact: Artifact) -> bool:
    """Graphs that are run once. Sentence encoders of the `onnx` format hold operators of ONNX Runtime alone."""
    if artifact.task.kind == "text-generation":
        return False
    return artifact.format == "openvino" or artifact.format == "onnx" and bool(artifact.manifest.get("graph"))


def load(artifact: Artifact, device: str = "cpu", threads: int = 0) -> Session:
    """Load an artifact.

    Raises:
        BadInput: another device. Corrupt: the file is damaged. Unsupported: an operator that OpenVINO lacks.
    """
    if device != "cpu":
        raise BadInput(f"--device {device}: this version runs OpenVINO on the CPU; use cpu")
    return OpenVINO(artifact, threads)


def signature(ports: list[Any]) -> Signature:
    """Dtypes and shapes of inputs or outputs; OpenVINO has no names for free axes."""
    shapes = [tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape()) for port in ports]
    names = [(name_of(port), str(np.dtype(port.get_element_type().to_dtype()))) for port in ports]
    return {name: (kind, shape) for (name, kind), shape in zip(names, shapes, strict=True)}


def name_of(port: Any) -> str:
    """The name of an input or output in the file: the tensor may carry names of inner values too, in no order."""
    told = port.node.get_friendly_name()
    names = sorted(port.get_names(), key=lambda name: (not f"{told}/".startswith(f"{name}/"), name))
    return names[0] if names else told


class OpenVINO(NoGenerate):
    """A compiled graph. Thread-safe: calls take turns."""

    grade = "A"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.path, self.lock = artifact.main, threading.Lock()
        sparse = sparse_rate(artifact.manifest)
        self.model: Any = compiled(artifact.main, threads, sparse)
        self.request = self.model.create_infer_request()
        self.inputs, self.outputs = signature(self.model.inputs), signature(self.model.outputs)
        found = executed(self.model)
        self.facts = {
            "runtime": "openvino", "version": ov.__version__, "build": ov.__version__, "isa": available()["isa"],
            "threads": str(threads or "auto"), "device": "cpu", "format": artifact.format,
            "layers": ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())),
        }  # fmt: skip
        if sparse:
            amx = "AMX" in self.facts["isa"].upper()
            why = "" if amx else "; this processor has no AMX: the zeros buy nothing here"
            self.facts["sparse weights"] = f"matrices of {sparse:.0%} zeros and more stay packed{why}"

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name to outputs by name, the first axis of each being the batch."""
        with self.lock:
            if self.model is None:
                raise BadInput("this session is closed: load the artifact again")
            self._fits(inputs)
            try:
                found = self.request.infer({name: np.ascontiguousarray(array) for name, array in inputs.items()})
            except Exception as error:  # the wheel's kinds have no common base but Exception
                shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in inputs.items())
                reason = " ".join(str(error).split())[:200]
                raise BadInput(f"{self.path.name} does not take these inputs: {shapes}\n{reason}") from error
            return {name_of(port): np.array(found[port]) for port in self.model.outputs}

    def _fits(self, inputs: dict[str, np.ndarray]) -> None:
        """Raise BadInput for a name or shape that is not the graph's: OpenVINO itself reads past such arrays."""
        for port in self.model.inputs:
            name, shape = name_of(port), port.get_partial_shape()
            if name not in inputs:
                raise BadInput(f"{self.path.name} does not take these inputs: '{name}' is missing")
            given = inputs[name].shape
            if not shape.compatible(ov.PartialShape(list(given))):
                raise BadInput(f"{self.path.name} does not take '{name}' of shape {list(given)}: it wants {shape}")

    def close(self) -> None:
        """Free the weights."""
        with self.lock:
            self.model = self.request = None


__all__ = ["accepts", "available", "load"]
