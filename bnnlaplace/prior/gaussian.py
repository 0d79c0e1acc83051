"""The prior of the weights, N(mu, P0^-1) with P0 = diag(delta): isotropic, one precision a group, or one a weight.

It is split into an overall factor tau and relative precisions D of geometric mean one, P0 = tau D. In the coordinates
sqrt(D) theta the prior is isotropic: there one decomposition of the curvature serves every tau, whatever D.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, described, leaf_names, number_type, ravel, size

Precision = float | Array | Mapping[str, Any] | PyTree
Groups = Callable[[str], str]


class Prior(NamedTuple):
    """The Gaussian N(mu, (tau D)^-1) of the weights.

    Attributes
    ----------
    precision
        tau: the prior precision, or the geometric mean over the weights if they differ in it.
    relative
        D: one number for each weight, shape (P,), of geometric mean one. The number 1.0 for an isotropic prior.
    mean
        mu: one number for each weight, shape (P,), or the number 0.0.
    """

    precision: Float[ArrayLike, ""]
    relative: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 1.0
    mean: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 0.0

    @property
    def is_isotropic(self) -> bool:
        """Whether all weights have the same precision. It is read off a shape, so it is known inside `jit` too."""
        return jnp.ndim(self.relative) == 0

    def deviation(self, params: PyTree) -> Float[Array, " P"]:
        """theta - mu."""
        return ravel(params) - self.mean

    def squared_distance(self, params: PyTree) -> float:
        """(theta - mu)' D (theta - mu), in float64 on the host."""
        deviation = np.asarray(self.deviation(params), np.float64)
        return float(deviation @ (deviation * np.asarray(self.relative, np.float64)))

    def gradient(self, params: PyTree) -> Float[Array, " P"]:
        """Gradient of the log density in the weights, -P0 (theta - mu)."""
        return self.relative * (-self.precision * self.deviation(params))

    def whiten(self, vector: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """D^-1/2 v. It takes a gradient to the coordinates sqrt(D) theta, and a deviation from them back to theta."""
        return vector if self.is_isotropic else vector / jnp.sqrt(self.relative)


def by_layer(path: str) -> str:
    """The group of a weight: the module that holds it, so that kernel and bias of a layer share a prior precision.

    Parameters
    ----------
    path
        Such as "Dense_0/kernel".
    """
    return path.rpartition("/")[0] or path


def group_names(params: PyTree, groups: Groups) -> list[str]:
    """The names of the groups, in the order of their first weights.

    Parameters
    ----------
    params
        The weights.
    groups
        From the path of a weight to the name of its group.

    Raises
    ------
    ValueError
        If a name is no string.
    """
    names = list(dict.fromkeys(groups(name) for name in leaf_names(params)))
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                "Laplace(prior_groups=...) must return the name of a group, a string; got "
                f"{described(name)}; try prior_groups=lambda path: path.split('/')[0]"
            )
    return names


def group_numbers(params: PyTree, groups: Groups) -> Int[np.ndarray, " P"]:
    """For each weight the position of its group in `group_names`.

    Parameters
    ----------
    params, groups
        As for `group_names`.
    """
    numbers = {name: number for number, name in enumerate(group_names(params, groups))}
    own = [numbers[groups(name)] for name in leaf_names(params)]
    return np.repeat(own, [leaf.size for leaf in jax.tree.leaves(params)])


def resolve(
    precision: Precision, mean: PyTree, params: PyTree, groups: Groups = by_layer, where: str = "Laplace"
) -> Prior:
    """Turn the prior as a user states it into a `Prior` of the weights `params`.

    Parameters
    ----------
    precision
        One number; a dictionary with one number for each group; a vector (P,); or a pytree whose leaves broadcast to
        those of `params`. A pytree with more leaves than `params` serves too: the matching ones are taken.
    mean
        One number, a vector (P,), or a pytree like `params` or with more leaves.
    params
        The weights with a posterior.
    groups
        From the path of a weight to the name of its group.
    where
        Who asks, for messages.

    Raises
    ------
    ValueError
        If a precision is not positive and finite, or either does not fit the weights; the message names the groups.
    """
    factor, relative = _split(precision, params, groups, where)
    return Prior(factor, relative, _mean(mean, params, where))


def _split(
    precision: Precision, params: PyTree, groups: Groups, where: str
) -> tuple[Float[ArrayLike, ""], Float[ArrayLike, ""] | Float[Array, " P"]]:
    """Prior precisions as a user states them, as an overall factor tau and relative precisions D."""
    if is_scalar(precision):
        checks.positive(precision, f"{where}(prior_precision=...)")
        return precision, 1.0
    # A vector has one number for each weight. Groups have one for each leaf, so that little is computed.
    by_group = is_by_group(precision, params, groups)
    numbers = _of_leaves(precision, params, groups) if by_group else _per_weight(precision, params, groups, where)
    counts = [leaf.size for leaf in jax.tree.leaves(params)] if by_group else 1
    if isinstance(numbers, jax.core.Tracer):
        vector = jnp.repeat(numbers, np.asarray(counts), total_repeat_length=size(params))
        factor = jnp.exp(jnp.mean(jnp.log(vector)))
        return factor, vector / factor
    exact = np.asarray(numbers, np.float64)  # operations of JAX would be traced inside `jit`
    if not np.all((exact > 0) & np.isfinite(exact)):
        raise ValueError(
            f"{where}(prior_precision=...) must be positive and finite for every weight; got numbers from "
            f"{exact.min():.3g} to {exact.max():.3g}; try 1.0"
        )
    if np.all(exact == exact[0]):
        return float(exact[0]), 1.0
    factor = float(np.exp(np.average(np.log(exact), weights=counts if by_group else None)))
    relative = np.repeat((exact / factor).astype(number_type(params)), counts)
    return factor, jnp.asarray(relative)


def is_scalar(precision: Precision) -> bool:
    """Whether it is one number for all weights.

    Parameters
    ----------
    precision
        As a user states it.
    """
    return not isinstance(precision, (Mapping, tuple, list, str)) and np.ndim(precision) == 0


def is_by_group(precision: Precision, params: PyTree, groups: Groups) -> bool:
    """Whether it is a dictionary with one number for each group.

    Parameters
    ----------
    precision
        As a user states it.
    params, groups
        As for `group_names`.
    """
    if not isinstance(precision, Mapping) or set(precision) != set(group_names(params, groups)):
        return False
    return all(map(is_scalar, precision.values()))


def _of_leaves(precision: Mapping[str, Any], params: PyTree, groups: Groups) -> Float[ArrayLike, " L"]:
    """The precision of the group of each leaf."""
    numbers = [precision[groups(name)] for name in leaf_names(params)]
    traced = any(isinstance(number, jax.core.Tracer) for number in numbers)
    return jnp.stack([jnp.asarray(number, float) for number in numbers]) if traced else np.asarray(numbers, np.float64)


def _per_weight(precision: Precision, params: PyTree, groups: Groups, where: str) -> Float[Array, " P"]:
    try:
        return as_vector(_of_chosen(precision, params), params)
    except (ValueError, TypeError):
        names = group_names(params, groups)
        got = f"the names {sorted(precision)}" if isinstance(precision, Mapping) else described(precision)
        raise ValueError(
            f"{where}(prior_precision=...) must be one number, a dictionary with one for each of the groups {names}, "
            f"{size(params)} numbers, or a pytree like the weights with a posterior; got {got}"
        ) from None


def _of_chosen(values: PyTree, params: PyTree) -> PyTree:
    """Of a pytree like all weights the leaves of those with a posterior; anything else as it is."""
    known = dict(zip(leaf_names(values), jax.tree.leaves(values), strict=True))
    names = leaf_names(params)
    if jax.tree.structure(values) == jax.tree.structure(params) or not set(names) <= set(known):
        return values
    return jax.tree.unflatten(jax.tree.structure(params), [known[name] for name in names])


def _mean(mean: PyTree, params: PyTree, where: str) -> Float[ArrayLike, ""] | Float[Array, " P"]:
    if isinstance(mean, (int, float)) and mean == 0:
        return 0.0
    try:
        vector = as_vector(_of_chosen(mean, params), params)
    except (ValueError, TypeError):
        raise ValueError(
            f"{where}(prior_mean=...) must be one number, {size(params)} numbers, or a pytree like the weights; got "
            f"{described(mean)}"
        ) from None
    if not isinstance(vector, jax.core.Tracer) and not np.isfinite(np.asarray(vector)).all():
        raise ValueError(f"{where}(prior_mean=...) must be finite; got NaN or infinite values")
    return vector
