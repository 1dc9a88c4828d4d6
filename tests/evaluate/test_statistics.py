"""The paired bootstrap: known quantiles, coverage, pairing, weights, and no claim from too little."""

import math

import numpy as np
import pytest

from tunesmith.evaluate import statistics
from tunesmith.evaluate.statistics import paired_bootstrap, t_quantile


@pytest.mark.parametrize(("freedom", "known"), [(3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)])
def test_t_quantile_is_that_of_the_printed_tables(freedom, known):
    assert t_quantile(0.95, freedom) == pytest.approx(known, rel=0.02 if freedom == 3 else 0.005)


def test_a_shift_of_every_row_is_certain_and_the_same_seed_repeats():
    before = np.linspace(1, 5, 40)
    assert paired_bootstrap(before, before - 0.5, seed=1) == pytest.approx((-0.5, -0.5, -0.5))
    noisy = before - 0.5 + np.sin(np.arange(40))
    assert paired_bootstrap(before, noisy, seed=1) == paired_bootstrap(before, noisy, seed=1)
    assert paired_bootstrap(before, noisy, seed=1) != paired_bootstrap(before, noisy, seed=2)


def test_pairing_takes_the_rows_own_difficulty_out():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 60)
    _, lo, hi = paired_bootstrap(hard, hard - 0.2 + rng.normal(0, 0.1, 60), seed=0)
    assert lo < -0.2 < hi < 0 and hi - lo < 0.1  # unpaired, the interval would be about 7 wide


def test_weights_are_trained_tokens():
    before, after, tokens = np.array([1.0, 2.0, 3.0]), np.array([1.5, 1.0, 3.0]), np.array([10, 30, 0])
    difference, _, _ = paired_bootstrap(before, after, tokens, seed=0)
    assert difference == pytest.approx((15 + 30) / 40 - (10 + 60) / 40)  # sums of nats over sums of tokens; the empty row is out


@pytest.mark.parametrize("rows", [6, 30])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(rows):
    """1,000 draws of a known truth. The plain percentile interval covers 86 % at six rows."""
    rng, hits = np.random.default_rng(1), 0
    for i in range(1000):
        noise = rng.normal(0.3, 1, rows)
        _, lo, hi = paired_bootstrap(np.zeros(rows), noise, seed=i, n=600)
        hits += lo <= 0.3 <= hi
    assert 0.92 <= hits / 1000 <= 0.975  # three standard errors of 1,000 draws are 2 %, and 600 resamples cost 0.5 %


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [0.5]), ([1.0, 2.0], [0.5, math.inf])])
def test_too_little_to_say(before, after):
    assert paired_bootstrap(before, after, seed=0)[1:] == (-math.inf, math.inf)


def test_many_rows_in_bounded_memory():
    rows = 200_000
    difference, lo, hi = paired_bootstrap(np.zeros(rows), np.tile([0.0, 1.0], rows // 2), seed=0, n=60)
    assert difference == 0.5 and lo < 0.5 < hi < 0.505


def test_mcnemar_is_the_exact_binomial_test():
    """By hand: 1 of 6 changed rows, two-sided, is 2 * (1 + 6) / 64."""
    before, after = [1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0]
    assert statistics.mcnemar(before, after) == (1, 5, 14 / 64)
    assert statistics.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    assert statistics.mcnemar([1, 0], [0, 1])[2] == 1.0  # both tails meet in the middle
    lost, won, p = statistics.mcnemar(np.zeros(3000), np.ones(3000))
    assert (lost, won) == (0, 3000) and p < 1e-300


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_is_the_published_interval(hits, rows, low, high):
    """The last is Newcombe's example (1998): 81 of 263."""
    assert statistics.wilson(hits, rows) == pytest.approx((low, high), abs=2e-4)


def test_the_bootstrap_of_a_mean_is_the_paired_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    wanted = statistics.paired_bootstrap(np.zeros(40), values, seed=3)
    found = statistics.bootstrap(lambda counts: counts @ values / counts.sum(1), 40, seed=3)
    assert np.allclose(found, wanted)
    assert statistics.bootstrap(lambda counts: counts @ values[:1], 1, seed=0)[1:] == (-math.inf, math.inf)
