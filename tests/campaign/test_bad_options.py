"""Bad values of what likelihoods, factors, weights of examples and joint posteriors take: each has a clear error."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from campaign.bad_values import BAD_KEYS, BAD_X, BAD_Y, KEY, NOT_COUNTS, NOT_POSITIVE, TARGETS, X, Y, changed, masked
from campaign.test_bad_inputs import NETWORK, PARAMS, affine, check, fit, fitted

from bnnlaplace import Laplace, Likelihood, Network, calibration, categorical, evidence, heteroscedastic, tempered

Table = Iterator[tuple[str, Callable[[], Any]]]

STRUCTURES = ("diag", "kron", "full", "lanczos")
FLAGS = {"None": None, "a number": 1, "a string": "True", "a list": [True], "an array": np.array([True, False])}
NAMES = {"unknown": "kfac", "None": None, "a list": ["expand"], "a number": 1, "bytes": b"expand"}
WEIGHTS = np.linspace(0.5, 2, 12)
BAD_WEIGHTS = {
    "negative": changed(WEIGHTS, -1),
    "NaN": changed(WEIGHTS, np.nan),
    "infinite": changed(WEIGHTS, np.inf),
    "beyond float32": changed(WEIGHTS, 1e39),
    "all zero": np.zeros(12),
    "all below float32": np.full(12, 1e-300),
    "too few": WEIGHTS[:5],
    "too many": np.ones(13),
    "none": WEIGHTS[:0],
    "a column": WEIGHTS[:, None],
    "one number": 1.0,
    "no axes": np.float32(1),
    "None": None,
    "strings": WEIGHTS.astype(str),
    "objects": WEIGHTS.astype(object),
    "complex": WEIGHTS + 0j,
    "masked": masked(WEIGHTS),
    "dates": WEIGHTS.astype("M8[s]"),
    "ragged": [[1.0], [1.0, 2.0]],
    "a string": "balanced",
    "a dictionary": {0: 1.0},
    "a set": {1.0},
}


LARGE_AND_SMALL = ("beyond float32", "all below float32")  # which metrics take: they compute in float64


def each(name: str, values: dict[str, Any], entry: Callable[[Any], Any]) -> Table:
    """One case for each value."""
    yield from ((f"{name}: {kind}", partial(entry, value)) for kind, value in values.items())


def joint_posteriors() -> Table:
    new_x = {kind: x for kind, x in BAD_X.items() if kind != "no columns"}
    for number, structure in enumerate(STRUCTURES):
        la = fitted(structure)
        yield from each(structure, dict(list(new_x.items())[number::4]), la.functional_posterior)
        yield from each(f"{structure} flag", FLAGS, lambda value, la=la: la.functional_posterior(X, joint=value))
        posteriors = partial(la.functional_posteriors, X, [1.0], key=KEY, num_samples=2)
        yield from each(f"{structure} flag of several", FLAGS, lambda v, of=posteriors: list(of(joint=v)))
    la = fitted("kron")
    yield from each("microbatch", NOT_COUNTS, lambda value: la.functional_posterior(X, microbatch=value))
    for joint in (True, False):
        draw = la.functional_posterior(X, joint=joint).sample
        yield from each(f"samples, {joint}", NOT_COUNTS, lambda value, draw=draw: draw(KEY, value))
        yield from each(f"key, {joint}", BAD_KEYS, lambda value, draw=draw: draw(value, 2))


def calls() -> Table:
    """`la(x)`: as `predictive`, with its arguments."""
    for number, structure in enumerate(STRUCTURES):
        yield from each(structure, dict(list(BAD_X.items())[number::4]), fitted(structure))
    la = fitted()
    names = {"unknown": "exact", "None": None, "a list": ["mc"]}
    yield from each("link", names, lambda value: la(X, link_approx=value))
    yield from each("pred_type", names, lambda value: la(X, value))
    yield from each("num_samples", NOT_COUNTS, lambda v: la(X, link_approx="mc", key=KEY, num_samples=v or 0.5))
    yield "not fitted", lambda: Laplace(NETWORK)(X)
    yield "no inputs", lambda: la(x=None)


def shared_weights() -> Table:
    for structure in STRUCTURES:
        yield from each(structure, NAMES, lambda v, s=structure: fit((X, Y), structure=s, key=KEY, shared_weights=v))
    for structure in ("diag", "full", "lanczos"):
        good = {name: name for name in ("expand", "reduce")}
        yield from each(
            f"not for {structure}", good, lambda v, s=structure: fit((X, Y), structure=s, key=KEY, shared_weights=v)
        )


def example_weights() -> Table:
    for number, structure in enumerate(STRUCTURES):
        some = dict(list(BAD_WEIGHTS.items())[number::4])
        options = {"structure": structure, "key": KEY}
        yield from each(structure, some, lambda w, options=options: fit((X, Y, w), **options))
    yield from each("in batches", BAD_WEIGHTS, lambda w: fit([(X, Y, w)]))
    # Weights that count nothing are no fault behind a batch that counts.
    some = {kind: weights for kind, weights in BAD_WEIGHTS.items() if not kind.startswith("all ")}
    yield from each("in a later batch", some, lambda w: fit([(X, Y), (X, Y, w)]))
    score = partial(fitted().optimize_prior_precision, "gridsearch", precisions=[0.1, 1.0, 10.0])
    yield from each("of validation data", BAD_WEIGHTS, lambda w: score(validation=(X, Y, w)))
    yield "kept examples have NaN", lambda: fit((changed(X, np.nan), Y, np.ones(12)))
    yield "targets do not count", lambda: fit((X, 0 * Y, WEIGHTS), categorical(class_weights=[0, 1, 1]))


def likelihoods() -> Table:
    indices = {
        "a fraction": 0.5,
        "a string": "-100",
        "a bool": True,
        "a list": [-100],
        "too large": 2**40,
        "NaN": np.nan,
    }
    yield from each("ignore_index", indices | {"complex": 1j, "an array": np.array([0, 1])}, lambda v: categorical(v))
    weights = {
        "negative": [-1.0, 1, 1],
        "NaN": [np.nan, 1, 1],
        "infinite": [np.inf, 1, 1],
        "beyond float32": [1e39, 1, 1],
        "all zero": np.zeros(3),
        "a table": np.ones((3, 3)),
        "one number": 1.0,
        "none": [],
        "strings": ["a", "b", "c"],
        "objects": np.array([object()] * 3),
        "complex": np.ones(3) + 1j,
        "a string": "balanced",
        "a dictionary": {0: 1.0},
        "masked": masked(np.ones(3)),
        "ragged": [[1.0], [1.0, 2.0]],
    }
    yield from each("class_weights", weights, lambda value: categorical(class_weights=value))
    wrong = {"too few": np.ones(2), "too many": np.ones(4)}
    yield from each("class_weights of others", wrong, lambda v: fit((X, Y), categorical(class_weights=v)))
    ignoring = categorical(ignore_index=-100)
    yield from each("y with ignore_index", BAD_Y, lambda y: fit((X, y), ignoring))
    yield "all ignored", lambda: fit((X, np.full(12, -100)), ignoring)
    yield "all ignored in validation", lambda: fit((X, Y), ignoring).validation_curve(X, np.full(12, -100), [1.0])
    yield "soft targets with an index", lambda: fit((X, np.full((12, 3), 0.5)), ignoring)

    yield from each("temperature", NOT_POSITIVE, lambda value: tempered(categorical(), value))
    several = {"None": None, "a list": [1.0], "an array": np.ones(2), "a dictionary": {}, "a string": "cold"}
    yield from each("temperature", several, lambda value: tempered(categorical(), value))
    others = {"a name": "classification", "None": None, "a function": categorical, "a network": NETWORK}
    yield from each("tempered", others, lambda value: tempered(value, 2.0))
    cold = tempered(categorical(), 0.5)
    yield from each("y, tempered", dict(list(BAD_Y.items())[::2]), lambda y: fit((X, y), cold))
    yield "noise, tempered", lambda: Laplace(NETWORK, cold, sigma_noise=2.0)

    # The network has three outputs, of which a mean and a log variance each cannot be made.
    yield "odd number of outputs", lambda: fit((X, TARGETS[:, :1]), heteroscedastic())
    pairs = Network.from_function(lambda p, x: affine(p, x)[:, :2], PARAMS)
    yield from each("heteroscedastic", BAD_TARGETS_OF_ONE, lambda y: pair_fit(pairs, y))
    yield "heteroscedastic noise", lambda: Laplace(pairs, "heteroscedastic", sigma_noise=2.0)
    la = pair_fit(pairs, TARGETS[:, :1])
    yield from each("with_noise", FLAGS, lambda value: la(X, with_noise=value))
    yield "link of no classes", lambda: la(X, link_approx="bridge")
    yield "chosen noise", lambda: la.optimize_prior_precision(optimize_sigma_noise=True)
    yield "other noise", lambda: la.with_sigma_noise(2.0)
    yield from each("curve", BAD_TARGETS_OF_ONE, lambda y: la.validation_curve(X, y, [1.0], key=KEY, num_samples=2))
    batch = {"likelihood": heteroscedastic(), "network": pairs, "num_matvecs": 4, "num_probes": 2}
    yield from each(
        "evidence",
        BAD_TARGETS_OF_ONE,
        lambda y: evidence.log_marginal_likelihood(PARAMS, 1.0, (X, y), KEY, **batch).mean,
    )


ONE = TARGETS[:, :1]
BAD_TARGETS_OF_ONE = {
    "NaN": changed(ONE, np.nan),
    "infinite": changed(ONE, np.inf),
    "beyond float32": changed(ONE, 1e300),
    "complex": ONE + 1j,
    "strings": ONE.astype(str),
    "two columns": TARGETS[:, :2],
    "one axis": TARGETS[:, 0],
    "too few": ONE[:5],
    "masked": masked(ONE),
    "objects": ONE.astype(object),
    "None": None,
}


def pair_fit(network: Network, y: Any) -> Laplace:
    return Laplace(network, "heteroscedastic", hessian_structure="diag").fit((X, y))


def own_likelihoods() -> Table:
    """Functions of a likelihood of the user's own that return something else."""
    good = {"log_prob": lambda f, y: -jnp.sum((f - y) ** 2, axis=-1), "factor_mv": lambda f, u: u, "mean": lambda f: f}
    both = {"factor_transpose_mv": lambda f, v: v, "hessian_mv": lambda f, v: v}
    # For each function with these arguments: what returns another shape, another type, or nothing of use.
    wrong = {
        "too few arguments": lambda: 1.0,
        "a number": lambda *a: 1.0,
        "an integer": lambda *a: 1,
        "nothing": lambda *a: None,
        "a tuple": lambda *a: (a[0], a[0]),
        "integers": lambda *a: jnp.zeros(a[0].shape, int),
        "another shape": lambda *a: a[0][..., None],
        "a fault": lambda *a: 1 / 0,
        "a branch": lambda *a: a[0] if a[0].sum() > 0 else a[0],
        "on the host": lambda *a: np.asarray(a[0]),
        "a string": lambda *a: "log",
    }
    for name in ("log_prob", "factor_mv", "hessian_mv", "factor_transpose_mv", "target_weights"):
        yield from each(
            name, wrong, lambda v, name=name: fit((X, TARGETS), Likelihood("own", "array", **good | {name: v}))
        )
    some = {kind: wrong[kind] for kind in ("too few arguments", "a fault", "a branch", "on the host")}
    yield from each("mean", some, lambda v: fit((X, TARGETS), Likelihood("own", "array", **good | {"mean": v})))
    curvature = {
        "affine": {"factor_mv": lambda f, u: u + 1},
        "squared": {"factor_mv": lambda f, u: u**2},
        "not transposed": {"factor_mv": lambda f, u: jnp.roll(u, 1, axis=-1)},
        "another factor": {"hessian_mv": lambda f, v: 2 * v},
        "another sign": {"hessian_mv": lambda f, v: -v},
    }
    for structure in STRUCTURES:
        options = {"structure": structure, "key": KEY, "num_probes": 4}
        yield from each(
            structure,
            curvature,
            lambda v, o=options: fit((X, TARGETS), Likelihood("own", "array", **good | both | v), **o),
        )
    names = {"None": None, "a number": 3, "bytes": b"own"}
    yield from each("name", names, lambda value: Likelihood(value, "array", **good))


def earlier_posteriors() -> Table:
    """`fit(prior=...)`."""
    others = {
        "None of it": False,
        "a number": 1.0,
        "a posterior": fitted().fitted,
        "a network": NETWORK,
        "a name": "diag",
    }
    yield from each("prior", others, lambda value: fit((X, Y), prior=value))
    yield "not fitted", lambda: fit((X, Y), prior=Laplace(NETWORK, hessian_structure="diag"))
    for structure in STRUCTURES:
        for earlier in STRUCTURES:
            if structure != earlier or structure == "lanczos":
                options = {"structure": structure, "key": KEY, "prior": fitted(earlier)}
                yield f"{structure} after {earlier}", partial(fit, (X, Y), **options)
    stated = {"precision": {"prior_precision": 2.0}, "mean": {"prior_mean": PARAMS}}
    yield from each(
        "stated", stated, lambda v: Laplace(NETWORK, hessian_structure="diag", **v).fit((X, Y), prior=fitted())
    )
    narrow = {name: weight[..., :2] for name, weight in PARAMS.items()}
    others = Network.from_function(lambda p, x: x @ p["w1"] @ p["w2"][:2], narrow)
    yield (
        "other weights",
        lambda: Laplace(others, "regression", hessian_structure="diag").fit(
            (X, TARGETS[:, :2]), prior=fitted("diag", "regression")
        ),
    )


def binary_metrics() -> Table:
    probs, labels = np.linspace(0.1, 0.9, 12).astype(np.float32), np.arange(12) % 2
    metrics = {
        "accuracy": calibration.accuracy,
        "nll": calibration.negative_log_likelihood,
        "brier": calibration.brier_score,
        "ece": calibration.expected_calibration_error,
        "bins": calibration.reliability_bins,
        "evaluate": partial(calibration.evaluate, seed=0, resamples=2),
    }
    bad_probs = {
        "logits": 4 * probs - 2,
        "above 1": changed(probs, 1.5),
        "below 0": changed(probs, -0.1),
        "NaN": changed(probs, np.nan),
        "infinite": changed(probs, np.inf),
        "none": probs[:0],
        "strings": probs.astype(str),
        "complex": probs + 0j,
        "objects": np.array([object()] * 12),
        "three axes": probs[:, None, None],
        "too few": probs[:7],
        "None": None,
        "one number": 0.5,
        "a set": {0.5},
    }
    bad_labels = {
        "two": changed(labels, 2, int),
        "negative": changed(labels, -1, int),
        "beyond int32": changed(labels, 2**32, np.int64),
        "a half": changed(labels, 0.5),
        "NaN": changed(labels, np.nan),
        "strings": labels.astype(str),
        "complex": labels + 0j,
        "too few": labels[:7],
        "a row": labels[None],
        "one-hot": np.eye(2, dtype=int)[labels],
        "None": None,
        "one number": 1,
    }
    for name, metric in metrics.items():
        for shape in ((12,), (12, 1)):
            if shape == (12,) or name in ("nll", "bins"):
                good = probs.reshape(shape)
                yield from each(f"{name} labels {shape}", bad_labels, lambda y, m=metric, p=good: m(p, y))
        yield from each(f"{name} probs", bad_probs, lambda p, m=metric: m(p, labels))
        column = {kind: value[:, None] for kind, value in bad_probs.items() if np.ndim(value) == 1 and len(value)}
        yield from each(f"{name} column", column, lambda p, m=metric: m(p, labels))
    bad_weights = {kind: value for kind, value in BAD_WEIGHTS.items() if kind not in ("None", *LARGE_AND_SMALL)}
    for name in ("nll", "ece"):
        yield from each(
            f"{name} weights", bad_weights, lambda w, m=metrics[name]: m(probs.astype(np.float64), labels, weights=w)
        )
    logits = {kind: value for kind, value in bad_probs.items() if kind not in ("above 1", "below 0", "logits")}
    yield from each("temperature", logits, lambda f: calibration.fit_temperature(f, labels))
    yield from each("temperature labels", bad_labels, lambda y: calibration.fit_temperature(4 * probs - 2, y))


GROUPS = [
    joint_posteriors,
    calls,
    shared_weights,
    example_weights,
    likelihoods,
    own_likelihoods,
    earlier_posteriors,
    binary_metrics,
]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_bad_options(group, tally, unchecked_annotations):
    check(group, group(), tally)
