"""Healing in a recipe, students from a teacher's layers, own samples."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.conftest import write_llama, write_wordpiece
from tests.train.conftest import cnn, pictures
from wherry import api, shelf
from wherry.checkpoint import Checkpoint
from wherry.data import read, shipped
from wherry.distill.heal import Heal
from wherry.distill.onpolicy import OnPolicy
from wherry.errors import BadInput, Unsupported
from wherry.evaluate import similarity
from wherry.objective import IGNORE
from wherry.train import start


def distance(folder: Path, teacher: Path) -> float:
    ids = torch.tensor(Checkpoint.open(teacher).task.encode(shipped("calibration").read_text()[:4000]))[:512]
    with torch.no_grad():
        p, q = (Checkpoint.open(f).module()(ids.reshape(8, -1)).logits.log_softmax(-1) for f in (teacher, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_recipe_heals_between_pruning_and_rounding(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", layers=3)
    found = {}
    cut = "depth:drop=1 | magnitude:sparsity=0.5"
    for name, recipe in (("cut", cut), ("healed", f"{cut} | heal:steps=25,batch=4,lr=0.003")):
        out = tmp_path / name
        api.compress(str(model), out, recipe=f"{recipe} | rtn:scheme=W8A16,group_size=32", samples=16, length=32)
        found[name] = distance(out, model)
        weights = [Checkpoint.open(out).weight(n) for n in Checkpoint.open(out).names() if "proj" in n]
        assert len(weights) == 14
        assert all(float((w == 0).float().mean()) >= 0.499 for w in weights)  # zeros stay zeros
    assert found["healed"] < 0.8 * found["cut"]


def embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    session = shelf.find("runtimes", "torch").over(checkpoint)
    return similarity.embed(session, checkpoint.task, texts)


def test_an_encoder_heals_on_sentences(tmp_path: Path) -> None:
    """Embeddings of other texts come nearer to the original's, also through a smaller table; the export is proved."""
    model, data = write_wordpiece(tmp_path / "bert"), tmp_path / "sentences.txt"
    data.write_text("\n".join(f"the old w{i} on w{2 * i} river boating" for i in range(150)))
    (tmp_path / "short.txt").write_text("\n".join(f"w{i} boat" for i in range(150)))  # other lengths in one batch
    texts = [f"boating w{2 * i} cargo w{i}" for i in range(100)]
    cut = "width:neurons=0.75 | vocabulary:tokens=128,multiple=16"
    heal = f"heal:steps=60,batch=8,lr=0.001,data={data};{tmp_path / 'short.txt'}*0.5"
    near, true = {}, embeddings(model, texts)
    for name, recipe in (("cut", cut), ("healed", f"{cut} | {heal},options=length=16;warmup=2")):
        report = api.compress(str(model), tmp_path / name, recipe, data_file=data, samples=8, formats=("onnx",))
        assert report.get("check: tokenizer", "onnx").value is True, report.get("check: tokenizer", "onnx").note
        near[name] = float((embeddings(tmp_path / name, texts) * true).sum(1).mean())
    assert 1 - near["healed"] < 0.8 * (1 - near["cut"])


def test_calibration_follows_a_smaller_table(tmp_path: Path) -> None:
    """Static ranges after tokens went: the inputs are cut into the tokens that are left, not looked up beyond them."""
    model, data = write_wordpiece(tmp_path / "bert"), tmp_path / "sentences.txt"
    data.write_text("\n".join(f"w{i} and the old boat" for i in range(300, 400)))
    recipe = "vocabulary:tokens=128,multiple=16 | rtn:scheme=W8A8_STATIC"
    report = api.compress(str(model), tmp_path / "out", recipe, data_file=data, samples=8, formats=("onnx",))
    assert report.get("check: no NaN or infinity", "onnx").value is True
    assert Checkpoint.open(tmp_path / "out").config["vocab_size"] == 128


def test_a_graph_heals_on_pictures(tmp_path: Path) -> None:
    """The smaller net's classes come nearer to those of the whole one, by KL."""
    model, data = cnn(tmp_path / "net", "batch"), pictures(tmp_path / "data")
    x = Checkpoint.open(model).task.prepare(read(data).examples)["input"]

    def logits(folder: Path) -> np.ndarray:
        with_graph = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        return np.asarray(with_graph.run(None, {"input": x})[0])

    far, cut = {}, "width:parameters=0.6,multiple=2,repair=false"
    losses = "kl:temperature=2;weight=0.9+ce:weight=0.01"
    heal = f"heal:epochs=30,batch=12,lr=0.01,data={data},losses={losses}"
    for name, recipe in (("cut", cut), ("healed", f"{cut} | {heal}")):
        api.compress(str(model), tmp_path / name, recipe, data_file=data, samples=32)
        p, q = (torch.from_numpy(logits(folder)).log_softmax(-1) for folder in (model, tmp_path / name))
        far[name] = float((p.exp() * (p - q)).sum(-1).mean())
    assert far["healed"] < 0.5 * far["cut"]
    assert Checkpoint.open(tmp_path / "healed").params == Checkpoint.open(tmp_path / "cut").params


def test_what_cannot_be_healed_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(BadInput, match="one step"):
        Heal(steps=0)
    with pytest.raises(BadInput, match="no knob 'momentun'"):
        Heal(options=("momentun=0.9",))
    with pytest.raises(BadInput, match="no knob 'teacher'"):
        Heal(options=("teacher=x",))
    with pytest.raises(BadInput, match="sentences.txt"):
        Heal().expect(Checkpoint.open(tiny_bert))
    with pytest.raises(BadInput, match="labels"):
        Heal().expect(Checkpoint.open(cnn(tmp_path / "net", "group")))
    with pytest.raises(BadInput, match="no such data"):
        Heal(data="nowhere.txt").expect(Checkpoint.open(write_llama(tmp_path / "m")))
    (tmp_path / "t.txt").write_text("no labels\n")
    with pytest.raises(BadInput, match="no labels"):
        Heal(data=str(tmp_path / "t.txt")).expect(Checkpoint.open(tmp_path / "net"))
    graph = tmp_path / "graph"
    api.capture(torch.nn.Linear(4, 4), graph, {"input": torch.randn(2, 4)})
    with pytest.raises(Unsupported, match="graphs that classify"):
        Heal(data=str(graph)).expect(Checkpoint.open(graph))


def test_a_start_from_the_teachers_layers(tmp_path: Path) -> None:
    teacher = Checkpoint.open(write_llama(tmp_path / "t", layers=5))
    assert start.kept("teacher:layers=3", teacher) == [0, 2, 4]
    assert start.kept("teacher:keep=1;4", teacher) == [1, 4]
    assert start.kept("teacher", teacher, teacher.config | {"num_hidden_layers": 2}) == [0, 4]
    for wrong in ("teacher:layers=6", "teacher:keep=4;1", "teacher:keep=9", "friend", "teacher:width=3"):
        with pytest.raises(BadInput):
            start.kept(wrong, teacher)
    (tmp_path / "s").mkdir()
    start.write(teacher, [0, 3], tmp_path / "s")
    student, module = Checkpoint.open(tmp_path / "s"), teacher.module()
    module.model.layers = torch.nn.ModuleList([module.model.layers[i] for i in (0, 3)])
    for i, layer in enumerate(module.model.layers):
        layer.self_attn.layer_idx = i
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(student.module()(ids).logits, module(ids, use_cache=False).logits)


def test_own_samples_follow_the_students_distribution(tmp_path: Path) -> None:
    """The first token after the prompt is drawn as softmax(logits / T) says (chi square, 3 000 draws)."""
    module = Checkpoint.open(write_llama(tmp_path / "m", layers=1)).module()
    prompt = torch.arange(1, 5)
    batch = {"input_ids": prompt.repeat(3000, 2), "targets": torch.zeros(3000, 8, dtype=torch.int64)}
    step = OnPolicy(share=1.0, prompt=4, temperature=0.5)
    torch.manual_seed(0)
    made = step.sample(module, {k: v[:, :5] for k, v in batch.items()}, 0)
    assert made["input_ids"].shape == made["targets"].shape == (3000, 5)
    assert torch.equal(made["input_ids"][:, :4], prompt.repeat(3000, 1))
    assert torch.equal(made["input_ids"][:, 4], made["targets"][:, 3])
    assert bool((made["targets"][:, :3] == IGNORE).all())
    with torch.no_grad():
        p = (module(prompt[None]).logits[0, -1] / 0.5).softmax(-1).numpy()
    top = np.argsort(-p)[:8]
    drawn = np.bincount(made["input_ids"][:, 4].numpy(), minlength=len(p))[top]
    sigma = np.sqrt(3000 * p[top] * (1 - p[top]))
    assert (np.abs(drawn - 3000 * p[top]) < 4.5 * sigma + 1).all()


def test_own_samples_take_turns_by_the_share() -> None:
    turns = [OnPolicy(share=0.3).turn(i) for i in range(2000)]
    assert 0.26 < np.mean(turns) < 0.34
    assert turns == [OnPolicy(share=0.3).turn(i) for i in range(2000)]
    assert not any(OnPolicy(share=0.0).turn(i) for i in range(50))
    with pytest.raises(BadInput):
        OnPolicy(share=2.0)
