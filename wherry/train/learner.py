"""Learner: the student on this rank, and one update of it: forward, backward, one sum over ranks, a step.

The loss of an update is  sum_i weight_i * (sum over all ranks and micro-batches of term i) / (count of the same),
so it does not depend on how a batch is cut. Counts are known before the forward pass, so that each micro-batch's
gradient is divided at once.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from wherry.errors import BadInput, Missing, Unsupported
from wherry.objective import IGNORE, Objective
from wherry.train import rate, shards, stages, student
from wherry.train.job import Job
from wherry.train.mesh import World
from wherry.train.samples import TEACHER
from wherry.train.text import Batch
from wherry.train.watch import counted


@dataclass
class Outcome:
    """What an update did. loss in nats; terms by step; norm of the gradient before clipping; flags: sums over ranks.

    flops: operations, where they were counted.
    """

    loss: float
    terms: list[float]
    norm: float
    rate: float
    flags: list[float]
    flops: int = 0

    @property
    def finite(self) -> bool:
        """Whether the weights were changed: an update that is not finite is left out."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Learner:
    """A student laid out over the ranks, its teacher and its optimizers.

    Raises BadInput or Unsupported when job, model and ranks do not fit; every rank the same.
    """

    def __init__(self, job: Job, world: World, objective: Objective) -> None:
        self.job, self.world, self.objective = job, world, objective
        self.student = world.agree(lambda: student.opened(job.model))
        self.teacher: Any = world.agree(self._teacher)
        module = self.student.module
        if "attention" in objective.needs:
            world.agree(self._shows_attention)
        world.agree(self._prepare)
        module.to(world.device)
        for one in (self.student, self.teacher):
            if one is not None and one.graph and world.size == 1 and world.device.type == "cpu":
                student.laid(one.module, torch.channels_last)
        self.pipeline: stages.Pipeline | None = None
        self.rows = 0
        if world.sizes["pp"] > 1:
            world.agree(self._fits_pipeline)
            self.rows = stages.rows_of(job.batch // world.data_size, job.micro_batch, world.sizes["pp"])
        if job.recompute:
            world.agree(self._recompute)
        if job.compile:
            world.agree(self._compiles)
        summed: list[str] = []
        if world.sizes["pp"] > 1:
            if world.sizes["tp"] > 1:
                summed = world.agree(lambda: shards.tensor_parallel(module, world))
            self.pipeline = world.agree(lambda: stages.Pipeline(module, world))
            if world.data_size > 1:
                shards.fully_sharded(self.pipeline.stage_module, job, world)
            self.called: Any = self.pipeline.stage_module
            self.inner: Any = self.pipeline.stage_module.model
            summed = [name for name in self.pipeline.names if self.pipeline.names[name] in summed]
        else:
            self.called, summed = world.agree(lambda: shards.spread(module, job, world))
            self.inner = module
        self.modes()
        named = dict(self.inner.named_parameters())
        self.summed = [named[name] for name in summed]
        self.optimizers = rate.optimizers(job, named.items())
        self.trained = [p for p in named.values() if p.requires_grad]
        self.scale = 1.0  # of the learning rate; halved when a run goes back
        self.sums = torch.compile(self._sums, dynamic=False) if job.compile else self._sums

    def _prepare(self) -> None:
        torch.manual_seed(seed_of(self.job.seed, 0, -1))  # what a step draws is the same on every rank
        for step in self.objective.having("prepare"):
            step.prepare(self.student.module, self.student.checkpoint)
        if self.student.graph and (self.world.sizes["tp"] > 1 or self.world.sizes["pp"] > 1):
            raise Unsupported("--tp and --pp cut language models; a graph is trained with --dp and --fsdp")
        if self.student.task.kind != "text-generation" and (self.world.sizes["tp"] > 1 or self.world.sizes["pp"] > 1):
            raise Unsupported(f"--tp and --pp cut language models; {self.student.task.kind} takes --dp and --fsdp")

    def _shows_attention(self) -> None:
        """Fused kernels give no attention rows: both models compute them plainly."""
        for one in (self.student, self.teacher):
            if one.graph:
                raise Unsupported("attention: a graph shows no attention rows; take kl alone")
            module: Any = one.module
            module.set_attn_implementation("eager")

    def _compiles(self) -> None:
        """Raise where `compile` is not for the student or its layout."""
        cut = any(self.world.sizes[dim] > 1 for dim in ("fsdp", "tp", "pp"))
        if cut or self.student.graph or self.student.task.kind != "text-generation":
            raise Unsupported("compile is for language models that are whole on each rank: --dp alone")
        named = os.environ.get("CXX", "g++")
        if self.world.device.type == "cpu" and shutil.which(named) is None:
            raise Missing(f"compile needs a C++ compiler, and there is no {named}: install one, or --set compile=false")

    def _fits_pipeline(self) -> None:
        wrong = [need for need in ("hidden", "attention") if need in self.objective.needs]
        if wrong or self.objective.having("sample"):
            raise Unsupported(f"--pp: a loss on {' and '.join(wrong) or 'own samples'} needs the whole model on a rank")

    def _recompute(self) -> None:
        if self.student.graph:
            raise Unsupported("recompute is for transformers' models; a graph keeps its activations")
        module: Any = self.student.module
        if not module.supports_gradient_checkpointing:
            raise Unsupported(f"recompute: transformers cannot compute {type(module).__name__}'s activations again")
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the second: transformers before 5.20

    def _teacher(self) -> student.Student | None:
        if "teacher" not in self.objective.needs:
            return None
        if not self.job.teacher:
            names = ", ".join(step.method for step in self.objective.steps if "teacher" in step.needs)
            raise BadInput(f"{names}: a teacher is wanted. Give --teacher MODEL.")
        made = student.opened(self.job.teacher)
        same_vocabulary(self.job, made, self.student)
        made.module.eval().requires_grad_(False)
        made.module.to(self.world.device)
        return made

    def modes(self) -> None:
        """Training mode, batch norms as the job says."""
        self.called.train()
        student.norms(self.inner, self.job.norms)

    def whole_name(self, name: str) -> str:
        """The name in the whole model of a parameter or buffer on this rank."""
        return self.pipeline.whole_name(name) if self.pipeline else name

    def update(
        self, step: int, steps: int, batches: list[Batch], problem: Exception | None, flags: tuple[float, ...],
        count: bool = False,
    ) -> Outcome:  # fmt: skip
        """One update, unless it is not finite. problem: what making the batches raised, if anything; told to all.

        flags: told to all as sums, whatever they mean. count: its operations; compiled passes are done again for it.
        """
        job, world, losses = self.job, self.world, self.objective.losses
        torch.manual_seed(seed_of(job.seed, step, world.data_rank))
        factor = rate.share(job, step, steps) * self.scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        counts = [0.0] * len(losses)
        if problem is None:
            counts = [float(sum(c)) for c in zip(*(self.objective.counts(b) for b in batches), strict=True)]
        *totals, failed = world.total(counts, (float(problem is not None),))
        if failed:
            world.check(problem)
        if not all(totals):
            raise agreed(BadInput(f"update {step + 1}: a batch without a single target: nothing to learn from"))
        weights = [s.weight * world.data_size / n for s, n in zip(losses, totals, strict=True)]
        with counted(count and job.compile) as rehearsed:
            if count and job.compile:  # what is compiled cannot be counted, nor be called while anything is
                self._rehearse(batches)
        with counted(count and not job.compile) as passed:
            sums = self._pipelined(batches, weights) if self.pipeline else self._backward(batches, weights, step)
        found = world.total(sums, flags)
        means = [total / n for total, n in zip(found, totals, strict=False)]
        loss = sum(s.weight * mean for s, mean in zip(losses, means, strict=True))
        loss += self._penalties()
        norm = self._norm()
        done = Outcome(loss, means, norm, job.learning_rate * factor, found[len(losses) :])
        if done.finite:
            self._clip(norm)
            with counted(count) as stepped:
                for optimizer in self.optimizers:
                    optimizer.step()
            done.flops = rehearsed() + passed() + stepped()
            with torch.no_grad():
                for one in self.objective.having("after"):
                    one.after(self.inner, step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return done

    def _backward(self, batches: list[Batch], weights: list[float], step: int) -> list[float]:
        sums = [0.0] * len(weights)
        for i, batch in enumerate(batches):
            shards.last_backward(self.called, i + 1 == len(batches))
            batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
            for one in self.objective.having("sample"):
                batch = one.sample(self.inner, batch, step)
            terms = self.objective.terms(self.sums(batch, self._taught(batch)), batch)
            torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum().backward()
            sums = [a + float(t.detach()) for a, t in zip(sums, terms, strict=True)]
        return sums

    def _rehearse(self, batches: list[Batch]) -> None:
        """The passes of an update, not compiled, on this rank alone; the gradient is dropped."""
        shards.last_backward(self.called, False)
        for batch in batches:
            batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
            torch.stack([total for total, _ in self._sums(batch, self._taught(batch))]).sum().backward()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _sums(self, batch: Batch, taught: dict[str, Any] | None) -> list[tuple[torch.Tensor, Any]]:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            made = student.forward(self.called, batch, self.objective.needs, self.student.graph, self.job.use_cache)
        return self.objective.sums(made, taught, batch)

    def _pipelined(self, batches: list[Batch], weights: list[float]) -> list[float]:
        assert self.pipeline is not None
        whole = {name: torch.cat([b[name] for b in batches]).to(self.world.device) for name in batches[0]}
        found: dict[int, list[float]] = {}

        def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            part = {name: tensor[rows] for name, tensor in whole.items()}
            terms = self.objective.terms(self.objective.sums({"logits": logits}, self._taught(part), part), part)
            found[int(rows[0])] = [float(term.detach()) for term in terms]
            return torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum()

        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.job.precision == "bf16"):
            self.pipeline.step(whole, self.rows, loss)
        self.pipeline.add_twins()
        return [sum(term) for term in zip(*found.values(), strict=True)] if found else [0.0] * len(weights)

    @torch.no_grad()
    def _taught(self, batch: Batch) -> dict[str, Any] | None:
        if self.teacher is None:
            return None
        given = {n.removeprefix(TEACHER): t for n, t in batch.items() if n.startswith(TEACHER)} or batch
        return self.teacher.call(given, self.objective.needs) | {"mask": given.get("attention_mask")}

    def _penalties(self) -> float:
        """Terms of single weights: their gradients, added on each rank's own part, and their sum over all parts."""
        total = 0.0
        for one in self.objective.having("penalty"):
            values: dict[frozenset[str], torch.Tensor] = {}
            for p in self.trained:
                part = shards.local(p).detach().requires_grad_()
                value = one.weight * one.penalty(part)
                (grad,) = torch.autograd.grad(value, part)
                if p.grad is not None:
                    shards.local(p.grad).add_(grad)
                key = shards.split(p)
                values[key] = value.detach() + values.get(key, 0.0)
            total += shards.summed(values, self.world)
        return total

    def _norm(self) -> float:
        """Of the gradient of the whole model, on every rank."""
        for p in self.summed:
            if p.grad is not None:
                dist.all_reduce(shards.local(p.grad), group=self.world.group("tp"))
        twin = self.pipeline.twin.weight if self.pipeline and self.pipeline.pair is not None else None
        once = [p for p in self.trained if not (p is twin and self.world.last_stage)]
        parts = shards.parted(p.grad for p in once if p.grad is not None)
        square = shards.summed({key: get_total_norm(found).double() ** 2 for key, found in parts.items()}, self.world)
        return math.sqrt(square) if math.isfinite(square) else square

    def _clip(self, norm: float) -> None:
        factor = float(self.job.clip / (torch.tensor(norm) + 1e-6))  # in float32, as torch.nn.utils.clip_grad_norm_
        if self.job.clip and factor < 1:
            for p in self.trained:
                if p.grad is not None:
                    shards.local(p.grad).mul_(factor)

    @torch.no_grad()
    def measure(self, batches: Iterator[Batch]) -> list[float]:
        """Sum of the cross-entropy in nats, targets that are likeliest, and targets, over all ranks' batches.

        Every rank gives as many batches as the others.
        """
        self.called.eval()
        total, right, count = 0.0, 0.0, 0.0
        for batch in batches:
            batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
            logits: torch.Tensor | None
            if self.pipeline:
                logits = self.pipeline.forward(batch)
            else:
                logits = student.forward(self.called, batch, graph=self.student.graph)["logits"]
            if logits is None:
                continue
            targets = batch["targets"]
            total += float(
                cross_entropy(
                    logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
                )
            )
            right += float((logits.argmax(-1) == targets).sum())
            count += float((targets != IGNORE).sum())
        self.modes()
        return self.world.total([total, right, count])

    def gathered(self) -> dict[str, torch.Tensor] | None:
        """The whole model's parameters and buffers on the first rank, None on the others. Cost: the model in memory."""
        world = self.world
        mine = {}
        state = dict(self.inner.named_parameters()) | dict(self.inner.named_buffers())
        for name, tensor in state.items():
            full = shards.whole(tensor.detach()).cpu()
            if world.places["tp"] == world.places["dp"] == world.places["fsdp"] == 0:
                mine[self.whole_name(name)] = full
        if self.pipeline is None:
            return mine if world.first else None
        if world.places["tp"] or world.data_rank:
            return None
        group = world.group("pp")
        ranks = dist.get_process_group_ranks(group)
        for other in range(1, world.sizes["pp"]):
            told: list[Any] = [[(name, tensor.shape, tensor.dtype) for name, tensor in mine.items()]]
            dist.broadcast_object_list(told, src=ranks[other], group=group)
            for name, shape, dtype in told[0]:
                if world.places["pp"] == other:
                    dist.send(mine[name].contiguous(), ranks[0], group=group)
                elif world.first:
                    mine[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(mine[name], ranks[other], group=group)
        return mine if world.first else None


def agreed(error: Exception) -> Exception:
    """An error that every rank finds by itself: the first alone says it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def seed_of(seed: int, step: int, rank: int) -> int:
    """Of random numbers in an update: the same whenever the update is done."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")


def same_vocabulary(job: Job, teacher: student.Student, pupil: student.Student) -> None:
    """Raise BadInput when the logits of teacher and student do not mean the same."""
    if teacher.classes and pupil.classes and teacher.classes != pupil.classes:
        raise BadInput(
            f"the teacher {job.teacher} has {teacher.classes} classes or tokens, the student {pupil.classes}:"
            " their vocabularies must be the same"
        )
    files = [one.task.folder / "tokenizer.json" for one in (teacher, pupil)]
    if pupil.task.kind == "text-generation" and all(file.exists() for file in files):
        words = [one.task.tokenizer.get_vocab() for one in (teacher, pupil)]
        if words[0] != words[1]:
            odd = sorted(word for word in words[0] if words[1].get(word) != words[0][word])[:1]
            raise BadInput(
                f"the teacher {job.teacher} has another vocabulary: its token {odd[0] if odd else '?'!r} is not the"
                " student's of that number"
            )
    if teacher.task.labels and pupil.task.labels and teacher.task.labels != pupil.task.labels:
        raise BadInput(f"the teacher {job.teacher} has other labels than the student: {teacher.task.labels[:4]} ...")
