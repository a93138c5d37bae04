"""Where the engine's weights come from: a GGUF file's blocks, or a checkpoint's codes and floats; as they are stored.

Memory: a few megabytes beside the engine's own panels; a file is read once, in order, and never mapped.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType

from wherry import cargo
from wherry.artifact import Artifact
from wherry.errors import Corrupt, Unsupported
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import check_shapes, config_of
from wherry.runtimes.native.shape import Shape, shape_of

CHUNK = 4 << 20  # bytes that are read at once
KINDS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0",
)  # fmt: skip
# part of the engine: (name in GGUF, in transformers)
LAYER = {
    "attention_norm": ("attn_norm", "input_layernorm"), "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "q": ("attn_q", "self_attn.q_proj"), "k": ("attn_k", "self_attn.k_proj"), "v": ("attn_v", "self_attn.v_proj"),
    "o": ("attn_output", "self_attn.o_proj"), "gate": ("ffn_gate", "mlp.gate_proj"), "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"), "q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "k_norm": ("attn_k_norm", "self_attn.k_norm"),
}  # fmt: skip
# the same in layers with norms of what they add: there post_attention_layernorm is one of these
AFTER = LAYER | {
    "mlp_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "post_attention_norm": ("post_attention_norm", "post_attention_layernorm"),
    "post_mlp_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
}
WHOLE = {
    "embed": ("token_embd", "model.embed_tokens"), "norm": ("output_norm", "model.norm"), "head": ("output", "lm_head"),
}  # fmt: skip
IGNORED = ("rope_freqs.weight", "rotary_emb.inv_freq")  # the configuration says the same


class Weights(Protocol):
    """A model's weights on disk."""

    shape: Shape
    bytes: int

    def fill(self, engine: Any) -> None:
        """Hand every weight to the engine."""
        ...


def source(artifact: Artifact) -> Weights:
    """The weights of an artifact. Raises as Gguf and Folder do."""
    return Gguf(artifact) if artifact.format == "gguf" else Folder(artifact)


def layer_parts(shape: Shape) -> dict[str, tuple[str, str]]:
    """Parts of a layer, as in LAYER."""
    return AFTER if "post_ffw_norm" in shape.arch.norms else LAYER


def parts(shape: Shape, side: int) -> Iterator[tuple[str, str, int]]:
    """(name on disk without .weight or .bias, part of the engine, layer or -1); side 0: GGUF, 1: transformers."""
    for part, names in WHOLE.items():
        yield names[side], part, -1
    for i in range(shape.layers):
        for part, names in layer_parts(shape).items():
            yield f"{('blk', 'model.layers')[side]}.{i}.{names[side]}", part, i


class Gguf:
    """Blocks of a GGUF file.

    Raises:
        Unsupported: another architecture, a type of block that is not read, or a tensor that would be left out.
        Corrupt: the header contradicts itself or the file.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.header = Header(artifact.main)
        config = config_of(self.header)
        check_shapes(self.header, config)
        window = self.header.metadata.get(f"{self.header.arch}.attention.sliding_window")
        if isinstance(window, int) and window > 0 and "layer_types" not in config:
            raise Unsupported(f"{artifact.main} asks for a sliding window, which GGUF does not say the layers of")
        self.shape = shape_of(config, self.header.arch == "llama", str(artifact.main))
        self.bytes = sum(t.bytes for t in self.header.tensors.values())
        self.places: dict[str, tuple[str, int, bool]] = {}
        for name, part, layer in parts(self.shape, 0):
            for bias in (False, True):
                self.places[f"{name}.{'bias' if bias else 'weight'}"] = (part, layer, bias)
        for tensor in self.header.tensors.values():
            if tensor.name in IGNORED:
                continue
            if tensor.name not in self.places:
                raise Unsupported(f"{artifact.main}: the native runtime has no place for the tensor {tensor.name}")
            if tensor.kind not in KINDS:
                known = ", ".join(KINDS)
                raise Unsupported(f"{artifact.main}: {tensor.name} is {tensor.kind}; the native runtime reads {known}")

    def fill(self, engine: Any) -> None:
        """In the file's order, some rows at a time."""
        with open(self.header.path, "rb") as file:
            for tensor in sorted(self.header.tensors.values(), key=lambda t: t.begin):
                if tensor.name in IGNORED:
                    continue
                part, layer, bias = self.places[tensor.name]
                file.seek(tensor.begin)
                if bias or len(tensor.shape) == 1:
                    kind = {"F32": np.float32, "F16": np.float16}.get(tensor.kind)
                    if kind is None:
                        raise Unsupported(f"{self.header.path}: {tensor.name} is {tensor.kind}, not F32 or F16")
                    engine.vector(part, layer, self._read(file, tensor.bytes, tensor.name).view(kind), bias)
                    continue
                n, k = tensor.shape
                row = tensor.bytes // n
                engine.blocks(part, layer, (n, k), int(GGMLQuantizationType[tensor.kind]))
                step = max(CHUNK // row // 16, 1) * 16
                for first in range(0, n, step):
                    count = min(step, n - first)
                    engine.fill(part, layer, first, self._read(file, count * row, tensor.name).reshape(count, row))

    def _read(self, file: Any, size: int, name: str) -> np.ndarray:
        data = np.empty(size, dtype=np.uint8)
        if file.readinto(memoryview(data)) != size:  # type: ignore[arg-type]
            raise Corrupt(f"{self.header.path} is cut short inside of {name}")
        return data


class Folder:
    """A Hugging Face folder: integer codes of wherry or compressed-tensors, and floats. Needs torch, to read them."""

    def __init__(self, artifact: Artifact) -> None:
        from wherry.checkpoint import Checkpoint

        self.checkpoint = Checkpoint.open(artifact.path)
        self.shape = shape_of(self.checkpoint.config, False, str(artifact.path))
        self.bytes = self.checkpoint.source.bytes()
        kept = cargo.cache(self.checkpoint.config)
        if kept not in ("", "int8"):
            raise Unsupported(f"{artifact.path} asks for keys and values in {kept}; here they are bf16 or int8")
        for name in self.checkpoint.names():
            scheme = self.checkpoint.scheme(name)
            if scheme is None:
                continue
            reason = ""
            if scheme.activations is not None:
                reason = "rounds its inputs in its own way"
            elif scheme.tabled or scheme.kind != "int" or scheme.planes > 1:
                reason = "has codes that are no integers"
            elif scheme.bits == 7:
                reason = "has codes of 7 bits"
            if reason:
                raise Unsupported(f"{name}: {scheme} {reason}; the native runtime reads integer weights (W4A16, Q4_K)")
        have, norms = set(self.checkpoint.names()), self.shape.arch.norms
        for own in (own for other, own in layer_parts(self.shape).values() if other in norms):
            for name in (f"model.layers.{i}.{own}.weight" for i in range(self.shape.layers)):
                if name not in have:
                    raise Corrupt(f"{artifact.path} has no {name}, which its architecture asks for")

    def fill(self, engine: Any) -> None:
        """Tensor by tensor."""
        names = set(self.checkpoint.names())
        for own, part, layer in parts(self.shape, 1):
            if part == "head" and self.checkpoint.tied:
                continue
            for bias in (False, True):
                name = f"{own}.{'bias' if bias else 'weight'}"
                if name not in names:
                    continue
                names.discard(name)
                if bias or part.endswith("norm"):
                    lift = 0 if bias else self.shape.arch.lift
                    engine.vector(part, layer, self.checkpoint.weight(name).numpy() + np.float32(lift), bias)
                else:
                    matrix(engine, part, layer, self.checkpoint.tensor(name))
        left = [name for name in sorted(names) if not name.endswith(IGNORED) and name != "lm_head.weight"]
        if left:
            raise Unsupported(f"{self.checkpoint.path}: the native runtime has no place for the tensor {left[0]}")


def matrix(engine: Any, part: str, layer: int, tensor: Any) -> None:
    """One weight [n, k], a torch tensor or a QTensor, as it is stored."""
    import torch

    n, k = tensor.shape
    if isinstance(tensor, torch.Tensor):
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
        tensor = tensor.contiguous() if kind != "F32" else tensor.float().contiguous()
        engine.blocks(part, layer, (n, k), int(GGMLQuantizationType[kind]))
        engine.fill(part, layer, 0, tensor.view(torch.uint8).numpy().reshape(n, -1))
        return
    scheme, offset = tensor.scheme, -tensor.scheme.qmin
    scale = tensor.scale.float().numpy()
    scale = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, scale.shape[-1]), (n, scale.shape[-1])))
    minimum = None
    if tensor.zero is not None:
        zero = tensor.zero.float().numpy().reshape(-1, scale.shape[-1])
        minimum = -zero if scheme.minimum != "code" else -scale * (zero + offset)
        minimum = np.ascontiguousarray(np.broadcast_to(minimum, scale.shape))
    half = all(v is None or np.array_equal(v.astype(np.float16).astype(np.float32), v) for v in (scale, minimum))
    group = k // scale.shape[-1]
    engine.codes(part, layer, (n, k), max(scheme.bits, 2), group, None if minimum is not None else offset, half)
    code = (tensor.code.to(torch.int16) + offset).to(torch.uint8).numpy()
    step = max(CHUNK // k // 16, 1) * 16
    for first in range(0, n, step):
        rows = slice(first, first + step)
        engine.fill(part, layer, first, code[rows], scale[rows], None if minimum is None else minimum[rows])
