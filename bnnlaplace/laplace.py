"""Laplace: the front object. It assembles the stages and holds no algorithm."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace import evidence, predictive, prior, saved, subset, validation
from bnnlaplace.data import as_arrays, check_fits_model, check_inputs
from bnnlaplace.deterministic import check_deterministic
from bnnlaplace.features import precompute
from bnnlaplace.likelihood import Likelihood, resolve
from bnnlaplace.network import Network
from bnnlaplace.structure import BY_NAME, KrylovError, KrylovStructure, SampleStructure, Structure
from bnnlaplace.structure.fit import fit_dense, fit_diagonal, fit_krylov
from bnnlaplace.tree import ravel, register_unchecked, squared_norm, unraveler
from bnnlaplace.types import Estimate


@register_unchecked(
    ("network", "likelihood", "prior_precision", "structure", "fitted"), ("subset_of_weights", "hessian_structure")
)
@dataclass(frozen=True, init=False)
class Laplace:
    """A Laplace approximation N(theta*, (G + delta I)^-1) around the weights of a network.

    Immutable: every method returns a new object. A pytree. With "diag" and "full" it can be an argument of jitted
    functions that call `predictive`, `functional_variance`, `sample` or `mode_gradient`. With "lanczos" it cannot, as
    the small matrices of the decomposition are on the host: close over the object, or call it outside `jit`. Fitting,
    the evidence, the choice of the prior precision and saving are for outside `jit` with every structure;
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
        "lanczos": the whole GGN by block Krylov, matrix-free. "diag": its exact diagonal. "full": dense, for small
        networks.
    prior_precision
        delta of the isotropic prior N(0, 1/delta): one number.
    sigma_noise
        Standard deviation of the noise of "regression", one number or one for each output. As an attribute: the
        likelihood's, or None.

    Raises
    ------
    ValueError
        If a name is unknown, a number is not positive and finite, or `sigma_noise` is given to another likelihood.

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
    hessian_structure: Literal["lanczos", "diag", "full"]
    prior_precision: float | Float[Array, ""]
    structure: Structure | None
    fitted: evidence.DataTerms | None

    # By hand, as `sigma_noise` is an argument that ends up in the likelihood: a field would shadow the property.
    def __init__(
        self,
        network: Network,
        likelihood: Likelihood | str = "classification",
        subset_of_weights: subset.Subset = "all",
        hessian_structure: Literal["lanczos", "diag", "full"] = "lanczos",
        prior_precision: float | Float[Array, ""] = 1.0,
        structure: Structure | None = None,
        fitted: evidence.DataTerms | None = None,
        sigma_noise: float | Float[Array, "*C"] = 1.0,
    ) -> None:
        if hessian_structure not in BY_NAME:
            raise ValueError(
                f"Laplace(hessian_structure=...) must be one of {sorted(BY_NAME)}; got {hessian_structure!r}"
            )
        subset.check(subset_of_weights)
        prior.check(prior_precision, "Laplace(prior_precision=...)")
        likelihood = resolve(likelihood, sigma_noise)
        values = (network, likelihood, subset_of_weights, hessian_structure, prior_precision, structure, fitted)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def sigma_noise(self) -> Float[Array, "*C"] | None:
        """Standard deviation of a regression's noise, read from the likelihood; None where it has none."""
        return self.likelihood.sigma_noise

    # --- fitting ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        data: tuple[Array, Array] | Iterable[tuple[Array, Array]],
        *,
        key: Array | None = None,
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
            (x, y) arrays, or an iterable of (x, y) batches, without augmentation. Kept nowhere afterwards.
        key
            Seeds the probes; needed for "lanczos" alone.
        num_data
            Where `data` is a random subset: the size of the whole training set. Log likelihood and curvature are
            multiplied by num_data / len(x).
        num_probes
            Lanczos: normal probes in a block, which is also the number of posterior samples.
        max_vectors
            Lanczos: the largest number of basis vectors, each of P numbers.
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
            If data are empty, targets out of range, outputs not (B, ..., C), inputs or weights not finite, the network
            is not deterministic, no weight is in the subset, or `num_data` or `tolerance` are not positive.

        Notes
        -----
        Cost in GGN products of one vector over all data: "lanczos" at most `max_vectors`; "diag" about C backward
        passes per example; "full" P^2 memory.
        """
        if num_data is not None and not 0 < num_data < float("inf"):
            raise ValueError(f"fit(num_data=...) must be positive: the size of the training set; got {num_data}")
        if not tolerance > 0:
            raise ValueError(f"fit(tolerance=...) must be positive; got {tolerance}; try 0.05")
        x, y = as_arrays(data)
        check_deterministic(self.network, x)
        check_fits_model(self.network, self.likelihood, x, y)
        network = subset.select(self.network, self.subset_of_weights, x)
        # Where the posterior is over all weights nothing precedes them.
        head, x = (network, x) if network is self.network else precompute(network, x, microbatch=microbatch)
        scale = 1.0 if num_data is None else num_data / len(x)
        fitted = evidence.data_terms(head, self.likelihood, x, y, scale=scale, microbatch=microbatch)
        if self.hessian_structure == "diag":
            structure = fit_diagonal(head, self.likelihood, x, scale, microbatch=microbatch)
        elif self.hessian_structure == "full":
            structure = fit_dense(head, self.likelihood, x, scale)
        else:
            if key is None:
                raise ValueError("fit(key=...) must seed the probes of 'lanczos'; got None; pass jax.random.key(0)")
            structure = fit_krylov(
                head,
                self.likelihood,
                x,
                scale,
                key=key,
                log_likelihood=float(fitted.log_likelihood),
                squared_norm=squared_norm(network.params),
                num_probes=num_probes,
                max_vectors=max_vectors,
                tolerance=tolerance,
                target_precision=target_precision,
                microbatch=microbatch,
                on_block=on_block,
            )
        return dataclasses.replace(self, network=network, structure=structure, fitted=fitted)

    # --- evidence and prior -----------------------------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> Estimate:
        """The log evidence in nats at `prior_precision`, by default the object's own.

        `sem` is the standard error over the probes, 0 where the evidence is exact. What stopping the recurrence costs
        is no part of it: it lowers the mean by at most half of `krylov_error().log_determinant`.
        """
        self._usable_structure(prior_precision)
        point = self.evidence_curve([float(self._precision(prior_precision))]).log_marginal_likelihood
        return Estimate(float(point.mean[0]), float(point.sem[0]))

    def evidence_curve(self, precisions: Iterable[float]) -> evidence.EvidenceCurve:
        """The log evidence at many prior precisions, from the curvature already computed."""
        structure, fitted = self._require_fit()
        grid = prior.checked_grid(list(precisions), "evidence_curve(precisions=...)")
        return evidence.curve(
            structure.log_determinant, float(fitted.log_likelihood), squared_norm(self.network.params), grid
        )

    def evidence_optimum(self) -> prior.PriorOptimum:
        """The prior precision that maximises the evidence, and an interval for its errors, probes and truncation."""
        structure, fitted = self._require_fit()
        return prior.optimum(
            structure.log_determinant,
            float(fitted.log_likelihood),
            squared_norm(self.network.params),
            truncation=structure.truncation,
        )

    def optimize_prior_precision(
        self,
        method: Literal["marglik", "gridsearch"] = "marglik",
        *,
        validation: tuple[Array, Array] | None = None,
        precisions: Iterable[float] | None = None,
        key: Array | None = None,
        num_samples: int = 32,
    ) -> "Laplace":
        """Choose the prior precision, by the evidence or by the NLL of the Monte Carlo predictive on validation data.

        Parameters
        ----------
        method
            "marglik": maximise the evidence; no curvature is computed again. Warns where the optimum is at an end of
            the search range. "gridsearch": try `precisions`, and choose among those where "lanczos" has converged.
        validation, precisions, key, num_samples
            For "gridsearch", which serves likelihoods of class labels; `precisions` defaults to 25 values from 0.01 to
            10,000.

        Raises
        ------
        ValueError
            If the method is unknown, or "gridsearch" lacks an argument or has another likelihood.
        """
        if method == "marglik":
            optimum = self.evidence_optimum()
            if optimum.at_bound:
                warnings.warn(
                    f"the evidence still rises at the end of its search range, prior precision "
                    f"{optimum.prior_precision:.3g}: the optimum is not inside it; look for weights that are zero",
                    stacklevel=2,
                )
            return self.with_prior_precision(optimum.prior_precision)
        if method != "gridsearch":
            raise ValueError(f"optimize_prior_precision(method=...) must be 'marglik' or 'gridsearch'; got {method!r}")
        if validation is None or key is None:
            raise ValueError("optimize_prior_precision('gridsearch') must be given validation=(x, y) and key=...")
        grid = np.geomspace(1e-2, 1e4, 25) if precisions is None else precisions
        curve = self.validation_curve(*validation, grid, key=key, num_samples=num_samples)
        return self.with_prior_precision(curve.best_precision)

    def validation_curve(
        self, x: Array, y: Array, precisions: Iterable[float], *, key: Array, num_samples: int, microbatch: int = 64
    ) -> validation.ValidationCurve:
        """NLL and ECE of the Monte Carlo predictive at many prior precisions; see `bnnlaplace.validation`."""
        structure, _ = self._require_fit()
        check_inputs(x)
        options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
        return validation.validation_curve(self.network, self.likelihood, structure, x, y, precisions, **options)

    def with_prior_precision(self, prior_precision: float) -> "Laplace":
        """The same posterior at another prior precision."""
        return dataclasses.replace(self, prior_precision=prior_precision)

    def mode_gradient(self, prior_precision: float | None = None) -> Float[Array, " P"]:
        """Gradient of the log joint in the weights: zero at a mode of the model whose evidence is computed."""
        _, fitted = self._require_fit()
        return fitted.log_likelihood_gradient - self._precision(prior_precision) * ravel(self.network.params)

    def mode_decrement(self, prior_precision: float | None = None) -> float:
        """g' (G + delta I)^-1 g with g = `mode_gradient`: the squared distance to the mode in posterior deviations.

        Twice what a Gauss-Newton step promises to gain, in nats. Unlike the norm of g it does not depend on how weights
        are scaled, and it sees directions that only the prior determines. Small against the effective number of
        parameters: the weights are near a mode. Exact for "diag" (of its own posterior) and "full"; for "lanczos" from
        above, as directions outside the basis count with the precision of the prior alone.
        """
        structure, _ = self._require_fit()
        delta = float(self._precision(prior_precision))
        return structure.inverse_quadratic_form(np.asarray(self.mode_gradient(delta), np.float64), delta)

    def krylov_error(self) -> KrylovError | None:
        """Bounds on what truncation costs at the object's prior precision; None for structures that have none."""
        structure, _ = self._require_fit()
        return structure.error(float(self.prior_precision)) if isinstance(structure, KrylovStructure) else None

    # --- posterior and predictions ----------------------------------------------------------------------------------

    def sample(self, key: Array, num_samples: int) -> PyTree:
        """Posterior samples of the weights, a pytree like `network.params` with a leading axis of `num_samples`.

        `network.full_params` puts one sample of a subset in its place among all weights.
        Lanczos gives at most one sample per probe, and draws among those.
        """
        structure = self._usable_structure()
        deviations = structure.samples(key, num_samples, self.prior_precision)
        return jax.vmap(unraveler(self.network.params))(ravel(self.network.params) + deviations)

    def functional_posteriors(
        self, x: Array, precisions: Sequence[float], *, key: Array, num_samples: int, microbatch: int = 64
    ) -> Iterator[predictive.FunctionalPosterior]:
        """Mean, covariance and samples of the linearised outputs at each input, for each of several prior precisions.

        The network is differentiated once for all of them. For "diag" and "full" the samples are drawn at each input
        from its exact covariance; for "lanczos" they are weight samples pushed through the Jacobian, at most one per
        probe, and the covariance is estimated from them. See `bnnlaplace.predictive.functional_posteriors`.
        """
        structure, _ = self._require_fit()
        check_inputs(x)
        return predictive.functional_posteriors(
            self.network, structure, x, precisions, key=key, num_samples=num_samples, microbatch=microbatch
        )

    def functional_variance(self, x: Array, *, microbatch: int = 64) -> Float[Array, "B ... C C"]:
        """Covariance J (G + delta I)^-1 J' of the linearised outputs; for "lanczos" from all its samples."""
        structure = self._usable_structure()
        check_inputs(x)
        return predictive.functional_variance(self.network, structure, x, self.prior_precision, microbatch=microbatch)

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

        Returns
        -------
        Class probabilities (B, ..., C); for regression (mean, variance), (B, ..., C) each. For no inputs no rows.

        Raises
        ------
        ValueError
            If inputs are not finite, a name is unknown, "mc" lacks a key, or more samples are asked for than there are.
        """
        structure = self._usable_structure()
        check_inputs(x)
        return predictive.predictions(
            self.network,
            self.likelihood,
            structure,
            x,
            self.prior_precision,
            pred_type=pred_type,
            link_approx=link_approx,
            with_noise=with_noise,
            key=key,
            num_samples=num_samples,
            microbatch=microbatch,
        )

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write everything but the user's module, atomically and with a SHA-256 manifest."""
        self._require_fit()
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del parts["subset_of_weights"]  # the network is that of the subset
        saved.save(Path(path), **parts)

    @classmethod
    def load(cls, path: Path | str, network: Network, likelihood: Likelihood | None = None) -> "Laplace":
        """Read what `save` wrote, for a network of the same structure; its weights are replaced by the saved ones.

        Where only some weights have a posterior `network` is that of all of them, as it was given to `Laplace`.

        A likelihood of one's own must be passed again; its leaves are replaced by the saved ones.

        Raises
        ------
        bnnlaplace.checkpoint.CheckpointError
            If a file is damaged, or the network has another structure: the message names the file or the leaf.
        """
        return cls(**saved.load(Path(path), network, likelihood))

    # --- internals --------------------------------------------------------------------------------------------------

    def _usable_structure(self, prior_precision: float | None = None) -> Structure:
        """The structure, after a warning where it has not converged at the prior precision it is to be used at."""
        structure, _ = self._require_fit()
        if isinstance(structure, SampleStructure):
            reservation = structure.reservation(float(self._precision(prior_precision)))
            if reservation is not None:
                warnings.warn(
                    f"{reservation}; fit again with target_precision= that or more max_vectors, or use "
                    "optimize_prior_precision()",
                    stacklevel=3,
                )
        return structure

    def _require_fit(self) -> tuple[Structure, evidence.DataTerms]:
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

    def _precision(self, prior_precision: float | None) -> float | Float[Array, ""]:
        """The one given, checked, or the object's own."""
        if prior_precision is None:
            return self.prior_precision
        prior.check(prior_precision, "prior_precision=...")
        return prior_precision
