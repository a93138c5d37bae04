"""Every example is short, and runs to its end on the tiny models that it makes for itself."""

import runpy
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
SAYS = {
    "chat_over_http": ("PASS", "runs on", "answer: "),
    "embeddings": ("PASS", "A kitten naps on the couch."),
    "own_quantizer": ("rtn ", "clip "),
    "read_a_plan": ("bytes now", "group_size=64 does", "matches no layer"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf8").splitlines()) < 60


def test_every_example_is_run() -> None:
    assert {path.stem for path in FILES} == {*SAYS, "tiny"}


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python examples/NAME.py` does, in this process: importing torch once for all saves half a minute."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for words in SAYS[name]:
        assert words in said


def test_own_quantizer_beats_rounding(tmp_path: Path) -> None:
    """The example's claim, on weights with outliers, where clipping must help."""
    import torch

    sys.path.insert(0, str(EXAMPLES))
    try:
        from own_quantizer import Clip
    finally:
        sys.path.remove(str(EXAMPLES))
    from wherry.recipe import build

    torch.manual_seed(0)
    w = torch.distributions.StudentT(4.0).sample((64, 128))
    plain = build("rtn", {"scheme": "W3A16", "group_size": 64})
    own = Clip(scheme=plain.scheme)
    assert float((own.solve(w).decode() - w).norm()) < 0.97 * float((plain.solve(w).decode() - w).norm())
