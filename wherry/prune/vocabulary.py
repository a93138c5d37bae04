"""Vocabulary: drop tokens that hardly occur, with their rows of the embedding; the tokenizer is rewritten with it.

Source: Abdaoui et al. 2020, "Load What You Need" (arXiv:2010.05609), for WordPiece.
Idea:   WordPiece takes the longest piece that it knows. Without a rare word it takes smaller pieces of it, so every
        text can still be read as long as single characters stay; texts of kept tokens alone are cut as before.
Shapes: embedding [tokens, hidden]; rows of kept tokens, in their old order.
Cost:   counting the tokens of the texts; small beside anything else.
Fails:  Unsupported: a tokenizer that is no WordPiece, a head that is tied to the table in a way that is not known.
        BadInput: fewer tokens than must stay (special tokens and single characters).
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wherry.checkpoint import Checkpoint
from wherry.dependency import folder
from wherry.dependency.kinds import amount, rounded
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Pass
from wherry.report import read_object

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Pass):
    """tokens: a share that goes (0.5) or how many stay (16000). multiple: the number is rounded to it.

    What stays: special tokens and single characters, then tokens by how often they are expected: by their number
    in the calibration texts, and what Zipf's law gives their place in the table, whose order is that of frequency.
    """

    tokens: str = "0.5"
    multiple: int = 64

    calibrated = True

    def remake(
        self, checkpoint: Checkpoint, out: Path, batches: list[dict[str, np.ndarray]], progress: Progress
    ) -> None:
        """Write the model with fewer tokens into the folder `out`."""
        stay = self.planned(checkpoint)
        file = checkpoint.task.folder / "tokenizer.json"
        tokenizer = read_object(file)
        table: dict[str, int] = tokenizer["model"]["vocab"]
        seen: Counter[int] = Counter()
        for batch in batches:
            seen.update(np.asarray(batch["input_ids"]).ravel().tolist())
        kept = chosen(tokenizer, table, seen, stay)
        module = folder.module(checkpoint)
        before = len(table)
        index = torch.from_numpy(np.array(kept))
        for layer in module.modules():
            for name, p in list(layer.named_parameters(recurse=False)):
                if p.shape[0] == before and isinstance(layer, nn.Embedding | nn.Linear):
                    setattr(layer, name, nn.Parameter(p.detach()[index].contiguous(), requires_grad=False))
        config = dict(checkpoint.config) | {"vocab_size": len(kept)}
        new = {old: i for i, old in enumerate(kept)}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(config.get(key), int):
                config[key] = new[config[key]]
        folder.save(checkpoint, module, config, out)
        rewrite(out, tokenizer, table, new)

    def expect(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model with fewer rows in its table; raises what can be known to fail."""
        stay, before = self.planned(checkpoint), int(checkpoint.config["vocab_size"])
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        shapes = {n: (stay, *s[1:]) if s[0] == before else s for n, s in shapes.items()}
        return folder.expected(checkpoint, dict(checkpoint.config) | {"vocab_size": stay}, shapes)

    def remarks(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Tokens before and after."""
        return {"": f"tokens {int(checkpoint.config['vocab_size']):,} -> {self.planned(checkpoint):,}"}

    def planned(self, checkpoint: Checkpoint) -> int:
        """How many tokens stay."""
        file = checkpoint.task.folder / "tokenizer.json"
        kind = read_object(file).get("model", {}).get("type") if file.is_file() else None
        if checkpoint.graph is not None or kind != "WordPiece":
            raise Unsupported(
                f"vocabulary drops tokens of WordPiece tokenizers in Hugging Face folders; {checkpoint.name} has {kind}"
            )
        tokenizer = read_object(file)
        before, must = int(checkpoint.config["vocab_size"]), len(needed(tokenizer, tokenizer["model"]["vocab"]))
        if before != len(tokenizer["model"]["vocab"]):
            raise Unsupported(f"{file} has {len(tokenizer['model']['vocab'])} tokens, config.json says {before}")
        stay = rounded(amount(self.tokens, before, "tokens"), before, self.multiple)
        if stay < must:
            raise BadInput(f"tokens={self.tokens}: {must} special tokens and single characters must stay")
        if stay == before:
            raise BadInput(f"vocabulary: tokens={self.tokens} leaves all {before}, once rounded: let more go")
        return stay


def needed(tokenizer: dict[str, Any], table: dict[str, int]) -> set[int]:
    """Ids that must stay: special tokens, and single characters, alone and within words, so that all can be spelled."""
    special = {int(token["id"]) for token in tokenizer.get("added_tokens", [])}
    prefix = tokenizer["model"].get("continuing_subword_prefix", "##")
    return special | {i for token, i in table.items() if len(token.removeprefix(prefix)) == 1}


def chosen(tokenizer: dict[str, Any], table: dict[str, int], seen: Counter[int], stay: int) -> list[int]:
    """Old ids that stay, in their order."""
    must = needed(tokenizer, table)
    free = [i for token, i in sorted(table.items(), key=lambda item: item[1]) if i not in must and token[:1] != "["]
    unused = [i for token, i in table.items() if i not in must and token[:1] == "["]  # no text is cut to these
    total = max(seen.total(), 1) / np.log(len(table))
    expected = {i: seen[i] + total / rank for rank, i in enumerate(free, 1)}
    order = sorted(free, key=lambda i: -expected[i]) + unused
    return sorted([*must, *order[: stay - len(must)]])


def rewrite(out: Path, tokenizer: dict[str, Any], table: dict[str, int], new: dict[int, int]) -> None:
    """tokenizer.json and vocab.txt with the new numbers."""
    tokenizer["model"]["vocab"] = {token: new[i] for token, i in table.items() if i in new}
    for token in tokenizer.get("added_tokens", []):
        token["id"] = new[int(token["id"])]
    renumber(tokenizer.get("post_processor"), new)
    padding = tokenizer.get("padding")
    if isinstance(padding, dict):
        padding["pad_id"] = new[int(padding["pad_id"])]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf8")
    if (out / "vocab.txt").exists():
        words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
        (out / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf8")


def renumber(part: Any, new: dict[int, int]) -> None:
    """Ids inside of a post-processor: `ids` of a template's special tokens, `[token, id]` of BERT's."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "ids" and isinstance(value, list):
                part[key] = [new[int(i)] for i in value]
            elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
                value[1] = new[int(value[1])]
            else:
                renumber(value, new)
    elif isinstance(part, list):
        for value in part:
            renumber(value, new)
