"""Robustness of wherry's int8 files: quality before and after under noise, blur, typos ...; and over calibration seeds.

    python bench/fields/robust.py --model resnet20 efficientnet sst2
    python bench/fields/robust.py --model resnet20 --seeds 5        # the same recipe, five draws of calibration data

Rows go to bench/results/robustness.json, those of a model replaced as a whole. What is perturbed and how the intervals
are paired: docs/evaluate.md. Calibration and held-out data as in run.py.
"""

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from run import HERE, MODELS, now

RESULTS = HERE.parent / "results" / "robustness.json"
RECIPE = "rtn:scheme=W8A8_STATIC"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["resnet20", "efficientnet", "sst2"])
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"))
    parser.add_argument("--samples", type=int, default=32, help="calibration examples, drawn with the seed")
    parser.add_argument("--most", type=int, default=400, help="judged examples; 0 = all")
    parser.add_argument("--seeds", type=int, default=0, help="instead: so many calibration seeds, quality of each")
    return parser.parse_args()


def main() -> None:
    """Compress, measure, save, print."""
    from wherry import api
    from wherry.evaluate.stability import stability

    a = arguments()
    for name in a.model:
        folder = importlib.import_module(name).FIELD.prepare(a.cache)
        parts = {part: next(folder.glob(f"{part}*"), folder / part) for part in ("calibration", "held_out")}

        def compressed(seed: int, folder: Path = folder, data: Path = parts["calibration"]) -> Path:
            out = a.cache / "robust" / f"{folder.name}-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            api.compress(folder, out, RECIPE, data_file=data, samples=a.samples, seed=seed)
            return out

        def judged(seed: int, folder: Path = folder, data: Path = parts["held_out"], again: bool = False) -> Any:
            out = compressed(seed)
            return api.evaluate(out, data, "onnxruntime", against=folder, robustness=again, most=a.most)

        report = stability(judged, range(a.seeds)) if a.seeds else judged(0, again=True)
        keep(name, "seeds" if a.seeds else "perturbations", json.loads(report.to_json())["rows"])
        for row in report:
            print(f"{name} {row.what} | {row.where} | {row.text()}", flush=True)


def keep(model: str, kind: str, found: list[dict[str, Any]]) -> None:
    """Put the rows of a model in the place of its older ones."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    old = [entry for entry in old if (entry["model"], entry["kind"]) != (model, kind)]
    entry = {"model": model, "kind": kind, "recipe": RECIPE, "date": now()[:10], "rows": found}
    fresh = RESULTS.with_suffix(".partial")
    fresh.write_text(json.dumps([*old, entry], indent=1) + "\n")
    fresh.replace(RESULTS)


if __name__ == "__main__":
    main()
