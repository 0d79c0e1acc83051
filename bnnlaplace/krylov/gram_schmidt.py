"""Gram-Schmidt against the rows found so far: the products that dominate a Krylov method beside those with A.

The basis is a tuple of blocks of rows. A step that has found k rows touches only the blocks that hold them, not the
zeros still to come. Blocks are separate arrays, since a slice of one array would be copied before it is multiplied.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.core.linalg import matmul

Blocks = tuple[Float[Array, "_ n"], ...]

# Below this size of the whole basis it stays in the cache, and a choice among blocks costs more than it saves.
WHOLE_BYTES = 8 << 20
MOST_BLOCKS = 3


def split(basis: Float[Array, "K n"]) -> Blocks:
    """Cut a basis into blocks; `join` undoes it."""
    count = 1 if basis.nbytes <= WHOLE_BYTES else min(MOST_BLOCKS, len(basis))
    bounds = [len(basis) * i // count for i in range(count + 1)]
    return tuple(basis[first:last] for first, last in zip(bounds, bounds[1:], strict=False))


def join(blocks: Blocks) -> Float[Array, "K n"]:
    """Stack the blocks again."""
    return jnp.concatenate(blocks) if len(blocks) > 1 else blocks[0]


def set_row(blocks: Blocks, index: Int[ArrayLike, ""], row: Float[Array, " n"]) -> Blocks:
    """Replace one row. The others are left where they are, so that XLA updates the blocks in place."""
    updated, first = [], 0
    for block in blocks:
        local = jnp.clip(index - first, 0, len(block) - 1)
        kept = row
        if len(blocks) > 1:
            inside = (first <= index) & (index < first + len(block))
            kept = jnp.where(inside, row, jax.lax.dynamic_index_in_dim(block, local, keepdims=False))
        updated.append(jax.lax.dynamic_update_index_in_dim(block, kept, local, 0))
        first += len(block)
    return tuple(updated)


@jax.checkpoint
def impose(
    blocks: Blocks, last: Int[ArrayLike, ""], vector: Float[Array, " n"], wanted: Float[Array, " K"]
) -> tuple[Float[Array, " n"], Float[Array, " K"]]:
    """Change `vector` within the span of rows 0..last so that its products with them are `wanted`.

    With `wanted` zero this is one pass of Gram-Schmidt. Rows are orthonormal or zero. Blocks are treated one after
    another, as in modified Gram-Schmidt.

    Returns
    -------
    vector, coefficients
        The new vector, and the products with the rows that it had before each block was treated; zero beyond `last`.
    """
    ends = [sum(len(block) for block in blocks[: i + 1]) for i in range(len(blocks))]
    wanted = jnp.where(jnp.arange(ends[-1]) <= last, wanted, 0)

    def touch(count: int, blocks: Blocks, vector: Array, wanted: Array) -> tuple[Array, Array]:
        coefficients = []
        for block, end in zip(blocks[:count], ends, strict=False):
            rows = slice(end - len(block), end)
            along = jnp.where(jnp.arange(rows.start, rows.stop) <= last, matmul(block, vector), 0)
            vector = vector + matmul(wanted[rows] - along, block)
            coefficients.append(along)
        coefficients.append(jnp.zeros_like(vector, shape=ends[-1] - ends[count - 1]))
        return vector, jnp.concatenate(coefficients)

    if len(blocks) == 1:
        return touch(1, blocks, vector, wanted)
    branches = [lambda *args, count=count: touch(count, *args) for count in range(1, len(blocks) + 1)]
    needed = jnp.sum(jnp.asarray(last) >= jnp.asarray(ends[:-1]))
    return jax.lax.switch(needed, branches, blocks, vector, wanted)


# Norms of flat vectors whose gradients are finite at zero, where a breakdown ends up.
def norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """|v|, with a gradient of zero at zero."""
    square = matmul(vector, vector)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)


def safe_norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """The same without overflow or underflow of the squares, for one more pass over v."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vector)))
    largest = jnp.where(largest > 0, largest, 1)
    return largest * norm(vector / largest)


# Choices that stay choices under `vmap`, which would otherwise evaluate both branches of a `cond`.
@jax.custom_batching.custom_vmap
def anywhere(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """`condition`; under `vmap`, whether it holds anywhere in the batch, the same for all of it."""
    return condition


@anywhere.def_vmap
def _(size: int, batched: list[bool], condition: Bool[Array, " B"]) -> tuple[Bool[Array, ""], bool]:
    del size, batched
    return anywhere(jnp.any(condition)), False
