"""`evaluate` and `compare` on tiny ONNX graphs of every kind, run by ONNX Runtime, through the command line."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from wherry import api, opened
from wherry.cli import app
from wherry.errors import BadInput, Missing, Unsupported
from wherry.report import Report

RNG = np.random.default_rng(0)


def write_graph(file: Path, nodes, inputs, outputs, constants) -> None:
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}
    info = lambda name, kind, shape: helper.make_tensor_value_info(name, kinds[kind], shape)  # noqa: E731
    graph = helper.make_graph(
        nodes, "g", [info(*i) for i in inputs], [info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)


def write_task(folder: Path, kind: str, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"kind": kind, **more}))


def colours(folder: Path, noise: float = 0.0) -> Path:
    """Says which of red, green, blue a picture has most of; `noise` makes the weights worse."""
    weight = np.eye(3, dtype=np.float32) + noise * np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    write_graph(folder / "model.onnx", nodes, [("x", "f", ["n", 3, 8, 8])], [("logits", "f", ["n", 3])], {"w": weight})
    write_task(folder, "image-classification", inputs=["x"], labels=["red", "green", "blue"],
               processor={"size": [8, 8], "mean": [0.3] * 3})  # fmt: skip
    return folder


def pictures(folder: Path, count: int = 30) -> Path:
    for i in range(count):
        level = np.random.default_rng(i).integers(0, 120, (10, 12, 3), dtype=np.uint8)
        level[..., i % 3] += 40
        path = folder / ("red", "green", "blue")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(level).save(path)
    return folder


def said(*words) -> str:
    """What the command line prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        app([*map(str, words)], standalone_mode=False)
    return out.getvalue()


def run(*words) -> Report:
    return Report.from_json(said(*words, "--json"), "stdout")


def test_pictures_of_a_folder_are_judged(tmp_path):
    model, folder = colours(tmp_path / "model"), pictures(tmp_path / "data")
    report = run("evaluate", model, "--data", folder, "--runtime", "onnxruntime")
    row = report.get("accuracy", "model")
    assert row.value == 1
    assert row.low == pytest.approx(1 / (1 + 1.96**2 / 30), abs=1e-3)  # Wilson
    assert report.get("f1: red", "model").value == 1
    assert json.loads(report.get("confusion matrix").value) == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert report.get("evaluation data").value == "data"


def test_two_models_are_compared_pairwise(tmp_path):
    a, b, folder = colours(tmp_path / "a"), colours(tmp_path / "b", 3), pictures(tmp_path / "data")
    for report in (
        run("compare", a, b, "--data", folder),
        run("evaluate", b, "--against", a, "--data", folder, "--runtime", "onnxruntime"),
    ):
        places = [row.where for row in report.select("accuracy")]
        one, two = report.select("accuracy")
        assert len(set(places)) == 2
        gap = report.get("accuracy difference", places[1])
        assert gap.value == pytest.approx(two.value - one.value)
        assert gap.value < 0
        assert gap.low <= gap.value <= gap.high
        assert report.get("same answer", places[1]).value == pytest.approx(two.value)  # the first is always right


def test_robustness_shows_each_perturbation_for_both(tmp_path):
    a, b, folder = colours(tmp_path / "a"), colours(tmp_path / "b", 0.2), pictures(tmp_path / "data", 12)
    report = run("evaluate", b, "--against", a, "--robustness", "--data", folder, "--runtime", "onnxruntime")
    whats = [row.what for row in report if row.where == "a" and row.what.startswith("accuracy: ")]
    assert len(whats) == 10
    assert whats[0] == "accuracy: clean"
    for what in whats:
        name = what.removeprefix("accuracy: ")
        gap = report.get(what, "difference").value
        assert gap == pytest.approx(report.get(what, "b").value - report.get(what, "a").value)
        if name != "clean":
            clean = report.get("accuracy: clean", "difference").value
            assert report.get(what, "beyond clean").value == pytest.approx(gap - clean)
    for place in "ab":
        assert 0 < report.get("latency p50", place).value <= report.get("latency p99", place).value
    table = said("evaluate", b, "--against", a, "--robustness", "--data", folder, "--most", "6")
    assert "accuracy: noise 0.08 of range" in table


def test_undecodable_pictures_are_named(tmp_path):
    model, folder = colours(tmp_path / "model"), pictures(tmp_path / "data", 9)
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"1 of 10 examples cannot be decoded"):
        api.evaluate(model, folder, "onnxruntime")
    report = run("evaluate", model, "--data", folder, "--runtime", "onnxruntime", "--max-bad", "0.2")
    row = report.get("undecodable examples")
    assert row.value == 1
    assert "red/broken.png" in row.note


def test_labels_that_do_not_fit_are_refused_before_the_model_runs(tmp_path):
    model, folder = colours(tmp_path / "model"), pictures(tmp_path / "data", 3)
    (folder / "red").rename(folder / "reed")
    with pytest.raises(BadInput, match=r"reed/0\.png: the label 'reed' .*did you mean 'red'"):
        api.evaluate(model, folder, "onnxruntime")
    write_task(model, "image-classification", inputs=["x"], labels=["a", "b"], processor={"size": [8, 8]})
    (folder / "labels.csv").write_text("file,label\nreed/0.png,1\n")
    with pytest.raises(BadInput, match=r"gives \[1, 3\], task.json names 2 labels"):
        api.evaluate(model, folder, "onnxruntime")
    with pytest.raises(BadInput, match="give --data"):
        api.evaluate(model, None, "onnxruntime")


def test_data_that_the_model_was_made_with_are_flagged(tmp_path):
    from wherry import data
    from wherry.task import Task

    model, folder = colours(tmp_path / "model"), pictures(tmp_path / "data", 9)
    assert run("evaluate", model, "--data", folder).get("check: data not seen before") is None
    task = Task.of(model, {}).used("training", "data", data.read(folder).digest)
    (model / "task.json").write_text(json.dumps(task.to_dict()))
    row = run("evaluate", model, "--data", folder).get("check: data not seen before")
    assert row.value is False
    assert "training" in row.note


def test_calibration_data_are_known_again(tmp_path):
    """What a run calibrated on is in its report; judging on it is flagged."""
    model, folder = colours(tmp_path / "model"), pictures(tmp_path / "data", 30)
    out = tmp_path / "int8"
    api.compress(model, out, "rtn:scheme=W8A8_STATIC", data_file=folder, samples=16)
    row = api.evaluate(out, folder, "onnxruntime").get("check: data not seen before")
    assert row.value is False
    assert "calibration" in row.note
    assert api.evaluate(out, pictures(tmp_path / "other", 9), "onnxruntime").get("check: data not seen before") is None


def test_arrays_are_compared_with_the_original(tmp_path):
    for name, factor in (("a", 1.0), ("b", 1.1)):
        node = helper.make_node("Mul", ["x", "k"], ["y"])
        constants = {"k": np.float32(factor)}
        file = tmp_path / name / "model.onnx"
        write_graph(file, [node], [("x", "f", ["n", 4])], [("y", "f", ["n", 4])], constants)
        write_task(tmp_path / name, "feature-extraction", inputs=["x"], outputs=["y"])
    np.savez(tmp_path / "x.npz", x=RNG.standard_normal((20, 4)).astype(np.float32))
    report = api.compare(tmp_path / "a", tmp_path / "b", tmp_path / "x.npz")
    assert report.get("relative difference", str(tmp_path / "b")).value == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(Unsupported, match="--against ORIGINAL"):
        api.evaluate(tmp_path / "a", tmp_path / "x.npz", "onnxruntime")


def test_sounds_and_voice(tmp_path):
    """Loudness decides: class of a clip, and speech in each window, by a graph that carries a state."""
    nodes = [
        helper.make_node("Abs", ["x"], ["abs"]),
        helper.make_node("ReduceMean", ["abs"], ["m"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["m", "level"], ["over"]),
        helper.make_node("Mul", ["over", "hundred"], ["scaled"]),
    ]
    constants = {"level": np.float32(0.1), "hundred": np.float32(100), "one": np.float32(1)}
    clip = [*nodes, helper.make_node("Neg", ["scaled"], ["not"]),
            helper.make_node("Concat", ["not", "scaled"], ["logits"], axis=1)]  # fmt: skip
    write_graph(tmp_path / "clip/model.onnx", clip, [("x", "f", ["n", "t"])], [("logits", "f", ["n", 2])], constants)
    write_task(tmp_path / "clip", "audio-classification", inputs=["x"], labels=["quiet", "loud"],
               processor={"sampling_rate": 8000, "frames": 8000})  # fmt: skip
    step = [*nodes, helper.make_node("Sigmoid", ["scaled"], ["p"]), helper.make_node("Add", ["s", "one"], ["s2"])]
    write_graph(tmp_path / "vad/model.onnx", step, [("x", "f", ["n", 260]), ("s", "f", [1, "n", 2])],
                [("p", "f", ["n", 1]), ("s2", "f", [1, "n", 2])], constants)  # fmt: skip
    write_task(tmp_path / "vad", "voice-activity-detection", inputs=["x", "s"], outputs=["p", "s2"],
               processor={"sampling_rate": 8000, "window": 256, "context": 4, "state": {"s": [1, -1, 2]}})  # fmt: skip
    rows, spans = ["file,label"], []
    for i in range(6):
        wave = 0.01 * RNG.standard_normal(8000)
        if i % 2:
            wave[2048:6144] = 0.9 * np.sin(np.arange(4096))
        soundfile.write(tmp_path / f"{i}.wav", wave, 8000)
        rows.append(f"{i}.wav,{'loud' if i % 2 else 'quiet'}")
        spans.append(json.dumps({"file": f"{i}.wav", "segments": [[0.256, 0.768]] if i % 2 else []}))
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    (tmp_path / "spans.jsonl").write_text("\n".join(spans))
    report = run("evaluate", tmp_path / "clip", "--data", tmp_path / "clips.csv", "--robustness")
    assert report.get("accuracy: clean").value == 1
    assert report.get("accuracy: mp3 8 kbit/s").value is not None
    report = run("evaluate", tmp_path / "vad", "--data", tmp_path / "spans.jsonl")
    assert report.get("frame f1").value > 0.95
    assert report.get("frame f1").note.startswith("192 frames, 48 of speech")


def write_speller(folder: Path, layout: str) -> Path:
    """A "translator" that writes the ids it was given: the decoder picks the encoder's row of the next place."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "one", "two", "three", "eins"])}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    write_task(folder, "translation", inputs=["input_ids", "attention_mask"], processor={"start": [1], "most": 8})
    table = 20 * np.eye(7, dtype=np.float32)
    table[6] = table[3]  # eins = one
    table[0] = table[2]  # what is padding ends the answer
    files = [folder / f"{h}_model.onnx" if layout == "files" else folder / h / "model.onnx" for h in opened.HALVES]
    encoder = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Shape", ["attention_mask"], ["unused"]),
    ]
    write_graph(files[0], encoder, [("input_ids", "i", ["n", "t"]), ("attention_mask", "i", ["n", "t"])],
                [("hidden", "f", ["n", "t", 7])], {"table": table})  # fmt: skip
    decoder = [
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Pad", ["encoder_hidden_states", "pads"], ["longer"]),
        helper.make_node("Slice", ["longer", "zero", "length", "one"], ["cut"]),
        helper.make_node("Add", ["cut", "end"], ["logits"]),
    ]
    end = np.zeros(7, np.float32)
    end[2] = 1  # beyond the input the answer ends
    constants = {"one": np.array([1]), "zero": np.array([0]), "pads": np.array([0, 0, 0, 0, 9, 0]), "end": end}
    write_graph(files[1], decoder, [("input_ids", "i", ["n", "s"]), ("encoder_hidden_states", "f", ["n", "t", 7])],
                [("logits", "f", ["n", "s", 7])], constants)  # fmt: skip
    if layout == "folders":
        for half in opened.HALVES:
            (folder / half / "task.json").write_text((folder / "task.json").read_text())
    return folder


@pytest.mark.parametrize("layout", ["files", "folders"])
def test_an_encoder_and_a_decoder_write(tmp_path, layout):
    model = write_speller(tmp_path / "model", layout)
    (tmp_path / "data.tsv").write_text("source\ttarget\neins two\tone two\nthree\tthree\ntwo two one\ttwo one\n")
    report = run("evaluate", model, "--data", tmp_path / "data.tsv")
    assert report.get("exact match").value == pytest.approx(2 / 3)
    assert report.get("token f1").value == pytest.approx((1 + 1 + 4 / 5) / 3)
    assert report.get("sample").value == "two two one"
    assert report.get("sample").note == "for: two one"
    same = api.compare(model, write_speller(tmp_path / "other", layout), tmp_path / "data.tsv")
    assert same.get("same answer").value == 1
    assert same.get("bytes").value > 0


@pytest.mark.parametrize("layout", ["files", "folders"])
def test_an_encoder_and_a_decoder_are_served(tmp_path, layout):
    import httpx

    from wherry.choose import open_session
    from wherry.serve.app import create_app, serving

    model = write_speller(tmp_path / "model", layout)
    found = opened.opened(model, "onnxruntime", 1)
    with serving(create_app(found.session, opened.whole(found, model))) as url:
        answer = httpx.post(f"{url}/v1/answer", json={"input": ["three", "two two one"]}).json()
        assert answer["answers"] == [{"text": "three"}, {"text": "two two one"}]
        assert httpx.get(f"{url}/v1/wherry/facts").json()["model"]["bytes"] > 0
        assert httpx.post(f"{url}/v2/models/model/infer", json={}).status_code == 400
    if layout == "folders":
        half, artifact, _ = open_session(model / "encoder", "onnxruntime", 1)
        with pytest.raises(Unsupported, match="one half of a model"):
            create_app(half, artifact)


def test_a_folder_that_writes_without_its_halves(tmp_path):
    write_task(tmp_path / "model", "translation", processor={"start": [1]})
    with pytest.raises(Missing, match=r"encoder_model\.onnx and decoder_model\.onnx"):
        api.evaluate(tmp_path / "model", tmp_path, "onnxruntime")


def test_boxes_are_judged(tmp_path):
    """A graph that always says one box in the middle, and one in the corner with a small score."""
    boxes = np.array([[[0.25, 0.25, 0.75, 0.75], [0, 0, 0.1, 0.1]]], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["m", "axis"], ["m3"]),
        helper.make_node("Mul", ["m3", "nought"], ["zero"]),
        helper.make_node("Add", ["zero", "b"], ["boxes"]),
        helper.make_node("Squeeze", ["zero", "axis2"], ["z2"]),
        helper.make_node("Add", ["z2", "s"], ["scores"]),
    ]
    constants = {"nought": np.float32(0), "b": boxes, "axis": np.array([3]), "axis2": np.array([2]),
                 "s": np.array([[0.9, 0.1]], np.float32)}  # fmt: skip
    write_graph(tmp_path / "m/model.onnx", nodes, [("x", "f", ["n", 3, 16, 16])],
                [("boxes", "f", ["n", 2, 4]), ("scores", "f", ["n", 2])], constants)  # fmt: skip
    write_task(tmp_path / "m", "object-detection", inputs=["x"], labels=["thing"], processor={"size": [16, 16]})
    rows = []
    for i in range(4):
        Image.fromarray(RNG.integers(0, 255, (40, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file": f"{i}.png", "boxes": [[20, 10, 60, 30]], "labels": ["thing"]}))
    (tmp_path / "boxes.jsonl").write_text("\n".join(rows))
    report = run("evaluate", tmp_path / "m", "--data", tmp_path / "boxes.jsonl")
    assert report.get("map").value == pytest.approx(1)
    assert report.get("box f1").value == 1


def test_explain_draws_both_models(tmp_path):
    a, b, folder = colours(tmp_path / "a"), colours(tmp_path / "b", 0.2), pictures(tmp_path / "data", 3)
    words = ("explain", b, "--against", a, "--input", folder / "red" / "0.png", "--runtime", "onnxruntime")
    report = run(*words, "-o", tmp_path / "x.png")
    drawn = np.asarray(Image.open(tmp_path / "x.png"))
    assert drawn.shape[0] > 300
    assert drawn.shape[1] > 900  # the input, two panels and their difference
    assert drawn.std() > 10
    assert report.get("answer", "a").value.startswith("red")
    assert -1 <= report.get("agreement of reasons", "b").value <= 1
    run(*words, "-o", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "data:image/png;base64," in page
    assert "answer, b" in page
    same = run("explain", a, "--against", a, "--input", folder / "red" / "0.png", "-o", tmp_path / "y.png")
    assert same.get("agreement of reasons").value == pytest.approx(1)


def test_explain_refuses_before_it_works(tmp_path):
    a, folder = colours(tmp_path / "a"), pictures(tmp_path / "data", 1)
    good = folder / "red" / "0.png"
    write_speller(tmp_path / "writer", "files")
    for given, out, model, kind, what in (
        (good, tmp_path / "x.gif", a, BadInput, r"ends with \.png or \.html"),
        (good, tmp_path / "none" / "x.png", a, Missing, "no such folder"),
        ("words", tmp_path / "x.png", a, Missing, "a picture or a sound"),
        (a / "task.json", tmp_path / "x.png", a, BadInput, "not a picture"),
        ("eins", tmp_path / "x.png", tmp_path / "writer", Unsupported, "no single score for translation"),
    ):
        with pytest.raises(kind, match=what):
            api.explain(model, str(given), out=out)
    assert not list(tmp_path.glob("x.*"))
