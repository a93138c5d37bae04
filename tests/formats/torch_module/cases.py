"""ONNX's own backend node cases through the importer, and the page that lists every operator with them.

python tests/formats/torch_module/cases.py     # writes docs/onnx-import.md
"""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "onnx-import.md"
# what a case's name says -> why it is not asked for, or fails
OUTSIDE = {
    r"bernoulli|training_dropout": "random numbers are torch's own",
    r"string|strnorm|label_encoder|regex|tfidf": "texts are not tensors in torch",
    r"float4e2m1|FLOAT4E2M1|float8e8m0|FLOAT8E8M0|E8M0": "torch does not compute in 4-bit floats or bare exponents",
    r"image_decoder": "decoding images is not a model's work",
    r"adagrad|adam|momentum": "optimizers of training graphs",
    r"tree_ensemble|array_feature|binarizer": "classical models (ai.onnx.ml)",
    r"scan_sum$": "Scan of opset 8",
    r"deform_conv": "not imported",
    r"attention_(3d|4d)\S*(bf16|fp16)": "16-bit sums are rounded in another order, within 3 steps",
    r"downsample_scales_\w+_align_corners$": "a scale that leaves part of a pixel: ONNX Runtime's rule is taken",
    r"dft_inverse": "1.9e-7 where torch gives 0 exactly: rounding in the reference, above its 1e-7",
    r"linear_attention|causal_conv_with_state": "opset 27; ONNX's inliner, which would write it out, fails",
}


def tensor(value: Any) -> Any:
    """A case's value as the module takes it."""
    from wherry.formats.onnx.torch_module.values import DTYPES, from_array, tensor_of

    if isinstance(value, list):
        return [tensor(v) for v in value]
    if value is None:
        return None
    if isinstance(value, onnx.TensorProto):
        return tensor_of(value)
    array = np.asarray(value)
    return from_array(array, DTYPES[onnx.helper.np_dtype_to_tensor_dtype(array.dtype)])


def same(got: Any, wanted: Any, rtol: float, atol: float) -> None:
    """Raise AssertionError when a value differs in type, shape or number."""
    if isinstance(wanted, list) or wanted is None:
        assert (wanted is None) == (got is None)
        for one, other in zip(got or [], wanted or [], strict=True):
            same(one, other, rtol, atol)
        return
    expected = tensor(wanted)
    assert list(got.shape) == list(expected.shape), f"shape {list(got.shape)}, not {list(expected.shape)}"
    assert got.dtype == expected.dtype, f"type {got.dtype}, not {expected.dtype}"
    if got.is_complex():
        got, expected = torch.view_as_real(got), torch.view_as_real(expected)
    wide = [t.numpy() if t.dtype == torch.bool else t.double().numpy() for t in (got, expected)]
    np.testing.assert_allclose(*wide, rtol=rtol, atol=max(atol, 1e-7))


def operator_of(case: Any) -> str:
    """The operator that a case is about."""
    kinds = [(f"{n.domain}::" if n.domain else "") + n.op_type for n in case.model.graph.node]
    flat = case.name.replace("_", "").lower()
    named = [k for k in kinds if k.rpartition("::")[2].lower() in flat]
    return (named or kinds or ["?"])[0]


def run() -> tuple[dict[str, list[int]], dict[str, str], list[int]]:
    """({operator: [passed, total]}, {case that failed: why}, [passed, total] of the `_expanded` cases)."""
    np.random.seed(0)  # the cases draw from it
    from onnx.backend.test.loader import load_model_tests

    from wherry.formats.onnx.torch_module import module

    counts: dict[str, list[int]] = {}
    wrong: dict[str, str] = {}
    expanded = [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in load_model_tests(kind="node"):
            count = expanded if "_expanded" in case.name else counts.setdefault(operator_of(case), [0, 0])
            count[1] += 1
            try:
                net = module(case.model)
                for inputs, outputs in case.data_sets:
                    got = net(*[tensor(v) for v in inputs])
                    for one, wanted in zip(got if isinstance(got, tuple) else (got,), outputs, strict=True):
                        same(one, wanted, case.rtol, case.atol)
                count[0] += 1
            except Exception as error:  # every way to fail is counted
                wrong[case.name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return counts, wrong, expanded


def reason(name: str) -> str | None:
    """Why a case fails, when that is known."""
    return next((why for pattern, why in OUTSIDE.items() if re.search(pattern, name)), None)


def claimed() -> list[str]:
    """Operators of the table, sorted."""
    import wherry.formats.onnx.torch_module.whole  # noqa: F401 - fills it
    from wherry.formats.onnx.torch_module.table import TABLE

    return sorted(f"{domain}::{kind}" if domain else kind for domain, kind in TABLE)


def page(counts: dict[str, list[int]], wrong: dict[str, str], expanded: list[int]) -> str:
    """docs/onnx-import.md."""
    lines = [
        "# ONNX operators that are imported",
        "",
        "Written by `python tests/formats/torch_module/cases.py`; a test compares it.",
        "`wherry.formats.onnx.torch_module.module` makes an editable torch module of an ONNX file. The figures are",
        f"cases of the `onnx` package's own backend node tests ({onnx.__version__}): passed / all. Operators of",
        "`com.microsoft` have none. Tolerances: the cases' own, 1e-3 relative and 1e-7.",
        "",
        "| operator | cases |",
        "|---|---|",
    ]
    for name in claimed():
        count = counts.get(name)
        lines.append(f"| {name} | {f'{count[0]} / {count[1]}' if count else '-'} |")
    own = [counts[name] for name in claimed() if name in counts]
    others = {name: count for name, count in counts.items() if name not in claimed()}
    total = [sum(c[i] for c in own) for i in (0, 1)]
    lines += [
        f"| **all of these** | **{total[0]} / {total[1]}** |",
        f"| written with other operators (`_expanded`) | {expanded[0]} / {expanded[1]} |",
        "",
        "Cases that do not pass, of imported operators and `_expanded`:",
        "",
        "| cases | why |",
        "|---|---|",
    ]
    mine = {n: w for n, w in wrong.items() if operator_by_name(n, others) is None}
    for why, number in sorted(Counter(reason(name) or f"`{name}`" for name in mine).items()):
        lines.append(f"| {number} | {why} |")
    lines += [
        "",
        "Not imported (each raises `Unsupported` with its name, or is written with others where ONNX says how):",
        "",
    ]
    lines += [f"- {name} ({c[0]} / {c[1]})" for name, c in sorted(others.items())]
    return "\n".join(lines) + "\n"


def operator_by_name(case: str, others: dict[str, list[int]]) -> str | None:
    """The operator of `others` that a case's name begins with."""
    flat = case.replace("_", "").lower()
    names = {**{name: name.rpartition("::")[2].lower() for name in others}, "StringNormalizer": "strnorm"}
    return next((name for name, low in names.items() if low in flat), None) if "_expanded" not in case else None


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    text = page(*run())
    PAGE.write_text(text, encoding="utf8")
    print(text)
