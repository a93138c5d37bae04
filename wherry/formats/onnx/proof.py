"""What an export is put to at once, before anyone calls it an artifact: reloaded, run, compared, counted.

Each check is a dict {what, value, unit, limit, note} in the manifest under `checks`. One that fails raises.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from wherry.checkpoint import Checkpoint
from wherry.errors import Corrupt, Diverged
from wherry.formats.onnx.encoder import Pooled
from wherry.graph import edit
from wherry.graph.whole import check, executed
from wherry.graph.whole import session as session_of
from wherry.scheme import QTensor

LIMITS = {True: {"kl": 1e-3, "cosine": 1e-4}, False: {"kl": 5e-2, "cosine": 1e-2}}  # by `exact`
TIE = 0.05  # cosine distance that one moved code may cost one sentence: 4e-3 seen in MiniLM
LARGE = 4096  # values; a float tensor above it must be a weight that the plan leaves float
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
UNUSED = ("pooler.", "position_ids", "rotary_emb.inv_freq")
OWN = (edit.SCALES, ".steps", edit.LEFT, edit.RIGHT)  # floats that belong to codes
CACHES = {"cos_cache", "sin_cache"}  # rotary positions, drawn by the builder


def holds(checkpoint: Checkpoint, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every quantized weight is there as codes, once, and no float copy of one is. Raises Corrupt when not.

    Returns checks, and the plan without the weights that the task does not use (a pooler, stored positions).
    """
    model = onnx.load(path, load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    quantized = {name for name in checkpoint.names() if checkpoint.scheme(name) is not None}
    coded = {name.removesuffix(edit.CODES) for name in tensors if name.endswith(edit.CODES)}
    if coded != quantized:
        name = sorted(coded ^ quantized)[0]
        raise Corrupt(f"{path}: {name} {'is' if name in coded else 'is not'} stored as codes, against the plan")
    free = set(checkpoint.names()) - quantized
    for name, tensor in tensors.items():
        of = name.removesuffix(edit.TRANSPOSED)
        large = tensor.data_type in FLOATS and np.prod(tensor.dims, dtype=np.int64) > LARGE
        if large and of not in free and name not in CACHES and not name.endswith(OWN):
            raise Corrupt(
                f"{path}: {name} holds {list(tensor.dims)} floats that are not in the plan: a second copy of a weight"
            )
    there = {name.removesuffix(edit.TRANSPOSED) for name in tensors} | coded
    left = sorted(free - there)
    if wrong := [name for name in left if not any(word in name for word in UNUSED)]:
        raise Corrupt(f"{path}: {wrong[0]} is not in the file, against the plan")
    out = [check("tensors with codes", len(coded), "", None, "each once, no float copy of any in the file")]
    if left:
        out.append(check("left out", len(left), "", None, f"not used by this task: {', '.join(left)}"))
    return out, [row for row in checkpoint.plan if row["name"] not in left]


def fused(path: Path, wanted: int) -> list[dict[str, Any]]:
    """Count the operators that ONNX Runtime makes of the graph. Raises Diverged when int8 products run in float."""
    _, nodes = executed(path)
    kinds = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulInteger")
    found = {kind: nodes[kind] for kind in kinds if nodes[kind]}
    if sum(found.values()) != wanted:
        raise Diverged(
            f"{path}: {wanted} layers are planned in int8, ONNX Runtime runs {sum(found.values())} ({found}) so"
        )
    note = ", ".join(f"{count} {kind}" for kind, count in found.items())
    return [check("int8 products", wanted, "", wanted, f"of the optimized graph: {note}")]


def generator(checkpoint: Checkpoint, path: Path, exact: bool) -> list[dict[str, Any]]:
    """Compare logits with the decoded torch module: one pass over a text, and in two parts through the key-value cache.

    Raises Diverged above the limits, or at a value that is not a number. Cost: the module in float32 in memory.
    """
    tokens = [t for text in checkpoint.task.examples() * 2 for t in checkpoint.task.encode(text)]
    tokens = tokens[: checkpoint.task.max_length]
    with torch.no_grad():
        reference = checkpoint.module()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()
    reference = torch.log_softmax(reference, -1).numpy()
    session = session_of(path)
    past = {i.name: np.zeros((1, i.shape[1], 0, width(checkpoint)), np.float32) for i in session.get_inputs()[2:]}
    names = [o.name for o in session.get_outputs()]

    def run(part: list[int], past: dict[str, np.ndarray], seen: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        mask = np.ones((1, seen + len(part)), np.int64)
        out = dict(
            zip(names, session.run(names, {"input_ids": np.array([part]), "attention_mask": mask, **past}), strict=True)
        )
        return out.pop("logits")[0], {name.replace("present", "past_key_values"): v for name, v in out.items()}

    whole, _ = run(tokens, past, 0)
    cut = len(tokens) // 2
    first, past = run(tokens[:cut], past, 0)
    second, _ = run(tokens[cut:], past, cut)
    out = []
    for what, logits in (("kl", whole), ("kl in two parts", np.concatenate([first, second]))):
        other = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
        kl = float((np.exp(reference) * (reference - other)).sum(-1).mean())
        limit = LIMITS[exact]["kl"]
        if not kl <= limit:
            raise Diverged(f"{path}: {what} {kl:.3g} nats per token against the decoded torch module, above {limit:g}")
        agree = float((reference.argmax(-1) == other.argmax(-1)).mean())
        note = f"decoded torch module || ONNX Runtime, {len(tokens)} tokens, top-1 {agree:.1%}"
        out.append(check(what, kl, "nats/token", limit, note))
    return out


def width(checkpoint: Checkpoint) -> int:
    """Numbers per attention head."""
    config = checkpoint.config
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def encoder(checkpoint: Checkpoint, path: Path, exact: bool) -> list[dict[str, Any]]:
    """Compare embeddings with the decoded torch module in float64, its activations rounded as planned, at other shapes.

    Where activations are rounded, a tie that falls the other way moves one code, and that sentence with it: so the
    median of the sentences is held to the narrow limit there, and the worst to TIE.

    Raises Diverged when a cosine falls below the limit, or is not a number.
    """
    task, rounding = checkpoint.task, integer_layers(checkpoint) > 0
    module = checkpoint.module()
    round_inputs(module, checkpoint)
    pooled = Pooled(module, task).eval().double()
    session = session_of(path)
    words = " ".join(task.examples()).split()
    texts = [" ".join(words[i : i + n]) for n in (3, 7, len(words)) for i in range(0, len(words) - n + 1, 3)]
    distances: list[float] = []
    for batch in ([texts[0]], texts[1:]):
        inputs = task.batch(batch)
        with torch.no_grad():
            a = pooled(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
        b = session.run(["embedding"], inputs)[0].astype(np.float64)
        cosine = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)
        distances += np.where(np.isfinite(cosine), np.maximum(1 - cosine, 0), np.inf).tolist()
    limit, worst, median = LIMITS[exact]["cosine"], max(distances), float(np.median(distances))
    judged = median if rounding else worst
    if not judged <= limit or not worst <= TIE:
        raise Diverged(
            f"{path}: embeddings differ from the decoded torch module's by 1 - cosine = {median:.3g} in the median "
            f"(limit {limit:g}), {worst:.3g} in the worst (limit {TIE:g})"
        )
    name, note = (
        "median" if rounding else "worst",
        f"{len(texts)} sentences in two batches, torch with the same rounding",
    )
    return [check("cosine distance", judged, "", limit, f"{name} of {note}; worst {worst:.2g}")]


def round_inputs(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Let each layer with an activation scheme see its input rounded as that scheme says."""
    places = checkpoint.places(module)
    for path, child in module.named_modules():
        weight = places.get(f"{path}.weight")
        scheme = checkpoint.scheme(weight) if weight else None
        if weight is None or scheme is None or scheme.activations is None:
            continue
        tensor = checkpoint.tensor(weight)
        assert isinstance(tensor, QTensor)

        def rounded(
            _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], t: QTensor = tensor
        ) -> tuple[torch.Tensor, ...]:
            x = inputs[0]
            if t.activation_scale is None or t.activation_zero is None:
                scale = (x.abs().amax(-1, keepdim=True) * (1 / 127)).clamp(min=1e-30)
                return (torch.round(x / scale).clamp(-128, 127) * scale, *inputs[1:])
            zero, scale = t.activation_zero.to(x.dtype), t.activation_scale.to(x.dtype)
            q = (torch.round(x / scale) + zero).clamp(-128, 127)
            return ((q - zero) * scale, *inputs[1:])

        child.register_forward_pre_hook(rounded)


def integer_layers(checkpoint: Checkpoint) -> int:
    """How many weights are planned to be multiplied in integers."""
    schemes = [checkpoint.scheme(name) for name in checkpoint.names()]
    return sum(scheme is not None and scheme.activations is not None for scheme in schemes)
