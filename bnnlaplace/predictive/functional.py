"""The posterior of the linearised outputs f(x; theta*) + J(x) (theta - theta*)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import eigh, einsum
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.jacobian import jacobian, size_of_jacobian
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import by_microbatch, check_microbatch, outputs, pushforward
from bnnlaplace.model.jaxpr import numbers_of_example
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline, output_shape
from bnnlaplace.structure import CovarianceStructure, OutputCovariance, SampleStructure

# Of derivatives of outputs, and what is made of them, in memory at a time, and as much again of the activations of
# backward passes that are run together; on CPU less, as more gains nothing there. Passes that have to be run in turn
# are few enough for a cache.
JACOBIAN_BYTES, CPU_JACOBIAN_BYTES, CACHED_BYTES = 2**28, 2**25, 2**23
# Inputs that one program takes at least before it takes several outputs of each.
FEW_INPUTS = 8


class FunctionalPosterior(NamedTuple):
    """The posterior of the linearised outputs at a batch of inputs.

    Attributes
    ----------
    mean
        f(x; theta*), (B, ..., C).
    variance
        J Sigma J' within each output position, (B, ..., C, C); from the samples where they are the only way.
    deviations
        Samples of J (theta - theta*), (S, B, ..., C).
    """

    mean: Float[Array, "B ... C"]
    variance: Float[Array, "B ... C C"]
    deviations: Float[Array, "S B ... C"]


def functional_posteriors(
    fitted: Fitted,
    inputs: Inputs,
    precisions: Sequence[float],
    *,
    key: Array,
    num_samples: int,
    microbatch: int = 64,
) -> Iterator[FunctionalPosterior]:
    """The posterior of the linearised outputs at each of several prior precisions, one after another.

    A structure that knows covariances gives them exactly at each input, and samples are drawn from those; it takes one
    Jacobian per input for all precisions. One that knows samples has them pushed through the Jacobian, and the
    covariance is estimated from them: without bias, with relative standard error sqrt(2 / num_samples).

    Parameters
    ----------
    fitted
        The posterior of the weights. Its own prior gives the ratios of the precisions.
    inputs
        (B, ...); none are allowed.
    precisions
        Prior precisions.
    key, num_samples
        Of the samples; of a `SampleStructure` at most as many as it has.
    microbatch
        Inputs differentiated at a time; bounds memory.
    """
    checks.key(key, "functional_posteriors(key=...)")
    checks.count(num_samples, "functional_posteriors(num_samples=...)", advice="try 32")
    return _one_after_another(fitted, inputs, precisions, key, num_samples, microbatch)


def _one_after_another(
    fitted: Fitted,
    inputs: Inputs,
    precisions: Sequence[float],
    key: Array,
    num_samples: int,
    microbatch: int,
) -> Iterator[FunctionalPosterior]:
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    mean = outputs(fitted.network, inputs, microbatch=microbatch)
    if isinstance(fitted.structure, SampleStructure):
        for deviations in _sampled(fitted, inputs, key, num_samples, precisions, microbatch=microbatch):
            yield FunctionalPosterior(mean, sample_variance(deviations), deviations)
        return
    for variance in _covariances(fitted, inputs, precisions, microbatch=microbatch):
        yield FunctionalPosterior(mean, variance, marginal_samples(key, variance, num_samples))


def functional_variances(
    fitted: Fitted,
    inputs: Inputs,
    precisions: Sequence[float],
    *,
    microbatch: int = 64,
    marginal: bool = False,
) -> Iterator[Float[Array, "B ... C C"] | Float[Array, "B ... C"]]:
    """The covariance of the linearised outputs at each prior precision; from all samples of a `SampleStructure`.

    Parameters
    ----------
    fitted, inputs, precisions, microbatch
        As for `functional_posteriors`.
    marginal
        Its diagonal alone, the variance of each output.
    """
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    if not isinstance(fitted.structure, SampleStructure):
        yield from _covariances(fitted, inputs, precisions, microbatch=microbatch, marginal=marginal)
        return
    # All samples are used, so that the key only orders them.
    key, count = jax.random.key(0), fitted.structure.num_probes
    for deviations in _sampled(fitted, inputs, key, count, precisions, microbatch=microbatch):
        yield jnp.mean(deviations**2, axis=0) if marginal else sample_variance(deviations)


def _sampled(
    fitted: Fitted,
    inputs: Inputs,
    key: Array,
    num_samples: int,
    precisions: Sequence[float],
    *,
    microbatch: int,
) -> Iterator[Float[Array, "S B ... C"]]:
    """J times samples at each prior precision."""
    # The directions are whitened a few rows at a time: no copy is made of a whole basis.
    factors = None if fitted.prior.is_isotropic else 1 / jnp.sqrt(fitted.prior.relative)
    push = partial(pushforward, fitted.network.unlinearised(), inputs, factors=factors, microbatch=microbatch)
    return fitted.structure.function_samples(push, key, num_samples, precisions)


def _covariances(
    fitted: Fitted,
    inputs: Inputs,
    precisions: Sequence[float],
    *,
    microbatch: int,
    marginal: bool = False,
) -> Float[Array, "D B ... C C"] | Float[Array, "D B ... C"]:
    """J Sigma J' at every prior precision, or its diagonal alone.

    One Jacobian per input serves all precisions. At most `JACOBIAN_BYTES` of derivatives, and of what the structure
    makes of them, are in memory at a time: those of fewer inputs than a microbatch if need be, or of some outputs of
    one input: single ones for the diagonal, the C of one position at least for covariances.
    """
    network, structure = fitted.network.unlinearised(), fitted.structure
    shape = output_shape(network, inputs)[1:]
    unit = 1 if marginal else shape[-1]
    sizes = _sizes(network, inputs, structure, math.prod(shape) // unit, unit, len(precisions), microbatch)
    covariance = structure.output_covariance(precisions, fitted.prior.relative)
    found = by_microbatch(partial(_of_microbatch, network, covariance, sizes), inputs, sizes.inputs)
    return jnp.swapaxes(found, 0, 1).reshape(len(precisions), -1, *shape, *([] if marginal else [unit]))


class _Sizes(NamedTuple):
    """How many inputs are differentiated at a time, how many groups of `unit` outputs, how many passes run together."""

    inputs: int
    groups: int
    unit: int
    passes: int


def _sizes(
    network: Network,
    inputs: Inputs,
    structure: CovarianceStructure,
    num_groups: int,
    unit: int,
    num_precisions: int,
    microbatch: int,
) -> _Sizes:
    """As many as there is room for."""
    check_microbatch(microbatch)
    most = min(JACOBIAN_BYTES, CPU_JACOBIAN_BYTES) if jax.default_backend() == "cpu" else JACOBIAN_BYTES
    number_bytes = number_type(network.params).itemsize
    of_pass = number_bytes * numbers_of_example(Outline.of(network, inputs))
    held = size_of_jacobian(network, inputs)
    count, num_outputs = size(network.params), num_groups * unit
    of_input = held.example + int(structure.rows_for_column * count) * held.columns(num_outputs)
    of_output = held.output + int(structure.rows_for_output * count) + num_precisions * unit
    of_input, of_group = of_pass + number_bytes * of_input, number_bytes * unit * of_output
    few = min(microbatch, FEW_INPUTS)
    groups = min(num_groups, max(1, (most - few * of_input) // (few * of_group)))
    at_once = min(microbatch, max(1, most // (of_input + groups * of_group)))
    passes = groups * unit
    if at_once * passes * of_pass > most:
        passes = max(1, min(CACHED_BYTES, most) // (at_once * of_pass))
    return _Sizes(at_once, groups, unit, passes)


@partial(jax.jit, static_argnums=2)
def _of_microbatch(
    network: Network, covariance: OutputCovariance, sizes: _Sizes, x: PyTree[Shaped[AnyArray, "m ..."]]
) -> Float[Array, "m D U C C"]:
    """The covariances at m inputs of all groups of outputs, some groups at a time."""
    passed = tapped.forward(network, network.params, x)
    count = math.prod(passed.outputs.shape[1:]) // sizes.unit
    num = math.ceil(count / sizes.groups)
    # Some of the last may be those of no output.
    numbers = np.arange(num * math.ceil(count / num) * sizes.unit).reshape(num, -1, sizes.unit)

    def some(numbers: Int[Array, "U C"]) -> Float[Array, "m U D C C"]:
        return jnp.moveaxis(covariance(jacobian(passed, numbers, sizes.passes)), 0, 2)

    found = some(numbers[0])[None] if num == 1 else jax.lax.map(some, jnp.asarray(numbers))
    joined = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1, *found.shape[3:])[:, :count]
    return jnp.moveaxis(joined, 2, 1)


def marginal_samples(key: Array, variance: Float[Array, "B ... C C"], num_samples: int) -> Float[Array, "S B ... C"]:
    """Draws from N(0, variance) at each input and output position, independent between them.

    Averages over samples at one position do not see that.

    Parameters
    ----------
    key
        Of the noise, the same for every call with that key.
    variance
        A covariance at each input and position.
    num_samples
        S.
    """
    values, vectors = eigh(variance)
    # The symmetric root, which changes little where the variance does; eigenvectors may change their signs.
    root = einsum("...ck,...k,...dk->...cd", vectors, jnp.sqrt(jnp.maximum(values, 0)), vectors)
    noise = jax.random.normal(key, (num_samples, *variance.shape[:-1]), variance.dtype)
    return einsum("...cd,s...d->s...c", root, noise)


def sample_variance(deviations: Float[Array, "S B ... C"]) -> Float[Array, "B ... C C"]:
    """Functional variance from samples whose mean is known to be zero; relative standard error sqrt(2 / S).

    Parameters
    ----------
    deviations
        Samples of J (theta - theta*).
    """
    return einsum("s...c,s...d->...cd", deviations, deviations) / len(deviations)
