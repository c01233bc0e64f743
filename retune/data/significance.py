"""How sure a mean over queries is: intervals and tests that assume nothing of the values' distribution.

Takes matrices of values, queries by columns; knows nothing of measures or models.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
CELLS = 1 << 22  # weights held at once, so that memory does not grow with the number of queries


def bootstrap_interval(values: np.ndarray, seed: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over queries (Efron, 1979), `RESAMPLES` resamples.

    Args:
        values: float64 [q, m]; all columns are resampled together.
        seed: of the resampling.
        confidence: share of the resampled means that the interval holds.

    Returns:
        Lower and upper bounds, float64 [m] each.
    """
    n = len(values)
    rng = np.random.default_rng([seed, 0])
    means = np.empty((RESAMPLES, values.shape[1]))
    for start, stop in _blocks(RESAMPLES, n):
        size = stop - start
        drawn = rng.integers(n, size=(size, n), dtype=np.int32)  # [b, q]
        drawn += np.arange(size, dtype=np.int32)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)  # times each query was drawn
        means[start:stop] = weights.astype(np.float64) @ values / n  # [b, m]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def randomisation_test(differences: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-value of a paired randomisation test (Fisher; Smucker et al., CIKM 2007).

    Were two models alike, each query's difference might as well have the other sign.  All 2^q
    assignments of signs are tried where they are no more than `RESAMPLES`; as many random ones
    otherwise, with the observed assignment counted among them, so that no p-value is 0.

    Args:
        differences: float64 [q, m], model less baseline.
        seed: of the random signs.

    Returns:
        float64 [m].
    """
    n = len(differences)
    observed = np.abs(differences.sum(0))  # [m]
    threshold = observed - 1e-9 * np.abs(differences).sum(0)  # sums that are equal but for rounding are equal
    exact = n < 63 and 2**n <= RESAMPLES
    trials = 2**n if exact else RESAMPLES
    rng = np.random.default_rng([seed, 1])
    extreme = np.zeros(differences.shape[1], np.int64)
    for start, stop in _blocks(trials, n):
        if exact:
            bits = np.arange(start, stop)[:, None] >> np.arange(n) & 1  # [b, q]
        else:
            bits = np.unpackbits(np.frombuffer(rng.bytes(-(-(stop - start) * n // 8)), np.uint8))
            bits = bits[: (stop - start) * n].reshape(stop - start, n)
        sums = (1.0 - 2.0 * bits) @ differences  # [b, m]
        extreme += (np.abs(sums) >= threshold).sum(0)
    return extreme / trials if exact else (extreme + 1) / (trials + 1)


def _blocks(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, CELLS // max(width, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
