"""From the file to the module: read, infer shapes, build, try at a second batch."""

import os
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from torch import Tensor, fx

from wherry.errors import BadInput, Unsupported
from wherry.formats.onnx.torch_module import (  # noqa: F401 - each fills the table of operators
    arrange,
    attention,
    control,
    convolution,
    elementwise,
    indexing,
    matrix,
    microsoft,
    normalisation,
    pooling,
    quantized,
    recurrent,
    reduce,
    resize,
    sequences,
    shapes,
    signals,
)
from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.inference import infer
from wherry.formats.onnx.torch_module.names import clean
from wherry.formats.onnx.torch_module.reading import read
from wherry.formats.onnx.torch_module.table import TABLE
from wherry.formats.onnx.torch_module.values import DTYPES, Constant, from_array
from wherry.graph.proto import every_graph

TOLERANCE = 1e-4  # of the largest output, between two examples together and each alone


def module(source: str | os.PathLike | onnx.ModelProto, fixed: dict[str, Any], symbolic: bool) -> fx.GraphModule:
    """The module; see the package."""
    model = read(source)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if unknown := fixed.keys() - {i.name for i in model.graph.input}:
        raise BadInput(f"fixed={sorted(unknown)[0]} is not an input; these are: {inputs(model)}")
    model = written_out(model)
    infer(model)
    batch = fixed_batch(model, fixed) if symbolic else None
    net, builder = build(model, fixed, batch, symbolic)
    if batch is None:
        net.meta["batch"] = "as the file says" if symbolic else "as the file says (symbolic=False)"
    elif reason := second_batch(net, model, fixed, batch):
        net, builder = build(model, fixed, None, False)
        net.meta["batch"] = f"fixed at {batch}: {reason}"
    else:
        net.meta["batch"] = f"free: {batch} in the file, and two examples together give what each gives alone"
    net.meta["symbolic"] = dict(builder.changed)
    return net


def inputs(model: onnx.ModelProto) -> list[str]:
    """Names of the graph's inputs that are not initializers."""
    given = {t.name for t in model.graph.initializer}
    return [i.name for i in model.graph.input if i.name not in given]


def written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Operators that are not imported but that ONNX itself defines by others, as these others."""
    kinds = {(n.domain, n.op_type) for graph in every_graph(model.graph) for n in graph.node}
    lacking = sorted(k for k in kinds if ("" if k[0] == "ai.onnx" else k[0], k[1]) not in TABLE)
    if not lacking or any(onnx.defs.has(kind, domain) and defined(kind, domain) for domain, kind in lacking) is False:
        return model
    try:
        return onnx.inliner.inline_selected_functions(model, lacking, inline_schema_functions=True)
    except RuntimeError as error:
        names = ", ".join(kind for _, kind in lacking)
        raise Unsupported(f"{names} is not imported, and ONNX cannot write it with others: {error}") from error


def defined(kind: str, domain: str) -> bool:
    """Whether ONNX gives the operator as a function of others."""
    schema = onnx.defs.get_schema(kind, domain=domain)
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def build(model: onnx.ModelProto, fixed: dict[str, Any], batch: int | None, symbolic: bool) -> tuple[Any, Builder]:
    """The graph module, and what built it."""
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    builder = Builder(model.graph, opsets, symbolic=symbolic)
    builder.batch = batch
    builder.constants()
    for value in model.graph.input:
        if value.name in fixed:
            kind = DTYPES[value.type.tensor_type.elem_type]
            builder.env[value.name] = Constant(from_array(np.asarray(fixed[value.name]), kind), value.name)
        elif value.name not in builder.env:
            builder.env[value.name] = builder.graph.placeholder(clean(value.name))
    builder.build()
    builder.finish([o.name for o in model.graph.output])
    net = fx.GraphModule(builder.root, builder.graph, clean(model.graph.name).title().replace("_", "") or "Graph")
    net.graph.eliminate_dead_code()
    net.graph.lint()
    net.recompile()
    net.meta["outputs"] = [o.name for o in model.graph.output]
    net.meta["inputs"] = {n.target: n.meta.get("onnx", n.target) for n in net.graph.nodes if n.op == "placeholder"}
    return net.eval(), builder


def fixed_batch(model: onnx.ModelProto, fixed: dict[str, Any]) -> int | None:
    """The first dimension of all inputs, when it is one number, and every other dimension is a number too."""
    found = set()
    for value in model.graph.input:
        if value.name in fixed or value.name not in inputs(model):
            continue
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions or any(d.dim_value <= 0 for d in dimensions):
            return None
        found.add(dimensions[0].dim_value)
    return found.pop() if len(found) == 1 else None


def second_batch(net: fx.GraphModule, model: onnx.ModelProto, fixed: dict[str, Any], batch: int) -> str:
    """Run two batches alone and together. Returns why they differ, or nothing."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[sample(v, generator) for v in model.graph.input if v.name in inputs(model) and v.name not in fixed]
             for _ in range(2)]  # fmt: skip
    try:
        with torch.no_grad():
            alone = [flat(net.forward(*given)) for given in pairs]
            both = flat(net.forward(*[torch.cat(parts) for parts in zip(*pairs, strict=True)]))
            return next(filter(None, map(differ, *alone, both)), "")
    except Exception as error:  # whatever torch, or a layer, says to sizes that it cannot take
        return f"it does not run at {2 * batch}: {str(error)[:120]}"


def differ(first: Any, second: Any, together: Any) -> str:
    """How an output of two batches together differs from those of each alone, or nothing."""
    if not isinstance(together, Tensor) or not first.dim() or together.shape[0] != 2 * first.shape[0]:
        return f"an output of shape {list(getattr(first, 'shape', []))} does not grow with it"
    wanted = torch.cat([first, second])
    if together.shape != wanted.shape:
        return f"an output of shape {list(first.shape)} becomes {list(together.shape)}"
    if not wanted.numel():
        return ""
    gap = (together.double() - wanted.double()).abs().nan_to_num(0).max().item()
    size = wanted.double().nan_to_num(0, 0, 0).abs().max().item()
    return f"two examples together differ by {gap:.2g} from each alone" if gap > TOLERANCE * max(size, 1e-6) else ""


def sample(value: onnx.ValueInfoProto, generator: torch.Generator) -> Tensor:
    """Random numbers of an input's type and shape: normal floats, integers 0 and 1."""
    kind = value.type.tensor_type
    shape, dtype = [d.dim_value for d in kind.shape.dim], DTYPES[kind.elem_type]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def flat(outputs: Any) -> list[Tensor]:
    """Outputs as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
