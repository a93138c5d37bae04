"""Write a Checkpoint as one .gguf file, tensor by tensor."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType

from wherry import cargo
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import Exhausted, Unsupported
from wherry.formats.gguf import adapter
from wherry.formats.gguf.blocks import BLOCK, BYTES, kind_of, note_of, pack, row_bytes
from wherry.formats.gguf.names import (
    ARCHS,
    ROPE_FREQS,
    ROTARY,
    arch_of,
    heads,
    metadata_of,
    norm_lift,
    order,
    rope,
    rope_divisors,
    tensor_names,
)
from wherry.formats.gguf.vocabulary import Vocabulary, vocabulary
from wherry.ops import kquant
from wherry.recipe import Plan, PlanRow, Progress
from wherry.scheme import QTensor

CACHES = {"int8": "q8_0", "int4": "q4_0"}  # kv cache: what llama.cpp calls it
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
VALUES = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K, "Q3_K": LlamaFileType.MOSTLY_Q3_K_S, "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_S, "Q6_K": LlamaFileType.MOSTLY_Q6_K, "MXFP4": LlamaFileType.MOSTLY_MXFP4_MOE,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0, "Q4_1": LlamaFileType.MOSTLY_Q4_1, "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "TQ2_0": LlamaFileType.MOSTLY_TQ2_0,
}  # fmt: skip


def check(plan: Plan) -> dict[str, str]:
    """Notes per tensor; raises what can be known before any work."""
    checkpoint, config = plan.checkpoint, plan.config
    arch, names = _names(checkpoint)
    made = vocabulary(checkpoint.path, _rows(checkpoint))
    metadata_of(arch, config, len(made.tokens))
    notes: dict[str, str] = {}
    for row in plan.rows:
        if row.name.endswith(ROTARY):
            notes[row.name] = "not stored: llama.cpp computes it"
            continue
        if row.name not in names:
            raise Unsupported(f"the tensor {row.name} has no place in GGUF's architecture '{arch}'")
        scheme = row.scheme or checkpoint.scheme(row.name)
        if scheme is None:
            continue
        try:
            kind = kind_of(scheme, row.shape)
        except Unsupported as error:
            raise Unsupported(f"{row.name}: {error}") from error
        plain = row.scheme and row.scheme.kind == "int" and not row.scheme.nested
        if plain and 0 <= row.step < len(plan.recipe.steps) and not plan.recipe.steps[row.step].portable:
            raise Unsupported(
                f"{row.name}: portable=false leaves scales that fp16 cannot hold, and GGUF stores fp16.\n"
                f"Leave portable=true, the default, or export compressed_tensors only."
            )
        if note := note_of(scheme, kind):
            notes[row.name] = note
    window = 0 if ARCHS[arch].every else config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config.get("max_position_embeddings", 0):
        made.notes.append(f"llama.cpp's {arch} has no sliding window: equal to the original up to {window} tokens")
    kept = cargo.cache(config)
    if kept in CACHES:
        if heads(config)[2] % BLOCK:
            raise Unsupported(
                f"llama.cpp keeps {kept} keys in blocks of {BLOCK}, which do not divide heads of {heads(config)[2]}; "
                "leave kvcache out"
            )
        made.notes.append(f"kv cache {kept}: llama.cpp's {CACHES[kept]}, recorded as wherry.kv_cache")
    elif kept:
        made.notes.append(f"kv cache {kept} is recorded, but llama.cpp has no such cache: it keeps floats")
    if made.notes:
        name = next(name for name in names if name in {row.name for row in plan.rows})
        notes[name] = "; ".join(filter(None, [notes.get(name, ""), *made.notes]))
    return notes


def bytes_of(plan: Plan, row: PlanRow) -> int:
    """Bytes of one tensor in the file."""
    if row.name.endswith(ROTARY):
        return 0
    if row.scheme is None:
        return 4 * row.shape[0] if len(row.shape) == 1 else row.after
    each = row_bytes(kind_of(row.scheme.by_rows, row.shape), row.shape[-1])
    return int(np.prod(row.shape[:-1])) * each + 2 * row.scheme.rank * sum(row.shape)


def besides(plan: Plan) -> int:
    """Bytes of the file that are no tensor, at most: the vocabulary, facts, and names and padding of tensors."""
    made = vocabulary(plan.checkpoint.path, _rows(plan.checkpoint))
    words = sum(len(text.encode()) + 8 for text in (*made.tokens, *made.merges)) + 8 * len(made.tokens)
    return words + 8192 + 2 * len(str(plan.recipe)) + 4 * len(str(made.template or "")) + 192 * len(plan.rows)


def save(checkpoint: Checkpoint, out: Path, progress: Progress) -> Artifact:
    """One .gguf file and the tokenizer's files in the folder `out`."""
    from wherry import __version__

    arch, names = _names(checkpoint)
    stored = [name for name in checkpoint.names() if not name.endswith(ROTARY)]
    kinds = {name: _kind(checkpoint, name) for name in stored}
    sizes: Counter[str] = Counter()
    for name in stored:
        sizes[kinds[name]] += int(np.prod(checkpoint.shape(name)))
    main = sizes.most_common(1)[0][0]
    stem = re.sub(r"[^\w.-]+", "-", checkpoint.name).strip("-.") or "model"
    file = out / f"{stem}-{main}.gguf"
    writer = GGUFWriter(None, arch)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    if checkpoint.license:
        writer.add_license(checkpoint.license)
    writer.add_file_type(int(FILE_TYPES[main]))
    writer.add_quantization_version(2)
    writer.add_string("general.quantized_by", f"wherry {__version__}")
    writer.add_string("wherry.version", __version__)
    writer.add_string("wherry.recipe", checkpoint.recipe)
    writer.add_string("wherry.source", checkpoint.origin)
    thin = f"{file.stem}-lora.gguf" if adapter.corrected(checkpoint) else ""
    if thin:
        adapter.write(checkpoint, arch, names, out / thin)
        writer.add_string(adapter.KEY, thin)
    if kept := cargo.cache(checkpoint.config):
        writer.add_string("wherry.kv_cache", kept)
    made = vocabulary(checkpoint.path, _rows(checkpoint))
    for key, value in metadata_of(arch, checkpoint.config, len(made.tokens)).items():
        writer.add_key_value(key, value, VALUES[type(value)])
    _add_vocabulary(writer, made)
    scaling = rope(checkpoint.config)
    extra = rope_divisors(scaling, heads(checkpoint.config)[2]) if scaling["rope_type"] == "llama3" else None
    if extra is not None:
        writer.add_tensor_info(ROPE_FREQS, extra.shape, extra.dtype, extra.nbytes)
    for name in stored:
        shape, kind = checkpoint.shape(name), kinds[name]
        if kind in BYTES or kind in kquant.BYTES:
            shape = (*shape[:-1], row_bytes(kind, shape[-1]))
        dtype = np.dtype({"F32": "float32", "F16": "float16"}.get(kind, "uint8"))
        if kind == "BF16":
            shape = (*shape[:-1], shape[-1] * 2)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(names[name], shape, dtype, size, raw_dtype=GGMLQuantizationType[kind])
    temporary = file.with_name(file.name + ".tmp")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        for i, name in enumerate(stored):
            progress(i, len(stored), name)
            writer.write_tensor_data(_data(checkpoint, arch, name, kinds[name]))
        writer.flush()
        assert writer.fout is not None
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(temporary, file)
        cargo.beside(checkpoint.path, checkpoint.task, out)
    except OSError as error:
        raise Exhausted(f"cannot write {file}: {error.strerror or error}.\nFree space or choose another -o.") from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    progress(len(stored), len(stored), file.name)
    more = {"adapter": thin} if thin else {}
    facts = cargo.facts(checkpoint, "gguf", file.name)
    return Artifact.seal(out, **facts | more | {"plan": [_promised(checkpoint, arch, row) for row in facts["plan"]]})


def _promised(checkpoint: Checkpoint, arch: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the plan as this file keeps it: of a norm w it holds 1 + w in float32, which may round w itself.

    The model is the same to the bit: transformers computes 1 + w in float32, too.
    """
    lift = norm_lift(arch, row["name"])
    if not lift or not row.get("digest"):
        return row
    kept = checkpoint.weight(row["name"]) + lift - lift
    return row | {"digest": hashlib.sha256(kept.contiguous().numpy().tobytes()).hexdigest()[:16]}


def _names(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    if checkpoint.task.kind != "text-generation":
        kind = checkpoint.task.kind
        raise Unsupported(f"GGUF here holds text generators, and {checkpoint.name} is for {kind}: leave gguf out")
    arch = arch_of(checkpoint.config)
    return arch, tensor_names(arch, int(checkpoint.config.get("num_hidden_layers", 0)))


def _rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding."""
    if "model.embed_tokens.weight" not in checkpoint.names():
        raise Unsupported(f"{checkpoint.name} has no model.embed_tokens.weight: not of the Llama family")
    return checkpoint.shape("model.embed_tokens.weight")[0]


def _kind(checkpoint: Checkpoint, name: str) -> str:
    """The ggml type of one tensor: vectors F32 (llama.cpp wants that), floats as they are, codes in blocks."""
    scheme, shape = checkpoint.scheme(name), checkpoint.shape(name)
    if scheme is not None:
        return kind_of(scheme, shape)
    if len(shape) == 1:
        return "F32"
    dtype = checkpoint.source.dtype(name)
    if dtype not in KINDS:
        raise Unsupported(f"{name} is stored as {dtype}; GGUF holds float32, float16 and bfloat16")
    return KINDS[dtype]


def _data(checkpoint: Checkpoint, arch: str, name: str, kind: str) -> np.ndarray:
    """The bytes of one tensor as the writer wants them, rows in GGUF's order."""
    tensor, rows = checkpoint.tensor(name), order(arch, checkpoint.config, name)
    if isinstance(tensor, QTensor):
        if rows is not None:
            index = torch.from_numpy(rows)
            zero = None if tensor.zero is None else tensor.zero[index]
            tensor = QTensor(tensor.scheme, tensor.code[index], tensor.scale[index], zero)
        found, blocks = pack(name, tensor)
        assert found == kind, (name, found, kind)
        return blocks
    if rows is not None:
        tensor = tensor[torch.from_numpy(rows)]
    if lift := norm_lift(arch, name):
        tensor = tensor.float() + lift
    if kind == "BF16":
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.to(torch.float32 if kind == "F32" else torch.float16).contiguous().numpy()


def _add_vocabulary(writer: GGUFWriter, made: Vocabulary) -> None:
    writer.add_tokenizer_model(made.kind)
    writer.add_tokenizer_pre(made.pre)
    writer.add_token_list(made.tokens)
    writer.add_token_types(made.types)
    if made.scores is not None:
        writer.add_token_scores(made.scores)
    if made.merges:
        writer.add_token_merges(made.merges)
    for name, i in made.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    writer.add_add_bos_token(made.add_bos)
    writer.add_add_space_prefix(made.space_prefix)
    if made.template:
        writer.add_chat_template(made.template)
