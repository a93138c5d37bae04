"""What training on several processes costs: scaling, the loop's own time, memory and bytes against theory.

    python -m bench.training scaling|overhead|memory|bytes [--out bench/results/training.json]

scaling:  samples per second of 2 ranks x 1 thread over 1 rank x 1 thread, the same --batch of samples per rank; a row
          for each batch.
overhead: seconds of an update of our loop over those of a bare PyTorch loop on the same model, data and optimizer; the
          two take turns, the ratio is of the medians.
memory:   bytes of parameters, gradients and AdamW's state on each rank, under DDP and under FSDP2, against 16 N and
          16 N / ranks.
bytes:    bytes that a rank sends in one update, from the kernel's counter of the loopback interface, against theory for
          a ring: DDP 2 (R - 1) / R x 4 N; FSDP2 3 (R - 1) / R x 4 N. Through gloo FSDP2 is otherwise: its
          reduce-scatter is an all-reduce (twice the bytes); what is outside of the blocks is gathered once, not twice.
Each part takes below two minutes on two cores. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS, BATCH, LENGTH = 10, 24, 128


def model(folder: Path, hidden: int = 256, layers: int = 4) -> Path:
    """An untrained Llama of about 5 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 4096, 200_000))
    return folder


def job(folder: Path, out: str, ranks: int = 1, **more: Any) -> dict[str, Any]:
    """A job's fields."""
    return {
        "model": str(folder), "out": str(folder / out), "data": str(folder / "tokens.npy"), "steps": STEPS,
        "batch": BATCH * ranks, "length": LENGTH, "learning_rate": 1e-4, "threads": 1, **more,
    }  # fmt: skip


def sent() -> int:
    """Bytes that have gone out on the loopback interface."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def rank(path: Path) -> None:
    """One rank of a run: seconds of each update after the second, bytes sent, bytes held."""
    import torch

    from wherry.train import loop, mesh, shards
    from wherry.train.job import Job

    times: list[tuple[float, int]] = []
    wanted = Job.load(path)
    with mesh.joined(wanted) as world:
        run = loop.Run(wanted, world)
        run.go(lambda done, total, text: times.append((time.perf_counter(), sent())))
        held = {"parameters": 0, "gradients": 0, "optimizer": 0}
        for p in run.learner.trained:
            held["parameters"] += shards.local(p).nbytes
            held["gradients"] += shards.local(p).nbytes  # a gradient has its parameter's shape
        for optimizer in run.learner.optimizers:
            for state in optimizer.state.values():
                held["optimizer"] += sum(shards.local(t).nbytes for t in state.values() if isinstance(t, torch.Tensor))
        found = {
            "seconds": [b[0] - a[0] for a, b in zip(times[2:], times[3:], strict=False)],
            "bytes": [b[1] - a[1] for a, b in zip(times[2:], times[3:], strict=False)], "held": held,
            "elements": sum(p.numel() for p in run.learner.trained),
        }  # fmt: skip
        path.with_suffix(f".rank{world.rank}").write_text(json.dumps(found))


def started(folder: Path, name: str, ranks: int, **more: Any) -> list[dict[str, Any]]:
    """Run a job on so many ranks of one thread; what each measured."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(job(folder, name, ranks, **more)))
    around = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = [*line, "-m", "bench.training", "rank", str(file)]
    subprocess.run(line, check=True, env=around, cwd=ROOT, stderr=subprocess.DEVNULL)
    return [json.loads(file.with_suffix(f".rank{i}").read_text()) for i in range(ranks)]


def scaling(folder: Path, batch: int = BATCH) -> dict[str, Any]:
    """Samples per second of one rank and of two, `batch` samples each."""
    rates = {}
    for ranks in (1, 2):
        found = started(folder, f"scale{ranks}", ranks, batch=batch * ranks)
        rates[ranks] = batch * ranks / statistics.median(found[0]["seconds"])
    return {"samples a rank": batch, "load": os.getloadavg()[0], "samples per second, 1 rank": rates[1],
            "samples per second, 2 ranks": rates[2], "times": rates[2] / rates[1]}  # fmt: skip


def overhead(folder: Path) -> dict[str, Any]:
    """Our loop and a bare one in turns, in this process, one thread."""
    import torch

    from wherry.train import loop, order
    from wherry.train.job import Job

    torch.set_num_threads(1)
    tokens = np.load(folder / "tokens.npy")

    def bare() -> list[float]:
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        times = []
        for step in range(STEPS):
            rows = [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in order.ids(step, BATCH, len(tokens) // LENGTH, 0)]
            x = torch.from_numpy(np.stack(rows))
            logits = net(input_ids=x[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            times.append(time.process_time())
        return [b - a for a, b in zip(times[2:], times[3:], strict=False)]

    def ours(turn: int) -> list[float]:
        times: list[float] = []
        loop.run(Job.from_dict(job(folder, f"ours{turn}")), lambda *_: times.append(time.process_time()))
        return [b - a for a, b in zip(times[2:], times[3:], strict=False)]

    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(3):
        seconds["bare"] += bare()
        seconds["ours"] += ours(turn)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    return {"CPU seconds of an update, bare": middle["bare"], "CPU seconds of an update, ours": middle["ours"],
            "overhead": middle["ours"] / middle["bare"] - 1}  # fmt: skip


def memory(folder: Path) -> dict[str, Any]:
    """Bytes held by each rank of two."""
    out: dict[str, Any] = {}
    for name, layout, share in (("DDP", {}, 1), ("FSDP2", {"dp": 1, "fsdp": 2}, 2)):
        found = started(folder, f"memory{name}", 2, **layout)
        elements = found[0]["elements"]
        out[name] = {
            "held by rank, B": [sum(each["held"].values()) for each in found], "theory, B": 16 * elements // share,
        }  # fmt: skip
    return out


def bytes_sent(folder: Path) -> dict[str, Any]:
    """Bytes on the wire in an update, for both ranks together, and for each in theory."""
    out: dict[str, Any] = {}
    for name, layout, times in (("DDP", {}, 2), ("FSDP2", {"dp": 1, "fsdp": 2}, 3)):
        found = started(folder, f"bytes{name}", 2, **layout)
        elements = found[0]["elements"]
        out[name] = {"sent by a rank, B": statistics.median(found[0]["bytes"]) / 2,
                     "theory, B": times * 4 * elements // 2}  # fmt: skip
        if name == "FSDP2":
            outer = 4096 * 256 + 256  # the embedding, which is the head too, and the last norm
            out[name]["theory with gloo, B"] = 2 * elements + 2 * (elements - outer) + 4 * elements
    return out


PARTS = {"scaling": scaling, "overhead": overhead, "memory": memory, "bytes": bytes_sent}


def main() -> None:
    """Measure one part and enter it in the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[*PARTS, "rank"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of a rank in an update; of scaling")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "training.json")
    args = parser.parse_args()
    if args.part == "rank":
        rank(args.file)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        made = model(Path(folder))
        found = scaling(made, args.batch) if args.part == "scaling" else PARTS[args.part](made)
    hash_ = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    row = {"date": date.today().isoformat(), "commit": hash_.stdout.strip(), "torch": torch.__version__,
           "cores": os.cpu_count(), **found}  # fmt: skip
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = args.part if args.batch == BATCH else f"{args.part}, {args.batch} samples a rank"
    args.out.write_text(json.dumps(known | {name: row}, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
