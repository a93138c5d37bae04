"""An ONNX file as an editable torch module: weights in layers, sizes as Python ints, the rest torch functions.

    net = module("model.onnx")                 # torch.fx.GraphModule, in eval mode
    y = net(x)                                 # inputs by position in the file's order, or by name
    torch.export.export(net, (x,), dynamic_shapes=...)   # and on to ONNX again, or torch.jit.trace(net, (x,))

Layers:     Conv, ConvTranspose, Gemm, MatMul (with the Add behind it), Gather of a table, BatchNormalization,
            LayerNormalization, GroupNormalization, InstanceNormalization, RMSNormalization, LSTM, GRU, RNN and
            MatMulNBits become torch.nn layers when their weights are constant, under names made of the initializers'
            names. Weights that are shared in the file are one Parameter. Codes with a constant scale are float
            weights. Other constants are buffers, scalars Python numbers.
Sizes:      what comes from Shape stays Python ints (x.size(i)); constants of Reshape follow the input again, see
            `symbolic` for what can be inferred and how a doubt is decided. At the file's own shapes nothing changes.
            A model whose batch is fixed in the file is tried at twice that batch when it is read: two batches must
            give what each gives alone. Else the constants stay as they were: `net.meta["batch"]` says which and why.
Operators:  docs/onnx-import.md; opset 13 to 28. An Embedding takes no negative index. Random numbers are torch's.
Safety:     nothing is unpickled; external data is read only from the model's own folder.
Cost:       memory: the file twice while it is read; time: seconds; a fixed batch adds three runs of the model.
"""

import os
from typing import TYPE_CHECKING, Any

import onnx

if TYPE_CHECKING:
    from torch import fx, nn


def module(
    source: "str | os.PathLike | onnx.ModelProto", fixed: dict[str, Any] | None = None, symbolic: bool = True
) -> "fx.GraphModule | nn.Module":
    """The torch module of an ONNX file or ModelProto, or of a saved torch.export program (`.pt2`).

    fixed: inputs that are not to be inputs but constants, {name: number or array}: a sampling rate, a mode; an If
        that hangs on one becomes its branch. symbolic: False keeps the constants of Reshape as they are.

    Raises:
        Unsupported: an operator, an attribute, an opset or an element type that is not imported, with the node's name.
        Corrupt: the file is cut short, wrong, or points outside of its folder.
        Missing: the file or its external data is not there.
        BadInput: an input without a type, a name in `fixed` that the graph has not.
    """
    from wherry.formats.onnx.torch_module import exported, whole

    if not isinstance(source, onnx.ModelProto) and str(source).endswith(".pt2"):
        return exported.program(source)
    return whole.module(source, fixed or {}, symbolic)


__all__ = ["module"]
