"""CTranslate2: Whisper models as faster-whisper ships them (model.bin), read as a Checkpoint in Hugging Face naming.

Source: the binary format of CTranslate2, versions 4 to 6 (src/models/model.cc): specification, revision, then for each
        variable its name, shape, dtype and bytes, then aliases; int8 weights hold round(w * scale), one scale per row.
Shapes: queries, keys and values of self-attention are one matrix [3 * width, width], keys and values of
        cross-attention one [2 * width, width]; they are cut apart here.
Cost:   the header is read when it is opened, with every claim checked; then one tensor at a time.
"""

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from wherry.checkpoint import Checkpoint, natural
from wherry.errors import Corrupt, Missing, Unsupported
from wherry.locate import license_of, name_of
from wherry.report import read_object
from wherry.scheme import QTensor, Scheme
from wherry.task import Task

if TYPE_CHECKING:
    from wherry.recipe import Plan

DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
VERSIONS = (4, 5, 6)
VARIABLES_MOST, DIMS_MOST = 100_000, 8
ACTIVATIONS = ("relu", "gelu_new", "silu", "gelu")  # by CTranslate2's number
TOP = {
    "encoder/conv1": "encoder.conv1", "encoder/conv2": "encoder.conv2",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm": "encoder.layer_norm", "decoder/layer_norm": "decoder.layer_norm",
    "decoder/embeddings": "decoder.embed_tokens",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
}  # fmt: skip
# a layer's variable -> its parts in the rows of the matrix
LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",), "ffn/linear_0": ("fc1",), "ffn/linear_1": ("fc2",),
}  # fmt: skip
SPECIAL = ("startoftranscript", "endoftext", "notimestamps")
LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Variable:
    """Where one variable lies: dtype, shape, and its bytes [begin, begin + bytes) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    bytes: int


class Binary:
    """One model.bin; the whole table of variables is read and checked when it is opened.

    specification: "WhisperSpec" and the like. variables: {name: Variable}. aliases: {name: name of a variable}.

    Raises:
        Missing: no such file.
        Corrupt: not CTranslate2's, cut short, or with a claim that its own bytes contradict; says which.
        Unsupported: a version of the format that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Missing(f"no such file: {path}")
        with open(path, "rb") as file:
            self.size, self._file = os.fstat(file.fileno()).st_size, file
            self._read(file)
            del self._file

    def _read(self, file: BinaryIO) -> None:
        version = self._number("I")
        if version not in VERSIONS:
            if 0 < version < 20:
                raise Unsupported(f"{self.path} is CTranslate2 format {version}; 4 to 6 are read: convert it again")
            raise Corrupt(f"{self.path} is not a CTranslate2 model: its version would be {version}")
        self.specification, self.revision = self._string(), self._number("I")
        self.variables: dict[str, Variable] = {}
        for _ in range(self._count("variables", VARIABLES_MOST)):
            name, dims = self._string(), self._number("B")
            if dims > DIMS_MOST or name in self.variables:
                raise self._bad(f"the variable {name!r} is there twice or has {dims} dimensions")
            shape = tuple(self._number("I") for _ in range(dims))
            kind, claimed = self._number("B"), self._number("I")
            if kind >= len(DTYPES):
                raise self._bad(f"the variable {name!r} is of the unknown dtype {kind}")
            if math.prod(shape) * DTYPES[kind].itemsize != claimed:
                raise self._bad(f"the variable {name!r} of shape {list(shape)} claims {claimed:,} bytes")
            begin = file.tell()
            if begin + claimed > self.size:
                raise self._bad(f"{name!r} would end at byte {begin + claimed:,} of {self.size:,}: it is cut short")
            self.variables[name] = Variable(DTYPES[kind], shape, begin, claimed)
            file.seek(begin + claimed)
        self.aliases = {self._string(): self._string() for _ in range(self._count("aliases", VARIABLES_MOST))}
        for alias, name in self.aliases.items():
            if name not in self.variables or alias in self.variables:
                raise self._bad(f"the alias {alias!r} stands for {name!r}, which is no variable")
        if file.tell() != self.size:
            raise self._bad(f"{self.size - file.tell():,} bytes follow its last entry")

    def read(self, name: str) -> torch.Tensor:
        """One variable as stored, in memory of its own. Raises Corrupt when the file has become shorter."""
        entry = self.variables[name]
        value = torch.empty(entry.shape, dtype=entry.dtype)
        with open(self.path, "rb") as file:
            file.seek(entry.begin)
            data = memoryview(value.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            if file.readinto(data) != entry.bytes:
                raise self._bad(f"it ends inside of {name!r}")
        return value

    def scalar(self, name: str, default: int = 0) -> int:
        """A whole number that the converter stored; the default where there is none."""
        return int(self.read(name).reshape(-1)[0]) if name in self.variables else default

    def _bad(self, reason: str) -> Corrupt:
        return Corrupt(f"{self.path} is damaged: {reason}.\nDownload or convert it again.")

    def _take(self, count: int) -> bytes:
        if count > self.size - self._file.tell():
            raise self._bad(f"its header ends in the middle, at byte {self._file.tell():,} of {self.size:,}")
        return self._file.read(count)

    def _number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0])

    def _count(self, what: str, most: int) -> int:
        count = self._number("I")
        if count > most:
            raise self._bad(f"it claims {count:,} {what}")
        return count

    def _string(self) -> str:
        raw = self._take(self._number("H"))
        if not raw.endswith(b"\0"):
            raise self._bad("a name in it does not end with a zero byte")
        try:
            return raw[:-1].decode("utf8")
        except UnicodeDecodeError as error:
            raise self._bad(f"a name in it is not UTF-8 ({error.reason})") from error


class Whisper:
    """A Whisper model's tensors under the names of transformers' WhisperForConditionalGeneration.

    Codes are decoded to float32 when they are read; a bias of keys, which Whisper has not, must be zero.

    Raises:
        Corrupt: a tensor is missing, of a shape that does not fit, or not known.
    """

    def __init__(self, binary: Binary) -> None:
        self.binary = binary
        # weight's name -> (variable, first row, last row)
        self.where: dict[str, tuple[str, int, int]] = {}
        for name, variable in binary.variables.items():
            if variable.dtype in (torch.int8, torch.float32, torch.float16, torch.bfloat16) and variable.shape:
                self._place(name, variable)

    def _place(self, name: str, variable: Variable) -> None:
        stem, _, leaf = name.rpartition("/")
        if name in TOP:
            self.where[f"model.{TOP[name]}"] = (name, 0, variable.shape[0])
            return
        if leaf == "weight_scale":
            return
        side, _, inner = stem.partition("/")
        layer, _, place = inner.partition("/")
        parts: tuple[str, ...]
        if stem in TOP and leaf in LEAVES:
            prefix, parts = "model.", (TOP[stem],)
        elif layer.startswith("layer_") and layer[6:].isdigit() and place in LAYER and leaf in LEAVES:
            prefix, parts = f"model.{side}.layers.{int(layer[6:])}.", LAYER[place]
        else:
            raise Corrupt(f"{self.binary.path} holds {name!r}, which a Whisper model has not")
        if variable.shape[0] % len(parts):
            raise Corrupt(f"{self.binary.path}: {name!r} of shape {list(variable.shape)} has not {len(parts)} parts")
        rows = variable.shape[0] // len(parts)
        for i, part in enumerate(parts):
            if part.endswith("k_proj") and leaf == "bias":
                if self._rows(name, i * rows, (i + 1) * rows).any():
                    raise Corrupt(f"{self.binary.path}: {name!r} has a bias of keys, which a Whisper model has not")
                continue
            self.where[f"{prefix}{part}.{LEAVES[leaf]}"] = (name, i * rows, (i + 1) * rows)

    def _rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        value, scale = self.binary.read(name), f"{name}_scale"
        if value.dtype == torch.int8:
            if scale not in self.binary.variables:
                raise Corrupt(f"{self.binary.path}: {name!r} holds int8 codes without {scale!r}")
            scales = self.binary.read(scale).float().reshape(-1)
            if len(scales) not in (1, len(value)) or not bool((scales > 0).all()):
                raise Corrupt(f"{self.binary.path}: {scale!r} does not fit {name!r} of shape {list(value.shape)}")
            value = value.float() / scales.reshape(-1, *[1] * (value.dim() - 1))
        return value[begin:end].clone()

    def names(self) -> list[str]:
        """All tensors, layers in numeric order."""
        return sorted(self.where, key=natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        variable, begin, end = self.where[name]
        return (end - begin, *self.binary.variables[variable].shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Float dtype as stored; float32 of codes, which are decoded."""
        dtype = self.binary.variables[self.where[name][0]].dtype
        return torch.float32 if dtype == torch.int8 else dtype

    def scheme(self, name: str) -> Scheme | None:
        """None: codes are decoded."""
        return None

    def read(self, name: str) -> torch.Tensor | QTensor:
        """One tensor."""
        return self._rows(*self.where[name])

    def fingerprint(self) -> str:
        """Table, size and time of change of the file."""
        status = self.binary.path.stat()
        told = f"{self.binary.variables} {self.binary.aliases} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(told.encode()).hexdigest()

    def bytes(self) -> int:
        """Size of the file."""
        return self.binary.size


def check(plan: "Plan") -> dict[str, str]:
    """Always raises Unsupported: this format is read, not written."""
    raise Unsupported("ctranslate2 is read, not written; formats that are written: compressed_tensors, gguf, onnx")


def load(path: Path) -> Checkpoint:
    """Open a folder with CTranslate2's model.bin and a tokenizer.json as a Checkpoint.

    Raises:
        Missing: no model.bin or tokenizer.json.
        Corrupt: a damaged file, or tensors that make no Whisper model.
        Unsupported: another model than Whisper.
    """
    binary = Binary(path / "model.bin")
    if binary.specification != "WhisperSpec":
        raise Unsupported(f"{path} is a CTranslate2 model of '{binary.specification}'; WhisperSpec is what is read")
    source = Whisper(binary)
    config, told = _config(source), read_object(path / "config.json") if (path / "config.json").exists() else {}
    task = Task("automatic-speech-recognition", path, inputs=("input_features",), outputs=("logits",))
    ids = {name: task.tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL}
    if None in ids.values():
        absent = next(name for name, number in ids.items() if number is None)
        raise Corrupt(f"{path / 'tokenizer.json'} is no tokenizer of Whisper: it lacks <|{absent}|>")
    config |= {"decoder_start_token_id": ids["startoftranscript"], "eos_token_id": ids["endoftext"]}
    config |= {"bos_token_id": ids["endoftext"], "pad_token_id": ids["endoftext"]}
    processor = {"sampling_rate": 16000, "features": "log-mel", "n_mels": config["num_mel_bins"], "n_fft": 400,
                 "hop_length": 160, "frames": 2 * config["max_source_positions"]}  # fmt: skip
    processor |= {"start": [ids["startoftranscript"], ids["notimestamps"]], "most": config["max_target_positions"] // 2}
    processor |= {"suppress": [int(i) for i in told.get("suppress_ids", []) if 0 <= int(i) < config["vocab_size"]]}
    task = Task(task.kind, path, inputs=task.inputs, outputs=task.outputs, processor=processor)
    return Checkpoint(path, config, task, source, name_of(path), license_of(path))


def _config(source: Whisper) -> dict[str, Any]:
    """A WhisperConfig of transformers as plain values, from the shapes; every tensor that it asks for must be there."""
    binary = source.binary

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in source.where or len(source.shape(name)) != dims:
            raise Corrupt(f"{binary.path} lacks {name}, or it has not {dims} dimensions: no Whisper model")
        return source.shape(name)

    layers = {
        side: len({name.split(".")[3] for name in source.names() if name.startswith(f"model.{side}.layers.")})
        for side in ("encoder", "decoder")
    }
    vocabulary, width = shape("model.decoder.embed_tokens.weight", 2)
    activation = binary.scalar("decoder/activation", 3)
    if activation not in range(len(ACTIVATIONS)):
        raise Unsupported(f"{binary.path} uses the activation number {activation}, which is not known")
    config: dict[str, Any] = {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": width,
        "vocab_size": vocabulary, "num_mel_bins": shape("model.encoder.conv1.weight", 3)[1],
        "max_source_positions": shape("model.encoder.embed_positions.weight", 2)[0],
        "max_target_positions": shape("model.decoder.embed_positions.weight", 2)[0],
        "activation_function": ACTIVATIONS[activation],
        "scale_embedding": bool(binary.scalar("decoder/scale_embeddings")),
        "tie_word_embeddings": True,
    }  # fmt: skip
    for side in layers:
        heads = binary.scalar(f"{side}/num_heads")
        if heads < 1 or width % heads:
            raise Corrupt(f"{binary.path}: {heads} heads do not fit the {side}'s width of {width}")
        config |= {f"{side}_layers": layers[side], f"{side}_attention_heads": heads}
        config[f"{side}_ffn_dim"] = shape(f"model.{side}.layers.0.fc1.weight", 2)[0]
    return config
