"""Redraw: a model that is an ONNX graph as a torch module that can be changed, and back to a graph model's folder."""

import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wherry.capture import capture
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.formats.onnx.torch_module import module as imported


class Drawn:
    """An imported graph. module: fx module, its arguments are `names` in the order of the file's inputs `inputs`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.graph.quantized:
            raise BadInput(f"{checkpoint.path} is quantized already; prune the float model that it was made from")
        self.task = checkpoint.task
        net: Any = imported(checkpoint.graph.path)
        self.module = net
        self.inputs = [str(value.name) for value in checkpoint.graph.model.graph.inputs]
        self.names = []
        for node, name in zip(net.graph.find_nodes(op="placeholder"), self.inputs, strict=True):
            node.target = name if name.isidentifier() and not keyword.iskeyword(name) else node.target
            self.names.append(str(node.target))
        net.recompile()  # the next file's inputs have the same names
        self.outputs = list(net.meta["outputs"])

    def called(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A batch by the file's names as arguments of the module."""
        return {to: torch.as_tensor(batch[name]) for to, name in zip(self.names, self.inputs, strict=True)}

    def save(self, out: Path, example: Mapping[str, Any]) -> None:
        """Write model.onnx and task.json into the folder `out`. example: a batch by the file's names."""
        inputs = self.called(example)
        if len(next(iter(inputs.values()))) < 2:
            inputs = {name: torch.cat([x, x]) for name, x in inputs.items()}
        axes = {
            to: {axis: say for axis, say in self.task.axes.get(name, {}).items() if axis}
            for to, name in zip(self.names, self.inputs, strict=True)
        }
        out.mkdir(parents=True, exist_ok=True)
        inner = out / "graph"
        capture(self.module.eval(), inner, inputs, self.task, axes, self.outputs)
        for file in sorted(inner.iterdir()):
            file.rename(out / file.name)
        inner.rmdir()
