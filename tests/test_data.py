import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from wherry import data
from wherry.errors import BadInput, Missing
from wherry.task import Task


def picture(level: int = 0, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (level, level, level)).save(buffer, kind)
    return buffer.getvalue()


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id,text,label\n1,"good, really",pos\n2,"two\nlines",neg\n'),
        ("a.tsv", "label\ttext\npos\tgood, really\nneg\ttwo\\nlines\n"),
        ("a.jsonl", '{"text": "good, really", "label": "pos"}\n\n{"text": "two\\nlines", "label": "neg"}\n'),
        ("a.json", '[{"text": "good, really", "label": "pos"}, {"text": "two\\nlines", "label": "neg"}]'),
        ("b.tsv", "good, really\tpos\ntwo\\nlines\tneg\n"),
        ("b.csv", '\ufeffsentence,label\n"good, really",pos\n"two\nlines",neg\n'),
    ],
)
def test_texts_and_labels_of_every_table(tmp_path, name, content):
    write(tmp_path / name, content)
    found = data.read(tmp_path / name)
    assert found.examples[0] == "good, really"
    assert found.texts == found.examples
    assert found.labels == ("pos", "neg")
    assert len(found.places) == 2
    assert found.places[0].startswith(name)


def test_parquet_with_texts_and_with_pictures(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"sentence": ["a", "b"], "label": [0, 1]}), tmp_path / "a.parquet")
    assert data.read(tmp_path / "a.parquet").labels == (0, 1)
    images = [{"bytes": picture(i), "path": "x.png"} for i in (10, 20)]
    parquet.write_table(pyarrow.table({"image": images, "label": [3, 4]}), tmp_path / "b.parquet")
    found = data.read(tmp_path / "b.parquet")
    kind = Task("image-classification", tmp_path, inputs=("x",), processor={"size": [2, 2], "scale": 1})
    assert kind.prepare(found.examples)["x"][:, 0, 0, 0].tolist() == [10, 20]
    write(tmp_path / "c.parquet", "no parquet")
    with pytest.raises(BadInput, match="not a parquet file"):
        data.read(tmp_path / "c.parquet")


def test_pairs_translations_and_words(tmp_path):
    write(tmp_path / "a.csv", "sentence1,sentence2,score\na,b,0.5\nc,d,1\n")
    assert data.read(tmp_path / "a.csv").pairs == (("a", "b", 0.5), ("c", "d", 1.0))
    write(tmp_path / "b.csv", "a,b,0.5\nc,d,1\n")
    assert data.read(tmp_path / "b.csv").pairs == data.read(tmp_path / "a.csv").pairs
    write(tmp_path / "c.tsv", "source\ttarget\neins\tone\n")
    found = data.read(tmp_path / "c.tsv")
    assert (found.examples, found.labels) == (("eins",), ("one",))
    write(tmp_path / "d.jsonl", json.dumps({"tokens": ["Ann", "ran"], "tags": ["PER", "O"]}))
    found = data.read(tmp_path / "d.jsonl")
    assert (found.examples, found.labels) == ((["Ann", "ran"],), (["PER", "O"],))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"texd": "b"}\n', r"a\.jsonl:2: not an object with a field \"text\""),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: .* but a list"),
        ("a.jsonl", '{"text": "a"}\n{"text": 7}\n', r"a\.jsonl:2: a text is wanted, not 7"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json: element 2"),
        ("a.csv", "text,label\na,b\na,b,c\n", r"a\.csv:3: 3 columns, the header has 2"),
        ("a.csv", "a,b,0.5\na,b,x\n", r"a\.csv:2: not two sentences and a score"),
        ("a.tsv", "a\tb\t0.5\nc\td\n", r"a\.tsv:2: not two sentences and a score"),
        ("a.tsv", "a\tb\nc\td\te\n", r"a\.tsv:2: not two sentences and a score"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "file,label\n../../etc/passwd,1\n", "is outside of"),
        ("a.csv", "file,label\n/etc/passwd,1\n", "is outside of"),
        ("a.csv", "file,label\nnone.png,1\n", r"a\.csv:2: no such file"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("a.csv", "sentence1,sentence2,score\na,b,inf\n", r"a\.csv:2: the score 'inf' is not a finite number"),
        ("a.png", "no picture", "1 of 1 examples cannot be decoded"),
        ("a.wav", "no sound", "1 of 1 examples cannot be decoded"),
        ("a.json", '{"annotations": 3}', "not a COCO file"),
    ],
)
def test_faults_name_the_line(tmp_path, name, content, said):
    write(tmp_path / name, content)
    with pytest.raises((BadInput, Missing), match=said):
        data.read(tmp_path / name)


def test_a_folder_of_classes(tmp_path):
    for i, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/3.PNG", "loose.png", "notes.txt")):
        write(tmp_path / name, picture(i))
    found = data.read(tmp_path)
    assert found.labels == ("cat", "cat", "dog")
    assert found.places == ("cat/1.png", "cat/deep/2.png", "dog/3.PNG")
    assert found.notes == (f"1 files beside the class folders of {tmp_path.name} are left out",)
    before = found.digest
    assert data.read(tmp_path).digest == before
    write(tmp_path / "cat/1.png", picture(99))
    assert data.read(tmp_path).digest != before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", "a.wav,yes\nb.wav,no\n"),
        ("labels.tsv", "file\tlabel\na.wav\tyes\nb.wav\tno\n"),
        ("metadata.jsonl", '{"file_name": "a.wav", "label": "yes"}\n{"file_name": "b.wav", "label": "no"}\n'),
        ("metadata.csv", "file_name,transcription\na.wav,yes\nb.wav,no\n"),
    ],
)
def test_a_folder_with_a_label_file(tmp_path, name, content):
    for sound in "abc":
        soundfile.write(tmp_path / f"{sound}.wav", np.zeros(100), 8000)
    write(tmp_path / name, content)
    found = data.read(tmp_path)
    assert found.labels == ("yes", "no")
    assert [path.name for path in found.examples] == ["a.wav", "b.wav"]
    assert found.notes == (f"1 files of {tmp_path.name} are not in {name}",)


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no pictures and no sounds"):
        data.read(tmp_path)
    write(tmp_path / "labels.csv", "text,label\nwords,1\n")
    with pytest.raises(BadInput, match="has no column 'file'"):
        data.read(tmp_path)


def test_undecodable_pictures_are_named_and_fatal_beyond_the_bound(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i % 3}/{i}.jpg", picture(i, "jpeg"))
    write(tmp_path / "0/bad.jpg", picture(9, "jpeg")[:200])
    with pytest.raises(BadInput, match=r"1 of 10 examples cannot be decoded, 1.0% may be.\n0/bad.jpg: "):
        data.read(tmp_path)
    found = data.read(tmp_path, max_bad=0.1)
    assert len(found.examples) == len(found.labels) == len(found.places) == 9
    assert len(found.bad) == 1
    assert found.bad[0].startswith("0/bad.jpg: ")


def test_arrays_by_name_and_token_ids(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2, 2), np.float32), mask=np.arange(3), label=np.array([1, 0, 1]))
    found = data.read(tmp_path / "a.npz")
    assert found.labels == (1, 0, 1)
    assert found.tokens is None
    assert found.examples[2]["mask"] == 2
    np.savez(tmp_path / "b.npz", x=np.ones((3, 2)), y=np.ones((2, 2)))
    with pytest.raises(BadInput, match="different numbers of examples"):
        data.read(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", input_ids=np.arange(6).reshape(2, 3))
    assert data.read(tmp_path / "c.npz").tokens.shape == (2, 3)
    np.save(tmp_path / "d.npy", np.arange(6))
    assert data.read(tmp_path / "d.npy").tokens.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_boxes_of_coco(tmp_path):
    write(tmp_path / "a.png", picture())
    found = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "categories": [{"id": 9, "name": "car"}],
        "annotations": [{"image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 1]}],
    }
    write(tmp_path / "instances.json", json.dumps(found))
    read = data.read(tmp_path / "instances.json")
    made = data.targets(read, Task("object-detection", tmp_path, labels=("person", "car")))[0]
    assert made["boxes"].tolist() == [[1, 2, 4, 3]]
    assert made["labels"].tolist() == [1]
    found["annotations"][0]["image_id"] = 6
    write(tmp_path / "instances.json", json.dumps(found))
    with pytest.raises(BadInput, match="not a COCO file"):
        data.read(tmp_path / "instances.json")


def test_a_video_becomes_frames(tmp_path):
    from tests.test_image import film

    film(tmp_path / "film.mp4", 6)
    found = data.read(tmp_path / "film.mp4")
    assert len(found.examples) == 6
    assert found.places[2] == "film.mp4: frame 2"
    kind = Task("image-classification", tmp_path, inputs=("x",), processor={"size": [8, 8]})
    assert data.inputs(found, kind, 4, batch=3)[0]["x"].shape == (3, 3, 8, 8)


def test_inputs_are_drawn_with_a_seed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(50, dtype=np.float32)[:, None])
    found, kind = data.read(tmp_path / "a.npz"), Task("feature-extraction", tmp_path, inputs=("x",))

    def drawn(seed, batch=16):
        return np.concatenate([b["x"] for b in data.inputs(found, kind, 20, seed, batch)]).ravel().tolist()

    assert drawn(None) == list(range(20))
    assert drawn(1) == drawn(1, batch=7) != drawn(2)
    assert len(set(drawn(1))) == 20


def test_targets_name_the_line(tmp_path):
    write(tmp_path / "a.csv", "text,label\na,pos\nb,pso\n")
    kind = Task("text-classification", tmp_path, labels=("neg", "pos"))
    with pytest.raises(BadInput, match=r"a\.csv:3: the label 'pso' .*did you mean 'pos'"):
        data.targets(data.read(tmp_path / "a.csv"), kind)
    write(tmp_path / "b.txt", "one line\n")
    with pytest.raises(BadInput, match="has no labels"):
        data.targets(data.read(tmp_path / "b.txt"), kind)


def test_real_data_sets_read(wherry_data):
    assert len(data.read(wherry_data / "sst2" / "dev.tsv").examples) > 800
    stsb = data.read(wherry_data / "stsb" / "stsb-en-dev.csv")
    assert len(stsb.pairs) == 1500
    cifar = data.read(wherry_data / "cifar10")
    assert len(set(cifar.labels)) == 10
    assert len(data.read(wherry_data / "fsdd").examples) == 600
