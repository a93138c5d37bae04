"""Windows of text, against slices and counts made here; bytes of text, against the file's own size."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from wherry.data import shipped
from wherry.errors import BadInput
from wherry.objective import IGNORE
from wherry.task import Task
from wherry.train import samples, text


@pytest.mark.parametrize("n", [2, 9, 10, 16, 17, 18, 40, 41])
@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 1), (8, 3), (1, 1), (8, 20)])
def test_windows_begin_at_each_stride(n: int, length: int, stride: int) -> None:
    found = text.Windows("x", "", np.arange(n), length, stride)
    starts = [i for i in range(0, n, stride or length) if i + length + 1 <= n]
    assert len(found) == len(starts)
    if starts:
        batch = found.batch(np.arange(len(found)))
        assert batch["input_ids"][:, 0].tolist() == starts
        assert (batch["targets"] - batch["input_ids"] == 1).all()


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 13, 16, 17, 33, 100])
@pytest.mark.parametrize(("length", "overlap"), [(8, 4), (8, 1), (8, 7), (16, 8)])
def test_overlapping_windows_judge_each_token_once(n: int, length: int, overlap: int) -> None:
    found = text.Overlapping("x", "", np.arange(n), length, overlap)
    seen = []
    for i in range(len(found)):
        batch = found.batch(np.array([i]))
        inputs, targets = batch["input_ids"][0], batch["targets"][0]
        for place, target in enumerate(targets.tolist()):
            if target != IGNORE:
                assert inputs[: place + 1].tolist() == list(range(target - place - 1, target))  # the context is whole
                assert place >= (overlap if i else 0)
                seen.append(target)
    assert seen == list(range(1, n))


def test_bytes_of_a_text_are_those_of_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    """By tokenizing, and by spelling out the tokens of an array; one in which bytes are not characters."""
    said = shipped("calibration").read_text(encoding="utf8")[:3000] + "Überfahrt – 渡し舟\n"
    (tmp_path / "a.txt").write_text(said, encoding="utf8")
    task = Task.of(tiny_llama, {"architectures": ["LlamaForCausalLM"]})
    cut = text.Cut(32, judged=True)
    ours = samples.opened(str(tmp_path / "a.txt"), task, cut, tmp_path / "tokens").parts[0]
    assert ours.size == (tmp_path / "a.txt").stat().st_size
    np.save(tmp_path / "a.npy", ours.tokens)
    spelled = samples.opened(str(tmp_path / "a.npy"), task, cut, tmp_path / "tokens").parts[0]
    assert spelled.size == ours.size
    assert spelled.digest == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()  # of the content alone
    assert samples.opened(str(tmp_path / "a.npy"), task, text.Cut(32), tmp_path / "tokens").parts[0].size == 0
    with pytest.raises(BadInput, match="where documents begin"):
        samples.opened(str(tmp_path / "a.npy"), task, text.Cut(32, "documents"), tmp_path / "tokens")


def test_cuts_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="fewer than the 8 tokens"):
        text.Cut(8, overlap=8)
    with pytest.raises(BadInput, match="packing=stream"):
        text.Cut(8, "documents", stride=4)
