"""How users' models are wrapped: by value, in boxes of metadata, and with several inputs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive
from flax import nnx

from bnnlaplace import Laplace, Network
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.model.forward import key_of

RNG = np.random.default_rng(3)
X = RNG.normal(size=(12, 4)).astype(np.float32)
Y = RNG.integers(0, 3, size=12)


def evidence(network, inputs=X, structure="diag", **options):
    options = {"prior_precision": {"Dense_0": 0.5, "Dense_1": 2.0}} | options
    return Laplace(network, hessian_structure=structure, **options).fit((inputs, Y)).log_marginal_likelihood().mean


# --- by value ---------------------------------------------------------------------------------------------------


class Config:
    """Like a ConfigDict: attributes and `items`, without a hash."""

    __hash__ = None

    def __init__(self, **entries):
        self.entries = entries

    def items(self):
        return self.entries.items()

    def __eq__(self, other):
        return isinstance(other, Config) and other.entries == self.entries


class Stages(nn.Module):
    """Sizes in a list and a dictionary, as authors of residual networks write them."""

    sizes: list
    config: Any
    act: Any = nn.tanh

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = self.act(nn.Dense(size)(x))
        return nn.Dense(dict(self.config.items())["classes"])(x)


def test_modules_of_lists_and_configurations_share_programs_by_value():
    def network(size=5, **changes):
        module = Stages([size], Config(classes=3, rate=[0.1, 0.2], **changes))
        return Network.from_linen(module, module.init(jax.random.key(0), X))

    first, again = network(), network()
    assert first.forward == again.forward and hash(first.forward) == hash(again.forward)
    assert first.forward != network(6).forward and first.forward != network(extra=1).forward
    assert np.isfinite(evidence(first))
    traces = []
    traced = jax.jit(lambda network, x: (traces.append(1), network(network.params, x))[1])
    for each in (first, again):
        traced(each, X)
    assert len(traces) == 1


def test_keys_are_equal_for_equal_values():
    @dataclasses.dataclass
    class Record:
        entries: list

    class Opaque:
        __hash__ = None

    def values():
        return [
            {"b": 1, "a": [1, 2]},
            [1, (2, [3])],
            {1, 2},
            np.arange(3),
            jnp.ones(2),
            Record([1, 2]),
            (Record([np.ones(2)]), {"x": {3}}),
        ]

    assert list(map(key_of, values())) == list(map(key_of, values()))
    assert len(set(map(key_of, values()))) == len(values())
    assert key_of(np.arange(3)) != key_of(np.arange(3.0)) != key_of(np.arange(3.0, dtype=np.float32))
    opaque = Opaque()
    assert key_of(opaque) == key_of(opaque) != key_of(Opaque())
    random_key = jax.random.key(0)  # no array of NumPy can be made of it
    assert key_of([random_key]) == key_of([random_key])
    assert key_of("relu") == "relu"


def test_an_array_among_the_arguments_is_a_constant():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return nn.Dense(3)(x * mask)

    mask = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    variables = Masked().init(jax.random.key(0), X, mask)
    network = Network.from_linen(Masked(), variables, mask=mask)
    np.testing.assert_allclose(network(network.params, X), Masked().apply(variables, X, mask), rtol=1e-6)


# --- boxes ------------------------------------------------------------------------------------------------------


KERNEL_INIT, BIAS_INIT = nn.initializers.lecun_normal(), nn.initializers.normal()


def two_layers(kernel_init=KERNEL_INIT, bias_init=BIAS_INIT):
    class TwoLayers(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"kernel_init": kernel_init, "bias_init": bias_init}
            x = nn.tanh(nn.Dense(5, **options)(x))
            return nn.Dense(3, **options)(x)

    return TwoLayers()


BOXES = {"partitioned": nn.with_partitioning, "logically partitioned": nn.with_logical_partitioning}


@pytest.mark.parametrize(("boxes", "structure"), [exhaustive("partitioned", "kron"), ("logically partitioned", "diag")])
def test_boxed_weights_of_linen_are_those_without_boxes(boxes, structure, tmp_path):
    box = BOXES[boxes]
    module = two_layers(box(nn.initializers.lecun_normal(), (None, "model")), box(nn.initializers.normal(), ("model",)))
    boxed = module.init(jax.random.key(0), X)
    plain = nn.unbox(boxed)
    assert leaf_names(boxed["params"]) != leaf_names(plain["params"])
    network, reference = Network.from_linen(module, boxed), Network.from_linen(two_layers(), plain)
    assert jax.tree.structure(network.params) == jax.tree.structure(reference.params)
    assert evidence(network, structure=structure) == pytest.approx(evidence(reference, structure=structure), rel=1e-6)
    # A checkpoint of the one is read with the other.
    Laplace(network, hessian_structure=structure).fit((X, Y)).save(tmp_path / "la")
    assert np.isfinite(Laplace.load(tmp_path / "la", reference).predictive(X[:2])).all()


def test_boxes_that_a_function_opens():
    """The function gets the boxes that it was given; paths, groups and evidence are those without."""

    def outputs(params, x):
        hidden = jnp.tanh(x @ params["Dense_0"]["kernel"][...] + params["Dense_0"]["bias"][...])
        return hidden @ params["Dense_1"]["kernel"][...] + params["Dense_1"]["bias"][...]

    plain = nn.unbox(two_layers().init(jax.random.key(0), X))["params"]
    network = Network.from_function(outputs, jax.tree.map(nnx.Param, plain))
    reference = Network.from_function(outputs, plain)
    assert leaf_names(network.params) == leaf_names(reference.params)
    assert evidence(network) == pytest.approx(evidence(reference), rel=1e-6)
    last = [evidence(each, subset_of_weights="last_layer", prior_precision=1.0) for each in (network, reference)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)


def test_metadata_of_nnx_does_not_change_the_groups():
    def model(**options):
        return nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0), **options))

    with nnx.use_eager_sharding(False):
        boxed = model(kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")))
    network, reference = Network.from_nnx(boxed), Network.from_nnx(model())
    assert leaf_names(network.params) == leaf_names(reference.params)
    precision = {"layers/0": 0.5}
    assert evidence(network, prior_precision=precision) == pytest.approx(evidence(reference, prior_precision=precision))


# --- several inputs ---------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train=False):
        return nn.Dense(3)(x * mask)


class OptionalInput(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        return nn.Dense(3)(x if mask is None else x * mask)


class OneTree(nn.Module):
    @nn.compact
    def __call__(self, inputs, train=False):
        x, mask = inputs if isinstance(inputs, (tuple, list)) else (inputs["x"], inputs["mask"])
        return nn.Dense(3)(x * mask)


class TwoInputsNNX(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.dense(x * mask)


MASK = RNG.integers(0, 2, size=X.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (TwoInputs(), (X, MASK)),
        exhaustive(TwoInputs(), [X, MASK]),
        exhaustive(TwoInputs(), {"mask": MASK, "x": X}),
        (OptionalInput(), {"mask": MASK, "x": X}),
        exhaustive(OneTree(), (X, MASK)),
        (OneTree(), {"mask": MASK, "x": X}),
    ],
)
def test_linen_modules_of_several_inputs(module, inputs):
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(1), X)["params"]
    network = Network.from_linen(module, {"params": {"Dense_0": params}})
    reference = Network.from_linen(dense, {"params": params})
    found, expected = (
        Laplace(each, hessian_structure="full").fit((x, Y)) for each, x in ((network, inputs), (reference, X * MASK))
    )
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-6)
    np.testing.assert_allclose(found.predictive(inputs), expected.predictive(X * MASK), rtol=1e-5)


def test_nnx_models_of_several_inputs():
    network, reference = Network.from_nnx(TwoInputsNNX()), Network.from_nnx(TwoInputsNNX().dense)
    for inputs in ((X, MASK), {"x": X, "mask": MASK}):
        expected = reference(reference.params, X * MASK)
        np.testing.assert_allclose(network(network.params, inputs), expected, rtol=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_is_not_a_model(unchecked_annotations):
    dense = nn.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    with pytest.raises(
        TypeError, match=r"from_linen\(module=...\) must be a flax.linen.Module; got Linear; .*from_nnx"
    ):
        Network.from_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), variables)
    with pytest.raises(TypeError, match=r"from_linen\(variables=...\) must be the dictionary .*; got ArrayImpl"):
        Network.from_linen(dense, jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"from_linen\(variables=...\) must hold arrays of numbers; got kernel \(str\)"
    ):
        Network.from_linen(dense, {"params": {"kernel": "w"}})
    with pytest.raises(TypeError, match=r"from_function\(function=...\) must be a function .*; got int"):
        Network.from_function(3, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"from_function.* must hold arrays of numbers; got w \(object\)"):
        Network.from_function(lambda w, x: x, {"w": object()})
    with pytest.raises(
        ValueError, match=r"weights of from_function.* real floating-point numbers; got value \(complex64"
    ):
        Network.from_function(lambda w, x: x, jnp.ones(2, complex))


class Normalised(nn.Module):
    """Batch normalisation as it is written for several devices."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(4)(x))
        return nn.Dense(3)(x)


def test_batch_normalisation_over_devices():
    variables = Normalised().init(jax.random.key(0), X, train=False)
    with pytest.raises(
        ValueError, match="called without pmap or shard_map; .*NameError.*axis_name.* such as train=False"
    ):
        evidence(Network.from_linen(Normalised(), variables, train=True), prior_precision=1.0)
    assert np.isfinite(evidence(Network.from_linen(Normalised(), variables, train=False), prior_precision=1.0))
