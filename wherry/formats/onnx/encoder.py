"""Sentence encoders as ONNX: torch.onnx.export of module and pooling, quantized layers drawn as ONNX operators.

Idea:   every Linear and Embedding with codes is replaced by a module whose forward pass names the ONNX operators
        to write, so nothing has to be found again in the exported graph:
        W4A16, W8A16   MatMulNBits, as in language models
        W8A8_STATIC    QuantizeLinear(x) ... DequantizeLinear(codes): ONNX Runtime fuses them to one int8 product
        W8A8           the same after dividing each token by its own scale, which is multiplied back: per token, as
                       planned, where ONNX's own DynamicQuantizeLinear would be per tensor
        Embedding      GatherBlockQuantized
Shapes: inputs int64 [batch, sequence], both free; output `embedding` float32 [batch, width].
Cost:   the module once in memory with decoded small tensors; half a minute for six layers, nearly all in torch.export.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from wherry.checkpoint import Checkpoint, put
from wherry.errors import Unsupported
from wherry.formats.onnx.decoder import quiet
from wherry.graph import edit
from wherry.graph.blocks import Blocks, blocks, pack
from wherry.scheme import QTensor
from wherry.task import Task

OPSET = 21
# attribute of a layer below -> what its tensor is called in the file, after the weight's name
PARTS = {"codes": edit.CODES, "scales": edit.SCALES, "zeros": edit.ZEROS, "rows": edit.TRANSPOSED}
PARTS |= {"left": edit.LEFT, "right": edit.RIGHT}


class Pooled(torch.nn.Module):
    """An encoder with the task's pooling: tokens in, sentence embedding out."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.pooling, self.normalize = model, task.pooling, task.normalize

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embedding [batch, width]; the same arithmetic as Task.answer."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self.normalize:
            pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return pooled


def operator(kind: str, *inputs: torch.Tensor, dtype: torch.dtype, shape: Any, **attributes: Any) -> torch.Tensor:
    """One ONNX operator with one output, written as it is into the export."""
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=tuple(shape))


class Layer(torch.nn.Module):
    """A Linear or Embedding that writes ONNX operators. name: of its weight."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    rows: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor

    def __init__(
        self, name: str, bias: torch.nn.Parameter | None = None, **tensors: torch.Tensor | np.ndarray | None
    ) -> None:
        super().__init__()
        self.name, self.bias = name, bias
        for key, tensor in tensors.items():
            if tensor is not None:
                self.register_buffer(key, tensor if isinstance(tensor, torch.Tensor) else torch.from_numpy(tensor))

    def biased(self, y: torch.Tensor) -> torch.Tensor:
        """With the bias, where there is one."""
        return y if self.bias is None else y + self.bias


class Float(Layer):
    """A Linear that stays float: its weight is stored [k, n], as MatMul reads it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., k] to [..., n]."""
        return self.biased(x @ self.rows)


class Blocked(Layer):
    """A Linear with blocked codes and float activations; left [rank, n] and right [k, rank] correct it."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, name: str, bias: torch.nn.Parameter | None, tensor: QTensor, level: int) -> None:
        weight = blocks(tensor)
        zeros = None if weight.zeros is None else pack(weight.zeros, weight.bits)
        thin = {side: None if t is None else t.T.contiguous() for side, t in
                (("left", tensor.left), ("right", tensor.right))}  # fmt: skip
        super().__init__(name, bias, codes=weight.codes, scales=weight.scales, zeros=zeros, **thin)
        self.weight, self.level, self.thin = weight, level, tensor.left is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., k] to [..., n]."""
        w = self.weight
        inputs = [x, self.codes, self.scales, *([] if w.zeros is None else [self.zeros])]
        facts = {"K": w.k, "N": w.n, "bits": w.bits, "block_size": w.size, "accuracy_level": self.level}
        kind = f"{edit.MICROSOFT}::MatMulNBits"
        y = operator(kind, *inputs, dtype=torch.float32, shape=(*x.shape[:-1], w.n), **facts)
        return self.biased(y + (x @ self.right) @ self.left if self.thin else y)


class Integer(Layer):
    """A Linear whose product runs in int8. Codes [k, n], scales [n]; the input's scale is given, or found per token."""

    def __init__(self, name: str, bias: torch.nn.Parameter | None, weight: QTensor) -> None:
        step, offset = torch.ones(()), torch.tensor(128, dtype=torch.uint8)
        if weight.activation_scale is not None and weight.activation_zero is not None:
            step = weight.activation_scale.float().reshape(())
            offset = (weight.activation_zero.reshape(()).int() + 128).to(torch.uint8)
        scales = weight.scale.float().reshape(-1)
        zeros = torch.zeros(len(scales), dtype=torch.int8)
        super().__init__(
            name, bias, codes=weight.code.T.contiguous(), scales=scales, zeros=zeros, step=step, offset=offset
        )
        self.dynamic = weight.activation_scale is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., k] to [..., n]. A token's largest value gets code 127; by 2 / 255 it would lie on a tie, 127.5."""
        token = (x.abs().amax(-1, keepdim=True) * (1 / 127)).clamp(min=1e-30) if self.dynamic else None
        x = x if token is None else x / token
        q = operator("QuantizeLinear", x, self.step, self.offset, dtype=torch.uint8, shape=x.shape)
        x = operator("DequantizeLinear", q, self.step, self.offset, dtype=torch.float32, shape=x.shape)
        shape = self.codes.shape
        w = operator("DequantizeLinear", self.codes, self.scales, self.zeros, dtype=torch.float32, shape=shape, axis=1)
        y = x @ w
        return self.biased(y if token is None else y * token)


class Table(Layer):
    """An Embedding with blocked codes."""

    def __init__(self, name: str, weight: Blocks) -> None:
        zeros = None if weight.zeros is None else weight.zeros[:, :, None].copy()
        super().__init__(name, codes=weight.codes, scales=weight.scales[:, :, None].copy(), zeros=zeros)
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [batch, sequence] to [batch, sequence, k]."""
        w = self.weight
        inputs = [self.codes, ids, self.scales, *([] if w.zeros is None else [self.zeros])]
        facts = {"bits": w.bits, "block_size": w.size, "gather_axis": 0, "quantize_axis": 2}
        shape = (*ids.shape, w.k // w.size, w.size)
        kind = f"{edit.MICROSOFT}::GatherBlockQuantized"
        return operator(kind, *inputs, dtype=torch.float32, shape=shape, **facts).flatten(-2)


def build(checkpoint: Checkpoint, out: Path, exact: bool) -> None:
    """Write model.onnx and model.onnx.data into `out`. exact: see decoder.build."""
    module: Any = checkpoint.skeleton()
    module.set_attn_implementation("eager")
    if hasattr(module, "pooler"):
        module.pooler = None  # a sentence embedding does not use it; its weights are left out of the file
    places = checkpoint.places(module)
    dress(module, checkpoint, places, 0 if exact else 4)
    model = trace(Pooled(module, checkpoint.task).eval(), checkpoint.task, places)
    if exact:
        edit.halve(model.graph)
    edit.write(model, out / "model.onnx")


def dress(module: torch.nn.Module, checkpoint: Checkpoint, places: dict[str, str], level: int) -> None:
    """Replace every quantized layer by one of those above, and fill in the float tensors."""
    for path, child in list(module.named_modules()):
        weight = places.get(f"{path}.weight")
        if weight is None or not isinstance(child, torch.nn.Linear | torch.nn.Embedding):
            continue
        tensor = checkpoint.tensor(weight)
        bias = None
        if f"{path}.bias" in places:
            bias = torch.nn.Parameter(checkpoint.weight(places[f"{path}.bias"]), requires_grad=False)
        layer: Layer
        if isinstance(child, torch.nn.Embedding):
            if not isinstance(tensor, QTensor):
                continue
            layer = Table(weight, blocks(tensor))
        elif not isinstance(tensor, QTensor):
            layer = Float(weight, bias, rows=tensor.float().T.contiguous())
        elif tensor.scheme.activations is not None:
            if not tensor.scheme.activations.dynamic and tensor.activation_scale is None:
                raise Unsupported(
                    f"onnx: {weight} wants static activations, and its checkpoint holds no scale for them"
                )
            layer = Integer(weight, bias, tensor)
        else:
            layer = Blocked(weight, bias, tensor, level)
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, layer)
    for parameter, _ in list(module.named_parameters()):
        if parameter in places:
            put(module, parameter, checkpoint.weight(places[parameter]))


def trace(module: Pooled, task: Task, places: dict[str, str]) -> ir.Model:
    """Export with free batch and sequence; initializers are named after their weights."""
    inputs = {name: torch.from_numpy(value) for name, value in task.batch(task.examples()).items()}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=task.axes,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many kinds: all of them mean that it cannot take this model
            reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
            raise Unsupported(f"onnx: torch.onnx.export cannot take {type(module.model).__name__}: {reason}") from error
    assert program is not None
    model: ir.Model = program.model
    rename(model.graph, module, places)
    tidy(model)
    return model


def tidy(model: ir.Model) -> None:
    """What the exporter's own optimizer does, but for merging weights that happen to be equal: each keeps its name."""
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    rewriter.rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # the exporter's notes hold paths of this machine


def rename(graph: ir.Graph, module: Pooled, places: dict[str, str]) -> None:
    """Name tensors after the checkpoint's weights and the output `embedding`; nothing else may hold that name."""
    for node in graph:
        for value in node.outputs:
            if value.name == "embedding":
                value.name = "rows_of_embedding"
    graph.outputs[0].name = "embedding"
    layers = {path: child.name for path, child in module.named_modules() if isinstance(child, Layer)}
    for old in list(graph.initializers):
        path, _, leaf = old.rpartition(".")
        if path in layers:
            value = graph.initializers[old]
            new = layers[path].removesuffix("weight") + "bias" if leaf == "bias" else layers[path] + PARTS.get(leaf, "")
            if leaf in ("step", "offset"):
                assert value.const_value is not None
                new = f"{leaf}_{value.const_value.numpy().item()!r}"
        else:
            new = places.get(old.removeprefix("model."), old)
        if new == old:
            continue
        if new in graph.initializers:  # the scale of an input that several layers share
            ir.convenience.replace_all_uses_with(graph.initializers.pop(old), graph.initializers[new])
        else:
            value = graph.initializers.pop(old)
            value.name = new
            graph.register_initializer(value)
