"""The rows of bench/results/fields.json as a markdown table, one per model."""

from statistics import median, quantiles
from typing import Any

FLOAT, OWN = "float32", ("ort minmax", "ort percentile", "ort entropy", "ort dynamic", "nncf")
TITLES = ("", "quality (95%)", "loss (95%, paired)", "MB", "smaller", "p50 / p99 ms, 1 thread", "x float", "x best own",
          "2 threads: p50 ms", "x float", "x best own")  # fmt: skip
Row = dict[str, Any]


def show(rows: list[Row], models: list[str], peak: float | None = None) -> None:
    """Print the tables of the named models, or of all; peak: int8 operations of one core in 1e9/s."""
    for model, engine in dict.fromkeys((row["model"], row["engine"]) for row in rows):
        if models and model not in models:
            continue
        mine = [row for row in rows if (row["model"], row["engine"]) == (model, engine)]
        print(f"\n**{model}** on {engine}, {mine[0].get('statistic', '')}\n")
        titles = (*TITLES, "of int8 peak, 1 thread") if peak else TITLES
        print("| " + " | ".join(titles) + " |\n|" + "-|" * len(titles))
        for row in mine:
            share = [_share(row, peak)] if peak else []
            print("| " + " | ".join([*_cells(row, mine, rows), *share]) + " |")


def _cells(row: Row, mine: list[Row], rows: list[Row]) -> list[str]:
    if "error" in row:
        return [row["variant"], row["error"][:80], *[""] * (len(TITLES) - 2)]
    float_ = next(r for r in rows if r["model"] == row["model"] and r["variant"] == FLOAT)
    cells = [row["variant"], _interval(row, "quality"), _interval(row, "loss") if "loss" in row else ""]
    cells += [f"{row['bytes'] / 1e6:.2f}", f"{float_['bytes'] / row['bytes']:.2f}x"]
    for threads in ("threads_1", "threads_2"):
        if threads not in row:
            cells += [""] * 3
            continue
        timed = row[threads]
        cells.append(f"{timed['p50_ms']:.3g}" + (f" / {timed['p99_ms']:.3g}" if threads == "threads_1" else ""))
        cells.append(_ratio(row, [r for r in mine if r["variant"] == FLOAT], threads))
        cells.append(_ratio(row, _best_own(mine, threads), threads) if row["variant"].startswith("wherry") else "")
    return cells


def _share(row: Row, peak: float) -> str:
    """Two operations for each multiplication of a convolution or matrix product, by the median latency."""
    if "threads_1" not in row:
        return ""
    return f"{2 * row['multiplications'] / (row['threads_1']['p50_ms'] * 1e6) / peak:.0%}"


def _interval(row: Row, name: str) -> str:
    return f"{row[name]:.4f} ({row[name + '_low']:.4f} to {row[name + '_high']:.4f})"


def _best_own(mine: list[Row], threads: str) -> list[Row]:
    """The fastest of the runtimes' own quantizers."""
    return sorted((r for r in mine if r["variant"] in OWN and threads in r), key=lambda r: r[threads]["p50_ms"])[:1]


def _ratio(row: Row, others: list[Row], threads: str) -> str:
    """Times faster, median and quartiles over rounds of the same run of the clock."""
    same = [r for r in others if r is not row and r.get(threads, {}).get("clock") == row[threads]["clock"]]
    if not same:
        return ""
    pairs = zip(same[0][threads]["rounds_ms"], row[threads]["rounds_ms"], strict=True)
    each = [other / ours for other, ours in pairs]
    low, _, high = quantiles(each, n=4)
    return f"{median(each):.2f} ({low:.2f} to {high:.2f})"
