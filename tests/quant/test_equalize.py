"""Equalization: the same function, ranges that are the paper's sqrt(r1 r2)."""

import numpy as np
import onnxruntime
import pytest
import torch

import wherry
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.graph import edit
from wherry.quant.equalize import Equalize


class Uneven(torch.nn.Module):
    """Channels whose ranges differ by a hundred, one pair behind a depthwise layer, one behind a ReLU6."""

    def __init__(self, clip=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.clip = torch.nn.Conv2d(8, 4, 1), clip
        with torch.no_grad():
            self.a.weight *= torch.logspace(-1, 1, 8)[:, None, None, None]

    def forward(self, image):
        gate = torch.nn.functional.relu6 if self.clip else torch.relu
        return self.c(gate(self.b(gate(self.a(image))))).mean((2, 3))


def test_the_function_stays_and_ranges_meet(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    wherry.capture(Uneven(), tmp_path / "net", x)
    before = Checkpoint.open(tmp_path / "net")
    after = Equalize().rewrite(before)
    edit.write(after.graph.copy().model, tmp_path / "again.onnx")
    for batch in (x.numpy(), np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)):
        a, b = (onnxruntime.InferenceSession(str(f)).run(None, {"image": batch})[0]
                for f in (tmp_path / "net" / "model.onnx", tmp_path / "again.onnx"))  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    a, b, c = (after.weight(f"{n}.weight").abs() for n in "abc")
    torch.testing.assert_close(a.amax(1), b.amax(1), rtol=0.01, atol=1e-4)
    torch.testing.assert_close(b.amax(1), c.amax(0), rtol=0.01, atol=1e-4)
    assert before.weight("a.weight").abs().amax(1).max() / before.weight("a.weight").abs().amax(1).min() > 50


def test_it_composes_and_verifies_against_the_original(tmp_path):
    x = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", image=x)
    wherry.capture(Uneven(), tmp_path / "net", torch.from_numpy(x[:2]))
    report = wherry.compress(
        tmp_path / "net", tmp_path / "out", "equalize | rtn:scheme=W8A8_STATIC", data_file=tmp_path / "x.npz",
        evaluation=tmp_path / "x.npz",
    )  # fmt: skip
    assert report.get("verdict").value == "PASS"
    report = wherry.verify(tmp_path / "out", against=tmp_path / "net", data_file=tmp_path / "x.npz", speed=False)
    assert report.get("verdict").value == "PASS"


def test_what_it_cannot_do_is_said(tmp_path, tiny_llama):
    wherry.capture(Uneven(clip=True), tmp_path / "net", torch.randn(2, 3, 8, 8))
    with pytest.raises(BadInput, match="finds no two convolutions"):
        Equalize().rewrite(Checkpoint.open(tmp_path / "net"))
    with pytest.raises(Unsupported, match="smoothquant"):
        Equalize().rewrite(Checkpoint.open(tiny_llama))
