"""A weight that lies on a scheme's grid whenever it is used: a torch parametrization that gradients move.

    w_hat = s * (q - z)     q = round(clamp(w / s + z)),   s = s0 exp(a)

Gradients pass straight through round and sign; the scale's is that of LSQ: (q - w/s) inside of the range, the end's
code outside; the zero's that of LSQ+. s is rounded as it is stored (portable), z to an integer, at every step: what
is trained is what every format holds.
Source: Bengio et al. 2013, arXiv:1308.3432 (straight through); Esser et al. 2020 (LSQ, arXiv:1902.08153); Bhalgat et
    al. 2020 (LSQ+, arXiv:2004.09576) for zeros; Rastegari et al. 2016, arXiv:1603.05279 (binary: s sign(w), gradients
    where |w| <= s); Li & Liu 2016, arXiv:1605.04711 (ternary).
Shapes: w [n, ...], seen as [n, k]; s, z [n, g] by the scheme's grain; a and z are held
    flat, so that no optimizer takes them for matrices.
Cost:   about 15 elementwise operations per weight and step; memory: w, and a and z of g per row.
"""

import torch

from wherry.errors import BadInput, Unsupported
from wherry.ops import grid, tiles
from wherry.scheme import QTensor, Scheme

UNIT, UNIT_SCALE = 8.0, 2.0  # a step of 1e-3 moves a weight by 0.008 codes, a scale by 0.2%


def through(exact: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """The value of `exact`, bit for bit, with the gradient of `path`."""
    return exact.detach() + (path - path.detach())


def trainable(scheme: Scheme) -> Scheme:
    """The scheme itself. Raises Unsupported for grids that have no one step to learn."""
    if scheme.planes > 1 or scheme.nested or scheme.kind == "fp" or scheme.table not in ("", "ternary", "binary"):
        near = "Q4_0 is W4A16,group_size=32" if scheme.nested else f"W{min(max(scheme.bits, 2), 8)}A16"
        raise Unsupported(f"{scheme} is not trained: its levels have no one step to learn. The nearest is {near}")
    return scheme


def start(w: torch.Tensor, scheme: Scheme, rounding: grid.Rounding | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero [n, g] where training begins: the range with the least squared error."""
    matrix = w.detach().float().flatten(1)
    if scheme.table == "ternary":
        return ternary(matrix, scheme, rounding), None
    return grid.search(matrix, scheme, rounding)


def ternary(matrix: torch.Tensor, scheme: Scheme, rounding: grid.Rounding | None) -> torch.Tensor:
    """The scale of least squared error for codes -1, 0, 1: by Lloyd's iteration from 3/2 of the mean of |w|."""
    if scheme.tiled:
        found: tuple[torch.Tensor] = tiles.fit(lambda w, one, _: (ternary(w, one, rounding),), matrix, scheme)
        return found[0]
    groups = grid.grouped(matrix, scheme).abs()
    s = 1.5 * groups.mean(-1)
    for _ in range(10):
        far = groups > s.unsqueeze(-1) / 2
        s = torch.where(far.any(-1), (groups * far).sum(-1) / far.sum(-1).clamp(min=1), s)
    s = torch.where(s > 0, s, torch.ones_like(s))
    return s if rounding is None else rounding(s)


class LearnedGrid(torch.nn.Module):
    """The parametrization. `a` and `z` are what an optimizer moves besides the weight.

    held_in_codes: the weight is held as w / (UNIT s0), so that one learning rate suits all layers, their scales and
        norms; False where another parametrization stands before.
    """

    scale0: torch.Tensor

    def __init__(
        self, w: torch.Tensor, scheme: Scheme, rounding: grid.Rounding | None, learn_scale: bool = True,
        found: tuple[torch.Tensor, torch.Tensor | None] | None = None, held_in_codes: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scheme, self.rounding, self.held_in_codes = trainable(scheme), rounding, held_in_codes
        if w.ndim < 2:
            raise BadInput(f"a weight of {w.ndim} axis has no rows to give scales to")
        scale, zero = found if found is not None else start(w, scheme, rounding)
        self.register_buffer("scale0", scale.float())
        self.a = torch.nn.Parameter(torch.zeros(scale.numel(), device=scale.device), requires_grad=learn_scale)
        self.z = None if zero is None else torch.nn.Parameter(zero.float().flatten(), requires_grad=learn_scale)

    def growth(self) -> torch.Tensor:
        """What scales were multiplied with since training began, [n, g]."""
        return tiles.shared((UNIT_SCALE * self.a).view_as(self.scale0), self.scheme).exp()

    def scale(self) -> torch.Tensor:
        """Scales [n, g] as they will be stored."""
        free = self.scale0 * self.growth()
        return free if self.rounding is None else through(self.rounding(free.detach()), free)

    def zero(self) -> torch.Tensor | None:
        """Zeros [n, g], whole numbers within the codes."""
        if self.z is None:
            return None
        free = tiles.shared(self.z.view_as(self.scale0), self.scheme).clamp(self.scheme.qmin, self.scheme.qmax)
        return through(torch.round(free.detach()), free)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        """What is held for a weight."""
        if not self.held_in_codes:
            return w
        groups = grid.grouped(w.float().flatten(1), self.scheme)
        return (groups / (UNIT * self.scale0.unsqueeze(-1))).reshape(w.shape)

    def codes(self, held: torch.Tensor) -> torch.Tensor:
        """The weight [n, g, size] in units of its scales of now."""
        groups = grid.grouped(held.flatten(1), self.scheme)
        first = UNIT if self.held_in_codes else 1 / self.scale0.unsqueeze(-1)
        return groups * first / self.growth().unsqueeze(-1)

    def forward(self, held: torch.Tensor) -> torch.Tensor:
        """The weight on its grid, in the shape of `held`."""
        groups = self.codes(held)
        s, z = self.scale().unsqueeze(-1), self.zero()
        if self.scheme.table == "binary":
            c = groups.clamp(-1, 1)
            return (through(torch.where(groups >= 0, 1.0, -1.0), c) * s).reshape(held.shape)
        at = groups if z is None else groups + z.unsqueeze(-1)
        c = at.clamp(self.scheme.qmin, self.scheme.qmax)
        q = through(torch.round(c), c)
        return ((q if z is None else q - z.unsqueeze(-1)) * s).reshape(held.shape)

    @torch.no_grad()
    def settle(self, held: torch.Tensor) -> QTensor:
        """Codes, scales and zeros where training left them."""
        groups = self.codes(held)
        s, z = self.scale(), self.zero()
        if self.scheme.table == "binary":
            code = torch.where(groups >= 0, 0.0, -1.0)
        else:
            at = groups if z is None else groups + z.unsqueeze(-1)
            code = torch.round(at.clamp(self.scheme.qmin, self.scheme.qmax))
        zero = None if z is None else z.to(torch.int8)
        return QTensor(self.scheme, code.to(torch.int8).flatten(1), s, zero)


class LearnedRange(torch.nn.Module):
    """A layer's input on a grid: found per token when it runs, or a learned range of the whole tensor.

    x [..., k]. Per token: the largest |x| gets the last code, as ONNX exports and vLLM do. Per tensor: s and z learned,
    begun at the extremes of the first batch.
    """

    seen: torch.Tensor

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.log_scale = torch.nn.Parameter(torch.zeros(1)) if not scheme.dynamic else None
        self.z = torch.nn.Parameter(torch.zeros(1)) if not scheme.dynamic else None
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X on its grid, gradients straight through."""
        low, high = self.scheme.qmin, self.scheme.qmax
        if self.log_scale is None or self.z is None:
            s = (x.detach().abs().amax(-1, keepdim=True) / high).clamp(min=1e-12)
            c = (x / s).clamp(low, high)
            return through(torch.round(c), c) * s
        if not self.seen:
            with torch.no_grad():
                first, last = x.min().clamp(max=0), x.max().clamp(min=0)
                scale = ((last - first) / (high - low)).clamp(min=1e-6)
                self.log_scale.copy_(scale.log())
                self.z.copy_(low - first / scale)
                self.seen.fill_(True)
        s = self.log_scale.exp()
        z = through(torch.round(self.z), self.z)
        c = (x / s + z).clamp(low, high)
        return (through(torch.round(c), c) - z) * s
