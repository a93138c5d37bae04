"""ONNX graphs of pictures: they learn, their batch norms stay or gather, and two processes give what one gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.train.conftest import cnn, pictures, torchrun
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.train import loop, student
from wherry.train.job import Job

MORE = {"batch": 12, "optimizer": "sgd", "learning_rate": 0.05, "held_out": "", "length": 0}


def test_a_graph_learns_and_is_a_graph_again(tmp_path: Path, job_of: Callable) -> None:
    model, data = cnn(tmp_path / "net", "batch"), str(pictures(tmp_path / "data"))
    more = {**MORE, "data": data, "steps": 40}
    frozen = loop.run(Job.from_dict(job_of(model, "frozen", **more)))
    assert frozen["losses"][-1] < 0.5 * frozen["losses"][0]
    made = Checkpoint.open(tmp_path / "frozen")
    assert made.task.labels == ("r", "g", "b")
    assert made.task.inputs == ("input",)
    assert made.task.leak(data_digest(data)) == "training"
    again = loop.run(Job.from_dict(job_of(tmp_path / "frozen", "again", **{**more, "steps": 2})))
    assert again["losses"][0] < 0.6 * frozen["losses"][0]  # it goes on where the file stands
    onnx.checker.check_model(str(tmp_path / "again" / "model.onnx"))


def test_channels_last_changes_time_alone(tmp_path: Path, job_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights as in the usual layout; the file's weights are in the usual one."""
    model, data = cnn(tmp_path / "net", "batch"), str(pictures(tmp_path / "data"))
    seen, laid = [], student.laid

    def plain(module: torch.nn.Module, form: torch.memory_format) -> None:
        laid(module, torch.contiguous_format)

    def watched(module: torch.nn.Module, form: torch.memory_format) -> None:
        laid(module, form)
        weights = [p for p in module.parameters() if p.ndim == 4]
        seen.append(form is torch.channels_last and all(p.is_contiguous(memory_format=form) for p in weights))

    made = {}
    for name, how in (("plain", plain), ("last", watched)):
        monkeypatch.setattr(student, "laid", how)
        losses = loop.run(Job.from_dict(job_of(model, name, **MORE, data=data, steps=6)))["losses"]
        graph = onnx.load(str(tmp_path / name / "model.onnx")).graph
        made[name] = losses, [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    assert seen == [True, False]  # while it learns, and when it is written
    np.testing.assert_allclose(made["last"][0], made["plain"][0], rtol=1e-5)
    for a, b in zip(made["last"][1], made["plain"][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_norms_stay_or_gather() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)).train()
    student.norms(net, "frozen")
    assert [child.training for child in net] == [False, True]
    student.norms(net, "trained")
    assert net[0].training


def data_digest(path: str) -> str:
    from wherry import data

    return data.read(path).digest


def test_turned_pictures_are_drawn_by_the_seed(tmp_path: Path, job_of: Callable) -> None:
    model, data = cnn(tmp_path / "net", "group"), str(pictures(tmp_path / "data"))
    more = {**MORE, "data": data, "steps": 3}
    plain, first, second = (
        loop.run(Job.from_dict(job_of(model, name, **more, augment=how)))["losses"]
        for name, how in (("a", ""), ("b", "flip,crop"), ("c", "flip,crop"))
    )
    assert first == second != plain
    with pytest.raises(BadInput, match="flop"):
        loop.run(Job.from_dict(job_of(model, "d", **more, augment="flop")))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path, job_of: Callable) -> None:
    data = str(pictures(tmp_path / "data"))
    cases, references = [], {}
    for norm in ("group", "batch"):
        model = cnn(tmp_path / norm, norm)
        more = {**MORE, "data": data, "held_out": str(pictures(tmp_path / f"other {norm}", 5))}
        references[norm] = loop.run(Job.from_dict(job_of(model, f"{norm} one", **more)))
        for name, layout in {"dp": {}, "fsdp": {"dp": 1, "fsdp": 2}}.items():
            cases.append({"name": f"{norm} {name}", "job": job_of(model, f"{norm} {name}", **more, **layout)})
    found = torchrun(tmp_path / "ranks", cases, 2)
    for case in cases:
        result, reference = found[case["name"]], references[case["name"].split()[0]]
        assert "error" not in result, result
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["held_out"], reference["held_out"], rtol=1e-5)
