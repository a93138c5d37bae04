"""GPTQ: the layout of AutoGPTQ and GPTQModel, which transformers, vLLM and SGLang load; any method may have made it.

    qweight int32 [k * bits / 32, n]: inputs packed along a column, low bits first, codes from 0
    qzeros  int32 [groups, n * bits / 32]: zeros packed along the outputs
    scales  float16 [groups, n]; g_idx int32 [k]: the group of each input
Symmetric zeros are stored less one (checkpoint_format "gptq"); asymmetric ones as they are ("gptq_v2"): less one, a
zero of 0 would be -1, which readers take for 16 or for 0.
Source: AutoGPTQ 0.7 qlinear_cuda.py; GPTQModel for gptq_v2. 2, 4 and 8 bits; 3 bits straddle words there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wherry import packed
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import Unsupported
from wherry.ops.pack import pack, unpack
from wherry.packed import command, decode
from wherry.recipe import Plan, Progress
from wherry.report import read_object
from wherry.scheme import QTensor, Scheme


def parts(q: QTensor) -> dict[str, torch.Tensor]:
    """A layer [n, k] as the tensors of the file."""
    bits, k = q.scheme.bits, q.shape[-1]
    zero = q.zero if q.zero is not None else torch.zeros(q.scale.shape, dtype=torch.int8)
    stored = zero - 1 if q.zero is None else zero
    group = torch.arange(k, dtype=torch.int32) // (k // q.scale.shape[-1])
    return {
        "qweight": pack(q.code, bits).T.contiguous(), "qzeros": pack(stored.T.contiguous(), bits),
        "scales": q.scale.T.half().contiguous(), "g_idx": group,
    }  # fmt: skip


def whole(have: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The layer that `parts` took apart; zeros as they are (gptq_v2), or not looked at (symmetric)."""
    groups, n = have["scales"].shape
    k = have["qweight"].shape[0] * 32 // scheme.bits
    if "g_idx" in have and not torch.equal(have["g_idx"].long(), torch.arange(k) // (k // groups)):
        raise Unsupported("a GPTQ file with its inputs out of order (desc_act=true) is not read; get one without")
    zero = None if scheme.symmetric else unpack(have["qzeros"], scheme.bits, n).T.contiguous()
    code = unpack(have["qweight"].T.contiguous(), scheme.bits, k)
    return QTensor(scheme, code, have["scales"].float().T.contiguous(), zero)


SPELLINGS = ("W8A16", "W8A16_ASYM", "W4A16", "W4A16_ASYM", "W2A16", "W2A16_ASYM")
LAYOUT = packed.Layout("gptq", SPELLINGS, "W4A16", parts, whole)


def check(plan: Plan) -> dict[str, str]:
    """Notes per tensor. Raises Unsupported for what the files cannot hold."""
    left = [row.name for row in plan.rows if row.role == "linear" and row.scheme is None]
    if left and len(left) < sum(row.role == "linear" for row in plan.rows):
        raise Unsupported(f"gptq takes every layer of the blocks, {left[0]} is left a float; awq and gguf can mix")
    return packed.check(LAYOUT, plan)


def save(checkpoint: Checkpoint, out: Path, progress: Progress) -> Artifact:
    """Write the folder `out`."""
    check(Plan.of(checkpoint))

    def config(scheme: Scheme, left: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "gptq", "bits": scheme.bits, "group_size": packed.grain(scheme), "sym": scheme.symmetric,
            "desc_act": False, "lm_head": False, "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        }  # fmt: skip

    return packed.save(LAYOUT, checkpoint, out, config, progress)


def load(path: Path) -> Checkpoint:
    """Open such a folder as a Checkpoint that holds codes."""
    config = read_object(path / "config.json")
    found = config["quantization_config"]
    symmetric = bool(found.get("sym", True))
    if not symmetric and found.get("checkpoint_format", "gptq") != "gptq_v2":
        raise Unsupported(f"{path}: asymmetric zeros of the first GPTQ format are ambiguous; get it as gptq_v2")
    scheme = packed.scheme_of(path, "gptq", found.get("bits"), found.get("group_size"), symmetric)
    return packed.load(LAYOUT, path, config, scheme)


__all__ = ["LAYOUT", "check", "command", "decode", "load", "save"]
