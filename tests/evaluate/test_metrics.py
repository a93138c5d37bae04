"""Every metric against its library or a closed form, and its interval against simulation."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from wherry.errors import BadInput
from wherry.evaluate import (
    classification,
    detection,
    features,
    field,
    interval,
    metric,
    speech,
    tagging,
    translation,
    voice,
)
from wherry.task import Task

RNG = np.random.default_rng(0)


def task(kind: str, folder=".", **more) -> Task:
    return Task(kind, folder, **more)


def by_name(found) -> dict[str, metric.Metric]:
    return {each.name: each for each in found}


def one_hot(answers, classes: int) -> list[np.ndarray]:
    return list(np.eye(classes, dtype=np.float32)[answers])


# ---- classification -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "used"), [(2, 2), (7, 7), (1000, 30)])
def test_classification_is_scikit_learns(classes, used):
    labels = RNG.integers(0, used, 200)
    scores = RNG.standard_normal((200, classes)).astype(np.float32)
    scores[np.arange(200), labels] += 2
    found = by_name(classification.metrics(list(scores), labels, task("image-classification")))
    answers = scores.argmax(1)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(labels, answers))
    three = sk.precision_recall_fscore_support(labels, answers, average="macro", zero_division=0)
    for name, expected in zip(("macro precision", "macro recall", "macro f1"), three, strict=False):
        assert found[name].value == pytest.approx(expected)
    if classes > 5:
        expected = sk.top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
        assert found["top-5 accuracy"].value == pytest.approx(expected)
    weights = RNG.integers(0, 4, 200)
    kept = np.repeat(np.arange(200), weights)
    drawn = sk.f1_score(labels[kept], answers[kept], average="macro", zero_division=0)
    assert found["macro f1"].of(weights[None].astype(float))[0] == pytest.approx(drawn)


def test_details_hold_every_class_and_the_confusions():
    labels, answers = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0]
    kind = task("image-classification", labels=("cat", "dog", "ship"))
    report = classification.details(one_hot(answers, 3), labels, kind, "m")
    assert json.loads(report.get("confusion matrix").value) == [[1, 2, 0], [0, 2, 0], [1, 0, 0]]
    assert report.get("precision: dog").value == pytest.approx(0.5)
    assert report.get("recall: cat").value == pytest.approx(1 / 3)
    assert report.get("f1: ship").value == 0
    assert [(row.value, row.note) for row in report.select("mistakes")] == [
        (2, "cat taken for dog"), (1, "ship taken for cat")
    ]  # fmt: skip
    many = classification.details(one_hot([0], 60), [0], task("image-classification"), "m")
    assert many.rows[-1].value is None
    assert "60 classes" in many.rows[-1].note


def test_scores_that_are_not_finite_are_wrong_and_said():
    scores = [np.array([0, 1.0]), np.array([np.nan, 0])]
    found = by_name(classification.metrics(scores, [1, 0], task("text-classification")))
    assert found["accuracy"].value == 0.5
    assert "1 examples have scores that are not finite" in found["accuracy"].note
    with pytest.raises(BadInput, match="class 2, the model gives scores for 2"):
        classification.metrics(scores, [1, 2], task("text-classification"))


# ---- intervals ------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_covers_as_students_t():
    values = RNG.standard_normal(400)
    found = interval.weighted(metric.mean("x", values).of, 400)
    half = 1.966 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_paired_shares_cover_in_simulation():
    """True difference -0.05 of two models that mostly err together: nominal 95% within simulation error."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        reference = rng.random(120) < 0.8
        hits = np.where(rng.random(120) < 0.9, reference, rng.random(120) < 0.3)
        found = interval.paired_share(hits, reference)
        inside += found.low <= 0.1 * (0.3 - 0.8) <= found.high
    assert 0.93 < inside / 400 <= 1


def test_no_disagreement_keeps_a_width():
    hits = np.ones(50, bool)
    found = interval.paired_share(hits, hits)
    assert found.value == 0
    assert found.low < 0 < found.high
    assert found.high - found.low < 0.15


def test_paired_differences_are_tighter_than_two_intervals():
    a = RNG.standard_normal(300)
    b = a + 0.1 + 0.01 * RNG.standard_normal(300)
    first, second = metric.mean("x", a), metric.mean("x", b)
    report = metric.differences([second], [first], "b", "a")
    row = report.get("x difference")
    assert row.low < 0.1 < row.high
    assert row.high - row.low < 0.01
    with pytest.raises(BadInput, match="not the same data"):
        metric.differences([metric.mean("x", b[:5])], [first], "b", "a")


def test_a_metric_without_a_value_is_said():
    row = metric.rows([metric.ratio("x", np.zeros(4), np.zeros(4))], "m").rows[0]
    assert row.value is None
    assert "nothing to divide by" in row.note
    assert metric.rows([metric.mean("x", [1.0])], "m").rows[0].low is None


# ---- text -----------------------------------------------------------------------------------------------------

SAID = ["the cat sat on a mat", "there is a dog in the house", "zero", "it rains very much today"]
WANTED = ["the cat sat on the mat", "there is a dog in this house", "zero", "today it rains very much"]


def test_translation_is_sacrebleus_and_rouges():
    import sacrebleu

    found = by_name(translation.metrics(SAID, WANTED, task("translation")))
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(SAID, [WANTED]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(SAID, [WANTED]).score)
    score = translation.rouge_scorer(["rougeL"]).score
    rouge = [score(t, s)["rougeL"].fmeasure for s, t in zip(SAID, WANTED, strict=True)]
    assert found["rouge-l"].value == pytest.approx(np.mean(rouge))
    assert found["exact match"].value == 0.25
    drawn = found["bleu"].of(np.array([[0, 2.0, 1, 0]]))[0]
    again = [1, 1, 2]
    expected = sacrebleu.corpus_bleu([SAID[i] for i in again], [[WANTED[i] for i in again]]).score
    assert drawn == pytest.approx(expected)


def test_token_f1_is_squads():
    assert translation.token_f1("The cat, the cat!", "a cat") == pytest.approx(2 * 1 / (4 + 2))
    assert translation.token_f1("", "") == 1
    assert translation.token_f1("", "a") == 0


def test_word_error_rate_is_the_sum_of_edits():
    found = by_name(speech.metrics(["one too three", "FOUR."], ["one two three four", "4"], task("translation")))
    assert found["word error rate"].value == pytest.approx(2 / 5)
    assert found["right utterances"].value == 0.5
    perfect = by_name(speech.metrics(["a"], ["a"], task("translation")))
    assert perfect["word error rate"].value == perfect["character error rate"].value == 0
    silent = by_name(speech.metrics([""], ["a b"], task("translation")))
    assert silent["word error rate"].value == 1
    with pytest.raises(BadInput, match="holds no word"):
        speech.metrics(["a"], ["..."], task("translation"))


def test_words_are_compared_plainly():
    assert speech.plain(" It's  Zero, 7! (ok)") == "it's zero seven ok"
    assert speech.plain("Ça va — «oui»") == "ça va oui"


def test_tags_are_seqevals():
    from seqeval.metrics import f1_score

    labels = ("O", "B-PER", "I-PER", "B-LOC")
    wanted = [[1, 2, 0, 3], [0, 0, 3], [1, 0, 0]]
    said = [[1, 2, 0, 3], [0, 3, 3], [1, 2, 0]]
    found = by_name(tagging.metrics(said, wanted, task("token-classification", labels=labels)))
    names = [[[labels[i] for i in row] for row in rows] for rows in (wanted, said)]
    assert found["entity f1"].value == pytest.approx(f1_score(*names))
    flat = [np.concatenate(rows) for rows in (wanted, said)]
    assert found["token f1"].value == pytest.approx(sk.f1_score(*flat, labels=[1, 2, 3], average="micro"))
    with pytest.raises(BadInput, match="3 words, but 4 labels"):
        tagging.metrics([[0, 0, 0]], [[0] * 4], task("token-classification", labels=labels))


# ---- detection and voice --------------------------------------------------------------------------------------


def scene(count: int, seed: int):
    rng = np.random.default_rng(seed)
    said, wanted = [], []
    for _ in range(count):
        corner = rng.uniform(0, 80, (int(rng.integers(0, 5)), 2))
        true = np.concatenate([corner, corner + rng.uniform(5, 40, corner.shape)], 1)
        labels = rng.integers(0, 3, len(true))
        kept = rng.random(len(true)) < 0.8
        false = rng.uniform(0, 20, (2, 4)) + [0, 0, 30, 30]
        boxes = np.concatenate([true[kept] + rng.normal(0, 2, (int(kept.sum()), 4)), false])
        said.append({"boxes": boxes, "scores": rng.random(len(boxes)), "labels": np.append(labels[kept], [0, 1])})
        wanted.append({"boxes": true, "labels": labels})
    return said, wanted


def test_mean_average_precision_is_pycocotools():
    import contextlib
    import io

    said, wanted = scene(40, 3)
    found = by_name(detection.metrics(said, wanted, task("object-detection")))
    coco = detection.Matches(said, wanted).coco
    with contextlib.redirect_stdout(io.StringIO()):
        coco.accumulate()
    precision = coco.eval["precision"][:, :, :, 0, 0]  # [thresholds, recalls, classes]
    assert found["map"].value == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
    assert found["map at 0.5"].value == pytest.approx(precision[0][precision[0] > -1].mean(), abs=1e-9)
    assert 0.05 < found["map"].value < 0.9


def test_average_precision_in_closed_form():
    """Two true boxes; best box right, second wrong, third right: precision 1 up to recall 0.5, then 2/3."""
    true = {"boxes": np.array([[0, 0, 10, 10], [50, 50, 60, 60.0]]), "labels": np.zeros(2, int)}
    said = {"boxes": np.array([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 60.0]]),
            "scores": np.array([0.9, 0.8, 0.7]), "labels": np.zeros(3, int)}  # fmt: skip
    found = by_name(detection.metrics([said], [true], task("object-detection")))
    assert found["map"].value == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found["box precision"].value == pytest.approx(2 / 3)
    assert found["box recall"].value == 1
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    assert by_name(detection.metrics([nothing], [true], task("object-detection")))["map"].value == 0
    assert np.isnan(by_name(detection.metrics([said], [nothing], task("object-detection")))["map"].value)


def test_weights_of_detection_are_repeated_pictures():
    said, wanted = scene(12, 5)
    weights = np.array([[2, 0, 1, 1, 0, 3, 1, 0, 1, 2, 0, 1.0]])
    kept = np.repeat(np.arange(12), weights[0].astype(int))
    drawn = by_name(detection.metrics(said, wanted, task("object-detection")))["map at 0.5"].of(weights)[0]
    again = by_name(
        detection.metrics([said[i] for i in kept], [wanted[i] for i in kept], task("object-detection"))
    )["map at 0.5"].value
    assert drawn == pytest.approx(again, abs=0.02)  # equal scores are broken differently


def test_voice_frames():
    frames = np.stack([[0.9, 0.8, 0.2, 0.1, 0.7], np.arange(5) + 0.5], 1)
    wanted = [np.array([[0.0, 3.0]])]
    found = by_name(voice.metrics([frames], wanted, task("voice-activity-detection")))
    assert found["frame precision"].value == found["frame recall"].value == pytest.approx(2 / 3)
    assert found["frame accuracy"].value == pytest.approx(3 / 5)


def test_features_against_the_original():
    base = [np.array([3.0, 4.0]), np.array([1.0, 0])]
    found = by_name(features.metrics([np.array([3.0, 4.5]), np.array([0, 1.0])], base, task("feature-extraction")))
    assert found["relative difference"].value == pytest.approx((0.1 + np.sqrt(2)) / 2)
    with pytest.raises(BadInput, match="different shapes"):
        features.metrics([np.ones(3)], [np.ones(2)], task("feature-extraction"))


def test_every_kind_has_a_family_whose_first_metric_is_the_tasks():
    from wherry.task import KINDS

    assert set(field.FAMILIES) == set(KINDS) - {"text-generation"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in field.FAMILIES:
            module = field.family(task(kind))
            assert callable(module.say)
            assert callable(module.metrics)
