"""What QAT trained is what ships: rtn finds the codes, GGUF and ONNX answer with the trained model's loss."""

from pathlib import Path

import pytest
import torch

from tests.conftest import write_llama
from wherry import api, shelf
from wherry.artifact import Artifact
from wherry.checkpoint import Checkpoint
from wherry.data import shipped
from wherry.train import loop
from wherry.train.job import Job

CASES = (("W2A16_ASYM,group_size=32", ("gguf", "onnx")),)


@pytest.mark.parametrize(("scheme", "formats"), CASES, ids=[name for name, _ in CASES])
def test_every_export_has_the_trained_models_loss(tmp_path: Path, scheme: str, formats: tuple[str, ...]) -> None:
    model, text = write_llama(tmp_path / "m", hidden=128), tmp_path / "text.txt"
    text.write_text(shipped("calibration").read_text(encoding="utf8")[:20_000], encoding="utf8")
    loop.run(Job(
        model=str(model), teacher=str(model), out=str(tmp_path / "trained"), data=str(text), length=24, steps=6,
        recipe=f"kl | qat:scheme={scheme}", learning_rate=2e-3, batch=4, threads=1,
    ))  # fmt: skip
    trained = Checkpoint.open(tmp_path / "trained")
    # the embedding is rounded to 8 bits by compressing; take it from there, so that the linears alone are compared
    api.compress(str(tmp_path / "trained"), tmp_path / "out", recipe=f"rtn:scheme={scheme}", formats=formats)
    packed = Checkpoint.open(tmp_path / "out")
    linears = [name for name in packed.names() if packed.scheme(name) is not None and "proj" in name]
    assert len(linears) == 14
    for name in linears:
        assert torch.equal(packed.weight(name), trained.weight(name))
        assert not torch.equal(packed.weight(name), Checkpoint.open(model).weight(name))
    module, table = trained.module(), packed.weight("model.embed_tokens.weight")
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(table)  # type: ignore[operator,union-attr]
        ids = torch.tensor(trained.task.encode(text.read_text())[:64])
        wanted = torch.nn.functional.cross_entropy(module(ids[None]).logits[0, :-1], ids[1:])
    for form in formats:
        artifact = Artifact.open(tmp_path / "out" / form)
        session = shelf.find("runtimes", {"gguf": "llamacpp", "onnx": "onnxruntime"}[form]).load(artifact, "cpu", 1)
        got = -float(session.score(ids.tolist()).logprob.mean())
        session.close()
        assert got == pytest.approx(float(wanted), abs=2e-3), form
