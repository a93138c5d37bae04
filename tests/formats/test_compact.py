"""compact: what goes in comes out to the bit, whatever it holds; sizes against entropies worked out by hand."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import wherry
from wherry import shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import Corrupt, Unsupported
from wherry.formats import compact
from wherry.ops import entropy

RNG = np.random.default_rng(0)


def cases() -> dict[str, np.ndarray]:
    normal = RNG.standard_normal(5000).astype(np.float32)
    sparse = np.where(RNG.random(5000) < 0.5, 0, normal).astype(np.float32)
    return {
        "normal": normal, "half": normal.astype(np.float16), "sparse": sparse, "sparse half": sparse.astype(np.float16),
        "few": RNG.choice(np.array([0, 1.5, -2, -0.0], np.float32), 5000, p=[0.9, 0.05, 0.04, 0.01]),
        "zeros": np.zeros(777, np.float32), "one": np.ones(1, np.float32), "empty": np.zeros(0, np.float32),
        "codes": RNG.integers(-8, 8, 3001).astype(np.int8), "ids": RNG.integers(0, 1 << 40, 333),
        "packed": RNG.integers(-(1 << 31), 1 << 31, 500).astype(np.int32), "flags": RNG.integers(0, 2, 99).astype(bool),
        "nan": np.array([np.nan, np.inf, -0.0, 0.0, 1e-45], np.float32), "wide": RNG.integers(0, 900, 4000),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(cases()))
def test_every_bit_comes_back(name: str) -> None:
    array = cases()[name]
    how, streams = entropy.squeeze(array)
    items = entropy.restore(how, streams, array.size, array.dtype.itemsize)
    assert items.tobytes() == array.tobytes()


def test_sizes_are_near_the_entropy() -> None:
    n = 200_000
    mask = RNG.random(n) < 0.9
    few = np.where(mask, 0, RNG.integers(1, 8, n)).astype(np.float32)
    _, streams = entropy.squeeze(few)
    share = np.bincount(few.astype(int)) / n
    ideal = -(share * np.log2(share)).sum() * n / 8
    assert ideal < sum(map(len, streams)) < 1.01 * ideal + 100
    half = np.where(RNG.random(n) < 0.5, 0, RNG.standard_normal(n)).astype(np.float16)
    size = sum(map(len, entropy.squeeze(half)[1]))
    assert size < 0.58 * half.nbytes  # a flag for each, and half of the numbers
    two_of_four = (np.argsort(RNG.random((n // 4, 4)), 1) < 2).reshape(-1)
    size = len(entropy.encode(np.packbits(two_of_four)))
    assert size < n / 8 * (np.log2(6) / 4) * 1.02 + 400  # six patterns of four flags


def pruned(folder: Path, out: Path, recipe: str, **options: object) -> object:
    return wherry.compress(folder, out, recipe, formats=("compact",), samples=4, length=32, **options)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import write_llama

    top = tmp_path_factory.mktemp("compact")
    wide = write_llama(top / "wide", hidden=128)
    report = pruned(wide, top / "out", "magnitude:sparsity=0.5")
    assert report.get("verdict").value in ("PASS", "FAIL")
    wrong = [row.what for row in report if row.value is False and row.where == "compact"]
    assert set(wrong) <= {"check: kl", "check: perplexity ratio"}, wrong  # half of a random model is another one
    return top / "out"


def test_a_pruned_folder_is_about_half(sparse: Path) -> None:
    artifact = Artifact.open(sparse / "compact")
    stock = sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    layers = [n for n in Checkpoint.open(sparse).names() if "layers" in n and n.endswith("proj.weight")]
    dense = stock - sum(4 * Checkpoint.open(sparse).weight(name).numel() for name in layers)
    assert artifact.main.stat().st_size < dense + 0.52 * (stock - dense)
    artifact.verify()


def test_it_opens_and_unpacks_to_the_very_file(sparse: Path, tmp_path: Path) -> None:
    made, stock = Checkpoint.open(sparse / "compact"), Checkpoint.open(sparse)
    for name in stock.names():
        assert torch.equal(made.tensor(name), stock.tensor(name))
    (tmp_path / "again").mkdir()
    inner = compact.restore(Artifact.open(sparse / "compact"), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (sparse / "model.safetensors").read_bytes()
    inner.verify()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    report = wherry.export(sparse / "compact", tmp_path / "stock", "safetensors")
    assert report.get("verdict").value == "PASS"


def test_codes_keep_their_zeros_and_shrink(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = "magnitude:sparsity=0.75 | rtn:scheme=W8A8,embedding=keep"
    pruned(tiny_llama, tmp_path / "out", recipe, max_kl=99, max_ratio=99)
    made, stock = Checkpoint.open(tmp_path / "out" / "compact"), Checkpoint.open(tmp_path / "out")
    for name in stock.names():
        assert torch.equal(made.weight(name), stock.weight(name))
    manifest = json.loads((tmp_path / "out" / "compact" / "wherry.json").read_text())
    assert manifest["inner"]["format"] == "compressed_tensors"


def test_graphs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 64))
    wherry.capture(net, tmp_path / "net", torch.randn(2, 1, 8, 8))
    np.savez(tmp_path / "data.npz", input=RNG.standard_normal((8, 1, 8, 8)).astype(np.float32))
    report = wherry.compress(
        tmp_path / "net", tmp_path / "out", "magnitude:sparsity=0.9 | cluster:bits=3", formats=("compact",),
        evaluation=tmp_path / "data.npz",
    )  # fmt: skip
    assert not [row.what for row in report if row.value is False and "near" not in row.what and row.what != "verdict"]
    packed = tmp_path / "out" / "compact"
    assert (packed / "model.compact").stat().st_size < 0.1 * (tmp_path / "net" / "model.onnx.data").stat().st_size
    session = shelf.find("runtimes", "compact").load(Artifact.open(packed))
    x = RNG.standard_normal((3, 1, 8, 8)).astype(np.float32)
    stock = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    name = stock.get_inputs()[0].name
    assert np.array_equal(next(iter(session.predict({name: x}).values())), stock.run(None, {name: x})[0])
    session.close()
    wherry.export(packed, tmp_path / "again", "onnx")
    again = onnxruntime.InferenceSession(str(tmp_path / "again" / "model.onnx"))
    assert np.array_equal(again.run(None, {name: x})[0], stock.run(None, {name: x})[0])


def test_damaged_files_are_refused(sparse: Path, tmp_path: Path) -> None:
    good = (sparse / "compact" / "model.compact").read_bytes()
    file, out = tmp_path / "model.compact", tmp_path / "out"
    out.mkdir()
    for data in (b"", good[:7], good[:40], good[:-9], b"x" + good[1:], good[:8] + b"\xff" * 8 + good[16:]):
        file.write_bytes(data)
        with pytest.raises(Corrupt):
            compact.unpack(file, out)
    for at in range(16, 400, 13):  # a wrong byte in the header
        data = bytearray(good)
        data[at] ^= 0x55
        file.write_bytes(bytes(data))
        try:
            compact.unpack(file, out)
        except Corrupt:
            continue
    with pytest.raises(Unsupported):
        compact.save(Checkpoint.open(_gguf(tmp_path)), out, lambda *a: None)


def _gguf(folder: Path) -> Path:
    from tests.conftest import write_llama

    model = write_llama(folder / "small")
    wherry.export(model, folder / "gguf", "gguf")
    return next((folder / "gguf").glob("*.gguf"))
