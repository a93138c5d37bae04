"""The affine integer grid: from the range of a group to its scale and zero, and from weights to codes.

Shapes: w [..., n, k]; scale, zero [..., n, g] with g scales per row; codes int8 [..., n, k].
Source: Jacob et al. 2018, arXiv:1712.05877 (affine quantization); the rounding of ranges is that of
    compressed-tensors, so that round-to-nearest here equals llm-compressor's.
"""

from collections.abc import Callable
from itertools import repeat

import torch

from wherry.levels import levels
from wherry.ops import tiles
from wherry.ops.kquant import nested as nested_scales
from wherry.scheme import QTensor, Scheme, values

Rounding = Callable[[torch.Tensor], torch.Tensor]
PORTABLE_BITS = 7  # significant bits of a portable scale: 7 + 4 <= 11, what fp16 holds
COARSE_BITS = 3  # of a scale whose 8-bit codes must decode exactly in fp16: 3 + 8 <= 11
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 24  # weights that are worked on at once: what caches hold
FP16_LEAST = 2.0**-24
PORTABLE_MOST = 127 * 2.0**5  # the largest of 7 bits that fp16 holds 16 times
COARSE_MOST = 7 * 2.0**6  # the largest of 3 bits that fp16 holds 128 times


def portable(scale: torch.Tensor) -> torch.Tensor:
    """Round a positive scale to 7 significant bits, within the range in which fp16 holds it exactly.

    Then s, s*z and s*(q-z) are exact in fp16 for codes of up to 4 bits, so that one set of codes means the
    same weights in GGUF (fp16 d and m), ONNX and compressed-tensors. Error of the scale: at most 2^-7 of it.
    """
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.round(mantissa * 2**PORTABLE_BITS), exponent - PORTABLE_BITS)
    return rounded.clamp(FP16_LEAST * 2 ** (PORTABLE_BITS - 1), PORTABLE_MOST)


def coarse(scale: torch.Tensor) -> torch.Tensor:
    """Round a positive scale up to 3 significant bits: then s*q is exact in fp16 for codes of 8 bits.

    For embeddings and heads: a format that cannot share int8 codes between both holds them as fp16, and still
    decodes to the same weights. The step grows by 0 to 25%; it never clips.
    """
    mantissa, exponent = torch.frexp(scale)
    rounded = torch.ldexp(torch.ceil(mantissa * 2**COARSE_BITS), exponent - COARSE_BITS)
    return rounded.clamp(FP16_LEAST * 2 ** (COARSE_BITS - 1), COARSE_MOST)


def power(scale: torch.Tensor) -> torch.Tensor:
    """The nearest power of two: MXFP4's e8m0."""
    return torch.exp2(torch.round(torch.log2(scale)).clamp(-127, 127))


def power_half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest power of two that fp16 holds 16 times: e8m0 scales of integers, exact in every format."""
    return torch.exp2(torch.round(torch.log2(scale)).clamp(-24, 11))


def over_one(scale: torch.Tensor) -> torch.Tensor:
    """Scales as e4m3 over one power of two for the whole tensor: NVFP4, whose global scale can be found again."""
    most = scale.amax()
    over = torch.exp2(torch.ceil(torch.log2(most / 448.0)))
    small = (scale / over).clamp(min=2.0**-9).to(torch.float8_e4m3fn).float()
    return small * over


def over_one_half(scale: torch.Tensor) -> torch.Tensor:
    """The same within the range in which fp16 holds 4 bits exactly: fp8 scales of integers, exact in every format."""
    return over_one(scale.clamp(FP16_LEAST * 2 ** (PORTABLE_BITS - 1), PORTABLE_MOST))


def stored(scheme: Scheme, rounding: Rounding | None) -> Rounding | None:
    """How the scales of a scheme are rounded: as its definition says, else by `rounding`."""
    if scheme.nested:
        return lambda scale: nested_scales(scale, scheme)
    if scheme.scale in ("bfloat16", "float32"):
        kind = getattr(torch, str(scheme.scale))
        return rounding or (lambda scale: scale.to(kind).float())
    float_ = scheme.kind == "fp"
    own = {"e8m0": power if float_ else power_half, "float8_e4m3fn": over_one if float_ else over_one_half}
    return own.get(str(scheme.scale), rounding)


def dependent(scheme: Scheme) -> bool:
    """Whether a group's scale is rounded by those of others: k-quants, and fp8 over one power of two."""
    return scheme.nested or scheme.scale == "float8_e4m3fn"


def grouped(w: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """View w [..., n, k] as [..., n, g, k/g]. Raises BadInput when the group does not divide k."""
    return w.unflatten(-1, (scheme.scales_per_row(w.shape[-1]), -1))


def fit(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None = portable
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero of each group from its minimum and maximum; the scale is rounded by `rounding`, if any.

    Returns scale float32 [..., n, g] > 0 and zero int8 of the same shape (None when symmetric; a k-quant's minimum).
    Rows that share a tile have the same, here and in `search` and `recover`.
    """
    if scheme.tiled:
        return tiles.fit(lambda each, one, _: fit(each, one, rounding), w, scheme)
    if scheme.table == "binary":
        return residual(w, scheme, rounding), None
    groups = grouped(w.float(), scheme)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.nested and rounding is not None:
        return settled(*between(low, high, scheme, None), scheme, rounding)
    return between(low, high, scheme, rounding)


def between(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, rounding: Rounding | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero of the grid that spans low <= 0 to high >= 0, each [..., n, g]."""
    span = float(scheme.qmax - scheme.qmin)
    if scheme.tabled:
        span = 2 * levels(scheme.table)[-1]
    scale = 2 * torch.maximum(-low, high) / span if scheme.symmetric else (high - low) / span
    least = torch.finfo(torch.float32).tiny
    idle = least if dependent(scheme) else 1.0  # zeros: no measure for their neighbours
    scale = torch.where(scale > 0, scale, idle).clamp(min=least)
    if rounding is not None:
        scale = rounding(scale)
    if scheme.symmetric:
        return scale, None
    if scheme.nested:
        return scale, -low
    zero = (scheme.qmin - torch.round(low / scale)).clamp(scheme.qmin, scheme.qmax)
    return scale, zero.to(torch.int8)


def recover(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None:
    """Scale and zero of the groups that lie on a grid of the scheme already, as trained or decoded weights do.

    Idea:   w = s c with whole c: s = max|w| / m for one of the few m that the codes allow; the smallest m that fits all
            of the group. Rounding then changes nothing beyond float16's last bit, so no other grid is better.
    Returns scale, zero [..., n, g] and which groups were found [..., n, g]; None when none was, or the grid is no
    integer grid. Cost: one rounding of w per m for groups that pass; a look at 4 rows where none does.
    """
    if scheme.kind != "int" or scheme.nested or scheme.planes > 1 or scheme.scale != "float16":
        return None
    if scheme.tiled:
        return tiles.fit(lambda each, one, _: recover(each, one, rounding), w, scheme)
    groups = grouped(w.float(), scheme)
    if groups.ndim == 3 and len(groups) > 8 and not _on_grid(groups[:4], scheme, rounding)[2].any():
        return None
    scale, low, found = _on_grid(groups, scheme, rounding)
    if not found.any():
        return None
    if scheme.symmetric:
        return scale, None, found
    zero = (scheme.qmin - low).clamp(scheme.qmin, scheme.qmax)
    return scale, zero.to(torch.int8), found


def _on_grid(
    groups: torch.Tensor, scheme: Scheme, rounding: Rounding | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, lowest whole number, and whether it fits, of each group."""
    most = groups.abs().amax(-1)
    reach = scheme.qmax - scheme.qmin if not scheme.symmetric else max(-scheme.qmin, scheme.qmax)
    scale, low, found = torch.ones_like(most), torch.zeros_like(most), most == 0
    for m in range(1, reach + 1):
        s = (most / m).clamp(min=torch.finfo(torch.float32).tiny)
        s = s if rounding is None else rounding(s)
        c = groups / s.unsqueeze(-1)
        whole = torch.round(c)
        first, last = whole.amin(-1), whole.amax(-1)
        if scheme.symmetric:
            inside = (first >= scheme.qmin) & (last <= scheme.qmax)
        else:  # zero = qmin - first, within the codes, as 0 must be
            inside = (last.clamp(min=0) - first.clamp(max=0)) <= scheme.qmax - scheme.qmin
        near = ((c - whole).abs() <= whole.abs() * 2.0**-11 + 1e-5).all(-1)
        new = near & inside & ~found
        scale, low = torch.where(new, s, scale), torch.where(new, first.clamp(max=0), low)
        found = found | new
        if found.all():
            break
    return scale, low, found


def settled(
    scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (and a k-quant's minimums) rounded together, once all groups are known."""
    return rounding(scale), rounding(zero) if zero is not None and scheme.minimum != "code" else zero


def search(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None, importance: torch.Tensor | None = None,
    least: float = 0.4, steps: int = 31, norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Scale and zero of each group whose range, shrunk by 1 to `least`, gives the smallest weighted squared error.

    importance: [k] or [n, k], weight of each error (the diagonal of the Hessian), or None for plain squared error.
    norm: power of the error in place of 2; a higher one clips less.
    Source: the search of llm-compressor's observers memoryless_mse and imatrix_mse. Cost: `steps` roundings of w.
    """
    if scheme.tiled:
        return tiles.fit(
            lambda each, one, weight: search(each, one, rounding, weight, least, steps, norm), w, scheme, importance
        )
    if scheme.table == "binary":
        return residual(w, scheme, rounding, importance), None
    rows = max(1, (CPU_CHUNK if w.device.type == "cpu" else DEVICE_CHUNK) // w.shape[-1])
    if not dependent(scheme) and w.ndim == 2 and len(w) > rows:
        each = importance.split(rows) if importance is not None and importance.ndim == 2 else repeat(importance)
        found = [
            search(part, scheme, rounding, own, least, steps, norm)
            for part, own in zip(w.split(rows), each, strict=False)
        ]
        zeros = [zero for _, zero in found if zero is not None]
        return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None
    groups = grouped(w.float(), scheme)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    weight = None if importance is None else importance.float().unflatten(-1, groups.shape[-2:])
    single = None if scheme.nested else rounding
    best_scale, best_zero = between(low, high, scheme, single)
    best, room = torch.full_like(low, torch.inf), torch.empty_like(groups)
    for shrink in (1 - (1 - least) * i / max(steps - 1, 1) for i in range(steps)):
        scale, zero = between(low * shrink, high * shrink, scheme, single)
        error = misfit(groups, scheme, scale, zero, room)
        error = error.square_() if norm == 2 else error.abs_().pow_(norm)
        total = (error if weight is None else error.mul_(weight)).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    if scheme.nested and rounding is not None:
        return settled(best_scale, best_zero, scheme, rounding)
    return best_scale, best_zero


def misfit(
    groups: torch.Tensor, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None, room: torch.Tensor
) -> torch.Tensor:
    """What rounding weights [..., g, size] to the nearest code adds to them; plain integers use `room` for it."""
    if scheme.tabled or scheme.minimum != "code":
        code = nearest(units(groups, scheme, scale, zero), scheme)
        return values(code, scheme, scale, zero).sub_(groups)
    s, z = scale.unsqueeze(-1), None if zero is None else zero.float().unsqueeze(-1)
    x = torch.div(groups, s, out=room)
    x = x.round_() if z is None else x.add_(z).round_()
    x.clamp_(scheme.qmin, scheme.qmax)
    return (x if z is None else x.sub_(z)).mul_(s).sub_(groups)


def residual(
    w: torch.Tensor, scheme: Scheme, rounding: Rounding | None, importance: torch.Tensor | None = None, rounds: int = 8
) -> torch.Tensor:
    """Scales [..., n, g * planes] of binary planes: greedy residuals, then least squares and nearest sums in turn.

    Source: Rastegari et al. 2016, arXiv:1603.05279 (one plane: the mean of |w|); Guo et al. 2017 (Network Sketching,
    arXiv:1706.02021) for more planes and their refinement.
    """
    groups = grouped(w.float(), scheme)
    weight = torch.ones_like(groups[..., :1, :]) if importance is None else importance.float().unflatten(
        -1, groups.shape[-2:])  # fmt: skip
    weight = weight.clamp(min=1e-12).expand_as(groups)
    rest, found = groups, []
    for _ in range(scheme.planes):
        found.append((rest.abs() * weight).sum(-1) / weight.sum(-1))
        rest = rest - found[-1].unsqueeze(-1) * torch.where(rest >= 0, 1.0, -1.0)
    scale = torch.stack(found, -1)
    for _ in range(rounds if scheme.planes > 1 else 0):
        code = nearest_plane(groups, scheme, scale.flatten(-2))
        place = code.long() + (1 << (scheme.planes - 1))
        signs = torch.stack([(place >> p & 1) * 2.0 - 1 for p in range(scheme.planes)])
        signs = signs.movedim(0, -1)  # [..., g, size, planes]
        A = torch.einsum("...sp,...sq,...s->...pq", signs, signs, weight)
        b = torch.einsum("...sp,...s,...s->...p", signs, groups, weight)
        ridge = 1e-4 * torch.diag_embed(A.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(b.shape))
        scale = torch.linalg.solve(A + ridge, b + (ridge @ scale.unsqueeze(-1)).squeeze(-1)).abs()
    scale = scale.flatten(-2)
    scale = torch.where(scale > 0, scale, torch.full_like(scale, 1e-8))
    return scale if rounding is None else rounding(scale)


def nearest_plane(groups: torch.Tensor, scheme: Scheme, scale: torch.Tensor) -> torch.Tensor:
    """Codes [..., g, size] of the nearest sums of planes; scale [..., g * planes]. Cost: 2^planes comparisons."""
    first = -(1 << (scheme.planes - 1))
    best, least = torch.zeros_like(groups), torch.full_like(groups, torch.inf)
    for code in range(first, -first):
        guess = torch.full_like(groups[..., :1], code)
        error = (values(guess, scheme, scale, None) - groups).abs()
        best, least = torch.where(error < least, guess, best), torch.minimum(error, least)
    return best


def units(groups: torch.Tensor, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Weights [..., g, size] in the units of codes (of levels, where there is a table); scale, zero [..., g]."""
    s = torch.where(scale != 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    if zero is None:
        return groups / s
    z = zero.float().unsqueeze(-1)
    return (groups + z) / s + scheme.qmin if scheme.minimum != "code" else groups / s + z


def nearest(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The nearest codes (float) of weights in the units of codes."""
    if not scheme.tabled:
        return torch.round(x).clamp_(scheme.qmin, scheme.qmax)
    table = torch.tensor(levels(scheme.table), dtype=x.dtype, device=x.device)
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2).to(x.dtype) + scheme.qmin


def snapper(scheme: Scheme, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """snap(w, scale, zero): nearest codes (float) and what they mean, for one weight [n] of each row on its row's grid.

    scale [planes, n], zero float [n] or None. All constants are made here: a call launches arithmetic alone.
    """
    low, high = scheme.qmin, scheme.qmax
    if scheme.planes > 1:
        places = torch.arange(1 << scheme.planes, device=device)
        signs = torch.stack([(places >> p & 1) * 2.0 - 1 for p in range(scheme.planes)], -1)  # [codes, planes]
        return lambda w, scale, zero: pick(w, signs @ scale, -(1 << (scheme.planes - 1)))
    table = torch.tensor(levels(scheme.table), device=device) if scheme.tabled else None
    edges = None if table is None else (table[1:] + table[:-1]) / 2

    def snap(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        s = scale[0]
        if table is not None and edges is not None:
            place = torch.bucketize(w / s, edges)
            return place.float() + low, table[place] * s
        if zero is None:
            q = (w / s).round_().clamp_(low, high)
            return q, q * s
        if scheme.minimum != "code":
            q = ((w + zero) / s).add_(low).round_().clamp_(low, high)
            return q, (q - low).mul_(s).sub_(zero)
        q = (w / s).add_(zero).round_().clamp_(low, high)
        return q, (q - zero).mul_(s)

    return snap


def pick(w: torch.Tensor, sums: torch.Tensor, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of sums [codes, n] to each w [n], and its code."""
    place = (sums - w).abs().argmin(0, keepdim=True)
    return place[0].float() + low, sums.gather(0, place)[0]


def encode(w: torch.Tensor, scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> QTensor:
    """Round each weight to the nearest code of its group's grid."""
    groups = grouped(w.float(), scheme)
    if scheme.planes > 1:
        code = nearest_plane(groups, scheme, scale)
    else:
        code = nearest(units(groups, scheme, scale, zero), scheme)
    return QTensor(scheme, code.to(torch.int8).flatten(-2), scale, zero)
