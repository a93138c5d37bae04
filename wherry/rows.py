"""Rows: what the steps of one stage do to each tensor: which scheme, how many zeros, what shape, or why nothing."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass, corrected, matches
from wherry.roles import MULTIPLIED, OUTSIDE, QUANTIZABLE, QUANTIZED, roles
from wherry.scheme import PRESETS, Scheme


@dataclass(frozen=True)
class PlanRow:
    """What will happen to one tensor.

    role: "linear", "embedding", "head", "norm", "bias" or "other". scheme None: left as it is, for `reason`.
    step: index of the pass of its stage that takes it, -1 if none. before, after: bytes in the checkpoint.
    sparsity: share of weights that are made zero; 0 also where a threshold decides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    scheme: Scheme | None
    step: int
    reason: str
    before: int
    after: int
    notes: tuple[str, ...] = ()
    sparsity: float = 0.0


def row_of(
    steps: tuple[Pass, ...], checkpoint: Checkpoint, name: str, role: str, why: str, first: int = 0
) -> PlanRow:
    """What the steps of a stage do to one tensor; first: how many steps of the recipe stand before them."""
    shape, dtype = checkpoint.shape(name), checkpoint.source.dtype(name)
    stored = checkpoint.scheme(name)
    before = stored.bytes(shape) if stored else torch.Size(shape).numel() * dtype.itemsize
    row = PlanRow(name, shape, str(dtype).removeprefix("torch."), role, None, -1, why, before, before)
    if steps[-1].gait == "zeros":
        return pruned(steps, checkpoint, row, why, first)
    if role not in QUANTIZABLE or why == QUANTIZED:
        return row
    reasons = []
    solvers = [(i, step) for i, step in enumerate(steps) if step.solves]
    wanting = [item for item in solvers if item[1].wants(name) and not hasattr(item[1], "smooth")]
    for i, step in wanting[:1] or solvers:  # one that smooths leaves the codes to a later step, if there is one
        if step.targets and not any(matches(p, name) for p in step.targets):
            reasons.append(f"not among the targets of step {first + i + 1}")
            continue
        if any(matches(p, name) for p in step.ignore):
            reasons.append(f"ignored by step {first + i + 1}")
            continue
        if role != "linear" and step.embedding == "keep":
            reasons.append("embedding=keep")
            continue
        scheme = step.scheme if role in MULTIPLIED else Scheme.parse(step.embedding)
        if checkpoint.graph is not None:
            scheme, note = in_graph(scheme, role, step)
        elif role == "linear" and why != OUTSIDE:
            scheme = corrected(steps, name, scheme, shape)
        try:
            scheme.scales_per_row(shape[-1])
        except BadInput as error:
            if role not in MULTIPLIED:
                reasons.append(str(error))
                continue
            raise misfit(scheme, shape[-1], checkpoint, step, name) from error
        gaits = ("fit", "tune")
        learns = [o.method for o in steps if any(hasattr(o, gait) for gait in gaits) and o.wants(name)]
        learns += [step.method] if step.one_step else []
        if role == "linear" and scheme.planes > 1 and learns:
            way = f"take W{scheme.bits * scheme.planes}A16, or leave {learns[0]} out"
            raise Unsupported(f"{scheme}: sums of planes have no one step to fit; {way}")
        scale_bytes = 4 if scheme.bits > 4 or not step.portable else 2
        after = scheme.bytes(shape, scale_bytes)
        notes: tuple[str, ...] = ()
        if checkpoint.graph is not None:
            notes = (note,) if note else ()
        elif role != "linear":
            after = 2 * torch.Size(shape).numel()  # what transformers can load is float: exact values in fp16
            notes = (f"{scheme}, rounded to nearest; held in the checkpoint as fp16 of exactly these values",)
        elif step.calibrated and why == OUTSIDE:
            notes = ("outside of the blocks: rounded to nearest, without data",)
        else:
            notes = tuple(
                f"{word} by step {first + j + 1} ({other.method})"
                for word, gait in (
                    ("smoothed", "smooth"), ("corrected", "correct"), ("codes learned", "fit"), ("tuned", "tune"),
                )  # fmt: skip
                for j, other in enumerate(steps)
                if hasattr(other, gait) and other.wants(name) and (i != j or gait == "smooth")
            )
        return dataclasses.replace(row, scheme=scheme, step=i, reason="", after=after, notes=notes)
    return dataclasses.replace(row, reason="; ".join(reasons))


def misfit(scheme: Scheme, k: int, checkpoint: Checkpoint, step: Pass, name: str) -> BadInput:
    """Why a scheme does not fit a weight of k inputs, and what fits all the weights that the step takes."""
    taken = (each for each, role, _ in roles(checkpoint) if role in MULTIPLIED and step.wants(each))
    try:
        scheme.scales_per_row(k, math.gcd(*(checkpoint.shape(each)[-1] for each in taken)))
    except BadInput as error:
        return BadInput(f"{name}: {error}")
    return BadInput(f"{name}: {scheme} does not fit its {k} inputs")


def pruned(steps: tuple[Pass, ...], checkpoint: Checkpoint, row: PlanRow, why: str, first: int) -> PlanRow:
    """The row of one tensor in a stage that zeroes weights."""
    step: Any = steps[-1]
    number = f"step {first + len(steps)} ({step.method})"
    if why == QUANTIZED:
        raise BadInput(f"{checkpoint.name} is quantized already; {step.method} takes the float model")
    if row.role not in MULTIPLIED:
        stays = "the table of tokens stays dense" if row.role in ("embedding", "head") else row.reason
        return dataclasses.replace(row, reason=stays)
    for wrong, reason in (
        (not step.wants(row.name), f"not a target of {number}, or ignored"),
        (step.calibrated and why == OUTSIDE, f"{OUTSIDE}: {number} sees no inputs there"),
        (step.calibrated and row.role == "recurrent", f"{number} does not see a recurrent layer's inputs"),
    ):
        if wrong:
            return dataclasses.replace(row, reason=reason)
    try:
        sparsity = step.planned(row.shape)
    except BadInput as error:
        raise BadInput(f"{row.name}: {error}") from error
    if not getattr(step, "takes", lambda shape: True)(row.shape):
        return dataclasses.replace(row, reason=f"the share of {number} rounds to nothing of it")
    for other in steps[:-1]:  # it says how much each layer takes, around that
        getattr(other, "choices", lambda sparsity: [])(sparsity)
        number += f", shared out by step {first + 1} ({other.method})"
    share = step.wording(sparsity)
    last = len(steps) - 1
    return dataclasses.replace(row, step=last, reason="", sparsity=sparsity, notes=(f"{share} by {number}",))


def holds_zero(scheme: Scheme) -> bool:
    """Whether a grid has a code for exactly zero: not binary, not sums of planes, not one with a float minimum."""
    return scheme.planes == 1 and scheme.minimum == "code" and scheme.table != "binary"


def remade(steps: tuple[Pass, ...], checkpoint: Checkpoint, made: Checkpoint, first: int) -> list[PlanRow]:
    """Rows of the model that a `remake` step will write (`made`), with the bytes of the one that it is made from."""
    step: Any = steps[-1]
    if any(checkpoint.scheme(name) is not None for name in checkpoint.names()):
        raise BadInput(f"{checkpoint.name} is quantized already; {step.method} takes the float model")
    remarks = step.remarks(checkpoint) if hasattr(step, "remarks") else {}
    have = set(checkpoint.names())
    rows: list[PlanRow] = []
    for name, role, _ in roles(made):
        shape, dtype = made.shape(name), made.source.dtype(name)
        after = torch.Size(shape).numel() * dtype.itemsize
        old = checkpoint.shape(name) if name in have else ()
        before = torch.Size(old).numel() * checkpoint.source.dtype(name).itemsize if name in have else 0
        notes = [f"remade by step {first + 1} ({step.method})"]
        if old != shape:
            notes[0] += f": {list(old)} -> {list(shape)}" if name in have else ": new"
        said = [remarks[key] for key in ([name] if rows else ["", name]) if key in remarks]
        kept = f"float, by {step.method}"
        kind = str(dtype).removeprefix("torch.")
        rows.append(PlanRow(name, shape, kind, role, None, -1, kept, before, after, (*notes, *said)))
    return rows


def in_graph(scheme: Scheme, role: str, step: Pass) -> tuple[Scheme, str]:
    """The scheme that a weight of an ONNX graph gets, and a remark where it is not the one asked for."""
    if role == "linear":
        return scheme, ""
    row = PRESETS["W8A16"].with_group(-1)
    if role == "convolution" and scheme.activations is not None:
        if not scheme.activations.dynamic:
            return scheme, ""
        return row, f"{row}: dynamic int8 convolutions run several times slower than float on CPUs; take W8A8_STATIC"
    if role == "convolution" and scheme.activations is None and scheme.bits <= 2:
        if scheme.table == "binary" and scheme.planes == 1:
            ternary = PRESETS["W1.58A16"].with_group(-1)
            return ternary, f"{ternary} in place of {scheme}: ONNX has no integers of 1 bit; +-s stay so"
        if scheme.kind == "int" and scheme.symmetric and scheme.bits == 2:
            own = scheme.with_group(-1)
            return own, "" if own == scheme else f"{own}: a convolution has one scale per output"
    if role == "recurrent" and scheme.activations is not None:
        return row, f"no integer product of recurrent layers: {row}, computed in float"
    return row, "" if row == scheme else f"{row} in place of {scheme}: ONNX has no blocks for a {role} weight"
