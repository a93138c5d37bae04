"""Cargo: what travels with a model into every checkpoint and artifact: side files, the task, the manifest's facts.

No torch: what has been exported is described without it.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry.task import Task

if TYPE_CHECKING:
    from wherry.artifact import Artifact
    from wherry.checkpoint import Checkpoint

# beside config.json and the weights
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "LICENSE", "LICENSE.txt",
)  # fmt: skip


def beside(folder: Path, task: Task, out: Path) -> None:
    """Copy the side files that `folder` has into `out`, and write the task as task.json."""
    for name in SIDE_FILES:
        if (folder / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    text = json.dumps(task.to_dict(), indent=1, sort_keys=True) + "\n"
    (out / "task.json").write_text(text, encoding="utf8")


def facts(checkpoint: "Checkpoint", form: str, main: str) -> dict[str, Any]:
    """The manifest's facts that every format has. form: its name on the shelf; main: the file that is opened."""
    from wherry import __version__

    return {
        "wherry": __version__, "format": form, "main": main, "task": checkpoint.task.to_dict(),
        "model": checkpoint.name, "recipe": checkpoint.recipe, "source": checkpoint.origin,
        "license": checkpoint.license, "params": checkpoint.params, "plan": checkpoint.plan,
    }  # fmt: skip


def command(artifact: "Artifact") -> list[str]:
    """Copy-paste lines that load what a stock ONNX Runtime reads."""
    session = f"onnxruntime.InferenceSession('{artifact.main}')"
    return [f'python -c "import onnxruntime; s = {session}"', f"wherry serve {artifact.path}"]
