"""A .gguf file alone, as somebody else ships it: its task is the whole task, not a default one."""

import shutil
from pathlib import Path

from wherry.checkpoint import Checkpoint
from wherry.choose import artifacts
from wherry.deliver import save
from wherry.evaluate import proof


def test_task_of_a_bare_file(tiny_llama: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(tiny_llama)
    made = save(original, tmp_path / "gguf", "gguf", lambda done, total, text: None)
    alone = tmp_path / "alone" / made.main.name
    alone.parent.mkdir()
    shutil.copyfile(made.main, alone)
    (found,) = artifacts(alone)
    assert found.task.max_length == original.task.max_length == 256
    assert all(row.value for row in proof.same_task(found.task, Checkpoint.open(alone).task, None, "alone"))
