"""RTN: round to nearest, the baseline of every other method.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.
Idea:   each group's range gives its scale and zero; each weight takes the nearest code. With observer=mse the range is
        the part of it, from 0.4 to 1, whose rounding has the least squared error.
Shapes: w [..., n, k]; one scale and zero per group of k / g inputs.
Cost:   O(n k) time, 31 times that with observer=mse; one tensor in memory, no data.
Fails:  never; error per weight is at most half a step, plus the rounding of the scale.
Differs: groups that lie on a grid of the scheme already (trained by `qat`, or decoded) keep it and their values.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from wherry.ops import grid
from wherry.recipe import Pass
from wherry.scheme import QTensor


@dataclass(frozen=True, kw_only=True)
class RTN(Pass):
    """observer: how a group's range is found: "minmax", or by least squared error ("mse")."""

    observer: Literal["minmax", "mse"] = "minmax"

    def solve(self, w: torch.Tensor, stat: None = None, notes: list[str] | None = None) -> QTensor:
        """Codes of w by its own range alone."""
        fit = grid.fit if self.observer == "minmax" else grid.search
        scale, zero = fit(w, self.scheme, self.rounding)
        known = grid.recover(w, self.scheme, self.rounding)
        if known is not None:
            own, own_zero, found = known
            scale = torch.where(found, own, scale)
            if zero is not None and own_zero is not None:
                zero = torch.where(found, own_zero, zero)
            if notes is not None:
                notes.append(f"{int(found.sum())} of {found.numel()} groups lay on this grid already and kept it")
        return grid.encode(w, self.scheme, scale, zero)
