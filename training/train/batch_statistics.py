"""The exact population statistics of batch normalisation, for a network that is about to be frozen.

During training a batch-normalised layer divides by the statistics of its batch, and keeps a running average of them
while the weights still move. The frozen network should use the mean and variance of the layer's input over the whole
training set, with all earlier layers normalised in the same way. One batch of the whole set would give these numbers.
Here they are found in bounded memory by fixed-point iteration: pass over the set in order with the present statistics,
measure the input of every layer, and replace all statistics. After k passes the first k layers are exact. So as many
passes as there are layers always suffice, and in practice a few do.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Moments = dict[str, tuple[Any, Any, Any]]

TOLERANCE = 1e-5
"""The iteration ends if no mean changes by more than this fraction of the standard deviation, and no variance by more
than this fraction of itself."""
_EPSILON = 1e-5  # Flax adds it to the variance before it divides, so a layer without variation does not matter here.


def make_moments(module: nn.Module) -> Callable[..., Moments]:
    """Build the compiled measurement of one batch.

    Parameters
    ----------
    module
        A network whose only batch statistics are those of `flax.linen.BatchNorm` layers.

    Returns
    -------
    moments(params, batch_stats, images)
        For every layer, by its path: per channel, the sum over all images and pixels of the input minus the present
        mean, the sum of its square, and the number of terms. The present mean is near the new one, so the sums lose no
        digits to cancellation.
    """

    def moments(params: Any, batch_stats: Any, images: jax.Array) -> Moments:
        measured: Moments = {}

        def measure(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
                present = layer.variables["batch_stats"]["mean"]
                centred = jnp.moveaxis(args[0].astype(present.dtype), layer.axis, -1) - present
                centred = centred.reshape(-1, present.size)
                measured["/".join(layer.path)] = centred.sum(0), jnp.square(centred).sum(0), jnp.float32(len(centred))
            return call(*args, **kwargs)

        with nn.intercept_methods(measure):
            module.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
        return measured

    return jax.jit(moments)


def population_statistics(
    moments: Callable[..., Moments], params: Any, batch_stats: Any, batches: Callable[[], Iterable[tuple[Any, float]]]
) -> Any:
    """Replace running statistics by those of the whole data set.

    Parameters
    ----------
    moments
        From `make_moments`.
    params, batch_stats
        The network.
    batches
        It is called for every pass. It gives the images of the data set, unaugmented, in batches of one shape and in a
        fixed order, each batch with the weight of its sums (`training.train.batches.weighted_batches`).

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
        totals: dict[str, tuple[Any, ...]] = {}
        for images, weight in batches():
            for name, sums in moments(params, _nested(layers), images).items():
                so_far = totals.get(name, (0.0, 0.0, 0.0))
                totals[name] = tuple(a + weight * np.asarray(b, np.float64) for a, b in zip(so_far, sums, strict=True))
        for name in layers.keys() - totals.keys():
            raise _other_statistics(name)
        for name, (first, second, count) in totals.items():
            mean, var = layers[name]
            shift = first / count
            # Rounding can make a variance of zero slightly negative.
            new = (mean + shift).astype(mean.dtype), np.maximum(second / count - shift**2, 0.0).astype(var.dtype)
            scale = np.sqrt(new[1] + _EPSILON)
            change = max(change, np.max(np.abs(shift) / scale), np.max(np.abs(new[1] - var) / scale**2))
            layers[name] = new
        if change < TOLERANCE:
            break
    return _nested(layers)


def _layers(batch_stats: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return mean and variance of every layer by its path."""
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(batch_stats)[0]:
        *path, field = (key.key for key in keys)
        statistics.setdefault("/".join(path), {})[field] = np.asarray(leaf)
    for name, fields in statistics.items():
        if fields.keys() != {"mean", "var"}:
            raise _other_statistics(name)
    return {name: (fields["mean"], fields["var"]) for name, fields in statistics.items()}


def _other_statistics(name: str) -> TypeError:
    return TypeError(f"batch statistics must belong to flax.linen.BatchNorm layers; got others at {name!r}; use these")


def _nested(layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Return the nested dictionaries that `_layers` flattened."""
    tree: dict[str, Any] = {}
    for name, (mean, var) in layers.items():
        node = tree
        for key in name.split("/") if name else ():
            node = node.setdefault(key, {})
        node.update(mean=mean, var=var)
    return tree
