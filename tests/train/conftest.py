"""Start `ranks.py` with torchrun, and read what the first rank wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_llama
from wherry.data import shipped

HERE = Path(__file__).parent
Results = dict[str, dict[str, Any]]


def torchrun(folder: Path, cases: list[dict], ranks: int, *options: str, env: dict | None = None) -> Results:
    """Run the cases in one torchrun; {name: result}. Fails with the ranks' own words."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options]
    around = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])} | (env or {})
    line = line if any("master" in o or "rdzv" in o for o in options) else [*line[:3], "--standalone", *line[3:]]
    done = subprocess.run(
        [*line, str(HERE / "ranks.py"), str(file)], capture_output=True, text=True, timeout=600, env=around
    )
    found = {p.name.removesuffix(".result.json"): json.loads(p.read_text()) for p in folder.glob("*.result.json")}
    assert set(found) >= {case["name"] for case in cases}, done.stderr[-4000:]
    return found


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., dict]:
    """A job's fields: (model, name, more) -> dict; small and the same but for `more`."""

    def made(model: Path, name: str, **more: Any) -> dict:
        return {
            "model": str(model), "out": str(tmp_path / name), "data": str(shipped("calibration")), "steps": 20,
            "batch": 8, "length": 32, "cache": str(tmp_path / "cache"), "learning_rate": 1e-3, "timeout": 100.0,
            "held_out": str(shipped("evaluation")), **more,
        }  # fmt: skip

    return made


def rows(folder: Path, rank: int) -> dict[int, list[int]]:
    """{update: samples} that a rank noted."""
    lines = (folder / f"samples-{rank}.jsonl").read_text().splitlines()
    return {row["update"]: row["samples"] for row in map(json.loads, lines)}


def wide(folder: Path) -> Path:
    """A random Llama of 4 layers and 4 heads over 4: what 4 ranks can share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_llama(folder)  # its tokenizer
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def cnn(folder: Path, norm: str) -> Path:
    """A small network of pictures with group norms, or with batch norms, as an ONNX graph with its task."""
    import torch
    from torch import nn

    from wherry.capture import capture
    from wherry.task import Task

    torch.manual_seed(0)
    norms = {"group": lambda n: nn.GroupNorm(4, n), "batch": nn.BatchNorm2d}
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norms[norm](8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        norms[norm](16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(5):  # statistics that are not those of the start
            net(torch.randn(16, 3, 8, 8) * 0.5)
    processor = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "scale": 1 / 255}
    task = Task("image-classification", folder.parent, inputs=("input",), outputs=("logits",), labels=("r", "g", "b"),
                processor=processor)  # fmt: skip
    capture(net, folder, torch.randn(2, 3, 8, 8), task, outputs=["logits"])
    return folder


def pictures(folder: Path, count: int = 24) -> Path:
    """Noise with a tint, in a folder for each of three classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for channel, name in enumerate("rgb"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            array[:, :, channel] += 100
            Image.fromarray(array).save(folder / name / f"{i}.png")
    return folder
