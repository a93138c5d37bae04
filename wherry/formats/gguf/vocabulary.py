"""Tokenizers as GGUF metadata, and back: byte-level BPE ("gpt2") and SentencePiece-like BPE ("llama"). Torch-free.

llama.cpp does not store how text is split before the merges, only a name for it (`tokenizer.ggml.pre`). Its converter
finds the name by hashing a test string's ids, which knows a tokenizer only as released; here the split itself, as
tokenizer.json spells it, is looked up in SPLITS, so that a fine-tuned or extended vocabulary is known too.
Source: llama.cpp, src/llama-vocab.cpp (patterns by name; `ignore_merges`); tests compare with its tokenizer.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wherry.errors import Corrupt, Missing, Unsupported
from wherry.formats.gguf.header import Header

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
DIGITS = "each digit alone"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name: (splits in order, whether a whole word of the vocabulary skips the merges); the first name of equals is written
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((DIGITS, GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "tekken": ((TEKKEN,), True),
}
NOTES = {"tekken": "llama.cpp splits words with accents or other scripts a little differently from this tokenizer"}
SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "smaug-bpe": "dbrx", "starcoder": "smollm",
    "refact": "smollm", "command-r": "smollm", "exaone": "smollm", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2",
    "mpt": "gpt-2", "olmo": "gpt-2",
}  # fmt: skip
BPE = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokenizer_config -> GGUF


@dataclass
class Vocabulary:
    """What GGUF stores of a tokenizer. notes: what llama.cpp will do otherwise than the original."""

    kind: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    special: dict[str, int]  # "bos", "eos", "unknown", "padding", "eot" -> id
    add_bos: bool
    space_prefix: bool
    template: Any = None
    notes: list[str] = field(default_factory=list)


@dataclass
class TokenizerFiles:
    """tokenizer.json and its companions in a folder."""

    folder: Path

    @cached_property
    def data(self) -> dict[str, Any]:
        """tokenizer.json. Raises Missing or Corrupt."""
        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise Missing(f"{self.folder} has no tokenizer.json, which GGUF needs inside of the file")
        return _json(file)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json with the chat template; empty when there is none."""
        file, template = self.folder / "tokenizer_config.json", self.folder / "chat_template.jinja"
        config = _json(file) if file.exists() else {}
        return config | ({"chat_template": template.read_text(encoding="utf8")} if template.exists() else {})

    @cached_property
    def ends(self) -> list[int]:
        """Ids that end an answer, as generation_config.json and config.json list them."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            found = _json(self.folder / name).get("eos_token_id") if (self.folder / name).exists() else None
            ids += found if isinstance(found, list) else [] if found is None else [found]
        return ids


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf8")))
    except (ValueError, TypeError) as error:
        raise Corrupt(f"{file} is not a JSON object: {error}") from error


def vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read a folder's tokenizer for a model whose embedding has that many rows.

    Raises:
        Unsupported: a kind of tokenizer that is not written here.
        Corrupt: more tokens than the embedding has rows.
    """
    files = TokenizerFiles(folder)
    data, model = files.data, files.data["model"]
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(
            f"a {model['type']} tokenizer is not written as GGUF here; byte-level and SentencePiece BPE are"
        )
    parts = _flat(data.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    if not byte_level and not model.get("byte_fallback"):
        raise Unsupported("this BPE tokenizer is neither byte-level nor has it byte tokens; llama.cpp runs only these")
    ids: dict[str, int] = dict(model["vocab"])
    added = {int(t["id"]): t for t in data.get("added_tokens", [])}
    ids |= {t["content"]: i for i, t in added.items()}
    if max(ids.values()) >= rows:
        raise Corrupt(f"{folder}: token id {max(ids.values())} has no row in the embedding, which has {rows}")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, i in ids.items():
        tokens[i], types[i] = text, NORMAL
        if i in added:
            types[i] = CONTROL if added[i].get("special") else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    special = {}
    for name, own in SPECIAL.items():
        token = files.config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            special[own] = ids[token]
    if files.ends and special.get("eos") not in files.ends:
        special["eos"] = files.ends[0]
    others = [i for i in files.ends if i != special.get("eos")]
    if others:
        special["eot"] = others[0]
    made = Vocabulary(
        "gpt2" if byte_level else "llama", "default", tokens, types, merges, None, special,
        _adds_bos(files, special), False, files.config.get("chat_template"),
    )  # fmt: skip
    if byte_level:
        _byte_level(made, parts, model, data)
    else:
        _sentencepiece(made, parts, data)
    return made


def _byte_level(made: Vocabulary, parts: list[dict[str, Any]], model: dict[str, Any], data: dict[str, Any]) -> None:
    splits = []
    for part in parts:
        if part["type"] == "Digits" and part.get("individual_digits"):
            splits.append(DIGITS)
        elif part["type"] == "Split" and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        elif part["type"] == "ByteLevel":
            splits += [GPT2] if part.get("use_regex", True) else []
            splits += ["a space before the text"] if part.get("add_prefix_space") else []
        else:
            splits.append(part["type"])
    key = (tuple(splits), bool(model.get("ignore_merges")))
    made.pre = next((name for name, known in SPLITS.items() if known == key), "default")
    if made.pre == "default":
        made.notes.append(
            "llama.cpp has no name known here for how this tokenizer splits text: text may become other tokens there "
            "(token ids given by wherry are not affected)"
        )
    elif made.pre in NOTES:
        made.notes.append(NOTES[made.pre])
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer:
        made.notes.append(f"the tokenizer normalizes text ({normalizer}), llama.cpp does not: rare letters may differ")


def _sentencepiece(made: Vocabulary, parts: list[dict[str, Any]], data: dict[str, Any]) -> None:
    """Scores in the order of the merges: llama.cpp joins the pair whose result has the highest score first."""
    ids = {text: i for i, text in enumerate(made.tokens)}
    scores = [0.0] * len(made.tokens)
    for rank, merge in reversed(list(enumerate(made.merges))):
        left, _, right = merge.partition(" ")
        if left + right in ids:
            scores[ids[left + right]] = -float(rank + 1)
    for i, text in enumerate(made.tokens):
        if len(text) == 6 and text.startswith("<0x"):
            made.types[i] = BYTE
    if "unknown" in made.special:
        made.types[made.special["unknown"]] = UNKNOWN
    normalizers = _flat(data.get("normalizer"), "normalizers")
    made.space_prefix = any(n["type"] == "Prepend" for n in normalizers) or any(
        p["type"] == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts
    )
    made.scores, made.merges = scores, []


def _flat(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [inner for part in node[key] for inner in _flat(part, key)] if node["type"] == "Sequence" else [node]


def _adds_bos(files: TokenizerFiles, special: dict[str, int]) -> bool:
    """Whether plain text gets a BOS in front: what the post-processor does, not what the configuration says."""
    for part in _flat(files.data.get("post_processor"), "processors"):
        first = part.get("single", [{}])[0].get("SpecialToken", {}).get("id")
        if first is not None:
            ids = part["special_tokens"][first]["ids"]
            return bool(ids[:1] == [special.get("bos")])
    return False


def check(header: Header) -> None:
    """Raises Corrupt where the vocabulary contradicts itself, which llama.cpp answers by aborting the process."""
    data = header.metadata
    tokens = data.get("tokenizer.ggml.tokens", [])
    seen = {str(token).partition("\0")[0] for token in tokens} if isinstance(tokens, list) else set()
    if len(seen) != len(tokens):  # as C reads them: up to a NUL
        raise Corrupt(f"{header.path} is damaged: a token is in its vocabulary twice")
    for key in ("token_type", "scores"):
        values = data.get(f"tokenizer.ggml.{key}", tokens)
        if not isinstance(values, list) or len(values) != len(tokens):
            raise Corrupt(f"{header.path} is damaged: tokenizer.ggml.{key} does not have one entry for each token")
    for key, value in data.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            if not isinstance(value, int) or not 0 <= value < len(tokens):
                raise Corrupt(f"{header.path} is damaged: {key} is {value!r} of {len(tokens)} tokens")


def tokenizer_files(header: Header) -> dict[str, dict[str, Any]]:
    """{file name: content} of the Hugging Face tokenizer that a GGUF file describes.

    Raises:
        Unsupported: a kind of vocabulary or a way to split text that is not read.
        Corrupt: lists of unequal length, ids out of range.
    """
    data = header.metadata
    tokens = data.get("tokenizer.ggml.tokens") or []
    kind = data.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or not tokens:
        raise Unsupported(f"{header.path}: a vocabulary of the kind '{kind}' is not read here; gpt2 and llama are")
    check(header)
    types = data.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    scores = data.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    special = {
        name: data[f"tokenizer.ggml.{own}_token_id"]
        for name, own in (*SPECIAL.items(), ("eot", "eot"))
        if f"tokenizer.ggml.{own}_token_id" in data
    }
    added = [
        {"id": i, "content": text, "special": t != USER}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (text, t) in enumerate(zip(tokens, types, strict=True))
        if t in (UNKNOWN, CONTROL, USER)
    ]
    vocab = {text: i for i, (text, t) in enumerate(zip(tokens, types, strict=True)) if t != UNUSED}
    made: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    pre = data.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        made |= _gpt2_parts(header, vocab, pre)
    else:
        made |= _llama_parts(data, vocab, dict(zip(tokens, scores, strict=True)))
    add_bos = bool(data.get("tokenizer.ggml.add_bos_token", kind == "llama" or SAME.get(pre, pre) == "llama-bpe"))
    if add_bos and "bos" in special:
        bos = tokens[special["bos"]]
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        made["post_processor"] = {
            "type": "TemplateProcessing", "single": first, "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [special["bos"]], "tokens": [bos]}},
        }  # fmt: skip
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}
    config |= {f"{name}_token": tokens[i] for name, i in special.items() if name in SPECIAL}
    if "tokenizer.chat_template" in data:
        config["chat_template"] = data["tokenizer.chat_template"]
    ends = [special[name] for name in ("eos", "eot") if name in special]
    generation: dict[str, Any] = {f"{name}_token_id": special[name] for name in ("bos", "pad") if name in special}
    if ends:
        generation["eos_token_id"] = ends[0] if len(set(ends)) == 1 else list(dict.fromkeys(ends))
    return {"tokenizer.json": made, "tokenizer_config.json": config, "generation_config.json": generation}


def _gpt2_parts(header: Header, vocab: dict[str, int], pre: str) -> dict[str, Any]:
    name = SAME.get(pre, pre)
    if name not in SPLITS:
        known = ", ".join((*SPLITS, *SAME))
        raise Unsupported(f"{header.path}: text split the '{pre}' way is not read here; {known} are")
    splits, whole = SPLITS[name]
    parts: list[dict[str, Any]] = []
    for split in splits:
        if split == DIGITS:
            parts.append({"type": "Digits", "individual_digits": True})
        elif split != GPT2:
            parts.append({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts.append(level | {"use_regex": GPT2 in splits})
    model = {
        **BPE, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole, "vocab": vocab,
        "merges": header.metadata.get("tokenizer.ggml.merges", []),
    }  # fmt: skip
    return {
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": level | {"use_regex": True}, "decoder": level | {"use_regex": True}, "model": model,
    }  # fmt: skip


def _llama_parts(data: dict[str, Any], vocab: dict[str, int], scores: dict[str, float]) -> dict[str, Any]:
    """Merges from scores: every way to cut a token into two, best result first."""
    pairs = []
    for text in vocab:
        cuts = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
        pairs += [(-scores[text], vocab[left], vocab[right], left, right) for left, right in cuts]
    space = data.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    unknown = data.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [
            *prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, *strip,
        ]},
        "model": {
            **BPE, "unk_token": None if unknown is None else data["tokenizer.ggml.tokens"][unknown], "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
            "merges": [f"{left} {right}" for *_, left, right in sorted(pairs)],
        },
    }  # fmt: skip
