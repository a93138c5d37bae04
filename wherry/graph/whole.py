"""A quantized graph as an artifact: what is put to it at once, its manifest, and its weights decoded by foreign code.

Checks, each with its figure in the manifest; one that fails is a failed export:
    relative difference     outputs against the float graph's, on real inputs where there are any, at two batch sizes
    integer kernels         what ONNX Runtime really runs: planned in int8 must be run in int8
    by the specification    the same for the file with nothing fused: a processor or kernel that saturates is
                            farther from the float graph than this
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from wherry import cargo
from wherry.artifact import Artifact
from wherry.errors import Diverged
from wherry.graph import foreign

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint

Batches = list[dict[str, np.ndarray]]
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
DIFFERENCE_MOST = 0.7  # relative RMS: above it an output has little to do with the original's
OWN_MOST, OWN_FLOOR = 1.5, 0.02  # fused kernels may be so much farther off: ties fall the other way
INTEGER = (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger",
    "ConvInteger", "ConvIntegerToFloat", "DynamicQuantizeLSTM",
)  # fmt: skip
CHECKED = 4  # batches that are run


def check(what: str, value: float, unit: str, limit: float | None, note: str) -> dict[str, Any]:
    """One entry of the manifest."""
    entry = {"what": what, "value": value, "unit": unit, "limit": limit, "note": note}
    return {k: v for k, v in entry.items() if v is not None}


def agree(artifact: Artifact, one: Run, other: Run, limit: float, what: str) -> dict[str, Any]:
    """Check that two runs give the same outputs for random inputs at two batch sizes. Raises Diverged when not."""
    worst = max(difference(one(feeds), other(feeds)) for feeds in (artifact.example(1), artifact.example(3)))
    if not worst <= limit:
        raise Diverged(f"{artifact.main.name}: outputs differ by {worst:.3g} (relative RMS), above {limit}: {what}")
    return check("relative difference", worst, "", limit, f"{what}, two batch sizes, random inputs")


def manifest(
    checkpoint: "Checkpoint", plan: list[dict[str, Any]], checks: list[dict[str, Any]], form: str = "onnx",
    main: str = "model.onnx",
) -> dict[str, Any]:  # fmt: skip
    """The facts of a folder that holds a graph."""
    own = {"graph": True, "source": checkpoint.origin or checkpoint.name, "plan": plan, "checks": checks}
    return cargo.facts(checkpoint, form, main) | own | {"inputs": inputs_of(checkpoint.graph.path)}


def inputs_of(path: Path) -> dict[str, Any]:
    """{name: [dtype, shape]} of a graph's inputs; free axes as names."""
    out = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
        out[value.name] = [onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape]
    return out


def session(path: Path, optimized: Path | None = None, plain: bool = False) -> Any:
    """An ONNX Runtime session on the CPU; `plain`: every operator as the specification says, nothing fused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def executed(path: Path) -> tuple[Any, Counter[str]]:
    """A session, and how often it runs each operator of the graph that ONNX Runtime has made of the file."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        runtime = session(path, optimized)
        return runtime, Counter(n.op_type for n in onnx.load(optimized, load_external_data=False).graph.node)


def difference(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Relative RMS of the worst float output; infinite where one is not finite. Whole numbers are passed over."""
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.dtype.kind != "f" or not a.size:
            continue
        if not np.isfinite(b).all():
            return float("inf")
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a64)
        norm = float(np.sqrt((a64[finite] ** 2).mean())) if finite.any() else 0.0
        gap = float(np.sqrt(((a64 - b64)[finite] ** 2).mean())) if finite.any() else 0.0
        worst = max(worst, gap / norm if norm else gap)
    return worst


def checks(path: Path, original: Path, batches: Batches, integer: int) -> list[dict[str, Any]]:
    """All of them. integer: products that are planned in integers. Raises Diverged, naming the figure and its limit."""
    real = bool(batches)
    batches = batches[:CHECKED] or [Artifact(path.parent, {"inputs": inputs_of(path)}).example(2)]
    fused, nodes = executed(path)
    plain, source = session(path, plain=True), session(original)
    inputs = [value.name for value in source.get_inputs()]
    feeds = [{name: batch[name] for name in inputs} for batch in batches]
    one = {name: array[:1] if array.ndim else array for name, array in feeds[0].items()}
    same = len({len(a) for a in feeds[0].values() if a.ndim}) <= 1
    feeds = [*feeds, one] if same else feeds
    a, b, c = ([s.run(None, feed) for feed in feeds] for s in (source, fused, plain))
    far = max(difference(x, y) for x, y in zip(a, b, strict=True))
    said = max(difference(x, y) for x, y in zip(a, c, strict=True))
    kind = "real" if real else "random"
    what = f"float graph || ONNX Runtime, {len(feeds)} batches of {kind} inputs" + (
        ", one of a single row" if same else ""
    )
    limit = OWN_MOST * said + OWN_FLOOR
    if not far <= DIFFERENCE_MOST:
        raise Diverged(
            f"{path.name} is {far:.3g} (relative RMS) from the original, above {DIFFERENCE_MOST}.\n"
            "Leave the most sensitive layers out with ignore=, or take another activation_observer."
        )
    if not far <= limit:
        raise Diverged(
            f"{path.name}: on this processor's integer kernels it is {far:.3g} from the original, by the specification "
            f"{said:.3g} (relative RMS).\nWithout VNNI sums of int8 products saturate: use W8A16."
        )
    found = {kind: nodes[kind] for kind in INTEGER if nodes[kind]}
    if sum(found.values()) < integer:
        raise Diverged(
            f"{path.name}: {integer} products are planned in int8, ONNX Runtime runs {sum(found.values())} ({found}) so"
        )
    listed = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "none"
    left = sum(nodes[kind] for kind in ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"))
    out = [check("relative difference", far, "", DIFFERENCE_MOST, what)]
    out.append(
        check("relative difference by the specification", said, "", None, f"unfused; fused may be up to {limit:.3g}")
    )
    out.append(
        check("integer products", sum(found.values()), "", integer, f"of the executed graph: {listed}; {left} in float")
    )
    return out


def decode(artifact: Artifact) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the plan in float32 as [n, k], its codes decoded by ONNX Runtime's own operators."""
    from wherry.graph.source import load

    graph = load(artifact.main).graph
    for row in artifact.manifest["plan"]:
        name = row["name"]
        if name not in graph.layers:
            if name in graph.others:
                yield name, graph.read(name).float().numpy()
            continue
        layer = graph.layers[name]
        if layer.scales is None:
            yield name, graph.read(name).float().numpy()
            continue
        codes, scales = layer.value.const_value.numpy(), layer.scales.const_value.numpy().astype(np.float32)
        zeros = None if layer.zeros is None else layer.zeros.const_value.numpy()
        if layer.node.op_type == "MatMulNBits":
            facts = {key: int(layer.node.attributes[key].as_int()) for key in ("bits", "block_size", "N")}
            steps = scales.reshape(facts["N"], -1)
            if zeros is not None and facts["bits"] < 8:
                zeros = foreign.unpacked(zeros.reshape(facts["N"], -1), facts["bits"], steps.shape[1])
            yield name, foreign.blocked(codes, steps, zeros, facts["bits"], facts["block_size"])
            continue
        node = onnx.helper.make_node("DequantizeLinear", ["x", "scales", "zeros"], ["y"], axis=0)
        flat = scales.reshape(-1)
        constants = {"scales": flat, "zeros": np.zeros(len(flat), codes.dtype) if zeros is None else zeros.reshape(-1)}
        yield name, foreign.run(node, constants, layer.matrix(codes))
