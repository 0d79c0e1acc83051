"""The annotations of the package are checked while the tests run."""

import jax.numpy as jnp
import jaxtyping
import pytest

from bnnlaplace.core.tree import group_sums


def test_a_false_shape_is_refused():
    """Without this, a run that forgot the option would check nothing and pass."""
    with pytest.raises(jaxtyping.TypeCheckError, match="groups"):
        group_sums(jnp.ones(3), jnp.zeros((3, 2)))
