"""How far the weights are from a mode of the log joint, and the mode of a linearised network.

The Laplace evidence is defined only at a mode of the log joint. Away from one it is the evidence of no model. The
linearised network has exactly one mode for every prior precision, whatever training did, so its evidence is well
defined (Antoran, Janz, Allingham, Daxberger, Barbano, Nalisnick, Hernandez-Lobato, "Adapting the linearised Laplace
model evidence for modern deep learning", 2022, arXiv 2206.08900). To find it is a convex problem, which SciPy solves
here with GGN products alone.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
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

# Steps of the trust region. The problem is convex and starts at trained weights, so it needs few.
MAX_STEPS = 100


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
        f"posterior standard deviations (a posterior sample moves {effective**0.5:.3g}); train longer, pass the prior "
        "precision used in training (weight decay times the number of examples), or use fit(mean='linear')",
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
    )
    return model.at(unraveler(model.network.params)(prior.whiten(jnp.asarray(mode, dtype))))


def linear_mode(
    log_likelihood: Callable[[Float[np.ndarray, " P"]], tuple[float, Float[np.ndarray, " P"]]],
    product: Callable[[Float[np.ndarray, " P"], Float[np.ndarray, " P"]], Float[np.ndarray, " P"]],
    start: Float[Array, " P"] | Float[np.ndarray, " P"],
    *,
    prior_precision: float,
    prior_mean: Float[ArrayLike, ""] | Float[ArrayLike, " P"] = 0.0,
    tolerance: float = 1e-2,
    max_products: int = 200,
) -> Float[np.ndarray, " P"]:
    """Maximise log p(y | theta) - delta / 2 |theta - mu|^2, which is concave in theta, by an inexact Newton method.

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
    tolerance
        The largest Newton decrement g' (G + delta I)^-1 g that is left: twice the gain in nats.
    max_products
        The largest number of GGN products in the last Newton step.

    Notes
    -----
    Cost: in each step of a trust region one gradient and some products, few of them far from the mode; at the mode one
    Newton step, by conjugate gradients. Warns if the decrement stays above the tolerance: rounding of the log
    likelihood in single precision limits what can be reached.
    """

    def negative_log_joint(point: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        value, gradient = log_likelihood(point)
        deviation = point - prior_mean
        return 0.5 * prior_precision * deviation @ deviation - value, prior_precision * deviation - gradient

    def hessian_product(point: Float[np.ndarray, " P"], vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        return product(point, vector) + prior_precision * vector

    # (G + delta I)^-1 is at most 1 / delta: from this norm of the gradient on the decrement is below the tolerance.
    options = {"gtol": (tolerance * prior_precision) ** 0.5, "maxiter": MAX_STEPS}
    reached = scipy.optimize.minimize(
        negative_log_joint,
        np.asarray(start, np.float64),
        jac=True,
        hessp=hessian_product,
        method="trust-krylov",
        options=options,
    )
    # One more step makes a small decrement next to nothing. It also tells what is left if rounding ended the search.
    step = _newton_step(lambda vector: hessian_product(reached.x, vector), -reached.jac, max_products)
    decrement = float(-reached.jac @ step)
    if decrement <= tolerance:
        return reached.x + step
    checks.warn(
        f"the mode of the linearised network was not found: {0.5 * decrement:.2g} nats are left to gain after "
        f"{reached.nit} Newton steps; a larger prior precision makes the problem easier"
    )
    return reached.x


def _newton_step(
    product: Callable[[np.ndarray], np.ndarray], gradient: Float[np.ndarray, " P"], max_products: int
) -> Float[np.ndarray, " P"]:
    """Solve (G + delta I) step = gradient by conjugate gradients."""
    from scipy.sparse.linalg import LinearOperator, cg  # slow to import, and seldom needed

    operator = LinearOperator((len(gradient), len(gradient)), matvec=product, dtype=gradient.dtype)
    return cg(operator, gradient, rtol=1e-3, maxiter=max_products)[0]
