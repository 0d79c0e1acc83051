"""Frozen batch normalisation, folded into the kernels beside it: the same function of the images, of fewer weights.

Where batch statistics are frozen, a normalisation is the affine map x -> a x + c of each channel, with

    a = scale / sqrt(var + eps),   c = bias - a mean.

A convolution with kernel K and bias b before it becomes one with a K and a b + c. A pointwise layer after it that alone
reads its output becomes one with kernel a K (by input channels) and bias b + K' c. In a Visual Attention Network the
first holds for the patch embeddings, the second for the MLPs. The normalisation before an attention is read by its
skip connection, too: it stays, as an affine map with a as its scale and c as its bias.

A posterior depends on this choice although the function does not: the prior is on other numbers, and directions in
which scales and kernels undo each other are gone.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

EPSILON = 1e-5  # of `training.models.van`


class Folded(NamedTuple):
    """A network whose normalisations are folded, for the module that it was trained with."""

    params: Any
    batch_stats: Any
    """Statistics with which batch normalisation changes nothing."""
    constant: frozenset[str]
    """Paths of the scales 1 and biases 0 of the layers that are gone. They should have no posterior."""


def fold_batch_normalisation(params: Any, batch_stats: Any) -> Folded:
    """Fold the batch normalisations of a Visual Attention Network into its kernels.

    Parameters
    ----------
    params, batch_stats
        Of `training.models.van.VAN`, as nested dictionaries.

    Raises
    ------
    ValueError
        Some statistics belong to no layer whose place is known.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)  # copies
    kinds = jax.tree.map(lambda leaf: np.asarray(leaf).dtype, batch_stats)
    neutral, constant = {}, set()
    for block, layers in batch_stats.items():
        neutral[block] = {}
        for layer, statistics in layers.items():
            weights = params[block][layer]
            scale = weights["scale"] / np.sqrt(np.asarray(statistics["var"], np.float64) + EPSILON)
            shift = weights["bias"] - scale * np.asarray(statistics["mean"], np.float64)
            if not _absorb(params[block], layer, scale, shift):
                weights["scale"], weights["bias"] = scale, shift
            else:
                weights["scale"], weights["bias"] = np.ones_like(scale), np.zeros_like(shift)
                constant |= {f"{block}/{layer}/scale", f"{block}/{layer}/bias"}
            neutral[block][layer] = {"mean": np.zeros_like(shift), "var": np.full_like(scale, 1 - EPSILON)}
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    stats = jax.tree.map(lambda leaf, kind: np.asarray(leaf, kind), neutral, kinds)
    return Folded(single, stats, frozenset(constant))


def _absorb(block: dict[str, Any], layer: str, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Fold one normalisation into the layer of its block that can take it up; say whether there is one."""
    if layer == "norm" and {"kernel", "bias"} <= block.keys():  # patch embedding: the convolution before it
        block["kernel"], block["bias"] = block["kernel"] * scale, scale * block["bias"] + shift
        return True
    if layer == "norm2" and "mlp" in block:  # the first layer of the MLP, after it
        first = block["mlp"]["fc1"]
        first["bias"] = first["bias"] + shift @ first["kernel"]
        first["kernel"] = scale[:, None] * first["kernel"]
        return True
    if layer == "norm1" and "attn" in block:
        return False
    raise ValueError(
        f"`fold_batch_normalisation(batch_stats=...)` must be those of a VAN; got a layer {layer!r} beside "
        f"{sorted(block)}; use a network of training.models.van"
    )
