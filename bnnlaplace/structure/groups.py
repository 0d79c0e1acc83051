"""Sums over groups of weights."""

import numpy as np
from jaxtyping import Array, Float, Int


def group_sums(per_weight: Float[Array, "... P"], groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "... g"]:
    """Sum over the weights of each group, in float64."""
    values = np.asarray(per_weight, np.float64)
    flat = values.reshape(-1, values.shape[-1])
    count = int(groups.max()) + 1
    sums = [np.bincount(groups, weights=row, minlength=count) for row in flat]
    return np.stack(sums).reshape(*values.shape[:-1], count)
