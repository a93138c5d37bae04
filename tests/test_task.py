import json
from pathlib import Path

import numpy as np
import pytest

from wherry import data
from wherry.errors import BadInput, Corrupt, Missing, Unsupported
from wherry.task import KINDS, Task

PICTURE = {"size": [8, 12], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}


def task(kind: str, folder: Path = Path("."), **more) -> Task:
    return Task(kind, folder, **{"inputs": ("x",), **more})


def test_every_kind_survives_json():
    for kind in KINDS:
        before = task(kind, labels=("a", "b"), processor={"size": [4, 4], "mean": [0.1]}, outputs=("logits",))
        after = Task.from_dict(json.loads(json.dumps(before.to_dict())), Path("."))
        assert after == before
        assert after.metrics == KINDS[kind]
        hash(after)


def test_faults_of_task_json_are_said():
    with pytest.raises(Unsupported, match=r"task 'magic' is not known"):
        Task.from_dict({"kind": "magic"}, Path("."))
    with pytest.raises(BadInput, match=r"no 'meam' in a processor \(did you mean 'mean'"):
        Task.from_dict({"kind": "image-classification", "processor": {"meam": [0]}}, Path("."))
    with pytest.raises(Corrupt, match="processor"):
        Task.from_dict({"kind": "image-classification", "processor": "resnet"}, Path("."))


def test_pictures_are_scaled_as_the_processor_says():
    flat = np.full((5, 7, 3), (255, 51, 0), np.uint8)
    made = task("image-classification", processor=PICTURE).prepare([flat, flat])["x"]
    assert made.shape == (2, 3, 8, 12)
    assert made.dtype == np.float32
    for channel, expected in enumerate([(1 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (0 - 0.3) / 0.5]):
        assert made[:, channel] == pytest.approx(expected, abs=1e-6)


def test_words_and_pairs_become_ids(tiny_bert):
    names = ("input_ids", "attention_mask", "token_type_ids")
    made = Task("text-classification", tiny_bert, 32, inputs=names, labels=("no", "yes")).prepare(["a boat", "a"])
    assert {name: array.shape for name, array in made.items()} == dict.fromkeys(names, made["input_ids"].shape)
    assert made["attention_mask"].sum(1).tolist() == sorted(made["attention_mask"].sum(1), reverse=True)
    with pytest.raises(BadInput, match="takes texts, not int: 3"):
        Task("text-classification", tiny_bert).prepare([3])
    with pytest.raises(Unsupported, match="pixel_values"):
        Task("text-classification", tiny_bert, inputs=("pixel_values",)).prepare(["a"])


def test_arrays_by_name():
    kind = task("feature-extraction", inputs=("a", "b"))
    made = kind.prepare([{"a": np.ones(3), "b": [1, 2], "c": 0}, {"a": np.zeros(3), "b": [3, 4], "c": 0}])
    assert made["a"].shape == (2, 3)
    assert made["b"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BadInput, match="input 'b' is not in the data, which has a"):
        kind.prepare([{"a": np.ones(3)}])
    with pytest.raises(BadInput, match="different shapes"):
        kind.prepare([{"a": np.ones(3), "b": 1}, {"a": np.ones(4), "b": 1}])
    with pytest.raises(BadInput, match=r"takes arrays by input name \(a, b\)"):
        kind.prepare(["text"])


def test_answer_is_the_class_and_fits_the_labels():
    kind = task("image-classification", labels=("cat", "dog", "ship"), outputs=("scores",))
    logits = np.array([[0, 3, 1], [2, -1, 0]], np.float32)
    assert kind.answer({"other": np.ones(2), "scores": logits}, {}).tolist() == [1, 0]
    with pytest.raises(BadInput, match=r"gives \[2, 2\], task.json names 3 labels"):
        kind.answer({"scores": logits[:, :2]}, {})
    with pytest.raises(BadInput, match="no output 'scores'"):
        kind.answer({"a": logits, "b": logits}, {})


@pytest.mark.parametrize(
    ("label", "expected"), [("dog", 1), (" dog ", 1), (2, 2), ("2", 2), ("2.0", 2), (1.0, 1), (np.int64(0), 0)]
)
def test_a_label_by_name_or_index(label, expected):
    assert task("image-classification", labels=("cat", "dog", "ship")).target(label, "x.csv:2") == expected


@pytest.mark.parametrize("label", ["dgo", 3, -1, 0.5, "0.5", None, "", True, "nan", [1], float("nan"), "1e0", 10**30])
def test_a_label_that_does_not_fit_names_its_line(label):
    with pytest.raises(BadInput, match=r"^x\.csv:2: the label .* is not one of the model's"):
        task("image-classification", labels=("cat", "dog", "ship")).target(label, "x.csv:2")


def test_names_go_before_indices_and_doubles_are_refused():
    digits = task("audio-classification", labels=("9", "8", "crane", "crane"))
    assert digits.target("9", "x") == 0
    with pytest.raises(BadInput, match="'crane' names 2 classes"):
        digits.target("crane", "x")


def test_labels_of_other_kinds():
    assert task("translation").target("drei", "x") == "drei"
    assert task("token-classification", labels=("O", "PER")).target(["O", "PER", 1], "x") == [0, 1, 1]
    assert task("voice-activity-detection").target([], "x").shape == (0, 2)
    assert task("voice-activity-detection").target([[0.5, 1]], "x").tolist() == [[0.5, 1]]
    found = task("object-detection", labels=("car",)).target({"boxes": [[1, 2, 3, 4]], "labels": ["car"]}, "x")
    assert found["boxes"].tolist() == [[1, 2, 3, 4]]
    assert found["labels"].tolist() == [0]
    for kind, label, said in (
        ("translation", 3, "a text is wanted"),
        ("token-classification", "O O", "one per word"),
        ("sentence-similarity", "high", "a score is wanted"),
        ("sentence-similarity", "nan", "a score is wanted"),
        ("voice-activity-detection", [[1, 0.5]], "ends before it starts"),
        ("voice-activity-detection", "0-1", "in seconds are wanted"),
        ("object-detection", {"boxes": [[1, 2, 3]]}, "in pixels are wanted"),
        ("object-detection", {"boxes": [[3, 2, 1, 4]]}, "ends before it starts"),
        ("object-detection", {"boxes": [[1, 2, 3, 4]], "labels": []}, "1 boxes, but labels"),
        ("object-detection", "cat", "in pixels are wanted"),
    ):
        with pytest.raises(BadInput, match=f"^x.csv:7: .*{said}"):
            task(kind).target(label, "x.csv:7")


def test_data_that_was_used_is_known_again(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    (tmp_path / "b.csv").write_text("text,label\ny,1\n")
    a, b = data.read(tmp_path / "a.csv"), data.read(tmp_path / "b.csv")
    used = task("text-classification").used("training", a.name, a.digest).used("held_out", b.name, b.digest)
    again = Task.from_dict(json.loads(json.dumps(used.to_dict())), tmp_path)
    assert again.leak(a.digest) == "training"
    assert again.leak(b.digest) == ""
    assert again.used("search", b.name, b.digest).leak(b.digest) == "search"


def test_examples_are_two_that_can_be_prepared(tiny_bert):
    assert task("image-classification", processor=PICTURE).prepare(
        task("image-classification", processor=PICTURE).examples()
    )["x"].shape == (2, 3, 8, 12)
    sound = task("audio-classification", processor={"sampling_rate": 8000})
    assert sound.prepare(sound.examples())["x"].shape == (2, 16000)
    with pytest.raises(Unsupported, match="arrays by input name"):
        task("feature-extraction").examples()


def classifier(folder: Path, **config) -> Task:
    return Task.of(folder, {"architectures": ["BertForSequenceClassification"], **config})


def test_a_classifier_is_known_by_its_architecture(tiny_bert):
    found = classifier(tiny_bert, id2label={"1": "good", "0": "bad", "2": "so-so"}, max_position_embeddings=514)
    assert found.kind == "text-classification"
    assert found.labels == ("bad", "good", "so-so")
    assert found.max_length == 256  # the tokenizer's, which is less
    assert found.inputs == ("input_ids", "attention_mask")
    assert classifier(tiny_bert, type_vocab_size=2).inputs[2:] == ("token_type_ids",)
    assert classifier(tiny_bert).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, Corrupt, "not 0, 1, 2"),
        ({"id2label": ["a", "b"]}, Corrupt, "id2label"),
        ({"id2label": {"x": "a"}}, Corrupt, "id2label"),
        ({"id2label": {"0": "score"}}, Unsupported, "a regression"),
        ({"problem_type": "multi_label_classification"}, Unsupported, "one label of several"),
        ({"architectures": ["ViTForImageClassification"]}, Missing, "preprocessor_config.json"),
    ],
)
def test_classifiers_that_are_refused(tiny_bert, config, kind, said):
    with pytest.raises(kind, match=said):
        classifier(tiny_bert, **config)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 24, "width": 32}}),
        ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}, "resample": 3, "do_normalize": False}),
        ("ViTImageProcessorPil", {"size": {"height": 9, "width": 9}, "rescale_factor": 0.01, "image_std": [1, 2, 3]}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 28}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}, "resample": 2}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 30}, "crop_size": {"height": 20, "width": 20}}),
        ("DeiTImageProcessorPil", {"size": {"height": 30, "width": 30}, "crop_size": {"height": 20, "width": 20}}),
    ],
)
@pytest.mark.parametrize("shape", [(37, 50, 3), (61, 40, 3)])
def test_pictures_become_what_transformers_makes_of_them(tmp_path, name, facts, shape):
    import transformers

    maker = getattr(transformers, name)(**facts)
    maker.save_pretrained(tmp_path)
    config = {"architectures": ["ViTForImageClassification"]}
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    made = Task.of(tmp_path, config).prepare([pixels])["pixel_values"]
    expected = np.asarray(maker(pixels)["pixel_values"])
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("facts", [{"size": {"shortest_edge": 30}, "do_center_crop": False}, {}, {"do_pad": True},
                                   {"size": {"height": 8, "width": 8}, "resample": 5}])  # fmt: skip
def test_processors_that_are_not_made_here(tmp_path, facts):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    with pytest.raises(Unsupported, match="preprocessor_config.json"):
        Task.of(tmp_path, {"architectures": ["ViTForImageClassification"]})
