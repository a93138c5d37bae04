"""Loop: one program for one or many processes: updates in the job's order, checkpoints, rollbacks, the export.

A run works in `.NAME.partial-FINGERPRINT` beside its output, as every run of wherry; the same command goes on at the
newest whole checkpoint, on any number of ranks, and sees the samples that an uninterrupted run would have seen.
"""

import dataclasses
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry import __version__, page
from wherry.checkpoint import Safetensors
from wherry.errors import BadInput, Diverged, Exhausted, Missing
from wherry.journal import Journal
from wherry.objective import IGNORE, Objective
from wherry.report import write_atomic
from wherry.train import cache as teachers
from wherry.train import mesh, order, pictures, samples, save, student, watch
from wherry.train import start as starts
from wherry.train.heldout import HeldOut, Judged, together
from wherry.train.job import Job
from wherry.train.learner import Learner, agreed, seed_of
from wherry.train.mesh import World
from wherry.train.text import Batch, Cut

Progress = Callable[[int, int, str], None]
Judge = Callable[[int, float], None]  # (update, held-out loss); what it raises ends the run
TEXT = ("text-generation", "sentence-similarity")  # tasks whose samples are cut to a length
LENGTH = 512  # tokens of a sample where the job does not say
SAVE_S = 600.0  # between checkpoints where the job does not say
PATIENCE = 3  # updates in a row that may fail to be finite
ROLLBACKS = 3  # before a run gives up


def quiet(done: int, total: int, text: str) -> None:
    """A progress display that shows nothing."""


def run(job: Job, progress: Progress = quiet, judge: Judge | None = None) -> dict[str, Any]:
    """Train and write `job.out`; on several processes when torchrun started them.

    Returns:
        steps, loss (mean of the last 20 updates), losses (all, nats per target), held_out and held_out_before (means,
        or None), held_out_accuracy, seconds (of updates), samples_per_second, tokens_per_second, mfu, params, trained,
        skipped, rollbacks, ranks, layout, out, model.

    Raises:
        BadInput: the job does not fit its model, data or number of processes. Diverged: the loss is not finite, also
        after going back. Exhausted: the disk is full, a rank was lost, or a signal (SIGTERM) asked to stop; the same
        call goes on. `agreed` is True on errors that every rank raises.
    """
    with mesh.joined(job) as world:
        begun = world.agree(lambda: starts.begun(job, world.first))
        world.barrier()
        result = Run(begun, world, judge).go(progress)
        if begun is not job and world.first:
            shutil.rmtree(begun.model)
        return result


class Run:
    """One run on one rank."""

    def __init__(self, job: Job, world: World, judge: Judge | None = None) -> None:
        self.job, self.world, self.judge = job, world, judge
        self.objective = world.agree(lambda: Objective.parse(job.recipe))
        self.stop = False
        self.learner = Learner(job, world, self.objective)
        self.student = self.learner.student
        self.cache = Path(job.cache) if job.cache else Path(job.out).parent / f".{Path(job.out).name}.tokens"
        world.agree(self._open_data)
        self.steps = job.steps or max(1, round(job.epochs * len(self.data) / job.batch))
        if self.order is not None and self.steps > len(self.order):
            raise agreed(BadInput(f"{job.order} is for {len(self.order)} updates, {self.steps} are to be done"))
        if job.top and self.learner.teacher is not None:
            self._ask_teacher()
        self.journal: Journal | None = None
        self.folder = Path(self._shared(self._open_journal))
        self.saver = save.Saver(self.folder / "checkpoints", world, job.keep, job.fingerprint)
        self.skipped = self.rollbacks = self.flops = 0
        self.clock = watch.Clock()
        self.notes = ["MFU counts the activations that are computed again"] if job.recompute else []
        self.begin = self._resume(job.resume)
        self.log = world.agree(lambda: watch.Log(self.folder, world.rank, self.begin))

    def _open_data(self) -> None:
        job, task = self.job, self.student.task
        self.length = min(job.length or LENGTH, task.max_length) if task.kind in TEXT else 0
        if self.length and job.length > task.max_length:
            raise BadInput(f"length {job.length}: {job.model} takes {task.max_length} tokens at most")

        if task.kind != "text-generation" and (job.stride or job.overlap or job.use_cache):
            raise BadInput(f"stride, overlap and use_cache are for language models; this is {task.kind}")
        cut = Cut(self.length, job.packing, job.stride)
        judged = Cut(self.length, job.packing, 0, job.overlap, judged=True)
        self.data: Any = samples.opened(job.data, task, cut, self.cache)
        if self.learner.teacher is not None:
            samples.told(self.data, self.learner.teacher.task)
        self.held_out: HeldOut | None = None
        if job.held_out:
            held_out = samples.opened(job.held_out, task, judged, self.cache)
            if {p.digest for p in held_out.parts} & {p.digest for p in self.data.parts}:
                raise BadInput("held_out is among the training data: a model must be judged on other data")
            self.held_out = HeldOut(held_out, job.micro_batch or max(1, job.batch // self.world.data_size))
        self.order = order.given(Path(job.order), job.batch, len(self.data)) if job.order else None
        self._ids(0)
        self.turns = pictures.ways(job.augment)
        if self.turns and task.modality != "image":
            raise BadInput(f"augment {job.augment} is for pictures; this model takes {task.modality}")

    def _ask_teacher(self) -> None:
        """Ask the teacher once, keep its answers on disk, let it go; see `cache`."""
        job, world, teacher = self.job, self.world, self.learner.teacher
        world.agree(lambda: teachers.fits(job, self.objective))
        asked = next(step for step in self.objective.losses if "teacher" in step.needs)
        source = teacher.checkpoint.source if teacher.checkpoint is not None else Safetensors(Path(job.teacher))
        facts = teachers.Facts(
            top=job.top, temperature=asked.temperature, classes=self.student.classes, dtype="float16",
            teacher=source.fingerprint(), data=self.data.digest, length=self.length,
        )  # fmt: skip
        each = (order.share(self._ids(step), world.data_rank, world.data_size) for step in range(self.steps))
        try:
            answered = teachers.answered(
                teacher, self.data, each, self.cache / "teacher", facts, world.rank, lambda: world.check(None), quiet,
                self.steps, world.size,
            )  # fmt: skip
        except Exception as error:  # told to all ranks, unless they know
            if not getattr(error, "agreed", False):
                world.check(error)
            raise
        self.data, self.learner.teacher = answered, answered.cached

    def _ids(self, step: int) -> np.ndarray:
        """Samples of an update, on all ranks."""
        if self.order is not None:
            return np.asarray(self.order[step], np.int64)
        return order.mixed(step, self.job.batch, self.data.sizes, self.data.weights, self.job.seed)

    def _open_journal(self) -> str:
        stamp = {"job": self.job.fingerprint, "data": self.data.digest, "wherry": __version__}
        if self.order is not None:
            stamp["order"] = hashlib.sha256(self.order.tobytes()).hexdigest()
        self.journal = Journal(Path(self.job.out), stamp)
        self.job.save(self.journal.folder / "job.json")
        return str(self.journal.folder)

    def _shared(self, work: Callable[[], str]) -> str:
        """What the first rank finds, on all."""
        found = self.world.agree(lambda: work() if self.world.first else "")
        if self.world.size == 1:
            return found
        told = [found]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def _state(self) -> save.State:
        return save.state_of(self.learner.inner, self.learner.optimizers, self.learner.whole_name)

    def _resume(self, named: str = "") -> int:
        """Read the newest whole checkpoint, or the one that is named; gives the updates that it has behind it."""
        whole = self._shared(lambda: " ".join(map(str, self.saver.whole()))).split()
        path = self.saver.path(int(whole[-1])) if whole else Path(named) if named else None
        if path is None:
            return 0
        if not (path / ".metadata").exists():
            raise agreed(Missing(f"{path} is not a whole checkpoint: a folder update-... of a run is wanted"))
        if any(not optimizer.state for optimizer in self.learner.optimizers):
            save.wake(self.learner.optimizers)
        facts = self.world.agree(lambda: self.saver.read(self._state(), path))
        self.learner.scale = float(facts.get("scale", 1.0))
        self.skipped, self.rollbacks = int(facts.get("skipped", 0)), int(facts.get("rollbacks", 0))
        self.flops = int(facts.get("flops", 0))
        if not self.clock.here:  # later, going back does not undo the time
            self.clock = watch.Clock(float(facts.get("seconds", 0.0)), float(facts.get("cpu_seconds", 0.0)))
        return int(facts["update"]) if whole else 0

    def go(self, progress: Progress) -> dict[str, Any]:
        """All updates, then the export."""
        before = self.measure() if self.held_out is not None and not self.begin else None
        if before:
            self.log.judged(0, before)
        restore = self._listen()
        loader = ThreadPoolExecutor(1)
        try:
            self._updates(loader, progress)
            self.saver.wait()
            after = self.measure() if self.held_out is not None else None
            if after:
                self.log.judged(self.steps, after)
        finally:
            loader.shutdown(wait=True, cancel_futures=True)
            self.saver.close()
            restore()
            self.log.close()
        result = self._result(before, after)
        self._export(result)
        return result

    def _updates(self, loader: ThreadPoolExecutor, progress: Progress) -> None:
        job, learner = self.job, self.learner
        step, failed = self.begin, 0
        saved_at, saved = time.monotonic(), self.begin
        ahead = loader.submit(self._load, step)
        while step < self.steps:
            problem: Exception | None = None
            batches: list[Batch] = []
            unsaved = self.saver.problem()
            due = not job.save_every and time.monotonic() - saved_at > SAVE_S
            flags = (float(self.stop), float(self.world.first and due))
            with self.clock:
                try:
                    ids, batches = ahead.result()
                except Exception as error:  # told to all ranks by `update`
                    problem = error
                ahead = loader.submit(self._load, min(step + 1, self.steps - 1))
                count = step == min(1, self.steps - 1)  # it may change the last bits: once in a run
                done = learner.update(step, self.steps, batches, problem or unsaved, flags, count)
            self.flops = self.flops or done.flops
            step += 1
            self.log.saw(step, ids)
            row = {"update": step, "loss": done.loss, "norm": done.norm, "rate": done.rate}
            if len(done.terms) > 1:
                row |= {f"loss {s.method}": t for s, t in zip(self.objective.losses, done.terms, strict=True)}
            row["samples per second"] = job.batch * (step - self.begin) / self.clock.here
            if done.finite:
                failed = 0
                self.log.write(row)
            else:
                failed, self.skipped = failed + 1, self.skipped + 1
                if failed >= PATIENCE or step == self.steps:
                    step = self._back(step, failed)
                    failed, ahead = 0, self._again(loader, ahead, step)
                    continue
            progress(step, self.steps, self._line(done.loss, step))
            stop, clock = done.flags
            if job.eval_every and step % job.eval_every == 0 and step < self.steps and self.held_out is not None:
                found = self.measure()
                self.log.judged(step, found)
                if self.judge is not None:
                    self.judge(step, together(found)[0])
            every = job.save_every and step % job.save_every == 0 and step < self.steps
            if (every or clock or stop) and step != saved and not failed:
                self.log.flush()
                self.saver.save(step, self._state(), self._facts())
                saved, saved_at = step, time.monotonic()
            if stop and not failed:
                self.saver.wait()
                raise agreed(Exhausted(f"stopped by a signal after update {step}, which is saved.\n"
                                       "The same command goes on there."))  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        return {
            "scale": self.learner.scale, "skipped": self.skipped, "rollbacks": self.rollbacks, "flops": self.flops,
            "seconds": self.clock.wall, "cpu_seconds": self.clock.cpu,
        }  # fmt: skip

    def _again(self, loader: ThreadPoolExecutor, ahead: Future, step: int) -> Future:
        ahead.cancel()
        return loader.submit(self._load, step)

    def _back(self, step: int, failed: int) -> int:
        """To the newest checkpoint, at half the learning rate. Raises Diverged when that does not help either."""
        self.saver.wait()
        self.rollbacks += 1
        scale, skipped, count = self.learner.scale / 2, self.skipped, self.rollbacks
        if self.world.first:  # after it not one update was finite: its weights are what is wrong
            self.saver.drop(step - failed)
        whole = self._shared(lambda: " ".join(map(str, self.saver.whole())))
        if count > ROLLBACKS or not whole:
            raise agreed(Diverged(
                f"the loss or its gradient is not finite at updates {step - failed + 1} to {step}"
                f"{f', after {count - 1} rollbacks' if whole else ', and there is no checkpoint to go back to'}.\n"
                "Lower --learning-rate, or raise --warmup."
            ))  # fmt: skip
        back = self._resume()
        self.learner.scale, self.skipped, self.rollbacks = scale, skipped, count
        self.log.back(back)
        return back

    def _line(self, loss: float, step: int) -> str:
        recent = [row["loss"] for row in self.log.rows[-watch.RECENT :] if "loss" in row] or [loss]
        rate = self.job.batch * max(1, self.length) * (step - self.begin) / self.clock.here
        return f"loss {np.mean(recent):.4f}, {rate:,.0f} {'tokens' if self.length else 'samples'}/s"

    def _listen(self) -> Callable[[], None]:
        """Heed SIGTERM: save after the update, and end. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        old = signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "stop", True))
        return lambda: self._deaf(old)

    def _deaf(self, old: Any) -> None:
        signal.signal(signal.SIGTERM, old)

    def _load(self, step: int) -> tuple[np.ndarray, list[Batch]]:
        """This rank's samples of an update, in micro-batches."""
        job = self.job
        mine = order.share(self._ids(step), self.world.data_rank, self.world.data_size)
        size = self.learner.rows or min(job.micro_batch or len(mine), len(mine))
        made = [self.data.batch(mine[i : i + size]) for i in range(0, len(mine), size)]
        if self.turns:
            chance = torch.Generator().manual_seed(seed_of(job.seed + 1, step, self.world.data_rank))
            made = [pictures.turned(batch, self.student.task.inputs[0], self.turns, chance) for batch in made]
        for batch in made:
            self._check(batch)
        return mine, made

    def _check(self, batch: Batch) -> None:
        """Labels inside of the logits, and a text's tokens, of which the first is no label. Raises BadInput."""
        classes = self.student.classes
        numbers = {"label": batch["targets"][batch["targets"] != IGNORE]}
        if self.student.task.kind == "text-generation":
            numbers["token"] = batch["input_ids"]
        for what, found in numbers.items():
            low, high = (int(found.min()), int(found.max())) if found.numel() else (0, 0)
            if low < 0 or classes and high >= classes:
                raise BadInput(
                    f"the {what} {low if low < 0 else high} is out of range: {self.job.model} has {classes} classes or"
                    " tokens"
                )

    def measure(self) -> list[Judged]:
        """The student on each source of the held-out data."""
        assert self.held_out is not None
        return self.held_out.measure(self.learner)

    def _result(self, before: list[Judged] | None, after: list[Judged] | None) -> dict[str, Any]:
        job, world, learner, seconds = self.job, self.world, self.learner, self.clock.here
        done = self.steps - self.begin
        seen = done * job.batch
        dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
        mfu = None
        if self.flops and seconds:
            mfu = self.flops * done / seconds / watch.matmul_rate(world.device, dtype)
        losses = self.log.losses()
        params = [(p.numel(), p.requires_grad) for p in learner.inner.parameters()]
        return {
            "model": job.model, "out": job.out, "steps": self.steps, "losses": losses,
            "loss": float(np.mean(losses[-watch.RECENT :])) if losses else None,
            "held_out_before": together(before)[0] if before else None,
            "held_out": together(after)[0] if after else None,
            "held_out_accuracy": together(after)[1] if after else None,
            "judged": [dataclasses.asdict(one) for one in after or ()],
            "seconds": self.clock.wall, "cpu_seconds": self.clock.cpu,
            "samples_per_second": seen / seconds if seconds else 0.0,
            "tokens_per_second": seen * self.length / seconds if seconds else 0.0, "mfu": mfu, "ranks": world.size,
            "layout": " x ".join(f"{k} {v}" for k, v in world.sizes.items() if v > 1) or "one process",
            "params": sum(n for n, _ in params), "trained": sum(n for n, learns in params if learns),
            "skipped": self.skipped, "rollbacks": self.rollbacks, "notes": self.notes, "resumed_at": self.begin,
        }  # fmt: skip

    def _export(self, result: dict[str, Any]) -> None:
        """The first rank writes the whole student, as a model that every other verb takes."""
        self.world.barrier()  # every rank has closed its files
        state = self.learner.gathered() if self.world.size > 1 else None
        self.world.agree(lambda: self._write(state, result) if self.world.first else None)

    def _write(self, state: dict[str, torch.Tensor] | None, result: dict[str, Any]) -> None:
        made = self.student
        if state is not None:  # a module that was cut up is made again, whole
            made = student.opened(self.job.model)
            for step in self.objective.having("prepare"):
                step.prepare(made.module, made.checkpoint)
            student.load(made.module, state)
        made.module.cpu()
        student.laid(made.module, torch.contiguous_format)
        with torch.no_grad():
            for step in reversed(self.objective.having("finish")):
                step.finish(made.module, made.checkpoint)
        assert self.journal is not None
        out = self.folder / "result"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        student.write(made, out, [(part.name, part.digest) for part in self.data.parts])
        report = watch.report(result, self.log.rows)
        report.save(out / "report.json")
        write_atomic(out / "report.html", page.render(report))
        for pattern in ("metrics.jsonl", "samples-*.jsonl", "tensorboard", "job.json"):
            for path in self.folder.glob(pattern):
                os.rename(path, out / path.name)
        self.journal.finish(out)
