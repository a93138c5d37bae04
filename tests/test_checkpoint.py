"""Checkpoint: it reads what transformers reads; adapters are merged as peft defines it; nothing is read early."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import wherry
from tests.conftest import write_llama
from wherry.checkpoint import Checkpoint, natural
from wherry.errors import Corrupt, Missing


def shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({n: tensors[n] for n in own}, model / file)
    index = {"weight_map": {n: file for file, own in halves.items() for n in own}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
def test_the_module_is_that_of_transformers(tmp_path: Path, tied: bool, sharded: bool) -> None:
    model = write_llama(tmp_path / "m", tied=tied)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    if sharded:
        shard(model)
    checkpoint = Checkpoint.open(model)
    assert checkpoint.tied == tied
    assert ("lm_head.weight" in checkpoint.names()) != tied
    with torch.no_grad():
        assert torch.equal(checkpoint.module()(ids).logits, wanted)


def test_an_encoder_too(tiny_bert: Path) -> None:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(tiny_bert, dtype=torch.float32, add_pooling_layer=False)(
            ids
        ).last_hidden_state
        assert torch.equal(Checkpoint.open(tiny_bert).module()(ids).last_hidden_state, wanted)


def test_opening_reads_no_weights(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wherry import tensorfile

    monkeypatch.setattr(tensorfile.TensorFile, "read", lambda self, name: pytest.fail(f"read {name}"))
    checkpoint = Checkpoint.open(tiny_llama)
    assert checkpoint.params > 0
    assert all(parameter.is_meta for parameter in checkpoint.skeleton().parameters())


def test_layers_are_in_numeric_order(tmp_path: Path) -> None:
    names = Checkpoint.open(write_llama(tmp_path / "m", layers=11)).names()
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert sorted(["a.10.b", "a.2.b", "a.b"], key=natural) == ["a.2.b", "a.10.b", "a.b"]


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged(tmp_path: Path, tiny_llama: Path, rslora: bool) -> None:
    """W + scaling B A, scaling = alpha / r, or alpha / sqrt(r) for rslora: peft's definition, in float64."""
    adapter, layer = tmp_path / "adapter", "model.layers.1.mlp.up_proj"
    adapter.mkdir()
    A, B = torch.randn(4, 64), torch.randn(128, 4)
    save_file(
        {f"base_model.model.{layer}.lora_A.weight": A, f"base_model.model.{layer}.lora_B.weight": B},
        adapter / "adapter_model.safetensors",
    )
    config = {"base_model_name_or_path": str(tiny_llama), "r": 4, "lora_alpha": 6, "use_rslora": rslora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base, merged = Checkpoint.open(tiny_llama), Checkpoint.open(adapter)
    scaling = 6 / 2 if rslora else 6 / 4
    wanted = base.weight(f"{layer}.weight").double() + scaling * (B.double() @ A.double())
    assert torch.allclose(merged.weight(f"{layer}.weight").double(), wanted, atol=1e-5)
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged.weight(other), base.weight(other))
    assert merged.source.fingerprint() != base.source.fingerprint()


def test_the_fingerprint_follows_the_files(tmp_path: Path, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    before = Checkpoint.open(model).source.fingerprint()
    assert Checkpoint.open(model).source.fingerprint() == before
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(model).source.fingerprint() != before


def test_shapes_must_fit_the_configuration(tmp_path: Path, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    for change in ({"intermediate_size": 96}, {"vocab_size": 500}, {"num_hidden_layers": 3}):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        checkpoint = Checkpoint.open(model)
        with pytest.raises(Corrupt):
            checkpoint.places(checkpoint.skeleton())


def test_no_such_model(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere.gguf"):
        with pytest.raises(Missing):
            Checkpoint.open(name)


@pytest.fixture(scope="module")
def packed_llama(tiny_llama, tmp_path_factory):
    """The tiny model in W4A16, with its GGUF file."""
    out = tmp_path_factory.mktemp("packed") / "out"
    wherry.compress(tiny_llama, out, "rtn:scheme=W4A16_ASYM,group_size=32", formats=["gguf"])
    return out


@pytest.mark.parametrize(
    "file", ["model.safetensors", "embedding-scales.safetensors", "config.json", "wherry.json", "task.json", "gguf"]
)
def test_a_damaged_file_of_a_compressed_folder_is_refused_in_a_sentence(tmp_path, packed_llama, file):
    root = shutil.copytree(packed_llama, tmp_path / "model")
    victim = next((root / "gguf").glob("*.gguf")) if file == "gguf" else root / file
    good, drawn = victim.read_bytes(), np.random.default_rng(len(file))
    said = []
    for _ in range(80):
        damaged = bytearray(good)
        for _ in range(drawn.integers(1, 6)):
            damaged[drawn.integers(min(len(good), 4000))] = drawn.integers(256)
        victim.write_bytes(damaged[: drawn.integers(len(good))] if drawn.random() < 0.2 else damaged)
        try:
            checkpoint = Checkpoint.open(victim if file == "gguf" else root)
            for name in checkpoint.names():
                checkpoint.tensor(name)
        except wherry.Error as error:
            said.append(str(error))
    victim.write_bytes(good)
    assert Checkpoint.open(root).names()
    assert len(said) >= 20
    assert all(text.strip() and len(text) < 2000 for text in said)
