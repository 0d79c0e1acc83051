"""Gram-Schmidt against the basis found so far: the largest cost of a Krylov method beside the products with A.

The basis is a tuple of blocks of rows. A step that has found k rows touches only the blocks that hold those rows, and
leaves alone the zeros still to come. Each block is an array of its own, because XLA would copy a slice of one large
array before multiplying it.

The file holds, in this order: norms, the blocks, one pass of Gram-Schmidt, and as many passes as a vector needs.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.core.linalg import matmul

Blocks = tuple[Float[Array, "_ n"], ...]

# A basis of at most this many bytes stays in the cache. Choosing among blocks would then cost more than it saves.
WHOLE_BYTES = 8 << 20
MOST_BLOCKS = 3


def norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """|v|, with a gradient of zero at zero, where that of a square root is infinite."""
    square = matmul(vector, vector)
    # The inner `where` keeps the square root away from zero, since the gradient takes both branches of the outer one.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)


def safe_norm(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """`norm` without overflow or underflow of the squares, at the cost of one more pass over the vector."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vector)))
    largest = jnp.where(largest > 0, largest, 1)
    return largest * norm(vector / largest)


def split(basis: Float[Array, "K n"]) -> Blocks:
    """Cut a basis into blocks; `join` undoes it."""
    num_blocks = 1 if basis.nbytes <= WHOLE_BYTES else min(MOST_BLOCKS, len(basis))
    bounds = [len(basis) * i // num_blocks for i in range(num_blocks + 1)]
    return tuple(basis[first:last] for first, last in zip(bounds, bounds[1:], strict=False))


def join(blocks: Blocks) -> Float[Array, "K n"]:
    """Stack the blocks again."""
    return jnp.concatenate(blocks) if len(blocks) > 1 else blocks[0]


def set_row(blocks: Blocks, index: Int[ArrayLike, ""], row: Float[Array, " n"]) -> Blocks:
    """Replace one row of the basis."""
    updated, first = [], 0
    for block in blocks:
        local_index = jnp.clip(index - first, 0, len(block) - 1)
        new_row = row
        if len(blocks) > 1:
            # A block without this row writes back a row of its own. XLA then updates every block in place, where a
            # choice between old and new blocks would copy them.
            inside = (first <= index) & (index < first + len(block))
            new_row = jnp.where(inside, row, jax.lax.dynamic_index_in_dim(block, local_index, keepdims=False))
        updated.append(jax.lax.dynamic_update_index_in_dim(block, new_row, local_index, 0))
        first += len(block)
    return tuple(updated)


@jax.checkpoint
def impose(
    blocks: Blocks, last: Int[ArrayLike, ""], vector: Float[Array, " n"], wanted: Float[Array, " K"]
) -> tuple[Float[Array, " n"], Float[Array, " K"]]:
    """Change `vector` within the span of rows 0..last so that its products with these rows are `wanted`.

    With `wanted` zero this is one pass of Gram-Schmidt. The rows are orthonormal or zero. Blocks are treated one after
    another, as in modified Gram-Schmidt.

    Returns
    -------
    vector, coefficients
        The new vector, and the products that it had with the rows just before their block was treated. Coefficients
        beyond `last` are zero.
    """
    ends = [sum(len(block) for block in blocks[: i + 1]) for i in range(len(blocks))]
    wanted = jnp.where(jnp.arange(ends[-1]) <= last, wanted, 0)

    def treat(num_blocks: int, blocks: Blocks, vector: Array, wanted: Array) -> tuple[Array, Array]:
        """Treat the first `num_blocks` blocks, which hold rows 0..last."""
        coefficients = []
        for block, end in zip(blocks[:num_blocks], ends, strict=False):
            rows = slice(end - len(block), end)
            along = jnp.where(jnp.arange(rows.start, rows.stop) <= last, matmul(block, vector), 0)
            vector = vector + matmul(wanted[rows] - along, block)
            coefficients.append(along)
        coefficients.append(jnp.zeros_like(vector, shape=ends[-1] - ends[num_blocks - 1]))
        return vector, jnp.concatenate(coefficients)

    if len(blocks) == 1:
        return treat(1, blocks, vector, wanted)
    branches = [lambda *args, count=count: treat(count, *args) for count in range(1, len(blocks) + 1)]
    num_full_blocks = jnp.sum(jnp.asarray(last) >= jnp.asarray(ends[:-1]))
    return jax.lax.switch(num_full_blocks, branches, blocks, vector, wanted)


@jax.checkpoint
def orthogonalise(
    blocks: Blocks, last: Int[ArrayLike, ""], vector: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Remove what `vector` has along rows 0..last, in one pass or two; return the rest and its length.

    A pass leaves an error of eps times the part it removed. So a second pass follows if the first one removed more than
    it kept (Kahan's criterion, Parlett 1998, section 6.9).
    """
    wanted = jnp.zeros_like(vector, shape=sum(map(len, blocks)))
    rest, removed = impose(blocks, last, vector, wanted)
    length = safe_norm(rest)

    def second_pass() -> tuple[Array, Array]:
        again, _ = impose(blocks, last, rest, wanted)
        return again, safe_norm(again)

    return jax.lax.cond(anywhere(safe_norm(removed) > length), second_pass, lambda: (rest, length))


@jax.custom_batching.custom_vmap
def anywhere(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return `condition`; under `vmap`, whether it holds anywhere in the batch, as one value for all of it.

    `vmap` evaluates both branches of a `cond` whose condition differs within the batch. With one condition for the
    whole batch, `cond` still runs only one branch. Use it where the branch that does more is right for every member.
    """
    return condition


@anywhere.def_vmap
def _(size: int, batched: list[bool], condition: Bool[Array, " B"]) -> tuple[Bool[Array, ""], bool]:
    del size, batched
    # `anywhere` again, for the next `vmap` around this one.
    return anywhere(jnp.any(condition)), False
