"""What bad input gets: an error that says what to do, before anything is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import bnnlaplace
from bnnlaplace import Laplace, Variational

KEY = jax.random.key(0)
DRAWN = problems.drawn_labels(12, dtype=np.float32)
X, Y = DRAWN.data


def untrained(structure="diag", **options):
    return Laplace(DRAWN.network, hessian_structure=structure, **options)


def fit(la, data=(X, Y), **options):
    return la.fit(data, **{"key": KEY, "approximation": "variational", **options})


def continued():
    """A posterior whose prior is that of earlier data."""
    earlier = untrained().fit((X, Y))
    return untrained().fit((X, Y), prior=earlier)


FITS = {
    "unknown approximation": (
        lambda: fit(untrained(), approximation="vi"),
        "must be 'laplace', 'variational' or bnnlaplace.Variational(...) with options; got 'vi'",
    ),
    "no key": (lambda: fit(untrained(), key=None), "must be one random key; got None"),
    "a number for a key": (lambda: fit(untrained(), key=3), "must be one random key; got 3"),
    "data that can be read once": (lambda: fit(untrained(), iter([(X, Y)])), "can be read once"),
    "a prior of earlier data": (
        lambda: fit(untrained(), prior=untrained().fit((X, Y))),
        "must be used without prior=...; got the posterior of earlier data",
    ),
    "a state whose prior is that of earlier data": (lambda: fit(continued()), "must be used without prior=..."),
    "NaN": (lambda: fit(untrained(), (np.where(X > 2, np.nan, X), Y)), "x must be finite"),
    "num_data below the data": (lambda: fit(untrained(), num_data=3), "at least that of data, 12; got 3"),
    "num_data that is no count": (lambda: fit(untrained(), num_data=1.5), "fit(num_data=...) must be an integer"),
    "unknown mean": (lambda: fit(untrained(), mean="mode"), "fit(mean=...) must be 'network' or 'linear'"),
    "a mean beside one that is fixed": (
        lambda: fit(untrained(), mean="linear", approximation=Variational(fixed_mean=True)),
        "fit(mean=...) must be 'network' with Variational(fixed_mean=True)",
    ),
    "a target precision that is not a number": (
        lambda: fit(untrained("lanczos"), target_precision="x", num_probes=4, max_vectors=16),
        "fit(target_precision=...)",
    ),
    "shared_weights without kron": (
        lambda: fit(untrained(), shared_weights="expand"),
        "fit(shared_weights=...) must be left out unless hessian_structure='kron'",
    ),
    "a choice of the prior for a regression": (
        lambda: fit(
            Laplace(DRAWN.network, "regression"), (X, X[:, :3]), approximation=Variational(prior_structure="scalar")
        ),
        "Variational(prior_structure=...) must be left out for a regression",
    ),
}


@pytest.mark.parametrize("what", FITS)
def test_a_fit_is_refused(what, unchecked_annotations):
    call, message = FITS[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


OPTIONS = {
    "num_samples": [0, 3, 2.0, "64", True],
    "tolerance": [0, -1.0, np.inf, np.nan, "0.5", True],
    "max_iterations": [0, 1.5, None],
    "max_newton_steps": [0, -1],
    "fixed_mean": [1, "network", None],
    "prior_structure": ["kron", 1],
    "on_iteration": [3],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_refused_by_name(name, unchecked_annotations):
    for value in OPTIONS[name]:
        with pytest.raises(ValueError, match=rf"Variational\({name}=...\) must be .*; got "):
            Variational(**{name: value})


def test_a_fit_that_has_not_converged_says_so():
    with pytest.warns(UserWarning, match="stopped after one iteration"):
        fit(untrained(), approximation=Variational(max_iterations=1))
    with pytest.warns(UserWarning, match="has not converged in 2 iterations.*raise Variational"):
        fit(untrained(), approximation=Variational(max_iterations=2, tolerance=1e-9))


# --- the choice of the prior ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def la():
    return fit(untrained())


CHOICES = {
    "a refit that is no function": ({"refit": 3}, "must be a function from the new Laplace to the fitted one"),
    "a refit by Laplace": (
        {"refit": lambda la: la.fit((X, Y))},
        "got a Laplace approximation; pass refit=lambda la: la.fit(data, key=key, approximation=...)",
    ),
    "a refit of other data": (
        {"refit": lambda la: fit(la, (X[:6], Y[:6]))},
        "18 targets for 36; pass refit=lambda la: la.fit(data, key=key, approximation=...)",
    ),
    "the noise of a classification": ({"optimize_sigma_noise": True}, "must be asked of a regression"),
    "no refits": ({"refit": fit, "max_refits": 0}, "max_refits=...) must be an integer of at least 1"),
    "an unknown structure": ({"prior_structure": "kron"}, "prior_structure=...) must be"),
}


@pytest.mark.parametrize("what", CHOICES)
def test_a_choice_of_the_prior_is_refused(la, what, unchecked_annotations):
    options, message = CHOICES[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        la.optimize_prior_precision(**options)


def test_a_variational_refit_of_a_laplace_approximation_is_refused():
    laplace = untrained("lanczos").fit((X, Y), key=KEY, num_probes=4, max_vectors=32, tolerance=10.0)
    with pytest.raises(ValueError, match=r"got a variational posterior; pass .*la\.fit\(data, key=key\)$"):
        laplace.optimize_prior_precision(prior_structure="layerwise", refit=lambda la: fit(la, num_probes=4))


def test_a_prior_that_has_moved_without_a_refit_warns(la):
    with pytest.warns(UserWarning, match=r"the averaged curvature is still that of the former one; pass .*refit="):
        la.with_prior_precision(30.0).optimize_prior_precision()


@pytest.mark.filterwarnings("ignore:the validation NLL is lowest at an end")
def test_a_grid_search_warns_that_the_curvature_is_that_of_another_precision(la):
    with pytest.warns(UserWarning, match="is still that of the former one; the NLL of each precision is that of a fit"):
        la.optimize_prior_precision("gridsearch", validation=(X, Y), precisions=[10.0, 30.0, 90.0])


def test_all_targets_left_out_are_refused():
    likelihood = bnnlaplace.categorical(ignore_index=-1)
    la = Laplace(DRAWN.network, likelihood, hessian_structure="diag")
    with pytest.raises(ValueError, match="must have a target that counts"):
        fit(la, (X, jnp.full(len(Y), -1)))
