import numpy as np
import pytest

from wherry.errors import BadInput
from wherry.evaluate import perturb
from wherry.evaluate.stability import stability
from wherry.report import Report
from wherry.task import Task


def run(seed: int) -> Report:
    report = Report()
    report.add("accuracy", "int8", [0.5, 0.7, 0.6, 0.6, 0.6][seed], "", 0.4, 0.8)
    report.add("bytes", "int8", 100, "B")
    report.add("check: fine", "int8", True)
    if seed:
        report.add("sometimes", "int8", 1.0, "", 0.0, 2.0)
    return report


def test_mean_and_range_over_seeds():
    report = stability(run, range(5))
    row = report.get("accuracy over seeds", "int8")
    assert row.value == pytest.approx(0.6)
    assert (row.low, row.high) == (0.5, 0.7)
    assert f"{np.std([0.5, 0.7, 0.6, 0.6, 0.6], ddof=1):.3g}" in row.note
    assert report.get("accuracy: seed 1").value == 0.7
    assert [row.what for row in report if "over seeds" in row.what] == ["accuracy over seeds"]
    assert stability(run, range(5), ["bytes"]).get("bytes over seeds").value == 100


@pytest.mark.parametrize("seeds", [[], range(4), [1, 2, 3, 4, 4]])
def test_fewer_than_five_seeds_say_nothing(seeds):
    with pytest.raises(BadInput, match="five or more"):
        stability(run, seeds)


def every(kind: str, **processor) -> list[perturb.Perturbation]:
    return perturb.of(Task(kind, ".", inputs=("x",), processor=processor))


def test_perturbations_are_seeded_and_get_stronger():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    wave = (0.2 * np.sin(np.arange(8000) / 5)).astype(np.float32)
    for changes, example, distance in (
        (every("image-classification"), picture, lambda x: np.abs(decoded(x) - picture).mean()),
        (every("audio-classification", sampling_rate=8000), (wave, 8000), lambda x: np.abs(x[0] - wave).mean()),
        (every("feature-extraction"), {"x": wave}, lambda x: np.abs(x["x"] - wave).mean()),
    ):
        by_name: dict[str, list[float]] = {}
        for change in changes:
            one, again = change.all([example, example], 3), change.all([example, example], 3)
            assert distance(one[0]) == distance(again[0])
            by_name.setdefault(change.name, []).append(distance(one[0]))
        for name, found in by_name.items():
            assert 0 < found[0] <= found[-1], name
            assert found == sorted(found), name


def decoded(example) -> np.ndarray:
    from wherry import image

    return np.asarray(image.load(example), np.float64)


def test_noise_has_the_said_power():
    noisy = {c.strength: c for c in every("audio-classification", sampling_rate=8000) if c.name == "noise"}
    wave = np.sin(np.arange(80000) / 3).astype(np.float32)
    heard, rate = noisy["10 dB"].all([(wave, 8000)])[0]
    assert rate == 8000
    assert 10 * np.log10((wave**2).mean() / ((heard - wave) ** 2).mean()) == pytest.approx(10, abs=0.1)
    silent, _ = noisy["0 dB"].all([(np.zeros(100, np.float32), 8000)])[0]
    assert not silent.any()


def test_mp3_stays_in_time():
    changes = {str(c): c for c in every("audio-classification", sampling_rate=8000)}
    wave = np.convolve(np.random.default_rng(0).standard_normal(8000), np.ones(9) / 9, "same").astype(np.float32)
    heard, _ = changes["mp3 32 kbit/s"].all([(wave, 8000)])[0]
    assert len(heard) == len(wave)
    assert np.corrcoef(heard, wave)[0, 1] > 0.9


def test_texts_keep_their_words():
    changes = {str(c): c for c in every("text-classification")}
    text = "A wherry is a light boat that carries cargo up the shallow rivers of the county"
    typed = changes["typos 10% of letters"].all([text] * 40)
    assert len({*typed}) > 30
    assert all(len(each.split()) == len(text.split()) or "" in each.split(" ") for each in typed)
    shares = [sum(a != b for a, b in zip(text, each, strict=False)) for each in typed]
    assert np.mean(shares) > 3
    assert changes["shorter 50% of words"].all([text])[0] == " ".join(text.split()[:8])
    assert changes["longer 2 times"].all([(text, "b")])[0] == (f"{text} {text}", "b b")
    assert perturb.typos("a", 1.0, np.random.default_rng(0))
    assert perturb.typos("", 1.0, np.random.default_rng(0)) == ""
    words = {str(c): c for c in every("token-classification")}
    assert set(words) == {"typos 2% of letters", "typos 5% of letters", "typos 10% of letters"}
    assert len(words["typos 10% of letters"].all([text.split()])[0]) == len(text.split())
