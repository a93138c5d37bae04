"""Graph models in other formats: OpenVINO, ORT, half precision; the same integers, run by the format's own runtime."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import wherry
from wherry import shelf
from wherry.artifact import Artifact
from wherry.errors import Corrupt, Diverged, Unsupported


class Small(torch.nn.Module):
    """Two convolutions and a linear layer, with one very large weight if asked for."""

    def __init__(self, large=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.out, self.large = torch.nn.Linear(8, 4), large

    def forward(self, image):
        x = torch.relu(self.a(image)) * self.large
        return self.out(torch.relu(self.b(x)).mean((2, 3)) / self.large)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("formats")
    x = np.random.default_rng(0).standard_normal((32, 3, 12, 12)).astype(np.float32)
    np.savez(top / "x.npz", image=x)
    wherry.capture(Small(), top / "net", torch.from_numpy(x[:2]))
    wherry.compress(
        top / "net", top / "out", "rtn:scheme=W8A8_STATIC", ("openvino", "ort"), top / "x.npz", top / "x.npz"
    )
    return top


def run(file, x):
    return onnxruntime.InferenceSession(str(file)).run(None, {"image": x})[0]


def test_openvino_runs_the_same_integers_in_int8(folder):
    ov = pytest.importorskip("openvino")
    report = wherry.Report.load(folder / "out" / "report.json")
    assert report.get("verdict").value == "PASS"
    x = np.load(folder / "x.npz")["image"][:5]
    model = ov.compile_model(str(folder / "out" / "openvino" / "model.xml"), "CPU")
    found = model(x)[0]
    expected = run(folder / "out" / "model.onnx", x)
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 0.03
    kinds = {}
    for node in model.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = str(getattr(info["layerType"], "value", info["layerType"]))
        how = str(getattr(info["primitiveType"], "value", info["primitiveType"])).lower()
        kinds.setdefault(kind, []).append(how)
    assert len(kinds["Convolution"]) == 2
    assert all(how.endswith("_i8") for how in kinds["Convolution"])


def test_openvino_decodes_to_the_weights_of_the_onnx_file(folder):
    pytest.importorskip("openvino")
    onnx_weights = dict(shelf.find("formats", "onnx").decode(Artifact.open(folder / "out")))
    found = dict(shelf.find("formats", "openvino").decode(Artifact.open(folder / "out" / "openvino")))
    assert set(found) == {"a.weight", "b.weight", "out.weight"}
    for name, weight in found.items():
        assert weight.tobytes() == onnx_weights[name].tobytes()


def test_openvino_answers_in_the_session_and_names_what_does_not_fit(folder):
    pytest.importorskip("openvino")
    session = shelf.find("runtimes", "openvino").load(Artifact.open(folder / "out" / "openvino"), threads=1)
    x = np.load(folder / "x.npz")["image"][:3]
    assert session.predict({"image": x})["output_0"].shape == (3, 4)
    assert "Convolution int8" in session.facts["layers"]
    with pytest.raises(wherry.BadInput, match="does not take"):
        session.predict({"image": x[:, :1]})
    session.close()
    with pytest.raises(wherry.BadInput, match="closed"):
        session.predict({"image": x})


def test_a_damaged_openvino_file_is_corrupt(folder, tmp_path):
    pytest.importorskip("openvino")
    shutil.copytree(folder / "out" / "openvino", tmp_path / "ov")
    xml = (tmp_path / "ov" / "model.xml").read_text()
    (tmp_path / "ov" / "model.xml").write_text(xml[: len(xml) // 2])
    with pytest.raises(Corrupt):
        shelf.find("runtimes", "openvino").load(Artifact.open(tmp_path / "ov"))


def test_ort_is_the_same_graph_with_its_list_of_operators(folder):
    x = np.load(folder / "x.npz")["image"][:5]
    np.testing.assert_allclose(
        run(folder / "out" / "ort" / "model.ort", x), run(folder / "out" / "model.onnx", x), atol=0.02
    )
    text = (folder / "out" / "ort" / "required_operators.config").read_text()
    assert "QLinearConv" in text
    session = shelf.find("runtimes", "onnxruntime").load(Artifact.open(folder / "out" / "ort"))
    assert session.predict({"image": x})["output_0"].shape == (5, 4)


def test_half_is_near_and_half_the_size(folder, tmp_path):
    wherry.export(folder / "net", tmp_path / "half", "onnx_half")
    proto = onnx.load(tmp_path / "half" / "model.onnx")
    kinds = {t.data_type for t in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    x = np.load(folder / "x.npz")["image"][:5]
    np.testing.assert_allclose(
        run(tmp_path / "half" / "model.onnx", x), run(folder / "net" / "model.onnx", x), atol=5e-3
    )
    with pytest.raises(Unsupported, match="smaller already"):
        wherry.export(folder / "out", tmp_path / "twice", "onnx_half")


def test_half_that_overflows_is_refused(folder, tmp_path):
    wherry.capture(Small(1e6), tmp_path / "net", torch.randn(2, 3, 12, 12))
    with pytest.raises(Diverged, match="beyond float16"):
        wherry.export(tmp_path / "net", tmp_path / "half", "onnx_half")
    assert not (tmp_path / "half").exists()


def test_transformers_folders_are_pointed_to_capture(tiny_bert, tmp_path):
    for form in ("openvino", "ort", "onnx_half"):
        with pytest.raises(Unsupported, match="wherry capture"):
            wherry.export(tiny_bert, tmp_path / form, form)


@pytest.fixture(scope="module")
def web(folder, tmp_path_factory):
    """A folder with onnxruntime-web, the int8 file and two pictures; what the native runtime says of them."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    top = tmp_path_factory.mktemp("web")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-web@1.30.0"]
    done = subprocess.run(install, cwd=top, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"onnxruntime-web cannot be had here: {done.stderr[-200:]}")
    x = np.load(folder / "x.npz")["image"][:2]
    onnx.save(onnx.load(folder / "out" / "model.onnx"), top / "model.onnx")  # one file, data inside
    (top / "x.json").write_text(json.dumps(x.reshape(-1).tolist()))
    return top, run(folder / "out" / "model.onnx", x)


def near(text, expected):
    found = np.array(json.loads(text)).reshape(expected.shape)
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 0.03


@pytest.mark.slow
def test_onnxruntime_web_runs_the_int8_file_under_node(web):
    top, expected = web
    (top / "run.cjs").write_text(
        """
        const ort = require('onnxruntime-web'), fs = require('fs');
        ort.env.wasm.numThreads = 1;
        (async () => {
          const s = await ort.InferenceSession.create(fs.readFileSync('model.onnx'));
          const x = Float32Array.from(JSON.parse(fs.readFileSync('x.json')));
          const out = await s.run({image: new ort.Tensor('float32', x, [2, 3, 12, 12])});
          console.log(JSON.stringify(Array.from(out[s.outputNames[0]].data)));
        })();
        """
    )
    out = subprocess.run(["node", "run.cjs"], cwd=top, capture_output=True, text=True, timeout=120)
    near(out.stdout.strip().splitlines()[-1], expected)


@pytest.mark.slow
def test_onnxruntime_web_runs_the_int8_file_in_a_page(web):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    top, expected = web
    (top / "page.html").write_text(
        """<!doctype html><pre id="out"></pre>
        <script src="node_modules/onnxruntime-web/dist/ort.min.js"></script><script>
        ort.env.wasm.numThreads = 1;
        (async () => {
          const s = await ort.InferenceSession.create('model.onnx', {executionProviders: ['wasm']});
          const x = Float32Array.from(await (await fetch('x.json')).json());
          const out = await s.run({image: new ort.Tensor('float32', x, [2, 3, 12, 12])});
          document.getElementById('out').textContent = JSON.stringify(Array.from(out[s.outputNames[0]].data));
        })().catch(error => { document.getElementById('out').textContent = String(error); });
        </script>"""
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(top)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/page.html"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
        done = subprocess.run([chromium, *flags, url], capture_output=True, text=True, timeout=180)
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    near(found[1], expected)
