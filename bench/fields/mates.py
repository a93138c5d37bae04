"""Does an answer depend on what else is in its batch? Dynamic int8 with one scale for the whole input says yes.

    python bench/fields/mates.py --cache CACHE --int8 FILE [FILE ...]

Runs the held-out sentences of the sentiment model alone and in batches of 32, and prints how far the logits move and
how many answers change. FILE: other ONNX files of the same model, such as one by onnxruntime's quantize_dynamic.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: TID253

from wherry import data
from wherry.report import read_object
from wherry.task import Task

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cache", type=Path, default=Path("bench-cache"), help="as of run.py")
parser.add_argument("--int8", type=Path, nargs="+", default=[], help="files to look at beside the float one")
parser.add_argument("--most", type=int, default=320, help="sentences")
args = parser.parse_args()

folder = args.cache / "sst2"
task = Task.from_dict(read_object(folder / "task.json"), folder)
examples = list(data.read(next(folder.glob("held_out*"))).examples[: args.most])
print("| file | logits move at most | in the median | answers that change |\n|-|-|-|-|")
for file in [folder / "model.onnx", *args.int8]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(texts: list) -> np.ndarray:
        inputs = task.prepare(texts)
        return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})[0]  # noqa: B023

    alone = np.concatenate([run([text]) for text in examples])
    batch = np.concatenate([run(examples[i : i + 32]) for i in range(0, len(examples), 32)])
    moved = np.abs(alone - batch).max(-1)
    changed = int((alone.argmax(-1) != batch.argmax(-1)).sum())
    print(f"| {file.parent.name} | {moved.max():.2g} | {np.median(moved):.2g} | {changed} of {len(examples)} |")
