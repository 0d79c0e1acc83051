"""The exact population statistics of batch normalisation, for a network that is about to be frozen.

During training a batch-normalised layer divides by the statistics of its batch and keeps a running average of them,
taken while the weights were still moving. Frozen, the network should divide by the mean and variance that the
layer's input has over the training set - with all earlier layers normalised by theirs. That is what one batch of the
whole set would compute. It is found here in bounded memory, as the fixed point of: pass over the set in order with
the present statistics, measure the input of every layer, replace them all. After k passes the first k layers are
exact, so as many passes as there are layers always suffice; in practice a few do.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Moments = dict[str, tuple[Any, Any, Any]]

# Of the standard deviation; the variance that flax adds before dividing keeps layers without variation out of this.
TOLERANCE = 1e-5
_EPSILON = 1e-5


def make_moments(module: nn.Module, prepare: Callable[[Any], Any]) -> Callable[..., Moments]:
    """Build the compiled measurement of one batch.

    Parameters
    ----------
    module
        A network whose only batch statistics are those of `flax.linen.BatchNorm` layers.
    prepare
        From stored images to the network's input.

    Returns
    -------
    moments(params, batch_stats, images, mask)
        For every layer, by its path: the sums over the unmasked images (and pixels) of the input minus the present
        mean, and of its square, per channel; and the number of terms in each sum. Measured from the present mean,
        which is near the new one, they lose no digits to cancellation.
    """

    def moments(params: Any, batch_stats: Any, images: jax.Array, mask: jax.Array) -> Moments:
        measured: Moments = {}

        def measure(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
                present = layer.variables["batch_stats"]["mean"]
                inputs = jnp.moveaxis(args[0].astype(present.dtype), layer.axis, -1)
                weights = mask.reshape(-1, *[1] * (inputs.ndim - 1))
                centred = jnp.where(weights, inputs - present, 0.0)
                others = tuple(range(inputs.ndim - 1))
                count = mask.sum() * (inputs[0, ..., 0].size)
                measured["/".join(layer.path)] = centred.sum(others), jnp.square(centred).sum(others), count
            return call(*args, **kwargs)

        with nn.intercept_methods(measure):
            module.apply({"params": params, "batch_stats": batch_stats}, prepare(images), train=False)
        return measured

    return jax.jit(moments)


def population_statistics(
    moments: Callable[..., Moments], params: Any, batch_stats: Any, batches: Callable[[], Iterable[tuple[Any, Any]]]
) -> Any:
    """Replace running statistics by those of the whole data set.

    Parameters
    ----------
    moments
        From `make_moments`.
    params, batch_stats
        The network.
    batches
        Called for every pass: the (images, mask) batches of the data set, unaugmented, in a fixed order.

    Returns
    -------
    Pytree like ``batch_stats``, NumPy arrays: mean and (biased) variance over all images and pixels.

    Raises
    ------
    TypeError
        Some batch statistics do not belong to a `flax.linen.BatchNorm` layer.
    """
    layers = _layers(batch_stats)
    for _ in layers:
        change = 0.0
        totals: dict[str, list[np.ndarray]] = {}
        for images, mask in batches():
            for name, sums in moments(params, _nested(layers), images, mask).items():
                held = totals.setdefault(name, [np.zeros(())] * 3)
                totals[name] = [total + np.asarray(term, np.float64) for total, term in zip(held, sums, strict=True)]
        if missing := sorted(layers.keys() - totals.keys()):
            raise TypeError(
                f"batch statistics must belong to flax.linen.BatchNorm layers; got others at {missing[0]!r}; "
                "use that layer"
            )
        for name, (first, second, count) in totals.items():
            mean, var = layers[name]
            shift = first / count
            new = (mean + shift).astype(mean.dtype), (second / count - shift**2).astype(var.dtype)
            scale = np.sqrt(new[1] + _EPSILON)
            change = max(change, np.max(np.abs(shift) / scale), np.max(np.abs(new[1] - var) / scale**2))
            layers[name] = new
        if change < TOLERANCE:
            break
    return _nested(layers)


def _layers(batch_stats: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of every layer by its path."""
    flat = jax.tree_util.tree_flatten_with_path(batch_stats)[0]
    found: dict[str, dict[str, np.ndarray]] = {}
    for keys, leaf in flat:
        *path, field = (key.key for key in keys)
        found.setdefault("/".join(path), {})[field] = np.asarray(leaf)
    return {name: (fields["mean"], fields["var"]) for name, fields in found.items()}


def _nested(layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    tree: dict[str, Any] = {}
    for name, (mean, var) in layers.items():
        node = tree
        for key in name.split("/") if name else ():
            node = node.setdefault(key, {})
        node.update(mean=mean, var=var)
    return tree
