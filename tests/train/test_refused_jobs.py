"""Bad input is told in one clear line before any work, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_llama
from tests.train.conftest import cnn, pictures
from wherry.data import shipped
from wherry.errors import BadInput
from wherry.objective import IGNORE
from wherry.train import loop, mesh
from wherry.train.job import Job


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "in" / "text.txt"
    file.parent.mkdir()
    file.write_text(shipped("calibration").read_text(encoding="utf8")[:20_000], encoding="utf8")
    return file


def job(student: Path, out: Path, data: Path, **more: object) -> Job:
    fields = {"model": str(student), "out": str(out), "data": str(data), "length": 16, "steps": 2, "batch": 4}
    return Job.from_dict(fields | more)


def refused(wanted: Job, said: str) -> None:
    """The run ends with the words, and neither the model nor a working folder is there."""
    with pytest.raises(BadInput, match=said):
        loop.run(wanted)
    out = Path(wanted.out)
    assert not [path for path in out.parent.glob(f"*{out.name}*") if not path.name.endswith(".tokens")]


def test_a_teacher_of_another_number_of_tokens(tmp_path: Path, text: Path) -> None:
    student, teacher = write_llama(tmp_path / "s"), write_llama(tmp_path / "t", seed=1)
    from transformers import AutoModelForCausalLM

    larger = AutoModelForCausalLM.from_pretrained(teacher)
    larger.resize_token_embeddings(640, mean_resizing=False)
    larger.save_pretrained(teacher)
    refused(job(student, tmp_path / "out", text, teacher=str(teacher), recipe="kl"), "640 .*512.*vocabularies")
    assert not (tmp_path / ".out.tokens").exists()


@pytest.mark.parametrize("top", [0, 8])
def test_a_teacher_whose_tokens_mean_something_else(tmp_path: Path, text: Path, top: int) -> None:
    """As many tokens, two of which have changed places: no shape tells."""
    student, teacher = write_llama(tmp_path / "s"), write_llama(tmp_path / "t", seed=1)
    known = json.loads((teacher / "tokenizer.json").read_text())
    words = known["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(known))
    wanted = job(student, tmp_path / "out", text, teacher=str(teacher), recipe="kl", top=top)
    refused(wanted, "another vocabulary: its token 'a'")
    assert not (tmp_path / ".out.tokens").exists()


def test_a_teacher_of_other_labels(tmp_path: Path) -> None:
    student = cnn(tmp_path / "s", "group")
    teacher = Path(shutil.copytree(student, tmp_path / "t"))
    task = json.loads((teacher / "task.json").read_text())
    task["labels"] = ["g", "r", "b"]
    (teacher / "task.json").write_text(json.dumps(task))
    data = pictures(tmp_path / "in")
    refused(job(student, tmp_path / "out", data, teacher=str(teacher), recipe="kl", length=0), "other labels")


def test_a_cache_of_another_teacher(tiny_llama: Path, tmp_path: Path, text: Path) -> None:
    """The cache of the first teacher is there; the second is refused before it is asked, and the cache stays."""
    student = tiny_llama
    first, second = (write_llama(tmp_path / f"t{seed}", seed=seed) for seed in (1, 2))
    more = {"recipe": "kl", "top": 8, "cache": str(tmp_path / "cache")}
    losses = loop.run(job(student, tmp_path / "one", text, teacher=str(first), **more))["losses"]
    kept = {path: path.read_bytes() for path in (tmp_path / "cache" / "teacher").iterdir()}
    refused(job(student, tmp_path / "out", text, teacher=str(second), **more), r"made with teacher \w+, this run has")
    assert {path: path.read_bytes() for path in (tmp_path / "cache" / "teacher").iterdir()} == kept
    again = loop.run(job(student, tmp_path / "again", text, teacher=str(first), **more))["losses"]
    assert again == losses


def test_a_batch_of_which_nothing_counts(tiny_llama: Path, tmp_path: Path, text: Path) -> None:
    """No loss of 0 / 0, and no step: the weights stay what they were."""
    wanted = job(tiny_llama, tmp_path / "out", text)
    with mesh.joined(wanted) as world:
        run = loop.Run(wanted, world)
        before = [p.detach().clone() for p in run.learner.trained]
        batch = run.data.batch(np.arange(4))
        batch["targets"].fill_(IGNORE)
        with pytest.raises(BadInput, match="update 1: a batch without a single target"):
            run.learner.update(0, 2, [batch], None, (0.0,))
        run.saver.close()
        run.log.close()
    assert all(torch.equal(a, b) for a, b in zip(before, run.learner.trained, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("a.jsonl", "", "empty"), ("a.jsonl", '{"text": ""}\n', "empty"), ("a", None, "no texts")],
)
def test_data_without_a_sample(tiny_llama: Path, tmp_path: Path, name: str, content: str | None, said: str) -> None:
    data = tmp_path / "in" / name
    data.parent.mkdir()
    data.mkdir() if content is None else data.write_text(content)
    refused(job(tiny_llama, tmp_path / "out", data), said)


@pytest.mark.parametrize("place", [0, 16 * 8 + 1])
@pytest.mark.parametrize("token", [600, IGNORE])
def test_a_token_out_of_range(tiny_llama: Path, tmp_path: Path, place: int, token: int) -> None:
    """Also the first of all, which is no target of any window; also where it looks like 'does not count'."""
    tokens = np.random.default_rng(0).integers(0, 512, 16 * 9 + 1)
    tokens[place] = token
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "tokens.npy", tokens)
    wanted = job(tiny_llama, tmp_path / "out", tmp_path / "in" / "tokens.npy", batch=1, steps=9)
    with pytest.raises(BadInput, match=f"{token} is out of range"):
        loop.run(wanted)
    assert not (tmp_path / "out").exists()
