"""Fit the posterior: from a network, data and a prior to its curvature and log likelihood."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Num, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.curvature import dense, diagonal, kronecker
from bnnlaplace.curvature.keep import wide_row_sizes
from bnnlaplace.curvature.kept import CurvatureAt, diagonal_by_rows
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.fitting.continual import posterior_as_prior
from bnnlaplace.fitting.krylov import KrylovOptions, fit_krylov
from bnnlaplace.fitting.mode import at_linear_mode, warn_unless_mode
from bnnlaplace.fitting.prepare import (
    Model,
    bytes_of_images,
    memory_of,
    num_outputs,
    outputs_of_example,
    prepare,
    rounding_of,
)
from bnnlaplace.model.data import Batch, Data
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import sites
from bnnlaplace.model.network import Network
from bnnlaplace.model.sample import Sample
from bnnlaplace.prior import Prior
from bnnlaplace.structure import DenseStructure, DiagonalStructure, KroneckerStructure, SpectralStructure, Structure
from bnnlaplace.structure.finite import are_finite, check_finite, check_in_range, check_products, not_finite

# Training examples that a posterior keeps.
NUM_KEPT = 64

# The structures that need one pass over the data. For each: the function that computes the curvature of a batch, whose
# results add up over batches, and the function that makes the structure from the sum and the rounding of derivatives.
EXACT: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Structure]]] = {
    "diag": (diagonal.ggn_diagonal, lambda total, rounding: DiagonalStructure(total)),
    "kron": (kronecker.factors, KroneckerStructure.fit),
    "full": (dense.ggn_in_float64, DenseStructure.fit),
}


def fit(
    state: Unfitted | Fitted,
    settings: Settings,
    data: Data,
    *,
    mean: Literal["network", "linear"],
    num_data: int | None,
    microbatch: int,
    krylov: KrylovOptions,
    shared_weights: kronecker.SharedWeights = "partial_traces",
    posterior: Fitted | None = None,
) -> Fitted:
    """Compute the curvature at the weights or, for `mean` "linear", at the mode of the linearised network.

    `posterior` is that of earlier data, in place of the prior of the settings. Other parameters, errors and warnings
    are those of `Laplace.fit`.
    """
    structure = settings.hessian_structure
    num_data = check_options(structure, num_data, mean, shared_weights)
    checks.known("fit", state, settings, posterior)
    krylov.check_types()
    model = prepare(state, settings, data, linear=mean == "linear", microbatch=microbatch, num_data=num_data)
    if posterior is not None:
        prior = posterior_as_prior(posterior, model.network)
    else:
        prior = settings.prior(model.network) if state.prior is None else state.prior
    if mean == "linear" or structure not in EXACT:
        what = "mean='linear'" if mean == "linear" else f"hessian_structure={structure!r}"
        model.data.check_repeatable(f"fit(data=...) must be readable several times for {what}")
    memory_of(model, structure, krylov.max_vectors).check()
    if mean == "linear":
        model = at_linear_mode(model, prior, microbatch=microbatch)
    if structure in EXACT:
        fitted = _fit_exact(model, prior, structure, microbatch=microbatch, shared_weights=shared_weights)
    else:
        fitted = _fit_products(model, prior, krylov, microbatch=microbatch)
    if model.scale() == 1.0:  # the gradient of a part of the data has the noise of the part, at a mode, too
        warn_unless_mode(fitted)
    return fitted._replace(sample=Sample(data.sample(NUM_KEPT)))


def check_options(structure: str, num_data: int | None, mean: str, shared_weights: str) -> int | None:
    """Check the options of `Laplace.fit` that every approximation takes, and return `num_data` as a Python int."""
    if num_data is not None:
        num_data = checks.count(num_data, "fit(num_data=...)", advice="pass the size of the training set")
    checks.choice(mean, "fit(mean=...)", ("network", "linear"))
    checks.choice(shared_weights, "fit(shared_weights=...)", get_args(kronecker.SharedWeights))
    if shared_weights != "partial_traces" and structure != "kron":
        raise ValueError(
            f"fit(shared_weights=...) must be left out unless hessian_structure='kron'; got {shared_weights!r} for "
            f"{structure!r}; it chooses Kronecker factors"
        )
    return num_data


def _fit_exact(
    model: Model, prior: Prior, name: str, *, microbatch: int, shared_weights: kronecker.SharedWeights
) -> Fitted:
    """Fit a structure of `EXACT` in one pass over the data, which need not be readable a second time."""
    curvature_of = _curvature_of_batch(model, name, microbatch=microbatch, shared_weights=shared_weights)

    def step(batch: Batch) -> tuple[LogLikelihood, Any]:
        return model.batch_log_likelihood(batch, microbatch=microbatch), curvature_of(batch)

    (log_likelihood, curvature), scale = model.accumulate(step)
    log_likelihood = log_likelihood.scaled(scale).check()
    structure = _in_coordinates(prior, exact_structure(name, curvature, scale, rounding_of(model)))
    return Fitted(model.network, model.likelihood, prior, structure, log_likelihood)


def fit_structure(
    model: Model,
    prior: Prior,
    name: str,
    krylov: KrylovOptions,
    *,
    microbatch: int,
    shared_weights: kronecker.SharedWeights = "partial_traces",
) -> Structure:
    """Compute the curvature alone, at the points of the data, for a likelihood of `model.likelihoods.sites`.

    "lanczos" converges at the prior precision, unless the options name another one. Cost: that of `fit` without the
    log likelihood.
    """
    if name == "diag" and model.rows is not None and sites.of_sample(model.likelihood) is None:
        diagonal_sum = model.rows.ggn_diagonal(model.likelihood, model.curvature_at(microbatch=microbatch))
        return _in_coordinates(prior, exact_structure(name, diagonal_sum, model.scale(), rounding_of(model)))
    if name in EXACT:
        step = _curvature_of_batch(model, name, microbatch=microbatch, shared_weights=shared_weights)
        curvature, scale = model.accumulate(step)
        return _in_coordinates(prior, exact_structure(name, curvature, scale, rounding_of(model)))
    if krylov.target_precision is None:
        krylov = replace(krylov, target_precision=float(prior.precision))
    return _structure_of_products(model, prior, model.scale(), krylov, microbatch=microbatch)


def _curvature_of_batch(
    model: Model, name: str, *, microbatch: int, shared_weights: kronecker.SharedWeights
) -> Callable[[Batch], Any]:
    """Return the function from a batch to its curvature for a structure of `EXACT`."""
    # The derivatives of single examples are in memory here. Half as many examples as in other passes keep the memory
    # level, unless the matrix is larger than they are.
    at_once = microbatch if name == "full" else max(1, microbatch // 2)
    options = {"microbatch": at_once, "shared_weights": shared_weights}
    return partial(batch_curvature, name, model.head, model.likelihood, **options)


def _in_coordinates(prior: Prior, structure: Structure) -> Structure:
    """The structure in the weights times sqrt(D), with the curvature of earlier data if the prior has one."""
    if not prior.is_isotropic:
        structure = check_in_range(structure.whitened(prior.relative))
    if prior.curvature is not None:
        structure = check_in_range(prior.curvature.plus(structure))
    return structure


def batch_curvature(
    name: str,
    network: Network,
    likelihood: Likelihood,
    batch: Batch,
    *,
    microbatch: int,
    shared_weights: kronecker.SharedWeights = "partial_traces",
) -> PyTree:
    """Compute the curvature of one batch for the structure `name` of `EXACT`. Each shape is compiled once.

    `shared_weights` chooses the factors of "kron"; other structures do not use it.
    """
    if name == "full":  # float64 is not known to JAX by default, so the function compiles its parts itself
        weights = likelihood.weights_of(batch.targets, batch.weights)
        options = {"points": batch.points, "microbatch": microbatch}
        return dense.ggn_in_float64(network, likelihood, batch.inputs, weights, **options)
    expansion = network.unlinearised()
    sizes = wide_row_sizes(expansion, batch.inputs, microbatch) if name == "diag" else None
    if sizes is not None and sites.of_sample(likelihood) is None:
        at = CurvatureAt.of_batch(network, likelihood, batch, microbatch=microbatch)
        return diagonal_by_rows(expansion, likelihood, batch.inputs, at, sizes)
    chosen = {"shared_weights": shared_weights} if name == "kron" else {}
    return _compiled_curvature(name, network, likelihood, batch, microbatch=microbatch, **chosen)


@partial(jax.jit, static_argnames=("name", "microbatch", "shared_weights"))
def _compiled_curvature(
    name: str, network: Network, likelihood: Likelihood, batch: Batch, *, microbatch: int, **chosen: str
) -> PyTree:
    function, _ = EXACT[name]
    options = {"weights": likelihood.weights_of(batch.targets, batch.weights), "points": batch.points, **chosen}
    return function(network, likelihood, network.params, batch.inputs, microbatch=microbatch, **options)


def exact_structure(name: str, curvature: PyTree, scale: Num[ArrayLike, ""], rounding: float = OF_FLOAT32) -> Structure:
    """Make the structure `name` of `EXACT` from the sum of its curvature over batches, multiplied by `scale`.

    `rounding` is the relative error of the derivatives.

    Raises
    ------
    ValueError
        If the curvature is not finite.
    """
    if name == "full":  # one matrix on the host, of which a copy would take as much memory
        return check_in_range(EXACT[name][1](curvature if scale == 1 else scale * curvature, rounding))
    structure, is_finite = _compiled_structure(name, curvature, scale, rounding)
    if not is_finite:
        raise not_finite(jax.tree.leaves(curvature)[0].dtype)
    return check_products(structure)


@partial(jax.jit, static_argnames="name")
def _compiled_structure(
    name: str, curvature: PyTree, scale: Num[ArrayLike, ""], rounding: Num[ArrayLike, ""]
) -> tuple[Structure, Bool[Array, ""]]:
    structure = EXACT[name][1](jax.tree.map(lambda leaf: scale * leaf, curvature), rounding)
    # The sums are checked, too: eigenvalues of a matrix with NaN may be finite.
    return structure, are_finite(jax.tree.leaves((curvature, structure)))


def _fit_products(model: Model, prior: Prior, options: KrylovOptions, *, microbatch: int) -> Fitted:
    """Fit the log likelihood, and a structure that needs several passes over the data."""
    count, num_weights = num_outputs(model), size(model.network.params)
    # A fault of the options is reported before a pass over the data if the number of outputs is known by then.
    if count is not None and count > options.max_vectors:
        options.check(num_weights)
    log_likelihood, scale = model.log_likelihood(microbatch=microbatch)
    log_likelihood.check()
    target = LogJoint(float(log_likelihood.value)), prior.squared_distance(model.network.params)
    structure = _structure_of_products(model, prior, scale, options, target, microbatch=microbatch)
    return Fitted(model.network, model.likelihood, prior, structure, log_likelihood)


def _structure_of_products(
    model: Model,
    prior: Prior,
    scale: float,
    options: KrylovOptions,
    evidence: tuple[LogJoint, float] | None = None,
    *,
    microbatch: int,
) -> Structure:
    """Fit all eigenpairs if there are few outputs or few weights, otherwise a Krylov decomposition by products.

    `evidence` is as for `fit_krylov`. The number of examples must be known.
    """
    # Not the number of targets, in which the weights of examples are.
    if _are_few_outputs(model, model.data.num_examples, options):
        return fit_spectral(model.whitened(prior), scale, microbatch=microbatch)
    if _are_few_weights(model, options):
        return _eigenpairs(model.whitened(prior), scale, microbatch=microbatch)
    # Weights that are scaled first are not layers, so rows are those of the network as it is.
    beside = memory_of(model, "lanczos", options.max_vectors).needed + bytes_of_images(model, options.max_vectors)
    model = model.with_rows(options.max_vectors, microbatch=microbatch, bytes_beside=beside)
    return fit_krylov(model.whitened(prior), scale, options, evidence, microbatch=microbatch)


def reads_factor(model: Model, name: str, num_examples: int | None, options: KrylovOptions) -> bool:
    """Whether a structure is made of columns of the factor B of the curvature, and not of products with it.

    If the number of examples is not known yet, "lanczos" counts as made of products.
    """
    few_outputs = num_examples is not None and _are_few_outputs(model, num_examples, options)
    return name == "full" or (name == "lanczos" and (few_outputs or _are_few_weights(model, options)))


def _are_few_outputs(model: Model, num_examples: int, options: KrylovOptions) -> bool:
    """Whether the factor of the curvature has no more rows than a Krylov basis would."""
    return num_examples * outputs_of_example(model) <= options.max_vectors


def _are_few_weights(model: Model, options: KrylovOptions) -> bool:
    """Whether one block of probes would span all weights."""
    return size(model.head.params) <= min(options.num_probes, options.max_vectors)


def fit_spectral(model: Model, scale: float, *, microbatch: int) -> SpectralStructure:
    """Compute all eigenpairs of G from its factor B' J, which has one row for each output of all data.

    Cost: one backward pass for each output, unless the model keeps rows, and the factorisation of N C rows of P
    numbers. They are in memory twice.
    """
    if model.rows is not None:
        rows = model.rows.ggn_factor(model.likelihood, model.curvature_at(microbatch=microbatch))
    else:
        rows = jnp.concatenate([_factor_rows(model.head, model.likelihood, batch) for batch in model.data])
    structure = _spectral(jnp.sqrt(scale) * rows, rounding_of(model))
    check_finite(structure.eigenvalues)
    return structure


def _eigenpairs(model: Model, scale: float, *, microbatch: int) -> SpectralStructure:
    """Compute all eigenpairs of G from its matrix, for a network with few weights."""
    step = partial(batch_curvature, "full", model.head, model.likelihood, microbatch=microbatch)
    matrix, _ = model.accumulate(step)
    check_finite(matrix)
    values, vectors = np.linalg.eigh(scale * matrix)
    dtype = number_type(model.head.params)
    with np.errstate(over="ignore"):  # the check below is the better message
        values = np.maximum(values, 0).astype(dtype)
    check_finite(values)
    rounding = jnp.asarray(rounding_of(model), dtype)
    return SpectralStructure(jnp.asarray(values), jnp.asarray(vectors.T, dtype), rounding)


@jax.jit
def _factor_rows(network: Network, likelihood: Likelihood, batch: Batch) -> Float[Array, "R P"]:
    """Compute the rows of B' J for one batch."""
    weights = likelihood.weights_of(batch.targets, batch.weights)
    return dense.factor_rows(network, likelihood, network.params, batch.inputs, weights, batch.points)


_spectral = jax.jit(SpectralStructure.fit)
