"""SVD: two thin factors in place of a weight, weighted by its inputs, where that beats pruning at equal bytes.

Source: Wang et al. 2024 (SVD-LLM, arXiv:2403.07378), truncation-aware whitening; Hsu et al. 2022, arXiv:2207.00112.
Idea:   minimise ||(W - B A) X||^2 over rank r. With H = X X^T + damp * mean(diag H) * I = L L^T the best is the
        truncated SVD of W L = U S V^T: B = U_r S_r, A = V_r^T L^-1. A layer takes it where its error in that metric is
        below that of Wanda's zeros in as many bytes (numbers that stay, and a bit for each weight).
Shapes: W [n, k]; A [r, k]; B [n, r]; r = keep * n k / (n + k), rounded down.
Cost:   one SVD per layer, O(n k min(n, k)) in float64; one pass over the calibration data.
Fails:  Unsupported for transformers folders: their architectures have no place for two factors, and stock tools would
        not load them. BadInput where no layer is better off so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from wherry import shelf
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass
from wherry.graph import edit, tidy
from wherry.ops import sparse
from wherry.ops.solve import Hessian


@dataclass(frozen=True, kw_only=True)
class SVD(Pass):
    """keep: share of a layer's numbers that stay. damp: as in gptq. always: also where pruning would be better."""

    keep: float = 0.5
    damp: float = 0.01
    always: bool = False
    calibrated = True

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise BadInput(f"svd: keep={self.keep:g} is not a share between 0 and 1, like 0.5")

    def observe(self, stat: Hessian | None, x: torch.Tensor) -> Hessian:
        """Add the tokens x [tokens, k] to the statistic."""
        return Hessian.add(stat, x)

    def rank(self, shape: tuple[int, ...]) -> int:
        """Of the factors of a weight [n, k]."""
        n, k = shape
        return int(self.keep * n * k / (n + k))

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same: which layers are factored is seen with the data. Raises what can be known to fail."""
        if checkpoint.graph is None:
            raise Unsupported(
                f"svd: {checkpoint.name} is a transformers folder, and its architecture has no place for two "
                "factors.\nCapture it as a graph first: wherry capture MODEL -o GRAPH"
            )
        if checkpoint.graph.quantized or not self.layers(checkpoint.graph):
            raise BadInput(f"svd finds no float linear layer of {checkpoint.name} that rank 1 or more would shrink")
        return checkpoint

    def remarks(self, checkpoint: Checkpoint) -> dict[str, str]:
        """What the plan says of each layer that may be factored."""
        return {
            name: f"rank {self.rank(checkpoint.shape(name))}" + ("" if self.always else ", if that beats pruning")
            for name in self.layers(checkpoint.graph)
        }

    def layers(self, graph: Any) -> list[str]:
        """Names of the weights that may be factored: of one Gemm or MatMul each."""
        found = []
        for name, layer in graph.layers.items():
            plain = layer.node.op_type == "MatMul" or (
                layer.node.op_type == "Gemm" and not tidy.attribute(layer.node, "transA", 0)
            )
            alone = layer.role == "linear" and len(list(layer.value.uses())) == 1
            if plain and alone and self.wants(name) and self.rank(graph.shape(name)) >= 1:
                found.append(name)
        return found

    def remake(self, checkpoint: Checkpoint, out: Path, batches: list[Any], progress: Any) -> None:
        """Write the graph with factors into the folder `out`."""
        source = checkpoint.graph.copy()
        names = self.layers(source)
        file = out.with_name("observed.onnx")
        edit.write(source.model, file)
        stats = shelf.find("engine", "graph").statistics(file, source, dict.fromkeys(names, self), batches, progress)
        taken = 0
        for i, name in enumerate(names):
            progress(i, len(names), name)
            w = source.read(name).float()
            A, B, error, pruned = factors(w, stats.get(name), self.rank(w.shape), self.damp)
            if self.always or error < pruned:
                draw(source.model.graph, name, source.layers[name], A, B)
                taken += 1
        if not taken:
            where = f"none of {len(names)} layers of {checkpoint.name}"
            raise BadInput(f"svd:keep={self.keep:g} beats pruning in {where}: prune it, or say always=true")
        edit.write(source.model, out / "model.onnx")


def factors(
    w: torch.Tensor, stat: Hessian | None, r: int, damp: float
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """A [r, k] and B [n, r], the squared error of their product in the metric of the inputs, and that of pruning."""
    W, k = w.double(), w.shape[1]
    H = torch.eye(k, dtype=torch.float64) if stat is None else stat.total.double() / max(stat.tokens, 1)
    H = H + (damp * H.diagonal().mean().clamp(min=1e-30)) * torch.eye(k, dtype=torch.float64)
    L = torch.linalg.cholesky(H)
    U, S, V = torch.linalg.svd(W @ L, full_matrices=False)
    B = U[:, :r] * S[:r]
    A = torch.linalg.solve_triangular(L, V[:r], upper=False, left=False)
    stays = max(r * sum(w.shape) - w.numel() / 32, 1) / w.numel()  # a bitmap costs a bit for each weight
    score = w.abs() * H.diagonal().float().sqrt()
    gap = W * ~sparse.keep(score, 1 - stays, rows=True)
    return A.float(), B.float(), float(S[r:].square().sum()), float(((gap @ H) * gap).sum())


def draw(graph: ir.Graph, name: str, layer: Any, A: torch.Tensor, B: torch.Tensor) -> None:
    """Put a product with A before the layer, and B in place of its weight."""
    node = layer.node
    x = node.inputs[0]
    left = edit.constant(graph, f"{name}.left", A.T.contiguous().numpy())
    inner = edit.call(node, "MatMul", [x, left], f"{name}/left")
    transposed = node.op_type == "Gemm" and tidy.attribute(node, "transB", 0)
    right = edit.constant(graph, f"{name}.right", (B if transposed else B.T.contiguous()).numpy())
    node.replace_input_with(0, inner)
    node.replace_input_with(1, right)
    tidy.forget(graph, layer.value)
