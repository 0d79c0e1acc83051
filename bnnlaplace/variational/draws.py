"""Samples of the outputs at the training inputs, under the posterior at hand.

A structure that knows covariances of outputs gives those of each example and position. Their samples are quasi-random:
one Sobol sequence, moved by a random shift for each example and position (Cranley and Patterson 1976), with each point
and its mirror image. So the error of a sum over examples falls with their number. A structure that knows the outputs
through samples of the weights gives these samples, and their mirror images.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.roots import symmetric_root
from bnnlaplace.core.types import AnyArray
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import outputs, pushforward
from bnnlaplace.model.data import Batch, Data
from bnnlaplace.predictive.functional import functional_variances
from bnnlaplace.structure import SampleStructure


class Draws(NamedTuple):
    """The outputs of one batch under the posterior.

    Attributes
    ----------
    mean
        J m + f, the outputs at the mean of the weights, (B, ..., C).
    deviations
        One of each pair of samples, minus the mean: (H, B, ..., C). The other one has the opposite sign.
    targets, weights
        As in `Batch`.
    """

    mean: Float[Array, "B ... C"]
    deviations: Float[Array, "H B ... C"]
    targets: AnyArray
    weights: Float[Array, " B"]

    def samples(self) -> Float[Array, "S B ... C"]:
        """All samples, 2 H of them."""
        return jnp.concatenate([self.mean + self.deviations, self.mean - self.deviations])


def draw(fitted: Fitted, data: Data, *, key: Array, num_pairs: int, microbatch: int) -> Iterator[Draws]:
    """Yield the outputs of each batch. The same key gives the same noise, whatever the posterior.

    Cost: for "lanczos" a forward-mode derivative for each probe and example, otherwise the Jacobian of each example.
    """
    for number, batch in enumerate(data):
        mean = outputs(fitted.network, batch.inputs, microbatch=microbatch)
        deviations = _deviations(fitted, batch, jax.random.fold_in(key, number), num_pairs, microbatch=microbatch)
        yield Draws(mean, deviations, jnp.asarray(batch.targets), batch.weights)


def without_spread(fitted: Fitted, data: Data, *, microbatch: int) -> Iterator[Draws]:
    """Yield the outputs of each batch at the mean of the weights alone, where a fit begins."""
    for batch in data:
        mean = outputs(fitted.network, batch.inputs, microbatch=microbatch)
        yield Draws(mean, jnp.zeros((1, *mean.shape), mean.dtype), jnp.asarray(batch.targets), batch.weights)


def _deviations(
    fitted: Fitted, batch: Batch, key: Array, num_pairs: int, *, microbatch: int
) -> Float[Array, "H B ... C"]:
    precisions = [fitted.prior.precision]
    if isinstance(fitted.structure, SampleStructure):
        factors = None if fitted.prior.is_isotropic else 1 / jnp.sqrt(fitted.prior.relative)
        network, options = fitted.network.unlinearised(), {"factors": factors, "microbatch": microbatch}
        push = partial(pushforward, network, batch.inputs, **options)
        count = fitted.structure.num_probes
        # All probes are used, each with both signs, so that the key has no effect.
        return next(fitted.structure.function_samples(push, jax.random.key(0), count, precisions))
    (variance,) = functional_variances(fitted, batch.inputs, precisions, microbatch=microbatch)
    *lead, width = variance.shape[:-1]
    return _coloured(variance, key, jnp.asarray(sobol_points(num_pairs, width), variance.dtype), tuple(lead))


@jax.jit
def _coloured_at(
    variance: Float[Array, "B ... C C"], shifts: Float[Array, "B ... C"], points: Float[Array, "H C"]
) -> Float[Array, "H B ... C"]:
    """Turn points in the unit cube into samples of N(0, variance)."""
    placed = (points.reshape(len(points), *[1] * (shifts.ndim - 1), -1) + shifts) % 1
    # A point on the boundary would be infinitely far away.
    smallest = jnp.finfo(placed.dtype).eps
    normal = jax.scipy.special.ndtri(jnp.clip(placed, smallest, 1 - smallest))
    return einsum("...cd,h...d->h...c", symmetric_root(variance), normal)


def _coloured(
    variance: Float[Array, "B ... C C"], key: Array, points: Float[Array, "H C"], lead: tuple[int, ...]
) -> Float[Array, "H B ... C"]:
    shifts = jax.random.uniform(key, (*lead, points.shape[1]), variance.dtype)
    return _coloured_at(variance, shifts, points)


def sobol_points(count: int, dimension: int) -> Float[np.ndarray, "H C"]:
    """The first `count` points of a Sobol sequence in the unit cube, in float64.

    Parameters
    ----------
    count
        H, best a power of two.
    dimension
        C.
    """
    from scipy.stats import qmc  # slow to import, and seldom needed

    exponent = int(np.ceil(np.log2(max(count, 1))))
    return qmc.Sobol(dimension, scramble=False).random_base2(exponent)[:count]
