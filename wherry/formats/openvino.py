"""OpenVINO IR: model.xml and model.bin, made from a graph model, the same integers inside.

Only graph models (ONNX) are converted: a transformers folder goes through ONNX first. Float weights are kept in
float32 unless `half` asks for fp16.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wherry import cargo
from wherry.artifact import Artifact
from wherry.errors import Corrupt, Diverged, Unsupported

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, Progress

MAIN = "model.xml"
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
WHOLE = ("linear", "convolution", "embedding")  # weights that must still be integers in the file
DIFFERENCE_MOST = 0.1  # relative RMS to the same graph in ONNX Runtime: ties in 8 bits fall the other way


def check(plan: "Plan") -> dict[str, str]:
    """Notes per tensor. Raises Unsupported for what is no graph model; Missing without the package."""
    import openvino  # noqa: F401

    if plan.checkpoint.graph is None:
        raise Unsupported(
            f"openvino takes graph models, and {plan.checkpoint.name} is a transformers folder.\n"
            "Draw it first: wherry capture MODEL -o GRAPH"
        )
    notes = {}
    for row in plan.taken():
        if row.role == "recurrent":
            notes[row.name] = "written as floats of the same values: OpenVINO's recurrent layers take no codes"
        elif row.scheme and row.scheme.activations is not None and row.scheme.activations.dynamic:
            notes[row.name] = "computed in float: this runtime has no kernel for dynamic int8 products"
    return notes


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress", half: bool = False) -> Artifact:
    """Write model.xml and model.bin into the empty folder `out`, reload them, compare, count the integer layers.

    Raises:
        Unsupported: an operator that OpenVINO does not convert. Diverged: it computes something else.
    """
    import openvino as ov

    from wherry.graph import whole

    progress(0, 2, "convert")
    try:
        model = converted(checkpoint, out)
    except Exception as error:  # the wheel's kinds have no common base but Exception
        reason = " ".join(str(error).split())[:200]
        raise Unsupported(f"OpenVINO {ov.__version__} does not convert {checkpoint.path}: {reason}") from error
    ov.save_model(model, str(out / MAIN), compress_to_fp16=half)
    cargo.beside(checkpoint.path, checkpoint.task, out)
    progress(1, 2, "reload and compare")
    manifest = whole.manifest(checkpoint, [], [], "openvino", MAIN)
    products, tables = decoders(core().read_model(str(out / MAIN)))
    coded = {*products, *tables}
    manifest["plan"] = [row for row in checkpoint.plan if row["name"] in coded]
    if lost := [
        row["name"] for row in checkpoint.plan if row["scheme"] and row["role"] in WHOLE and row["name"] not in coded
    ]:
        raise Diverged(f"OpenVINO's converter dropped the integers of {lost[0]} (and {len(lost) - 1} more)")
    manifest["checks"] = checks(Artifact(out, manifest), checkpoint, half)
    return Artifact.seal(out, **manifest)


def converted(checkpoint: "Checkpoint", out: Path) -> Any:
    """The graph in OpenVINO's memory; recurrent weights as floats."""
    import openvino as ov

    from wherry.graph import edit, source, tidy

    recurrent = {n: layer for n, layer in checkpoint.graph.layers.items() if layer.role == "recurrent" and layer.scales}
    if not recurrent:
        return ov.convert_model(str(checkpoint.graph.path))
    model = source.load(checkpoint.graph.path).graph
    graph = model.model.graph
    for name in recurrent:
        layer = model.layers[name]
        for i, value in enumerate(layer.node.inputs):
            if value is not None and source.stored_at(layer.node, i, value)[0] is layer.value:
                floats = model.read(name).decode().numpy().reshape(source.extents(layer.value))
                layer.node.replace_input_with(i, tidy.initializer(graph, f"{name}.decoded", floats))
    file = out / "float-recurrent.onnx"
    edit.write(model.model, file)
    try:
        return ov.convert_model(str(file))
    finally:
        for path in out.glob(f"{file.name}*"):
            path.unlink()


def checks(artifact: Artifact, checkpoint: "Checkpoint", half: bool) -> list[dict[str, Any]]:
    """Reload, run at two batch sizes, compare with ONNX Runtime; count layers by how they execute."""
    from wherry.graph import whole

    model = compiled(artifact.main)
    source = whole.session(checkpoint.graph.path)
    names = [value.name for value in source.get_outputs()]

    def infer(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = model(feeds)
        return [np.array(found[port]) for port in model.outputs]

    what = "ONNX Runtime || OpenVINO, the same integers"
    same = whole.agree(artifact, lambda feeds: source.run(names, feeds), infer, DIFFERENCE_MOST, what)
    kinds = executed(model)
    planned = sum(1 for row in checkpoint.plan if row["scheme"] and "A8" in row["scheme"])
    integer = sum(count for kind, count in kinds.items() if kind.endswith("int8"))
    if planned and not integer:
        raise Diverged(f"{planned} layers are planned in int8, OpenVINO runs none so: {dict(kinds)}")
    note = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [
        same,
        whole.check("integer products", integer, "", None, f"of the executed model: {note}"),
    ]


SPARSE_LEAST = 0.7  # zeros of a matrix from which on reading fewer bytes is worth unpacking them


def sparse_rate(manifest: dict[str, Any]) -> float:
    """The share of zeros from which on the CPU plugin shall keep integer matrices packed: 0, when none has so many.

    The plugin does so for int8 matrices alone, and on processors with AMX; elsewhere the property changes nothing.
    """
    shares = [row.get("sparsity") or 0.0 for row in manifest.get("plan", [])
              if row.get("scheme") and row["role"] == "linear"]  # fmt: skip
    return SPARSE_LEAST if any(share >= SPARSE_LEAST for share in shares) else 0.0


@functools.cache
def core() -> Any:
    """OpenVINO's registry, one for the whole process and never freed.

    Its CPU plugin gives the thread that first asks for it another stack for signals, and frees that stack when the last
    registry or model goes; gone in another thread, the next signal (Ctrl-C) is a segmentation fault (2026.4).
    """
    import openvino as ov

    return ov.Core()


def compiled(path: Path, threads: int = 0, sparse: float = 0.0) -> Any:
    """A model compiled for the CPU; what is float is computed in float32: bfloat16 would be another model.

    sparse: zeros from which on integer matrices stay packed in memory; 0: none.

    Raises:
        Unsupported: an operator that OpenVINO lacks. Corrupt: a damaged file.
    """
    import openvino as ov

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    if sparse:
        options["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = sparse
    try:
        return core().compile_model(core().read_model(str(path)), "CPU", options)
    except Exception as error:  # the wheel's kinds have no common base but Exception
        text = " ".join(str(error).split())[:300]
        if "OpConversionFailure" in text or "conversion" in text.lower():
            raise Unsupported(f"OpenVINO {ov.__version__} cannot run {path}: {text}") from error
        raise Corrupt(f"{path} is damaged, or its weights beside it are: {text}") from error


def executed(model: Any) -> dict[str, int]:
    """{"Convolution int8": 12, "FullyConnected f32": 1} of what the compiled model really runs."""
    out: dict[str, int] = {}
    for node in model.get_runtime_model().get_ops():
        info = node.get_rt_info()
        keys = [key for key in ("layerType", "primitiveType") if key in info]
        facts = {key: str(getattr(info[key], "value", info[key])) for key in keys}
        if facts.get("layerType") in PRODUCTS:
            how = facts.get("primitiveType", "").lower()
            name = f"{facts['layerType']} {'int8' if how.endswith(('_i8', '_u8')) else how.rsplit('_', 1)[-1]}"
            out[name] = out.get(name, 0) + 1
    return out


def decode(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Every quantized weight in float32 as [n, k]; products' weights decoded by OpenVINO's own operators."""
    import openvino as ov

    found, tables = decoders(core().read_model(str(artifact.main)))
    for name, node in found.items():
        steps = [value.get_source_output().get_node() for value in node.inputs()]
        scale = next(step for step in steps if step.get_type_name() == "Constant")
        axis = next((i for i, extent in enumerate(scale.get_output_shape(0)) if extent > 1), 0)
        small = core().compile_model(ov.Model([node.output(0)], [], name), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        weight = np.moveaxis(np.array(small({})[0]), axis, 0)
        yield name, np.ascontiguousarray(weight.reshape(len(weight), -1))
    for name, (codes, scales) in tables.items():
        yield name, codes.get_data().astype(np.float32) * scales.get_data().reshape(len(codes.get_data()), -1)


def decoders(model: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """{weight: the operator that multiplies its codes with their scales}, {table: (codes, scales)}."""
    end, named = "/dequantize", {op.get_friendly_name(): op for op in model.get_ops()}
    coded = [name.removesuffix(".codes") for name in named if name.endswith(".codes")]
    products = {n: named[n + end] for n in coded if n + end in named and named[n + end].get_type_name() == "Multiply"}
    tables = {
        n: (named[f"{n}.codes"], named[f"{n}.scales"]) for n in coded if f"{n}.scales" in named and n not in products
    }
    return products, tables


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    line = f"python -c \"import openvino as ov; m = ov.compile_model('{artifact.main}', 'CPU')\""
    return [line, f"wherry serve {artifact.path}"]


__all__ = ["check", "command", "decode", "save"]
