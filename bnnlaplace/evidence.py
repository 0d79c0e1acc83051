"""The log marginal likelihood of the Laplace approximation.

With the prior N(mu, P0^-1), P0 = diag(delta), and G the GGN of the negative log likelihood at theta,

    log p(D) = sum_n log p(y_n | f_n) - 1/2 (theta - mu)' P0 (theta - mu) - 1/2 log det(I + P0^-1/2 G P0^-1/2).

Written like this the null space of G contributes exactly zero to the determinant.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature import ggn
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.krylov import stochastic_lanczos_quadrature
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import as_vector, ravel
from bnnlaplace.types import Estimate


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


class DataTerms(NamedTuple):
    """The log likelihood at the weights, and its gradient: what the evidence needs beside the curvature.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n), in nats.
    log_likelihood_gradient
        Its gradient in the weights, shape (P,): with the prior's, it says how far from a mode the weights are.
    """

    log_likelihood: Float[Array, ""]
    log_likelihood_gradient: Float[Array, " P"]


def data_terms(
    network: Network,
    likelihood: Likelihood,
    inputs: Float[Array, "N ..."],
    targets: Array,
    *,
    scale: float = 1.0,
    microbatch: int,
) -> DataTerms:
    """The log likelihood of all data at the network's weights and its gradient, times `scale`.

    Parameters
    ----------
    network, likelihood
        The model.
    inputs, targets
        All data.
    scale
        (all training examples) / N: multiplies both.
    microbatch
        Examples at a time; bounds memory.

    Raises
    ------
    ValueError
        If either is not finite.
    """
    value, gradient = _log_likelihood_and_gradient(
        network, likelihood, network.params, inputs, targets, microbatch=microbatch
    )
    if not bool(jnp.isfinite(value) & jnp.isfinite(gradient).all()):
        raise ValueError(
            "fit: the log likelihood or its gradient is not finite at these weights and data; look for NaN or "
            "infinite values in the inputs and the weights"
        )
    return DataTerms(scale * value, scale * gradient)


def log_likelihood_and_gradient(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    targets: Array,
    *,
    microbatch: int,
) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """sum_n log p(y_n | f_n) and its gradient in the weights, a microbatch at a time. Call it inside `jit`.

    Parameters
    ----------
    network, likelihood
        The model.
    params
        The weights.
    inputs, targets
        All data.
    microbatch
        Examples at a time; bounds memory.
    """
    dtype = ravel(params).dtype
    batches = mb.split(inputs, microbatch, dtype)
    labels = mb.split(targets, microbatch, dtype).inputs

    def value(params: PyTree, batch: mb.Microbatches, targets: Array) -> Array:
        log_prob = likelihood.log_prob(network(params, batch.inputs), targets)
        return jnp.sum(mb.over_outputs(batch.weights, log_prob) * log_prob)

    def add(total: tuple[Array, PyTree], part: tuple[mb.Microbatches, Array]) -> tuple[tuple[Array, PyTree], None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(value)(params, *part)), None

    zero = jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, params)
    (total, gradient), _ = jax.lax.scan(add, zero, (batches, labels))
    return total, ravel(gradient)


_log_likelihood_and_gradient = jax.jit(log_likelihood_and_gradient, static_argnames="microbatch")


def log_joint(
    log_likelihood: float, squared_norm: float, prior_precision: Float[np.ndarray, " D"] | float
) -> Float[np.ndarray, " D"] | float:
    """The terms of the evidence without the determinant, for an isotropic prior: log p(y|f) - delta |theta - mu|^2 / 2.

    The prior's normalisation is not part of it: in the evidence it cancels against that of the posterior.

    Parameters
    ----------
    log_likelihood, squared_norm
        log p(y | f) of all data, and |theta - mu|^2.
    prior_precision
        delta: one number, or a grid.
    """
    return log_likelihood - 0.5 * prior_precision * squared_norm


def log_marginal_likelihood(
    params: PyTree,
    prior_precision: Float[Array, ""] | Float[Array, " P"] | PyTree,
    batch: tuple[Array, Array],
    probes: Float[Array, "S V"],
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    scale: float = 1.0,
    prior_mean: Float[Array, ""] | PyTree = 0.0,
    side: Literal["primal", "dual"] = "primal",
    gradient: Literal["adjoint", "quadrature", "autodiff"] = "adjoint",
    probe_batch_size: int = 1,
    microbatch: int = 128,
) -> Estimate:
    """The evidence by stochastic Lanczos quadrature, differentiable in every array argument.

    Parameters
    ----------
    params
        theta, the point of expansion.
    prior_precision
        delta > 0: a scalar, one number per weight, or a pytree like the weights with leaves that broadcast.
    batch
        (inputs, targets).
    probes
        S rows with independent entries of mean 0 and variance 1, normal or Rademacher: of P numbers for "primal", for
        "dual" of one number per output, the padding of the last microbatch included (`dual_operator(...).size`).
    network, likelihood
        The model.
    num_matvecs
        Krylov depth per probe.
    scale
        (all training examples) / (examples in the batch): multiplies log likelihood and curvature.
    prior_mean
        mu, as `prior_precision`.
    side
        "primal": Lanczos on P numbers. "dual": on outputs, log det(I + B' J P0^-1 J' B), the same value with shorter
        vectors where there are fewer outputs than weights.
    gradient
        Of the log-determinant, as for `krylov.stochastic_lanczos_quadrature`. "adjoint": that of the value returned, by
        S K more products and K vector-Jacobian products a probe; "quadrature": an unbiased one by a single
        vector-Jacobian product a probe, which needs a converged recurrence.
    probe_batch_size
        Probes at once.
    microbatch
        Examples in one step of the linearisation's inner loop.

    Returns
    -------
    Estimate
        `mean` and, over probes, `sem` (infinite for one probe). A recurrence that `num_matvecs` ends early lowers the
        mean, of which `sem` knows nothing.

    Notes
    -----
    Cost: one linearisation, whose outputs serve the log likelihood too, and S K products; about twice that with the
    gradient. Memory: residuals of the linearisation at the batch, and K vectors. Reference: Krämer et al. 2024, arXiv
    2405.17277, section 5.

    Raises
    ------
    ValueError
        If `side` is unknown, or `prior_precision` or `prior_mean` does not fit the weights.
    """
    inputs, targets = batch
    delta = as_vector(prior_precision, params)
    deviation = ravel(params) - as_vector(prior_mean, params)
    linearised = ggn.linearise(network, params, inputs, microbatch=microbatch)
    if side == "primal":
        operator = ggn.ggn_operator(linearised, likelihood, scale=scale)
        root = jax.lax.rsqrt(delta)

        def matvec(vector: Array) -> Array:
            return root * operator.matvec(root * vector)

    elif side == "dual":
        matvec = ggn.dual_operator(linearised, likelihood, scale=scale, prior_precision=delta).matvec
    else:
        raise ValueError(f"log_marginal_likelihood(side=...) must be 'primal' or 'dual'; got {side!r}")
    log_determinant = stochastic_lanczos_quadrature(
        jnp.log1p, matvec, probes, num_matvecs=num_matvecs, gradient=gradient, probe_batch_size=probe_batch_size
    )
    log_likelihood = scale * jnp.sum(likelihood.log_prob(linearised.outputs[: len(inputs)], targets))
    log_prior = -0.5 * jnp.sum(delta * deviation**2)
    return Estimate(log_likelihood + log_prior - 0.5 * log_determinant.mean, 0.5 * log_determinant.sem)


def curve(
    log_determinant: Callable[[float], Float[np.ndarray, " S"]],
    log_likelihood: float,
    squared_norm: float,
    precisions: Float[np.ndarray, " D"],
) -> EvidenceCurve:
    """The evidence at each prior precision from a fitted structure's `log_determinant`: no product is computed.

    Parameters
    ----------
    log_determinant
        delta -> log det(I + G / delta) for each probe; as the method of a `bnnlaplace.structure.Structure`.
    log_likelihood, squared_norm
        As for `log_joint`.
    precisions
        The grid.
    """
    forms = np.stack([log_determinant(delta) for delta in precisions])
    mean = log_joint(log_likelihood, squared_norm, precisions) - 0.5 * forms.mean(axis=1)
    count = forms.shape[1]
    # A single value is an exact one, as `structure` promises.
    sem = 0.5 * forms.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(len(forms))
    return EvidenceCurve(precisions, Estimate(mean, sem))
