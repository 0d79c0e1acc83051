"""Files of weights as others publish them: safetensors, and pickles of PyTorch that hold nothing but arrays."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import UserError, one_line

SAFETENSORS = ".safetensors"
PICKLES = (".pth", ".pth.tar", ".pt", ".bin")

SAFE_TORCH = (2, 6)
"""Before this release a pickle could run code although `weights_only` was set."""

# Entries under which training scripts keep the weights, beside the optimiser and the like.
_WEIGHTS = ("state_dict", "model", "model_state_dict")
_LONGEST = 300  # characters of what a library says
# A name that data parallelism puts in front of all others.
_PARALLEL = "module."


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file by their names, numbers in 16 bits as float32.

    Raises
    ------
    UserError
        There is no such file, it is of another kind or damaged, it is a pickle that would run code or that PyTorch is
        missing for, or it holds no weights.
    """
    if not path.is_file():
        raise UserError(f"the file of weights must exist; there is none at {path}; check the path")
    if path.name.endswith(SAFETENSORS):
        arrays = _read_safetensors(path)
    elif path.name.endswith(PICKLES):
        arrays = _read_pickle(path)
    else:
        raise UserError(
            f"the file of weights must end in {', '.join((SAFETENSORS, *PICKLES))}; got {path.name}; rename it if it "
            "is one of these"
        )
    if arrays and all(name.startswith(_PARALLEL) for name in arrays):
        arrays = {name.removeprefix(_PARALLEL): array for name, array in arrays.items()}
    return arrays


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        # As arrays of JAX, because NumPy has no bfloat16 of its own.
        with safe_open(path, framework="flax") as file:
            return {name: _in_single_precision(np.asarray(file.get_tensor(name))) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} must be a file of safetensors; got {one_line(error)[:_LONGEST]}; download it again"
        ) from error
    except Exception as error:  # as for numbers of 8 or 4 bits, which Flax has no type for
        raise UserError(
            f"{path} must hold numbers of 16 bits or more; got {one_line(error)[:_LONGEST]}; convert them"
        ) from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path.name} is a pickle, and PyTorch must be installed to read it; pip install torch, or take the file "
            f"that ends in {SAFETENSORS} where there is one"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise UserError(
            f"PyTorch must be {'.'.join(map(str, SAFE_TORCH))} or newer to read a pickle without running it "
            f"(CVE-2025-32434); got {torch.__version__}; upgrade it, or take a file that ends in {SAFETENSORS}"
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises whatever the broken file makes it raise
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} must hold nothing but arrays and plain values; as a pickle it would call {called[1]}; nothing "
                "of it was run; where you trust it, save the `state_dict()` of the model anew, or as safetensors"
            ) from None
        raise UserError(
            f"{path} must be a file of PyTorch; got {one_line(error)[:_LONGEST]}; download it again"
        ) from error
    state = _state_of(held)
    if state is None:
        raise UserError(
            f"{path} must hold weights by name, or under one of {', '.join(_WEIGHTS)}; got {type(held).__name__}"
            f"{_names_of(held)}; save the `state_dict()` of the model"
        )
    return {name: _as_array(tensor) for name, tensor in state.items()}


def _state_of(held: Any) -> Mapping[str, Any] | None:
    """The arrays by name that a checkpoint holds, itself or in one of its entries."""
    import torch

    for candidate in (held, *(held.get(name) for name in _WEIGHTS if isinstance(held, Mapping))):
        holds = isinstance(candidate, Mapping) and bool(candidate)
        if holds and all(isinstance(value, torch.Tensor) for value in candidate.values()):
            return candidate
    return None


def _names_of(held: Any) -> str:
    return f" with {', '.join(map(str, list(held)[:8]))}" if isinstance(held, Mapping) else ""


def _as_array(tensor: Any) -> np.ndarray:
    """An array of PyTorch in NumPy, numbers in 16 bits as float32."""
    import torch

    is_short = tensor.dtype in (torch.bfloat16, torch.float16)
    tensor = tensor.detach()  # of a parameter, which asks for gradients
    return (tensor.float() if is_short else tensor).numpy()


def _in_single_precision(array: np.ndarray) -> np.ndarray:
    """Numbers in 16 bits as float32; others as they are."""
    is_short = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
    return array.astype(np.float32) if is_short else array
