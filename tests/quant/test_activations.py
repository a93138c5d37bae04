"""Static and dynamic activations by recipe: on decoders, encoders and graphs; observers, choice by layer, outliers."""

from pathlib import Path

import pytest
import torch

from wherry import api, data, deliver
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.ops.ranges import OBSERVERS
from wherry.recipe import Recipe
from wherry.scheme import QTensor

LAYERS = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "bert": "encoder.layer.1.output.dense.weight",
}


def compress(model: Path, out: Path, recipe: str) -> Checkpoint:
    checkpoint = Checkpoint.open(model)
    plan = Recipe.parse(recipe).plan(checkpoint)
    source = data.read(data.shipped("calibration"))
    batches = deliver.calibration(checkpoint, source, 6, 48, 0) if plan.recipe.calibrated else []
    deliver.deliver(plan, out, (), batches, {}, lambda result: None, api.quiet)
    return Checkpoint.open(out)


def span(checkpoint: Checkpoint, name: str) -> float:
    """Of the static range of a layer's input."""
    tensor = checkpoint.tensor(name)
    assert isinstance(tensor, QTensor)
    assert tensor.activation_scale is not None
    return 255 * float(tensor.activation_scale)


def inputs(model: Path, name: str) -> torch.Tensor:
    """What the float model feeds that layer on the calibration data."""
    checkpoint = Checkpoint.open(model)
    module, caught = checkpoint.module(), []
    places = {weight: place for place, weight in checkpoint.places(module).items()}
    layer = module.get_submodule(places[name].removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten()))
    source = data.read(data.shipped("calibration"))
    with torch.no_grad():
        for batch in deliver.calibration(checkpoint, source, 6, 48, 0):
            module(**{key: torch.from_numpy(value) for key, value in batch.items()})
    return torch.cat(caught)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_observers_cut_static_ranges(kind: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """minmax is all that was seen; the others cut; mse has the least error of them on the very inputs."""
    model, name = {"llama": tiny_llama, "bert": tiny_bert}[kind], LAYERS[kind]
    spans, errors, x = {}, {}, inputs(model, name)
    tried = OBSERVERS if kind == "llama" else ("mse", "minmax")
    for observer in tried:
        made = compress(model, tmp_path / observer, f"rtn:scheme=W8A8_STATIC,activation_observer={observer}")
        tensor = made.tensor(name)
        spans[observer] = span(made, name)
        scale, zero = tensor.activation_scale, tensor.activation_zero.float()
        rounded = (torch.round(x / scale + zero).clamp(-128, 127) - zero) * scale
        errors[observer] = float((rounded - x).square().mean())
    seen = float(x.max().clamp(min=0) - x.min().clamp(max=0))
    assert spans["minmax"] == pytest.approx(seen, rel=0.05)  # blocks before it are compressed, inputs a little others
    assert all(spans[o] <= spans["minmax"] * 1.001 for o in tried)
    assert spans["mse"] < spans["minmax"]
    assert errors["mse"] <= 1.05 * min(errors.values())


def test_without_a_word_the_range_is_minmax(tiny_llama: Path, tmp_path: Path) -> None:
    auto = compress(tiny_llama, tmp_path / "auto", "rtn:scheme=W8A8_STATIC")
    minmax = compress(tiny_llama, tmp_path / "minmax", "rtn:scheme=W8A8_STATIC,activation_observer=minmax")
    assert span(auto, LAYERS["llama"]) == span(minmax, LAYERS["llama"])


def test_each_layer_has_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = "smoothquant | rtn:scheme=W8A8_STATIC,targets=q_proj;k_proj;v_proj"
    recipe += " | rtn:scheme=W8A8,targets=gate_proj;up_proj"
    recipe += " | gptq:scheme=W4A8,group_size=32,targets=o_proj | rtn:scheme=W4A16,group_size=32"
    made = compress(tiny_llama, tmp_path / "out", recipe)
    found = {part: str(made.scheme(f"model.layers.0.{part}.weight")) for part in
             ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj", "mlp.down_proj")}  # fmt: skip
    assert list(found.values()) == ["W8A8_STATIC", "W8A8", "W4A8,group_size=32", "W4A16,group_size=32"]
    assert span(made, "model.layers.0.self_attn.q_proj.weight") > 0


def test_smoothing_tames_outliers(tiny_llama: Path, tmp_path: Path) -> None:
    """Inputs with a few large channels: SmoothQuant before rounding brings the model nearer to its original."""
    from transformers import AutoModelForCausalLM

    rough = tmp_path / "rough"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 60
            layer.post_attention_layernorm.weight[:2] *= 60
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                         layer.mlp.gate_proj, layer.mlp.up_proj):  # fmt: skip
                part.weight[:, :2] /= 60
    model.save_pretrained(rough)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (rough / name).write_bytes((tiny_llama / name).read_bytes())
    tokens, distance = list(range(3, 60)), {}
    from wherry.runtimes import torch as runtime

    want = runtime.over(Checkpoint.open(rough)).score(tokens).logits
    for first in ("", "smoothquant | "):
        made = compress(rough, tmp_path / f"out{len(first)}", f"{first}rtn:scheme=W8A8_STATIC")
        distance[first] = float(((runtime.over(made).score(tokens).logits - want) ** 2).mean())
    assert distance["smoothquant | "] < 0.5 * distance[""]


@pytest.mark.parametrize("first", ["W8A8", "W8A8_STATIC", "W4A8,group_size=32"])
def test_later_blocks_see_what_was_rounded(first: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The range kept for the second block is that of what it is given where all before it is rounded."""
    from wherry.runtimes import torch as runtime

    recipe = f"gptq:scheme={first},targets=re:.*layers[.]0[.].* | gptq:scheme=W8A8_STATIC"
    made = compress(tiny_llama, tmp_path / "out", recipe)
    session, caught = runtime.over(made), []
    layer = session.module.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten()), prepend=True)
    for batch in deliver.calibration(Checkpoint.open(tiny_llama), data.read(data.shipped("calibration")), 6, 48, 0):
        with torch.no_grad():
            session.module(**{key: torch.from_numpy(value) for key, value in batch.items()})
    x = torch.cat(caught)
    assert span(made, "model.layers.1.self_attn.q_proj.weight") == pytest.approx(float(x.max() - x.min()), rel=1e-5)


def test_tuning_tells_the_distance_of_the_model_that_runs_in_integers(tiny_llama: Path, tmp_path: Path) -> None:
    from wherry.runtimes import torch as runtime

    made = compress(tiny_llama, tmp_path / "out", "rtn:scheme=W8A8 | tune:epochs=1")
    notes = [note for row in Artifact.open(tmp_path / "out").manifest["plan"] for note in row.get("notes", [])]
    note = next(note for note in notes if "before tuning" in note)
    said = float(note.rpartition("tuning, ")[2].removesuffix(" after"))
    source, found = data.read(data.shipped("calibration")), []
    for batch in deliver.calibration(Checkpoint.open(tiny_llama), source, 6, 48, 0):
        given = {key: torch.from_numpy(value) for key, value in batch.items()}
        with torch.no_grad():
            p, q = (runtime.over(each).module(**given).logits.flatten(0, 1).log_softmax(-1)
                    for each in (Checkpoint.open(tiny_llama), made))  # fmt: skip
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert said == pytest.approx(sum(found) / len(found), rel=0.01)
