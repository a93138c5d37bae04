"""Doctor: CPU features, memory, disk, what is installed, and the exact pip line for what is not."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from wherry import __version__, shelf
from wherry.errors import Missing
from wherry.report import Report

FEATURES = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")
PACKAGES = {
    "torch": "torch", "transformers": "torch", "compressed-tensors": "torch", "gguf": "gguf", "xllamacpp": "gguf",
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnxruntime", "onnxruntime-genai": "onnx",
    "scipy": "eval", "matplotlib": "eval", "wherry-native": "native",
}  # fmt: skip


def cpu_flags() -> set[str]:
    """Instruction set extensions that the processor reports; empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = [line for line in info.read_text(encoding="utf8").splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def examine() -> Report:
    """Rows of what there is; a missing package has its pip line as the note."""
    report = Report(f"wherry {__version__}")
    report.add("python", "", platform.python_version(), note=sys.executable)
    report.add("system", "", f"{platform.system()} {platform.machine()}")
    flags = cpu_flags()
    report.add("cpu cores", "", os.cpu_count())
    report.add("cpu features", "", " ".join(f for f in FEATURES if f in flags) or "not told by this system")
    memory = psutil.virtual_memory()
    report.add("memory", "", memory.total, "B", note=f"{memory.available / 1e9:.1f} GB free")
    report.add("disk", str(Path.cwd()), shutil.disk_usage(Path.cwd()).free, "B", note="free here")
    for package, extra in PACKAGES.items():
        try:
            report.add("package", package, version(package))
        except PackageNotFoundError:
            report.add("package", package, None, note=f"missing: pip install 'wherry[{extra}]'")
    for name in shelf.names("runtimes"):
        try:
            facts = shelf.find("runtimes", name).available()
            report.add("runtime", name, "ready", note=", ".join(f"{k} {v}" for k, v in facts.items()))
        except Missing as error:
            report.add("runtime", name, None, note=str(error).splitlines()[-1])
    return report
