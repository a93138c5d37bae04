"""Without torch: what others compressed is listed, served and answers.

In the default suite a hook that refuses the heavy imports stands for their absence (a process of its own, real HTTP).
The slow test builds real environments with pip, serves in them, and prints their sizes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_bert, write_llama

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "transformers",
    "compressed_tensors",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime_genai",
    "scipy",
)
BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from wherry.cli import main
main()
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made beforehand, where torch is: a GGUF file and an ONNX decoder of one model, and an ONNX encoder."""
    from wherry import api

    folder = tmp_path_factory.mktemp("no-torch")
    llama, bert = write_llama(folder / "llama"), write_bert(folder / "bert")
    api.compress(llama, folder / "w4", "rtn:scheme=W4A16,group_size=32")
    api.export(folder / "w4", folder / "gguf", "gguf")
    api.compress(bert, folder / "w8", "rtn:scheme=W8A8_STATIC", samples=4, length=32)
    api.export(folder / "w8", folder / "onnx", "onnx")
    return {"float": llama, "checkpoint": folder / "w4", "gguf": folder / "gguf", "onnx": folder / "onnx"}


def words_of(python: str, *words: str | Path, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """`wherry WORDS` where the heavy packages cannot be imported; nothing blocked: the plain command."""
    code = ["-c", BLOCKED.format(heavy=set(heavy))] if heavy else ["-m", "wherry"]
    return [python, *code, *map(str, words)]


def wherry(*words: str | Path, **kind: Any) -> subprocess.CompletedProcess[str]:
    command = words_of(sys.executable, *words, **kind)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@contextmanager
def serving(command: list[str], port: int, cwd: Path) -> Iterator[str]:
    """A server process; gives its URL when it is ready."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
    try:
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            try:
                ask(f"{url}/health/ready")
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def answers(command: list[str], port: int, kind: str, cwd: Path) -> None:
    """Serve, and ask what the model is for."""
    with serving(command, port, cwd) as url:
        model = ask(f"{url}/v1/models")["data"][0]["id"]
        if kind == "gguf":
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            reply = ask(f"{url}/v1/chat/completions", body)
            assert reply["usage"]["completion_tokens"] >= 1
            assert isinstance(reply["choices"][0]["message"]["content"], str)
        else:
            reply = ask(f"{url}/v1/embeddings", {"model": model, "input": ["a boat", "a ship"]})
            vectors = [entry["embedding"] for entry in reply["data"]]
            assert len(vectors) == 2
            assert len(vectors[0]) == 64
            assert abs(sum(x * x for x in vectors[0]) - 1) < 1e-3
            assert vectors[0] != vectors[1]


def test_import_is_lean() -> None:
    heavy = (
        *HEAVY,
        "onnxruntime",
        "xllamacpp",
        "gguf",
        "numpy",
        "rich",
        "typer",
        "uvicorn",
        "matplotlib",
        "tokenizers",
    )
    code = f"import sys, wherry; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_block_blocks(artifacts: dict[str, Path]) -> None:
    """What needs torch says so, with the pip line; it is no fault of wherry's."""
    for words in (
        ("inspect", artifacts["float"]),
        ("compress", artifacts["float"], "-o", "none"),
        ("serve", artifacts["float"]),
    ):
        done = wherry(*words)
        assert done.returncode not in (0, 1), done.stderr
        assert "pip install 'wherry[torch]'" in done.stderr
        assert "fault" not in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 3


def test_list_and_doctor() -> None:
    done = wherry("list")
    assert done.returncode == 0, done.stderr
    assert "gptq" in done.stdout
    done = wherry("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout


def test_the_pip_line_is_shown_whole() -> None:
    """Square brackets are markup to some printers: they must come through."""
    done = wherry("doctor", heavy=(*HEAVY, "xllamacpp", "onnxruntime"))
    for extra in ("torch", "gguf", "onnxruntime"):
        assert f"'wherry[{extra}]'" in done.stdout


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_served_without_torch(artifacts: dict[str, Path], kind: str) -> None:
    port = free_port()
    answers(words_of(sys.executable, "serve", artifacts[kind], "--port", str(port)), port, kind, ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "extra"), [("gguf", "gguf"), ("onnx", "onnxruntime")])
def test_served_from_a_real_environment(artifacts: dict[str, Path], tmp_path: Path, kind: str, extra: str) -> None:
    """pip install 'wherry[...]' into an empty environment; prints what it weighs."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("wherry", "pyproject.toml", "README.md", "LICENSE"):
        place = ROOT / name
        shutil.copytree(place, source / name) if place.is_dir() else shutil.copy(place, source / name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))

    def install(what: str) -> int:
        done = subprocess.run([python, "-m", "pip", "install", "-q", what], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install here: {done.stderr.strip().splitlines()[-1]}")
        return sum(f.stat().st_size for f in packages.rglob("*") if f.is_file() and "/pip" not in f.as_posix())

    base = install(str(source))
    with_runtime = install(f"{source}[{extra}]")
    assert not (packages / "torch").exists()
    port = free_port()
    answers([str(python), "-m", "wherry", "serve", str(artifacts[kind]), "--port", str(port)], port, kind, tmp_path)
    print(f"\nbase {base / 1e6:.0f} MB; with [{extra}] {with_runtime / 1e6:.0f} MB; served {kind}, no torch")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
