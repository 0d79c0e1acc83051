"""Bad inputs of every entry: each gives an error of one sentence that this package words, and nothing silent or raw."""

import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from campaign.bad_values import (
    BAD_KEYS,
    BAD_TARGETS,
    BAD_X,
    BAD_Y,
    KEY,
    NOT_COUNTS,
    NOT_POSITIVE,
    RNG,
    TARGETS,
    X,
    Y,
)
from flax import nnx

import bnnlaplace
from bnnlaplace import Laplace, Likelihood, Network, evidence

MOST_CHARACTERS = 700


def affine(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


PARAMS = {"w1": RNG.normal(size=(4, 5)).astype(np.float32), "w2": RNG.normal(size=(5, 3)).astype(np.float32)}
NETWORK = Network.from_function(affine, PARAMS)
DENSE = nn.Dense(3)
VARIABLES = DENSE.init(KEY, X)


@cache
def fitted(structure: str = "diag", likelihood: str = "classification") -> Laplace:
    """A posterior of each structure; "lanczos" by products, not from all eigenpairs."""
    data = (X, TARGETS if likelihood == "regression" else Y)
    options = {"key": KEY, "num_probes": 4, "max_vectors": 30} if structure == "lanczos" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Laplace(NETWORK, likelihood, hessian_structure=structure).fit(data, **options)


def fit(data: Any, likelihood: Any = "classification", structure: str = "diag", **options: Any) -> Laplace:
    return Laplace(NETWORK, likelihood, hessian_structure=structure).fit(data, **options)


# --- entries ----------------------------------------------------------------------------------------------------

Table = dict[str, Callable[[], Any]]


def each(name: str, values: dict[str, Any], entry: Callable[[Any], Any]) -> Table:
    """One case for each value."""
    return {f"{name}: {kind}": partial(entry, value) for kind, value in values.items()}


def inputs_of_fit() -> Table:
    likelihoods = {"NaN": BAD_TARGETS["NaN"]} | BAD_TARGETS
    binary = {"below 0": TARGETS, "above 1": np.full((12, 3), 2), "NaN": np.full((12, 3), np.nan), "labels": Y}
    not_data = {
        "an array": X,
        "four arrays": (X, Y, Y, Y),
        "a dictionary": {"x": X, "y": Y},
        "a single": (X,),
        "nothing": (),
    }
    weights = {"below 0": -np.ones(12), "NaN": np.full(12, np.nan), "too few": np.ones(11), "strings": ["a"] * 12}
    return {
        **each("x", BAD_X, lambda x: fit((x, Y))),
        **each("weights", weights, lambda w: fit((X, Y, w))),
        **each("x of a batch", BAD_X, lambda x: fit([(X, Y), (x, Y)])),
        **each("y", BAD_Y, lambda y: fit((X, y))),
        **each("y of a batch", BAD_Y, lambda y: fit([(X, y)])),
        **each("regression", likelihoods, lambda y: fit((X, y), "regression")),
        **each("binary", binary, lambda y: fit((X, y), "binary")),
        **each("data", not_data | {"None": None, "a number": 1, "a string": "x"}, fit),
        **each("x, lanczos", dict(list(BAD_X.items())[:20:4]), lambda x: fit((x, Y), structure="lanczos", key=KEY)),
    }


def inputs_of_predictions() -> Table:
    new_x = {kind: x for kind, x in BAD_X.items() if kind != "no columns"}
    la = fitted()
    options = {"key": KEY, "num_samples": 4}
    grid = {"precisions": [0.1, 1.0, 10.0], **options}
    choose = partial(la.optimize_prior_precision, "gridsearch", **grid)
    return {
        **each("predictive", new_x, la.predictive),
        **each("functional_variance", dict(list(new_x.items())[::2]), la.functional_variance),
        **each("validation x", dict(list(new_x.items())[1::2]), lambda x: choose(validation=(x, Y))),
        **each("validation y", BAD_Y, lambda y: choose(validation=(X, y))),
        **each("curve y", BAD_TARGETS, lambda y: fitted("diag", "regression").validation_curve(X, y, [1.0])),
    }


def options_of_fit() -> Table:
    def krylov(**option: Any) -> Laplace:
        return fit((X, Y), structure="lanczos", **({"key": KEY, "num_probes": 4, "max_vectors": 30} | option))

    positive = {kind: value for kind, value in NOT_POSITIVE.items() if kind not in ("infinite",)}
    return {
        **each("key", BAD_KEYS, lambda key: krylov(key=key)),
        **each("num_probes", NOT_COUNTS, lambda value: krylov(num_probes=value)),
        **each("max_vectors", NOT_COUNTS, lambda value: krylov(max_vectors=value)),
        **each("microbatch", NOT_COUNTS, lambda value: fit((X, Y), microbatch=value)),
        **each("tolerance", {"zero": 0, "NaN": np.nan, "string": "1", "None": None}, lambda v: krylov(tolerance=v)),
        **each("target_precision", positive, lambda value: krylov(target_precision=value)),
        **each(
            "num_data",
            {"too few": 3, "fraction": 12.5, "bool": True, "string": "12"},
            lambda v: fit((X, Y), num_data=v),
        ),
        **each("mean", {"unknown": "map", "None": None, "list": ["linear"]}, lambda value: fit((X, Y), mean=value)),
        **each("on_block", {"a number": 3}, lambda value: krylov(on_block=value)),
    }


def options_of_laplace() -> Table:
    per_group = {"one of two": {"w1": 1.0}, "unknown": {"w1": 1.0, "w3": 1.0}, "negative": {"w1": 1.0, "w2": -1.0}}
    vectors = {"short": np.ones(3), "with zero": np.r_[0.0, np.ones(34)], "with NaN": np.full(35, np.nan)}
    regression = partial(Laplace, NETWORK, "regression")
    names = {"unknown": "kfac", "None": None, "list": ["diag"], "a number": 0}
    reaching = Network.from_function(
        lambda p, x: jnp.hstack([x @ p["w1"], x @ p["v"]]), PARAMS | {"v": np.ones((4, 2))}
    )
    return {
        **each("network", {"Linen": DENSE, "function": affine, "None": None, "weights": PARAMS}, Laplace),
        **each(
            "likelihood",
            {"unknown": "poisson", "None": None, "list": [], "function": bnnlaplace.gaussian},
            lambda value: Laplace(NETWORK, value),
        ),
        **each("prior_precision", NOT_POSITIVE | per_group | vectors, lambda v: Laplace(NETWORK, prior_precision=v)),
        **each("at precision", NOT_POSITIVE, lambda value: fitted().log_marginal_likelihood(value)),
        **each(
            "prior_mean", {"NaN": np.nan, "short": np.ones(3), "string": "0"}, lambda v: Laplace(NETWORK, prior_mean=v)
        ),
        **each("prior_groups", {"None": None, "string": "w1"}, lambda value: Laplace(NETWORK, prior_groups=value)),
        "prior_groups: numbers": lambda: fit_groups(lambda path: 1),
        **each("hessian_structure", names, lambda value: Laplace(NETWORK, hessian_structure=value)),
        **each(
            "subset",
            {"unknown": "first", "None": None, "list": ["w1"]},
            lambda v: Laplace(NETWORK, subset_of_weights=v),
        ),
        "subset: nothing": lambda: Laplace(NETWORK, subset_of_weights=lambda path: False).fit((X, Y)),
        "subset: one of two heads": lambda: Laplace(
            reaching, hessian_structure="diag", subset_of_weights=lambda path: path == "v"
        ).fit((X, Y)),
        **each(
            "sigma_noise", NOT_POSITIVE | {"None": None, "matrix": np.ones((2, 2))}, lambda v: regression(sigma_noise=v)
        ),
        "sigma_noise: too many": lambda: regression(sigma_noise=np.ones(4), hessian_structure="diag").fit((X, TARGETS)),
        "sigma_noise: of classes": lambda: Laplace(NETWORK, sigma_noise=2.0),
        "not fitted": lambda: Laplace(NETWORK).predictive(X),
    }


def fit_groups(groups: Any) -> Laplace:
    return Laplace(NETWORK, hessian_structure="diag", prior_precision={"w1": 1.0}, prior_groups=groups).fit((X, Y))


def options_of_answers() -> Table:
    la, regression, lanczos = fitted(), fitted("diag", "regression"), fitted("lanczos")
    mc = partial(la.predictive, X, link_approx="mc")
    grids = {"none": [], "negative": [1.0, -1.0], "NaN": [np.nan], "a table": [[1.0]], "a number": 1.0, "string": "1"}
    grids |= {"strings": ["a"], "None in it": [None], "beyond float32": [1e300], "subnormal": [1e-300]}
    choose = la.optimize_prior_precision
    validate = partial(choose, "gridsearch", key=KEY)
    return {
        **each("microbatch", NOT_COUNTS, lambda value: la.predictive(X, microbatch=value)),
        **each(
            "num_samples", {k: v for k, v in NOT_COUNTS.items() if k != "None"}, lambda v: mc(key=KEY, num_samples=v)
        ),
        **each("key", BAD_KEYS, lambda key: mc(key=key)),
        **each("link", {"unknown": "exact", "None": None, "list": ["mc"]}, lambda v: la.predictive(X, link_approx=v)),
        **each("pred_type", {"unknown": "bnn", "None": None}, lambda value: la.predictive(X, pred_type=value)),
        "noise of classes": lambda: la.predictive(X, with_noise=True),
        "bridge of a regression": lambda: regression.predictive(X, link_approx="bridge"),
        **each("sample", NOT_COUNTS, lambda value: la.sample(KEY, value)),
        **each("sample key", BAD_KEYS, lambda key: la.sample(key, 2)),
        "more samples than probes": lambda: lanczos.sample(KEY, 5),
        **each("evidence_curve", grids, la.evidence_curve),
        **each("functional_posteriors", grids, lambda v: list(la.functional_posteriors(X, v, key=KEY, num_samples=2))),
        **each("validation_curve", grids, lambda v: la.validation_curve(X, Y, v, key=KEY, num_samples=2)),
        **each("method", {"unknown": "cv", "None": None, "list": ["marglik"]}, choose),
        **each("prior_structure", {"unknown": "group", "list": ["scalar"]}, lambda v: choose(prior_structure=v)),
        **each("max_refits", NOT_COUNTS, lambda value: choose(prior_structure="layerwise", max_refits=value)),
        "noise of classes, chosen": lambda: choose(optimize_sigma_noise=True),
        "refit missing": lambda: lanczos.optimize_prior_precision(prior_structure="layerwise"),
        "refit returns nothing": lambda: lanczos.optimize_prior_precision(
            prior_structure="diag", refit=lambda la: None
        ),
        "refit is a number": lambda: lanczos.optimize_prior_precision(prior_structure="diag", refit=3),
        **each(
            "validation",
            {"None": None, "a number": 1, "a string": "x", "an array": X, "nothing": [], "four": (X, Y, Y, Y)},
            lambda value: validate(validation=value),
        ),
        **each(
            "with_sigma_noise",
            NOT_POSITIVE | {"ratios": np.array([1.0, 2.0, 3.0]), "None": None},
            regression.with_sigma_noise,
        ),
        **each("memory_estimate", NOT_COUNTS, lambda value: la.memory_estimate((X, Y), max_vectors=value)),
    }


class TrainedMode(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(3)(x)


class Live(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


def networks() -> Table:
    def fit_function(function: Callable[[Any, Any], Any]) -> Laplace:
        return Laplace(Network.from_function(function, PARAMS), hessian_structure="diag").fit((X, Y))

    outputs = {
        "integers": lambda p, x: affine(p, x).astype(int),
        "complex": lambda p, x: affine(p, x) + 1j,
        "no classes": lambda p, x: affine(p, x)[:, :0],
        "one class": lambda p, x: affine(p, x)[:, :1],
        "no class axis": lambda p, x: affine(p, x)[:, 0],
        "a tuple": lambda p, x: (affine(p, x), x),
        "nothing": lambda p, x: None,
        "a number": lambda p, x: affine(p, x).sum(),
        "transposed": lambda p, x: affine(p, x).T,
        "means of the batch": lambda p, x: affine(p, x - x.mean(0)),
        "random": lambda p, x: affine(p, x) * RNG.normal(),
        "a fault": lambda p, x: p["missing"] @ x,
        "NaN": lambda p, x: affine(p, x) * jnp.nan,
        "a Python branch": lambda p, x: affine(p, x) if x.sum() > 0 else x,
        "on the host": lambda p, x: np.asarray(affine(p, x)),
    }
    weights = {
        "none": {},
        "None": None,
        "integers": {"w": np.ones(3, int)},
        "strings": {"w": "a"},
        "objects": {"w": object()},
        "complex": {"w": np.ones(2, complex)},
        "bools": {"w": np.ones(2, bool)},
        "keys": {"w": KEY},
        "lists of strings": ["a"],
    }
    trained = TrainedMode().init(KEY, X, train=False)
    nnx_model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    return {
        **each("outputs", outputs, fit_function),
        **each("weights", weights, partial(Network.from_function, affine)),
        **each(
            "function", {"None": None, "a number": 3, "an array": X}, lambda value: Network.from_function(value, PARAMS)
        ),
        **each(
            "module",
            {"None": None, "class": nn.Dense, "NNX": nnx_model, "function": affine},
            lambda value: Network.from_linen(value, VARIABLES),
        ),
        **each(
            "variables",
            {"None": None, "weights": VARIABLES["params"], "an array": X, "empty": {}, "no weights": {"params": {}}},
            lambda value: Network.from_linen(DENSE, value),
        ),
        "variables of another module": lambda: Laplace(
            Network.from_linen(
                DENSE, {"params": {"kernel": np.ones((3, 3), np.float32), "bias": np.ones(3, np.float32)}}
            )
        ).fit((X, Y)),
        "an unknown argument": lambda: Laplace(Network.from_linen(DENSE, VARIABLES, train=False)).fit((X, Y)),
        "train mode over devices": lambda: Laplace(Network.from_linen(TrainedMode(), trained, train=True)).fit((X, Y)),
        "live dropout": lambda: Laplace(Network.from_linen(Live(), {"params": {"Dense_0": VARIABLES["params"]}})).fit(
            (X, Y)
        ),
        "live dropout of NNX": lambda: Laplace(Network.from_nnx(nnx_model)).fit((X, Y)),
        **each(
            "model",
            {"None": None, "class": nnx.Linear, "Linen": DENSE, "state": nnx.state(nnx_model)},
            Network.from_nnx,
        ),
        **each("selected", {"None": None, "nothing": lambda path: False, "a string": "w1"}, NETWORK.subset),
        **each("target_kind", {"None": None, "unknown": "int"}, lambda v: Likelihood("own", v, affine, affine, affine)),
        **each(
            "target_shape",
            {"a number": 1, "a list": [1], "zero": (0,), "strings": ("a",)},
            lambda v: Likelihood("own", "array", affine, affine, affine, target_shape=v),
        ),
        **each(
            "log_prob",
            {"None": None, "a number": 1},
            lambda v: Laplace(NETWORK, Likelihood("own", "array", v, affine, affine)),
        ),
        **each("load network", {"None": None, "weights": PARAMS}, lambda value: Laplace.load("nowhere", value)),
        "load from nowhere": lambda: Laplace.load("/nonexistent/folder", NETWORK),
    }


def functions_of_the_evidence() -> Table:
    def log_evidence(x: Any = X, y: Any = Y, precision: Any = 1.0, probes: Any = KEY, **options: Any) -> Any:
        model = {"network": NETWORK, "likelihood": bnnlaplace.categorical(), "num_matvecs": 4, "num_probes": 2}
        value = evidence.log_marginal_likelihood(NETWORK.params, precision, (x, y), probes, **(model | options))
        return value.mean.block_until_ready()

    in_short = (
        "strings",
        "objects",
        "masked",
        "NaN",
        "infinite",
        "beyond float32",
        "too narrow",
        "None",
        "nested lists",
    )
    return {
        **each("evidence x", {kind: BAD_X[kind] for kind in in_short}, log_evidence),
        **each("evidence y", BAD_Y, lambda y: log_evidence(y=y)),
        **each("evidence precision", NOT_POSITIVE, lambda value: log_evidence(precision=value)),
        **each("evidence num_matvecs", NOT_COUNTS, lambda value: log_evidence(num_matvecs=value)),
        **each("evidence num_probes", NOT_COUNTS, lambda value: log_evidence(num_probes=value)),
        **each("evidence microbatch", NOT_COUNTS, lambda value: log_evidence(microbatch=value)),
        **each("evidence probes", BAD_KEYS, lambda value: log_evidence(probes=value)),
    }


GROUPS = [
    inputs_of_fit,
    inputs_of_predictions,
    options_of_fit,
    options_of_laplace,
    options_of_answers,
    networks,
    functions_of_the_evidence,
]


def outcome_of(case: Callable[[], Any]) -> tuple[str, str]:
    """What becomes of a bad input, and in which words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case()
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        message = str(error)
        is_ours = "/bnnlaplace/" in last.filename and "/site-packages/jax" not in last.filename
        says_what_to_do = " must " in message or "; " in message
        is_clear = isinstance(error, (ValueError, TypeError, OSError)) and says_what_to_do and "\n" not in message
        outcome = "error" if is_ours and is_clear and len(message) <= MOST_CHARACTERS else "raw"
        return outcome, f"{type(error).__name__}: {message:.160}"
    return "silent", f"returned {result!r:.120}"


def check(group: Callable, cases: Iterable[tuple[str, Callable[[], Any]]], tally: Callable[[str, str], None]) -> None:
    """Count the outcomes of the cases of a group, and fail with a list of those that are no clear error."""
    faults = []
    for name, case in cases:
        outcome, words = outcome_of(case)
        tally(group.__name__.replace("_", " "), outcome)
        if outcome != "error":
            faults.append(f"{name}: {outcome}: {words}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_bad_inputs(group, tally, unchecked_annotations):
    check(group, group().items(), tally)
