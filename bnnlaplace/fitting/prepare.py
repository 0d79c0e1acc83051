"""Check the data against the network, select the weights, compute their features once; estimate the memory of a fit."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks, memory
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.keep import keep
from bnnlaplace.curvature.kept import CurvatureAt, GGNFactors, KeptRows
from bnnlaplace.curvature.streamed import primal_product
from bnnlaplace.evidence.log_likelihood import LogLikelihood, batch_log_likelihood
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.model import features, subset
from bnnlaplace.model.batched import check_microbatch
from bnnlaplace.model.data import Batch, Data, accumulate, check_fits_model
from bnnlaplace.model.determinism import check_deterministic
from bnnlaplace.model.jaxpr import derivative_rounding
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import sites
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, Shapes, output_shape
from bnnlaplace.prior import Prior

Total = TypeVar("Total")


class Model(NamedTuple):
    """The network to be expanded around its weights, and the data for it.

    Attributes
    ----------
    network
        A function of the weights with a posterior, at the centre of the expansion.
    head
        The same function of the features, if the weights with a posterior follow features; otherwise `network` itself.
    likelihood
        p(y | f).
    data
        With inputs for `head`.
    num_data
        The size of the whole training set; None if `data` is all of it.
    rows
        The rows of the head's Jacobian at the data, if they are kept.
    """

    network: Network
    head: Network
    likelihood: Likelihood
    data: Data
    num_data: int | None = None
    rows: KeptRows | None = None

    def at(self, params: PyTree) -> "Model":
        """The same model, expanded at other weights."""
        rows = self.rows if self.network.is_linearised else None
        return self._replace(network=self.network.with_params(params), head=self.head.with_params(params), rows=rows)

    def with_rows(self, num_products: int, *, microbatch: int, bytes_beside: int) -> "Model":
        """The same model, which keeps the rows of its Jacobian if `keep` finds that they pay and fit.

        Call it after a pass over the data. `num_products` GGN products are expected, and the rest of the fit needs
        `bytes_beside`.
        """
        if self.rows is not None:
            return self
        options = {"num_products": num_products, "microbatch": microbatch, "bytes_beside": bytes_beside}
        return self._replace(rows=keep(self.head, self.data, **options))

    def whitened(self, prior: Prior) -> "Model":
        """The model as a function of the weights times sqrt(D), in which the prior is isotropic."""
        if prior.is_isotropic:  # weights that are scaled first are not layers: curvature would be slower for them
            return self
        factors = prior.whiten(jnp.ones_like(prior.relative))
        rows = None if self.rows is None else self.rows.scaled(factors)
        return self._replace(network=self.network.scaled(factors), head=self.head.scaled(factors), rows=rows)

    def ggn_product(self, scale: float, *, microbatch: int) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
        """Return the function V -> V G of S rows at once. Without rows each call is a pass over the data."""
        if self.rows is None:
            return primal_product(self.head, self.likelihood, self.data, scale, microbatch=microbatch)
        return self.rows.ggn_product(self.likelihood, self.curvature_at(microbatch=microbatch), scale)

    def ggn_factors(self, scale: float, *, microbatch: int) -> GGNFactors | None:
        """Return the products with R and R' of G = R' R, if rows are kept and the likelihood has such factors."""
        # Curvature that is a mean over samples has no factor of one column for each output.
        if self.rows is None or sites.of_sample(self.likelihood) is not None:
            return None
        return self.rows.ggn_factors(self.likelihood, self.curvature_at(microbatch=microbatch), scale)

    def curvature_at(self, *, microbatch: int) -> list[CurvatureAt]:
        """Where the curvature of each batch is evaluated: at its points, or at the outputs."""
        # Rows come with the outputs of the network that they are of.
        kept = None if self.rows is None or self.head.is_linearised else self.rows.outputs
        return [
            CurvatureAt.of_batch(
                self.head,
                self.likelihood,
                batch if kept is None or batch.points is not None else batch._replace(points=kept[number]),
                microbatch=microbatch,
            )
            for number, batch in enumerate(self.data)
        ]

    def accumulate(self, step: Callable[[Batch], Total]) -> tuple[Total, float]:
        """Sum `step` over the batches in one pass; return it with (all training examples) / (examples in `data`).

        An example counts as many times as its weight says.
        """
        total, _ = accumulate(self.data, step)
        return total, self.scale()

    def scale(self) -> float:
        """(all training examples) / (examples in `data`), known after a pass."""
        count = self.data.total_weight
        if self.num_data is not None and self.num_data < count:
            raise ValueError(
                f"fit(num_data=...) must be the size of the whole training set, so at least that of data, "
                f"{count:.15g}; got {self.num_data}"
            )
        return 1.0 if self.num_data is None else self.num_data / count

    def batch_log_likelihood(self, batch: Batch, *, microbatch: int) -> LogLikelihood:
        """The log likelihood of one batch, and its gradient."""
        inputs, targets, weights, _ = batch
        arguments = self.head, self.likelihood, self.head.params, inputs, targets, weights
        return batch_log_likelihood(*arguments, microbatch=microbatch)

    def log_likelihood(self, *, microbatch: int) -> tuple[LogLikelihood, float]:
        """The log likelihood of all training examples, estimated from `data` in one pass, and the scale of `data`."""
        total, scale = self.accumulate(partial(self.batch_log_likelihood, microbatch=microbatch))
        return total.scaled(scale), scale


def prepare(
    state: Unfitted | Fitted,
    settings: Settings,
    data: Data,
    *,
    linear: bool = False,
    microbatch: int = 64,
    num_data: int | None = None,
) -> Model:
    """Check the data against the network, select the weights, and compute the features before them once.

    `linear` linearises the network at its weights.

    Raises
    ------
    ValueError
        If the network is not deterministic, no weight is selected, the selected ones do not reach all outputs, or the
        data do not fit (found while they are read for the first time).
    """
    network, likelihood, selection = state.network, state.likelihood, settings.subset_of_weights
    check_microbatch(microbatch)
    first = data.first
    check_deterministic(network, first)
    data = data.checked(partial(check_fits_model, network, likelihood))
    chosen = subset.select(network, selection, first)
    # Nothing precedes the weights if all of them get a posterior.
    cut = None if selection == "all" else features.cut(chosen, first)
    head = chosen if cut is None else cut.network
    if linear and not chosen.is_linearised:
        chosen, head = chosen.linearised(), head.linearised()
    if cut is not None:
        data = data.mapped(partial(features.compute, cut, microbatch=microbatch), features.memory_limit())
    return Model(chosen, head, likelihood, data, num_data)


def memory_estimate(
    state: Unfitted | Fitted, settings: Settings, data: Data, *, max_vectors: int, microbatch: int
) -> memory.MemoryEstimate:
    """How much memory a fit needs at its peak, from the first batch of the data."""
    data.check_restarts("memory_estimate(data=...) must be readable again, as its first batch is used")
    model = prepare(state, settings, data.few(), microbatch=microbatch)
    return memory_of(model, settings.hessian_structure, max_vectors)


def memory_of(model: Model, hessian_structure: str, max_vectors: int) -> memory.MemoryEstimate:
    """How much memory the fit of a prepared model needs at its peak. Nothing is computed for it."""
    max_vectors = checks.count(max_vectors, "max_vectors=...", advice="try 512")
    weight_bytes = size(model.head.params) * number_type(model.head.params).itemsize
    feature_bytes = model.data.mapped_bytes
    if hessian_structure == "lanczos":
        vector_bytes = 2 * weight_bytes  # a basis vector, and its copy while a block is appended
        outputs = num_outputs(model)
        if outputs is not None:  # for few outputs the basis is the rows of B' J
            max_vectors = min(max_vectors, outputs)
        free = memory.free_bytes()
        num_fitting = max_vectors if free is None else max(0, free - feature_bytes) // vector_bytes
        fits = f" (at most {num_fitting} fit)" if num_fitting < max_vectors else ""
        shrink = (
            f"lower max_vectors, now {max_vectors}{fits}, use hessian_structure='diag', or give fewer weights a "
            "posterior with subset_of_weights"
        )
        return memory.MemoryEstimate(feature_bytes + vector_bytes * max_vectors, free, shrink)
    # Two copies are the sum over batches and the curvature of one batch. A matrix takes two more to be decomposed.
    copies = 2 if hessian_structure == "diag" else 4
    shrink = "give fewer weights a posterior with subset_of_weights"
    if hessian_structure != "diag":
        shrink = f"use hessian_structure='diag', or 'lanczos' with few max_vectors, or {shrink}"
    curvature_bytes = {
        "diag": lambda: weight_bytes,
        "kron": lambda: _kronecker_bytes(model),
        "full": lambda: 8 * size(model.head.params) ** 2,  # in float64
    }[hessian_structure]()
    return memory.MemoryEstimate(feature_bytes + copies * curvature_bytes, memory.free_bytes(), shrink)


def bytes_of_images(model: Model, max_vectors: int) -> int:
    """Bytes of the images of a Krylov basis under the factor of G, where rows are kept, and of their copy.

    The number of examples must be known.
    """
    num_numbers = max_vectors * model.data.num_examples * outputs_of_example(model)
    return 2 * num_numbers * number_type(model.head.params).itemsize


def _kronecker_bytes(model: Model) -> int:
    """Bytes of the Kronecker factors, by abstract evaluation for one example."""
    example = Shapes.of_example(model.data.first).batch(1)
    sums = jax.eval_shape(_factors_of_one, model.head, model.likelihood, example)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sums))


@jax.jit  # never run: it makes JAX remember the trace for the next fit
def _factors_of_one(network: Network, likelihood: Likelihood, inputs: PyTree) -> list[kronecker.LeafSums]:
    return kronecker.factors(network, likelihood, network.params, inputs, weights=jnp.ones(1), microbatch=1)


def num_outputs(model: Model) -> int | None:
    """The number of outputs of all examples; None if the number of examples is not known before they are read."""
    if model.data.length is None:
        return None
    return model.data.length * outputs_of_example(model)


def outputs_of_example(model: Model) -> int:
    """The number of outputs of one example, at all its positions."""
    return math.prod(output_shape(model.head, model.data.first)[1:])


def rounding_of(model: Model) -> float:
    """Relative error of the derivatives of a model, from the type in which its network computes."""
    return derivative_rounding(NetworkSpec.of(model.head, model.data.first))
