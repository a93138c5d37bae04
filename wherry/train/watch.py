"""Watch: what a run writes about itself: metrics.jsonl, TensorBoard files, samples.jsonl of each rank, the report.

MFU: floating-point operations of an update, counted by torch as they are dispatched, over seconds and over the rate of
a large matrix product measured here, times the ranks: 1 would be an update that is nothing but such products.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wherry.report import Report
from wherry.train.heldout import Judged, together

SIDE = 1024  # of the measured matrix product
CURVES = (  # name in the report, in metrics.jsonl, unit
    ("training loss", "loss", "nats"),
    ("held-out loss", "held-out loss", "nats"),
    ("samples per second", "samples per second", "samples/s"),
)
POINTS = 200  # of a curve, at most
RECENT = 20  # updates that the shown loss is the mean of


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations per second of square products of 1024 here, with the threads in use."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))

    def once(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once(1)
    single = max(once(1), 1e-6)
    times = max(3, int(seconds / single))
    return 2 * SIDE**3 * times / once(times)


@dataclass
class Clock:
    """Seconds of updates: by the clock and of the processor over all starts of a run, and by the clock in this one."""

    wall: float = 0.0
    cpu: float = 0.0
    here: float = 0.0

    def __enter__(self) -> None:
        self.at = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self.at[0]
        self.wall, self.here = self.wall + passed, self.here + passed
        self.cpu += time.process_time() - self.at[1]


@contextmanager
def counted(wanted: bool) -> Iterator[Callable[[], int]]:
    """Gives a call that says how many floating-point operations were dispatched inside; 0 where that is not wanted."""
    if not wanted:
        yield lambda: 0
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield lambda: int(counter.get_total_flops())


class Log:
    """The files of one rank; metrics and curves on the first alone.

    done: updates that are behind; what was written beyond them by a run that was killed is dropped.
    """

    def __init__(self, folder: Path, rank: int, done: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.file = self.board = None
        if rank == 0:
            path = folder / "metrics.jsonl"
            self.rows = [row for row in lines(path) if row["update"] <= done]
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf8")
            self.file = open(path, "a", encoding="utf8")
            self.board = tensorboard(folder / "tensorboard", done)
        seen = folder / f"samples-{rank}.jsonl"
        kept = [row for row in lines(seen) if row["update"] <= done]
        seen.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf8")
        self.seen = open(seen, "a", encoding="utf8")

    def saw(self, update: int, ids: np.ndarray) -> None:
        """Note the samples of this rank."""
        self.seen.write(json.dumps({"update": update, "samples": ids.tolist()}) + "\n")

    def write(self, row: dict[str, Any]) -> None:
        """Note an update: update, loss, and what else is known."""
        self.rows.append(row)
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "update" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["update"])

    def judged(self, update: int, found: list[Judged]) -> None:
        """Note the loss on held-out data after an update, once; update 0: before the first."""
        if any(row["update"] == update and "held-out loss" in row for row in self.rows):
            return
        row: dict[str, Any] = {"update": update, "held-out loss": together(found)[0]}
        for one in found:
            where = f" {one.name}" if len(found) > 1 else ""
            row |= {f"held-out loss{where}": one.loss}
            row |= {} if one.bits_per_byte is None else {f"bits per byte{where}": one.bits_per_byte}
        self.write(row)

    def flush(self) -> None:
        """Put everything on disk, as it stands beside a checkpoint."""
        for file in (self.file, self.seen, self.board):
            if file is not None:
                file.flush()

    def back(self, done: int) -> None:
        """Forget the updates after `done`, which are done again."""
        self.rows = [row for row in self.rows if row["update"] <= done]

    def losses(self) -> list[float]:
        """Of the updates so far, each once."""
        return [row["loss"] for row in self.rows if "loss" in row]

    def close(self) -> None:
        """Close the files."""
        for file in (self.file, self.seen, self.board):
            if file is not None:
                file.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; the last may be cut off by a kill."""
    found = []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def tensorboard(folder: Path, done: int) -> Any:
    """A writer of TensorBoard's files, or None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)


def report(result: dict[str, Any], rows: list[dict[str, Any]]) -> Report:
    """Rows of a finished run: figures, and its curves over updates (at most 200 points each; see `page.curves`)."""
    made = Report(f"training: {result['model']} -> {result['out']}")
    made.add("updates", "", result["steps"])
    made.add("training loss", "", result["loss"], "nats", note=f"mean of the last {RECENT} updates")
    if result["held_out"] is not None:
        made.add("held-out loss, before", "", result["held_out_before"], "nats")
        made.add("held-out loss", "", result["held_out"], "nats")
        made.add("held-out accuracy", "", result["held_out_accuracy"], note="likeliest token or class is the target")
    for one in result["judged"]:
        where = one["name"] if len(result["judged"]) > 1 else ""
        if where:
            made.add("held-out loss", where, one["loss"], "nats")
        if one["bits_per_byte"] is not None:
            made.add("bits per byte", where, one["bits_per_byte"], "bits")
    made.add("seconds", "", result["seconds"], "s", note="of updates, over all starts of the run")
    made.add("processor seconds", "", result["cpu_seconds"], "s", note="the same, all threads of the first rank")
    made.add("samples per second", "", result["samples_per_second"], "samples/s")
    if result["tokens_per_second"]:
        made.add("tokens per second", "", result["tokens_per_second"], "tokens/s")
    if result["mfu"] is not None:
        made.add("MFU", "", 100 * result["mfu"], "%", note="of the matrix products' rate measured here")
    made.add("ranks", "", result["ranks"], note=result["layout"])
    made.add("parameters", "", result["params"], note=f"{result['trained']} of them trained")
    if result["skipped"]:
        made.add("updates left out", "", result["skipped"], note="their loss or gradient was not finite")
    if result["rollbacks"]:
        made.add("rollbacks", "", result["rollbacks"], note="to the newest checkpoint, at half the learning rate")
    for note in result["notes"]:
        made.add("note", "", None, note=note)
    for what, field, unit in CURVES:
        curve = [row for row in rows if field in row]
        every = max(1, -(-len(curve) // POINTS))
        for row in curve[(len(curve) - 1) % every :: every]:  # the last is there
            made.add(f"curve: {what}", f"update {row['update']}", row[field], unit)
    return made
