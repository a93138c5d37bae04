"""Options that change how a run is computed, not what it learns, and the families of models that it takes."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import write_llama, write_tokenizer
from tests.train.conftest import torchrun
from wherry.cli import app
from wherry.train import learner, loop
from wherry.train.job import Job

SIZES = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}


def made(kind: str) -> Any:
    """A random model of an architecture whose names, positions or heads are not those of Llama."""
    import transformers as t

    torch.manual_seed(0)
    wide = {**SIZES, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
        model: Any = t.GPT2LMHeadModel(t.GPT2Config(**SIZES, **still, n_embd=64, n_layer=2, n_head=4, n_positions=128))
    elif kind == "opt":
        model = t.OPTForCausalLM(t.OPTConfig(**wide, ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=64,
                                             pad_token_id=0, dropout=0))  # fmt: skip
    elif kind == "gpt_neox":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**wide, intermediate_size=128, max_position_embeddings=128))
    else:
        model = t.BloomForCausalLM(t.BloomConfig(**SIZES, hidden_size=64, n_layer=2, n_head=4))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def write(folder: Path, kind: str) -> Path:
    """The model as a folder."""
    made(kind).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "bloom"])
def test_other_families_learn_and_stock_transformers_reads_them(tmp_path: Path, job_of: Callable, kind: str) -> None:
    """The first loss is that of transformers' own model; the result has the logits that ours has."""
    from transformers import AutoModelForCausalLM

    from wherry.checkpoint import Checkpoint

    job = Job.from_dict(job_of(write(tmp_path / "m", kind), "out", steps=8))
    found = loop.run(job)
    with loop.mesh.joined(job) as world:
        run = loop.Run(replace(job, out=str(tmp_path / "x")), world)
        batch = run.data.batch(run._ids(0))
        run.saver.close()
        run.log.close()
    logits = made(kind)(input_ids=batch["input_ids"]).logits
    first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    assert found["losses"][0] == pytest.approx(first.item(), rel=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    ids = torch.arange(20)[None] * 9 % 512
    theirs = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()(input_ids=ids).logits
    ours = Checkpoint.open(job.out).module()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, made(kind).eval()(input_ids=ids).logits, atol=1e-3)


def test_recompute_does_each_block_twice_and_changes_no_bit(
    tiny_llama: Path, job_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[bool] = []
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (calls.append(torch.is_grad_enabled()), plain(self, x))[1])
    losses, counts = [], []
    for recompute in (False, True):
        calls.clear()
        job = job_of(tiny_llama, f"out {recompute}", recompute=recompute, steps=3, held_out="")
        losses.append(loop.run(Job.from_dict(job))["losses"])
        counts.append(len(calls))
    assert counts == [3 * 2, 2 * 3 * 2]  # blocks of the model times updates, once more for the backward pass
    assert losses[0] == losses[1]


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tiny_llama: Path, job_of: Callable) -> None:
    runs = {}
    for precision in ("fp32", "bf16"):
        job = Job.from_dict(job_of(tiny_llama, precision, precision=precision, steps=8))
        runs[precision] = loop.run(job)
    whole, half = (runs[name]["losses"] for name in ("fp32", "bf16"))
    assert half != whole
    np.testing.assert_allclose(half, whole, rtol=2e-2)
    assert runs["bf16"]["held_out"] == pytest.approx(runs["fp32"]["held_out"], rel=1e-2)
    with loop.mesh.joined(job) as world:
        made_ = learner.Learner(job, world, loop.Objective.parse("ce"))
        assert {p.dtype for p in made_.trained} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            assert made_.inner(input_ids=torch.arange(8)[None]).logits.dtype == torch.bfloat16


def test_adapters_are_drawn_by_the_seed(tiny_llama: Path, tmp_path: Path, job_of: Callable) -> None:
    """Whatever was drawn before in this process, as it was by ranks that had other data."""
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        job = Job.from_dict(job_of(tiny_llama, "out", recipe="ce | lora:rank=2", seed=seed))
        with loop.mesh.joined(job) as world:
            found = learner.Learner(job, world, loop.Objective.parse(job.recipe))
            drawn.append(dict(found.inner.named_parameters())["model.layers.0.mlp.up_proj.parametrizations.weight.0.A"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_attention_rows_are_compared_in_a_run(tmp_path: Path, job_of: Callable) -> None:
    """Fused attention shows no rows: both models are asked to compute it plainly, and the loss is the one by hand."""
    from transformers import AutoModelForCausalLM

    student, teacher = write_llama(tmp_path / "s"), write_llama(tmp_path / "t", seed=1)
    job = Job.from_dict(job_of(student, "out", teacher=str(teacher), recipe="attention:layers=all", steps=1, batch=2))
    found = loop.run(job)
    rows = []
    with loop.mesh.joined(job) as world:
        run = loop.Run(replace(job, out=str(tmp_path / "x")), world)
        ids = run.data.batch(run._ids(0))["input_ids"]
        run.saver.close()
        run.log.close()
    for folder in (student, teacher):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        rows.append(model(input_ids=ids, output_attentions=True).attentions)
    total = sum(torch.special.xlogy(b, b / a.clamp(min=1e-30)).sum(-1).mean() for a, b in zip(*rows, strict=True))
    assert found["losses"][0] == pytest.approx(total.item() / len(rows[0]), rel=1e-4)


def listener(folder: Path) -> Path:
    """A small network of spoken digits over log-mel features, as a graph."""
    from torch import nn

    from wherry.capture import capture
    from wherry.task import Task

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(40, 24, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(24, 24, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    processor = {"sampling_rate": 8000, "features": "log-mel", "n_mels": 40, "n_fft": 400, "hop_length": 160,
                 "frames": 50}  # fmt: skip
    task = Task("audio-classification", folder.parent, inputs=("x",), outputs=("logits",), labels=tuple("0123456789"),
                processor=processor)  # fmt: skip
    capture(net, folder, torch.randn(2, 40, 50), task, outputs=["logits"])
    return folder


def test_the_command_learns_from_a_folder_of_sounds(tmp_path: Path, wherry_data: Path) -> None:
    """Spoken digits of five speakers; half of each one's recordings are held out. Chance is 0.1."""
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        with open(tmp_path / part / "labels.csv", "w", encoding="utf8", newline="") as opened:
            table = csv.writer(opened)
            table.writerow(["file", "label"])
            for file in sorted((wherry_data / "fsdd").glob("*.wav")):
                digit, _, number = file.stem.split("_")
                if (int(number) % 2 == 0) == (part == "train") and digit in "0369":
                    shutil.copy(file, tmp_path / part / file.name)
                    table.writerow([file.name, digit])
    line = ["train", str(listener(tmp_path / "net")), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "train"),
            "--held-out", str(tmp_path / "test"), "--epochs", "8", "--batch", "10", "--learning-rate", "3e-3",
            "--json"]  # fmt: skip
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["what"]: row["value"] for row in report["rows"]}
    assert rows["held-out accuracy"] > 0.6
    assert rows["held-out loss"] < rows["held-out loss, before"] - 0.5


@pytest.mark.slow
def test_options_on_two_processes(tmp_path: Path, job_of: Callable) -> None:
    """Each option with the ranks that it is said to go with gives what one process gives."""
    llama, opt = write_llama(tmp_path / "m"), write(tmp_path / "opt", "opt")
    shard, cut = {"dp": 1, "fsdp": 2}, {"tp": 2}
    wanted = {
        "muon fsdp": (llama, {"optimizer": "muon"}, shard, 1e-3),
        "muon dp": (llama, {"optimizer": "muon"}, {}, 1e-3),
        "bf16 fsdp": (llama, {"precision": "bf16"}, shard, 5e-3),
        "bf16 dp": (llama, {"precision": "bf16"}, {}, 5e-3),
        "recompute fsdp": (llama, {"recompute": True, "optimizer": "sgd"}, shard, 1e-5),
        "recompute tp": (llama, {"recompute": True, "optimizer": "sgd"}, cut, 1e-5),
        "derived tp": (opt, {"optimizer": "sgd"}, cut, 1e-5),  # transformers has no plan for it
        "documents dp": (llama, {"packing": "documents", "optimizer": "sgd"}, {}, 1e-5),
        "lora fsdp": (llama, {"recipe": "ce | lora:rank=4", "optimizer": "sgd"}, shard, 1e-5),
        "qat fsdp": (llama, {"recipe": "ce | qat:scheme=W4A16,group_size=32", "optimizer": "sgd"}, shard, 1e-4),
    }
    cases = [{"name": name, "job": job_of(model, name, steps=6, **more, **layout)}
             for name, (model, more, layout, _) in wanted.items()]  # fmt: skip
    found = torchrun(tmp_path / "ranks", cases, 2)
    for name, (model, more, _, near) in wanted.items():
        one = loop.run(Job.from_dict(job_of(model, f"{name} one", steps=6, **more)))
        assert "error" not in found[name], (name, found[name])
        np.testing.assert_allclose(found[name]["losses"], one["losses"], rtol=near, err_msg=name)
        np.testing.assert_allclose(found[name]["held_out"], one["held_out"], rtol=near, err_msg=name)
