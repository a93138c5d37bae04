"""Best is a name for other steps, which the stored recipe shows."""

import pytest

from wherry.errors import BadInput
from wherry.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("best:scheme=W3A16,group_size=32", ["rounding", "tune"]),
        ("best:scheme=Q4_K,effort=medium", ["rounding"]),
        ("best:scheme=W4A16,effort=low", ["gptaq"]),
        ("best:scheme=W2A16_BINARY", ["gptaq"]),
        ("best:scheme=W8A8", ["gptaq"]),
        ("best:scheme=W4A8,group_size=32", ["rounding", "tune"]),
        ("smoothquant | best:scheme=W8A8,ignore=re:.*down_proj", ["smoothquant", "gptaq"]),
    ],
)
def test_what_it_stands_for(text: str, steps: list[str], tmp_path) -> None:
    recipe = Recipe.parse(text).spelled(graph=False)
    assert [step.method for step in recipe.steps] == steps
    assert Recipe.parse(str(recipe)) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.parse(str(file)) == recipe


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("best:scheme=W8A8_STATIC", "gptq:scheme=W8A8_STATIC,bias_correction=true"),
        ("best:scheme=W4A16,group_size=32,iters=9,ignore=a", "gptq:scheme=W4A16,group_size=32,ignore=a"),
        ("best:scheme=W8A8_STATIC,attention=true,activation_observer=entropy",
         "gptq:scheme=W8A8_STATIC,activation_observer=entropy,attention=true,bias_correction=true"),
    ],
)  # fmt: skip
def test_on_graphs_it_is_another(text: str, wanted: str) -> None:
    assert Recipe.parse(text).spelled(graph=True) == Recipe.parse(wanted)


def test_knobs_are_handed_on() -> None:
    recipe = Recipe.parse("best:scheme=W4A16,group_size=64,iters=500,embedding=keep,ignore=a;b,portable=false")
    first, last = recipe.spelled(graph=False).steps
    assert first.iters == 500
    assert last.epochs == 20
    assert first.ignore == ("a", "b")
    assert first.embedding == "keep"
    assert not first.portable
    assert first.scheme.group_size == 64
    with pytest.raises(BadInput, match="none of low, medium, high"):
        Recipe.parse("best:effort=huge")
