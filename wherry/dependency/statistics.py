"""Statistics: what layers that read lanes were given: second moments of their inputs, and gradients of all weights.

Source: inputs as in SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774); gradients as in Molchanov et al. 2019
    (arXiv:1906.10771).
Shapes: gram [k, k] float64 of inputs [n, k] with a column of ones behind; of a convolution k is channels * kernel.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherry.errors import Diverged

Batches = Sequence[Mapping[str, Any]]


@dataclass
class Reader:
    """A layer that reads lanes: its weight as a matrix [outputs, inputs], inputs of one lane side by side.

    each: columns of one lane. turned: whether the stored weight is [inputs, outputs].
    """

    layer: Any
    each: int
    turned: bool

    @property
    def matrix(self) -> Tensor:
        """The weight, float64 [outputs, lanes * each]."""
        w: Tensor = self.layer.weight.detach().double()
        return w.T if self.turned else w.flatten(1)

    def put(self, matrix: Tensor) -> None:
        """Store a changed matrix."""
        weight = self.layer.weight
        with torch.no_grad():
            weight.copy_((matrix.T if self.turned else matrix.reshape(weight.shape)).to(weight.dtype))

    def rows(self, x: Tensor) -> Tensor:
        """An input of the layer as rows [n, lanes * each]."""
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            if isinstance(conv.padding, str):
                reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
                sides = [(r // 2, r - r // 2) if conv.padding == "same" else (0, 0) for r in reach]
                x = F.pad(x, [*sides[1], *sides[0]])
            padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
            x = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride).transpose(1, 2)
        return x.reshape(-1, x.shape[-1])


def reader(module: nn.Module, name: str, d: int) -> Reader | None:
    """The layer that reads lanes of dimension d of this weight; None where the dimension is not one that is read."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    if leaf != "weight":
        return None
    if isinstance(layer, nn.Linear) and d == 1:
        return Reader(layer, 1, False)
    if isinstance(layer, nn.Conv2d) and d == 1 and layer.groups == 1:
        return Reader(layer, layer.kernel_size[0] * layer.kernel_size[1], False)
    if type(layer).__name__ == "Conv1D" and d == 0:
        return Reader(layer, 1, True)
    return None


@contextmanager
def gathering(readers: Mapping[str, Reader]) -> Iterator[dict[str, Tensor]]:
    """Gram matrices of what layers are given while this is open, with a last column for ones."""
    grams: dict[str, Tensor] = {}

    def hook(name: str, reader: Reader) -> Callable[..., None]:
        def fold(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = reader.rows(inputs[0].detach().float())
            x = torch.cat([x, torch.ones(len(x), 1, device=x.device)], 1)
            gram = (x.T @ x).double()
            grams[name] = grams[name] + gram if name in grams else gram

        return fold

    handles = [r.layer.register_forward_pre_hook(hook(n, r)) for n, r in readers.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(
    module: nn.Module, readers: Mapping[str, Reader], batches: Batches, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Gram matrices over the batches. Cost: one pass, k^2 float64 for each reader. Raises Diverged for NaN."""
    with gathering(readers) as grams, torch.no_grad():
        for i, batch in enumerate(batches):
            module(**batch)
            progress(i + 1, len(batches))
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise Diverged(f"the inputs of {name} are NaN or infinite: check the model and the calibration data")
    return grams


def gradients(
    module: nn.Module, batches: Batches, progress: Callable[[int, int], None], seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Gradients of all weights, batch after batch, of a loss that needs no labels.

    The results are projected on random signs r: the mean of (r^T J w)^2 over r is |J w|^2, the curvature of the squared
    distance to the results themselves (Gauss-Newton).
    """
    generator = torch.Generator().manual_seed(seed)
    needed = {name: p.requires_grad for name, p in module.named_parameters()}
    module.requires_grad_(True)
    try:
        for i, batch in enumerate(batches):
            module.zero_grad(set_to_none=True)
            with torch.enable_grad():
                out = main(module(**batch))
                sign = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
                ((out * sign).sum() / out.numel() ** 0.5).backward()
            yield {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            progress(i + 1, len(batches))
    finally:
        module.zero_grad(set_to_none=True)
        for name, p in module.named_parameters():
            p.requires_grad_(needed[name])


def main(result: Any) -> Tensor:
    """The result that counts: logits as log-probabilities, else the last hidden state, else the first tensor."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        if "logits" in result:
            return torch.log_softmax(result["logits"].float(), -1)
        return next(v for v in result.values() if isinstance(v, Tensor))
    return next(v for v in result if isinstance(v, Tensor))
