"""Levels: the numbers that a code may mean where it is not an integer, ascending; no torch.

    e2m1, e4m3, e5m2   small floats without infinities   OCP MX 1.0; Micikevicius et al. 2022, arXiv:2209.05433
    nf4                quantiles of a normal             Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, appendix E
    binary             -1, 1                             Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279
    ternary            -1, 0, 1                          Li & Liu 2016, arXiv:1605.04711; 1.58 bits
A code is the place of its level minus 2^(bits - 1), so that it fits a signed integer of `bits` bits.
"""

from functools import cache

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# exponent bits, mantissa bits, bias, largest
FLOATS = {"e2m1": (2, 1, 1, 6.0), "e4m3": (4, 3, 7, 448.0), "e5m2": (5, 2, 15, 57344.0)}


@cache
def levels(name: str) -> tuple[float, ...]:
    """All levels of a table, ascending, zero once."""
    if name == "nf4":
        return NF4
    if name == "binary":
        return (-1.0, 1.0)
    if name == "ternary":
        return (-1.0, 0.0, 1.0)
    exponent, mantissa, bias, most = FLOATS[name]
    found = {0.0}
    for e in range(1 << exponent):
        for m in range(1 << mantissa):
            value = (m if e == 0 else (1 << mantissa) + m) * 2.0 ** (max(e, 1) - bias - mantissa)
            if value <= most:
                found |= {value, -value}
    return tuple(sorted(found))
