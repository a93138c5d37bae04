"""Tokenizer: does an artifact cut texts as the original does? tokenizer.json against tokenizer.json."""

from pathlib import Path
from typing import Any

from wherry.report import read_object

CALLED = ("padding", "truncation")  # what a call may set


def differs(ours: Path, theirs: Path, fewer: bool = False) -> tuple[list[str], str]:
    """Parts of tokenizer.json that are not the same in two folders, and what to say where there are none.

    fewer: ours has lost tokens on purpose: those that stay must have kept their order, and the rest say the same of
    them under their new numbers.
    """
    a, b = plain(ours), plain(theirs)
    good = "tokenizer.json says the same"
    if fewer and "model" in a and "model" in b:
        own, old = a["model"].pop("vocab"), b["model"].pop("vocab")
        stay = [token for token in sorted(old, key=old.__getitem__) if token in own]
        if stay != sorted(own, key=own.__getitem__):
            return ["the order of its tokens"], good
        good = f"{len(own):,} of {len(old):,} tokens in their order, the rest says the same of them"
        a = renumbered(a, {new: old[token] for token, new in own.items()})
    return [key for key in {**a, **b} if a.get(key) != b.get(key)], good


def plain(folder: Path) -> dict[str, Any]:
    """tokenizer.json without what a call may set; empty where there is none."""
    file = folder / "tokenizer.json"
    return {key: value for key, value in read_object(file).items() if key not in CALLED} if file.exists() else {}


def renumbered(part: Any, old: dict[int, int]) -> Any:
    """The same with every token's number the old one: `id`, `ids`, and BERT's `[token, id]` of sep and cls."""
    if isinstance(part, list):
        return [renumbered(value, old) for value in part]
    if not isinstance(part, dict):
        return part
    out: dict[str, Any] = {}
    for key, value in part.items():
        if key == "id" and isinstance(value, int):
            out[key] = old.get(value)
        elif key == "ids" and isinstance(value, list):
            out[key] = [old.get(i) for i in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            out[key] = [value[0], old.get(value[1])]
        else:
            out[key] = renumbered(value, old)
    return out
