"""A run with the teacher's answers on disk is the run with the teacher in memory."""

from pathlib import Path

import pytest

from tests.conftest import write_llama
from wherry.data import shipped
from wherry.errors import BadInput
from wherry.train.job import Job
from wherry.train.loop import run


def test_all_classes_cached_give_the_same_losses(tmp_path: Path) -> None:
    student, teacher = write_llama(tmp_path / "s"), write_llama(tmp_path / "t", seed=1)
    text = tmp_path / "text.txt"
    text.write_text(shipped("calibration").read_text(encoding="utf8")[:20_000], encoding="utf8")
    losses = {}
    for top in (0, 4096, 8):
        job = Job(
            model=str(student), teacher=str(teacher), out=str(tmp_path / f"out{top}"), data=str(text), length=16,
            recipe="kl:temperature=2.0 | qat:scheme=W4A16,group_size=32", steps=5, batch=4, learning_rate=1e-2, top=top,
        )  # fmt: skip
        losses[top] = run(job)["losses"]
    assert losses[4096] == pytest.approx(losses[0], rel=5e-3)  # the cache is float16
    assert all(a <= b + 1e-6 for a, b in zip(losses[8][:1], losses[0][:1], strict=True))  # a bound
    for recipe in ("kl | hidden", "kl | onpolicy", "kl | kl:temperature=2"):
        with pytest.raises(BadInput, match="leave top out"):
            run(Job(model=str(student), teacher=str(teacher), out=str(tmp_path / "no"), data=str(text), length=16,
                    recipe=recipe, steps=1, top=8))  # fmt: skip
    with pytest.raises(BadInput, match="teacher"):
        run(Job(model=str(student), out=str(tmp_path / "no"), data=str(text), recipe="kl", steps=1, top=8))
