"""Order: which samples a rank sees at a step; a pure function of seed and step, so that a resumed run sees the same.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains": a Feistel network on 2^(2h) >= n places is a
        permutation; places beyond n are sent on until they fall inside ("cycle walking").
Idea:   each epoch is a permutation of all samples, computed place by place: no list of n numbers, whatever n is.
        A batch is what stands at the places step * batch ... (step + 1) * batch of the epochs one after another.
Cost:   O(batch) time and memory for a step.
"""

from pathlib import Path

import numpy as np

from wherry.errors import BadInput, Missing

ROUNDS = 6
M1, M2, STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser: uint64 to uint64, every bit on every bit."""
    x = (x ^ (x >> np.uint64(30))) * M1
    x = (x ^ (x >> np.uint64(27))) * M2
    return x ^ (x >> np.uint64(31))


def shuffled(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The samples at these places (int64, 0 to n - 1) of an epoch's permutation."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed], np.uint64) * STEP + np.uint64(epoch) + np.uint64(1))
        keys = [mix(key + np.uint64(i) * STEP) for i in range(ROUNDS)]
        x = places.astype(np.uint64)
        todo = np.ones(len(x), bool)
        while todo.any():
            left, right = x[todo] >> half, x[todo] & mask
            for key in keys:
                left, right = right, left ^ (mix(right + key) & mask)
            x[todo] = (left << half) | right
            todo = x >= n
    return x.astype(np.int64)


def ids(step: int, batch: int, n: int, seed: int) -> np.ndarray:
    """Samples int64 [batch] of an update, of `n` samples in all; epochs follow one another."""
    if n < 1:
        raise BadInput("the data holds no sample")
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, at = np.divmod(places, n)
    out = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = shuffled(at[here], n, seed, int(epoch))
    return out


def shares(weights: list[float], batch: int) -> list[int]:
    """Rows of a batch for each source, by largest remainder; each source with a weight has one at least."""
    total = sum(weights)
    wanted = [batch * weight / total for weight in weights]
    out = [int(value) for value in wanted]
    for i in sorted(range(len(out)), key=lambda i: out[i] - wanted[i])[: batch - sum(out)]:
        out[i] += 1
    if 0 in out:
        raise BadInput(f"a batch of {batch} cannot hold a sample of each of {len(weights)} sources at these weights")
    return out


def mixed(step: int, batch: int, sizes: list[int], weights: list[float], seed: int) -> np.ndarray:
    """Samples of an update drawn from several sources; those of a source are numbered after the sources before it."""
    if len(sizes) == 1:
        return ids(step, batch, sizes[0], seed)
    parts, start = [], 0
    for i, (size, rows) in enumerate(zip(sizes, shares(weights, batch), strict=True)):
        parts.append(start + ids(step, rows, size, seed + 7919 * i))
        start += size
    return np.concatenate(parts)


def given(path: Path, batch: int, samples: int) -> np.ndarray:
    """Sample ids int [updates, batch] from an array file: what each update sees.

    Raises Missing; BadInput for another batch, or ids that are none.
    """
    if not path.is_file():
        raise Missing(f"no such order: {path}")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} is not an array file of sample ids: {error}") from error
    if found.ndim != 2 or found.dtype.kind not in "iu" or not found.size or found.shape[1] != batch:
        raise BadInput(f"{path}: whole numbers [updates, {batch}] wanted, not {found.dtype} {found.shape}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= samples:
        raise BadInput(f"{path}: there is no sample {low if low < 0 else high}; the data has {samples}")
    return found


def share(found: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """A data-parallel rank's part of a batch: equal, disjoint, in order.

    Raises BadInput when the batch cannot be divided.
    """
    if len(found) % ranks:
        raise BadInput(
            f"a batch of {len(found)} cannot be divided among {ranks} data-parallel ranks.\n"
            f"Use --batch {-(-len(found) // ranks) * ranks}, or another number of ranks."
        )
    size = len(found) // ranks
    return found[rank * size : (rank + 1) * size]
