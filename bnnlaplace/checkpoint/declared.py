"""What a saved posterior must be, whatever its manifest says: a file that is whole may still be nonsense.

Each check raises Damage with a clause such as "its prior precision is -1.0". They are cheap: none multiplies matrices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.checkpoint.errors import Damage
from bnnlaplace.core.tree import leaf_names, size
from bnnlaplace.structure import (
    BY_NAME,
    DenseStructure,
    KroneckerStructure,
    KrylovStructure,
    SpectralStructure,
    Structure,
)
from bnnlaplace.structure.block_sum import BlockSum

# Norms of vectors that were orthonormal in float32 and symmetric entries agree within this.
_ROUNDING = 1e-2

# The fields of metadata.json, and the parts of the tree: what must be there, what releases before format version 2 may
# have left out, and what some posteriors have.
_METADATA = {"hessian_structure": str, "likelihood": str}
_LATER_METADATA = {"structure": str, "likelihood_is_ours": bool, "weights": list, "linearised": bool, "groups": dict}
_OPTIONAL_METADATA = {"prior_precision": dict, "likelihood_options": list}
_PARTS = {"network": dict, "prior_precision": np.ndarray, "structure": dict, "fitted": dict}
_OPTIONAL_PARTS = {
    "likelihood": list,
    "relative_precision": np.ndarray,
    "prior_mean": np.ndarray,
    "prior_curvature": dict,  # of a prior that is the posterior of earlier data
    "bound": dict,  # of a variational posterior
}


def check_parts(stored: Any, metadata: Mapping[str, Any], version: int) -> None:
    """Check the fields of the metadata and the parts of the tree, each by itself."""
    required, optional = {**_METADATA, **_LATER_METADATA}, _OPTIONAL_METADATA
    if version == 1:
        required, optional = _METADATA, {**_LATER_METADATA, **_OPTIONAL_METADATA}
    _check_fields(metadata, required, optional, "the metadata")
    _check_fields(stored, _PARTS, _OPTIONAL_PARTS, "the tree")
    name = metadata["hessian_structure"]
    if name not in BY_NAME or metadata.get("structure", "") not in ("", *(kind.__name__ for kind in BY_NAME[name])):
        raise Damage(f"its structure is {metadata.get('structure', '')!r:.80} for {name!r:.80}, which there is not")
    if not all(isinstance(weight, str) for weight in metadata.get("weights", ())):
        raise Damage("its weights are not named")
    if not all(isinstance(group, str) for group in metadata.get("groups", {}).values()):
        raise Damage("its groups of weights are not named")
    for group, value in metadata.get("prior_precision", {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise Damage(f"its prior precision of {group!r:.80} is {value!r:.80}")


def _check_fields(record: Any, required: Mapping[str, type], optional: Mapping[str, type], where: str) -> None:
    """Raise Damage unless a dictionary has all required fields, perhaps the optional ones, and no other ones."""
    if not isinstance(record, dict):
        raise Damage(f"{where} has no fields")
    types = {**required, **optional}
    for name in {**required, **record}:
        if name not in types:
            raise Damage(f"{where} has a field {name!r:.80}, which no posterior has")
        if name not in record:
            raise Damage(f"{where} has no field {name!r}")
        if not isinstance(record[name], types[name]):
            raise Damage(f"{where} has a {type(record[name]).__name__} as {name!r}")


# --- numbers --------------------------------------------------------------------------------------------------------


def vector(array: Any, length: int, what: str, *, positive: bool = False) -> np.ndarray:
    """Return finite numbers of shape (length,), which may have to be positive."""
    numbers = _floats(array, what)
    if numbers.shape != (length,):
        raise Damage(f"its {what} have shape {numbers.shape}, where there are {length} weights")
    if positive and not np.all(numbers > 0):
        raise Damage(f"its {what} are not positive")
    return numbers


def number(array: Any, what: str, *, least: float = -math.inf, may_be_unknown: bool = False) -> float:
    """Return one finite number, which may have a least value or be NaN where an earlier release did not know it."""
    numbers = np.asarray(array)
    if numbers.shape != () or not _is_floating(numbers):
        raise Damage(f"its {what} is not a number")
    value = float(numbers)
    if may_be_unknown and math.isnan(value):
        return value
    if not math.isfinite(value) or value < least:
        raise Damage(f"its {what} is {value!r}")
    return value


def _floats(array: Any, what: str) -> np.ndarray:
    """Return an array of finite floating-point numbers."""
    if not isinstance(array, (np.ndarray, jax.Array)) or not _is_floating(array):
        raise Damage(f"its {what} are not numbers")
    numbers = np.asarray(array)
    if not np.isfinite(numbers).all():
        raise Damage(f"its {what} are not all finite")
    return numbers


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


# --- structures -----------------------------------------------------------------------------------------------------


def check_structure(structure: Structure, stored: Any, params: Any, version: int) -> None:
    """Check that a structure rebuilt from stored arrays is one of these weights, with all its arrays and no other."""
    numbers = dict(zip(leaf_names(stored), jax.tree.leaves(stored), strict=True))
    for name, array in numbers.items():
        if name != "tolerance":  # which may be infinite
            _floats(array, f"numbers at {name!r} of the curvature")
    # An earlier release wrote the eigenvectors of a dense matrix, and another one no tolerance.
    # As a pytree a matrix does not show its rounding.
    names = ["matrix", "rounding"] if isinstance(structure, DenseStructure) else leaf_names(structure)
    if version > 1 and (differing := set(numbers) ^ set(names)):
        raise Damage(f"its curvature differs from a {type(structure).__name__} in {min(differing)!r:.80}")
    count = size(params)
    match structure:
        case KroneckerStructure():
            _check_blocks(structure.blocks, jax.tree.leaves(params))
        case KrylovStructure():
            _check_decomposition(structure, count)
        case SpectralStructure():
            _check_shape(structure.eigenvectors, (len(structure.eigenvalues), count), "eigenvectors")
            _check_spectrum(structure.eigenvalues)
            _check_norms(structure.eigenvectors, axis=1)
        case DenseStructure():
            matrix = np.asarray(structure.matrix)
            _check_shape(matrix, (count, count), "matrix")
            _check_spectrum(np.diagonal(matrix))
            if not np.allclose(matrix, matrix.T, rtol=_ROUNDING, atol=_ROUNDING * np.abs(matrix).max(initial=0)):
                raise Damage("its curvature is not symmetric")
        case _:
            _check_shape(structure.diagonal, (count,), "diagonal")
            _check_spectrum(structure.diagonal)


def _check_blocks(blocks: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Check that there is a block for each array of weights, with as many rows as that has numbers."""
    if len(blocks) != len(leaves):
        raise Damage(f"its curvature has {len(blocks)} blocks, where there are {len(leaves)} arrays of weights")
    pairs = [
        (term, leaf)
        for block, leaf in zip(blocks, leaves, strict=True)
        for term in (block.terms if isinstance(block, BlockSum) else [block])
    ]
    for block, leaf in pairs:
        for name in block._fields:
            if name.endswith("vectors"):
                vectors, values = getattr(block, name), getattr(block, name.replace("vectors", "values"))
                width = vectors.shape[-1]
                _check_shape(vectors, (*vectors.shape[:-2], width, width), name)
                _check_shape(vectors.reshape(-1, width), (values.size, width), name)
                _check_norms(vectors, axis=-2)
            else:
                _check_spectrum(getattr(block, name))
        if "row_values" in block._fields:
            _check_sides(block.row_values.shape, block.column_values.shape, leaf.shape)
        _check_shape(block.eigenvalues, (leaf.size,), "block")


def _check_sides(rows: tuple[int, ...], columns: tuple[int, ...], leaf: tuple[int, ...]) -> None:
    """Check that each axis of the weight, or several neighbours joined, belong to the rows or to the columns."""
    axes = [max(lengths) for lengths in zip(rows, columns, strict=True) if min(lengths) == 1]
    # Axes are joined if the numbers of weights before them are among those of the weight itself.
    before = {math.prod(leaf[:position]) for position in range(len(leaf) + 1)}
    joined = {math.prod(axes[:position]) for position in range(len(axes) + 1)}
    if len(axes) != len(rows) or not joined <= before:
        raise Damage(f"the sides of its curvature have shapes {rows} and {columns}, where the weights have {leaf}")


def _check_decomposition(structure: KrylovStructure, count: int) -> None:
    """Check the shapes of a block Krylov decomposition against each other, and that its basis is one."""
    decomposition, ritz = structure.decomposition, structure.ritz
    vectors, probes = len(decomposition.basis), len(decomposition.start)
    shapes = {
        "basis": (decomposition.basis, (vectors, count)),
        "tridiagonal": (decomposition.tridiagonal, (vectors, vectors)),
        "start": (decomposition.start, (probes, probes)),
        "residual": (decomposition.residual, (probes, probes)),
        "Ritz values": (ritz.values, (vectors,)),
        "Ritz vectors": (ritz.vectors, (vectors, vectors)),
        "Ritz weights": (ritz.weights, (vectors, probes)),
        "couplings": (ritz.couplings, (vectors,)),
        "tails": (ritz.tails, (probes, vectors)),
        "Gauss-Radau nodes": (structure.radau_nodes, (vectors + probes,)),
        "Gauss-Radau weights": (structure.radau_weights, (vectors + probes, probes)),
    }
    for name, (array, shape) in shapes.items():
        _check_shape(array, shape, name)
    _check_norms(decomposition.basis, axis=1)
    _check_norms(ritz.vectors, axis=0)
    _check_spectrum(ritz.values)
    if not structure.tolerance > 0:
        raise Damage(f"its tolerance is {float(structure.tolerance)!r}")


def _check_shape(array: Any, shape: tuple[int, ...], what: str) -> None:
    if array.shape != shape:
        raise Damage(f"the {what} of its curvature have shape {array.shape} instead of {shape}")


def _check_spectrum(values: Any) -> None:
    """Check that eigenvalues or a diagonal are not negative by more than rounding."""
    numbers = np.asarray(values)
    if numbers.min(initial=0) < -_ROUNDING * numbers.max(initial=0):
        raise Damage(f"its curvature has the negative eigenvalue {float(numbers.min()):.3g}")


def _check_norms(vectors: Any, axis: int) -> None:
    """Check that no vector is longer than one. Those beyond the rank may be zero."""
    squares = np.sum(np.asarray(vectors, np.float32) ** 2, axis=axis)
    if squares.max(initial=0) > 1 + _ROUNDING:
        raise Damage("its eigenvectors are not of length one")
