"""Checks of what a user hands to a Krylov method: vectors, operators, counts and numbers.

Every message names the function, its argument, and a way out: "lanczos(start=...) must ...; got ...; try ...". Names of
options are checked by `bnnlaplace.core.checks.choice`. Counts and numbers are checked here, since they must be known
while JAX traces: a traced one is refused with the advice to make it a static argument.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import concatenated, described


def is_traced(tree: PyTree) -> bool:
    """Whether a leaf of `tree` is traced, so that its values are not known yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_real(caller: str, argument: str, tree: PyTree) -> PyTree:
    """Return `tree` with arrays for leaves; raise TypeError unless they have one real floating-point dtype."""
    for leaf in jax.tree.leaves(tree):
        checks.unmasked(leaf, f"{caller}({argument}=...)")
    tree = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), tree)
    given = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    # Without x64 JAX takes a NumPy array of float64 for one of float32, so the two go together.
    dtypes = {jax.dtypes.canonicalize_dtype(dtype) if jnp.issubdtype(dtype, jnp.number) else dtype for dtype in given}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no leaves"
        raise TypeError(
            f"{caller}({argument}=...) must have leaves of one real floating-point dtype; got {names}; "
            "cast them, and stack real and imaginary parts of complex vectors"
        )
    return tree


def check_vector(caller: str, argument: str, tree: PyTree) -> Float[Array, " n"]:
    """Return a vector as one flat array.

    Raises
    ------
    TypeError
        As for `check_real`.
    ValueError
        If the vector is empty, or if it is known to be zero or not finite.
    """
    tree = check_real(caller, argument, tree)
    check_finite(caller, argument, jax.tree.map(lambda leaf: leaf[None], tree))
    vector = concatenated(jax.tree.map(jnp.asarray, tree))
    if not vector.size:
        raise ValueError(f"{caller}({argument}=...) must have at least one entry; got none; pass a vector with entries")
    return vector


def check_finite(caller: str, argument: str, vectors: PyTree[Float[Any, "S ..."]]) -> None:
    """Raise ValueError if one of S vectors is zero or not finite; traced vectors pass."""
    leaves = jax.tree.leaves(vectors)
    if is_traced(leaves):
        return
    rows = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    num_bad = rows.size - np.count_nonzero(np.isfinite(rows))
    if num_bad:
        raise ValueError(
            f"{caller}({argument}=...) must be finite; got {num_bad} of {rows.size} entries that are not; look for NaN "
            "or infinite values where they come from"
        )
    num_zero = np.count_nonzero(~rows.any(axis=1))
    if num_zero and rows.size:
        raise ValueError(
            f"{caller}({argument}=...) must not be zero; got {num_zero} of {len(rows)} with {rows.shape[1]} zeros; "
            "draw them at random, say with jax.random.normal"
        )


def check_decomposable(caller: str, argument: str, dtype: Any) -> None:
    """Raise TypeError for a dtype in which JAX cannot decompose the small matrix of a Krylov method."""
    if jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{caller}({argument}=...) must be float32 or float64, since the projected matrix is decomposed in its "
            f"dtype; got {dtype}; cast it, and products to and from {dtype} inside of matvec"
        )


def check_callable(caller: str, argument: str, value: Any, form: str) -> None:
    """Raise TypeError unless `value` can be called; `form` is an example of what can."""
    if not callable(value):
        raise TypeError(f"{caller}({argument}=...) must be a function, such as {form}; got {type(value).__name__}")


def check_product(caller: str, matvec: Callable[..., PyTree], vector: PyTree, params: Sequence[Any]) -> None:
    """Raise TypeError unless `matvec(vector, *params)` has the structure, shapes and dtypes of `vector`."""
    check_callable(caller, "matvec", matvec, "lambda v: matrix @ v")
    try:
        image = jax.eval_shape(lambda *arguments: matvec(*arguments), vector, *params)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{caller}(matvec=...) must be made of functions that JAX can trace; got one that asks for a number, a "
            "bool or a NumPy array; use jax.numpy for what depends on its arguments, and close over what is static"
        ) from error
    except Exception as error:  # whatever a user's function raises at a vector that it does not take
        raise TypeError(
            f"{caller}(matvec=...) must take a vector like the one given, {described(vector)}; got "
            f"{first_line(error)}; mend the product, or pass a vector of its size"
        ) from error
    if jax.tree.structure(vector) != jax.tree.structure(image):
        raise TypeError(
            f"{caller}(matvec=...) must return the structure that it takes, {jax.tree.structure(vector)}; got "
            f"{jax.tree.structure(image)}; put the result into that structure"
        )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(vector)]
    for name, before, after in zip(names, jax.tree.leaves(vector), jax.tree.leaves(image), strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise TypeError(
                f"{caller}(matvec=...) must return the shape and dtype that it takes, {before.dtype}{before.shape}; "
                f"got {after.dtype}{after.shape}{' at ' + name if name else ''}; mend the product, or cast its result "
                "or the start vector"
            )


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


def check_flag(caller: str, argument: str, value: Any) -> bool:
    """Return True or False; raise TypeError for anything else, which would count as one of them."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{caller}({argument}=...) must be True or False; got {value!r:.80}; leave it out for False")
    return bool(value)


def check_count(caller: str, argument: str, value: Any, largest: int | None = None, limit: str = "") -> int:
    """Return an integer between 1 and `largest`, which `limit` describes, as a Python int.

    Raises
    ------
    TypeError
        If `value` is not an integer, or is traced.
    ValueError
        If it is out of range.
    """
    try:
        # `operator.index` would take True for 1.
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{caller}({argument}=...) must be an integer that is known while JAX traces; got {value!r:.80}; "
            "pass a Python int, or make it a static argument of jit"
        ) from None
    if largest is None and count < 1:
        raise ValueError(f"{caller}({argument}=...) must be at least 1; got {count}; raise it")
    if largest is not None and not 1 <= count <= largest:
        raise ValueError(
            f"{caller}({argument}=...) must lie between 1 and {limit} {largest}; got {count}; "
            f"{'raise' if count < 1 else 'lower'} it"
        )
    return count


def check_number(caller: str, argument: str, value: Any, *, positive: bool) -> float:
    """Return a finite number that is positive, or at least not negative, as a Python float.

    Raises
    ------
    TypeError
        If `value` is not a number, or is traced.
    ValueError
        If it is negative, not finite, or zero where it must be positive.
    """
    wanted = "a positive number" if positive else "a number, zero or more,"
    try:
        # `float` would take "1" and True for numbers.
        if isinstance(value, (str, bytes)) or np.asarray(value).dtype == bool:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"{caller}({argument}=...) must be {wanted} that is known while JAX traces; got {value!r:.80}; pass a "
            "Python float, or make it a static argument of jit"
        ) from None
    where, advice = f"{caller}({argument}=...)", "leave it out for the default"
    if positive:
        checks.positive(number, where, advice=advice)
    elif not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{where} must be {wanted} and finite; got {number}; {advice}")
    return number
