"""How sure a before/after difference is: the paired bootstrap over held-out rows. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

FEW_ROWS = 20  # held-out rows below which a difference is told without the word better or worse
FEW_CHANGED = 6  # rows that differ below which no difference is shown: even 5 to 0 is p 0.062 by the sign test, and where most
# rows are alike (F1 of a weak model, mostly 0) a bootstrap finds zero outside its interval from 4 of 100 on
CELLS = 4_000_000  # counts drawn at a time: 32 MB however many rows there are


def paired_bootstrap(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    seed: int,
    n: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(difference, lo, hi): the weighted mean of `after - before` [rows] and its interval; below zero, a loss fell.

    Rows are resampled in pairs, so what makes a row hard cancels out. With `weights` (trained tokens of each row) the difference is
    that of the means over tokens. The percentiles are taken further out for few rows, as Student's t asks (the expanded percentile
    interval, Hesterberg 2015, doi 10.1080/00031305.2015.1089789). One row says nothing about others: its interval is (-inf, inf).
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    weight = np.ones_like(before) if weights is None else np.asarray(weights, np.float64)
    assert before.shape == after.shape == weight.shape and before.ndim == 1, "one value a row, in the same order"
    used = weight > 0
    change, weight = (after - before)[used], weight[used]
    rows = len(change)
    if not rows:
        return 0.0, -math.inf, math.inf
    difference = float(change @ weight / weight.sum())
    if rows == 1 or not np.isfinite(change).all():
        return difference, -math.inf, math.inf
    rng, step = np.random.default_rng(seed), max(1, CELLS // rows)
    even = np.full(rows, 1 / rows)
    means = np.empty(n)
    for start in range(0, n, step):
        counts_NR = rng.multinomial(rows, even, size=min(step, n - start)) * weight
        means[start : start + len(counts_NR)] = counts_NR @ change / counts_NR.sum(1)
    tail = _tail(level, rows)
    lo, hi = np.quantile(means, [tail, 1 - tail])
    return difference, float(lo), float(hi)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], rows: int, *, seed: int, n: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """(value, lo, hi) of what is no mean over rows, such as macro-F1 or a difference of two of them on the same rows.

    `statistic` turns counts of rows [n, rows] into values [n]. Percentiles as in `paired_bootstrap`.
    """
    value = float(statistic(np.ones((1, rows)))[0])
    if rows < 2:
        return value, -math.inf, math.inf
    rng, step = np.random.default_rng(seed), max(1, CELLS // rows)
    even = np.full(rows, 1 / rows)
    found = [statistic(rng.multinomial(rows, even, size=min(step, n - start))) for start in range(0, n, step)]
    tail = _tail(level, rows)
    lo, hi = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return value, float(lo), float(hi)


def mcnemar(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> tuple[int, int, float]:
    """(rows right only before, rows right only after, p) of values 0 and 1 on the same rows: McNemar's test in its exact form, a
    two-sided binomial test over the rows that changed. Without such rows p is 1."""
    right_before, right_after = np.asarray(before) > 0.5, np.asarray(after) > 0.5
    lost, won = int((right_before & ~right_after).sum()), int((right_after & ~right_before).sum())
    changed, fewer = lost + won, min(lost, won)
    whole = 1 << changed  # integers: 2 ** -n is 0 as a float from 1,075 rows on
    p = 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / whole if changed else 1.0
    return lost, won, min(1.0, p)


def wilson(hits: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927): also of none or all of few rows, where a bootstrap would claim certainty."""
    z = _normal_quantile(0.5 + level / 2)
    share, weight = hits / rows, 1 + z**2 / rows
    middle = (share + z**2 / (2 * rows)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _tail(level: float, rows: int) -> float:
    """The percentile that is taken at each end for so many rows."""
    return _normal(-math.sqrt(rows / (rows - 1)) * t_quantile(level, rows - 1))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, lo, hi) of a few values by Student's t; one value says nothing of its spread: (-inf, inf)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = t_quantile(level, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def t_quantile(level: float, freedom: int) -> float:
    """Student's two-sided quantile by the Cornish-Fisher series (Abramowitz and Stegun 26.7.5): within 2 % from 3 degrees
    on; exact for 1 and 2."""
    if freedom <= 2:
        return math.tan(math.pi * level / 2) if freedom == 1 else level * math.sqrt(2 / (1 - level**2))
    z = _normal_quantile(0.5 + level / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _normal_quantile(p: float) -> float:
    lo, hi = -10.0, 10.0
    for _ in range(80):  # bisection to the last bit; called once a comparison
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if _normal(middle) < p else (lo, middle)
    return (lo + hi) / 2
