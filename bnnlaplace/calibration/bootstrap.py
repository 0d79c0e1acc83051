"""Bootstrap intervals for metrics that are functions of weights on the examples.

A metric is written once, for rows of weights: all ones give its value, multinomial counts give it on a resample, and
a thousand resamples cost a few matrix products.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Statistics = Callable[..., dict[str, Float[np.ndarray, "R"]]]

_LEVELS = (0.025, 0.975)
_CHUNK_ELEMENTS = 2**21  # weights held at a time: 16 MiB an array, about 100 MiB with a metric's temporaries


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval.

    Attributes
    ----------
    value
        On the data.
    low, high
        The ends.
    """

    value: float
    low: float
    high: float


class Bootstrap(NamedTuple):
    """Metrics on the data and on R resamples of it.

    Attributes
    ----------
    values
        Of each metric on the data, by name.
    replicates
        Of each metric on the R resamples.
    biased_upwards
        Names of the metrics that resampling inflates.
    """

    values: dict[str, float]
    replicates: dict[str, Float[np.ndarray, "R"]]
    biased_upwards: tuple[str, ...]


def resample(
    statistics: Statistics,
    sizes: Sequence[int],
    *,
    seed: int,
    resamples: int = 1000,
    biased_upwards: Sequence[str] = (),
) -> Bootstrap:
    """Evaluate metrics on the data and on resamples drawn with replacement.

    Parameters
    ----------
    statistics
        Takes one array of weights (R, N_i) per set of examples, with row sums N_i, and returns arrays (R,) by name.
    sizes
        The numbers of examples N_i; the sets are resampled independently.
    seed
        Resamples depend on this and on `sizes` alone: methods evaluated on the same examples with the same seed see
        the same resamples, which is what makes `paired_differences` paired.
    resamples
        How many resamples R.
    biased_upwards
        Names of metrics such as |mean difference|, which sampling noise inflates; see `intervals`.

    Returns
    -------
    Bootstrap
        Memory is bounded by chunks of resamples, whose size does not change the result.

    Raises
    ------
    ValueError
        `resamples` below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}; 1000 is usual for 95 % intervals")
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(len(sizes))]
    rows = max(1, _CHUNK_ELEMENTS // sum(sizes))
    chunks = []
    for start in range(0, resamples, rows):
        now = min(rows, resamples - start)
        chunks.append(statistics(*(_multinomial(rng, now, size) for rng, size in zip(streams, sizes, strict=True))))
    values = {name: float(value[0]) for name, value in statistics(*(np.ones((1, size)) for size in sizes)).items()}
    replicates = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in values}
    return Bootstrap(values, replicates, tuple(biased_upwards))


def intervals(result: Bootstrap) -> dict[str, Interval]:
    """95 % intervals of all metrics.

    Percentile intervals, but for metrics that are biased upwards: a resample of calibrated predictions is further
    from calibrated than the sample, as the sample is further than the truth. There the interval is reflected about
    the value (the basic bootstrap: Davison and Hinkley, "Bootstrap methods and their application", 1997, equation
    5.6), cut at 0 and extended to the value itself. With few examples and a small
    calibration error the percentile interval misses the truth more often than it holds it (`tests/test_calibration.py`
    simulates both).

    A metric that is at its limit on every example (accuracy 1) gets an interval of no width.

    Parameters
    ----------
    result
        From `bootstrap` or `resample`.
    """
    found = {}
    for name, value in result.values.items():
        low, high = _ends(result, name, value, result.replicates[name])
        if name in result.biased_upwards:
            low, high = max(0.0, low), max(value, high)
        found[name] = Interval(value, low, high)
    return found


def paired_differences(result: Bootstrap, reference: Bootstrap) -> dict[str, Interval]:
    """95 % intervals of `result` minus `reference`, metric by metric, from shared resamples.

    Both must come from the same examples, seed and number of resamples. Much narrower than the two intervals
    suggest: most of the uncertainty is in the examples, which both have in common. NaN where both are infinite.

    Parameters
    ----------
    result, reference
        Of the two methods.

    Raises
    ------
    ValueError
        Other metrics or another number of resamples in the two.
    """
    found = {}
    for name, value in result.values.items():
        ours, theirs = result.replicates[name], reference.replicates.get(name, np.empty(0))
        if ours.shape != theirs.shape:
            raise ValueError(
                f"both must hold {name} on the same resamples; got {len(ours)} and {len(theirs)} of them; "
                "evaluate both with the same arguments"
            )
        with np.errstate(invalid="ignore"):  # inf - inf is the documented NaN
            difference = float(np.float64(value) - reference.values[name])
            found[name] = Interval(difference, *_ends(result, name, difference, ours - theirs))
    return found


def _multinomial(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """(rows, size) counts of `size` draws with replacement; counting draws is several times faster than binomials."""
    draws = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def _ends(result: Bootstrap, name: str, value: float, replicates: np.ndarray) -> tuple[float, float]:
    """Order statistics rather than interpolated quantiles: infinite replicates stay infinite instead of NaN."""
    if np.isnan(value) or np.isnan(replicates).any():
        return np.nan, np.nan
    low, high = (float(end) for end in np.quantile(replicates, _LEVELS, method="inverted_cdf"))
    return (2 * value - high, 2 * value - low) if name in result.biased_upwards else (low, high)
