"""Weight sharing against brute force over all cuts of a few numbers, and the laws that it keeps."""

import itertools

import pytest
import torch

from wherry.errors import BadInput
from wherry.prune.cluster import Cluster


def test_few_values_and_zeros_stay() -> None:
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    w[w.abs() < 0.7] = 0
    for bits in (1, 2, 5):
        v = Cluster(bits=bits).prune(w)
        assert torch.equal(v == 0, w == 0)
        assert len(v.unique()) <= 2**bits
    errors = [float((Cluster(bits=bits).prune(w) - w).norm()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


def test_each_value_is_the_mean_of_its_weights_and_the_nearest() -> None:
    w = torch.randn(200, generator=torch.Generator().manual_seed(1))[None]
    v = Cluster(bits=3).prune(w)
    for value in v.unique():
        assert float((w[v == value].mean() - value).abs()) < 1e-5
    assert torch.allclose((w[..., None] - v.unique()).abs().min(-1).values, (w - v).abs(), atol=1e-6)


def test_near_the_best_of_all_cuts() -> None:
    """Ten numbers, three clusters: contiguous in order, so 36 cuts are all there are."""
    for seed in range(8):
        w = torch.randn(10, generator=torch.Generator().manual_seed(seed)).sort().values
        best = min(
            sum(float((part - part.mean()).square().sum()) for part in (w[:i], w[i:j], w[j:]))
            for i, j in itertools.combinations(range(1, 10), 2)
        )
        found = float((Cluster(bits=2).prune(w[None])[0] - w).square().sum())
        assert best - 1e-5 <= found <= 3 * best + 1e-5


def test_odd_weights() -> None:
    assert torch.equal(Cluster().prune(torch.zeros(3, 4)), torch.zeros(3, 4))
    one = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert torch.equal(Cluster().prune(one), one)
    with pytest.raises(BadInput):
        Cluster(bits=0)
    with pytest.raises(BadInput):
        Cluster(bits=11)
