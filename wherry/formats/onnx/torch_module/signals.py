"""Transforms of sound: DFT, STFT, windows, mel weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wherry.formats.onnx.torch_module.table import runs
from wherry.formats.onnx.torch_module.values import dtype_of


@runs("DFT", ints=(1, 2))
def fourier(
    x: Tensor, length: int | None = None, place: int | None = None, axis: int | None = None, inverse: int = 0,
    onesided: int = 0, opset: int = 20,
) -> Tensor:  # fmt: skip
    """The discrete Fourier transform along an axis; the last axis holds real, or real and imaginary parts."""
    default = -2 if opset >= 20 else 1
    where = place if place is not None else axis if axis is not None else default
    where = where + x.dim() if where < 0 else where
    if inverse and onesided:
        z = torch.fft.irfft(torch.view_as_complex(x.contiguous()), n=length, dim=where)
        return z.unsqueeze(-1)
    z = torch.view_as_complex(x.double().contiguous()) if x.shape[-1] == 2 else x[..., 0].double()
    if onesided and not z.is_complex():
        return torch.view_as_real(torch.fft.rfft(z, n=length, dim=where)).to(x.dtype)
    y = torch.fft.ifft(z, n=length, dim=where) if inverse else torch.fft.fft(z, n=length, dim=where)
    if onesided:
        y = y.narrow(where, 0, y.shape[where] // 2 + 1)
    return torch.view_as_real(y).to(x.dtype)


@runs("STFT", ints=(1, 3))
def short_fourier(
    x: Tensor, step: int, window: Tensor | None = None, length: int | None = None, onesided: int = 1
) -> Tensor:
    """Fourier transforms of windows of x [n, time, 1 or 2], [n, frames, frequencies, 2]."""
    size = len(window) if window is not None else length
    assert size is not None
    z = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.reshape(x.shape[0], -1)
    frames = z.unfold(1, size, step)
    frames = frames if window is None else frames * window
    if onesided and not z.is_complex():
        return torch.view_as_real(torch.fft.rfft(frames))
    y = torch.fft.fft(frames)
    return torch.view_as_real(y[..., : size // 2 + 1] if onesided else y)


def cosine_window(size: Tensor, weights: list[float], periodic: int, dtype: int) -> Tensor:
    """A window of weighted cosines."""
    count = int(size.item())
    at = torch.arange(count, dtype=torch.float64) * (2 * math.pi / max(count - (0 if periodic else 1), 1))
    y = torch.zeros_like(at)
    for i, weight in enumerate(weights):
        y = y + weight * torch.cos(i * at)
    return y.to(dtype_of(dtype))


@runs("HannWindow")
def hann(size: Tensor, periodic: int = 1, output_datatype: int = 1) -> Tensor:
    """Hann's window."""
    return cosine_window(size, [0.5, -0.5], periodic, output_datatype)


@runs("HammingWindow")
def hamming(size: Tensor, periodic: int = 1, output_datatype: int = 1) -> Tensor:
    """Hamming's window."""
    return cosine_window(size, [25 / 46, -21 / 46], periodic, output_datatype)


@runs("BlackmanWindow")
def blackman(size: Tensor, periodic: int = 1, output_datatype: int = 1) -> Tensor:
    """Blackman's window."""
    return cosine_window(size, [0.42, -0.5, 0.08], periodic, output_datatype)


@runs("MelWeightMatrix")
def mel_weights(
    bins: Tensor, length: Tensor, rate: Tensor, low: Tensor, high: Tensor, output_datatype: int = 1
) -> Tensor:
    """Triangles [length / 2 + 1, bins] that are even on the mel scale."""
    count, n, sample = int(bins), int(length), int(rate)
    mel = [2595 * math.log10(1 + float(f) / 700) for f in (low, high)]
    points = torch.arange(count + 2, dtype=torch.float64) * ((mel[1] - mel[0]) / (count + 2)) + mel[0]
    places = torch.floor((n + 1) * 700 * (10 ** (points / 2595) - 1) / sample).to(torch.int64).tolist()
    out = torch.zeros(n // 2 + 1, count, dtype=torch.float64)
    for i in range(count):
        a, b, c = places[i : i + 3]
        if b == a:
            out[b, i] = 1
        else:
            out[a : b + 1, i] = (torch.arange(a, b + 1) - a) / (b - a)
        if c > b:
            out[b:c, i] = (c - torch.arange(b, c)) / (c - b)
    return out.to(dtype_of(output_datatype))


@runs("Bernoulli", fold=False)
def bernoulli(x: Tensor, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """1 with probability x; torch's own random numbers."""
    return torch.bernoulli(x).to(x.dtype if dtype is None else dtype_of(dtype))


@runs("RandomNormalLike", fold=False)
def normal_like(x: Tensor, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float = 0) -> Tensor:
    """Normal random numbers of torch, of x's shape."""
    return torch.randn(x.shape, dtype=x.dtype if dtype is None else dtype_of(dtype)) * scale + mean


@runs("RandomUniformLike", fold=False)
def uniform_like(x: Tensor, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float = 0) -> Tensor:
    """Even random numbers of torch, of x's shape."""
    return torch.rand(x.shape, dtype=x.dtype if dtype is None else dtype_of(dtype)) * (high - low) + low


@runs("RandomNormal", fold=False)
def normal(shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float = 0) -> Tensor:
    """Normal random numbers of torch."""
    return torch.randn(shape, dtype=dtype_of(dtype)) * scale + mean


@runs("RandomUniform", fold=False)
def uniform(shape: list[int], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float = 0) -> Tensor:
    """Even random numbers of torch."""
    return torch.rand(shape, dtype=dtype_of(dtype)) * (high - low) + low


@runs("SoftmaxCrossEntropyLoss")
def cross_entropy(
    scores: Tensor, labels: Tensor, weights: Tensor | None = None, ignore_index: int | None = None,
    reduction: str = "mean", outputs: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss of class scores [n, classes, ...], and the logarithms of their softmax."""
    logs = torch.log_softmax(scores, 1)
    return (likelihood(logs, labels, weights, ignore_index, reduction), logs)[:outputs]


@runs("NegativeLogLikelihoodLoss")
def likelihood(
    logs: Tensor, labels: Tensor, weights: Tensor | None = None, ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The loss of logarithms of probabilities [n, classes, ...]."""
    skip = -(1 << 40) if ignore_index is None else ignore_index
    return F.nll_loss(logs, labels.long(), weights, ignore_index=skip, reduction=reduction)
