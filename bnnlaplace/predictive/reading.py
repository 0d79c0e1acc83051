"""What a posterior reads from rows of the Jacobian, and its predictions, which follow from that."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.roots import symmetric_root
from bnnlaplace.core.types import Inputs
from bnnlaplace.curvature import rows
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import output_shape
from bnnlaplace.structure import RowStructure, SampleStructure
from bnnlaplace.structure.protocol import PriorPrecisions, RowCovariance

# With no more outputs their covariance, and its root, are cheap, whatever the number of samples. With more than
# MANY_OUTPUTS they are dear, whatever the number of precisions that share the derivatives.
FEW_OUTPUTS, MANY_OUTPUTS = 32, 256

Spread = Literal["covariance", "marginal", "none"]


class FunctionalPosterior(NamedTuple):
    """The posterior of the linearised outputs at a batch of inputs.

    Attributes
    ----------
    mean
        f(x; theta*), (B, ..., C).
    variance
        J Sigma J' within each output position, (B, ..., C, C); its diagonal, (B, ..., C); or None. See `spread` of
        `functional_posteriors`. A `SampleStructure` estimates it from the samples.
    deviations
        Samples of J (theta - theta*), (S, B, ..., C). They are samples of functions, which belong together over inputs,
        for a `SampleStructure`, with `joint`, and for many outputs whose covariance is not asked for. Otherwise those
        of one input and output position are independent of those of all others.
    """

    mean: Float[Array, "B ... C"]
    variance: Float[Array, "B ... C C"] | Float[Array, "B ... C"] | None
    deviations: Float[Array, "S B ... C"]


class Draws(NamedTuple):
    """What is asked of a functional posterior; see `functional_posteriors`."""

    key: Array
    num_samples: int
    microbatch: int = 64
    joint: bool = False
    spread: Spread = "covariance"


class Reading(NamedTuple):
    """What a posterior reads from rows of the Jacobian, and how its predictions follow from that and the mean."""

    network: Network
    reader: rows.Reader
    finish: Callable[[Float[Array, "B ... C"], Float[Array, "k B U ..."]], Iterator[FunctionalPosterior]]


def draws_functions(fitted: Fitted, inputs: Inputs, draws: Draws, num_precisions: int = 1) -> bool:
    """Whether samples of the outputs are those of functions, and one key gives the same functions at other inputs.

    They are if `joint` asks for it, and with a `SampleStructure`. Covariances, if nobody asks for them, take a backward
    pass for each output, which serves all precisions, and a root for each precision. Functions take a forward
    derivative for each sample and precision. So functions are drawn if outputs are more than these, or very many.
    """
    if draws.joint or isinstance(fitted.structure, SampleStructure):
        return True
    num_outputs = math.prod(output_shape(fitted.network, inputs)[1:])
    few = max(FEW_OUTPUTS, min(MANY_OUTPUTS, draws.num_samples * num_precisions))
    return draws.spread != "covariance" and num_outputs > few


def reading_of(fitted: Fitted, inputs: Inputs, precisions: PriorPrecisions, draws: Draws) -> Reading | None:
    """Prepare to read a posterior from rows; None if that would not pay."""
    structure, sizes = fitted.structure, rows.row_sizes(fitted.network.unlinearised(), inputs, draws.microbatch)
    if sizes is None:
        return None
    if isinstance(structure, SampleStructure):
        directions, combined = structure.sample_directions(draws.key, draws.num_samples, precisions)
        if not rows.directions_pay(sizes, len(directions)):
            return None

        def of_samples(mean: Float[Array, "B ... C"], images: Float[Array, "R B U C"]) -> Iterator[FunctionalPosterior]:
            for deviations in combined(images.reshape(len(images), *mean.shape)):
                yield FunctionalPosterior(mean, sample_variance(deviations, draws.spread), deviations)

        return Reading(fitted.network, partial(products, directions, whitening(fitted)), of_samples)
    if not isinstance(structure, RowStructure) or draws_functions(fitted, inputs, draws, len(precisions)):
        return None

    def of_covariances(mean: Float[Array, "B ... C"], read: Float[Array, "D B U C C"]) -> Iterator[FunctionalPosterior]:
        for variance in read[: len(precisions)].reshape(len(precisions), *mean.shape, mean.shape[-1]):
            deviations = marginal_samples(draws.key, variance, draws.num_samples)
            yield FunctionalPosterior(mean, of_covariance(variance, draws.spread), deviations)

    return Reading(fitted.network, covariance_reader(fitted, precisions), of_covariances)


def read_all(inputs: Inputs, readings: Sequence[Reading], microbatch: int) -> list[Iterator[FunctionalPosterior]]:
    """Read several posteriors from the same rows, those of the first network; see `have_one_expansion`."""
    network = readings[0].network
    mean, expansion = outputs(network, inputs, microbatch=microbatch), network.unlinearised()
    sizes = rows.row_sizes(expansion, inputs, microbatch)
    results = rows.read(expansion, inputs, sizes, [reading.reader for reading in readings])

    def mean_of(reading: Reading) -> Float[Array, "B ... C"]:
        if _are_equal(reading.network, network):
            return mean
        return outputs(reading.network, inputs, microbatch=microbatch)

    return [reading.finish(mean_of(reading), result) for reading, result in zip(readings, results, strict=True)]


def have_one_expansion(network: Network, other: Network) -> bool:
    """Whether two networks, linearised or not, have the same Jacobian: one function, expanded at equal weights."""
    return _are_equal(network.unlinearised(), other.unlinearised())


def _are_equal(network: Network, other: Network) -> bool:
    """Whether two networks are one function with equal numbers, such as those read from checkpoints of one network."""
    if network is other:
        return True
    (leaves, structure), (others, other_structure) = jax.tree.flatten(network), jax.tree.flatten(other)
    return structure == other_structure and all(map(_are_equal_leaves, leaves, others))


def _are_equal_leaves(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if any(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended) for leaf in (one, other)):
        return False  # random keys have no numbers to compare
    return jnp.result_type(one) == jnp.result_type(other) and np.array_equal(one, other)


def covariance_reader(fitted: Fitted, precisions: PriorPrecisions) -> rows.Reader:
    """Return a reader of covariances at the precisions, and at copies of the last one.

    Their number is rounded up, so that one program serves many numbers of precisions.
    """
    count = len(precisions)
    padded = [precisions[min(number, count - 1)] for number in range(_rounded_up(count))]
    return partial(covariances, fitted.structure.row_covariance(padded, fitted.prior.relative))


@jax.jit
def covariances(covariance: RowCovariance, rows: Float[Array, "U C m P"]) -> Float[Array, "D m U C C"]:
    """Compute the covariances of the outputs at each precision of `covariance`; a `Reader` of its second argument."""
    return covariance(rows)


@jax.jit
def products(
    directions: Float[Array, "R P"], factors: Float[Array, " P"] | None, rows: Float[Array, "U C m P"]
) -> Float[Array, "R m U C"]:
    """Differentiate along directions times `factors`, as `pushforward` does; a `Reader` of its last argument."""
    rows = rows if factors is None else rows * factors
    flat = einsum("kp,rp->kr", rows.reshape(-1, rows.shape[-1]), directions)
    return jnp.transpose(flat.reshape(*rows.shape[:-1], -1), (3, 2, 0, 1))


def _rounded_up(count: int) -> int:
    """The next power of two up to eight, then the next multiple of eight."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def whitening(fitted: Fitted) -> Float[Array, " P"] | None:
    """D^-1/2, None for the identity. It is applied a few rows at a time, so that a whole basis is never copied."""
    return None if fitted.prior.is_isotropic else 1 / jnp.sqrt(fitted.prior.relative)


def marginal_samples(key: Array, variance: Float[Array, "B ... C C"], num_samples: int) -> Float[Array, "S B ... C"]:
    """Draw samples of N(0, variance) at each input and output position, independent between positions.

    An average over the samples at one position does not depend on that independence.

    Parameters
    ----------
    key
        The random key of the noise. The same key gives the same noise.
    variance
        A covariance at each input and position.
    num_samples
        S, the number of samples.
    """
    # The symmetric root depends smoothly on the variance. Eigenvectors alone may change their signs between two prior
    # precisions, and the curve over precisions would not be smooth.
    root = symmetric_root(variance)
    noise = jax.random.normal(key, (num_samples, *variance.shape[:-1]), variance.dtype)
    return einsum("...cd,s...d->s...c", root, noise)


def of_covariance(
    covariance: Float[Array, "B ... C C"], spread: Spread
) -> Float[Array, "B ... C C"] | Float[Array, "B ... C"] | None:
    """Return what `spread` asks for, from a covariance at each input and position."""
    if spread == "none":
        return None
    return jnp.diagonal(covariance, axis1=-2, axis2=-1) if spread == "marginal" else covariance


def sample_variance(
    deviations: Float[Array, "S B ... C"], spread: Spread = "covariance"
) -> Float[Array, "B ... C C"] | Float[Array, "B ... C"] | None:
    """Estimate the functional variance from samples with known mean zero. Its relative standard error is sqrt(2 / S).

    Parameters
    ----------
    deviations
        Samples of J (theta - theta*).
    spread
        What of it is wanted.
    """
    if spread == "none":
        return None
    if spread == "marginal":
        return jnp.mean(deviations**2, axis=0)
    return einsum("s...c,s...d->...cd", deviations, deviations) / len(deviations)
