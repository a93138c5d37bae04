"""Sabotage: an artifact is changed and its manifest made right again; the proof must still see it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_bert, write_llama
from wherry import api
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.evaluate import drift, proof, weights
from wherry.formats import compressed_tensors
from wherry.prove import turned
from wherry.report import Report, Row
from wherry.runtimes import torch as runtime
from wherry.scheme import Scheme

Q = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("original") / "llama", hidden=128)


@pytest.fixture(scope="module")
def compressed(original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "w4"
    api.compress(original, out, "rtn:scheme=W4A16_ASYM,group_size=32")
    return out


def reader(original: Path):
    checkpoint = Checkpoint.open(original)
    return lambda name: checkpoint.weight(name).numpy()


def prove(folder: Path, original: Path | None) -> Report:
    artifact = Artifact.open(folder)
    decoded = compressed_tensors.decode(artifact)  # compressed-tensors' own decompressor
    report = proof.structure(artifact, decoded, reader(original) if original else None)
    if original:
        template = None
        report.extend(proof.same_task(artifact.task, Checkpoint.open(original).task, template, artifact.format))
    return report


def failed(report: Report) -> set[str]:
    return {row.what.removeprefix("check: ") for row in report if row.what.startswith("check: ") and row.value is False}


def reseal(folder: Path, original: Path | None = None) -> None:
    """Make the manifest right again: hashes, and with `original` also every digest and error, as a forger would."""
    manifest = json.loads((folder / "wherry.json").read_text())
    artifact = Artifact.open(folder)
    if original:
        source = turned(Checkpoint.open(original), artifact)
        for name, v in compressed_tensors.decode(artifact):
            row = next(row for row in manifest["plan"] if row["name"] == name)
            w = source.weight(name).numpy()
            row["digest"] = proof.digest(v)
            row["error"] = float(np.linalg.norm(v - w) / np.linalg.norm(w))
    manifest.pop("files")
    Artifact.seal(folder, **manifest)


@pytest.fixture
def victim(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "victim"))


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_honest_artifact_passes(compressed, original):
    report = prove(compressed, original)
    assert failed(report) == set()
    assert not [row for row in report if row.value is None]
    assert proof.verdict(report)
    errors = report.select("weight error")
    assert len(errors) == 15  # 7 linears in 2 layers, and the embedding
    recorded = {row["name"]: row["error"] for row in Artifact.open(compressed).manifest["plan"]}
    for row in errors:
        assert row.value == pytest.approx(recorded[row.where], rel=1e-3)


def scaled(t):
    t[f"{Q.format(1)}.weight_scale"] *= 1.02


def shrunk(t):
    t[f"{Q.format(1)}.weight_scale"] *= 0.98


def swapped(t):
    for part in ("weight_packed", "weight_scale", "weight_zero_point"):
        a, b = f"{Q.format(0)}.{part}", f"{Q.format(1)}.{part}"
        t[a], t[b] = t[b].clone(), t[a].clone()


def zeroed(t):
    t[f"{Q.format(0)}.weight_scale"][5, 1] = 0


def one_norm(t):
    t["model.norm.weight"] *= 1.02


def noisy(t):
    t[f"{Q.format(0)}.weight_packed"][:] = torch.randint(-(2**31), 2**31, t[f"{Q.format(0)}.weight_packed"].shape)


SABOTAGES = {
    scaled: "weights of the original",
    shrunk: "weights of the original",
    swapped: "weights of the original",
    zeroed: "no zero scale",
    one_norm: "weights of the original",
    noisy: "weights of the original",
}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_sabotage_with_a_perfect_manifest_fails(victim, original, sabotage):
    edit(victim, sabotage)
    reseal(victim, original)
    report = prove(victim, original)
    assert SABOTAGES[sabotage] in failed(report)
    assert "decodes to the plan's weights" not in failed(report)  # the forger made the digests right
    assert not proof.verdict(report)


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_sabotage_with_right_hashes_fails_without_the_original(victim, sabotage):
    edit(victim, sabotage)
    reseal(victim)
    assert "decodes to the plan's weights" in failed(prove(victim, None))


def test_a_swapped_tensor_is_named_as_such(victim, original):
    edit(victim, swapped)
    reseal(victim, original)
    note = prove(victim, original).get("check: weights of the original").note
    assert "q_proj.weight: error 1.4" in note
    assert "looks like another tensor" in note


def test_a_changed_file_fails_at_once(victim, original):
    edit(victim, scaled)
    report = prove(victim, original)
    assert failed(report) == {"hashes"}
    assert "differs from its manifest" in report.get("check: hashes").note


def test_a_file_that_is_not_listed_fails(victim):
    (victim / "extra.py").write_text("print('hello')")
    assert failed(prove(victim, None)) == {"hashes"}


def test_a_float_copy_and_a_missing_tensor_fail(victim, original):
    def change(t):
        t["model.spare.weight"] = torch.zeros(64, 64)
        del t["model.norm.weight"]

    edit(victim, change)
    reseal(victim)
    assert {"no second copy", "all tensors present"} <= failed(prove(victim, original))


def test_floats_that_pretend_to_be_codes_fail(compressed, original):
    artifact = Artifact.open(compressed)
    read = reader(original)
    decoded = ((name, read(name)) for name, _ in compressed_tensors.decode(artifact))
    report = proof.structure(artifact, decoded, read)
    assert "quantized as planned" in failed(report)
    assert "32 values in one group where 16 codes exist" in report.get("check: quantized as planned").note


def test_twice_the_same_tensor_fails(compressed):
    artifact = Artifact.open(compressed)
    rows = list(compressed_tensors.decode(artifact))
    assert failed(proof.structure(artifact, iter([*rows, rows[0]]))) == {"no second copy"}


def test_nan_fails(victim, original):
    def change(t):
        t[f"{Q.format(0)}.weight_scale"][0, 0] = float("nan")

    edit(victim, change)
    reseal(victim, original)
    assert "no NaN or infinity" in failed(prove(victim, original))


def test_a_second_copy_hidden_in_a_weight_file_fails(compressed):
    """A copy under no tensor name at all shows in the size."""
    artifact = Artifact.open(compressed)
    assert proof.verdict(proof.structure(artifact, compressed_tensors.decode(artifact), slack_bytes=60_000))
    files = {**artifact.manifest["files"]}
    copy = sum(np.prod(row["shape"]) * 2 for row in artifact.manifest["plan"])
    files["model.safetensors"] = {
        **files["model.safetensors"],
        "bytes": files["model.safetensors"]["bytes"] + int(copy),
    }
    fat = Artifact(artifact.path, {**artifact.manifest, "files": files, "wherry": ""})
    assert failed(proof.structure(fat, compressed_tensors.decode(artifact), slack_bytes=60_000)) == {"size as forecast"}


def rewrite(folder: Path, name: str, change) -> None:
    file = folder / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    reseal(folder)


def test_a_wrong_chat_template_fails(victim, original):
    def change(config):
        config["chat_template"] = config["chat_template"].replace("assistant", "user")
        return config

    rewrite(victim, "tokenizer_config.json", change)
    report = prove(victim, original)
    assert failed(report) == {"chat template"}
    assert "differs at character" in report.get("check: chat template").note


def test_a_wrong_chat_template_inside_the_main_file_fails(compressed, original):
    a, b = Artifact.open(compressed).task, Checkpoint.open(original).task
    right = b.tokenizer_config["chat_template"]
    assert proof.verdict(proof.same_task(a, b, right))
    assert failed(proof.same_task(a, b, right + " ")) == {"chat template"}
    assert failed(proof.same_task(a, b, "")) == {"chat template"}


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("generation_config.json", lambda c: {**c, "eos_token_id": 7}, "stop tokens"),
        ("tokenizer_config.json", lambda c: {**c, "bos_token": "[PAD]"}, "special tokens"),
        ("tokenizer.json", lambda c: {**c, "added_tokens": c["added_tokens"][:-1]}, "tokenizer"),
        ("wherry.json", lambda c: {**c, "task": {**c["task"], "max_length": 17}}, "task"),
    ],
)
def test_a_changed_task_fails(victim, original, file, change, what):
    rewrite(victim, file, change)
    assert what in failed(prove(victim, original))


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn:scheme=W2A16,group_size=32", "rtn:scheme=W3A16_ASYM,group_size=64", "rtn:scheme=W4A16,group_size=-1",
        "rtn:scheme=W4A16,group_size=128,portable=false", "rtn:scheme=W8A16", "gptq:scheme=W4A16_ASYM,group_size=64",
        "gptq:scheme=W3A16,group_size=32", "gptq:scheme=W2A16_ASYM,group_size=32",
    ],
)  # fmt: skip
def test_no_false_alarm(original, tmp_path, recipe):
    api.compress(original, tmp_path / "out", recipe, samples=8, length=128)
    report = prove(tmp_path / "out", original)
    assert failed(report) == set()


def test_no_false_alarm_on_an_encoder(tmp_path):
    bert = write_bert(tmp_path / "bert")
    api.compress(bert, tmp_path / "out", "rtn:scheme=W8A8_STATIC")
    report = prove(tmp_path / "out", bert)
    assert failed(report) == set()
    assert report.get("check: chat template") is None


def test_a_group_that_was_constant_before_is_no_lost_scale():
    scheme = Scheme.parse("W4A16,group_size=32")
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    w[1, :32] = 0
    v, _ = weights.rounded(w, scheme, 32)
    assert weights.lost_scales(v, scheme, w) == 0
    assert weights.lost_scales(v, scheme, None) is None
    v[2, 32:] = -0.25
    assert weights.lost_scales(v, scheme, w) == 1


def test_scales_fitted_by_least_squares_pass_and_smaller_ones_do_not():
    """Where scales minimise the error, <w, v> = <v, v>: the slope is 1 - e^2, far below rounding's, and still right."""
    scheme = Scheme.parse("W2A16,group_size=32")
    w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    plain = weights.rounded(w, scheme, 32)[0].reshape(-1, 32)
    groups = w.reshape(-1, 32)
    best = (groups * plain).sum(-1, keepdims=True) / (plain * plain).sum(-1, keepdims=True) * plain
    fitted = weights.compare(w, best.reshape(w.shape), scheme)
    assert fitted.slope == pytest.approx(1 - fitted.error**2, abs=1e-5)
    assert fitted.slope < 0.95
    assert fitted.problem == ""
    assert "scaled down" in weights.compare(w, 0.98 * best.reshape(w.shape), scheme).problem


def test_plain_rounding_is_that_of_torch():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True)) / 15, None
    zero = torch.round(-8 - w.amin(-1, keepdim=True) / scale)
    expected = torch.cat([
        torch.fake_quantize_per_channel_affine(row[None], s, z.int(), 0, -8, 7)
        for row, s, z in zip(w, scale, zero, strict=True)
    ])  # fmt: skip
    ours, step = weights.rounded(w.numpy(), Scheme.parse("W4A16_ASYM,group_size=-1"), 64)
    assert ours == pytest.approx(expected.numpy(), abs=1e-6)
    assert step == pytest.approx(scale[:, 0].numpy())


def test_behaviour_of_a_damaged_model_fails(compressed, victim, original):
    windows = np.random.default_rng(0).integers(4, 512, (4, 64))
    base = runtime.over(Checkpoint.open(original))
    good = drift.compare(base, runtime.load(Artifact.open(compressed)), windows, "w4")
    checks = proof.behaviour(good, "w4", kl_limit=2.0, ratio_limit=None)
    assert proof.verdict(checks)
    assert "at most 2 nats/token" in checks.get("check: kl").note
    edit(victim, noisy)
    reseal(victim)
    bad = drift.compare(base, runtime.load(Artifact.open(victim)), windows, "w4")
    limit = (good.get("kl", "w4").high + bad.get("kl", "w4").low) / 2
    assert failed(proof.behaviour(bad, "w4", kl_limit=limit, ratio_limit=None)) == {"kl"}


def test_behaviour_looks_at_the_bad_end_of_the_interval():
    row = Row("kl", "a", 0.4, "nats/token", 0.3, 0.6)
    report = Report(rows=[Row("perplexity", "a", 9.0), row, Row("perplexity ratio", "a", 1.1, "", 1.0, 1.2)])
    assert failed(proof.behaviour(report, "a")) == {"kl"}
    report.rows[1] = replace(row, high=0.5)
    assert proof.verdict(proof.behaviour(report, "a"))
    report.rows.append(Row("top-1 agreement", "a", 99.2, "%", 98.9, 99.5))
    assert failed(proof.behaviour(report, "a", top1_limit=99)) == {"top-1 agreement"}
    report.rows.append(Row("kl", "a", None, "nats/token", note="not finite"))
    assert failed(proof.behaviour(report, "a")) == {"finite outputs", "kl"}


def test_nothing_checked_is_not_a_pass():
    report = Report(rows=[Row("check: x", "", None, note="not made")])
    assert not proof.verdict(report)
    assert proof.conclude(report).get("verdict").value == "FAIL"
    report = proof.conclude(Report(rows=[Row("check: x", "", True), Row("check: y", "", None)]))
    assert report.get("verdict").value == "PASS"
    assert report.get("verdict").note == "1 checks passed, 1 not made"
