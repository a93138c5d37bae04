"""A model's sizes, rotation and windows from its configuration: what the engine is told first. No torch."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import wherry_native

from wherry.errors import Corrupt, Unsupported
from wherry.formats.gguf.names import ARCHS, CAPS, GELU, Arch, heads, layer_types, rope, rope_divisors

KINDS = {"llama": ARCHS["llama"], "mistral": ARCHS["llama"]} | {arch.model_type: arch for arch in ARCHS.values()}
# what transformers takes for granted where a configuration is silent
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, **CAPS},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}


@dataclass(frozen=True)
class Shape:
    """Sizes as the engine counts them, and what differs from Llama.

    frequencies: [rotations, width / 2] float32; factors: [rotations] of cosine and sine; rotation: the number of its
    own for each layer; windows: [layers], 0 = all positions. Caps: 0 = none.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    context: int
    eps: float
    neighbours: bool
    frequencies: np.ndarray
    factors: tuple[float, ...]
    rotation: tuple[int, ...]
    windows: tuple[int, ...]
    arch: Arch
    embed_scale: float = 1.0
    query_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0

    def token_bytes(self, bits: int) -> int:
        """Of keys and values of one token, in bf16 or in 8 bits with float scales."""
        return self.layers * self.kv_heads * 2 * (-(-self.width // 16) * 16 * bits // 8 + (4 if bits == 8 else 0))

    def config(self, context: int) -> Any:
        """The engine's structure."""
        return wherry_native.Config(
            self.layers, self.hidden, self.inner, self.heads, self.kv_heads, self.width, self.vocab, context,
            self.neighbours, len(self.factors), self.arch.act[1] == GELU, self.eps, self.embed_scale, self.query_scale,
            self.attention_cap, self.logit_cap,
        )  # fmt: skip

    def matrices(self) -> dict[str, tuple[int, int]]:
        """{part of a layer: rows, inputs}."""
        query, key = self.heads * self.width, self.kv_heads * self.width
        return {
            "q": (query, self.hidden), "k": (key, self.hidden), "v": (key, self.hidden), "o": (self.hidden, query),
            "gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner),
        }  # fmt: skip


def shape_of(config: dict[str, Any], neighbours: bool, what: str) -> Shape:
    """From a Hugging Face configuration.

    Raises:
        Unsupported: another architecture, activation or rotation.
        Corrupt: a number is missing or cannot be one.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise Unsupported(f"{what} is a '{kind}'; the native runtime runs {', '.join(KINDS)}; torch runs others")
    arch = KINDS[kind]
    name, act, *others = arch.act
    if config.get(name, act) not in (act, *others):
        raise Unsupported(f"{what}: the native runtime has no activation '{config[name]}' for a '{kind}'; {act} alone")
    if config.get("use_bidirectional_attention"):
        raise Unsupported(f"{what} looks ahead (use_bidirectional_attention); the native runtime does not, torch does")
    config = DEFAULTS.get(kind, {}) | config
    if arch.every and not config["sliding_window"]:
        raise Unsupported(f"{what} is a '{kind}' without a sliding window, which is not run here; torch runs it")
    query, key, width = heads(config)
    counts = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    numbers: list[Any] = [config.get(name) for name in counts]
    if not all(isinstance(n, int) and n > 0 for n in [*numbers, query, key, width]) or query % key or width % 2:
        raise Corrupt(f"{what} has sizes that no model has: {numbers}, heads {query}, {key}, {width}")
    if width > 1024:
        raise Unsupported(f"{what}: heads of {width} are wider than the native runtime's 1024")
    layers, hidden, inner, vocab = numbers
    tables = [rotation(rope(config), config, width, what)]
    if kind == "gemma3_text":
        tables.append(rotation(rope(config, "sliding_attention"), config, width, what))
    context = int(config.get("max_position_embeddings") or 2048)
    eps = float(config.get("rms_norm_eps", 1e-6))
    seen = windows(config, layers)
    scalar, near, last = _positive(config, what)
    return Shape(
        layers, hidden, inner, query, key, width, vocab, context, eps, neighbours,
        np.stack([table for table, _ in tables]), tuple(factor for _, factor in tables),
        tuple(int(len(tables) > 1 and window > 0) for window in seen), seen, arch,
        hidden**0.5 if arch.lift else 1.0, (scalar or width) ** -0.5, near, last,
    )  # fmt: skip


def _positive(config: dict[str, Any], what: str) -> list[float]:
    """What Gemma's queries are divided by the root of, the caps of its scores and of its logits; 0 = there is none."""
    names = ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
    used = {"gemma2": names, "gemma3_text": [names[0], names[2]]}.get(config["model_type"], [])
    found = [config.get(name) if name in used else None for name in names]
    if any(n is not None and not (isinstance(n, int | float) and 0 < n < math.inf) for n in found):
        raise Corrupt(f"{what} has a scalar of queries or caps that no model has: {found}")
    return [float(n or 0) for n in found]


def windows(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Positions that a token of each layer sees, itself included; 0 = all."""
    window, kind = config.get("sliding_window") or 0, config["model_type"]
    if kind in ("llama", "gemma") or (kind in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        window = 0
    kinds = config.get("layer_types")
    if kinds is None and KINDS[kind].every:
        kinds = layer_types(int(config.get("sliding_window_pattern") or KINDS[kind].every), layers)
    if kinds is None:
        first = config.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kinds[i] == "sliding_attention" else 0 for i in range(layers))


def rotation(told: dict[str, Any], config: dict[str, Any], width: int, what: str) -> tuple[np.ndarray, float]:
    """(frequencies [width / 2], the factor of cosine and sine). told: the rotary parameters.

    Source: transformers, modeling_rope_utils; YaRN: arXiv:2309.00071.
    """
    kind, theta = told["rope_type"], float(told["rope_theta"])
    if float(told.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1:
        raise Unsupported(f"{what} turns only a part of its heads, which the native runtime does not")
    plain = 1 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if kind == "default":
        return plain.astype(np.float32), 1.0
    if kind == "linear":
        return (plain / float(told["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return (plain / rope_divisors(told, width)).astype(np.float32), 1.0
    if kind != "yarn":
        raise Unsupported(f"{what}: rotary scaling '{kind}' is not run here; default, linear, llama3 and yarn are")
    factor = float(told["factor"])
    first = float(told.get("original_max_position_embeddings") or config["max_position_embeddings"])

    def place(turns: float) -> float:
        return width * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(told.get("beta_fast") or 32), place(told.get("beta_slow") or 1)
    if told.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    made = plain / factor * ramp + plain * (1 - ramp)

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    over = told.get("attention_factor")
    if over is None:
        both = told.get("mscale"), told.get("mscale_all_dim")
        over = scaled(both[0]) / scaled(both[1]) if all(both) else scaled(1)  # type: ignore[arg-type]
    return made.astype(np.float32), float(over)
