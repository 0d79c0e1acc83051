"""How far the weights are from a mode of the log joint, and the mode of a linearised network.

The Laplace evidence is defined only at a mode of the log joint. Away from one it is the evidence of no model. The
linearised network has exactly one mode for every prior precision, whatever training did, so its evidence is well
defined (Antoran, Janz, Allingham, Daxberger, Barbano, Nalisnick, Hernandez-Lobato, "Adapting the linearised Laplace
model evidence for modern deep learning", 2022, arXiv 2206.08900). To find it is a convex problem, solved here by
Newton's method with GGN products alone.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import number_type, ravel, unraveler
from bnnlaplace.core.types import NotAModeWarning
from bnnlaplace.curvature import streamed
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior
from bnnlaplace.structure import KrylovStructure

# The largest squared distance to the mode, relative to that of a posterior sample, that passes without a warning. At a
# quarter the mode is half as far away as a sample.
LARGEST_RATIO = 0.25

# Newton steps, and halvings of one step. The problem is convex and starts at trained weights, so it needs few steps.
MAX_STEPS, MAX_HALVINGS = 50, 12


def warn_unless_mode(fitted: Fitted) -> None:
    """Warn if the mode of the log joint is not much nearer to the weights than a posterior sample is.

    The decrement g' (G + P0)^-1 g is the squared distance to the mode of a quadratic log joint, in posterior standard
    deviations. A posterior sample has the effective parameters as its average squared distance to the mode, in the
    directions that the data determine.
    """
    decrement, effective = fitted.mode_decrement(), fitted.effective_parameters()
    if not decrement > LARGEST_RATIO * effective:
        return
    # A truncated recurrence bounds the decrement from above.
    up_to = "up to " if isinstance(fitted.structure, KrylovStructure) else ""
    checks.warn(
        f"the weights are not at a mode of the log joint for prior precision {float(fitted.prior.precision):.3g}: one "
        f"Gauss-Newton step would gain {up_to}{0.5 * decrement:.3g} nats and move {up_to}{decrement**0.5:.3g} "
        f"posterior standard deviations (samples of the posterior are about {effective**0.5:.3g} away from its mean); "
        "train longer, pass the prior precision used in training (weight decay times the number of examples), or use "
        "fit(mean='linear')"
        + ("; with prior=..., train with the penalty -prior.log_density" if fitted.prior.curvature is not None else ""),
        NotAModeWarning,
    )


def at_linear_mode(model: Model, prior: Prior, *, microbatch: int) -> Model:
    """Expand the linearised network at the mode of its log joint."""
    # In whitened weights the prior is isotropic, and conjugate gradients need fewer products.
    white = model.whitened(prior)
    unravel, dtype = unraveler(white.head.params), number_type(white.head.params)

    def at(point: Float[np.ndarray, " P"]) -> Model:
        return white.at(unravel(jnp.asarray(point, dtype)))

    scale = 1.0

    def log_likelihood(point: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        nonlocal scale  # known after a pass over the data; the first pass precedes the first product
        value, scale = at(point).log_likelihood(microbatch=microbatch)
        return float(value.value), np.asarray(value.gradient, np.float64)

    def ggn_product(point: Float[np.ndarray, " P"], vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        there = at(point)
        product = streamed.primal_product(there.head, there.likelihood, there.data, scale, microbatch=microbatch)
        return np.asarray(product(jnp.asarray(vector, dtype).reshape(1, -1))[0], np.float64)

    mode = linear_mode(
        log_likelihood,
        ggn_product,
        ravel(white.head.params),
        prior_precision=float(prior.precision),
        prior_mean=np.asarray(prior.mean * jnp.sqrt(prior.relative), np.float64),
        prior_curvature=None if prior.curvature is None else prior.curvature.product,
    )
    return model.at(unraveler(model.network.params)(prior.whiten(jnp.asarray(mode, dtype))))


def linear_mode(
    log_likelihood: Callable[[Float[np.ndarray, " P"]], tuple[float, Float[np.ndarray, " P"]]],
    product: Callable[[Float[np.ndarray, " P"], Float[np.ndarray, " P"]], Float[np.ndarray, " P"]],
    start: Float[Array, " P"] | Float[np.ndarray, " P"],
    *,
    prior_precision: float,
    prior_mean: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 0.0,
    prior_curvature: Callable[[Float[np.ndarray, " P"]], Float[np.ndarray, " P"]] | None = None,
    tolerance: float = 1e-2,
    max_products: int = 200,
) -> Float[np.ndarray, " P"]:
    """Maximise log p(y | theta) - delta / 2 |theta - mu|^2, which is concave in theta, by Newton's method.

    Parameters
    ----------
    log_likelihood
        theta -> log p(y | theta) and its gradient.
    product
        (theta, v) -> G(theta) v. The network is linear, so G is minus the Hessian of log p(y | theta).
    start
        Where to begin.
    prior_precision, prior_mean
        delta and mu of the isotropic prior.
    prior_curvature
        v -> K v, if the precision of the prior is K + delta I.
    tolerance
        Stop if the Newton decrement g' (G + delta I)^-1 g is below this: twice the gain in nats that is left.
    max_products
        The largest number of GGN products in one Newton step.

    Notes
    -----
    Cost: one gradient for each step, and as many products as conjugate gradients take. Warns if the decrement stays
    above the tolerance: rounding of the log likelihood in single precision limits what can be reached.
    """
    point = np.asarray(start, np.float64)

    def prior_product(vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        scaled = prior_precision * vector
        return scaled if prior_curvature is None else scaled + prior_curvature(vector)

    def log_joint(point: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        value, gradient = log_likelihood(point)
        deviation = point - prior_mean
        pull = prior_product(deviation)
        return value - 0.5 * deviation @ pull, gradient - pull

    value, gradient = log_joint(point)
    decrement = np.inf
    for number in range(1, MAX_STEPS + 1):  # noqa: B007
        step = _newton_step(lambda v, at=point: product(at, v) + prior_product(v), gradient, max_products)
        decrement = float(gradient @ step)
        if decrement <= tolerance:
            return point + step
        for halving in range(MAX_HALVINGS):
            length = 0.5**halving
            candidate, candidate_gradient = log_joint(point + length * step)
            if candidate >= value + 1e-4 * length * decrement:  # Armijo's condition
                break
        else:
            break
        point, value, gradient = point + length * step, candidate, candidate_gradient
    checks.warn(
        f"the mode of the linearised network was not found: {0.5 * decrement:.2g} nats are left to gain after {number} "
        "Newton steps; a larger prior precision makes the problem easier"
    )
    return point


def _newton_step(
    product: Callable[[np.ndarray], np.ndarray], gradient: Float[np.ndarray, " P"], max_products: int
) -> Float[np.ndarray, " P"]:
    """Solve (G + delta I) step = gradient. An inexact solution is still a direction of ascent."""
    from scipy.sparse.linalg import LinearOperator, cg  # slow to import, and seldom needed

    operator = LinearOperator((len(gradient), len(gradient)), matvec=product, dtype=gradient.dtype)
    return cg(operator, gradient, rtol=1e-3, maxiter=max_products)[0]
