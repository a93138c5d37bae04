"""Importance: how much a model would lose with a group of lanes.

Source: magnitude: Li et al. 2017 (arXiv:1608.08710). activation: the sum over reading layers of |W_i|^2 E[x_i^2], Wanda
    (Sun et al. 2023, arXiv:2306.11695) for whole lanes, less the mean where a bias can stand for it, as in FLAP (An et
    al. 2023, arXiv:2312.11983). taylor: Molchanov et al. 2019 (arXiv:1906.10771), summed over a group as in LLM-Pruner.
    hessian: W_S (H^-1_SS)^-1 W_S^T, the least error of the reading layer once its other weights have made up for S:
    optimal brain surgeon for structures, ZipLM (Kurtic et al. 2023, arXiv:2302.04089), SlimGPT (arXiv:2412.18110).
Shapes: one float per group; comparable within a family, and between families after division by their mean.
Cost:   magnitude none; activation and hessian one pass, the latter k^3 per reading layer; taylor a pass with gradients.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from wherry.dependency import Group
from wherry.dependency.statistics import Batches, Reader, gradients, reader
from wherry.errors import Unsupported

METHODS = ("magnitude", "activation", "taylor", "hessian")
DAMP = 0.01  # of the mean of the diagonal


def readers(module: nn.Module, groups: Sequence[Group]) -> dict[str, Reader]:
    """Layers that read lanes of these groups, by the name of their weight."""
    places = dict.fromkeys(place for group in groups for place in group.lanes)
    found = {name: reader(module, name, d) for name, d in places}
    return {name: r for name, r in found.items() if r is not None and (name, 0 if r.turned else 1) in places}


def columns(group: Group, name: str, reading: Reader) -> np.ndarray:
    """Columns of a reading layer's matrix that belong to a group."""
    index = group.lanes.get((name, 0 if reading.turned else 1))
    if index is None:
        return np.zeros(0, np.int64)
    return (index[:, None] * reading.each + np.arange(reading.each)).ravel()


def along(x: Tensor, d: int) -> np.ndarray:
    """Sums over all dimensions but one."""
    return x.movedim(d, 0).flatten(1).sum(1).numpy() if x.ndim > 1 else x.numpy()


def magnitude(module: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    """Sum of squares of all weights of each group."""
    scores = np.zeros(len(groups))
    squares: dict[tuple[str, int], np.ndarray] = {}
    names = {name for name, _ in module.named_parameters()}
    for i, group in enumerate(groups):
        for (name, d), index in group.lanes.items():
            if name in names and (name, d) not in squares:
                squares[name, d] = along(module.get_parameter(name).detach().double() ** 2, d)
            if name in names:
                scores[i] += squares[name, d][index].sum()
    return scores


def activation(module: nn.Module, groups: Sequence[Group], grams: Mapping[str, Tensor], centre: bool) -> np.ndarray:
    """Sum over reading layers of |W_i|^2 times the mean square, or the variance, of what lane i brings."""
    scores = np.zeros(len(groups))
    for name, reading in readers(module, groups).items():
        gram = grams[name]
        n = gram[-1, -1]
        power = gram.diagonal()[:-1] / n
        if centre and getattr(reading.layer, "bias", None) is not None:
            power = power - (gram[-1, :-1] / n) ** 2
        lost = (reading.matrix.square().sum(0) * power.clamp(min=0)).numpy()
        for i, group in enumerate(groups):
            scores[i] += lost[columns(group, name, reading)].sum()
    return scores


def taylor(
    module: nn.Module, groups: Sequence[Group], batches: Batches, progress: Callable[[int, int], None]
) -> np.ndarray:
    """Mean over batches of (sum over the group of weight times gradient)^2."""
    scores, names = np.zeros(len(groups)), {name for name, _ in module.named_parameters()}
    for grads in gradients(module, batches, progress):
        sums = np.zeros(len(groups))
        cache: dict[tuple[str, int], np.ndarray] = {}
        for i, group in enumerate(groups):
            for (name, d), index in group.lanes.items():
                if name in names and name in grads:
                    if (name, d) not in cache:
                        product = module.get_parameter(name).detach().double() * grads[name].double()
                        cache[name, d] = along(product, d)
                    sums[i] += cache[name, d][index].sum()
        scores += sums**2 / len(batches)
    return scores


def hessian(module: nn.Module, groups: Sequence[Group], grams: Mapping[str, Tensor]) -> np.ndarray:
    """Least error of the reading layers when one group is gone and all other columns make up for it."""
    scores = np.zeros(len(groups))
    for name, reading in readers(module, groups).items():
        inverse = torch.linalg.inv(damped(grams[name]))
        W = reading.matrix
        single = W.square().sum(0) / inverse.diagonal()
        for i, group in enumerate(groups):
            S = torch.from_numpy(columns(group, name, reading))
            if len(S) == 1:
                scores[i] += float(single[S]) / float(grams[name][-1, -1])
            elif len(S):
                lost = torch.linalg.solve(inverse[S][:, S], W[:, S].T)
                scores[i] += float((W[:, S].T * lost).sum()) / float(grams[name][-1, -1])
    return scores


def damped(gram: Tensor) -> Tensor:
    """The moments of the inputs (the ones left out), with a little on the diagonal."""
    H = gram[:-1, :-1]
    return H + DAMP * H.diagonal().mean().clamp(min=1e-12) * torch.eye(len(H), dtype=H.dtype)


def score(
    method: str, module: nn.Module, groups: Sequence[Group], grams: Mapping[str, Tensor],
    batches: Batches, progress: Callable[[int, int], None] = lambda done, total: None, centre: bool = True,
) -> np.ndarray:  # fmt: skip
    """Importance of each group by one of METHODS.

    Raises Unsupported when a method needs layers that read the lanes and there are none that it can watch.
    """
    if method == "magnitude":
        return magnitude(module, groups)
    if method == "taylor":
        return taylor(module, groups, batches, progress)
    if not readers(module, groups):
        place = sorted(groups[0].lanes)[0][0]
        raise Unsupported(f"{method} cannot watch the layer that reads {place}; use importance=taylor or magnitude")
    if method == "activation":
        return activation(module, groups, grams, centre)
    return hessian(module, groups, grams)
