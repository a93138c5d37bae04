"""Recipe and Plan: text and YAML round trips, errors that help, every tensor accounted for."""

from pathlib import Path

import pytest

from wherry.checkpoint import Checkpoint
from wherry.errors import BadInput, Error, Unsupported
from wherry.recipe import Recipe
from wherry.scheme import Scheme

TEXTS = [
    "rtn:scheme=W8A16",
    "gptq:scheme=W4A16_ASYM,group_size=32,damp=0.1",
    "rtn:scheme=W8A16,targets=re:.*down_proj;o_proj | gptq:scheme=W3A16,group_size=32,ignore=lm_head,portable=false",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_yaml_round_trip(text: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.parse(str(file)) == recipe


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("gptp:scheme=W4A16", Unsupported, "did you mean 'gptq'"),
        ("gptq:shceme=W4A16", BadInput, "did you mean 'scheme'"),
        ("gptq:scheme=W4A61", BadInput, "did you mean 'W4A16'"),
        ("gptq:damp=much", BadInput, "not a number"),
        ("rtn:portable=perhaps", BadInput, "not true or false"),
        ("rtn:scheme=W4A16,group_size=0", BadInput, "group_size=0"),
        ("rtn | ", BadInput, "empty step"),
        ("nosuch.yaml", BadInput, "no such recipe file"),
        ("rtn:embedding=W9A16", BadInput, "unknown scheme"),
    ],
)
def test_errors_help(text: str, kind: type[Error], message: str) -> None:
    with pytest.raises(kind, match=message):
        Recipe.parse(text)


def test_plan_lists_every_tensor_once(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plan = Recipe.parse("gptq:scheme=W4A16,group_size=32,ignore=re:.*o_proj").plan(checkpoint)
    assert [row.name for row in plan.rows] == checkpoint.names()
    for row in plan.rows:
        assert (row.scheme is None) == bool(row.reason), row
    kept = [row for row in plan.rows if "o_proj" in row.name]
    assert kept
    assert all(row.reason == "ignored by step 1" for row in kept)
    assert plan.row("model.embed_tokens.weight").scheme is not None
    assert plan.after < plan.before


def test_the_first_pass_that_wants_a_tensor_takes_it(tiny_llama: Path) -> None:
    recipe = Recipe.parse("rtn:scheme=W8A16,group_size=32,targets=down_proj | gptq:scheme=W4A16,group_size=32")
    plan = recipe.plan(Checkpoint.open(tiny_llama))
    for row in plan.taken():
        if row.role == "linear":
            assert row.step == (0 if "down_proj" in row.name else 1)
            assert row.scheme is not None
            assert row.scheme.bits == (8 if "down_proj" in row.name else 4)


@pytest.mark.parametrize("knob", ["ignore=re:.*nosuch.*", "targets=nosuch", "ignore=lm_haed"])
def test_a_pattern_that_matches_nothing_is_an_error(knob: str, tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="matches no layer"):
        Recipe.parse(f"rtn:scheme=W8A16,group_size=32,{knob}").plan(Checkpoint.open(tiny_llama))


def test_group_that_does_not_divide_names_tensor_and_cure(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match=r"down_proj.weight|q_proj.weight.*group_size=64 does"):
        Recipe.parse("rtn:scheme=W4A16,group_size=96").plan(Checkpoint.open(tiny_llama))


@pytest.mark.parametrize("scheme", ["W4A16_ASYM,group_size=64", "W3A16,group_size=128", "W8A16", "W8A8_STATIC"])
@pytest.mark.parametrize("embedding", ["", ",embedding=keep", ",embedding=W4A16"])
def test_best_keeps_the_scheme_and_the_embedding_that_it_was_given(scheme, embedding):
    steps = Recipe.parse(f"best:scheme={scheme}{embedding}").steps
    assert str(steps[0].scheme) == str(Scheme.parse(scheme))
    assert steps[0].embedding == (embedding.removeprefix(",embedding=") or "W8A16,group_size=32")


def test_a_group_size_behind_the_embedding_is_the_embeddings():
    text = "gptq:scheme=W4A16_ASYM,group_size=64,embedding=W4A16,group_size=32"
    step = Recipe.parse(text).steps[0]
    assert (str(step.scheme), step.embedding) == ("W4A16_ASYM,group_size=64", "W4A16,group_size=32")
    assert str(Recipe.parse(text)) == text


def test_a_knob_given_twice_is_refused():
    with pytest.raises(BadInput, match="gptq has group_size twice"):
        Recipe.parse("gptq:scheme=W4A16_ASYM,group_size=64,group_size=32")
