"""A few training examples that a fitted posterior keeps, to be checked against them."""

from dataclasses import dataclass
from typing import Any

import jax

from bnnlaplace.model.data import Data


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sample:
    """Training examples beside a posterior. JAX sees no arrays in it, so that they are lost in `jit` and on disk.

    Attributes
    ----------
    data
        The examples; None if there are none.
    """

    data: Data | None = None

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """No leaves."""
        return (), None

    @classmethod
    def tree_unflatten(cls, meta: None, leaves: Any) -> "Sample":
        """A sample without examples."""
        return cls()
