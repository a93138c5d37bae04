"""House rules, checked: imports go down only, `import wherry` is lean, methods cite their paper, files stay small."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import wherry
from wherry.shelf import names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wherry"
# module or folder of wherry/ -> its floor; the same table stands in docs/architecture.md
FLOORS = {
    "errors": 0, "shelf": 0,
    "scheme": 1, "levels": 1, "report": 1, "ops": 1, "tensorfile": 1, "locate": 1, "image": 1, "audio": 1,
    "table": 1, "label": 1,
    "checkpoint": 2, "artifact": 2, "task": 2, "knobs": 2, "page": 2,
    "cargo": 3, "gait": 3, "graph": 3, "recipe": 3, "session": 3, "writer": 3, "packed": 3, "data": 3, "journal": 3,
    "objective": 3, "roles": 3, "rows": 3, "steps": 3, "budget": 3, "dependency": 3,
    "quant": 4, "prune": 4, "formats": 4, "distill": 4, "capture": 4,
    "redraw": 4,
    "engine": 5, "runtimes": 5, "train": 5,
    "serve": 6, "evaluate": 6, "card": 6,
    "board": 7, "options": 7, "choose": 7, "opened": 7, "prove": 7, "deliver": 7, "describe": 7, "summary": 7,
    "doctor": 7, "judge": 7,
    "explain": 7, "judging": 8, "training": 8, "api": 7,
    "demo": 8, "cli": 8, "__main__": 8,
}  # fmt: skip
SHELVES = ("quant", "prune", "formats", "runtimes", "distill")  # their entries never import one another
PAPERS = (("quant",), ("prune",))  # shelves of algorithms: small files that cite their paper
BLIND = {"serve": ("runtimes", "engine", "quant", "prune"), "evaluate": ("runtimes", "engine", "quant", "prune")}
# (file, module it imports inside of a function) -> why this one may go up
UPWARDS = {("api.py", "demo"): "a verb of the public interface whose work is a script over all other verbs"}
HEAVY = (
    "torch", "onnx", "onnxruntime", "onnxruntime_genai", "openvino", "ray", "tensorflow", "transformers", "xllamacpp",
    "gguf", "compressed_tensors", "scipy", "matplotlib", "sklearn", "PIL", "av", "soundfile", "pyarrow", "captum",
    "wherry_native",
)  # fmt: skip
LINES, LINES_QUANT, LINES_CLI = 400, 200, 300
VAGUE = {"utils", "util", "base", "common", "helper", "helpers", "manager", "handler", "factory", "misc"}
TEXT_BYTES = 300_000
PICKLERS = ("pickle", "dill", "joblib", "cloudpickle")
BINARY = (".png", ".jpg", ".ico", ".woff2", ".safetensors", ".gguf", ".onnx")


@cache
def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def parts(path: Path) -> tuple[str, ...]:
    """Place below wherry: formats/onnx/blocks.py -> (formats, onnx, blocks); its __init__.py -> (formats, onnx)."""
    dotted = path.relative_to(PACKAGE).with_suffix("").parts
    return dotted[:-1] if dotted[-1] == "__init__" else dotted


def only_for_types(path: Path) -> set[ast.AST]:
    """Nodes below `if TYPE_CHECKING:`, which never run."""
    out: set[ast.AST] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            out.update(ast.walk(ast.Module(node.body, [])))
    return out


def imports(path: Path, typing: bool = True) -> set[tuple[str, ...]]:
    """Places in wherry that a file imports, wherever in the file: (formats, gguf, header)."""
    skipped = set() if typing else only_for_types(path)
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(tree(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("wherry."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wherry":
            assert not node.level
            base = tuple(str(node.module).split(".")[1:])
            for alias in node.names:
                place = (*base, alias.name)
                here = PACKAGE.joinpath(*place)
                module = here.with_suffix(".py").exists() or (here / "__init__.py").exists()
                if module:
                    found.add(place)
                elif base:
                    found.add(base)
    return found


def test_every_file_has_a_floor() -> None:
    known = {parts(path)[0] for path in files() if parts(path)}
    assert known <= set(FLOORS), f"give these a floor here and in docs/architecture.md: {known - set(FLOORS)}"


def test_imports_go_down_only() -> None:
    wrong = []
    for path in files():
        if not parts(path):  # wherry/__init__.py: names alone, loaded when they are used
            continue
        own = parts(path)[0]
        for place in imports(path):
            other, says = place[0], f"{relative(path)} (floor {FLOORS[own]}) imports {'.'.join(place)}"
            if FLOORS[other] > FLOORS[own] and (relative(path), other) not in UPWARDS:
                wrong.append(f"{says} of floor {FLOORS[other]}, which is above")
            if other in BLIND.get(own, ()):
                wrong.append(f"{says}: {own} must work with every runtime and method")
            if own in SHELVES and other in SHELVES and FLOORS[own] == FLOORS[other] and parts(path)[:2] != place[:2]:
                wrong.append(f"{says}: what stands on a shelf does not know its neighbours")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_circle() -> None:
    """Between files, function-level imports included; those for types alone left out."""
    graph = {
        parts(path): {p for p in imports(path, typing=False) if p != parts(path)}
        for path in files()
        if parts(path)
    }
    for path in files():
        for name, other in UPWARDS:
            if relative(path) == name:
                graph[parts(path)] = {p for p in graph[parts(path)] if p[0] != other}
    state: dict[tuple[str, ...], int] = {}

    def visit(place: tuple[str, ...], trail: list[tuple[str, ...]]) -> None:
        if state.get(place) == 2:
            return
        circle = " -> ".join(".".join(p) for p in [*trail, place])
        assert state.get(place) != 1, f"a circle of imports: {circle}"
        state[place] = 1
        for other in sorted(graph.get(place, ())):
            # an entry's __init__ is its face: it may import its parts, and they its constants
            if place[:2] == other[:2] and len(place) != len(other):
                continue
            visit(other, [*trail, place])
        state[place] = 2

    for place in sorted(graph):
        visit(place, [])


def test_import_is_lean() -> None:
    code = f"import sys, wherry; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_serving_needs_no_torch() -> None:
    """What the base install promises: the command line, the server and the llama.cpp runtime start without torch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import wherry.cli, wherry.api, wherry.choose, wherry.serve.app, wherry.doctor\n"
        "from wherry import shelf; shelf.find('runtimes', 'llamacpp')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [p for p in files() if parts(p)[:1] in PAPERS and len(parts(p)) > 1], ids=relative)
def test_methods_cite_their_paper(path: Path) -> None:
    doc = ast.get_docstring(tree(path)) or ""
    for section in ("Source:", "Idea:", "Shapes:", "Cost:"):
        assert re.search(rf"^{section}", doc, re.M), f"{relative(path)}: the docstring lacks {section}"


def test_files_stay_small() -> None:
    wrong, total = [], 0
    for path in files():
        count = len(path.read_text(encoding="utf8").splitlines())
        total += count
        most = LINES_CLI if relative(path) == "cli.py" else LINES_QUANT if parts(path)[:1] in PAPERS else LINES
        if count > most:
            wrong.append(f"{relative(path)} has {count} lines, {most} at most: name a part of it and move it out")
    print(f"{total} lines in {len(files())} files")
    assert not wrong, "\n".join(wrong)


def test_names_are_plain() -> None:
    for path in files():
        vague = set(parts(path)) & VAGUE
        assert not vague, f"{relative(path)}: '{vague.pop()}' says nothing; name the thing"
    for (shelf,) in PAPERS:
        for name in names(shelf):
            file = PACKAGE / shelf / f"{name}.py"
            if file.exists():
                classes = [node.name.lower() for node in tree(file).body if isinstance(node, ast.ClassDef)]
                assert name.replace("_", "") in classes, f"{shelf}/{name}.py has no class of that name"


def test_everything_public_is_explained() -> None:
    wrong = []
    for path in files():
        if not ast.get_docstring(tree(path)) and path.name != "__main__.py":
            wrong.append(relative(path))
        for node in tree(path).body:
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            for inner in [node, *(node.body if public else [])]:
                named = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if named and not inner.name.startswith("_") and not ast.get_docstring(inner):
                    wrong.append(f"{relative(path)}:{inner.lineno} {inner.name}")
    assert not wrong, "no docstring: " + ", ".join(wrong)


def test_nothing_is_swallowed() -> None:
    """No bare except; no `except Exception` (or broader) that does nothing."""
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = {name.id for name in ast.walk(node.type or ast.Pass()) if isinstance(name, ast.Name)}
            empty = all(isinstance(s, ast.Pass | ast.Continue | ast.Expr) and not _calls(s) for s in node.body)
            if node.type is None or (empty and kinds & {"Exception", "BaseException"}):
                wrong.append(f"{relative(path)}:{node.lineno}")
    assert not wrong, "an exception is swallowed: " + ", ".join(wrong)


def _calls(statement: ast.AST) -> bool:
    return any(isinstance(node, ast.Call | ast.Yield | ast.Await) for node in ast.walk(statement))


def test_nothing_is_unpickled() -> None:
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import) and any(alias.name in PICKLERS for alias in node.names):
                wrong.append(f"{relative(path)}:{node.lineno} imports a pickler")
            if isinstance(node, ast.Call):
                name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name == "torch.load" and given.get("weights_only") != "True":
                    wrong.append(f"{relative(path)}:{node.lineno} torch.load without weights_only=True")
                if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                    wrong.append(f"{relative(path)}:{node.lineno} np.load that may unpickle")
    assert not wrong, "\n".join(wrong)


def tracked() -> list[Path]:
    """Files that git knows; all files when this is not a clone."""
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        found = [path for path in ROOT.rglob("*") if path.is_file()]
        return [path for path in found if not {".venv", ".git"} & set(path.relative_to(ROOT).parts)]
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_one_machine() -> None:
    """Nothing that is shipped names a folder that only one machine has."""
    pattern = re.compile(r"(?<![\w.:/~-])/(?:work|root|home/\w+|Users/\w+|mnt/\w+)/[\w.]")
    wrong = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in BINARY:
            continue
        try:
            text = path.read_text(encoding="utf8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {match[0]}..." for match in pattern.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_shipped_texts_are_small() -> None:
    size = sum(path.stat().st_size for path in (PACKAGE / "texts").iterdir())
    assert size <= TEXT_BYTES, f"wherry/texts is {size:,} B, {TEXT_BYTES:,} B at most"


def test_architecture_page_has_the_same_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
    written = {}
    for level, row in re.findall(r"^\| (\d) \| (.+?) \|", text, re.M):
        written.update(dict.fromkeys(re.findall(r"`([\w.]+?)/?`", row), int(level)))
    assert written == FLOORS


def test_version_is_the_newest_of_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    newest = re.search(r"^## (\S+)", text, re.M)
    assert newest
    assert newest[1] == wherry.__version__


def test_public_names_exist() -> None:
    for name in wherry.__all__:
        assert getattr(wherry, name) is not None


def test_verbs_outlive_modules_of_their_name() -> None:
    """`wherry.evaluate` is a verb and a folder: Python replaces the first by the second when something imports it."""
    code = """
import wherry, wherry.evaluate.proof, wherry.serve.app, wherry.doctor, wherry.demo
assert wherry.doctor().get("python").value == wherry.doctor().get("python").value
for verb in (wherry.evaluate, wherry.serve):
    try:
        verb("no-such-model")
    except wherry.Missing:
        continue
    raise AssertionError(verb)
assert wherry.evaluate.proof.verdict and callable(wherry.demo)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
