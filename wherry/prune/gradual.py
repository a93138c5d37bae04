"""Gradual: prune in rounds under a cubic schedule, and train after each; a name for other steps.

Source: Zhu & Gupta 2017, To Prune, or Not to Prune, arXiv:1710.01878, equation 1; the rounds of Han et al. 2015,
    arXiv:1506.02626.
Idea:   s_t = s (1 - (1 - t / rounds)^3): fast while much is redundant, slowly when little is left. After each round the
        rest is trained with its zeros held (`heal`). gradual:sparsity=0.7,rounds=2,steps=50 is
        magnitude:sparsity=0.6125 | heal:steps=50 | magnitude:sparsity=0.7 | heal:steps=50
Shapes: those of its parts.
Cost:   `rounds` times that of its parts; each round is a stage that is done once.
Fails:  as its parts; heal takes models that write text. For graphs train between the rounds: bench/deep_compression.py.
"""

from dataclasses import dataclass

from wherry.errors import BadInput
from wherry.gait import QUANTIZER, Pass


@dataclass(frozen=True, kw_only=True)
class Gradual(Pass):
    """prune_by: the method; options: its knobs, `;` between them. steps, lr: of heal after each round."""

    prune_by: str = "magnitude"
    options: tuple[str, ...] = ()
    sparsity: float = 0.7
    rounds: int = 4
    steps: int = 100
    lr: float = 3e-4

    @classmethod
    def knobs(cls) -> list[str]:
        """Without those of codes."""
        return [name for name in super().knobs() if name not in QUANTIZER]

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise BadInput(f"gradual: rounds={self.rounds}, steps={self.steps}: one round of one step at least")
        if not 0 < self.sparsity < 1:
            raise BadInput(f"gradual: sparsity={self.sparsity:g} is not a share between 0 and 1")

    def recipe(self, graph: bool) -> str:
        """The recipe that it stands for, on a graph as elsewhere."""
        more = list(self.options)
        for knob, patterns in (("targets", self.targets), ("ignore", self.ignore)):
            more += [f"{knob}={';'.join(patterns)}"] if patterns else []
        parts = []
        for t in range(1, self.rounds + 1):
            share = self.sparsity * (1 - (1 - t / self.rounds) ** 3)
            parts.append(f"{self.prune_by}:{','.join([f'sparsity={share:.6g}', *more])}")
            parts.append(f"heal:steps={self.steps},lr={self.lr:g}")
        return " | ".join(parts)
