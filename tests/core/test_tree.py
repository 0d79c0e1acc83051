"""Pytrees as vectors, sums over groups of weights, names of leaves, and what can be differentiated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.core import tree


class Pair(NamedTuple):
    first: object
    second: object


TREE = {"a": Pair(jnp.ones((2, 3), jnp.bfloat16), jnp.arange(2.0)), "b": [jnp.full((), 7.0)]}


def test_a_vector_holds_all_leaves_in_order_and_comes_back():
    vector = tree.ravel(TREE)
    assert tree.size(TREE) == 9 and vector.dtype == tree.number_type(TREE) == jnp.float32
    np.testing.assert_array_equal(vector, [1] * 6 + [0, 1, 7])
    back = tree.unraveler(jax.eval_shape(lambda: TREE))(vector)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for leaf, original in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert leaf.dtype == original.dtype
        np.testing.assert_array_equal(leaf, original)
    assert tree.squared_norm(TREE) == 6 + 1 + 49


def test_one_number_per_weight():
    params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    np.testing.assert_array_equal(tree.as_vector(2.0, params), np.full(6, 2.0))
    np.testing.assert_array_equal(tree.as_vector(np.arange(6.0), params), np.arange(6.0))
    by_row = {"w": jnp.array([[1.0], [2.0]]), "b": 3.0}
    np.testing.assert_array_equal(tree.as_vector(by_row, params), [3, 3, 1, 1, 2, 2])
    for wrong, got in ((np.ones(5), r"shape \(5,\)"), ({"w": 1.0}, "dict"), ({"w": jnp.ones(3), "b": 1.0}, "dict")):
        with pytest.raises(ValueError, match=rf"a scalar, a vector of 6 numbers or a pytree .*; got {got}.*; try"):
            tree.as_vector(wrong, params)


def test_sums_over_groups_are_in_double_precision():
    groups = np.array([1, 0, 1, 2])
    np.testing.assert_array_equal(tree.group_sums(jnp.array([1.0, 2.0, 4.0, 8.0]), groups), [2, 5, 8])
    rows = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    expected = np.stack([rows[..., 1], rows[..., 0] + rows[..., 2], rows[..., 3]], axis=-1)
    np.testing.assert_array_equal(tree.group_sums(rows, groups), expected)
    assert tree.group_sums(np.array([1.0, 1e-12]), np.zeros(2, int)) == 1 + 1e-12


def test_leaves_have_names():
    assert tree.leaf_names(TREE) == ["a/first", "a/second", "b/0"]
    assert tree.leaf_names(jnp.ones(1)) == ["value"]


def test_leaves_that_can_be_differentiated_are_separated():
    mixed = {"i": jnp.arange(2), "x": jnp.ones(2), "y": (3.0,)}
    active = tree.floating(mixed)
    assert len(active.leaves) == 2 and active.leaves[1] == 3.0
    filled = active.fill([5.0, 6.0])
    assert filled["x"] == 5.0 and filled["y"] == (6.0,) and filled["i"] is mixed["i"]
    assert active.cotangent([5.0, 6.0]) == {"i": None, "x": 5.0, "y": (6.0,)}
