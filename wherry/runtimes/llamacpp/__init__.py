"""llama.cpp: GGUF files on any CPU, by the prebuilt `xllamacpp` wheel; no torch.

The wheel contains all of llama.cpp and exports its C functions: with them a session gives full logits (grade A,
direct.py). Where a wheel hides or changes them, its server interface is used instead (grade B, server.py).
Source: llama.cpp, include/llama.h; xllamacpp 2026.10.
"""

import os
import re

import xllamacpp

from wherry.artifact import Artifact
from wherry.errors import BadInput, Unsupported
from wherry.formats.gguf import adapter, vocabulary
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import ARCHS, check_shapes, shape_of
from wherry.session import Session

CONTEXT = 4096  # tokens that a session holds unless the model's own limit is lower
USUAL = ("AVX512", "AVX512_VNNI", "AMX_INT8", "AVX_VNNI")  # what a native build has on today's servers


def available() -> dict[str, str]:
    """Version, how the wheel was built, and the instruction set that it uses here."""
    found = re.findall(r"([A-Z0-9_]+) = 1", xllamacpp.get_system_info())
    isa = " ".join(
        name for name in found if re.match(r"SSE|AVX|FMA|F16C|BMI|AMX|NEON|ARM|DOTPROD|SVE|MATMUL|RVV|VSX", name)
    )
    x86 = "AVX" in isa or "SSE" in isa
    if x86 and not any(name in found for name in USUAL):
        isa += " (built without AVX-512)"
    info = xllamacpp.BUILD_INFO
    return {
        "version": f"xllamacpp {xllamacpp.__version__}", "isa": isa,
        "build": f"prebuilt wheel, {info.get('compiler', '?')}, {info.get('build_target', '?')}",
    }  # fmt: skip


def accepts(artifact: Artifact) -> bool:
    """Text generators in a GGUF file."""
    return artifact.format == "gguf" and artifact.manifest["task"]["kind"] == "text-generation"


def load(
    artifact: Artifact, device: str = "cpu", threads: int = 0, context: int = 0, api: str = "auto",
    cache: str = "recorded",
) -> Session:  # fmt: skip
    """Check the file's header, then load it.

    Args:
        artifact: a GGUF artifact, also a bare file.
        device: "cpu"; this wheel has no other.
        threads: 0 = all cores that this process may use.
        context: tokens that a call may hold, prompt and answer together; 0 = the model's limit, at most 4096.
        cache: "recorded" = keys and values are kept as the artifact says; "float" = in fp16, llama.cpp's default.
        api: "auto" = direct where it works, else server; "direct" or "server" insists.

    Raises:
        Corrupt: the header contradicts itself or the file, or llama.cpp refuses it.
        Unsupported: llama.cpp does not know the architecture.
    """
    from wherry.runtimes.llamacpp import direct, server

    if device != "cpu":
        raise BadInput(f"--device {device}: the installed xllamacpp runs on the CPU; use cpu")
    if api not in ("auto", "direct", "server"):
        raise BadInput(f"api={api}: it is auto, direct or server")
    header = Header(artifact.main)
    vocabulary.check(header)  # what llama.cpp would only find by aborting the process
    if header.arch in ARCHS:
        check_shapes(header, shape_of(header))
    most = int(header.metadata.get(f"{header.arch}.context_length", 0))
    context = context or min(most or CONTEXT, CONTEXT)
    threads = threads or cores()
    kept = str(artifact.manifest.get("kv_cache") or header.metadata.get("wherry.kv_cache", ""))
    kind = direct.CACHES.get(kept, "") if cache == "recorded" else ""
    reason = direct.unusable(bool(kind)) if api != "server" else "asked for"
    if reason and api == "direct":
        raise Unsupported(f"xllamacpp {xllamacpp.__version__} cannot be called directly: {reason}; use api=server")
    facts = {
        "runtime": "llamacpp", **available(), "threads": str(threads), "device": "cpu", "format": "gguf",
        "context": str(context), "api": f"server ({reason})" if reason else "direct",
    }  # fmt: skip
    thin = adapter.beside(header)
    if thin is not None:
        facts["adapter"] = thin.name
    if kind:
        facts["kv cache"] = kind
    return (server.Server if reason else direct.Direct)(header, threads, context, facts, thin, kind)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
