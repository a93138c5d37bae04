"""The decoder of bench/decoder: the n-gram adds up to one, training repeats bit for bit, the card is true."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench.decoder import card, start, text, train  # noqa: E402
from bench.decoder.kneser_ney import KneserNey  # noqa: E402
from wherry.errors import BadInput, Corrupt, Diverged, Missing  # noqa: E402
from wherry.train import loop  # noqa: E402
from wherry.train.job import Job  # noqa: E402

HERE = Path(start.__file__).parent
TINY = start.Plan(
    hidden=64,
    ffn=64,
    layers=1,
    heads=2,
    kv_heads=1,
    vocab=300,
    context=16,
    bible_rows=2,
    dictionary_rows=1,
    steps=6,
    warmup=2,
)


PARTS = {
    name: [f"{name} {i}\n" + " ".join(str(i * k % 97) for k in range(60)) for i in range(12)]
    for name in (*start.BOOKS, *start.WATCHED)
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run of the tiny plan on numbers in place of words, prepared."""
    start.prepare(tmp_path / "run", TINY, PARTS)
    return start.job(tmp_path / "run", TINY, threads=1, compiled=False)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_sums_to_one(order: int) -> None:
    rng = np.random.default_rng(order)
    vocab = 7
    tokens = np.minimum(rng.geometric(0.35, 500) - 1, vocab - 1)
    model = KneserNey(tokens, order, vocab)
    for context in (tokens[100:104], tokens[7:11], np.asarray([6, 6, 6, 6]), np.asarray([6, 0, 6, 3])):
        total = sum(model.probabilities(np.append(context, w))[-1] for w in range(vocab))
        assert total == pytest.approx(1, abs=1e-12)


def test_kneser_ney_by_hand() -> None:
    # "0 1 0 1 0 2": bigrams 01 x2, 10 x2, 02 x1; n1 = 1, n2 = 2, others floored to 1 -> Y = 1/5
    # discounts 1 - 2Y*2 = 1/5, 2 - 3Y/2 = 17/10. Left neighbours: 0 <- {1}, 1 <- {0}, 2 <- {0}: n1 = 3, n2
    # floored to 1, Y = 3/5, D1 = 1 - 2*(3/5)*(1/3) = 3/5, so p1(w) = 0.4/3 + (1.8/3)/4 for w in 0, 1, 2 and
    # vocab 4
    model = KneserNey(np.asarray([0, 1, 0, 1, 0, 2]), 2, 4)
    unigram = 0.4 / 3 + 0.6 / 4
    freed = (1.7 + 0.2) / 3
    assert model.probabilities(np.asarray([0, 1]))[1] == pytest.approx((2 - 1.7) / 3 + freed * unigram)
    assert model.probabilities(np.asarray([0, 2]))[1] == pytest.approx((1 - 0.2) / 3 + freed * unigram)
    assert model.probabilities(np.asarray([3, 3]))[1] == pytest.approx(0.15)  # context unseen, token unseen


def test_training_repeats_and_resumes_bit_for_bit(job: Job) -> None:
    threads = torch.get_num_threads()
    try:
        assert train.check_repro(job, 6)["equal"]
    finally:
        torch.set_num_threads(threads)


def test_the_order_is_a_function_of_the_seed() -> None:
    """Against the definition, row by row: a new permutation of windows from a new place in each epoch."""
    rng = np.random.default_rng(0)
    streams = {"bible": rng.integers(0, 300, 400), "dictionary": rng.integers(0, 300, 200)}
    plan = replace(TINY, steps=20)
    found = start.order(plan, streams)
    assert found.shape == (20, 3)
    for name, first, count, before in (("bible", 0, 2, 0), ("dictionary", 2, 1, 400 - 16)):
        windows = (len(streams[name]) - 1) // 16 - 1
        for row in range(20 * count):
            chance = np.random.default_rng([plan.seed, len(name), row // windows])
            begin = chance.integers(16) + chance.permutation(windows)[row % windows] * 16
            assert found[row // count, first + row % count] == before + begin
            assert begin + 17 <= len(streams[name])
    assert not np.array_equal(found, start.order(replace(plan, seed=1), streams))


def test_divergence_is_named(job: Job) -> None:
    with pytest.raises(Diverged, match=r"not finite at updates.*\nLower --learning-rate"):
        loop.run(replace(job, outer_rate=1e38))


def test_a_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    start.prepare(tmp_path, TINY, PARTS)
    start.prepare(tmp_path, TINY, PARTS)
    with pytest.raises(BadInput, match="other settings"):
        start.prepare(tmp_path, replace(TINY, seed=1), PARTS)


def test_the_command_is_the_job(job: Job) -> None:
    """What the card prints, read by wherry's own command line, gives the run that made the weights."""
    import shlex

    import typer

    from wherry import training

    words = shlex.split(" ".join(start.command(job)))[2:]
    command = typer.main.get_command(training.app).commands["train"]  # type: ignore[attr-defined]
    given = command.make_context("train", words).params
    fields = {k: v for k, v in given.items() if k not in training.BESIDE}
    seen = training.made(fields | {"model": str(fields["model"]), "out": str(given["out"])}, list(given["more"]))
    assert seen == job


def test_the_card_is_told_from_the_files_of_the_run(job: Job) -> None:
    done = loop.run(job)
    told = train.told(job)
    assert told["train"] == done["losses"]
    assert told["search"] == [[6, *(round(one["bits_per_byte"], 4) for one in done["judged"])]]
    assert (told["seconds"], told["cpu_seconds"]) == (done["seconds"], done["cpu_seconds"])
    model = start.LlamaForCausalLM.from_pretrained(job.out)
    tokens = np.load(Path(job.out).parent / "search_book.npy")
    bits = card.surprisal(model, tokens, TINY.context).sum()
    size = sum(len(d.encode()) for d in start.glimpse(PARTS["search_book"]))
    assert done["judged"][0]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)


def test_surprisal_covers_every_token_once() -> None:
    model = start.build(TINY).eval()
    tokens = np.random.default_rng(0).integers(0, 300, 45)
    bits = card.surprisal(model, tokens, context=16, rows=2)
    assert bits.shape == (44,)
    assert (bits > 0).all()
    whole = model(torch.from_numpy(tokens[None, :17])).logits[0].log_softmax(-1)  # the first window alone
    expected = -whole[torch.arange(16), torch.from_numpy(tokens[1:17])].detach().numpy() / np.log(2)
    np.testing.assert_allclose(bits[:16], expected, rtol=1e-4)


def test_wrong_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bible.data").write_bytes(b"something else")
    with pytest.raises(Corrupt, match=r"pinned.*\nDelete it"):
        text.fetch(text.KJV, tmp_path / "cache", tmp_path)
    with pytest.raises(Missing, match=r"absent.*\nExtract"):
        text.fetch(text.GCIDE, tmp_path / "cache", tmp_path)


def test_an_entry_is_cleaned() -> None:
    block = (
        'Bathometer \\Ba*thom"e*ter\\ (b[.a]*th[o^]m"[-e]*t[~e]r), n.\n'
        "   [Gr. baqo`s depth + -meter. See {Bar[ae]}.]\n"
        "   An instrument for measuring depths, see\n   {Sounding}.\n   [1913 Webster]\n\n"
        "   Syn: something later.\n        [WordNet 1.5]"
    )
    assert text.entry(block) == "Bathometer, n. An instrument for measuring depths, see Sounding."
    assert text.entry(block.replace("1913 Webster", "PJC")) == ""


def test_rounding_hurts_in_order() -> None:
    model = start.build(TINY)
    w = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    after = [card.rounded(model, b).model.layers[0].mlp.up_proj.weight for b in (8, 4, 3, 2)]
    errors = [(v - w).pow(2).mean().item() for v in after]
    assert errors == sorted(errors)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, w)


@pytest.mark.skipif(not (HERE / "card.json").exists(), reason="the card is not made yet")
def test_the_kept_card_holds() -> None:
    kept = json.loads((HERE / "card.json").read_text())
    weights = HERE / "model" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == kept["model"]["sha256"]
    assert weights.stat().st_size <= 17e6
    assert 4e6 <= kept["model"]["parameters"] <= 8e6
    assert kept["decoder_minus_best_ngram"]["held_out_book"]["high"] < 0
    damage = [kept["rounding_damage"][w]["held_out_book"]["low"] for w in ("W8", "W4", "W3", "W2")]
    assert damage == sorted(damage)
    assert damage[1] > 0
    assert (HERE / "README.md").read_text() == card.readme(kept)
    documents = (HERE / "heldout" / "held_out_book.txt").read_text()[:-1]
    assert hashlib.sha256(documents.encode()).hexdigest() == kept["data"]["held_out_book"]["sha256"]
