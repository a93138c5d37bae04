"""Capture: a torch module, by hand, by a factory's name or from a transformers folder, as a graph model (ONNX).

    wherry.capture(module, "out", {"image": torch.randn(2, 3, 32, 32)})          any torch.nn.Module
    wherry capture "package.models:resnet" -o out --weights w.safetensors --example one.npz
    wherry capture HF_FOLDER -o out                                              classifiers and encoders

torch.export draws the graph; where that fails and `script=True` allows it, the older TorchScript exporter does. The
first axis of every input stays free, and `sequence` axes that the task or `free` names. The result is reloaded and
compared with the module at the example's shape and at another batch before it gets its name.
"""

import importlib
import inspect
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry import cargo
from wherry.errors import BadInput, Diverged, Missing, Unsupported
from wherry.graph import tidy
from wherry.journal import remove_empty, vacant
from wherry.report import Report, read_object
from wherry.task import CLASSIFIERS, Task

DIFFERENCE_MOST = 1e-3  # relative RMS between torch and ONNX Runtime: 1e-6 is usual
Inputs = Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor
OPSET = 21


def capture(
    module: torch.nn.Module, out: str | Path, example_inputs: Inputs, task: Task | None = None,
    free: Mapping[str, Mapping[int, str]] | None = None, outputs: Sequence[str] = (), script: bool = False,
) -> Report:  # fmt: skip
    """Write `out/model.onnx` and `out/task.json`.

    Args:
        module: any; it is put into eval mode. example_inputs: tensors by name, or in the order of forward; batch 2 or
            more, so that 1 is not taken for a constant.
        task: what the model is for; None: arrays in, arrays out.
        free: {input: {axis: name}} of axes beside the first that may have other sizes.
        outputs: names of the outputs; by default output_0 ...
        script: let the TorchScript exporter try where torch.export cannot; the report says which did.

    Raises:
        BadInput: inputs that do not fit, or a batch of 1. Unsupported: neither exporter takes the module.
        Diverged: the file computes something else than the module.
    """
    out = Path(out)
    parents = vacant(out)
    named = by_name(module, example_inputs)
    module = module.eval()
    with torch.no_grad():
        reference = flat(module(**named))
    names = list(outputs) or [f"output_{i}" for i in range(len(reference))]
    if len(names) != len(reference):
        raise BadInput(f"{len(names)} names for {len(reference)} outputs: {', '.join(names)}")
    axes = {name: {0: "batch", **dict((free or {}).get(name, {}))} for name in named}
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        how = draw(module, named, axes, names, temporary / "model.onnx", script)
        far = compare(module, named, temporary / "model.onnx")
        made = task or Task("feature-extraction", temporary, inputs=tuple(named), outputs=tuple(names))
        made = replace(made, inputs=tuple(named), outputs=tuple(names))
        cargo.beside(made.folder, made, temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(parents)
        raise
    report = Report(f"{type(module).__name__} -> {out}")
    report.add("bytes", "graph", sum(f.stat().st_size for f in out.glob("model.onnx*")), "B")
    report.add("drawn by", "graph", how)
    report.add("relative difference", "graph", far, note="torch || ONNX Runtime, at two batch sizes")
    return report


def by_name(module: torch.nn.Module, example: Inputs) -> dict[str, torch.Tensor]:
    """Example inputs under the names of forward's arguments. Raises BadInput."""
    arguments = [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]
    if isinstance(example, torch.Tensor):
        example = [example]
    if not isinstance(example, Mapping):
        if len(example) > len(arguments):
            raise BadInput(f"{len(example)} inputs for forward({', '.join(arguments)}): give them by name")
        example = dict(zip(arguments, example, strict=False))
    for name, value in example.items():
        if name not in arguments:
            raise BadInput(f"forward has no argument '{name}'; it has: {', '.join(arguments)}")
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise BadInput(f"example input '{name}' is no tensor with a batch axis")
        if len(value) < 2:
            raise BadInput(
                f"example input '{name}' has a batch of {len(value)}: give 2 or more, so that batches stay free"
            )
    return dict(example)


def flat(result: Any) -> list[torch.Tensor]:
    """Tensors of a module's result, in order: of a tensor, tuple, dict or transformers' output."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, Mapping) else result
    return [tensor for value in values if value is not None for tensor in flat(value)]


class Flat(torch.nn.Module):
    """A module whose results are a plain tuple."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs in the order of `names`."""
        return tuple(flat(self.module(**dict(zip(self.names, inputs, strict=True)))))


def draw(
    module: torch.nn.Module, named: dict[str, torch.Tensor], axes: dict[str, dict[int, str]], outputs: Sequence[str],
    file: Path, script: bool,
) -> str:  # fmt: skip
    """Write the graph. Returns which exporter did. Raises Unsupported."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise Missing(f"capturing a module needs {', '.join(missing)}.\npip install 'wherry[onnx]'")
    dims = {name: torch.export.Dim.DYNAMIC for name in {n for a in axes.values() for n in a.values()}}
    shapes = tuple({axis: dims[name] for axis, name in axes[key].items()} for key in named)
    flattened, inputs = Flat(module, list(named)), tuple(named.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                flattened, inputs, dynamo=True, dynamic_shapes=(shapes,), input_names=list(named), verbose=False,
                output_names=list(outputs), opset_version=OPSET, optimize=False,
            )  # fmt: skip
            assert program is not None
            rename(program.model.graph, axes)
            tidy.tidy(program.model)
            program.save(str(file), external_data=True)
            return "torch.export"
        except Exception as error:  # torch.export fails with exceptions of many classes
            reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
            if not script:
                raise Unsupported(
                    f"torch.export cannot take {type(module).__name__}: {reason}\n"
                    "Try the older exporter: script=True (--script)."
                ) from error
        try:
            torch.onnx.export(
                flattened, inputs, str(file), dynamo=False, input_names=list(named), output_names=list(outputs),
                dynamic_axes=axes, opset_version=17,
            )  # fmt: skip
        except Exception as error:  # and so does TorchScript
            raise Unsupported(
                f"neither exporter takes {type(module).__name__}: {str(error).strip().splitlines()[0][:200]}"
            ) from error
    return f"TorchScript (torch.export failed: {reason})"


def rename(graph: Any, axes: dict[str, dict[int, str]]) -> None:
    """Give free axes their names, and weights those that they have in the module."""
    for value in graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            if value.shape is not None and not isinstance(value.shape[axis], int):
                value.shape[axis] = name
    for old in list(graph.initializers):
        if old.startswith("module."):
            value = graph.initializers.pop(old)
            value.name = old.removeprefix("module.")
            graph.register_initializer(value)


def compare(module: torch.nn.Module, named: dict[str, torch.Tensor], file: Path) -> float:
    """Relative RMS between the module and the reloaded file, at the example's batch and at half or twice of it."""
    from wherry.graph.whole import difference, session

    runtime, worst = session(file), 0.0
    batch = len(next(iter(named.values())))
    other = {name: torch.cat([x, x])[: 2 * batch - 1].contiguous() for name, x in named.items()}
    for feeds in (named, other):
        with torch.no_grad():
            expected = [tensor.numpy() for tensor in flat(module(**feeds))]
        try:
            found = runtime.run(None, {name: feeds[name].numpy() for name in [i.name for i in runtime.get_inputs()]})
        except Exception as error:  # the wheel's kinds have no common base but Exception
            text = " ".join(str(error).split())[:200]
            raise Diverged(f"the graph does not run at a batch of {len(next(iter(feeds.values())))}: {text}") from error
        worst = max(worst, difference(expected, found))
    if not worst <= DIFFERENCE_MOST:
        raise Diverged(f"the graph differs from the module by {worst:.3g} (relative RMS), above {DIFFERENCE_MOST}")
    return worst


def factory(dotted: str, weights: str | Path | None = None) -> torch.nn.Module:
    """The module that `package.module:function` makes without arguments, with weights from safetensors.

    The name is the user's word that this code may run. Raises BadInput, Missing, Corrupt.
    """
    from wherry.tensorfile import TensorFile

    package, _, name = dotted.partition(":")
    try:
        module = getattr(importlib.import_module(package), name)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"no such factory: {dotted} ({error}); give package.module:function") from error
    except TypeError as error:
        raise BadInput(f"{dotted} cannot be called without arguments: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise BadInput(f"{dotted} gave {type(module).__name__}, not a torch.nn.Module")
    if weights is not None:
        file = TensorFile(Path(weights))
        found = module.load_state_dict({name: file.read(name) for name in file.entries}, strict=False)
        if found.missing_keys or found.unexpected_keys:
            raise BadInput(
                f"{weights} does not fit {dotted}: "
                f"missing {found.missing_keys[:3]}, unexpected {found.unexpected_keys[:3]}"
            )
    return module


def command(
    model: str, out: str | Path, example: str | Path | None, weights: str | Path | None, script: bool
) -> Report:
    """What `wherry capture` does: a factory with an example (.npz), or a transformers folder."""
    if ":" not in model or Path(model).exists():
        return folder(model, out)
    if example is None:
        raise BadInput(f"{model} needs an example of its inputs: --example FILE.npz, arrays by name, batch 2 or more")
    from wherry import data

    if not data.read(example).examples or Path(example).suffix != ".npz":  # names what is wrong with the file
        raise BadInput(f"{example} holds no arrays by name: a .npz file is wanted")
    with np.load(example, allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "label"}
    return capture(factory(model, weights), out, inputs, script=script)


def folder(path: str | Path, out: str | Path) -> Report:
    """A transformers folder of a classifier or encoder as a graph model; weights from safetensors alone.

    Raises Unsupported for architectures that are compressed as they are (language models) or are not known.
    """
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    from wherry.checkpoint import Checkpoint

    path = Path(path)
    task = Task.of(path, read_object(path / "config.json"))
    if task.kind not in CLASSIFIERS.values():
        checkpoint = Checkpoint.open(path)
        if checkpoint.task.kind != "sentence-similarity":
            raise Unsupported(f"{path} is compressed as it is: wherry compress {path} -o OUT")
        inputs = {name: torch.from_numpy(array) for name, array in task.batch(task.examples()).items()}
        module = First(checkpoint.module(), "last_hidden_state")
        return capture(module, out, inputs, task, sequence(inputs), ["last_hidden_state"])
    text = task.kind == "text-classification"
    loader: Any = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    module = loader.from_pretrained(path, local_files_only=True, use_safetensors=True)
    inputs = {name: torch.from_numpy(array) for name, array in task.prepare(task.examples()).items()}
    return capture(First(module, "logits"), out, inputs, task, sequence(inputs) if text else None, task.outputs)


def sequence(inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """The second axis of each input, free."""
    return {name: {1: "sequence"} for name in inputs}


class First(torch.nn.Module):
    """A transformers model that gives one of its outputs alone."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.forward = self._with(list(inspect.signature(model.forward).parameters))

    def _with(self, names: list[str]) -> Callable[..., torch.Tensor]:
        def forward(**inputs: torch.Tensor) -> torch.Tensor:
            return getattr(self.model(**inputs), self.name)

        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
                for name in names
                if name not in ("self", "kwargs")
            ]
        )
        return forward


__all__ = ["capture", "command", "factory", "folder"]
