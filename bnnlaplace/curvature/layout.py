"""How the numbers of a weight form a matrix, through any reshaping and transposing on the way to the product."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Var
from jaxtyping import ArrayLike, Real, Shaped


class Layout(NamedTuple):
    """A weight as a matrix from inputs (rows) to outputs (columns), both in the order in which the weight stores them.

    Attributes
    ----------
    segments
        The weight's shape after neighbouring axes of the same side are joined, as pairs (length, whether it belongs to
        the rows). The kernel (3, 3, 8, 16) of a convolution has the segments ((72, True), (16, False)).
    row_sizes, row_order
        The lengths of the axes of the inputs as the product sums over them, and the transposition that brings them into
        the order of the rows.
    column_sizes, column_order
        Lengths and transposition for the outputs.
    """

    segments: tuple[tuple[int, bool], ...]
    row_sizes: tuple[int, ...]
    row_order: tuple[int, ...]
    column_sizes: tuple[int, ...]
    column_order: tuple[int, ...]

    def rows(self, inputs: Shaped[ArrayLike, "M T I"]) -> Shaped[ArrayLike, "M T I"]:
        """Bring inputs from the order of the product into the order of the rows."""
        return _reordered(inputs, self.row_sizes, self.row_order)

    def columns(self, outputs: Shaped[ArrayLike, "M T O"]) -> Shaped[ArrayLike, "M T O"]:
        """Bring outputs from the order of the product into the order of the columns."""
        return _reordered(outputs, self.column_sizes, self.column_order)

    def flat(self, matrix: Real[ArrayLike, "... I O"]) -> Real[ArrayLike, "... p"]:
        """Turn matrices into the numbers of the weight, in the order in which the weight stores them."""
        return from_matrix(matrix, self.segments)


def from_matrix(matrix: Real[ArrayLike, "... I O"], segments: Sequence[tuple[int, bool]]) -> Real[ArrayLike, "... p"]:
    """Turn matrices into the numbers of the weight, in the order in which the weight stores them.

    Parameters
    ----------
    matrix
        One matrix or several. NumPy arrays remain NumPy arrays.
    segments
        The segments of the `Layout`.
    """
    lead = matrix.shape[:-2]
    order = _matrix_order(segments)
    shape = [segments[index][0] for index in order]
    # The inverse of a permutation sorts it.
    inverse = sorted(range(len(order)), key=order.__getitem__)
    pieces = matrix.reshape((*lead, *shape))
    return pieces.transpose((*range(len(lead)), *(len(lead) + index for index in inverse))).reshape((*lead, -1))


def as_matrices(columns: Real[ArrayLike, "p R"], segments: Sequence[tuple[int, bool]]) -> Real[ArrayLike, "I O R"]:
    """Turn each column of numbers, in the order in which the weight stores them, into a matrix.

    Parameters
    ----------
    columns
        R columns with one number for each weight.
    segments
        The segments of the `Layout`.
    """
    order = _matrix_order(segments)
    pieces = columns.reshape((*(size for size, _ in segments), columns.shape[-1]))
    moved = pieces.transpose((*order, len(order)))
    return moved.reshape((math.prod(size for size, is_row in segments if is_row), -1, columns.shape[-1]))


def as_matrix(flat: Real[ArrayLike, "... p"], segments: Sequence[tuple[int, bool]]) -> Real[ArrayLike, "... I O"]:
    """Turn the numbers of the weight, in the order in which the weight stores them, into matrices.

    Parameters
    ----------
    flat
        One weight or several. NumPy arrays remain NumPy arrays.
    segments
        The segments of the `Layout`.
    """
    lead = flat.shape[:-1]
    pieces = flat.reshape((*lead, *(size for size, _ in segments)))
    order = _matrix_order(segments)
    moved = pieces.transpose((*range(len(lead)), *(len(lead) + index for index in order)))
    return moved.reshape((*lead, math.prod(size for size, is_row in segments if is_row), -1))


def find_layout(
    leaf: Var, operand: Var, equations: Iterable[JaxprEqn], summed: Sequence[int], left: Sequence[int]
) -> Layout | None:
    """Find the layout of a leaf that `equations` turn into the operand of a product.

    Parameters
    ----------
    leaf, operand
        The weight, and the operand of the product.
    equations
        The equations between them.
    summed, left
        The axes of the operand that the product sums over, and the others, each in the order of the product.

    Returns
    -------
    Layout or None
        None if the equations do anything but reshape, transpose or change the type of the leaf.
    """
    axes = {leaf: _axes_of(leaf.aval.shape)}
    for equation in equations:
        (source, *others) = equation.invars
        if others or source not in axes:
            return None
        moved = _moved(equation, axes[source])
        if moved is None:
            return None
        axes[equation.outvars[0]] = moved
    if operand not in axes:
        return None
    rows = [piece for axis in summed for piece in axes[operand][axis]]
    columns = [piece for axis in left for piece in axes[operand][axis]]
    pieces = sorted([(piece, True) for piece in rows] + [(piece, False) for piece in columns], key=_position)
    joined = groupby(pieces, key=lambda entry: entry[1])
    segments = tuple((math.prod(piece.size for piece, _ in run), is_row) for is_row, run in joined)
    return Layout(segments, *_order(rows), *_order(columns))


class _Piece(NamedTuple):
    """A part of an axis of the weight: its length, and the distance of neighbouring indices in memory."""

    size: int
    stride: int


_Axes = list[list[_Piece]]


def _position(entry: tuple[_Piece, bool]) -> int:
    return -entry[0].stride


def _axes_of(shape: tuple[int, ...]) -> _Axes:
    # An axis of length one has no pieces: it moves no numbers, whatever its place.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return [[_Piece(size, stride)] if size > 1 else [] for size, stride in zip(shape, strides, strict=True)]


def _moved(equation: JaxprEqn, axes: _Axes) -> _Axes | None:
    """Follow axes, each of which is a list of pieces with the slowest first, through one equation."""
    name, params = equation.primitive.name, equation.params
    if name in ("convert_element_type", "copy", "copy_p"):
        return axes
    if name == "transpose":
        return [axes[axis] for axis in params["permutation"]]
    shape = equation.outvars[0].aval.shape
    # A broadcast that adds axes of length one alone is a reshape. Any other repeats numbers, which no layout describes.
    only_ones = name == "broadcast_in_dim" and math.prod(shape) == math.prod(equation.invars[0].aval.shape)
    if name in ("squeeze", "expand_dims") or only_ones or (name == "reshape" and params.get("dimensions") is None):
        return _regrouped([piece for axis in axes for piece in axis], shape)
    return None


def _regrouped(pieces: list[_Piece], shape: tuple[int, ...]) -> _Axes | None:
    """Cut a sequence of pieces into axes of the given lengths. A piece is split if its length divides."""
    pieces = list(pieces)
    axes: _Axes = []
    for length in shape:
        axis = []
        while length > 1:
            piece = pieces.pop(0)
            if piece.size > length:
                if piece.size % length:
                    return None
                # The slow part of the piece belongs to this axis, the fast one to the next.
                inner = piece.size // length
                pieces.insert(0, _Piece(inner, piece.stride))
                piece = _Piece(length, piece.stride * inner)
            if length % piece.size:
                return None
            axis.append(piece)
            length //= piece.size
        axes.append(axis)
    return axes


def _order(pieces: list[_Piece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lengths of the pieces, and the permutation that puts them into the order of the weight."""
    order = sorted(range(len(pieces)), key=lambda index: -pieces[index].stride)
    return tuple(piece.size for piece in pieces), tuple(order)


def _matrix_order(segments: Sequence[tuple[int, bool]]) -> list[int]:
    """The indices of the segments with those of rows first."""
    return sorted(range(len(segments)), key=lambda index: not segments[index][1])


def _reordered(
    array: Shaped[ArrayLike, "M T I"], sizes: Sequence[int], order: Sequence[int]
) -> Shaped[ArrayLike, "M T I"]:
    if list(order) == sorted(order):
        return array  # the usual case: no copy
    pieces = array.reshape(*array.shape[:2], *sizes)
    return jnp.transpose(pieces, (0, 1, *(2 + index for index in order))).reshape(array.shape)
