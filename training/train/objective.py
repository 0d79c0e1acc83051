"""The network as training sees it: log-likelihood, its gradient, and the gradient of the log joint.

There are two modes. Live: batch statistics come from the batch, and drop-path is on. Frozen: batch statistics are fixed
and drop-path is off, so the network is the deterministic function that a Laplace approximation expands.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from training.train.prior import by_leaf

Batches = Iterable[tuple[Any, Any, Any]]
"""Images, labels and mask of batches of one shape."""


Totals = tuple[jax.Array, jax.Array]
"""Negative log-likelihood in nats and number of correct predictions, summed over a batch."""


class Passes(NamedTuple):
    """The passes over one batch. Each compiles at its first call."""

    initialise: Callable[[jax.Array, Any], tuple[Any, Any]]
    """(key, images) -> params, batch_stats"""
    live_gradient: Callable[..., Any]
    """(params, batch_stats, images, labels, key) -> (nll, (correct, batch_stats)), gradient. Compiles with the step."""
    frozen_gradient: Callable[..., Any]
    """(params, batch_stats, images, labels, mask) -> (nll, correct), gradient"""
    frozen_totals: Callable[..., Totals]
    """(params, batch_stats, images, labels, mask) -> nll, correct"""


class JointGradient(NamedTuple):
    """Euclidean norms of gradients at one point, in nats per unit of weight."""

    norm: float
    """Norm of the gradient of log p(D, theta) over all training images."""
    prior_norm: float
    """Norm of the gradient of the prior alone, prior_precision * |theta|."""


def make_passes(module: nn.Module) -> Passes:
    """Build the passes of a Flax module.

    Parameters
    ----------
    module
        ``module.apply(variables, images, train=..., rngs={"drop_path": key})`` returns logits, for images as they are
        stored.

    Notes
    -----
    ``nll`` and ``correct`` are sums over the batch, or over the images that the mask leaves in.
    """

    def initialise(key: jax.Array, images: Any) -> tuple[Any, Any]:
        variables = module.init({"params": key, "drop_path": key}, images, train=False)
        return variables["params"], variables.get("batch_stats", {})

    def live_totals(params: Any, batch_stats: Any, images: Any, labels: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, updates = module.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )
        # Live batches are never padded: padding would enter the batch statistics.
        nll, correct = _totals(logits, labels, np.ones(labels.shape, bool))
        return nll, (correct, updates.get("batch_stats", batch_stats))

    def frozen_totals(params: Any, batch_stats: Any, images: Any, labels: Any, mask: Any) -> Totals:
        logits = module.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
        return _totals(logits, labels, mask)

    return Passes(
        initialise=jax.jit(initialise),
        live_gradient=jax.value_and_grad(live_totals, has_aux=True),
        frozen_gradient=jax.jit(jax.value_and_grad(frozen_totals, has_aux=True)),
        frozen_totals=jax.jit(frozen_totals),
    )


def _totals(logits: jax.Array, labels: Any, mask: Any) -> Totals:
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(-1) == labels
    # `where` rather than a product: the loss of a padded image could be NaN, and NaN times zero is NaN.
    return jnp.where(mask, nll, 0.0).sum(), (mask & correct).sum(dtype=jnp.int32)


def evaluate(passes: Passes, params: Any, batch_stats: Any, batches: Batches) -> tuple[float, float]:
    """Compute the mean negative log-likelihood (nats) and the accuracy of the frozen network."""
    nll = correct = count = 0.0
    for images, labels, mask in batches:
        batch_nll, batch_correct = passes.frozen_totals(params, batch_stats, images, labels, mask)
        nll, correct, count = nll + float(batch_nll), correct + int(batch_correct), count + int(mask.sum())
    return nll / count, correct / count


def joint_gradient(
    passes: Passes, params: Any, batch_stats: Any, prior_precision: Any, batches: Batches
) -> JointGradient:
    """Measure how far the frozen network is from a mode of the log joint, over the whole training set.

    Notes
    -----
    `prior_precision` is one number, or a dictionary with one for each layer. It costs one gradient of the training set.
    The batches are summed in float64, because at a mode the gradients of likelihood and prior cancel.
    """
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    precisions = [np.float64(number) for number in jax.tree.leaves(by_leaf(prior_precision, params))]
    total = [precision * leaf for precision, leaf in zip(precisions, leaves, strict=True)]
    prior_norm = norm_of(total)
    for images, labels, mask in batches:
        _, gradient = passes.frozen_gradient(params, batch_stats, images, labels, mask)
        terms = jax.tree.leaves(gradient)
        total = [leaf + np.asarray(term, np.float64) for leaf, term in zip(total, terms, strict=True)]
    return JointGradient(norm_of(total), prior_norm)


def norm_of(tree: Any) -> float:
    """Return the Euclidean norm of all leaves together, in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))
