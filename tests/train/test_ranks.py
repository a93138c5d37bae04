"""Several processes give what one gives, and see together what one sees; on errors all of them end."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_llama
from tests.train.conftest import rows, torchrun, wide
from wherry.train import loop
from wherry.train.job import Job

TWO = {"dp": {}, "fsdp": {"dp": 1, "fsdp": 2}, "tp": {"tp": 2}, "pp": {"pp": 2}}
FOUR = {
    "dp": {}, "fsdp": {"dp": 1, "fsdp": 4}, "tp": {"tp": 4}, "pp": {"pp": 4}, "fsdp tp": {"dp": 1, "fsdp": 2, "tp": 2},
    "dp tp": {"dp": 2, "tp": 2}, "fsdp pp": {"dp": 1, "fsdp": 2, "pp": 2}, "tp pp": {"tp": 2, "pp": 2},
}  # fmt: skip
RTOL = {"sgd": 1e-5, "adamw": 1e-3}
LR = {"sgd": {"optimizer": "sgd", "learning_rate": 1e-2}, "adamw": {"optimizer": "adamw"}}


def same(found: dict, reference: dict, optimizer: str) -> None:
    """Loss curves and held-out losses agree."""
    assert "error" not in found, found
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=RTOL[optimizer])
    np.testing.assert_allclose(found["held_out"], reference["held_out"], rtol=RTOL[optimizer])
    assert found["losses"][-1] < found["losses"][0] - 0.05  # it did learn


def equal(models: dict, layouts: dict, ranks: int, optimizers: tuple, job_of: Callable, folder: Path) -> None:
    """Every layout against one process."""
    cases, references = [], {}
    for label, model in models.items():
        for optimizer in optimizers:
            more = LR[optimizer]
            references[label, optimizer] = loop.run(Job.from_dict(job_of(model, f"{label} {optimizer} one", **more)))
            for name, layout in layouts.items():
                out = f"{label} {optimizer} {name}"
                cases.append({"name": out, "job": job_of(model, out, **more, **layout)})
    found = torchrun(folder / "ranks", cases, ranks)
    for (label, optimizer), reference in references.items():
        for name in layouts:
            same(found[f"{label} {optimizer} {name}"], reference, optimizer)


def test_two_processes_give_what_one_gives(tmp_path: Path, job_of: Callable) -> None:
    """Also a term on the weights, clipping, micro-batches of unequal size, untied heads; and who saw which samples."""
    model = write_llama(tmp_path / "m", tied=False)
    more = {"optimizer": "sgd", "learning_rate": 1e-2, "steps": 6, "clip": 0.5, "save_every": 3, "batch": 12}
    one = loop.run(Job.from_dict(job_of(model, "one", **more)))
    cut = {"micro_batch": 4}
    cases = [
        {"name": name, "job": job_of(model, f"out {name}", **more, **layout, **(cut if name == "dp" else {}))}
        for name, layout in TWO.items()
    ]
    cases.append({"name": "label", "job": job_of(model, "x", data=str(odd_tokens(tmp_path)), held_out="", dp=2)})
    cases.append({"name": "divide", "job": job_of(model, "x", batch=9)})
    cases.append({"name": "layout", "job": job_of(model, "x", fsdp=3)})
    found = torchrun(tmp_path / "ranks", cases, 2)
    for name in TWO:
        np.testing.assert_allclose(found[name]["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(found[name]["held_out"], one["held_out"], rtol=1e-5)
    seen = [rows(tmp_path / "out dp", rank) for rank in range(2)]
    single = rows(tmp_path / "one", 0)
    for update in range(1, 7):
        first, second = (each[update] for each in seen)
        assert not set(first) & set(second)
        assert sorted(first + second) == sorted(single[update])
    assert rows(tmp_path / "out tp", 1) == rows(tmp_path / "out tp", 0) == single
    said = {"label": "label 600 is out of range", "divide": "--batch 10", "layout": "cannot be laid out"}
    for name, text in said.items():
        assert found[name]["error"] == "BadInput"
        assert text in found[name]["text"]
        other = json.loads((tmp_path / "ranks" / f"{name}.rank1.json").read_text())
        assert other == found[name]  # every rank ends with the same error, and the first alone says it


def odd_tokens(folder: Path) -> Path:
    """Token ids of which one, in a sample that the second rank gets, is outside of the vocabulary."""
    tokens = np.random.default_rng(0).integers(0, 512, 32 * 8 + 1)
    tokens[200] = 600
    np.save(folder / "tokens.npy", tokens)
    return folder / "tokens.npy"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_layouts_of_two(tmp_path: Path, job_of: Callable, optimizer: str) -> None:
    equal({"tied": write_llama(tmp_path / "m")}, TWO, 2, (optimizer,), job_of, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_layouts_of_four(tmp_path: Path, job_of: Callable, optimizer: str) -> None:
    model = wide(tmp_path / "m")
    equal({"tied": model}, FOUR, 4, (optimizer,), job_of, tmp_path)


