"""Loop: one program for one or many processes: data in the job's order, the objective's mean, updates, an export.

The loss of an update is  sum_i weight_i * (sum over all ranks and micro-batches of step i) / (count of the same),
so it does not depend on how a batch is cut. Counts are known before the forward pass, so that each micro-batch's
gradient is divided at once.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry import __version__
from wherry.errors import BadInput, Diverged
from wherry.journal import Journal
from wherry.objective import IGNORE, Objective
from wherry.train import cache as teachers
from wherry.train import mesh, order, rate, samples, student
from wherry.train.job import Job
from wherry.train.samples import Batch

Progress = Callable[[int, int, str], None]
TEXT = ("text-generation", "sentence-similarity")  # tasks whose samples are cut to a length
LENGTH = 512  # tokens of a sample where the job does not say


def quiet(done: int, total: int, text: str) -> None:
    """A progress display that shows nothing."""


def run(job: Job, progress: Progress = quiet) -> dict[str, Any]:
    """Train and write `job.out`; on several processes when torchrun started them.

    Returns:
        steps, loss (mean of the last 20 updates), losses (all, nats), held_out (mean after the last update, or None),
        seconds (of updates), samples_per_second, tokens_per_second, params, out.

    Raises:
        BadInput: the job does not fit its model, data or number of processes. Diverged: the loss is not finite.
    """
    with mesh.joined(job) as world:
        return Run(job, world).go(progress)


def own(batch: Batch) -> Batch:
    """The teacher's inputs of a batch: its own where it cuts texts into other tokens, else the student's."""
    mine = {n.removeprefix(samples.TEACHER): t for n, t in batch.items() if n.startswith(samples.TEACHER)}
    return mine or batch


class Run:
    """One run on one rank."""

    def __init__(self, job: Job, world: mesh.World) -> None:
        self.job, self.world = job, world
        self.objective = Objective.parse(job.recipe)
        self.student = student.opened(job.model)
        self.teacher: Any = self._teacher()
        task = self.student.task
        self.length = min(job.length or LENGTH, task.max_length) if task.kind in TEXT else 0
        if job.length > task.max_length and self.length:
            raise BadInput(f"length {job.length}: {job.model} takes {task.max_length} tokens at most")
        out = Path(job.out)
        cache = Path(job.cache) if job.cache else out.parent / f".{out.name}.tokens"
        self.data: Any = samples.opened(job.data, task, self.length, job.packing, cache)
        if self.teacher is not None:
            samples.told(self.data, self.teacher.task)
        self.held_out = (
            samples.opened(job.held_out, task, self.length, job.packing, cache) if job.held_out else None
        )
        self.steps = job.steps or max(1, round(job.epochs * len(self.data) / job.batch))
        stamp = {"job": job.fingerprint, "data": self.data.digest, "wherry": __version__}
        self.journal = Journal(out, stamp)
        for step in self.objective.having("prepare"):
            step.prepare(self.student.module, self.student.checkpoint)
        self.module = self.student.module.to(world.device)
        if job.top:
            self._cache(cache)
        student.norms(self.module, job.norms)
        self.optimizers = rate.optimizers(job, self.module.named_parameters())

    def _teacher(self) -> student.Student | None:
        if "teacher" not in self.objective.needs:
            return None
        if not self.job.teacher:
            names = ", ".join(step.method for step in self.objective.steps if "teacher" in step.needs)
            raise BadInput(f"{names}: a teacher is wanted. Give --teacher MODEL.")
        made = student.opened(self.job.teacher)
        if made.classes and self.student.classes and made.classes != self.student.classes:
            raise BadInput(
                f"the teacher {self.job.teacher} has {made.classes} classes or tokens, the student"
                f" {self.student.classes}: their vocabularies must be the same"
            )
        made.module.eval().requires_grad_(False)
        made.module.to(self.world.device)
        return made

    def _cache(self, folder: Path) -> None:
        """Ask the teacher once, keep its answers, let it go."""
        job, world, teacher = self.job, self.world, self.teacher
        assert teacher is not None
        facts = teachers.Facts(
            top=job.top, temperature=next(s.temperature for s in self.objective.steps if hasattr(s, "temperature")),
            classes=self.student.classes, dtype="float16", teacher=teacher.checkpoint.source.fingerprint(),
            data=self.data.digest, length=self.length,
        )  # fmt: skip
        each = (order.share(order.mixed(step, job.batch, self.data.sizes, self.data.weights, job.seed),
                            world.data_rank, world.data_size) for step in range(self.steps))  # fmt: skip
        answered = teachers.answered(teacher, self.data, each, folder / "teacher", facts, world.data_rank,
                                   lambda: None, quiet, self.steps)  # fmt: skip
        self.data, self.teacher = answered, answered.cached

    def go(self, progress: Progress) -> dict[str, Any]:
        """All updates, then the export."""
        losses: list[float] = []
        log = open(self.journal.folder / "metrics.jsonl", "a", encoding="utf8")
        with log, ThreadPoolExecutor(1) as loader:
            began = time.perf_counter()
            for step, batches in enumerate(self._batches(loader)):
                loss, norm = self._update(step, batches)
                losses.append(loss)
                log.write(json.dumps({"step": step + 1, "loss": loss, "norm": norm}) + "\n")
                progress(step + 1, self.steps, f"loss {np.mean(losses[-20:]):.4f}")
            seconds = time.perf_counter() - began
        held_out = self.measure() if self.held_out else None
        self._export()
        seen = self.steps * self.job.batch
        return {
            "steps": self.steps, "loss": float(np.mean(losses[-20:])), "losses": losses, "held_out": held_out,
            "seconds": seconds, "samples_per_second": seen / seconds,
            "tokens_per_second": seen * self.length / seconds, "out": self.job.out,
            "params": sum(p.numel() for p in self.module.parameters()),
        }  # fmt: skip

    def _batches(self, loader: ThreadPoolExecutor) -> Iterator[list[Batch]]:
        """The micro-batches of each update; those of the next are made meanwhile."""
        ahead = loader.submit(self._load, 0)
        for step in range(self.steps):
            found = ahead.result()
            if step + 1 < self.steps:
                ahead = loader.submit(self._load, step + 1)
            yield found

    def _load(self, step: int) -> list[Batch]:
        job, data = self.job, self.data
        ids = order.mixed(step, job.batch, data.sizes, data.weights, job.seed)
        mine = order.share(ids, self.world.data_rank, self.world.data_size)
        size = min(job.micro_batch or len(mine), len(mine))
        made = [self.data.batch(mine[i : i + size]) for i in range(0, len(mine), size)]
        for batch in made:
            self._check(batch)
        return made

    def _check(self, batch: Batch) -> None:
        """Labels inside of the logits. Raises BadInput."""
        counted = batch["targets"][batch["targets"] != IGNORE]
        if not len(counted):
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or self.student.classes and high >= self.student.classes:
            wrong = low if low < 0 else high
            raise BadInput(
                f"the label {wrong} is out of range: {self.job.model} has {self.student.classes} classes or tokens"
            )

    def _update(self, step: int, batches: list[Batch]) -> tuple[float, float]:
        """One update; gives the loss and the norm of its gradient."""
        torch.manual_seed(hash((self.job.seed, step, self.world.data_rank)) % (1 << 62))
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = group["peak"] * rate.share(self.job, step, self.steps)
        counts = [sum(c) for c in zip(*(self.objective.counts(batch) for batch in batches), strict=True)]
        totals = self.world.total([float(c) for c in counts])
        if not all(totals):
            raise BadInput(f"update {step + 1}: a batch without a single target: nothing to learn from")
        sums = [0.0] * len(totals)
        for batch in batches:
            batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
            terms = self._terms(batch, step)
            loss = sum(s.weight * t / n for s, t, n in zip(self.objective.losses, terms, totals, strict=True))
            loss.backward()
            sums = [a + float(t.detach()) for a, t in zip(sums, terms, strict=True)]
        found = self.world.total(sums)
        value = sum(s.weight * t / n for s, t, n in zip(self.objective.losses, found, totals, strict=True))
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.job.clip or float("inf")))
        if not np.isfinite(value) or not np.isfinite(norm):
            raise Diverged(f"the loss is {value} at update {step + 1}: lower the learning rate")
        for one in self.optimizers:
            one.step()
            one.zero_grad()
        for later in self.objective.having("after"):
            with torch.no_grad():
                later.after(self.module, step)
        return value, norm

    def _terms(self, batch: Batch, step: int) -> list[torch.Tensor]:
        needs = self.objective.needs
        for one in self.objective.having("sample"):
            batch = one.sample(self.module, batch, step)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher.call(own(batch), needs) | {"mask": own(batch).get("attention_mask")}
        bf16 = self.job.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            made = student.forward(self.module, batch, needs, self.student.graph)
        return self.objective.terms(made, teacher, batch)

    @torch.no_grad()
    def measure(self) -> float:
        """Mean cross-entropy in nats per target of held-out data."""
        assert self.held_out is not None
        self.module.eval()
        total, count = 0.0, 0
        size = self.job.micro_batch or self.job.batch
        for start in range(0, len(self.held_out), size):
            batch = self.held_out.batch(np.arange(start, min(start + size, len(self.held_out))))
            batch = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
            logits = student.forward(self.module, batch, graph=self.student.graph)["logits"]
            total += float(torch.nn.functional.cross_entropy(
                logits.flatten(0, -2).float(), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum"
            ))  # fmt: skip
            count += int((batch["targets"] != IGNORE).sum())
        student.norms(self.module.train(), self.job.norms)
        return total / max(1, count)

    def _export(self) -> None:
        for step in self.objective.having("finish"):
            step.finish(self.module, self.student.checkpoint)
        result = self.journal.folder / "result"
        result.mkdir(exist_ok=True)
        student.write(self.student, result, (self.data.name, self.data.digest))
        self.journal.finish(result)
