"""Arrays as users hand them over: converted to those of NumPy or JAX, and checked for the type they will be used in.

Without 64-bit types, JAX casts an int64 label of 2**32 to 0 and a float64 input of 1e39 to infinity, both silently. So
numbers are checked against the type after the cast. The checks reduce an array to its extremes, where it is. They copy
nothing, and numbers that no cast changes, such as uint8 images, are not read at all.
"""

import numbers
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described
from bnnlaplace.core.types import AnyArray

# Whether something can be converted to an array: a tensor of another library, a table, an array.
_PROTOCOLS = ("__array__", "__dlpack__", "__jax_array__")


def is_array(value: Any) -> bool:
    """Whether it is an array, or something with a protocol by which it can become one; lists and numbers are not."""
    return hasattr(value, "shape") or any(hasattr(value, protocol) for protocol in _PROTOCOLS)


def is_list_of_numbers(value: Any) -> bool:
    """Whether it is a list or tuple, of any depth, whose entries are all plain numbers."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(entry, (numbers.Number, np.generic)) for entry in jax.tree.leaves(value))


def as_arrays(tree: PyTree, where: str) -> PyTree[AnyArray]:
    """Convert every leaf to an array of NumPy or JAX, with examples along the first axis; see `as_array`.

    Raises
    ------
    ValueError
        If there is no leaf, a leaf cannot be converted, or leaves have different numbers of examples.
    """
    _check_dense(tree, where)
    converted = jax.tree.map(lambda leaf: as_array(leaf, where), tree)
    counts = sorted({leaf.shape[0] for leaf in jax.tree.leaves(converted)})
    if len(counts) != 1:
        got = f"{' and '.join(map(str, counts))} examples" if counts else described(tree)
        raise ValueError(f"{where} must be arrays with as many examples in each; got {got}; pass jnp.asarray(x)")
    return converted


def as_array(value: Any, where: str) -> AnyArray:
    """Convert to an array of NumPy or JAX, without a copy if that is possible.

    Anything with `__array__`, DLPack or `__jax_array__` is taken, such as a tensor of another library.

    Raises
    ------
    ValueError
        If it is not an array of numbers with examples along the first axis, or entries of it are masked.
    """
    array = value if isinstance(value, jax.Array) else _converted(value, where)
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if used_type(array.dtype) is None:
        raise ValueError(f"{where} must be numbers; got an array of {array.dtype}; encode them as float32 or int32")
    if array.ndim == 0:
        raise ValueError(
            f"{where} must be arrays with examples along the first axis; got a {type(value).__name__}; pass "
            "jnp.asarray(x)"
        )
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and not array.is_fully_addressable:
        raise ValueError(f"{where} must be in the memory of this process; got an array of several processes; gather it")
    return array


def used_type(dtype: Any) -> np.dtype | None:
    """The type in which JAX uses numbers of `dtype`; None if they are not numbers."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return None
    # NumPy counts spans of time among the integers, and has floats that are too long for JAX.
    is_number = jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, np.timedelta64)
    is_long = is_number and jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits > 64
    return jax.dtypes.canonicalize_dtype(dtype) if (is_number and not is_long) or jnp.issubdtype(dtype, bool) else None


def check_fits_type(array: AnyArray, where: str) -> None:
    """Raise ValueError if a finite number leaves its range when JAX casts it to a shorter type."""
    used = used_type(array.dtype)
    if isinstance(array, jax.Array) or used == array.dtype or not array.size:
        return
    is_integer = jnp.issubdtype(used, jnp.integer)
    limits = jnp.iinfo(used) if is_integer else jnp.finfo(used)
    parts = (array.real, array.imag) if np.iscomplexobj(array) else (array,)
    for part in parts:
        with np.errstate(invalid="ignore"):
            lowest, highest = part.min(), part.max()
        # Infinite numbers are infinite in every type. Comparisons with NaN are false.
        if (lowest < limits.min and lowest != -np.inf) or (highest > limits.max and highest != np.inf):
            advice = "remap them" if is_integer else "rescale them, as by standardising"
            got = f"{lowest} to {highest}" if is_integer else f"{lowest:.6g} to {highest:.6g}"
            raise ValueError(
                f"{where} must fit into {used.name}, in which they are used; got numbers from {got}; "
                f"{advice}, or enable 64 bits: jax.config.update('jax_enable_x64', True)"
            )


def check_finite(array: AnyArray, where: str) -> None:
    """Raise ValueError if a number is NaN, infinite, or would be so in the type in which it is used; traced ones pass.

    Integers cannot be any of these; what a cast makes of them is checked as by `check_fits_type`.
    """
    if isinstance(array, jax.core.Tracer) or not array.size:
        return
    check_fits_type(array, where)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return
    # Checked where the array is: images on the host need no copy on the device. A traced function may close over an
    # array, whose check must not be traced.
    with jax.ensure_compile_time_eval(), np.errstate(invalid="ignore"):
        if isinstance(array, jax.Array):
            all_finite = bool(_all_finite(array))
        else:
            parts = (array.real, array.imag) if np.iscomplexobj(array) else (array,)
            # NaN propagates to both extremes.
            all_finite = all(np.isfinite(part.min()) and np.isfinite(part.max()) for part in parts)
    if not all_finite:
        rows = np.unique(np.nonzero(~np.isfinite(np.asarray(array)))[0])
        raise ValueError(
            f"{where} must be finite; got NaN or infinite values in {len(rows)} of {len(array)} of them, first in "
            f"number {rows[0]}; remove or mend them"
        )


@jax.jit
def _all_finite(array: Shaped[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()


def _converted(value: Any, where: str) -> AnyArray:
    checks.unmasked(value, where)
    if isinstance(value, np.ndarray):
        return np.asarray(value)  # of a subclass, the plain array
    fault = None
    for protocol, convert in zip(_PROTOCOLS, (np.asarray, jax.dlpack.from_dlpack, jnp.asarray), strict=True):
        if hasattr(value, protocol):
            try:
                return convert(value)
            except Exception as error:  # whatever another library raises, such as for a tensor on another device
                fault = error
    if fault is not None:
        message = str(fault).split("\n", 1)[0]
        raise ValueError(
            f"{where} must be arrays; a {type(value).__name__} could not be converted: {type(fault).__name__}: "
            f"{message:.120}; pass it as an array of NumPy"
        ) from fault
    advice = "pass x.toarray()" if hasattr(value, "toarray") else "pass jnp.asarray(x)"
    raise ValueError(
        f"{where} must be arrays with examples along the first axis; got a {type(value).__name__}; {advice}"
    )


def _check_dense(tree: PyTree, where: str) -> None:
    """Raise ValueError for sparse arrays of JAX: they are pytrees, whose leaves would be taken for inputs."""
    sparse = sys.modules.get("jax.experimental.sparse")
    if sparse is None:
        return
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, sparse.JAXSparse))
    if any(isinstance(node, sparse.JAXSparse) for node in nodes):
        raise ValueError(f"{where} must be dense arrays; got a sparse one; pass x.todense()")
