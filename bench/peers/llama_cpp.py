"""llama.cpp's own quantizer, with and without an importance matrix, by its C function that the wheel xllamacpp exports.

    Entry("llama.cpp", "quantize") and Entry("llama.cpp", "quantize", "imatrix=true") of bench/quality.py

Every linear of the blocks goes through ggml_quantize_chunk, as in llama-quantize; the importance matrix is the mean of
x^2 of each input over the calibration windows in the float model, as llama-imatrix collects it. The folder that is
written holds plain fp16 weights of what the blocks mean, by the gguf package's dequantizer; bits are of a safetensors
file with the blocks and fp16 of the rest, as wherry's own are.
"""

import ctypes as c
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save


def quantize(w: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    """Blocks uint8 [n, bytes] of w [n, k] float32; importance [k] or None."""
    import xllamacpp

    found = [f for f in Path(xllamacpp.__file__).parent.glob("*.so") if b"ggml_quantize_chunk" in f.read_bytes()]
    library = c.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = c.c_size_t
    floats, number = c.POINTER(c.c_float), c.c_int64
    library.ggml_quantize_chunk.argtypes = [c.c_int, floats, c.c_void_p, number, number, number, floats]
    n, k = w.shape
    per, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    out = np.zeros((n, k // per * size), np.uint8)
    source = np.ascontiguousarray(w, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = None if weights is None else weights.ctypes.data_as(floats)
    wrote = library.ggml_quantize_chunk(
        int(GGMLQuantizationType[kind]), source.ctypes.data_as(floats), out.ctypes.data, 0, n, k, pointer
    )
    assert wrote == out.nbytes, (wrote, out.nbytes)
    return out


def compress(folder: Path, out: Path, kind: str, tokens: np.ndarray | None) -> dict[str, Any]:
    """Make `out` from `folder`; tokens [windows, length] give the importance matrix. Returns what it took."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    start, cpu = time.perf_counter(), time.process_time()
    squares: dict[str, torch.Tensor] = {}

    def see(name: str) -> Any:
        def hook(layer: torch.nn.Module, args: Any) -> None:
            x = args[0].flatten(0, -2)
            squares[name] = squares.get(name, torch.zeros(x.shape[-1])) + x.square().sum(0)

        return hook

    if tokens is not None:
        handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
        with torch.no_grad():
            for row in tokens:
                model(torch.from_numpy(row[None]))
        for handle in handles:
            handle.remove()
    held = {n: p.detach().half() for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        importance = (squares[name] / tokens.size).numpy() if tokens is not None else None
        blocks = quantize(layer.weight.detach().numpy(), kind, importance)
        held[f"{name}.weight"] = torch.from_numpy(blocks)
        layer.weight.data = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind])).float()
    took = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    every = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    model.to(torch.float16).save_pretrained(out)
    size = len(save(held))
    return took | {"bytes": size, "bits": 8 * size / every}
