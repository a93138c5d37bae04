"""Linear algebra that several methods share: an inverse of a Hessian that repairs itself, scales fitted to codes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from wherry.errors import Diverged
from wherry.levels import levels
from wherry.ops import grid
from wherry.scheme import Scheme


class Hessian(NamedTuple):
    """A sum over tokens, so that statistics of several ranks add up: sum of x x^T, and the number of tokens."""

    total: torch.Tensor  # [k, k] float32
    tokens: int

    @classmethod
    def add(cls, stat: "Hessian | None", x: torch.Tensor) -> "Hessian":
        """The statistic with the tokens x [tokens, k] added."""
        x = x.float()
        if stat is None:
            return cls(x.T @ x, len(x))
        return cls(torch.addmm(stat.total, x.T, x), stat.tokens + len(x))


def inverse_factor(hessian: torch.Tensor, damp: float, most: float = 1.0) -> tuple[torch.Tensor, float]:
    """Upper U with U^T U = (H + damp * mean(diag H) * I)^-1, and the damping that it took.

    Tries `damp`, then ten times as much, until the factorisation succeeds or `most` is passed.
    Computed in float64: H [k, k] takes 8 k^2 bytes; time O(k^3).

    Raises:
        Diverged: H has NaN or inf, or is not positive definite even at `most`.
    """
    H = hessian.double()
    if not torch.isfinite(H).all():
        raise Diverged("the calibration statistics hold NaN or inf: check the model's activations and the data")
    mean = H.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(H), dtype=torch.float32), damp  # no input was ever non-zero: every choice is as good
    eye = torch.eye(len(H), dtype=H.dtype)
    while damp <= most:
        L, failed = torch.linalg.cholesky_ex(H + damp * mean * eye)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and torch.isfinite(U).all():
                return U.float(), damp
        damp = max(damp, 1e-4) * 10
    raise Diverged(f"the Hessian is not positive definite even with damp={most}: use more calibration data")


def columns(
    w: torch.Tensor, U: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme,
    order: torch.Tensor, block: int = 128, P: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Codes of w [n, k], column after column in the given order; the rest pays the error of each: the loop of GPTQ.

    U [k, k]: upper factor of H^-1, in that order. scale, zero [n, g]: of each column's own group, fixed. P [k, k]: what
    one unit of a column asks of the columns after it (GPTAQ), in that order, or None. An exact zero stays zero.
    Lazy blocks of `block` columns. Returns code float [n, k]. Cost: O(n k^2).
    """
    k = w.shape[-1]
    size, planes = k * scheme.planes // scale.shape[-1], scheme.planes
    keep, W = (w != 0)[:, order], w[:, order].clone()
    code = torch.empty_like(W)
    group = (order // size).tolist()
    null = neutral(scheme, scale, zero)
    for i in range(0, k, block):
        j = min(i + block, k)
        B, Ub = W[:, i:j].clone(), U[i:j, i:j]
        E, began = torch.empty_like(B), torch.empty_like(B)
        for c in range(j - i):
            g, w_c = group[i + c], B[:, c]
            z = None if zero is None else zero[:, g]
            q, v = grid.snap(w_c, scheme, scale[:, g] if planes == 1 else scale[:, g * planes : (g + 1) * planes], z)
            if null is not None:
                q, v = torch.where(keep[:, i + c], q, null[:, g]), v * keep[:, i + c]
            E[:, c] = (w_c - v) / Ub[c, c]
            if P is not None:
                began[:, c] = w_c
                B[:, c + 1 :] += began[:, c : c + 1] * P[i + c, i + c + 1 : j]
            B[:, c:] -= E[:, c : c + 1] * Ub[c, c:]
            code[:, i + c] = q
        W[:, j:] -= E @ U[i:j, j:]
        if P is not None:
            W[:, j:] += began @ P[i:j, j:]
    return code[:, torch.argsort(order)]


def zero_columns(
    w: torch.Tensor, U: torch.Tensor, keep: Callable[[torch.Tensor], torch.Tensor], block: int = 128, group: int = 0
) -> torch.Tensor:
    """W [n, k] with zeros, column after column; the rest pays what each costs: the loop of SparseGPT.

    U [k, k]: upper factor of H^-1. keep(score [n, b]) -> the mask of weights that stay among b columns: asked once for
    each `block` of columns, or, with `group`, for each so many when they are reached. A weight that is zero stays zero,
    and is offered first. Returns float [n, k]. Cost: O(n k^2).
    """
    k, there, W = w.shape[-1], w != 0, w.clone()
    for i in range(0, k, block):
        j = min(i + block, k)
        B, Ub = W[:, i:j], U[i:j, i:j]
        E, d, step = torch.empty_like(B), Ub.diagonal(), group or j - i
        stay = there[:, i:j].clone()
        for c in range(j - i):
            if c % step == 0:
                part = slice(c, c + step)
                score = torch.where(there[:, i:j][:, part], (B[:, part] / d[part]).square(), -1.0)
                stay[:, part] &= keep(score)
            gone = B[:, c] * ~stay[:, c]
            E[:, c] = gone / d[c]
            B[:, c + 1 :] -= E[:, c : c + 1] * Ub[c, c + 1 :]
        B *= stay
        W[:, j:] -= E @ U[i:j, j:]
    return W


def fit_kept(w: torch.Tensor, v: torch.Tensor, hessian: torch.Tensor, steps: int) -> torch.Tensor:
    """Lessen ||(w - v) X||^2 over the weights of v [n, k] that are not zero: conjugate gradients, all rows at once.

    hessian [k, k], damped; preconditioned by its diagonal. Never worse than v. Cost: O(n k^2) for each step.
    """
    mask, diagonal = v != 0, hessian.diagonal().clamp(min=1e-30)
    x, r = v.clone(), ((w - v) @ hessian) * mask
    z = r / diagonal
    p, rz = z.clone(), (r * z).sum(1, keepdim=True)
    for _ in range(steps):
        q = (p @ hessian) * mask
        a = torch.nan_to_num(rz / (p * q).sum(1, keepdim=True), posinf=0.0, neginf=0.0)
        x += a * p
        r -= a * q
        z = r / diagonal
        new = (r * z).sum(1, keepdim=True)
        p = z + torch.nan_to_num(new / rz, posinf=0.0, neginf=0.0) * p
        rz = new
    return x


def neutral(scheme: Scheme, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor | None:
    """The code [n, g] (float) that means zero; None for a grid that has no zero (binary, a float minimum)."""
    if scheme.planes > 1 or scheme.minimum != "code" or scheme.table == "binary":
        return None
    if zero is not None:
        return zero.float()
    place = float(levels(scheme.table).index(0.0) + scheme.qmin) if scheme.tabled else 0.0
    return torch.full_like(scale, place)


def refit_codes(
    target: torch.Tensor, code: torch.Tensor, scheme: Scheme, hessian: torch.Tensor, scale: torch.Tensor,
    zero: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`refit` for the codes [n, k] of any grid: scales [n, g] that bring them near `target`; planes stay."""
    if scheme.planes > 1:
        return scale
    size = code.shape[-1] // scale.shape[-1]
    if scheme.tabled:
        table = torch.tensor(levels(scheme.table))
        return refit(target, table[code.long() - scheme.qmin], hessian, scale)
    if zero is None:
        return refit(target, code, hessian, scale)
    z = zero.float().repeat_interleave(size, 1)
    if scheme.minimum != "code":
        return refit(target + z, code - scheme.qmin, hessian, scale)
    return refit(target, code - z, hessian, scale)


def refit(
    w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, ridge: float = 0.01, rows: int = 256
) -> torch.Tensor:
    """Scales that lessen ||(W - S Q) X||^2 while the codes stay: for each row, least squares over its groups.

    Source: the scale update of COMQ (Zhang et al. 2024, arXiv:2403.07134), with all groups of a row together.
    Shapes: w, q [n, k] (q = code - zero); hessian [k, k], damped; scale [n, g] positive. Returns [n, g] positive.
    ridge: pull to the old scales, as a fraction of the mean diagonal of a row's normal equations.
    A scale that would leave half to twice its old value stays. Cost: O(n k^2 + n g^3) time, `rows` rows at a time.
    """
    groups, size = scale.shape[1], w.shape[1] // scale.shape[1]
    out = scale.clone()
    for i in range(0, len(w), rows):
        Q, old = q[i : i + rows].float(), scale[i : i + rows]
        b = ((w[i : i + rows].float() @ hessian) * Q).unflatten(-1, (groups, size)).sum(-1)
        A = torch.empty(len(Q), groups, groups)
        for j in range(groups):
            part = slice(j * size, (j + 1) * size)
            A[:, j] = ((Q[:, part] @ hessian[part]) * Q).unflatten(-1, (groups, size)).sum(-1)
        pull = ridge * A.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
        pull = torch.where(pull > 0, pull, torch.ones_like(pull))  # a row of zeros: any scale is as good
        s = torch.linalg.solve(A + torch.diag_embed(pull.expand(-1, groups)), b + pull * old)
        out[i : i + rows] = torch.where((s > old / 2) & (s < old * 2), s, old)
    return out
