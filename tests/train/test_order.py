import numpy as np
import pytest

from wherry.errors import BadInput
from wherry.train import order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_epoch_is_a_permutation(n: int) -> None:
    found = order.shuffled(np.arange(n), n, 5, 2)
    assert sorted(found.tolist()) == list(range(n))


def test_epochs_and_seeds_differ_and_no_place_is_favoured() -> None:
    n = 1000
    a, b, c = (order.shuffled(np.arange(n), n, *key) for key in ((0, 0), (0, 1), (1, 0)))
    assert (a == b).mean() < 0.01
    assert (a == c).mean() < 0.01
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.1
    means = np.mean([order.shuffled(np.arange(50), 50, seed, 0) for seed in range(400)], axis=0)
    assert abs(means - 24.5).max() < 4.5  # 4.5 standard errors of 14.4 / sqrt(400)


def test_steps_walk_through_epochs_without_a_gap() -> None:
    walked = np.concatenate([order.ids(step, 6, 20, 3) for step in range(10)])
    for epoch in range(3):
        assert sorted(walked[20 * epoch : 20 * epoch + 20].tolist()) == list(range(20))


def test_a_trillion_samples_cost_nothing() -> None:
    found = order.ids(10**9, 512, 10**12, 0)
    assert len(set(found.tolist())) == 512
    assert 0 <= found.min() <= found.max() < 10**12


def test_shares_are_disjoint_and_whole() -> None:
    batch = order.mixed(3, 12, [50, 10], [2.0, 1.0], 0)
    assert [int((batch < 50).sum()), int((batch >= 50).sum())] == [8, 4]
    parts = [order.share(batch, rank, 4) for rank in range(4)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    with pytest.raises(BadInput, match="--batch 15"):
        order.share(batch, 0, 5)
    with pytest.raises(BadInput, match="cannot hold a sample of each"):
        order.shares([1.0, 1000.0], 4)
