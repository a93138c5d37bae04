"""The whole line on a tiny model: compress, export, prove, serve, answer over HTTP; one set of codes everywhere."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from wherry import api, choose, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.report import Report
from wherry.serve.app import create_app
from wherry.serve.listen import serving
from wherry.session import Sampling

FORMATS = ("gguf", "onnx")


@pytest.fixture(scope="module", params=["gptq:scheme=W4A16_ASYM,group_size=32", "rtn:scheme=W3A16,group_size=64"])
def delivered(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("line") / "out"
    report = api.compress(tiny_llama, out, request.param, FORMATS, samples=8, length=64)
    verdict = report.get("verdict")
    assert verdict is not None
    assert verdict.value == "PASS", [row for row in report if row.value is False]
    return out


def test_all_formats_decode_to_the_same_weights_by_foreign_code(delivered: Path) -> None:
    """compressed-tensors' decompressor, the gguf package and ONNX Runtime give equal float32 bytes for every tensor."""
    decoded = {}
    for artifact in choose.artifacts(delivered):
        decoded[artifact.format] = dict(shelf.find("formats", artifact.format).decode(artifact))
    base = decoded.pop("compressed_tensors")
    quantized = [row["name"] for row in Artifact.open(delivered).manifest["plan"] if row["scheme"]]
    for name, weights in decoded.items():
        assert set(quantized) <= set(weights), name
        for tensor in base:
            if tensor in weights:
                assert np.array_equal(base[tensor], weights[tensor]), (name, tensor)
    print(f"{len(base)} tensors compared, {len(quantized)} quantized, in {', '.join(['compressed_tensors', *decoded])}")


def test_every_runtime_says_what_torch_says(delivered: Path) -> None:
    report = Report.load(delivered / "report.json")
    for where in FORMATS:
        kl = report.get("kl to the checkpoint", where)
        assert kl is not None
        assert isinstance(kl.value, float)
        assert kl.value <= 1e-3, (where, kl)


def test_stock_transformers_loads_it(delivered: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(delivered)
    ids = torch.tensor([checkpoint.task.encode("In the beginning was the word, and the word was light.")])
    stock = AutoModelForCausalLM.from_pretrained(delivered, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, checkpoint.module()(ids).logits)


@pytest.mark.parametrize(("format", "runtime"), [("gguf", "llamacpp"), ("onnx", "onnxruntime")])
def test_it_answers_over_http(delivered: Path, format: str, runtime: str) -> None:
    artifact = Artifact.open(delivered / format)
    session = shelf.find("runtimes", runtime).load(artifact, threads=1)
    expected = list(session.generate(artifact.task.encode("In the beginning"), Sampling(max_tokens=8)))
    with serving(create_app(session, artifact)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="In the beginning", max_tokens=8, temperature=0)
        assert answer.choices[0].text == artifact.task.tokenizer.decode(expected)
        asked: Any = [{"role": "user", "content": "Who?"}]  # greedy: a drawn answer may end before its first word
        chat = client.chat.completions.create(model=model, messages=asked, max_tokens=4, temperature=0)
        assert chat.usage is not None
        assert 0 < chat.usage.completion_tokens <= 4
    session.close()


def test_auto_takes_the_fastest_and_a_slower_one_flips_it(delivered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, artifact, report = choose.open_session(delivered, "auto", threads=1)
    session.close()
    runs = {row.where: row.value for row in report.select("quick run")}
    built = importlib.util.find_spec("wherry_native") is not None  # it runs two of the three formats
    assert len(runs) == (5 if built else 3)
    fastest = min(runs, key=lambda where: runs[where] or 0)
    assert fastest.startswith(artifact.format)
    real = choose.quick

    def slowed(session: object, artifact: Artifact) -> float:
        return real(session, artifact) + (1000.0 if fastest.startswith(artifact.format) else 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "quick", slowed)
    session, other, _ = choose.open_session(delivered, "auto", threads=1)
    session.close()
    assert other.format != artifact.format


def test_encoder_to_int8_onnx(tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.compress(tiny_bert, out, None, ("onnx",), samples=16)
    verdict = report.get("verdict")
    assert verdict is not None
    assert verdict.value == "PASS", [row for row in report if row.value is False]
    near = report.get("embedding agreement", "onnx")
    assert near is not None
    assert isinstance(near.value, float)
    assert near.value > 0.99
    artifact = Artifact.open(out / "onnx")
    session = shelf.find("runtimes", "onnxruntime").load(artifact, threads=1)
    with serving(create_app(session, artifact)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        vectors = client.embeddings.create(model=model, input=["A boat.", "A light boat."]).data
        got = np.array([v.embedding for v in vectors])
    inputs = artifact.task.batch(["A boat.", "A light boat."])
    expected = artifact.task.answer(session.predict(inputs), inputs)
    session.close()
    np.testing.assert_allclose(got, expected, atol=2e-2)  # a batch of another size may be padded otherwise


def test_lora_is_merged_on_the_way_in(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "model.layers.1.mlp.up_proj"
    A, B = torch.randn(4, 64), torch.randn(128, 4)
    prefix = f"base_model.model.{name}"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"base_model_name_or_path": str(tiny_llama), "r": 4, "lora_alpha": 8, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base, merged = Checkpoint.open(tiny_llama), Checkpoint.open(tmp_path)
    torch.testing.assert_close(merged.weight(f"{name}.weight"), base.weight(f"{name}.weight") + 2.0 * (B @ A))
    assert torch.equal(merged.weight("model.norm.weight"), base.weight("model.norm.weight"))


def test_the_same_run_twice_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        api.compress(tiny_llama, tmp_path / name / "out", "gptq:scheme=W4A16,group_size=32", samples=4, length=64)
        folders.append(tmp_path / name / "out")
    listing = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in folders]
    assert listing[0] == listing[1]
    different = [n for n in listing[0] if (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()]
    assert [n for n in different if "out" not in (folders[0] / n).read_text(errors="replace")] == []
    assert not [n for n in different if n.endswith((".safetensors", "config.json", "wherry.json", ".yaml"))]
