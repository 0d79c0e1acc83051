"""The weights of the Flax network under the names of the official code, and of Hugging Face's.

The official code is Visual-Attention-Network/VAN-Classification. PyTorch keeps the kernel of a convolution as (outputs,
inputs, height, width), and that of a linear layer as (outputs, inputs).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

# From the official names to those of the Flax network: parts of a path that differ.
_PARTS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_MODULES = {
    "conv0": "spatial_gating_unit.conv0",
    "conv_spatial": "spatial_gating_unit.conv_spatial",
    "conv1": "spatial_gating_unit.conv1",
    "dwconv": "dwconv.dwconv",
}

# From names of Hugging Face, within one stage, to official ones. `s` and `i` stand for the stage and the block.
_HUGGING_FACE = {
    r"embeddings\.convolution": "patch_embed{s}.proj",
    r"embeddings\.normalization": "patch_embed{s}.norm",
    r"layers\.(?P<i>\d+)\.pre_normomalization": "block{s}.{i}.norm1",
    r"layers\.(?P<i>\d+)\.post_normalization": "block{s}.{i}.norm2",
    r"layers\.(?P<i>\d+)\.attention\.pre_projection\.conv": "block{s}.{i}.attn.proj_1",
    r"layers\.(?P<i>\d+)\.attention\.post_projection": "block{s}.{i}.attn.proj_2",
    r"layers\.(?P<i>\d+)\.attention\.attention_layer\.attention\.depth_wise": "block{s}.{i}.attn."
    "spatial_gating_unit.conv0",
    r"layers\.(?P<i>\d+)\.attention\.attention_layer\.attention\.depth_wise_dilated": "block{s}.{i}.attn."
    "spatial_gating_unit.conv_spatial",
    r"layers\.(?P<i>\d+)\.attention\.attention_layer\.attention\.point_wise": "block{s}.{i}.attn."
    "spatial_gating_unit.conv1",
    r"layers\.(?P<i>\d+)\.mlp\.in_dense": "block{s}.{i}.mlp.fc1",
    r"layers\.(?P<i>\d+)\.mlp\.depth_wise": "block{s}.{i}.mlp.dwconv.dwconv",
    r"layers\.(?P<i>\d+)\.mlp\.out_dense": "block{s}.{i}.mlp.fc2",
    r"layers\.(?P<i>\d+)\.attention_scaling\.weight": "block{s}.{i}.layer_scale_1",
    r"layers\.(?P<i>\d+)\.mlp_scaling\.weight": "block{s}.{i}.layer_scale_2",
    r"normalization": "norm{s}",
}
_STAGE = re.compile(r"(?:van\.)?encoder\.stages\.(?P<s>\d+)\.(?P<rest>.+)")
# What a file may hold that no network computes with: how many batches there were, and a normalisation that is never
# called.
_UNUSED = re.compile(r".*\.num_batches_tracked|(?:van\.)?layernorm\.(?:weight|bias)")


def official_names(names: Sequence[str]) -> dict[str, str]:
    """Map official names to the names that a file has, those of the official code or of Hugging Face.

    A name that is neither is mapped to itself, and so is a second name of one array. Names of what no network computes
    with are left out.
    """
    found: dict[str, str] = {}
    for name in names:
        if not _UNUSED.fullmatch(name):
            official = _official(name)
            found[name if official in found else official] = name
    return found


def name_of(path: Sequence[str]) -> str:
    """Return the official name of a leaf of the Flax network, from its path within its collection."""
    *modules, last = path
    modules = [re.sub(r"^(block\d+)_(\d+)$", r"\1.\2", module) for module in modules]
    is_embedding = modules[:1] and modules[0].startswith("patch_embed")
    if is_embedding and len(modules) == 1:
        modules.append("proj")
    return ".".join([*(_MODULES.get(module, module) for module in modules), _PARTS.get(last, last)])


def arranged(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Arrange an array of PyTorch as the leaf of this shape; None if it has another shape.

    Four axes become (height, width, inputs, outputs), those of a depthwise convolution (height, width, channels), and
    those of a pointwise one (inputs, outputs).
    """
    if array.ndim == 4 and len(shape) == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 4 and len(shape) == 3 and array.shape[1] == 1:
        array = array[:, 0].transpose(1, 2, 0)
    elif array.ndim == 4 and len(shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0].T
    elif array.ndim == 2 and len(shape) == 2:
        array = array.T
    return np.ascontiguousarray(array) if array.shape == shape else None


def _official(name: str) -> str:
    if match := re.fullmatch(r"classifier\.(weight|bias)", name):
        return f"head.{match[1]}"
    stage = _STAGE.fullmatch(name)
    if stage is None:
        return name
    for pattern, replacement in _HUGGING_FACE.items():
        if match := re.fullmatch(rf"{pattern}(?P<last>(?:\.(?:weight|bias|running_mean|running_var))?)", stage["rest"]):
            found: Mapping[str, str] = match.groupdict()
            return replacement.format(s=int(stage["s"]) + 1, i=found.get("i")) + found["last"]
    return name
