"""What the tests of the runtimes for decoders share: the same tokens, the same tiny models, the same ruler."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tests.conftest import write_tokenizer
from tests.formats.test_gguf import save
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.session import Sampling

TOKENS = np.random.default_rng(0).integers(3, 512, 150).tolist()
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "llama-head-32": ("Llama", {"head_dim": 32}),
    "llama-head-48": ("Llama", {"head_dim": 48}),
    "llama-head-128": ("Llama", {"head_dim": 128}),
    "llama-head-256": ("Llama", {"head_dim": 256, "num_key_value_heads": 4}),
    "llama-one-key": ("Llama", {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 16}),
    "llama-biases-attention": ("Llama", {"attention_bias": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd": (
        "Llama", {"hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "llama-odder": ("Llama", {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18, "vocab_size": 517}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "yarn-rope": ("Llama", {"rope_parameters": YARN}),
}  # fmt: skip
# windows and caps that these texts reach, and weights that make the softmax sharp
GEMMA2 = {
    "initializer_range": 0.05, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 33,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "num_hidden_layers": 3,
}  # fmt: skip
GEMMA3 = {
    "initializer_range": 0.05, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 33,
    "num_hidden_layers": 7,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
GEMMA: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 32, "initializer_range": 0.05}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2-odd": ("Gemma2", GEMMA2 | {
        "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": None, "num_key_value_heads": 1, "hidden_size": 72, "head_dim": 18,
        "num_hidden_layers": 2,
    }),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3-odd": ("Gemma3", GEMMA3 | {
        "num_hidden_layers": 3, "sliding_window_pattern": 2, "query_pre_attn_scalar": 50,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        },
    }),
}  # fmt: skip


def write_family(folder: Path, kind: str) -> Path:
    """A tiny model of another architecture of the family."""
    name, extra = (FAMILY | GEMMA)[kind]
    common = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(1)
    made = getattr(t, f"{name}ForCausalLM")
    model = made(made.config_class(**common | extra))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif "bias" in name or "_norm" in name or "norm" in name and kind in GEMMA:
                parameter.add_(torch.randn_like(parameter) / 2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def reference(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [T-1, vocabulary] of transformers, float64."""
    with torch.no_grad():
        logits = checkpoint.module()(torch.tensor([tokens])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The same of a runtime's logits."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) in nats per token."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny Llama with grouped-query attention, in float32."""
    return save(Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("gguf") / "out")


def together(session: Any, prompts: list[list[int]], how: list[Sampling]) -> list[list[int]]:
    """Answers to all prompts, asked at once, each by a thread of its own."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda p, h: list(session.generate(p, h)), prompts, how))
