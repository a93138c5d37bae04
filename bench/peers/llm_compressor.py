"""Driver of llm-compressor: runs inside that peer's own environment and imports nothing of wherry.

    PEER/bin/python bench/peers/llm_compressor.py --model FOLDER --tokens calibration.npy --out OUT \\
        --method gptq --scheme W3A16_ASYM --group-size 64 [--actorder static --damp 0.01 --observer memoryless_minmax]
    PEER/bin/python bench/peers/llm_compressor.py ... --method sparsegpt --sparsity 0.5 [--pattern 2:4]

Reads a Hugging Face folder and an array of token ids [windows, length]; writes a compressed-tensors folder. Only the
decoder's linears are quantized or pruned. Everything is calibrated and solved in float32; what is written is fp16
(scales, embedding, norms), so that files can be compared byte for byte with others. Ends with one JSON line of what it
took. With --serve it reads such arguments line by line from stdin, so that one import of the peer serves many runs.

The environment (torch first, then the peer with a constraints file that holds the line torch==2.13.0):
    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    PEER/bin/pip install llmcompressor==0.14.0.1 -c constraints.txt
"""

import argparse
import resource

import driver
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from transformers import AutoTokenizer  # noqa: TID253


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = driver.options(__doc__, ("rtn", "gptq", "awq", "wanda", "sparsegpt"))
    made.add_argument("--sparsity", type=float, default=0.5, help="of wanda and sparsegpt")
    made.add_argument("--pattern", default="", help="2:4, in their place")
    made.add_argument("--actorder", default="static", help="static, or none")
    made.add_argument("--damp", type=float, default=0.01)
    made.add_argument("--observer", default="memoryless_minmax", help="or memoryless_mse, imatrix_mse")
    made.add_argument("--targets", default="", help="sequential targets, comma separated; default: the decoder layer")
    return made


def compress(a: argparse.Namespace) -> dict[str, object]:
    """Quantize and save; returns wall and CPU seconds (loading and saving left out), peak memory, versions."""
    if a.method in ("wanda", "sparsegpt"):
        return prune(a)
    weights = QuantizationArgs(
        num_bits=int(a.scheme[1]), type="int", symmetric=not a.scheme.endswith("_ASYM"), strategy="group",
        group_size=a.group_size, observer=a.observer,
    )  # fmt: skip
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = driver.load(a.model)
    clock = driver.Clock()
    if a.method == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    else:
        ids, rows = dataset(a)
        order = None if a.actorder == "none" else a.actorder
        recipe: object = GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=a.damp, actorder=order)
        if a.method == "awq":
            recipe = [awq(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
        oneshot(
            model=model, dataset=rows, num_calibration_samples=len(ids), max_seq_length=max(map(len, ids)),
            shuffle_calibration_samples=False, sequential_targets=a.targets.split(",") if a.targets else None,
            recipe=recipe,
        )  # fmt: skip
    return finish(model, a, clock)


def dataset(a: argparse.Namespace) -> tuple[list[list[int]], Dataset]:
    """The windows, as ids and as the peer wants them."""
    ids = driver.rows(a.tokens)
    return ids, Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def awq() -> AWQModifier:
    """Its AWQ with its widest search.

    Version 0.14.0.1 ends where there is no accelerator, since it pins what it keeps for a faster copy to one:
    RuntimeError: Cannot access accelerator device when none is available. There nothing is pinned.
    """
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    return AWQModifier(duo_scaling="both")


def prune(a: argparse.Namespace) -> dict[str, object]:
    """The same for a model with zeros in it; written as plain floats."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind, knobs = WandaPruningModifier, {}
    if a.method == "sparsegpt":
        kind, knobs = SparseGPTModifier, {"dampening_frac": a.damp}
    left = ["re:.*lm_head"]  # a plain "lm_head" is not recognised by these modifiers: a tied embedding would be pruned
    step = kind(sparsity=a.sparsity, mask_structure=a.pattern or "0:0", targets=["Linear"], ignore=left, **knobs)
    model = driver.load(a.model)
    clock = driver.Clock()
    ids, rows = dataset(a)
    oneshot(model=model, dataset=rows, num_calibration_samples=len(ids), max_seq_length=max(map(len, ids)),
            shuffle_calibration_samples=False, recipe=step)  # fmt: skip
    return finish(model, a, clock)


def finish(model: torch.nn.Module, a: argparse.Namespace, clock: driver.Clock) -> dict[str, object]:
    """Save; the JSON line of what it took since `clock` was made."""
    took = clock.read()
    model.save_pretrained(a.out, save_compressed=True)
    AutoTokenizer.from_pretrained(a.model).save_pretrained(a.out)
    driver.halve(a.out)
    took["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return took | driver.versions("llmcompressor", "torch", "transformers", "compressed-tensors")


if __name__ == "__main__":
    logger.remove()
    driver.main(compress, parser())
