"""The posterior of the linearised outputs f(x; theta*) + J(x) (theta - theta*)."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.curvature import rows, tapped
from bnnlaplace.curvature.jacobian import feature_derivatives, jacobian, size_of_jacobian
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.arrays import as_arrays
from bnnlaplace.model.batched import by_microbatch, check_microbatch, outputs, pushforward
from bnnlaplace.model.jaxpr import numbers_of_example
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, output_shape
from bnnlaplace.predictive.reading import (
    Draws,
    FunctionalPosterior,
    Spread,
    covariance_reader,
    draws_functions,
    have_one_expansion,
    marginal_samples,
    of_covariance,
    products,
    read_all,
    reading_of,
    sample_variance,
    whitening,
)
from bnnlaplace.structure import CovarianceStructure, OutputCovariance, RowStructure, SampleStructure
from bnnlaplace.structure.protocol import PriorPrecision, PriorPrecisions

# How many bytes of derivatives, and of what a structure makes of them, are in memory at a time. The activations of
# backward passes that run together may take as much again. On CPU a larger number would gain nothing. If not all passes
# can run together, CACHED_BYTES keeps the activations of those that do small enough for a cache.
JACOBIAN_BYTES, CPU_JACOBIAN_BYTES, CACHED_BYTES = 2**28, 2**25, 2**23
# A program takes this many inputs before it takes several outputs of each.
FEW_INPUTS = 8
# Bytes of samples of the weights that are in memory at a time.
SAMPLE_BYTES = 2**28


def functional_posteriors(
    fitted: Fitted,
    inputs: Inputs,
    precisions: PriorPrecisions,
    *,
    key: Array,
    num_samples: int,
    microbatch: int = 64,
    joint: bool = False,
    spread: Spread = "covariance",
) -> Iterator[FunctionalPosterior]:
    """Yield the posterior of the linearised outputs at each of several prior precisions.

    A `CovarianceStructure` gives exact covariances at each input, from which samples are drawn: independently at each
    input, or with `joint` as functions. One Jacobian for each input serves all precisions. The samples of a
    `SampleStructure` are multiplied by the Jacobian, and the covariance is estimated from them: without bias, with
    relative standard error sqrt(2 / num_samples).

    Parameters
    ----------
    fitted
        The posterior of the weights. Its own prior gives the ratios of the precisions.
    inputs
        (B, ...); B may be zero.
    precisions
        Prior precisions.
    key, num_samples
        The random key of the samples, and their number. A `SampleStructure` gives at most as many as it has.
    microbatch
        Inputs differentiated at a time; bounds memory.
    joint
        Multiply samples of the weights by the Jacobian, so that each sample is one function: correlated over inputs,
        and the same at all inputs that are asked with one key. Cost: a forward-mode derivative for each sample, input
        and precision.
    spread
        What `variance` holds: "covariance" that between the outputs of a position, "marginal" the variance of each
        output, "none" nothing. A covariance of many outputs is formed only if it is asked for: without, samples are
        drawn as with `joint`, if there are more outputs than samples at all precisions, or more than 256.
    """
    checks.key(key, "functional_posteriors(key=...)")
    checks.count(num_samples, "functional_posteriors(num_samples=...)", advice="try 32")
    check_joint(joint, "functional_posteriors")
    checks.choice(spread, "functional_posteriors(spread=...)", get_args(Spread))
    # The checks above run at the call. Those inside a generator would run at its first element.
    return _one_after_another(fitted, inputs, precisions, Draws(key, num_samples, microbatch, joint, spread))


def check_joint(joint: bool, where: str) -> None:
    """Raise ValueError unless `joint` is a bool."""
    if not isinstance(joint, (bool, np.bool_)):
        raise ValueError(f"{where}(joint=...) must be True or False; got {joint!r:.80}; try True")


def _one_after_another(
    fitted: Fitted, inputs: Inputs, precisions: PriorPrecisions, draws: Draws
) -> Iterator[FunctionalPosterior]:
    """Yield what `functional_posteriors` promises."""
    key, num_samples, microbatch, joint, spread = draws
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    are_functions = draws_functions(fitted, inputs, draws, len(precisions))
    if not joint and (reading := reading_of(fitted, inputs, precisions, draws)) is not None:
        yield from read_all(inputs, [reading], microbatch)[0]
        return
    mean = outputs(fitted.network, inputs, microbatch=microbatch)
    if isinstance(fitted.structure, SampleStructure):
        for deviations in _sampled(fitted, inputs, key, num_samples, precisions, microbatch=microbatch):
            yield FunctionalPosterior(mean, sample_variance(deviations, spread), deviations)
        return
    variances = repeat(None)
    if spread != "none" or not are_functions:
        is_marginal = are_functions and spread == "marginal"
        variances = _covariances(fitted, inputs, precisions, microbatch=microbatch, marginal=is_marginal)
    for precision, variance in zip(precisions, variances):  # noqa: B905 (None repeats without end)
        if are_functions:
            deviations = _of_functions(fitted, inputs, key, num_samples, precision, microbatch)
            yield FunctionalPosterior(mean, variance, deviations)
        else:
            deviations = marginal_samples(key, variance, num_samples)
            yield FunctionalPosterior(mean, of_covariance(variance, spread), deviations)


def _of_functions(
    fitted: Fitted, inputs: Inputs, key: Array, num_samples: int, precision: PriorPrecision, microbatch: int
) -> Float[Array, "S B ... C"]:
    """Multiply samples of the weights by the Jacobian, as many at a time as have memory."""
    push = jacobian_product(fitted, inputs, microbatch=microbatch)
    network = fitted.network
    most = max(1, SAMPLE_BYTES // (number_type(network.params).itemsize * size(network.params)))
    num_parts = math.ceil(num_samples / most)
    if num_parts == 1:
        return push(fitted.structure.samples(key, num_samples, precision))
    count = math.ceil(num_samples / num_parts)
    parts = [push(fitted.structure.samples(each, count, precision)) for each in jax.random.split(key, num_parts)]
    return jnp.concatenate(parts)[:num_samples]


def shared_posteriors(
    posteriors: Sequence[Fitted],
    inputs: Inputs,
    precisions: Sequence[PriorPrecisions],
    *,
    keys: Sequence[Array],
    num_samples: int,
    microbatch: int = 64,
    spread: Spread = "covariance",
) -> list[Iterator[FunctionalPosterior]]:
    """Do what `functional_posteriors` does for several posteriors. Those of one convolutional network share a Jacobian.

    Parameters
    ----------
    posteriors, precisions, keys
        The posteriors, and for each of them its prior precisions and the random key of its samples.
    inputs, num_samples, microbatch, spread
        As for `functional_posteriors`.

    Returns
    -------
    list of iterators
        One for each posterior, in their order. Those that share a Jacobian are computed at the call.
    """
    results: list[Iterator[FunctionalPosterior] | None] = [None] * len(posteriors)
    first, shared = posteriors[0].network, []
    inputs = as_arrays(inputs, "inputs to predict at")
    for number, (fitted, grid, key) in enumerate(zip(posteriors, precisions, keys, strict=True)):
        draws, reading = Draws(key, num_samples, microbatch, spread=spread), None
        if not fitted.network.is_subset and have_one_expansion(fitted.network, first):
            reading = reading_of(fitted, inputs, grid, draws)
        if reading is None:
            results[number] = functional_posteriors(fitted, inputs, grid, **draws._asdict())
        else:
            shared.append((number, reading))
    if shared:
        read = read_all(inputs, [reading for _, reading in shared], microbatch)
        for (number, _), result in zip(shared, read, strict=True):
            results[number] = result
    return results


def functional_variances(
    fitted: Fitted,
    inputs: Inputs,
    precisions: PriorPrecisions,
    *,
    microbatch: int = 64,
    marginal: bool = False,
) -> Iterator[Float[Array, "B ... C C"] | Float[Array, "B ... C"]]:
    """Yield the covariance of the linearised outputs at each prior precision.

    A `SampleStructure` estimates it from all its samples.

    Parameters
    ----------
    fitted, inputs, precisions, microbatch
        As for `functional_posteriors`.
    marginal
        Yield only the diagonal, the variance of each output.
    """
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    if not isinstance(fitted.structure, SampleStructure):
        yield from _covariances(fitted, inputs, precisions, microbatch=microbatch, marginal=marginal)
        return
    # All samples are used, so the key affects only their order and signs.
    key, count = jax.random.key(0), fitted.structure.num_probes
    for deviations in _sampled(fitted, inputs, key, count, precisions, microbatch=microbatch):
        yield jnp.mean(deviations**2, axis=0) if marginal else sample_variance(deviations)


def _sampled(
    fitted: Fitted,
    inputs: Inputs,
    key: Array,
    num_samples: int,
    precisions: PriorPrecisions,
    *,
    microbatch: int,
) -> Iterator[Float[Array, "S B ... C"]]:
    """Yield J times the samples of a `SampleStructure` at each prior precision."""
    push = jacobian_product(fitted, inputs, microbatch=microbatch)
    return fitted.structure.function_samples(push, key, num_samples, precisions)


def jacobian_product(
    fitted: Fitted, inputs: Inputs, *, microbatch: int
) -> Callable[[Float[Array, "R P"]], Float[Array, "R B ... C"]]:
    """Return V -> J D^-1/2 V, from rows in the coordinates of the structure to derivatives of the outputs.

    It goes forward, or reads rows of J if the directions are many and outputs few.
    """
    network, factors = fitted.network.unlinearised(), whitening(fitted)
    sizes = rows.row_sizes(network, inputs, microbatch)

    def push(directions: Float[Array, "R P"]) -> Float[Array, "R B ... C"]:
        if sizes is None or not rows.directions_pay(sizes, len(directions)):
            return pushforward(network, inputs, directions, factors=factors, microbatch=microbatch)
        (images,) = rows.read(network, inputs, sizes, [partial(products, directions, factors)])
        return images.reshape(*images.shape[:2], *output_shape(network, inputs)[1:])

    return push


def _covariances(
    fitted: Fitted,
    inputs: Inputs,
    precisions: PriorPrecisions,
    *,
    microbatch: int,
    marginal: bool = False,
) -> Float[Array, "D B ... C C"] | Float[Array, "D B ... C"]:
    """Compute J Sigma J' at every prior precision, or only its diagonal.

    One Jacobian for each input serves all precisions. At most `JACOBIAN_BYTES` of derivatives, and of what the
    structure makes of them, are in memory at a time. If a microbatch needs more, fewer inputs are taken at a time, and
    then only some outputs of each input: single outputs for the diagonal, at least the C outputs of one position for
    covariances.
    """
    network, structure = fitted.network.unlinearised(), fitted.structure
    shape = output_shape(network, inputs)[1:]
    unit = 1 if marginal else shape[-1]
    if isinstance(structure, RowStructure) and (few := rows.row_sizes(network, inputs, microbatch, unit=unit)):
        (read,) = rows.read(network, inputs, few, [covariance_reader(fitted, precisions)])
        return read[: len(precisions)].reshape(len(precisions), -1, *shape, *([] if marginal else [unit]))
    sizes = _sizes(network, inputs, structure, math.prod(shape) // unit, unit, len(precisions), microbatch)
    covariance = structure.output_covariance(precisions, fitted.prior.relative)
    by_input = by_microbatch(partial(_microbatch_covariances, network, covariance, sizes), inputs, sizes.inputs)
    return jnp.swapaxes(by_input, 0, 1).reshape(len(precisions), -1, *shape, *([] if marginal else [unit]))


def derivative_bytes() -> int:
    """How many bytes of derivatives are in memory at a time."""
    return min(JACOBIAN_BYTES, CPU_JACOBIAN_BYTES) if jax.default_backend() == "cpu" else JACOBIAN_BYTES


class _Sizes(NamedTuple):
    """How many inputs are differentiated at a time, how many groups of `unit` outputs, and how many passes together.

    `by_features` says that the passes are those of features, from which all outputs follow.
    """

    inputs: int
    groups: int
    unit: int
    passes: int
    by_features: bool = False


def _sizes(
    network: Network,
    inputs: Inputs,
    structure: CovarianceStructure,
    num_groups: int,
    unit: int,
    num_precisions: int,
    microbatch: int,
) -> _Sizes:
    """Choose the largest sizes that keep within the limits of memory."""
    check_microbatch(microbatch)
    limit = derivative_bytes()
    number_bytes = number_type(network.params).itemsize
    pass_bytes = number_bytes * numbers_of_example(NetworkSpec.of(network, inputs))
    # Numbers for each input and for each of its outputs: the Jacobian, what the structure makes of it, the result.
    sizes = size_of_jacobian(network, inputs)
    num_weights, num_outputs = size(network.params), num_groups * unit
    per_input = sizes.example + int(structure.rows_for_column * num_weights) * sizes.columns(num_outputs)
    # Shared derivatives are weighted anew at each input for the covariances of several outputs.
    weighted = sizes.shared if unit > 1 else 0
    per_output = sizes.output + weighted + int(structure.rows_for_output * num_weights) + num_precisions * unit
    # Few features are differentiated once, if there is room for that; otherwise a pass for each output.
    of_features = number_bytes * sizes.features * sizes.output
    by_features = 0 < FEW_INPUTS * of_features <= limit / 2
    per_input += sizes.features * sizes.output if by_features else 0
    input_bytes, group_bytes = pass_bytes + number_bytes * per_input, number_bytes * unit * per_output
    shared_bytes = number_bytes * unit * sizes.shared
    # First as many groups as fit with a few inputs, then as many inputs as fit with these groups.
    # Where all derivatives are shared, the more inputs share them the better.
    min_inputs = microbatch if not sizes.output and unit == 1 else min(microbatch, FEW_INPUTS)
    room = limit - min_inputs * input_bytes
    groups = min(num_groups, max(1, room // (shared_bytes + min_inputs * group_bytes)))
    num_inputs = min(microbatch, max(1, (limit - groups * shared_bytes) // (input_bytes + groups * group_bytes)))
    passes = sizes.features if by_features else groups * unit
    if num_inputs * passes * pass_bytes > limit:
        passes = max(1, min(CACHED_BYTES, limit) // (num_inputs * pass_bytes))
    return _Sizes(num_inputs, groups, unit, passes, by_features)


@partial(jax.jit, static_argnums=2)
def _microbatch_covariances(
    network: Network, covariance: OutputCovariance, sizes: _Sizes, x: PyTree[Shaped[AnyArray, "m ..."]]
) -> Float[Array, "m D U C C"]:
    """Compute the covariances at m inputs of all groups of outputs, `sizes.groups` groups at a time."""
    passed = tapped.forward(network, network.params, x)
    num_groups = math.prod(passed.outputs.shape[1:]) // sizes.unit
    num_steps = math.ceil(num_groups / sizes.groups)
    # All steps take equally many groups. The last step may reach beyond the last output, where derivatives are zero.
    indices = np.arange(num_steps * math.ceil(num_groups / num_steps) * sizes.unit).reshape(num_steps, -1, sizes.unit)

    # A network whose equations depend on the number of examples has a head with some numbers alone.
    of_features = feature_derivatives(passed, sizes.passes) if sizes.by_features and passed.head is not None else None

    def step(indices: Int[AnyArray, "U C"]) -> Float[Array, "m U D C C"]:
        derivatives = jacobian(passed, indices, sizes.passes, of_features=of_features)
        return jnp.moveaxis(covariance(derivatives), 0, 2)

    by_step = step(indices[0])[None] if num_steps == 1 else jax.lax.map(step, jnp.asarray(indices))
    by_group = jnp.moveaxis(by_step, 0, 1).reshape(by_step.shape[1], -1, *by_step.shape[3:])[:, :num_groups]
    return jnp.moveaxis(by_group, 2, 1)
