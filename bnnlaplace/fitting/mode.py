"""The mode of a linearised network's log joint: a convex problem, solved by Newton's method without a matrix.

The evidence of a network at weights that are no mode of its log joint is that of no model. The linearised network has
one mode for every prior precision, whatever training did: its evidence is well defined. Source: Antoran, Janz,
Allingham, Daxberger, Barbano, Nalisnick, Hernandez-Lobato, "Adapting the linearised Laplace model evidence for modern
deep learning", 2022, arXiv 2206.08900.
"""

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float
from scipy.sparse.linalg import LinearOperator, cg

from bnnlaplace.core.types import NotAModeWarning
from bnnlaplace.structure import KrylovStructure, Structure

# Newton steps, and halvings of one: a convex problem started where the network was trained takes a few.
MOST_STEPS, MOST_HALVINGS = 50, 12


def linear_mode(
    terms: Callable[[Float[np.ndarray, " P"]], tuple[float, Float[np.ndarray, " P"]]],
    product: Callable[[Float[np.ndarray, " P"], Float[np.ndarray, " P"]], Float[np.ndarray, " P"]],
    start: Float[Array, " P"],
    *,
    prior_precision: float,
    prior_mean: Float[Array, " P"] | None = None,
    tolerance: float = 1e-2,
    max_products: int = 200,
) -> Float[np.ndarray, " P"]:
    """Maximise log p(y | theta) - delta / 2 |theta - mu|^2, log-concave in theta.

    Parameters
    ----------
    terms
        theta -> log p(y | theta) and its gradient.
    product
        (theta, v) -> G(theta) v, which is minus the Hessian of the first of them, as the network is linear.
    start
        Where to begin.
    prior_precision, prior_mean
        delta and mu of the isotropic prior; None is zero.
    tolerance
        Stop where the Newton decrement g' (G + delta I)^-1 g, twice the gain in nats that is left, is below this.
    max_products
        GGN products in one Newton step.

    Notes
    -----
    Cost: for each step one gradient and as many products as conjugate gradients take. Warns where the decrement stays
    above the tolerance; rounding of the log likelihood in single precision limits what can be reached.
    """
    point = np.asarray(start, np.float64)
    centre = np.zeros_like(point) if prior_mean is None else np.asarray(prior_mean, np.float64)

    def joint(point: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        value, gradient = terms(point)
        deviation = point - centre
        return value - 0.5 * prior_precision * deviation @ deviation, gradient - prior_precision * deviation

    value, gradient = joint(point)
    decrement = np.inf
    for number in range(1, MOST_STEPS + 1):  # noqa: B007
        step = _newton_step(lambda v, at=point: product(at, v) + prior_precision * v, gradient, max_products)
        decrement = float(gradient @ step)
        if decrement <= tolerance:
            return point + step
        for halving in range(MOST_HALVINGS):
            size = 0.5**halving
            candidate, next_gradient = joint(point + size * step)
            if candidate >= value + 1e-4 * size * decrement:
                break
        else:
            break
        point, value, gradient = point + size * step, candidate, next_gradient
    warnings.warn(
        f"the mode of the linearised network was not found: {0.5 * decrement:.2g} nats are left to gain after "
        f"{number} Newton steps; a larger prior precision makes the problem easier",
        stacklevel=4,
    )
    return point


def _newton_step(
    product: Callable[[np.ndarray], np.ndarray], gradient: Float[np.ndarray, " P"], max_products: int
) -> Float[np.ndarray, " P"]:
    operator = LinearOperator((len(gradient), len(gradient)), matvec=product, dtype=gradient.dtype)
    # An inexact solution of a positive definite system is still a direction of ascent.
    return cg(operator, gradient, rtol=1e-3, maxiter=max_products)[0]


# Whether the weights are a mode of the log joint whose evidence is computed, and how far from one they are.
# Squared distance to the mode over that of a posterior sample: at a quarter the mode is half a sample away.
LARGEST_RATIO = 0.25


def warn_unless_mode(structure: Structure, decrement: float, effective_parameters: float, precision: float) -> None:
    """Warn where the mode is not much nearer than a posterior sample is.

    Parameters
    ----------
    structure
        What the numbers come from.
    decrement
        g' (G + P0)^-1 g with the gradient g of the log joint: the squared distance to the mode, in posterior standard
        deviations, of a quadratic log joint. For a truncated recurrence an upper bound.
    effective_parameters
        tr G (G + P0)^-1: that of a sample, on average, in the directions that the data determine.
    precision
        The prior precision that was assumed.
    """
    if not decrement > LARGEST_RATIO * effective_parameters:
        return
    most = "at most " if isinstance(structure, KrylovStructure) else ""
    warnings.warn(
        f"the weights are no mode of the log joint at prior precision {precision:.3g}: a Gauss-Newton step gains "
        f"{most}{0.5 * decrement:.3g} nats and goes {most}{decrement**0.5:.3g} posterior standard deviations, where a "
        f"sample goes {effective_parameters**0.5:.3g}; pass the prior precision of training (weight decay times the "
        "number of examples), train on, or use fit(mean='linear')",
        NotAModeWarning,
        stacklevel=3,
    )
