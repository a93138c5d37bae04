"""Pictures: turned and cut at random while training, by seed and update, so that a resumed run sees the same.

Source: Krizhevsky et al. 2012 (mirrored pictures); He et al. 2016, arXiv:1512.03385, section 4.2 (a margin of an eighth
        of zeros, and a window of the old size).
Shapes: float [B, channels, height, width], after the processor.
"""

import torch

from wherry.errors import BadInput
from wherry.shelf import suggest
from wherry.train.text import Batch

WAYS = ("flip", "crop")


def ways(text: str) -> tuple[str, ...]:
    """Of "flip,crop". Raises BadInput for what is not known."""
    found = tuple(filter(None, (part.strip() for part in text.split(","))))
    for way in found:
        if way not in WAYS:
            raise BadInput(f"augment: no '{way}'{suggest(way, WAYS)}; there are: {', '.join(WAYS)}")
    return found


def turned(batch: Batch, name: str, how: tuple[str, ...], generator: torch.Generator) -> Batch:
    """The batch with its pictures, the input of that name, mirrored and cut."""
    x = batch[name]
    count, _, height, width = x.shape
    if "flip" in how:
        mirrored = torch.rand(count, generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if "crop" in how:
        margin = max(1, height // 8), max(1, width // 8)
        padded = torch.nn.functional.pad(x, (margin[1], margin[1], margin[0], margin[0]))
        tops, lefts = (torch.randint(2 * m + 1, (count,), generator=generator).tolist() for m in margin)
        x = torch.stack([padded[i, :, t : t + height, s : s + width]
                         for i, (t, s) in enumerate(zip(tops, lefts, strict=True))])  # fmt: skip
    return {**batch, name: x.contiguous()}
