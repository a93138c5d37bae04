"""Architectures as data: how Hugging Face's configuration and weights are called in GGUF, and back. Torch-free.

A new architecture of the Llama family is a row of ARCHS. Source: llama.cpp's convert_hf_to_gguf.py (what it writes
for the same models); the names of tensors come from the `gguf` package's own map.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map

from wherry.errors import Corrupt, Unsupported
from wherry.formats.gguf.header import Header

ROPE_FREQS = "rope_freqs.weight"  # llama.cpp's form of Llama 3's scaling: a divisor for each rotary frequency
ROTARY = "rotary_emb.inv_freq"  # a buffer that old checkpoints store; every runtime computes it


@dataclass(frozen=True)
class Arch:
    """One architecture: its name in GGUF and in transformers, and what llama.cpp takes for granted of it.

    permuted: the rows of q and k are in another order. lift: what GGUF's norms hold above transformers' (which compute
    1 + w). act: key and name of the gate's activation, and
    its other names. norms: parts of a layer that each such model has beside its
    two norms. every: layers from one that sees all positions to the next, 0 = no windows. large: layers of the one size
    whose queries are scaled by hidden / heads, not by the width of a head.
    """

    gguf: MODEL_ARCH
    model_type: str
    classes: tuple[str, ...]
    permuted: bool = False
    lift: float = 0.0
    act: tuple[str, ...] = ("hidden_act", "silu", "swish")
    norms: tuple[str, ...] = ()
    every: int = 0
    large: int = 0


GELU = "gelu_pytorch_tanh"
HEADS = ("attn_q_norm", "attn_k_norm")
AFTER = ("post_attention_norm", "post_ffw_norm")  # of what a layer adds


ARCHS = {
    "llama": Arch(MODEL_ARCH.LLAMA, "llama", ("LlamaForCausalLM", "MistralForCausalLM"), permuted=True),
    "qwen2": Arch(MODEL_ARCH.QWEN2, "qwen2", ("Qwen2ForCausalLM",)),
    "qwen3": Arch(MODEL_ARCH.QWEN3, "qwen3", ("Qwen3ForCausalLM",), norms=HEADS),
    "gemma": Arch(MODEL_ARCH.GEMMA, "gemma", ("GemmaForCausalLM",), lift=1.0, act=("hidden_act", GELU, "gelu")),
    "gemma2": Arch(
        MODEL_ARCH.GEMMA2, "gemma2", ("Gemma2ForCausalLM",), lift=1.0, act=("hidden_activation", GELU), norms=AFTER,
        every=2, large=46,
    ),
    "gemma3": Arch(
        MODEL_ARCH.GEMMA3, "gemma3_text", ("Gemma3ForCausalLM",), lift=1.0, act=("hidden_activation", GELU),
        norms=AFTER + HEADS, every=6, large=62,
    ),
}  # fmt: skip
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # of a gemma2 that does not say them
# config key -> metadata key below "llama."
COUNTS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
SCALING = "wherry.rope_scaling"  # the parameters behind these divisors, which llama.cpp does not store
# Llama 3's scalings as they were released: found again by their divisors
LLAMA3 = tuple(
    {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)  # fmt: skip


def arch_of(config: dict[str, Any]) -> str:
    """The name in GGUF of a configuration's architecture. Raises Unsupported with those that are."""
    found = (config.get("architectures") or ["?"])[0]
    for name, arch in ARCHS.items():
        if found in arch.classes:
            return name
    known = ", ".join(c for arch in ARCHS.values() for c in arch.classes)
    raise Unsupported(f"{found} is not written as GGUF here; {known} are")


def tensor_names(arch: str, layers: int) -> dict[str, str]:
    """{Hugging Face name: GGUF name} of every weight and bias that such a model can have."""
    table = get_tensor_name_map(ARCHS[arch].gguf, layers)
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    names += [f"model.layers.{i}.{part}" for i in range(layers) for part in LAYER]
    pairs = {}
    for name in names:
        for end in (".weight", ".bias"):
            other = table.get_name(name + end, try_suffixes=(end,))
            if other is not None:
                pairs[name + end] = other
    return pairs


def heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of a head)."""
    query = int(config["num_attention_heads"])
    key = int(config.get("num_key_value_heads") or query)
    return query, key, int(config.get("head_dim") or config["hidden_size"] // query)


def order(arch: str, config: dict[str, Any], name: str) -> np.ndarray | None:
    """Rows of the Hugging Face tensor in GGUF's order [n], or None when the order is the same.

    transformers rotates the halves of a head, llama.cpp's `llama` neighbouring pairs: the rows (half, pair) of
    each q and k head become (pair, half). `argsort` of it is the way back.
    """
    query, key, width = heads(config)
    count = query if ".self_attn.q_proj." in name else key if ".self_attn.k_proj." in name else 0
    if not count or not ARCHS[arch].permuted:
        return None
    return np.arange(count * width).reshape(count, 2, width // 2).swapaxes(1, 2).reshape(-1)


def rope(config: dict[str, Any], layer: str = "full_attention") -> dict[str, Any]:
    """Rotary parameters as one dict, from the new (`rope_parameters`) or the old spelling of the configuration.

    layer: where layers differ (Gemma 3), of those that see all positions, or of "sliding_attention".
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = config.get("rope_theta", 10000.0)
    if config.get("model_type") == "gemma3_text":
        near = layer == "sliding_attention"
        theta = config.get("rope_local_base_freq", 1e4) if near else config.get("rope_theta", 1e6)
        old = {} if near else config.get("rope_scaling") or {}
        found = dict((config.get("rope_parameters") or {}).get(layer) or old)
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", theta)
    return found


def norm_lift(arch: str, name: str) -> float:
    """What GGUF holds above the Hugging Face tensor of that name: 1 for norms that compute 1 + w there."""
    return ARCHS[arch].lift if name.endswith("norm.weight") else 0.0


def rope_divisors(parameters: dict[str, Any], width: int) -> np.ndarray:
    """Llama 3's scaling as a divisor of each of the width / 2 rotary frequencies, float32.

    Source: "Llama 3.1", meta-llama/llama-models, apply_scaling.
    """
    factor, low, high = (float(parameters[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    first = float(parameters["original_max_position_embeddings"])
    frequency = 1 / float(parameters["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    turns = first * frequency / (2 * math.pi)  # of this frequency within the first context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def metadata_of(arch: str, config: dict[str, Any], vocabulary: int) -> dict[str, int | float | str]:
    """The metadata that describes the model. Raises Unsupported for what llama.cpp would run wrongly."""
    key, act, *others = ARCHS[arch].act
    if config.get(key, act) not in (act, *others):
        raise Unsupported(f"{key}={config[key]}: llama.cpp's {arch} always uses {act}")
    if config.get("use_bidirectional_attention"):
        raise Unsupported(f"it looks ahead (use_bidirectional_attention), which llama.cpp's {arch} does not")
    defaults = {"num_key_value_heads": config.get("num_attention_heads"), "max_position_embeddings": 2048}
    out: dict[str, int | float | str] = {}
    for key, own in COUNTS.items():
        value = config.get(key) or defaults.get(key)
        if not isinstance(value, int):
            raise Corrupt(f"config.json has no {key}, which GGUF needs")
        out[own] = value
    _, _, width = heads(config)
    out |= {"vocab_size": vocabulary, "rope.dimension_count": width}
    if config.get("head_dim"):
        out |= {"attention.key_length": width, "attention.value_length": width}
    out["attention.layer_norm_rms_epsilon"] = float(config.get("rms_norm_eps", 1e-6))
    scaling = rope(config)
    kind = scaling["rope_type"]
    known = ("default", "linear") if ARCHS[arch].lift else ("default", "linear", "yarn", "llama3")
    if kind not in known:
        raise Unsupported(f"rotary scaling '{kind}' is not written as GGUF's {arch} here; {', '.join(known)} are")
    out["rope.freq_base"] = float(scaling["rope_theta"])
    if kind in ("linear", "yarn"):
        out |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            first = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
            out["rope.scaling.original_context_length"] = int(first)
    if ARCHS[arch].every:
        out |= _gemma(arch, config)
    made = {f"{arch}.{key}": value for key, value in out.items()}
    if kind == "llama3":
        made[SCALING] = json.dumps({k: scaling[k] for k in LLAMA3[0]}, sort_keys=True)
    return made


def layer_types(every: int, layers: int) -> list[str]:
    """The last of every so many layers sees all positions, as transformers and llama.cpp have it."""
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def query_scalar(arch: str, config: dict[str, Any]) -> float:
    """Whose root divides the queries: llama.cpp knows it by the number of layers, and GGUF has no key for it."""
    query, _, width = heads(config)
    return config["hidden_size"] // query if config["num_hidden_layers"] == ARCHS[arch].large else width


def _gemma(arch: str, config: dict[str, Any]) -> dict[str, int | float]:
    """Windows and caps of Gemma 2 and 3. Raises Unsupported for what llama.cpp takes for granted and is otherwise."""
    every, layers, window = ARCHS[arch].every, config["num_hidden_layers"], config.get("sliding_window", 4096)
    usual = layer_types(every, layers)
    found = config.get("layer_types") or layer_types(int(config.get("sliding_window_pattern", every)), layers)
    scalar = query_scalar(arch, config)
    wrong = {
        f"its windows are not those of all layers but one in {every}": found != usual,
        f"its query_pre_attn_scalar is not {scalar}": config.get("query_pre_attn_scalar", 256) != scalar,
        "it has no sliding window": not window,
    }
    if arch == "gemma2":
        caps = {key: float(config.get(key, usual) or 0) for key, usual in CAPS.items()}
        wrong["it does not cap its scores and logits"] = not all(caps.values())
    else:
        near = rope(config, "sliding_attention")
        caps = {"rope.freq_base_swa": float(near["rope_theta"])}
        wrong["it caps its logits"] = bool(config.get("final_logit_softcapping"))
        wrong["the rotation of its windowed layers is scaled"] = near["rope_type"] != "default"
    for reason, true in wrong.items():
        if true:
            raise Unsupported(f"{reason}, which GGUF's {arch} cannot say: it would run wrongly.\nLeave gguf out")
    return {"attention.sliding_window": int(window), **caps}


def shape_of(header: Header) -> dict[str, Any]:
    """The numbers of a configuration that a runtime divides by or counts with, from a file's metadata.

    Raises:
        Unsupported: another architecture.
        Corrupt: a key is missing or no number that could be one.
    """
    if header.arch not in ARCHS:
        raise Unsupported(f"{header.path} is of the architecture '{header.arch}'; {', '.join(ARCHS)} are read here")
    config: dict[str, Any] = {}
    for key, own in COUNTS.items():
        stated = own != "attention.head_count_kv" or f"{header.arch}.{own}" in header.metadata
        config[key] = _number(header, own if stated else "attention.head_count")
    stated = f"{header.arch}.attention.key_length" in header.metadata
    width = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = _number(header, "attention.key_length") if stated else width
    if (
        config["head_dim"] < 2
        or config["head_dim"] % 2
        or config["num_attention_heads"] % config["num_key_value_heads"]
    ):
        raise Corrupt(f"{header.path} is damaged: its heads are {heads(config)} (query, key, width)")
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.metadata.get(f"{header.arch}.{key}", config["head_dim"]) != config["head_dim"]:
            raise Corrupt(
                f"{header.path} is damaged: {header.arch}.{key} is not {config['head_dim']}, its width of a head"
            )
    config["rms_norm_eps"] = shortest(_number(header, "attention.layer_norm_rms_epsilon", float))
    stated = f"{header.arch}.rope.freq_base" in header.metadata
    config["rope_theta"] = shortest(_number(header, "rope.freq_base", float)) if stated else 10000.0
    layers, have = config["num_hidden_layers"], len(header.tensors)
    if layers > have:
        raise Corrupt(f"{header.path} is damaged: it claims {layers:,} layers in {have} tensors")
    if "token_embd.weight" not in header.tensors:
        raise Corrupt(f"{header.path} is damaged: it has no token_embd.weight")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    return config


def config_of(header: Header) -> dict[str, Any]:
    """The Hugging Face configuration that a file describes.

    Raises:
        Unsupported: another architecture, or rotary scaling that is not read.
        Corrupt: a key is missing or contradicts the tensors.
    """
    config, data, tensors = shape_of(header), header.metadata, header.tensors
    arch = ARCHS[header.arch]
    config |= {"architectures": [arch.classes[0]], "model_type": arch.model_type, arch.act[0]: arch.act[1]}
    config |= _windows(header, config) if arch.every else {}
    config["rope_scaling"] = _scaling(header, config["rope_theta"], config["head_dim"])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for name, own in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = data.get(f"tokenizer.ggml.{own}_token_id")
    config["dtype"] = "float32"
    return config


def _windows(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """What only Gemma 2 and 3 have, from a file that may leave out what llama.cpp takes for granted."""
    arch, data, layers = header.arch, header.metadata, config["num_hidden_layers"]

    def stated(key: str, usual: Any, kind: type = float) -> Any:
        found = _number(header, key, kind) if f"{arch}.{key}" in data else usual
        return shortest(found) if kind is float and found else found

    found: dict[str, Any] = {"query_pre_attn_scalar": query_scalar(arch, config)}
    every = data.get(f"{arch}.attention.sliding_window_pattern", ARCHS[arch].every)
    if isinstance(every, list):
        found["layer_types"] = [("full_attention", "sliding_attention")[bool(near)] for near in every]
    elif isinstance(every, int) and every > 0:
        found["layer_types"] = layer_types(every, layers)
    if len(found.get("layer_types", ())) != layers:
        raise Corrupt(f"{header.path} is damaged: {arch}.attention.sliding_window_pattern is {every!r}")
    if arch == "gemma2":
        found |= {key: stated(key, usual) for key, usual in CAPS.items()}
        return found | {"sliding_window": stated("attention.sliding_window", 4096, int)}
    window = stated("attention.sliding_window", 0, int)
    if not window:
        raise Unsupported(f"{header.path} is a gemma3 without a sliding window; it is not read here, llama.cpp runs it")
    near = stated("rope.freq_base_swa", 10000.0)
    return found | {"sliding_window": window, "rope_local_base_freq": near, "final_logit_softcapping": None}


def _number(header: Header, key: str, kind: type = int) -> Any:
    value: Any = header.metadata.get(f"{header.arch}.{key}")
    if type(value) is kind and 0 < value < math.inf:  # type: ignore[operator]
        return value
    raise Corrupt(f"{header.path} is damaged: {header.arch}.{key} is {value!r}")


def _scaling(header: Header, theta: float, width: int) -> dict[str, Any] | None:
    data, arch = header.metadata, header.arch
    if ROPE_FREQS in header.tensors:
        return _llama3(header, theta, width)
    kind = data.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{header.path}: rotary scaling '{kind}' is not read here; linear, yarn and llama3 are")
    found = {"rope_type": kind, "factor": shortest(data.get(f"{arch}.rope.scaling.factor", 1.0))}
    first = data.get(f"{arch}.rope.scaling.original_context_length")
    return {**found, "original_max_position_embeddings": first} if first else found


def _llama3(header: Header, theta: float, width: int) -> dict[str, Any]:
    entry = header.tensors[ROPE_FREQS]
    stored = header.raw(ROPE_FREQS).view(np.float32) if entry.kind == "F32" else np.empty(0)
    try:
        for found in [json.loads(header.metadata[SCALING])] if SCALING in header.metadata else LLAMA3:
            divisors = rope_divisors({**found, "rope_theta": theta}, width)
            if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-5):
                return {**found}
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise Corrupt(f"{header.path} is damaged: its {SCALING} is {header.metadata[SCALING]!r}") from error
    raise Unsupported(f"{header.path}: its {ROPE_FREQS} is none of Llama 3's released scalings")


def expected(arch: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{GGUF name: shape} of the weights that every such model has; biases are extra."""
    query, key, width = heads(config)
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (rows, hidden), "output_norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{i}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (width if name in HEADS else hidden,) for name in ARCHS[arch].norms}
        shapes |= {f"blk.{i}.attn_q": (query * width, hidden), f"blk.{i}.attn_output": (hidden, query * width)}
        shapes |= {f"blk.{i}.{name}": (key * width, hidden) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (inner, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (hidden, inner)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def check_shapes(header: Header, config: dict[str, Any]) -> None:
    """Raises Corrupt when a weight is missing or its shape contradicts the metadata, before a runtime trips over it."""
    for name, shape in expected(header.arch, config).items():
        if name not in header.tensors:
            raise Corrupt(f"{header.path} is damaged: it has no {name}, which its metadata asks for")
        if header.tensors[name].shape != shape:
            found = list(header.tensors[name].shape)
            raise Corrupt(f"{header.path} is damaged: {name} is {found}, its metadata asks for {list(shape)}")


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that means it: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))
