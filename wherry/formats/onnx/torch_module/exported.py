"""A saved torch.export program (`.pt2`) as a module, loaded only when nothing in it can run code.

Idea:   torch's own reader unpickles what it is told to, evaluates symbolic expressions and resolves any name below
        `torch`. So the archive is read whole, and each of these is checked first: records have known names, no
        payload is pickled, sample inputs load with weights_only, expressions are arithmetic, targets are operators.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wherry.errors import Corrupt, Missing, Unsupported

RECORDS = re.compile(
    r"models/model\.json|data/(weights/(weight_\d+|model_weights_config\.json)|sample_inputs/model\.pt"
    r"|constants/(tensor_\d+|model_constants_config\.json))|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|version|\.format_version|\.storage_alignment"
)
TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|_c10d_functional)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|xor)"
    r"|torch\.sym_(float|int|not|max|min|ite|sum)|math\.(ceil|floor|trunc|sqrt)"
)
WORDS = re.compile(
    r"[suz][a-z]{0,2}\d+|Symbol|positive|nonnegative|integer|real|True|False|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv"
    r"|CeilDiv|CeilToInt|FloorToInt|IntTrueDiv|FloatTrueDiv|ToFloat|TruncToInt|Pow|PowByNatural|Eq|Ne|Lt|Le|Gt|Ge|And|Or"
    r"|Not|Piecewise|Add|Mul|Integer|Rational|oo|int_oo|Where|LShift|RShift|BitwiseFn_bitwise_and|BitwiseFn_bitwise_or"
)


def program(path: str | os.PathLike) -> nn.Module:
    """The module of a saved torch.export program.

    Raises Missing, Corrupt for what is no such archive, Unsupported for one that holds pickled objects or code.
    """
    file = Path(path)
    if not file.is_file():
        raise Missing(f"{file} is not a file; give the path of a .pt2 that torch.export.save wrote")
    from torch.export.pt2_archive._package import load_pt2

    data = file.read_bytes()
    try:
        check(file, data)
        contents = load_pt2(io.BytesIO(data))
    except (RuntimeError, ValueError, KeyError, AssertionError, OSError, TypeError, AttributeError) as error:
        raise Corrupt(
            f"{file} is not a program that torch.export.save of this torch wrote: {str(error)[:150]}"
        ) from error
    exported = contents.exported_programs.get("model")
    if exported is None:
        raise Corrupt(f"{file} holds no exported program")
    exported._guards_code = []  # Python text of the file, which module() would run
    return exported.module(check_guards=False)


def check(file: Path, data: bytes) -> None:
    """Raise Unsupported for anything in the archive that could run code."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    def refuse(what: str) -> None:
        raise Unsupported(f"{file} {what}: it was not loaded.\nSave it again with torch.export.save, or as ONNX.")

    with PT2ArchiveReader(io.BytesIO(data)) as archive:
        for name in archive.get_file_names():
            if not RECORDS.fullmatch(name):
                refuse(f"holds {name!r}, which is not part of a plain exported program")
            record = archive.read_bytes(name)
            if name.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(record), weights_only=True)
                except Exception as error:  # whatever is not plain tensors
                    raise Unsupported(f"{file} holds pickled objects in {name!r}; it was not loaded") from error
            if name.endswith(".json"):
                for key, value in fields(json.loads(record)):
                    if key == "use_pickle" and value:
                        refuse("holds pickled weights")
                    if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
                        refuse(f"names the payload {value!r}")
                    if key == "expr_str" and not arithmetic(str(value)):
                        refuse(f"has the expression {str(value)[:60]!r}")
                    if key == "target" and isinstance(value, str) and not TARGETS.fullmatch(value):
                        refuse(f"calls {value!r}, which is not an operator of torch")


def fields(value: Any) -> list[tuple[str, Any]]:
    """All (key, value) of a JSON document, at any depth."""
    out: list[tuple[str, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            out += one.items()
            todo += one.values()
        elif isinstance(one, list):
            todo += one
    return out


def arithmetic(text: str) -> bool:
    """Whether an expression holds numbers, sizes and known functions only."""
    words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\d+\.\d*(e[+-]?\d+)?", "0", text))
    plain = re.fullmatch(r"[\w\s+\-*/%(),.=<>&|~'\"]*", text) and not re.search(r"\.\s*[A-Za-z_]", text)
    return bool(plain) and all(WORDS.fullmatch(word) for word in words)
