"""Best: the other methods in the order that measured best for a scheme, by how much time there is.

Source: docs/log.md, "What best composes"; the parts are those of gptaq, rounding and tune.
Idea:   low     gptaq                 codes column by column, drift repaired
        medium  rounding              codes and scales learned block by block
        high    rounding | tune       then scales, norms and codes against the original's outputs
        Sums of planes cannot be learned, and where inputs too have 8 bits codes of 8 are no better learned: there it
        is gptaq at every effort. An ONNX graph has no blocks to learn: there it is gptq at every effort, and static
        activations have their mean error taken from the biases.
Shapes: those of its parts.
Cost:   low about twice gptq; medium `iters` passes of every block over one batch; high 2 epochs of the whole model per
        100 iters more, and 40 bytes of memory per parameter.
Fails:  as its parts.
"""

from dataclasses import dataclass
from typing import Literal

from wherry import knobs
from wherry.errors import BadInput
from wherry.gait import Pass

EPOCHS = 0.04  # of tuning, per step of learning a block


@dataclass(frozen=True, kw_only=True)
class Best(Pass):
    """effort: low, medium or high. iters: steps of learning per block; the time grows with it."""

    effort: Literal["low", "medium", "high"] = "high"
    iters: int = 200

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise BadInput(f"best: iters={self.iters} is not a number of steps; 200 is the usual one")

    def recipe(self, graph: bool) -> str:
        """The recipe that it stands for, on an ONNX graph or on a folder of transformers."""
        common = knobs.spell(self, Pass.knobs(), ("scheme",)).partition(":")[2]
        whole = self.scheme.activations is not None and self.scheme.bits >= 8
        static = self.scheme.activations is not None and not self.scheme.activations.dynamic
        if graph:
            return f"gptq:{common}" + (",bias_correction=true" if static and not self.bias_correction else "")
        if self.effort == "low" or self.scheme.planes > 1 or whole:
            return f"gptaq:{common}"
        learned = f"rounding:{common},iters={self.iters}"
        if self.effort == "medium":
            return learned
        return f"{learned} | tune:epochs={max(1, round(EPOCHS * self.iters))}"
