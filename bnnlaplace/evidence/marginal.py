"""The log marginal likelihood of the Laplace approximation.

With the prior N(mu, P0^-1), P0 = diag(delta), and G the GGN of the negative log likelihood at theta,

    log p(D) = sum_n log p(y_n | f_n) - 1/2 (theta - mu)' P0 (theta - mu) - 1/2 log det(I + P0^-1/2 G P0^-1/2).

In this form the null space of G contributes exactly zero to the determinant.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Num, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, ravel
from bnnlaplace.core.types import AnyArray, Estimate, Inputs
from bnnlaplace.curvature.linearisation import linearise
from bnnlaplace.evidence.arguments import checked_batch, curvature_weights
from bnnlaplace.evidence.log_determinant import Probes, Rules, rules
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.evidence.terms import lanczos_terms, log_determinant_of, log_likelihood_of, problem_of
from bnnlaplace.krylov.derivative_modes import once
from bnnlaplace.krylov.tridiagonal import rounding_of_zero
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.weights import like_weights


class EvidenceCurve(NamedTuple):
    """The log marginal likelihood as a function of a scalar prior precision.

    Attributes
    ----------
    prior_precision
        The grid, shape (D,).
    log_marginal_likelihood
        Mean and standard error over probes in nats, shape (D,) each. The standard error does not include the truncation
        of the recurrence, which lowers the mean by at most half the mean of `structure.truncation`.
    """

    prior_precision: Float[np.ndarray, " D"]
    log_marginal_likelihood: Estimate


def log_marginal_likelihood(
    params: PyTree,
    prior_precision: PyTree,
    batch: tuple[Inputs, AnyArray] | tuple[Inputs, AnyArray, Num[AnyArray, " N"]],
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    num_probes: int | None = None,
    scale: Num[ArrayLike, ""] = 1.0,
    prior_mean: PyTree = 0.0,
    side: Literal["auto", "primal", "dual"] = "auto",
    gradient: Literal["adjoint", "forward", "quadrature", "autodiff"] = "adjoint",
    probe_batch_size: int = 1,
    microbatch: int = 128,
    remat: bool = False,
) -> Estimate:
    """Estimate the log evidence by stochastic Lanczos quadrature, differentiable in every array argument.

    Parameters
    ----------
    params
        theta, the point of expansion.
    prior_precision
        delta > 0: a scalar, one number for each weight, or a pytree like the weights with leaves that broadcast. A
        scalar does not enter the products; see Notes.
    batch
        (inputs, targets), or (inputs, targets, weights) with weights (N,) that say how many times each example counts.
        Traced labels cannot be checked: a label that is not a class makes the value NaN.
    probes
        A random key, from which `num_probes` Rademacher probes are drawn. Or S rows of independent entries with mean 0
        and variance 1, normal or Rademacher. A row has P numbers on the primal side. On the dual side it has one number
        for each output, including the padding of the last microbatch (`dual_operator(...).size`).
    network, likelihood
        The model.
    num_matvecs
        Krylov depth for each probe.
    num_probes
        S, if `probes` is a key.
    scale
        (all training examples) / (examples in the batch). It multiplies log likelihood and curvature.
    prior_mean
        mu, in the same forms as `prior_precision`.
    side
        "primal": Lanczos on vectors of P numbers. "dual": Lanczos on outputs, log det(I + B' J P0^-1 J' B), which is
        the same value and has shorter vectors if there are fewer outputs than weights. "auto": the side that rows of
        probes fit or, with a key, the side with shorter vectors.
    gradient
        How the log-determinant is differentiated. "adjoint": the gradient of the value returned, by S K more products
        and K vector-Jacobian products for each probe. "forward": in `prior_precision` alone, from the forward pass. For
        a scalar it equals "adjoint". For one number for each weight it is an unbiased estimate, whose sum over a common
        factor of all is the derivative of the value returned. "quadrature": an unbiased estimate in everything, by a
        single vector-Jacobian product for each probe. "autodiff": through the loop. Unbiased estimates need a converged
        recurrence.
    probe_batch_size
        Probes at once. More of them cost memory, and pay only if products gain from batching.
    microbatch
        Examples in one step of the inner loop of a product.
    remat
        Linearise each microbatch anew in every product, as `jax.checkpoint` does. This needs the memory of one
        microbatch instead of all examples, for some more time. It pays if a microbatch is much smaller than the batch.

    Returns
    -------
    Estimate
        `mean`, and the standard error over probes, `sem` (infinite for one probe). `sem` does not include the
        truncation after `num_matvecs` steps, which lowers the mean.

    Notes
    -----
    Cost: one linearisation, whose outputs also give the log likelihood, and S K products. The gradient "forward" costs
    no more products, except for S products with one number for each weight on the dual side. For many values of a
    scalar prior precision at fixed weights, use `isotropic`, which computes the products once for all of them.
    Memory: residuals of the linearisation for the batch, or for a microbatch with `remat`; and K vectors for each of
    `probe_batch_size` probes.
    Rounding: products have errors of about eps lambda_max, and eigenvalues below 4 eps lambda_max count as zero. The
    value is too high by sum log(1 + lambda / delta) / 2 over these; see `IsotropicEvidence.rounding`. In float32 this
    may be nats as soon as 4 eps lambda_max exceeds delta, as with little noise, or with a bias beside features of size
    1e3. The dual side has no null space if there are fewer outputs than weights. Otherwise use float64, or `Laplace`,
    whose "full" sums in float64.
    Reference: Krämer et al. 2024, arXiv 2405.17277, section 5. `bnnlaplace/evidence/log_determinant.py` derives
    "forward".

    Raises
    ------
    ValueError
        If an option is unknown, `params` are not like `network.params`, probes fit no side, targets do not fit the
        likelihood, `prior_precision` or `prior_mean` does not fit the weights, or outside `jit` a precision is not
        positive or another number not finite.
    TypeError
        If "forward" is differentiated in something else.
    """
    caller = "log_marginal_likelihood"
    options = {"num_matvecs": num_matvecs, "num_probes": num_probes, "side": side, "gradient": gradient}
    options |= {"probe_batch_size": probe_batch_size, "microbatch": microbatch, "remat": remat}
    model = {"network": network, "likelihood": likelihood, "scale": scale, "prior_mean": prior_mean}
    return lanczos_terms(caller, params, prior_precision, batch, probes, **model, **options).log_marginal_likelihood


class IsotropicEvidence(NamedTuple):
    """The log evidence at fixed weights, as a smooth function of a scalar prior precision. It is a pytree.

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

    def __call__(self, prior_precision: Num[ArrayLike, "*shape"]) -> Estimate:
        """Return mean and standard error over probes at one prior precision, or at each of an array of them.

        They can be differentiated to any order, and the derivatives are those of the numbers returned. Cost: S K
        logarithms.
        """
        delta = jnp.asarray(prior_precision, self.squared_norm.dtype)
        checks.all_positive(delta, "the prior precision of an IsotropicEvidence")
        log_determinant = log_determinant_of(self.rules, delta)
        mean = self.log_likelihood - 0.5 * delta * self.squared_norm - 0.5 * log_determinant.mean
        return Estimate(mean, 0.5 * log_determinant.sem)

    def rounding(self, prior_precision: Num[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        """Return by how many nats the mean may be too high, as curvature that may be rounding counts as zero.

        Eigenvalues of G below 4 eps times the largest one are not told from zero. The bound puts all of them at that
        size. It is loose if G has a null space, and it does not contain the rounding of the other eigenvalues.
        """
        delta = jnp.asarray(prior_precision, self.squared_norm.dtype)
        largest = jax.vmap(rounding_of_zero)(self.rules.nodes)  # of the eigenvalues that are hidden from each probe
        hidden = jnp.sum(jnp.where(self.rules.nodes == 0, self.rules.weights, 0), axis=-1)
        return 0.5 * jnp.mean(hidden * jnp.log1p(largest / delta[..., None]), axis=-1)


def isotropic(
    params: PyTree,
    batch: tuple[Inputs, AnyArray] | tuple[Inputs, AnyArray, Num[AnyArray, " N"]],
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    num_probes: int | None = None,
    scale: Num[ArrayLike, ""] = 1.0,
    prior_mean: PyTree = 0.0,
    side: Literal["auto", "primal", "dual"] = "auto",
    probe_batch_size: int = 1,
    microbatch: int = 128,
    remat: bool = False,
) -> IsotropicEvidence:
    """Return the log evidence as a function of a scalar prior precision, from one decomposition of each probe.

    A scalar prior precision shifts G, which does not change its Krylov spaces. So all products are computed here, once.
    The value and all derivatives at any prior precision follow without another product. A training loop, an optimiser
    or a curve can call the result as often as they like. Call this function inside `jit`.

    Parameters
    ----------
    params, batch, probes, network, likelihood, num_matvecs, num_probes, scale, prior_mean, side
        As for `log_marginal_likelihood`, which returns the same values.
    probe_batch_size, microbatch, remat
        As for `log_marginal_likelihood`; they bound memory.

    Returns
    -------
    IsotropicEvidence
        A function that can be differentiated in the prior precision, but not in the arguments given here.

    Notes
    -----
    Cost: one linearisation and S K products. Memory: as for `log_marginal_likelihood`; the result is small. Rounding as
    there; `rounding` of the result bounds it.

    Raises
    ------
    ValueError
        As for `log_marginal_likelihood`.
    TypeError
        If the result is differentiated in an argument of this function.

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
    batch = checked_batch(caller, network, batch)
    params = like_weights(params, network.params, f"{caller}(params=...)", finite=True)
    weights = curvature_weights(network, likelihood, batch)
    linearised = linearise(network, params, batch[0], weights=weights, microbatch=microbatch, remat=remat)
    problem, rows = problem_of(caller, linearised, likelihood, scale, side, probes, num_probes, num_matvecs)
    checks.real_numbers(prior_mean, f"{caller}(prior_mean=...)", finite=True)
    options = {"num_matvecs": num_matvecs, "probe_batch_size": probe_batch_size}
    deviation = ravel(params) - as_vector(prior_mean, params)
    log_likelihood = log_likelihood_of(linearised.outputs, likelihood, batch, scale)
    # A derivative in the weights would go through the whole loop of Lanczos, so it is refused.
    return once(
        IsotropicEvidence(log_likelihood, jnp.sum(deviation**2), rules(problem, rows, **options)),
        f"{caller} has derivatives in the prior precision only; in other things take log_marginal_likelihood",
    )


def curve(
    log_determinant: Callable[[float], Float[np.ndarray, " S"]],
    log_joint: LogJoint,
    squared_norm: float,
    precisions: Float[np.ndarray, " D"],
) -> EvidenceCurve:
    """Evaluate the evidence at each prior precision from a fitted structure. No GGN product is computed.

    Parameters
    ----------
    log_determinant
        delta -> log det(I + G / delta) for each probe.
    log_joint, squared_norm
        The function from q = delta * squared_norm to the other terms of the evidence (see `LogJoint`), and
        squared_norm = (theta - mu)' D (theta - mu).
    precisions
        The grid.
    """
    points = [estimate_of_forms(log_joint(delta * squared_norm), log_determinant(delta)) for delta in precisions]
    return EvidenceCurve(precisions, Estimate(*map(np.array, zip(*points, strict=True))))


def estimate_of_forms(other_terms: float, forms: Float[np.ndarray, " S"]) -> Estimate:
    """Estimate the evidence from its terms beside the determinant, and the log-determinant of each probe.

    A single value is exact, as `bnnlaplace.structure.Structure` promises. Its standard error is 0.
    """
    sem = 0.5 * forms.std(ddof=1) / np.sqrt(len(forms)) if len(forms) > 1 else 0.0
    return Estimate(float(other_terms - 0.5 * forms.mean()), float(sem))
