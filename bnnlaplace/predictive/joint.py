"""The Gaussian of the linearised outputs at many inputs together, and draws of functions from it."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from bnnlaplace.core import checks, memory
from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import num_examples, number_type, size
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.curvature import rows, tapped
from bnnlaplace.curvature.jacobian import Jacobian, LeafJacobian, jacobian
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import by_microbatch, check_microbatch, outputs
from bnnlaplace.model.jaxpr import numbers_of_example
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, output_shape
from bnnlaplace.predictive.functional import check_joint, derivative_bytes, functional_variances, marginal_samples
from bnnlaplace.predictive.reading import covariance_reader
from bnnlaplace.structure import OutputCovariance, SampleStructure

# How many times J and the covariance are in memory at the peak: as they are, and what is made of them.
COPIES_OF_JACOBIAN, COPIES_OF_COVARIANCE = 4, 4


class FunctionalGaussian(NamedTuple):
    """A Gaussian over the linearised outputs at a batch of inputs.

    Attributes
    ----------
    mean
        f(x; theta*), (B, ..., C).
    covariance
        J Sigma J'. Joint: between all outputs at all inputs, (B, ..., C, B, ..., C). Otherwise within each input and
        output position, (B, ..., C, C).
    """

    mean: Float[Array, "B ... C"]
    covariance: Float[Array, "..."]

    @property
    def is_joint(self) -> bool:
        """Whether the covariance is one over all inputs."""
        return self.covariance.ndim == 2 * self.mean.ndim

    def sample(self, key: Array, num_samples: int) -> Float[Array, "S B ... C"]:
        """Draw outputs from the Gaussian, any number of them.

        If it is joint, each draw is a function, correlated over inputs as the covariance says. Otherwise draws at
        different inputs and output positions are independent. Draws are the symmetric root of the covariance times
        noise. They can be differentiated, also where it has a null space. Cost: an eigendecomposition of it.

        Parameters
        ----------
        key, num_samples
            The random key and S. One key gives the same draws again.

        Raises
        ------
        ValueError
            If `key` is not a random key, or `num_samples` not an integer of at least one.
        """
        checks.key(key, "FunctionalGaussian.sample(key=...)")
        num_samples = checks.count(num_samples, "FunctionalGaussian.sample(num_samples=...)", advice="try 32")
        if not self.is_joint or not self.mean.size:
            covariance = self.covariance if not self.is_joint else jnp.zeros((*self.mean.shape, self.mean.shape[-1]))
            return self.mean + marginal_samples(key, covariance, num_samples)
        count = self.mean.size
        deviations = marginal_samples(key, self.covariance.reshape(1, count, count), num_samples)
        return self.mean + deviations.reshape(num_samples, *self.mean.shape)


def functional_posterior(
    fitted: Fitted, inputs: Inputs, *, joint: bool = True, microbatch: int = 64
) -> FunctionalGaussian:
    """Compute mean and covariance of the linearised outputs at all inputs, jointly or at each of them.

    The joint covariance of a `CovarianceStructure` is exact for its curvature. That of a Krylov decomposition is exact
    inside its basis, and outside a multiple of the prior's, which its samples choose at each input. `joint=False` gives
    the covariances of `functional_variances`.

    Parameters
    ----------
    fitted
        The posterior of the weights, at its own prior.
    inputs
        (B, ...); B may be zero.
    joint
        Whether to compute the covariances between inputs.
    microbatch
        The largest number of inputs that are differentiated at a time.

    Raises
    ------
    MemoryError
        If the joint covariance, or the derivatives that it is made of, do not fit in memory.

    Notes
    -----
    Cost of a joint covariance: a backward pass for each of the n = B ... C outputs, and their inner products under the
    posterior, about n^2 P multiplications. Memory: n^2 numbers of the covariance and n P of derivatives, about four
    times each. Each number of inputs is compiled once.
    """
    check_joint(joint, "functional_posterior")
    check_microbatch(microbatch)
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    mean = outputs(fitted.network, inputs, microbatch=microbatch)
    if not joint:
        options = {"microbatch": microbatch}
        return FunctionalGaussian(mean, next(functional_variances(fitted, inputs, [fitted.prior.precision], **options)))
    if not mean.size:
        return FunctionalGaussian(mean, jnp.zeros((*mean.shape, *mean.shape), mean.dtype))
    _check_memory(fitted.network, mean.shape)
    derivatives = _rows(fitted.network.unlinearised(), inputs, microbatch)
    structure, precision, relative = fitted.structure, fitted.prior.precision, fitted.prior.relative
    if isinstance(structure, SampleStructure):
        root = jnp.sqrt(relative).astype(derivatives.dtype)
        white = derivatives if fitted.prior.is_isotropic else derivatives / root
        covariance = structure.joint_covariance(white, precision)
    else:
        sizes = tuple(leaf.size for leaf in jax.tree.leaves(fitted.network.params))
        covariance = _joint_covariance(structure.output_covariance([precision], relative), sizes, derivatives)
    return FunctionalGaussian(mean, covariance.reshape(*mean.shape, *mean.shape))


def covariances_within(
    fitted: Fitted, inputs: Inputs, factors: Float[Array, "B ... C R"] | None = None, *, microbatch: int
) -> Float[Array, "B ... C C"]:
    """Compute the covariance of the outputs within each position of each input, from the basis of a `SampleStructure`.

    It is exact inside the basis, where samples have an error of sqrt(2 / S). Cost: a backward pass for each output, and
    its product with the basis.

    Parameters
    ----------
    fitted
        The posterior of the weights, at its own prior.
    inputs, microbatch
        (B, ...), and the largest number of inputs that are differentiated at a time.
    factors
        Those of the curvature of the outputs, if the posterior was fitted to these inputs.
    """
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    network = fitted.network.unlinearised()
    shape = output_shape(network, inputs)[1:]
    sizes = rows.row_sizes(network, inputs, microbatch)
    if sizes is not None:
        parts = (
            _within_of(fitted, _by_input(part), None if factors is None else factors[index], shape[-1])
            for index, part in rows.in_parts(network, inputs, sizes)
        )
        together = jnp.concatenate([jax.block_until_ready(part) for part in parts])[: num_examples(inputs)]
        return together.reshape(-1, *shape, shape[-1])
    row_bytes = number_type(network.params).itemsize * size(network.params)
    few = min(microbatch, max(1, derivative_bytes() // (math.prod(shape) * row_bytes)))

    def of_few(pair: tuple[Inputs, Array | None]) -> Float[Array, "m U C C"]:
        return _within_of(fitted, _rows(network, pair[0], few), pair[1], shape[-1])

    return by_microbatch(of_few, (inputs, factors), few).reshape(-1, *shape, shape[-1])


def covariances_from_rows(
    fitted: Fitted,
    rows_of_data: Float[Array, "num K m P"],
    shape: tuple[int, ...],
    factors: Float[Array, "B ... C R"] | None = None,
) -> Float[Array, "B ... C C"]:
    """Compute what `covariances_within` does from rows of the Jacobian that are at hand, a microbatch at a time.

    Parameters
    ----------
    fitted
        The posterior of the weights, with a `SampleStructure` or a `RowStructure`.
    rows_of_data
        The rows at all inputs, as `curvature.kept` holds them.
    shape
        The shape of the outputs, (B, ..., C).
    factors
        As for `covariances_within`; for a `SampleStructure` alone.
    """
    width, count, parts = shape[-1], rows_of_data.shape[2], []
    for number in range(len(rows_of_data)):
        groups = _part(rows_of_data, number, width)
        if isinstance(fitted.structure, SampleStructure):
            index = np.minimum(np.arange(number * count, (number + 1) * count), shape[0] - 1)  # the rest is padding
            parts.append(_within_of(fitted, _by_input(groups), None if factors is None else factors[index], width))
        else:
            parts.append(covariance_reader(fitted, [fitted.prior.precision])(groups)[0])
    return jnp.concatenate(parts)[: shape[0]].reshape(*shape, width)


@partial(jax.jit, static_argnums=2)
def _part(rows_of_data: Float[Array, "num K m P"], number: Int[ArrayLike, ""], width: int) -> Float[Array, "U C m P"]:
    part = jax.lax.dynamic_index_in_dim(rows_of_data, number, keepdims=False)
    return part.reshape(-1, width, *part.shape[1:])


def _within_of(
    fitted: Fitted, by_input: Float[Array, "m K P"], factors: Float[Array, "m ... C R"] | None, width: int
) -> Float[Array, "m U C C"]:
    """The covariances within positions, from the basis of a `SampleStructure`."""
    root = jnp.sqrt(fitted.prior.relative).astype(by_input.dtype)
    white = by_input if fitted.prior.is_isotropic else by_input / root
    of_outputs = None if factors is None else _of_all_positions(factors)
    return _at_positions(fitted.structure.covariance_within(white, fitted.prior.precision, of_outputs), width)


def _by_input(rows_of_groups: Float[Array, "U C m P"]) -> Float[Array, "m K P"]:
    by_input = jnp.moveaxis(rows_of_groups, 2, 0)
    return by_input.reshape(len(by_input), -1, by_input.shape[-1])


@partial(jax.jit, static_argnums=1)
def _at_positions(within: Float[Array, "m K K"], width: int) -> Float[Array, "m U C C"]:
    """Cut the covariances at each position out of those of all outputs of an input."""
    blocks = within.reshape(len(within), -1, width, within.shape[1] // width, width)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=1, axis2=3), -1, 1)


@jax.jit
def _of_all_positions(factors: Float[Array, "m ... C R"]) -> Float[Array, "m K L"]:
    """The factors of the curvature of all outputs of an input: those of its positions, side by side."""
    at_positions = factors.reshape(len(factors), -1, *factors.shape[-2:])
    count, (width, columns) = at_positions.shape[1], at_positions.shape[2:]
    together = einsum("mucr,uv->mucvr", at_positions, jnp.eye(count, dtype=factors.dtype))
    return together.reshape(len(factors), count * width, count * columns)


def _check_memory(network: Network, shape: tuple[int, ...]) -> None:
    """Raise MemoryError if the covariance of outputs of this shape, and their derivatives, exceed the free memory."""
    count, num_weights, number_bytes = math.prod(shape), size(network.params), number_type(network.params).itemsize
    needed = number_bytes * count * (COPIES_OF_JACOBIAN * num_weights + COPIES_OF_COVARIANCE * count)
    free = memory.free_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"functional_posterior(x, joint=True) must have memory for the covariance of {count} outputs, {shape[0]} "
            f"inputs times {count // shape[0]}, and their derivatives in {num_weights} weights; got "
            f"{memory.in_words(free)} free for about {memory.in_words(needed)}; try fewer inputs, joint=False for "
            "covariances at each input, or functional_posteriors(joint=True) for samples alone"
        )


def _rows(network: Network, inputs: Inputs, microbatch: int) -> Float[Array, "B K P"]:
    """Differentiate all K outputs at each input; few inputs at a time, so that the activations stay in memory."""
    example_shape = output_shape(network, inputs)[1:]
    number_bytes = number_type(network.params).itemsize
    pass_bytes = number_bytes * numbers_of_example(NetworkSpec.of(network, inputs))
    limit, num_outputs = derivative_bytes(), math.prod(example_shape)
    input_bytes = num_outputs * (pass_bytes + 2 * number_bytes * size(network.params))
    num_inputs = min(microbatch, num_examples(inputs), max(1, limit // input_bytes))
    passes = min(num_outputs, max(1, limit // (num_inputs * pass_bytes)))
    return by_microbatch(partial(_microbatch_rows, network, num_outputs, passes), inputs, num_inputs)


@partial(jax.jit, static_argnums=(1, 2))
def _microbatch_rows(
    network: Network, num_outputs: int, passes: int, x: PyTree[Shaped[AnyArray, "m ..."]]
) -> Float[Array, "m K P"]:
    passed = tapped.forward(network, network.params, x)
    return jacobian(passed, np.arange(num_outputs)[None], passes).rows()[:, 0]


@partial(jax.jit, static_argnums=1)
def _joint_covariance(
    covariance: OutputCovariance, leaf_sizes: tuple[int, ...], rows: Float[Array, "B K P"]
) -> Float[Array, "n n"]:
    """Compute the covariance of all outputs at all inputs, as if they were the outputs of one example."""
    together = rows.reshape(1, 1, -1, rows.shape[-1])
    parts = jnp.split(together, np.cumsum(leaf_sizes)[:-1], axis=-1)
    return covariance(Jacobian([LeafJacobian(None, part, None) for part in parts]))[0, 0, 0]
