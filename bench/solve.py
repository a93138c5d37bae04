"""Time of the solvers per 10^9 parameters, and where it goes.

    python bench/solve.py                          a block's linears of 2048 x 2048 to 2048 x 5632, one thread
    python bench/solve.py --methods gptq --profile 20
    python bench/solve.py --device cuda            where there is one

Weights are random; inputs are correlated. CPU seconds of this process (what others do on the machine does not count),
wall seconds on a device. `observe` is the product of 2 k tokens and counts per layer; layers that share an input share
it, as they do in a walk. Rows go to bench/results/solve.json with date and hash of the code.
"""

import argparse
import datetime
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from wherry.recipe import build

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "solve.json"
CODE = ("ops/grid.py", "ops/solve.py", "quant/gptq.py", "quant/gptaq.py", "quant/awq.py", "quant/hqq.py")
SHAPES = ((2048, 2048, 3), (2048, 2048, 1), (5632, 2048, 2), (2048, 5632, 1))  # outputs, inputs, layers of that input
METHODS = ("rtn", "hqq", "awq", "gptq", "gptaq")


def digest() -> str:
    """Of the files whose speed this is."""
    root = HERE.parent / "wherry"
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in CODE)).hexdigest()[:16]


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, by the wall on a device that is done with its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(method: str, scheme: str, device: str) -> dict[str, Any]:
    """One method over a block's shapes: seconds of observing and of solving, and the parameters."""
    step = build(method, {"scheme": scheme, "group_size": 128})
    observing = solving = 0.0
    count = 0
    for n, k, layers in SHAPES:
        g = torch.Generator().manual_seed(k)
        x = (torch.randn(2 * k, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)).to(device)
        x = x + 0.1 * torch.randn(x.shape, generator=g).to(device)
        stat: Any = None
        if hasattr(step, "observe"):
            began = clock(device)
            stat = step.observe(None, x, *([1.01 * x] if method == "gptaq" else []))
            observing += clock(device) - began
        for layer in range(layers):
            w = (0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(layer))).to(device)
            began = clock(device)
            step.solve(w, stat)
            solving += clock(device) - began
            count += n * k
    return {
        "method": method, "scheme": f"{scheme},group_size=128", "device": device, "parameters": count,
        "observe s": round(observing, 3), "solve s": round(solving, 3),
        "solve s per 1e9": round(solving / count * 1e9, 1),
    }  # fmt: skip


def profile(method: str, scheme: str, device: str, rows: int) -> str:
    """The operators that take the time of one 2048 x 2048 layer."""
    step = build(method, {"scheme": scheme, "group_size": 128})
    x = torch.randn(4096, 2048, device=device)
    stat = step.observe(None, x, *([x] if method == "gptaq" else [])) if hasattr(step, "observe") else None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        step.solve(torch.randn(2048, 2048, device=device), stat)
    return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--scheme", default="W4A16_ASYM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    parser.add_argument("--label", default="", help="stored with the rows: what code this was")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    old = json.loads(RESULTS.read_text(encoding="utf8")) if RESULTS.exists() else []
    for method in given.methods.split(","):
        stamp = {"date": datetime.date.today().isoformat(), "code": digest(), "torch": torch.__version__}
        row = measure(method, given.scheme, given.device) | stamp | {"threads": given.threads, "label": given.label}
        print(json.dumps(row), flush=True)
        key = ("method", "scheme", "device", "threads", "label")
        old = [other for other in old if any(other[name] != row[name] for name in key)] + [row]
        RESULTS.write_text(json.dumps(old, indent=1) + "\n", encoding="utf8")
        if given.profile:
            print(profile(method, given.scheme, given.device, given.profile))


if __name__ == "__main__":
    main()
