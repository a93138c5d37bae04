"""Rules: what each operator does to lanes. Operators of kinds; the others stand in `layers` and `places`.

A rule names the lanes that an operator keeps together by `flow.tie`; dimensions that it does not name are pinned.
"""

import numpy as np

from wherry.dependency.flow import Flow, Rule
from wherry.dependency.record import Op, Value

RULES: dict[str, Rule] = {}


def rule(*names: str):  # type: ignore[no-untyped-def]
    """Enter a function as the rule of these ATen operators; those that end in `_` work in place."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
            RULES[f"{name}_copy"] = function
        return function

    return enter


def same(flow: Flow, a: Value, b: Value, but: tuple[int, ...] = ()) -> None:
    """Tie dimensions of equal size of two values of one rank, but for some."""
    for d in range(a.rank):
        if d not in but and a.shape[d] == b.shape[d]:
            flow.tie(a, d, b, d)


@rule(
    "pointwise", "to", "_to_copy", "clone", "contiguous", "alias", "lift_fresh", "detach", "expand", "where", "copy",
    "masked_fill", "native_dropout", "dropout", "fill", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "view_as_real_", "_prelu_kernel", "fill_diagonal", "_conj", "resolve_conj",
)  # fmt: skip
def pointwise(flow: Flow, op: Op) -> None:
    """Equal lanes of all, aligned at the last dimension; a dimension of size 1 is spread over the lanes."""
    out = op.outputs[0]
    for value in op.values:
        for d in range(value.rank):
            place = out.rank - value.rank + d
            if place >= 0 and value.shape[d] == out.shape[place] and value is not out:
                flow.tie(value, d, out, place)
            elif value.shape[d] == 1:
                flow.handled.add(flow.key(value, d))
    for d in range(out.rank):
        flow.handled.add(flow.key(out, d))


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten")
def view(flow: Flow, op: Op) -> None:
    """Other sizes, the same elements."""
    flow.reshape(op.args[0], op.outputs[0], op)


@rule("permute", "transpose", "t", "numpy_T", "swapaxes", "movedim")
def permute(flow: Flow, op: Op) -> None:
    """Dimensions in another order."""
    x, out = op.args[0], op.outputs[0]
    order = list(range(x.rank))
    if op.name.startswith("permute"):
        order = [d % x.rank for d in op.args[1]]
    elif op.name.startswith("transpose") or op.name.startswith("swapaxes"):
        i, j = op.args[1] % x.rank, op.args[2] % x.rank
        order[i], order[j] = order[j], order[i]
    else:
        order.reverse()
    for d, source in enumerate(order):
        flow.tie(x, source, out, d)


@rule("repeat", "tile")
def repeat(flow: Flow, op: Op) -> None:
    """Lanes again and again."""
    x, out = op.args[0], op.outputs[0]
    for d in range(x.rank):
        place = out.rank - x.rank + d
        if x.shape[d] > 1:
            flow.tie(out, place, x, d, np.arange(out.shape[place]) % x.shape[d])


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "linear", "matmul")
def product(flow: Flow, op: Op) -> None:
    """Rows of the first, columns of the second; the dimension that is summed over is shared."""
    out = op.outputs[0]
    tensors = [v for v in op.args if isinstance(v, Value)]
    if op.name == "linear":
        x, w = tensors[:2]
        for d in range(x.rank - 1):
            flow.tie(x, d, out, d)
        flow.tie(x, -1, w, 1)
        flow.tie(w, 0, out, -1)
        if len(tensors) > 2:
            flow.tie(tensors[2], 0, out, -1)
        return
    if op.name in ("addmm", "baddbmm", "addmv"):
        bias, x, y = tensors
        for d in range(bias.rank):
            if bias.shape[d] == out.shape[out.rank - bias.rank + d] and bias.shape[d] > 1:
                flow.tie(bias, d, out, out.rank - bias.rank + d)
    else:
        x, y = tensors
    flow.tie(x, x.rank - 1, y, max(y.rank - 2, 0))
    if _made(x) and _made(y):
        flow.note(x, x.rank - 1, f"{op} sums products of activations over it")
    if x.rank == 3:
        flow.tie(x, 0, out, 0)
        flow.tie(y, 0, out, 0)
    if x.rank > 1:
        flow.tie(x, x.rank - 2, out, x.rank - 2)
    if y.rank > 1:
        flow.tie(y, y.rank - 1, out, out.rank - 1)


@rule("_grouped_mm")
def experts(flow: Flow, op: Op) -> None:
    """Rows of x [tokens, k] times one matrix each of w [experts, k, n]; which is said by offsets."""
    x, w = op.args[:2]
    out = op.outputs[0]
    flow.tie(x, x.rank - 1, w, w.rank - 2)
    flow.tie(w, w.rank - 1, out, out.rank - 1)
    if x.rank == 2:
        flow.tie(x, 0, out, 0)


def _made(value: Value) -> bool:
    """Whether a value is made of something, and not a weight or a weight transposed."""
    return value.kind == "made" and not any(
        op.outputs[:1] == [value] and op.name in ("t", "transpose", "permute", "expand", "view", "select", "slice")
        and isinstance(op.args[0], Value) and not _made(op.args[0])
        for op in value.uses
    )  # fmt: skip


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk", "logcumsumexp",
      "_safe_softmax", "argsort", "kthvalue")  # fmt: skip
def along(flow: Flow, op: Op) -> None:
    """Lanes of one dimension depend on each other; the others are independent."""
    x = op.args[0]
    place = 2 if op.name == "topk" else 1
    dim = op.kwargs.get("dim", op.args[place] if len(op.args) > place else -1)
    for out in op.outputs:
        same(flow, x, out, but=((dim if isinstance(dim, int) else -1) % max(x.rank, 1),))


MEANS = ("mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")


@rule("sum", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin", "prod", "logsumexp", "count_nonzero",
      "nansum", *MEANS)  # fmt: skip
def reduce(flow: Flow, op: Op) -> None:
    """Some dimensions become one number. Zeroed lanes add nothing to a sum; a mean is over fewer of them."""
    x = op.args[0]
    dims = next((a for a in op.args[1:] if isinstance(a, int | list | tuple) and not isinstance(a, bool)), None)
    if op.name in ("linalg_vector_norm", "norm"):
        dims = op.args[2] if len(op.args) > 2 else None
    dims = op.kwargs.get("dim", dims)
    gone = {d % x.rank for d in ([dims] if isinstance(dims, int) else dims or range(x.rank))}
    for out in op.outputs:
        kept = out.rank == x.rank
        place = 0
        for d in range(x.rank):
            if d in gone:
                if op.name in (*MEANS, "sum", "nansum"):
                    flow.note(x, d, f"{op} is taken over it")
                place += kept
                continue
            flow.tie(x, d, out, place)
            place += 1
        if kept:
            flow.handled |= {flow.key(out, d) for d in gone}


@rule("full", "zeros", "ones", "new_zeros", "new_ones", "new_full")
def alike(flow: Flow, op: Op) -> None:
    """One number everywhere: any lane may go, where the size follows (a configuration, an fx graph)."""
    flow.handled |= {flow.key(op.outputs[0], d) for d in range(op.outputs[0].rank)}


@rule("scalar_tensor", "arange", "empty", "rand", "randn", "eye", "linspace",
      "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense",
      "is_nonzero", "equal", "randint", "tril_indices", "triu_indices", "item", "bincount", "nonzero",
      "histc", "unique_consecutive", "_unique2", "one_hot", "set_", "resize", "_assert_async")  # fmt: skip
def fixed(flow: Flow, op: Op) -> None:
    """Made by size, or read as numbers: whatever lane it touches stays."""
