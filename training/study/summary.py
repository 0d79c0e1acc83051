"""The summary of a study: means over seeds, differences to the reference with intervals, tables and figures."""

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy

from bnnlaplace.calibration import Interval, intervals, paired_interval, resample
from training import sealed
from training.study import figures, method_names, store, tables
from training.study.config import Study, to_document
from training.study.scores import Method
from training.workdir import write_atomically

# Scores that are means over images: for these intervals are over images and seeds. "shift_..." are means over all
# shifts and severities.
OF_IMAGES = ("nll", "calibrated", "brier", "accuracy", "shift_nll", "shift_accuracy")
# Others have intervals over seeds alone, by Student's t.
OF_SEEDS = ("ece", "rejection")
_INTERVAL_SEED = 0

Key = tuple[str, str, str | None, str | None]
"""Training, method, how the prior was chosen, and link."""


class Regime(NamedTuple):
    """What there is of one regime."""

    name: str
    methods: dict[Key, dict[int, Method]]
    """By key and seed."""
    failures: list[dict[str, Any]]
    about: dict[str, Any]
    seconds: dict[str, float]
    """By unit, mean over seeds."""
    missing: int
    """Units of the study that have not been computed."""


def summarise(root: Path, study: Study, command: str) -> list[str]:
    """Write `summary/summary.json`, `summary/summary.md` and figures from the units that are there.

    Returns the lines of the shortest table, for the terminal.

    Raises
    ------
    UserError
        A unit is damaged, or was computed with other settings than those of the study.
    """
    found = list(_collected(root, study))
    document = {
        "study": to_document(study),
        "command": command,
        "versions": {name: version(name) for name in ("bnnlaplace", "jax", "flax", "numpy", "scipy")},
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "reference": study.reference_name,
        "regimes": {regime.name: _of_regime(regime, study) for regime in found},
    }
    directory = root / store.SUMMARY
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "summary.json", sealed.dump(document, indent=1))
    write_atomically(directory / "summary.md", "\n".join(tables.page(document)) + "\n")
    for regime in found:
        figures.draw(directory, regime.name, regime.methods, study)
    return [*tables.short(document), f"written to {directory}"]


def _collected(root: Path, study: Study) -> Iterable[Regime]:
    """Read all units, regime by regime."""
    for regime in study.regimes:
        units = [unit for unit in store.units_of(study) if unit.regime == regime.name]
        results = {unit: result for unit in units if (result := _loaded(root, study, unit)) is not None}
        methods: dict[Key, dict[int, Method]] = {}
        seconds: dict[str, list[float]] = {}
        for unit, result in results.items():
            for method in result.methods:
                methods.setdefault(key_of(method), {})[unit.seed] = method
            seconds.setdefault(f"{unit.training}.{unit.name}", []).append(result.seconds)
        failures = [
            {**unit._asdict(), "failed": result.failed} for unit, result in results.items() if result.failed is not None
        ]
        about = next((result.about for result in results.values()), {})
        means = {name: float(np.mean(each)) for name, each in seconds.items()}
        yield Regime(regime.name, methods, failures, about, means, len(units) - len(results))


def _loaded(root: Path, study: Study, unit: store.Unit) -> store.Result | None:
    return store.load_unit(root, unit, store.settings_of(study, unit))


def key_of(method: Method) -> Key:
    """Return what names a method within a regime."""
    return tuple(method.description[name] for name in ("training", "method", "prior", "link"))


def _of_regime(regime: Regime, study: Study) -> dict[str, Any]:
    """Return the part of the document for one regime."""
    reference = study.reference_name
    rows = []
    for key, by_seed in regime.methods.items():
        against = {
            "MAP": (reference, method_names.MAP, None, None),
            "MAP + T": (reference, method_names.MAP_T_SPLIT, None, None),
            "MAP + T (validation)": (reference, method_names.MAP_T_VALIDATION, None, None),
            "own MAP": (key[0], method_names.MAP, None, None),
        }
        differences = {
            name: _differences(by_seed, regime.methods[other])
            for name, other in against.items()
            if other in regime.methods and other != key
        }
        rows.append({**_means(key, by_seed), "seeds": sorted(by_seed), "differences": differences})
    return {
        "about": regime.about,
        "methods": rows,
        "failures": regime.failures,
        "missing": regime.missing,
        "seconds": regime.seconds,
    }


def _means(key: Key, by_seed: dict[int, Method]) -> dict[str, Any]:
    """Average the numbers of a method over its seeds. One that is not finite for a seed is None."""
    numbers = [method.numbers for method in by_seed.values()]
    described = [method.description for method in by_seed.values()]
    precisions = [each["prior_precision"] for each in described if "prior_precision" in each]
    return {
        **dict(zip(("training", "method", "prior", "link"), key, strict=True)),
        "numbers": _mean(numbers),
        "prior_precision": float(np.exp(np.mean(np.log(precisions)))) if precisions else None,
        "temperature": _mean([each.get("temperature") for each in described]),
        "log_evidence": _mean([each.get("log_evidence") for each in described]),
        "seconds": _mean([each.get("seconds", {}) for each in described]),
        "reservations": [
            *sorted({each["reservation"] for each in described if each.get("reservation")}),
            *_of_temperatures(by_seed),
        ],
        "warnings": sorted({text for each in described for text in each["warnings"]}),
    }


def _of_temperatures(by_seed: dict[int, Method]) -> Iterator[str]:
    """Say for which seeds the search for the temperature ended at which end of its range."""
    at_end: dict[float, list[int]] = {}
    for seed, method in sorted(by_seed.items()):
        if method.description.get("temperature_at_bound"):
            at_end.setdefault(method.description["temperature"], []).append(seed)
    for temperature, seeds in sorted(at_end.items()):
        yield (
            f"the temperature is at the end of its search range, {temperature:g}, for seed "
            f"{', '.join(map(str, seeds))}: the optimum is not inside it"
        )


def _mean(values: Sequence[Any]) -> Any:
    """Average numbers, or lists and dictionaries of such, entry by entry."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        names = [name for name in values[0] if all(name in value for value in values)]
        return {name: _mean([value[name] for value in values]) for name in names}
    if isinstance(values[0], list):
        return [_mean(entries) for entries in zip(*values, strict=True)]
    return float(np.mean(values))


# --- differences ----------------------------------------------------------------------------------------------------


def _differences(ours: dict[int, Method], theirs: dict[int, Method]) -> dict[str, Any]:
    """Compare two methods on the seeds that both have, score by score."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return {}
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    compared = {}
    for name in OF_IMAGES:
        rows = [[_per_image(method, name) for method in pair] for pair in pairs]
        if all(row is not None for pair in rows for row in pair):
            compared[name] = _verdict(name, _over_images(*zip(*rows, strict=True)))
    names = [*OF_SEEDS, *(f"auroc.{name}" for name in pairs[0][0].numbers["auroc"])]
    for name in names:
        values = [[_number(method, name) for method in pair] for pair in pairs]
        if all(value is not None for pair in values for value in pair):
            compared[name] = _verdict(name, _over_seeds(np.array(values)))
    return compared


def _per_image(method: Method, name: str) -> np.ndarray | None:
    """Scores of each image in double precision, averaged over shifts and severities; None if some are not finite."""
    array = method.arrays.get(name)
    if array is None or not np.isfinite(array).all():
        return None
    array = np.asarray(array, np.float64)
    return array.mean(axis=(0, 1)) if array.ndim == 3 else array


def _number(method: Method, name: str) -> float | None:
    value: Any = method.numbers
    for part in name.split("."):
        value = value.get(part)
    return value


def _over_images(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Interval:
    """Return the mean difference with its interval over images and seeds; of one seed, over images alone."""
    if len(ours) > 1:
        return paired_interval(ours, theirs, seed=_INTERVAL_SEED)
    difference = ours[0] - theirs[0]

    def mean(counts: np.ndarray) -> dict[str, np.ndarray]:
        return {"difference": counts @ difference / len(difference)}

    return intervals(resample(mean, (len(difference),), seed=_INTERVAL_SEED))["difference"]


def _over_seeds(values: np.ndarray) -> Interval:
    """Return the mean difference of (seeds, 2) numbers with Student's interval; of one seed, without an interval."""
    difference = values[:, 0] - values[:, 1]
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(scipy.special.stdtrit(count - 1, 0.975) * difference.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)


LOWER_IS_BETTER = ("nll", "brier", "ece", "shift_nll")


def _verdict(name: str, interval: Interval) -> dict[str, Any]:
    """Say "better" or "worse" only where the interval excludes zero."""
    low, high = (None if np.isnan(end) else float(end) for end in (interval.low, interval.high))
    verdict = "not told"
    if low is not None and interval.excludes_zero:
        verdict = "better" if (interval.value < 0) == (name in LOWER_IS_BETTER) else "worse"
    return {"value": float(interval.value), "low": low, "high": high, "verdict": verdict}
