"""Attribution: the picture of what an answer rests on, for one model or two side by side. matplotlib, without a screen.

Red speaks for the answer, blue against it; the colours mean the same numbers in every panel.
"""

import base64
import html
import io
from typing import Any

import numpy as np

COLOURS = "RdBu_r"
WRAP = 74  # letters of a line of words


def draw(shown: Any, panels: list[tuple[str, np.ndarray]], title: str, meaning: str) -> bytes:
    """A PNG: the input, and one panel per (heading, heat); with two, a third of their difference.

    Args:
        shown: words, pixels [h, w, 3], or (wave, rate). title: over all. meaning: of the colour bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(float(np.abs(heat).max()) for _, heat in panels) or 1.0
    if len(panels) == 2:
        panels = [*panels, ("difference: after less before", panels[1][1] - panels[0][1])]
    words = isinstance(shown, list)
    count = len(panels) + (0 if words else 1)
    if words:
        lines = _lines(shown)
        figure = Figure(figsize=(9, 1.3 + count * (0.5 + 0.3 * len(lines))), layout="constrained")
        axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    elif isinstance(shown, tuple):
        figure = Figure(figsize=(9, 1.0 + 1.9 * count), layout="constrained")
        axes = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    else:
        figure = Figure(figsize=(1.0 + 3.1 * count, 4.4), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    drawn: Any = None
    if not words:
        _input(axes[0], shown)
    for axis, (heading, heat) in zip(axes[0 if words else 1 :], panels, strict=True):
        axis.set_title(heading, fontsize=10, loc="left" if words or isinstance(shown, tuple) else "center")
        drawn = (_words if words else _sound if isinstance(shown, tuple) else _pixels)(axis, shown, heat, most)
    bar = figure.colorbar(drawn, ax=list(axes), location="bottom", shrink=0.5, aspect=40, pad=0.03)
    bar.set_label(meaning, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(picture: bytes, title: str, rows: list[tuple[str, str]]) -> str:
    """One HTML file with the picture in it and a table of facts."""
    code = base64.b64encode(picture).decode()
    facts = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:16px system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
        "img{max-width:100%}th{text-align:left;padding-right:2rem;font-weight:normal;color:#555}</style>"
        f"<h1>{html.escape(title)}</h1><img alt='heat of each part of the input' src='data:image/png;base64,{code}'>"
        f"<table>{facts}</table></html>\n"
    )


def _lines(words: list[str]) -> list[list[int]]:
    """Indices of the words of each line."""
    lines: list[list[int]] = [[]]
    length = 0
    for i, word in enumerate(words):
        if lines[-1] and length + len(word) + 1 > WRAP:
            lines.append([])
            length = 0
        lines[-1].append(i)
        length += len(word) + 1
    return lines


def _scale(most: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-most, most), COLOURS)


def _words(axis: Any, words: list[str], heat: np.ndarray, most: float) -> Any:
    scale, lines = _scale(most), _lines(words)
    axis.set_xlim(-1, WRAP + 3)
    axis.set_ylim(len(lines), 0)
    axis.axis("off")
    for row, line in enumerate(lines):
        at = 0.0
        for i in line:
            colour = scale.to_rgba(heat[i])
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
            axis.text(
                at + len(words[i]) / 2, row + 0.5, words[i].replace("$", r"\$"), family="monospace", fontsize=13,
                ha="center", va="center", color="white" if dark else "black",
                bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"},
            )  # fmt: skip
            at += len(words[i]) + 1
    return scale


def _input(axis: Any, shown: Any) -> None:
    if not isinstance(shown, tuple):
        axis.imshow(shown)
        axis.set_title("input", fontsize=10)
        axis.axis("off")
        return
    loud, extent = _spectrogram(shown)
    axis.imshow(loud, origin="lower", aspect="auto", extent=extent, cmap="gray_r")
    axis.set_title("input: loudness of each frequency over time", fontsize=10, loc="left")
    axis.set_ylabel("kHz", fontsize=9)


def _spectrogram(shown: tuple[np.ndarray, int]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    from scipy.signal import stft

    wave, rate = shown
    _, _, spectrum = stft(wave, nperseg=256)
    loud = 20 * np.log10(np.abs(spectrum) + 1e-6)
    return np.maximum(loud, loud.max() - 70), (0.0, len(wave) / rate, 0.0, rate / 2000)


def _pixels(axis: Any, shown: np.ndarray, heat: np.ndarray, most: float) -> Any:
    height, width = shown.shape[:2]
    axis.imshow(shown.mean(-1), cmap="gray", vmin=-80, vmax=255, extent=(0, width, height, 0))
    axis.axis("off")
    return axis.imshow(
        heat, cmap=COLOURS, vmin=-most, vmax=most, alpha=0.62, extent=(0, width, height, 0), interpolation="bilinear"
    )


def _sound(axis: Any, shown: tuple[np.ndarray, int], heat: np.ndarray, most: float) -> Any:
    loud, extent = _spectrogram(shown)
    axis.imshow(loud, origin="lower", aspect="auto", extent=extent, cmap="gray_r", vmin=loud.min(), vmax=2 * loud.max())
    axis.set_ylabel("kHz", fontsize=9)
    axis.set_xlabel("seconds", fontsize=9)
    return axis.imshow(
        heat, origin="lower", aspect="auto", extent=extent, cmap=COLOURS, vmin=-most, vmax=most, alpha=0.62,
        interpolation="bilinear",
    )  # fmt: skip
