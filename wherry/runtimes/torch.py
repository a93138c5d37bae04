"""PyTorch: the reference. Loads a Hugging Face folder (compressed or not) in float32; grade A, full logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry import cargo
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.ops.activation import cached, round_inputs
from wherry.scheme import QTensor
from wherry.session import Sampling, Score, Session, draw

FORMATS = ("compressed_tensors", "safetensors", "gptq", "awq")


def available() -> dict[str, str]:
    """Versions and the instruction set that torch uses."""
    import transformers

    isa = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "isa": isa}


def accepts(artifact: Artifact) -> bool:
    """Hugging Face folders of any task."""
    return artifact.format in FORMATS


def load(artifact: Artifact, device: str = "cpu", threads: int = 0, cache: str = "recorded") -> Session:
    """Load an artifact into memory, decoded to float32. cache: "float" keeps keys and values as they are."""
    return over(Checkpoint.open(artifact.path), device, threads, cache)


def over(checkpoint: Checkpoint, device: str = "cpu", threads: int = 0, cache: str = "recorded") -> Torch:
    """A session over any checkpoint, also one that was never exported: the original, to compare with."""
    return Torch(checkpoint, device, threads, cache)


class Torch:
    """One module in memory. Thread-safe."""

    grade = "A"

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", threads: int = 0, cache: str = "recorded") -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise BadInput(f"--device {device}: torch sees no such device here; use cpu")
        if threads:
            torch.set_num_threads(threads)
        self.module = checkpoint.module()
        quantize_inputs(self.module, checkpoint)
        self.module.to(device)
        self.device, self.task, self.lock = device, checkpoint.task, threading.Lock()
        self.limit = checkpoint.task.max_length
        self.facts = {"runtime": "torch", **available(), "threads": str(torch.get_num_threads()), "device": device}
        self.facts["format"] = "compressed_tensors" if checkpoint.plan else "safetensors"
        self.words: dict[str, Any] = {}
        kept = cargo.cache(checkpoint.config)
        if cache == "recorded" and kept in ("int8", "int4"):
            self.words = checkpoint.config["quantization_config"]["kv_cache_scheme"]
            self.facts["kv cache"] = f"{kept}, as numbers: computed in float32"

    @torch.no_grad()
    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Hidden states [batch, sequence, width] as `last_hidden_state`."""
        with self.lock:
            out = self.module(**{k: torch.from_numpy(v).to(self.device) for k, v in inputs.items()})
        return {"last_hidden_state": out.last_hidden_state.cpu().numpy()}

    @torch.no_grad()
    def score(self, tokens: Sequence[int], top_k: int = 32) -> Score:
        """Full logits of one window in one pass."""
        ids = torch.tensor([list(tokens)], device=self.device)
        with self.lock:
            logits = self.module(input_ids=ids, **self._fresh()).logits[0, :-1].float().cpu()
        logprob = torch.log_softmax(logits, -1)
        top = logprob.topk(min(top_k, logprob.shape[-1]), -1)
        given = logprob.gather(1, ids[0, 1:, None].cpu())[:, 0]
        return Score(given.numpy(), top.indices.numpy(), top.values.numpy(), logits.numpy())

    @torch.no_grad()
    def generate(self, tokens: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One token at a time with transformers' own key-value cache."""
        random = np.random.default_rng(sampling.seed)
        text = list(tokens)
        ids = torch.tensor([text], device=self.device)
        cache = self._fresh().get("past_key_values")
        for _ in range(min(sampling.max_tokens, self.limit - len(tokens))):
            with self.lock:
                out = self.module(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = draw(out.logits[0, -1].float().cpu().numpy(), sampling, random, text, len(tokens))
            if token in sampling.stop:
                return
            yield token
            text.append(token)
            ids = torch.tensor([[token]], device=self.device)

    def _fresh(self) -> dict[str, Any]:
        """How the module is called without a past: with an empty cache, where one is asked for that rounds."""
        if not self.words:
            return {"use_cache": False}
        return {"use_cache": True, "past_key_values": rounding_cache(self.module.config, self.words)}

    def close(self) -> None:
        """Free the weights."""
        del self.module


def rounding_cache(config: Any, words: dict[str, Any]) -> Any:
    """An empty cache of transformers that keeps keys and values as integers would give them back."""
    from transformers import DynamicCache

    bits, group = int(words["num_bits"]), int(words["group_size"])

    class Rounded(DynamicCache):
        """Rounds on the way in."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any) -> Any:
            keys, values = (cached(states, bits, group) for states in (key_states, value_states))
            return super().update(keys, values, *args, **options)

    return Rounded(config=config)


def quantize_inputs(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Round the inputs of every layer whose scheme has integer activations, as a kernel for it would."""
    for parameter, name in checkpoint.places(module, some=checkpoint.apart).items():
        scheme = checkpoint.scheme(name)
        if scheme is not None and scheme.activations is not None:
            stored = checkpoint.tensor(name)
            assert isinstance(stored, QTensor)
            round_inputs(module.get_submodule(parameter.removesuffix(".weight")), stored)


def wrap(path: Path) -> Artifact:
    """A plain Hugging Face folder seen as an artifact without a manifest, for measuring the original."""
    checkpoint = Checkpoint.open(path)
    fields = {"format": "safetensors", "main": "config.json", "model": checkpoint.name, "files": {}, "plan": []}
    return Artifact(checkpoint.path, {**fields, "task": checkpoint.task.to_dict(), "params": checkpoint.params})
