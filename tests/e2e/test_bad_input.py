"""Bad input through the real command line: one to three lines, a code that is not zero, nothing left behind.

Most cases call `wherry.cli.main` in this process with sys.argv set; some run `python -m wherry`. The error's text is
checked for the word that tells a user what to do.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_llama

RTN = "rtn:scheme=W4A16,group_size=32"
GPTQ = "gptq:scheme=W4A16,group_size=32"
FEW = ["--samples", "2", "--length", "32"]


@dataclass
class Said:
    code: int
    error: str
    out: str


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size if p.is_file() else -1 for p in sorted(folder.rglob("*"))
    }


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process."""
    from wherry import cli

    def call(*words: str | Path) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["wherry", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return Said(code, said.err, said.out)

    return call


def message(said: Said) -> list[str]:
    """The error's lines, after whatever was said of progress; checked for what every error must be."""
    assert said.code not in (0, 1), f"exit code {said.code}: {said.error}"
    assert "Traceback" not in said.error
    assert "fault of wherry" not in said.error
    lines = said.error.strip().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    found = lines[begin:]
    assert 1 <= len(found) <= 3, found
    assert all(len(line) < 400 for line in found), found
    assert lines[begin] != "error: "
    return found


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refuses(run: Run, folder: Path, words: list[str | Path], *wanted: str) -> list[str]:
    """Run; the error must hold the wanted words; the folder must be as it was."""
    before = tree(folder)
    lines = message(run(*words))
    text = "\n".join(lines)
    for word in wanted:
        assert word in text, text
    assert tree(folder) == before
    return lines


# ---- damaged models -------------------------------------------------------------------------------------------


def shard(model: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({n: tensors[n] for n in own}, model / file)
    index = {"metadata": {}, "weight_map": {n: file for file, own in halves.items() for n in own}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def config(model: Path, **values: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def missing_shard(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def shard_without_promise(model: Path) -> None:
    shard(model)
    save_file({"other": torch.zeros(2)}, model / "model-00002-of-00002.safetensors")


def index_not_json(model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text("{oops")


def index_is_a_list(model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def shard_outside(model: Path) -> None:
    shard(model)
    file = model / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00001-of-00002", "../other"))


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)


def truncated_in_header(model: Path) -> None:
    with open(model / "model.safetensors", "r+b") as handle:
        handle.truncate(100)


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def junk_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{this is no json" + b"\0" * 64)


def huge_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 8 + b"\0" * 64)


def header(model: Path, **entry: object) -> None:
    """A header with one entry, and 16 bytes of data."""
    values = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **entry}
    raw = json.dumps({"model.norm.weight": values}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 16)


def header_is_a_list(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def html_page(model: Path) -> None:
    (model / "model.safetensors").write_text("<!DOCTYPE html><html><body>404 Not Found, and a long text</body></html>")


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 269060552\n"
    )


def nan(model: Path) -> None:
    edit(model, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(float("nan")))


def inf_in_norm(model: Path) -> None:
    edit(model, lambda t: t["model.layers.1.input_layernorm.weight"].view(-1)[5].fill_(float("inf")))


def nan_in_embedding(model: Path) -> None:
    edit(model, lambda t: t["model.embed_tokens.weight"].view(-1)[5].fill_(float("nan")))


def lacks_a_weight(model: Path) -> None:
    edit(model, lambda t: t.__delitem__("model.layers.0.mlp.up_proj.weight"))


def other_shape(model: Path) -> None:
    edit(model, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32)}))


def other_depth(model: Path) -> None:
    config(model, num_hidden_layers=3)


def config_not_json(model: Path) -> None:
    (model / "config.json").write_text("{'model_type': llama")


def config_is_a_list(model: Path) -> None:
    (model / "config.json").write_text("[1, 2]")


def config_wrong_type(model: Path) -> None:
    config(model, hidden_size="sixty-four")


def config_heads(model: Path) -> None:
    config(model, num_attention_heads=5)


def config_unknown_model(model: Path) -> None:
    config(model, model_type="nosuch")


def config_no_model_type(model: Path) -> None:
    file = model / "config.json"
    values = json.loads(file.read_text())
    del values["model_type"]
    file.write_text(json.dumps(values))


def config_other_task(model: Path) -> None:
    config(model, architectures=["LlamaForQuestionAnswering"])


def config_quantized(model: Path) -> None:
    config(model, quantization_config={"quant_method": "awq", "bits": 4})


def config_quantized_junk(model: Path) -> None:
    config(
        model,
        quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"]}}},
    )


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def task_not_json(model: Path) -> None:
    (model / "task.json").write_text("{")


def float8(model: Path) -> None:
    header(model, dtype="F4_E2M1", shape=[32])


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (missing_shard, RTN, "missing shard"),
    (shard_without_promise, RTN, "promises"),
    (index_not_json, RTN, "index"),
    (index_is_a_list, RTN, "index"),
    (shard_outside, RTN, "outside"),
    (truncated, RTN, "truncated"),
    (truncated, GPTQ, "truncated"),
    (truncated_in_header, RTN, "not a safetensors file"),
    (empty, RTN, "not a safetensors file"),
    (junk_header, RTN, "junk"),
    (huge_header, RTN, "not a safetensors file"),
    (header_is_a_list, RTN, "junk"),
    (html_page, RTN, "not a safetensors file"),
    (lfs_pointer, RTN, "not a safetensors file"),
    (lambda m: header(m, shape=[5]), RTN, "does not fit"),
    (lambda m: header(m, shape=[-4]), RTN, "does not fit"),
    (lambda m: header(m, shape="four"), RTN, "junk"),
    (lambda m: header(m, data_offsets=[-16, 0]), RTN, "does not fit"),
    (lambda m: header(m, data_offsets=[0]), RTN, "junk"),
    (float8, RTN, "F4_E2M1"),
    (nan, RTN, "NaN"),
    (nan, GPTQ, "model.layers.1.mlp.up_proj.weight"),
    (inf_in_norm, RTN, "model.layers.1.input_layernorm.weight"),
    (inf_in_norm, GPTQ, "infinite"),
    (nan_in_embedding, RTN, "model.embed_tokens.weight"),
    (lacks_a_weight, RTN, "model.layers.0.mlp.up_proj.weight"),
    (other_shape, RTN, "model.layers.0.mlp.up_proj.weight"),
    (other_shape, GPTQ, "shape"),
    (other_depth, RTN, "lacks"),
    (config_not_json, RTN, "is not JSON"),
    (config_is_a_list, RTN, "config.json"),
    (config_wrong_type, RTN, "config"),
    (config_heads, RTN, "config"),
    (config_unknown_model, RTN, "nosuch"),
    (config_no_model_type, RTN, "model_type"),
    (config_other_task, RTN, "task"),
    (config_quantized, RTN, "awq"),
    (config_quantized_junk, RTN, "quantization_config"),
    (no_config, RTN, "config.json"),
    (no_weights, RTN, "model.safetensors"),
    (pickled, RTN, "pickled"),
    (task_not_json, RTN, "task.json"),
]


@pytest.mark.parametrize(
    ("damage", "recipe", "wanted"),
    DAMAGE,
    ids=[f"{d.__name__}-{r[:4].strip(':')}-{i}" for i, (d, r, _) in enumerate(DAMAGE)],
)
def test_a_damaged_model(run: Run, model: Path, damage: Callable[[Path], None], recipe: str, wanted: str) -> None:
    damage(model)
    more = FEW if recipe == GPTQ else []
    refuses(
        run, model.parent, ["compress", model, "-o", model.parent / "new" / "out", "--recipe", recipe, *more], wanted
    )


def test_inspect_of_a_damaged_model(run: Run, model: Path) -> None:
    truncated(model)
    refuses(run, model.parent, ["inspect", model], "truncated")


def test_a_damaged_gguf(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content, wanted in (
        (b"", "not a GGUF"), (b"GGUF", "damaged"), (b"PK\3\4" + b"\0" * 100, "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 9, 1, 1), "version"),
    ):  # fmt: skip
        file.write_bytes(content)
        for words in (["compress", file, "-o", tmp_path / "out"], ["serve", file, "--port", "0"], ["inspect", file]):
            refuses(run, tmp_path, words, wanted)


def test_adapters(run: Run, model: Path) -> None:
    folder = model.parent
    adapter = folder / "adapter"
    adapter.mkdir()
    words: list[str | Path] = ["compress", adapter, "-o", folder / "out", "--recipe", RTN]
    for text, wanted in (
        ("{", "adapter_config.json"), ("[]", "adapter_config.json"), ("{}", "base_model_name_or_path"),
        (json.dumps({"base_model_name_or_path": "./nowhere", "r": 2, "lora_alpha": 4}), "nowhere"),
        (json.dumps({"base_model_name_or_path": str(model), "r": 2, "lora_alpha": 4}), "adapter_model.safetensors"),
        (json.dumps({"base_model_name_or_path": str(model), "r": 2, "lora_alpha": 4, "use_dora": True}), "use_dora"),
        (json.dumps({"base_model_name_or_path": str(model)}), "lora_alpha"),
    ):  # fmt: skip
        (adapter / "adapter_config.json").write_text(text)
        refuses(run, folder, words, wanted)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model), "r": 2, "lora_alpha": 4})
    )
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    for tensors, wanted in (
        ({f"{layer}.lora_A.weight": torch.zeros(2, 64)}, "lora_B"),
        ({f"{layer}.lora_A.weight": torch.zeros(2, 63), f"{layer}.lora_B.weight": torch.zeros(128, 2)}, "shape"),
        ({"nowhere.lora_A.weight": torch.zeros(2, 64)}, "nowhere"),
    ):
        save_file(tensors, adapter / "adapter_model.safetensors")
        refuses(run, folder, words, wanted)


# ---- wrong words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("rtn:scheme=W7A16", ["W7A16", "did you mean", "W4A16"]),
        ("rtn:scheme=w4a16", ["did you mean 'W4A16'"]),
        ("gtpq:scheme=W4A16", ["did you mean 'gptq'"]),
        ("nosuchmethod", ["there are"]),
        ("gptq:dampp=0.1", ["did you mean 'damp'"]),
        ("rtn:damp=0.1", ["rtn has no knob 'damp'"]),
        ("gptq:damp=much", ["damp=much", "number"]),
        ("gptq:damp=-1", ["damp"]),
        ("gptq:damp=nan", ["damp"]),
        ("gptq:block=0", ["block"]),
        ("gptq:actorder=sometimes", ["actorder", "static"]),
        ("rtn:portable=perhaps", ["true or false"]),
        ("rtn:scheme=W4A16,group_size=128", ["group_size=128", "group_size=64 does"]),
        ("rtn:scheme=W4A16,group_size=0", ["group_size=0"]),
        ("rtn:scheme=W4A16,group_size=big", ["group_size=big"]),
        ("rtn:scheme=W4A16,group_size=-2", ["group_size=-2"]),
        ("rtn:scheme=W4A16,group_size=1.5", ["group_size=1.5"]),
        ("rtn:embedding=W9A16", ["W9A16"]),
        ("rtn:scheme=W4A16,group_size=32,ignore=nosuch_proj", ["'nosuch_proj' matches no layer"]),
        ("rtn:scheme=W4A16,group_size=32,ignore=re:.*up_prj", ["matches no layer"]),
        ("rtn:scheme=W4A16,group_size=32,targets=re:(", ["not a regular expression"]),
        ("rtn:scheme=W4A16,group_size=32,targets=lm_haed", ["matches no layer"]),
        ("rtn:scheme", ["not knob=value"]),
        ("rtn || gptq", ["empty step"]),
        ("", ["empty"]),
        ("nosuch.yaml", ["no such recipe file"]),
    ],
)
def test_a_wrong_recipe(run: Run, tiny_llama: Path, tmp_path: Path, recipe: str, wanted: list[str]) -> None:
    refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / "out", "--recipe", recipe], *wanted)
    refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / "out", "--recipe", recipe, "--dry-run"], *wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("recipe: [gptq: {damp: 0.01", "not YAML"),
        ("", "no recipe"),
        ("just words", "no recipe"),
        ("- 5", "METHOD"),
        ("- rtn: 5", "METHOD"),
        ("- rtn: {scheme: W7A16}", "W7A16"),
        ("- gtpq: {}", "did you mean"),
        ("- gptq: {dampp: 1}", "did you mean"),
        ("- rtn: {group_size: [1, 2]}", "group_size"),
        ("- rtn: {1: 2}", "knob"),
        ("recipe: !!python/object/apply:os.system ['true']", "not YAML"),
        ("\0", "not YAML"),
    ],
)
def test_a_wrong_yaml(run: Run, tiny_llama: Path, tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    refuses(
        run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml"], wanted
    )


def test_a_recipe_that_is_a_folder_or_not_text(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name in ("folder.yaml", "bytes.yaml"):
        refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / "out", "--recipe", tmp_path / name], name)


def test_group_128_on_width_576(run: Run, tmp_path: Path) -> None:
    """What a first user types with SmolLM2-135M."""
    model = write_llama(tmp_path / "model", layers=1, hidden=576)
    words: list[str | Path] = ["compress", model, "-o", tmp_path / "out", "--recipe", "gptq:scheme=W4A16"]
    refuses(run, tmp_path, words, "group_size=128", "576", "group_size=64 does")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--format", "nosuch"], "no 'nosuch' in formats"),
        (["--format", "ggfu"], "did you mean 'gguf'"),
        (["--device", "tpu"], "--device tpu"),
        (["--samples", "0"], "samples"),
        (["--samples", "-3"], "samples"),
        (["--samples", "many"], "samples"),
        (["--length", "0"], "length"),
        (["--length", "-1"], "length"),
        (["--seed", "-1"], "seed"),
        (["--nosuch"], "--nosuch"),
        (["--data", "nosuch.txt"], "no such data file"),
        (["--evaluation", "nosuch.txt"], "no such data file"),
    ],
)
def test_a_wrong_option(
    run: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(run, tmp_path, ["compress", tiny_llama, "-o", "out", "--recipe", GPTQ, *words], wanted)


def test_wrong_verbs(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "made"
    assert run("compress", tiny_llama, "-o", compressed, "--recipe", RTN).code == 0
    cases: list[tuple[list[str | Path], str]] = [
        (["serv", compressed], "serv"),
        (["list", "quants"], "did you mean 'quant'"),
        (["serve", compressed, "--runtime", "nosuch"], "no 'nosuch' in runtimes"),
        (["serve", compressed, "--runtime", "llamacp"], "did you mean 'llamacpp'"),
        (["serve", compressed, "--runtime", "llamacpp"], "does not run"),
        (["evaluate", compressed, "--runtime", "nosuch"], "no 'nosuch' in runtimes"),
        (["verify", compressed, "--runtime", "nosuch"], "no 'nosuch' in runtimes"),
        (["verify", compressed, "--against", tmp_path / "nowhere"], "nowhere"),
        (["verify", tmp_path / "nowhere"], "nowhere"),
        (["serve", tmp_path / "nowhere"], "nowhere"),
        (["evaluate", tmp_path / "nowhere"], "nowhere"),
        (["compare", compressed, tmp_path / "nowhere"], "nowhere"),
        (["chat", tmp_path / "nowhere"], "nowhere"),
        (["export", compressed, "-o", tmp_path / "o", "--format", "nosuch"], "no 'nosuch' in formats"),
        (["export", tmp_path / "nowhere", "-o", tmp_path / "o", "--format", "gguf"], "nowhere"),
        (["export", tiny_llama, "-o", compressed, "--format", "gguf"], "exists already"),
        (["inspect", compressed, "--target", "nosuch"], "no 'nosuch' in formats"),
        (["serve", compressed, "--port", "70000"], "70000"),
        (["serve", compressed, "--port", "0", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ]
    for words, wanted in cases:
        refuses(run, tmp_path, words, wanted)


def test_damaged_artifacts(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "made"
    assert run("compress", tiny_llama, "-o", compressed, "--recipe", RTN).code == 0
    manifest = (compressed / "wherry.json").read_text()
    for text, wanted in (
        ("{", "manifest"), ("[]", "manifest"), ("{}", "manifest"),
        (manifest.replace('"model.safetensors"', '"../model.safetensors"'), "outside"),
        (manifest.replace("text-generation", "mind-reading"), "mind-reading"),
    ):  # fmt: skip
        (compressed / "wherry.json").write_text(text)
        for verb in (["verify"], ["serve", "--port", "0"]):
            refuses(run, tmp_path, [verb[0], compressed, *verb[1:]], wanted)
    (compressed / "wherry.json").write_text(manifest)
    (compressed / "model.safetensors").write_bytes(b"short")
    refuses(run, tmp_path, ["evaluate", compressed], "model.safetensors")


# ---- data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n \t\n", "empty"),
        ("short.txt", b"Too short.", "fewer than one window"),
        ("bytes.txt", b"\xff\xfe\x00binary", "UTF-8"),
        ("bad.jsonl", b'{"text": "fine"}\nnot json\n', ":2:"),
        ("other.jsonl", b'{"prompt": "no text"}\n', ":1:"),
        ("number.jsonl", b"5\n", ":1:"),
        ("pairs.tsv", b"a\tb\t0.5\nc\td\n", ":2:"),
        ("one.csv", b"onlyonecolumn\n1\n", "csv"),
        ("junk.npy", b"not numpy", "junk.npy"),
        ("junk.npz", b"PK\3\4 not numpy", "junk.npz"),
    ],
)
def test_wrong_calibration_data(
    run: Run, tiny_llama: Path, tmp_path: Path, name: str, content: bytes, wanted: str
) -> None:
    (tmp_path / name).write_bytes(content)
    words: list[str | Path] = [
        "compress",
        tiny_llama,
        "-o",
        tmp_path / "out",
        "--recipe",
        GPTQ,
        *FEW,
        "--data",
        tmp_path / name,
    ]
    refuses(run, tmp_path, words, wanted)


def test_too_little_to_judge_on_is_told_before_the_work(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    words = ["compress", tiny_llama, "-o", tmp_path / "out", "--recipe", RTN, "--format", "gguf"]
    said = run(*words, "--evaluation", tmp_path / "short.txt")
    assert "fewer than one window" in " ".join(message(said))
    assert "model.layers" not in said.error  # no line of progress
    assert tree(tmp_path) == {"short.txt": 10}


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (np.array([[1, 2, 600]]), "token 600"),
        (np.array([[1, 2, -1]]), "token -1"),
        (np.array([[0.5, 1.0]]), "whole numbers"),
        (np.zeros((0, 16), dtype=np.int64), "tokens.npy"),
        (np.zeros((3, 0), dtype=np.int64), "tokens.npy"),
        (np.array([], dtype=np.int64), "tokens.npy"),
        (np.array([{"a": 1}], dtype=object), "tokens.npy"),
        (np.zeros((2, 3, 4), dtype=np.int64), "whole numbers"),
    ],
)
def test_wrong_token_ids(run: Run, tiny_llama: Path, tmp_path: Path, tokens: np.ndarray, wanted: str) -> None:
    np.save(tmp_path / "tokens.npy", tokens, allow_pickle=True)
    words: list[str | Path] = [
        "compress",
        tiny_llama,
        "-o",
        tmp_path / "out",
        "--recipe",
        GPTQ,
        "--data",
        tmp_path / "tokens.npy",
    ]
    refuses(run, tmp_path, words, wanted)


def test_data_that_is_a_folder(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").mkdir()
    words: list[str | Path] = [
        "compress",
        tiny_llama,
        "-o",
        tmp_path / "out",
        "--recipe",
        GPTQ,
        "--data",
        tmp_path / "data.txt",
    ]
    refuses(run, tmp_path, words, "data.txt")


def test_data_without_a_tokenizer(run: Run, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    refuses(run, model.parent, ["compress", model, "-o", model.parent / "out", "--recipe", GPTQ], "tokenizer.json")


def test_a_broken_tokenizer(run: Run, model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    refuses(run, model.parent, ["compress", model, "-o", model.parent / "out", "--recipe", GPTQ], "tokenizer.json")


# ---- places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c", "", "C:\\models\\x"]
)
def test_no_such_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(run, tmp_path, ["compress", name, "-o", "out", "--recipe", RTN])


def test_a_file_that_is_no_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refuses(run, tmp_path, ["compress", tmp_path / "notes.txt", "-o", tmp_path / "out"], "notes.txt is not a model")
    refuses(run, tmp_path, ["compress", tmp_path, "-o", tmp_path / "out"], "config.json")


def test_an_output_that_exists(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / name, "--recipe", RTN], "exists already")
    for place in ("", ".", "/", "..", tmp_path):
        refuses(run, tmp_path, ["compress", tiny_llama, "-o", place, "--recipe", RTN])
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_below_a_file(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file/out", "file/deep/out"):
        refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / place, "--recipe", RTN], "not a folder")


def test_an_output_inside_of_the_model(run: Run, model: Path) -> None:
    """It is allowed: a model's folder may hold what was made of it. Nothing else is changed."""
    before = tree(model)
    assert run("compress", model, "-o", model / "small", "--recipe", RTN).code == 0
    assert {k: v for k, v in tree(model).items() if not k.startswith("small")} == before


def test_a_name_that_is_too_long(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    refuses(run, tmp_path, ["compress", tiny_llama, "-o", tmp_path / ("n" * 300), "--recipe", RTN])


def test_a_port_in_use(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        lines = refuses(run, tmp_path, ["serve", tiny_llama, "--port", str(port)], f"port {port}", "--port")
        assert not any(f"--port {port}" in line for line in lines)


# ---- disks: real, small ones ----------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount small file systems; needs the rights for it."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        point = tmp_path / f"disk{len(mounted)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], capture_output=True, text=True
        )
        if done.returncode:
            point.rmdir()
            pytest.skip(f"no right to mount a file system here: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield make
    for point in mounted:
        subprocess.run(["umount", "-l", str(point)], check=False)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_disk_that_is_too_small(run: Run, tiny_llama: Path, mount: Callable[[str], Path], recipe: str) -> None:
    disk = mount("size=64k")
    refuses(
        run, disk, ["compress", tiny_llama, "-o", disk / "out", "--recipe", recipe, *FEW], "no space", "needed", "free"
    )
    refuses(run, disk, ["compress", tiny_llama, "-o", disk / "a" / "b" / "out", "--recipe", recipe, *FEW], "no space")


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize("free", [0, 40_000, 150_000, 300_000])
def test_a_disk_that_fills_while_it_runs(
    run: Run, tiny_llama: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Another program takes the space after the check: the disk is full in the middle. Real ENOSPC, no mock of it."""
    from wherry import deliver

    disk = mount("size=1m")
    made = deliver.Journal

    def take(*args: object, **kwargs: object) -> object:
        journal = made(*args, **kwargs)  # type: ignore[arg-type]
        (disk / "taken").write_bytes(b"\0" * (shutil.disk_usage(disk).free - free))
        return journal

    monkeypatch.setattr(deliver, "Journal", take)
    lines = message(run("compress", tiny_llama, "-o", disk / "new" / "out", "--recipe", RTN))
    assert "No space left" in "\n".join(lines)
    assert set(tree(disk)) == {"taken"}


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_calibrated_work_outlives_a_full_disk(
    run: Run, model: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of calibration are not thrown away: the error says where they are; with space the same command goes on."""
    from wherry import deliver

    disk = mount("size=3m")
    write_llama(model, layers=4)
    words = ["compress", model, "-o", disk / "out", "--recipe", GPTQ, *FEW]
    made = deliver.Journal

    def take(*args: object, **kwargs: object) -> object:
        journal = made(*args, **kwargs)  # type: ignore[arg-type]
        (disk / "taken").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 250_000))
        return journal

    monkeypatch.setattr(deliver, "Journal", take)
    lines = message(run(*words))
    monkeypatch.setattr(deliver, "Journal", made)
    kept = next(disk.glob(".out.partial-*"))
    assert f"are kept in {kept}; the same command goes on" in lines[-1]
    assert list(kept.glob("unit-block-*.safetensors"))
    (disk / "taken").unlink()
    assert run(*words).code == 0
    assert {path.name for path in disk.iterdir()} == {"out"}


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_read_only_disk(run: Run, tiny_llama: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=1m,ro")
    for place in (disk / "out", disk / "deep" / "out"):
        refuses(run, disk, ["compress", tiny_llama, "-o", place, "--recipe", RTN], "written")
        refuses(run, disk, ["export", tiny_llama, "-o", place, "--format", "gguf"], "written")


# ---- real processes -------------------------------------------------------------------------------------------


def real(*words: str | Path, **env: str) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", "wherry", *map(str, words)], capture_output=True, text=True, timeout=120,
        env={**os.environ, **env}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return Said(done.returncode, done.stderr, done.stdout)


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    """The hub's client retries; the answer must come soon. A proxy that refuses stands for the missing network."""
    begin = time.perf_counter()
    env = {
        "HF_HUB_OFFLINE": "0",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    said = real("compress", "nosuch-org/nosuch-model", "-o", tmp_path / "out", **env)
    assert "nosuch-org/nosuch-model" in "\n".join(message(said))
    assert time.perf_counter() - begin < 60
    assert not (tmp_path / "out").exists()


def test_real_processes_end_with_the_same_errors(tmp_path: Path, model: Path) -> None:
    truncated(model)
    before = tree(tmp_path)
    assert "truncated" in "\n".join(message(real("compress", model, "-o", tmp_path / "out", "--recipe", RTN)))
    said = real("--debug", "compress", model, "-o", tmp_path / "out", "--recipe", RTN)
    assert "Traceback" in said.error
    assert said.code
    assert tree(tmp_path) == before
