"""Student: from files to a module that learns, and back: Hugging Face folders and ONNX graphs."""

import keyword
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wherry import cargo
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.report import read_object
from wherry.task import CLASSIFIERS, Task

EXTRA = {"hidden": "output_hidden_states", "attention": "output_attentions"}


@dataclass
class Student:
    """A module and where it comes from.

    graph: of an ONNX graph the names of its inputs, in their order; classes: width of the logits, 0: unknown.
    """

    checkpoint: Any
    task: Task
    module: torch.nn.Module
    graph: tuple[str, ...]
    classes: int

    def call(self, batch: Mapping[str, Any], needs: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The module's outputs by name: see `objective`."""
        return forward(self.module, batch, needs, self.graph)


def forward(
    module: torch.nn.Module, batch: Mapping[str, Any], needs: frozenset[str] = frozenset(), graph: tuple[str, ...] = (),
    cache: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Outputs of a module for a batch, whose `targets` it is not shown. cache: keys and values are kept too."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets" and ":" not in name}
    if graph:
        found = module(*(inputs[name] for name in graph))
        while isinstance(found, Mapping | tuple | list):
            found = found.get("logits", next(iter(found.values()))) if isinstance(found, Mapping) else found[0]
        return {"logits": found}
    asked = {EXTRA[need]: True for need in needs if need in EXTRA}
    found = module(**inputs, **asked, **({"use_cache": cache} if "input_ids" in inputs else {}))
    return {name: found[name] for name in ("logits", "hidden_states", "attentions") if found.get(name) is not None}


def opened(model: str | Path) -> Student:
    """Open a model as a module with gradients, in training mode, float32.

    A language model's folder, a classifier's folder, an ONNX file or its folder.

    Raises Unsupported for tasks that are not trained here.
    """
    path = Path(model)
    if path.is_dir() and (path / "config.json").exists():
        config = read_object(path / "config.json")
        if str((config.get("architectures") or ["?"])[0]).endswith(tuple(CLASSIFIERS)):
            return _classifier(path, config)
    checkpoint = Checkpoint.open(model)
    if checkpoint.graph is not None:
        return _graph(checkpoint)
    if checkpoint.task.kind not in ("text-generation", "sentence-similarity"):
        raise Unsupported(
            f"{model}: {checkpoint.task.kind} is not trained here; language models, sentence encoders, classifiers"
            " and ONNX graphs are"
        )
    module = checkpoint.module()
    classes = int(checkpoint.config["vocab_size"]) if checkpoint.task.kind == "text-generation" else 0
    return Student(checkpoint, checkpoint.task, _learning(module), (), classes)


def _learning(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module.train()


def _classifier(path: Path, config: dict[str, Any]) -> Student:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    task = Task.of(path, config)
    loader: Any = (
        AutoModelForSequenceClassification if task.kind == "text-classification" else AutoModelForImageClassification
    )
    module = loader.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    return Student(None, task, _learning(module), (), len(task.labels))


def _graph(checkpoint: Checkpoint) -> Student:
    from wherry.formats.onnx.torch_module import module as imported

    file = checkpoint.graph.path
    module: Any = imported(file)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and buffer.numel() == 0:
            raise BadInput(f"{file}: the constant {name} is empty")
    if not any(p.requires_grad or p.is_floating_point() for p in module.parameters()):
        raise BadInput(f"{file} has no float weights to train; a quantized graph is trained from its float model")
    names = tuple(str(value.name) for value in checkpoint.graph.model.graph.inputs)
    for node, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name if name.isidentifier() and not keyword.iskeyword(name) else node.target
    module.recompile()  # forward's arguments have the file's names, so that the next file has them too
    return Student(checkpoint, checkpoint.task, _learning(module), names, len(checkpoint.task.labels))


NORMS = (torch.nn.modules.batchnorm._BatchNorm,)


def norms(module: torch.nn.Module, how: str) -> None:
    """Batch norms in eval mode when they are "frozen": their statistics stay, their factors learn."""
    for child in module.modules():
        if isinstance(child, NORMS):
            child.train(how == "trained")


def laid(module: torch.nn.Module, form: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory in that form, which their results then have.

    Channels last is what kernels for CPUs want: ResNet-20 learns in a fifth less time.
    """
    if any(p.ndim == 4 for p in module.parameters()):
        module.to(memory_format=form)  # type: ignore[call-overload]


def load(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put a whole model's tensors into its module. Raises BadInput when one is missing."""
    kept = set(module.state_dict())
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in state:
                tensor.copy_(state[name])
            elif name in kept:
                raise BadInput(f"{name} is in the model, but not among what was trained")


def write(student: Student, out: Path, used: Iterable[tuple[str, str]] = ()) -> None:
    """Write the module into the empty folder `out`: a Hugging Face folder, or model.onnx and task.json.

    used: names and digests of data, entered in task.json as training data, so that judging on them is noticed.
    """
    task = student.task
    for each in used:
        task = task.used("training", *each)
    module = student.module.eval()
    if student.graph:
        _draw(student, task, out)
        return
    dtype = torch.float32
    if student.checkpoint is not None:
        stored = {student.checkpoint.source.dtype(name) for name in student.checkpoint.names()}
        dtype = next(iter(stored)) if len(stored) == 1 and next(iter(stored)).is_floating_point else torch.float32
    if getattr(module, "held_by", dtype) is not dtype:  # weights on a grid, which a smaller dtype would leave
        dtype = torch.float32
    with torch.no_grad():
        module = module.to(dtype)
    import transformers

    config: Any = module.config
    config.dtype = dtype
    transformers.utils.logging.disable_progress_bar()
    module.save_pretrained(out)  # type: ignore[operator]
    cargo.beside(student.task.folder, task, out)
    if (student.task.folder / "preprocessor_config.json").exists():
        (out / "preprocessor_config.json").write_bytes((student.task.folder / "preprocessor_config.json").read_bytes())


def _draw(student: Student, task: Task, out: Path) -> None:
    from wherry.capture import capture

    module: Any = student.module
    if task.modality == "arrays":
        raise Unsupported("a graph of arrays needs an example to be drawn again")
    prepared = task.prepare(task.examples())
    arguments = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    inputs = {to: torch.from_numpy(prepared[name]) for to, name in zip(arguments, student.graph, strict=True)}
    axes = {to: {axis: say for axis, say in task.axes[name].items() if axis}
            for to, name in zip(arguments, student.graph, strict=True)}  # fmt: skip
    inner = out / "graph"
    capture(module, inner, inputs, task, axes, task.outputs)
    for file in inner.iterdir():
        file.rename(out / file.name)
    inner.rmdir()
