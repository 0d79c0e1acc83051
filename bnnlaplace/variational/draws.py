"""Samples of the outputs at the training inputs, under the posterior at hand.

The outputs of an example at one position are Gaussian, with the covariance that the structure knows. If an example has
more than `MOST_OUTPUTS` outputs, samples of the weights estimate it: the Jacobian would take more passes, and the
matrix more memory, than as many samples do. The samples of the outputs are quasi-random: one Sobol sequence, moved by a
random shift for each example and position (Cranley and Patterson 1976), with each point and its mirror image. So the
error of a sum over examples falls with their number.

There must be many of them. The mean and the sites are chosen by averages over the samples, so that they find the gaps
between few samples: on 100 images of ten classes a fit with 32 samples claimed a bound of -527 nats where it had -547,
and one with 256 claimed -505 and had -508.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.roots import symmetric_root
from bnnlaplace.core.tree import ravel
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.kept import KeptRows
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.data import Batch, Data
from bnnlaplace.model.spec import output_shape
from bnnlaplace.predictive.functional import functional_variances, jacobian_product
from bnnlaplace.predictive.joint import covariances_from_rows, covariances_within
from bnnlaplace.structure import RowStructure, SampleStructure

# How many outputs an example has at most for covariances that are exact, and how many samples estimate others.
MOST_OUTPUTS = 64


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


# Reads, for each batch, the roots R of the covariances R R' that its samples have.
RootReader = Callable[[Float[Array, "B ... C K"]], None]


def draw(
    fitted: Fitted,
    data: Data,
    *,
    key: Array,
    num_pairs: int,
    microbatch: int,
    kept: KeptRows | None = None,
    factors: Sequence[Float[Array, "B ... C R"]] | None = None,
    read_roots: RootReader | None = None,
) -> Iterator[Draws]:
    """Yield the outputs of each batch. The same key gives the same noise, whatever the posterior.

    `kept` are the rows of the Jacobian at the data, if there are any. `factors` are, for each batch, those of the
    curvature that the posterior was fitted to; they make the covariances of a `SampleStructure` more exact.

    Cost: the Jacobian of each example, or a forward-mode derivative for each sample of the weights.
    """
    means = None if kept is None else kept.linearised_outputs(ravel(fitted.network.params))
    for number, batch in enumerate(data):
        mean = outputs(fitted.network, batch.inputs, microbatch=microbatch) if means is None else means[number]
        rows = None if kept is None else kept.batches[number]
        of_batch = None if factors is None else factors[number]
        roots = _roots(fitted, batch, key, rows, of_batch, microbatch=microbatch)
        if read_roots is not None:
            read_roots(roots)
        points = jnp.asarray(sobol_points(num_pairs, roots.shape[-1]), roots.dtype)
        yield Draws(
            mean,
            _deviations(roots, jax.random.fold_in(key, number), points),
            jnp.asarray(batch.targets),
            batch.weights,
        )


def are_samples(num_outputs: int) -> bool:
    """Whether the covariances of the outputs of an example are those of samples of the weights."""
    return num_outputs > MOST_OUTPUTS


def without_spread(fitted: Fitted, data: Data, *, microbatch: int) -> Iterator[Draws]:
    """Yield the outputs of each batch at the mean of the weights alone, where a fit begins."""
    for batch in data:
        mean = outputs(fitted.network, batch.inputs, microbatch=microbatch)
        yield Draws(mean, jnp.zeros((1, *mean.shape), mean.dtype), jnp.asarray(batch.targets), batch.weights)


def _roots(
    fitted: Fitted,
    batch: Batch,
    key: Array,
    rows: Float[Array, "num O m P"] | None,
    factors: Float[Array, "B ... C R"] | None,
    *,
    microbatch: int,
) -> Float[Array, "B ... C K"]:
    """Return R with R R' = J (G + P0)^-1 J' at each example and position, or an estimate of that."""
    structure, precision = fitted.structure, fitted.prior.precision
    if are_samples(math.prod(output_shape(fitted.network, batch.inputs)[1:])):
        count = structure.num_probes if isinstance(structure, SampleStructure) else MOST_OUTPUTS
        push = jacobian_product(fitted, batch.inputs, microbatch=microbatch)
        return jnp.moveaxis(push(structure.samples(key, count, precision)), 0, -1) / np.sqrt(count)
    if rows is not None and isinstance(structure, (SampleStructure, RowStructure)):
        shape = output_shape(fitted.network, batch.inputs)
        return symmetric_root(covariances_from_rows(fitted, rows, shape, factors))
    if isinstance(structure, SampleStructure):
        return symmetric_root(covariances_within(fitted, batch.inputs, factors, microbatch=microbatch))
    return symmetric_root(next(functional_variances(fitted, batch.inputs, [precision], microbatch=microbatch)))


@jax.jit
def _deviations(roots: Float[Array, "B ... C K"], key: Array, points: Float[Array, "H K"]) -> Float[Array, "H B ... C"]:
    """Turn points in the unit cube into samples of N(0, R R')."""
    shifts = jax.random.uniform(key, (*roots.shape[:-2], roots.shape[-1]), roots.dtype)
    placed = (points.reshape(len(points), *[1] * (shifts.ndim - 1), -1) + shifts) % 1
    # A point on the boundary would be infinitely far away.
    smallest = jnp.finfo(placed.dtype).eps
    normal = jax.scipy.special.ndtri(jnp.clip(placed, smallest, 1 - smallest))
    return einsum("...ck,h...k->h...c", roots, normal)


def sobol_points(count: int, dimension: int) -> Float[np.ndarray, "H C"]:
    """The first `count` points of a scrambled Sobol sequence in the unit cube, the same at every call, in float64.

    Parameters
    ----------
    count
        H, best a power of two.
    dimension
        C.
    """
    from scipy.stats import qmc  # slow to import, and seldom needed

    exponent = int(np.ceil(np.log2(max(count, 1))))
    # Scrambled, because in many dimensions the first points of the plain sequence lie on lines.
    return qmc.Sobol(dimension, scramble=True, seed=0).random_base2(exponent)[:count]
