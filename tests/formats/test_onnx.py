"""The ONNX format: our codes, bit for bit, as ONNX Runtime itself reads them; nothing else in the file."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from tests.conftest import write_llama, write_tokenizer
from wherry import data, deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Corrupt, Diverged, Missing, Unsupported
from wherry.formats.onnx import legal, proof
from wherry.graph import blocks, foreign
from wherry.graph import edit as graph
from wherry.ops import grid
from wherry.recipe import Recipe
from wherry.scheme import QTensor, Scheme

FORMAT = shelf.find("formats", "onnx")


def quiet(done: int, total: int, text: str) -> None:
    pass


def compressed(model: Path, recipe: str, out: Path) -> Checkpoint:
    plan = Recipe.parse(recipe).plan(Checkpoint.open(model), ("onnx",))
    batches = []
    if plan.recipe.calibrated:
        batches = deliver.calibration(plan.checkpoint, data.read(data.shipped("calibration")), 8, 64, 0)
    deliver.deliver(plan, out, (), batches, {}, lambda result: None, quiet)
    return Checkpoint.open(out)


def exported(checkpoint: Checkpoint, out: Path, **options: str) -> Artifact:
    out.mkdir()
    return FORMAT.save(checkpoint, out, quiet, **options)


def operators(artifact: Artifact) -> Counter:
    return Counter(node.op_type for node in onnx.load(artifact.main, load_external_data=False).graph.node)


def logits(artifact: Artifact, tokens: list[int], width: int = 16, **extra: np.ndarray) -> np.ndarray:
    """One pass by bare onnxruntime, with an empty cache; width of a head."""
    session = onnxruntime.InferenceSession(str(artifact.main), providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, i.shape[1], 0, width), np.float32) for i in session.get_inputs() if "past" in i.name}
    feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past, **extra}
    return session.run(["logits"], feeds)[0][0]


def reference(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return checkpoint.module()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def decodes_exactly(artifact: Artifact, checkpoint: Checkpoint) -> set[str]:
    seen = set()
    for name, weight in FORMAT.decode(artifact):
        assert name not in seen
        seen.add(name)
        np.testing.assert_array_equal(weight, checkpoint.weight(name).numpy(), err_msg=name)
    return seen


@pytest.fixture(scope="module")
def four(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Artifact]:
    """A tied Llama at W4A16_ASYM with its embedding at 8 bits, and its export."""
    folder = tmp_path_factory.mktemp("four")
    checkpoint = compressed(tiny_llama, "rtn:scheme=W4A16_ASYM,group_size=32", folder / "checkpoint")
    return checkpoint, exported(checkpoint, folder / "onnx")


@pytest.fixture(scope="module")
def mixed(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Artifact]:
    """A Bert with every kind of layer: static int8, int8 per token, 4-bit and 8-bit blocks, a table of codes.

    Its layers are made eight times louder, or a random model's embedding would hardly depend on them.
    """
    folder = tmp_path_factory.mktemp("mixed")
    loud = shutil.copytree(tiny_bert, folder / "loud")
    state = load_file(loud / "model.safetensors")
    save_file({k: 8 * v if v.ndim == 2 and "layer." in k else v for k, v in state.items()}, loud / "model.safetensors")
    recipe = (
        "rtn:scheme=W8A8_STATIC,targets=re:.*layer.0.attention.* | rtn:scheme=W8A8,targets=re:.*layer.0.* | "
        "rtn:scheme=W4A16_ASYM,group_size=32,targets=re:.*layer.1.attention.* | rtn:scheme=W8A16,group_size=32"
    )
    checkpoint = compressed(loud, recipe, folder / "checkpoint")
    return checkpoint, exported(checkpoint, folder / "onnx")


def test_decoder_holds_the_codes_and_runs_as_torch(four: tuple[Checkpoint, Artifact]) -> None:
    checkpoint, artifact = four
    assert decodes_exactly(artifact, checkpoint) == set(checkpoint.names())
    count = operators(artifact)
    assert (count["MatMulNBits"], count["GatherBlockQuantized"], count["MatMul"], count["Gather"]) == (15, 1, 0, 1)
    tokens = list(range(5, 65))
    want = reference(checkpoint, tokens)
    np.testing.assert_allclose(logits(artifact, tokens), want, atol=1e-4 * np.abs(want).max())
    artifact.verify()


def test_tied_head_reads_the_embedding_and_nothing_is_there_twice(four: tuple[Checkpoint, Artifact]) -> None:
    checkpoint, artifact = four
    model = onnx.load(artifact.main)
    readers = [node.op_type for node in model.graph.node if "model.embed_tokens.weight.codes" in node.input]
    assert sorted(readers) == ["GatherBlockQuantized", "MatMulNBits"]
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    floats = {name: v.size for name, v in tensors.items() if v.dtype.kind == "f" and not name.endswith(".scales")}
    assert all(size <= 64 for name, size in floats.items() if name not in ("cos_cache", "sin_cache"))
    linear = sum(checkpoint.tensor(n).code.numel() for n in checkpoint.names() if "_proj" in n)
    embedding = 512 * 64
    codes = sum(v.nbytes for name, v in tensors.items() if name.endswith(".codes"))
    assert codes == linear // 2 + embedding
    assert sum(v.nbytes for name, v in tensors.items() if name.endswith(".scales")) == 4 * (linear + embedding) // 32


@pytest.mark.parametrize(
    ("recipe", "model", "bytes_per_weight"),
    [
        ("rtn:scheme=W8A16,group_size=16", {}, 1.0),
        ("rtn:scheme=W3A16_ASYM,group_size=32,embedding=W4A16_ASYM", {"hidden": 128}, 0.5),
        ("rtn:scheme=W2A16_ASYM,group_size=16,embedding=keep", {}, 0.25),
        ("rtn:scheme=W4A16,group_size=-1", {"tied": False}, 0.5),
    ],
)
def test_every_scheme(tmp_path: Path, recipe: str, model: dict[str, object], bytes_per_weight: float) -> None:
    checkpoint = compressed(write_llama(tmp_path / "model", **model), recipe, tmp_path / "c")
    artifact = exported(checkpoint, tmp_path / "onnx")
    assert decodes_exactly(artifact, checkpoint) == set(checkpoint.names())
    tokens = list(range(5, 65))
    want = reference(checkpoint, tokens)
    got = logits(artifact, tokens, checkpoint.config["hidden_size"] // 4)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    sizes = {t.name: numpy_helper.to_array(t).nbytes for t in onnx.load(artifact.main).graph.initializer}
    name = "model.layers.1.mlp.up_proj.weight"
    assert sizes[f"{name}.codes"] == bytes_per_weight * checkpoint.tensor(name).code.numel()
    assert (operators(artifact)["GatherBlockQuantized"] == 1) == ("=keep" not in recipe)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        tie_word_embeddings=kind != "Mistral",
    )  # fmt: skip
    if kind == "Mistral":
        config.sliding_window = None
    module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    (tmp_path / "model").mkdir()
    module.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    checkpoint = compressed(tmp_path / "model", "rtn:scheme=W4A16_ASYM,group_size=32", tmp_path / "c")
    artifact = exported(checkpoint, tmp_path / "onnx")
    assert decodes_exactly(artifact, checkpoint) == set(checkpoint.names())
    tokens = list(range(5, 65))
    want = reference(checkpoint, tokens)
    np.testing.assert_allclose(logits(artifact, tokens), want, atol=1e-4 * np.abs(want).max())
    assert checkpoint.config["architectures"][0] in legal.DECODERS


def test_stock_genai_generates_what_transformers_does(four: tuple[Checkpoint, Artifact]) -> None:
    import onnxruntime_genai

    checkpoint, artifact = four
    prompt = checkpoint.task.encode("A wherry is a light boat.")
    model = onnxruntime_genai.Model(str(artifact.path))
    assert list(onnxruntime_genai.Tokenizer(model).encode("A wherry is a light boat.")) == prompt
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + 32, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    with torch.no_grad():
        ids = torch.tensor([prompt])
        want = checkpoint.module().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=3
        )[0]
    assert [int(token) for token in generator.get_sequence(0)] == want.tolist()


def test_last_row_only_when_asked(four: tuple[Checkpoint, Artifact]) -> None:
    _, artifact = four
    tokens = list(range(5, 25))
    last = logits(artifact, tokens, logits_from=np.array([-1]))
    assert last.shape[0] == 1
    np.testing.assert_allclose(last[0], logits(artifact, tokens)[-1], atol=1e-4)


def test_activations_int8_is_another_model_and_says_so(four: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    checkpoint, exact = four
    rounded = exported(checkpoint, tmp_path / "int8", activations="int8")
    assert (exact.manifest["activations"], rounded.manifest["activations"]) == ("float32", "int8")
    levels = [
        {
            a.i
            for node in onnx.load(x.main, load_external_data=False).graph.node
            for a in node.attribute
            if a.name == "accuracy_level"
        }
        for x in (exact, rounded)
    ]
    assert levels == [{0, 4}, {4}]  # the 8-bit head runs in two halves
    kl = [next(c["value"] for c in x.manifest["checks"] if c["what"] == "kl") for x in (exact, rounded)]
    assert kl[0] < 1e-8 < 1e-6 < kl[1]
    with pytest.raises(BadInput, match="activations=int4"):
        exported(checkpoint, tmp_path / "int4", activations="int4")


def test_halves_keep_sixteen_bits(tmp_path: Path) -> None:
    """Against float64: int8 activations lose 2 digits, two halves lose none that float32 has at this width."""
    import onnx_ir

    rng = np.random.default_rng(0)
    scheme = Scheme.parse("W8A16,group_size=32")
    w = torch.from_numpy(rng.standard_normal((96, 256), dtype=np.float32))
    tensor = grid.encode(w, scheme, *grid.fit(w, scheme))
    x = (rng.standard_normal((2, 5, 256)) * np.exp(rng.standard_normal((2, 5, 256)))).astype(np.float32)
    x[1, 4, 32:64] = 0
    want = x.astype(np.float64) @ tensor.decode().double().numpy().T
    errors = []
    for halved in (False, True):
        a = onnx_ir.Value(
            name="x", shape=onnx_ir.Shape(["b", "s", 256]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        )
        node = onnx_ir.node("Identity", [a], name="place")
        node.outputs[0].name = "y"
        g = onnx_ir.Graph([a], list(node.outputs), nodes=[node], opset_imports={"": 21}, name="one")
        model = onnx_ir.Model(g, ir_version=10)
        graph.replace(node, graph.linear(node, a, "w", blocks.blocks(tensor), 4))
        if halved:
            assert graph.halve(g) == 1
        graph.write(model, tmp_path / f"{halved}.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / f"{halved}.onnx"), providers=["CPUExecutionProvider"])
        errors.append(np.abs(session.run(None, {"x": x})[0] - want).max() / np.abs(want).max())
    assert errors[0] > 3e-3
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_foreign_decoding_is_the_grid(bits: int) -> None:
    """Codes laid out by hand, decoded by ONNX Runtime: scale * (u - zero), lowest bits first."""
    rng = np.random.default_rng(bits)
    n, g, size = 5, 3, 16
    u = rng.integers(0, 1 << bits, (n, g, size), dtype=np.uint8)
    z = rng.integers(0, 1 << bits, (n, g), dtype=np.uint8)
    scales = rng.random((n, g), dtype=np.float32)
    shifts = (np.arange(size) * bits) % 8
    codes = (u.astype(np.uint16) << shifts).reshape(n, g, -1, 8 // bits).sum(-1).astype(np.uint8)
    want = (scales[..., None] * (u.astype(np.float32) - z[..., None])).reshape(n, g * size)
    np.testing.assert_array_equal(foreign.blocked(codes, scales, z, bits, size), want)
    want = (scales[..., None] * (u.astype(np.float32) - (1 << (bits - 1)))).reshape(n, g * size)
    np.testing.assert_array_equal(foreign.blocked(codes, scales, None, bits, size), want)


@pytest.mark.parametrize(
    "spelling",
    ["W4A16_ASYM,group_size=16", "W2A16_ASYM,group_size=32", "W3A16_ASYM,group_size=-1", "W8A16,group_size=32"],
)
def test_blocks_in_the_whole_operator(spelling: str) -> None:
    """MatMulNBits on the identity, over the weight as it is stored: the zeros are packed by rows."""
    scheme = Scheme.parse(spelling)
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    tensor = grid.encode(w, scheme, *grid.fit(w, scheme))
    b = blocks.blocks(tensor)
    constants = {"codes": b.codes, "scales": b.scales}
    if b.zeros is not None:
        constants["zeros"] = blocks.pack(b.zeros, b.bits)
    facts = {"K": b.k, "N": b.n, "bits": b.bits, "block_size": b.size}
    node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **facts)
    np.testing.assert_array_equal(foreign.run(node, constants, np.eye(96, dtype=np.float32)).T, tensor.decode().numpy())
    assert b.bytes == sum(value.nbytes for value in constants.values())


def test_encoder_int8_runs_as_int8_and_as_planned(mixed: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    checkpoint, artifact = mixed
    count = operators(artifact)
    assert (count["MatMulNBits"], count["GatherBlockQuantized"], count["QuantizeLinear"]) == (
        6,
        1,
        4,
    )  # q, k, v share one
    assert decodes_exactly(artifact, checkpoint) == {row["name"] for row in artifact.manifest["plan"]}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(artifact.main), options, providers=["CPUExecutionProvider"])
    fused = Counter(
        node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    )
    assert fused["MatMulIntegerToFloat"] == 6
    assert next(c for c in artifact.manifest["checks"] if c["what"] == "int8 products")["value"] == 6
    task = checkpoint.task
    texts = ["up the river", "Cargo for the shallow upper reaches, carried by wherry.", "a"]
    inputs = task.batch(texts)
    got = session.run(["embedding"], inputs)[0]
    module = fake_quantized(checkpoint)
    with torch.no_grad():
        out = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    want = task.answer({"last_hidden_state": out.last_hidden_state.numpy()}, inputs)
    assert np.median((got * want).sum(-1)) > 1 - 1e-6
    assert (got * want).sum(-1).min() > 1 - 1e-3
    alone = np.concatenate([session.run(["embedding"], task.batch([text]))[0] for text in texts])
    assert (got * alone).sum(-1).min() > 1 - 1e-5  # per token: a sentence does not depend on its batch


def fake_quantized(checkpoint: Checkpoint) -> torch.nn.Module:
    """The torch module in float64 with its inputs rounded by the formulas of the schemes, written out again here."""
    module = checkpoint.module().double()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if not isinstance(tensor, QTensor) or tensor.scheme.activations is None:
            continue

        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], t: QTensor = tensor) -> torch.Tensor:
            x = inputs[0]
            if t.activation_scale is None:
                step = x.abs().max(-1, keepdim=True).values / 127
                return torch.round(x / step) * step
            step, zero = t.activation_scale.item(), t.activation_zero.item()
            return (torch.clamp(torch.round(x / step) + zero, -128, 127) - zero) * step

        module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
    return module


def test_encoder_float_is_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_bert)
    artifact = exported(checkpoint, tmp_path / "onnx")
    task = checkpoint.task
    inputs = task.batch(["one", "two or three words", "A wherry carries cargo where big ships cannot go."])
    session = onnxruntime.InferenceSession(str(artifact.main), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        out = checkpoint.module()(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    want = task.answer({"last_hidden_state": out.last_hidden_state.numpy()}, inputs)
    np.testing.assert_allclose(session.run(["embedding"], inputs)[0], want, atol=1e-5)
    assert decodes_exactly(artifact, checkpoint) == {name for name in checkpoint.names() if "position_ids" not in name}
    model = onnx.load(artifact.main)
    assert not any(prop for node in model.graph.node for prop in node.metadata_props)  # they would hold paths
    floats = 4 * sum(checkpoint.weight(name).numel() for name in checkpoint.names() if "position_ids" not in name)
    assert sum((artifact.path / f).stat().st_size for f in ("model.onnx", "model.onnx.data")) < floats + 120_000


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rtn:scheme=W4A16,group_size=8", "group_size=16 is"),
        ("rtn:scheme=W8A8", "language models keep float activations in ONNX; use W8A16 or W4A16"),
    ],
)
def test_plans_that_cannot_be_written(tiny_llama: Path, recipe: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Recipe.parse(recipe).plan(Checkpoint.open(tiny_llama), ("onnx",))


def test_schemes_that_have_no_operator() -> None:
    for scheme, message in (
        (Scheme(5), "nearest is W4A16"),
        (Scheme(7), "nearest is W8A16"),
        (Scheme(1), "nearest is W4A16"),
        (Scheme(4, kind="fp"), "not a plain integer scheme"),
        (Scheme(2, planes=2), "not a plain integer scheme"),
    ):
        with pytest.raises(Unsupported, match=message):
            blocks.container(scheme)
    with pytest.raises(Unsupported, match="group_size=64 is"):
        blocks.block_size(Scheme.parse("W4A16,group_size=96"), 576)
    with pytest.raises(Unsupported, match="cannot be cut into blocks"):
        blocks.block_size(Scheme.parse("W8A16"), 100)
    static = Scheme.parse("W8A8_STATIC").activations
    for scheme, message in (
        (Scheme(4, activations=static), "8 bits by 8 bits"),
        (Scheme(8, activations=static), "per row"),
    ):
        with pytest.raises(Unsupported, match=message):
            legal.integer(scheme, scheme.activations, generator=False)


def test_architectures_that_are_not_drawn(tiny_llama: Path) -> None:
    with pytest.raises(Unsupported, match="FalconForCausalLM is not exported to ONNX"):
        legal.architecture({"architectures": ["FalconForCausalLM"]})
    config = {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "max_position_embeddings": 256}
    with pytest.raises(Unsupported, match="windows of 64"):
        legal.architecture(config)
    assert legal.architecture(config | {"use_sliding_window": False}) == "MistralModel"


def test_codes_with_activations_are_not_written_without_them(tiny_llama: Path, tmp_path: Path) -> None:
    plan = Recipe.parse("rtn:scheme=W8A8").plan(Checkpoint.open(tiny_llama))
    deliver.deliver(plan, tmp_path / "c", (), [], {}, lambda result: None, quiet)
    with pytest.raises(Unsupported, match="language models keep float activations"):
        exported(Checkpoint.open(tmp_path / "c"), tmp_path / "onnx")


def test_missing_package_is_said_before_any_work(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Recipe.parse("rtn:scheme=W4A16,group_size=32").plan(Checkpoint.open(tiny_llama))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime_genai" else find(name))
    with pytest.raises(Missing, match=r"onnxruntime_genai, not installed\.\npip install 'wherry\[onnx\]'"):
        FORMAT.check(plan)


def test_notes_of_the_plan(tiny_llama: Path) -> None:
    plan = Recipe.parse("rtn:scheme=W3A16,group_size=32").plan(Checkpoint.open(tiny_llama))
    assert FORMAT.check(plan)["model.layers.0.mlp.up_proj.weight"] == "3-bit codes live in 4-bit blocks: no bytes saved"
    plan = Recipe.parse("rtn:scheme=W4A16,group_size=-1").plan(Checkpoint.open(tiny_llama))
    assert "once for each block of 64" in FORMAT.check(plan)["model.layers.0.mlp.up_proj.weight"]
    assert "model.layers.0.input_layernorm.weight" not in FORMAT.check(plan)


def copy(artifact: Artifact, folder: Path) -> Path:
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes((artifact.path / name).read_bytes())
    return folder / "model.onnx"


def test_checks_fail_on_a_second_copy_and_on_a_missing_one(four: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    checkpoint, artifact = four
    path = copy(artifact, tmp_path / "twice")
    model = onnx.load(path)
    proof.holds(checkpoint, path)
    extra = checkpoint.weight("model.layers.0.mlp.up_proj.weight").numpy()
    model.graph.initializer.append(numpy_helper.from_array(extra, "a_float_copy"))
    onnx.save(model, path)
    with pytest.raises(Corrupt, match="a_float_copy .* a second copy"):
        proof.holds(checkpoint, path)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "model.layers.1.mlp.up_proj.weight.codes":
                node.input[i] = "other"
    for tensor in model.graph.initializer:
        tensor.name = "other" if tensor.name == "model.layers.1.mlp.up_proj.weight.codes" else tensor.name
    onnx.save(model, path)
    with pytest.raises(Corrupt, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not stored as codes"):
        proof.holds(checkpoint, path)


def test_checks_fail_when_a_scale_is_wrong(four: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    checkpoint, artifact = four
    path = copy(artifact, tmp_path / "scaled")
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name == "model.layers.0.self_attn.v_proj.weight.scales")
    tensor.raw_data = (numpy_helper.to_array(tensor) * 3).tobytes()
    onnx.save(model, path)
    with pytest.raises(Diverged, match="kl .* nats per token"):
        proof.generator(checkpoint, path, exact=True)
    wrong = {name: w for name, w in foreign.decode(path) if not np.array_equal(w, checkpoint.weight(name).numpy())}
    assert list(wrong) == ["model.layers.0.self_attn.v_proj.weight"]


def test_checks_fail_when_int8_would_run_in_float_or_embeddings_differ(
    mixed: tuple[Checkpoint, Artifact], tmp_path: Path
) -> None:
    checkpoint, artifact = mixed
    assert proof.integer_layers(checkpoint) == 6
    with pytest.raises(Diverged, match="7 layers are planned in int8, ONNX Runtime runs 6"):
        proof.fused(artifact.main, 7)
    path = copy(artifact, tmp_path / "reversed")
    model = onnx.load(path)
    (table,) = (t for t in model.graph.initializer if t.name == "embeddings.word_embeddings.weight.codes")
    table.raw_data = numpy_helper.to_array(table)[::-1].tobytes()
    onnx.save(model, path)
    with pytest.raises(Diverged, match="embeddings differ"):
        proof.encoder(checkpoint, path, exact=True)


def test_decode_of_damaged_files_is_refused(four: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    _, artifact = four
    path = copy(artifact, tmp_path / "cut")
    path.with_name("model.onnx.data").write_bytes(b"short")
    with pytest.raises(Corrupt):
        list(foreign.decode(path))
    path.write_bytes(b"this is no model")
    with pytest.raises(Corrupt, match="not an ONNX file"):
        list(foreign.decode(path))


def test_same_bytes_every_time(four: tuple[Checkpoint, Artifact], tmp_path: Path) -> None:
    checkpoint, artifact = four
    assert exported(checkpoint, tmp_path / "again").manifest["files"] == artifact.manifest["files"]


def test_decoded_without_torch(four: tuple[Checkpoint, Artifact]) -> None:
    _, artifact = four
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from wherry import shelf; from wherry.artifact import Artifact\n"
        f"artifact = Artifact.open({str(artifact.path)!r})\n"
        "onnx = shelf.find('formats', 'onnx')\n"
        "print(len(dict(onnx.decode(artifact))), len(onnx.command(artifact)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(len(artifact.manifest["plan"])), "2"]


def test_command_of_a_language_model_runs(four: tuple[Checkpoint, Artifact]) -> None:
    _, artifact = four
    line = FORMAT.command(artifact)[0]
    out = subprocess.run(["sh", "-c", line.replace("python ", f"{sys.executable} ", 1)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("Once")


def test_manifest_carries_what_serving_needs(four: tuple[Checkpoint, Artifact]) -> None:
    checkpoint, artifact = four
    again = Artifact.open(artifact.path)
    assert (again.format, again.main.name, again.task.kind) == ("onnx", "model.onnx", "text-generation")
    assert again.task.stop == checkpoint.task.stop
    genai = json.loads((again.path / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] in (list(checkpoint.task.stop), checkpoint.task.stop[0])
    assert "quantization_config" not in json.loads((again.path / "config.json").read_text())
