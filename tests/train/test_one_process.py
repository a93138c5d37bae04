"""The loop on one process: against a loop written here, cut in micro-batches, on text, pictures and labelled texts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from wherry.data import shipped
from wherry.errors import BadInput, Missing, Unsupported
from wherry.objective import Objective
from wherry.task import Task
from wherry.train import loop, order, samples
from wherry.train.job import Job
from wherry.train.text import Cut, Packed


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Job:
    return Job(
        model=str(tiny_llama), out=str(tmp_path / "out"), data=str(shipped("calibration")), steps=5, batch=8, length=32,
        learning_rate=1e-3, schedule="constant", clip=0.0, cache=str(tmp_path / "cache"),
    )  # fmt: skip


def test_is_the_textbook_loop(job: Job, tiny_llama: Path, tmp_path: Path) -> None:
    job = replace(job, optimizer="sgd", momentum=0.0)
    found = loop.run(job)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    text = shipped("calibration").read_text(encoding="utf8")
    task = Task.of(tiny_llama, {"architectures": ["LlamaForCausalLM"]})
    stream = torch.tensor([*task.encode(text), task.stop[0]])
    losses = []
    for step in range(5):
        ids = order.ids(step, 8, (len(stream) - 1) // 32, 0)
        rows = torch.stack([stream[i * 32 : i * 32 + 33] for i in ids.tolist()])
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
                p.grad = None
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-6)
    written = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
    for (name, a), b in zip(written.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_micro_batches_change_nothing(job: Job, tmp_path: Path) -> None:
    whole = loop.run(job)
    cut = loop.run(replace(job, out=str(tmp_path / "cut"), micro_batch=3))  # 3 + 3 + 2
    np.testing.assert_allclose(whole["losses"], cut["losses"], rtol=1e-5)


def test_packed_documents_do_not_see_each_other(job: Job, tmp_path: Path, tiny_llama: Path) -> None:
    """The loss of a packed row is the mean over its documents' tokens, each document alone."""
    table = tmp_path / "d.jsonl"
    texts = ["A wherry is a light boat.", "It carries cargo up the rivers.", "Short."]
    table.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    task = Task.of(tiny_llama, {"architectures": ["LlamaForCausalLM"]})
    packed = samples.opened(str(table), task, Cut(128, "documents"), tmp_path / "tokens").parts[0]
    assert len(packed) == 1
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    batch = packed.batch(np.array([0]))
    targets = batch.pop("targets")
    logits = model(**batch, use_cache=False).logits[0]
    total = torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum", ignore_index=-100)
    alone, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*task.encode(text), task.stop[0]]])
        logits = model(input_ids=ids[:, :-1]).logits[0]
        alone += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert int((targets != -100).sum()) == count
    assert total.item() == pytest.approx(alone, rel=1e-5)


def test_long_documents_go_on_in_the_next_row(tiny_llama: Path) -> None:
    tokens = np.arange(100)
    packed = Packed("x", "", tokens, np.array([0, 3, 60, 61, 100]), 16)
    batch = packed.batch(np.arange(len(packed)))
    both = torch.stack([batch["input_ids"].flatten(), batch["targets"].flatten()], 1)
    pairs = [(a, b) for a, b in both.tolist() if b != -100]
    inside = [(i, i + 1) for i in range(99) if i + 1 not in (3, 60, 61)]
    assert sorted(pairs) == inside


def test_says_what_is_wrong(job: Job, tmp_path: Path) -> None:
    cases = [
        ({"recipe": "cee"}, Unsupported, "did you mean 'ce'"),
        ({"recipe": "ce:smooth=1"}, BadInput, "did you mean 'smoothing'"),
        ({"data": str(tmp_path / "no.txt")}, Missing, "no such data"),
        ({"length": 1000}, BadInput, "takes 256 tokens at most"),
        ({"model": str(tmp_path)}, Missing, "config.json"),
    ]
    for change, kind, text in cases:
        with pytest.raises(kind, match=text):
            loop.run(replace(job, **change))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInput, match="fewer than one sample"):
        loop.run(replace(job, data=str(tmp_path / "empty.txt")))
    for change, text in [({"batch": 0}, "batch"), ({"steps": 0}, "steps or epochs"), ({"optimizer": "adam"}, "adamw")]:
        with pytest.raises(BadInput, match=text):
            replace(job, **change)


def test_job_goes_through_json(job: Job, tmp_path: Path) -> None:
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job
    assert replace(job, tp=2, out="x").fingerprint == job.fingerprint != replace(job, seed=1).fingerprint
    with pytest.raises(BadInput, match="did you mean 'steps'"):
        Job.from_dict({"model": "a", "out": "b", "data": "c", "step": 1})


def test_recipe_prints_as_it_is_read() -> None:
    text = "ce:weight=0.5,smoothing=0.1 | ce"
    assert str(Objective.parse(text)) == text
