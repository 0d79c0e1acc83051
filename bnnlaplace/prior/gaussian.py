"""The Gaussian prior N(mu, P0^-1) of the weights, with P0 = diag(delta).

Its precision delta is one number for all weights, one for each group of weights, or one for each weight. It is split
into an overall precision tau and relative precisions D with geometric mean one, P0 = tau D. In the coordinates
sqrt(D) theta the prior is isotropic, so one decomposition of the curvature there serves every tau.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Num, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, described, leaf_names, number_type, ravel, size
from bnnlaplace.core.types import AnyArray
from bnnlaplace.structure.protocol import AdditiveStructure

Precision = float | Array | Mapping[str, Any] | PyTree
"""Prior precisions as a user states them: one number, one for each group, or one for each weight."""
Groups = Callable[[str], str]
"""From the path of a weight to the name of its group."""


class Prior(NamedTuple):
    """The Gaussian N(mu, (tau D)^-1) of the weights, or the posterior of earlier data in its place.

    Attributes
    ----------
    precision
        tau: the prior precision, or its geometric mean over the weights if they have different ones.
    relative
        D: one number for each weight, shape (P,), with geometric mean one. The number 1.0 for an isotropic prior.
    mean
        mu: one number for each weight, shape (P,), or the number 0.0.
    curvature
        The curvature G of earlier data, in the weights times sqrt(D), if the prior is a posterior: its precision is
        then P0 = sqrt(D) (G + tau I) sqrt(D). None for a prior that is stated by numbers.
    """

    precision: Num[ArrayLike, ""]
    relative: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 1.0
    mean: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 0.0
    curvature: AdditiveStructure | None = None

    @property
    def is_isotropic(self) -> bool:
        """Whether D is one number. It is read off a shape, so it is known inside `jit` too."""
        return jnp.ndim(self.relative) == 0

    def deviation(self, params: PyTree) -> Float[Array, " P"]:
        """theta - mu."""
        return ravel(params) - self.mean

    def squared_distance(self, params: PyTree) -> float:
        """(theta - mu)' D (theta - mu), in float64 on the host."""
        return self.squared_norm(np.asarray(self.deviation(params), np.float64))

    def squared_norm(self, deviation: Float[np.ndarray, " P"]) -> float:
        """v' D v of a vector in float64."""
        return float(deviation @ (deviation * np.asarray(self.relative, np.float64)))

    def quadratic_form(self, params: PyTree) -> float:
        """(theta - mu)' P0 (theta - mu), in float64 on the host."""
        form = float(self.precision) * self.squared_distance(params)
        if self.curvature is None:
            return form
        root = np.sqrt(np.asarray(self.relative, np.float64))
        white = root * np.asarray(self.deviation(params), np.float64)
        return form + float(white @ self.curvature.product(white))

    def log_determinant(self) -> Float[np.ndarray, " 1"]:
        """log det (P0 / tau) - log det D = log det(I + G / tau), in float64; zero without a curvature."""
        return np.zeros(1) if self.curvature is None else self.curvature.log_determinant(float(self.precision))

    def gradient(self, params: PyTree) -> Float[Array, " P"]:
        """Gradient of the log density in the weights, -P0 (theta - mu)."""
        deviation = self.deviation(params)
        gradient = self.relative * (-self.precision * deviation)
        if self.curvature is None:
            return gradient
        root = jnp.sqrt(self.relative)
        return gradient - root * self.curvature.product(root * deviation)

    def whiten(self, vector: Float[AnyArray, "... P"]) -> Float[AnyArray, "... P"]:
        """Multiply by D^-1/2: a gradient changes to the coordinates sqrt(D) theta, a deviation from them to theta."""
        return vector if self.is_isotropic else vector / jnp.sqrt(self.relative)


def by_layer(path: str) -> str:
    """Group a weight by the module that holds it, so that kernel and bias of a layer share a prior precision.

    Parameters
    ----------
    path
        The path of a weight, such as "Dense_0/kernel".
    """
    return path.rpartition("/")[0] or path


def group_names(params: PyTree, groups: Groups) -> list[str]:
    """List the names of the groups, in the order of their first weights.

    Parameters
    ----------
    params
        The weights.
    groups
        The function from the path of a weight to the name of its group.

    Raises
    ------
    ValueError
        If a name is not a string.
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
    """Return for each weight the position of its group in `group_names`.

    Parameters
    ----------
    params, groups
        As for `group_names`.
    """
    numbers = {name: number for number, name in enumerate(group_names(params, groups))}
    leaf_groups = [numbers[groups(name)] for name in leaf_names(params)]
    return np.repeat(leaf_groups, [leaf.size for leaf in jax.tree.leaves(params)])


def resolve(
    precision: Precision, mean: PyTree, params: PyTree, groups: Groups = by_layer, where: str = "Laplace"
) -> Prior:
    """Turn the prior as a user states it into a `Prior` of the weights `params`.

    Parameters
    ----------
    precision
        One number; a dictionary with one number for each group; a vector (P,); or a pytree whose leaves broadcast to
        those of `params`. A pytree may have more leaves than `params`: those with the paths of `params` are taken.
    mean
        One number, a vector (P,), or a pytree like `params`, which may have more leaves as well.
    params
        The weights with a posterior.
    groups
        The function from the path of a weight to the name of its group.
    where
        The name of the caller, for messages.

    Raises
    ------
    ValueError
        If a precision is not positive and finite, or precision or mean does not fit the weights. The message names the
        groups.
    """
    factor, relative = _split(precision, params, groups, where)
    return Prior(factor, relative, _mean(mean, params, where))


def _split(
    precision: Precision, params: PyTree, groups: Groups, where: str
) -> tuple[Num[ArrayLike, ""], Float[ArrayLike, ""] | Float[Array, " P"]]:
    """Split prior precisions, as a user states them, into an overall factor tau and relative precisions D."""
    if is_scalar(precision):
        checks.positive(precision, f"{where}(prior_precision=...)")
        return precision, 1.0
    # Precisions of groups stay one number for each leaf until the end, so that little is computed.
    by_group = is_by_group(precision, params, groups)
    numbers = _per_leaf(precision, params, groups) if by_group else _per_weight(precision, params, groups, where)
    counts = [leaf.size for leaf in jax.tree.leaves(params)] if by_group else 1
    # Traced numbers can be neither checked nor compared.
    if isinstance(numbers, jax.core.Tracer):
        vector = jnp.repeat(numbers, np.asarray(counts), total_repeat_length=size(params))
        factor = jnp.exp(jnp.mean(jnp.log(vector)))
        return factor, vector / factor
    exact = np.asarray(numbers, np.float64)  # an operation of JAX would be traced inside `jit`
    checks.all_positive(exact, f"the numbers in {where}(prior_precision=...)")
    # Equal numbers are an isotropic prior, for which every structure is cheaper.
    if np.all(exact == exact[0]):
        return float(exact[0]), 1.0
    # The geometric mean over weights; each leaf counts as often as it has weights.
    factor = float(np.exp(np.average(np.log(exact), weights=counts if by_group else None)))
    relative = np.repeat((exact / factor).astype(number_type(params)), counts)
    return factor, jnp.asarray(relative)


def is_scalar(precision: Precision) -> bool:
    """Whether a prior precision is one number for all weights."""
    return not isinstance(precision, (Mapping, tuple, list, str)) and np.ndim(precision) == 0


def is_by_group(precision: Precision, params: PyTree, groups: Groups) -> bool:
    """Whether a prior precision is a dictionary with one number for each group."""
    if not isinstance(precision, Mapping) or set(precision) != set(group_names(params, groups)):
        return False
    return all(map(is_scalar, precision.values()))


def _per_leaf(precision: Mapping[str, Any], params: PyTree, groups: Groups) -> Float[ArrayLike, " L"]:
    """Return the precision of each leaf's group."""
    numbers = [precision[groups(name)] for name in leaf_names(params)]
    if any(isinstance(number, jax.core.Tracer) for number in numbers):
        return jnp.stack([jnp.asarray(number, float) for number in numbers])
    return np.asarray(numbers, np.float64)


def _per_weight(precision: Precision, params: PyTree, groups: Groups, where: str) -> Num[Array, " P"]:
    """Return one precision for each weight, or raise ValueError with all ways to state a precision."""
    try:
        return as_vector(with_posterior(precision, params), params)
    except (ValueError, TypeError):
        names = group_names(params, groups)
        got = f"the names {sorted(precision)}" if isinstance(precision, Mapping) else described(precision)
        raise ValueError(
            f"{where}(prior_precision=...) must be one number, a dictionary with one for each of the groups {names}, "
            f"{size(params)} numbers, or a pytree like the weights with a posterior; got {got}"
        ) from None


def with_posterior(values: PyTree, params: PyTree) -> PyTree:
    """Take from a pytree like all weights the leaves with the paths of `params`; return anything else as it is."""
    known = dict(zip(leaf_names(values), jax.tree.leaves(values), strict=True))
    names = leaf_names(params)
    if jax.tree.structure(values) == jax.tree.structure(params) or not set(names) <= set(known):
        return values
    return jax.tree.unflatten(jax.tree.structure(params), [known[name] for name in names])


def _mean(mean: PyTree, params: PyTree, where: str) -> Float[ArrayLike, ""] | Num[Array, " P"]:
    """Return the prior mean as the number 0.0 or as one number for each weight."""
    if isinstance(mean, (int, float)) and mean == 0:
        return 0.0  # the number, so that no vector of zeros is stored
    checks.real_numbers(mean, f"{where}(prior_mean=...)", finite=True)
    try:
        return as_vector(with_posterior(mean, params), params)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{where}(prior_mean=...) must be one number, {size(params)} numbers, or a pytree like the weights; got "
            f"{described(mean)}"
        ) from None
