"""Heat in closed form: linear models, whose parts count exactly as much as their weights."""

import numpy as np
import pytest
import torch

from wherry.errors import BadInput, Unsupported
from wherry.evaluate import attribute
from wherry.session import NoGenerate
from wherry.task import Task


class Linear(NoGenerate):
    """Logit of class 1 = the mean of the input times a fixed array; class 0 has logit 0."""

    grade, facts = "A", {}

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight

    def predict(self, inputs):
        x = inputs["x"].astype(np.float64)
        logit = (x * self.weight).reshape(len(x), -1).sum(1)
        return {"logits": np.stack([np.zeros(len(x)), logit], 1)}

    def close(self) -> None:
        pass


class Words(NoGenerate):
    """Counts: +2 for each "good", -1 for each "bad"."""

    grade, facts = "A", {}

    def predict(self, inputs):
        raise AssertionError

    def close(self) -> None:
        pass


def picture_task(**more) -> Task:
    return Task("image-classification", ".", inputs=("x",), processor={"size": [28, 28], "scale": 1 / 255}, **more)


def test_a_picture_is_hot_where_the_weights_are():
    weight = np.zeros((3, 28, 28))
    weight[:, 4:8, 20:24] = 1
    pixels = np.random.default_rng(0).integers(60, 90, (28, 28, 3), dtype=np.uint8)
    pixels[4:8, 20:24] = 255
    cut = attribute.parts(picture_task(), pixels)
    heat, target = attribute.occlusion(Linear(weight), picture_task(labels=("no", "yes")), cut)
    assert target == 1
    assert heat.answer.startswith("yes")
    hottest = np.unravel_index(heat.heat.argmax(), heat.heat.shape)
    assert hottest in {(2, 10), (2, 11), (3, 10), (3, 11)}
    cold = heat.heat.copy()
    cold[1:5, 9:13] = 0
    assert np.abs(cold).max() == pytest.approx(0, abs=1e-9)


def test_the_second_model_explains_the_answer_of_the_first():
    weight, pixels = np.ones((3, 28, 28)), np.full((28, 28, 3), 99, np.uint8)
    cut = attribute.parts(picture_task(), pixels)
    heat, target = attribute.occlusion(Linear(-weight), picture_task(labels=("no", "yes")), cut, 1)
    assert target == 1
    assert "explained: yes" in heat.answer
    with pytest.raises(BadInput, match="class 7 is explained, but this model has 2"):
        attribute.occlusion(Linear(weight), picture_task(), cut, 7)


def test_words_are_hidden_one_by_one(tiny_bert):
    task = Task("text-classification", tiny_bert)
    cut = attribute.parts(task, "a good  boat")
    assert cut.shown == ["a", "good", "boat"]
    assert [text for text, _ in cut.hidden()] == ["good boat", "a boat", "a good"]
    pair = attribute.parts(task, ("one two", "three"))
    assert [text for text, _ in pair.hidden()] == [("two", "three"), ("one", "three"), ("one two", "")]
    with pytest.raises(BadInput, match="at least one word"):
        attribute.parts(task, "  ")


def test_words_of_a_real_encoder(tiny_bert):
    from wherry.checkpoint import Checkpoint
    from wherry.runtimes import torch as runtime

    checkpoint = Checkpoint.open(tiny_bert)
    session, task = runtime.over(checkpoint), checkpoint.task
    sentences = "a small boat"
    cut = attribute.parts(task, sentences)
    heat, target = attribute.occlusion(session, task, cut)
    assert target is None
    rows = [task.answer(session.predict(i := task.batch([t])), i)[0] for t in (sentences, "small boat")]
    near = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert heat.heat[0] == pytest.approx(1 - near, abs=1e-5)
    assert heat.score == pytest.approx(1, abs=1e-5)


def test_a_sound_is_hot_at_its_time_and_pitch():
    """A model that hears 1 kHz in the second half second."""
    rate, task = 8000, Task("audio-classification", ".", inputs=("x",), processor={"sampling_rate": 8000})
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 1000 * time) * (time > 0.5)
    cut = attribute.parts(task, (tone.astype(np.float32), rate))
    heat, _ = attribute.occlusion(Linear(0.01 * tone), task, cut)
    band = heat.heat.sum(1).argmax()
    assert band == 2  # 1 to 1.5 kHz of 4 kHz in 8 bands, shared with its neighbour
    assert heat.heat[:, 14:].sum() > 20 * abs(heat.heat[:, :10].sum())


def test_what_has_no_parts_is_refused():
    with pytest.raises(Unsupported, match="arrays have no parts"):
        attribute.parts(Task("feature-extraction", "."), {"x": np.ones(3)})
    with pytest.raises(Unsupported, match="no single score for translation"):
        attribute.occlusion(Words(), Task("translation", "."), attribute._words("a b"))
    with pytest.raises(BadInput, match="too few"):
        attribute.parts(Task("audio-classification", ".", processor={"sampling_rate": 8000}), np.ones(100))


def test_integrated_gradients_add_up():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x = np.random.default_rng(0).standard_normal((1, 6)).astype(np.float32)
    found = attribute.integrated_gradients(module, x, 2, steps=200)
    with torch.no_grad():
        gap = module(torch.from_numpy(x))[0, 2] - module(torch.zeros(1, 6))[0, 2]
    assert found.sum() == pytest.approx(float(gap), abs=1e-3)
    linear = torch.nn.Linear(6, 3)
    found = attribute.integrated_gradients(linear, x, 1)
    assert found[0] == pytest.approx(x[0] * linear.weight[1].detach().numpy(), abs=1e-5)
