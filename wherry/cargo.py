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


def cache(config: dict[str, Any]) -> str:
    """How a configuration says that keys and values are kept: "int8", "int4", another's word, or "" for floats."""
    words = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if not isinstance(words, dict):
        return ""
    kind = {"int": "int", "float": "fp"}.get(str(words.get("type", "int")), "?")
    own = words.get("dynamic") is True and words.get("strategy") == "group"
    return f"{kind}{words.get('num_bits', '?')}" + ("" if kind == "int" and own else f" per {words.get('strategy')}")


def unread(config: dict[str, Any], runtime: str) -> str:
    """A remark for a format whose runtime keeps the cache in floats, or ""."""
    kept = cache(config)
    return f"kv cache {kept} is recorded, but {runtime} does not read it: keys and values stay float" if kept else ""


def facts(checkpoint: "Checkpoint", form: str, main: str) -> dict[str, Any]:
    """The manifest's facts that every format has. form: its name on the shelf; main: the file that is opened."""
    from wherry import __version__

    kept = cache(checkpoint.config)
    return ({"kv_cache": kept} if kept else {}) | {
        "wherry": __version__, "format": form, "main": main, "task": checkpoint.task.to_dict(),
        "model": checkpoint.name, "recipe": checkpoint.recipe, "source": checkpoint.origin,
        "license": checkpoint.license, "params": checkpoint.params, "plan": checkpoint.plan,
    }  # fmt: skip


def command(artifact: "Artifact") -> list[str]:
    """Copy-paste lines that load what a stock ONNX Runtime reads."""
    session = f"onnxruntime.InferenceSession('{artifact.main}')"
    return [f'python -c "import onnxruntime; s = {session}"', f"wherry serve {artifact.path}"]
