"""Task: what a model is for. Raw example to inputs, outputs to answer, metrics, example inputs, data fields.

It is found once, when a model is opened, stored as `task.json` with the checkpoint and in every artifact's
manifest, and used by calibration, evaluation and serving alike, so that all of them see the same inputs.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.report import read_object

KINDS = {
    "text-generation": ("perplexity", "kl", "top-1 agreement"),
    "sentence-similarity": ("spearman", "pearson"),
}


@dataclass(frozen=True)
class Task:
    """kind is a name of the Hugging Face hub's tasks; folder holds the tokenizer's files.

    axes: {input name: {axis: symbol}}, the dynamic axes of the inputs, for graph exports.
    training, search, held_out: names of the data that were used for fitting, for choosing, for judging;
        kept apart so that leakage can be tested.
    """

    kind: str
    folder: Path = field(compare=False)
    max_length: int = 512
    pooling: str = ""  # "mean" or "cls"; only for sentence-similarity
    normalize: bool = False  # unit length of the embedding
    inputs: tuple[str, ...] = ("input_ids",)
    training: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that judge this task."""
        return KINDS[self.kind]

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of each input."""
        return {name: {0: "batch", 1: "sequence"} for name in self.inputs}

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`; no torch, no transformers."""
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise Missing(
                f"{self.folder} has no tokenizer.json.\nSave one with AutoTokenizer(...).save_pretrained."
            )
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the only class that the tokenizers package raises
            raise Corrupt(f"{file} is not a tokenizer: {error}.\nGet the model again.") from error

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json (chat template, names of special tokens); empty when there is none."""
        file = self.folder / "tokenizer_config.json"
        config = read_object(file) if file.exists() else {}
        template = self.folder / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf8")
        return config

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: for generators without special tokens, for encoders with them, cut to max_length."""
        special = self.kind != "text-generation"
        tokenizer = self.tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(text, add_special_tokens=special).ids
        if special and len(ids) > self.max_length:
            tokenizer.enable_truncation(self.max_length)
            ids = tokenizer.encode(text).ids
        return ids

    def batch(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Padded int64 inputs [batch, longest] by input name, for encoders."""
        return self.pad([self.encode(text) for text in texts])

    def pad(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        """The same from token ids, one row per text."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.token_to_id(self.tokenizer_config.get("pad_token") or "[PAD]") or 0
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: every[name] for name in self.inputs}

    def answer(self, outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Outputs to answer: the pooled sentence embedding [batch, width].

        An exported graph may do the pooling itself: then its output is named `embedding`.
        """
        if "embedding" in outputs:
            return outputs["embedding"]
        hidden = outputs["last_hidden_state"]
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"][..., None].astype(hidden.dtype)
            pooled = (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        return pooled

    def examples(self) -> list[str]:
        """Two raw examples of unequal length, for tracing and for a first check of an export."""
        return ["A wherry is a light boat.", "It carries cargo where big ships cannot go, up the shallow rivers."]

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a conversation by the model's own chat template; `role: text` lines when it has none."""
        template = self.tokenizer_config.get("chat_template")
        if not template:
            return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise BadInput(f"the model's chat template refuses this conversation: {message}")

        special = {
            k: _token_text(v) for k, v in self.tokenizer_config.items() if k in ("bos_token", "eos_token", "pad_token")
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer: eos of generation_config.json, config.json and the tokenizer, each once."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            file = self.folder / name
            eos = read_object(file).get("eos_token_id") if file.exists() else None
            ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        eos = self.tokenizer.token_to_id(_token_text(self.tokenizer_config.get("eos_token")))
        return tuple(dict.fromkeys(ids + ([] if eos is None else [eos])))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the folder, as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "folder"}

    @classmethod
    def from_dict(cls, data: dict[str, Any], folder: Path) -> "Task":
        """The opposite of to_dict. Raises Unsupported for a kind that this version does not know."""
        if data.get("kind") not in KINDS:
            raise Unsupported(f"task '{data.get('kind')}' is not known; there are: {', '.join(KINDS)}")
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in cls.__dataclass_fields__
        }
        return cls(**known, folder=Path(folder))

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any]) -> "Task":
        """Find out what a Hugging Face folder is for: its task.json, else its architecture and its pooling files."""
        file = folder / "task.json"
        if file.exists():
            return cls.from_dict(read_object(file), folder)
        architecture = str((config.get("architectures") or ["?"])[0])
        if architecture.endswith("ForCausalLM"):
            return cls("text-generation", folder, max_length=config.get("max_position_embeddings", 2048))
        if (folder / "modules.json").exists() or architecture.endswith("Model"):
            pooling, length = "mean", config.get("max_position_embeddings", 512)
            if (folder / "1_Pooling" / "config.json").exists():
                modes = read_object(folder / "1_Pooling" / "config.json")
                pooling = "cls" if modes.get("pooling_mode_cls_token") else "mean"
            if (folder / "sentence_bert_config.json").exists():
                length = read_object(folder / "sentence_bert_config.json").get("max_seq_length", length)
            modules = (folder / "modules.json").read_text(encoding="utf8") if (folder / "modules.json").exists() else ""
            names = ("input_ids", "attention_mask") + (("token_type_ids",) if config.get("type_vocab_size") else ())
            return cls("sentence-similarity", folder, length, pooling, "Normalize" in modules, names)
        raise Unsupported(
            f"{folder}: architecture {architecture} has no task here yet.\n"
            f"Text generation and sentence similarity have; write a task.json if it is one of these."
        )


def _token_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""
