"""Weights of PyTorch as the variables of the Flax network of a size, all of them or none."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from training.errors import UserError
from training.models.van import VAN, VARIANTS
from training.pretrained.names import arranged, name_of, official_names

HEAD = "head.weight"
# How many names a message lists.
_SHOWN = 5


class Differences(NamedTuple):
    """What keeps a file from being the weights of a network, in the names of the file or of the official code."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        parts = {"it lacks": self.missing, "it has besides": self.unexpected, "other shapes have": self.shapes}
        return "; ".join(f"{kind} {_some(names)}" for kind, names in parts.items() if names)


def to_flax(arrays: Mapping[str, np.ndarray], size: str, what: str = "the file") -> dict[str, Any]:
    """Return the variables of the Flax network of a size: its weights and batch statistics.

    The number of classes is that of the head.

    Parameters
    ----------
    arrays
        Arrays by their names in PyTorch, as `files.read_weights` returns them.
    size
        A key of `VARIANTS`.
    what
        What messages call the file.

    Raises
    ------
    UserError
        The size is unknown, or the arrays are not those of the network. The message lists which are missing, are not
        expected or have another shape, and names the size that they are of.
    """
    if size not in VARIANTS:
        raise UserError(f"`--size` must be one of {', '.join(VARIANTS)}; got {size!r}; choose one")
    variables, differences = _compared(arrays, size)
    if differences:
        like = _sizes_like(arrays)
        others = [other for other in like if other != size]
        advice = "download it again" if size in like else "it is of another network"
        advice = f"choose --size {' or '.join(others)}, which it looks like" if others else advice
        raise UserError(f"{what} must have the weights of size {size} and no others; {differences}; {advice}")
    if faults := _faults(variables):
        raise UserError(
            f"{what} must have finite numbers, and variances of at least zero; got others in {_some(faults)}; download "
            "it again"
        )
    return variables


def num_classes_of(variables: Mapping[str, Any]) -> int:
    """Return the number of outputs of the head."""
    return len(variables["params"]["head"]["bias"])


def _compared(arrays: Mapping[str, np.ndarray], size: str) -> tuple[dict[str, Any], Differences]:
    """The variables as far as they are there, and what differs."""
    names = official_names(list(arrays))
    head = arrays[names[HEAD]] if HEAD in names else np.zeros((1, 1))
    shapes = _shapes(size, len(head) if head.ndim else 1)
    left, missing, others = dict(names), [], []

    def leaf(path: Sequence[Any], expected: jax.ShapeDtypeStruct) -> np.ndarray | None:
        name = name_of([part.key for part in path[1:]])
        theirs = left.pop(name, None)
        if theirs is None:
            missing.append(name)
            return None
        found = arranged(arrays[theirs], expected.shape)
        if found is None:
            others.append(f"{theirs} {arrays[theirs].shape} in place of that for {expected.shape}")
            return None
        return found.astype(expected.dtype)

    variables = jax.tree_util.tree_map_with_path(leaf, shapes)
    return variables, Differences(missing, list(left.values()), others)


def _faults(variables: Mapping[str, Any]) -> list[str]:
    """The names of leaves with numbers that no network computes with."""
    return [
        name_of([part.key for part in path[1:]])
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if not np.isfinite(leaf).all() or (path[-1].key == "var" and (leaf < 0).any())
    ]


def _sizes_like(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The sizes with the channels and the blocks that the arrays have."""
    names = official_names(list(arrays))
    channels, depths = [], []
    while (name := f"patch_embed{len(channels) + 1}.proj.bias") in names:
        channels.append(arrays[names[name]].size)
        stage = len(channels)
        depths.append(len({name.split(".")[1] for name in names if name.startswith(f"block{stage}.")}))
    sizes = VARIANTS.items()
    return [size for size, of in sizes if (list(of.embed_dims), list(of.depths)) == (channels, depths)]


@lru_cache(maxsize=16)
def _shapes(size: str, num_classes: int) -> dict[str, Any]:
    variant = VARIANTS[size]
    module = VAN.from_variant(variant, num_classes)
    image = jax.ShapeDtypeStruct((1, *variant.image_shape), np.float32)
    return jax.eval_shape(partial(module.init, train=False), {"params": jax.random.key(0)}, image)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
