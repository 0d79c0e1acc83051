"""Data in batches, read again and again or once, and inputs that are pytrees: the same as arrays; and bad ones."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_problem, two_layers, usual

import bnnlaplace
from bnnlaplace.model.data import as_data

STRUCTURES = ["full", "diag", "kron", "lanczos"]
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 32, "tolerance": 0.05, "microbatch": 3}


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        yield random_problem(bnnlaplace.categorical(), np.random.default_rng(1).integers(0, 3, size=11))


@pytest.fixture(scope="module")
def whole(problem):
    """A function from a structure to its posterior, fitted to arrays."""

    @cache
    def fitted(structure):
        la = bnnlaplace.Laplace(problem.network, hessian_structure=structure)
        return la.fit((problem.inputs, problem.targets), **OPTIONS)

    return fitted


class Loader:
    """Batches of four from a source that is read anew by every pass, as those of a file are."""

    def __init__(self, problem, sizes=(4, 4, 3)):
        self.problem, self.sizes, self.passes = problem, sizes, 0

    def __iter__(self):
        self.passes += 1
        ends = np.cumsum(self.sizes)
        for start, end in zip(ends - self.sizes, ends, strict=True):
            yield self.problem.inputs[start:end], self.problem.targets[start:end]


def assert_same(found, expected, problem):
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-9)
    np.testing.assert_allclose(found.mode_gradient(), expected.mode_gradient(), atol=1e-9)
    np.testing.assert_allclose(
        found.functional_variance(problem.inputs), expected.functional_variance(problem.inputs), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("structure", usual(["lanczos"], STRUCTURES))
def test_batches_are_the_same_data(problem, whole, structure):
    loader = Loader(problem)
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure).fit(loader, **OPTIONS)
    assert_same(la, whole(structure), problem)
    # One pass where sums are enough, one for each block of products otherwise. The first one begins with the batch that
    # was looked at.
    assert loader.passes == 1 if structure != "lanczos" else loader.passes > 3


@pytest.mark.parametrize("structure", usual(["diag"], ["diag", "kron", "full"]))
def test_a_generator_can_be_read_once(problem, whole, structure):
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure).fit(iter(Loader(problem)), **OPTIONS)
    assert_same(la, whole(structure), problem)


def test_a_generator_suits_the_last_layer_whose_features_are_kept(problem):
    options = {"subset_of_weights": lambda path: path in ("w2", "b2"), "hessian_structure": "lanczos"}
    found = bnnlaplace.Laplace(problem.network, **options).fit(iter(Loader(problem)), **OPTIONS)
    loader = Loader(problem)
    expected = bnnlaplace.Laplace(problem.network, **options).fit(loader, **OPTIONS)
    assert loader.passes == 1
    assert_same(found, expected, problem)
    arrays = bnnlaplace.Laplace(problem.network, **options).fit((problem.inputs, problem.targets), **OPTIONS)
    assert_same(found, arrays, problem)


def test_a_part_of_the_data_is_scaled_to_all(problem, whole):
    la = bnnlaplace.Laplace(problem.network, hessian_structure="kron").fit(Loader(problem), num_data=22, **OPTIONS)
    expected = whole("kron").structure.scaled(2.0)
    np.testing.assert_allclose(la.structure.log_determinant(1.0), expected.log_determinant(1.0), rtol=1e-9)
    np.testing.assert_allclose(la.fitted.log_likelihood.value, 2 * whole("kron").fitted.log_likelihood.value, rtol=1e-9)


@pytest.mark.parametrize(
    ("structure", "subset"),
    usual([("kron", "all"), ("lanczos", "last_layer")], STRUCTURES, ("all", "last_layer")),
)
def test_inputs_that_are_pytrees(problem, structure, subset):
    """A mask beside the features, which plain inputs of another network hold, too."""
    mask = np.random.default_rng(0).integers(0, 2, size=(11, 4)).astype(float)
    tree = {"x": problem.inputs, "mask": mask}
    of_tree = problem.network
    of_tree = bnnlaplace.Network.from_function(
        lambda p, inputs: two_layers(p, inputs["x"] * inputs["mask"]), of_tree.params
    )
    options = {"hessian_structure": structure, "subset_of_weights": subset}
    found = bnnlaplace.Laplace(of_tree, **options).fit((tree, problem.targets), **OPTIONS)
    plain = problem.inputs * mask
    expected = bnnlaplace.Laplace(problem.network, **options).fit((plain, problem.targets), **OPTIONS)
    for pred in ({"link_approx": "probit"}, {"link_approx": "mc", "key": jax.random.key(1), "num_samples": 4}):
        np.testing.assert_allclose(found.predictive(tree, **pred), expected.predictive(plain, **pred), rtol=1e-6)
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-8)
    with pytest.raises(ValueError, match="inputs to predict at must be finite"):
        found.predictive({"x": problem.inputs * np.nan, "mask": mask})


def fit(problem, data, structure="diag", **options):
    return bnnlaplace.Laplace(problem.network, hessian_structure=structure).fit(data, **OPTIONS | options)


def bad_batches(problem):
    """Data, options of the fit, and the message."""
    x, y = problem.inputs, problem.targets
    readable = "must be readable several times.*an iterator that can be read once"
    structure = r"one structure.*float64\[B,4\], int64\[B\] and then float64\[B,3\], int64\[B\]"
    counts = "as many targets as inputs, and at least one; got"
    return [
        ([(x, y), (x[:, :3], y)], {}, structure),
        ([(x, y), (x.astype(np.float32), y)], {}, r"float64\[B,4\], int64\[B\] and then float32\[B,4\]"),
        (iter(Loader(problem)), {"structure": "lanczos"}, readable),
        (iter(Loader(problem)), {"mean": "linear"}, readable),
        (iter(()), {}, "at least one batch; got none; an iterator may be used up"),
        ((x[:0], y[:0]), {}, f"{counts} 0 inputs and 0 targets"),
        (({"a": x, "b": x[:3]}, y), {}, "must be arrays with as many examples in each; got 3 and 11 examples"),
        (3, {}, "must be two arrays.*got int for a batch"),
        ([(x, y), (x, y + 1)], {}, "batch 1: .* labels must lie in 0..2"),
        ((x, y.astype(float)), {}, "labels must be integers of shape"),
        (
            [(x, y), (x * np.nan, y)],
            {},
            "batch 1: .* x must be finite; got NaN or infinite values in 11 of 11 of them, first in number 0",
        ),
    ]


def test_bad_batches(problem, unchecked_annotations):
    for data, options, message in bad_batches(problem):
        with pytest.raises(ValueError, match=message):
            fit(problem, data, **options)
            pytest.fail(f"accepted: {message}")


def test_passes_that_differ_are_found(problem):
    class Shrinking(Loader):
        def __iter__(self):
            batches = list(super().__iter__())
            yield from batches[: 3 if self.passes < 3 else 2]

    with pytest.raises(ValueError, match="the same batches in every pass; the first gave 11 examples, a later one 8"):
        fit(problem, Shrinking(problem), "lanczos")


def test_batches_of_one_shape(problem):
    shapes = [(batch.inputs.shape, float(batch.weights.sum())) for batch in as_data(Loader(problem))]
    assert shapes == [((4, 4), 4), ((4, 4), 4), ((4, 4), 3)]
    assert [batch.inputs.shape[0] for batch in as_data(Loader(problem, (2, 5, 4)))] == [2, 5, 4]


def test_batches_share_one_compilation(problem):
    from bnnlaplace.fitting import fit as structure_fit

    fit(problem, Loader(problem))
    before = structure_fit._compiled_curvature._cache_size()
    fit(problem, Loader(problem))
    fit(problem, Loader(problem, (4, 4, 2, 1)))
    assert structure_fit._compiled_curvature._cache_size() == before


def test_a_soft_target_is_a_float_array(problem):
    soft = np.eye(3)[problem.targets]
    found, expected = fit(problem, (problem.inputs, soft)), fit(problem, (problem.inputs, problem.targets))
    np.testing.assert_allclose(found.fitted.log_likelihood.value, expected.fitted.log_likelihood.value)
    assert float(found.fitted.log_likelihood.num_targets) == 33
    assert jnp.isfinite(found.log_marginal_likelihood().mean)


class Resumed:
    """A loader that keeps one iterator, as some with workers do; with `resets`, it is set back to the start first."""

    def __init__(self, problem, resets=False):
        self.loader, self.resets, self.kept = Loader(problem), resets, Kept(self)
        self.batches = iter(self.loader)

    def __iter__(self):
        if self.resets:
            self.batches = iter(self.loader)
        return self.kept


class Kept:
    def __init__(self, owner):
        self.owner = owner

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.owner.batches)


@pytest.mark.parametrize("resets", [False, True])
def test_a_loader_that_keeps_one_iterator(problem, whole, resets):
    """One pass sees all data. More passes are right if the iterator is set back, and an error if it is used up."""
    found = bnnlaplace.Laplace(problem.network, hessian_structure="diag").fit(Resumed(problem, resets), **OPTIONS)
    assert_same(found, whole("diag"), problem)
    lanczos = bnnlaplace.Laplace(problem.network, hessian_structure="lanczos")
    if resets:
        assert_same(lanczos.fit(Resumed(problem, True), **OPTIONS), whole("lanczos"), problem)
        lanczos.memory_estimate(Resumed(problem, True))
    else:
        with pytest.raises(ValueError, match="the first gave 11 examples, a later one 0; pass a list of batches"):
            lanczos.fit(Resumed(problem), **OPTIONS)
        with pytest.raises(
            ValueError, match="memory_estimate.*__iter__ goes on where the last one stopped; pass a list"
        ):
            lanczos.memory_estimate(Resumed(problem))


def test_a_loader_whose_second_pass_is_empty(problem):
    class Once(Loader):
        def __iter__(self):
            batches = list(super().__iter__())
            yield from batches if self.passes == 1 else ()

    with pytest.raises(ValueError, match="the first gave 11 examples, a later one 0"):
        fit(problem, Once(problem), "lanczos")


def test_several_processes_do_not_fit(problem, whole, monkeypatch):
    """Each of them would see a part of the data only. Predictions of each at its own inputs are right."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    data = (problem.inputs, problem.targets)
    la = whole("diag")
    for step in (
        lambda: fit(problem, data),
        lambda: fit(problem, Loader(problem)),
        lambda: la.memory_estimate(data),
        lambda: la.validation_curve(*data, [1.0], key=jax.random.key(0)),
        lambda: la.optimize_prior_precision("gridsearch", validation=data, key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match="must run in a single process.*process_count.*gather the data"):
            step()
    assert la.predictive(problem.inputs).shape == (11, 3)


BAD_OUTPUTS = {
    "integers": lambda p, x: (x @ p["w1"]).astype(int),
    "complex": lambda p, x: x @ p["w1"] + 1j,
    "bools": lambda p, x: x @ p["w1"] > 0,
    "no classes": lambda p, x: (x @ p["w1"])[:, :0],
    "no class axis": lambda p, x: (x @ p["w1"])[:, 0],
    "a fault": lambda p, x: x @ p["missing"],
    "nothing": lambda p, x: None,
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_networks_that_cannot_be_fitted(problem, case, unchecked_annotations):
    network = bnnlaplace.Network.from_function(BAD_OUTPUTS[case], problem.network.params)
    message = "the network raised KeyError: 'missing'" if case == "a fault" else "outputs must be one array of shape"
    with pytest.raises(ValueError, match=message):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit((problem.inputs, problem.targets))


@pytest.mark.parametrize("weights", [None, 1.0, "balanced"])
def test_what_are_no_weights_is_named(problem, weights, unchecked_annotations):
    """The message spoke of batches that are no pairs, as three things were taken for three batches."""
    la = bnnlaplace.Laplace(problem.network, hessian_structure="diag")
    with pytest.raises(ValueError, match=r"fit\(data=\(x, y, w\)\): w must be"):
        la.fit((problem.inputs, problem.targets, weights))


@pytest.mark.parametrize("data", ["abc", b"abc", {"x": 1}, np.ones((2, 2, 4)), np.ones(3), None, 1.0, (1, 2), [[1, 2]]])
def test_what_is_not_data(problem, data, unchecked_annotations):
    with pytest.raises(ValueError, match="must be two arrays|must be arrays"):
        fit(problem, data)
