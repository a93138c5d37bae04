"""Thirteen architectures, seeded, tiny: pruned in width and depth, reloaded by stock transformers.

Pruned logits == logits of the dense model with the same weights at zero, where that is exact: neurons, heads, layers.
Hidden size has its own reference: the dense model with lanes at zero, whose norms measure over those that stay.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wherry.checkpoint import Checkpoint
from wherry.dependency import choose, folder, importance
from wherry.dependency.cut import mask_out
from wherry.errors import BadInput, Unsupported
from wherry.prune.depth import Depth
from wherry.prune.width import Width

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
# name -> (class, configuration, kind of task, whether its configuration can say fewer heads)
MODELS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("LlamaForCausalLM", COMMON | {"tie_word_embeddings": True}, "text-generation", True),
    "qwen2": ("Qwen2ForCausalLM", COMMON, "text-generation", True),
    "qwen3": ("Qwen3ForCausalLM", COMMON | {"head_dim": 8}, "text-generation", True),
    "gemma": ("GemmaForCausalLM", COMMON | {"head_dim": 8, "tie_word_embeddings": True}, "text-generation", True),
    "phi3": ("Phi3ForCausalLM", COMMON, "text-generation", True),
    "mixtral": ("MixtralForCausalLM", COMMON | {"num_local_experts": 4}, "text-generation", True),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        COMMON | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
        "text-generation", True,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
        "text-generation", False,
    ),
    "opt": ("OPTForCausalLM", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "text-generation", False),
    "bert": ("BertModel", COMMON, "sentence-similarity", False),
    "vit": (
        "ViTForImageClassification", COMMON | {"image_size": 16, "patch_size": 8}, "image-classification", False,
    ),
    "t5": ("T5Model", T5, "feature-extraction", True),
    "whisper": ("WhisperModel", WHISPER, "feature-extraction", False),
}  # fmt: skip


def inputs_of(name: str) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    if name == "t5":
        return {"input_ids": IDS, "decoder_input_ids": IDS}
    if name == "whisper":
        sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
        return {"input_features": sound, "decoder_input_ids": IDS}
    return {"input_ids": IDS}


def write(name: str, path: Path) -> Checkpoint:
    """A seeded model's folder, its norms and biases not trivial."""
    import transformers

    kind, config, task, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind)(transformers.AutoConfig.for_model(name, **config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(path)
    (path / "task.json").write_text(json.dumps({"kind": task}))
    return Checkpoint.open(path)


QUICK = ("llama", "bert", "t5", "gpt2")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module", params=EACH)
def model(request: Any, tmp_path_factory: Any) -> tuple[str, Checkpoint]:
    return request.param, write(request.param, tmp_path_factory.mktemp("arch") / request.param)


def stock(path: Path) -> nn.Module:
    """The folder as stock transformers loads it."""
    import transformers

    config = json.loads((path / "config.json").read_text())
    loaded, facts = getattr(transformers, config["architectures"][0]).from_pretrained(path, output_loading_info=True)
    assert not [key for key in facts["missing_keys"] if "pooler" not in key], facts
    assert not facts["unexpected_keys"]
    assert not facts["mismatched_keys"]
    return loaded.eval()


def results(module: nn.Module, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        out = module(**inputs_of(name))
    names = ("logits", "last_hidden_state", "encoder_last_hidden_state")
    return [out[key] for key in names if out.get(key) is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert a
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y, x, rtol=2e-4, atol=2e-5 * max(1.0, float(x.abs().max())))


def pruned(step: Width, name: str, checkpoint: Checkpoint, out: Path, monkeypatch: Any) -> tuple[nn.Module, nn.Module]:
    """(what stock transformers loads, the dense model with the groups that went at zero)."""
    import wherry.dependency.widths as widths_
    import wherry.prune.width as module_

    gone: list[Any] = []
    keep: dict[str, Any] = {}
    plan = widths_.Widths.plan
    monkeypatch.setattr(module_, "example", lambda _: inputs_of(name))
    monkeypatch.setattr(module_.choose, "removed", lambda *a: gone.extend(choose_removed(*a)) or gone)

    def noted(self: Any, module: nn.Module, given: Any) -> Any:
        keep["dense"] = copy.deepcopy(module)
        keep["graph"] = plan(self, module, given).graph
        return self

    monkeypatch.setattr(widths_.Widths, "plan", noted)
    out.mkdir()
    step.remake(checkpoint, out, [], lambda *_: None)
    expected = step.expect(checkpoint)
    written = Checkpoint.open(out)
    assert {n: written.shape(n) for n in written.names()} == {n: expected.shape(n) for n in expected.names()}
    assert gone
    return stock(out), mask_out(keep["dense"], keep["graph"], gone)


choose_removed = choose.removed


def test_neurons(model: tuple[str, Checkpoint], tmp_path: Path, monkeypatch: Any) -> None:
    name, checkpoint = model
    step = Width(neurons="0.4", importance="magnitude", repair=False, multiple=4)
    small, masked = pruned(step, name, checkpoint, tmp_path / "out", monkeypatch)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    same(results(masked, name), results(small, name))


def test_heads(model: tuple[str, Checkpoint], tmp_path: Path, monkeypatch: Any) -> None:
    name, checkpoint = model
    step = Width(heads="0.5", importance="magnitude", repair=False)
    if not MODELS[name][3]:
        with pytest.raises(Unsupported, match="head"):
            pruned(step, name, checkpoint, tmp_path / "out", monkeypatch)
        return
    small, masked = pruned(step, name, checkpoint, tmp_path / "out", monkeypatch)
    same(results(masked, name), results(small, name))


def test_layers(model: tuple[str, Checkpoint], tmp_path: Path) -> None:
    name, checkpoint = model
    (tmp_path / "out").mkdir()
    Depth(drop=("1",)).remake(checkpoint, tmp_path / "out", [], lambda *_: None)
    dense = folder.module(checkpoint)
    stacks = [m for m in dense.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    for stack in [m for m in stacks if len(m) == 3]:
        del stack[1]
        for number, block in enumerate(stack):
            for part in block.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = number
    if hasattr(dense.config, "layer_types"):
        dense.config.layer_types = dense.config.layer_types[:2]
    dense.config.num_hidden_layers = 2
    same(results(dense, name), results(stock(tmp_path / "out"), name))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_query_heads_go_one_by_one(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = write(name, tmp_path / name)
    step = Width(heads="2", by="queries", importance="magnitude", repair=False)
    small, masked = pruned(step, name, checkpoint, tmp_path / "out", monkeypatch)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 2)
    same(results(masked, name), results(small, name))


@pytest.mark.parametrize(("name", "more"), [("llama", {}), ("gpt2", None), ("qwen3", {}), ("bert", {"heads": "3"})])
def test_hidden_size(name: str, more: dict[str, str] | None, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = write(name, tmp_path / name)
    if more is None:
        with pytest.raises(Unsupported, match="head"):
            pruned(Width(hidden="24"), name, checkpoint, tmp_path / "out", monkeypatch)
        return
    step = Width(hidden="24", importance="magnitude", repair=False, **more)  # type: ignore[arg-type]
    small, masked = pruned(step, name, checkpoint, tmp_path / "out", monkeypatch)
    assert small.config.hidden_size == 24

    def narrow(layer: nn.Module) -> None:
        """Measure over 24 of 32 lanes: those that went are zero, and add nothing to the sums."""
        weight, bias = layer.weight, getattr(layer, "bias", None)
        eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", 0.0))
        kept = (weight != 0).float()  # the weights of norms are not zero elsewhere
        assert int(kept.sum()) == 24

        def forward(x: torch.Tensor) -> torch.Tensor:
            if bias is None:
                return weight * x * ((x * kept).square().sum(-1, keepdim=True) / 24 + eps).rsqrt()
            mean = (x * kept).sum(-1, keepdim=True) / 24
            far = (x - mean) * kept
            return weight * far * (far.square().sum(-1, keepdim=True) / 24 + eps).rsqrt() + bias

        layer.forward = forward  # type: ignore[assignment]

    for layer in masked.modules():
        if "Norm" in type(layer).__name__ and layer.weight.numel() == 32:
            narrow(layer)
    found = results(small, name)
    wanted = results(masked, name)
    if name == "bert":  # its results are as wide as the hidden size
        kept = next(m.weight for m in masked.modules() if isinstance(m, nn.LayerNorm)) != 0
        wanted = [w[..., kept] for w in wanted]
    same(wanted, found)


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (lambda: Width(neurons="1.0"), BadInput, "multiple|keep|least|leaves|stay"),
        (lambda: Width(neurons="49"), BadInput, "there are 48"),
        (lambda: Width(heads="3"), BadInput, "breaks groups"),
        (lambda: Width(heads="many"), BadInput, "no number"),
        (lambda: Width(neurons="nan"), BadInput, "share"),
        (lambda: Width(parameters=0.95), BadInput, "at most"),
        (lambda: Width(), BadInput, "give neurons"),
        (lambda: Width(neurons="0.5", macs=0.3), BadInput, "budget"),
        (lambda: Depth(layers="0.99"), BadInput, "every layer"),
        (lambda: Depth(drop=("0", "1", "2")), BadInput, "every layer"),
        (lambda: Depth(drop=("7",)), BadInput, "no layer 7"),
        (lambda: Depth(layers="2", drop=("1",)), BadInput, "not both"),
        (lambda: Width(neurons="0"), BadInput, "takes nothing"),
        (lambda: Width(neurons="1e-9"), BadInput, "as it is"),
        (lambda: Width(heads="0.01"), BadInput, "as it is"),
        (lambda: Width(neurons="48"), BadInput, "as it is"),
        (lambda: Depth(layers="0"), BadInput, "takes nothing"),
        (lambda: Depth(layers="3"), BadInput, "as it is"),
        (lambda: Depth(drop=("1", "1")), BadInput, "twice"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work(step: Any, error: type, match: str, tmp_path: Path) -> None:
    checkpoint = write("llama", tmp_path / "llama")
    with pytest.raises(error, match=match):
        planned(step, checkpoint)


def planned(step: Any, checkpoint: Checkpoint) -> None:
    made = step()
    made.expect(checkpoint)
    made.remarks(checkpoint)


def test_rounding_is_told(tmp_path: Path) -> None:
    checkpoint = write("llama", tmp_path / "llama")
    said = Width(neurons="30", multiple=16).remarks(checkpoint)[""]
    assert "48 -> 32 (asked for 30, rounded)" in said


def test_importance_is_the_loss_of_least_squares(tmp_path: Path) -> None:
    """hessian: what numpy's least squares leaves, for each neuron of a small layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(200, 5)
    from wherry import dependency
    from wherry.dependency.statistics import inputs_of as gathered

    (groups,) = dependency.graph(net, {"input": x}).families()
    readers = importance.readers(net, groups)
    grams = gathered(net, readers, [{"input": x}], lambda *_: None)
    old, importance.DAMP = importance.DAMP, 1e-12
    try:
        scores = importance.score("hessian", net, groups, grams, [])
    finally:
        importance.DAMP = old
    h = torch.relu(net[0](x)).detach().numpy().astype(np.float64)
    w = net[2].weight.detach().numpy().astype(np.float64)
    for i, score in enumerate(scores):
        rest = np.delete(h, i, 1)
        lost = np.linalg.lstsq(rest, h @ w.T, rcond=None)[1].sum() / len(h)
        np.testing.assert_allclose(score, lost, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("merged", [False, True])
def test_experts(name: str, merged: bool, tmp_path: Path) -> None:
    """A model without some experts is the dense one whose router never sends a token there."""
    from wherry.prune.experts import Experts, mixtures

    checkpoint = write(name, tmp_path / name)
    (tmp_path / "out").mkdir()
    step, batches = Experts(experts="3", merge=merged), [{"input_ids": IDS.numpy()}]
    step.remake(checkpoint, tmp_path / "out", batches, lambda *_: None)
    small, dense = stock(tmp_path / "out"), folder.module(checkpoint)
    found = results(small, name)
    assert all(len(router.weight) == 3 for router, _ in mixtures(small).values())
    for path, (router, experts) in mixtures(dense).items():
        left = mixtures(small)[path][0].weight
        kept = [e for e in range(4) if any(torch.equal(router.weight[e], row) for row in left)]
        assert len(kept) == 3
        forward = router.forward
        router.weight = nn.Parameter(router.weight[kept], requires_grad=False)
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[kept], requires_grad=False)
        experts.down_proj = nn.Parameter(experts.down_proj[kept], requires_grad=False)
        for layer in (router, experts):
            if hasattr(layer, "num_experts"):
                layer.num_experts = 3
        assert forward is not None
    if merged:
        assert (results(dense, name)[0] - found[0]).abs().max() > 1e-4
    else:
        same(results(dense, name), found)
    with pytest.raises(BadInput, match="each token"):
        Experts(experts="1").expect(checkpoint)
    with pytest.raises(Unsupported, match="mixture"):
        Experts().expect(write("llama", tmp_path / "llama"))
