"""Graph models over real HTTP: raw examples to answers, tensors to tensors, the page, bad requests of every kind."""

import base64
import io
import json
import shutil
import wave

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import wherry
from wherry.choose import artifacts, open_session
from wherry.errors import Unsupported
from wherry.serve.app import create_app, serving
from wherry.shelf import find
from wherry.task import Task

SIZE = 8
PICTURES = {"size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.25] * 3}
LABELS = ("red", "green", "blue")


class Colour(torch.nn.Module):
    """The mean of each channel, so that the right label is known without a trained model."""

    def forward(self, pixel_values):
        return 3 * pixel_values.mean((2, 3))


class Words(torch.nn.Module):
    """The first token's parity; a second output, as real graphs have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(512, 4)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        hidden = self.table(input_ids) * mask
        return (hidden.sum(1) / mask.sum(1))[:, :2], hidden


class Loud(torch.nn.Module):
    """Probability of speech by the power of windows of 100 samples."""

    def forward(self, audio):
        power = audio.reshape(audio.shape[0], -1, 100).pow(2).mean(-1)
        return torch.sigmoid(100 * (power - 0.05))


class Spots(torch.nn.Module):
    """Always the same two boxes; the scores follow the picture's brightness."""

    def forward(self, pixel_values):
        light = pixel_values.mean((1, 2, 3))
        boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
        boxes = boxes[None] + 0 * light[:, None, None]
        return boxes, torch.stack([torch.sigmoid(light), torch.sigmoid(-light)], 1)


class Sums(torch.nn.Module):
    def forward(self, a, b):
        return a * 2 + b.float().sum(1, keepdim=True), b + 1, torch.log(a)


def served(folder, module, example, task, free=None):
    """A folder made by wherry.capture, on ONNX Runtime: a server as a context that gives its URL."""
    outputs = task.outputs
    wherry.capture(module, folder, example, task=task, free=free, outputs=outputs)
    session, artifact, _ = open_session(folder, "onnxruntime", 1)
    return serving(create_app(session, artifact))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "colours"
    fields = {"inputs": ("pixel_values",), "outputs": ("logits",), "labels": LABELS, "processor": PICTURES}
    task = Task("image-classification", folder.parent, **fields)
    with served(folder, Colour(), torch.zeros(2, 3, SIZE, SIZE), task) as url:
        yield url, folder


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_bert):
    folder = tmp_path_factory.mktemp("models") / "words"
    ids = torch.ones(2, 5, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": ids}
    fields = {"inputs": tuple(example), "outputs": ("logits", "hidden"), "labels": ("bad", "good"), "max_length": 64}
    free = {name: {1: "sequence"} for name in example}
    with served(folder, Words(), example, Task("text-classification", tiny_bert, **fields), free) as url:
        yield url, folder


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "loud"
    processor = {"sampling_rate": 1000, "features": "wave", "frames": 1000, "window": 100}
    fields = {"inputs": ("audio",), "outputs": ("p",), "processor": processor}
    task = Task("voice-activity-detection", folder.parent, **fields)
    with served(folder, Loud(), torch.zeros(2, 1000), task) as url:
        yield url


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "spots"
    fields = {"inputs": ("pixel_values",), "outputs": ("boxes", "scores"), "labels": ("cup",), "processor": PICTURES}
    task = Task("object-detection", folder.parent, **fields)
    with served(folder, Spots(), torch.zeros(2, 3, SIZE, SIZE), task) as url:
        yield url


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Arrays in, arrays out."""
    folder = tmp_path_factory.mktemp("models") / "sums"
    example = {"a": torch.ones(2, 3), "b": torch.ones(2, 4, dtype=torch.int64)}
    wherry.capture(Sums(), folder, example, outputs=("twice", "next", "log"))
    session, artifact, _ = open_session(folder, "onnxruntime", 1)
    with serving(create_app(session, artifact)) as url:
        yield url


def picture(colour, kind="PNG", size=(20, 12)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def sound(samples, rate=1000):
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def encoded(raw):
    return base64.b64encode(raw).decode()


def labels(answer):
    assert answer.status_code == 200, answer.text
    return [one["labels"][0]["label"] for one in answer.json()["answers"]]


def refused(answer, status, *words):
    """The message of an answer that is an error in the shape of its protocol."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    message = error if "/v2/" in str(answer.url) else error["message"]
    for word in words:
        assert word in message
    assert "Traceback" not in message
    return message


def write_classifier(folder, kind):
    """A random transformers classifier as save_pretrained leaves it."""
    from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification
    from transformers import ConvNextImageProcessorPil as Processor

    torch.manual_seed(3)
    if kind == "text":
        config = BertConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=96, id2label={0: "dull", 1: "fine", 2: "splendid"}, initializer_range=0.5,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
    else:
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label={0: "cat", 1: "cup"}
        )
        model = ResNetForImageClassification(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # buffers must come along
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        Processor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_a_transformers_classifier_from_its_folder_to_its_answer(tmp_path, tiny_bert, kind):
    """Captured, served, asked; against transformers' own module and processor."""
    from transformers import ConvNextImageProcessorPil as Processor

    source, graph = tmp_path / "source", tmp_path / "graph"
    model = write_classifier(source, kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_bert / name, source / name)
    with pytest.raises(Unsupported, match="wherry capture"):  # a classifier without its head would be nonsense
        wherry.compress(source, tmp_path / "out", "rtn:scheme=W8A16,group_size=-1")
    wherry.capture(source, graph)
    session, artifact, _ = open_session(graph, "onnxruntime", 1)
    with serving(create_app(session, artifact)) as url:
        if kind == "text":
            found = httpx.post(f"{url}/v1/answer", json={"input": "A quiet delight."}).json()["answers"][0]
            inputs = {k: torch.from_numpy(v) for k, v in artifact.task.prepare(["A quiet delight."]).items()}
        else:
            noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
            noise.save(file := io.BytesIO(), "PNG")
            answer = httpx.post(f"{url}/v1/answer", content=file.getvalue(), headers={"content-type": "image/png"})
            found = answer.json()["answers"][0]
            inputs = Processor.from_pretrained(source)(noise, return_tensors="pt")
    with torch.no_grad():
        p = model(**inputs).logits.softmax(-1)[0]
    expected = {model.config.id2label[i]: pytest.approx(float(p[i]), abs=1e-4) for i in range(len(p))}
    assert {one["label"]: one["probability"] for one in found["labels"]} == expected


# -- raw examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_a_picture_by_every_road(colours, kind, mime):
    url = f"{colours[0]}/v1/answer"
    red, blue = picture("red", kind), picture("blue", kind)
    for content in (mime, "application/octet-stream"):
        assert labels(httpx.post(url, content=red, headers={"content-type": content})) == ["red"]
    assert labels(httpx.post(url, json={"input": encoded(blue)})) == ["blue"]
    both = [f"data:{mime};base64,{encoded(red)}", encoded(blue)]
    assert labels(httpx.post(url, json={"input": both, "model": "colours"})) == ["red", "blue"]
    files = [("input", ("a", blue, mime)), ("anything", ("b", red, mime))]
    assert labels(httpx.post(url, files=files, data={"top": "2"})) == ["blue", "red"]


def test_probabilities_are_those_of_the_graph(colours):
    """By onnxruntime alone, with the processor's arithmetic written out."""
    url, folder = colours
    answer = httpx.post(f"{url}/v1/answer?top=2", content=picture((255, 51, 0)), headers={"content-type": "image/png"})
    pixels = (np.array([1.0, 0.2, 0.0], np.float32) - 0.5) / 0.25
    feed = np.tile(pixels[None, :, None, None], (1, 1, SIZE, SIZE))
    logits = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, {"pixel_values": feed})[0][0]
    expected = np.exp(logits) / np.exp(logits).sum()
    body = answer.json()
    assert (body["model"], body["task"]) == ("colours", "image-classification")
    found = body["answers"][0]
    assert found["probabilities"] == "softmax"
    assert [one["label"] for one in found["labels"]] == ["red", "green"]
    assert [one["probability"] for one in found["labels"]] == pytest.approx(expected[:2].tolist(), abs=1e-5)


def test_texts_one_by_one_and_together_are_the_same(words):
    url = f"{words[0]}/v1/answer"
    texts = ["A boat.", "It carries cargo up the shallow rivers, where big ships cannot go.", "x"]
    together = httpx.post(url, json={"input": texts}).json()["answers"]
    for text, expected in zip(texts, together, strict=True):
        for alone in (
            httpx.post(url, json={"input": text}),
            httpx.post(url, content=text.encode(), headers={"content-type": "text/plain; charset=utf-8"}),
            httpx.post(url, files={"input": (None, text)}),
        ):
            found = alone.json()["answers"][0]["labels"]
            assert [one["label"] for one in found] == [one["label"] for one in expected["labels"]]
            assert found[0]["probability"] == pytest.approx(expected["labels"][0]["probability"], abs=1e-5)
        assert sum(one["probability"] for one in expected["labels"]) == pytest.approx(1)
    pair = httpx.post(url, json={"input": [["A boat.", "A ship."]]})
    assert len(pair.json()["answers"]) == 1


def test_speech_is_told_in_seconds(loud):
    wave_ = np.zeros(1000)
    wave_[300:600] = 0.9
    answer = httpx.post(f"{loud}/v1/answer", content=sound(wave_), headers={"content-type": "audio/wav"})
    found = answer.json()["answers"][0]
    assert found["speech"] == [{"start": pytest.approx(0.3), "end": pytest.approx(0.6)}]
    silent = httpx.post(f"{loud}/v1/answer", content=sound(np.zeros(1000)), headers={"content-type": "audio/wav"})
    assert silent.json()["answers"][0]["speech"] == []


def test_boxes_are_pixels_of_the_picture_that_was_sent(spots):
    files = [("input", ("a.png", picture("white", size=(40, 20)))), ("input", ("b.png", picture("black")))]
    bright, dark = httpx.post(f"{spots}/v1/answer", files=files).json()["answers"]
    assert [(one["box"], one["label"]) for one in bright["boxes"]] == [([0, 0, 20, 10], "cup")]
    assert [one["box"] for one in dark["boxes"]] == [[10, 6, 20, 12]]


@pytest.mark.parametrize(
    ("content", "mime", "status", "said"),
    [
        (b"no picture at all", "image/png", 400, "not a picture that can be decoded"),
        (picture("red")[:48], "image/png", 400, "not a picture that can be decoded"),
        (b"", "image/png", 400, "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "image/x-eps", 400, "not a picture"),
        (sound(np.zeros(9)), "audio/wav", 415, "does not fit image-classification"),
        (b"red", "text/plain", 415, "image/*"),
        (picture("red"), "", 415, "content type"),
        (b"{", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "must be a JSON object"),
        (b"--x\r\nno form", "multipart/form-data; boundary=y", 400, "form"),
        (b"", "multipart/form-data", 400, "boundary"),
    ],
)
def test_bad_uploads(colours, content, mime, status, said):
    refused(httpx.post(f"{colours[0]}/v1/answer", content=content, headers={"content-type": mime}), status, said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "base64 of a file"),
        ({"input": []}, "base64 of a file"),
        ({"input": "/etc/passwd"}, "base64"),
        ({"input": "http://localhost/a.png"}, "base64"),
        ({"input": [5]}, "base64"),
        ({"input": encoded(b"x")}, "not a picture that can be decoded"),
        ({"input": encoded(picture("red")), "top": 0}, "top must be a whole number"),
        ({"input": encoded(picture("red")), "top": True}, "top must be a whole number"),
        ({"input": encoded(picture("red")), "topp": 1}, "did you mean 'top'"),
        ({"input": [encoded(picture("red"))] * 65}, "no more than 64"),
    ],
)
def test_bad_json_for_pictures(colours, body, said):
    refused(httpx.post(f"{colours[0]}/v1/answer", json=body), 400, said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": 5}, "must be a text"),
        ({"input": ""}, "not empty"),
        ({"input": ["a", "  "]}, "input[1]"),
        ({"input": [["a", "b", "c"]]}, "a pair"),
        ({"input": "boat " * 500}, "the model reads 64 at most"),
    ],
)
def test_bad_json_for_texts(words, body, said):
    refused(httpx.post(f"{words[0]}/v1/answer", json=body), 400, said)


def test_unknown_models_and_routes(colours, sums):
    url = colours[0]
    refused(httpx.post(f"{url}/v1/answer", json={"input": encoded(picture("red")), "model": "gpt"}), 404, "'colours'")
    refused(httpx.get(f"{url}/v2/models/other"), 404, "this server has 'colours'")
    refused(httpx.post(f"{url}/v2/models/other/infer", json={}), 404, "no model 'other'")
    refused(httpx.get(f"{url}/v2/models/colours/infer"), 405, "use POST")
    refused(httpx.get(f"{url}/v2/nothing"), 404, "there is nothing at /v2/nothing")
    refused(httpx.post(f"{url}/v1/chat/completions", json={}), 404, "there is nothing at")
    refused(httpx.post(f"{sums}/v1/answer", json={"input": "a"}), 400, "takes arrays by name", "/v2/models/sums/infer")


def test_hours_of_silence_in_a_small_file_are_refused_unread(loud):
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.zeros(8000 * 700, np.int16), 8000, format="FLAC")
    answer = httpx.post(f"{loud}/v1/answer", content=out.getvalue(), headers={"content-type": "audio/flac"})
    refused(answer, 400, "700 s of sound, 600 at most")


def test_large_bodies_are_refused(colours):
    session, artifact, _ = open_session(colours[1], "onnxruntime", 1)
    with serving(create_app(session, artifact, max_body=5000)) as url:
        red = picture("red")
        assert labels(httpx.post(f"{url}/v1/answer", content=red, headers={"content-type": "image/png"})) == ["red"]
        for path in ("/v1/answer", "/v2/models/colours/infer"):
            answer = httpx.post(url + path, content=red + bytes(5000), headers={"content-type": "image/png"})
            refused(answer, 413, "5000 bytes")


# -- Open Inference Protocol --------------------------------------------------------------------------------------


def request(**changes):
    """A right request to `sums`, with changes to its first tensor."""
    a = {"name": "a", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5.5, 6]}
    b = {"name": "b", "shape": [2, 4], "datatype": "INT64", "data": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    return {"id": "42", "inputs": [a | changes, b]}


def test_tensors_in_tensors_out(sums):
    answer = httpx.post(f"{sums}/v2/models/sums/infer", json=request())
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model_name"], body["id"]) == ("sums", "42")
    found = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in body["outputs"]}
    a, b = np.array([[1, 2, 3], [4, 5.5, 6]]), np.arange(1, 9).reshape(2, 4)
    np.testing.assert_allclose(found["twice"], 2 * a + b.sum(1, keepdims=True))
    assert found["next"].tolist() == (b + 1).tolist()
    assert [one["datatype"] for one in body["outputs"]] == ["FP32", "INT64", "FP32"]
    chosen = httpx.post(f"{sums}/v2/models/sums/infer", json=request() | {"outputs": [{"name": "next"}]}).json()
    assert [one["name"] for one in chosen["outputs"]] == ["next"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_each_runtime_says_what_the_file_says(colours, runtime):
    """Names and dtypes by onnx alone; OpenVINO has no names for free axes."""
    import onnx

    pytest.importorskip(runtime)
    session = find("runtimes", runtime).load(artifacts(colours[1])[0], threads=1)
    graph = onnx.load(colours[1] / "model.onnx", load_external_data=False).graph
    for values, found in ((graph.input, session.inputs), (graph.output, session.outputs)):
        assert list(found) == [value.name for value in values]
        for value in values:
            kind, shape = found[value.name]
            assert kind == str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            assert not isinstance(shape[0], int)
            assert list(shape[1:]) == [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    session.close()


def test_v2_health_and_metadata(sums):
    assert httpx.get(f"{sums}/v2").json()["name"] == "wherry"
    assert httpx.get(f"{sums}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{sums}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{sums}/v2/models/sums/ready").json() == {"name": "sums", "ready": True}
    told = httpx.get(f"{sums}/v2/models/sums").json()
    assert (told["name"], told["platform"]) == ("sums", "onnxruntime_onnx")
    assert told["inputs"] == [
        {"name": "a", "datatype": "FP32", "shape": [-1, 3]}, {"name": "b", "datatype": "INT64", "shape": [-1, 4]},
    ]  # fmt: skip
    assert [one["name"] for one in told["outputs"]] == ["twice", "next", "log"]
    assert httpx.get(f"{sums}/v1/models").json()["data"][0]["id"] == "sums"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "c"}, "the model has no 'c'"),
        ({"name": "b"}, "'b' stands there twice"),
        ({"name": None}, "no 'None'"),
        ({"datatype": "FP64"}, "a must be FP32"),
        ({"datatype": None}, "a must be FP32"),
        ({"shape": [2, 2]}, "not the shape [2, 2]"),
        ({"shape": [6]}, "not the shape [6]"),
        ({"shape": [1, 3], "data": [1, 2, 3]}, "must agree"),
        ({"shape": [-2, 3]}, "whole numbers above 0"),
        ({"shape": [True, 3]}, "whole numbers above 0"),
        ({"shape": "2,3"}, "whole numbers above 0"),
        ({"shape": None}, "whole numbers above 0"),
        ({"data": [1, 2]}, "data has the shape [2]"),
        ({"data": [[1, 2], [3, 4], [5, 6]]}, "data has the shape [3, 2]"),
        ({"data": [[1, 2, 3], [4]]}, "ragged"),
        ({"data": ["1", "2", "3", "4", "5", "6"]}, "something else than such numbers"),
        ({"data": [1, 2, 3, None, 5, 6]}, "something else than such numbers"),
        ({"data": [1, 2, 3, 4, 5, 1e39]}, "not finite, or beyond FP32"),
        ({"data": []}, "something else"),
        ({"data": None}, "data must be a list"),
        ({"data": 5}, "data must be a list"),
        ({"parameters": {"binary_data_size": 24}}, "no binary data"),
        ({"data": [1, 2, 3, 4, 5, -1]}, "the output 'log' has NaN"),
    ],
)
def test_wrong_tensors(sums, changes, said):
    status = 500 if "log" in said else 400
    refused(httpx.post(f"{sums}/v2/models/sums/infer", json=request(**changes)), status, said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b'{"inputs": 5}', "inputs must be a list"),
        (b'{"inputs": []}', "the input 'a' is missing"),
        (b'{"inputs": [5]}', "inputs must be a list of objects"),
        (b'{"input": []}', "did you mean 'inputs'"),
        (b'{"id": 5, "inputs": []}', "id must be a string"),
        (json.dumps(request() | {"outputs": [{"name": "x"}]}).encode(), "the model has no 'x'"),
        (json.dumps(request()).replace("5.5", "NaN").encode(), "not finite"),
        (json.dumps(request()).replace("[1, 2, 3, 4]", f"[1, 2, 3, {2**63}]").encode(), "something else"),
        (json.dumps(request()).replace("[1, 2, 3, 4]", "[1, 2, 3, 4.5]").encode(), "something else"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_wrong_bodies(sums, body, said):
    refused(httpx.post(f"{sums}/v2/models/sums/infer", content=body), 400, said)


def test_a_sentence_encoder_keeps_its_embeddings_and_a_writer_has_no_tensors(encoder, writer):
    with serving(create_app(*encoder)) as url:
        assert len(httpx.post(f"{url}/v1/embeddings", json={"input": "boat"}).json()["data"]) == 1
        assert httpx.get(f"{url}/v2/health/ready").json() == {"ready": True}
    with serving(create_app(*writer)) as url:
        refused(httpx.post(f"{url}/v2/models/tiny-writer/infer", json={}), 400, "is not served as a graph")


# -- counters and the page ----------------------------------------------------------------------------------------


def test_routes_are_counted_by_name(colours):
    url = colours[0]
    httpx.get(f"{url}/v2/models/colours/ready")
    httpx.get(f"{url}/v2/models/secret/ready")
    text = httpx.get(f"{url}/metrics").text
    assert 'route="/v2/models/colours/ready"' in text
    assert "secret" not in text


@pytest.mark.parametrize("modality", ["image", "text", "audio", "arrays"])
def test_the_page_of_a_graph_loads_nothing_from_elsewhere(colours, words, loud, sums, modality):
    import re

    url = {"image": colours[0], "text": words[0], "audio": loud, "arrays": sums}[modality]
    page = httpx.get(url)
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    seen = page.text
    for link in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert link.startswith("/web/")
        seen += httpx.get(url + link).text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", seen)
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|innerHTML|insertAdjacentHTML|@import", seen)
    facts = httpx.get(f"{url}/v1/wherry/facts").json()
    assert facts["model"]["modality"] == modality
