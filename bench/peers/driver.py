"""What the peers' drivers share. They run inside a peer's environment and import nothing of wherry, but this file."""

import argparse
import contextlib
import importlib.metadata
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def options(doc: str | None, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that every driver has; each adds its own knobs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, help="npy of ids [windows, length], for those that look at data")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--scheme", help="W4A16, W4A16_ASYM, W3A16, ...")
    parser.add_argument("--group-size", type=int)
    return parser


class Clock:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, object]:
        """What a driver's line says of time."""
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        return {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}


def count(model: torch.nn.Module) -> int:
    """Its parameters; tied ones count once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def size(files: int, parameters: int) -> dict[str, object]:
    """Bytes of the weight files, and bits a parameter."""
    return {"bytes": files, "bits": files * 8 / parameters}


def load(folder: Path) -> torch.nn.Module:
    """The model in float32: a decoder with its head, an encoder as it is."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    causal = any("CausalLM" in name for name in AutoConfig.from_pretrained(folder).architectures or [])
    return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(folder, dtype=torch.float32)


def rows(tokens: Path) -> list[list[int]]:
    """The ids of each window; an encoder's sentences end where -1 begins."""
    return [row[row >= 0].tolist() for row in np.load(tokens)]


def halve(folder: Path) -> None:
    """Store what is float32 as fp16: scales, embedding, norms. The codes stay as they were solved, in float32."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: t.half() if t.dtype == torch.float32 else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def versions(*packages: str) -> dict[str, object]:
    """What was installed."""
    return {"versions": [f"{name}=={importlib.metadata.version(name)}" for name in packages]}


def main(compress: Callable[[argparse.Namespace], dict[str, object]], parser: argparse.ArgumentParser) -> None:
    """One run, or with --serve one for each line of stdin: one import of the peer serves many.

    Each ends with a JSON line of what it took; all that the peer prints goes to stderr.
    """
    lines = sys.stdin if sys.argv[1:] == ["--serve"] else [shlex.join(sys.argv[1:])]
    for line in lines:
        with contextlib.redirect_stdout(sys.stderr):
            took = compress(parser.parse_args(shlex.split(line)))
        print(json.dumps(took), flush=True)
