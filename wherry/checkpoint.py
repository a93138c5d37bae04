"""Checkpoint: a trained model as files. Lazy: one tensor at a time; a module only when it is asked for."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from wherry import shelf
from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.locate import license_of, locate, name_of
from wherry.report import read_object
from wherry.scheme import QTensor, Scheme
from wherry.task import CLASSIFIERS, Task
from wherry.tensorfile import TensorFile

INDEX = "model.safetensors.index.json"
HEADS = {"lm_head.weight": "embed_out.weight"}  # what transformers 5 calls otherwise than the files: GPT-NeoX


class Source(Protocol):
    """Where a checkpoint's tensors come from. Names are those of the Hugging Face module."""

    def names(self) -> list[str]:
        """All tensors, layers in numeric order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight, also where it is stored as codes."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Float dtype of the weight as stored (of a quantized one: of its scales)."""
        ...

    def scheme(self, name: str) -> Scheme | None:
        """How the weight is stored, or None when it is a plain float tensor."""
        ...

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One tensor."""
        ...

    def fingerprint(self) -> str:
        """A cheap identity of the content: it changes when a file does."""
        ...

    def bytes(self) -> int:
        """Size of the weights on disk."""
        ...


class Safetensors:
    """Plain safetensors of a folder, one file or sharded with an index.

    Raises:
        Missing: no weights, or a shard that the index names is absent.
        Corrupt: a file or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.exists():
            try:
                weight_map: dict[str, str] = read_object(index)["weight_map"]
                shards = sorted(set(map(Path, weight_map.values())))
            except (KeyError, TypeError, AttributeError) as error:
                raise Corrupt(f"{index} is not an index of safetensors shards: {error!r}") from error
            for shard in shards:
                if not (folder / shard).resolve().is_relative_to(folder.resolve()):
                    raise Corrupt(f"{index} names a file outside of the folder: {shard}")
                if not (folder / shard).exists():
                    raise Missing(f"missing shard: {folder / shard}, named by {INDEX}.\nDownload or copy it again.")
        else:
            shards = [Path("model.safetensors")]
            if not (folder / shards[0]).exists():
                pickled = sorted(path.name for path in folder.glob("*.bin"))
                hint = (
                    f"It holds only pickled weights ({pickled[0]}): save it once with safetensors." if pickled else ""
                )
                raise Missing(f"{folder} has no model.safetensors and no {INDEX}.\n{hint}".rstrip())
        self.files = [TensorFile(folder / shard) for shard in shards]
        self.where = {name: file for file in self.files for name in file.entries}
        if index.exists() and set(weight_map) - set(self.where):
            absent = sorted(set(weight_map) - set(self.where))[0]
            raise Corrupt(f"{index} promises {absent}, which no shard holds")

    def names(self) -> list[str]:
        """All tensors, layers in numeric order."""
        return sorted(self.where, key=natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        return self.file(name).entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self.file(name).entry(name).dtype

    def scheme(self, name: str) -> Scheme | None:
        """Plain tensors have none."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.file(name).read(name)

    def file(self, name: str) -> TensorFile:
        """The file that holds a tensor. Raises Corrupt when none does."""
        if name not in self.where:
            raise Corrupt(f"{self.files[0].path.parent} has no tensor {name}; a file is missing, or of another model")
        return self.where[name]

    def fingerprint(self) -> str:
        """Headers, sizes and times of change of all files."""
        parts = [
            f"{f.path.name} {f.header_digest} {f.path.stat().st_size} {f.path.stat().st_mtime_ns}" for f in self.files
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.path.stat().st_size for file in self.files)


class Lora:
    """A base source with a LoRA adapter merged on the way in: W + scaling * B A. Source: arXiv:2106.09685."""

    def __init__(self, base: Source, folder: Path) -> None:
        config = read_object(folder / "adapter_config.json")
        for key in ("use_dora", "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
            if config.get(key):
                raise Unsupported(
                    f"{folder}: adapter with {key} is not merged here; merge it with peft's merge_and_unload"
                )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise Corrupt(f"{folder / 'adapter_config.json'} lacks a proper r or lora_alpha")
        self.scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        self.base, self.file = base, TensorFile(folder / "adapter_model.safetensors")
        self.pairs: dict[str, dict[str, str]] = {}
        for name in self.file.entries:
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
            if not match or f"{match[1]}.weight" not in base.names():
                raise Unsupported(f"{folder}: adapter tensor {name} has no place in the base model")
            self.pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        for name, pair in self.pairs.items():
            n, k = base.shape(name)
            for side, shape in (("A", (rank, k)), ("B", (n, rank))):
                if side not in pair:
                    raise Corrupt(f"{folder}: the adapter has no lora_{side} for {name}")
                if self.file.entries[pair[side]].shape != shape:
                    raise Corrupt(f"{folder}: lora_{side} of {name} is not of shape {shape}: made for another base")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def read(self, name: str) -> torch.Tensor | QTensor:
        """The base's tensor with the product of its two factors added in float32."""
        tensor = self.base.read(name)
        if name not in self.pairs:
            return tensor
        weight = tensor.decode() if isinstance(tensor, QTensor) else tensor
        A, B = (self.file.read(self.pairs[name][side]).float() for side in "AB")
        return (weight.float() + self.scaling * (B @ A)).to(weight.dtype)

    def scheme(self, name: str) -> Scheme | None:
        """A merged weight is a float again."""
        return None if name in self.pairs else self.base.scheme(name)

    def fingerprint(self) -> str:
        """Of the base and of the adapter's header and time."""
        stamp = f"{self.base.fingerprint()} {self.file.header_digest} {self.file.path.stat().st_mtime_ns}"
        return hashlib.sha256(stamp.encode()).hexdigest()


@dataclass
class Checkpoint:
    """A model's folder (config, tokenizer), its task and its tensors.

    plan: what was done to each tensor, as rows of the manifest; empty for a model that wherry has not touched.
    """

    path: Path
    config: dict[str, Any]
    task: Task
    source: Source
    name: str
    license: str = ""
    origin: str = ""  # what it was made from, as a person would say it
    plan: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    graph: Any = None  # of a model that is an ONNX graph: its source, which has the graph too
    original: "Checkpoint | None" = None  # between the stages of a recipe: the model that it started from

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        """Open a Hugging Face folder, a LoRA adapter's, a GGUF or ONNX file, or a hub id where there is a network.

        Raises:
            Missing: no such model, missing shard, no network.
            Corrupt: damaged files.
            Unsupported: an architecture or file type that is not read.
        """
        path = locate(model)
        if path.is_file():
            if path.suffix == ".gguf":
                return shelf.find("formats", "gguf").load(path)
            if path.suffix == ".onnx":
                return shelf.find("formats", "onnx").load(path)
            raise BadInput(f"{path} is not a model: give a folder with config.json, a .gguf or .onnx file, or a hub id")
        if (path / "model.compact").exists():
            return shelf.find("formats", "compact").load(path)
        if (path / "adapter_config.json").exists():
            config = read_object(path / "adapter_config.json")
            if not isinstance(config.get("base_model_name_or_path"), str):
                raise Corrupt(f"{path / 'adapter_config.json'} does not say its base_model_name_or_path")
            base_path = Path(config["base_model_name_or_path"])
            beside = path / base_path
            base = cls.open(beside if beside.exists() else str(base_path))
            base.source = Lora(base.source, path)
            base.name, base.origin = path.resolve().name, f"{base.name} with the adapter {path.resolve().name}"
            return base
        file = path / "config.json"
        if not file.exists() and (path / "model.onnx").exists():
            return shelf.find("formats", "onnx").load(path)
        if not file.exists():
            inner = sorted(path.glob("*.gguf"))
            if len(inner) == 1:
                return shelf.find("formats", "gguf").load(inner[0])
            raise Missing(f"{path} has no config.json: not a model's folder")
        config = read_object(file)
        if (path / "model.bin").exists() and "model_type" not in config:
            return shelf.find("formats", "ctranslate2").load(path)
        quantization = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "?")
            if method in ("gptq", "awq"):
                return shelf.find("formats", method).load(path)
            if method not in ("compressed-tensors", "wherry"):
                raise Unsupported(f"{path} is quantized by '{method}', which is not read; give the float model")
            return shelf.find("formats", "compressed_tensors").load(path)
        return cls(path, config, Task.of(path, config), Safetensors(path), name_of(path), license_of(path))

    def names(self) -> list[str]:
        """Names of all weights, in Hugging Face naming, layers in numeric order."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self.source.shape(name)

    def scheme(self, name: str) -> Scheme | None:
        """How a weight is stored; None when it is float."""
        return self.source.scheme(name)

    def tensor(self, name: str) -> torch.Tensor | QTensor:
        """One weight as stored; codes come as a QTensor."""
        return self.source.read(name)

    def weight(self, name: str) -> torch.Tensor:
        """One weight in float32, decoded if it is stored as codes."""
        tensor = self.source.read(name)
        return tensor.decode() if isinstance(tensor, QTensor) else tensor.float()

    @property
    def params(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.names())

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding itself."""
        return bool(self.config.get("tie_word_embeddings", True)) and "lm_head.weight" not in self.names()

    @cached_property
    def hf_config(self) -> Any:
        """The configuration as transformers' object, without any quantization entry."""
        from transformers import AutoConfig

        plain = {k: v for k, v in self.config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
        kind = plain.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **plain)
        except Exception as error:  # each model's class has its own checks, with exceptions of many classes
            if isinstance(error, KeyError) or "model identifier" in str(error):
                raise Unsupported(f"{self.path}: transformers does not know the model_type '{kind}'") from error
            reason = " ".join(str(error).split())[:200]
            raise Corrupt(f"{self.path / 'config.json'} is no configuration of '{kind}': {reason}") from error

    def skeleton(self) -> torch.nn.Module:
        """The module in eval mode with all parameters on the meta device: structure without memory."""
        import accelerate
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

        if self.task.kind in CLASSIFIERS.values():
            raise Unsupported(
                f"{self.path}: a classifier is compressed and run as a graph.\n"
                f"wherry capture {self.path} -o GRAPH, then GRAPH in its place."
            )
        builders = {"text-generation": AutoModelForCausalLM, "automatic-speech-recognition": AutoModelForSpeechSeq2Seq}
        builder = builders.get(self.task.kind, AutoModel)
        config = self.hf_config
        try:
            with accelerate.init_empty_weights(include_buffers=False):
                module = builder.from_config(config, dtype=torch.float32)
        except Exception as error:  # each model's class fails in its own way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise Corrupt(f"{self.path}: transformers cannot build a model by its config.json.\n{reason}") from error
        return module.eval()

    @property
    def apart(self) -> bool:
        """Whether experts are stored one by one, which transformers renames and computes in one tensor."""
        return any(re.search(r"\.experts\.\d+\.", name) for name in self.names())

    def places(self, module: torch.nn.Module, some: bool = False) -> dict[str, str]:
        """{parameter of the module: name of the weight}; tied parameters share a name. some: without what is missing.

        Raises Corrupt when a parameter of the module has no weight in the checkpoint, or one of another shape.
        """
        have, prefix = set(self.names()), getattr(module, "base_model_prefix", "")
        found: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), HEADS.get(name, name))
            match = next((c for c in candidates if c in have), None)
            if match is None and name in ("lm_head.weight", "proj_out.weight") and self.tied:
                embedding = module.get_input_embeddings().weight  # type: ignore[operator]
                match = next((found[n] for n in found if module.get_parameter(n) is embedding), None)
            if match is None:
                if some or "pooler" in name:  # sentence encoders are often shipped without it, and it is not used
                    continue
                raise Corrupt(f"{self.path} lacks the weight {name}, which {type(module).__name__} needs")
            if tuple(parameter.shape) != self.shape(match):
                said = f"has the shape {self.shape(match)}; its config.json says {tuple(parameter.shape)}"
                raise Corrupt(f"{self.path}: {match} {said}. Get the model again.")
            found[name] = match
        return found

    def fill(self, module: torch.nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Put decoded float32 weights into the module's parameters whose name is wanted."""
        for parameter, name in self.places(module).items():
            if wanted(parameter):
                put(module, parameter, self.weight(name))

    def module(self) -> torch.nn.Module:
        """The whole model in float32, eval mode, with decoded weights; tied parameters stay tied."""
        module, tensors = self.skeleton(), {}
        if self.apart and len(self.places(module, some=True)) < len(list(module.named_parameters())):
            return self.converted(type(module))
        for parameter, name in self.places(module).items():
            if name not in tensors:
                tensors[name] = torch.nn.Parameter(self.weight(name), requires_grad=False)
            put(module, parameter, tensors[name])
        for name, left in module.named_parameters():
            if left.is_meta:  # an unused pooler
                put(module, name, torch.zeros(left.shape))
        return module

    def converted(self, kind: Any) -> torch.nn.Module:
        """The module as transformers itself loads it, which renames weights. Raises Corrupt for what it misses."""
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
        made: Any = kind.from_pretrained(self.path, use_safetensors=True, output_loading_info=True, **how)
        if missing := [*made[1]["missing_keys"], *made[1]["mismatched_keys"]]:
            raise Corrupt(f"{self.path} lacks the weight {missing[0]}, which {kind.__name__} needs")
        return cast(torch.nn.Module, made[0].eval().requires_grad_(False))


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter of that dotted name. Raises Corrupt when the shapes differ."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = getattr(owner, leaf)
    if tuple(old.shape) != tuple(value.shape):
        raise Corrupt(f"{name} has shape {tuple(value.shape)}, the configuration says {tuple(old.shape)}")
    parameter = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
    owner._parameters[leaf] = parameter


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def stack(module: torch.nn.Module) -> str:
    """Path of the model's blocks: the longest ModuleList of one class. Raises Unsupported when there is none."""
    found = {
        path: len(child)
        for path, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len({type(block) for block in child}) == 1
    }
    if not found:
        raise Unsupported(
            f"{type(module).__name__} has no list of equal blocks to walk; use a method without data, like rtn"
        )
    return max(found, key=lambda path: found[path])
