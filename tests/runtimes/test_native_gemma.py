"""Gemma in the native runtime, against transformers: each of its peculiarities, from folders and from GGUF files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tests.conftest import write_tokenizer
from tests.formats.test_gguf import coded, save
from tests.runtimes.conftest import GEMMA, TOKENS, divergence, log_softmax, reference, together, write_family
from wherry import deliver, errors, prove
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.choose import artifacts, load
from wherry.evaluate import proof
from wherry.recipe import Recipe
from wherry.session import Sampling

native = pytest.importorskip("wherry.runtimes.native", reason="not built: pip install ./native", exc_type=ImportError)
ISAS = [name for name, runs in native.wherry_native.isas().items() if runs]
PLAIN = ("gemma", "gemma2", "gemma3")  # that GGUF can say


class InBrain(t.DynamicCache):
    """transformers' own cache in bf16, as the engine keeps it."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *rest, **more)


def expected(checkpoint: Checkpoint, tokens: list[int] = TOKENS) -> np.ndarray:
    """Log-probabilities [T-1, vocabulary] of transformers in float32 with keys and values in bf16."""
    module = checkpoint.module()
    with torch.no_grad():
        out = module(torch.tensor([tokens]), past_key_values=InBrain(config=module.config), use_cache=True)
    return torch.log_softmax(out.logits[0, :-1].double(), -1).numpy()


def scored(artifact: Artifact, tokens: list[int] = TOKENS, **knobs: Any) -> np.ndarray:
    made = native.load(artifact, **{"threads": 2} | knobs)
    try:
        return log_softmax(made.score(tokens).logits)
    finally:
        made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_family(tmp_path_factory.mktemp(kind) / kind, kind) for kind in GEMMA}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", GEMMA)
def test_logits_are_those_of_transformers(kind: str, isa: str, folders: dict[str, Path]) -> None:
    found = scored(artifacts(folders[kind])[0], isa=isa)
    kl = divergence(expected(Checkpoint.open(folders[kind])), found)
    print(f"{kind}, {isa}: KL {kl:.1e} nats")
    assert kl < (1e-4 if isa == "avx512bf16" else 1e-6)  # which also rounds queries and probabilities to bf16


CHANGES = {
    "scale of the embedding": lambda s: {"embed_scale": 1.0},
    "scale of the queries": lambda s: {"query_scale": s.query_scale * 1.1},
    "cap of the scores": lambda s: {"attention_cap": 0.0},
    "cap of the logits": lambda s: {"logit_cap": 0.0},
    "windows": lambda s: {"windows": (0,) * s.layers},
    "rotation of windowed layers": lambda s: {"rotation": (0,) * s.layers},
    "1 + w": lambda s: {"arch": replace(s.arch, lift=0.0)},
    "gelu": lambda s: {"arch": replace(s.arch, act=("hidden_act", "silu"))},
}


@pytest.mark.parametrize("kind", GEMMA)
def test_each_part_counts(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model has cannot be left out unseen: these tests would find it."""
    from wherry.runtimes.native import weights

    right, shape_of = expected(Checkpoint.open(folders[kind])), weights.shape_of
    for name, change in CHANGES.items():
        same = []

        def changed(*given: Any, change: Any = change, same: list[bool] = same) -> Any:
            shape = shape_of(*given)
            same.append(all(getattr(shape, key) == value for key, value in change(shape).items()))
            return replace(shape, **change(shape))

        monkeypatch.setattr(weights, "shape_of", changed)
        kl = divergence(right, scored(artifacts(folders[kind])[0]))
        print(f"{kind} without {name}: KL {kl:.1e} nats")
        assert same[0] or kl > 3e-4, name


@pytest.mark.parametrize("kind", PLAIN)
def test_gguf_files(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same model, and read back the same configuration; llama.cpp judges them in test_llamacpp."""
    checkpoint = Checkpoint.open(folders[kind])
    file = save(checkpoint, tmp_path / "out")
    kl = divergence(expected(checkpoint), scored(file))
    assert kl < 1e-6
    back = Checkpoint.open(file.main)
    assert divergence(reference(checkpoint, TOKENS), reference(back, TOKENS)) < 1e-12
    for name in checkpoint.names():
        assert torch.allclose(back.weight(name), checkpoint.weight(name), rtol=0, atol=2e-7), name


@pytest.mark.parametrize("kind", ["gemma2-odd", "gemma3-odd"])
def test_what_gguf_cannot_say_is_not_written(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folders[kind])
    with pytest.raises(errors.Unsupported, match=r"windows.*cannot say.*\n.*gguf"):
        save(checkpoint, tmp_path / "windows")
    checkpoint.config.pop("layer_types", None)
    checkpoint.config.pop("sliding_window_pattern", None)
    with pytest.raises(errors.Unsupported, match="query_pre_attn_scalar"):
        save(checkpoint, tmp_path / "scalar")


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_codes_of_four_bits(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Compressed, proved and run: as our checkpoint and as GGUF, with activations of 16 bits the float computation."""
    plan = Recipe.parse("rtn:scheme=W4A16,group_size=32").plan(Checkpoint.open(folders[kind]), ("gguf",))
    deliver.deliver(plan, tmp_path / "out", ("gguf",), [], {}, lambda result: None, lambda *news: None)
    right = expected(Checkpoint.open(tmp_path / "out"))
    for at in (tmp_path / "out", tmp_path / "out" / "gguf"):
        fine, coarse = (divergence(right, scored(Artifact.open(at), activations=bits)) for bits in (16, 8))
        print(f"{kind} from {at.name}: KL {fine:.1e} with 16 bits, {coarse:.1e} nats with 8")
        assert fine < 5e-6
        assert fine * 20 < coarse < 5e-3
    items = [prove.Item(Artifact.open(tmp_path / "out" / "gguf"), "native", "gguf")]
    report = prove.prove(items, Checkpoint.open(folders[kind]), behave=False, speed=False)
    assert proof.verdict(report), report


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_alone_or_together_in_parts_or_whole(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Windows and caps across steps of 256 tokens and pages of 32, in company of others, by one thread or three."""
    checkpoint = coded(folders[kind], "W4A16,group_size=32")
    checkpoint.config["max_position_embeddings"] = 2048
    file = save(checkpoint, tmp_path / "out")
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 512, n).tolist() for n in random.permutation(np.arange(1, 400, 37))]
    how = [Sampling(max_tokens=4 + 3 * i, temperature=i % 2 * 0.8, seed=i) for i in range(len(prompts))]
    made = native.load(file, threads=2)
    alone = [list(made.generate(p, h)) for p, h in zip(prompts, how, strict=True)]
    assert together(made, prompts, how) == alone
    long = random.integers(3, 512, 700).tolist()
    whole = made.score(long).logits
    made.close()
    for count in (1, 3):
        other = native.load(file, threads=count)
        assert np.abs(other.score(long).logits - whole).max() < 1e-4 * np.abs(whole).max()
        other.close()
    fine = scored(file, long, activations=16)
    assert divergence(expected(checkpoint, long), fine) < 5e-6


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_keys_and_values_of_8_bits(kind: str, folders: dict[str, Path]) -> None:
    made = load(artifacts(folders[kind])[0], "native:cache=int8", 2)
    found = log_softmax(made.score(TOKENS).logits)
    made.close()
    right = reference(Checkpoint.open(folders[kind]), TOKENS)
    assert divergence(right, found) < 5e-3


def test_what_is_not_run_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(kind: str, words: str, error: type[Exception] = errors.Unsupported, **changed: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for file in folders[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(error, match=words):
            native.load(artifacts(folder)[0])

    refused("gemma2", "no activation 'relu'.*gelu_pytorch_tanh alone", hidden_activation="relu")
    refused("gemma3", "looks ahead.*torch", use_bidirectional_attention=True)
    refused("gemma3", "without a sliding window.*torch", sliding_window=None)
    refused("gemma2", "caps that no model has", errors.Corrupt, final_logit_softcapping=-1.0)
    torch.manual_seed(0)
    config = t.CohereConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t.CohereForCausalLM(config).save_pretrained(tmp_path / "cohere")
    write_tokenizer(tmp_path / "cohere")
    with pytest.raises(errors.Unsupported, match="'cohere'.*gemma, gemma2, gemma3_text"):
        native.load(artifacts(tmp_path / "cohere")[0])


def test_a_norm_that_is_missing_is_missed(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folders["gemma2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.post_feedforward_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.Corrupt, match="layers.1.post_feedforward_layernorm.weight"):
        native.load(artifacts(tmp_path)[0])


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_damaged_files_are_refused_not_run(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Bytes of the header changed: an error of ours, or a model that answers."""
    data = save(coded(folders[kind], "W4A16,group_size=32"), tmp_path / "out").main.read_bytes()
    random = np.random.default_rng(0)
    places = [data.index(key) for key in (b"gemma", b".attention.", b".sliding_window", b"softcapping", b"freq_base")
              if key in data]  # fmt: skip
    refused = 0
    for i in range(80):
        bad = bytearray(data)
        for _ in range(1 + i % 5):
            bad[int(random.choice(places)) + random.integers(0, 60)] = random.integers(0, 256)
        file = tmp_path / "bad.gguf"
        file.write_bytes(bytes(bad))
        try:
            made = native.load(Artifact.open(file), threads=1, context=64)
            try:
                for _ in made.generate([5, 6, 7], Sampling(max_tokens=2)):
                    pass
            finally:
                made.close()
        except errors.Error:
            refused += 1
    assert refused > 20
