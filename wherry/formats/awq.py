"""AWQ: the layout of AutoAWQ (gemm), which transformers, vLLM and SGLang load; any 4-bit method may have made it.

    qweight int32 [k, n / 8]: eight outputs in a word, in the order 0 2 4 6 1 3 5 7, codes from 0
    qzeros  int32 [groups, n / 8]: in the same order
    scales  float16 [groups, n]
w = scale * (code - zero); symmetric codes have the zero 8.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py.
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

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds output ORDER[i] of its eight
BACK = [ORDER.index(i) for i in range(8)]


def turned(code: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Codes [rows, n] with each eight of a row in another order."""
    return code.unflatten(-1, (-1, 8))[..., order].flatten(-2).contiguous()


def parts(q: QTensor) -> dict[str, torch.Tensor]:
    """A layer [n, k] as the tensors of the file."""
    zero = q.zero if q.zero is not None else torch.zeros(q.scale.shape, dtype=torch.int8)
    return {
        "qweight": pack(turned(q.code.T, ORDER), 4), "qzeros": pack(turned(zero.T, ORDER), 4),
        "scales": q.scale.T.half().contiguous(),
    }  # fmt: skip


def whole(have: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The layer that `parts` took apart."""
    n = have["scales"].shape[1]
    code, zero = (turned(unpack(have[part], 4, n), BACK).T.contiguous() for part in ("qweight", "qzeros"))
    return QTensor(scheme, code, have["scales"].float().T.contiguous(), None if scheme.symmetric else zero)


LAYOUT = packed.Layout("awq", ("W4A16", "W4A16_ASYM"), "W4A16_ASYM", parts, whole)


def check(plan: Plan) -> dict[str, str]:
    """Notes per tensor. Raises Unsupported for what the files cannot hold."""
    return packed.check(LAYOUT, plan)


def save(checkpoint: Checkpoint, out: Path, progress: Progress) -> Artifact:
    """Write the folder `out`."""

    def config(scheme: Scheme, left: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq", "bits": 4, "group_size": packed.grain(scheme), "zero_point": True,
            "version": "gemm", "modules_to_not_convert": left or None,
        }  # fmt: skip

    return packed.save(LAYOUT, checkpoint, out, config, progress)


def load(path: Path) -> Checkpoint:
    """Open such a folder as a Checkpoint that holds codes; all zeros are read, so that it counts as asymmetric."""
    config = read_object(path / "config.json")
    found = config["quantization_config"]
    if found.get("version", "gemm") != "gemm" or not found.get("zero_point", True):
        raise Unsupported(f"{path}: of AWQ's layouts only gemm with zero points is read")
    scheme = packed.scheme_of(path, "awq", found.get("bits"), found.get("group_size"), False)
    return packed.load(LAYOUT, path, config, scheme)


__all__ = ["LAYOUT", "check", "command", "decode", "load", "save"]
