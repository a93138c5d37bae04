"""The words are true: commands parse, marked blocks run, generated tables are fresh, links lead somewhere."""

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from wherry.cli import app
from wherry.objective import Objective
from wherry.recipe import Recipe
from wherry.shelf import SHELVES, names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
BLOCK = re.compile(r"(?:<!-- runs: (\w+) -->\n)?```(\w+)\n(.*?)```", re.S)


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """(mark, text) of the fenced blocks of that language."""
    return [(m, text) for m, kind, text in BLOCK.findall(path.read_text(encoding="utf8")) if kind == language]


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every `wherry VERB ...`, in blocks and in running text."""
    text = path.read_text(encoding="utf8")
    lines = [line.partition(" #")[0] for _, block in blocks(path, "sh") for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(wherry [^`]+)`", text)]:
        if line.startswith("wherry ") and "..." not in line and not re.match(r"wherry [A-Z]", line):
            yield shlex.split(line)[1:]


def check(words: list[str]) -> None:
    """Parse a command line as the command would, without running it."""
    group = typer.main.get_command(app)
    command = group.commands.get(words[0])  # type: ignore[attr-defined]
    assert command, f"there is no verb '{words[0]}'"
    if all(word.startswith("--") for word in words[1:]) and any(p.required for p in command.params):
        known = {option for p in command.params for option in p.opts}
        assert set(words[1:]) <= known, f"wherry {words[0]} has no {set(words[1:]) - known}"
        return  # a verb, or a verb and its option, named in a sentence
    try:
        context = command.make_context(words[0], list(words[1:]))
    except Exception as error:
        raise AssertionError(f"wherry {shlex.join(words)}: {getattr(error, 'message', error)}") from error
    if context.params.get("recipe"):
        (Objective if words[0] in ("train", "distill", "heal") else Recipe).parse(context.params["recipe"])
    for name in filter(None, str(context.params.get("format") or "").split(",")):
        assert name in names("formats")
    if words[0] == "list":
        assert context.params["what"] in ("", "schemes", *SHELVES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_parse(path: Path) -> None:
    for words in commands(path):
        check(words)


def test_commands_are_found() -> None:
    """The search itself: it must see blocks and running text, and a wrong option must fail."""
    found = list(commands(READMES[0]))
    assert len(found) >= 12
    assert ["doctor"] in found
    with pytest.raises(AssertionError, match="No such option"):
        check(["serve", "x", "--prot", "80"])
    with pytest.raises(AssertionError, match="no verb"):
        check(["sevre", "x"])


def test_both_languages_show_the_same_code() -> None:
    english, chinese = (
        [re.sub(r" +#.*", "", text) for kind in ("sh", "python") for _, text in blocks(path, kind)] for path in READMES
    )
    assert english == chinese
    assert [text.count("\n## ") for text in (p.read_text(encoding="utf8") for p in READMES)] == [7, 7]


def test_every_verb_is_explained() -> None:
    """Each verb is shown in a page of docs/, and each option that a page shows in its table exists."""
    shown = {words[0] for path in (ROOT / "docs").glob("*.md") for words in commands(path)}
    assert set(typer.main.get_command(app).commands) <= shown  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target} is not there"


def test_generated_tables_are_fresh() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def desk(tmp_path: Path, tiny_llama: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the README calls my-model and my-encoder."""
    (tmp_path / "my-model").symlink_to(tiny_llama)
    (tmp_path / "my-encoder").symlink_to(tiny_bert)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> None:
    """One shell line of the README, in this process."""
    words = shlex.split(line)
    assert words[0] == "wherry"
    app(words[1:], standalone_mode=False)


@contextmanager
def served(artifact: Path) -> Iterator[str]:
    """The server of `wherry serve` on a free port."""
    from wherry.choose import open_session
    from wherry.serve.app import create_app, serving

    session, opened, _ = open_session(artifact)
    with serving(create_app(session, opened)) as url:
        yield url
    session.close()


def test_first_ten_minutes(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The marked blocks of the README, in their order, on tiny models; the other language has the same lines."""
    before = threading.active_count()
    ran = 0
    for mark, text in blocks(READMES[0], "sh"):
        if mark:
            for line in text.strip().splitlines():
                run(line)
                ran += 1
    assert ran == 7
    assert (desk / "my-model-gguf" / "wherry.json").exists()
    assert (desk / "my-encoder-onnx" / "model.onnx").exists()
    for mark, text in blocks(READMES[0], "python"):
        if mark == "llama":
            capsys.readouterr()
            exec(compile(text, "README.md", "exec"), {})
            assert "PASS" in capsys.readouterr().out
        elif mark == "server":
            with served(desk / "my-model-gguf") as url:
                exec(compile(text.replace("http://127.0.0.1:8000", url), "README.md", "exec"), {})
            assert capsys.readouterr().out.strip()
    assert threading.active_count() <= before + 8


def test_table_of_schemes_and_formats(tmp_path: Path) -> None:
    """docs/export.md: each "yes" is accepted by the format's check, each "no" is refused."""
    from tests.conftest import write_llama
    from wherry.checkpoint import Checkpoint
    from wherry.errors import Unsupported
    from wherry.scheme import PRESETS

    text = (ROOT / "docs" / "export.md").read_text(encoding="utf8")
    formats = re.search(r"^\| scheme \| (.+) \|$", text, re.M)[1].split(" | ")  # type: ignore[index]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", text, re.M))
    assert set(rows) == set(PRESETS)
    graphs = {"openvino", "ort", "onnx_half"}  # they take graph models alone, as the page says
    floats = {"safetensors", "compact"}  # what a recipe without codes ends as; a file of files
    assert set(formats) | graphs | floats == set(names("formats"))
    checkpoint = Checkpoint.open(write_llama(tmp_path / "wide", hidden=256, intermediate_size=768))  # k-quants: 256s
    for scheme, cells in rows.items():
        group = "" if PRESETS[scheme].activations or PRESETS[scheme].fixed else ",group_size=32"
        recipe = Recipe.parse(f"rtn:scheme={scheme}{group}")
        for name, cell in zip(formats, cells.split(" | "), strict=True):
            try:
                recipe.plan(checkpoint, (name,))
                found = "yes"
            except Unsupported:
                found = "no"
            assert found == cell, f"{scheme} into {name}: the page says {cell}"
