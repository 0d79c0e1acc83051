"""Unknown labels and weights of classes: the posterior of the labels that are known, each as often as it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import random_problem, two_layers, usual
from scipy import special

import bnnlaplace
from bnnlaplace import curvature, evidence

STRUCTURES = ["full", "diag", "kron", "lanczos"]
PRECISION = 0.7
WEIGHTS = np.array([1.0, 3.0, 2.0])
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 43, "tolerance": 1e-9, "microbatch": 3}
LABELS = np.array([2, -100, 0, 1, 1, -100, 0, 2])
SEQUENCES = np.array([[2, -100, 0], [-100, -100, -100], [1, 1, 2], [0, -100, 1], [2, 2, -100]])


pytestmark = pytest.mark.usefixtures("x64_module")


@pytest.fixture(scope="module")
def problem():
    return random_problem(bnnlaplace.categorical(), LABELS)


def laplace(problem, likelihood, structure):
    options = {"hessian_structure": structure, "prior_precision": PRECISION}
    return bnnlaplace.Laplace(problem.network, likelihood, **options)


def assert_same(found, expected, inputs):
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-9)
    np.testing.assert_allclose(found.mode_gradient(), expected.mode_gradient(), atol=1e-9)
    np.testing.assert_allclose(found.predictive(inputs), expected.predictive(inputs), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # the weights are random, so they are not at a mode
@pytest.mark.parametrize("structure", usual(["kron"], STRUCTURES))
def test_unknown_labels_are_absent_and_classes_are_repeated(problem, structure):
    likelihood = bnnlaplace.categorical(ignore_index=-100, class_weights=WEIGHTS)
    known = LABELS != -100
    counts = np.where(known, WEIGHTS[np.where(known, LABELS, 0)], 0).astype(int)
    repeated = np.repeat(problem.inputs, counts, axis=0), np.repeat(LABELS, counts)
    la = laplace(problem, likelihood, structure).fit((problem.inputs, LABELS), **OPTIONS)
    assert_same(la, laplace(problem, bnnlaplace.categorical(), structure).fit(repeated, **OPTIONS), problem.inputs)
    # Weights of examples multiply those of classes.
    twice = laplace(problem, likelihood, structure).fit((problem.inputs, LABELS, np.full(8, 2)), **OPTIONS)
    assert_same(
        twice,
        laplace(problem, likelihood, structure).fit([(problem.inputs, LABELS)] * 2, **OPTIONS),
        LABELS[:0, None] * np.ones(4),
    )


# --- several positions ------------------------------------------------------------------------------------------


def sequences():
    """Inputs of three positions, which share the weights and are mixed, so that outputs depend on all positions."""
    inputs = np.random.default_rng(4).normal(size=(*SEQUENCES.shape, 4))

    def mixed(params, x):
        return two_layers(params, x + 0.3 * jnp.sum(x, axis=1, keepdims=True))

    params = random_problem(bnnlaplace.categorical(), LABELS).network.params
    return bnnlaplace.Network.from_function(mixed, params), inputs


def weighted_rows():
    """The weight, the mixed input and the label of each position, by NumPy alone."""
    _, inputs = sequences()
    rows = (inputs + 0.3 * inputs.sum(axis=1, keepdims=True)).reshape(-1, 4)
    labels = SEQUENCES.reshape(-1)
    known = labels != -100
    labels = np.where(known, labels, 0)
    return np.where(known, WEIGHTS[labels], 0), rows, labels


def exact():
    """The log likelihood and the matrix of the curvature."""
    weights, rows, labels = weighted_rows()
    params = {name: np.asarray(leaf) for name, leaf in sequences()[0].params.items()}
    outputs = np.asarray(two_layers(params, rows))
    log_p = special.log_softmax(outputs, axis=-1)[np.arange(len(labels)), labels]
    curvatures = weights[:, None, None] * oracles.output_curvature(bnnlaplace.categorical(), outputs)
    ggn = oracles.ggn(oracles.two_layers_jacobian(params, rows), curvatures)
    return weights @ log_p, ggn, params


def exact_evidence():
    log_likelihood, ggn, params = exact()
    squared_norm = sum(np.sum(leaf**2) for leaf in params.values())
    determinant = np.linalg.slogdet(np.eye(len(ggn)) + ggn / PRECISION)[1]
    return log_likelihood - 0.5 * PRECISION * squared_norm - 0.5 * determinant


@pytest.fixture(scope="module")
def masked():
    return bnnlaplace.categorical(ignore_index=-100, class_weights=WEIGHTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_batches", "structure"), usual([(2, "lanczos")], (1, 2), ("full", "lanczos")))
def test_the_evidence_of_masked_positions(masked, structure, num_batches):
    network, inputs = sequences()
    la = bnnlaplace.Laplace(network, masked, hessian_structure=structure, prior_precision=PRECISION)
    batches = list(zip(np.array_split(inputs, num_batches), np.array_split(SEQUENCES, num_batches), strict=True))
    la = la.fit(batches, **(OPTIONS | {"microbatch": 2}))
    assert la.log_marginal_likelihood().mean == pytest.approx(exact_evidence(), rel=1e-9)
    plain = bnnlaplace.Laplace(network, hessian_structure=structure, prior_precision=PRECISION)
    plain = plain.fit((inputs, np.maximum(SEQUENCES, 0)), **OPTIONS)
    assert abs(plain.log_marginal_likelihood().mean - exact_evidence()) > 1


@pytest.mark.filterwarnings("ignore")
def test_the_diagonal_of_masked_positions(masked):
    network, inputs = sequences()
    la = bnnlaplace.Laplace(network, masked, hessian_structure="diag").fit((inputs, SEQUENCES), microbatch=2)
    np.testing.assert_allclose(la.structure.diagonal, np.diag(exact()[1]), rtol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_kronecker_factors_of_masked_positions(masked):
    # Exact blocks of small weights, and the same as without positions that do not count.
    network, inputs = sequences()
    la = bnnlaplace.Laplace(network, masked, hessian_structure="kron", prior_precision=PRECISION)
    la = la.fit((inputs, SEQUENCES), microbatch=2)
    ggn, blocks = exact()[1], np.zeros((43, 43))
    for start, end in ((0, 5), (5, 8), (8, 28), (28, 43)):  # b1, b2, w1, w2
        blocks[start:end, start:end] = ggn[start:end, start:end]
    np.testing.assert_allclose(
        la.structure.log_determinant(PRECISION)[0], np.linalg.slogdet(np.eye(43) + blocks / PRECISION)[1], rtol=1e-9
    )


@pytest.mark.parametrize("side", usual(["dual"], ["primal", "dual"]))
def test_both_sides_of_masked_positions(masked, side):
    network, inputs = sequences()
    length = {"primal": 43, "dual": 54}[side]  # six examples with the padding, three positions, three outputs
    options = {"network": network, "likelihood": masked, "num_matvecs": 25, "microbatch": 2, "probe_batch_size": length}
    probes = jnp.sqrt(length) * jnp.eye(length)
    run = jax.jit(
        lambda params: evidence.log_marginal_likelihood(
            params, PRECISION, (inputs, SEQUENCES), probes, side=side, **options
        )
    )
    found = run(network.params)
    assert found.mean == pytest.approx(exact_evidence(), rel=1e-8)
    data = [(inputs[:3], SEQUENCES[:3]), (inputs[3:], SEQUENCES[3:])]
    operator = curvature.streamed_operator(network, masked, data, side=side, microbatch=2)
    matrix = np.asarray(operator.matvec(jnp.eye(operator.size)))
    values = np.linalg.eigvalsh(matrix)[::-1][:20]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(exact()[1])[::-1][:20], rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_likelihood(problem):
    # Its label of unknown classes is not known, so labels are not checked against it.
    probes, params = jnp.sqrt(43) * jnp.eye(43), problem.network.params
    options = {"network": problem.network, "num_matvecs": 25, "probe_batch_size": 43, "side": "primal"}

    def value(likelihood):
        batch = problem.inputs, LABELS
        return evidence.log_marginal_likelihood(params, 0.7, batch, probes, likelihood=likelihood, **options).mean

    likelihood = bnnlaplace.categorical(-100, WEIGHTS)
    la = laplace(problem, likelihood, "full").fit((problem.inputs, LABELS))
    assert jax.jit(value)(likelihood) == pytest.approx(la.log_marginal_likelihood().mean, rel=1e-8)


# --- the likelihood itself --------------------------------------------------------------------------------------


def test_soft_labels_have_the_weights_of_their_classes():
    likelihood = bnnlaplace.categorical(class_weights=WEIGHTS)
    f, y = jnp.array([0.5, -1.2, 2.0]), jnp.array([0.2, 0.5, 0.3])
    assert likelihood.log_prob(f, y) == pytest.approx(np.sum(WEIGHTS * y * special.log_softmax(np.asarray(f))))
    hessian = jax.hessian(lambda f: -likelihood.log_prob(f, y))(f)
    columns = jax.vmap(likelihood.hessian_mv, in_axes=(None, 0), out_axes=1)(f, jnp.eye(3))
    np.testing.assert_allclose(likelihood.target_weights(y) * columns, hessian, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_unknown_labels_of_validation_data_are_not_scored(problem):
    known = LABELS != -100
    la = laplace(problem, bnnlaplace.categorical(-100), "diag").fit((problem.inputs, LABELS))
    found = la.validation_curve(problem.inputs, LABELS, [0.5, 2.0])
    expected = la.validation_curve(problem.inputs[known], LABELS[known], [0.5, 2.0])
    np.testing.assert_allclose(found.negative_log_likelihood, expected.negative_log_likelihood, rtol=1e-10)
    with pytest.raises(ValueError, match="at least one known target"):
        la.validation_curve(problem.inputs, np.full(8, -100), [1.0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"ignore_index": -100}, {"ignore_index": -100, "class_weights": WEIGHTS}])
def test_saved_posteriors_know_what_they_leave_out(problem, options, tmp_path):
    la = laplace(problem, bnnlaplace.categorical(**options), "diag").fit((problem.inputs, LABELS))
    la.save(tmp_path / "la")
    loaded = bnnlaplace.Laplace.load(tmp_path / "la", problem.network)
    assert loaded.likelihood.ignore_index == -100
    assert_same(loaded, la, problem.inputs)
    assert_same(loaded.fit((problem.inputs, LABELS)), la, problem.inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": 1.5}, "must be an integer"),
        ({"ignore_index": True}, "must be an integer"),
        ({"ignore_index": 2**40}, "must be an integer of 32 bits"),
        ({"class_weights": [1.0, -1.0, 1.0]}, "one number for each class"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"class_weights": [1.0, np.inf, 1.0]}, "must be finite"),
        ({"class_weights": [1.0, 1.0]}, "one number for each of the 3 classes; got 2"),
        ({"class_weights": 2.0}, "one number for each class"),
        ({"ignore_index": -1}, "labels must lie in 0..2"),
        ({"ignore_index": 0, "class_weights": "balanced"}, "class_weights"),
    ],
)
def test_options_that_cannot_be_used(problem, options, message):
    with pytest.raises(ValueError, match=message):
        laplace(problem, bnnlaplace.categorical(**options), "diag").fit(
            (problem.inputs, LABELS if "class_weights" not in options else np.abs(LABELS) % 3)
        )


def test_a_label_must_be_known_somewhere(problem):
    with pytest.raises(ValueError, match="must have a target that counts"):
        laplace(problem, bnnlaplace.categorical(-100), "diag").fit((problem.inputs, np.full(8, -100)))
