"""Claims about plumbing/stats.py, against tables and against the definitions."""

import math
import statistics

import numpy as np
import pytest

from plumbing.stats import (
    mcnemar,
    mean_sd,
    paired_interval,
    paired_t,
    plus_minus,
    smallest_difference,
    t_quantile,
    wilson,
)


def test_mean_and_sample_standard_deviation():
    """The sample's, not the population's; a single value has none, which is neither 0 nor nan."""
    # sqrt((.3² + .1² + .4²) / 2) = .361; the population's would be .294
    mean, sd = mean_sd([4.0, 4.2, 4.7])
    assert mean == pytest.approx(4.3) and sd == pytest.approx(math.sqrt(0.13))
    assert sd == statistics.stdev([4.0, 4.2, 4.7])
    assert mean_sd([4.0]) == (4.0, None)


@pytest.mark.parametrize("args, text", [
    ((4.0, None), "4.000"), ((4.3, 0.3606), "4.300 ± 0.361"), ((10.0, 0.0, 1), "10.0 ± 0.0"),
    ((0.5, 0.25, 2, ""), "0.50± 0.25"), ((-0.0001, None), "0.000"),
    ((-0.0004, 0.1), "0.000 ± 0.100"), ((-0.0006, None), "-0.001"),
])  # fmt: skip
def test_a_mean_and_its_spread_as_text(args, text):
    assert plus_minus(*args) == text


def test_wilson_interval():
    """Against the roots of its definition: |share - p| = z sqrt(p (1 - p) / n)."""
    for count, n in ((0, 10), (3, 10), (10, 10), (500, 1319)):
        for p in wilson(count, n):
            gap = 1.959964 * math.sqrt(p * (1 - p) / n)
            assert abs(count / n - p) == pytest.approx(gap, abs=1e-7)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("only_a, only_b, p", [
    (0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (3, 4, 1),
])  # fmt: skip
def test_mcnemar_is_a_fair_coin(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p)


@pytest.mark.parametrize("t, n, p", [
    (2.776445, 5, 0.05), (4.604095, 5, 0.01), (2.262157, 10, 0.05), (0.0, 5, 1.0),
    (8.610302, 5, 0.001),
])  # fmt: skip
def test_paired_t_gives_the_tables_values(t, n, p):
    noise = np.resize([1.0, -1.0], n) - np.resize([1.0, -1.0], n).mean()
    noise /= noise.std(ddof=1) / np.sqrt(n)
    reference = np.linspace(0.3, 0.9, n)
    assert paired_t(reference + noise + t, reference) == pytest.approx(p, abs=1e-5)
    assert paired_t(reference - noise - t, reference) == pytest.approx(p, abs=1e-5)


def test_equal_differences_need_no_density():
    assert paired_t([0.5, 0.6], [0.5, 0.6]) == 1
    assert paired_t([1.5, 2.5], [0.5, 1.5]) == 0


@pytest.mark.parametrize("p, df, t", [
    (0.975, 4, 2.776445), (0.975, 9, 2.262157), (0.8, 9, 0.883404), (0.995, 4, 4.604095),
    (0.5, 3, 0.0), (0.975, 1, 12.7062),
])  # fmt: skip
def test_quantiles_of_students_distribution_are_the_tables(p, df, t):
    assert t_quantile(p, df) == pytest.approx(t, abs=1e-4)


def test_an_interval_ends_where_the_test_says_five_percent():
    a, b = [0.71, 0.69, 0.74, 0.70], [0.66, 0.68, 0.67, 0.69]
    low, high = paired_interval(a, b)
    assert (low + high) / 2 == pytest.approx(np.subtract(a, b).mean())
    for end in (low, high):
        assert paired_t(np.subtract(a, end), b) == pytest.approx(0.05, abs=1e-6)


def test_the_smallest_difference_is_noticed_four_times_of_five():
    rng, n, trials = np.random.default_rng(0), 10, 400
    noise = rng.normal(size=n)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # so that the spread is 1
    d = smallest_difference(noise, np.zeros(n))
    noticed = sum(paired_t(rng.normal(d, 1, n), np.zeros(n)) < 0.05 for _ in range(trials))
    assert 0.73 < noticed / trials < 0.87
