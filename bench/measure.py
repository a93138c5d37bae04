"""One ruler for every tool: a folder as stock transformers reads it, against its float reference.

Bits are file bytes * 8 / parameters, where file bytes are all the safetensors files of the folder (codes, scales,
zeros, embedding, norms, headers) and parameters are the reference's, tied ones once.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BATCH = 4096  # tokens of one forward pass
PARTS = 96  # figures for pairing that a row keeps, each a mean over neighbouring windows


@dataclass(frozen=True)
class Float:
    """What is kept of the reference: the last hidden states and the head give its logits again, exactly."""

    hidden: torch.Tensor  # [windows, length - 1, width] float32
    head: torch.Tensor  # [vocabulary, width] float32
    nll: np.ndarray  # [windows] mean nats per token
    parameters: int


def load(folder: Path) -> torch.nn.Module:
    """The model of a folder in float32, decompressed; float folders and compressed-tensors folders alike."""
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization and quantization.get("quant_method") == "wherry":  # what nobody else has words for: k-quants, NF4
        from wherry.checkpoint import Checkpoint

        return Checkpoint.open(folder).module()
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain)
    return model.float().eval()


@torch.inference_mode()
def hidden(model: torch.nn.Module, ids: np.ndarray) -> torch.Tensor:
    """Last hidden states [windows, length - 1, width] of token windows [windows, length]."""
    parts = np.array_split(ids, -(-ids.size // BATCH))
    return torch.cat([model.base_model(torch.from_numpy(rows[:, :-1])).last_hidden_state for rows in parts])


def reference(folder: Path, ids: np.ndarray) -> Float:
    """The float model's side of every comparison."""
    model = load(folder)
    head = model.get_output_embeddings().weight.detach()
    parameters = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    h = hidden(model, ids)
    nll = [torch.nn.functional.cross_entropy(h[i] @ head.T, torch.from_numpy(ids[i, 1:])) for i in range(len(ids))]
    return Float(h, head, np.array([float(value) for value in nll]), parameters)


@torch.inference_mode()
def compare(folder: Path, ids: np.ndarray, float_: Float) -> dict[str, object]:
    """Perplexity, KL(float || model) in nats per token, top-1 agreement, bits; in parts too, for pairing.

    ppl_ratio_ci and kl_ci are half-widths of 95% intervals over windows (normal, paired with the float model).
    """
    model = load(folder)
    head = model.get_output_embeddings().weight.detach()
    nll, kl, top = [], [], []
    states = hidden(model, ids)
    for i, row in enumerate(ids):
        logits = states[i] @ head.T
        ours, original = logits.log_softmax(-1), (float_.hidden[i] @ float_.head.T).log_softmax(-1)
        nll.append(float(torch.nn.functional.nll_loss(ours, torch.from_numpy(row[1:]))))
        kl.append(float((original.exp() * (original - ours)).sum(-1).mean()))
        top.append(float((ours.argmax(-1) == original.argmax(-1)).float().mean()))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "perplexity": math.exp(np.mean(nll)),
        "float_perplexity": math.exp(float_.nll.mean()),
        "log_ratio": float(np.mean(nll) - float_.nll.mean()),
        "log_ratio_ci": interval(np.array(nll) - float_.nll),
        "kl": float(np.mean(kl)),
        "kl_ci": interval(np.array(kl)),
        "top1": float(np.mean(top)),
        "bytes": size,
        "bits": size * 8 / float_.parameters,
        "nll": parts(np.array(nll)),
        "float_nll": parts(float_.nll),
        "kls": parts(np.array(kl)),
    }


def parts(values: np.ndarray) -> list[float]:
    """Means of at most PARTS runs of neighbouring windows, for pairing with another row of the same windows."""
    return [round(float(part.mean()), 6) for part in np.array_split(values, min(PARTS, len(values)))]


def interval(values: np.ndarray) -> float:
    """Half-width of the 95% interval of a mean over windows."""
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))
