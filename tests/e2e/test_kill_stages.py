"""`kill -9` in each stage of `prune | heal | quantize`, then the same command: the same bytes, and nothing twice."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_llama
from tests.e2e.test_kill import Forge, Trial

GPTQ = "gptq:scheme=W4A16_ASYM,group_size=32"
HEAL = "heal:steps=12,batch=2,lr=0.001"
RECIPES = [f"magnitude:sparsity=0.5,scope=global | {HEAL} | {GPTQ}", f"wanda:sparsity=0.5 | {HEAL} | {GPTQ}"]
MOMENTS = [  # a file that a stage writes in its midst
    ".out.partial-*/stage-0/unit-block-1.safetensors",
    ".out.partial-*/stage-1/.healed.partial*/checkpoints/update-*/.metadata",
    ".out.partial-*/unit-block-1.safetensors",
]
LEFT = [{"stage-0"}, {"stage-0", "stage-1"}, {"stage-1"}]  # a stage is removed when the one after it is done


@pytest.fixture(scope="module", params=RECIPES, ids=["magnitude", "wanda"])
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    forge, folder = Forge(), tmp_path_factory.mktemp("stages")
    model = write_llama(folder / "llama", layers=4)
    words = ["compress", str(model), "-o", "out", "--recipe", request.param, "--samples", "8", "--length", "64"]
    yield Trial(forge, folder / "run", words)
    forge.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(3))
def test_killed_in_a_stage(trial: Trial, stage: int) -> None:
    assert any(trial.caught(MOMENTS[stage]) for _ in range(8)), "no kill hit it"  # it comes and goes
    (partial,) = trial.folder.glob(".out.partial-*")
    assert {path.name for path in partial.glob("stage-*")} == LEFT[stage]
    said = Path(f"{trial.folder}.log")
    before = said.stat().st_size
    trial.again()
    again = said.read_bytes()[before:].decode()
    assert (" 1/3 " in again, " 2/3 " in again) == (stage == 0, stage <= 1), again
    updates = [int(n) for n in re.findall(r"^(\d+)/12 2/3 heal: loss", again, re.MULTILINE)]
    assert stage != 1 or min(updates) > 3, again  # nor are updates that were saved
