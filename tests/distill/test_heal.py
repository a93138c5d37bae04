"""Healing in a recipe, students from a teacher's layers, own samples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_llama
from wherry import api
from wherry.checkpoint import Checkpoint
from wherry.data import shipped
from wherry.distill.onpolicy import OnPolicy
from wherry.errors import BadInput, Unsupported
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


def test_graphs_and_bad_knobs_are_refused(tmp_path: Path, tiny_bert: Path) -> None:
    from wherry.distill.heal import Heal

    with pytest.raises(BadInput, match="one step"):
        Heal(steps=0)
    with pytest.raises(Unsupported, match="running text"):
        Heal().expect(Checkpoint.open(tiny_bert))
    with pytest.raises(BadInput, match="no such data"):
        Heal(data="nowhere.txt").expect(Checkpoint.open(write_llama(tmp_path / "m")))


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
