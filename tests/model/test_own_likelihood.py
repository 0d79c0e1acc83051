"""A likelihood of the user's own: plain functions are taken, and wrong ones are found before anything is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

import bnnlaplace

X = np.linspace(-1, 1, 15).reshape(5, 3).astype(np.float32)
Y = np.ones((5, 2), np.float32)
NETWORK = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((3, 2)))


def likelihood(**changes):
    """A Gaussian of unit variance, without its constant."""
    functions = {
        "log_prob": lambda f, y: -0.5 * jnp.sum((f - y) ** 2, axis=-1),
        "factor_mv": lambda f, u: u,
        "mean": lambda f: f,
    }
    return bnnlaplace.Likelihood(**{"name": "own", "target_kind": "array", **functions, **changes})


def test_plain_functions_are_taken():
    """Only Partials were; a function ended in an error of JAX that names none of its arguments."""
    for structure in ("diag", "kron", "full"):
        own = bnnlaplace.Laplace(NETWORK, likelihood(), hessian_structure=structure).fit((X, Y))
        gaussian = bnnlaplace.Laplace(NETWORK, "regression", hessian_structure=structure).fit((X, Y))
        constant = 5 * np.log(2 * np.pi)
        assert own.log_marginal_likelihood().mean == pytest.approx(gaussian.log_marginal_likelihood().mean + constant)


# Some of these broadcast: the answer was another number, without a word.
FAULTS = {
    "not summed": ({"log_prob": lambda f, y: (f - y) ** 2}, r"log_prob=...\) must return .* got float32 of \(1, 2\)"),
    "an integer": ({"log_prob": lambda f, y: 1}, r"log_prob=...\) must return .* got int32 of"),
    "one argument": ({"log_prob": lambda f: f}, r"log_prob=...\) must be a function of two arrays .* raised TypeError"),
    "on the host": ({"mean": lambda f: np.asarray(f)}, r"mean=...\) must be a function of an array .* JAX can trace"),
    "summed": ({"factor_mv": lambda f, u: u.sum(-1)}, r"factor_mv=...\) must return .* got float32 of \(1,\)"),
    "a tuple": ({"factor_mv": lambda f, u: (u, u)}, r"factor_mv=...\) must return .* got tuple"),
    "affine": (
        {"factor_mv": lambda f, u: u + 1, "factor_transpose_mv": lambda f, v: v, "hessian_mv": lambda f, v: v},
        r"factor_mv=...\) must be linear",
    ),
    "not transposed": (
        {"factor_mv": lambda f, u: u.at[..., 0].add(u[..., 1]), "factor_transpose_mv": lambda f, v: v},
        r"factor_transpose_mv=...\) must be the transpose",
    ),
    "another curvature": ({"hessian_mv": lambda f, v: 5 * v}, r"hessian_mv=...\) must be B B' v"),
    "weights": ({"target_weights": lambda y: y}, r"target_weights=...\) must return"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_functions_are_named(fault, unchecked_annotations):
    changes, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"Likelihood\({message}"):
        bnnlaplace.Laplace(NETWORK, likelihood(**changes), hessian_structure="diag").fit((X, Y))


def test_outputs_outside_of_the_domain_are_not_judged():
    """Products that are not finite at the outputs of the check say nothing about those of the network."""
    roots = likelihood(factor_mv=lambda f, u: jnp.sqrt(f) * u)
    positive = bnnlaplace.Network.from_function(lambda w, x: jnp.exp(x @ w), jnp.ones((3, 2)))
    assert bnnlaplace.Laplace(positive, roots, hessian_structure="diag").fit((X, Y)).structure is not None
