"""Journal: what is whole is done; another run's files are never taken; each end leaves what it must."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from wherry.errors import BadInput, Exhausted
from wherry.journal import Journal, vacant

STAMP = {"recipe": "rtn", "data": None}


def test_a_unit_is_done_when_it_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", STAMP)
    assert not journal.resumed
    assert journal.done("block-0") is None
    journal.save("block-0", {"w": torch.arange(4.0)}, {"rows": [{"name": "w"}]})
    again = Journal(tmp_path / "out", STAMP)
    assert again.resumed
    done = again.done("block-0")
    assert done is not None
    assert torch.equal(done.read("w"), torch.arange(4.0))
    assert Journal.facts(done) == {"rows": [{"name": "w"}]}
    file = again.path("block-0")
    file.write_bytes(file.read_bytes()[:-1])
    assert again.done("block-0") is None


def test_other_runs_have_other_folders(tmp_path: Path) -> None:
    folders = {Journal(tmp_path / "out", {**STAMP, **more}).folder for more in ({}, {"recipe": "gptq"}, {"seed": 1})}
    assert len(folders) == 3
    assert Journal(tmp_path / "out", dict(reversed(STAMP.items()))).folder in folders


def test_leftovers_of_a_write_are_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", STAMP)
    (journal.folder / "result" / "deep").mkdir(parents=True)
    for name in ("unit-a.safetensors.tmp", "result/model.tmp", "result/deep/x.tmp"):
        (journal.folder / name).write_text("half")
    Journal(tmp_path / "out", STAMP)
    assert not list(journal.folder.rglob("*.tmp"))


def test_finish_from_every_state_that_a_kill_leaves(tmp_path: Path) -> None:
    """The states by hand: before the first rename; after it; with the journal half removed; with it gone."""
    for i, state in enumerate(("before", "moved", "half", "gone")):
        out = tmp_path / str(i) / "out"
        journal = Journal(out, STAMP)
        journal.save("block-0", {"w": torch.zeros(2)}, {})
        result = journal.folder / "result"
        result.mkdir()
        (result / "file").write_text("content")
        if state != "before":
            os.rename(result, journal.ready)
        if state == "half":
            journal.path("block-0").unlink()
        if state == "gone":
            shutil.rmtree(journal.folder)
        again = Journal(out, STAMP)
        assert again.ready.exists() == (state != "before")
        again.finish(again.folder / "result")
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert (out / "file").read_text() == "content"


def test_discard_removes_the_folders_that_it_made_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    journal = Journal(tmp_path / "mine" / "a" / "b" / "out", STAMP)
    assert journal.folder.exists()
    journal.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())
    journal = Journal(tmp_path / "mine" / "a" / "out", STAMP)
    (tmp_path / "mine" / "a" / "other").write_text("somebody's")
    journal.discard()
    assert [p.name for p in (tmp_path / "mine" / "a").iterdir()] == ["other"]


def test_space_is_asked_for_before_anything_is_made(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(Exhausted, match="MB needed"):
        Journal(tmp_path / "deep" / "out", STAMP, need=free + (1 << 40))
    assert not list(tmp_path.iterdir())


def test_what_is_spent_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "out", STAMP)
    journal.save("block-0", {"w": torch.zeros(100_000, dtype=torch.uint8)}, {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    Journal(tmp_path / "out", STAMP, need=140_000)
    with pytest.raises(Exhausted):
        Journal(tmp_path / "out", STAMP, need=160_000)


def test_vacant(tmp_path: Path) -> None:
    assert vacant(tmp_path / "out") == []
    assert vacant(tmp_path / "a" / "b" / "out") == [tmp_path / "a" / "b", tmp_path / "a"]
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("link", "."):
        with pytest.raises(BadInput, match="exists already"):
            vacant(tmp_path / name)
    with pytest.raises(BadInput, match="longer"):
        vacant(tmp_path / ("x" * 201))
