"""Find a method by its file name (or by an entry point of somebody else's package); list a shelf unread.

A shelf is a folder of interchangeable methods: `quant`, `formats`, `runtimes`, ... The file name is the
registry: `find("quant", "gptq")` imports `wherry/quant/gptq.py`. A package by a stranger adds a method with
`[project.entry-points."wherry.quant"]` in its own pyproject. Nothing is scanned or imported before it is asked for.
"""

import ast
import difflib
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from wherry.errors import Missing, Unsupported

ROOT = Path(__file__).parent
SHELVES = ("quant", "prune", "distill", "formats", "runtimes", "evaluate", "engine")
# module that an edge file imports -> the extra of wherry that brings it
EXTRAS = {
    "torch": "torch", "transformers": "torch", "compressed_tensors": "torch", "accelerate": "torch",
    "gguf": "gguf", "xllamacpp": "gguf", "onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnx",
    "onnxruntime_genai": "onnx", "openvino": "openvino", "onnx_ir": "onnx", "scipy": "eval", "matplotlib": "eval",
    "sklearn": "eval", "sacrebleu": "eval", "rouge_score": "eval", "jiwer": "eval", "seqeval": "eval",
    "pyarrow": "eval", "PIL": "vision", "av": "vision", "pycocotools": "vision", "soundfile": "audio",
    "captum": "explain", "tensorboard": "watch",
    "optuna": "tune", "ray": "ray", "wherry_native": "native", "constriction": "compact",
}  # fmt: skip


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def names(shelf: str) -> dict[str, str]:
    """Return {name: first docstring line} of a shelf, read as text: no optional package is needed."""
    found = {}
    for path in sorted((ROOT / shelf).glob("*")):
        file = path / "__init__.py" if path.is_dir() else path
        if file.suffix != ".py" or not file.exists() or path.name.startswith("_"):
            continue
        doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf8"))) or ""
        found[path.stem] = doc.split("\n")[0]
    for point in entry_points(group=f"wherry.{shelf}"):
        found.setdefault(point.name, f"from {point.value}")
    return found


def find(shelf: str, name: str) -> ModuleType:
    """Import one method of a shelf.

    Raises:
        Unsupported: no such name; the message has the nearest and the whole list.
        Missing: the method's own optional package is not installed; the message has the pip line.
    """
    name = name.replace("-", "_")
    try:
        if (ROOT / shelf / f"{name}.py").exists() or (ROOT / shelf / name / "__init__.py").exists():
            return importlib.import_module(f"wherry.{shelf}.{name}")
        for point in entry_points(group=f"wherry.{shelf}", name=name):
            return point.load()
    except ModuleNotFoundError as error:
        raise missing(error, f"{shelf}/{name}") from error
    known = names(shelf)
    raise Unsupported(f"no '{name}' in {shelf}{suggest(name, known)}; there are: {', '.join(known)}")


def missing(error: ModuleNotFoundError, what: str) -> Missing:
    """The error with its pip line. A module of our own that is not there is a fault of ours and raised as it is."""
    package = (error.name or "").split(".")[0]
    if package in ("", "wherry"):
        raise error
    extra = EXTRAS.get(package)
    line = f"pip install 'wherry[{extra}]'" if extra else f"pip install {package}"
    return Missing(f"{what} needs the package '{package}', which is not installed.\n{line}")


def load(shelf: str, name: str) -> type:
    """Return the class of a method file: the class whose lower-case name is the file's name."""
    module = find(shelf, name)
    for key, value in vars(module).items():
        if isinstance(value, type) and key.lower() == name.replace("_", "").replace("-", ""):
            return value
    raise Unsupported(f"{shelf}/{name}.py has no class named {name.upper()}")
