"""The ONNX Runtime session against transformers: scores, generation, the cache in place, threads, damaged files."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wherry import deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Corrupt
from wherry.recipe import Recipe
from wherry.session import Sampling, Session

RUNTIME = shelf.find("runtimes", "onnxruntime")


def quiet(done: int, total: int, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Artifact]:
    """A compressed Llama as a torch module with decoded weights, and its ONNX export."""
    folder = tmp_path_factory.mktemp("pair")
    plan = Recipe.parse("rtn:scheme=W4A16_ASYM,group_size=32").plan(Checkpoint.open(tiny_llama), ("onnx",))
    deliver.deliver(plan, folder / "checkpoint", (), [], {}, lambda result: None, quiet)
    checkpoint = Checkpoint.open(folder / "checkpoint")
    (folder / "onnx").mkdir()
    return checkpoint.module(), shelf.find("formats", "onnx").save(checkpoint, folder / "onnx", quiet)


@pytest.fixture
def session(pair: tuple[torch.nn.Module, Artifact]) -> Session:
    return RUNTIME.load(pair[1], threads=1)


TOKENS = [int(t) for t in np.random.default_rng(0).integers(4, 512, 200)]


def logits_of(module: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("chunk", [7, 64, 500])
def test_score_is_torchs(
    pair: tuple[torch.nn.Module, Artifact], session: Session, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUNTIME, "CHUNK", chunk)
    want = torch.log_softmax(torch.from_numpy(logits_of(pair[0], TOKENS)[:-1]).double(), -1).numpy()
    score = session.score(TOKENS, top_k=5)
    assert session.grade == "A"
    assert score.logits.shape == want.shape
    np.testing.assert_allclose(score.logprob, want[np.arange(199), TOKENS[1:]], atol=1e-3)
    np.testing.assert_allclose(score.top_logprob, -np.sort(-want, -1)[:, :5], atol=1e-3)
    given = np.take_along_axis(want, score.top_ids, -1)
    np.testing.assert_allclose(score.top_logprob, given, atol=1e-3)
    assert (np.diff(score.top_logprob, axis=-1) <= 0).all()
    assert session.score(TOKENS[:2], top_k=10_000).top_ids.shape == (1, 512)


def test_greedy_is_transformers_generate(pair: tuple[torch.nn.Module, Artifact], session: Session) -> None:
    prompt = TOKENS[:150]  # longer than a chunk: the prompt goes in by two
    with torch.no_grad():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        want = pair[0].generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=3, eos_token_id=0
        )
    assert want.shape == (1, 190)
    assert list(session.generate(prompt, Sampling(max_tokens=40))) == want[0, 150:].tolist()


def test_steps_through_the_cache_are_one_pass(pair: tuple[torch.nn.Module, Artifact], session: Session) -> None:
    """The buffers are written in place: each step's logits are those of the whole text at that place."""
    want = logits_of(pair[0], TOKENS[:60])
    cache = session.cache(60)
    first = cache.step(np.array(TOKENS[:40]))
    np.testing.assert_allclose(first[-1], want[39], atol=1e-3)
    for i in range(40, 60):
        step = cache.step(np.array([TOKENS[i]]))
        assert step.shape == (1, 512)
        np.testing.assert_allclose(step[0], want[i], atol=1e-3)
    assert cache.seen == 60


def test_sampling(session: Session) -> None:
    def run(**options: float) -> list[int]:
        return list(session.generate(TOKENS[:20], Sampling(max_tokens=24, **options)))

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, top_k=1) == run()
    assert run(temperature=1.0, top_p=1e-9) == run()


def test_generation_ends(session: Session) -> None:
    answer = list(session.generate(TOKENS[:20], Sampling(max_tokens=24)))
    assert len(answer) == 24
    stop = next(token for i, token in enumerate(answer) if token not in answer[:i] and i > 0)
    cut = answer.index(stop)
    assert list(session.generate(TOKENS[:20], Sampling(max_tokens=24, stop=(stop,)))) == answer[:cut]
    limit = session.limit
    assert limit == 256
    assert len(list(session.generate((TOKENS + TOKENS)[: limit - 3], Sampling(max_tokens=24)))) == 3
    assert list(session.generate((TOKENS + TOKENS)[:limit], Sampling(max_tokens=24))) == []


def test_two_answers_at_once_do_not_mix(session: Session) -> None:
    alone = [list(session.generate(TOKENS[i : i + 20], Sampling(max_tokens=12))) for i in (0, 50)]
    runs = [session.generate(TOKENS[i : i + 20], Sampling(max_tokens=12)) for i in (0, 50)]
    mixed = [list(column) for column in zip(*zip(*runs, strict=True), strict=True)]
    assert mixed == alone


def test_bad_calls(pair: tuple[torch.nn.Module, Artifact], session: Session) -> None:
    for tokens, message in (
        ([], "no tokens"),
        ([5, 512], "the model knows 0 to 511"),
        ([-1, 5], "the model knows 0 to 511"),
        ([5] * 257, "257 tokens are more than the model's 256"),
    ):
        with pytest.raises(BadInput, match=message):
            list(session.generate(tokens, Sampling()))
        with pytest.raises(BadInput, match=message):
            session.score(tokens)
    with pytest.raises(BadInput, match="score two or more"):
        session.score([5])
    with pytest.raises(NotImplementedError):
        session.predict({})
    with pytest.raises(BadInput, match="--device cuda"):
        RUNTIME.load(pair[1], device="cuda")
    session.close()
    with pytest.raises(BadInput, match="closed"):
        session.score(TOKENS)


def test_facts(pair: tuple[torch.nn.Module, Artifact], session: Session) -> None:
    assert RUNTIME.accepts(pair[1])
    assert RUNTIME.available()["onnxruntime"] == session.facts["version"]
    assert session.facts["threads"] == "1"
    assert session.facts["activations"] == "float32"
    assert session.facts["isa"].startswith(("cpu flags", "unknown"))
    assert isinstance(session, Session)


def damaged(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.path, folder)
    return Artifact.open(folder)


def test_damaged_files(pair: tuple[torch.nn.Module, Artifact], tmp_path: Path) -> None:
    artifact = damaged(pair[1], tmp_path / "a")
    weights = artifact.path / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Corrupt, match=r"model\.onnx is damaged"):
        RUNTIME.load(artifact)
    artifact = damaged(pair[1], tmp_path / "b")
    artifact.main.write_bytes(b"this is no model")
    with pytest.raises(Corrupt, match=r"model\.onnx is damaged"):
        RUNTIME.load(artifact)
    artifact = damaged(pair[1], tmp_path / "c")
    weights = artifact.path / "model.onnx.data"
    weights.unlink()
    with pytest.raises(Corrupt, match=r"model\.onnx is damaged"):
        RUNTIME.load(artifact)
    artifact = damaged(pair[1], tmp_path / "d")
    (artifact.path / "genai_config.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"genai_config\.json does not give the head size"):
        RUNTIME.load(artifact)


def test_encoder(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_bert)
    artifact = shelf.find("formats", "onnx").save(checkpoint, tmp_path, quiet)
    session = RUNTIME.load(artifact, threads=1)
    task = artifact.task
    inputs = task.batch(["one", "A wherry carries cargo where big ships cannot go."])
    answer = task.answer(session.predict(inputs), inputs)
    with torch.no_grad():
        hidden = checkpoint.module()(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state.numpy()
    np.testing.assert_allclose(answer, task.answer({"last_hidden_state": hidden}, inputs), atol=1e-5)
    with pytest.raises(BadInput, match=r"does not take these inputs: input_ids float32 \[1, 3\]"):
        session.predict({"input_ids": np.zeros((1, 3), np.float32)})
    with pytest.raises(NotImplementedError):
        session.score([1, 2])
    session.close()
    with pytest.raises(BadInput, match="closed"):
        session.predict(inputs)


def test_runs_without_torch(pair: tuple[torch.nn.Module, Artifact]) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from wherry import shelf; from wherry.artifact import Artifact; from wherry.session import Sampling\n"
        f"session = shelf.find('runtimes', 'onnxruntime').load(Artifact.open({str(pair[1].path)!r}))\n"
        "print(len(list(session.generate([5, 6, 7], Sampling(max_tokens=8)))), session.score([5, 6, 7]).logits.shape)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "8 (2, 512)"
    assert out.stderr == ""
