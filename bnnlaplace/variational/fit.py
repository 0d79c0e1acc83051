"""Fit the variational posterior: sites, mean and curvature in turn, until the evidence lower bound has settled.

For a Gaussian q = N(m, Sigma) over the weights of the linearised network, the maximum of the evidence lower bound

    ELBO = sum_n E_q log p(y_n | f_n) - KL(q || N(mu, P0^-1))

obeys, with averages over q of the likelihood's gradient r_n and curvature W_n,

    Sigma^-1 = P0 + sum_n J_n' W_n J_n,    P0 (m - mu) = sum_n J_n' r_n.

(Opper and Archambeau, "The variational Gaussian approximation revisited", 2009.) That is a Laplace approximation whose
curvature and residuals are averaged under its own predictions. With the curvature G that a structure holds and
gamma = tr G (G + P0)^-1, the divergence is

    KL = 1/2 [(m - mu)' P0 (m - mu) - gamma + log det(I + P0^-1/2 G P0^-1/2)].

So E_q log p + gamma / 2 stands where the log likelihood at the mode stands in the Laplace evidence, and whatever is
computed from that is computed from this. A structure such as the diagonal restricts Sigma; the bound is one for any.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnnlaplace.core import checks
from bnnlaplace.core.memory import MemoryEstimate
from bnnlaplace.core.tree import number_type
from bnnlaplace.curvature.kronecker import SharedWeights
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.evidence.lower_bound import Bound
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.fitting.fit import check_options, fit, reads_factor
from bnnlaplace.fitting.krylov import KrylovOptions
from bnnlaplace.fitting.prepare import Model, bytes_of_images, memory_of, prepare
from bnnlaplace.model.data import Data
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.spec import output_shape
from bnnlaplace.prior import Prior
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import Structure
from bnnlaplace.variational import newton_outputs, prior_step
from bnnlaplace.variational.draws import Draws
from bnnlaplace.variational.iteration import Context, Iterate, iterate
from bnnlaplace.variational.mean import with_mean
from bnnlaplace.variational.mixing import DEPTH
from bnnlaplace.variational.options import Progress, Variational, resolve
from bnnlaplace.variational.sites import are_by_samples


def fit_posterior(
    state: Unfitted | Fitted, settings: Settings, data: Data, approximation: str | Variational, **how: Any
) -> tuple[Fitted, Settings]:
    """Fit a Laplace approximation or a variational posterior; return it with the settings of its prior.

    Parameters and errors are those of `Laplace.fit`.
    """
    options = resolve(approximation)
    if options is None:
        return fit(state, settings, data, **how), settings
    return fit_variational(state, settings, data, options, **how)


def fit_variational(
    state: Unfitted | Fitted,
    settings: Settings,
    data: Data,
    options: Variational,
    *,
    num_data: int | None,
    microbatch: int,
    krylov: KrylovOptions,
    shared_weights: SharedWeights = "partial_traces",
    posterior: Fitted | None = None,
    mean: str = "network",
) -> tuple[Fitted, Settings]:
    """Fit the variational posterior at the prior precision of the settings, or at the best one.

    The iteration begins at the posterior of a fitted `state`, whichever approximation made it. So another prior
    precision near by takes few iterations. Parameters beside `options` are those of `fitting.fit.fit`.

    Raises
    ------
    ValueError
        If data can be read once only, or options or data cannot be used.

    Notes
    -----
    Cost of an iteration: one Laplace fit of the structure, the samples of the outputs, and in each Newton step of the
    mean a gradient and the products of conjugate gradients. Memory beside that of a Laplace fit: the samples of the
    outputs of all examples, S N C numbers, and N C^2 for the sites, or S N C again where C > S.
    """
    checks.known("fit", state, settings)
    num_data = check_options(settings.hessian_structure, num_data, mean, shared_weights)
    _check(state, posterior, data)
    if options.fixed_mean and mean == "linear":
        raise ValueError(
            "fit(mean=...) must be 'network' with Variational(fixed_mean=True), which keeps the mean at the weights; "
            "got 'linear'; leave one of the two out"
        )
    if state.likelihood.sigma_noise is not None:  # the posterior of the linearised network is Gaussian
        _check_prior_stays(options)
        there = "network" if options.fixed_mean else "linear"
        exact = {"mean": there, "num_data": num_data, "microbatch": microbatch, "shared_weights": shared_weights}
        return fit(state, settings, data, krylov=krylov, **exact), settings
    checks.key(krylov.key, "fit(key=...), which seeds the samples of the outputs,")
    krylov.check_types()
    model = prepare(state, settings, data, linear=True, microbatch=microbatch, num_data=num_data)
    model = model._replace(data=model.data.in_order())
    context = _context(model, settings, options, krylov, shared_weights, microbatch)
    prior, structure = _start(state, settings, context)
    best, progress = iterate(context, prior, structure)
    if context.grouping is not None:
        settings = settings.at(context.grouping.as_given(context.grouping.precisions(best.prior)))
    return _as_fitted(context, best, progress), settings


def _check(state: Unfitted | Fitted, posterior: Fitted | None, data: Data) -> None:
    if posterior is not None or (state.prior is not None and state.prior.curvature is not None):
        raise ValueError(
            "fit(approximation='variational') must be used without prior=...; got the posterior of earlier data; fit "
            "all tasks with approximation='laplace'"
        )
    data.check_repeatable("fit(data=...) must be readable several times for approximation='variational'")


def _check_prior_stays(options: Variational) -> None:
    if options.prior_structure is not None:
        raise ValueError(
            "Variational(prior_structure=...) must be left out for a regression, whose variational posterior is that "
            f"of Laplace; got {options.prior_structure!r}; use optimize_prior_precision()"
        )


def _context(
    model: Model,
    settings: Settings,
    options: Variational,
    krylov: KrylovOptions,
    shared_weights: SharedWeights,
    microbatch: int,
) -> Context:
    """Check the memory and read the data once, which checks and counts them."""
    name = settings.hessian_structure
    shape = output_shape(model.head, model.data.first)[1:]

    def sizes(num_examples: int | None) -> tuple[int, bool, MemoryEstimate]:
        num_pairs = options.pairs_for(shape, num_examples)
        # Samples of the outputs have the right products, but their factor is that of another curvature.
        by_samples = are_by_samples(shape[-1], num_pairs) and not reads_factor(model, name, num_examples, krylov)
        memory = _memory(model, name, krylov.max_vectors, shape, num_pairs, by_samples)
        memory.check()
        return num_pairs, by_samples, memory

    sizes(model.data.length)
    for _ in model.data:
        pass
    num_pairs, by_samples, memory = sizes(model.data.num_examples)
    # Each iteration differentiates all outputs, so rows pay from the second one on.
    num_products = options.max_iterations * math.prod(shape)
    beside = memory.needed + (bytes_of_images(model, krylov.max_vectors) if name == "lanczos" else 0)
    model = model.with_rows(num_products, microbatch=microbatch, bytes_beside=beside)
    chosen = options.prior_structure
    grouping = None if chosen is None else Grouping.of(chosen, model.network.params, settings.prior_groups)
    in_outputs = not options.fixed_mean and newton_outputs.is_for(model, num_pairs)
    kernel = newton_outputs.Kernel() if in_outputs else None
    of_data = {"num_pairs": num_pairs, "by_samples": by_samples, "scale": model.scale(), "kernel": kernel}
    return Context(model, name, options, krylov, shared_weights, microbatch, grouping=grouping, **of_data)


def _start(state: Unfitted | Fitted, settings: Settings, context: Context) -> tuple[Prior, Structure | None]:
    """The prior and the structure with which the iteration begins.

    Weights that are to share a precision begin at the geometric mean of theirs.
    """
    prior = settings.prior(context.model.network) if state.prior is None else state.prior
    structure = state.structure if isinstance(state, Fitted) else None
    if context.grouping is not None:
        dtype = number_type(context.model.network.params)
        shared = prior_step.prior_with(context.grouping, context.grouping.precisions(prior), prior.mean, dtype)
        if not np.allclose(shared.relative, prior.relative, rtol=1e-4):
            return shared, None  # the structure is in the coordinates of the old ratios
    return prior, structure


def _memory(
    model: Model, structure: str, max_vectors: int, shape: tuple[int, ...], num_pairs: int, by_samples: bool
) -> MemoryEstimate:
    """Memory of the structure, and of the outputs and the sites of all examples if their number is known."""
    estimate = memory_of(model, structure, max_vectors)
    outputs, number_bytes = math.prod(shape), number_type(model.head.params).itemsize
    # Present, proposed and mixed sites, and their factors; of matrices also those of the last steps, with residuals.
    sites = outputs * (4 * 2 * num_pairs if by_samples else (4 + 2 * (DEPTH + 1)) * shape[-1])
    per_example = number_bytes * (outputs * num_pairs + sites)
    shrink = f"{estimate.shrink}; or use fewer samples, Variational(num_samples=...)"
    return estimate._replace(needed=estimate.needed + (model.data.length or 0) * per_example, shrink=shrink)


def _as_fitted(context: Context, best: Iterate, progress: list[Progress]) -> Fitted:
    """Put the bound in the place of the log likelihood: its value with gamma / 2, and its gradient in the mean."""
    model, terms = context.model, best.terms
    there, dtype = with_mean(model, best.settled.mean), number_type(model.network.params)
    num_targets = _num_targets(model.likelihood, best.settled.draws) / float(model.likelihood.temperature)
    in_place = LogLikelihood(
        np.float64(terms.expected + 0.5 * terms.effective),
        jnp.asarray(best.settled.gradient, dtype),
        np.float64(context.scale * num_targets),
        np.float64(0.0),
    ).check()
    precision = np.float64(best.prior.precision)
    bound = Bound(np.float64(terms.expected), np.float64(terms.sem), np.int64(len(progress)), precision)
    return Fitted(there.network, model.likelihood, best.prior, best.structure, in_place, bound)


def _num_targets(likelihood: Likelihood, draws: list[Draws]) -> float:
    """How many outputs count, at all positions of all examples. No pass over the data is needed for it."""
    weights = [np.asarray(likelihood.weights_of(each.targets, each.weights), np.float64) for each in draws]
    return sum(each.sum() * (of_batch.mean.size // each.size) for each, of_batch in zip(weights, draws, strict=True))
