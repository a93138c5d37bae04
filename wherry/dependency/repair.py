"""Repair: what stays makes up for what goes: least squares for the layers that read removed lanes.

Source: the update of SlimGPT (Ling et al. 2024, arXiv:2412.18110) and of ThiNet (Luo et al. 2017, arXiv:1707.06342),
    in closed form; with the column of ones it holds FLAP's bias too.
Idea:   W' = W H[:, K] (H[K, K] + damp)^-1 minimises |W x - W' x_K|^2 over the inputs; H: their second moments.
Shapes: W [outputs, inputs]; K the columns that stay, and one for the bias where the layer has one.
Cost:   k^3 for each reading layer.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from wherry.dependency import Group
from wherry.dependency.importance import DAMP, columns, readers


def repair(module: nn.Module, removed: Sequence[Group], grams: Mapping[str, Tensor]) -> dict[str, float]:
    """Change the reading layers of a module that is not cut yet. Returns {layer: share of the lost energy won back}."""
    won = {}
    for name, reading in readers(module, removed).items():
        if name not in grams:
            continue
        W, H = reading.matrix, grams[name]
        gone = np.zeros(W.shape[1], bool)
        for group in removed:
            gone[columns(group, name, reading)] = True
        bias = getattr(reading.layer, "bias", None)
        R, K = (torch.from_numpy(np.flatnonzero(mask)) for mask in (gone, ~gone))
        if bias is not None:
            K = torch.cat([K, torch.tensor([len(gone)])])
        ridge = DAMP * H.diagonal()[:-1].mean().clamp(min=1e-12) * torch.eye(len(K), dtype=H.dtype)
        if bias is not None:
            ridge[-1, -1] = 0
        change = torch.linalg.solve(H[K][:, K] + ridge, H[K][:, R] @ W[:, R].T).T  # what the lost columns gave
        lost = float((W[:, R] @ H[R][:, R] * W[:, R]).sum())
        left = lost - 2 * float((change @ H[K][:, R] * W[:, R]).sum()) + float((change @ H[K][:, K] * change).sum())
        won[name] = 1 - left / lost if lost > 0 else 1.0
        columns_kept = K[:-1] if bias is not None else K
        W = W.clone()
        W[:, columns_kept] += change[:, : len(columns_kept)]
        reading.put(W)
        if bias is not None:
            with torch.no_grad():
                bias += change[:, -1].to(bias.dtype)
    return won
