"""Rotation: turn the residual stream and the heads' values by Hadamard matrices, folded into weights before rounding.

Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), sections 3 and 4; R1 and R2 in the letters of SpinQuant
    (Liu et al. 2024, arXiv:2405.16406).
Idea:   RMS norm commutes with an orthogonal Q once its weight g is folded into the layers after it. With E' = E Q,
        W' = W diag(g) Q for layers that read the stream, W' = Q^T W for those that write it, the model computes the
        same, and no column of a weight sticks out. R2 does so for each head
        between v and o. Nothing is left to do at run time.
Shapes: Q [hidden, hidden]; E [vocabulary, hidden]; H [head, head].
Cost:   one product per weight when it is read; hidden^2 * 4 bytes. A tied head is untied: it takes g of the last norm.
Fails:  Unsupported for an architecture whose weights are not known to be of that form.
Differs: signs are seeded, not learned; a width that is no power of two takes blocks of its largest one times a seeded
        orthogonal matrix of what is left.
"""

import hashlib
from dataclasses import dataclass
from dataclasses import replace as copy
from typing import Any

import torch

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
READS = {"q_proj": "input", "k_proj": "input", "v_proj": "input", "gate_proj": "post", "up_proj": "post"}
WRITES = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Rotation(Pass):
    """r1: turn the residual stream. r2: turn each head's values. seed: of the signs. A solver must come after it."""

    r1: bool = True
    r2: bool = True
    seed: int = 0

    def rewrite(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same model with other weights; each is turned when it is read."""
        kind = (checkpoint.config.get("architectures") or ["?"])[0]
        if kind not in KNOWN or checkpoint.graph is not None:
            raise Unsupported(
                f"rotation does not know the weights of {kind}; it knows {', '.join(KNOWN)}: leave it out"
            )
        if not (self.r1 or self.r2):
            raise BadInput("rotation: r1=false and r2=false leave nothing to do")
        config = dict(checkpoint.config)
        if self.r1:
            config["tie_word_embeddings"] = False
        return copy(checkpoint, config=config, source=Turned(checkpoint, self))


def orthogonal(n: int, seed: int) -> torch.Tensor:
    """A seeded orthogonal matrix [n, n], float64: Hadamard with random signs, as far as n has factors of two."""
    g = torch.Generator().manual_seed(seed)
    power = n & -n
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < power:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    rest = torch.linalg.qr(torch.randn(n // power, n // power, generator=g, dtype=torch.float64))[0]
    signs = torch.randint(0, 2, (n, 1), generator=g).double() * 2 - 1
    return signs * torch.kron(rest.contiguous(), H / power**0.5)


class Turned:
    """A source whose weights are turned on the way in. `turned` says by which method, name by name."""

    def __init__(self, checkpoint: Checkpoint, step: Rotation) -> None:
        self.base, self.step, self.tied = checkpoint.source, step, checkpoint.tied
        config = checkpoint.config
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self.Q = orthogonal(hidden, step.seed)
        self.H = orthogonal(int(config.get("head_dim") or hidden // heads), step.seed + 1)
        self.table = next(name for name in self.base.names() if name.endswith("embed_tokens.weight"))
        self.prefix = self.table.removesuffix("embed_tokens.weight")
        touched = [n for n in self.base.names() if self._part(n) in (*READS, *WRITES, "") or "norm" in n]
        self.turned = dict.fromkeys([*touched, "lm_head.weight"], "rotation")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def _part(self, name: str) -> str:
        part = name.split(".")[-2]
        return "" if part in ("embed_tokens", "lm_head", "norm") else part

    def names(self) -> list[str]:
        """The base's, and a head of its own where it was tied."""
        extra = ["lm_head.weight"] if self.step.r1 and self.tied else []
        return [*self.base.names(), *extra]

    def _stored(self, name: str) -> str:
        return self.table if name == "lm_head.weight" and self.tied else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self.base.dtype(self._stored(name))

    def scheme(self, name: str) -> None:
        """None: codes cannot be turned, their weights are."""
        return None

    def fingerprint(self) -> str:
        """Of the base and of the knobs."""
        return hashlib.sha256(f"{self.base.fingerprint()} {self.step}".encode()).hexdigest()

    def _float(self, name: str) -> torch.Tensor:
        tensor = self.base.read(name)
        return (tensor if isinstance(tensor, torch.Tensor) else tensor.decode()).double()

    def _norm(self, name: str, part: str) -> torch.Tensor:
        where = {"input": "input_layernorm", "post": "post_attention_layernorm"}[READS[part]]
        return self._float(f"{'.'.join(name.split('.')[:-3])}.{where}.weight")

    def read(self, name: str) -> torch.Tensor:
        """One weight in its stored dtype; the biases of v and of writers are turned too."""
        part, leaf = name.split(".")[-2], name.split(".")[-1]
        r1, w = self.step.r1, self._float(self._stored(name))
        if part in ("input_layernorm", "post_attention_layernorm") or name == f"{self.prefix}norm.weight":
            return (torch.ones_like(w) if r1 else w).to(self.dtype(name))
        if r1 and part == "embed_tokens":
            w = w @ self.Q
        elif r1 and part == "lm_head":
            w = (w * self._float(f"{self.prefix}norm.weight")) @ self.Q
        elif r1 and part in READS and leaf == "weight":
            w = (w * self._norm(name, part)) @ self.Q
        if self.step.r2 and part == "v_proj":
            heads = w.unflatten(0, (-1, len(self.H)))
            w = (self.H.T @ heads).flatten(0, 1) if leaf == "weight" else (heads @ self.H).flatten()
        elif self.step.r2 and part == "o_proj" and leaf == "weight":
            w = (w.unflatten(-1, (-1, len(self.H))) @ self.H).flatten(-2)
        if r1 and part in WRITES:
            w = self.Q.T @ w if leaf == "weight" else w @ self.Q
        return w.to(self.dtype(name))
