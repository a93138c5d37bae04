"""Quality against bits after training only: one, 1.58, two and three bits, as a picture made of measured rows.

    python bench/quality.py --model minilm --scheme W1A16 W1.58A16 W2A16 W2A16_BINARY W3A16_BINARY --seeds 1
    python bench/curve.py                       docs/curve.svg, from results/quality.json; measures nothing

Bits are those of a weight with its scales (and zeros), as they are stored: a file also holds the float embedding, which
is most of a small model. Distance: KL from the float model in nats per token, or 1 - cosine of a sentence's embeddings
before and after. Each point is one scheme; of several calibration draws the median.
"""

import json
import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from wherry.scheme import Scheme

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "curve.svg"
MODELS = {"babyllama": "BabyLlama (KL)", "decoder": "our decoder (KL)", "minilm": "MiniLM-L6 (1 - cosine)"}
SCHEMES = {
    "W1A16": "signs", "W1.58A16": "ternary", "W2A16": "four levels", "W2A16_BINARY": "two planes",
    "W3A16_ASYM": "W3", "W3A16_BINARY": "three planes", "W4A16_ASYM": "W4",
}  # fmt: skip
METHODS = {"rtn": ("#9a9a9a", "o"), "gptq": ("#4c78a8", "s"), "gptaq": ("#e0812b", "^"), "best": ("#2a7f4f", "D")}
PLANES = ("W1A16", "W2A16_BINARY", "W3A16_BINARY")


def bits(scheme: str, group: int) -> float:
    """Stored bits of a weight: codes, scales and zeros."""
    found = Scheme.parse(scheme)
    found = found if found.fixed else found.with_group(group)
    own = {"W1.58A16": 1.58}.get(scheme)  # a file takes two; what the codes are worth is log2 of three
    stored = found.bytes((256, 32 * group)) * 8 / (256 * 32 * group)
    return stored if own is None else stored - 2 + own


def points(model: str, method: str) -> list[tuple[float, float, str]]:
    """(bits, distance, scheme) of what was measured, by rising bits; plain settings only."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in json.loads((HERE / "results" / "quality.json").read_text(encoding="utf8")):
        if (row["model"], row["tool"], row["method"], row["options"]) != (model, "wherry", method, ""):
            continue
        if row["scheme"] in SCHEMES:
            far = row["kl"] if "kl" in row else row["distance"]
            found.setdefault(row["scheme"], []).append((bits(row["scheme"], row["group_size"]), far))
    return sorted((rows[0][0], statistics.median(far for _, far in rows), scheme) for scheme, rows in found.items())


def main() -> None:
    """Draw all models side by side."""
    mpl.rcParams.update({"svg.hashsalt": "wherry", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"})
    figure, axes = plt.subplots(1, len(MODELS), figsize=(11, 3.9), layout="constrained")
    for axis, (model, title) in zip(axes, MODELS.items(), strict=True):
        lowest: dict[str, tuple[float, float]] = {}
        highest: dict[str, tuple[float, float]] = {}
        for method, (colour, mark) in METHODS.items():
            found = points(model, method)
            if not found:
                continue
            even = [(x, y) for x, y, scheme in found if scheme not in PLANES[1:]]
            axis.plot(*zip(*even, strict=True), color=colour, marker=mark, ms=5, lw=1.3, label=method)
            planes = [(x, y) for x, y, scheme in found if scheme in PLANES]
            axis.plot(*zip(*planes, strict=True), color=colour, marker=mark, ms=5, lw=1, ls=":", mfc="white", zorder=1)
            for x, y, scheme in found:
                lowest[scheme] = (x, min(y, lowest.get(scheme, (x, y))[1]))
                highest[scheme] = (x, max(y, highest.get(scheme, (x, y))[1]))
        for scheme in lowest:
            place, away = (highest[scheme], 7) if scheme in PLANES[1:] else (lowest[scheme], -12)
            axis.annotate(SCHEMES[scheme], place, (0, away), textcoords="offset points", ha="center", fontsize=7.5)
        axis.set(title=title, yscale="log", xlabel="bits of a weight, scales included")
        axis.grid(which="major", lw=0.4, color="#d0d0d0")
        axis.margins(x=0.1, y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("distance from the float model")
    axes[0].legend(frameon=False)
    figure.suptitle("After training only; full lines: even levels, dotted: sums of binary planes", fontsize=10)
    figure.savefig(OUT, metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main()
