"""Laplace: the front object. It assembles the stages and holds no algorithm."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace import prior as priors
from bnnlaplace.checkpoint import posterior as saved
from bnnlaplace.core.checks import check_key
from bnnlaplace.core.memory import MemoryEstimate
from bnnlaplace.core.tree import ravel, register_unchecked, unraveler
from bnnlaplace.core.tree import size as tree_size
from bnnlaplace.core.types import Estimate
from bnnlaplace.evidence import marginal as evidence
from bnnlaplace.evidence.log_joint import BestNoise, FixedNoise
from bnnlaplace.evidence.log_likelihood import DataTerms
from bnnlaplace.fitting import fit as fitting
from bnnlaplace.fitting import optimize_prior as choice
from bnnlaplace.fitting.mode import warn_unless_mode
from bnnlaplace.model import subset
from bnnlaplace.model.data import Inputs, as_data, check_inputs, checked_pairs
from bnnlaplace.model.likelihood import Likelihood, gaussian, resolve
from bnnlaplace.model.network import Network
from bnnlaplace.predictive import functional as posterior
from bnnlaplace.predictive import predictions as predictive
from bnnlaplace.predictive import validation
from bnnlaplace.structure import BY_NAME, KrylovError, KrylovStructure, SampleStructure, Structure


@register_unchecked(
    ("network", "likelihood", "prior_precision", "prior_mean", "structure", "fitted"),
    ("subset_of_weights", "hessian_structure", "prior_groups"),
)
@dataclass(frozen=True, init=False, repr=False)
class Laplace:
    """A Laplace approximation N(theta*, (G + P0)^-1) around the weights of a network, P0 the precision of the prior.

    Immutable: every method returns a new object. A pytree. With "diag", "kron" and "full" it can be an argument of
    jitted functions that call `predictive`, `functional_variance`, `sample` or `mode_gradient`. With "lanczos" it
    cannot where the small matrices of a decomposition are on the host: close over the object, or call it outside `jit`.
    Fitting, the evidence, the choice of the prior precision and saving are for outside `jit` with every structure;
    `bnnlaplace.evidence.log_marginal_likelihood` is the traceable evidence.

    Parameters
    ----------
    network
        From `Network.from_linen`, `from_nnx` or `from_function`, at the weights training found: a mode of the log joint
        with the prior whose evidence is to be computed (`mode_gradient` says how nearly). After `fit` its `params` are
        the weights that have a posterior.
    likelihood
        "classification", "regression", "binary", or a `Likelihood`.
    subset_of_weights
        Which weights get a posterior, the others being frozen and without a prior: "all"; "last_layer", which is found,
        see `bnnlaplace.subset`; or a function from the path of a weight, such as "Dense_0/kernel", to a bool.
    hessian_structure
        "lanczos": the whole GGN by block Krylov, matrix-free. "kron": Kronecker factors of each layer (KFAC), see
        `bnnlaplace.curvature.kronecker`. "diag": the exact diagonal. "full": dense, for small networks.
    prior_precision
        Of the Gaussian prior N(mu, P0^-1), P0 = diag(delta): one number; a dictionary with one for each group of
        weights; one for each weight, as a vector or a pytree like the weights with a posterior.
    prior_mean
        mu: one number, or a pytree like the weights.
    prior_groups
        From the path of a weight to the name of its group; by default each layer is one, "Dense_0" for instance.
    sigma_noise
        Standard deviation of the noise of "regression", one number or one for each output. As an attribute: the
        likelihood's, or None.

    Raises
    ------
    ValueError
        If a name is unknown, a number is not positive and finite, or `sigma_noise` is given to another likelihood.
    TypeError
        If `network` is a model that is not wrapped.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> key_x, key_fit = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(key_x, (30, 2))
    >>> y = (x.sum(axis=1) > 0).astype(int)
    >>> network = Network.from_function(lambda w, x: x @ w, jnp.array([[-1.0, 1.0], [-1.0, 1.0]]))
    >>> la = Laplace(network, hessian_structure="lanczos").fit((x, y), key=key_fit)
    >>> la = la.optimize_prior_precision()
    >>> la.predictive(x[:5], link_approx="mc", key=key_x).shape
    (5, 2)
    """

    network: Network
    likelihood: Likelihood
    subset_of_weights: subset.Subset
    hessian_structure: str
    prior_precision: priors.Precision
    prior_mean: PyTree
    prior_groups: priors.Groups
    structure: Structure | None
    fitted: DataTerms | None

    # By hand, as `sigma_noise` is an argument that ends up in the likelihood: a field would shadow the property.
    def __init__(
        self,
        network: Network,
        likelihood: Likelihood | str = "classification",
        subset_of_weights: subset.Subset = "all",
        hessian_structure: Literal["lanczos", "kron", "diag", "full"] = "lanczos",
        prior_precision: priors.Precision = 1.0,
        prior_mean: PyTree = 0.0,
        prior_groups: priors.Groups = priors.by_layer,
        structure: Structure | None = None,
        fitted: DataTerms | None = None,
        sigma_noise: float | Float[Array, "*C"] = 1.0,
    ) -> None:
        if not isinstance(network, Network):
            raise TypeError(
                f"Laplace(network=...) must be a bnnlaplace.Network; got {type(network).__name__}; wrap a Flax model "
                "by Network.from_linen(module, variables) or Network.from_nnx(model), a function by from_function"
            )
        if hessian_structure not in BY_NAME:
            raise ValueError(
                f"Laplace(hessian_structure=...) must be one of {sorted(BY_NAME)}; got {hessian_structure!r}"
            )
        subset.check(subset_of_weights)
        if priors.is_scalar(prior_precision):
            priors.check(prior_precision, "Laplace(prior_precision=...)")
        if not callable(prior_groups):
            raise ValueError(
                "Laplace(prior_groups=...) must be a function from the path of a weight to the name of its group; got "
                f"{prior_groups!r}"
            )
        values = {
            "network": network,
            "likelihood": resolve(likelihood, sigma_noise),
            "subset_of_weights": subset_of_weights,
            "hessian_structure": hessian_structure,
            "prior_precision": prior_precision,
            "prior_mean": prior_mean,
            "prior_groups": prior_groups,
            "structure": structure,
            "fitted": fitted,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if subset_of_weights == "all":  # otherwise the weights are known once there are data
            _ = self.prior

    def __repr__(self) -> str:
        state = "not fitted" if self.structure is None else f"fitted as {type(self.structure).__name__}"
        precision = self.prior_precision
        if not priors.is_scalar(precision):
            precision = f"{len(precision)} groups" if isinstance(precision, dict) else "one for each weight"
        return (
            f"Laplace({self.likelihood.name!r}, {self.hessian_structure!r}, {tree_size(self.network.params)} weights, "
            f"prior_precision={precision}, {state})"
        )

    @property
    def sigma_noise(self) -> Float[Array, "*C"] | None:
        """Standard deviation of a regression's noise, read from the likelihood; None where it has none."""
        return self.likelihood.sigma_noise

    @property
    def prior(self) -> priors.Prior:
        """The prior of the weights with a posterior, as an overall factor, relative precisions and a mean."""
        return priors.resolve(self.prior_precision, self.prior_mean, self.network.params, self.prior_groups)

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        data: tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]],
        *,
        key: Array | None = None,
        mean: Literal["network", "linear"] = "network",
        num_data: int | None = None,
        num_probes: int = 32,
        max_vectors: int = 512,
        tolerance: float = 0.05,
        target_precision: float | None = None,
        microbatch: int = 64,
        on_block: Callable[[KrylovStructure, KrylovError], None] | None = None,
    ) -> "Laplace":
        """Compute the curvature at the network's weights.

        Parameters
        ----------
        data
            (x, y), x an array or a pytree of them, without augmentation; or such batches, read a pass at a time, which
            an object that can be iterated over again gives: the data need not fit in memory. Kept nowhere afterwards.
        key
            Seeds the probes; needed for "lanczos" alone.
        mean
            "network": around its weights. "linear": the network is replaced by its linearisation there, and expanded at
            the mode of that one's log joint, which exists whatever training did; see `bnnlaplace.linear_mode`.
        num_data
            Where `data` is a random subset: the size of the whole training set. Log likelihood and curvature are
            multiplied by num_data / (examples in `data`).
        num_probes
            Lanczos: normal probes in a block, which is also the number of posterior samples.
        max_vectors
            Lanczos: the largest number of basis vectors, each of P numbers. Data with no more outputs than these are
            not decomposed by products: the curvature is exact then, from one gradient for each output.
        tolerance
            Lanczos: grow until the bound on the relative error of a posterior sample is below this.
        target_precision
            Lanczos: the prior precision at which it must be; default: the maximiser of the evidence.
        microbatch
            Examples linearised at a time; bounds memory.
        on_block
            Lanczos: called with (structure, `KrylovError`) after each block.

        Raises
        ------
        ValueError
            If data are empty, batches differ in structure or from pass to pass, they can be read once where more passes
            are needed, targets are out of range, outputs not (B, ..., C), inputs or weights not finite, the network is
            not deterministic, no weight is in the subset, the prior does not fit it, or `num_data` or `tolerance` are
            not positive.
        MemoryError
            If the curvature is larger than what the device has free; see `memory_estimate`.

        Notes
        -----
        Cost in GGN products of one vector over all data: "lanczos" at most `max_vectors`; "diag" and "kron" about C
        backward passes per example; "full" P^2 memory. Warns (`NotAModeWarning`) where the weights are far from a mode
        of the log joint.
        """
        if num_data is not None and not 0 < num_data < float("inf"):
            raise ValueError(f"fit(num_data=...) must be positive: the size of the training set; got {num_data}")
        if not tolerance > 0:
            raise ValueError(f"fit(tolerance=...) must be positive; got {tolerance}; try 0.05")
        if mean not in ("network", "linear"):
            raise ValueError(f"fit(mean=...) must be 'network' or 'linear'; got {mean!r}")
        model = self._model(data, linear=mean == "linear", microbatch=microbatch)
        found = fitting.fit(
            model,
            dataclasses.replace(self, network=model.network).prior,
            self.hessian_structure,
            mean=mean,
            num_data=num_data,
            microbatch=microbatch,
            key=key,
            num_probes=num_probes,
            max_vectors=max_vectors,
            tolerance=tolerance,
            target_precision=target_precision,
            on_block=on_block,
        )
        la = dataclasses.replace(self, network=found.network, structure=found.structure, fitted=found.terms)
        warn_unless_mode(la.structure, la.mode_decrement(), la.effective_parameters(), float(la.prior.precision))
        return la

    def memory_estimate(
        self,
        data: tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]],
        *,
        max_vectors: int = 512,
        microbatch: int = 64,
    ) -> MemoryEstimate:
        """What `fit` with the same arguments takes at its peak, beside the activations of a microbatch; it is not run.

        Of `data` the first batch is used, to find the shapes and the weights with a posterior. Features before those
        weights are counted for arrays; of batches they are kept too, in at most a quarter of the free memory.

        Parameters
        ----------
        data, max_vectors, microbatch
            As for `fit`; data that can be read once only are refused, as their first batch would be missing then.
        """
        found = as_data(data)
        found.check_repeatable("memory_estimate(data=...) must be readable again, as its first batch is used")
        model = self._model(found.few(), linear=False, microbatch=microbatch)
        return fitting.estimate(model, self.hessian_structure, max_vectors, microbatch)

    def _model(self, data: Any, *, linear: bool, microbatch: int) -> fitting.Model:
        return fitting.prepare(
            self.network, self.likelihood, as_data(data), self.subset_of_weights, linear=linear, microbatch=microbatch
        )

    # --- evidence and prior -----------------------------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: priors.Precision | None = None) -> Estimate:
        """The log evidence in nats at `prior_precision`, by default the object's own.

        `sem` is the standard error over the probes, 0 where the evidence is exact. What stopping the recurrence costs
        is no part of it: it lowers the mean by at most half of `krylov_error().log_determinant`.

        Parameters
        ----------
        prior_precision
            As `Laplace` takes it; for "lanczos" with the ratios that it was fitted at. Here and below.
        """
        la = self._at(prior_precision)
        la._usable_posterior()
        point = la.evidence_curve([float(la.prior.precision)]).log_marginal_likelihood
        return Estimate(float(point.mean[0]), float(point.sem[0]))

    def evidence_curve(self, precisions: Iterable[float] | None = None) -> evidence.EvidenceCurve:
        """The log evidence at many prior precisions, from the curvature already computed.

        Parameters
        ----------
        precisions
            Numbers; of a prior that is not isotropic geometric means over the weights, at the ratios that it has. By
            default 61 over six decades around the maximum, from the same decomposition.
        """
        structure, fitted = self._require_fit()
        if precisions is None:
            precisions = self.evidence_optimum().prior_precision * np.geomspace(1e-3, 1e3, 61)
        grid = priors.checked_grid(precisions, "evidence_curve(precisions=...)")
        squared = self.prior.squared_distance(self.network.params)
        return evidence.curve(structure.log_determinant, FixedNoise(float(fitted.log_likelihood)), squared, grid)

    def evidence_optimum(self) -> priors.PriorOptimum:
        """The prior precision that maximises the evidence, and an interval for its errors, probes and truncation.

        As for `evidence_curve` the geometric mean, where the prior is not isotropic.
        """
        structure, fitted = self._require_fit()
        return priors.optimum(
            structure.log_determinant,
            FixedNoise(float(fitted.log_likelihood)),
            self.prior.squared_distance(self.network.params),
            truncation=structure.truncation,
        )

    def optimize_prior_precision(
        self,
        method: Literal["marglik", "gridsearch"] = "marglik",
        *,
        prior_structure: Literal["scalar", "layerwise", "diag"] | None = None,
        optimize_sigma_noise: bool = False,
        refit: Callable[["Laplace"], "Laplace"] | None = None,
        max_refits: int = 10,
        validation: tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]] | None = None,
        precisions: Iterable[float] | None = None,
        key: Array | None = None,
        num_samples: int | None = None,
    ) -> "Laplace":
        """Choose the prior precision, by the evidence or by the NLL of the predictive on validation data.

        Parameters
        ----------
        method
            "marglik": maximise the evidence. Warns where the optimum is at an end of the search range. "gridsearch":
            try `precisions`, in one pass for all of them, and choose among those where "lanczos" has converged; of a
            prior that is not isotropic they are as for `evidence_curve`.
        prior_structure
            What "marglik" chooses: one precision for all weights ("scalar"), for each group of `prior_groups`
            ("layerwise"), for each weight ("diag"); None keeps the ratios of the precisions and chooses a common
            factor, for which no curvature is computed again.
        optimize_sigma_noise
            Of a regression: maximise over a common factor of the noise, too; no curvature is computed again for it.
        refit
            "lanczos" has to be fitted again where ratios change, from la to la.fit(data, key=...) for instance.
        max_refits
            The largest number of such fits; each is one step of MacKay's fixed point, from the last fit alone.
        validation, precisions, key, num_samples
            For "gridsearch": arrays (x, y) or batches of such pairs, which are read once; the rest is as for
            `validation_curve`, and `precisions` defaults to 25 values from 0.01 to 10,000.

        Raises
        ------
        ValueError
            If a name is unknown, an argument is missing or of the other method, or "kron" is asked for one precision
            for each weight.
        """
        self._require_fit()
        of_evidence = {"prior_structure": prior_structure, "optimize_sigma_noise": optimize_sigma_noise, "refit": refit}
        of_grid = {"validation": validation, "precisions": precisions, "key": key, "num_samples": num_samples}
        foreign = {"marglik": of_grid, "gridsearch": of_evidence}.get(method, {})
        if given := [name for name, value in foreign.items() if value is not None and value is not False]:
            raise ValueError(
                f"optimize_prior_precision({method!r}) must not be given {given[0]}=..., which is of the other method; "
                "leave it out"
            )
        if method == "marglik":
            options = {"optimize_sigma_noise": optimize_sigma_noise, "refit": refit, "max_refits": max_refits}
            return choice.by_evidence(self, prior_structure, **options)
        if method != "gridsearch":
            raise ValueError(f"optimize_prior_precision(method=...) must be 'marglik' or 'gridsearch'; got {method!r}")
        if validation is None:
            raise ValueError(
                "optimize_prior_precision('gridsearch') must be given validation=(x, y) or batches of such pairs"
            )
        grid = np.geomspace(1e-2, 1e4, 25) if precisions is None else precisions
        curve = self._validation_curve(validation, grid, key=key, num_samples=num_samples)
        factor = curve.best_precision / self.prior.precision
        return self.with_prior_precision(jax.tree.map(lambda value: value * factor, self.prior_precision))

    def validation_curve(
        self,
        x: Inputs,
        y: Array,
        precisions: Iterable[float],
        *,
        key: Array | None = None,
        num_samples: int | None = None,
        microbatch: int = 64,
    ) -> validation.ValidationCurve:
        """NLL and ECE of the predictive at many prior precisions; see `bnnlaplace.validation`.

        Parameters
        ----------
        x, y
            Validation data.
        precisions
            As for `evidence_curve`.
        key, num_samples
            Of the samples, the same at every prior precision; by default 32, or fewer where "lanczos" has fewer
            probes. A regression needs none, and no key.
        microbatch
            Inputs differentiated at a time; bounds memory.
        """
        return self._validation_curve((x, y), precisions, key=key, num_samples=num_samples, microbatch=microbatch)

    def with_prior_precision(self, prior_precision: priors.Precision) -> "Laplace":
        """The same posterior at another prior precision.

        Parameters
        ----------
        prior_precision
            As `Laplace` takes it.

        Raises
        ------
        ValueError
            If it does not fit the weights, or "lanczos" would have to be fitted again, as ratios of precisions differ.
        """
        new = dataclasses.replace(self, prior_precision=prior_precision)
        if self.structure is None:
            return new
        before, after = self.prior.relative, new.prior.relative
        if before is None and after is None:
            return new
        ratio = (1.0 if after is None else after) / (1.0 if before is None else before)
        return dataclasses.replace(new, structure=self.structure.whitened(ratio))

    def with_sigma_noise(self, sigma_noise: float | Float[Array, "*C"]) -> "Laplace":
        """The same posterior of a regression at another noise; no curvature is computed again.

        Parameters
        ----------
        sigma_noise
            One standard deviation or one for each output, all changed by the same factor.

        Raises
        ------
        ValueError
            If the likelihood has no noise, or the ratios between the outputs change: fit again for that.
        """
        _, fitted = self._require_fit()
        if self.sigma_noise is None:
            raise ValueError(f"with_sigma_noise must be asked of a regression; got {self.likelihood.name!r}")
        new = resolve("regression", sigma_noise)
        factors = np.atleast_1d(np.asarray(new.sigma_noise, np.float64) / np.asarray(self.sigma_noise)) ** 2
        if not np.allclose(factors, factors[0], rtol=1e-5):
            raise ValueError(
                f"with_sigma_noise(sigma_noise=...) must keep the ratios between outputs; got {sigma_noise} for "
                f"{self.sigma_noise}; construct Laplace(sigma_noise=...) and fit again"
            )
        factor = float(factors[0])
        noise = BestNoise.of(float(fitted.squared_residuals), float(fitted.num_outputs), self.sigma_noise)
        terms = fitted._replace(
            log_likelihood=jnp.asarray(noise.log_likelihood(factor), fitted.log_likelihood.dtype),
            log_likelihood_gradient=fitted.log_likelihood_gradient / factor,
            squared_residuals=fitted.squared_residuals / factor,
        )
        likelihood = gaussian(jnp.asarray(new.sigma_noise, self.sigma_noise.dtype))
        return dataclasses.replace(
            self, likelihood=likelihood, fitted=terms, structure=self.structure.scaled(1 / factor)
        )

    def mode_gradient(self, prior_precision: priors.Precision | None = None) -> Float[Array, " P"]:
        """Gradient of the log joint in the weights: zero at a mode of the model whose evidence is computed."""
        _, fitted = self._require_fit()
        la = dataclasses.replace(self, prior_precision=self._precision(prior_precision))
        return fitted.log_likelihood_gradient + la.prior.gradient(self.network.params)

    def mode_decrement(self, prior_precision: priors.Precision | None = None) -> float:
        """g' (G + P0)^-1 g with g = `mode_gradient`: the squared distance to the mode in posterior deviations.

        Twice what a Gauss-Newton step promises to gain, in nats. Unlike the norm of g it does not depend on how weights
        are scaled, and it sees directions that only the prior determines. Small against `effective_parameters`: the
        weights are near a mode. Exact for "diag" and "kron" (of their own posteriors) and "full"; for "lanczos" from
        above, as directions outside the basis count with the precision of the prior alone.
        """
        la = self._at(prior_precision)
        gradient = la.prior.whiten(la.mode_gradient())
        return la.structure.inverse_quadratic_form(np.asarray(gradient, np.float64), float(la.prior.precision))

    def effective_parameters(self, prior_precision: priors.Precision | None = None) -> float:
        """tr G (G + P0)^-1: the number of directions that the data determine rather than the prior."""
        la = self._at(prior_precision)
        groups = np.zeros(tree_size(la.network.params), int)
        return float(la.structure.effective_parameters(float(la.prior.precision), groups).mean())

    def krylov_error(self) -> KrylovError | None:
        """Bounds on what truncation costs at the object's prior precision; None for structures that have none."""
        structure, _ = self._require_fit()
        return structure.error(float(self.prior.precision)) if isinstance(structure, KrylovStructure) else None

    # --- posterior and predictions ----------------------------------------------------------------------------------

    def sample(self, key: Array, num_samples: int) -> PyTree:
        """Posterior samples of the weights, a pytree like `network.params` with a leading axis of `num_samples`.

        `network.full_params` puts one sample of a subset in its place among all weights.

        Parameters
        ----------
        key
            Of the noise; for "lanczos" of the choice among its samples and of their signs.
        num_samples
            For "lanczos" at most the number of probes.
        """
        usable = self._usable_posterior()
        check_key(key, "sample(key=...)")
        predictive.check_num_samples(num_samples, "sample(num_samples=...)", least=0)
        deviations = usable.deviations(key, num_samples, self.prior.precision)
        return jax.vmap(unraveler(self.network.params))(ravel(self.network.params) + deviations)

    def functional_posteriors(
        self, x: Array, precisions: Sequence[float], *, key: Array, num_samples: int, microbatch: int = 64
    ) -> Iterator[posterior.FunctionalPosterior]:
        """Mean, covariance and samples of the linearised outputs at each input, for each of several prior precisions.

        The network is differentiated once for all of them. Where variances are exact samples are drawn at each input
        from its covariance; for "lanczos" they are weight samples pushed through the Jacobian, at most one per
        probe, and the covariance is estimated from them. See `bnnlaplace.posterior.functional_posteriors`.

        Parameters
        ----------
        x
            Inputs (B, ...).
        precisions
            As for `evidence_curve`.
        key, num_samples
            Of the samples.
        microbatch
            Inputs differentiated at a time; bounds memory.
        """
        found = self._posterior()
        check_inputs(self.network, x)
        check_key(key, "functional_posteriors(key=...)")
        predictive.check_num_samples(num_samples, "functional_posteriors(num_samples=...)")
        grid = priors.checked_grid(precisions, "functional_posteriors(precisions=...)")
        return posterior.functional_posteriors(found, x, grid, key=key, num_samples=num_samples, microbatch=microbatch)

    def functional_variance(self, x: Array, *, microbatch: int = 64) -> Float[Array, "B ... C C"]:
        """Covariance J (G + P0)^-1 J' of the linearised outputs; for "lanczos" from all its samples.

        Parameters
        ----------
        x
            Inputs (B, ...).
        microbatch
            Inputs differentiated at a time; bounds memory.
        """
        usable = self._usable_posterior()
        check_inputs(self.network, x)
        return next(posterior.functional_variances(usable, x, [self.prior.precision], microbatch=microbatch))

    def predictive(
        self,
        x: Array,
        pred_type: Literal["glm", "nn"] = "glm",
        link_approx: Literal["probit", "mc", "bridge"] = "probit",
        *,
        with_noise: bool = False,
        key: Array | None = None,
        num_samples: int | None = None,
        microbatch: int = 64,
    ) -> Float[Array, "B ... C"] | tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
        """Predictions under the posterior.

        Parameters
        ----------
        x
            Inputs (B, ...).
        pred_type
            "glm": of the linearised network, whose posterior this is. "nn": of the network at samples of the weights,
            which may lie where the linearisation no longer holds.
        link_approx
            "probit": MacKay's approximation from marginal variances. "mc": the mean probability over samples. "bridge":
            the mean of a matching Dirichlet distribution, from the covariance of the outputs.
        with_noise
            For regression: add the variance of the noise to that of the outputs.
        key, num_samples
            For "mc" and "nn"; by default as many samples as "lanczos" has probes, otherwise 100.
        microbatch
            Inputs at a time; bounds memory.

        Returns
        -------
        Array or (Array, Array)
            Class probabilities (B, ..., C); for regression (mean, variance), (B, ..., C) each. For no inputs no rows.

        Raises
        ------
        ValueError
            If inputs are not finite, a name is unknown, "mc" lacks a key, or more samples are asked for than there are.
        """
        usable = self._usable_posterior()
        check_inputs(self.network, x)
        return predictive.predictions(
            usable,
            self.likelihood,
            x,
            self.prior.precision,
            pred_type=pred_type,
            link_approx=link_approx,
            with_noise=with_noise,
            key=key,
            num_samples=num_samples,
            microbatch=microbatch,
        )

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write everything but the user's module, atomically and with a SHA-256 manifest.

        Parameters
        ----------
        path
            The directory to create; a checkpoint there is replaced.
        """
        self._require_fit()
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del parts["subset_of_weights"]  # the network is that of the subset
        saved.save(Path(path), **parts)

    @classmethod
    def load(cls, path: Path | str, network: Network, likelihood: Likelihood | None = None) -> "Laplace":
        """Read what `save` wrote.

        Parameters
        ----------
        path
            The directory.
        network
            One of the same structure, whose weights are replaced by the saved ones. Where only some weights have a
            posterior, that of all of them, as it was given to `Laplace`.
        likelihood
            One of one's own must be passed again; its leaves are replaced by the saved ones.

        Raises
        ------
        bnnlaplace.checkpoint.CheckpointError
            If a file is damaged, or the network has another structure: the message names the file or the leaf.
        """
        if not isinstance(network, Network):
            raise TypeError(f"load(network=...) must be a bnnlaplace.Network; got {type(network).__name__}")
        return cls(**saved.load(Path(path), network, likelihood))

    # --- internals --------------------------------------------------------------------------------------------------

    def _validation_curve(
        self,
        data: tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]],
        precisions: Iterable[float],
        *,
        key: Array | None,
        num_samples: int | None,
        microbatch: int = 64,
    ) -> validation.ValidationCurve:
        found = self._posterior()
        if validation.needs_samples(self.likelihood):
            check_key(key, "validation_curve(key=...)")
        if num_samples is None:
            num_samples = min(32, found.structure.num_probes) if isinstance(found.structure, SampleStructure) else 32
        predictive.check_num_samples(num_samples, "validation_curve(num_samples=...)")
        pairs = checked_pairs(self.network, data)
        options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
        return validation.validation_curve(found, self.likelihood, pairs, precisions, **options)

    def _posterior(self) -> posterior.Posterior:
        structure, _ = self._require_fit()
        return posterior.Posterior(self.network, structure, self.prior.relative)

    def _usable_posterior(self) -> posterior.Posterior:
        """The posterior, after a warning where it has not converged at the prior precision it is to be used at."""
        found = self._posterior()
        if isinstance(found.structure, SampleStructure):
            reservation = found.structure.reservation(float(self.prior.precision))
            if reservation is not None:
                warnings.warn(
                    f"{reservation}; fit again with target_precision= that or more max_vectors, or use "
                    "optimize_prior_precision()",
                    stacklevel=3,
                )
        return found

    def _require_fit(self) -> tuple[Structure, DataTerms]:
        if self.structure is None:
            raise ValueError("this Laplace has no curvature yet; call la = la.fit((x, y), ...) first")
        if isinstance(self.structure, KrylovStructure):
            leaves = jax.tree.leaves((self.structure, self.prior_precision))
            if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                raise TypeError(
                    "a Laplace with hessian_structure='lanczos' must not be traced, nor its prior precision, as its "
                    "small matrices are on the host; got an argument of jit, vmap or grad; close over the object "
                    "(jax.jit(lambda x: la.predictive(x))), or call it outside"
                )
        return self.structure, self.fitted

    def _precision(self, prior_precision: priors.Precision | None) -> priors.Precision:
        """The one given, checked, or the object's own."""
        if prior_precision is None:
            return self.prior_precision
        if priors.is_scalar(prior_precision):
            priors.check(prior_precision, "prior_precision=...")
        return prior_precision

    def _at(self, prior_precision: priors.Precision | None) -> "Laplace":
        """At the one given, checked, or itself."""
        self._require_fit()
        return self if prior_precision is None else self.with_prior_precision(self._precision(prior_precision))
