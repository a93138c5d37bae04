"""How much int8 quality moves with the calibration sample alone: one recipe, five or more seeds, paired.

    python bench/stability.py MODEL --calibrate DATA --data HELD_OUT [--seeds 5] [--samples 64] [--recipe RECIPE]

Each seed draws other calibration examples of DATA, compresses, and is judged on HELD_OUT against MODEL. The last rows
hold, for each figure, the mean over the seeds, its lowest and highest, and the standard deviation.
"""

import argparse
import tempfile
from pathlib import Path

from wherry import api, board
from wherry.evaluate.stability import stability
from wherry.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--recipe", default="rtn:scheme=W8A8_STATIC")
    parser.add_argument("--most", type=int, default=0, help="judge on so many examples; 0 = all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, board.bar() as progress:

        def run(seed: int) -> Report:
            out = Path(folder) / f"int8-{seed}"
            api.compress(args.model, out, args.recipe, (), args.calibrate, args.data, samples=args.samples, seed=seed)
            found = api.evaluate(out, args.data, against=args.model, most=args.most)
            rows = [row for row in found if row.where == out.name]
            return Report("", [Report().add(r.what, "int8", r.value, r.unit, r.low, r.high, r.note) for r in rows])

        report = stability(run, range(args.seeds), progress=progress)
    if not args.json:
        report.rows = [row for row in report if row.what.endswith(" over seeds")]
    board.show(report, args.json)


if __name__ == "__main__":
    main()
