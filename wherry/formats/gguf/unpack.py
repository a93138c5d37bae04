"""A GGUF file's configuration and tokenizer as a Hugging Face folder in the cache. Torch-free."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from wherry.errors import Exhausted
from wherry.formats.gguf.header import Header
from wherry.formats.gguf.names import check_shapes, config_of
from wherry.formats.gguf.vocabulary import tokenizer_files

REVISION = 1  # of what is written: raise it, and folders of older versions are no longer used


def unpack(header: Header) -> tuple[Path, dict[str, Any]]:
    """(folder with config.json and the tokenizer's files, the configuration).

    The folder is below XDG_CACHE_HOME (else ~/.cache), named after the file and its header's hash.

    Raises:
        Unsupported, Corrupt: what the header says cannot be read, or contradicts itself.
        Exhausted: the cache cannot be written.
    """
    config = config_of(header)
    check_shapes(header, config)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wherry" / "gguf"
    stamp = hashlib.sha256(f"{header.digest} {REVISION}".encode()).hexdigest()[:16]
    folder = root / f"{header.path.stem[:80]}-{stamp}"
    if folder.is_dir():
        return folder, config
    files = {**tokenizer_files(header), "config.json": config}
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
        os.replace(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise Exhausted(f"cannot write {folder}: {error.strerror}.\nFree space, or set XDG_CACHE_HOME.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder, config
