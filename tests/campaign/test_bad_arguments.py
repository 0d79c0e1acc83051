"""Bad arguments of functions of matrices, metrics and predictions: each has a clear error, or a warning of its cause.

The table is drawn from a seed: which entry of an array is spoilt, and how large a wrong number is. An outcome counts as
"error" if this package raises ValueError or TypeError with one sentence of its pattern, or warns. An error from inside
of JAX or NumPy is "raw", and a value that comes back without a word is "silent".
"""

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnnlaplace
from bnnlaplace import calibration, evidence, krylov
from bnnlaplace.calibration import bootstrap, evaluate, fit_temperature, resample

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

PACKAGE = str(Path(bnnlaplace.__file__).parent)
SENTENCE = re.compile(r"must|takes|needs|has no|gives one sample")
KEY = jax.random.key(0)
RNG = np.random.default_rng(20)


class Case(NamedTuple):
    """One bad argument: what kind it is of, what to call it, and the call."""

    kind: str
    name: str
    call: Callable[[], Any]


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """Run a call; return "error", "raw" or "silent", and what it said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
            jax.block_until_ready(result)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1].filename
            message = str(error)
            clear = isinstance(error, (ValueError, TypeError)) and place.startswith(PACKAGE)
            clear = clear and "\n" not in message and SENTENCE.search(message)
            return ("error" if clear else "raw"), f"{type(error).__name__}: {message:.150}"
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return ("error", ours[0]) if ours else ("silent", f"{result!r:.80}")


# --- bad values -------------------------------------------------------------------------------------------------


def counts() -> list[Any]:
    return [0, -int(RNG.integers(1, 99)), 2.5, True, "3", np.nan, [2], 2j, np.array([1, 2]), object()]


def numbers() -> list[Any]:
    return ["1", -float(RNG.random()), np.nan, np.inf, True, 1j, [0.1, 0.2], object()]


def keys() -> list[Any]:
    return [int(RNG.integers(99)), "key", 1.5, jnp.zeros(2), jax.random.split(KEY, 2), object()]


def names() -> list[Any]:
    return ["wrong", 3, True, ["full"], np.array(1.0)]


def spoilt(array: np.ndarray, value: float) -> np.ndarray:
    """A copy with one entry, chosen at random, replaced."""
    copy = np.array(array, copy=True)
    copy[tuple(RNG.integers(extent) for extent in copy.shape)] = value
    return copy


def vectors(size: int) -> list[Any]:
    good = RNG.normal(size=size).astype(np.float32)
    return [
        *(spoilt(good, value) for value in (np.nan, np.inf, -np.inf)),
        *(np.zeros(size, np.float32), np.ones(0, np.float32), good + 1j, np.arange(size), good > 0),
        *(
            "vector",
            None,
            np.array(["a"] * size),
            np.array([object()] * size),
            (),
            {"a": good, "b": good.astype(np.float16)},
        ),
    ]


def products() -> list[Any]:
    return [
        *(None, np.eye(4), "matrix", lambda v: v[:-1], lambda v: (v, v), lambda v: v.astype(jnp.float16)),
        *(
            lambda v: np.asarray(v),
            lambda v: jnp.eye(7) @ v,
            lambda: 1,
            lambda v: "product",
            lambda v: v if v[0] > 0 else -v,
        ),
        *(lambda v: v / 0, lambda v: v * 1e38 * 1e3),
    ]


def scalar_functions() -> list[Any]:
    return [
        None,
        "log",
        2.0,
        np.log,
        lambda x: (x, x),
        lambda x: x + 1j,
        lambda x: x @ x,
        lambda x: x if x > 0 else 0.0,
    ]


def probabilities(rows: np.ndarray) -> list[Any]:
    return [
        *(spoilt(rows, value) for value in (np.nan, np.inf, -0.5, 3.0)),
        *(
            2 * rows,
            rows[..., None],
            rows[:0],
            rows + 0j,
            rows.astype(str),
            np.array(None),
            None,
            "probs",
            [[1.0], [0.5, 0.5]],
        ),
        *(np.log(rows), rows[0] - 1, 0.5),
    ]


def labels(size: int, num_classes: int) -> list[Any]:
    good = RNG.integers(0, num_classes, size)
    return [
        *(spoilt(good, value) for value in (-1, num_classes, 2**32, -(2**40))),
        *(
            good[:-1],
            good + 0.5,
            good.astype(str),
            np.eye(num_classes, dtype=int)[good],
            good + 0j,
            None,
            "labels",
            1,
            [],
        ),
    ]


def inputs(good: np.ndarray) -> list[Any]:
    return [
        *(spoilt(good, value) for value in (np.nan, np.inf)),
        *(
            good[:, :-1],
            good[0, 0],
            good.astype(str),
            np.array([object()] * len(good)),
            None,
            "inputs",
            3.0,
            good[..., None],
        ),
        *(good.astype(np.float64) * 1e39, good + 1j),
    ]


def precisions() -> list[Any]:
    return [0.0, -1.0, [], [1.0, -1.0], [np.nan], [np.inf], "1", ["a"], [[1.0]], [1j], object(), [None]]


# --- good calls, with one argument open -------------------------------------------------------------------------

VECTOR = np.linspace(0.5, 2, 4).astype(np.float32)
DIAGONAL = jnp.arange(1.0, 5)
PROBES = np.sign(RNG.normal(size=(3, 4))).astype(np.float32)


def product(vector: Any) -> Any:
    return DIAGONAL * vector


def of_matrices() -> Iterator[Case]:
    """Krylov methods. The operator is indefinite for one function that is not defined there."""
    expm = jax.scipy.linalg.expm
    methods = {
        "lanczos": (partial(krylov.lanczos, product, VECTOR), {"num_matvecs": 2, "gradient": "autodiff"}),
        "arnoldi": (partial(krylov.arnoldi, product, VECTOR), {"num_matvecs": 2, "gradient": "autodiff"}),
        "matfun_lanczos": (partial(krylov.matfun_lanczos, jnp.exp, product, VECTOR), {"num_matvecs": 2}),
        "matfun_arnoldi": (partial(krylov.matfun_arnoldi, expm, product, VECTOR), {"num_matvecs": 2}),
        "quadrature": (partial(krylov.stochastic_lanczos_quadrature, jnp.exp, product, PROBES), {"num_matvecs": 2}),
        "eigenpairs": (partial(krylov.leading_eigenpairs, product, VECTOR), {"num_matvecs": 2, "num_pairs": 1}),
    }
    counted = {
        "quadrature": ("num_matvecs", "vjp_batch_size", "probe_batch_size"),
        "eigenpairs": ("num_matvecs", "num_pairs"),
    }
    for name, (method, good) in methods.items():
        for argument in counted.get(name, ("num_matvecs", "vjp_batch_size")):
            for value in [*counts(), None]:
                yield Case("krylov count", f"{name} {argument} {value}", partial(method, **{**good, argument: value}))
        for argument in ("gradient", "reorthogonalise") if name != "eigenpairs" else ():
            for value in names():
                yield Case("krylov name", f"{name} {argument} {value}", partial(method, **{**good, argument: value}))
        function, before = method.func, method.args[:-2]
        for value in vectors(4):
            if name == "quadrature":
                value = value[None] if isinstance(value, np.ndarray) else value
            yield Case("krylov vector", f"{name} {value}", partial(function, *before, product, value, **good))
        for value in products():
            yield Case("krylov product", f"{name} {value}", partial(function, *before, value, method.args[-1], **good))
        if name in ("matfun_lanczos", "quadrature"):
            for value in scalar_functions():
                yield Case(
                    "krylov function", f"{name} {value}", partial(function, value, product, method.args[-1], **good)
                )
            indefinite = lambda v: (DIAGONAL - 2.5) * v  # noqa: E731
            for value in (jnp.log, jnp.sqrt, jax.lax.rsqrt):
                call = partial(function, value, indefinite, method.args[-1], **{**good, "num_matvecs": 4})
                yield Case("krylov function", f"{name} indefinite {value}", call)
    for argument, name in (
        ("tolerance", "eigenpairs"),
        ("breakdown_tolerance", "lanczos"),
        ("relative_sem", "quadrature"),
    ):
        method, good = methods[name]
        for value in numbers():
            yield Case("krylov number", f"{name} {argument} {value}", partial(method, **{**good, argument: value}))
    for value in names():
        call = partial(methods["quadrature"][0], num_matvecs=2, semidefinite=value)
        if not isinstance(value, bool):
            yield Case("krylov name", f"semidefinite {value}", call)
        yield Case(
            "krylov name", f"deflation {value}", partial(methods["quadrature"][0], num_matvecs=2, deflation=value)
        )
    for draw in (krylov.rademacher_probes, krylov.normal_probes):
        for value in counts():
            yield Case("krylov count", f"{draw.__name__} {value}", partial(draw, KEY, VECTOR, value))
        for value in keys():
            yield Case("krylov key", f"{draw.__name__} {value}", partial(draw, value, VECTOR, 2))
    for value in keys():
        yield Case("krylov key", f"check_symmetric {value}", partial(krylov.check_symmetric, product, VECTOR, value))


def of_metrics() -> Iterator[Case]:
    """Metrics, bootstrap and temperature."""
    rows = RNG.dirichlet(np.ones(3), size=8)
    classes = RNG.integers(0, 3, 8)
    metrics = (
        *(calibration.accuracy, calibration.negative_log_likelihood, calibration.brier_score),
        *(calibration.expected_calibration_error, calibration.calibration_gaps, calibration.reliability_bins),
        partial(evaluate, seed=0, resamples=2),
    )
    for metric in metrics:
        name = getattr(metric, "__name__", "evaluate")
        for value in probabilities(rows):
            yield Case("probabilities", f"{name} {value}", partial(metric, value, classes))
        for value in labels(8, 3):
            yield Case("labels", f"{name} {value}", partial(metric, rows, value))
        for value in labels(8, 2):
            yield Case("binary labels", f"{name} {value}", partial(metric, rows[:, 0], value))
    for value in probabilities(rows):
        yield Case("probabilities", f"mean_confidence {value}", partial(calibration.mean_confidence, value))
    for value in [*counts(), None]:
        yield Case("metric count", f"num_bins {value}", partial(calibration.reliability_bins, rows, classes, value))
        yield Case("metric count", f"resamples {value}", partial(bootstrap, rows, classes, seed=0, resamples=value))
        if not isinstance(value, int) or value:
            yield Case("metric count", f"seed {value}", partial(bootstrap, rows, classes, seed=value, resamples=2))
        weights = lambda weights: {"mean": weights.mean(axis=1)}  # noqa: E731
        yield Case("metric count", f"sizes {value}", partial(resample, weights, [value], seed=0))
    for value in names():
        yield Case(
            "metric name", f"{value}", partial(calibration.expected_calibration_error, rows, classes, binning=value)
        )
        yield Case("metric name", f"intervals {value}", partial(calibration.intervals, value))
        yield Case("metric name", f"differences {value}", partial(calibration.paired_differences, value, value))
    logits = RNG.normal(size=(8, 3))
    # Other finite rows are logits, so they are no fault here.
    is_logits = lambda value: getattr(value, "shape", None) == (8, 3) and value.dtype.kind == "f"  # noqa: E731
    wrong = [value for value in probabilities(rows)[:-2] if not is_logits(value)]
    for value in [*wrong, spoilt(logits, np.nan), logits[..., None], rows]:
        yield Case("logits", f"fit_temperature {value}", partial(fit_temperature, value, classes))
    for value in (None, (1.0,), (2.0, 1.0), ("1", "2"), (0.0, 1.0), (1.0, np.inf), (1.0, np.nan), 3.0, (1j, 2j)):
        yield Case("logits", f"bounds {value}", partial(fit_temperature, logits, classes, value))
    scores = RNG.random(6)
    for value in (
        spoilt(scores, np.nan),
        scores[:0],
        scores.astype(str),
        None,
        "scores",
        np.ones((2, 2)),
        scores + 1j,
        0.5,
    ):
        yield Case("scores", f"auroc in {value}", partial(calibration.auroc, value, scores))
        yield Case("scores", f"fpr out {value}", partial(calibration.fpr_at_95_tpr, scores, value))


def of_predictions(la: bnnlaplace.Laplace, x: np.ndarray, y: np.ndarray) -> Iterator[Case]:
    """Methods of a fitted `Laplace`."""
    structure = la.hessian_structure
    mc, nn = {"link_approx": "mc", "key": KEY}, {"pred_type": "nn", "key": KEY}
    for value in inputs(x):
        for name, method in (("predictive", la.predictive), ("variance", la.functional_variance)):
            yield Case("inputs", f"{structure} {name} {value}", partial(method, value))
        yield Case("inputs", f"{structure} curve {value}", partial(la.validation_curve, value, y, [1.0, 2.0]))
    for value in labels(len(y), 3):
        yield Case("targets", f"{structure} {value}", partial(la.validation_curve, x, value, [1.0, 2.0]))
    for value in counts():
        for name, options in (("mc", mc), ("nn", nn), ("probit", {})):
            call = partial(la.predictive, x, num_samples=value, **options)
            yield Case("predictive count", f"{structure} {name} num_samples {value}", call)
        yield Case("predictive count", f"{structure} microbatch {value}", partial(la.predictive, x, microbatch=value))
        call = partial(la.validation_curve, x, y, [1.0], microbatch=value)
        yield Case("predictive count", f"{structure} curve microbatch {value}", call)
        call = partial(la.validation_curve, x, y, [1.0], num_samples=value, **mc)
        yield Case("predictive count", f"{structure} curve num_samples {value}", call)
        call = partial(la.optimize_prior_precision, max_refits=value)
        yield Case("predictive count", f"{structure} max_refits {value}", call)
        if not isinstance(value, int) or value:
            yield Case("predictive count", f"{structure} sample {value}", partial(la.sample, KEY, value))
    posteriors = lambda x, deltas, **options: list(la.functional_posteriors(x, deltas, **options))  # noqa: E731
    for argument in ("num_samples", "microbatch"):
        for value in counts():
            call = partial(posteriors, x, [1.0], **{"key": KEY, "num_samples": 2, argument: value})
            yield Case("predictive count", f"{structure} posteriors {argument} {value}", call)
    for value in keys():
        call = partial(posteriors, x, [1.0], key=value, num_samples=2)
        yield Case("predictive key", f"{structure} posteriors {value}", call)
    for value in precisions():
        call = partial(posteriors, x, value, key=KEY, num_samples=2)
        yield Case("precisions", f"{structure} posteriors {value}", call)
    for value in inputs(x):
        call = partial(posteriors, value, [1.0], key=KEY, num_samples=2)
        yield Case("inputs", f"{structure} posteriors {value}", call)
    for value in keys():
        yield Case("predictive key", f"{structure} sample {value}", partial(la.sample, value, 2))
        for name, options in (("mc", {"link_approx": "mc"}), ("nn", {"pred_type": "nn"}), ("probit", {})):
            yield Case("predictive key", f"{structure} {name} {value}", partial(la.predictive, x, key=value, **options))
        call = partial(la.validation_curve, x, y, [1.0], link_approx="mc", key=value)
        yield Case("predictive key", f"{structure} curve {value}", call)
    for value in names():
        for argument in ("pred_type", "link_approx"):
            yield Case(
                "predictive name", f"{structure} {argument} {value}", partial(la.predictive, x, **{argument: value})
            )
        if value is not True:
            yield Case("predictive name", f"{structure} noise {value}", partial(la.predictive, x, with_noise=value))
        call = partial(la.validation_curve, x, y, [1.0], link_approx=value)
        yield Case("predictive name", f"{structure} curve {value}", call)
        for argument in ("method", "prior_structure", "refit", "precisions", "validation"):
            call = partial(la.optimize_prior_precision, **{argument: value})
            yield Case("predictive name", f"{structure} {argument} {value}", call)
        call = partial(la.optimize_prior_precision, "gridsearch", validation=value)
        yield Case("predictive name", f"{structure} gridsearch {value}", call)
    for value in precisions():
        yield Case("precisions", f"{structure} curve {value}", partial(la.validation_curve, x, y, value))
        call = partial(la.optimize_prior_precision, "gridsearch", validation=(x, y), precisions=value)
        yield Case("precisions", f"{structure} gridsearch {value}", call)
        yield Case("precisions", f"{structure} evidence {value}", partial(la.evidence_curve, value))
    for value in (0.0, -1.0, np.nan, np.inf, "1", 1j, True, [1.0, -1.0], {"a": 1.0}, object()):
        for name in ("with_prior_precision", "log_marginal_likelihood", "effective_parameters", "mode_decrement"):
            yield Case("precision", f"{structure} {name} {value}", partial(getattr(la, name), value))
    for name in ("log_marginal_likelihood", "effective_parameters", "mode_decrement"):
        answer = getattr(la, name)
        mean = lambda delta, answer=answer: getattr(answer(delta), "mean", answer(delta))  # noqa: E731
        yield Case("traced", f"{structure} {name}", partial(jax.grad(mean), 1.0))


def of_evidence(network: bnnlaplace.Network, x: np.ndarray, y: np.ndarray) -> Iterator[Case]:
    """The traceable evidence."""
    good = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 2}

    def call(precision=1.0, batch=(x, y), probes=KEY, **options):
        return evidence.log_marginal_likelihood(network.params, precision, batch, probes, **{**good, **options})

    for argument in ("num_matvecs", "num_probes", "probe_batch_size", "microbatch"):
        for value in counts():
            yield Case("evidence count", f"{argument} {value}", partial(call, **{argument: value}))
    for argument in ("gradient", "side"):
        for value in names():
            yield Case("evidence name", f"{argument} {value}", partial(call, **{argument: value}))
    for value in keys():
        yield Case("evidence key", f"{value}", partial(call, probes=value))
    for value in numbers():
        yield Case("evidence number", f"scale {value}", partial(call, scale=value))
        yield Case("evidence number", f"precision {value}", partial(call, precision=value))
    for value in labels(len(y), 3):
        yield Case("evidence targets", f"{value}", partial(call, batch=(x, value)))


# --- the tests --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    x = RNG.normal(size=(12, 4)).astype(np.float32)
    y = RNG.integers(0, 3, 12)
    return bnnlaplace.Network.from_function(lambda w, x: x @ w, 0.1 * RNG.normal(size=(4, 3)).astype(np.float32)), x, y


def check(cases: Iterator[Case], tally: Callable[[str, str], None]) -> None:
    """Count the outcomes, and fail with a list of those that are not clear."""
    unclear = []
    for case in cases:
        found, said = outcome(case.call)
        tally(case.kind, found)
        if found != "error":
            unclear.append(f"{found:7}{case.kind}: {case.name:.70} -> {said}".replace("\n", " "))
    assert not unclear, f"{len(unclear)} are not clear:\n" + "\n".join(unclear)


def test_methods_for_matrices(tally):
    check(of_matrices(), tally)


def test_metrics(tally):
    check(of_metrics(), tally)


@pytest.mark.parametrize("structure", ["full", "lanczos"])
def test_predictions(structure, model, tally):
    network, x, y = model
    la = bnnlaplace.Laplace(network, hessian_structure=structure)
    check(of_predictions(la.fit((x, y), key=KEY, num_probes=4, max_vectors=8), x, y), tally)


def test_evidence(model, tally):
    check(of_evidence(*model), tally)
