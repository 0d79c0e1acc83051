"""Predictions under the posterior: of the linearised network f(x; theta*) + J(x) (theta - theta*), or of samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace import features, link
from bnnlaplace.curvature import dense
from bnnlaplace.equations import numbers_of_example
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.outline import Outline, Shapes, output_shape
from bnnlaplace.precise import einsum
from bnnlaplace.random_key import check_key
from bnnlaplace.structure import CovarianceStructure, JacobianRoot, SampleStructure, Structure
from bnnlaplace.tree import num_examples, number_type, ravel, unraveler

# Likelihoods whose mean is a softmax, a sigmoid, or the output itself.
PROBIT = ("classification", "binary", "regression")
# Jacobians of outputs that are in memory at a time, at most; on CPU fewer, as larger ones gain nothing there; and those
# that a cache holds, so that more inputs at a time pay.
JACOBIAN_BYTES, CPU_JACOBIAN_BYTES, CACHED_BYTES = 2**28, 2**25, 2**24


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


def outputs(
    network: Network, inputs: PyTree[Float[Array, "B ..."]], *, microbatch: int = 64
) -> Float[Array, "B ... C"]:
    """f(x; theta*), one microbatch at a time; for no inputs no rows, here and below.

    Parameters
    ----------
    network
        At its own weights.
    inputs
        (B, ...).
    microbatch
        Inputs at a time; bounds memory.
    """
    return _by_microbatch(partial(_outputs, network), inputs, microbatch)


def pushforward(
    network: Network,
    inputs: PyTree[Float[Array, "B ..."]],
    directions: Float[Array, "R P"],
    *,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Float[Array, "R B ... C"]:
    """J(x) v for every input and every row v of `directions`, by forward mode.

    Memory: `vectors_at_once` times the activations of a microbatch, and the result. Any number of inputs and rows
    shares one program.

    Parameters
    ----------
    network, inputs
        What is differentiated, and where.
    directions
        R vectors in the space of the weights.
    microbatch, vectors_at_once
        Inputs and vectors at a time; they bound memory.
    """
    images = []
    for start in range(0, len(directions), vectors_at_once):
        rows = directions[start : start + vectors_at_once]
        padded = jnp.pad(rows, ((0, vectors_at_once - len(rows)), (0, 0)))
        found = _by_microbatch(partial(_pushforward, network, padded), inputs, microbatch)
        images.append(jnp.swapaxes(found, 0, 1)[: len(rows)])
    return jnp.concatenate(images)


def functional_posteriors(
    network: Network,
    structure: Structure,
    inputs: PyTree[Float[Array, "B ..."]],
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
    network, structure
        The posterior.
    inputs
        (B, ...); none are allowed.
    precisions
        Prior precisions.
    key, num_samples
        Of the samples; of a `SampleStructure` at most as many as it has.
    microbatch
        Inputs differentiated at a time; bounds memory.
    """
    network, inputs = _head(network, inputs, microbatch=microbatch)
    mean = outputs(network, inputs, microbatch=microbatch)
    if isinstance(structure, SampleStructure):
        push = partial(pushforward, network, inputs, microbatch=microbatch)
        for deviations in structure.function_samples(push, key, num_samples, precisions):
            yield FunctionalPosterior(mean, sample_variance(deviations), deviations)
        return
    for variance in structured_variance(network, inputs, structure, precisions, microbatch=microbatch):
        yield FunctionalPosterior(mean, variance, marginal_samples(key, variance, num_samples))


def functional_variance(
    network: Network,
    structure: Structure,
    inputs: PyTree[Float[Array, "B ..."]],
    prior_precision: float,
    *,
    microbatch: int = 64,
    marginal: bool = False,
) -> Float[Array, "B ... C C"] | Float[Array, "B ... C"]:
    """The covariance J (G + delta I)^-1 J' of the linearised outputs; from all samples of a `SampleStructure`.

    Parameters
    ----------
    network, structure, inputs, microbatch
        As for `functional_posteriors`.
    prior_precision
        delta.
    marginal
        Its diagonal alone, the variance of each output.
    """
    head = _head(network, inputs, microbatch=microbatch)
    return _functional_variance(*head, structure, prior_precision, microbatch=microbatch, marginal=marginal)


def _functional_variance(
    network: Network,
    inputs: PyTree[Float[Array, "B ..."]],
    structure: Structure,
    prior_precision: float,
    *,
    microbatch: int,
    marginal: bool,
) -> Float[Array, "B ... C C"] | Float[Array, "B ... C"]:
    if isinstance(structure, SampleStructure):
        push = partial(pushforward, network, inputs, microbatch=microbatch)
        # All samples are used, so that the key only orders them.
        key, count = jax.random.key(0), structure.num_probes
        (deviations,) = structure.function_samples(push, key, count, [prior_precision])
        return jnp.mean(deviations**2, axis=0) if marginal else sample_variance(deviations)
    options = {"microbatch": microbatch, "marginal": marginal}
    return structured_variance(network, inputs, structure, [prior_precision], **options)[0]


def predictions(
    network: Network,
    likelihood: Likelihood,
    structure: Structure,
    inputs: PyTree[Float[Array, "B ..."]],
    prior_precision: float,
    *,
    pred_type: Literal["glm", "nn"] = "glm",
    link_approx: Literal["probit", "mc", "bridge"] = "probit",
    with_noise: bool = False,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> Float[Array, "B ... C"] | tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
    """E[y] under the posterior; of a regression the mean of the outputs and their variance.

    Parameters
    ----------
    network, likelihood, structure, prior_precision
        The posterior.
    inputs
        (B, ...); none are allowed.
    pred_type
        "glm": of the linearised network. "nn": of the network itself, by samples of the weights; `link_approx` has no
        part in it.
    link_approx
        See `bnnlaplace.link`; "bridge" is for "classification", a regression needs none.
    with_noise
        Of a regression: add the variance of the noise.
    key, num_samples
        For "mc" and "nn"; by default as many samples as a `SampleStructure` has, from a covariance 100.
    microbatch
        Inputs at a time; bounds memory.

    Raises
    ------
    ValueError
        If a name is unknown, "bridge" is asked of another likelihood, noise of one that has none, or samples are needed
        and there is no key.
    """
    if pred_type not in ("glm", "nn"):
        raise ValueError(f"predictive(pred_type=...) must be 'glm' or 'nn'; got {pred_type!r}")
    if link_approx not in ("probit", "mc", "bridge"):
        raise ValueError(f"predictive(link_approx=...) must be 'probit', 'mc' or 'bridge'; got {link_approx!r}")
    is_regression = likelihood.name == "regression"
    if link_approx == "bridge" and likelihood.name != "classification":
        raise ValueError(
            f"predictive(link_approx='bridge') must be asked of 'classification'; got {likelihood.name!r}; try 'probit'"
        )
    if link_approx == "probit" and pred_type == "glm" and likelihood.name not in PROBIT:
        raise ValueError(
            f"predictive(link_approx='probit') must be asked of one of {PROBIT}, being made for softmax and sigmoid; "
            f"got {likelihood.name!r}; use link_approx='mc' with key=..."
        )
    if with_noise and likelihood.sigma_noise is None:
        raise ValueError(
            f"predictive(with_noise=True) must be asked of a regression with sigma_noise; got {likelihood.name!r}"
        )
    noise = likelihood.sigma_noise**2 if with_noise else 0.0
    network, inputs = _head(network, inputs, microbatch=microbatch)
    if pred_type == "nn" or (link_approx == "mc" and not is_regression):
        which = "pred_type='nn'" if pred_type == "nn" else "link_approx='mc'"
        check_key(key, f"predictive({which}, key=...)")
        if num_samples is None:
            num_samples = structure.num_probes if isinstance(structure, SampleStructure) else 100
        check_num_samples(num_samples, f"predictive({which}, num_samples=...)")
        if pred_type == "nn" and is_regression and num_samples < 2:
            raise ValueError("predictive(pred_type='nn', num_samples=...) of a regression must be at least 2; got 1")
        draw = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
        if pred_type == "nn":
            mean, variance = _of_weight_samples(network, likelihood, structure, inputs, prior_precision, **draw)
            return (mean, variance + noise) if is_regression else mean
        (found,) = functional_posteriors(network, structure, inputs, [prior_precision], **draw)
        return link.monte_carlo(likelihood, found.mean, found.deviations)
    mean = outputs(network, inputs, microbatch=microbatch)
    variance_of = partial(_functional_variance, network, inputs, structure, prior_precision, microbatch=microbatch)
    if is_regression:
        return mean, variance_of(marginal=True) + noise
    if link_approx == "bridge":
        return link.bridge(mean, variance_of(marginal=False))
    return link.probit(likelihood, mean, variance_of(marginal=True))


def _head(
    network: Network, inputs: PyTree[Float[Array, "B ..."]], *, microbatch: int
) -> tuple[Network, PyTree[Float[Array, "B ..."]]]:
    """What follows the features of a network, and those of all inputs, computed once; itself where there are none."""
    cut = features.cut(network, inputs) if network.is_subset else None
    if cut is None or num_examples(inputs) * features.bytes_each(network, inputs) > features.most_bytes():
        return network, inputs  # then features are computed twice, for the mean and for the variance
    return cut.network, _by_microbatch(partial(_features, cut), inputs, microbatch)


def _of_weight_samples(
    network: Network,
    likelihood: Likelihood,
    structure: Structure,
    inputs: PyTree[Float[Array, "B ..."]],
    prior_precision: float,
    *,
    key: Array,
    num_samples: int,
    microbatch: int,
) -> tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
    """The mean over weight samples of E[y | f(x; theta)], and its variance over them; one forward pass a sample."""
    centre, unravel = ravel(network.params), unraveler(network.params)
    mean = squares = 0.0
    for count, deviation in enumerate(structure.samples(key, num_samples, prior_precision), start=1):
        sample = network.with_params(unravel(centre + deviation))
        new = likelihood.mean(outputs(sample, inputs, microbatch=microbatch))
        step = new - mean
        mean = mean + step / count
        squares = squares + step * (new - mean)
    return mean, squares / max(num_samples - 1, 1)


def structured_variance(
    network: Network,
    inputs: PyTree[Float[Array, "B ..."]],
    structure: CovarianceStructure,
    precisions: Sequence[float],
    *,
    microbatch: int = 64,
    marginal: bool = False,
) -> Float[Array, "D B ... C C"] | Float[Array, "D B ... C"]:
    """J Sigma J' at every prior precision, or its diagonal alone, from `structure.covariance_root`.

    One Jacobian per input serves all precisions. As one is C gradients of P numbers, at most `JACOBIAN_BYTES` of them
    are in memory at a time; and of more than a quarter of a microbatch only where they and what a backward pass for
    each output computes are small. Where one input has more, its outputs are taken in parts: single ones for the
    diagonal, the C of one position at least for covariances.

    Parameters
    ----------
    network, inputs, precisions, microbatch
        As for `functional_posteriors`.
    structure
        One that gives covariances.
    marginal
        The diagonal alone.
    """
    roots = [structure.covariance_root(precision) for precision in precisions]
    few, outputs_at_once = _at_once(network, inputs, microbatch, marginal=marginal)
    if outputs_at_once is not None:
        found = _by_microbatch(partial(_by_outputs, network, roots, outputs_at_once, marginal), inputs, 1)
        return jnp.swapaxes(found, 0, 1)

    def of_microbatch(x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m D ..."]:
        jacobian = _jacobian(network, x)
        return jnp.stack([_inner_products(root, jacobian, marginal=marginal) for root in roots], axis=1)

    return jnp.swapaxes(_by_microbatch(of_microbatch, inputs, few), 0, 1)


def _at_once(
    network: Network, inputs: PyTree[Float[Array, "B ..."]], microbatch: int, *, marginal: bool
) -> tuple[int, int | None]:
    """How many inputs are differentiated at a time; if the Jacobian of one is too large, how many of its outputs."""
    shape = output_shape(network, inputs)[1:]
    num_outputs = math.prod(shape)
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(network.params))
    unit = 1 if marginal else shape[-1]
    most_bytes = min(JACOBIAN_BYTES, CPU_JACOBIAN_BYTES) if jax.default_backend() == "cpu" else JACOBIAN_BYTES
    if num_outputs > unit and num_outputs * row_bytes > most_bytes:
        return 1, unit * max(1, most_bytes // (unit * row_bytes))
    most = max(1, most_bytes // (num_outputs * row_bytes))
    passed_bytes = number_type(network.params).itemsize * numbers_of_example(Outline.of(network, inputs))
    cached = CACHED_BYTES // (num_outputs * (row_bytes + passed_bytes))
    return min(microbatch, most, max(1, microbatch // 4, cached)), None


def _by_outputs(
    network: Network, roots: Sequence[JacobianRoot], at_once: int, marginal: bool, x: PyTree[Float[Array, "1 ..."]]
) -> Float[Array, "1 D ..."]:
    """The (co)variances of one input, some of its outputs at a time."""
    shape = output_shape(network, x)[1:]
    count, unit = math.prod(shape), 1 if marginal else shape[-1]
    found = []
    for start in range(0, count, at_once):
        rows = _some_rows(network, x, jnp.minimum(start + jnp.arange(at_once), count - 1))
        parts = rows.reshape(-1, unit, rows.shape[-1])
        found.append(jnp.stack([_inner_products(root, parts, marginal=marginal) for root in roots]))
    joined = jnp.concatenate(found, axis=1)[:, : count // unit]
    return joined.reshape(1, len(roots), *shape, *([] if marginal else [unit]))


def check_num_samples(num_samples: int, where: str, *, least: int = 1) -> None:
    """Check that there is a sample to average over, or as many as are needed.

    Parameters
    ----------
    num_samples
        How many are asked for.
    where
        The name of the argument, for the message.
    least
        How many are needed.

    Raises
    ------
    ValueError
        If there are fewer, or it is no integer.
    """
    if not isinstance(num_samples, (int, np.integer)) or num_samples < least:
        raise ValueError(f"{where} must be an integer of at least {least}; got {num_samples}; try 32")


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
    values, vectors = jnp.linalg.eigh(variance)
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


@jax.jit
def _features(head: features.Head, x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m ..."]:
    return head.features(x)


@jax.jit
def _outputs(network: Network, x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m ... C"]:
    return network(network.params, x)


@jax.jit
def _pushforward(
    network: Network, directions: Float[Array, "R P"], x: PyTree[Float[Array, "m ..."]]
) -> Float[Array, "m R ... C"]:
    unravel = unraveler(network.params)
    _, jvp = jax.linearize(lambda p: network(p, x), network.params)
    return jnp.swapaxes(jax.vmap(lambda v: jvp(unravel(v)))(directions), 0, 1)


@jax.jit
def _jacobian(network: Network, x: PyTree[Float[Array, "m ..."]]) -> Float[Array, "m ... C P"]:
    return dense.jacobian(network, network.params, x)


@jax.jit
def _some_rows(network: Network, x: PyTree[Float[Array, "1 ..."]], numbers: Int[Array, " r"]) -> Float[Array, "r P"]:
    """The gradients of some of the outputs of one input."""
    outputs, pullback = jax.vjp(lambda p: network(p, x), network.params)

    def row(number: Int[Array, ""]) -> Float[Array, " P"]:
        cotangent = jax.nn.one_hot(number, outputs.size, dtype=outputs.dtype).reshape(outputs.shape)
        return ravel(pullback(cotangent)[0])

    return jax.lax.map(row, numbers, batch_size=min(8, len(numbers)))


@partial(jax.jit, static_argnames="marginal")
def _inner_products(root: JacobianRoot, jacobian: Float[Array, "m ... C P"], *, marginal: bool) -> Array:
    rows = root(jacobian)
    if marginal:
        return jnp.sum(rows**2, axis=-1)
    return einsum("...cr,...dr->...cd", rows, rows)


def _by_microbatch(
    function: Callable[[Array], Array], inputs: PyTree[Float[Array, "B ..."]], microbatch: int
) -> Float[Array, "B ..."]:
    """Apply a compiled function to microbatches of one shape, the last one padded with copies of the last input.

    Called from Python rather than scanned, so that inputs of any number share one program.
    """
    if microbatch < 1:
        raise ValueError(f"microbatch=... must be at least 1; got {microbatch}; try 64")
    count = num_examples(inputs)
    if count == 0:
        one = jax.eval_shape(function, Shapes.of_example(inputs).batch(1))
        return jnp.zeros((0, *one.shape[1:]), one.dtype)
    microbatch = min(microbatch, count)
    found = []
    for start in range(0, count, microbatch):
        index = np.minimum(np.arange(start, start + microbatch), count - 1)
        found.append(function(jax.tree.map(partial(_rows, index), inputs)))
    return jnp.concatenate(found)[:count]


def _rows(index: np.ndarray, leaf: Array) -> Array:
    """Of an array on the host there; of one on the device by a compiled gather, as indexing takes a millisecond."""
    return leaf[index] if isinstance(leaf, np.ndarray) else _gathered(leaf, index)


@jax.jit
def _gathered(leaf: Array, index: Array) -> Array:
    return jnp.take(leaf, index, axis=0)
