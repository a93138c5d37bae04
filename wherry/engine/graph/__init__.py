"""Graph: a model that is an ONNX graph, quantized as a whole: ranges of edges, integers for weights, QDQ in the file.

    ranges by calibration (observe) -> which edges are integer (place) -> codes (solve of the recipe's passes)
    -> biases corrected -> drawn into the graph (draw) -> written, sealed, checked (formats/onnx)

Passes that see data get, for each weight [n, k], the rows that it is multiplied with: patches of k numbers for a Conv.
Memory: the graph in float32 twice, the edges of one batch. Cost: three runs of the float graph over the batches.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from wherry import cargo
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.engine import share
from wherry.engine.graph import bias, draw, observe
from wherry.engine.graph.place import PRODUCTS, Places, place
from wherry.engine.stream import zeroed
from wherry.engine.unit import fact, sound
from wherry.errors import Diverged
from wherry.graph import edit, tidy, whole
from wherry.graph.source import Graph, Layer, constant, extents
from wherry.ops import grid
from wherry.recipe import Pass, Plan, PlanRow
from wherry.scheme import Group, QTensor

Progress = Callable[[int, int, str], None]
FAR, FAR_FLOOR = 3.0, 0.01  # error of a solved weight, times that of rounding: beyond it, it is another weight
ROWS_MOST = 1 << 14  # rows of one batch that a statistic is given, drawn evenly: patches repeat themselves


def quantize(
    plan: Plan, batches: list[dict[str, np.ndarray]], result: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Quantize by the plan, write a folder, check it at once: facts of its tensors, and the checks.

    Raises:
        Diverged: the file did not pass its checks. BadInput: data that do not fit the graph.
    """
    checkpoint = plan.checkpoint
    result.mkdir(exist_ok=True, parents=True)
    seen = batches if plan.recipe.calibrated else []  # those of an earlier stage are for the checks alone
    facts, integer = run(plan, seen, result, progress)
    progress(1, 1, "reload and compare")
    checks = whole.checks(result / "model.onnx", checkpoint.graph.path, batches, integer)
    cargo.beside(checkpoint.path, checkpoint.task, result)
    return facts, checks


def prune(plan: Plan, batches: list[dict[str, np.ndarray]], result: Path, progress: Progress) -> list[dict[str, Any]]:
    """Zero weights of the float graph by the plan, and write it as a graph's folder; facts of its tensors."""
    checkpoint = plan.checkpoint
    result.mkdir(exist_ok=True, parents=True)
    for row in plan.rows:
        if row.step >= 0:
            sound(row.name, checkpoint.weight(row.name))
    share.run(plan, None, batches, progress)
    source: Graph = checkpoint.graph.copy()
    rows = {row.name: row for row in plan.rows if row.step >= 0}
    watched = {name: step for name, row in rows.items() if hasattr(step := plan.recipe.steps[row.step], "observe")}
    stats: dict[str, Any] = {}
    if watched:
        float_file = result / "float.onnx"
        edit.write(source.model, float_file)
        stats = statistics(float_file, source, watched, batches, progress)
        for file in (float_file, float_file.with_name(float_file.name + ".data")):
            file.unlink(missing_ok=True)
    facts = []
    for i, row in enumerate(plan.rows):
        w, notes = source.read(row.name), list[str]()
        assert isinstance(w, torch.Tensor)
        result_w = w
        if row.name in rows:
            progress(i, len(plan.rows), row.name)
            if row.name in watched and row.name not in stats:
                notes.append("its inputs differ from row to row, or none reached it: pruned by magnitude")
            result_w = zeroed(plan, row, w, stats.get(row.name), notes)
            layer = source.layers[row.name]
            shape = extents(layer.value)
            array = layer.stored(result_w.numpy(), shape).astype(constant(layer.value).dtype)
            layer.value.const_value = ir.tensor(array, name=row.name)
        facts.append(fact(row, w, result_w, notes))
    edit.write(source.model, result / "model.onnx")
    cargo.beside(checkpoint.path, checkpoint.task, result)
    return facts


def compared(given: Checkpoint, result: Path, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """How far the outputs of a pruned or remade graph are from those of the graph before: a figure without a limit.

    Raises Diverged where they are not finite.
    """
    made = Checkpoint.open(result)
    example = Artifact(result, {"inputs": whole.inputs_of(result / "model.onnx")}).example
    feeds = batches[: whole.CHECKED] or [example(1), example(3)]
    one, other = whole.session(given.graph.path), whole.session(made.graph.path)
    wanted = [value.name for value in one.get_inputs()]
    far = max(
        whole.difference(one.run(None, given_), other.run(None, given_))
        for given_ in ({name: batch[name] for name in wanted} for batch in feeds)
    )
    if not np.isfinite(far):
        raise Diverged(f"{given.name}: after the recipe an output is NaN or infinite")
    kind = "real" if batches else "random"
    return [whole.check("relative difference", far, "", None, f"graph before || graph after, {kind} inputs")]


def described(given: Checkpoint, result: Path, checks: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's facts of a finished folder."""
    found = whole.manifest(given, [], checks)
    return found | {"inputs": whole.inputs_of(result / "model.onnx")}


def run(
    plan: Plan, batches: list[dict[str, np.ndarray]], result: Path, progress: Progress
) -> tuple[list[dict[str, Any]], int]:
    """Write `result/model.onnx` by the plan. Returns the plan as facts, and how many products are integer."""
    source: Graph = plan.checkpoint.graph.copy()  # changed below
    if batches:
        float_file = result / "float.onnx"
        edit.write(source.model, float_file)
    graph = source.model.graph
    rows = {row.name: row for row in plan.taken()}
    steps = plan.recipe.steps
    kinds = {name: kind(row) for name, row in rows.items()}
    uses = {name: [use.node for use in source.layers[name].value.uses()] for name in rows}
    static = {node for name, k in kinds.items() if k == "static" for node in uses[name] if node.op_type in PRODUCTS}
    places = place(graph, static, any(step.attention for step in steps)) if static else Places()
    watched = {name: step for name, row in rows.items() if hasattr(step := steps[row.step], "observe")}
    notes: dict[str, list[str]] = {name: [] for name in rows}
    seen: observe.Seen | None = None
    stats: dict[str, Any] = {}
    if batches:
        seen, stats = calibrate(float_file, source, places, static, steps, watched, batches, progress)
        for file in (float_file, float_file.with_name(float_file.name + ".data")):
            file.unlink(missing_ok=True)
    facts, results = [], {}
    for i, (name, row) in enumerate(rows.items()):
        progress(i, len(rows), name)
        w = source.read(name)
        assert isinstance(w, torch.Tensor)
        step = replace(steps[row.step], scheme=row.scheme or steps[row.step].scheme, portable=False)
        q = solved(step, w.float(), row, stats.get(name), name in watched, notes[name])
        results[name] = replace(q, scheme=q.scheme.by_rows)
        facts.append(fact(row, w, q, notes[name]))
    if seen is not None and any(step.bias_correction for step in steps):
        bias.correct(source, static, results, seen)
    scales = {}
    if seen is not None:
        observers = next((step.ranging(True) for step in steps if step.scheme.activations), "mse")
        ranges = {name: seen.range(name, observers) for name in places.names()}
        scales = draw.activations(graph, places, ranges)
    write(source, results, kinds, scales, places, notes)
    for entry in facts:
        entry["notes"] = [*rows[entry["name"]].notes, *notes[entry["name"]]]
    for row in plan.rows:  # biases that became integers are part of their layers
        if row.name in source.others and row.name in graph.initializers and row.name not in rows:
            kept = torch.from_numpy(np.array(constant(source.others[row.name])))
            facts.append(fact(row, kept, kept, []))
    small = any(q.scheme.bits == 2 and not isinstance(q.scheme.grain, Group) for q in results.values())
    graph.opset_imports[""] = max(source.opset, draw.OPSET_INT2 if small else draw.OPSET)
    source.model.ir_version = max(source.model.ir_version, draw.IR_INT2 if small else 10)
    edit.write(source.model, result / "model.onnx")
    dynamic = [use for name, k in kinds.items() if k == "dynamic" for use in uses[name]]
    return facts, len(places.layers) + len(dynamic)


def kind(row: PlanRow) -> str:
    """How a weight is drawn: "static", "dynamic" or "weights"."""
    assert row.scheme
    if row.scheme.activations is None or row.role not in ("linear", "convolution"):
        return "weights"
    return "dynamic" if row.scheme.activations.dynamic else "static"


def solved(step: Pass, w: torch.Tensor, row: PlanRow, stat: Any, watched: bool, notes: list[str]) -> QTensor:
    """Codes of one weight; rounded to nearest, with a remark, where its inputs do not tell enough to do better."""
    if not watched:
        return step.solve(w)
    assert row.scheme
    nearest = grid.encode(w, row.scheme, *grid.fit(w, row.scheme, None))
    if stat is None:
        notes.append("no calibration input reached it: rounded to nearest")
        return nearest
    q = step.solve(w, stat, notes)
    far, near = (float((x.decode() - w).norm() / w.norm().clamp(min=1e-30)) for x in (q, nearest))
    if far <= FAR * near + FAR_FLOOR:
        return q
    notes.append(
        f"its inputs are nearly dependent, {step.method} went {far / near:.0f} times as far as rounding: rounded"
    )
    return nearest


def calibrate(
    file: Path, source: Graph, places: Places, static: set[ir.Node], steps: tuple[Pass, ...],
    watched: dict[str, Pass], batches: list[dict[str, np.ndarray]], progress: Progress,
) -> tuple[observe.Seen, dict[str, Any]]:  # fmt: skip
    """Ranges of the placed edges, means of layers' inputs, statistics of the passes."""
    observers = {step.ranging(True) for step in steps if step.scheme.activations}
    means = {}
    for node in static:
        if node.op_type != "MatMul":
            means[edge_of(node)] = 1 if node.op_type == "Conv" else -1
    seen = observe.observe(file, places.names(), batches, observers != {"minmax"}, means, progress)
    stats: dict[str, Any] = {}
    if watched:
        stats = statistics(file, source, watched, batches, progress)
    return seen, stats


def statistics(
    file: Path, source: Graph, watched: dict[str, Pass], batches: list[dict[str, np.ndarray]], progress: Progress
) -> dict[str, Any]:
    """What the passes gather of each weight's inputs."""
    stats: dict[str, Any] = {}
    edges = {name: edge_of(source.layers[name].node) for name in watched
             if source.layers[name].role in ("linear", "convolution")}  # fmt: skip
    session, names = observe.exposing(file, list(edges.values()))
    for i, batch in enumerate(batches):
        progress(i, len(batches), "statistics")
        values = dict(zip(names, observe.run(session, names, batch), strict=True))
        for name, edge in edges.items():
            x = patches(torch.from_numpy(np.ascontiguousarray(values[edge])), source.layers[name])
            step: Any = watched[name]
            if x is not None:
                stats[name] = step.observe(stats.get(name), x)
    return stats


def patches(x: torch.Tensor, layer: Layer) -> torch.Tensor | None:
    """What the rows of a weight [n, k] are multiplied with: [rows, k]; None where that differs from row to row."""
    node = layer.node
    if node.op_type in ("MatMul", "Gemm"):
        flat = x.reshape(-1, x.shape[-1])
    elif node.op_type == "Conv" and x.ndim == 4 and tidy.attribute(node, "group", 1) == 1:
        size = extents(layer.value)[2:]
        pads = list(tidy.attribute(node, "pads", [0, 0, 0, 0]))
        x = torch.nn.functional.pad(x, (pads[1], pads[3], pads[0], pads[2]))
        dilation, stride = (tuple(tidy.attribute(node, key, [1, 1])) for key in ("dilations", "strides"))
        columns = torch.nn.functional.unfold(x, size, dilation, 0, stride)
        flat = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    else:
        return None
    return flat[:: max(1, len(flat) // ROWS_MOST)]


def edge_of(node: ir.Node) -> str:
    """Name of the edge that a layer reads."""
    assert node.inputs[0] is not None
    return str(node.inputs[0].name)


def write(
    source: Graph, results: dict[str, QTensor], kinds: dict[str, str], scales: dict[ir.Value, float], places: Places,
    notes: dict[str, list[str]],
) -> None:  # fmt: skip
    """Draw all weights and biases."""
    graph = source.model.graph
    tokens: draw.Tokens = {}
    by_name = {f"{value.name}.rounded": scale for value, scale in scales.items()}
    for name, q in results.items():
        layer = source.layers[name]
        if layer.role == "embedding":
            if note := draw.table(graph, name, layer, q):
                notes[name].append(note)
        elif kinds[name] == "dynamic":
            draw.dynamic(graph, name, layer, q, tokens)
        elif isinstance(q.scheme.grain, Group):
            draw.blocked(graph, name, layer, q)
        elif layer.node not in places.layers:
            draw.folded(graph, name, layer, q, list(layer.value.uses()))
            draw.detach(graph, layer.value)
        else:
            users = [use.node for use in layer.value.uses()]
            w_scale = tidy.constant(draw.weight(graph, name, layer, q))
            assert w_scale is not None
            for node in users:
                if node in places.layers and node.op_type in ("Conv", "Gemm") and node.inputs[0] is not None:
                    note = draw.biases(graph, node, by_name[edge_of(node)], w_scale)
                    if note:
                        notes[name].append(note)
        if kinds[name] == "static" and layer.node not in places.layers:
            notes[name].append(f"no integer {layer.node.op_type} on this runtime: the product runs in float")
