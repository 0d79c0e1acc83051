"""The posterior of earlier data as the prior of later ones: continual learning.

The posterior N(w_old, (G_old + P0)^-1) of a fitted `Laplace` becomes the prior of the next data, as Kirkpatrick et al.
(2017, arXiv 1612.00796) do with a diagonal and Ritter, Botev and Barber (NeurIPS 2018, arXiv 1805.07810) with Kronecker
factors. The posterior precision is then G_new + G_old + P0, and the evidence of the new data given the old ones is

    log p(D_new | w*) - 1/2 (w* - w_old)' (G_old + P0) (w* - w_old) + 1/2 log det(G_old + P0)
        - 1/2 log det(G_new + G_old + P0),

so the evidences of successive data add up to that of all of them.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.core.tree import leaf_names, ravel
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Prior
from bnnlaplace.prior.gaussian import is_scalar


def earlier_posterior(prior: Any, state: Unfitted | Fitted, settings: Settings) -> tuple[Fitted | None, Settings]:
    """Return the posterior that a user gives as `fit(prior=...)`, and the settings of the fit with its prior.

    Raises
    ------
    TypeError, ValueError
        If it is not a fitted `Laplace` of the same structure, or the structure has no sums, or another prior is stated.
    """
    if prior is None:
        return None, settings
    posterior, earlier = getattr(prior, "state", None), getattr(prior, "settings", None)
    if not isinstance(earlier, Settings):
        raise TypeError(
            f"fit(prior=...) must be the Laplace that was fitted to the earlier data; got {type(prior).__name__}; a "
            "prior of numbers is stated by Laplace(prior_precision=..., prior_mean=...)"
        )
    if not isinstance(posterior, Fitted):
        raise ValueError(
            "fit(prior=...) must be a fitted Laplace; got one that has seen no data; assign what its fit returns"
        )
    name = settings.hessian_structure
    if name == "lanczos":
        raise ValueError(
            "fit(prior=...) must be used with hessian_structure='diag', 'kron' or 'full'; got 'lanczos', which knows "
            "the curvature of earlier data only in its basis; fit all tasks with one of the three"
        )
    if earlier.hessian_structure != name:
        raise ValueError(
            f"fit(prior=...) must have the hessian_structure of the new fit, {name!r}; got "
            f"{earlier.hessian_structure!r}; fit all tasks with the same one"
        )
    if state.prior is None or state.prior.curvature is None:
        _check_none_is_stated(settings)
    return posterior, replace(
        settings,
        prior_precision=earlier.prior_precision,
        prior_mean=posterior.network.params,
        prior_groups=earlier.prior_groups,
    )


def _check_none_is_stated(settings: Settings) -> None:
    """Raise ValueError if a prior other than the default is stated as well."""
    precision, mean = settings.prior_precision, settings.prior_mean
    has_default_mean = isinstance(mean, (int, float)) and mean == 0
    if is_scalar(precision) and not isinstance(precision, jax.core.Tracer) and precision == 1 and has_default_mean:
        return
    what = f"prior_precision={settings.described_precision()}" if has_default_mean else "a prior_mean"
    raise ValueError(
        f"fit(prior=...) must be the only prior; got {what} of this Laplace as well; construct it without "
        "prior_precision and prior_mean, as both are those of the earlier posterior"
    )


def posterior_as_prior(posterior: Fitted, network: Network) -> Prior:
    """Return the posterior as the prior of the weights of a network.

    Raises
    ------
    ValueError
        If the network has other weights with a posterior, or other frozen numbers.
    """
    earlier = posterior.network
    shapes, found = _shapes(network), _shapes(earlier)
    if shapes != found:
        differing = sorted(set(shapes.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            "fit(prior=...) must be a posterior of the same weights of the same network; they differ in "
            f"{differing!r:.80}, which is {_in_words(shapes.get(differing))} here; got one where it is "
            f"{_in_words(found.get(differing))}; give the same network and subset_of_weights to all tasks"
        )
    if differing := _differing(network, earlier):
        raise ValueError(
            "fit(prior=...) must be a posterior of the same function of the weights, with equal frozen weights and "
            f"statistics; got one with another {differing!r:.80}; train later tasks with all of them as in the first"
        )
    return Prior(posterior.prior.precision, posterior.prior.relative, ravel(earlier.params), posterior.structure)


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights with a posterior, by path."""
    leaves = jax.tree.leaves(network.params)
    return {name: leaf.shape for name, leaf in zip(leaf_names(network.params), leaves, strict=True)}


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "absent or frozen" if shape is None else f"of shape {shape}"


def _differing(network: Network, earlier: Network) -> str | None:
    """The path of a frozen number that differs between two networks with the same weights with a posterior."""
    new, old = (_frozen(each) for each in (network, earlier))
    if set(new) != set(old):
        return min(set(new) ^ set(old))
    return next((name for name in new if not np.array_equal(new[name], old[name])), None)


def _frozen(network: Network) -> dict[str, Any]:
    """All floating-point numbers that a network reads beside the weights with a posterior, by path."""
    whole, with_posterior = network.whole(), set(leaf_names(network.params))
    everything = {
        name: leaf
        for tree in (whole.params, whole.frozen)
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    }
    return {
        name: leaf
        for name, leaf in everything.items()
        if name not in with_posterior and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
