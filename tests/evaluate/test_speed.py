import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.evaluate import speed
from wherry.runtimes import torch as runtime


class Clock:
    """Time that passes only when a session says so: rates come out exact, on a busy machine too."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Paced:
    """A generator of known pace: seconds per prompt token, then per new token; keeps the prompts."""

    grade, facts = "C", {}

    def __init__(self, clock: Clock, read_s: float, write_s: float, most: int = 10**6) -> None:
        self.clock, self.read_s, self.write_s, self.most, self.prompts = clock, read_s, write_s, most, []

    def generate(self, tokens, sampling):
        self.prompts.append(tuple(tokens))
        self.clock.now += self.read_s * len(tokens)
        for i in range(min(sampling.max_tokens, self.most)):
            self.clock.now += self.write_s if i else 0
            yield 5


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "perf_counter", clock)
    return clock


@pytest.fixture
def task(tiny_llama):
    return Checkpoint.open(tiny_llama).task


def test_prefill_and_decode_are_told_apart(task, clock):
    report = speed.measure(Paced(clock, read_s=0.002, write_s=0.05), task, "paced", prompt=200, new=20)
    assert report.get("prefill", "paced").value == pytest.approx(500)
    assert report.get("decode", "paced").value == pytest.approx(20)
    assert report.get("time to first token", "paced").value == pytest.approx(0.4)
    assert "20 tokens" in report.get("decode", "paced").note


def test_the_median_stands_between_the_slowest_and_the_fastest(task, clock):
    class Tiring(Paced):
        def generate(self, tokens, sampling):
            self.read_s += 0.001
            return super().generate(tokens, sampling)

    report = speed.measure(Tiring(clock, 0, 0.01), task, "tiring", repeats=5, prompt=100, new=4)
    row = report.get("time to first token", "tiring")
    # calls alternate: the warm-up, then long, short, long, short ...
    assert (row.low, row.value, row.high) == pytest.approx((0.2, 0.6, 1.0))


def test_no_prompt_is_used_twice_and_none_has_special_tokens(task, clock):
    session = Paced(clock, 0.1, 0.1)
    speed.measure(session, task, repeats=4, prompt=100, new=3)
    long = [prompt for prompt in session.prompts if len(prompt) == 100]
    assert len(long) == 5  # a warm-up and four
    assert len({prompt[:8] for prompt in session.prompts}) == len(session.prompts)
    assert not {0, 1, 2, 3} & {token for prompt in session.prompts for token in prompt}


def test_an_answer_that_ends_early_is_said(task, clock):
    report = speed.measure(Paced(clock, 0.1, 0.1, most=5), task, prompt=50, new=64)
    assert "of 64 asked for" in report.get("decode").note
    assert report.get("decode").value == pytest.approx(10)
    report = speed.measure(Paced(clock, 0.1, 0.1, most=1), task, prompt=50, new=64)
    assert report.get("decode").value is None
    assert "no token to time" in report.get("decode").note
    with pytest.raises(BadInput, match="three"):
        speed.measure(Paced(clock, 0.1, 0.1), task, repeats=2)


def test_a_prompt_fits_the_models_context(task, clock):
    session = Paced(clock, 0.1, 0.1)
    speed.measure(session, task, prompt=5000, new=5000)
    assert max(len(prompt) for prompt in session.prompts) <= task.max_length - 2


def test_real_models(tiny_llama, tiny_bert):
    for folder, names in ((tiny_llama, ("prefill", "decode")), (tiny_bert, ("sentences", "latency"))):
        checkpoint = Checkpoint.open(folder)
        report = speed.measure(runtime.over(checkpoint), checkpoint.task, "torch", prompt=64, new=8)
        for name in names:
            assert report.get(name, "torch").value > 0
        assert report.get("peak memory", "torch").value > 50e6


def test_sentences_are_counted(tiny_bert, clock):
    task = Checkpoint.open(tiny_bert).task

    def predict(inputs):
        clock.now += 0.01
        return {"last_hidden_state": np.zeros((*inputs["input_ids"].shape, 4), dtype=np.float32)}

    report = speed.measure(SimpleNamespace(predict=predict), task, "slow", texts=["A boat.", "A river."] * 8)
    assert report.get("sentences", "slow").value == pytest.approx(800)
    assert report.get("latency", "slow").value == pytest.approx(0.01)


def test_peak_memory_keeps_the_highest_point():
    code = (
        "from wherry.evaluate.speed import peak_memory_bytes as peak; before = peak()[0]\n"
        "block = bytearray(b'x') * 150_000_000; del block\n"
        "print(peak()[0] - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 130e6 < int(out) < 200e6
