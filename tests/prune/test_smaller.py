"""Steps that make a model smaller, in recipes, on real exports, and with their refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wherry
from tests.conftest import write_llama, write_tokenizer, write_wordpiece
from wherry import dependency
from wherry.checkpoint import Checkpoint
from wherry.dependency import choose, kinds
from wherry.dependency.blocks import influence, merge
from wherry.errors import BadInput, Unsupported
from wherry.prune.depth import Depth
from wherry.prune.vocabulary import Vocabulary
from wherry.prune.width import Width

IDS = [{"input_ids": np.random.default_rng(i).integers(0, 512, (4, 24))} for i in range(2)]


@pytest.mark.slow
def test_a_recipe_of_stages_exports_to_gguf_and_onnx(tmp_path: Path) -> None:
    """Width, depth, then codes: every export is loaded and proved against the checkpoint by `compress` itself."""
    source, out = write_llama(tmp_path / "llama", layers=3), tmp_path / "out"
    recipe = "width:neurons=0.5,heads=2 | depth:layers=2 | rtn:scheme=W8A16,group_size=32"
    wherry.compress(source, out, recipe, formats=("gguf", "onnx"), samples=4, length=32)
    config = json.loads((out / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (64, 2, 1)
    assert config["num_hidden_layers"] == 2
    assert (out / "gguf" / "wherry.json").exists()
    assert (out / "onnx" / "wherry.json").exists()


@pytest.mark.parametrize(
    ("recipe", "entry", "wanted"),
    [("width:neurons=0.5", "intermediate_size", 64), ("depth:layers=2", "num_hidden_layers", 2),
     ("width:heads=2", "num_attention_heads", 2)],
)  # fmt: skip
def test_a_step_alone_begins_with_the_model_that_is_there(recipe: str, entry: str, wanted: int, tmp_path: Path) -> None:
    """Not with what the plan expects of it: once as much goes as was asked for, and what stays is what it was."""
    source = write_llama(tmp_path / "llama", layers=3)
    plan = wherry.plan(source, recipe)
    assert plan.before > plan.after
    report = wherry.compress(source, tmp_path / "out", recipe, samples=4, length=32)
    assert report.get("verdict").value == "PASS"
    made, dense = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert made.config[entry] == wanted
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(made.tensor(name), dense.tensor(name))
    assert not any(torch.equal(made.weight(name), torch.zeros(made.shape(name))) for name in made.names())


def test_experts_of_a_folder_that_stores_them_one_by_one(tmp_path: Path) -> None:
    """As the hub has them: transformers renames and fuses them. Through the verbs, then by stock transformers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    source, out, ids = tmp_path / "moe", tmp_path / "out", torch.from_numpy(IDS[0]["input_ids"])
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(source)
    write_tokenizer(source)
    assert any(".experts.0." in name for name in Checkpoint.open(source).names())
    assert wherry.plan(source, "experts:experts=2").before > wherry.plan(source, "experts:experts=2").after
    assert wherry.compress(source, out, "experts:experts=2", samples=4, length=32).get("verdict").value == "PASS"
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert stock.config.num_experts == 2
    with torch.no_grad():
        torch.testing.assert_close(Checkpoint.open(out).module()(ids).logits, stock(ids).logits)
        assert not torch.equal(stock(ids).logits, Checkpoint.open(source).module()(ids).logits)
    with pytest.raises(Unsupported, match="fused experts"):
        wherry.plan(source, "rtn:scheme=W8A16,group_size=16")


def test_repair_keeps_more(tmp_path: Path) -> None:
    """Distance of the logits on other inputs: solved again < left as it is."""
    checkpoint = Checkpoint.open(write_llama(tmp_path / "llama"))
    dense, x = checkpoint.module(), torch.from_numpy(np.random.default_rng(9).integers(0, 512, (4, 24)))
    many = [{"input_ids": np.random.default_rng(i).integers(0, 512, (16, 32))} for i in range(10, 16)]
    far = {}
    for repair in (True, False):
        out = tmp_path / f"out-{repair}"
        out.mkdir()
        Width(neurons="0.5", repair=repair).remake(checkpoint, out, many, lambda *_: None)
        with torch.no_grad():
            far[repair] = float((Checkpoint.open(out).module()(x).logits - dense(x).logits).square().mean())
    assert far[True] < far[False]


def test_influence_is_one_minus_the_cosine(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_llama(tmp_path / "llama", layers=3))
    module, data = checkpoint.module(), [{k: torch.from_numpy(v) for k, v in batch.items()} for batch in IDS]
    found = influence(module, module.model.layers, data)
    with torch.no_grad():
        states = [module(**batch, output_hidden_states=True).hidden_states for batch in data]
    for layer in (0, 1):  # the last state has gone through the last norm
        pairs = [(s[layer], s[layer + 1]) for s in states]
        wanted = np.mean([1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairs])
        assert found[layer] == pytest.approx(wanted, rel=1e-4)


def test_merging_adds_what_the_dropped_differ() -> None:
    stack = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    weights = [layer.weight.detach().clone() for layer in stack]
    merge(stack, [1, 2])
    torch.testing.assert_close(stack[0].weight.detach(), weights[1] + weights[2] - weights[0])


def test_an_empty_layer_goes_first(tmp_path: Path) -> None:
    """A layer that writes nothing into the stream has no influence, and nothing changes without it."""
    from safetensors.torch import load_file, save_file

    source = write_llama(tmp_path / "llama", layers=4)
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(source)
    (tmp_path / "out").mkdir()
    Depth(layers="3").remake(checkpoint, tmp_path / "out", IDS, lambda *_: None)
    x = torch.from_numpy(IDS[0]["input_ids"])
    with torch.no_grad():
        found = Checkpoint.open(tmp_path / "out").module()(x).logits
        torch.testing.assert_close(found, checkpoint.module()(x).logits)


def test_perplexity_is_measured_without_each_layer(tmp_path: Path) -> None:
    """The layer that goes is the one without which transformers' own loss is least."""
    checkpoint = Checkpoint.open(write_llama(tmp_path / "llama", layers=3))
    losses = []
    for drop in range(3):
        module = checkpoint.module()
        del module.model.layers[drop]
        with torch.no_grad():
            ids = [torch.from_numpy(batch["input_ids"]) for batch in IDS]
            losses.append(sum(float(module(x, labels=x, use_cache=False).loss) for x in ids))
    module = checkpoint.module()
    data = [{k: torch.from_numpy(v) for k, v in batch.items()} for batch in IDS]
    step = Depth(layers="2", importance="perplexity")
    assert step.chosen(module, "model.layers", 1, data, lambda *_: None) == [int(np.argmin(losses))]


def test_vocabulary_keeps_what_is_used(tmp_path: Path) -> None:
    """Texts of kept tokens give the same states; a dropped word is spelled from characters."""
    checkpoint = Checkpoint.open(write_wordpiece(tmp_path / "bert"))
    (tmp_path / "out").mkdir()
    texts = ["the old boat", "river cargo boating"]
    step = Vocabulary(tokens="128", multiple=16)
    step.remake(checkpoint, tmp_path / "out", [checkpoint.task.batch(texts)], lambda *_: None)
    made = Checkpoint.open(tmp_path / "out")
    assert made.config["vocab_size"] == 128
    assert {n: made.shape(n) for n in made.names()} == {
        n: step.expect(checkpoint).shape(n) for n in step.expect(checkpoint).names()
    }
    for text in texts:
        states = []
        for one in (checkpoint, made):
            batch = {k: torch.from_numpy(v) for k, v in one.task.batch([text]).items()}
            with torch.no_grad():
                states.append(one.module()(**batch).last_hidden_state)
        torch.testing.assert_close(states[1], states[0])
    assert made.task.tokenizer.encode("w447").tokens != ["[CLS]", "w447", "[SEP]"]
    with pytest.raises(BadInput, match="must stay"):
        Vocabulary(tokens="16", multiple=16).expect(checkpoint)
    with pytest.raises(BadInput, match="leaves all 512"):
        Vocabulary(tokens="512").expect(checkpoint)
    with pytest.raises(Unsupported, match="WordPiece"):
        Vocabulary().expect(Checkpoint.open(write_llama(tmp_path / "llama")))


def test_a_graph_is_pruned_by_budget_and_written_again(tmp_path: Path) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1, groups=32),
        torch.nn.Conv2d(32, 24, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(24, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    wherry.capture(net, tmp_path / "graph", {"input": x})
    checkpoint = Checkpoint.open(tmp_path / "graph")
    (tmp_path / "out").mkdir()
    batches = [{"input": torch.randn(8, 3, 8, 8).numpy()} for _ in range(2)]
    Width(parameters=0.4, multiple=4).remake(checkpoint, tmp_path / "out", batches, lambda *_: None)
    made = Checkpoint.open(tmp_path / "out")
    assert made.params <= 0.6 * checkpoint.params
    (tmp_path / "whole").mkdir()
    Width(parameters=0.4).remake(checkpoint, tmp_path / "whole", batches, lambda *_: None)
    graph: Any = Checkpoint.open(tmp_path / "whole").graph
    assert {len(graph.read(name)) for name in graph.layers} == {16, 5}  # 32 and 24 lanes, to whole blocks of 16; logits
    with pytest.raises(BadInput, match="at most"):
        Width(parameters=0.99, multiple=4).remake(checkpoint, tmp_path / "no", batches, lambda *_: None)
    with pytest.raises(Unsupported, match="width"):
        Depth(layers="2").expect(checkpoint)
    with pytest.raises(Unsupported, match="WordPiece"):
        Vocabulary().expect(checkpoint)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_a_budget_takes_what_matters_least_for_its_cost(target: float) -> None:
    """Against the list of all groups in the order of score / (parameters of one), cut where the budget is met."""
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)
    )
    graph = dependency.graph(net, {"input": torch.randn(2, 4)})
    families = kinds.families(graph, None)
    one = {12: 4 + 1 + 40, 40: 12 + 1 + 3}  # a row, a bias, a column
    random = np.random.default_rng(3)
    scores = {f: random.uniform(0.1, 1, len(f.groups)) * (3 if len(f.groups) == 12 else 1) for f in families}
    stay = choose.ranked(graph, families, scores, target, "parameters", 1)

    def left(a: int, b: int) -> int:
        return 4 * a + a + a * b + b + b * 3 + 3

    density = sorted((s / one[len(f.groups)], len(f.groups)) for f in families for s in scores[f])
    for gone in range(len(density)):
        a, b = (n - sum(size == n for _, size in density[:gone]) for n in (12, 40))
        if left(a, b) <= (1 - target) * left(12, 40):
            break
    assert {len(f.groups): n for f, n in stay.items()} == {12: a, 40: b}
    assert a < 12
    assert b < 40
