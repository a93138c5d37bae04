"""The page "What executes where" says what is measured: every cell again, all of them when slow tests run."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_llama
from tests.formats import where
from wherry.scheme import PRESETS

CLAIMS = json.loads(where.FOUND.read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("where") / "llama", layers=1, hidden=256, intermediate_size=768)


def again(name: str, model: Path, out: Path) -> None:
    found = where.evidence(where.recipes()[name], model, out)
    assert found.keys() == CLAIMS[name].keys()
    for key, value in found.items():
        if isinstance(value, float):
            assert value <= 3 * CLAIMS[name][key] + 1e-4, f"{name} on {key}: {value}, the page says {CLAIMS[name][key]}"
        else:
            assert value == CLAIMS[name][key]


@pytest.mark.parametrize("name", ["MXFP4A16", "lowrank:rank=8"])
def test_some_cells_again(name: str, model: Path, tmp_path: Path) -> None:
    again(name, model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", where.recipes())
def test_every_cell_again(name: str, model: Path, tmp_path: Path) -> None:
    again(name, model, tmp_path / "out")


def test_the_page_is_fresh_and_whole() -> None:
    assert where.page(CLAIMS) == where.PAGE.read_text(encoding="utf8")
    assert set(CLAIMS) == set(where.recipes()) >= set(PRESETS)


def test_what_the_issue_names_is_run() -> None:
    for name in ("MXFP4A16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "lowrank:rank=8", "kvcache:bits=8"):
        assert CLAIMS[name]["gguf"] < 5e-3
    assert CLAIMS["kvcache:bits=4"]["gguf"] < 0.1  # q4_0 is another grid of 4 bits than compressed-tensors'
    assert CLAIMS["lowrank:rank=8"]["onnx"] < 1e-6
    for name in ("FP8_E5M2A16", "NF4", "W1A16"):
        assert not CLAIMS[name]
