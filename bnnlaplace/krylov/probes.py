"""Random probes z with E[z z'] = I, as pytrees like the vectors that an operator takes."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from bnnlaplace.core import checks
from bnnlaplace.krylov.checks import check_count, check_real


def rademacher_probes(key: Array, like: PyTree, num_probes: int) -> PyTree:
    """Draw probes with independent entries +1 and -1.

    Among all distributions with independent entries, this one gives z' A z the smallest variance:
    2 (|A|_F^2 - sum_i A_ii^2) (Hutchinson 1990).

    Parameters
    ----------
    key
        The random key.
    like
        An array or a pytree of arrays, such as the vector that an operator takes; only shapes and dtype are used.
    num_probes
        The number of probes.

    Returns
    -------
    PyTree
        The structure of `like`, with the probes along a new leading axis of each leaf.

    Raises
    ------
    ValueError
        If `num_probes` is below 1, or `key` is not one random key.
    TypeError
        If `num_probes` is not an integer, or the leaves of `like` do not have one real floating-point dtype.
    """
    return _draw("rademacher_probes", jax.random.rademacher, key, like, num_probes)


def normal_probes(key: Array, like: PyTree, num_probes: int) -> PyTree:
    """Draw standard normal probes.

    The variance of z' A z is 2 |A|_F^2, more than for Rademacher probes. Posterior samples start from normal probes.

    Parameters
    ----------
    key
        The random key.
    like
        An array or a pytree of arrays, such as the vector that an operator takes; only shapes and dtype are used.
    num_probes
        The number of probes.

    Returns
    -------
    PyTree
        The structure of `like`, with the probes along a new leading axis of each leaf.

    Raises
    ------
    ValueError
        If `num_probes` is below 1, or `key` is not one random key.
    TypeError
        If `num_probes` is not an integer, or the leaves of `like` do not have one real floating-point dtype.
    """
    return _draw("normal_probes", jax.random.normal, key, like, num_probes)


def _draw(caller: str, draw: Callable, key: Array, like: PyTree, num_probes: int) -> PyTree:
    """Draw each leaf from a key of its own."""
    checks.key(key, f"{caller}(key=...)")
    num_probes = check_count(caller, "num_probes", num_probes)
    leaves, structure = jax.tree.flatten(check_real(caller, "like", like))
    keys = jax.random.split(key, len(leaves))
    drawn = [draw(key, (num_probes, *leaf.shape), leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)
