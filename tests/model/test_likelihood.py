"""Likelihoods against autodiff of their own log-probabilities and against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import usual
from jax.tree_util import Partial
from scipy import stats

import bnnlaplace
from bnnlaplace.model.likelihood import check_targets, resolve

CASES = {
    "categorical": (bnnlaplace.categorical, np.array([2, 0])),
    "categorical, soft": (bnnlaplace.categorical, np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])),
    "gaussian": (lambda: bnnlaplace.gaussian(0.7), np.array([[0.1, -1.0, 2.0], [0.5, 0.2, 0.0]])),
    "gaussian, by output": (lambda: bnnlaplace.gaussian(np.array([0.7, 1.0, 2.5])), np.zeros((2, 3))),
    "bernoulli": (bnnlaplace.bernoulli, np.array([[1, 0, 1], [0, 0, 1]])),
}
OUTPUTS = np.array([[0.5, -1.2, 2.0], [3.0, 0.1, -0.4]])
VECTORS = np.array([[1.0, -0.3, 0.2], [0.4, 0.9, -2.0]])


@pytest.mark.parametrize("name", CASES)
def test_curvature_is_the_hessian(x64, name):
    make, targets = CASES[name]

    @jax.jit
    def curvatures(likelihood, f, v, y):
        hessian = jax.hessian(lambda f: -likelihood.log_prob(f, y))(f)
        factor = jax.vmap(likelihood.factor_mv, in_axes=(None, 0), out_axes=1)(f, jnp.eye(3))
        return hessian, factor, likelihood.hessian_mv(f, v), likelihood.factor_transpose_mv(f, v)

    likelihood = make()
    for f, v, y in zip(OUTPUTS, VECTORS, jnp.asarray(targets), strict=True):
        hessian, factor, hessian_mv, factor_transpose_mv = curvatures(likelihood, f, v, y)
        np.testing.assert_allclose(hessian_mv, hessian @ v, atol=1e-12)
        np.testing.assert_allclose(factor @ factor.T, hessian, atol=1e-12)
        np.testing.assert_allclose(factor_transpose_mv, factor.T @ v, atol=1e-12)
        np.testing.assert_allclose(oracles.output_curvature(likelihood, f[None])[0], hessian, atol=1e-12)


def test_log_probabilities(x64):
    probs = np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(axis=1, keepdims=True)
    labels = np.array([2, 0])
    np.testing.assert_allclose(bnnlaplace.categorical().log_prob(OUTPUTS, labels), np.log(probs[[0, 1], labels]))
    targets = CASES["gaussian"][1]
    expected = stats.norm.logpdf(targets, OUTPUTS, 0.7).sum(axis=1)
    np.testing.assert_allclose(bnnlaplace.gaussian(0.7).log_prob(OUTPUTS, targets), expected)
    sigma = np.array([0.7, 1.0, 2.5])
    expected = stats.norm.logpdf(targets, OUTPUTS, sigma).sum(axis=1)
    np.testing.assert_allclose(bnnlaplace.gaussian(sigma).log_prob(OUTPUTS, targets), expected)
    targets = CASES["bernoulli"][1]
    expected = stats.bernoulli.logpmf(targets, 1 / (1 + np.exp(-OUTPUTS))).sum(axis=1)
    np.testing.assert_allclose(bnnlaplace.bernoulli().log_prob(OUTPUTS, targets), expected)


def test_products_stay_finite_at_certainty():
    certain = jnp.array([200.0, 0.0, -200.0])
    for likelihood in (bnnlaplace.categorical(), bnnlaplace.bernoulli()):
        gradient = jax.jit(jax.grad(lambda f, of=likelihood: jnp.sum(of.factor_mv(f, jnp.ones(3)))))(certain)
        assert np.isfinite(gradient).all()


def test_noise_is_differentiable(x64):
    gradient = jax.grad(lambda sigma: bnnlaplace.gaussian(sigma).log_prob(jnp.zeros(2), jnp.ones(2)))(0.5)
    np.testing.assert_allclose(gradient, 2 * (1 / 0.5**3 - 1 / 0.5))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0, 3, 1]), "labels must lie in 0..2.*from 0 to 3"),
        (np.array([0, -1, 1]), "from -1 to 1"),
        (np.array([0.0, 1.0, 1.0]), "labels must be integers"),
        (np.eye(3, dtype=int), r"labels must be integers of shape \(3,\), or probabilities of shape \(3, 3\); got int"),
        (np.full((3, 3), 0.3), "soft targets must be probabilities.*sums from 0.9"),
        (np.array([[1.5, -0.5, 0.0]] * 3), "soft targets must be probabilities.*got -0.5 and more"),
        (np.full((3, 3), np.nan), "soft targets must be probabilities"),
    ],
)
def test_bad_labels(targets, message):
    with pytest.raises(ValueError, match=message):
        check_targets(bnnlaplace.categorical(), (3, 3), targets, "fit(data=(x, y))")


def test_bad_regression_targets():
    with pytest.raises(ValueError, match=r"shape \(3, 2\) of the outputs; got \(3,\)"):
        check_targets(bnnlaplace.gaussian(), (3, 2), np.zeros(3), "fit(data=(x, y))")


def test_soft_targets_of_one_class_are_its_label():
    check_targets(bnnlaplace.categorical(), (2, 3), np.eye(3)[[2, 0]], "fit(data=(x, y))")
    found = bnnlaplace.categorical().log_prob(OUTPUTS, jnp.eye(3)[jnp.array([2, 0])])
    np.testing.assert_allclose(found, bnnlaplace.categorical().log_prob(OUTPUTS, np.array([2, 0])), rtol=1e-6)


def test_three_functions_make_a_likelihood(x64):
    """The other two are the same as those that are written out; parameters are differentiated through them, too."""
    for whole in (bnnlaplace.categorical(), bnnlaplace.gaussian(jnp.array([0.5, 1.0, 2.0])), bnnlaplace.bernoulli()):
        short = bnnlaplace.Likelihood("own", whole.target_kind, whole.log_prob, whole.factor_mv, whole.mean)
        v = jnp.asarray(np.random.default_rng(2).normal(size=OUTPUTS.shape))
        for found, expected in (
            (short.hessian_mv, whole.hessian_mv),
            (short.factor_transpose_mv, whole.factor_transpose_mv),
        ):
            np.testing.assert_allclose(jax.jit(found)(OUTPUTS, v), expected(OUTPUTS, v), rtol=1e-10, atol=1e-12)
        again = jax.tree.map(lambda leaf: 2 * leaf, short)
        twice = jax.tree.map(lambda leaf: 2 * leaf, whole)
        np.testing.assert_allclose(again.hessian_mv(OUTPUTS, v), twice.hessian_mv(OUTPUTS, v), rtol=1e-10, atol=1e-12)


def test_noise_by_output_must_have_as_many_numbers():
    check_targets(bnnlaplace.gaussian(np.ones(2)), (3, 2), np.zeros((3, 2)), "fit(data=(x, y))")
    with pytest.raises(ValueError, match="sigma_noise=.* one for each of the 2 outputs; got 3"):
        check_targets(bnnlaplace.gaussian(np.ones(3)), (3, 2), np.zeros((3, 2)), "fit(data=(x, y))")


@pytest.mark.parametrize("targets", [[[-1, 1]], [[2, 0]], [[0.5, 1.1]], [[np.nan, 0.0]]])
def test_bad_binary_targets(targets):
    with pytest.raises(ValueError, match="binary targets must be 0 or 1, or probabilities between"):
        check_targets(bnnlaplace.bernoulli(), (1, 2), np.array(targets), "fit(data=(x, y))")


@pytest.mark.parametrize("targets", [[[0, 1]], [[False, True]], [[0.0, 1.0]], [[0.25, 0.75]]])
def test_binary_targets(targets, x64):
    likelihood, f = bnnlaplace.bernoulli(), jnp.array([[0.3, -2.0]])
    check_targets(likelihood, (1, 2), np.array(targets), "fit(data=(x, y))")
    p, y = jax.nn.sigmoid(f), np.array(targets, float)
    expected = np.sum(y * np.log(p) + (1 - y) * np.log(1 - p), axis=-1)
    np.testing.assert_allclose(likelihood.log_prob(f, jnp.asarray(targets)), expected)


def test_sigma_noise_is_that_of_the_likelihood():
    np.testing.assert_allclose(bnnlaplace.gaussian(0.3).sigma_noise, 0.3)
    np.testing.assert_allclose(resolve("regression", 0.3).sigma_noise, 0.3)
    assert bnnlaplace.categorical().sigma_noise is None and bnnlaplace.bernoulli().sigma_noise is None


BAD_NOISE = [-1, 0.0, np.nan, jnp.float32(-1.0), np.float32(-1), jnp.inf, np.array([1, 0]), np.ones((1, 1)), "1", None]


@pytest.mark.parametrize("sigma", BAD_NOISE)
def test_sigma_noise_is_positive(sigma):
    with pytest.raises(
        ValueError, match=r"Laplace\(sigma_noise=...\) must be (one positive, finite number, or|positive and)"
    ):
        resolve("regression", sigma)


@pytest.mark.parametrize("likelihood", ["classification", "binary", bnnlaplace.gaussian(0.5)])
def test_sigma_noise_is_for_regression_by_name(likelihood):
    resolve(likelihood, 1.0)
    with pytest.raises(ValueError, match=r"sigma_noise=...\) must be left out unless likelihood='regression'; got 2.0"):
        resolve(likelihood, 2.0)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"\['binary', 'classification', 'heteroscedastic', .*got 'poisson'"):
        resolve("poisson")


def test_noise_that_is_an_integer_is_a_real_number():
    assert bnnlaplace.gaussian(2).sigma_noise.dtype == jnp.float32
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 1)))
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    la = bnnlaplace.Laplace(network, "regression", sigma_noise=1, hessian_structure="full").fit((x, 3 * x[:, :1]))
    np.testing.assert_allclose(la.with_sigma_noise(1.7).sigma_noise, 1.7)


# --- a likelihood of more outputs than targets ------------------------------------------------------------------


def lognormal_pair_log_prob(f, y):
    """Two means and two log variances of two targets."""
    mean, log_variance = f[..., :2], f[..., 2:]
    terms = (y - mean) ** 2 * jnp.exp(-log_variance) + log_variance + jnp.log(2 * jnp.pi)
    return -0.5 * terms.sum(axis=-1)


def pair_factor_mv(f, u):
    """A factor of the Fisher information, which is diagonal: exp(-s) for a mean, 1/2 for a log variance."""
    return u * jnp.concatenate([jnp.exp(-0.5 * f[..., 2:]), jnp.full_like(f[..., 2:], 0.5**0.5)], axis=-1)


def pair_mean(f):
    return f[..., :2]


def half(num_outputs):
    return (num_outputs // 2,)


def pair(target_shape):
    functions = map(Partial, (lognormal_pair_log_prob, pair_factor_mv, pair_mean))
    return bnnlaplace.Likelihood("pair", "array", *functions, target_shape=target_shape)


@pytest.mark.parametrize(("target_shape", "structure"), usual([(half, "lanczos")], ((2,), half), ("full", "lanczos")))
def test_more_outputs_than_targets(x64, unchecked_annotations, structure, target_shape):
    rng = np.random.default_rng(4)
    x, y, weights = rng.normal(size=(9, 3)), rng.normal(size=(9, 2)), 0.3 * rng.normal(size=(3, 4))
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    la = bnnlaplace.Laplace(network, pair(target_shape), hessian_structure=structure, prior_precision=0.8)
    f = x @ weights
    log_likelihood = stats.norm.logpdf(y, f[:, :2], np.exp(f[:, 2:] / 2)).sum()
    curvatures = np.concatenate([np.exp(-f[:, 2:]), np.full((9, 2), 0.5)], axis=1)
    ggn = sum(np.kron(np.outer(a, a), np.diag(c)) for a, c in zip(x, curvatures, strict=True))
    determinant = np.linalg.slogdet(np.eye(12) + ggn / 0.8)[1]
    expected = log_likelihood - 0.4 * (weights**2).sum() - 0.5 * determinant
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    for data in ((x, y), batches):
        fitted = la.fit(data, key=jax.random.key(0))
        np.testing.assert_allclose(fitted.log_marginal_likelihood().mean, expected, rtol=1e-9)
    options = {"key": jax.random.key(0), "num_samples": 5}
    assert fitted.predictive(x, link_approx="mc", **options).shape == (9, 2)
    assert np.isfinite(fitted.validation_curve(x, y, [1.0], **options).negative_log_likelihood).all()
    with pytest.raises(ValueError, match=r"targets of 'pair' must have the shape \(9, 2\); got \(9, 4\); reshape"):
        la.fit((x, np.concatenate([y, y], axis=1)))


def test_labels_of_a_shape_of_their_own_have_any_range():
    """As in ordinal regression: one output, and labels whose number the likelihood knows."""
    ordinal = bnnlaplace.Likelihood("ordinal", "label", *map(Partial, [pair_mean] * 3), target_shape=())
    check_targets(ordinal, (3, 1), np.array([0, 4, 9]), "fit")
    with pytest.raises(ValueError, match=r"fit: labels must be integers of shape \(3,\); got float64"):
        check_targets(ordinal, (3, 1), np.array([0.0, 4.0, 9.0]), "fit")


@pytest.mark.parametrize("target_shape", [1, [1], (0,), (1.0,), "1"])
def test_the_shape_of_a_target_is_a_shape(target_shape, unchecked_annotations):
    with pytest.raises(
        ValueError, match=r"Likelihood\(target_shape=...\) must be a tuple of positive lengths.*try \(1,\)"
    ):
        pair(target_shape)


def test_a_likelihood_that_is_none(unchecked_annotations):
    with pytest.raises(ValueError, match=r"Likelihood\(target_kind=...\) must be 'array' or 'label'; got 'int'"):
        bnnlaplace.Likelihood("own", "int", pair_mean, pair_mean, pair_mean)
    for likelihood in (None, [], 3, bnnlaplace.gaussian):
        with pytest.raises(ValueError, match=r"Laplace\(likelihood=...\) must be one of .* or a Likelihood"):
            resolve(likelihood)
    with pytest.raises(ValueError, match=r"Likelihood\(mean=...\) must be a function; got 3"):
        resolve(bnnlaplace.Likelihood("own", "array", pair_mean, pair_mean, 3))


def test_classification_needs_two_outputs():
    message = (
        r"'classification' must have an output for each class, at least two; got one output; use likelihood='binary'"
    )
    for labels in (np.array([0, 1, 1]), np.zeros(3, int)):
        with pytest.raises(ValueError, match=message):
            check_targets(bnnlaplace.categorical(), (3, 1), labels, "fit")


def test_targets_are_numbers_in_the_type_in_which_they_are_used():
    message = "targets must be (real )?numbers; got an array of {}; encode them".format
    for targets, dtype in ((np.full((2, 3), "a"), "<U1"), (np.ones((2, 3), complex), "complex128")):
        with pytest.raises(ValueError, match=message(dtype)):
            check_targets(bnnlaplace.gaussian(), (2, 3), targets, "fit")
    with pytest.raises(ValueError, match="fit: targets must fit into float32"):
        check_targets(bnnlaplace.gaussian(), (2, 3), np.full((2, 3), -1e39), "fit")
    with pytest.raises(ValueError, match="fit: targets must be finite; got NaN or infinite values in 2 of 2"):
        check_targets(bnnlaplace.gaussian(), (2, 3), np.full((2, 3), np.nan), "fit")
    # A likelihood of the user's own may mark missing targets by NaN.
    check_targets(pair((2,)), (2, 4), np.full((2, 2), np.nan), "fit")


@pytest.mark.parametrize("sigma", [1e-300, 1e-20, 1e20, 10**400])
def test_a_noise_whose_variance_is_zero_or_infinite(sigma):
    with pytest.raises(ValueError, match=r"Laplace\(sigma_noise=...\) must be positive"):
        resolve("regression", sigma)
