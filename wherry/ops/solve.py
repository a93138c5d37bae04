"""Linear algebra that several methods share: an inverse of a Hessian that repairs itself, scales fitted to codes."""

import torch

from wherry.errors import Diverged


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
