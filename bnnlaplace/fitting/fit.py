"""From a prepared model and a prior to the fitted posterior."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.checks import check_key
from bnnlaplace.core.tree import number_type, ravel, size, unraveler
from bnnlaplace.curvature import dense, diagonal, kronecker, streamed
from bnnlaplace.evidence.log_joint import FixedNoise
from bnnlaplace.evidence.log_likelihood import DataTerms, data_terms
from bnnlaplace.fitting.krylov import check_block, fit_krylov
from bnnlaplace.fitting.mode import linear_mode
from bnnlaplace.fitting.prepare import Model, _num_outputs, estimate
from bnnlaplace.model.data import Batch, Data, accumulate
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Prior
from bnnlaplace.structure import Structure
from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.kronecker import KroneckerStructure
from bnnlaplace.structure.spectral import SpectralStructure

# The curvature of a batch, which adds up over batches, and the structure from the sum.
EXACT: dict[str, tuple[Callable[..., Any], Callable[[Any], Structure]]] = {
    "diag": (diagonal.ggn_diagonal, DiagonalStructure),
    "kron": (kronecker.factors, KroneckerStructure.fit),
    "full": (dense.ggn, DenseStructure.fit),
}


class Fit(NamedTuple):
    """The centre of the expansion, the curvature there (in weights whose prior is isotropic), and the likelihood."""

    network: Network
    structure: Structure
    terms: DataTerms


def fit(
    model: Model,
    prior: Prior,
    hessian_structure: str,
    *,
    mean: Literal["network", "linear"],
    num_data: int | None,
    microbatch: int,
    **krylov_options: Any,
) -> Fit:
    """Compute the curvature, at the weights or, for `mean` "linear", at the mode of the linearised network.

    One pass over the data serves a structure of `structure.fit.EXACT`, so that they may be such as can be read once.
    Parameters and errors are those of `Laplace.fit`.
    """
    if mean == "linear" or hessian_structure not in EXACT:
        what = "mean='linear'" if mean == "linear" else f"hessian_structure={hessian_structure!r}"
        model.data.check_repeatable(f"fit(data=...) must be readable several times for {what}")
    estimate(model, hessian_structure, krylov_options["max_vectors"], microbatch).check()
    if mean == "linear":
        model = at_linear_mode(model, prior, num_data, microbatch=microbatch)
    if hessian_structure in EXACT:
        return _fit_exact(model, prior, hessian_structure, num_data, microbatch=microbatch)
    return _fit_products(model, prior, num_data, microbatch=microbatch, **krylov_options)


def scale_of(data: Data, num_data: int | None) -> float:
    """(all training examples) / (examples seen), once the data have been read."""
    if num_data is not None and num_data < data.num_examples:
        raise ValueError(
            "fit(num_data=...) must be the size of the whole training set, so at least that of data, "
            f"{data.num_examples}; got {num_data}"
        )
    return 1.0 if num_data is None else num_data / data.num_examples


def at_linear_mode(model: Model, prior: Prior, num_data: int | None, *, microbatch: int) -> Model:
    """The linearised network at the mode of its log joint; see `bnnlaplace.linear_mode`."""
    white = _whitened(model, prior)
    unravel = unraveler(white.head.params)
    dtype = number_type(white.head.params)
    whitened_mean = None if prior.mean is None else np.asarray(prior.mean / prior.whiten(jnp.ones_like(prior.mean)))

    def terms(point: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        found = _terms(white.at(unravel(jnp.asarray(point, dtype))), num_data, microbatch=microbatch)
        return float(found.log_likelihood), np.asarray(found.log_likelihood_gradient, np.float64)

    def product(point: Float[np.ndarray, " P"], vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        there = white.at(unravel(jnp.asarray(point, dtype)))
        rows = jnp.asarray(vector, dtype).reshape(1, -1)
        return np.asarray(_product(there, num_data, microbatch=microbatch)(rows)[0], np.float64)

    found = linear_mode(
        terms,
        product,
        ravel(white.head.params),
        prior_precision=float(prior.precision),
        prior_mean=whitened_mean,
    )
    params = unraveler(model.network.params)(prior.whiten(jnp.asarray(found, dtype)))
    return model.at(params)


def _fit_exact(model: Model, prior: Prior, name: str, num_data: int | None, *, microbatch: int) -> Fit:
    # Derivatives of single examples are alive: half of the examples of other passes keeps memory level, but where the
    # matrix is larger than they are.
    few = microbatch if name == "full" else max(1, microbatch // 2)

    def step(batch: Batch) -> tuple[DataTerms, Any]:
        curvature = batch_curvature(name, model.head, model.likelihood, batch, microbatch=few)
        return _batch_terms(model, batch, microbatch=microbatch), curvature

    terms, curvature = accumulate(model.data, step)
    scale = scale_of(model.data, num_data)
    structure = exact_structure(name, curvature, scale)
    if prior.relative is not None:
        structure = structure.whitened(prior.relative)
    return Fit(model.network, structure, _scaled(terms, scale).check())


def _fit_products(
    model: Model, prior: Prior, num_data: int | None, *, microbatch: int, max_vectors: int, **krylov_options: Any
) -> Fit:
    def check_options() -> None:
        check_key(krylov_options["key"], "fit(key=...), which seeds the probes of 'lanczos',")
        num_probes, target_precision = (krylov_options[name] for name in ("num_probes", "target_precision"))
        check_block(num_probes, max_vectors, target_precision, size(model.network.params))

    known = _num_outputs(model)
    if known is not None and known > max_vectors:  # before a pass over the data rather than after it
        check_options()
    terms = _terms(model, num_data, microbatch=microbatch).check()
    scale = scale_of(model.data, num_data)
    white = _whitened(model, prior)
    arguments = (white.head, model.likelihood, model.data, scale)
    if int(terms.num_outputs / scale) <= max_vectors:
        return Fit(model.network, fit_spectral(*arguments), terms)
    check_options()
    structure = fit_krylov(
        *arguments,
        log_joint=FixedNoise(float(terms.log_likelihood)),
        squared_norm=prior.squared_distance(model.network.params),
        max_vectors=max_vectors,
        microbatch=microbatch,
        **krylov_options,
    )
    return Fit(model.network, structure, terms)


def _whitened(model: Model, prior: Prior) -> Model:
    """The model as a function of weights whose prior is isotropic."""
    if prior.relative is None:
        return model
    factors = prior.whiten(jnp.ones_like(prior.relative))
    return model._replace(network=model.network.scaled(factors), head=model.head.scaled(factors))


def _terms(model: Model, num_data: int | None, *, microbatch: int) -> DataTerms:
    found = accumulate(model.data, partial(_batch_terms, model, microbatch=microbatch))
    return _scaled(found, scale_of(model.data, num_data))


def _batch_terms(model: Model, batch: Batch, *, microbatch: int) -> DataTerms:
    return data_terms(model.head, model.likelihood, model.head.params, *batch, microbatch=microbatch)


def _scaled(terms: DataTerms, scale: float) -> DataTerms:
    return jax.tree.map(lambda part: scale * part, terms)


def _product(model: Model, num_data: int | None, *, microbatch: int) -> Callable[[Array], Array]:
    scale = scale_of(model.data, num_data)
    return streamed.primal_product(model.head, model.likelihood, model.data, scale, microbatch=microbatch)


@partial(jax.jit, static_argnames=("name", "microbatch"))
def batch_curvature(name: str, network: Network, likelihood: Likelihood, batch: Batch, *, microbatch: int) -> Any:
    """The curvature of one batch for the structure `name` of `EXACT`, compiled once per shape."""
    function, _ = EXACT[name]
    options = {"weights": batch.weights, "microbatch": microbatch}
    return function(network, likelihood, network.params, batch.inputs, **options)


@partial(jax.jit, static_argnames="name")
def exact_structure(name: str, curvature: Any, scale: float) -> Structure:
    """The structure `name` of `EXACT` from the sum over batches, times `scale`."""
    return EXACT[name][1](jax.tree.map(lambda part: scale * part, curvature))


def fit_spectral(network: Network, likelihood: Likelihood, data: Data, scale: float) -> SpectralStructure:
    """All eigenpairs of G by its factor B' J, one row for each output: for data with few outputs.

    Cost: one backward pass an output, and the factorisation of N C rows of P numbers, which are in memory twice.
    """
    rows = [_factor_rows(network, likelihood, batch) for batch in data]
    return _spectral(jnp.sqrt(scale) * jnp.concatenate(rows))


@jax.jit
def _factor_rows(network: Network, likelihood: Likelihood, batch: Batch) -> Float[Array, "R P"]:
    return dense.factor_rows(network, likelihood, network.params, batch.inputs, batch.weights)


_spectral = jax.jit(SpectralStructure.fit)
