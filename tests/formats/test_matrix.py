"""Every scheme x method x format: what a plan calls legal is done and decoded, what it refuses names a way that works.

The cases come from the shelves and PRESETS, so that a new method, scheme or format is among them. All are run by
`pytest -m slow tests/formats/test_matrix.py`; a dozen by `-k some_cases`, others with each WHERRY_DRAW=N.
"""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_bert, write_llama
from wherry import api, data, deliver, shelf
from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Error, Unsupported
from wherry.prove import prove_folder
from wherry.recipe import Plan, Recipe, build
from wherry.scheme import PRESETS

FORMATS = tuple(name for name, line in shelf.names("formats").items() if not line.startswith("from "))
METHODS = tuple(name for name, line in shelf.names("quant").items() if not line.startswith("from "))
Way = tuple[str, tuple[str, ...]]  # recipe and formats
FAST = {"rounding": "iters=2", "best": "iters=2", "tune": "epochs=1", "hqq": "iters=2", "lowrank": "rank=4"}
TILED = ("W8A16,strategy=tensor", "W4A16_ASYM,block_structure=16x32", "FP8A16,block_structure=16x32",
         "W8A8_STATIC,strategy=tensor")  # fmt: skip
SCHEMES = (*PRESETS, *TILED)
DRAW = int(os.environ.get("WHERRY_DRAW", 0))
NAMES = "|".join(sorted(map(re.escape, PRESETS), key=len, reverse=True))
GRAIN = r",group_size=-?\d+|,block_structure=\d+x\d+|,strategy=\w+"
SPELLING = re.compile(rf"(?<![\w.])({NAMES})(?![\w])((?:{GRAIN})?)( without)?")
OUT = ("leave it out", "ignore=", "wherry capture", "is read, not written", *(f"leave {name} out" for name in FORMATS))


def recipe_of(method: str, scheme: str, group: str = "group_size=32") -> str:
    """A recipe that has the method work on that scheme: alone where it solves, else beside rtn."""
    preset = PRESETS[scheme.split(",")[0]]
    size = "" if preset.fixed or "," in scheme or preset.activations is not None else f",{group}"
    knobs, wanted = FAST.get(method, ""), f"scheme={scheme}{size}"
    step = build(method, {})
    if step.solves and not hasattr(step, "smooth") or hasattr(step, "recipe"):
        return f"{method}:{wanted}" + (f",{knobs}" if knobs else "")
    own = f"{method}:{knobs}".rstrip(":")
    if method == "mixed":  # a smaller one beside it, or what an error proposes alone
        name = scheme.split(",")[0]
        own = f"mixed:schemes={name}{'' if ',' in scheme else ';W4A16'},bits=12"
    after = any(hasattr(step, gait) for gait in ("tune", "correct"))
    return f"rtn:{wanted} | {own}" if after else f"{own} | rtn:{wanted}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "decoder": write_llama(folder / "llama", layers=1, hidden=256, intermediate_size=768),
        "narrow": write_llama(folder / "narrow", layers=1, hidden=96),
        "encoder": write_bert(folder / "bert"),
    }
    return {kind: Checkpoint.open(path) for kind, path in made.items()}


def refusal(recipe: str, checkpoint: Checkpoint, formats: tuple[str, ...] = ()) -> str:
    """Why it cannot be planned, or an empty string."""
    try:
        Recipe.parse(recipe).plan(checkpoint, formats)
    except (BadInput, Unsupported) as error:
        return str(error)
    return ""


def refused(plan: Plan, form: str) -> str:
    """Why a format does not take a plan that is made, or an empty string: what Recipe.plan asks it."""
    try:
        for trial in (*plan.trials(), plan):
            trial.legal(form)
    except (BadInput, Unsupported) as error:
        return str(error)
    return ""


def ways(text: str, recipe: str, method: str, scheme: str, form: tuple[str, ...]) -> Iterator[Way]:
    """(recipe, formats) of everything that a refusal proposes."""
    name = scheme.split(",")[0]
    for found, size, without in SPELLING.findall(text):
        if found != name or without:
            alone = ",group_size=32" if method == "mixed" and not size and not PRESETS[found].fixed else ""
            yield recipe_of("rtn" if without else method, found + size + alone), form
    for size in re.findall(r"(?<!,)group_size=(-?\d+)(?: does\b(?! not)| is$|$)", text):
        if method == "mixed":
            yield recipe_of(method, scheme).replace("bits=12", f"bits=12,group_size={size}"), form
            continue
        yield recipe_of(method, f"{name},group_size={size}"), form
    for other in re.findall(r"take (\w+) or (\w+) there", text):
        yield from ((recipe_of(each, scheme), form) for each in other)
    for other in FORMATS:
        if re.search(rf"\b(use|write|export) {re.sub('[-_ ]', '[-_ ]', other)}\b", text, re.I) and form != (other,):
            yield recipe, (other,)
    if form != (method,) and f"leave {method} out" in text or f"{method} is for" in text:  # awq is a format as well
        yield recipe_of("rtn", scheme), form


REFUSALS = [(kind, scheme) for kind in ("decoder", "narrow", "encoder") for scheme in SCHEMES]


def ask(kind: str, scheme: str, models: dict[str, Checkpoint]) -> None:
    """Every way that a refusal proposes is planned and succeeds; a refusal without one is as bad."""
    checkpoint, wrong, seen = models[kind], [], set()
    for method in METHODS:
        recipe, texts = recipe_of(method, scheme), {}
        texts[()] = refusal(recipe, checkpoint)
        if not texts[()]:
            plan = Recipe.parse(recipe).plan(checkpoint)
            texts = {(form,): refused(plan, form) for form in FORMATS}
        for form, text in texts.items():
            if not text or (text, form) in seen:
                continue
            seen.add((text, form))
            found = list(ways(text, recipe, method, scheme, form))
            bad = [(way, told) for way in found if (told := refusal(way[0], checkpoint, way[1]))]
            if bad or (not found and not any(way in text for way in OUT)):
                wrong.append(f"{recipe} -> {form or 'checkpoint'}: {text!r}\n    {bad or 'it names no way'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", [("decoder", "W4A16")], ids="-".join)
def test_some_refusals_name_ways_that_work(case: tuple[str, str], models: dict[str, Checkpoint]) -> None:
    ask(*case, models)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS, ids="-".join)
def test_every_refusal_names_ways_that_work(case: tuple[str, str], models: dict[str, Checkpoint]) -> None:
    ask(*case, models)


def legal(checkpoint: Checkpoint, recipe: str) -> tuple[str, ...]:
    """The formats that take the recipe; raises when the checkpoint itself does not."""
    plan = Recipe.parse(recipe).plan(checkpoint)
    return tuple(name for name in FORMATS if not refused(plan, name))


def run(checkpoint: Checkpoint, recipe: str, out: Path) -> tuple[str, ...]:
    """Do it in every format that takes it; foreign code must decode the plan's weights from each."""
    formats = tuple(name for name in legal(checkpoint, recipe) if name != "compressed_tensors")
    plan: Plan = Recipe.parse(recipe).plan(checkpoint, formats)
    source = data.read(data.shipped("calibration"))
    batches = deliver.calibration(checkpoint, source, 4, 32, 0) if plan.recipe.calibrated else []
    deliver.deliver(plan, out, formats, batches, {}, lambda result: None, api.quiet)
    report = prove_folder(out, checkpoint, None, False, (0.5, 1.5), api.quiet)
    assert report.rows[-1].value == "PASS", [row for row in report.rows if row.value is False]
    decoded = {row.where for row in report if row.what == "check: decodes to the plan's weights"}
    assert decoded >= {"checkpoint", *formats}
    return formats


CASES = [(kind, method, scheme) for kind in ("decoder", "encoder") for method in METHODS for scheme in SCHEMES]


def attempt(case: tuple[str, str, str], models: dict[str, Checkpoint], out: Path) -> None:
    kind, method, scheme = case
    recipe = recipe_of(method, scheme)
    if text := refusal(recipe, models[kind]):
        print(f"{kind}: {recipe}: {text}")  # that the refusal helps is asked above
        return
    formats = run(models[kind], recipe, out)
    print(f"{kind}: {recipe} -> {', '.join(('checkpoint', *formats))}")


@pytest.mark.slow
@pytest.mark.parametrize("case", random.Random(DRAW).sample(CASES, 12), ids="-".join)
def test_some_cases_run(case: tuple[str, str, str], models: dict[str, Checkpoint], tmp_path: Path) -> None:
    attempt(case, models, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_case_runs(case: tuple[str, str, str], models: dict[str, Checkpoint], tmp_path: Path) -> None:
    attempt(case, models, tmp_path / "out")


def test_nothing_is_forgotten() -> None:
    """Each scheme and method of the shelf stands in a case; what is no scheme is an error."""
    assert {scheme for _, _, scheme in CASES} == set(SCHEMES)
    assert {method for _, method, _ in CASES} == set(METHODS)
    with pytest.raises(Error):
        Recipe.parse("rtn:scheme=NOSUCH")
