"""Language models as ONNX: onnxruntime-genai's builder draws the graph, every weight in it is placed by us.

Idea:   the builder gets a module whose quantized weights are memory that nobody has touched, so that drawing costs
        no memory; where each initializer comes from is read off its address, not guessed from its name. Then every
        MatMul with a quantized weight becomes a MatMulNBits that holds our codes, and the embedding a
        GatherBlockQuantized; a tied head reads the very same codes.
Cost:   memory: the stored weights once, and the largest one decoded; time: seconds.
Fails:  Unsupported when a quantized weight finds no place in the graph (a builder that fuses or slices weights).
"""

import contextlib
import io
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from wherry.checkpoint import Checkpoint, put
from wherry.errors import Unsupported
from wherry.formats.onnx.legal import architecture, integer
from wherry.graph import edit
from wherry.graph.blocks import Blocks, blocks
from wherry.scheme import QTensor

LAST = "logits_from"  # optional input: the first position whose logits are wanted; runtimes that prefill send -1


@dataclass(frozen=True)
class Origin:
    """Where an initializer comes from: a weight's name, and whether it is transposed."""

    name: str
    transposed: bool


@dataclass
class Drawing:
    """The builder's graph, and the origin of its initializers."""

    model: ir.Model
    builder: Any
    origins: dict[str, Origin] = field(default_factory=dict)


def build(checkpoint: Checkpoint, out: Path, exact: bool) -> None:
    """Write model.onnx, model.onnx.data and genai_config.json into `out`, where the tokenizer's files are already.

    exact: float32 activations (4 bits and less), or int8 in two halves (8 bits: about 16 bits); else plain int8.
    """
    drawing = draw(checkpoint, out)
    place(drawing, checkpoint, 0 if exact else 4)
    if exact:
        edit.halve(drawing.model.graph)
    edit.write(drawing.model, out / "model.onnx")


def draw(checkpoint: Checkpoint, out: Path) -> Drawing:
    """Let the builder draw the graph of the checkpoint's architecture, with no weights read."""
    name = architecture(checkpoint.config)
    stop = checkpoint.task.stop
    if not stop:
        raise Unsupported(f"{checkpoint.name} names no token that ends an answer; add eos_token_id to its config.json")
    module = checkpoint.skeleton()
    names: dict[int, str] = {}
    values: dict[bytes, list[str]] = {}  # small float weights by content: the builder adds 0 to each norm
    tensors: dict[str, torch.nn.Parameter] = {}
    for parameter, weight in checkpoint.places(module).items():
        if weight not in tensors:
            quantized = checkpoint.scheme(weight) is not None
            value = torch.empty(checkpoint.shape(weight)) if quantized else checkpoint.weight(weight)
            tensors[weight] = torch.nn.Parameter(value, requires_grad=False)
            names[value.data_ptr()] = weight
            if value.ndim == 1:
                values.setdefault(value.numpy().tobytes(), []).append(weight)
        put(module, parameter, tensors[weight])
    origins: dict[str, Origin] = {}
    with quiet():
        import onnxruntime_genai.models.builder as genai

        class Drawn(getattr(genai, name)):  # type: ignore[misc]
            """The builder's own class, with our module for its weights."""

            def load_weights(self, input_path: str) -> torch.nn.Module:
                return module

            def make_initializer(self, tensor: Any, /, name: str, **options: Any) -> None:
                weight = names.get(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else None
                if weight and tensor.numel() == tensors[weight].numel():
                    origins[name] = Origin(weight, tensor.ndim == 2 and tensor.stride() != tensors[weight].stride())
                elif isinstance(tensor, torch.Tensor) and tensor.ndim == 1 and tensor.dtype == torch.float32:
                    if same := values.get(tensor.detach().numpy().tobytes()):
                        origins[name] = Origin(same.pop(0), False)
                super().make_initializer(tensor, name, **options)

            def resolve_special_token_ids(self, config: Any, extra_kwargs: Any) -> tuple[int, list[int], int]:
                first = config.bos_token_id
                pad = config.pad_token_id
                return stop[0] if first is None else first, list(stop), stop[0] if pad is None else pad

        config = checkpoint.hf_config
        config.architectures = checkpoint.config["architectures"]
        builder = Drawn(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(out), {"fuse_qkv": False})
        builder.make_model("")
        builder.make_genai_config(config, {}, str(out))
    return Drawing(builder.model, builder, origins)


def place(drawing: Drawing, checkpoint: Checkpoint, level: int) -> None:
    """Put every quantized weight into the graph as codes; name the float ones after their weight.

    level: accuracy level of MatMulNBits: 0 = activations stay float32, 4 = they are rounded to int8.
    """
    graph = drawing.model.graph
    sources = [origin.name for origin in drawing.origins.values()]
    shared: dict[str, Blocks] = {}
    thin: dict[str, list[np.ndarray]] = {}
    placed: set[str] = set()

    def stored(name: str) -> Blocks:
        if name in shared:
            return shared[name]
        tensor = checkpoint.tensor(name)
        assert isinstance(tensor, QTensor)
        if tensor.scheme.activations is not None:
            integer(tensor.scheme, tensor.scheme.activations, generator=True)
        value = blocks(tensor)
        if tensor.left is not None and tensor.right is not None:
            thin[name] = [tensor.left.numpy(), tensor.right.numpy()]
        if sources.count(name) > 1:
            shared[name] = value
        return value

    for node in list(graph):
        weight = next((v for v in node.inputs if v is not None and v.name in drawing.origins), None)
        if weight is None or weight.name is None:
            continue
        origin = drawing.origins[weight.name]
        if checkpoint.scheme(origin.name) is None:
            continue
        value = stored(origin.name)
        if node.op_type == "MatMul" and node.inputs[1] is weight and origin.transposed:
            x = node.inputs[0]
            assert x is not None
            y = edit.linear(node, x, origin.name, value, level)
            if origin.name in thin:
                y = edit.corrected(node, x, y, origin.name, *thin.pop(origin.name))
            edit.replace(node, y)
        elif node.op_type == "Gather" and node.inputs[0] is weight and not origin.transposed:
            ids = node.inputs[1]
            assert ids is not None
            edit.replace(node, edit.lookup(node, ids, origin.name, value))
        else:
            raise Unsupported(
                f"onnx: {origin.name} is used by {node.op_type}, which has no form with codes; leave it out by ignore="
            )
        placed.add(origin.name)
    wanted = {name for name in checkpoint.names() if checkpoint.scheme(name) is not None}
    left = sorted(wanted - placed)
    if left:
        raise Unsupported(
            f"onnx: {len(left)} quantized weights have no place in the graph (the first: {left[0]}); leave them out"
        )
    name_floats(drawing)
    last_rows(graph)


def name_floats(drawing: Drawing) -> None:
    """Call float initializers by their weight's name; a tied float head reads the embedding instead of a copy."""
    graph = drawing.model.graph
    for old, origin in drawing.origins.items():
        if old not in graph.initializers:
            continue
        value = graph.initializers.pop(old)
        if origin.transposed and origin.name in graph.initializers:
            ((node, _),) = value.uses()
            x = node.inputs[0]
            assert x is not None
            shared = graph.initializers[origin.name]
            y = edit.call(node, f"{edit.MICROSOFT}::FusedMatMul", [x, shared], f"{origin.name}/FusedMatMul", transB=1)
            edit.replace(node, y)
            continue
        value.name = origin.name + (edit.TRANSPOSED if origin.transposed else "")
        graph.register_initializer(value)


def last_rows(graph: ir.Graph) -> None:
    """Cut the rows that go into the head at the optional input `logits_from`: 0, the default, keeps all of them."""
    node = graph.outputs[0].producer()
    while node is not None and node.op_type not in ("MatMul", "MatMulNBits", "FusedMatMul"):
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node is None or graph.outputs[0].name != "logits":
        raise Unsupported("onnx: the builder's graph has no head that ends in logits")
    x = node.inputs[0]
    assert x is not None
    start = edit.constant(graph, LAST, torch.zeros(1, dtype=torch.int64).numpy())
    graph.inputs.append(start)
    ends = edit.integers(graph, 2**62)
    rows = edit.call(node, "Slice", [x, start, ends, edit.integers(graph, 1)], "logits_from/Slice")
    rows.shape, rows.type = x.shape, x.type
    node.replace_input_with(0, rows)


@contextlib.contextmanager
def quiet() -> Any:
    """Keep other people's printing, logging and warnings off the terminal, and their code off the network."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    level = logging.root.manager.disable
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            yield
    finally:
        logging.disable(level)
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
