"""Cut: take lanes out of a module in place: smaller weights, the sizes that layers remember, the sizes in an fx graph.

A module whose own code holds sizes as numbers (`view(n, 64)`) keeps them: trace it first (`torch.fx.symbolic_trace`)
or import it from ONNX, and the numbers in its graph follow.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from wherry.dependency import Graph, Group
from wherry.dependency.record import Value
from wherry.errors import BadInput, Unsupported

RESHAPES = {"reshape", "view", "expand", "broadcast_to", "_unsafe_view", "view_copy", "reshape_as_sizes"}
# layer -> attribute that tells a size -> from the new weight and the old module
SIZES: tuple[tuple[type, dict[str, Callable[[Any, torch.Tensor], Any]]], ...] = (
    (nn.modules.conv._ConvTransposeNd, {
        "in_channels": lambda m, w: w.shape[0],
        "groups": lambda m, w: w.shape[0] * m.groups // m.in_channels if m.groups > 1 else 1,
        "out_channels": lambda m, w: w.shape[1] * (w.shape[0] * m.groups // m.in_channels if m.groups > 1 else 1),
    }),
    (nn.modules.conv._ConvNd, {
        "out_channels": lambda m, w: w.shape[0],
        "groups": lambda m, w: w.shape[0] * m.groups // m.out_channels if m.groups > 1 else 1,
        "in_channels": lambda m, w: w.shape[1] * (w.shape[0] * m.groups // m.out_channels if m.groups > 1 else 1),
    }),
    (nn.Linear, {"in_features": lambda m, w: w.shape[1], "out_features": lambda m, w: w.shape[0]}),
    (nn.Embedding, {"embedding_dim": lambda m, w: w.shape[1], "num_embeddings": lambda m, w: w.shape[0]}),
    (nn.modules.batchnorm._NormBase, {"num_features": lambda m, w: w.shape[0]}),
    (nn.GroupNorm, {
        "num_groups": lambda m, w: w.shape[0] * m.num_groups // m.num_channels,
        "num_channels": lambda m, w: w.shape[0],
    }),
    (nn.LayerNorm, {"normalized_shape": lambda m, w: tuple(w.shape)}),
    (nn.RMSNorm, {"normalized_shape": lambda m, w: tuple(w.shape)}),
    (nn.PReLU, {"num_parameters": lambda m, w: w.shape[0]}),
)  # fmt: skip


def cut(module: nn.Module, graph: Graph, removed: Sequence[Group]) -> nn.Module:
    """Remove groups from the module, in place. Returns it. In an fx graph the sizes in calls follow.

    Raises:
        BadInput: a group that is pinned, or a layer that would lose all its lanes.
        Unsupported: a call of an fx graph that cannot be written for fewer lanes.
    """
    for group in removed:
        if group.pinned:
            raise BadInput(f"{sorted(group.lanes)[0][0]} keeps its lanes: {group.pinned}")
    if empty := graph.empty(removed):
        raise BadInput(f"{empty} would lose all its channels: keep one at least")
    if isinstance(module, fx.GraphModule):
        rewrite(module, graph, removed)
    new: dict[str, torch.Tensor] = {}
    for (name, d), mask in graph.kept(removed).items():
        tensor = new.get(name, module.get_parameter(name) if name in graph.parameters else module.get_buffer(name))
        new[name] = tensor.detach().index_select(d, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    names = {first: [first, *(n for n, other in graph.alias.items() if other == first)] for first in new}
    for name, tensor in new.items():
        old = module.get_parameter(name) if name in graph.parameters else None
        value = tensor.contiguous() if old is None else nn.Parameter(tensor.contiguous(), old.requires_grad)
        for each in names[name]:
            owner, _, leaf = each.rpartition(".")
            place = module.get_submodule(owner)
            store: dict[str, Any] = place._buffers if old is None else place._parameters
            store[leaf] = value
    for name in dict.fromkeys(n.rpartition(".")[0] for each in names.values() for n in each):
        resize(module.get_submodule(name))
    return module


def resize(layer: nn.Module) -> None:
    """Make the sizes that a layer remembers those of its weights."""
    weight = getattr(layer, "weight", None)
    weight = getattr(layer, "running_mean", None) if weight is None else weight
    for kind, sizes in SIZES:
        if isinstance(layer, kind) and isinstance(weight, torch.Tensor):
            for key, value in {key: size(layer, weight) for key, size in sizes.items()}.items():
                setattr(layer, key, value)
            return
    if type(layer).__name__ == "Conv1D" and weight is not None:  # transformers' Linear of GPT-2
        layer.nx, layer.nf = weight.shape


def rewrite(module: fx.GraphModule, graph: Graph, removed: Sequence[Group]) -> None:
    """Sizes, bounds and paddings in the calls of an fx graph, for the lanes that stay."""
    flow = graph.flow
    gone = np.array([group.label for group in removed])
    nodes = flow.record.nodes

    def mask(value: Any, d: int) -> np.ndarray | None:
        """Which lanes stay; None where all do."""
        if not isinstance(value, Value) or not -value.rank <= d < value.rank:
            return None
        labels = flow.labels(value, d)
        kept = None if labels is None else ~np.isin(labels, gone)
        return None if kept is None or kept.all() else kept

    def size(value: Value, d: int) -> int:
        kept = mask(value, d)
        return value.shape[d] if kept is None else int(kept.sum())

    def changed(value: Any) -> bool:
        return isinstance(value, Value) and any(mask(value, d) is not None for d in range(value.rank))

    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        out: Any = nodes.get(node.name)
        x: Any = nodes.get(node.args[0].name) if node.args and isinstance(node.args[0], fx.Node) else None
        outs = list(out) if isinstance(out, list | tuple) else [out]
        if not (changed(x) or any(map(changed, outs))):
            continue
        if name in ("zeros", "ones", "full") and isinstance(out, Value):
            node.args = (*resized((list(node.args[0]),), out, size), *node.args[1:])
        elif name in RESHAPES and isinstance(out, Value):
            node.args = (node.args[0], *resized(node.args[1:], out, size))
            node.kwargs = {k: resized((v,), out, size)[0] if k in ("shape", "size") else v
                           for k, v in node.kwargs.items()}  # fmt: skip
        elif name in ("chunk", "split", "split_with_sizes", "tensor_split"):
            dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
            node.target, node.op = torch.split, "call_function"
            node.args, node.kwargs = (node.args[0], [size(o, dim) for o in outs], dim), {}
        elif node.target is operator.getitem and isinstance(x, Value):
            node.args = (node.args[0], bounds(node.args[1], x, mask))
        elif name == "narrow" and (kept := mask(x, node.args[1])) is not None:
            dim, start, length = node.args[1:4]
            node.args = (node.args[0], dim, int(kept[:start].sum()), int(kept[start : start + length].sum()))
        elif name == "pad" and isinstance(out, Value):
            node.args = (node.args[0], padding(list(node.args[1]), out, mask), *node.args[2:])
        elif name == "unflatten" and isinstance(out, Value):
            dim, sizes = node.args[1], list(node.args[2])
            first = dim % x.rank
            node.args = (node.args[0], dim, [size(out, first + i) for i in range(len(sizes))])
        elif name in ("layer_norm", "rms_norm") and isinstance(out, Value):
            given = list(node.args)
            given[1] = [size(out, d) for d in range(-len(given[1]), 0)]
            node.args = tuple(given)
        elif name in ("group_norm", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose1d"):
            before, after = out.shape[1], size(out, 1)
            key, place = ("num_groups", 1) if name == "group_norm" else ("groups", 6)
            groups = node.kwargs.get(key, node.args[place] if len(node.args) > place else 1)
            if groups > 1:
                node.args = tuple(groups * after // before if i == place else a for i, a in enumerate(node.args))
                node.kwargs = node.kwargs | ({key: groups * after // before} if key in node.kwargs else {})
    module.graph.lint()
    module.recompile()


def resized(sizes: tuple[Any, ...], out: Value, size: Callable[[Value, int], int]) -> tuple[Any, ...]:
    """Arguments of a reshape: ints that tell the old size of a dimension tell the new one; -1, 1 and nodes stay."""
    listed = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
    flat = list(sizes[0]) if listed else list(sizes)
    shift = out.rank - len(flat)
    new = [
        size(out, d + shift) if type(item) is int and item == out.shape[d + shift] and item != 1 else item
        for d, item in enumerate(flat)
    ]
    return (new,) if listed else tuple(new)


def bounds(index: Any, x: Value, mask: Callable[[Value, int], np.ndarray | None]) -> Any:
    """Slices of the lanes that stay. Raises Unsupported for steps and numbers in a dimension that loses lanes."""
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(item is not None and item is not Ellipsis for item in items)
    new: list[Any] = []
    d = 0
    for item in items:
        if item is Ellipsis:
            d += x.rank - given
            new.append(item)
            continue
        if item is None:
            new.append(item)
            continue
        kept = mask(x, d)
        if kept is not None and item != slice(None, None, None):
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise Unsupported(f"the index {item} picks channels one by one; it cannot follow when some of them go")
            start, stop, _ = item.indices(x.shape[d])
            item = slice(int(kept[:start].sum()), int(kept[:stop].sum()), None)
        new.append(item)
        d += 1
    return tuple(new) if isinstance(index, tuple) else new[0]


def padding(sizes: list[int], out: Value, mask: Callable[[Value, int], np.ndarray | None]) -> list[int]:
    """How many lanes before and behind are left."""
    for back in range(len(sizes) // 2):
        kept = mask(out, out.rank - 1 - back)
        low, high = sizes[2 * back : 2 * back + 2]
        if kept is not None and min(low, high) >= 0:
            sizes[2 * back] = int(kept[:low].sum())
            sizes[2 * back + 1] = int(kept[len(kept) - high :].sum())
    return sizes


def mask_out(module: nn.Module, graph: Graph, removed: Sequence[Group]) -> nn.Module:
    """Set the weights of groups to zero, in place: what the cut module must equal wherever that is exact."""
    with torch.no_grad():
        for group in removed:
            for (name, d), index in group.lanes.items():
                if name in graph.parameters:
                    module.get_parameter(name).index_fill_(d, torch.from_numpy(index), 0.0)
    return module
