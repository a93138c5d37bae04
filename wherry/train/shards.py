"""Shards: weights cut over ranks: tensor parallel (Megatron, arXiv:1909.08053), FSDP2 (ZeRO-3, arXiv:1910.02054), DDP.

Tensor parallel: where a block has Linears A on one input and a Linear B behind them, A is cut by rows and B by columns,
so that one sum after B is all that is sent. Which pairs: transformers' own plan of the architecture; else each pair
is tried: with half of A's rows and half of B's columns, the outputs of both halves must add up to the whole.
After the cut, outputs and gradients are compared with the whole model's on a few tokens. A gradient that is only whole
as the sum over ranks (a norm of single heads) is found there, and summed in every update.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from wherry.checkpoint import stack
from wherry.errors import Unsupported
from wherry.train.job import Job
from wherry.train.mesh import World

TOKENS = 16  # of the comparison
FAR = 1e-3  # relative difference that is not the order of sums
TINY = 1e-6  # of the largest gradient: what is below is rounding
LEAF = 1 << 16  # elements of a layer of a graph that is a unit of FSDP of its own
STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel, "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}  # fmt: skip


def plan(module: Any, ranks: int) -> dict[str, str]:
    """{layer: style} of the Linears that tensor parallelism cuts.

    Raises Unsupported when there is none, or heads or widths cannot be divided by the ranks.
    """
    blocks = stack(module)
    known = getattr(module, "base_model_prefix", "")
    stated = {f"{known}.{key}": style for key, style in
              (getattr(module.config, "base_model_tp_plan", None) or {}).items()}  # fmt: skip
    linears = [name for name, child in module.named_modules() if type(child) is torch.nn.Linear]
    found = {}
    for key, style in stated.items():
        pattern = re.escape(key).replace(r"\*", r"\d+")
        found.update({name: style for name in linears if style in STYLES and re.fullmatch(pattern, name)})
    if not found:
        found = derived(module, blocks)
    if not found:
        raise Unsupported(f"{type(module).__name__}: no layers were found that can be cut; use --fsdp in place of --tp")
    heads = [getattr(module.config, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    for count in filter(None, heads if stated else ()):
        if count % ranks:
            raise Unsupported(f"{count} heads cannot be divided among {ranks} ranks: choose another --tp")
    for name, style in found.items():
        width = module.get_submodule(name).weight.shape[0 if style.startswith("col") else 1]
        if width % ranks:
            raise Unsupported(f"{name}: a width of {width} cannot be divided among {ranks} ranks: choose another --tp")
    return found


@torch.no_grad()
def derived(module: Any, blocks: str) -> dict[str, str]:
    """Pairs of the first block that add up when they are cut in two, for all blocks."""
    block = module.get_submodule(blocks)[0]
    calls: list[tuple[str, torch.Tensor]] = []
    hooks = [
        child.register_forward_pre_hook(lambda m, args, name=name: calls.append((name, args[0])))
        for name, child in block.named_modules() if type(child) is torch.nn.Linear
    ]  # fmt: skip
    seen: list[Any] = []
    hooks.append(block.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True))
    ids = torch.arange(TOKENS)[None] % module.config.vocab_size
    module.eval()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    args, kwargs, _ = seen[0]
    out: dict[str, str] = {}
    for i, (last, _) in enumerate(calls):
        before = [name for name, x in calls[:i] if x is calls[i - 1][1]] if i else []
        if before and not set(before) & set(out) and _adds_up(block, before, last, args, kwargs):
            out.update(dict.fromkeys(before, "colwise") | {last: "rowwise"})
    module.train()
    count = len(module.get_submodule(blocks))
    return {f"{blocks}.{i}.{name}": style for i in range(count) for name, style in out.items()}


def _adds_up(block: Any, before: list[str], last: str, args: Any, kwargs: Any) -> bool:
    """Whether the outputs of `last` with either half of the weights add up to the whole."""
    found: list[torch.Tensor] = []
    target = block.get_submodule(last)
    kept = {name: (block.get_submodule(name).weight, block.get_submodule(name).bias) for name in (*before, last)}
    hook = target.register_forward_hook(lambda m, a, out: found.append(out))
    try:
        block(*args, **kwargs)
        for half in range(2):
            for name, (weight, bias) in kept.items():
                child = block.get_submodule(name)
                child.weight = torch.nn.Parameter(weight.chunk(2, dim=0 if name != last else 1)[half])
                if bias is not None:
                    child.bias = None if name == last else torch.nn.Parameter(bias.chunk(2)[half])
            block(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError):  # code that counts on the whole width
        return False
    finally:
        hook.remove()
        for name, (weight, bias) in kept.items():
            block.get_submodule(name).weight, block.get_submodule(name).bias = weight, bias
    whole, first, second = found[:3]
    bias = kept[last][1]
    both = first + second + (bias if bias is not None else 0)
    return bool((whole - both).norm() <= FAR * whole.norm())


def tensor_parallel(module: torch.nn.Module, world: World) -> list[str]:
    """Cut the Linears in place; gives the names of parameters whose gradients must be summed over the ranks.

    Raises Unsupported when the cut model does not give the whole one's outputs and gradients.
    """
    found = plan(module, world.sizes["tp"])
    module.eval()
    logits, grads = _trial(module, world.device)
    parallelize_module(module, world.mesh["tp"], {name: STYLES[style]() for name, style in found.items()})
    again, cut = _trial(module, world.device)
    if not (again - logits).norm() <= FAR * logits.norm():
        raise Unsupported(
            f"{type(module).__name__} cut by its tensor-parallel plan computes something else: use --fsdp in its place"
        )
    summed = []
    least = TINY * max(float(grad.norm()) for grad in grads.values())  # a key's bias has no gradient but rounding
    for name, grad in cut.items():
        if isinstance(grad, DTensor):
            continue
        near = FAR * grads[name].norm() + least
        if (grad - grads[name]).norm() <= near:
            continue
        dist.all_reduce(grad, group=world.group("tp"))
        if not (grad - grads[name]).norm() <= near:
            raise Unsupported(f"the gradient of {name} is wrong under tensor parallelism: use --fsdp in its place")
        summed.append(name)
    module.train()
    return summed


def _trial(module: Any, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a few tokens, and the gradients of a sum over them."""
    ids = torch.arange(TOKENS, device=device)[None] * 7 % module.config.vocab_size
    logits = module(input_ids=ids, use_cache=False).logits
    torch.linspace(-1, 1, logits.numel(), device=device).reshape(logits.shape).mul(logits).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return logits.detach(), grads


def fully_sharded(module: Any, job: Job, world: World) -> None:
    """FSDP2 in place: each block is a unit, and what is outside of the blocks; over dp, weights are copies."""
    mesh = world.mesh["dp", "fsdp"] if world.sizes["dp"] > 1 else world.mesh["fsdp"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if job.precision == "bf16" else MixedPrecisionPolicy()
    try:
        units: Iterable[Any] = list(module.get_submodule(stack(module)))
    except Unsupported:
        units = [
            child for child in module.modules()
            if not list(child.children()) and sum(p.numel() for p in child.parameters(recurse=False)) >= LEAF
        ]  # fmt: skip
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def spread(module: torch.nn.Module, job: Job, world: World) -> tuple[Any, list[str]]:
    """The module to call, and names of parameters whose gradients are summed over tp. Changes the module in place."""
    summed = tensor_parallel(module, world) if world.sizes["tp"] > 1 else []
    if world.sizes["fsdp"] > 1 or world.sizes["dp"] > 1 and (world.sizes["tp"] > 1 or world.sizes["pp"] > 1):
        fully_sharded(module, job, world)
        return module, summed
    if world.sizes["dp"] > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        group = world.group("dp")
        return DistributedDataParallel(
            module, device_ids=ids, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        ), summed
    return module, summed


def last_backward(module: Any, last: bool) -> None:
    """Send gradients with the last micro-batch of an update alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split(tensor: torch.Tensor) -> frozenset[str]:
    """The dimensions of the mesh over which a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return frozenset()
    names = tensor.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, place in zip(names, tensor.placements, strict=True) if not place.is_replicate())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All parts together; every rank that has a part must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parted(tensors: Iterable[torch.Tensor]) -> dict[frozenset[str], list[torch.Tensor]]:
    """This rank's parts, by the dimensions over which they are cut."""
    parts: dict[frozenset[str], list[torch.Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(split(tensor), []).append(local(tensor))
    return parts


def summed(parts: dict[frozenset[str], torch.Tensor], world: World) -> float:
    """The sum of scalars, one for the parts that are cut alike, over all parts of the whole model, on every rank."""
    keys = sorted(parts, key=sorted)
    if world.size == 1:
        return float(sum(float(parts[key]) for key in keys))
    sums = torch.stack([parts[key] for key in keys]).double().cpu()
    for dim in ("fsdp", "tp"):
        mine = torch.tensor([dim in key for key in keys])
        if mine.any():
            cut = torch.where(mine, sums, 0.0)
            dist.all_reduce(cut, group=world.group(dim))
            sums = torch.where(mine, cut, sums)
    total = sums.sum()
    if world.sizes["pp"] > 1:
        dist.all_reduce(total, group=world.group("pp"))
    return float(total)
