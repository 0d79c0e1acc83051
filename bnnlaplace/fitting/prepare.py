"""Check data against the network, select the weights and compute their features once; how much memory a fit takes."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bnnlaplace.core import memory
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.curvature import kronecker
from bnnlaplace.model import features, subset
from bnnlaplace.model.data import Batch, Data, check_fits_model
from bnnlaplace.model.determinism import check_deterministic
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes, output_shape


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

        def of_batch(network: Network, likelihood: Likelihood, batch: Batch) -> Any:
            return kronecker.factors(
                network, likelihood, network.params, batch.inputs, weights=batch.weights, microbatch=1
            )

        result = jax.eval_shape(of_batch, model.head, model.likelihood, batch)
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
