"""What the module is: layers with names, sizes as ints, traceable, prunable; silero-vad against ONNX Runtime."""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils import prune

from tests.formats.torch_module.random_graphs import Graph
from wherry.errors import Corrupt, Missing, Unsupported
from wherry.formats.onnx.torch_module import module
from wherry.formats.onnx.torch_module.builder import Builder
from wherry.formats.onnx.torch_module.values import Ints


def session(source: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    data = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    return onnxruntime.InferenceSession(data, options)


def close(net: nn.Module, source: Any, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Every output within `tolerance` of its largest number."""
    wanted = session(source).run(None, feeds)
    with torch.no_grad():
        got = net(*[torch.from_numpy(v) for v in feeds.values()])
    for one, other in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        assert list(one.shape) == list(other.shape)
        assert np.abs(one.numpy().astype(float) - other.astype(float)).max() <= tolerance * max(
            np.abs(other).max(), 1e-3
        )


def encoder(batch: int | str = "batch", length: int | str = "length", heads: int = 4, d: int = 32) -> onnx.ModelProto:
    """A block of attention over an embedding, named as exporters name it; the table is the head's weight too."""
    g = Graph(0, batch)
    g.opset = 17
    random = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> str:
        g.weights.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / d**0.5, name))
        return name

    x = g.op("Gather", weight("embed.weight", 50, d), "ids")
    x = g.op("LayerNormalization", x, weight("norm.weight", d), weight("norm.bias", d), axis=-1)
    parts = []
    for name in ("query", "key", "value"):
        y = g.op("MatMul", x, weight(f"layer.0.{name}.weight", d, d))
        y = g.op("Add", weight(f"layer.0.{name}.bias", d), y)
        if isinstance(batch, int) and isinstance(length, int):
            y = g.op("Reshape", y, g.ints(batch, length, heads, d // heads))
        else:
            first, second = (
                g.op("Gather", g.op("Shape", x), g.constant(np.array([i], np.int64)), axis=0) for i in (0, 1)
            )
            y = g.op("Reshape", y, g.op("Concat", first, second, g.ints(heads, d // heads), axis=0))
        parts.append(g.op("Transpose", y, perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3]))
    scores = g.op("Softmax", g.op("MatMul", parts[0], parts[1]), axis=-1)
    y = g.op("Transpose", g.op("MatMul", scores, parts[2]), perm=[0, 2, 1, 3])
    tail = g.ints(batch, length, d) if isinstance(batch, int) and isinstance(length, int) else g.op(
        "Concat", g.op("Slice", g.op("Shape", y), g.ints(0), g.ints(2)), g.ints(d), axis=0)  # fmt: skip
    y = g.op("MatMul", g.op("Reshape", y, tail), weight("layer.0.out.weight", d, d))
    y = g.op("MatMul", y, g.op("Transpose", "embed.weight", perm=[1, 0]))
    graph = helper.make_graph(
        g.nodes, "encoder", [helper.make_tensor_value_info("ids", TensorProto.INT64, [batch, length])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [batch, length, 50])], g.weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, shape)


def test_layers_names_and_shared_weights() -> None:
    net = module(encoder())
    kinds = {name: type(layer) for name, layer in net.named_modules() if type(layer).__module__.startswith("torch.nn")}
    assert kinds["embed"] is nn.Embedding
    assert kinds["norm"] is nn.LayerNorm
    assert {kinds[f"layer.0.{name}"] for name in ("query", "key", "value", "out")} == {nn.Linear}
    head = next(
        layer for name, layer in net.named_modules() if name.startswith("embed") and isinstance(layer, nn.Linear)
    )
    assert head.weight is net.embed.weight
    assert net.get_submodule("layer.0.query").bias is not None
    assert not [name for name, _ in net.named_buffers()]
    close(net, encoder(), {"ids": ids(3, 7)})
    close(net, encoder(), {"ids": ids(1, 4)})


def test_each_constant_is_its_own() -> None:
    """Constants made on the way are told apart by what they are, not by an address that is used again."""
    builder = Builder(onnx.GraphProto(), {"": 17})
    nodes = [builder.tensor(Ints([i])) for i in range(500)]
    assert [getattr(builder.root, node.target).item() for node in nodes] == list(range(500))


def test_frozen_graph_runs_at_another_batch() -> None:
    net = module(encoder(2, 7))
    assert net.meta["batch"].startswith("free: 2"), net.meta
    close(net, encoder(2, 7), {"ids": ids(2, 7)})
    close(net, encoder(5, 7), {"ids": ids(5, 7)})
    kept = module(encoder(2, 7), symbolic=False)
    with pytest.raises(RuntimeError):
        kept.forward(torch.from_numpy(ids(5, 7)))


def test_frozen_batch_that_cannot_be_free_says_why() -> None:
    g = Graph(0, 2)
    y = g.op("ReduceMean", "x", axes=[0], keepdims=1)
    proto = g.proto(y, [1, 8, 12, 12])
    proto.opset_import[0].version = 13
    assert "does not grow" in module(proto).meta["batch"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_can_be_taken_out(frozen: bool) -> None:
    """What pruning does: rows of query, key and value and columns of the output go; the reshapes follow."""
    net = module(encoder(2, 7) if frozen else encoder())
    keep = torch.cat([torch.arange(8), torch.arange(16, 32)])
    x = torch.from_numpy(ids(2, 7))
    for name in ("query", "key", "value"):
        layer = net.get_submodule(f"layer.0.{name}")
        prune.random_structured(layer, "weight", 1, dim=0)  # torch's own tool takes the layer
        prune.remove(layer, "weight")
        layer.weight, layer.bias = nn.Parameter(layer.weight[keep]), nn.Parameter(layer.bias[keep])
    out = net.get_submodule("layer.0.out")
    whole = out.weight.detach().clone()
    out.weight = nn.Parameter(whole[:, keep])
    got = net(x)
    back = module(encoder())  # the same with the head's columns set to nothing
    for name in ("query", "key", "value"):
        source, target = net.get_submodule(f"layer.0.{name}"), back.get_submodule(f"layer.0.{name}")
        target.weight.data[keep], target.bias.data[keep] = source.weight.data, source.bias.data
    back.get_submodule("layer.0.out").weight.data[:, 8:16] = 0
    torch.testing.assert_close(got, back(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # TorchScript still serves
@pytest.mark.parametrize("seed", [3, 11])
def test_traced_and_exported_again(seed: int, tmp_path: Path) -> None:
    net, x, other = module(Graph(seed, 2).model()), torch.randn(2, 8, 12, 12), torch.randn(5, 8, 12, 12)
    with torch.no_grad():
        wanted = net(other)
        torch.testing.assert_close(torch.jit.trace(net, (x,))(other), wanted, rtol=1e-4, atol=1e-5)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "net.pt2")
        again = module(tmp_path / "net.pt2")
        torch.testing.assert_close(again(other), wanted, rtol=1e-4, atol=1e-5)


def test_codes_become_float_layers() -> None:
    g = Graph(0, "batch")
    g.opset = 17
    random = np.random.default_rng(0)
    codes = g.constant(random.integers(-127, 128, (4, 8, 3, 3)).astype(np.int8), "codes")
    steps = g.constant(np.linspace(0.01, 0.02, 4).astype(np.float32), "steps")
    w = g.op("DequantizeLinear", codes, steps, g.constant(np.zeros(4, np.int8)), axis=0)
    scale, zero = g.constant(np.float32(0.03)), g.constant(np.uint8(120))
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", "x", scale, zero), scale, zero)
    proto = g.proto(g.op("Conv", x, w, kernel_shape=[3, 3], pads=[1] * 4), ["batch", 4, 12, 12])
    net = module(proto)
    assert [type(layer) for layer in net.modules() if type(layer) is nn.Conv2d] == [nn.Conv2d]
    close(net, proto, {"x": random.standard_normal((3, 8, 12, 12)).astype(np.float32)})


SILERO = importlib.util.find_spec("silero_vad")


@pytest.mark.skipif(SILERO is None, reason="the package silero-vad is not installed")
@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_16k_op15", "silero_vad_op18_ifless", "silero_vad_half"])
@pytest.mark.parametrize("rate", [16000, 8000])
def test_silero_with_its_branches(name: str, rate: int) -> None:
    path = Path(str(SILERO.origin)).parent / "data" / f"{name}.onnx"  # type: ignore[union-attr]
    names = [i.name for i in onnx.load(path).graph.input]
    if rate == 8000 and name != "silero_vad":
        pytest.skip(f"{name} has one rate")
    width = 576 if rate == 16000 else 288
    random = np.random.default_rng(0)
    for batch in (1, 3):
        feeds = {
            "input": random.standard_normal((batch, width)).astype(np.float32) / 4,
            "state": random.standard_normal((2, batch, 128)).astype(np.float32),
            "sr": np.array(rate, np.int64),
        }
        feeds = {n: feeds[n] for n in names}
        close(module(path), path, feeds)
        if "sr" in names:
            alone = module(path, fixed={"sr": rate})
            got = alone(*[torch.from_numpy(v) for n, v in feeds.items() if n != "sr"])
            torch.testing.assert_close(got[0], module(path)(*map(torch.from_numpy, feeds.values()))[0])


# saved programs of torch.export


@pytest.fixture
def program(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(net, (torch.randn(3, 4),), dynamic_shapes=({0: batch},)), tmp_path / "a.pt2")
    return tmp_path / "a.pt2"


def changed(path: Path, end: str, change: Any) -> Path:
    """The archive with one record changed, or added."""
    out = path.with_name("b.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(end) else data)
    return out


def test_program(program: Path) -> None:
    assert module(program)(torch.randn(7, 4)).shape == (7, 5)


def test_program_missing_or_cut(program: Path, tmp_path: Path) -> None:
    with pytest.raises(Missing):
        module(tmp_path / "none.pt2")
    program.write_bytes(program.read_bytes()[:900])
    with pytest.raises(Corrupt):
        module(program)


def test_program_that_calls_something_else(program: Path) -> None:
    def change(data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.relu.default", b"torch.os.system")

    with pytest.raises(Unsupported, match=r"torch\.os\.system"):
        module(changed(program, "models/model.json", change))


def test_program_with_an_expression_that_runs(program: Path) -> None:
    def change(data: bytes) -> bytes:
        text = data.decode()
        start = text.index('"expr_str": "') + len('"expr_str": "')
        return (text[:start] + "eval(chr(49))" + text[text.index('"', start) :]).encode()

    with pytest.raises(Unsupported, match="expression"):
        module(changed(program, "models/model.json", change))


def test_program_with_pickled_weights(program: Path) -> None:
    def change(data: bytes) -> bytes:
        config = json.loads(data)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    with pytest.raises(Unsupported, match="pickled"):
        module(changed(program, "model_weights_config.json", change))


def test_program_with_pickled_inputs(program: Path, tmp_path: Path) -> None:
    torch.save(Path("anything"), tmp_path / "object.pt")
    with pytest.raises(Unsupported, match="pickled"):
        module(changed(program, "sample_inputs/model.pt", lambda data: (tmp_path / "object.pt").read_bytes()))
