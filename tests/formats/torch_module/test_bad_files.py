"""Files that are wrong: the error's class, and what it names."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.formats.onnx.torch_module import module

FLOAT = TensorProto.FLOAT


def model(nodes: list, initializers: list = (), opset: int = 17, inputs: list | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "bad",
        [helper.make_tensor_value_info("x", FLOAT, [1, 4])] if inputs is None else inputs,
        [helper.make_tensor_value_info("y", FLOAT, None)], list(initializers),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def gemm(external: str | None = None, **facts: str) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": external, **facts}.items():
            weight.external_data.add(key=key, value=value)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])


def write(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


def test_unknown_operator_names_node_domain_and_opset() -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="layer7/frob", domain="acme")
    proto = model([node])
    proto.opset_import.append(helper.make_opsetid("acme", 3))
    with pytest.raises(Unsupported, match=r"acme::Frobnicate \(node 'layer7/frob'\).*domain acme, opset 3"):
        module(proto)


def test_unknown_attribute() -> None:
    with pytest.raises(Unsupported, match=r"Elu \(node 'e'\), opset 17: attribute 'gain'"):
        module(model([helper.make_node("Elu", ["x"], ["y"], name="e", gain=2.0)]))


@pytest.mark.parametrize("opset", [8, 12])
def test_old_opset_names_the_way_out(opset: int) -> None:
    with pytest.raises(Unsupported, match=rf"Softmax of opset {opset}.*version_converter"):
        module(model([helper.make_node("Softmax", ["x"], ["y"])], opset=opset))


def test_opset_of_the_future() -> None:
    with pytest.raises(Unsupported, match=r"opset 99.*version_converter"):
        module(model([helper.make_node("Relu", ["x"], ["y"])], opset=99))


def test_old_opset_of_an_operator_that_never_changed() -> None:
    x = torch.randn(1, 4)
    assert torch.equal(module(model([helper.make_node("Relu", ["x"], ["y"])], opset=9))(x), torch.relu(x))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"none\.onnx"):
        module(tmp_path / "none.onnx")


def test_external_data_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"weights\.bin.*'w'"):
        module(write(tmp_path, gemm("weights.bin")))


@pytest.mark.parametrize("place", ["../secret.bin", "{absolute}", "link.bin", "sub/../../secret.bin", ""])
def test_external_data_outside_is_not_read(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones((4, 3), np.float32).tobytes())
    path = write(tmp_path, gemm(place.format(absolute=secret)))
    (path.parent / "link.bin").symlink_to(secret)
    with pytest.raises(Corrupt, match="outside"):
        module(path)


@pytest.mark.parametrize("facts", [{}, {"offset": "40"}, {"length": "100"}, {"offset": "-4"}, {"offset": "none"}])
def test_external_data_of_the_wrong_length(tmp_path: Path, facts: dict) -> None:
    path = write(tmp_path, gemm("w.bin", **facts))
    (path.parent / "w.bin").write_bytes(np.ones(11, np.float32).tobytes())
    with pytest.raises(Corrupt, match=r"'w'|w\.bin"):
        module(path)


def test_external_data_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, gemm("w.bin", offset="8", length="48"))
    (path.parent / "w.bin").write_bytes(b"\0" * 8 + np.arange(12, dtype=np.float32).tobytes())
    assert module(path)(torch.ones(1, 4)).tolist() == [[18.0, 22.0, 26.0]]


@pytest.mark.parametrize("keep", [0, 1, 10, 60, -1])
def test_cut_short(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, gemm())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((Corrupt, Unsupported, BadInput)):
        module(path)


def test_noise_is_never_another_error(tmp_path: Path) -> None:
    data, random = gemm().SerializeToString(), np.random.default_rng(0)
    path = write(tmp_path, gemm())
    for _ in range(300):
        wrong = bytearray(data)
        for place in random.integers(0, len(wrong), 3):
            wrong[place] = random.integers(256)
        path.write_bytes(bytes(wrong))
        try:
            module(path)
        except (Corrupt, Unsupported, BadInput, Missing):
            continue


def test_initializer_whose_bytes_do_not_match() -> None:
    proto = gemm()
    proto.graph.initializer[0].dims[0] = 5
    with pytest.raises(Corrupt, match="'w'"):
        module(proto)


def test_circle() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "one"), helper.make_node("Relu", ["a"], ["b"], "two")]
    with pytest.raises(Corrupt, match="circle through one, two"):
        module(model([*nodes, helper.make_node("Relu", ["b"], ["y"])]))


def test_nodes_in_any_order() -> None:
    nodes = [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Relu", ["x"], ["a"])]
    x = torch.randn(1, 4)
    assert torch.equal(module(model(nodes))(x), -torch.relu(x))


def test_name_that_nothing_makes() -> None:
    with pytest.raises(Corrupt, match="'ghost'"):
        module(model([helper.make_node("Add", ["x", "ghost"], ["y"])]))


def test_two_makers() -> None:
    with pytest.raises(Corrupt, match="two nodes make 'y'"):
        module(model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]))


def test_input_without_type() -> None:
    with pytest.raises(BadInput, match="'x'.*no type"):
        module(model([helper.make_node("Relu", ["x"], ["y"])], inputs=[onnx.ValueInfoProto(name="x")]))


def test_text_tensor() -> None:
    words = helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])
    with pytest.raises(Unsupported, match="STRING"):
        module(model([helper.make_node("Identity", ["w"], ["y"])], [words]))


def test_fixed_names_an_input() -> None:
    with pytest.raises(BadInput, match=r"fixed=rate.*\['x'\]"):
        module(model([helper.make_node("Relu", ["x"], ["y"])]), fixed={"rate": 1})
