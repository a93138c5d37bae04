"""Scheme: spellings, the round trip with compressed-tensors' own classes, sizes."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from wherry.errors import BadInput, Unsupported
from wherry.ops import layout
from wherry.scheme import PRESETS, Group, QTensor, Scheme


def sayable(scheme: Scheme) -> bool:
    try:
        layout.words(scheme)
    except Unsupported:
        return False
    return scheme.table != "ternary"  # said as 2 bits


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", ["", ",group_size=64", ",group_size=-1"])
def test_spelling_round_trip(name: str, size: str) -> None:
    if size and PRESETS[name].fixed:
        with pytest.raises(BadInput, match="by its definition"):
            Scheme.parse(name + size)
        return
    scheme = Scheme.parse(name + size)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("name", ["W8A16", "W4A16", "W4A16_ASYM", "W8A8", "NVFP4A16", "MXFP4A16"])
def test_presets_are_the_ecosystems(name: str) -> None:
    theirs = preset_name_to_scheme(name, targets=["Linear"])
    assert layout.from_words(theirs.model_dump(mode="json")) == PRESETS[name]


@pytest.mark.parametrize("name", [name for name, scheme in PRESETS.items() if sayable(scheme)])
def test_round_trip_through_their_classes(name: str) -> None:
    group = layout.words(PRESETS[name])
    theirs = QuantizationScheme(targets=["Linear"], **group)
    assert layout.from_words(theirs.model_dump(mode="json")) == PRESETS[name]


def test_what_they_cannot_say_is_an_error() -> None:
    q4_k = Scheme(
        4, grain=Group(32), symmetric=False, scale=Scheme(6, grain=Group(8)), minimum=Scheme(6, grain=Group(8))
    )
    with pytest.raises(Unsupported, match="cannot say"):
        layout.words(q4_k)


def test_unknown_scheme_suggests() -> None:
    with pytest.raises(BadInput, match="did you mean 'W4A16'"):
        Scheme.parse("W4A17")


@pytest.mark.parametrize(("group", "k", "near"), [(128, 576, 64), (128, 352, 32), (64, 96, 32), (100, 576, 64)])
def test_group_that_does_not_divide_names_one_that_does(group: int, k: int, near: int) -> None:
    assert k % near == 0
    with pytest.raises(BadInput, match=f"group_size={near} does"):
        Scheme(4, grain=Group(group)).scales_per_row(k)


def test_bytes_of_a_small_weight() -> None:
    scheme = Scheme.parse("W4A16_ASYM,group_size=32")
    assert scheme.bytes((2, 64)) == 64 + 4 * 2 + 2  # codes, four fp16 scales, four 4-bit zeros


def test_decode_is_scale_times_code_minus_zero() -> None:
    code = torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8)
    q = QTensor(Scheme(4, grain=Group(2)), code, torch.tensor([[0.5, 2.0]]), torch.tensor([[-1, 1]], dtype=torch.int8))
    assert torch.equal(q.decode(), torch.tensor([[-3.5, 4.0, -2.0, 0.0]]))
