"""Memory does not grow with depth: a model of four times the layers is compressed in (almost) the same memory.

The peak is that of a whole process, `wherry compress` with its save and its proof, as the kernel counts it (VmHWM,
read by the process itself when it ends). The seeded models are made of files directly: weights of 8 MB a layer, so
that holding the 18 more layers of the deeper model would show as 150 MB.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import write_tokenizer
from wherry import tensorfile

HIDDEN, FFN, VOCABULARY = 512, 768, 512
RUN = """
import sys
from wherry import api
recipe, data = sys.argv[3], {"samples": 8, "length": 128}
api.compress(sys.argv[1], sys.argv[2], recipe, **data)
print("peak", next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


def write(folder: Path, layers: int) -> Path:
    """A Llama of plain float32 files, layer by layer, in shards of one layer."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    where = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        tensorfile.write(folder / name, tensors)
        where.update(dict.fromkeys(tensors, name))

    shard(
        "outside.safetensors",
        {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)},
    )
    for i in range(layers):
        linear = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qo"}
        linear |= {f"self_attn.{x}_proj": (HIDDEN // 2, HIDDEN) for x in "kv"}
        linear |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
        tensors = {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in linear.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{i}.{name}.weight": torch.ones(HIDDEN) for name in norms}
        shard(f"layer-{i:03}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def peak(model: Path, out: Path, recipe: str) -> int:
    """Peak resident bytes of a whole compression."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(model), str(out), recipe], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak (\d+)", done.stdout)
    assert found
    return int(found[1]) * 1024


def forecast(model: Path, recipe: str) -> int:
    """What --dry-run says of memory."""
    words = [
        "compress",
        str(model),
        "-o",
        "none",
        "--recipe",
        recipe,
        "--dry-run",
        "--json",
        "--samples",
        "8",
        "--length",
        "128",
    ]
    done = subprocess.run([sys.executable, "-m", "wherry", *words], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return next(row["value"] for row in json.loads(done.stdout)["rows"] if row["what"] == "forecast: memory")


def compare(tmp_path: Path, recipe: str, few: int, many: int) -> tuple[int, int]:
    shallow, deep = write(tmp_path / "shallow", few), write(tmp_path / "deep", many)
    sizes = [sum(f.stat().st_size for f in model.glob("*.safetensors")) for model in (shallow, deep)]
    a, b = (peak(model, tmp_path / f"{model.name}-out", recipe) for model in (shallow, deep))
    print(
        f"\n{recipe}: {few} layers ({sizes[0] / 1e6:.0f} MB) peak {a / 1e6:.0f} MB; {many} layers "
        f"({sizes[1] / 1e6:.0f} MB) peak {b / 1e6:.0f} MB; growth {100 * (b / a - 1):+.1f}%"
    )
    assert sizes[1] - sizes[0] > 0.25 * a, "the weights are too small to show"
    return a, b


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "recipe", ["rtn:scheme=W4A16,group_size=32", "gptq:scheme=W4A16_ASYM,group_size=32"], ids=["rtn", "gptq"]
)
@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path, recipe: str) -> None:
    a, b = compare(tmp_path, recipe, 6, 24)
    assert b < 1.10 * a
    said = forecast(tmp_path / "deep", recipe)
    print(f"forecast {said / 1e6:.0f} MB, {100 * (said / b - 1):+.0f}% of what was measured")
    assert 0.75 < said / b < 1.4
