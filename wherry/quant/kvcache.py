"""KVCache: keys and values of attention kept as integers while a model writes, in groups along each head.

Source: Hooper et al. 2024 (KVQuant, arXiv:2401.18079) and Liu et al. 2024 (KIVI, arXiv:2402.02750) for why; the grid is
    what runtimes have: llama.cpp's q8_0 and q4_0, one scale for 32 numbers, after the rotary positions.
Idea:   x = s q, s = 2 max|x| / (2^bits - 1) over each group, found when a token is written; every later token reads
        s q. It changes no weight: it is recorded, and runtimes that read it keep their cache so.
Shapes: x [heads, tokens, d]; s [heads, tokens, d / group]; group 32, or the whole head where 32 does not divide it.
Cost:   none here. Memory of a context: 8.5 or 4.5 bits a number in place of 16 or 32.
Fails:  Unsupported for a model that writes no text.
Differs: per token in groups, no channel statistics and no outliers kept apart: no runtime here holds those.
"""

from dataclasses import dataclass
from dataclasses import replace as copy

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.gait import Pass

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class KVCache(Pass):
    """bits: 8 or 4. A solver must stand beside it: a recipe changes weights."""

    bits: int = 8
    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise BadInput(f"kvcache: bits={self.bits} is no cache that a runtime has; use 8 or 4")

    def rewrite(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same model with the scheme in its configuration, in compressed-tensors' words (kv_cache_scheme)."""
        if checkpoint.graph is not None or checkpoint.task.kind != "text-generation":
            raise Unsupported(f"kvcache is for models that write text; {checkpoint.name} keeps no cache: leave it out")
        heads = int(checkpoint.config["num_attention_heads"])
        head = int(checkpoint.config.get("head_dim") or int(checkpoint.config["hidden_size"]) // heads)
        words = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group", "dynamic": True,
            "group_size": GROUP if head % GROUP == 0 else head,
        }  # fmt: skip
        old = checkpoint.config.get("quantization_config") or {}
        return copy(checkpoint, config={**checkpoint.config, "quantization_config": old | {"kv_cache_scheme": words}})

    @property
    def dense(self) -> bool:
        """No weight changes."""
        return False
