"""Arrays of any library are taken; what would lose numbers, a mask or their meaning is refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from jax.experimental import sparse
from scipy.sparse import csr_array

import bnnlaplace
from bnnlaplace import Laplace, Network

RNG = np.random.default_rng(5)
X = RNG.normal(size=(12, 4)).astype(np.float32)
Y = RNG.integers(0, 3, size=12)
NETWORK = Network.from_function(lambda w, x: x @ w, jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32))


def outputs_of_tree(w, x):
    return (x["a"] + x["b"]) @ w


OF_TREE = Network.from_function(outputs_of_tree, NETWORK.params)


@pytest.fixture(scope="module")
def la():
    return Laplace(NETWORK, hessian_structure="diag").fit((X, Y))


class Tensor:
    """A tensor of another library, with one of the protocols that turn it into an array."""

    def __init__(self, array, protocol):
        self.values = np.asarray(array)
        self.shape = self.values.shape
        self.protocol = protocol

    def __getattr__(self, name):
        if name != self.__dict__.get("protocol"):
            raise AttributeError(name)
        return {
            "__array__": lambda dtype=None, copy=None: self.values,
            "__jax_array__": lambda: jnp.asarray(self.values),
        }[name]


class Exported(Tensor):
    """DLPack is asked of the class and needs two methods. `__array__` fails, as that of a tensor of 16 bits does."""

    def __init__(self, array):
        super().__init__(array, None)

    def __array__(self, dtype=None, copy=None):
        raise TypeError("unsupported type")

    def __dlpack__(self, **options):
        return self.values.__dlpack__()

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


FOREIGN = {
    "array protocol": lambda array: Tensor(array, "__array__"),
    "array protocol of jax": lambda array: Tensor(array, "__jax_array__"),
    "dlpack": Exported,
    "read only": lambda array: np.asarray(jnp.asarray(array)),
    "not contiguous": lambda array: np.repeat(array, 2, axis=0)[::2],
    "reversed strides": lambda array: array[::-1].copy()[::-1],
    "masked without a mask": np.ma.masked_array,
    "big endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "matrix": lambda array: np.asmatrix(array) if array.ndim == 2 else array,
}


@pytest.mark.filterwarnings("ignore:the matrix subclass", "ignore:the validation NLL is lowest at an end")
@pytest.mark.parametrize("kind", FOREIGN)
def test_arrays_of_other_libraries_are_taken_everywhere(la, kind, unchecked_annotations):
    x, y = FOREIGN[kind](X), FOREIGN[kind](Y)
    expected = la.log_marginal_likelihood().mean
    for data in ((x, y), [(x, y)], iter([(x, y)])):
        found = Laplace(NETWORK, hessian_structure="diag").fit(data)
        assert found.log_marginal_likelihood().mean == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(la.predictive(x), la.predictive(X), rtol=1e-6)
    np.testing.assert_allclose(la.functional_variance(x), la.functional_variance(X), rtol=1e-6)
    np.testing.assert_allclose(bnnlaplace.model.outputs(NETWORK, x), X @ np.asarray(NETWORK.params), rtol=1e-4)
    options = {"key": jax.random.key(0), "num_samples": 4}
    grid = {"precisions": [0.1, 1.0], **options}
    chosen = [la.optimize_prior_precision("gridsearch", validation=data, **grid) for data in ((x, y), [[x, y]], (X, Y))]
    assert len({float(each.prior_precision) for each in chosen}) == 1


@pytest.mark.filterwarnings("ignore:the validation NLL is lowest at an end")
def test_tensors_of_torch(la, unchecked_annotations):
    torch = pytest.importorskip("torch")
    x, y = torch.from_numpy(X.copy()), torch.from_numpy(Y.copy())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    for data in ((x, y), loader):
        found = Laplace(NETWORK, hessian_structure="diag").fit(data)
        assert found.log_marginal_likelihood().mean == pytest.approx(la.log_marginal_likelihood().mean, rel=1e-6)
    np.testing.assert_allclose(la.predictive(x), la.predictive(X), rtol=1e-6)
    half = x.to(torch.bfloat16)
    np.testing.assert_allclose(la.predictive(half), la.predictive(jnp.asarray(X, jnp.bfloat16)), rtol=1e-5)
    with pytest.raises(ValueError, match="a Tensor could not be converted: .*grad"):
        la.predictive(x.clone().requires_grad_())
    la.optimize_prior_precision("gridsearch", validation=loader, key=jax.random.key(0))


@pytest.mark.parametrize("dtype", usual([jnp.bfloat16, np.uint8, bool], [np.float64, np.float16, np.int64, np.uint64]))
def test_types_of_numbers(dtype, unchecked_annotations):
    x = (X > 0).astype(dtype)
    expected = Laplace(NETWORK, hessian_structure="diag").fit(((X > 0).astype(np.float32), Y))
    found = Laplace(NETWORK, hessian_structure="diag").fit((x, Y))
    rel = 1e-2 if np.dtype(dtype).itemsize == 2 else 1e-6
    assert found.log_marginal_likelihood().mean == pytest.approx(expected.log_marginal_likelihood().mean, rel=rel)
    np.testing.assert_allclose(found.predictive(x), expected.predictive(x.astype(np.float32)), rtol=rel)


def masked(array, entry):
    mask = np.zeros(array.shape, bool)
    mask.flat[entry] = True
    return np.ma.masked_array(array, mask)


def changed(array, value, dtype=np.float64):
    other = array.astype(dtype)
    other.flat[5] = value
    return other


def bcoo(array):
    return sparse.BCOO.fromdense(jnp.eye(len(array), 4), nse=len(array))


BAD_INPUTS = {
    "strings": (X.astype(str), "must be numbers; got an array of <U32"),
    "objects": (X.astype(object), "must be numbers; got an array of object"),
    "dates": (X.astype("M8[s]"), "must be numbers; got an array of datetime64"),
    "spans of time": (X.astype("m8[s]"), "must be numbers; got an array of timedelta64"),
    "records": (np.zeros(12, [("a", np.float32)]), "must be numbers; got an array of "),
    "long floats": (X.astype(np.longdouble), "must be numbers; got an array of "),
    "masked": (masked(X, 7), "must not be masked, as the mask would be lost; got 1 masked entries"),
    "sparse": (csr_array(X), r"must be arrays.*got a csr_array; pass x.toarray\(\)"),
    "sparse of jax": (bcoo(X), r"must be dense arrays; got a sparse one; pass x.todense\(\)"),
    "lists": (X.tolist(), "must be arrays.*pass jnp.asarray"),
    "strings alone": ("abc", "must be"),
    "nothing": (None, "must be"),
    "a set": ({1.0, 2.0}, "must be"),
    "an empty tree": ({}, "must be"),
    "a number": (np.float32(1), "must be arrays.*examples along the first axis"),
    "a number in an array": (jnp.ones(()), "must be arrays with examples along the first axis"),
    "keys": (jax.random.split(jax.random.key(0), 12), "must be numbers; got an array of key<fry>"),
    "NaN": (changed(X, np.nan), "must be finite; got NaN or infinite values in 1 of 12 of them, first in number 1"),
    "infinite": (jnp.asarray(changed(X, np.inf)), "must be finite; got NaN or infinite values in 1 of 12 of them"),
    "too large": (changed(X, 1e39), "must fit into float32, in which they are used; got numbers from .* to 1e.39"),
    "too small": (changed(X, -1e39), "must fit into float32.*rescale them"),
    "complex and too large": (changed(X, 1e39j, complex), "must fit into complex64"),
    "large integers": (changed(X, 2**32, np.int64), "must fit into int32.*to 4294967296; remap them"),
    "large unsigned integers": (
        changed(0 * X, 2**63, np.uint64),
        "must fit into uint32.*to 9223372036854775808; remap",
    ),
    "complex": (X + 1j, "real floating-point numbers; got complex64 numbers"),
    "another width": (X[:, :3], r"with inputs of float32\[B,3\] the network raised TypeError"),
    "no features": (X[:, :0], r"with inputs of float32\[B,0\] the network raised TypeError"),
    "one axis": (X[:, 0], r"with inputs of float32\[B\] the network raised TypeError"),
    "trees of another kind": ((X, X), "the network raised TypeError"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(la, case, unchecked_annotations):
    inputs, message = BAD_INPUTS[case]
    new = Laplace(NETWORK, hessian_structure="diag")
    is_pair = hasattr(inputs, "shape") and not isinstance(inputs, csr_array)  # otherwise it might be batches
    for data in ((inputs, Y), [(inputs, Y)], iter([(inputs, Y)])) if is_pair else ([(inputs, Y)],):
        with pytest.raises(ValueError, match=message):
            new.fit(data)
    with pytest.raises((ValueError, TypeError)) as raised:
        new.fit((inputs, Y))
    assert "\n" not in str(raised.value)
    if case != "complex":  # the network is not called by check of the inputs for its numbers
        with pytest.raises(ValueError, match=message):
            la.predictive(inputs)
        with pytest.raises(ValueError, match=f"{message}|validation=... must be two arrays"):
            la.optimize_prior_precision("gridsearch", validation=(inputs, Y), key=jax.random.key(0))


def test_trees_of_different_lengths(unchecked_annotations):
    la = Laplace(OF_TREE, hessian_structure="diag").fit(({"a": X, "b": X}, Y))
    for inputs in ({"a": X, "b": X[:5]}, {"a": X[:7], "b": X}):
        with pytest.raises(ValueError, match="must be arrays with as many examples in each; got . and 12 examples"):
            la.predictive(inputs)
        with pytest.raises(ValueError, match="must be arrays with as many examples in each; got . and 12 examples"):
            Laplace(OF_TREE, hessian_structure="diag").fit((inputs, Y))


BAD_LABELS = {
    "wrapped": (np.full(12, 2**32), "y must fit into int32.*got numbers from 4294967296 to 4294967296"),
    "wrapped to a class": (changed(Y, 2**32 + 1, np.int64), "y must fit into int32"),
    "unsigned": (changed(Y, 2**64 - 1, np.uint64), "y must fit into uint32.*18446744073709551615"),
    "negative": (changed(Y, -100, np.int64), "labels must lie in 0..2.*from -100 to 2"),
    "a class too many": (changed(Y, 3, np.uint8), "labels must lie in 0..2.*to 3"),
    "fractions": (Y + 0.5, "labels must be integers"),
    "whole floats": (Y.astype(np.float32), "labels must be integers"),
    "bools": (Y > 0, "labels must be integers"),
    "strings": (Y.astype(str), "y must be numbers; got an array of <U21"),
    "masked": (masked(Y, 3), "y must not be masked"),
    "a column": (Y[:, None], r"labels must be integers of shape \(12,\)"),
    "too few": (Y[:5], "as many targets as inputs, and at least one; got 12 inputs and 5 targets"),
    "lists of two lengths": ([[1], [2, 3]], "y must be one array; got list"),
    "soft, NaN": (np.full((12, 3), np.nan), "soft targets must be probabilities"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(la, case, unchecked_annotations):
    labels, message = BAD_LABELS[case]
    for data in ((X, labels), [(X, labels)]) if hasattr(labels, "shape") else ([(X, labels)],):
        with pytest.raises(ValueError, match=message):
            Laplace(NETWORK, hessian_structure="diag").fit(data)
    if len(labels) == 12:  # those of the wrong length have a message of their own there
        with pytest.raises(ValueError, match="(y|labels|targets) must"):
            la.optimize_prior_precision("gridsearch", validation=[(X, labels)], key=jax.random.key(0))


def test_labels_that_are_right_in_other_forms(la):
    expected = la.log_marginal_likelihood().mean
    for labels in (Y.tolist(), tuple(Y.tolist()), Y.astype(np.uint64), Y.astype(np.int8), Y[::-1].copy()[::-1]):
        found = Laplace(NETWORK, hessian_structure="diag").fit((X, labels))
        assert found.log_marginal_likelihood().mean == expected


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "must be finite"), (np.inf, "must be finite"), (1e39, "must fit into float32")]
)
def test_targets_of_a_regression_are_finite_in_their_type(value, message, unchecked_annotations):
    la = Laplace(NETWORK, "regression", hessian_structure="diag")
    targets = changed(X[:, :3], value)
    for data in ((X, targets), [(X, targets)]):
        with pytest.raises(ValueError, match=message):
            la.fit(data)
    with pytest.raises(ValueError, match=message):
        la.fit((X, X[:, :3])).validation_curve(X, targets, [1.0])


def test_double_precision_holds_what_single_precision_does_not(x64):
    network = Network.from_function(lambda w, x: x[..., :3] * 1e-39 * w, jnp.ones(3))
    la = Laplace(network, "regression", hessian_structure="diag").fit((changed(X, 1e39), X[:, :3].astype(float)))
    assert np.isfinite(la.predictive(changed(X, 1e39))[0]).all()


def test_traced_inputs_are_not_read(la):
    found = jax.jit(la.predictive)(jnp.asarray(X))
    np.testing.assert_allclose(found, la.predictive(X), rtol=1e-6)
