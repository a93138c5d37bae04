"""A quantizer of your own: clip each group's range a little where that lowers the squared error.

Source: the idea of OCTAV and MSE clipping, here by trying a few ranges. Shapes: w [..., n, k]. Cost: 8 times rtn's.

A method is a file with a class of its name. In a package of yours, three lines of pyproject.toml let wherry find it:

    [project.entry-points."wherry.quant"]
    clip = "own_quantizer"

    python examples/own_quantizer.py [MODEL]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import tiny
import torch

import wherry
from wherry.ops import grid


@dataclass(frozen=True, kw_only=True)
class Clip(wherry.Pass):
    """least: the smallest share of a group's range that is tried; a knob of the recipe, like every field."""

    least: float = 0.7

    def solve(self, w: torch.Tensor, stat: None = None) -> wherry.QTensor:
        """Codes of w with the best of 8 ranges for each group."""
        groups = grid.grouped(w.float(), self.scheme)
        best = lowest = None
        for share in torch.linspace(self.least, 1.0, 8):
            limit = share * groups.abs().amax(-1, keepdim=True)
            scale, zero = grid.fit(groups.clamp(-limit, limit).flatten(-2), self.scheme, self.rounding)
            made = grid.encode(w, self.scheme, scale, zero)
            error = (grid.grouped(made.decode() - w, self.scheme) ** 2).sum(-1)
            better = torch.ones_like(error, dtype=torch.bool) if lowest is None else error < lowest
            lowest = error if lowest is None else torch.where(better, error, lowest)
            old = best or (scale, zero)
            best = (torch.where(better, scale, old[0]), None if zero is None else torch.where(better, zero, old[1]))
        return grid.encode(w, self.scheme, *best)


if __name__ == "__main__":
    folder = Path(mkdtemp(prefix="own-"))
    info = folder / "clip-0.1.dist-info"  # what `pip install` of such a package leaves behind
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clip\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[wherry.quant]\nclip = own_quantizer\n")
    sys.path.insert(0, str(folder))
    for name in ("rtn", "clip"):
        model = sys.argv[1] if len(sys.argv) > 1 else tiny.language_model()
        report = wherry.compress(model, folder / name, f"{name}:scheme=W4A16,group_size=32")
        errors = [row.value for row in report.select("weight error") if ".layers." in row.where]
        print(f"{name:5} mean relative error {sum(errors) / len(errors):.4f}, {report.get('verdict').value}")
