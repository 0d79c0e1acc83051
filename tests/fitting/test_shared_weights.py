"""The choice of Kronecker factors for weights that an example uses several times, from `Laplace.fit`."""

import jax.numpy as jnp
import numpy as np
import pytest

import bnnlaplace

SHAPE = (12, 12)  # more numbers than have an exact block
OUTPUTS = {"sum": lambda w, x: (x @ w).sum(axis=1), "positions": lambda w, x: x @ w}


@pytest.fixture(scope="module", params=sorted(OUTPUTS))
def problem(request):
    """A linear map at three positions, whose outputs are sums over positions or those of each position."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(30, 3, 12)) + 0.5).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    y = np.asarray(OUTPUTS[request.param](weight, x))
    return request.param, bnnlaplace.Network.from_function(OUTPUTS[request.param], weight), (x, y)


def evidence(problem, structure, **options):
    _, network, data = problem
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure, prior_precision=0.5)
    return la.fit(data, microbatch=10, **options).log_marginal_likelihood().mean


# Each option is exact for linear networks: "reduce" for sums over positions, "expand" for outputs of single ones.
@pytest.mark.filterwarnings("ignore::bnnlaplace.NotAModeWarning")
def test_the_option_chooses_the_factors(problem):
    exact = evidence(problem, "full")
    right, wrong = ("reduce", "expand") if problem[0] == "sum" else ("expand", "reduce")
    np.testing.assert_allclose(evidence(problem, "kron", shared_weights=right), exact, rtol=1e-5)
    np.testing.assert_allclose(evidence(problem, "kron"), exact, rtol=1e-5)
    assert abs(evidence(problem, "kron", shared_weights=wrong) - exact) > 1


def test_the_option_is_for_kronecker_factors(problem, unchecked_annotations):
    _, network, data = problem
    for structure in ("diag", "full", "lanczos"):
        la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure)
        with pytest.raises(
            ValueError, match=f"left out unless hessian_structure='kron'; got 'expand' for '{structure}'"
        ):
            la.fit(data, shared_weights="expand")
    for value in ("kfac", None, ["expand"]):
        with pytest.raises(
            ValueError, match=r"fit\(shared_weights=...\) must be 'partial_traces', 'expand' or 'reduce'"
        ):
            bnnlaplace.Laplace(network, "regression", hessian_structure="kron").fit(data, shared_weights=value)
