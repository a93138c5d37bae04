"""Readable Python names made of the names in an ONNX file."""

import keyword
import re

from torch import fx, nn

OWN = {"training", "input", "type", "print"}  # names that mean something else in a module or in Python
SAYS_NOTHING = re.compile(r"::|^\d+$|^(val|const|constant|onnx|ints|arg)[._\d]*$|^/", re.IGNORECASE)


def stem(weights: list[str], node: str, kind: str) -> str:
    """The name of a layer: of its first weight that says something, without `.weight`; else of the node."""
    for weight in weights:
        name = re.sub(r"[._](weight|bias|weight_quantized|gamma|scale)(_transposed)?$", "", weight)
        name = re.sub(r"\.(codes|transposed)$", "", name)
        if name and not SAYS_NOTHING.search(name):
            return name
    name = re.sub(rf"[/._](node_)?{re.escape(kind)}(_\d+)?(_quant)?$", "", node.strip("/"), flags=re.IGNORECASE)
    name = re.sub(r"^node_|_+\d+$", "", name) if not re.search("[/.]", name) else name
    return name if name not in ("", "node") else kind.lower()


def buffer_name(name: str) -> str:
    """The name of a constant; `val_7` and its like, which exporters count up themselves, would clash with theirs."""
    return "constant" if not name or (SAYS_NOTHING.search(name) and name[0] != "/") else clean(name)


def clean(name: str) -> str:
    """A Python name of any text."""
    name = re.sub(r"\W+", "_", name).strip("_") or "value"
    name = f"n{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) or hasattr(fx.GraphModule, name) or name in OWN else name


def free_name(module: nn.Module, name: str) -> str:
    """`name`, or with a number behind it when the module has something of that name."""
    new, number = name, 1
    while hasattr(module, new):
        new, number = f"{name}_{number}", number + 1
    return new
