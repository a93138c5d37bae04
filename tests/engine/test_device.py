"""--device: refused where there is none; solvers and their statistics lie where the plan says, codes come back."""

from pathlib import Path

import pytest
import torch

from tests.conftest import write_llama
from wherry import api, data, deliver
from wherry.checkpoint import Checkpoint
from wherry.engine import walk
from wherry.errors import BadInput, Missing
from wherry.quant.gptaq import GPTAQ
from wherry.recipe import Recipe

RECIPE = "gptaq:scheme=W3A16,group_size=32,targets=re:.*mlp.*,embedding=keep | rtn:scheme=W4A16,group_size=32"


def weights(folder: Path, out: Path, device: str) -> dict[str, torch.Tensor]:
    plan = Recipe.parse(RECIPE).plan(Checkpoint.open(folder))
    plan.device = device
    batches = deliver.calibration(plan.checkpoint, data.read(data.shipped("calibration")), 4, 32, 0)
    deliver.deliver(plan, out, (), batches, {}, lambda result: None, api.quiet)
    made = Checkpoint.open(out)
    return {row.name: walk.floats(made.tensor(row.name)) for row in plan.taken()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_device_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama")
    with pytest.raises(Missing, match="no CUDA device here; leave --device out"):
        api.compress(model, tmp_path / "out", RECIPE, device="cuda")
    with pytest.raises(BadInput, match="cpu or cuda"):
        api.compress(model, tmp_path / "out", RECIPE, device="rocket")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_weights_and_statistics_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device by another name (cpu:0) stands for one: all that the solver is given has been sent there."""
    model, sent, given = write_llama(tmp_path / "llama"), [], []
    to, solve, observe = torch.Tensor.to, GPTAQ.solve, GPTAQ.observe

    def watched(self: torch.Tensor, *args: object, **more: object) -> torch.Tensor:
        found = to(self, *args, **more)
        if args == ("cpu:0",):
            sent.append(found)
        return found

    def seen(self: GPTAQ, w: torch.Tensor, *more: object) -> object:
        given.append(any(w is each for each in sent))
        return solve(self, w, *more)

    def summed(self: GPTAQ, stat: object, x: torch.Tensor, x_ref: torch.Tensor) -> object:
        given.append(all(any(one is each for each in sent) for one in (x, x_ref)))
        sent.clear()
        return observe(self, stat, x, x_ref)

    plain = weights(model, tmp_path / "plain", "cpu")
    monkeypatch.setattr(torch.Tensor, "to", watched)
    monkeypatch.setattr(GPTAQ, "solve", seen)
    monkeypatch.setattr(GPTAQ, "observe", summed)
    other = weights(model, tmp_path / "other", "cpu:0")
    assert len(given) > 6
    assert all(given)
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.gpu
def test_the_same_model_by_a_gpu(tmp_path: Path) -> None:
    """Sums in another order may turn a few codes; no more than that."""
    model = write_llama(tmp_path / "llama")
    plain, other = (weights(model, tmp_path / device, device) for device in ("cpu", "cuda"))
    for name, w in plain.items():
        assert float((other[name] - w).norm() / w.norm()) < 0.1
