"""Bad weights, prior means, refits and traces wherever one is taken: each has a clear error."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from campaign.bad_values import KEY, TARGETS, X, Y, changed, masked
from campaign.test_bad_inputs import NETWORK, PARAMS, affine, check, fit, fitted
from campaign.test_bad_options import Table, each

from bnnlaplace import Laplace, Network, categorical, evidence

OPTIONS = {"network": NETWORK, "likelihood": categorical(), "num_matvecs": 3, "num_probes": 2}


def each_weight(change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {name: change(weight) for name, weight in PARAMS.items()}


BAD_LEAVES = {
    "complex": each_weight(lambda weight: weight + 1j),
    "objects": each_weight(lambda weight: weight.astype(object)),
    "long floats": each_weight(lambda weight: weight.astype(np.longdouble)),
    "dates": each_weight(lambda weight: weight.astype("M8[s]")),
    "strings": each_weight(lambda weight: "w"),
    "bools": each_weight(lambda weight: weight > 0),
    "keys": each_weight(lambda weight: KEY),
    "masked": each_weight(masked),
}
BAD_TREES = {
    "None": None,
    "a string": "w1",
    "a set": {1.0},
    "empty": {},
    "a network": NETWORK,
    "a posterior": fitted,
    "incomplete": {"w1": PARAMS["w1"]},
    "other names": {"a": PARAMS["w1"], "b": PARAMS["w2"]},
    "a list": list(PARAMS.values()),
    "transposed": each_weight(np.transpose),
    "several samples": each_weight(lambda weight: weight[None]),
}
ONLY_WEIGHTS = {
    "a number": 1.0,
    "a vector": np.ones(35, np.float32),
    "integers": each_weight(lambda weight: weight.astype(int)),
    "nested lists": each_weight(np.ndarray.tolist),
}
NOT_FINITE = {
    "NaN": {**PARAMS, "w1": changed(PARAMS["w1"], np.nan)},
    "infinite": {**PARAMS, "w2": changed(PARAMS["w2"], -np.inf)},
    "beyond float32": {**PARAMS, "w1": changed(PARAMS["w1"], 1e39)},
    "NaN on the device": {**PARAMS, "w1": jnp.asarray(changed(PARAMS["w1"], np.nan))},
}


def weights() -> Table:
    bad = BAD_LEAVES | BAD_TREES | ONLY_WEIGHTS
    extra = {"one more": {**PARAMS, "b": PARAMS["w1"]}}
    yield from each("with_params", bad | extra, NETWORK.with_params)
    yield from each("full_params", bad | extra, NETWORK.full_params)
    some = NETWORK.subset(lambda path: path == "w1")
    yield from each("full_params of some", bad | {"all": PARAMS, "incomplete": {}}, some.full_params)
    known = bad | extra | NOT_FINITE
    value = partial(evidence.log_marginal_likelihood, **OPTIONS)
    yield from each("evidence", known, lambda params: value(params, 1.0, (X, Y), KEY))
    yield from each("isotropic", known, lambda params: evidence.isotropic(params, (X, Y), KEY, **OPTIONS))
    yield from each("log_density", bad | NOT_FINITE, fitted().log_density)
    yield from each("from_function", {"masked": BAD_LEAVES["masked"]}, partial(Network.from_function, affine))


def prior_means() -> Table:
    values = BAD_LEAVES | BAD_TREES | NOT_FINITE | {"a complex number": 1j, "a complex vector": np.ones(35) * 1j}
    values |= {"a short vector": np.ones(34), "a masked vector": masked(np.ones(35))}
    yield from each("Laplace", values, lambda mean: Laplace(NETWORK, prior_mean=mean))
    value = partial(evidence.log_marginal_likelihood, PARAMS, 1.0, (X, Y), KEY, **OPTIONS)
    yield from each("evidence", values, lambda mean: value(prior_mean=mean))


def refits() -> Table:
    options = {"key": KEY, "num_probes": 4, "max_vectors": 30}
    moved = NETWORK.with_params(each_weight(lambda weight: 2 * weight))
    narrow = Network.from_function(lambda p, x: affine(p, x)[:, :2], PARAMS)
    lanczos = fitted("lanczos")
    others = {
        "another structure": lambda la: fit((X, Y)),
        "another likelihood": lambda la: fit((X, TARGETS), "regression", "lanczos", **options),
        "other weights": lambda la: Laplace(moved).fit((X, Y), **options),
        "the first one": lambda la: lanczos,
        "fewer data": lambda la: la.fit((X[:8], Y[:8]), **options),
        "other labels": lambda la: la.fit((X, 2 - Y), **options),
        "fewer outputs": lambda la: Laplace(narrow).fit((X, Y % 2), **options),
        "its record": lambda la: la.fit((X, Y), **options).fitted,
    }
    yield from each(
        "refit", others, lambda refit: lanczos.optimize_prior_precision(prior_structure="diag", refit=refit)
    )


def traces() -> Table:
    la = fitted("diag", "regression")
    yield "noise, grad", lambda: jax.grad(lambda s: la.with_sigma_noise(s).fitted.log_likelihood.value)(1.0)
    yield "noise, jit", lambda: jax.jit(lambda: la.with_sigma_noise(2.0).log_marginal_likelihood())()
    yield "save", lambda: jax.jit(lambda la: la.save("unwritten"))(la)
    yield "save, prior", lambda: jax.jit(lambda tau: la.with_prior_precision(tau).save("unwritten"))(1.0)


@pytest.mark.parametrize("group", [weights, prior_means, refits, traces], ids=lambda group: group.__name__)
def test_bad_weights(group, tally, unchecked_annotations):
    check(group, group(), tally)
