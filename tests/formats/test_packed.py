"""GPTQ's and AWQ's files against decoders written from the source code of AutoGPTQ and AutoAWQ, nibble by nibble."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import write_llama
from wherry import api, deliver
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import Corrupt, Unsupported
from wherry.evaluate import proof
from wherry.formats import awq, gptq
from wherry.recipe import Recipe
from wherry.runtimes import torch as runtime
from wherry.scheme import QTensor, Scheme

GEMM_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("original") / "llama")


def exported(original: Path, out: Path, recipe: str, *names: str) -> Path:
    """The checkpoint, with exports inside; not proved here."""
    plan = Recipe.parse(recipe).plan(Checkpoint.open(original), names)
    deliver.deliver(plan, out, names, [], {}, lambda result: None, api.quiet)
    return out


def by_autogptq(t: dict[str, np.ndarray], layer: str, bits: int, offset: int) -> np.ndarray:
    """dequantize of qlinear_cuda.py, its broadcasts as loops over words; w [n, k]."""
    qweight, qzeros = (t[f"{layer}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    scales, g_idx, mask = t[f"{layer}.scales"].astype(np.float32), t[f"{layer}.g_idx"], (1 << bits) - 1
    per = 32 // bits
    k, n = qweight.shape[0] * per, qweight.shape[1]
    code, zero = np.zeros((k, n), np.int64), np.zeros((len(qzeros), n), np.int64)
    for i in range(per):
        code[i::per] = qweight >> np.uint32(bits * i) & mask
        zero[:, i::per] = qzeros >> np.uint32(bits * i) & mask
    return (scales[g_idx] * (code - (zero + offset)[g_idx])).T


def by_autoawq(t: dict[str, np.ndarray], layer: str) -> np.ndarray:
    """The opposite of WQLinear_GEMM.from_linear, which puts output 8 c + order[i] at bit 4 i of word c; w [n, k]."""
    qweight, qzeros = (t[f"{layer}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    scales = t[f"{layer}.scales"].astype(np.float32)
    code, zero = np.zeros((len(qweight), 8 * qweight.shape[1])), np.zeros(scales.shape)
    for i, place in enumerate(GEMM_ORDER):
        code[:, place::8] = qweight >> np.uint32(4 * i) & 15
        zero[:, place::8] = qzeros >> np.uint32(4 * i) & 15
    group = len(code) // len(scales)
    return ((code - zero.repeat(group, 0)) * scales.repeat(group, 0)).T


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("gptq", "W4A16,group_size=32"), ("gptq", "W2A16_ASYM,group_size=64"), ("awq", "W4A16_ASYM,group_size=32"),
        pytest.param("gptq", "W4A16_ASYM,group_size=32", marks=pytest.mark.slow),
        pytest.param("gptq", "W8A16,group_size=-1", marks=pytest.mark.slow),
        pytest.param("awq", "W4A16,group_size=64", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_independent_decoders_see_the_same_weights(original, tmp_path, name, scheme):
    exported(original, tmp_path / "out", f"rtn:scheme={scheme}", name)
    made, artifact = Checkpoint.open(tmp_path / "out"), Artifact.open(tmp_path / "out" / name)
    tensors = load_file(artifact.path / "model.safetensors")
    told = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == name
    assert told["group_size"] == Scheme.parse(scheme).group_size or told["group_size"] == -1
    layers = [row["name"] for row in made.plan if row["role"] == "linear"]
    assert len(layers) == 14
    for weight in layers:
        layer = weight.removesuffix(".weight")
        offset = 1 if told.get("checkpoint_format") == "gptq" else 0
        found = by_autoawq(tensors, layer) if name == "awq" else by_autogptq(tensors, layer, told["bits"], offset)
        assert np.array_equal(found.astype(np.float32), made.weight(weight).numpy()), weight
    source = Checkpoint.open(original)
    report = proof.structure(artifact, artifact_tensors(artifact), lambda n: source.weight(n).numpy())
    assert not [row for row in report if row.value is False]
    again = Checkpoint.open(artifact.path)
    assert again.names() == made.names()
    assert all(again.shape(n) == made.shape(n) for n in made.names())
    ids = list(range(4, 40))
    ours, theirs = (runtime.over(c).score(ids).logits for c in (made, again))
    assert np.array_equal(ours, theirs)


def artifact_tensors(artifact: Artifact):
    return {"gptq": gptq, "awq": awq}[artifact.format].decode(artifact)


@pytest.mark.slow
def test_verify_runs_it_in_torch(original, tmp_path):
    exported(original, tmp_path / "out", "rtn:scheme=W4A16_ASYM,group_size=32", "awq")
    report = api.verify(tmp_path / "out" / "awq", original, speed=False, max_kl=9, max_ratio=99)
    assert report.get("verdict").value == "PASS"
    assert report.get("fact: runtime", "awq").value == "torch"


def test_codes_of_every_value_survive():
    g = torch.Generator().manual_seed(0)
    for module, text in ((gptq, "W4A16_ASYM"), (gptq, "W2A16"), (gptq, "W8A16_ASYM"), (awq, "W4A16_ASYM")):
        scheme = Scheme.parse(f"{text},group_size=32")
        code = torch.randint(scheme.qmin, scheme.qmax + 1, (96, 64), generator=g, dtype=torch.int8)
        zero = None if scheme.symmetric else torch.randint(scheme.qmin, scheme.qmax + 1, (96, 2), dtype=torch.int8)
        scale = torch.rand(96, 2, generator=g).half().float()
        back = module.whole(module.parts(QTensor(scheme, code, scale, zero)), scheme)
        assert torch.equal(back.code, code)
        assert torch.equal(back.scale, scale)
        assert zero is None or torch.equal(back.zero, zero)


@pytest.mark.parametrize(
    ("name", "recipe", "said"),
    [
        ("gptq", "rtn:scheme=W3A16,group_size=32", "the nearest that it can is W4A16"),
        ("awq", "rtn:scheme=W8A16,group_size=32", "the nearest that it can is W4A16_ASYM"),
        ("gptq", "rtn:scheme=W4A16,group_size=32,portable=false", "float16"),
        ("gptq", "rtn:scheme=W4A16,group_size=32,ignore=down_proj", "awq and gguf can mix"),
        ("awq", "rtn:scheme=W4A16,group_size=32,targets=q_proj | rtn:scheme=W4A16,group_size=64", "one scheme"),
        ("awq", "mixed:schemes=W4A16;W4A16_ASYM,bits=5 | rtn:scheme=W4A16,group_size=32", "chooses among"),
    ],
)
def test_what_they_cannot_hold_is_refused_before_work(original, name, recipe, said):
    with pytest.raises(Unsupported, match=said):
        Recipe.parse(recipe).plan(Checkpoint.open(original), (name,))


def test_strange_files_are_refused(original, tmp_path):
    exported(original, tmp_path / "out", "rtn:scheme=W4A16_ASYM,group_size=32", "gptq", "awq")

    def told(name: str, **change: object) -> Path:
        file = tmp_path / "out" / name / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"] |= change
        file.write_text(json.dumps(config))
        return file.parent

    with pytest.raises(Unsupported, match="gptq_v2"):
        Checkpoint.open(told("gptq", checkpoint_format="gptq"))
    with pytest.raises(Unsupported, match="3 bits"):
        Checkpoint.open(told("gptq", checkpoint_format="gptq_v2", bits=3))
    with pytest.raises(Unsupported, match="gemm"):
        Checkpoint.open(told("awq", version="gemv"))
    scheme = Scheme.parse("W4A16,group_size=32")
    have = gptq.parts(QTensor(scheme, torch.zeros(32, 64).char(), torch.ones(32, 2)))
    have["g_idx"] = have["g_idx"].flip(0)
    with pytest.raises(Unsupported, match="out of order"):
        gptq.whole(have, scheme)
    folder = told("awq", version="gemm")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    tensors = load(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.scales")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Corrupt, match="no scales"):
        Checkpoint.open(folder)
