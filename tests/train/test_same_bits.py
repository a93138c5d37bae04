"""A run against a loop written here of torch's own parts: losses and weights are the same bits; so is a resumed run."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from wherry.data import shipped
from wherry.errors import BadInput, Missing, Unsupported
from wherry.train import loop, watch
from wherry.train.job import Job

STEPS, BATCH, LENGTH = 6, 4, 32


class Stopped(Exception):
    pass


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Job:
    """Given order, overlapping windows of two arrays, Muon with a decay and a rate apart, a norm that is clipped."""
    rng = np.random.default_rng(0)
    for name, n in (("a", 500), ("b", 300)):
        np.save(tmp_path / f"{name}.npy", rng.integers(3, 512, n).astype(np.uint16))
    rows = [rng.integers(0, 500 - LENGTH, (STEPS, 3)), 500 - LENGTH + rng.integers(0, 300 - LENGTH, (STEPS, 1))]
    np.save(tmp_path / "order.npy", np.concatenate(rows, 1))
    return Job(
        model=str(tiny_llama), out=str(tmp_path / "out"), data=f"{tmp_path / 'a.npy'};{tmp_path / 'b.npy'}",
        order=str(tmp_path / "order.npy"), stride=1, length=LENGTH, batch=BATCH, steps=STEPS, optimizer="muon",
        learning_rate=0.01, outer_rate=0.004, weight_decay=0.1, outer_decay=0.0, clip=0.5, schedule="trapezoid",
        warmup=2, cooldown=3, threads=1, device="cpu",
    )  # fmt: skip


def textbook(job: Job, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same run by torch.optim and torch.nn.utils.clip_grad_norm_ alone."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and ".layers." in n]
    outer = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
    each = [
        (0.01, torch.optim.Muon(inner, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")),
        (0.004, torch.optim.AdamW(outer, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0)),
    ]
    texts = [np.load(folder / f"{name}.npy").astype(np.int64) for name in "ab"]
    losses = []
    for step, places in enumerate(np.load(job.order)):
        cut = [texts[0][i : i + LENGTH + 1] for i in places[:3]] + [
            texts[1][i - 468 : i - 468 + LENGTH + 1] for i in places[3:]
        ]
        x = torch.from_numpy(np.stack(cut))
        for peak, optimizer in each:
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 2, (STEPS - step) / 3)
        with FlopCounterMode(display=False) if step == 1 else nullcontext():  # a run counts its second update
            loss = cross_entropy(model(input_ids=x[:, :-1], use_cache=False).logits.flatten(0, 1), x[:, 1:].flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for _, optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def same(out: Path, weights: dict[str, torch.Tensor]) -> None:
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, p in made.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_losses_and_weights_are_those_of_the_textbook(job: Job, tmp_path: Path) -> None:
    losses, weights = textbook(job, tmp_path)
    found = loop.run(job)
    assert found["losses"] == losses
    same(tmp_path / "out", weights)
    seen = [row["samples"] for row in watch.lines(tmp_path / "out" / "samples-0.jsonl")]
    assert seen == np.load(job.order).tolist()


def stopped(job: Job, at: int) -> None:
    def stop(done: int, total: int, said: str) -> None:
        if done == at:
            raise Stopped

    with pytest.raises(Stopped):
        loop.run(job, stop)


def test_a_resumed_run_ends_with_the_same_bits_and_all_its_seconds(job: Job, tmp_path: Path) -> None:
    losses, weights = textbook(job, tmp_path)
    job = replace(job, save_every=2)
    stopped(job, 5)
    (kept,) = tmp_path.glob(".out.partial-*/checkpoints/update-00000004/state.json")
    before = json.loads(kept.read_text())
    found = loop.run(job)
    assert found["resumed_at"] == 4
    assert found["losses"] == losses
    same(tmp_path / "out", weights)
    assert found["cpu_seconds"] > before["cpu_seconds"] > 0
    assert found["seconds"] > before["seconds"] > 0


def test_a_run_of_other_settings_is_not_taken_up(job: Job, tmp_path: Path) -> None:
    stopped(replace(job, save_every=2), 5)
    assert loop.run(replace(job, save_every=2, seed=1, steps=5))["resumed_at"] == 0
    shutil.rmtree(tmp_path / "out")
    np.save(tmp_path / "order.npy", np.load(job.order)[::-1])  # the same name, another order
    assert loop.run(replace(job, save_every=2))["resumed_at"] == 0


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (np.zeros((STEPS, 3), int), r"\[updates, 4\] wanted"),
        (np.zeros(STEPS * BATCH, int), r"\[updates, 4\] wanted"),
        (np.zeros((STEPS, BATCH)), "float64"),
        (np.full((STEPS, BATCH), 736), "no sample 736; the data has 736"),
        (np.full((STEPS, BATCH), -1), "no sample -1"),
        (np.zeros((STEPS - 1, BATCH), int), "5 updates, 6 are to be done"),
    ],
)
def test_an_order_that_does_not_fit(job: Job, tmp_path: Path, order: np.ndarray, said: str) -> None:
    np.save(tmp_path / "order.npy", order)
    with pytest.raises(BadInput, match=said):
        loop.run(job)
    assert not list(tmp_path.glob(".out.partial-*"))


def test_an_order_that_is_none(job: Job, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no such order"):
        loop.run(replace(job, order=str(tmp_path / "absent.npy")))
    (tmp_path / "order.npy").write_text("0 1 2 3")
    with pytest.raises(BadInput, match="not an array file"):
        loop.run(job)


def test_held_out_texts_are_judged_one_by_one(job: Job, tiny_llama: Path, tmp_path: Path) -> None:
    """Bits per byte of each, against a sum over tokens by transformers: all but the first, in windows that overlap."""
    said = shipped("evaluation").read_text(encoding="utf8")
    for name, part in (("c", said[:700]), ("d", said[5000:5400])):
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf8")
    job = replace(
        job, steps=3, held_out=f"{tmp_path / 'c.txt'};{tmp_path / 'd.txt'}", overlap=20, eval_every=2,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    found = loop.run(job)
    model = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    rows = [row for row in watch.lines(tmp_path / "out" / "metrics.jsonl") if "held-out loss" in row]
    assert [row["update"] for row in rows] == [0, 2, 3]
    total, count = 0.0, 0
    for one in found["judged"]:
        (folder,) = (f for f in (tmp_path / "cache").glob("tokens-*") if json.loads((f / "facts.json").read_text())
                     ["bytes"] == (tmp_path / one["name"]).stat().st_size)  # fmt: skip
        tokens = torch.from_numpy(np.fromfile(folder / "tokens.bin", np.uint16).astype(np.int64))
        nats, new = 0.0, 1
        while new < len(tokens):
            start = max(0, new - 21)
            logits = model(input_ids=tokens[None, start : start + LENGTH]).logits[0].log_softmax(-1)
            for target in range(new, min(start + LENGTH + 1, len(tokens))):
                nats -= logits[target - start - 1, tokens[target]].item()
            new = start + LENGTH + 1
        assert one["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
        size = (tmp_path / one["name"]).stat().st_size
        assert one["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
        assert rows[-1][f"bits per byte {one['name']}"] == one["bits_per_byte"]
        total, count = total + nats, count + len(tokens) - 1
    assert found["held_out"] == pytest.approx(total / count, rel=1e-5)


def test_a_decay_of_its_own_for_the_embedding(job: Job) -> None:
    """An optimizer's step without a gradient is the decay alone."""
    from wherry.train import rate

    for outer, wanted in ((0.0, 1.0), (0.5, 1 - 0.004 * 0.5), (-1.0, 1 - 0.004 * 0.1)):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        before = model.model.embed_tokens.weight.detach().clone()
        for optimizer in rate.optimizers(replace(job, outer_decay=outer), model.named_parameters()):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
        torch.testing.assert_close(model.model.embed_tokens.weight.detach(), before * wanted)


def test_what_compile_and_use_cache_are_not_for(job: Job) -> None:
    with pytest.raises(BadInput, match="packed documents see each other"):
        replace(job, use_cache=True, packing="documents", stride=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_it_is_the_same_run(job: Job, tmp_path: Path) -> None:
    """Losses of the plain run but for the order of sums; resumed, the same bits; operations are counted."""
    plain = loop.run(replace(job, out=str(tmp_path / "plain")))
    job = replace(job, compile=True, save_every=2)
    whole = loop.run(replace(job, out=str(tmp_path / "whole")))
    np.testing.assert_allclose(whole["losses"], plain["losses"], rtol=1e-4)
    assert whole["mfu"] > 0
    stopped(job, 5)
    found = loop.run(job)
    assert found["resumed_at"] == 4
    assert found["losses"] == whole["losses"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", tmp_path / "out")]
    assert weights[0] == weights[1]


def test_a_compiler_must_be_there(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Missing, match="needs a C\\+\\+ compiler.*no-such-compiler"):
        loop.run(replace(job, compile=True))


def test_only_language_models_are_compiled(tmp_path: Path) -> None:
    from tests.train.conftest import cnn, pictures

    graph, data = cnn(tmp_path / "cnn", "group"), pictures(tmp_path / "pictures")
    job = Job(model=str(graph), out=str(tmp_path / "out"), data=str(data), steps=1, compile=True)
    with pytest.raises(Unsupported, match="compile is for language models"):
        loop.run(job)
    with pytest.raises(BadInput, match="are for language models"):
        loop.run(replace(job, compile=False, stride=2))
