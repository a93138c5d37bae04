"""The clock of bench.structured: pruned models against dense ones in ONNX Runtime, one thread, in turn.

A round calls the dense model and each pruned one once; the speed-up is the median over rounds of dense / pruned, with
quartiles, by the wall clock and by CPU time (which other load moves less). `of_flops` is the speed-up over the ratio of
multiply-accumulates: 1 means that all of the time went. Lists are by batch size: see BATCHES.

    python bench/structured_clock.py MODEL.onnx [MODEL.onnx ...]     where the time goes: ONNX Runtime's own profile
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from structured_models import MODELS

BATCHES = {"minilm": (1, 16), "resnet20": (1, 16), "decoder": (1, 4)}
WARM, LEAST, MOST, SECONDS = 3, 15, 200, 12.0  # rounds; CPU seconds of all models together at one batch size
Row = dict[str, Any]


def session(folder: Path, work: Path) -> tuple[Any, int]:
    """The model in ONNX Runtime with one thread, exported first where it is no graph; numbers of a decoder's head."""
    import onnxruntime

    from wherry import shelf
    from wherry.checkpoint import Checkpoint

    checkpoint, file = Checkpoint.open(folder), folder / "model.onnx"
    if checkpoint.graph is None:
        exported = work / f"onnx-{folder.parent.name}-{folder.name}"  # two dense models are called "model"
        if not exported.exists():
            temporary = exported.with_name(f".{exported.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            shelf.find("formats", "onnx").save(checkpoint, temporary, lambda *_: None)
            temporary.rename(exported)
        file = exported / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return opened, checkpoint.config.get("head_dim", 0) if checkpoint.graph is None else 0


def call(opened: Any, head: int, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    """One run; a decoder's cache is empty, and all rows of its logits are made."""
    given = {}
    for value in opened.get_inputs():
        if value.name in feeds:
            given[value.name] = feeds[value.name]
        elif value.name.startswith("past_key_values."):
            rows = len(feeds["input_ids"])
            given[value.name] = np.zeros((rows, value.shape[1], 0, head), np.float32)
        elif value.name == "attention_mask":
            given[value.name] = np.ones_like(feeds["input_ids"])
    wanted = [opened.get_outputs()[0].name]
    return lambda: opened.run(wanted, given)


def measured(rows: list[Row], work: Path) -> dict[tuple[str, str], Row]:
    """{(model, folder): what the clock says}, for rows of bench.structured."""
    found: dict[tuple[str, str], Row] = {}
    for name, kind in MODELS.items():
        mine = [r for r in rows if r["model"] == name]
        if not mine:
            continue
        model = kind(work, None)
        opened = {"": session(model.path, work)} | {r["folder"]: session(work / r["folder"], work) for r in mine}
        for r in mine:
            found[name, r["folder"]] = {"batches": BATCHES[name]} | {
                key: [] for key in ("dense_ms", "ms", "speedup", "quartiles", "cpu_speedup", "of_flops", "cpu_of_flops")
            }
        for size in BATCHES[name]:
            calls = {key: call(*each, model.feeds(size)) for key, each in opened.items()}
            spent: dict[str, list[tuple[float, float]]] = {key: [] for key in calls}
            began = time.process_time()
            for i in range(MOST):
                if i >= LEAST and time.process_time() - began > SECONDS:
                    break
                for key, once in calls.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    once()
                    spent[key].append((time.perf_counter() - wall, time.process_time() - cpu))
            for r in mine:
                entry = found[name, r["folder"]]
                both = list(zip(spent[""][WARM:], spent[r["folder"]][WARM:], strict=True))
                walls, cpus = ([dense[i] / now[i] for dense, now in both] for i in (0, 1))
                wall, cpu = statistics.median(walls), statistics.median(cpus)
                entry["dense_ms"].append(1000 * statistics.median(dense[0] for dense, _ in both))
                entry["ms"].append(1000 * statistics.median(now[0] for _, now in both))
                entry["speedup"].append(wall)
                entry["quartiles"].append(statistics.quantiles(walls, n=4)[::2])
                entry["cpu_speedup"].append(cpu)
                entry["of_flops"].append(wall / r["flop_ratio"])
                entry["cpu_of_flops"].append(cpu / r["flop_ratio"])
                said = f"{name} {r['case']} {r['tool']} batch {size}"
                print(f"{said}: {wall:.2f} (CPU {cpu:.2f}), FLOPs {r['flop_ratio']:.2f}", flush=True)
    return found


def profile(file: Path, batch: int = 1, runs: int = 50) -> dict[str, float]:
    """Microseconds of one run by operator, largest first; inputs are zeros of the declared shapes."""
    import json
    import tempfile
    from collections import Counter

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, str(Path(tempfile.mkdtemp()) / "run")
    opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = {v.name: np.zeros([d if isinstance(d, int) else batch for d in v.shape], np.float32)
             for v in opened.get_inputs()}  # fmt: skip
    for _ in range(runs):
        opened.run(None, feeds)
    spent: Counter[str] = Counter()
    for event in json.loads(Path(opened.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / runs
    return dict(spent.most_common())


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for size in (1, 16):
            found = profile(Path(path), size)
            print(f"{path} batch {size}: {sum(found.values()):.0f} us", {name: round(us) for name, us in found.items()})
