"""Sums of many arrays whose rounding does not grow with their number.

A running sum in float32 forgets what is below half a unit in its last place, and it forgets in one direction: equal
terms are all rounded the same way. A million log likelihoods of -2.3 nats sum to a number that is off by hundreds. So
the rounding of each addition, which floating-point arithmetic can compute exactly, is summed beside the total.

Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, for the exact rounding of a sum; Ogita, Rump
and Oishi, "Accurate sum and dot product", 2005, for its use.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class Sum(NamedTuple):
    """A running sum of pytrees of arrays.

    Attributes
    ----------
    total
        The sum as it was rounded.
    error
        What rounding has taken from it: the sum is total + error. It has twice the digits of its type.
    """

    total: PyTree
    error: PyTree

    @classmethod
    def zeros(cls, like: PyTree) -> "Sum":
        """The empty sum of terms with the shapes and types of `like`."""
        zeros = jax.tree.map(jnp.zeros_like, like)
        return cls(zeros, zeros)

    def plus(self, terms: PyTree) -> "Sum":
        """Add one term."""
        total = jax.tree.map(jnp.add, self.total, terms)
        error = jax.tree.map(_with_rounding, self.error, self.total, terms, total)
        # What has gathered in the error goes back into the total, so that the error stays below its last digit.
        joined = jax.tree.map(jnp.add, total, error)
        return Sum(joined, jax.tree.map(lambda part, rest, whole: rest - (whole - part), total, error, joined))

    def value(self) -> PyTree:
        """The sum, rounded to its type."""
        return jax.tree.map(jnp.add, self.total, self.error)


def accumulated(terms: Iterable[PyTree]) -> PyTree:
    """Sum pytrees one after another, outside `jit`; None if there are none.

    Arrays of JAX are summed as a `Sum`. Those of NumPy are in float64 and are added as they are.
    """
    structure: Any = None
    totals: list[Any] = []
    for term in terms:
        leaves = jax.tree.leaves(term)
        if structure is None:  # most data are one batch, which needs no addition
            structure, totals = jax.tree.structure(term), leaves
        else:
            totals = [_plus(total, leaf) for total, leaf in zip(totals, leaves, strict=True)]
    values = [total.value() if isinstance(total, Sum) else total for total in totals]
    return None if structure is None else jax.tree.unflatten(structure, values)


def _plus(total: Any, term: Any) -> Any:
    """Add a term to a total, which is a `Sum` from its second term on."""
    if isinstance(term, (np.ndarray, np.generic)):
        return total + term
    return _compiled_plus(total if isinstance(total, Sum) else Sum(total, jnp.zeros_like(total)), term)


_compiled_plus = jax.jit(Sum.plus)


def _with_rounding(error: Any, before: Any, term: Any, total: Any) -> Any:
    """Add the exact rounding of total = before + term."""
    added = total - before
    return error + ((before - (total - added)) + (term - added))
