"""Official weights under both kinds of names, and files that are not what they should be."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from bnnlaplace.checkpoint import load_pytree, save_pytree
from training import import_weights
from training.config import Config, Model, Optimizer
from training.errors import UserError
from training.models.van import VAN, VARIANTS
from training.pretrained import convert, files, store
from training.pretrained.start import start_from

# One stage with one block: the official name, that of Hugging Face, and the path in the Flax network.
STAGE = [
    ("patch_embed1.proj", "embeddings.convolution", "patch_embed1"),
    ("patch_embed1.norm", "embeddings.normalization", "patch_embed1/norm"),
    ("block1.0.norm1", "layers.0.pre_normomalization", "block1_0/norm1"),
    ("block1.0.attn.proj_1", "layers.0.attention.pre_projection.conv", "block1_0/attn/proj_1"),
    (
        "block1.0.attn.spatial_gating_unit.conv0",
        "layers.0.attention.attention_layer.attention.depth_wise",
        "block1_0/attn/conv0",
    ),
    (
        "block1.0.attn.spatial_gating_unit.conv_spatial",
        "layers.0.attention.attention_layer.attention.depth_wise_dilated",
        "block1_0/attn/conv_spatial",
    ),
    (
        "block1.0.attn.spatial_gating_unit.conv1",
        "layers.0.attention.attention_layer.attention.point_wise",
        "block1_0/attn/conv1",
    ),
    ("block1.0.attn.proj_2", "layers.0.attention.post_projection", "block1_0/attn/proj_2"),
    ("block1.0.norm2", "layers.0.post_normalization", "block1_0/norm2"),
    ("block1.0.mlp.fc1", "layers.0.mlp.in_dense", "block1_0/mlp/fc1"),
    ("block1.0.mlp.dwconv.dwconv", "layers.0.mlp.depth_wise", "block1_0/mlp/dwconv"),
    ("block1.0.mlp.fc2", "layers.0.mlp.out_dense", "block1_0/mlp/fc2"),
    ("norm1", "normalization", "norm1"),
]
SCALES = [
    ("block1.0.layer_scale_1", "layers.0.attention_scaling.weight", "block1_0/layer_scale_1"),
    ("block1.0.layer_scale_2", "layers.0.mlp_scaling.weight", "block1_0/layer_scale_2"),
]
CHANNELS, CLASSES = 16, 7
# Shapes of PyTorch in the first stage of size "digits", whose second stage has 32 channels.
KERNELS = {"patch_embed1.proj": (16, 1, 3, 3), "block1.0.mlp.fc1": (32, 16, 1, 1), "block1.0.mlp.fc2": (16, 32, 1, 1)}
KERNELS |= {f"block1.0.attn.{name}": (16, 16, 1, 1) for name in ("proj_1", "proj_2", "spatial_gating_unit.conv1")}
KERNELS |= {"block1.0.attn.spatial_gating_unit.conv0": (16, 1, 5, 5), "block1.0.mlp.dwconv.dwconv": (32, 1, 3, 3)}
KERNELS |= {"block1.0.attn.spatial_gating_unit.conv_spatial": (16, 1, 7, 7)}


def official():
    """Weights of size "digits" as the official code keeps them."""
    rng, state = np.random.default_rng(0), {}

    def draw(name, shape):
        # The second stage has twice the channels in all axes but those of images and windows.
        for stage in (1, 2):
            wide = [2 * n if stage == 2 and n > 7 else n for n in shape]
            wide[1:2] = [16] if stage == 2 and name == "patch_embed1.proj.weight" else wide[1:2]
            renamed = re.sub(r"^(patch_embed|block|norm)1", rf"\g<1>{stage}", name)
            numbers = rng.normal(size=wide).astype(np.float32)
            state[renamed] = np.abs(numbers) if name.endswith("running_var") else numbers

    for name, _, _ in STAGE:
        if name in KERNELS:
            draw(f"{name}.weight", KERNELS[name])
            draw(f"{name}.bias", KERNELS[name][:1])
        else:
            is_batch_norm = name != "norm1"
            for last in ("weight", "bias", *(("running_mean", "running_var") if is_batch_norm else ())):
                draw(f"{name}.{last}", (CHANNELS,))
    for name, _, _ in SCALES:
        draw(name, (CHANNELS,))
    state["head.weight"] = rng.normal(size=(CLASSES, 2 * CHANNELS)).astype(np.float32)
    state["head.bias"] = rng.normal(size=CLASSES).astype(np.float32)
    state["patch_embed1.norm.num_batches_tracked"] = np.array(12)
    return state


def hugging_face(state):
    """The same under the names of Hugging Face, with its normalisation that is never called."""
    renamed = {"van.layernorm.weight": np.ones(32), "van.layernorm.bias": np.ones(32)}
    for name, array in state.items():
        if name.startswith("head."):
            renamed[name.replace("head", "classifier")] = array
            continue
        stage = re.match(r"(?:patch_embed|block|norm)(\d)", name)[1]
        first = re.sub(r"^(patch_embed|block|norm)\d", r"\g<1>1", name)
        for ours, theirs, _ in SCALES + STAGE:
            if first == ours or first.startswith(f"{ours}."):
                renamed[f"van.encoder.stages.{int(stage) - 1}.{theirs}{first.removeprefix(ours)}"] = array
                break
    assert len(renamed) == len(state) + 2
    return renamed


def at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def test_both_kinds_of_names_give_the_same_variables():
    """Kernels as (height, width, inputs, outputs), depthwise ones without inputs, pointwise ones without a window."""
    state = official()
    variables = convert.to_flax(state, "digits")
    for name, _, path in STAGE:
        params = at(variables["params"], path)
        if name not in KERNELS:
            np.testing.assert_array_equal(params["scale"], state[f"{name}.weight"])
            np.testing.assert_array_equal(params["bias"], state[f"{name}.bias"])
            if name != "norm1":
                stats = at(variables["batch_stats"], path)
                np.testing.assert_array_equal(stats["mean"], state[f"{name}.running_mean"])
                np.testing.assert_array_equal(stats["var"], state[f"{name}.running_var"])
            continue
        kernel = state[f"{name}.weight"]
        expected = {3: np.einsum("cohw->hwc", kernel), 4: np.einsum("oihw->hwio", kernel), 2: kernel[:, :, 0, 0].T}
        np.testing.assert_array_equal(params["kernel"], expected[params["kernel"].ndim])
        np.testing.assert_array_equal(params["bias"], state[f"{name}.bias"])
    for name, _, path in SCALES:
        np.testing.assert_array_equal(at(variables["params"], path), state[name])
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], state["head.weight"].T)
    renamed = convert.to_flax(hugging_face(state), "digits")
    paths = zip(*(sorted(map(str, files_of(tree).items())) for tree in (variables, renamed)), strict=True)
    assert all(one == other for one, other in paths)


def files_of(tree, prefix=""):
    """Digests of all leaves by path."""
    if not isinstance(tree, dict):
        return {prefix: (tree.shape, tree.tobytes())}
    return {k: v for name, value in tree.items() for k, v in files_of(value, f"{prefix}/{name}").items()}


def test_the_program_writes_a_checkpoint_of_the_network(tmp_path, capsys):
    save_file(official(), tmp_path / "model.safetensors")
    command = [str(tmp_path / "model.safetensors"), "--size", "digits", "--out", str(tmp_path / "out")]
    assert import_weights.main(command) == 0
    assert "weights of size digits for 7 classes" in capsys.readouterr().out
    pretrained = store.read(tmp_path / "out")
    assert (pretrained.size, pretrained.num_classes, pretrained.source["file"]) == ("digits", 7, "model.safetensors")
    variables, _ = load_pytree(tmp_path / "out")
    module = VAN.from_variant(VARIANTS["digits"], CLASSES)
    assert module.apply(variables, np.ones((2, 8, 8, 1), np.float32)).shape == (2, CLASSES)


def test_weights_of_another_network_are_listed_and_nothing_is_written(tmp_path, capsys):
    save_file(official(), tmp_path / "model.safetensors")
    command = [str(tmp_path / "model.safetensors"), "--size", "cifar", "--out", str(tmp_path / "out")]
    assert import_weights.main(command) == 2
    said = capsys.readouterr().err
    assert "must have the weights of size cifar and no others; it lacks " in said
    assert "other shapes have " in said
    assert "choose --size digits, which it looks like" in said and not (tmp_path / "out").exists()

    state = {**official(), "aux.weight": np.ones(3)}
    del state["block1.0.norm1.bias"]
    with pytest.raises(UserError, match=r"it lacks block1.0.norm1.bias; it has besides aux.weight; download it again"):
        convert.to_flax(state, "digits")
    twice = {**official(), "classifier.bias": np.ones(CLASSES)}
    with pytest.raises(UserError, match="it has besides classifier.bias"):
        convert.to_flax(twice, "digits")
    negative = {**official(), "block1.0.norm2.running_var": -np.ones(CHANNELS, np.float32)}
    with pytest.raises(UserError, match="variances of at least zero; got others in .*block1.0.norm2.running_var"):
        convert.to_flax(negative, "digits")
    with pytest.raises(UserError, match="`--size` must be one of b0, b1, .*; got 'b9'"):
        convert.to_flax(state, "b9")


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="must exist; there is none at"):
        files.read_weights(tmp_path / "none.safetensors")
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"must end in .safetensors, .pth"):
        files.read_weights(tmp_path / "weights.npz")
    save_file(official(), tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="must be a file of safetensors; got SafetensorError: .*; download it again"):
        files.read_weights(tmp_path / "cut.safetensors")
    (tmp_path / "model.pth.tar").write_bytes(b"pickle")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="PyTorch must be installed to read it; pip install torch"):
        files.read_weights(tmp_path / "model.pth.tar")


def test_the_names_of_data_parallelism_and_short_numbers_are_read(tmp_path):
    import jax.numpy as jnp
    from safetensors.flax import save_file as save_arrays

    short = {f"module.{name}": jnp.asarray(array, jnp.bfloat16) for name, array in official().items()}
    save_arrays(short, tmp_path / "short.safetensors")
    arrays = files.read_weights(tmp_path / "short.safetensors")
    assert arrays["head.bias"].dtype == np.float32
    np.testing.assert_allclose(arrays["head.bias"], official()["head.bias"], rtol=1e-2)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A directory with weights of size "digits" for 7 classes."""
    variables = convert.to_flax(official(), "digits")
    directory = tmp_path_factory.mktemp("imported") / "weights"
    source = {"file": "model.safetensors", "sha256": "0"}
    store.write(directory, store.Pretrained("digits", variables["params"], variables["batch_stats"], source))
    return directory


def shapes(num_classes, channels=1):
    module = VAN.from_variant(VARIANTS["digits"], num_classes)
    image = np.zeros((1, 8, 8, channels), np.float32)
    variables = jax.eval_shape(module.init, {"params": jax.random.key(0)}, image)
    return variables["params"], variables["batch_stats"]


def test_a_run_starts_from_imported_weights(imported):
    """With as many classes the head is kept; with others it alone is new."""
    config = Config(model=Model(variant="digits"), init_from=imported)
    same = start_from(imported, config, *shapes(CLASSES))
    np.testing.assert_array_equal(same.params["head"]["bias"], official()["head.bias"])
    assert "model.safetensors" in same.described and "its head for 7 classes is kept" in same.described
    params, batch_stats = shapes(3)
    other = start_from(imported, config, params, batch_stats)
    assert other.params["head"] is params["head"] and "a new head for 3 classes" in other.described
    stem = other.params["patch_embed1"]
    np.testing.assert_array_equal(stem["kernel"], np.einsum("oihw->hwio", official()["patch_embed1.proj.weight"]))
    np.testing.assert_array_equal(
        other.batch_stats["patch_embed1"]["norm"]["var"], official()["patch_embed1.norm.running_var"]
    )


def test_weights_that_a_run_cannot_start_from(imported, tmp_path):
    params, batch_stats = shapes(CLASSES)
    with pytest.raises(UserError, match="holds those of digits; choose --model.variant digits"):
        start_from(imported, Config(model=Model(variant="cifar")), params, batch_stats)
    with pytest.raises(UserError, match=r"patch_embed1/kernel has shape \(3, 3, 1, 16\) .*, and \(3, 3, 3, 16\)"):
        start_from(imported, Config(), *shapes(CLASSES, channels=3))
    untrained = Optimizer(epochs=0, warmup_epochs=0, polish_epochs=0)
    with pytest.raises(UserError, match="a head for 3 classes where nothing is trained; .* has one for 7; train it"):
        start_from(imported, Config(optimizer=untrained, init_from=imported), *shapes(3))
    save_pytree(tmp_path / "other", {"w": np.zeros(2)}, {})
    with pytest.raises(UserError, match="a directory that training.import_weights wrote; .* holds another checkpoint"):
        start_from(tmp_path / "other", Config(), params, batch_stats)
    with pytest.raises(UserError, match="`init_from` must be given where `optimizer.epochs` is 0"):
        Config(optimizer=Optimizer(epochs=0, warmup_epochs=0))
