"""Pack small signed integers densely into int32 words, as compressed-tensors' pack-quantized files hold them.

Element i of a row takes bits [i * b, (i + 1) * b) of the row's bit stream, low bits first, after adding 2^(b-1);
32 elements fill exactly b words, the last words of a row are cut off where they hold nothing.
Source: compressed-tensors 0.20, compressors/pack_quantized/helpers.py (format); for 2, 4 and 8 bits older
    versions agree.
Shapes: codes int8 [rows, k] <-> words int32 [rows, ceil(k * b / 32)].
"""

import torch


def pack(code: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 [rows, k] to words int32 [rows, ceil(k * bits / 32)]."""
    rows, k = code.shape
    groups = -(-k // 32)
    value = torch.zeros(rows, groups * 32, dtype=torch.int32)
    value[:, :k] = code.to(torch.int32) + (1 << (bits - 1))
    columns = value.reshape(rows * groups, 32).T.contiguous()  # element i of all groups side by side
    words = torch.zeros(bits, rows * groups, dtype=torch.int32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] |= columns[i] << shift
        if shift + bits > 32:  # the element's high bits go on in the next word
            words[word + 1] |= columns[i] >> (32 - shift)
    return words.T.reshape(rows, groups * bits)[:, : -(-k * bits // 32)].contiguous()


def unpack(word: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Words int32 [rows, ceil(k * bits / 32)] to codes int8 [rows, k]."""
    rows, groups = word.shape[0], -(-k // 32)
    padded = torch.zeros(rows, groups * bits, dtype=torch.int32)
    padded[:, : word.shape[1]] = word
    words = padded.reshape(rows * groups, bits).T.contiguous()
    out = torch.empty(32, rows * groups, dtype=torch.int8)
    for i in range(32):
        at, shift = divmod(i * bits, 32)
        value = (words[at] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            high = words[at + 1] & ((1 << (shift + bits - 32)) - 1)
            value = value | (high << (32 - shift))
        out[i] = (value - (1 << (bits - 1))).to(torch.int8)
    return out.T.reshape(rows, groups * 32)[:, :k].contiguous()
