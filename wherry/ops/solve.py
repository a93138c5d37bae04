"""Linear algebra that several methods share: a damped inverse of a Hessian that repairs itself."""

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
