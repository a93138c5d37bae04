"""Architecture: which entries of a Hugging Face configuration tell widths and depths; whether they can tell new ones.

No shapes are derived here: a configuration is changed, transformers builds the module by it without memory, and its
shapes are compared with the weights that were cut. What does not fit is refused with what differs.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported


@dataclass(frozen=True)
class Names:
    """Entries of the configuration. Where encoder and decoder have their own, the stack's name picks one."""

    heads: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")
    width: str = "head_dim"
    neurons: tuple[str, ...] = ("intermediate_size",)
    hidden: tuple[str, ...] = ("hidden_size",)
    layers: tuple[str, ...] = ("num_hidden_layers",)
    experts: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts")


DEFAULT = Names()
SEQUENCE = Names(
    ("encoder_attention_heads", "decoder_attention_heads"), "", ("encoder_ffn_dim", "decoder_ffn_dim"), ("d_model",),
    ("encoder_layers", "decoder_layers"),
)  # fmt: skip
KNOWN = {
    "gpt2": Names(("n_head",), "", ("n_inner",), ("n_embd",), ("n_layer",)),
    "opt": Names(("num_attention_heads",), "", ("ffn_dim",), ("hidden_size", "word_embed_proj_dim")),
    "t5": Names(("num_heads",), "d_kv", ("d_ff",), ("d_model",), ("num_layers", "num_decoder_layers")),
    "mt5": Names(("num_heads",), "d_kv", ("d_ff",), ("d_model",), ("num_layers", "num_decoder_layers")),
    "whisper": SEQUENCE, "bart": SEQUENCE, "marian": SEQUENCE, "mbart": SEQUENCE,
    "distilbert": Names(("n_heads",), "", ("hidden_dim",), ("dim",), ("n_layers",)),
    "vit": Names(width=""),  # transformers reads a head_dim that its configuration does not have; others do not
    "qwen3_moe": Names(neurons=("moe_intermediate_size", "intermediate_size")),
    "qwen2_moe": Names(neurons=("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size")),
}  # fmt: skip
PER_LAYER = ("layer_types", "mlp_only_layers", "no_rope_layers", "attention_layers")  # lists, an entry for each block


def names(config: Mapping[str, Any]) -> Names:
    """The entries of this model's configuration."""
    return KNOWN.get(str(config.get("model_type")), DEFAULT)


def pick(entries: tuple[str, ...], config: Mapping[str, Any], place: str) -> str:
    """The entry for a weight: that of its stack where encoder and decoder have their own; the first that is there."""
    stack = "decoder" if "decoder." in place else "encoder" if "encoder." in place else ""
    mine = [e for e in entries if stack and e.startswith(stack)]
    there = [e for e in mine or entries if e in config]
    return (there or mine or list(entries))[0]


def build(checkpoint: Checkpoint, config: Mapping[str, Any]) -> nn.Module:
    """The architecture's own class by a configuration, parameters on the meta device, eager attention, eval mode.

    Raises Unsupported with what transformers says when it cannot.
    """
    import accelerate
    import transformers

    kind = str((config.get("architectures") or ["?"])[0])
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype", "model_type")}
    cls = getattr(transformers, kind, None)
    if cls is None or not hasattr(cls, "_from_config"):
        raise Unsupported(f"{checkpoint.path}: transformers has no class {kind}")
    try:
        made = transformers.AutoConfig.for_model(str(config.get("model_type")), **deepcopy(plain))
        with accelerate.init_empty_weights(include_buffers=False):
            return cls._from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    except Exception as error:  # each model's class fails in its own way
        reason = " ".join(str(error).split())[:160]
        raise Unsupported(f"the configuration of {config.get('model_type')} cannot say that: {reason}") from error


def expressed(
    checkpoint: Checkpoint, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise Unsupported where a module by this configuration has other shapes than the weights."""
    built = {name: tuple(p.shape) for name, p in build(checkpoint, config).named_parameters()}
    for name, shape in built.items():
        if "pooler" not in name and name in shapes and shapes[name] != shape:
            kind = config.get("model_type")
            why = f"{name} would be {list(shapes[name])}, the configuration makes it {list(shape)}"
            if what in ("heads", "hidden"):
                why += ", for it has no width of a head (head_dim): hidden size is heads times that"
            raise Unsupported(
                f"{what}: the configuration of {kind} cannot express the result: {why}.\n"
                "Prune neurons or layers, or capture the model as a graph (wherry capture): its layers have any width."
            )


def blocks(config: Mapping[str, Any], names_: list[str]) -> dict[str, str]:
    """{entry for the number of layers: path of the stack}, from the weights' names."""
    found: dict[str, set[int]] = {}
    for name in names_:
        if match := re.match(r"(.*?(?:layers?|h|block|blocks))\.(\d+)\.", name):
            found.setdefault(match[1], set()).add(int(match[2]))
    out: dict[str, str] = {}
    for entry in names(config).layers:
        side = "decoder" if "decoder" in entry else "encoder" if "encoder" in entry else ""
        paths = [p for p in found if len(found[p]) == config.get(entry)]
        if side or len(paths) > 1:
            paths = [p for p in paths if (side or "encoder") in p.split(".")]
        if paths:
            out[entry] = min(paths, key=len)
    if not out:
        raise Unsupported(f"{config.get('model_type')}: no list of layers was found that the configuration counts")
    return out


def fewer(config: dict[str, Any], entry: str, kept: list[int]) -> dict[str, Any]:
    """The configuration with these layers of a stack alone. Raises BadInput when none is left."""
    if not kept:
        raise BadInput("depth would remove every layer: keep one at least")
    before = int(config[entry])
    new = config | {entry: len(kept)}
    for key in PER_LAYER:
        if isinstance(config.get(key), list) and len(config[key]) == before:
            new[key] = [config[key][i] for i in kept]
    if isinstance(config.get("max_window_layers"), int):
        new["max_window_layers"] = sum(i < config["max_window_layers"] for i in kept)
    return new
