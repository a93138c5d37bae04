"""The ways to int8: wherry's, ONNX Runtime's own, NNCF's, from the same float graph and calibration inputs.

quantize(graph, feeds, out) writes a folder `out` with one ONNX file per part and returns what it took.
ONNX Runtime: quantize_static as its documentation advises for x64 CPUs with VNNI: quant_pre_process, QDQ, uint8
    activations, int8 weights per channel; ranges by MinMax, Percentile or Entropy. quantize_dynamic: int8 weights per
    channel.
NNCF: nncf.quantize on the ONNX graph with its defaults (preset mixed, fast bias correction), model_type TRANSFORMER
    where the graph is one; in an environment of its own (bench/peers/nncf_ptq.py).
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from field import Feeds

WHERRY = {"wherry static": "rtn:scheme=W8A8_STATIC", "wherry dynamic": "rtn:scheme=W8A8"}
STATIC = {"ort minmax": "MinMax", "ort percentile": "Percentile", "ort entropy": "Entropy"}
DYNAMIC, NNCF = "ort dynamic", "nncf"
NAMES = (*WHERRY, *STATIC, DYNAMIC, NNCF)
HERE = Path(__file__).parent


class Reader:
    """Calibration inputs as onnxruntime.quantization wants them."""

    def __init__(self, feeds: list[Feeds]) -> None:
        self.feeds = feeds
        self.rewind()

    def rewind(self) -> None:
        """From the first again."""
        self.left: Iterator[Feeds] = iter(self.feeds)

    def get_next(self) -> Feeds | None:
        """The next inputs, or None."""
        return next(self.left, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """A part of them, for CalibStridedMinMax."""
        self.left = iter(self.feeds[start_index:end_index])

    def __len__(self) -> int:
        return len(self.feeds)


def quantize(name: str, graph: Path, feeds: list[Feeds], out: Path, python: str | None) -> None:
    """Write out/GRAPH.onnx, int8, from the float graph by the named way. Errors of a tool are its own."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / graph.name
    if name in WHERRY:
        _wherry(WHERRY[name], graph, feeds, target)
    elif name == NNCF:
        _nncf(graph, feeds, target, python)
    else:
        _onnxruntime(name, graph, feeds, target)


def _onnxruntime(name: str, graph: Path, feeds: list[Feeds], target: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if name == DYNAMIC:
        weights = quantization.QuantType.QInt8
        copy = Path(shutil.copyfile(graph, target.with_suffix(".plain")))  # it writes beside the graph that it reads
        quantization.quantize_dynamic(str(copy), str(target), per_channel=True, weight_type=weights)
        copy.unlink()
        return
    plain = target.with_suffix(".plain")
    quant_pre_process(str(graph), str(plain), skip_symbolic_shape=True)
    try:
        quantization.quantize_static(
            str(plain), str(target), Reader(feeds), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, STATIC[name]),
            extra_options={"CalibStridedMinMax": 1},  # one by one: histograms fail on unequal lengths otherwise
        )  # fmt: skip
    finally:
        plain.unlink()


def _nncf(graph: Path, feeds: list[Feeds], target: Path, python: str | None) -> None:
    if python is None:
        raise RuntimeError("NNCF needs --peer-python")
    data = target.with_suffix(".feeds.npz")
    np.savez(data, **{f"{i}/{name}": value for i, one in enumerate(feeds) for name, value in one.items()})
    driver = HERE.parent / "peers" / "nncf_ptq.py"
    try:
        done = subprocess.run(
            ["nice", "-n", "5", python, "-W", "ignore", str(driver), str(graph), str(data), str(target)],
            capture_output=True, text=True,
        )  # fmt: skip
    finally:
        data.unlink()
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-4:]) or "NNCF failed")


def _wherry(recipe: str, graph: Path, feeds: list[Feeds], target: Path) -> None:
    """As `wherry compress` does it, checks of the result included, from the same inputs as everyone's."""
    import onnx

    from wherry import api, deliver

    plan, out = api.plan(graph, recipe), target.with_suffix(".wherry")
    batches = feeds if plan.recipe.calibrated else []
    deliver.deliver(plan, out, (), batches, {"data": graph.stem}, lambda result: None, api.quiet)
    onnx.save(onnx.load(out / "model.onnx"), target)  # one file, also where its data lie beside it
    shutil.rmtree(out)


def timed(*job: Any) -> float:
    """Seconds that quantize took."""
    start = time.perf_counter()
    quantize(*job)
    return round(time.perf_counter() - start, 1)
