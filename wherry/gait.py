"""Pass: one step of a recipe. A method is a frozen dataclass: its fields are knobs, its methods say how it is walked.

`solve(w)`: streamed, tensor by tensor, without data.
`observe(stat, x)` and `solve(w, stat)`: walked block by block; statistics of inputs, then codes.
`observe(stat, x, x_ref)`: the same, layer after layer, with the original model's inputs beside.
`observe` and `smooth(ws, stat) -> s`: before a solver; the inputs of ws are divided by s [k], ws multiplied.
`rewrite(checkpoint) -> checkpoint`: before the plan; the same model with other weights.
`choices(scheme)`, `most(counted, rest)` and `assign(cost, budgets)`: before the walk; which scheme each weight gets.
`recipe(graph) -> text`: a name for other steps, on an ONNX graph or a transformers folder.
`observe` and `correct(w, q, stat, notes) -> q`: after a solver; a float correction of `rank` beside the codes.
`fit(call, latents, targets, notes)`: after a solver; the codes of one block learned together.
`tune(loss, latents, free, batches, notes)`: after the last block; the whole model against the original's outputs.
`prune(w, stat, notes) -> w`: a stage of its own, streamed or (with `observe`) walked; the same weight with zeros in it.
`share(plan, batches, progress) -> {name: sparsity}`: before a `prune`; how much of each weight it takes.
`choices(sparsity)`, `rounded(w, s)`, `allot(cost, size, sparsity)`: the same, from what each share costs the model.
`remake(checkpoint, out, batches, progress)`: a stage of its own; writes another model into the new folder `out`. With
    `expect(checkpoint) -> checkpoint` the plan knows its names, shapes and configuration before, and with
    `remarks(checkpoint) -> {tensor or "": text}` it says what was rounded, or why; both raise what must fail.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from wherry import knobs
from wherry.errors import BadInput
from wherry.ops import grid, sparse
from wherry.scheme import PRESETS, QTensor, Scheme

EMBEDDING = "W8A16,group_size=32"
SEEING = ("observe", "smooth", "correct", "fit", "tune", "assign", "allot")
# knobs that only a step which gives codes has
QUANTIZER = ("scheme", "embedding", "portable", "activation_observer", "bias_correction", "attention")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step of a recipe. Subclasses are files on a shelf; their fields are the knobs that a recipe can turn.

    scheme: how the chosen weights will be stored; group_size is a knob of its own in a recipe.
    embedding: scheme of the embedding and of the head, which share it when they are tied; "keep" leaves them.
    portable: round scales to 7 significant bits so that every format holds exactly the same weights.
    targets, ignore: layer names (`model.layers.0.mlp.up_proj`), or patterns after `re:`; several joined by `;`.
    activation_observer: how static ranges of activations are found: mse, minmax, percentile, entropy (ops/ranges.py);
        auto = mse on ONNX graphs, minmax elsewhere.
    bias_correction: take what rounding adds to a layer's mean output from its bias; graphs only, as the next.
    attention: also round the inputs of products of two activations.
    """

    scheme: Scheme = PRESETS["W4A16"]
    embedding: str = EMBEDDING
    portable: bool = True
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    activation_observer: Literal["auto", "mse", "minmax", "percentile", "entropy"] = "auto"
    bias_correction: bool = False
    attention: bool = False
    one_step: ClassVar[bool] = False  # whether `solve` fits one scale per group, so that planes are beyond it

    def solve(self, w: torch.Tensor, stat: Any = None, notes: list[str] | None = None) -> QTensor:
        """Codes for the weight w [..., n, k]; stat is what `observe` gathered, or None; remarks go into `notes`."""
        raise NotImplementedError

    @classmethod
    def knobs(cls) -> list[str]:
        """Names of the fields that a recipe can turn."""
        coded = not any(hasattr(cls, gait) for gait in ("prune", "share", "allot", "remake"))
        return [item.name for item in dataclasses.fields(cls) if coded or item.name not in QUANTIZER]

    @property
    def gait(self) -> str:
        """"zeros" for a step that prunes or says how much, "model" for one that remakes, else "codes"."""
        if hasattr(self, "remake"):
            return "model"
        return "zeros" if any(hasattr(self, gait) for gait in ("prune", "share", "allot")) else "codes"

    @property
    def calibrated(self) -> bool:
        """Whether it needs to see inputs: by a method that it defines, or the scheme has static activations."""
        activations = self.scheme.activations if self.gait == "codes" else None
        return any(hasattr(self, name) for name in SEEING) or (activations is not None and not activations.dynamic)

    @property
    def dense(self) -> bool:
        """Whether it fills zeros that an earlier stage has made: by turning all weights, or adding to them."""
        return hasattr(self, "rewrite") or hasattr(self, "correct")

    @property
    def solves(self) -> bool:
        """Whether it can choose codes from a float weight."""
        return type(self).solve is not Pass.solve

    def wants(self, name: str) -> bool:
        """Whether a weight of that name is among its targets and not ignored."""
        meant = not self.targets or any(matches(pattern, name) for pattern in self.targets)
        return meant and not any(matches(pattern, name) for pattern in self.ignore)

    @property
    def rounding(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """How scales are rounded before codes are solved; None when they are not."""
        return grid.stored(self.scheme, grid.portable if self.portable else None)

    def ranging(self, graph: bool) -> str:
        """Which observer finds static ranges; graph: of an ONNX graph."""
        return ("mse" if graph else "minmax") if self.activation_observer == "auto" else self.activation_observer

    @property
    def method(self) -> str:
        """Its name on the shelf."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return knobs.spell(self, self.knobs(), ("scheme",) if self.solves else ())


def corrected(steps: tuple[Pass, ...], name: str, scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme of a linear weight with the rank of the step that corrects it, if there is one."""
    found = [step for step in steps if hasattr(step, "correct") and step.wants(name)]
    if not found:
        return scheme
    rank, most = int(found[0].rank), min(shape)  # type: ignore[attr-defined]
    if len(found) > 1:
        raise BadInput(f"{name} is corrected by two steps; give each weight to one, by targets= and ignore=")
    if rank >= most:
        raise BadInput(f"{name}: rank={rank} is no low rank of a weight {list(shape)}; use rank={max(most // 8, 1)}")
    if scheme.activations is not None:
        raise BadInput(f"{found[0].method} wants inputs that stay float, and {scheme} rounds them; use {scheme.near}")
    return replace(scheme, rank=rank)


@dataclass(frozen=True, kw_only=True)
class Pruner(Pass):
    """A step that zeroes weights. Subclasses define `prune(w, stat, notes) -> w`, the weight [n, k] with zeros in it.

    sparsity: share of weights to zero, 0 to 1 (both excluded).
    pattern: "N:M" keeps N of every M neighbouring inputs of a row; sparsity is then 1 - N/M.
    block: "AxB" zeroes tiles of A outputs and B inputs together.
    """

    sparsity: float = 0.5
    pattern: str = ""
    block: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            said = "leaves nothing" if self.sparsity >= 1 else "takes nothing"
            raise BadInput(f"{self.method}: sparsity={self.sparsity:g} {said}; it is a share between 0 and 1, like 0.5")
        if self.pattern and self.block:
            raise BadInput(f"{self.method}: pattern={self.pattern} and block={self.block} exclude each other: take one")
        sparse.keep_of(self.pattern, self.method)
        sparse.tile_of(self.block, self.method)

    def prune(self, w: torch.Tensor, stat: Any = None, notes: list[str] | None = None) -> torch.Tensor:
        """The weight w [n, k] with zeros; stat is what `observe` gathered, or None; remarks go into `notes`."""
        raise NotImplementedError

    def planned(self, shape: tuple[int, ...]) -> float:
        """Share of a weight [n, k] that becomes zero. Raises BadInput where the pattern or block does not fit."""
        sparse.fits(shape, self.pattern, self.block)
        if self.pattern:
            n, m = sparse.keep_of(self.pattern, self.method)
            return 1 - n / m
        return self.sparsity

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the share rounds to one weight (tile) or more of a weight [n, k], and leaves one."""
        high, wide = sparse.tile_of(self.block)
        whole = shape[-1] // wide * (1 if self.rows else math.prod(shape[:-1]) // high)
        return bool(self.pattern) or (whole > 1 and round(self.sparsity * whole) > 0)

    def wording(self, sparsity: float) -> str:
        """What the plan says of a weight."""
        how = f" ({self.pattern})" if self.pattern else f" (blocks of {self.block})" if self.block else ""
        return f"{100 * sparsity:.4g}% zeros{how}"

    @property
    def by_itself(self) -> bool:
        """Whether the step says itself how much each weight loses: no other step may."""
        return bool(self.pattern)

    def foresee(self, plan: Any) -> None:
        """Raise BadInput for what shows in the weights alone, not in their shapes, when the plan is made."""

    @property
    def rows(self) -> bool:
        """Whether the share is taken of every row, and not of the whole weight."""
        return False

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """The mask [n, k] of weights that stay: those of largest score [n, k], as the knobs say, in each layer."""
        return sparse.keep(score, self.sparsity, self.pattern, self.block, rows=self.rows)


def matches(pattern: str, name: str) -> bool:
    """Whether a weight's or layer's name is meant by a pattern: exact, last part, or `re:` and a full match."""
    layer = name.removesuffix(".weight")
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], layer) is not None
        except re.error as error:
            raise BadInput(f"'{pattern}' is not a regular expression: {error}") from error
    return pattern in (layer, name) or layer.endswith(f".{pattern}")
