"""Killed, stopped, moved to other ranks, a full disk, numbers that are not finite: what is whole stays, all ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_llama
from tests.train.conftest import torchrun
from wherry.errors import BadInput, Corrupt, Diverged, Exhausted
from wherry.train import loop
from wherry.train.job import Job


def job(model: Path, out: Path, job_of: Callable, **more: object) -> Job:
    fields = job_of(model, out.name, **({"steps": 8, "save_every": 2, "held_out": "", "batch": 4} | more))
    return Job.from_dict(fields | {"out": str(out)})


def stopped(at: int, number: int = signal.SIGTERM) -> loop.Progress:
    """A progress display that sends this process a signal after update `at`."""

    def progress(done: int, total: int, text: str) -> None:
        if done == at:
            os.kill(os.getpid(), number)

    return progress


@pytest.fixture(autouse=True)
def _outlived() -> Iterator[None]:
    """A signal that the run does not heed fails a test; it does not end all of them."""
    old = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, old)


def test_sigterm_saves_and_the_same_call_goes_on(tiny_llama: Path, tmp_path: Path, job_of: Callable) -> None:
    whole = loop.run(job(tiny_llama, tmp_path / "whole", job_of))
    wanted = job(tiny_llama, tmp_path / "cut", job_of, save_every=0)
    with pytest.raises(Exhausted, match="after update 6, which is saved"):
        loop.run(wanted, stopped(5))
    found = loop.run(wanted)
    assert found["resumed_at"] == 6
    assert found["losses"] == whole["losses"]
    assert not list(tmp_path.glob(".cut.partial*"))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_a_checkpoint_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path, job_of: Callable) -> None:
    first = job(tiny_llama, tmp_path / "one", job_of)
    with pytest.raises(Exhausted):
        loop.run(first, stopped(3))
    (folder,) = tmp_path.glob(".one.partial*/checkpoints/update-00000004")
    other = write_llama(tmp_path / "other", hidden=32)
    with pytest.raises(BadInput, match="another model"):
        loop.run(job(other, tmp_path / "two", job_of, resume=str(folder)))
    with pytest.raises(BadInput, match="another model or optimizer"):
        loop.run(job(tiny_llama, tmp_path / "two", job_of, resume=str(folder), optimizer="sgd"))
    (folder / "__0_0.distcp").write_bytes(b"PK")
    with pytest.raises(Corrupt, match="Remove this checkpoint"):
        loop.run(job(tiny_llama, tmp_path / "two", job_of, resume=str(folder)))


def test_a_checkpoint_that_would_run_code_is_refused(tiny_llama: Path, tmp_path: Path, job_of: Callable) -> None:
    with pytest.raises(Exhausted):
        loop.run(job(tiny_llama, tmp_path / "one", job_of), stopped(3))
    (folder,) = tmp_path.glob(".one.partial*/checkpoints/update-00000004")
    mark = tmp_path / "ran"
    (folder / ".metadata").write_bytes(f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode())
    with pytest.raises(Corrupt, match="posix.system"):
        loop.run(job(tiny_llama, tmp_path / "two", job_of, resume=str(folder)))
    assert not mark.exists()


def test_what_is_not_finite_goes_back_and_gives_up_in_the_end(
    tiny_llama: Path, tmp_path: Path, job_of: Callable
) -> None:
    """The first update makes the weights infinite; what was saved after it is no place to go back to."""
    wild = job(
        tiny_llama, tmp_path / "wild", job_of, recipe="ce:weight=1e6", learning_rate=3e38, optimizer="sgd", clip=0.0,
        save_every=1, warmup=0, momentum=0.0,
    )  # fmt: skip
    with pytest.raises(Diverged, match=r"at updates 2 to 4, and there is no checkpoint.*\n.*--learning-rate"):
        loop.run(wild)
    with pytest.raises(Diverged, match="no checkpoint to go back to"):
        loop.run(replace(wild, out=str(tmp_path / "wild2"), save_every=0))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny_llama: Path, tmp_path: Path, job_of: Callable, small_disk: Path
) -> None:
    wanted = job(tiny_llama, small_disk / "out", job_of, keep=1)

    def fill(done: int, total: int, text: str) -> None:
        whole = list(small_disk.glob(".out.partial*/checkpoints/update-*/.metadata"))
        if done >= 3 and whole and not (small_disk / "fill").exists():
            try:
                (small_disk / "fill").write_bytes(bytes(6 << 20))
            except OSError:
                pass

    with pytest.raises(Exhausted, match=r"could not be written .*space.*; that of update \d+ is whole"):
        loop.run(wanted, fill)
    whole = sorted(small_disk.glob(".out.partial*/checkpoints/update-*"))
    assert [(path / ".metadata").exists() for path in whole] == [True]
    (small_disk / "fill").unlink()
    found = loop.run(wanted)
    assert found["resumed_at"] == int(whole[0].name[-8:])
    assert len(found["losses"]) == 8


@pytest.mark.slow
def test_a_killed_rank_costs_one_interval(tmp_path: Path, job_of: Callable) -> None:
    """kill -9 after update 11 with checkpoints each 4: all start again at 8, and end where the whole run ends."""
    model = write_llama(tmp_path / "m")
    more = {"batch": 12, "save_every": 4}
    whole = loop.run(Job.from_dict(job_of(model, "whole", **more)))
    case = {"name": "killed", "job": job_of(model, "killed", **more, dp=1, fsdp=2), "kill": [1, 11]}
    found = torchrun(tmp_path / "ranks", [case], 2, "--max-restarts", "2")["killed"]
    assert (tmp_path / "killed.kill").exists()
    assert found["resumed_at"] in (4, 8)
    np.testing.assert_allclose(found["losses"], whole["losses"], rtol=1e-4)
    np.testing.assert_allclose(found["held_out"], whole["held_out"], rtol=1e-5)


@pytest.mark.slow
def test_two_ranks_go_on_as_three_and_as_one(tmp_path: Path, job_of: Callable) -> None:
    model = write_llama(tmp_path / "m")
    more = {"batch": 12, "save_every": 4}
    whole = loop.run(Job.from_dict(job_of(model, "whole", **more)))
    for ranks, layout, stop in ((2, {"tp": 2}, [1, 6]), (3, {"dp": 1, "fsdp": 3}, [0, 13])):
        case = {"name": f"on {ranks}", "job": job_of(model, "moved", **more, **layout), "term": stop}
        (tmp_path / "moved.term").unlink(missing_ok=True)
        found = torchrun(tmp_path / f"ranks{ranks}", [case], ranks)[f"on {ranks}"]
        assert "stopped by a signal" in found["text"], found
    found = loop.run(Job.from_dict(job_of(model, "moved", **more)))
    assert found["resumed_at"] == 14
    np.testing.assert_allclose(found["losses"], whole["losses"], rtol=1e-4)
    np.testing.assert_allclose(found["held_out"], whole["held_out"], rtol=1e-5)


@pytest.mark.slow
def test_the_command_restarts_and_says_one_thing(tmp_path: Path, job_of: Callable) -> None:
    """`wherry train --ranks 2`: a rank is killed from outside; then a batch that does not divide, told once."""
    model = write_llama(tmp_path / "m")
    line = [
        sys.executable, "-m", "wherry", "train", str(model), "--data", job_of(model, "x")["data"], "--steps", "400",
        "--length", "32", "--ranks", "2", "--save-every", "20", "--batch", "4",
    ]  # fmt: skip
    said = tmp_path / "said.txt"
    with open(said, "w") as file:
        running = subprocess.Popen([*line, "-o", str(tmp_path / "out"), "--max-restarts", "1"], stderr=file)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".out.partial*/checkpoints/update-*/.metadata")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-f", "wherry.train.*", "-P", str(running.pid)], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[0]), signal.SIGKILL)
    assert running.wait(timeout=400) == 0, said.read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert next(row for row in report["rows"] if row["what"] == "updates")["value"] == 400
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 400
    done = subprocess.run([*line[:-1], "5", "-o", str(tmp_path / "odd")], capture_output=True, text=True, timeout=300)
    assert done.returncode == BadInput.code
    assert done.stderr.count("cannot be divided") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_full_disk_is_said_once_by_all_ranks(tmp_path: Path, job_of: Callable, small_disk: Path) -> None:
    """A disk with room for one checkpoint of two: the second fails on both ranks, and the command says so once."""
    (small_disk / "fill").write_bytes(bytes(4 << 20))
    fields = job_of(write_llama(tmp_path / "m"), "x")
    done = subprocess.run(
        [sys.executable, "-m", "wherry", "train", fields["model"], "-o", str(small_disk / "out"), "--data",
         fields["data"], "--set", f"cache={tmp_path / 'cache'}", "--steps", "12", "--length", "32", "--ranks", "2",
         "--save-every", "2", "--batch", "4", "--set", "timeout=60"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == Exhausted.code, done.stderr
    assert done.stderr.count("error:") == done.stderr.count("that of update 2 is whole") == 1, done.stderr
    whole = list(small_disk.glob(".out.partial*/checkpoints/update-*"))
    assert [path.name for path in whole] == ["update-00000002"]
    assert (whole[0] / ".metadata").exists()
