"""What executes where: each scheme in each format on its runtime, measured; and the page that shows it.

python tests/formats/where.py     # measures all (minutes), writes docs/where.json and docs/schemes.md
python tests/formats/where.py --page     # writes the page from docs/where.json alone

A figure is the mean KL in nats per token between the runtime's logits and those of torch with the same decoded weights
(and rounded inputs or cache) on a seeded Llama of one block: what the runtime's own arithmetic adds. Without a figure
nothing here runs it: its grid is tested against other packages' decoders and its file read back, no more.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.conftest import write_llama  # noqa: E402
from wherry import api, data, deliver, shelf  # noqa: E402
from wherry.artifact import Artifact  # noqa: E402
from wherry.checkpoint import Checkpoint  # noqa: E402
from wherry.errors import BadInput, Unsupported  # noqa: E402
from wherry.recipe import Recipe  # noqa: E402
from wherry.scheme import PRESETS  # noqa: E402

FOUND, PAGE = ROOT / "docs" / "where.json", ROOT / "docs" / "schemes.md"
RUNTIMES = {"gguf": "llamacpp", "onnx": "onnxruntime"}
TITLES = {"transformers": "transformers", "gguf": "llama.cpp (gguf)", "onnx": "ONNX Runtime (onnx)"}
TITLES |= {"packed": "gptq, awq"}
TOKENS = np.random.default_rng(0).integers(3, 512, 64).tolist()
MORE = {
    "W8A16,strategy=tensor": "rtn:scheme=W8A16,strategy=tensor",
    "W4A16,block_structure=64x64": "rtn:scheme=W4A16,block_structure=64x64",
    "FP8A16,block_structure=128x128": "rtn:scheme=FP8A16,block_structure=128x128",
    "W4A16,scale=fp8": "rtn:scheme=W4A16,group_size=32,scale=fp8",
    "W4A16,scale=e8m0": "rtn:scheme=W4A16,group_size=32,scale=e8m0",
    "lowrank:rank=8": "rtn:scheme=W4A16,group_size=32 | lowrank:rank=8",
    "kvcache:bits=8": "rtn:scheme=W8A16,group_size=32 | kvcache:bits=8",
    "kvcache:bits=4": "rtn:scheme=W8A16,group_size=32 | kvcache:bits=4",
}


def recipes() -> dict[str, str]:
    """{what a row is called: its recipe}, made from PRESETS."""
    plain = {
        name: f"rtn:scheme={name}" + ("" if s.fixed or s.activations is not None else ",group_size=32")
        for name, s in PRESETS.items()
    }
    return plain | MORE


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) in nats per token of logits [tokens, vocabulary]."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def accepted(recipe: str, checkpoint: Checkpoint, form: str) -> bool:
    """Whether the format takes the plan."""
    try:
        Recipe.parse(recipe).plan(checkpoint, (form,))
    except (BadInput, Unsupported):
        return False
    return True


def logits(runtime: str, folder: Path) -> np.ndarray:
    """What a runtime says of the tokens."""
    session = shelf.find("runtimes", runtime).load(Artifact.open(folder), threads=1)
    found = session.score(TOKENS).logits
    session.close()
    assert found is not None
    return found


def stock(folder: Path) -> np.ndarray | None:
    """What transformers itself says of the checkpoint; None when it does not read it."""
    from transformers import AutoModelForCausalLM

    words = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization_config"]
    if words["quant_method"] != "compressed-tensors":
        return None
    with torch.no_grad():
        small = "fp4" in words["format"]  # those decompress to bfloat16, whatever is asked for
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16" if small else "float32")
        return model(torch.tensor([TOKENS])).logits[0, :-1].float().numpy()


def evidence(recipe: str, model: Path, out: Path) -> dict[str, float | str]:
    """{transformers, gguf, onnx: KL of that runtime to torch; packed: which of gptq, awq hold it}; absent = refused."""
    checkpoint = Checkpoint.open(model)
    formats = tuple(form for form in RUNTIMES if accepted(recipe, checkpoint, form))
    plan = Recipe.parse(recipe).plan(checkpoint, formats)
    source = data.read(data.shipped("calibration"))
    batches = deliver.calibration(checkpoint, source, 8, 64, 0) if plan.recipe.calibrated else []
    deliver.deliver(plan, out, formats, batches, {}, lambda result: None, api.quiet)
    want = logits("torch", out)
    found: dict[str, Any] = {}
    theirs = stock(out)
    if theirs is not None:
        found["transformers"] = float(f"{divergence(want, theirs):.1e}")
    for form in formats:
        found[form] = float(f"{divergence(want, logits(RUNTIMES[form], out / form)):.1e}")
    if packed := [form for form in ("gptq", "awq") if accepted(recipe, checkpoint, form)]:
        found["packed"] = ", ".join(packed)
    return found


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/schemes.md."""
    head = ["scheme", "what it is", "torch", *TITLES.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in found.items():
        what = PRESETS[name].explain() if name in PRESETS else recipes()[name]
        cells = [f"KL {row[k]:.0e}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in TITLES]
        runs = any(isinstance(row.get(key), float) for key in RUNTIMES)
        cells.insert(0, "as numbers" if runs or "transformers" in row else "as numbers; grid and format tests only")
        what = what.replace("|", "\\|")
        lines.append("| " + " | ".join([f"`{name}`", what, *cells]) + " |")
    return INTRODUCTION + "\n".join(lines) + "\n" + END


# ruff: noqa: E501
INTRODUCTION = """# What executes where

Written by `python tests/formats/where.py`, which runs every cell; `tests/formats/test_where.py` measures them again.

A KL is that between the runtime's logits and torch's with the same decoded weights, in nats per token, on a seeded Llama of
one block whose logits are sharp: what the runtime's own arithmetic adds (llama.cpp rounds inputs to 8 bits in blocks).
An empty cell: the format refuses, with the nearest that it takes. torch decodes every scheme and computes in float32.

"""
END = """
- transformers reads compressed-tensors; vLLM reads the same folders, and is not run here, as no accelerator is asked for.
- gptq, awq: written and read back here, and decoded by tests as AutoGPTQ and AutoAWQ do; their kernels want a GPU.
- k-quants, MXFP4: ggml's own blocks. NVFP4, FP8, FP4, NF4 and binary: no runtime here has a kernel for them; transformers
  decompresses what compressed-tensors can say, 4-bit floats to bfloat16 (hence their KL).
- `lowrank`: a LoRA adapter in llama.cpp, two MatMuls in ONNX Runtime. `kvcache`: q8_0 and q4_0 in llama.cpp, whose grids differ
  a little from compressed-tensors'; ONNX Runtime keeps floats, so its figure is the whole effect of the cache.
- W8A8 of sentence encoders runs in integers in ONNX Runtime, and of graph models in ONNX Runtime and OpenVINO; both count the
  kernels that were executed (docs/verify.md). OpenVINO runs no language models here, so its u8 cache is not reached.
"""


def main() -> None:
    """Measure and write, or write."""
    if "--page" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            model = write_llama(Path(folder) / "llama", layers=1, hidden=256, intermediate_size=768)
            found = {}
            for name, recipe in recipes().items():
                found[name] = evidence(recipe, model, Path(folder) / "out")
                shutil.rmtree(Path(folder) / "out")
                print(name, found[name], flush=True)
        FOUND.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    PAGE.write_text(page(json.loads(FOUND.read_text(encoding="utf8"))), encoding="utf8")


if __name__ == "__main__":
    main()
