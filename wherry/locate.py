"""Locate: from what a user names to a folder or file: a local path, or a hub id where there is a network."""

import re
from pathlib import Path

from wherry.errors import Missing

GENERIC = {"model", "models", "checkpoint", "main", "final", "output", "out"}


def name_of(folder: Path) -> str:
    """What to call the model in a folder: the folder's name, or that of the one above where it says nothing."""
    folder = folder.resolve()
    return folder.parent.name if folder.name.lower() in GENERIC and folder.parent.name else folder.name


def license_of(folder: Path) -> str:
    """The `license:` of the model card's front matter, or an empty string."""
    card = folder / "README.md"
    if card.exists():
        match = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf8", errors="replace")[:4000], re.M)
        return match[1] if match else ""
    return ""


def locate(model: str | Path) -> Path:
    """A local path as it is; else a hub id, downloaded (or found in the local cache).

    Raises Missing with the way out when it is neither.
    """
    path = Path(model)
    if path.exists():
        return path
    text = str(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith(".") or path.parent.is_dir():
        raise Missing(
            f"no such model: {text}\nGive a folder with config.json, a .gguf file, or a hub id like org/name."
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise Missing(f"no such folder: {text}\nFor a hub id: pip install 'wherry[torch]'") from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "1_Pooling/*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds: all of them mean that it is not to be had
        reason = str(error).strip().split("\n")[0][:160]
        raise Missing(f"no such model: {text} is not a folder here, and the hub did not give it.\n{reason}") from error
