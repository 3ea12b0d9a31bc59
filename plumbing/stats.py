"""The statistics that results are told in: intervals, paired tests, mean ± sd."""

import math
import statistics

import numpy as np


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has none, which is not 0. Both are nan
    if a value is: what was not measured has no mean."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan if len(values) > 1 else None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def plus_minus(mean: float, sd: float | None, digits: int = 3, gap: str = " ") -> str:
    """A mean and its spread as text: 0.123 ± 0.004, or the mean alone where sd is None."""
    mean = round(mean, digits) + 0.0  # no -0.000
    return f"{mean:.{digits}f}" + (f"{gap}± {sd:.{digits}f}" if sd is not None else "")


def wilson(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share, Wilson's score interval: it holds near 0 and 1 too."""
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: where two models differ, is it a fair coin?"""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_t(a: list[float], b: list[float]) -> float:
    """Two-sided p of the paired t-test of n differences."""
    differences = np.subtract(a, b)
    n, sd = len(differences), differences.std(ddof=1)
    if sd == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return outside(abs(differences.mean()) / (sd / math.sqrt(n)), n - 1)


def paired_interval(a: list[float], b: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of n differences a - b, Student's."""
    differences = np.subtract(a, b)
    half = t_quantile(0.975, len(differences) - 1) * differences.std(ddof=1)
    mean, half = float(differences.mean()), float(half) / math.sqrt(len(differences))
    return mean - half, mean + half


def smallest_difference(a: list[float], b: list[float]) -> float:
    """How large a true mean difference has to be for the paired t-test, with the spread of these n
    differences, to notice it (p < .05) in about four cases of five."""
    differences = np.subtract(a, b)
    df, se = len(differences) - 1, differences.std(ddof=1) / math.sqrt(len(differences))
    return float((t_quantile(0.975, df) + t_quantile(0.8, df)) * se)


def outside(t: float, df: int) -> float:
    """The probability beyond -t and t of Student's distribution, by integrating its density."""
    x = np.linspace(0, t, 20001)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    inside = np.trapezoid(np.exp(log_c) * (1 + x * x / df) ** (-(df + 1) / 2), x)
    return max(0.0, 1 - 2 * float(inside))


def t_quantile(p: float, df: int) -> float:
    """The t that a value stays below with probability p, from .5 up to 1."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle, df) > 2 * (1 - p) else (low, middle)
    return low
