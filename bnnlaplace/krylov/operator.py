"""A user's linear operator on pytrees as one on flat vectors, and checks on what a user hands to a Krylov method."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.krylov.closures import convert
from bnnlaplace.precise import matmul
from bnnlaplace.tree import ravel, unraveler


class FlatOperator(NamedTuple):
    """v, *params -> A v on flat vectors, with everything that can be differentiated among its arguments.

    Attributes
    ----------
    matvec
        (vector, *arguments) -> A v; it closes over no traced array.
    start
        The start vector.
    arguments
        The user's `params`, and after them the traced arrays that the user's function closes over.
    unravel
        From a flat vector to the user's structure.
    """

    matvec: Callable[..., Float[Array, " n"]]
    start: Float[Array, " n"]
    arguments: tuple[Any, ...]
    unravel: Callable[[Float[Array, " n"]], PyTree]


def flatten(caller: str, matvec: Callable[..., PyTree], start: PyTree, params: Sequence[Any]) -> FlatOperator:
    """Check `matvec` and `start` and ravel them; errors name `caller`.

    Raises
    ------
    TypeError
        If a leaf of `start` is not real floating point or leaves differ in dtype, or `matvec` returns another
        structure, shape or dtype than it takes.
    ValueError
        If `start` is empty, or, where its values are known outside of `jit`, zero or not finite.
    """
    vector = check_vector(caller, "start", start)
    start = jax.tree.map(jnp.asarray, start)
    unravel = unraveler(start)
    _check_product(caller, start, jax.eval_shape(matvec, start, *params))

    def flat(vector: Array, *params: Any) -> Array:
        return ravel(matvec(unravel(vector), *params))

    closed, constants = convert(flat, vector, *params)
    return FlatOperator(closed, vector, (*params, *constants), unravel)


def check_vector(caller: str, argument: str, tree: PyTree) -> Float[Array, " n"]:
    """Ravel a nonzero, finite, real vector; errors as for `flatten`."""
    tree = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), tree)
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no leaves"
        raise TypeError(
            f"{caller}({argument}=...) must have leaves of one real floating-point dtype; got {names}; "
            "cast them, and stack real and imaginary parts of complex vectors"
        )
    check_finite(caller, argument, jax.tree.map(lambda leaf: leaf[None], tree))
    vector = ravel(jax.tree.map(jnp.asarray, tree))
    if not vector.size:
        raise ValueError(f"{caller}({argument}=...) must have at least one entry; got none")
    return vector


def check_finite(caller: str, argument: str, vectors: PyTree[Float[Array, "S ..."]]) -> None:
    """Raise ValueError where one of S vectors is known to be zero or not finite, as it is not while JAX traces."""
    leaves = jax.tree.leaves(vectors)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    rows = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    bad = rows.size - np.count_nonzero(np.isfinite(rows))
    if bad:
        raise ValueError(
            f"{caller}({argument}=...) must be finite; got {bad} of {rows.size} entries that are not; look for NaN or "
            "infinite values where they come from"
        )
    zeros = np.count_nonzero(~rows.any(axis=1))
    if zeros and rows.size:
        raise ValueError(
            f"{caller}({argument}=...) must not be zero; got {zeros} of {len(rows)} with {rows.shape[1]} zeros; draw "
            "them at random, say with jax.random.normal"
        )


def check_depth(caller: str, num_matvecs: int, dimension: int) -> None:
    """Raise ValueError unless 1 <= num_matvecs <= dimension."""
    if not 1 <= num_matvecs <= dimension:
        raise ValueError(
            f"{caller}(num_matvecs=...) must lie between 1 and the dimension {dimension}; got {num_matvecs}; "
            f"{'raise' if num_matvecs < 1 else 'lower'} it"
        )


def check_positive(caller: str, argument: str, value: int) -> None:
    """Raise ValueError unless value >= 1."""
    if not value >= 1:
        raise ValueError(f"{caller}({argument}=...) must be at least 1; got {value}")


def check_choice(caller: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        names = [repr(choice) for choice in choices]
        raise ValueError(f"{caller}({argument}=...) must be {', '.join(names[:-1])} or {names[-1]}; got {value!r}")


def check_symmetric(
    matvec: Callable[..., PyTree],
    vector: PyTree,
    key: Array,
    *params: Any,
    num_probes: int = 3,
    tolerance: float | None = None,
) -> float:
    """Measure by products alone how far a `matvec` is from symmetric, and refuse one that is not.

    For normal x and y, x' A y - y' A x has standard deviation |A - A'|_F, and |A y| is about |A|_F. The largest of
    |x' A y - y' A x| / (|A x| + |A y|) over `num_probes` pairs is returned: about |A - A'|_F / (2 |A|_F).

    Parameters
    ----------
    matvec, params
        v, *params -> A v, on pytrees like `vector`.
    vector
        Any vector that `matvec` takes; only its structure, shapes and dtype are used.
    key
        Of `jax.random.key`.
    num_probes
        Pairs of probes. A difference in a few of many entries can escape few probes.
    tolerance
        The largest ratio that passes; 1000 times the machine epsilon of the dtype unless given.

    Returns
    -------
    float
        The largest ratio: zero, or of the order of the machine epsilon, for a symmetric operator.

    Raises
    ------
    ValueError
        If the ratio exceeds `tolerance` or is not finite; it states the ratio.
    TypeError
        As for `lanczos`.

    Notes
    -----
    Cost: 2 `num_probes` products. Not for use inside `jit`.
    """
    check_positive("check_symmetric", "num_probes", num_probes)
    ones = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), jnp.result_type(leaf)), vector)
    operator = flatten("check_symmetric", matvec, ones, params)
    if tolerance is None:
        tolerance = 1e3 * float(jnp.finfo(operator.start.dtype).eps)
    shape = num_probes, 2, operator.start.size
    probes = jax.random.normal(key, shape, operator.start.dtype)

    @jax.jit
    def ratio(pair: Array, arguments: tuple[Any, ...]) -> Array:
        x, y = pair
        a_x, a_y = operator.matvec(x, *arguments), operator.matvec(y, *arguments)
        size = jnp.sqrt(matmul(a_x, a_x)) + jnp.sqrt(matmul(a_y, a_y))
        return jnp.abs(matmul(x, a_y) - matmul(y, a_x)) / jnp.where(size > 0, size, 1)

    worst = max(float(ratio(pair, operator.arguments)) for pair in probes)
    if not worst <= tolerance:
        raise ValueError(
            f"check_symmetric(matvec=...) must be symmetric; x'Ay and y'Ax differ by {worst:.3g} of |Ax| + |Ay|, more "
            f"than {tolerance:.3g}; use arnoldi for an operator that is not symmetric, or mend the product"
        )
    return worst


def _check_product(caller: str, taken: PyTree, returned: PyTree) -> None:
    if jax.tree.structure(taken) != jax.tree.structure(returned):
        raise TypeError(
            f"{caller}(matvec=...) must return the structure that it takes, {jax.tree.structure(taken)}; got "
            f"{jax.tree.structure(returned)}"
        )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(taken)]
    for name, before, after in zip(names, jax.tree.leaves(taken), jax.tree.leaves(returned), strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise TypeError(
                f"{caller}(matvec=...) must return the shape and dtype that it takes, {before.dtype}{before.shape}; "
                f"got {after.dtype}{after.shape}{' at ' + name if name else ''}; mend the product, or cast its result "
                "or the start vector"
            )
