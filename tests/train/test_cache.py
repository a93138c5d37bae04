"""The teacher's cache: what is read is what was written; k = V is the teacher itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from wherry.distill.kl import KL
from wherry.errors import BadInput, Corrupt, Diverged, Missing
from wherry.train import cache

V, T, N = 50, 6, 10


def facts(**other: object) -> cache.Facts:
    known = {"top": 8, "temperature": 2.0, "classes": V, "dtype": "float32", "teacher": "t", "data": "d", "length": T}
    return cache.Facts(**(known | other))  # type: ignore[arg-type]


def table() -> torch.Tensor:
    return torch.randn(N, T, V, generator=torch.Generator().manual_seed(0)) * 3


def made(folder: Path, given: cache.Facts, logits: torch.Tensor, ranks: int = 1) -> cache.Cached:
    for rank in range(ranks):
        ids = [np.array([i, i, (i + 1) % N]) for i in range(rank, N, ranks)]
        cache.make(folder, given, ids, lambda batch: logits[torch.from_numpy(batch)], rank)
    cache.finish(folder, given)
    return cache.Cached(folder)


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_are_torchs_topk(tmp_path: Path, ranks: int) -> None:
    logits = table()
    found = made(tmp_path / "c", facts(), logits, ranks).rows(np.array([7, 2, 7]))
    values, indices = (logits[[7, 2, 7]] / 2).log_softmax(-1).topk(8)
    assert torch.equal(found["top_values"], values)
    assert torch.equal(found["top_indices"], indices)


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_all_classes_cached_are_the_teacher(tmp_path: Path, direction: str) -> None:
    logits, given = table(), {"targets": torch.zeros(N, T, dtype=torch.int64)}
    student = torch.randn(N, T, V, requires_grad=True)
    step = KL(temperature=2.0, direction=direction)
    cached = made(tmp_path / "c", facts(top=V), logits).rows(np.arange(N))
    grads = []
    for teacher in ({"logits": logits}, cached):
        total, count = step.loss({"logits": student}, teacher, given)
        grads.append((float(total.detach() / count), torch.autograd.grad(total / count, student)[0]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-8)


def test_float16_halves_the_bytes_and_hardly_moves_the_loss(tmp_path: Path) -> None:
    logits, given = table(), {"targets": torch.zeros(N, T, dtype=torch.int64)}
    student, step, found = torch.randn(N, T, V), KL(temperature=2.0), {}
    for dtype in ("float32", "float16"):
        opened = made(tmp_path / dtype, facts(dtype=dtype), logits)
        total, count = step.loss({"logits": student}, opened.rows(np.arange(N)), given)
        found[dtype] = (float(total / count), opened.bytes)
    assert found["float16"][0] == pytest.approx(found["float32"][0], rel=1e-3)
    assert found["float16"][1] < 0.8 * found["float32"][1]


def test_labels_and_large_vocabularies(tmp_path: Path) -> None:
    logits = torch.randn(4, 70_000)
    opened = made_flat(tmp_path / "c", logits)
    values, indices = logits.log_softmax(-1).topk(5)
    found = opened.rows(np.array([3, 0]))
    assert torch.equal(found["top_indices"], indices[[3, 0]])
    assert torch.equal(found["top_values"], values[[3, 0]])


def made_flat(folder: Path, logits: torch.Tensor) -> cache.Cached:
    given = facts(top=5, temperature=1.0, classes=logits.shape[-1], length=0)
    cache.make(folder, given, [np.arange(len(logits))], lambda ids: logits[torch.from_numpy(ids)])
    cache.finish(folder, given)
    return cache.Cached(folder)


def test_faults_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    opened = made(folder, facts(), table())
    with pytest.raises(BadInput, match="lacks sample 99"):
        opened.rows(np.array([99]))
    with pytest.raises(BadInput, match="teacher t, this run has other"):
        opened.facts.check(facts(teacher="other"), folder)
    raw = bytearray((folder / "part-00000.bin").read_bytes())
    (folder / "part-00000.bin").write_bytes(bytes(raw[:-3]))
    with pytest.raises(Corrupt, match="cut off"):
        cache.Cached(folder)
    raw[5] ^= 255
    (folder / "part-00000.bin").write_bytes(bytes(raw))
    with pytest.raises(Corrupt, match="sample 0"):
        cache.Cached(folder).rows(np.array([0]))
    with pytest.raises(Missing):
        cache.Cached(tmp_path)
    with pytest.raises(Diverged):
        made(tmp_path / "nan", facts(), table() * float("nan"))
    assert not list((tmp_path / "nan").iterdir())


def test_an_unfinished_part_is_made_again(tmp_path: Path) -> None:
    folder, logits, calls = tmp_path / "c", table(), []

    def failing(ids: np.ndarray) -> torch.Tensor:
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits[torch.from_numpy(ids)]

    with pytest.raises(KeyboardInterrupt):
        cache.make(folder, facts(), [np.array([i]) for i in range(N)], failing)
    assert not cache.ready(folder)
    assert len(made(folder, facts(), logits).rows(np.arange(N))["top_values"]) == N


def test_parts_that_another_teacher_left_are_not_taken(tmp_path: Path) -> None:
    """A rank had finished its part when all were killed; the next run has another teacher."""
    folder, old, new = tmp_path / "c", table(), table() + torch.arange(V) % 7
    ids = [np.arange(N)]
    for given, logits in ((facts(), old), (facts(), new), (facts(teacher="other"), new)):
        cache.begin(folder, given, ranks=1)
        cache.make(folder, given, ids, lambda batch, of=logits: of[torch.from_numpy(batch)])
        cache.finish(folder, given)
        expected = old if given == facts() else new  # the same teacher's part is kept
        values = (expected / 2).log_softmax(-1).topk(8)[0]
        assert torch.equal(cache.Cached(folder).rows(np.arange(N))["top_values"], values)
        (folder / cache.FACTS).unlink()
