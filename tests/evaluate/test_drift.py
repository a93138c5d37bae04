import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.conftest import write_llama
from tests.evaluate.sessions import Fixed, Seeded, as_score
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Corrupt, Unsupported
from wherry.evaluate import drift
from wherry.runtimes import torch as runtime

P, Q = [0.5, 0.25, 0.15, 0.1], [0.4, 0.4, 0.1, 0.1]
WINDOWS = [[0, 1, 2, 3, 0], [1, 1, 0, 2, 0], [3, 0, 0, 0, 1]]


def test_kl_of_known_distributions():
    report = drift.compare(Fixed(P), Fixed(Q), WINDOWS, where="q")
    kl = report.get("kl", "q")
    assert kl.value == pytest.approx(stats.entropy(P, Q))
    assert (kl.low, kl.high) == pytest.approx((kl.value, kl.value))
    assert kl.unit == "nats/token"
    assert "exact" in kl.note
    assert report.get("perplexity", "original").value == pytest.approx(
        np.exp(-np.mean([np.log(P)[t] for w in WINDOWS for t in w[1:]]))
    )
    change = [np.log(P)[t] - np.log(Q)[t] for w in WINDOWS for t in w[1:]]
    assert report.get("perplexity ratio", "q").value == pytest.approx(np.exp(np.mean(change)))
    assert report.get("top-1 agreement", "q").value == 100


def test_a_model_against_itself_has_not_moved():
    report = drift.compare(Seeded(100, 0, 1), Seeded(100, 0, 1), WINDOWS)
    assert report.get("kl", "artifact").value == 0
    assert report.get("perplexity ratio", "artifact").value == 1
    assert report.get("top-1 agreement", "artifact").high == 100
    assert report.get("top-1 agreement", "artifact").low < 100  # twelve tokens do not prove every token


def test_the_bucket_is_what_the_bound_says():
    """Top-1 of P and of Q, both grade B: the scored tokens are known, the rest is one bucket."""
    windows = [[0, 1, 1], [1, 1, 1]]  # always scores token 1
    report = drift.compare(Fixed(P, "B"), Fixed(Q, "B"), windows, top_k=1)
    kl = report.get("kl", "artifact")
    # P knows tokens 0 and 1; Q's top-1 is token 0 (a tie with 1, the lower id first): known to both are 0 and 1
    assert kl.value == pytest.approx(stats.entropy([0.5, 0.25, 0.25], [0.4, 0.4, 0.2]))
    assert "lower bound" in kl.note
    assert "25.00%" in kl.note


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from(["AB", "BA", "BB"]))
def test_the_bound_is_never_above_the_exact_kl(seed, k, grades):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 7, 30)) * 3
    tokens = rng.integers(0, 30, 8)
    exact, rest = drift.kl_per_token(as_score(a, tokens, 30), as_score(b, tokens, 30), tokens[1:])
    assert not rest.any()
    one, two = as_score(a, tokens, k, grades[0] == "A"), as_score(b, tokens, k, grades[1] == "A")
    bound, _ = drift.kl_per_token(one, two, tokens[1:])
    assert (bound <= exact + 2e-6).all()
    assert (bound >= 0).all()
    if k == 30:
        assert bound == pytest.approx(exact, abs=3e-6)


def test_it_is_torchs_kl_on_a_real_model(tiny_llama, tmp_path):
    other = write_llama(tmp_path / "other", seed=1)
    windows = np.random.default_rng(0).integers(0, 512, (3, 40))
    a, b = runtime.over(Checkpoint.open(tiny_llama)), runtime.over(Checkpoint.open(other))
    report = drift.compare(a, b, windows, where="other")
    kl, same = [], []
    for window in windows:
        x, y = (torch.from_numpy(s.score(list(window)).logits) for s in (a, b))
        terms = torch.nn.functional.kl_div(
            y.double().log_softmax(-1), x.double().log_softmax(-1), log_target=True, reduction="none"
        )
        kl.append(terms.sum(-1))
        same.append(x.argmax(-1) == y.argmax(-1))
    assert report.get("kl", "other").value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)
    assert report.get("top-1 agreement", "other").value == pytest.approx(100 * float(torch.cat(same).float().mean()))
    bound = drift.compare(drift.record(a, windows, 32), b, windows, where="other").get("kl", "other")
    assert 0 < bound.value < report.get("kl", "other").value


def test_paired_intervals_are_narrower_than_those_of_each():
    windows = np.random.default_rng(3).integers(0, 200, (12, 30))
    report = drift.compare(Seeded(200, 0, 1), Seeded(200, 0.1, 2), windows)
    own, ratio = report.get("perplexity", "artifact"), report.get("perplexity ratio", "artifact")
    assert (ratio.high - ratio.low) / ratio.value < (own.high - own.low) / own.value / 3


def test_the_reference_scores_each_window_once():
    class Counted(Seeded):
        calls = 0

        def score(self, tokens, top_k=32):
            self.calls += 1
            return super().score(tokens, top_k)

    reference = Counted(50, 0, 1)
    report = drift.compare_all(reference, {"a": Seeded(50, 0.1, 2), "b": Seeded(50, 1, 3, "B")}, WINDOWS)
    assert reference.calls == len(WINDOWS)
    assert report.get("kl", "a").value < report.get("kl", "b").value
    assert [row.where for row in report.select("perplexity")] == ["original", "a", "b"]


def test_memory_does_not_grow_with_the_number_of_windows():
    def peak(count: int) -> int:
        windows = np.arange(count * 64).reshape(count, 64) % 50
        tracemalloc.start()
        drift.compare(Seeded(5000, 0, 1), Seeded(5000, 0.1, 2), windows)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(8) < 1.1 * peak(2)


def test_record_survives_the_disk(tmp_path):
    windows = np.random.default_rng(0).integers(0, 90, (3, 12))
    reference, other = Seeded(90, 0, 1), Seeded(90, 0.3, 2)
    kept = drift.record(reference, windows, top_k=16)
    kept.save(tmp_path / "reference.npz")
    again = drift.Record.load(tmp_path / "reference.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    assert drift.compare(again, other, windows).to_json() == drift.compare(kept, other, windows).to_json()
    with pytest.raises(BadInput, match="not in the recorded"):
        again.score([1, 2, 3])
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(Corrupt, match="not a record"):
        drift.Record.load(tmp_path / "junk.npz")


@pytest.mark.parametrize("grade", ["A", "B"])
def test_nan_becomes_a_row_without_a_value(grade):
    class Broken(Seeded):
        def score(self, tokens, top_k=32):
            score = super().score(tokens, top_k)
            score.logprob[0] = np.nan
            if score.logits is not None:
                score.logits[0] = np.nan
            return score

    report = drift.compare(Seeded(50, 0, 1), Broken(50, 0, 1, grade), WINDOWS)
    for what in ("perplexity", "perplexity ratio", "kl"):
        assert report.get(what, "artifact").value is None
    assert "3 of 12 tokens" in report.get("kl", "artifact").note
    report.to_json()


def test_no_probability_for_what_the_original_expects_is_infinite():
    report = drift.compare(Fixed(P), Fixed([0.5, 0.5, 0, 0]), [[0, 1, 0], [0, 0, 1]])
    assert report.get("kl", "artifact").value is None
    assert drift.compare(Fixed([0.5, 0.5, 0, 0]), Fixed(P), [[0, 1, 0], [0, 0, 1]]).get("kl").value == pytest.approx(
        stats.entropy([0.5, 0.5, 0, 0], P)
    )


def test_grade_c_is_said_and_refused_as_a_reference():
    report = drift.compare(Fixed(P), Fixed(Q, "C"), WINDOWS)
    assert report.get("kl", "artifact").value is None
    assert "generation only" in report.get("kl", "artifact").note
    with pytest.raises(Unsupported, match="grade C"):
        drift.compare(Fixed(P, "C"), Fixed(Q), WINDOWS)


def test_other_vocabularies_are_refused():
    with pytest.raises(BadInput, match="not the same tokenizer"):
        drift.compare(Fixed(P), Fixed([0.2] * 5), WINDOWS)
