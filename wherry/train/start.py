"""Start: a smaller student made of the teacher's own layers, as a model's folder.

    --init-from teacher                    as many layers as the student's config.json has (a folder without weights)
    --init-from teacher:layers=8           the teacher's architecture with 8 of its layers
    --init-from teacher:keep=0;1;4;7       these layers

Source: Sanh et al. 2019 (DistilBERT, arXiv:1910.01108): every other layer of the teacher is a far better start than
    random weights; here n of N are spread evenly, the first and the last among them.
Fewer heads, neurons or hidden numbers: `wherry compress TEACHER --recipe width:...`; its result is a student.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from wherry import cargo, tensorfile
from wherry.checkpoint import Checkpoint, stack
from wherry.errors import BadInput, Unsupported
from wherry.report import read_object
from wherry.scheme import QTensor
from wherry.train.job import Job


def spread(n: int, of: int) -> list[int]:
    """Take n of `of` layers, evenly, the first and the last among them (the last alone for n = 1)."""
    if not 1 <= n <= of:
        raise BadInput(f"layers={n}: the teacher has {of}")
    return [of - 1] if n == 1 else [round(i * (of - 1) / (n - 1)) for i in range(n)]


def kept(text: str, teacher: Checkpoint, student: dict[str, Any] | None = None) -> list[int]:
    """The teacher's layers that `init_from` names. Raises BadInput."""
    of = layers_of(teacher)
    method, _, rest = text.partition(":")
    if method != "teacher":
        raise BadInput(f"init_from '{text}': write teacher, teacher:layers=N, or teacher:keep=0;2;5")
    key, _, value = rest.partition("=")
    if not rest:
        n = of
        if student is not None:
            n = int(Checkpoint(teacher.path, student, teacher.task, teacher.source, "").hf_config.num_hidden_layers)
        return spread(n, of)
    if key == "layers" and re.fullmatch(r"\d+", value):
        return spread(int(value), of)
    if key == "keep" and re.fullmatch(r"\d+(;\d+)*", value):
        found = [int(part) for part in value.split(";")]
        if found == sorted(set(found)) and found[-1] < of:
            return found
        raise BadInput(f"keep={value}: rising numbers below {of}, the teacher's layers")
    raise BadInput(f"init_from '{text}': write teacher, teacher:layers=N, or teacher:keep=0;2;5")


def layers_of(checkpoint: Checkpoint) -> int:
    """How many blocks a model has. Raises Unsupported for a graph, or where its configuration does not say."""
    if checkpoint.graph is not None:
        raise Unsupported("a graph has no layers to take: give the student as a graph of its own")
    count = len(checkpoint.skeleton().get_submodule(stack(checkpoint.skeleton())))  # type: ignore[arg-type]
    if getattr(checkpoint.hf_config, "num_hidden_layers", None) != count:
        raise Unsupported(f"{checkpoint.name}: its configuration does not say how many of its blocks there are")
    return count


def begun(job: Job, first: bool) -> Job:
    """The job whose model is the start that `init_from` asks for, written beside its output; any other as it is.

    The configuration is the student's (`model`) where that is a folder without weights, else the teacher's.
    Raises BadInput without a teacher.
    """
    if not job.init_from:
        return job
    if not job.teacher:
        raise BadInput("--init-from teacher: give --teacher MODEL")
    out = Path(job.out)
    folder = out.with_name(f".{out.name}.start-{job.fingerprint[:12]}")
    if first and not folder.exists():
        teacher, config = Checkpoint.open(job.teacher), Path(job.model) / "config.json"
        own = read_object(config) if config.exists() and not list(Path(job.model).glob("*.safetensors")) else None
        layers = kept(job.init_from, teacher, own)
        if own is not None:
            same(own, teacher)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(teacher, layers, part)
        part.rename(folder)
    return dataclasses.replace(job, model=str(folder))


def same(config: dict[str, Any], teacher: Checkpoint) -> None:
    """Raise Unsupported where a student's configuration differs from the teacher's in more than its layers."""
    free = ("num_hidden_layers", "n_layer", "num_layers", "layer_types", "max_window_layers", "transformers_version",
            "dtype", "torch_dtype", "use_cache")  # fmt: skip
    for key in sorted(set(config) & set(teacher.config) - set(free)):
        if config[key] != teacher.config[key]:
            raise Unsupported(
                f"--init-from teacher takes whole layers, and the student's {key} is {config[key]}, the teacher's "
                f"{teacher.config[key]}.\nFewer heads or neurons: wherry compress TEACHER --recipe width:..."
            )


def write(teacher: Checkpoint, layers: list[int], out: Path) -> None:
    """The teacher with these layers alone, numbered anew, in the empty folder `out`. Memory: the weights once.

    Entries of config.json with one value per layer keep those of the layers that stay.
    """
    of, module = layers_of(teacher), teacher.skeleton()
    inside = f"{stack(module)}."
    home = {name: place for place, name in teacher.places(module).items()}
    new = {old: i for i, old in enumerate(layers)}
    tensors: dict[str, torch.Tensor] = {}
    for name in teacher.names():
        place = home.get(name, "")
        target = name
        if place.startswith(inside):
            old = int(place.removeprefix(inside).split(".")[0])
            if old not in new:
                continue
            before, after = place.removeprefix(inside).split(".", 1)
            at = name.rindex(f".{before}.{after}")  # a prefix of the folder's own names may stand before
            target = f"{name[:at]}.{new[old]}.{after}"
        tensor = teacher.tensor(name)
        tensors[target] = tensor.decode() if isinstance(tensor, QTensor) else tensor
    tensorfile.write(out / "model.safetensors", tensors, {"format": "pt"})
    config = {key: value for key, value in teacher.config.items() if key != "quantization_config"}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == of:
            config[key] = [value[i] for i in layers]
    names = getattr(type(teacher.hf_config), "attribute_map", {})
    config[names.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    if "max_window_layers" in config:
        config["max_window_layers"] = min(int(config["max_window_layers"]), len(layers))
    tensorfile.write_pieces(out / "config.json", [json.dumps(config, indent=2, sort_keys=True).encode()])
    cargo.beside(teacher.path, teacher.task, out)
