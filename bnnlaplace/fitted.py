"""The records behind `Laplace`: its settings, the model before data, and the fitted posterior that answers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import ravel, register_unchecked, size, unraveler
from bnnlaplace.core.types import Estimate, Inputs
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.evidence.lower_bound import Bound
from bnnlaplace.evidence.marginal import EvidenceCurve, curve, estimate_of_forms
from bnnlaplace.model.batched import at_features
from bnnlaplace.model.likelihood import Likelihood, with_noise
from bnnlaplace.model.likelihood import resolve as resolve_likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.sample import Sample
from bnnlaplace.model.subset import Subset
from bnnlaplace.model.subset import check as check_subset
from bnnlaplace.model.weights import like_weights
from bnnlaplace.prior.gaussian import Groups, Precision, Prior, is_scalar, resolve, with_posterior
from bnnlaplace.prior.scalar import PriorOptimum, checked_grid, optimum, range_above
from bnnlaplace.structure import (
    BY_NAME,
    AdditiveStructure,
    KrylovError,
    KrylovStructure,
    SampleStructure,
    Structure,
)
from bnnlaplace.structure.finite import check_in_range


@register_unchecked(("prior_precision", "prior_mean"), ("subset_of_weights", "hessian_structure", "prior_groups"))
@dataclass(frozen=True)
class Settings:
    """The options of `Laplace` other than the network and the likelihood.

    Attributes
    ----------
    subset_of_weights
        Which weights get a posterior.
    hessian_structure
        The structure that is fitted to the curvature.
    prior_precision, prior_mean
        The prior as the user states it; `prior` resolves its numbers.
    prior_groups
        From the path of a weight to the name of its group.
    """

    subset_of_weights: Subset
    hessian_structure: str
    prior_precision: Precision
    prior_mean: PyTree
    prior_groups: Groups

    @classmethod
    def checked(
        cls,
        subset_of_weights: Subset,
        hessian_structure: str,
        prior_precision: Precision,
        prior_mean: PyTree,
        prior_groups: Groups,
    ) -> "Settings":
        """Settings from a user, with each field checked as far as that is possible before data are known."""
        checks.choice(hessian_structure, "Laplace(hessian_structure=...)", sorted(BY_NAME))
        check_subset(subset_of_weights)
        if not callable(prior_groups):
            raise ValueError(
                "Laplace(prior_groups=...) must be a function from the path of a weight to the name of its group; got "
                f"{prior_groups!r}"
            )
        return cls(subset_of_weights, hessian_structure, prior_precision, prior_mean, prior_groups)

    def at(self, prior_precision: Precision) -> "Settings":
        """The same settings at another prior precision."""
        return replace(self, prior_precision=prior_precision)

    def described_precision(self) -> str:
        """The prior precision in a few words."""
        precision = self.prior_precision
        if is_scalar(precision):
            return str(precision)
        return f"{len(precision)} groups" if isinstance(precision, dict) else "one for each weight"

    def prior(self, network: Network) -> Prior:
        """The prior of a network's weights, with its numbers resolved."""
        return resolve(self.prior_precision, self.prior_mean, network.params, self.prior_groups)


class Unfitted(NamedTuple):
    """A network and a likelihood before they have seen data.

    Attributes
    ----------
    network, likelihood
        As the user gave them.
    prior
        The prior of all weights. None if only some weights get a posterior, because data tell which.
    """

    network: Network
    likelihood: Likelihood
    prior: Prior | None

    @classmethod
    def of(cls, network: Network, likelihood: Likelihood, settings: Settings) -> "Unfitted":
        """Check the network, and resolve the prior if that is possible before data are known: faults show early."""
        if not isinstance(network, Network):
            raise TypeError(
                f"Laplace(network=...) must be a bnnlaplace.Network; got {type(network).__name__}; wrap a Flax model "
                "by Network.from_linen(module, variables) or Network.from_nnx(model), a function by from_function"
            )
        if is_scalar(settings.prior_precision):
            checks.positive(settings.prior_precision, "Laplace(prior_precision=...)")
        return cls(network, likelihood, settings.prior(network) if settings.subset_of_weights == "all" else None)


class Fitted(NamedTuple):
    """The Laplace posterior N(theta*, D^-1/2 (G + tau I)^-1 D^-1/2), and what its evidence needs.

    Everything that a fitted `Laplace` answers is answered from these fields. The prior is resolved once, when it
    is given: no method reads it again from what the user wrote.

    Attributes
    ----------
    network
        The network at theta*, as a function of the weights with a posterior.
    likelihood
        p(y | f).
    prior
        N(mu, (tau D)^-1), or the posterior of earlier data.
    structure
        The curvature G of all data so far, in the weights times sqrt(D). In those coordinates a prior without a
        curvature is isotropic, so one structure serves every tau.
    log_likelihood
        The log likelihood of the data at theta*, and its gradient. For a variational posterior with mean m: its average
        plus half of the effective parameters, and the average of its gradient; see `bnnlaplace.variational.fit`.
    bound
        For a variational posterior; None for a Laplace approximation.
    sample
        A few training examples.
    """

    network: Network
    likelihood: Likelihood
    prior: Prior
    structure: Structure
    log_likelihood: LogLikelihood
    bound: Bound | None = None
    sample: Sample = Sample()

    # --- the same curvature at another prior or noise ---------------------------------------------------------------

    def at(self, prior: Prior) -> "Fitted":
        """The same curvature under another prior with the same mean. No curvature is computed again.

        Raises
        ------
        ValueError
            If the ratios of the precisions change and the structure would have to be fitted again for that.
        """
        self.check_concrete(prior).check_prior_is_stated("a prior precision")
        if _has_same_ratios(prior, self.prior):  # a structure may remember what it has factorised
            return self._replace(prior=prior)
        structure = self.structure.whitened(prior.relative / self.prior.relative)
        bound = None if self.bound is None else self.bound._replace(precision=np.float64(np.nan))
        return self._replace(prior=prior, structure=check_in_range(structure), bound=bound)

    def with_sigma_noise(self, sigma_noise: float | Float[ArrayLike, "*C"]) -> "Fitted":
        """The same posterior of a regression at another noise. No curvature is computed again.

        Raises
        ------
        ValueError
            If the likelihood has no noise, or the ratios of the noise between outputs change.
        """
        checks.known("with_sigma_noise", self, sigma_noise)
        self.check_prior_is_stated("another noise")
        before = self.likelihood.sigma_noise
        if before is None:
            raise ValueError(f"with_sigma_noise must be asked of a regression; got {self.likelihood.name!r}")
        after = resolve_likelihood("regression", sigma_noise).sigma_noise
        factors = np.atleast_1d(np.asarray(after, np.float64) / np.asarray(before)) ** 2
        if not np.allclose(factors, factors[0], rtol=1e-5):
            raise ValueError(
                f"with_sigma_noise(sigma_noise=...) must keep the ratios between outputs; got {sigma_noise} for "
                f"{before}; construct Laplace(sigma_noise=...) and fit again"
            )
        factor = float(factors[0])
        return self._replace(
            likelihood=with_noise(self.likelihood, jnp.asarray(after, before.dtype)),
            structure=check_in_range(
                self.structure.scaled(1 / factor)
            ),  # G is proportional to the inverse of the noise variance
            log_likelihood=self.log_likelihood.with_noise_variance(factor, before),
        )

    # --- evidence ---------------------------------------------------------------------------------------------------

    @property
    def squared_distance(self) -> float:
        """(theta* - mu)' D (theta* - mu)."""
        return self.prior.squared_distance(self.network.params)

    def log_joint(self, *, best_noise: bool = False) -> LogJoint:
        """The evidence without its log-determinant, with the noise as it is or at its best."""
        self.check_known("the evidence")
        if best_noise:
            return self.log_likelihood.log_joint_at_best_noise(self.likelihood.sigma_noise)
        return LogJoint(float(self.log_likelihood.value))

    def log_marginal_likelihood(self) -> Estimate:
        """The log evidence at the prior; if that is a posterior of earlier data, given those.

        Of a variational posterior it is the evidence lower bound. At another prior than that of the fit that is
        extrapolated, with the mean and the averaged curvature as they are: the expected log likelihood is taken for
        linear in the covariance. There it may be above the evidence.
        """
        self.check_known("the evidence")
        others = self.log_joint()(self.prior.quadratic_form(self.network.params))
        # G holds the curvature of earlier data, too. What it adds to the precision of the prior counts.
        forms = self.structure.log_determinant(float(self.prior.precision)) - self.prior.log_determinant()
        estimate = estimate_of_forms(others, forms)
        return estimate if self.bound is None else self.bound.of(estimate, float(self.prior.precision))

    def evidence_curve(self, precisions: Iterable[float] | None) -> EvidenceCurve:
        """The log evidence at each tau, with D as it is; by default at 61 over six decades around the maximum."""
        self.check_prior_is_stated("the evidence at other prior precisions")
        if precisions is None:
            best = self.evidence_optimum().prior_precision
            precisions = np.geomspace(max(1e-3 * best, self.structure.resolution()), 1e3 * best, 61)
        grid = checked_grid(precisions, "evidence_curve(precisions=...)")
        self._warn_of_rounding(grid.min())
        found = curve(self.structure.log_determinant, self.log_joint(), self.squared_distance, grid)
        if self.bound is None:
            return found
        return found._replace(log_marginal_likelihood=self.bound.extrapolated(found.log_marginal_likelihood))

    def evidence_optimum(self) -> PriorOptimum:
        """The tau that maximises the evidence, and an interval for the errors of probes and truncation."""
        self.check_known("the evidence")
        self.check_prior_is_stated("the best prior precision")
        structure = self.structure
        return optimum(
            structure.log_determinant,
            self.log_joint(),
            self.squared_distance,
            truncation=structure.truncation,
            search_range=range_above(structure.resolution()),
        )

    def effective_parameters(self) -> float:
        """tr G (G + tau I)^-1, averaged over the probes."""
        self.check_known("the effective number of parameters")
        groups = np.zeros(size(self.network.params), int)
        return float(self.structure.effective_parameters(float(self.prior.precision), groups).mean())

    # --- the mode ---------------------------------------------------------------------------------------------------

    def with_stated(self, prior: Prior) -> "Fitted":
        """The record with another prior and the curvature as it is, for what the prior alone changes."""
        return self.check_prior_is_stated("another prior precision")._replace(prior=prior)

    def mode_gradient(self) -> Float[Array, " P"]:
        """Gradient of the log joint in the weights."""
        return self.log_likelihood.gradient + self.prior.gradient(self.network.params)

    def mode_decrement(self) -> float:
        """g' (G + P0)^-1 g with the gradient g of the log joint."""
        self.check_known("the mode decrement")
        gradient = np.asarray(self.prior.whiten(self.mode_gradient()), np.float64)
        return self.structure.inverse_quadratic_form(gradient, float(self.prior.precision))

    # --- the posterior ----------------------------------------------------------------------------------------------

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """log N(theta; theta*, P^-1) at other weights, which may be traced; P = sqrt(D) (G + tau I) sqrt(D)."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            raise TypeError(
                "log_density must be asked of a Laplace that is not traced, as its constant is computed in float64 on "
                "the host; got an argument of jit, vmap or grad; close over the Laplace, and trace the weights alone"
            )
        if not isinstance(self.structure, AdditiveStructure):
            raise ValueError(
                "log_density must be asked of 'diag', 'kron' or 'full'; got 'lanczos', which knows the curvature only "
                "in its basis; fit with another hessian_structure"
            )
        centre, precision = self.network.params, float(self.prior.precision)
        posterior = Prior(precision, self.prior.relative, ravel(centre), self.structure)
        options = {"finite": True, "like": "la.network.params"}
        weights = like_weights(with_posterior(params, centre), centre, "log_density(params=...)", **options)
        with jax.ensure_compile_time_eval():  # the weights may be traced, the posterior is not
            relative = np.broadcast_to(np.asarray(self.prior.relative, np.float64), (size(centre),))
            log_determinant = posterior.log_determinant().item() + np.log(precision * relative).sum()
        constant = 0.5 * (log_determinant - size(centre) * np.log(2 * np.pi))
        deviation = ravel(weights) - posterior.mean
        return constant + 0.5 * matmul(deviation, posterior.gradient(weights))

    def deviations(self, key: Array, num_samples: int) -> Float[Array, "S P"]:
        """Samples of theta - theta*. A `SampleStructure` gives at most as many as it has."""
        return self.prior.whiten(self.structure.samples(key, num_samples, self.prior.precision))

    def samples(self, key: Array, num_samples: int) -> PyTree[Float[Array, "S ..."]]:
        """Samples of the weights, like `network.params` with a leading axis."""
        checks.key(key, "sample(key=...)")
        num_samples = checks.count(num_samples, "sample(num_samples=...)", least=0, advice="try 32")
        flat = ravel(self.network.params) + self.deviations(key, num_samples)
        return jax.vmap(unraveler(self.network.params))(flat)

    def at_features(self, inputs: Inputs, *, microbatch: int) -> tuple["Fitted", Inputs]:
        """Replace the network by what follows its features, and the inputs by those; see `batched.at_features`."""
        network, features = at_features(self.network, inputs, microbatch=microbatch)
        return self._replace(network=network), features

    # --- what can go wrong ------------------------------------------------------------------------------------------

    def krylov_error(self) -> KrylovError | None:
        """Bounds on what truncation costs at the prior; None for a structure that truncates nothing."""
        is_truncated = isinstance(self.structure, KrylovStructure)
        return self.structure.error(float(self.prior.precision)) if is_truncated else None

    def warn_unless_converged(self) -> "Fitted":
        """Warn if the structure has not converged at the prior at which it is about to be used; return the record.

        Also warn if the prior precision is below the rounding of the curvature.
        """
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.structure, self.prior))):
            return self
        precision = float(self.prior.precision)
        if isinstance(self.structure, SampleStructure):
            reservation = self.structure.reservation(precision)
            if reservation is not None:
                # A variational fit grows its decomposition at the prior precision as it is.
                remedy = "target_precision= that or more max_vectors, or use optimize_prior_precision()"
                checks.warn(f"{reservation}; fit again with {remedy if self.bound is None else 'more max_vectors'}")
        self._warn_of_rounding(precision)
        return self

    def _warn_of_rounding(self, precision: float) -> None:
        """Warn of a prior precision below the rounding of the curvature."""
        resolution = self.structure.resolution()
        if precision < resolution:
            checks.warn(
                f"the prior precision {precision:.3g} is below {resolution:.3g}, the rounding of the curvature: "
                "curvature between the two cannot be told from zero and may be left out; use a larger prior precision, "
                "standardise the inputs, or compute in float64"
            )

    def check_prior_is_stated(self, what: str) -> "Fitted":
        """Return the record, or raise ValueError if the prior is a posterior of earlier data: `what` has no meaning."""
        if self.prior.curvature is not None:
            raise ValueError(
                f"{what} must be asked of the first task; got a Laplace fitted with prior=..., whose prior is the "
                "posterior of earlier data: these are gone, and their weights and curvature belong to the prior and "
                "noise of then; choose both in the first task"
            )
        return self

    def check_known(self, what: str) -> None:
        """Raise TypeError if a number of the posterior or its prior is traced: `what` is computed on the host."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            raise TypeError(
                f"{what} of a Laplace must be asked for outside of jit, grad and vmap, as it is computed in float64 on "
                "the host; got a traced prior precision, noise or posterior; for derivatives use "
                "bnnlaplace.evidence.log_marginal_likelihood, or bnnlaplace.evidence.isotropic"
            )

    def check_concrete(self, prior: Prior | None = None) -> "Fitted":
        """Return the record, or raise TypeError if a Krylov structure or its prior is traced by JAX."""
        if isinstance(self.structure, KrylovStructure):
            leaves = jax.tree.leaves((self.structure, self.prior, prior))
            if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                raise TypeError(
                    "a Laplace with hessian_structure='lanczos' must not be traced, nor its prior precision, as its "
                    "small matrices are on the host; got an argument of jit, vmap or grad; close over the object "
                    "(jax.jit(lambda x: la.predictive(x))), or call it outside"
                )
        return self


def _has_same_ratios(prior: Prior, other: Prior) -> bool:
    """Whether D is known to be the same up to rounding. Ratios that are traced count as others."""
    if prior.relative is other.relative or (prior.is_isotropic and other.is_isotropic):
        return True
    if any(isinstance(ratios, jax.core.Tracer) for ratios in (prior.relative, other.relative)):
        return False
    if prior.is_isotropic != other.is_isotropic:
        return False
    eps = float(np.finfo(np.asarray(prior.relative).dtype).eps)
    return np.allclose(prior.relative, other.relative, rtol=8 * eps, atol=0)
