"""Task: what a model is for. Raw example to inputs, outputs to answer, metrics, example inputs, data fields.

It is found once, when a model is opened, stored as `task.json` with the checkpoint and in every artifact's
manifest, and used by calibration, evaluation and serving alike, so that all of them see the same inputs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from wherry import audio, image
from wherry import label as label_
from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.report import read_object
from wherry.shelf import suggest

CLASSES = ("accuracy", "top-5 accuracy", "macro precision", "macro recall", "macro f1")
KINDS = {
    "text-generation": ("perplexity", "kl", "top-1 agreement"),
    "sentence-similarity": ("spearman", "pearson"),
    "text-classification": CLASSES,
    "token-classification": ("token f1", "entity f1"),
    "image-classification": CLASSES,
    "object-detection": ("map", "map at 0.5"),
    "automatic-speech-recognition": ("word error rate", "character error rate"),
    "audio-classification": CLASSES,
    "voice-activity-detection": ("frame f1", "frame precision", "frame recall"),
    "translation": ("bleu", "chrf", "rouge-l", "exact match"),
    "feature-extraction": ("relative difference",),
}
CLASSIFIERS = {"ForSequenceClassification": "text-classification", "ForImageClassification": "image-classification"}
WRITES = ("automatic-speech-recognition", "translation")  # an encoder and a decoder that writes ids one by one
WRITER_KEYS = ("start", "most", "suppress")
MODALITIES = {
    "image-classification": "image", "object-detection": "image", "automatic-speech-recognition": "audio",
    "audio-classification": "audio", "voice-activity-detection": "audio",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """kind is a name of the Hugging Face hub's tasks; folder holds the tokenizer's files.

    labels: names of the classes in the order of the logits. outputs: names of the graph's outputs, the answer first.
    processor: how raw examples become inputs; keys: `image.KEYS` for pictures, `audio.KEYS` for sounds; for tasks
        that write, `start`: ids that an answer begins with, `most`: ids of an answer at most, `suppress`: ids never
        written.
    axes: {input name: {axis: symbol}}, the dynamic axes of the inputs, for graph exports.
    training, search, held_out: the data that were used for fitting, for choosing, for judging, each as
        "NAME sha256:DIGEST"; kept apart so that leakage can be tested.
    """

    kind: str
    folder: Path = field(compare=False)
    max_length: int = 512
    pooling: str = ""  # "mean" or "cls"; only for sentence-similarity
    normalize: bool = False  # unit length of the embedding
    inputs: tuple[str, ...] = ("input_ids",)
    outputs: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    processor: dict[str, Any] = field(default_factory=dict, hash=False)
    training: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that judge this task."""
        return KINDS[self.kind]

    @property
    def modality(self) -> str:
        """What raw examples are: "text", "image", "audio", or "arrays" by input name."""
        if self.kind == "feature-extraction":
            if "size" in self.processor:
                return "image"
            return "audio" if "sampling_rate" in self.processor else "text" if self.pooling else "arrays"
        return MODALITIES.get(self.kind, "text")

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of each input."""
        fixed = self.modality in ("image", "arrays") or self.processor.get("frames")
        last = {} if fixed else {1 if self.modality == "text" else -1: "sequence"}
        return {name: {0: "batch", **last} for name in self.inputs}

    def used(self, field_name: str, name: str, digest: str) -> "Task":
        """The same task with one data set more in `training`, `search` or `held_out`."""
        entry = f"{name} sha256:{digest}"
        changed: Any = {field_name: tuple(dict.fromkeys((*getattr(self, field_name), entry)))}
        return replace(self, **changed)

    def leak(self, digest: str) -> str:
        """Where data of this digest was used to make the model: "training", "search", or "" where it was not."""
        for name in ("training", "search"):
            if digest and any(entry.endswith(f"sha256:{digest}") for entry in getattr(self, name)):
                return name
        return ""

    @cached_property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`; no torch, no transformers."""
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise Missing(f"{self.folder} has no tokenizer.json.\nSave one with AutoTokenizer(...).save_pretrained.")
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

    def encode(self, text: str | tuple[str, str]) -> list[int]:
        """Token ids of plain text: for generators without special tokens, for encoders with them, cut to max_length."""
        return self._encoding(text).ids

    def _encoding(self, text: str | tuple[str, str] | list[str]) -> Any:
        """Of a text, of two texts, or of words (a list)."""
        special, tokenizer = self.kind != "text-generation", self.tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        parts = text if isinstance(text, tuple) else (text,)
        words = isinstance(text, list)
        found = tokenizer.encode(*parts, is_pretokenized=words, add_special_tokens=special)
        if special and len(found.ids) > self.max_length:
            tokenizer.enable_truncation(self.max_length)
            found = tokenizer.encode(*parts, is_pretokenized=words)
            tokenizer.no_truncation()
        return found

    def words(self, text: Any) -> list[int | None]:
        """The word that each token of `text` (a list of words) belongs to; None for special tokens."""
        return list(self._encoding(text).word_ids)

    def batch(self, texts: list[Any]) -> dict[str, np.ndarray]:
        """Padded int64 inputs [batch, longest] by input name, for encoders, of texts or pairs of texts."""
        found = [self._encoding(text) for text in texts]
        return self.pad([each.ids for each in found], [each.type_ids for each in found])

    def pad(self, rows: list[list[int]], types: list[list[int]] | None = None) -> dict[str, np.ndarray]:
        """The same from token ids, one row per text."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.token_to_id(_token_text(self.tokenizer_config.get("pad_token")) or "[PAD]") or 0
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            kinds[i, : len(row)] = 0 if types is None else types[i]
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        try:
            return {name: every[name] for name in self.inputs}
        except KeyError as error:
            raise Unsupported(
                f"a text cannot become the input '{error.args[0]}': {', '.join(every)} it can.\n"
                "Mend `inputs` of task.json, or give arrays by input name (.npz)."
            ) from error

    def prepare(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Raw examples to one batch of inputs by name.

        Args:
            examples: of one sort: {input name: array} without the batch axis (any task); text or (text, text); a
                picture, see `image.load`; a sound, see `audio.load`.

        Raises:
            BadInput: none, or not what the task takes, or undecodable; names it.
        """
        if not len(examples):
            raise BadInput("no examples to prepare")
        if isinstance(examples[0], dict):
            return self._stacked(examples)
        if self.modality == "image":
            return {self.inputs[0]: image.prepare(examples, self.processor)}
        if self.modality == "audio":
            batch, mask = audio.prepare(examples, self.processor)
            return {self.inputs[0]: batch} | {name: mask for name in self.inputs[1:] if name.endswith("attention_mask")}
        words = self.kind == "token-classification"
        for example in examples:
            text = isinstance(example, str) or isinstance(example, tuple) and all(isinstance(e, str) for e in example)
            if not (text or words and isinstance(example, list)):
                raise BadInput(
                    f"{self.kind} takes {'words' if words else 'texts'}, not {type(example).__name__}: {example!r:.50}"
                )
        if self.modality == "arrays":
            raise BadInput(f"this model takes arrays by input name ({', '.join(self.inputs)}): give an .npz file")
        return self.batch(list(examples))

    def _stacked(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        out = {}
        for name in self.inputs:
            try:
                out[name] = np.stack([np.asarray(example[name]) for example in examples])
            except KeyError as error:
                given = ", ".join(examples[0])
                raise BadInput(f"the model's input '{name}' is not in the data, which has {given}") from error
            except (ValueError, TypeError) as error:
                raise BadInput(f"examples of '{name}' have different shapes: {error}") from error
        return out

    def main(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """The output that holds the answer: the first of `outputs`, else "logits", else the only one."""
        for name in (*self.outputs[:1], "logits"):
            if name in outputs:
                return outputs[name]
        if len(outputs) == 1 or not self.outputs:
            return next(iter(outputs.values()))
        raise BadInput(f"the model has no output '{self.outputs[0]}', it has {', '.join(outputs)}: mend task.json")

    def answer(self, outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Any:
        """Outputs to answer, one per example.

        Classification: index of the class int64 [batch]. Token classification: [batch, sequence]. Sentence similarity:
        the pooled embedding [batch, width]; an exported graph may do the pooling itself: then its output is named
        `embedding`. Others: the main output as it is.
        """
        if self.kind in ("text-classification", "image-classification", "audio-classification", "token-classification"):
            scores = self.main(outputs)
            axes = 3 if self.kind == "token-classification" else 2
            if scores.ndim != axes or self.labels and scores.shape[-1] != len(self.labels):
                raise BadInput(
                    f"the model gives {list(scores.shape)}, task.json names {len(self.labels)} labels: they must agree"
                )
            return scores.argmax(-1)
        if self.kind != "sentence-similarity":
            return self.main(outputs)
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

    def target(self, label: Any, place: str) -> Any:
        """A label of the data as this task understands it: an index, a number, a text, ...; see `label.fit`.

        Raises:
            BadInput: it does not fit; `place` (file:line) stands in the message.
        """
        return label_.fit(label, self.kind, self.labels, place)

    def examples(self) -> list[Any]:
        """Two raw examples for tracing and for a first check of an export, of unequal length where that may be.

        Texts; noise of the right size as a picture; one and two seconds of noise. Seeded.

        Raises:
            Unsupported: the model takes arrays by name, of which nothing is known.
        """
        rng = np.random.default_rng(0)
        if self.modality == "image":
            size = image.pair(self.processor.get("size"), "size")
            return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2)]
        if self.modality == "audio":
            rate = int(self.processor.get("sampling_rate", 16000))
            return [(0.1 * rng.standard_normal(seconds * rate)).astype(np.float32) for seconds in (1, 2)]
        if self.modality == "arrays":
            raise Unsupported("this model takes arrays by input name; there are no examples of its own: give data")
        texts = ["A wherry is a light boat.", "It carries cargo where big ships cannot go, up the shallow rivers."]
        return [text.split() for text in texts] if self.kind == "token-classification" else texts

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
        if not isinstance(known.get("processor", {}), dict):
            raise Corrupt(f"the processor of {folder} must be an object, not {known['processor']!r:.60}")
        keys = (*image.KEYS, *audio.KEYS, *WRITER_KEYS)
        for key in known.get("processor", {}):
            if key not in keys:
                raise BadInput(f"task.json: no '{key}' in a processor{suggest(key, keys)}; known: {', '.join(keys)}")
        return cls(**known, folder=Path(folder))

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any]) -> "Task":
        """Find out what a Hugging Face folder is for: its task.json, else its architecture and its pooling files."""
        file = folder / "task.json"
        if file.exists():
            return cls.from_dict(read_object(file), folder)
        architecture = str((config.get("architectures") or ["?"])[0])
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):  # the second: GPT-2, whose length is n_positions
            length = config.get("max_position_embeddings", config.get("n_positions", 2048))
            return cls("text-generation", folder, max_length=length)
        for end, kind in CLASSIFIERS.items():
            if architecture.endswith(end):
                return cls.of_classifier(kind, folder, config)
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
            f"Text generation, sentence similarity and classifiers have; write a task.json if it is one of these."
        )

    @classmethod
    def of_classifier(cls, kind: str, folder: Path, config: dict[str, Any]) -> "Task":
        """The task of a transformers folder of one label per text or picture; labels from id2label.

        Raises Unsupported for several labels at once and for regression; Missing without preprocessor_config.json.
        """
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        try:
            labels = tuple(str(names[key]) for key in sorted(names, key=int))
            if [int(key) for key in sorted(names, key=int)] != list(range(len(names))):
                raise ValueError("its numbers are not 0, 1, 2, ...")
        except (ValueError, TypeError) as error:
            raise Corrupt(f"{folder / 'config.json'}: id2label does not number the labels: {error}") from error
        problem = config.get("problem_type") or "single_label_classification"
        if problem != "single_label_classification" or len(labels) < 2:
            what = problem if len(labels) > 1 else "one output, a regression"
            raise Unsupported(f"{folder}: {what}; classification here means one label of several")
        if kind == "image-classification":
            file = folder / "preprocessor_config.json"
            if not file.exists():
                raise Missing(
                    f"{folder} has no preprocessor_config.json.\nSave it: AutoImageProcessor.save_pretrained."
                )
            made = image.processor(read_object(file), int(config.get("num_channels", 3)))
            return cls(kind, folder, inputs=("pixel_values",), outputs=("logits",), labels=labels, processor=made)
        inputs = ("input_ids", "attention_mask") + (("token_type_ids",) if config.get("type_vocab_size") else ())
        task = cls(kind, folder, inputs=inputs, outputs=("logits",), labels=labels)
        limits = (config.get("max_position_embeddings", 512), task.tokenizer_config.get("model_max_length"))
        return replace(task, max_length=int(min(limit for limit in limits if limit)))


def _token_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""
