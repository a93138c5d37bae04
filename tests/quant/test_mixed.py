"""Mixed precision: the budget holds, sensitive weights get more bits, and it beats one scheme for all."""

import math
import re
from pathlib import Path

import onnx
import pytest
import torch
from gguf import GGUFReader
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from tests.conftest import write_llama
from tests.engine.test_gaits import batches, compress, divergence
from wherry import api, deliver, shelf
from wherry.checkpoint import Checkpoint
from wherry.engine.assign import information
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Recipe

SOLVER = "rtn:scheme=W3A16,group_size=32,embedding=keep"


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A model in which the second block adds little, so that its weights matter little."""
    folder = write_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.1" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.02
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_bits_go_where_they_matter(sensitivity: str, uneven: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(uneven)
    mixed = f"mixed:schemes=W2A16;W3A16;W4A16,bits=3.5,sensitivity={sensitivity}"
    made = compress(uneven, f"{mixed} | {SOLVER}", tmp_path / "mixed")
    plain = compress(uneven, SOLVER, tmp_path / "plain")
    rows = {row["name"]: row for row in made.plan if row["scheme"]}
    bits = sum(8 * row["after"] for row in rows.values())
    assert bits <= 3.5 * sum(row["shape"][0] * row["shape"][1] for row in rows.values())
    assert bits <= sum(8 * row["after"] for row in plain.plan if row["scheme"])
    middle = [
        sum(int(row["scheme"][1]) for name, row in rows.items() if f"layers.{i}." in name) / 7 for i in range(2)
    ]
    assert middle[0] > middle[1]
    assert divergence(made, original) < 0.8 * divergence(plain, original)
    assert any("chosen by step 1 (mixed)" in note for row in rows.values() for note in row["notes"])


def test_the_information_predicts_the_divergence(tiny_llama: Path) -> None:
    """1/2 sum F d^2 against the KL measured after a small random step of one weight."""
    checkpoint = Checkpoint.open(tiny_llama)
    module = checkpoint.module()
    place = "model.layers.1.mlp.down_proj.weight"
    weight = module.get_parameter(place)
    fisher = information(module, [weight], batches(8))[0]
    torch.manual_seed(0)
    d = 0.02 * float(weight.square().mean().sqrt()) * torch.randn_like(weight)
    ids = torch.from_numpy(batches(1)[0]["input_ids"])
    with torch.no_grad():
        p = module(input_ids=ids).logits.log_softmax(-1)
        weight.data = weight.data + d
        q = module(input_ids=ids).logits.log_softmax(-1)
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    expected = float((fisher * d.square()).sum()) / 2
    assert 0.5 < expected / measured < 2


def test_what_cannot_be_is_said_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    with pytest.raises(Unsupported, match="W8A16_ASYM"):
        Recipe.parse(f"mixed:schemes=W4A16;W8A16_ASYM,bits=5 | {SOLVER}").plan(checkpoint, ("gguf",))
    with pytest.raises(BadInput, match="super-blocks of 256"):
        Recipe.parse(f"mixed:schemes=Q4_K;Q6_K,bits=5 | {SOLVER}").plan(checkpoint)
    with pytest.raises(BadInput, match="smallest schemes take 2.525 in compressed_tensors; raise it"):
        compress(tiny_llama, f"mixed:bits=1.5 | {SOLVER}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="no step gives codes to any weight that mixed"):
        Recipe.parse(f"mixed:targets=q_proj | {SOLVER},ignore=q_proj").plan(checkpoint)
    with pytest.raises(BadInput, match="two budgets"):
        Recipe.parse(f"mixed:bits=4,size=1MB | {SOLVER}")
    with pytest.raises(BadInput, match="no size; write 100MB"):
        Recipe.parse(f"mixed:size=lots | {SOLVER}")


PLACES = {"compressed_tensors": "*.safetensors", "gguf": "gguf/*.gguf", "onnx": "onnx/model.onnx*"}
TENSORS = {
    "compressed_tensors": lambda out: sum(
        sum(t.nbytes for t in load_file(file).values()) for file in out.glob("*.safetensors")
    ),
    "gguf": lambda out: sum(int(t.n_bytes) for t in GGUFReader(next((out / "gguf").glob("*.gguf"))).tensors),
    "onnx": lambda out: sum(
        numpy_helper.to_array(t).nbytes
        for t in onnx.load(out / "onnx" / "model.onnx").graph.initializer
        if not t.name.endswith("_cache")  # sines and cosines of positions
    ),
}


def size_of(out: Path, name: str) -> int:
    return sum(file.stat().st_size for file in out.glob(PLACES[name]))


@pytest.mark.parametrize("recipe", [
    "rtn:scheme=W4A16_ASYM,group_size=32", "rtn:scheme=W3A16,group_size=64", "rtn:scheme=W8A16,group_size=32",
    "rtn:scheme=W4A16,group_size=32,embedding=keep", "rtn:scheme=W3A16_ASYM,block_structure=16x32",
])  # fmt: skip
def test_bytes_are_those_of_the_files(recipe: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What each format says that its tensors take, against foreign readers of what it wrote."""
    plan = Recipe.parse(recipe).plan(Checkpoint.open(tiny_llama), ("gguf", "onnx"))
    deliver.deliver(plan, tmp_path / "out", ("gguf", "onnx"), [], {}, lambda result: None, api.quiet)
    for name, measured in TENSORS.items():
        module, out = shelf.find("formats", name), tmp_path / "out"
        said = sum(module.bytes_of(plan, row) for row in plan.rows)
        assert said <= measured(out) <= said + (200 if name == "onnx" else 0)  # scalars of the graph
        assert said < size_of(out, name) <= said + module.besides(plan)


def test_a_budget_of_bytes_is_kept_in_every_file(uneven: Path, tmp_path: Path) -> None:
    """Three bits take four in GGUF: there nothing is won by them, and the file stays below what was asked."""
    checkpoint, solver = Checkpoint.open(uneven), "rtn:scheme=W4A16,group_size=32"
    forms = ("gguf", "onnx")
    schemes = "schemes=W2A16;W3A16;W4A16;W8A16"
    with pytest.raises(BadInput, match=r"in (gguf|onnx)") as said:
        Recipe.parse(f"mixed:{schemes},size=1kB | {solver}").plan(checkpoint, forms)
    least = float(re.search(r"take ([\d.]+)MB", str(said.value))[1])
    for more in (1.0, 1.05, 1.1):
        most, out = math.ceil(1e3 * least * more), tmp_path / f"out-{more}"
        plan = Recipe.parse(f"mixed:{schemes},size={most}kB | {solver}").plan(checkpoint, forms)
        deliver.deliver(plan, out, forms, batches(), {}, lambda result: None, api.quiet)
        assert all(size_of(out, name) <= most * 1e3 for name in forms)
        rows = [row for row in Checkpoint.open(out).plan if row["role"] == "linear" and row["scheme"]]
        taken = {row["scheme"].split(",")[0] for row in rows}
        assert taken <= {"W2A16", "W3A16", "W4A16"} if more == 1.0 else "W8A16" in taken
        assert any("for the 14 weights that step 1 chose for" in note for row in rows for note in row["notes"])
