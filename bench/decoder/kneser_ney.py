"""Interpolated modified Kneser-Ney: the n-gram model that the decoder has to beat, over the same tokens.

Source: Chen and Goodman 1998, "An empirical study of smoothing techniques", TR-10-98, section 3.
Idea:   p(w|h) = max(c(hw) - D(c(hw)), 0) / c(h) + gamma(h) p(w|h'), h' = h without its oldest token. The
        longest order counts occurrences; shorter orders count distinct tokens to the left. Below unigrams
        lies 1 / vocab.
Shapes: tokens [n] int64; an n-gram is one int64 key, `bits` bits a token, oldest first (order * bits <= 62).
Cost:   one sort of the text per order; scoring is one binary search per token and order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """Counts of one order: sorted n-grams with their discounted counts, sorted contexts with their sums."""

    grams: Ints  # [g]
    kept: Floats  # [g], count minus discount
    contexts: Ints  # [h]
    total: Floats  # [h]
    freed: Floats  # [h], mass that discounting frees for the shorter order: gamma * total


def keys(tokens: Ints, order: int, bits: int) -> Ints:
    """Pack every window of `order` tokens into one integer: [n] -> [n - order + 1]."""
    count = len(tokens) - order + 1
    out = np.zeros(count, np.int64)
    for i in range(order):
        out = (out << bits) | tokens[i : i + count]
    return out


class KneserNey:
    """An n-gram model fitted on one stream of tokens."""

    def __init__(self, tokens: Ints, order: int, vocab: int) -> None:
        """Count `tokens` up to `order`; all ids are below `vocab`."""
        self.vocab, self.order, self.bits = vocab, order, max(1, int(vocab - 1).bit_length())
        if order * self.bits > 62:
            raise ValueError(f"order {order} x {self.bits} bits does not fit a 64-bit key; lower the order")
        self.orders: list[Order] = []
        longer: Ints = np.zeros(0, np.int64)
        for n in range(order, 0, -1):
            if n == order:
                grams, counts = np.unique(keys(tokens, n, self.bits), return_counts=True)
            else:  # distinct left neighbours: drop the oldest token of each distinct longer n-gram
                grams, counts = np.unique(longer & ((1 << (n * self.bits)) - 1), return_counts=True)
            self.orders.insert(0, self._order(grams, counts))
            longer = grams

    def _order(self, grams: Ints, counts: Ints) -> Order:
        n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.clip(
            [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3]
        )
        cut = discounts[np.minimum(counts, 3)]
        contexts, where = np.unique(grams >> self.bits, return_inverse=True)
        return Order(
            grams,
            counts - cut,
            contexts,
            np.bincount(where, counts).astype(np.float64),
            np.bincount(where, cut),
        )

    def probabilities(self, tokens: Ints) -> Floats:
        """Return p(token | the order - 1 tokens before it) for every token of a stream: [n] -> [n]."""
        p = np.full(len(tokens), 1.0 / self.vocab)
        for n, table in enumerate(self.orders, 1):
            grams = keys(tokens, n, self.bits)
            at, seen = find(table.contexts, grams >> self.bits)
            gram, known = find(table.grams, grams)
            here = p[n - 1 :]
            mixed = (np.where(known, table.kept[gram], 0.0) + table.freed[at] * here) / table.total[at]
            p[n - 1 :] = np.where(seen, mixed, here)
        return p


def find(table: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Look `wanted` up in the sorted `table`: positions, and whether each was there."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted
