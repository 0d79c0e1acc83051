"""Random keys as users pass them."""

from typing import Any

import jax
import numpy as np


def is_key(value: Any) -> bool:
    """Whether it is one key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`.

    Parameters
    ----------
    value
        Anything.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None:
        return False
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == np.uint32 and shape in ((2,), (4,))


def check_key(value: Any, where: str) -> None:
    """Check that it is a key.

    Parameters
    ----------
    value
        Anything.
    where
        The name of the argument, for the message.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not is_key(value):
        got = repr(value) if not hasattr(value, "shape") else f"{value.dtype} of shape {value.shape}"
        raise ValueError(f"{where} must be one random key; got {got}; pass jax.random.key(0)")
