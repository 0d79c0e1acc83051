"""Folding batch normalisation changes the weights of a Visual Attention Network and nothing that it computes."""

import jax
import numpy as np
import pytest

from training.models import van
from training.study.fold import fold_batch_normalisation

VARIANT = van.VANVariant((4, 6), (1, 1), (2, 2), 3, 1, (8, 8, 1))


@pytest.fixture(scope="module")
def network():
    """A small network of two stages with random weights and statistics, and images."""
    module = van.VAN.from_variant(VARIANT, 3, pixel_mean=(0.3,), pixel_std=(0.4,))
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(5, 8, 8, 1), dtype=np.uint8)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: rng.normal(0.3, 0.5, leaf.shape).astype(np.float32), variables)
    statistics = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.abs(leaf) + 0.05 if path[-1].key == "var" else leaf, variables["batch_stats"]
    )
    return module, variables["params"], statistics, images


def test_outputs_stay_and_absorbed_layers_do_nothing(network):
    module, params, statistics, images = network
    folded = fold_batch_normalisation(params, statistics)
    before = module.apply({"params": params, "batch_stats": statistics}, images)
    after = module.apply({"params": folded.params, "batch_stats": folded.batch_stats}, images)
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
    # Two patch embeddings and two MLPs take up their layers; what normalises an attention stays an affine map.
    layers = {path.rpartition("/")[0] for path in folded.constant}
    assert layers == {"patch_embed1/norm", "patch_embed2/norm", "block1_0/norm2", "block2_0/norm2"}
    for layer in layers:
        block, name = layer.split("/")
        weights = folded.params[block][name]
        assert np.all(weights["scale"] == 1) and np.all(weights["bias"] == 0)
    # Without these layers the function is the same: what they hold enters nothing but the kernels.
    assert not np.allclose(folded.params["patch_embed1"]["kernel"], params["patch_embed1"]["kernel"])


def test_statistics_of_another_network_are_refused(network):
    _, params, statistics, _ = network
    statistics = {**statistics, "patch_embed1": {"other": statistics["patch_embed1"]["norm"]}}
    params = {**params, "patch_embed1": {**params["patch_embed1"], "other": params["patch_embed1"]["norm"]}}
    with pytest.raises(ValueError, match="must be those of a VAN; got a layer 'other'"):
        fold_batch_normalisation(params, statistics)
