"""Stages: a language model cut into runs of blocks, one per rank, with one forward and one backward in turn (1F1B).

Source: Narayanan et al. 2019, arXiv:1806.03377 (PipeDream) and 2021, arXiv:2104.04473, through
        torch.distributed.pipelining.
Idea:   a stage is the model's own code with a part of its blocks: the first has the embedding; the others are given
        `inputs_embeds`; the last has the norm and the head. That this holds is tried on a few tokens before training.
        A head that is tied to the embedding is on two stages; its gradients are added after each update's backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from wherry.checkpoint import stack
from wherry.errors import BadInput, Unsupported
from wherry.train.mesh import World
from wherry.train.shards import FAR, TOKENS, local
from wherry.train.text import Batch


class Stage(torch.nn.Module):
    """A part of a model: token ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: Any, first: bool) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """X: ids int64 [B, T] on the first stage, else hidden states [B, T, d]; gives [B, T, d] or logits [B, T, V]."""
        own = {"input_ids": x} if self.first else {"inputs_embeds": x}
        return self.model(**own, **inputs, use_cache=False).logits


def bounds(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Blocks of each stage, as equal as can be, the later ones longer.

    Raises BadInput when there are fewer blocks than stages.
    """
    if blocks < stages:
        raise BadInput(f"{blocks} blocks cannot be laid on {stages} pipeline stages: choose a smaller --pp")
    ends = [i * blocks // stages for i in range(stages + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def cut(module: Any, start: int, end: int, first: bool, last: bool) -> Callable[[], None]:
    """Leave the blocks start ... end - 1 in the module, the embedding on the first stage, norm and head on the last.

    Returns what puts everything back.
    """
    path = stack(module)
    owner_name, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_name)
    undo: list[Callable[[], None]] = []

    def put(parent: Any, name: str, value: Any) -> None:
        old = getattr(parent, name)
        undo.append(lambda: setattr(parent, name, old))
        setattr(parent, name, value)

    blocks = getattr(owner, leaf)
    names = [name for name, _ in owner.named_children()]
    behind = names[names.index(leaf) + 1 :]
    put(owner, leaf, torch.nn.ModuleList(blocks[start:end]))
    for name, child in list(owner.named_children()):
        holds = next(child.parameters(), None) is not None
        if name == leaf or not holds:
            continue
        if name in behind and not last or name not in behind and not first:
            put(owner, name, torch.nn.Identity())
    if not last:
        for name, child in list(module.named_children()):
            if child is not owner and not path.startswith(f"{name}."):
                put(module, name, torch.nn.Identity())
    for config in {id(c): c for c in (module.config, owner.config)}.values():
        for key in ("layer_types", "mlp_layer_types"):
            if isinstance(getattr(config, key, None), list):
                put(config, key, getattr(config, key)[start:end])
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if hasattr(config, key):
                try:
                    put(config, key, end - start)
                except (AttributeError, ValueError, TypeError):  # a property, or one that is checked against others
                    undo.pop()

    def back() -> None:
        for each in reversed(undo):
            each()

    return back


@torch.no_grad()
def tried(module: Any, parts: list[tuple[int, int]]) -> None:
    """See that the stages one after the other are the model.

    Raises Unsupported when they are not.
    """
    module.eval()
    ids = torch.arange(TOKENS)[None] * 7 % module.config.vocab_size
    whole = module(input_ids=ids, use_cache=False).logits
    x: Any = ids
    try:
        for i, (start, end) in enumerate(parts):
            back = cut(module, start, end, i == 0, i == len(parts) - 1)
            try:
                x = Stage(module, i == 0)(x)
            finally:
                back()
        far = float((x - whole).norm() / whole.norm())
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise Unsupported(
            f"{type(module).__name__} cannot be cut into pipeline stages ({' '.join(str(error).split())[:120]}).\n"
            "Use --fsdp or --tp in place of --pp."
        ) from error
    if not far <= FAR:
        raise Unsupported(
            f"{type(module).__name__} in pipeline stages computes something else ({far:.2g}): use --fsdp or --tp"
        )
    module.train()


class Pipeline:
    """This rank's stage and its schedule.

    names: {parameter's name in the stage: in the whole model}. tied: names here of what another stage has too.
    """

    def __init__(self, module: Any, world: World) -> None:
        self.world, place, count = world, world.places["pp"], world.sizes["pp"]
        parts = bounds(len(module.get_submodule(stack(module))), count)
        tried(module, parts)
        path, (start, end) = stack(module), parts[place]
        known = {id(p): name for name, p in module.named_parameters()}
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        self.shares = head is not None and embedding.weight is head.weight
        cut(module, start, end, place == 0, place == count - 1)
        self.names = {name: known[id(p)] for name, p in module.named_parameters()}
        self.path, self.start = path, start
        self.twin = module.get_output_embeddings() if place else module.get_input_embeddings()
        self.stage_module = Stage(module, place == 0)
        self.pair = self._pairs() if self.shares else None
        self.schedule: Any = None
        self.loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def _pairs(self) -> Any:
        """The group of this rank and its like on the other end; every rank makes all groups."""
        grid, mine = self.world.mesh.mesh, None
        for ranks in grid.reshape(grid.shape[0], -1).T.tolist():
            group = dist.new_group([ranks[0], ranks[-1]])
            if self.world.rank in (ranks[0], ranks[-1]):
                mine = group
        return mine

    def whole_name(self, name: str) -> str:
        """The name that a parameter or buffer of the stage has in the whole model."""
        if name in self.names:
            return self.names[name]
        head, _, rest = name.removeprefix(f"{self.path}.").partition(".")
        inside = name.startswith(f"{self.path}.") and head.isdigit()
        return f"{self.path}.{int(head) + self.start}.{rest}" if inside else name

    def step(self, batch: Batch, rows: int, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Forward and backward of a rank's whole share in micro-batches of `rows`.

        loss: (logits, row numbers of the micro-batch) to the term whose gradient is wanted; on the last stage alone.
        """
        size = len(batch["targets"])
        if self.schedule is None:
            place, count = self.world.places["pp"], self.world.sizes["pp"]
            stage = PipelineStage(
                self.stage_module, place, count, self.world.device, group=self.world.group("pp")
            )  # fmt: skip
            self.schedule = Schedule1F1B(
                stage, size // rows, loss_fn=lambda output, target: self._loss(output, target), scale_grads=False
            )
        self.loss = loss
        numbers = torch.arange(size, device=self.world.device)
        more = {k: v for k, v in batch.items() if k not in ("input_ids", "targets") and ":" not in k}
        first = [batch["input_ids"]] if self.world.places["pp"] == 0 else []
        target = {"target": numbers, "losses": []} if self.world.last_stage else {}
        self.schedule.step(*first, **more, **target, return_outputs=False)

    def _loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert self.loss is not None
        return self.loss(output, target)

    def add_twins(self) -> None:
        """Add the gradients of a tied embedding and head, which lie on the first and the last stage."""
        if self.pair is not None and self.twin.weight.grad is not None:
            dist.all_reduce(local(self.twin.weight.grad), group=self.pair)

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Logits on the last stage without gradients, None elsewhere: blocking, one stage after the other."""
        place, count = self.world.places["pp"], self.world.sizes["pp"]
        group = self.world.group("pp")
        ranks = dist.get_process_group_ranks(group)
        more = {k: v for k, v in batch.items() if k not in ("input_ids", "targets") and ":" not in k}
        if place == 0:
            x: torch.Tensor = batch["input_ids"]
        else:
            width = self.stage_module.model.config.hidden_size
            x = torch.empty(*batch["input_ids"].shape, width, device=self.world.device)
            dist.recv(x, ranks[place - 1], group=group)
        out = self.stage_module(x, **more)
        if place + 1 < count:
            dist.send(out.float().contiguous(), ranks[place + 1], group=group)
            return None
        return out


def rows_of(share: int, wanted: int, stages: int) -> int:
    """Samples of a micro-batch: `wanted`, or the most that gives two micro-batches for each stage.

    Raises BadInput when a rank's share cannot be cut into equal micro-batches, one for each stage at least.
    """
    if wanted and (share % wanted or share // wanted < stages):
        raise BadInput(
            f"{share} samples of a rank in micro-batches of {wanted}: {stages} pipeline stages want equal ones,"
            f" {stages} at least.\nChoose a --micro-batch that divides {share}, or a larger --batch."
        )
    if wanted:
        return wanted
    counts = [count for count in range(stages, share + 1) if share % count == 0]
    if not counts:
        raise BadInput(f"a rank's share of {share} samples gives no {stages} equal micro-batches: a larger --batch")
    return share // min(counts, key=lambda count: (count < 2 * stages, count))
