"""Every scheme in every format that takes it: foreign code decodes the checkpoint's weights from the export."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_llama
from wherry import api, deliver, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Unsupported
from wherry.recipe import Recipe
from wherry.scheme import PRESETS

FORMATS = ("compressed_tensors", "gguf")
WEIGHTS = [name for name, scheme in PRESETS.items() if scheme.activations is None]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("wide") / "llama", layers=1, hidden=256)


@pytest.mark.parametrize("name", WEIGHTS)
def test_exports_decode_to_the_checkpoint(name: str, wide: Path, tmp_path: Path) -> None:
    scheme = PRESETS[name]
    group = "" if scheme.fixed else ",group_size=32"
    recipe, checkpoint, legal = Recipe.parse(f"rtn:scheme={name}{group}"), Checkpoint.open(wide), []
    refusals: list[str] = []
    for form in FORMATS:
        try:
            recipe.plan(checkpoint, (form,))
            legal.append(form)
        except Unsupported as error:
            refusals.append(str(error))
    assert all(any(word in text for word in PRESETS if word != name) for text in refusals)  # each names one that works
    formats = tuple(form for form in legal if form == "gguf")
    plan = recipe.plan(checkpoint, formats)
    deliver.deliver(plan, tmp_path / "out", formats, [], {}, lambda result: None, api.quiet)
    made = Checkpoint.open(tmp_path / "out")
    quantized = [row["name"] for row in made.plan if row["scheme"] and row["role"] == "linear"]
    assert len(quantized) == 7
    for row in made.plan:
        if row["name"] in quantized:
            assert made.scheme(row["name"]) is not None
            assert made.scheme(row["name"]).bits == scheme.bits
    folders = [tmp_path / "out", *(tmp_path / "out" / form for form in formats)]
    for folder in folders:
        artifact = Artifact.open(folder)
        for key, value in shelf.find("formats", artifact.format).decode(artifact):
            want = made.weight(key).numpy() if key in quantized else None
            if want is not None and name in ("NVFP4A16", "MXFP4A16", "FP8A16") and artifact.format != "gguf":
                np.testing.assert_allclose(value, want, rtol=2**-8)  # compressed-tensors decodes these in bfloat16
            elif want is not None:
                np.testing.assert_array_equal(value, want)


def test_a_wrong_width_names_a_scheme_that_fits(tmp_path: Path) -> None:
    narrow = Checkpoint.open(write_llama(tmp_path / "narrow", layers=1, hidden=64))
    with pytest.raises(BadInput, match="W4A16,group_size=64 fits"):  # rows of 128 and of 64
        Recipe.parse("gptq:scheme=Q4_K").plan(narrow)
