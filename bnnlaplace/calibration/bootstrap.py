"""Bootstrap intervals for metrics that are functions of weights on the examples.

A metric is written once, for rows of weights. A row of ones gives its value on the data, and a row of multinomial
counts gives its value on a resample, so a thousand resamples cost a few matrix products.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bnnlaplace.core import checks

Statistics = Callable[..., dict[str, Float[np.ndarray, " R"]]]

_TAIL = 40  # one replicate of so many lies beyond each end of an interval: 2.5 %
_MOST_RESAMPLES = 1_000_000  # 8 MB of replicates for each metric; all of them are kept
_CHUNK_ELEMENTS = 2**21  # weights in memory at a time: 16 MiB an array, about 100 MiB with a metric's temporaries


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

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval: only then does a difference say which of two methods is better."""
        return self.low > 0 or self.high < 0


class Bootstrap(NamedTuple):
    """Metrics on the data and on R resamples of it.

    Attributes
    ----------
    values
        By name, the value of each metric on the data.
    replicates
        By name, the R values of each metric on the resamples.
    biased_upwards
        Names of the metrics that resampling inflates.
    """

    values: dict[str, float]
    replicates: dict[str, Float[np.ndarray, " R"]]
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
        Takes one array of weights (R, N_i) for each set of examples, with row sums N_i, and returns arrays (R,) by
        name.
    sizes
        The numbers of examples N_i. The sets are resampled independently.
    seed
        Seeds the resamples, which depend on nothing but this and `sizes`. Two methods that are evaluated on the same
        examples with the same seed see the same resamples, so `paired_differences` can pair them.
    resamples
        How many resamples R, at most a million: all replicates are kept.
    biased_upwards
        Names of metrics such as |mean difference|, which sampling noise inflates; see `intervals`.

    Returns
    -------
    Bootstrap
        Resamples are drawn in chunks, which bounds memory and does not change the result.

    Raises
    ------
    ValueError
        If `statistics` is not a function, there are no sizes or one is not a positive integer, `seed` is negative, or
        `resamples` is below 1 or above a million.
    """
    if not callable(statistics):
        raise ValueError(f"statistics must be a function of weights; got {type(statistics).__name__}; see `resample`")
    if isinstance(sizes, (str, bytes)) or not hasattr(sizes, "__len__") or len(sizes) == 0:
        raise ValueError(f"sizes must be the numbers of examples of each set; got {sizes!r:.80}; try [len(probs)]")
    sizes = [checks.count(size, "sizes=[...]") for size in sizes]
    if isinstance(biased_upwards, str):
        raise ValueError(f"biased_upwards must be several names; got {biased_upwards!r}; try ({biased_upwards!r},)")
    seed = checks.count(seed, "seed=...", least=0)
    resamples = checks.count(
        resamples, "resamples=...", most=_MOST_RESAMPLES, advice="1000 is usual for 95 % intervals"
    )
    generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(len(sizes))]
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // sum(sizes))
    chunks = []
    for start in range(0, resamples, rows_per_chunk):
        rows = min(rows_per_chunk, resamples - start)
        weights = [_multinomial(rng, rows, size) for rng, size in zip(generators, sizes, strict=True)]
        chunks.append(statistics(*weights))
    on_the_data = statistics(*(np.ones((1, size)) for size in sizes))
    values = {name: float(value[0]) for name, value in on_the_data.items()}
    replicates = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in values}
    return Bootstrap(values, replicates, tuple(biased_upwards))


def intervals(result: Bootstrap) -> dict[str, Interval]:
    """Return a 95 % interval for every metric.

    Most metrics get the percentile interval. Metrics that are biased upwards get the basic one, which is the percentile
    interval reflected about the value (Davison and Hinkley, "Bootstrap methods and their application", 1997, equation
    5.6), cut at 0 and extended to the value itself. The reason is that a resample of calibrated predictions is further
    from calibrated than the sample, just as the sample is further from calibrated than the truth. With few examples and
    a small calibration error the percentile interval misses the truth more often than it holds it; the tests simulate
    both.

    A metric that is at its limit on every example (accuracy 1) gets an interval of width 0.

    Parameters
    ----------
    result
        From `bootstrap` or `resample`.

    Raises
    ------
    ValueError
        If it is something else.
    """
    _check_bootstrap(result, "result")
    by_name = {}
    for name, value in result.values.items():
        low, high = _ends(result, name, value, result.replicates[name])
        if name in result.biased_upwards:
            low, high = max(0.0, low), max(value, high)
        by_name[name] = Interval(value, low, high)
    return by_name


def paired_differences(result: Bootstrap, reference: Bootstrap) -> dict[str, Interval]:
    """Return 95 % intervals of `result` minus `reference`, metric by metric, from shared resamples.

    Both must come from the same examples, seed and number of resamples. The intervals are much narrower than those of
    the two methods suggest, because most of the uncertainty is in the examples, which both have in common. A difference
    of two infinite values is NaN.

    Parameters
    ----------
    result, reference
        The two methods, from `bootstrap` or `resample`.

    Raises
    ------
    ValueError
        If the two hold different metrics or different numbers of resamples, or are something else.
    """
    _check_bootstrap(result, "result")
    _check_bootstrap(reference, "reference")
    if result.values.keys() != reference.values.keys():
        raise ValueError(
            f"both must hold the same metrics; got {sorted(result.values)} and {sorted(reference.values)}; evaluate "
            "both with the same arguments"
        )
    by_name = {}
    for name, value in result.values.items():
        ours, theirs = result.replicates[name], reference.replicates[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"both must hold {name} on the same resamples; got {len(ours)} and {len(theirs)} of them; "
                "evaluate both with the same arguments"
            )
        with np.errstate(invalid="ignore"):  # inf - inf is the documented NaN
            difference = float(np.float64(value) - reference.values[name])
            by_name[name] = Interval(difference, *_ends(result, name, difference, ours - theirs))
    return by_name


def _check_bootstrap(result: Bootstrap, name: str) -> None:
    """Raise ValueError unless `result` is a `Bootstrap`."""
    if not isinstance(result, Bootstrap):
        raise ValueError(
            f"{name} must come from `bootstrap` or `resample`; got {type(result).__name__}; call one first"
        )


def _multinomial(rng: np.random.Generator, rows: int, size: int) -> Float[np.ndarray, "{rows} {size}"]:
    """Draw rows of counts of `size` draws with replacement."""
    # Counting draws is several times faster than drawing from a multinomial distribution, which draws binomials.
    draws = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def _ends(result: Bootstrap, name: str, value: float, replicates: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """Ends of the percentile interval, reflected about the value if the metric is biased upwards."""
    if np.isnan(value) or np.isnan(replicates).any():
        return np.nan, np.nan
    # Order statistics rather than interpolated quantiles, so that infinite replicates stay infinite instead of NaN.
    # Both are equally far from their end: so the interval of a difference is the mirror image of that of its negative.
    last = -(-len(replicates) // _TAIL) - 1
    ordered = np.sort(replicates)
    low, high = float(ordered[last]), float(ordered[-1 - last])
    return (2 * value - high, 2 * value - low) if name in result.biased_upwards else (low, high)
