"""The log marginal likelihood of the Laplace approximation.

With the prior N(mu, P0^-1), P0 = diag(delta), and G the GGN of the negative log likelihood at theta,

    log p(D) = sum_n log p(y_n | f_n) - 1/2 (theta - mu)' P0 (theta - mu) - 1/2 log det(I + P0^-1/2 G P0^-1/2).

Written like this the null space of G contributes exactly zero to the determinant.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from bnnlaplace.core.tree import as_vector, num_examples, ravel
from bnnlaplace.core.types import AnyArray, Estimate, Inputs
from bnnlaplace.curvature.linearisation import Linearisation, linearise
from bnnlaplace.evidence.log_determinant import (
    Problem,
    Rules,
    choose_side,
    estimate,
    forward_estimate,
    mean_and_sem,
    rows_of,
    rules,
)
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.krylov.derivative_modes import once
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.network import Network


class EvidenceCurve(NamedTuple):
    """The log marginal likelihood as a function of a scalar prior precision.

    Attributes
    ----------
    prior_precision
        The grid, shape (D,).
    log_marginal_likelihood
        Mean and standard error over probes, shape (D,) each; in nats. The standard error knows nothing of a truncated
        recurrence, which lowers the mean: `structure.truncation` bounds by how much.
    """

    prior_precision: Float[np.ndarray, " D"]
    log_marginal_likelihood: Estimate


def log_marginal_likelihood(
    params: PyTree,
    prior_precision: Float[Array, ""] | Float[Array, " P"] | PyTree,
    batch: tuple[Inputs, AnyArray],
    probes: Float[Array, "S V"] | Key[Array, ""],
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    num_probes: int | None = None,
    scale: float = 1.0,
    prior_mean: Float[Array, ""] | PyTree = 0.0,
    side: Literal["auto", "primal", "dual"] = "auto",
    gradient: Literal["adjoint", "forward", "quadrature", "autodiff"] = "adjoint",
    probe_batch_size: int = 1,
    microbatch: int = 128,
    remat: bool = False,
) -> Estimate:
    """The evidence by stochastic Lanczos quadrature, differentiable in every array argument.

    Parameters
    ----------
    params
        theta, the point of expansion.
    prior_precision
        delta > 0: a scalar, one number per weight, or a pytree like the weights with leaves that broadcast. A scalar
        takes no part in the products: see Notes.
    batch
        (inputs, targets). Labels that are traced cannot be checked: one outside of the classes makes the value NaN.
    probes
        A random key, from which `num_probes` Rademacher probes are drawn, the same for the same key. Or S rows with
        independent entries of mean 0 and variance 1, normal or Rademacher: of P numbers for the primal side, for the
        dual of one number per output, the padding of the last microbatch included (`dual_operator(...).size`).
    network, likelihood
        The model.
    num_matvecs
        Krylov depth per probe.
    num_probes
        S, with a key.
    scale
        (all training examples) / (examples in the batch): multiplies log likelihood and curvature.
    prior_mean
        mu, as `prior_precision`.
    side
        "primal": Lanczos on P numbers. "dual": on outputs, log det(I + B' J P0^-1 J' B), the same value with shorter
        vectors where there are fewer outputs than weights. "auto": the one that rows of probes fit, or, with a key, the
        one with shorter vectors.
    gradient
        Of the log-determinant. "adjoint": that of the value returned, by S K more products and K vector-Jacobian
        products a probe. "forward": in `prior_precision` alone, from the forward pass; for a scalar the same as
        "adjoint", for one number per weight an unbiased estimate, whose component along a common factor of all is that
        of the value returned. "quadrature": in everything, an unbiased one by a single vector-Jacobian product a probe.
        "autodiff": through the loop. All that is unbiased needs a converged recurrence.
    probe_batch_size
        Probes at once. More of them cost memory, and pay off only where products gain from batching.
    microbatch
        Examples in one step of the inner loop of a product.
    remat
        Linearise each microbatch anew in every product, as `jax.checkpoint` does: memory of one microbatch in place of
        all examples, for some more time. Pays with a microbatch much smaller than the batch.

    Returns
    -------
    Estimate
        `mean` and, over probes, `sem` (infinite for one probe). A recurrence that `num_matvecs` ends early lowers the
        mean, of which `sem` knows nothing.

    Notes
    -----
    Cost: one linearisation, whose outputs serve the log likelihood too, and S K products. Gradients: "forward" costs no
    product more, but S products for one number per weight on the dual side; the others as said above. With many values
    of a scalar prior precision and fixed weights take `isotropic`, which computes the products once for all of them.
    Memory: residuals of the linearisation at the batch, or with `remat` at a microbatch, and K vectors of each of
    `probe_batch_size` probes.
    Rounding: products have errors of about eps lambda_max, and eigenvalues below 4 eps times the largest one count as
    zero. Where that is not small against delta, as in float32 with little noise and a small prior precision, the primal
    side is off by some nats; take the dual one, or float64.
    Reference: Krämer et al. 2024, arXiv 2405.17277, section 5; `log_determinant.py` derives "forward".

    Raises
    ------
    ValueError
        If an option is unknown, probes fit no side, targets do not fit the likelihood, `prior_precision` or
        `prior_mean` does not fit the weights, or a precision outside `jit` is not positive.
    TypeError
        If "forward" is differentiated in something else.
    """
    caller = "log_marginal_likelihood"
    if gradient not in ("adjoint", "forward", "quadrature", "autodiff"):
        raise ValueError(
            f"{caller}(gradient=...) must be 'adjoint', 'forward', 'quadrature' or 'autodiff'; got {gradient!r}"
        )
    options = {"num_matvecs": num_matvecs, "probe_batch_size": probe_batch_size}
    linearised = linearise(network, params, batch[0], microbatch=microbatch, remat=remat)
    problem, rows = _problem(caller, linearised, likelihood, scale, side, probes, num_probes, num_matvecs)
    vector = as_vector(prior_precision, params)
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        vector = vector.astype(linearised.outputs.dtype)
    _check_positive(vector, f"{caller}(prior_precision=...)")
    is_scalar = jnp.ndim(prior_precision) == 0 if _is_leaf(prior_precision) else False
    delta = jnp.asarray(prior_precision, vector.dtype) if is_scalar else vector
    if gradient != "forward":
        log_determinant = estimate(problem, delta, rows, gradient=gradient, **options)
    elif is_scalar:
        log_determinant = _of_rules(_fixed_rules(caller, problem, rows, **options), delta)
    else:
        log_determinant = forward_estimate(caller, problem, delta, rows, **options)
    deviation = ravel(params) - as_vector(prior_mean, params)
    log_prior = -0.5 * jnp.sum(vector * deviation**2)
    mean = _log_likelihood(linearised, likelihood, batch, scale) + log_prior - 0.5 * log_determinant.mean
    return Estimate(mean, 0.5 * log_determinant.sem)


class IsotropicEvidence(NamedTuple):
    """The evidence of one set of weights at every scalar prior precision: a pytree, and a smooth function.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n), in nats.
    squared_norm
        |theta - mu|^2.
    rules
        The Gauss rule of each probe for G.
    """

    log_likelihood: Float[Array, ""]
    squared_norm: Float[Array, ""]
    rules: Rules

    def __call__(self, prior_precision: Float[Array, "*shape"] | float) -> Estimate:
        """Mean and standard error over probes at one prior precision, or at each of an array of them.

        Differentiable to any order; the derivatives are those of the numbers returned. Cost: S K logarithms.
        """
        delta = jnp.asarray(prior_precision, self.squared_norm.dtype)
        _check_positive(delta, "the prior precision of an IsotropicEvidence")
        found = _of_rules(self.rules, delta)
        mean = self.log_likelihood - 0.5 * delta * self.squared_norm - 0.5 * found.mean
        return Estimate(mean, 0.5 * found.sem)


def isotropic(
    params: PyTree,
    batch: tuple[Inputs, AnyArray],
    probes: Float[Array, "S V"] | Key[Array, ""],
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    num_probes: int | None = None,
    scale: float = 1.0,
    prior_mean: Float[Array, ""] | PyTree = 0.0,
    side: Literal["auto", "primal", "dual"] = "auto",
    probe_batch_size: int = 1,
    microbatch: int = 128,
    remat: bool = False,
) -> IsotropicEvidence:
    """The evidence as a function of a scalar prior precision, from one decomposition of each probe.

    A scalar prior precision shifts G, and its Krylov spaces stay what they are. So the products are computed here once,
    and the value and all derivatives at any prior precision follow without another one: a training loop, an optimiser
    and a curve call the result as often as they like. Call it inside `jit`.

    Parameters
    ----------
    params, batch, probes, network, likelihood, num_matvecs, num_probes, scale, prior_mean, side
        As for `log_marginal_likelihood`, whose values those of the result are.
    probe_batch_size, microbatch, remat
        The same: they bound memory.

    Returns
    -------
    IsotropicEvidence
        Not differentiable in the arguments here, but in the prior precision that it is called with.

    Notes
    -----
    Cost: one linearisation and S K products. Memory: as for `log_marginal_likelihood`; the result is small.

    Raises
    ------
    ValueError
        As `log_marginal_likelihood`.
    TypeError
        If it is differentiated in an argument of this function.

    Examples
    --------
    >>> import bnnlaplace
    >>> network = Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    >>> x, y = jnp.ones((5, 2)), jnp.arange(5) % 3
    >>> options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 4}
    >>> evidence = isotropic(network.params, (x, y), jax.random.key(0), **options)
    >>> evidence(jnp.array([0.1, 1.0, 10.0])).mean.shape
    (3,)
    """
    caller = "isotropic"
    linearised = linearise(network, params, batch[0], microbatch=microbatch, remat=remat)
    problem, rows = _problem(caller, linearised, likelihood, scale, side, probes, num_probes, num_matvecs)
    options = {"num_matvecs": num_matvecs, "probe_batch_size": probe_batch_size}
    deviation = ravel(params) - as_vector(prior_mean, params)
    log_likelihood = _log_likelihood(linearised, likelihood, batch, scale)
    found = rules(problem, rows, **options)
    return once(
        IsotropicEvidence(log_likelihood, jnp.sum(deviation**2), found),
        f"{caller} has derivatives in the prior precision only; in other things take log_marginal_likelihood",
    )


def _problem(
    caller: str,
    linearised: Linearisation,
    likelihood: Likelihood,
    scale: float,
    side: str,
    probes: Array,
    num_probes: int | None,
    num_matvecs: int,
) -> tuple[Problem, Float[Array, "S V"]]:
    """The operator whose determinant is meant, and its probes."""
    outputs, num_weights = linearised.outputs, linearised.size
    side = choose_side(caller, side, probes, num_weights, outputs.size)
    length = num_weights if side == "primal" else outputs.size
    rows = rows_of(caller, probes, num_probes, length, outputs.dtype)
    if not 1 <= num_matvecs <= length:
        raise ValueError(
            f"{caller}(num_matvecs=...) must be between 1 and {length}, the length of the vectors of side={side!r}; "
            f"got {num_matvecs}"
        )
    _check_positive(scale, f"{caller}(scale=...)")
    return Problem(linearised, likelihood, scale, side), rows


def _fixed_rules(caller: str, *arguments: Any, **options: Any) -> Rules:
    message = f"{caller}(gradient='forward') has derivatives in prior_precision and prior_mean only; use 'adjoint'"
    return once(rules(*arguments, **options), message)


def _of_rules(rules: Rules, prior_precision: Float[Array, "*shape"]) -> Estimate:
    """log det(I + G / delta) at each prior precision."""
    forms = jnp.sum(rules.weights * jnp.log1p(rules.nodes / prior_precision[..., None, None]), axis=-1)
    return mean_and_sem(forms)


def _log_likelihood(
    linearised: Linearisation, likelihood: Likelihood, batch: tuple[Inputs, AnyArray], scale: float
) -> Float[Array, ""]:
    inputs, targets = batch
    outputs = linearised.outputs[: num_examples(inputs)]
    check_targets(likelihood, outputs.shape, targets, "log_marginal_likelihood(batch=(x, y))")
    return scale * jnp.sum(likelihood.log_prob(outputs, targets))


def _check_positive(numbers: ArrayLike, where: str) -> None:
    if isinstance(numbers, jax.core.Tracer):
        return
    known = np.asarray(numbers)  # operations of JAX would be traced inside `jit`
    if not np.all((known > 0) & np.isfinite(known)):
        raise ValueError(f"{where} must be positive and finite; got {known}; try 1.0")


def _is_leaf(value: PyTree) -> bool:
    return jax.tree.structure(value) == jax.tree.structure(0)


def curve(
    log_determinant: Callable[[float], Float[np.ndarray, " S"]],
    log_joint: LogJoint,
    squared_norm: float,
    precisions: Float[np.ndarray, " D"],
) -> EvidenceCurve:
    """Evaluate the evidence at each prior precision, from a fitted structure's `log_determinant` alone.

    Parameters
    ----------
    log_determinant
        delta -> log det(I + G / delta) for each probe.
    log_joint, squared_norm
        From q = delta * squared_norm to the other terms of the evidence; see `LogJoint`.
    precisions
        The grid.

    Notes
    -----
    No GGN product is computed.
    """
    points = [estimate_of_forms(log_joint(delta * squared_norm), log_determinant(delta)) for delta in precisions]
    return EvidenceCurve(precisions, Estimate(*map(np.array, zip(*points, strict=True))))


def estimate_of_forms(other_terms: float, forms: Float[np.ndarray, " S"]) -> Estimate:
    """The evidence from its terms beside the determinant and the log-determinant of each probe.

    A single value is exact, as `bnnlaplace.structure.Structure` promises: its standard error is 0.
    """
    sem = 0.5 * forms.std(ddof=1) / np.sqrt(len(forms)) if len(forms) > 1 else 0.0
    return Estimate(float(other_terms - 0.5 * forms.mean()), float(sem))
