"""Linear algebra that several methods share: an inverse of a Hessian that repairs itself, scales fitted to codes."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from wherry.errors import Diverged
from wherry.levels import levels
from wherry.ops import grid, tiles
from wherry.scheme import Scheme

INNER = 32  # columns whose errors are paid one by one; those beyond get them as one product


class Last:
    """The last factor that was made, while the statistic that it was made of lives: layers share their inputs."""

    made_of: "weakref.ref[torch.Tensor] | None" = None
    key: object = None
    factor: tuple[torch.Tensor, torch.Tensor, float] | None = None


def ordered_factor(
    total: torch.Tensor, tokens: int, damp: float, falling: bool = True
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(order, U, damping) of H = total / tokens: columns by falling diag H, or as they are, and `inverse_factor` so.

    The next call with the same tensor gets the same answer without work. Cost: as inverse_factor.
    """
    key = (tokens, damp, falling)
    alive = Last.made_of() if Last.made_of is not None else None
    if alive is total and Last.key == key and Last.factor is not None:
        return Last.factor
    H = total / max(tokens, 1)
    k = len(H)
    order = torch.arange(k, device=H.device)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if falling else order
    U, taken = inverse_factor(H[order][:, order], damp)
    Last.made_of, Last.key, Last.factor = weakref.ref(total), key, (order, U, taken)
    return Last.factor


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
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    if mean <= 0:
        return eye.float(), damp  # no input was ever non-zero: every choice is as good
    while damp <= most:
        L, failed = torch.linalg.cholesky_ex((H + damp * mean * eye).flip(0, 1))
        if not failed:  # J H J = L L^T, so H = R R^T with R = J L J upper, and H^-1 = U^T U with U = R^-1
            U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
            if torch.isfinite(U).all():
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
    Lazy blocks of `block` columns, and of INNER inside of them. Returns code float [n, k]. Cost: O(n k^2). Nothing in
    the loop waits for a device or makes a tensor of Python numbers.
    """
    k = w.shape[-1]
    W = w.T[order].contiguous()  # [k, n]: what is done column by column lies in one piece
    keep, code = W != 0, torch.empty_like(W)
    group = order // (k * scheme.planes // scale.shape[-1])
    steps = scale.T.unflatten(0, (-1, scheme.planes))[group].contiguous()  # [k, planes, n]
    zeros = None if zero is None else zero.T[group].float()
    null = neutral(scheme, scale, zero)
    rest = None if null is None else null.T[group]
    snap, falls = grid.snapper(scheme, w.device), U.diagonal()
    for i in range(0, k, block):
        j = min(i + block, k)
        E = torch.empty_like(W[i:j])
        began = torch.empty_like(E) if P is not None else None
        for a in range(i, j, INNER):
            b = min(a + INNER, j)
            for c in range(a, b):
                x = W[c]
                q, v = snap(x, steps[c], None if zeros is None else zeros[c])
                if rest is not None:
                    q, v = torch.where(keep[c], q, rest[c]), v * keep[c]
                torch.div(x - v, falls[c], out=E[c - i])
                code[c] = q
                if P is not None and began is not None:
                    began[c - i] = x
                    W[c + 1 : b].addr_(P[c, c + 1 : b], began[c - i])
                W[c + 1 : b].addr_(U[c, c + 1 : b], E[c - i], alpha=-1)
            W[b:j].addmm_(U[a:b, b:j].T, E[a - i : b - i], alpha=-1)
            if P is not None and began is not None:
                W[b:j].addmm_(P[a:b, b:j].T, began[a - i : b - i])
        W[j:].addmm_(U[i:j, j:].T, E, alpha=-1)
        if P is not None and began is not None:
            W[j:].addmm_(P[i:j, j:].T, began)
    return code[torch.argsort(order)].T.contiguous()


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
    size, ties = code.shape[-1] // scale.shape[-1], tiles.rows(scheme, len(code))
    if scheme.tabled:
        table = torch.tensor(levels(scheme.table), device=code.device)
        return refit(target, table[code.long() - scheme.qmin], hessian, scale, ties)
    if zero is None:
        return refit(target, code, hessian, scale, ties)
    z = zero.float().repeat_interleave(size, 1)
    if scheme.minimum != "code":
        return refit(target + z, code - scheme.qmin, hessian, scale, ties)
    return refit(target, code - z, hessian, scale, ties)


def refit(
    w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, ties: int = 1, ridge: float = 0.01,
    rows: int = 256,
) -> torch.Tensor:  # fmt: skip
    """Scales that lessen ||(W - S Q) X||^2 while the codes stay: for each row, least squares over its groups.

    Source: the scale update of COMQ (Zhang et al. 2024, arXiv:2403.07134), with all groups of a row together.
    Shapes: w, q [n, k] (q = code - zero); hessian [k, k], damped; scale [n, g] positive. Returns [n, g] positive.
    ties: how many neighbouring rows share their scales; their normal equations are added.
    ridge: pull to the old scales, as a fraction of the mean diagonal of a row's normal equations.
    A scale that would leave half to twice its old value stays. Cost: O(n k^2 + n g^3) time, `rows` rows at a time.
    """
    groups, size = scale.shape[1], w.shape[1] // scale.shape[1]
    out = scale.clone()
    for i in range(0, len(w), max(rows, ties) // ties * ties):
        held = slice(i, i + max(rows, ties) // ties * ties)
        Q, old = q[held].float(), scale[held]
        b = ((w[held].float() @ hessian) * Q).unflatten(-1, (groups, size)).sum(-1)
        A = torch.empty(len(Q), groups, groups, device=Q.device)
        for j in range(groups):
            part = slice(j * size, (j + 1) * size)
            A[:, j] = ((Q[:, part] @ hessian[part]) * Q).unflatten(-1, (groups, size)).sum(-1)
        if ties > 1:
            A, b = (torch.stack([one.sum(0) for one in each.split(ties)]) for each in (A, b))
            old = old[::ties]
        pull = ridge * A.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
        pull = torch.where(pull > 0, pull, torch.ones_like(pull))  # a row of zeros: any scale is as good
        s = torch.linalg.solve(A + torch.diag_embed(pull.expand(-1, groups)), b + pull * old)
        s = torch.where((s > old / 2) & (s < old * 2), s, old)
        out[held] = s.repeat_interleave(ties, 0)[: len(Q)]
    return out
