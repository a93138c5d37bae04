"""Graphs quantized as a whole: against numbers worked out by hand, ONNX's own arithmetic, and what the runtime runs."""

import collections
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import wherry
from wherry.checkpoint import Checkpoint
from wherry.engine.graph import observe
from wherry.errors import BadInput, Corrupt, Diverged, Missing, Unsupported
from wherry.graph import tidy
from wherry.graph.source import load
from wherry.recipe import Recipe
from wherry.scheme import QTensor

STATIC = "rtn:scheme=W8A8_STATIC"


class Net(torch.nn.Module):
    """Residual, depthwise, strided, padded, pooled, a transposed convolution and a linear layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = torch.nn.Conv2d(8, 16, 1, stride=2)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.nn.functional.relu6(self.deep(x)) + x
        x = torch.nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.point(x))
        return self.head(self.up(x).mean((2, 3)))


def images(count=48, seed=1):
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph") / "net"
    wherry.capture(Net(), folder, torch.from_numpy(images(2)))
    np.savez(folder.parent / "calibration.npz", image=images())
    np.savez(folder.parent / "held_out.npz", image=images(32, 2))
    return folder


def compress(graph, out, recipe=STATIC, **options):
    data = graph.parent / "calibration.npz"
    return wherry.compress(graph, out, recipe, data_file=data, evaluation=graph.parent / "held_out.npz", **options)


@pytest.fixture(scope="module")
def packed(graph, tmp_path_factory):
    """The graph in static int8."""
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(graph, out)
    return out


def run(file, x, plain=False):
    options = onnxruntime.SessionOptions()
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options).run(None, {"image": x})[0]


def far(a, b):
    return float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()))


def test_a_captured_module_is_the_module_and_batch_norm_is_gone(graph):
    x = images(5, 3)
    with torch.no_grad():
        expected = Net().eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(graph / "model.onnx", x), expected, atol=1e-5)
    source = load(graph / "model.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in source.model.graph}
    net = Net().eval()
    gain = net.norm.weight / torch.sqrt(net.norm.running_var + net.norm.eps)
    folded = (net.stem.weight * gain[:, None, None, None]).reshape(8, -1)
    torch.testing.assert_close(source.read("stem.weight"), folded.detach(), rtol=1e-5, atol=1e-6)
    up = net.up.weight.detach().permute(1, 0, 2, 3).reshape(8, -1)
    torch.testing.assert_close(source.read("up.weight"), up)


@pytest.mark.parametrize("recipe", [STATIC, "gptq:scheme=W8A8_STATIC,bias_correction=true", "rtn:scheme=W8A8",
                                    "rtn:scheme=W8A16,group_size=-1", "best:scheme=W8A8_STATIC", "gptq:scheme=W8A8",
                                    "gptq:scheme=W8A16,group_size=-1",
                                    "rtn:scheme=W8A8_STATIC,strategy=tensor"])  # fmt: skip
def test_every_recipe_passes_its_proof_and_stays_near(graph, tmp_path, recipe):
    report = compress(graph, tmp_path / "out", recipe)
    assert report.get("verdict").value == "PASS"
    x = images(16, 9)
    assert far(run(graph / "model.onnx", x), run(tmp_path / "out" / "model.onnx", x)) < 0.05
    assert report.get("check: weights of the original", "onnx").value is True


def test_the_file_says_what_the_plan_says_by_foreign_arithmetic(graph, packed, tmp_path):
    """Rebuild every layer's codes from its float weight by the formula, and read them from the file by onnx alone."""
    proto = onnx.load(packed / "model.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    source = load(graph / "model.onnx").graph
    for name in ("stem.weight", "deep.weight", "point.weight", "head.weight"):
        w = source.read(name).numpy()
        scale = (2 * np.abs(w).max(1) / 255).astype(np.float32)
        np.testing.assert_allclose(tensors[f"{name}.scales"], scale, rtol=1e-6)
        codes = np.clip(np.rint(w / scale[:, None]), -128, 127)
        stored = tensors[f"{name}.codes"]
        assert stored.dtype == np.int8
        # a weight that lies on a tie may fall either way
        assert (np.abs(stored.reshape(len(w), -1) - codes) > 1).sum() == 0
        assert (stored.reshape(len(w), -1) != codes).mean() < 0.01
    nodes = collections.Counter(node.op_type for node in proto.graph.node)
    assert nodes["QuantizeLinear"] >= 5
    for node in proto.graph.node:  # a bias is int32 at the product of both scales
        if node.op_type == "DequantizeLinear" and tensors.get(node.input[0], np.zeros(0)).dtype == np.int32:
            assert tensors[node.input[1]].ndim == 1


def test_what_is_planned_in_integers_runs_in_integers(graph, packed, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(packed / "model.onnx"), options)
    found = collections.Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert found["QLinearConv"] == 3
    assert found["QGemm"] == 1
    assert found["QLinearAdd"] == 1  # the residual stream stays in 8 bits
    assert found["ConvTranspose"] == 1  # and what has no kernel is said
    report = wherry.Report.load(packed / "report.json")
    assert any("no integer ConvTranspose" in str(row.value) + row.note for row in report if row.where == "up.weight")


def test_dynamic_runs_in_integers_where_that_is_fast(graph, tmp_path):
    report = compress(graph, tmp_path / "out", "rtn:scheme=W8A8")
    nodes = collections.Counter(n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    assert nodes["QuantizeLinear"] == 1  # of the one linear layer's tokens
    assert nodes["ConvInteger"] == nodes["DynamicQuantizeLinear"] == 0
    assert any("slower than float" in str(row.value) + row.note for row in report if row.where == "stem.weight")


def test_a_dynamic_answer_does_not_depend_on_the_rest_of_its_batch(tmp_path):
    """One example with values a hundred times larger in the batch; each row by the formula of one scale a token."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    x = np.random.default_rng(0).standard_normal((4, 3, 16)).astype(np.float32)
    wherry.capture(torch.nn.Sequential(layer), tmp_path / "net", torch.from_numpy(x))
    wherry.compress(tmp_path / "net", tmp_path / "out", "rtn:scheme=W8A8,portable=false")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    name = session.get_inputs()[0].name
    loud = x.copy()
    loud[1:] *= 100
    alone, beside = session.run(None, {name: x[:1]})[0], session.run(None, {name: loud})[0][:1]
    np.testing.assert_allclose(alone, beside, atol=1e-6)
    w = layer.weight.detach().numpy()
    step = 2 * np.abs(w).max(1, keepdims=True) / 255
    w = np.clip(np.rint(w / step), -128, 127) * step
    token = np.abs(x).max(-1, keepdims=True) / 127
    expected = (np.rint(x / token) * token) @ w.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(session.run(None, {name: x})[0], expected, atol=2e-3)


def test_a_quantized_graph_opens_as_a_checkpoint_of_integers_and_is_not_quantized_twice(graph, packed, tmp_path):
    again = Checkpoint.open(packed)
    q = again.tensor("stem.weight")
    assert isinstance(q, QTensor)
    assert q.scheme.bits == 8
    w = Checkpoint.open(graph).weight("stem.weight")
    assert float((q.decode() - w).abs().max()) <= float(q.scale.max()) * 0.51
    with pytest.raises(BadInput, match="quantized already"):
        Recipe.parse(STATIC).plan(again)


@pytest.mark.parametrize("observer", observe.OBSERVERS)
def test_observers_find_ranges_that_are_near_the_best(observer):
    """On a normal sample with one outlier: brute force over symmetric clips gives the least squared error."""
    x = np.concatenate([np.random.default_rng(0).standard_normal(200_000), [30.0]]).astype(np.float32)
    seen = observe.Seen()
    seen.extremes("x", x)
    seen.count("x", x)
    low, high = seen.range("x", observer)
    assert low < 0 < high <= 30

    def error(a, b):
        step = (b - a) / 255
        zero = np.round(-a / step)
        return float((((np.clip(np.round(x / step + zero), 0, 255) - zero) * step - x) ** 2).mean())

    best = min(error(-c, c * r) for c in np.linspace(2, 6, 17) for r in (0.8, 1.0, 1.5, 2, 4, 7))
    if observer == "minmax":
        assert high == 30
    elif observer == "mse":
        assert error(low, high) <= 1.3 * best
    else:
        assert high < 30


def test_bias_correction_takes_the_mean_away(graph, tmp_path):
    """Coarse weights make a mean error; with the correction the mean of the layer's output is the float one."""
    x = images(48)
    plain, mended = [], []
    for recipe, found in ((STATIC, plain), (f"{STATIC},bias_correction=true", mended)):
        compress(graph, tmp_path / recipe.replace(":", "-"), recipe)
        y = run(tmp_path / recipe.replace(":", "-") / "model.onnx", x)
        found.append(np.abs((y - run(graph / "model.onnx", x)).mean(0)).mean())
    assert mended[0] < 1.2 * plain[0]


def test_int8_that_saturates_would_fail_its_own_check(graph, packed, tmp_path, monkeypatch):
    from wherry.graph import whole

    monkeypatch.setattr(whole, "DIFFERENCE_MOST", 1e-6)
    with pytest.raises(Diverged, match="relative RMS"):
        whole.checks(packed / "model.onnx", graph / "model.onnx", [{"image": images(4)}], 4)
    monkeypatch.undo()
    with pytest.raises(Diverged, match="9 products are planned in int8"):
        whole.checks(packed / "model.onnx", graph / "model.onnx", [{"image": images(4)}], 9)


def test_a_changed_weight_fails_the_proof(graph, packed, tmp_path):
    from wherry.artifact import Artifact

    shutil.copytree(packed, tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        if tensor.name == "stem.weight.scales":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.3), tensor.name))
    (tmp_path / "out" / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(proto, file)
    manifest = {k: v for k, v in Artifact.open(tmp_path / "out").manifest.items() if k != "files"}
    Artifact.seal(tmp_path / "out", **manifest)
    report = wherry.verify(tmp_path / "out", against=graph, speed=False)
    assert report.get("verdict").value == "FAIL"


def test_bad_files(graph, tmp_path):
    raw = (graph / "model.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(raw[: len(raw) // 3])
    with pytest.raises(Corrupt):
        Checkpoint.open(cut)
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model at all")
    with pytest.raises(Corrupt):
        Checkpoint.open(junk)
    w = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")

    def save(name, location, opset=21):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(w)
        if location:
            onnx.external_data_helper.set_external_data(tensor, location)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        made = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])], [tensor],
        )  # fmt: skip
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        (tmp_path / name).write_bytes(model.SerializeToString())
        return tmp_path / name

    with pytest.raises(Missing, match="absent.bin"):
        Checkpoint.open(save("a.onnx", "absent.bin"))
    (tmp_path.parent / "secret.bin").write_bytes(b"0" * 48)
    with pytest.raises(Corrupt, match="outside of the folder"):
        Checkpoint.open(save("b.onnx", "../secret.bin"))
    (tmp_path / "short.bin").write_bytes(b"0" * 12)
    with pytest.raises(Corrupt, match="cut off"):
        Checkpoint.open(save("c.onnx", "short.bin"))
    with pytest.raises(Unsupported, match="operator set 9.*\n.*convert_version"):
        Checkpoint.open(save("d.onnx", "", 9))


def test_data_that_do_not_fit(graph, tmp_path):
    np.savez(tmp_path / "small.npz", image=images(4)[:, :1])
    with pytest.raises(BadInput, match="does not take"):
        wherry.compress(graph, tmp_path / "o", STATIC, data_file=tmp_path / "small.npz")
    np.savez(tmp_path / "nan.npz", image=np.full((4, 3, 16, 16), np.nan, np.float32))
    with pytest.raises((Diverged, BadInput)):
        wherry.compress(graph, tmp_path / "o", STATIC, data_file=tmp_path / "nan.npz")
    with pytest.raises(BadInput, match="--data"):
        wherry.compress(graph, tmp_path / "o", STATIC)
    with pytest.raises(BadInput, match="mean is none of"):
        wherry.compress(graph, tmp_path / "o", "rtn:scheme=W8A8_STATIC,activation_observer=mean")
    plan = wherry.plan(graph, "rtn:scheme=W4A16,group_size=-1,targets=stem")
    assert any("in place of W4A16" in note for note in plan.row("stem.weight").notes)
    assert list(tmp_path.glob(".o*")) == []
    assert not (tmp_path / "o").exists()


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    report = wherry.compress(
        Twice(), tmp_path / "out", STATIC, data_file=tmp_path / "x.npz", evaluation=tmp_path / "x.npz",
        example_inputs=torch.from_numpy(x[:2]),
    )  # fmt: skip
    assert report.get("verdict").value == "PASS"
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert [t.name for t in proto.graph.initializer].count("layer.weight.codes") == 1


def test_recurrent_and_embedding_weights(tmp_path):
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(50, 12)
            self.cell = torch.nn.LSTM(12, 16, batch_first=True, bidirectional=True)
            self.gru = torch.nn.GRU(32, 8, batch_first=True)
            self.out = torch.nn.Linear(8, 3)

        def forward(self, ids):
            return self.out(self.gru(self.cell(self.table(ids))[0])[0])

    ids = np.random.default_rng(0).integers(0, 50, (32, 7))
    np.savez(tmp_path / "x.npz", ids=ids)
    report = wherry.compress(
        Words(), tmp_path / "out", STATIC, data_file=tmp_path / "x.npz", evaluation=tmp_path / "x.npz",
        example_inputs=torch.from_numpy(ids[:2]),
    )  # fmt: skip
    assert report.get("verdict").value == "PASS"
    stored = Checkpoint.open(tmp_path / "out").graph
    kinds = {layer.role for name, layer in stored.layers.items() if stored.scheme(name)}
    assert kinds == {"linear", "recurrent", "embedding"}


def test_a_table_that_is_also_the_head_is_stored_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mid = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 16)

        def forward(self, ids):
            return torch.relu(self.mid(self.table(ids))) @ self.table.weight.T

    ids = np.random.default_rng(0).integers(0, 40, (32, 5))
    np.savez(tmp_path / "x.npz", ids=ids)
    for recipe in (STATIC, "rtn:scheme=W8A8"):
        out = tmp_path / recipe.replace(":", "-")
        report = wherry.compress(
            Tied(), out, recipe, data_file=tmp_path / "x.npz", evaluation=tmp_path / "x.npz",
            example_inputs=torch.from_numpy(ids[:2]),
        )  # fmt: skip
        assert report.get("verdict").value == "PASS"
        proto = onnx.load(out / "model.onnx", load_external_data=False)
        sizes = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
        assert [name for name, size in sizes.items() if size == 40 * 16] == ["table.weight.codes"]


def test_tidy_keeps_what_a_graph_computes():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((4, 5, 3, 3)), "g": random.uniform(0.5, 2, 5), "b": random.standard_normal(5),
        "m": random.standard_normal(5), "v": random.uniform(0.5, 2, 5), "t": random.standard_normal((3, 5)),
    }  # fmt: skip
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["c"], epsilon=1e-3),
        helper.make_node("Dropout", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], keepdims=0),
        helper.make_node("Transpose", ["t"], ["tt"]),
        helper.make_node("MatMul", ["e", "tt"], ["y"]),
    ]
    made = helper.make_graph(
        nodes, "g", [x], [y],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
        + [numpy_helper.from_array(np.array([-1, 2]), "axes")],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.shape_inference.infer_shapes(model)
    import onnx_ir as ir

    plain = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    tidy.tidy(plain)
    kinds = [node.op_type for node in plain.graph]
    assert "BatchNormalization" not in kinds
    assert "Transpose" not in kinds
    assert "Dropout" not in kinds
    assert "t" in plain.graph.initializers
    feeds = {"x": random.standard_normal((2, 4, 6, 6)).astype(np.float32)}
    a = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    b = onnxruntime.InferenceSession(ir.to_proto(plain).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["smoothquant | rtn:scheme=W8A8_STATIC", "awq:scheme=W4A16,group_size=-1",
                                    "rtn:scheme=W8A16,group_size=-1 | rounding", "gptaq:scheme=W8A8_STATIC",
                                    "rotation | rtn:scheme=W8A8"])  # fmt: skip
def test_methods_that_want_blocks_are_refused(graph, recipe):
    with pytest.raises(Unsupported, match="block|rotation"):
        wherry.plan(graph, recipe)


def test_hqq_needs_no_data_on_graphs(graph, tmp_path):
    report = wherry.compress(graph, tmp_path / "out", "hqq:scheme=W8A16,group_size=-1")
    assert report.get("verdict").value == "PASS"


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, graph, seed):
    good, drawn = (graph / "model.onnx").read_bytes(), np.random.default_rng(seed)
    said = []
    for _ in range(60):
        bytes_ = bytearray(good)
        near = [drawn.integers(600), len(good) - 1 - drawn.integers(600), drawn.integers(len(good))]
        for place in near[: drawn.integers(1, 4)]:
            bytes_[place] = drawn.integers(256)
        file = tmp_path / "damaged.onnx"
        file.write_bytes(bytes_[: drawn.integers(1, len(good))] if drawn.random() < 0.2 else bytes_)
        try:
            checkpoint = Checkpoint.open(file)
            for name in checkpoint.names():
                checkpoint.source.read(name)
        except wherry.Error as error:
            said.append(str(error))
    assert len(said) >= 10
    assert all(str(file) in text or "tensor" in text for text in said)


def test_a_weight_of_the_wrong_rank_is_named(tmp_path):
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 5]) for name in "xy"]
    weight = numpy_helper.from_array(np.zeros(5, np.float32), "w")
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:], [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(Corrupt, match="w has 1 axes, not what Gemm takes"):
        load(tmp_path / "m.onnx")
