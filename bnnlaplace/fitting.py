"""From a network, a likelihood and data to what a fitted Laplace holds: the data's way through the stages."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace import features, memory, subset
from bnnlaplace.curvature import streamed
from bnnlaplace.data import Batch, Data, accumulate, check_fits_model
from bnnlaplace.data_terms import DataTerms, data_terms
from bnnlaplace.deterministic import check_deterministic
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.linear_mode import linear_mode
from bnnlaplace.log_joint import FixedNoise
from bnnlaplace.network import Network
from bnnlaplace.outline import Shapes, output_shape
from bnnlaplace.prior import Prior
from bnnlaplace.random_key import check_key
from bnnlaplace.structure import Structure
from bnnlaplace.structure import fit as structure_fit
from bnnlaplace.tree import number_type, ravel, size, unraveler


class Model(NamedTuple):
    """What is expanded, and how it is computed.

    Attributes
    ----------
    network
        A function of the weights with a posterior, at the centre of the expansion.
    head
        The same function of features that no such weight enters; `network` itself where there are none.
    likelihood
        p(y | f).
    data
        With inputs for `head`.
    """

    network: Network
    head: Network
    likelihood: Likelihood
    data: Data

    def at(self, params: PyTree) -> "Model":
        """The same, expanded elsewhere."""
        return self._replace(network=self.network.with_params(params), head=self.head.with_params(params))


class Fit(NamedTuple):
    """The centre of the expansion, the curvature there (in weights whose prior is isotropic), and the likelihood."""

    network: Network
    structure: Structure
    terms: DataTerms


def prepare(
    network: Network,
    likelihood: Likelihood,
    data: Data,
    selection: subset.Subset,
    *,
    linear: bool = False,
    microbatch: int = 64,
) -> Model:
    """Check data against the network, select the weights, and compute what precedes them once.

    Raises
    ------
    ValueError
        If the network is not deterministic, no weight is selected, or, while data are read for the first time, they do
        not fit.
    """
    first = data.first
    check_deterministic(network, first)
    data = data.checked(partial(check_fits_model, network, likelihood))
    chosen = subset.select(network, selection, first)
    # Where the posterior is over all weights nothing precedes them.
    cut = None if selection == "all" else features.cut(chosen, first)
    head = chosen if cut is None else cut.network
    if linear and not chosen.is_linearised:
        chosen, head = chosen.linearised(), head.linearised()
    if cut is not None:
        data = data.mapped(partial(features.compute, cut, microbatch=microbatch), features.most_bytes())
    return Model(chosen, head, likelihood, data)


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
    if mean == "linear" or hessian_structure not in structure_fit.EXACT:
        what = "mean='linear'" if mean == "linear" else f"hessian_structure={hessian_structure!r}"
        model.data.check_repeatable(f"fit(data=...) must be readable several times for {what}")
    estimate(model, hessian_structure, krylov_options["max_vectors"], microbatch).check()
    if mean == "linear":
        model = at_linear_mode(model, prior, num_data, microbatch=microbatch)
    if hessian_structure in structure_fit.EXACT:
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


def estimate(model: Model, hessian_structure: str, max_vectors: int, microbatch: int) -> memory.MemoryEstimate:
    """What `fit` needs at its peak; nothing is computed."""
    count, itemsize = size(model.head.params), number_type(model.head.params).itemsize
    kept = model.data.mapped_bytes
    if max_vectors < 1:
        raise ValueError(f"max_vectors=... must be at least 1; got {max_vectors}; try 512")
    if hessian_structure == "lanczos":
        one = 2 * count * itemsize
        outputs = _num_outputs(model)
        if outputs is not None:  # of few outputs all rows of B' J are the basis
            max_vectors = min(max_vectors, outputs)
        free = memory.free_bytes()
        most = max_vectors if free is None else max(0, free - kept) // one
        fits = f" (at most {most} fit)" if most < max_vectors else ""
        shrink = (
            f"lower max_vectors, now {max_vectors}{fits}, use hessian_structure='diag', or give fewer weights a "
            "posterior with subset_of_weights"
        )
        return memory.MemoryEstimate(kept + one * max_vectors, free, shrink)
    if hessian_structure == "kron":
        batch = Batch(Shapes.of_example(model.data.first).batch(1), None, jnp.ones(1))
        curvature = partial(structure_fit.batch_curvature, hessian_structure, microbatch=1)
        result = jax.eval_shape(curvature, model.head, model.likelihood, batch)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(result))
    else:
        held = count**2 * itemsize if hessian_structure == "full" else count * itemsize
    # The sum over batches, a batch's share of it, and what an eigendecomposition takes besides.
    copies = 2 if hessian_structure == "diag" else 4
    shrink = "give fewer weights a posterior with subset_of_weights"
    if hessian_structure != "diag":
        shrink = f"use hessian_structure='diag', or 'lanczos' with few max_vectors, or {shrink}"
    return memory.MemoryEstimate(kept + copies * held, memory.free_bytes(), shrink)


def _num_outputs(model: Model) -> int | None:
    """Of all examples, where their number is known before they are read."""
    if model.data.length is None:
        return None
    return model.data.length * math.prod(output_shape(model.head, model.data.first)[1:])


def _fit_exact(model: Model, prior: Prior, name: str, num_data: int | None, *, microbatch: int) -> Fit:
    # Derivatives of single examples are alive: half of the examples of other passes keeps memory level, but where the
    # matrix is larger than they are.
    few = microbatch if name == "full" else max(1, microbatch // 2)

    def step(batch: Batch) -> tuple[DataTerms, Any]:
        curvature = structure_fit.batch_curvature(name, model.head, model.likelihood, batch, microbatch=few)
        return _batch_terms(model, batch, microbatch=microbatch), curvature

    terms, curvature = accumulate(model.data, step)
    scale = scale_of(model.data, num_data)
    structure = structure_fit.exact_structure(name, curvature, scale)
    if prior.relative is not None:
        structure = structure.whitened(prior.relative)
    return Fit(model.network, structure, _scaled(terms, scale).check())


def _fit_products(
    model: Model, prior: Prior, num_data: int | None, *, microbatch: int, max_vectors: int, **krylov_options: Any
) -> Fit:
    def check_options() -> None:
        check_key(krylov_options["key"], "fit(key=...), which seeds the probes of 'lanczos',")
        num_probes, target_precision = (krylov_options[name] for name in ("num_probes", "target_precision"))
        structure_fit.check_block(num_probes, max_vectors, target_precision, size(model.network.params))

    known = _num_outputs(model)
    if known is not None and known > max_vectors:  # before a pass over the data rather than after it
        check_options()
    terms = _terms(model, num_data, microbatch=microbatch).check()
    scale = scale_of(model.data, num_data)
    white = _whitened(model, prior)
    arguments = (white.head, model.likelihood, model.data, scale)
    if int(terms.num_outputs / scale) <= max_vectors:
        return Fit(model.network, structure_fit.fit_spectral(*arguments), terms)
    check_options()
    structure = structure_fit.fit_krylov(
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
