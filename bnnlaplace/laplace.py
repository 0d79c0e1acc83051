"""Laplace: the front object. It holds settings and a fitted posterior; each method is one call into a stage."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from bnnlaplace.checkpoint import posterior as on_disk
from bnnlaplace.core.memory import MemoryEstimate
from bnnlaplace.core.tree import register_unchecked, size
from bnnlaplace.core.types import AnyArray, Estimate, Inputs
from bnnlaplace.evidence.marginal import EvidenceCurve
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.fitting.continual import earlier_posterior
from bnnlaplace.fitting.krylov import KrylovOptions
from bnnlaplace.fitting.optimize_prior import Chosen, check_method
from bnnlaplace.fitting.prepare import memory_estimate
from bnnlaplace.model.data import PairOrBatches, as_data, check_inputs
from bnnlaplace.model.likelihood import Likelihood, resolve
from bnnlaplace.model.network import Network
from bnnlaplace.model.subset import Subset
from bnnlaplace.predictive.functional import FunctionalPosterior, Spread, functional_posteriors, functional_variances
from bnnlaplace.predictive.joint import FunctionalGaussian, functional_posterior
from bnnlaplace.predictive.predictions import predictions
from bnnlaplace.predictive.validation import ValidationCurve, validation_curve
from bnnlaplace.prior.gaussian import Groups, Precision, Prior, by_layer
from bnnlaplace.prior.scalar import PriorOptimum, checked_grid
from bnnlaplace.structure import KrylovError, KrylovStructure, Structure
from bnnlaplace.variational.choose_prior import by_validation, choose_prior
from bnnlaplace.variational.fit import fit_posterior
from bnnlaplace.variational.options import Variational


@register_unchecked(("state", "settings"), ())
@dataclass(frozen=True, init=False, repr=False)
class Laplace:
    """A Laplace approximation N(theta*, (G + P0)^-1) around the weights of a network; P0 is the prior precision.

    A `Laplace` is immutable: every method returns a new object, so assign the result. It is also a pytree. With "diag",
    "kron" and "full" it can be an argument of jitted functions that call `predictive`, `functional_variance`, `sample`
    or `mode_gradient`; "full" then factorises its matrix at every call, which closing over the object avoids. With
    "lanczos" small matrices are on the host: close over the object, or call it outside `jit`. Fitting, the evidence,
    the choice of the prior precision and saving belong outside; `evidence.log_marginal_likelihood` can be traced.

    Parameters
    ----------
    network
        From `Network.from_linen`, `from_nnx` or `from_function`, at the weights that training found. They should be a
        mode of the log joint with the prior whose evidence is to be computed; `mode_gradient` tells how near they are.
        After `fit`, `network.params` are the weights that have a posterior.
    likelihood
        "classification", "regression", "binary", "heteroscedastic", or a `Likelihood`.
    subset_of_weights
        Which weights get a posterior: "all"; "last_layer", which is found in the forward pass; or a function from the
        path of a weight, such as "Dense_0/kernel", to a bool. The other weights are frozen and have no prior.
    hessian_structure
        "lanczos": the whole GGN by block Krylov, matrix-free. "kron": Kronecker factors of each layer (KFAC). "diag":
        the exact diagonal. "full": the dense matrix, for small networks.
    prior_precision
        delta of the Gaussian prior N(mu, P0^-1), P0 = diag(delta): one number; a dictionary with one number for each
        group of weights; or one number for each weight, as a vector or a pytree like the weights with a posterior.
    prior_mean
        mu: one number, or a pytree like the weights.
    prior_groups
        From the path of a weight to the name of its group. By default each layer is a group, such as "Dense_0".
    sigma_noise
        Standard deviation of the noise of "regression": one number, or one for each output.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used; the message says which, why, and what to try.

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

    state: Unfitted | Fitted
    settings: Settings

    def __init__(
        self,
        network: Network,
        likelihood: Likelihood | str = "classification",
        subset_of_weights: Subset = "all",
        hessian_structure: Literal["lanczos", "kron", "diag", "full"] = "lanczos",
        prior_precision: Precision = 1.0,
        prior_mean: PyTree = 0.0,
        prior_groups: Groups = by_layer,
        sigma_noise: float | Float[ArrayLike, "*C"] = 1.0,
    ) -> None:
        settings = Settings.checked(subset_of_weights, hessian_structure, prior_precision, prior_mean, prior_groups)
        state = Unfitted.of(network, resolve(likelihood, sigma_noise), settings)
        self.__dict__.update(state=state, settings=settings)  # the dataclass is frozen

    @classmethod
    def _of(cls, state: Unfitted | Fitted, settings: Settings) -> "Laplace":
        la = object.__new__(cls)
        la.__dict__.update(state=state, settings=settings)
        return la

    def __repr__(self) -> str:
        fit_as = "not fitted" if self.structure is None else f"fitted as {type(self.structure).__name__}"
        return (
            f"Laplace({self.likelihood.name!r}, {self.hessian_structure!r}, {size(self.network.params)} weights, "
            f"prior_precision={self.settings.described_precision()}, {fit_as})"
        )

    @property
    def network(self) -> Network:
        """The network. After `fit`: as a function of the weights with a posterior, at the centre of the expansion."""
        return self.state.network

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood p(y | f)."""
        return self.state.likelihood

    @property
    def sigma_noise(self) -> Float[Array, "*C"] | None:
        """Standard deviation of the noise of a regression. None for other likelihoods."""
        return self.likelihood.sigma_noise

    @property
    def hessian_structure(self) -> str:
        """The name of the structure that `fit` gives the curvature."""
        return self.settings.hessian_structure

    @property
    def prior_precision(self) -> Precision:
        """The prior precision, in the form in which it was given."""
        return self.settings.prior_precision

    @property
    def subset_of_weights(self) -> Subset:
        """Which weights get a posterior, as it was given."""
        return self.settings.subset_of_weights

    @property
    def prior_mean(self) -> PyTree:
        """The prior mean, in the form in which it was given."""
        return self.settings.prior_mean

    @property
    def prior_groups(self) -> Groups:
        """From the path of a weight to the name of its group."""
        return self.settings.prior_groups

    @property
    def prior(self) -> Prior:
        """The prior of the weights with a posterior: an overall precision, relative precisions and a mean."""
        return self.settings.prior(self.network) if self.state.prior is None else self.state.prior

    @property
    def structure(self) -> Structure | None:
        """The fitted curvature. None before `fit`."""
        return self.state.structure if isinstance(self.state, Fitted) else None

    @property
    def fitted(self) -> Fitted:
        """The fitted posterior, which every answer below comes from. Raises ValueError before `fit`."""
        if not isinstance(self.state, Fitted):
            raise ValueError("this Laplace has no curvature yet; call la = la.fit((x, y), ...) first")
        return self.state.check_concrete()

    def fit(
        self,
        data: PairOrBatches,
        *,
        approximation: Literal["laplace", "variational"] | Variational = "laplace",
        prior: "Laplace | None" = None,
        key: Array | None = None,
        mean: Literal["network", "linear"] = "network",
        num_data: int | None = None,
        num_probes: int = 32,
        max_vectors: int = 512,
        tolerance: float = 0.05,
        target_precision: float | None = None,
        microbatch: int = 64,
        shared_weights: Literal["partial_traces", "expand", "reduce"] = "partial_traces",
        on_block: Callable[[KrylovStructure, KrylovError], None] | None = None,
    ) -> "Laplace":
        """Compute the posterior.

        Parameters
        ----------
        data
            (x, y), without augmentation; x may be a pytree. Or (x, y, w): example n counts w_n >= 0 times. Or batches
            of such that can be read again, and need not fit in memory. Up to 64 examples of the first batch are kept.
        approximation
            "laplace": the curvature at the weights. "variational", or `bnnlaplace.Variational` with options: the
            Gaussian of the largest evidence lower bound for the linearised network; it needs a key. Its evidence can be
            acted on where training saturates the softmax. For a regression it is "laplace" with mean="linear".
        prior
            Continual learning: the `Laplace` of earlier data, with "diag", "kron" or "full", whose posterior takes the
            place of the prior. Curvatures add up, and the evidence is that of the new data given the earlier ones.
            Train with the penalty -prior.log_density. Prior precision and noise are chosen in the first task alone.
        key
            Seeds the probes of "lanczos", and the samples of "variational".
        mean
            "network": expand around the weights. "linear": replace the network by its linearisation there, for later
            fits of the result as well, and expand around the mode of its log joint. "variational" does so anyway.
        num_data
            Size of the training set if `data` is a random subset: all sums count num_data / (weight of `data`) times.
        num_probes, max_vectors
            Lanczos: normal probes in a block, which is also the number of posterior samples; the largest number of
            basis vectors, each of P numbers. If all data together have no more outputs than this, the curvature is
            exact and costs one gradient for each output.
        tolerance, target_precision
            Lanczos: the decomposition grows until the bound on the relative error of a posterior sample is below this
            tolerance at this prior precision: by default the best by the evidence, or that of a variational fit.
        microbatch
            Examples linearised at a time; bounds memory.
        shared_weights
            "kron": the factors of weights that are used several times; see `bnnlaplace.curvature.kronecker_factors`.
        on_block
            Lanczos: called with (structure, `KrylovError`) after each block.

        Raises
        ------
        ValueError, MemoryError
            If data, options, prior or network cannot be used, or memory is short. Warns far from a mode.

        Notes
        -----
        Cost in GGN products of one vector over all data: "lanczos" at most `max_vectors`; "diag" and "kron" about C
        backward passes per example; "full" P^2 memory.
        """
        options = KrylovOptions(key, num_probes, max_vectors, tolerance, target_precision, on_block)
        how = {"mean": mean, "num_data": num_data, "microbatch": microbatch, "shared_weights": shared_weights}
        how["posterior"], settings = earlier_posterior(prior, self.state, self.settings)
        return Laplace._of(*fit_posterior(self.state, settings, as_data(data), approximation, krylov=options, **how))

    def memory_estimate(self, data: PairOrBatches, *, max_vectors: int = 512, microbatch: int = 64) -> MemoryEstimate:
        """How much memory `fit` takes at its peak, beside activations. Data that can be read once only are refused.

        Features before the weights with a posterior are counted for arrays; of batches they take at most a quarter.
        """
        return memory_estimate(self.state, self.settings, as_data(data), max_vectors=max_vectors, microbatch=microbatch)

    def log_marginal_likelihood(self, prior_precision: Precision | None = None) -> Estimate:
        """Log evidence in nats at `prior_precision`, by default its own, where a variational fit has a `LowerBound`.

        `sem` is the standard error over the probes, 0 if the evidence is exact, without the truncation of Lanczos,
        which lowers the mean by at most `krylov_error().log_determinant / 2`. "lanczos" answers at its own ratios.
        """
        return self._at(prior_precision).warn_unless_converged().log_marginal_likelihood()

    def evidence_curve(self, precisions: Iterable[float] | None = None) -> EvidenceCurve:
        """The log evidence at many prior precisions, by default 61 over six decades around the maximum.

        If the prior is not isotropic they are geometric means over the weights, whose ratios are kept. A variational
        posterior extrapolates its lower bound from the precision of its fit, and may be above the evidence elsewhere.
        """
        return self.fitted.evidence_curve(precisions)

    def evidence_optimum(self) -> PriorOptimum:
        """The best factor for `evidence_curve`, and an interval for the errors of probes and truncation."""
        return self.fitted.evidence_optimum()

    def optimize_prior_precision(
        self,
        method: Literal["marglik", "gridsearch"] = "marglik",
        *,
        prior_structure: Literal["scalar", "layerwise", "diag"] | None = None,
        optimize_sigma_noise: bool = False,
        refit: Callable[["Laplace"], "Laplace"] | None = None,
        max_refits: int = 10,
        validation: PairOrBatches | None = None,
        precisions: Iterable[float] | None = None,
        link_approx: Literal["probit", "mc", "bridge"] | None = None,
        key: Array | None = None,
        num_samples: int | None = None,
    ) -> "Laplace":
        """Choose the prior precision, by the evidence or by the NLL of the predictive on validation data.

        Parameters
        ----------
        method
            "marglik": maximise the evidence, or its lower bound. Unless it was loaded, a Laplace posterior warns if it
            does not fit the training data. "gridsearch": try `precisions`, all in one pass, and choose among those at
            which "lanczos" has converged. Both warn if the optimum is at an end of what they search.
        prior_structure
            What "marglik" chooses: one precision for all weights ("scalar"), for each group of `prior_groups`
            ("layerwise"), or for each weight ("diag"). None, the default, chooses a common factor of all.
        optimize_sigma_noise
            For a regression: also maximise over a common factor of the noise.
        refit, max_refits
            "lanczos" has to be fitted again if ratios change, a variational posterior if any precision does: a function
            such as lambda la: la.fit(data, key=key), and how many steps towards the best precision call it at most.
        validation, precisions, link_approx, key, num_samples
            For "gridsearch": arrays (x, y), or (x, y, w) with weights of examples, or batches of such, which are read
            once; the rest as for `validation_curve`. `precisions` defaults to 25 values from 0.01 to 10,000.
        """
        fitted = self.fitted.check_prior_is_stated("optimize_prior_precision")
        chosen = Chosen(fitted, self.settings, refit, Laplace._of)
        how = {"link_approx": link_approx, "key": key, "num_samples": num_samples}
        evidence_options = {"prior_structure": prior_structure, "optimize_sigma_noise": optimize_sigma_noise}
        grid_options = {"validation": validation, "precisions": precisions, **how}
        check_method(method, {**evidence_options, "refit": refit}, grid_options)
        if method == "marglik":
            best = choose_prior(chosen, **evidence_options, max_refits=max_refits)
        else:
            best = by_validation(chosen, validation_curve(self.fitted, validation, precisions, **how))
        return Laplace._of(best.fitted, best.settings)

    def validation_curve(
        self,
        x: Inputs,
        y: AnyArray,
        precisions: Iterable[float],
        *,
        weights: Real[ArrayLike, " B"] | None = None,
        link_approx: Literal["probit", "mc", "bridge"] | None = None,
        key: Array | None = None,
        num_samples: int | None = None,
        microbatch: int = 64,
    ) -> ValidationCurve:
        """NLL and ECE of the predictive at many prior precisions; see `bnnlaplace.predictive.validation`.

        Parameters
        ----------
        x, y, precisions, weights, microbatch
            Validation data, the grid as for `evidence_curve`, how many times each example counts (once by default), and
            how many inputs are differentiated at a time.
        link_approx, key, num_samples
            The link, by default that of `predictive`. For "mc": the seed and the number of samples, by default 32.
        """
        how = {"link_approx": link_approx, "key": key, "num_samples": num_samples, "microbatch": microbatch}
        return validation_curve(self.fitted, (x, y) if weights is None else (x, y, weights), precisions, **how)

    def with_prior_precision(self, prior_precision: Precision) -> "Laplace":
        """The same posterior at another prior precision. "lanczos" must be fitted again if ratios change: an error."""
        settings, is_fitted = self.settings.at(prior_precision), isinstance(self.state, Fitted)
        state = self._at(prior_precision) if is_fitted else Unfitted.of(self.network, self.likelihood, settings)
        return Laplace._of(state, settings)

    def with_sigma_noise(self, sigma_noise: float | Float[ArrayLike, "*C"]) -> "Laplace":
        """The same posterior of a regression at another noise. All outputs must keep their ratios: else fit again."""
        return Laplace._of(self.fitted.with_sigma_noise(sigma_noise), self.settings)

    def mode_gradient(self, prior_precision: Precision | None = None) -> Float[Array, " P"]:
        """Gradient of the log joint in the weights: zero at a mode of the model whose evidence is computed."""
        if prior_precision is None:
            return self.fitted.mode_gradient()
        return self.fitted.with_stated(self.settings.at(prior_precision).prior(self.network)).mode_gradient()

    def mode_decrement(self, prior_precision: Precision | None = None) -> float:
        """g' (G + P0)^-1 g with g = `mode_gradient`: the squared distance to the mode in posterior deviations.

        It is twice what a Gauss-Newton step promises to gain, in nats, however weights are scaled. Weights are near a
        mode if it is small against `effective_parameters`. It is exact for "full", and for "diag" and "kron" of their
        own posteriors. For "lanczos" it is an upper bound: the prior alone counts in directions outside the basis.
        """
        return self._at(prior_precision).mode_decrement()

    def effective_parameters(self, prior_precision: Precision | None = None) -> float:
        """tr G (G + P0)^-1: the number of directions that the data determine rather than the prior."""
        return self._at(prior_precision).effective_parameters()

    def krylov_error(self) -> KrylovError | None:
        """Bounds on what truncation costs at the object's prior precision. None for structures without truncation."""
        return self.fitted.krylov_error()

    def sample(self, key: Array, num_samples: int) -> PyTree:
        """Posterior samples of the weights: a pytree like `network.params` with a leading axis of `num_samples`.

        `network.full_params` puts one sample of a subset in its place among all weights. "lanczos" has at most as many
        samples as probes, and the key chooses among them.
        """
        return self.fitted.warn_unless_converged().samples(key, num_samples)

    def log_density(self, params: PyTree) -> Float[Array, ""]:
        """Log density of the posterior at weights `params`, in nats. Its negative is the penalty for training on.

        It can be jitted and differentiated in `params`, which are like `network.params` or all weights of the model;
        close over the `Laplace`. Not for "lanczos". Cost: a product with the curvature.
        """
        return self.fitted.log_density(params)

    def functional_posterior(self, x: Inputs, *, joint: bool = True, microbatch: int = 64) -> FunctionalGaussian:
        """Mean and covariance of the linearised outputs at inputs (B, ...) together; its `sample` draws functions.

        With `joint` the covariance (B, ..., C, B, ..., C) is that between all inputs, exact but for "lanczos" outside
        its basis; MemoryError if it does not fit. Without, it is that within each input, and draws are independent.
        """
        check_inputs(self.network, x)
        return functional_posterior(self.fitted.warn_unless_converged(), x, joint=joint, microbatch=microbatch)

    def functional_posteriors(
        self,
        x: Inputs,
        precisions: Sequence[float],
        *,
        key: Array,
        num_samples: int,
        microbatch: int = 64,
        joint: bool = False,
        spread: Spread = "covariance",
    ) -> Iterator[FunctionalPosterior]:
        """Mean, covariance and samples of the linearised outputs at each input, for several prior precisions.

        "lanczos" pushes samples of the weights through the Jacobian, at most one for each probe, and estimates the
        covariance from them. Other structures draw from exact covariances at each input, independently of others.

        Parameters
        ----------
        x, precisions, key, num_samples, microbatch
            Inputs (B, ...); the rest as for `validation_curve`.
        joint, spread
            Push samples of the weights through the Jacobian, so that each is a function. "marginal" for the variance of
            each output, or "none", in place of their covariance: many outputs are then sampled in this way, too.
        """
        check_inputs(self.network, x)
        grid = checked_grid(precisions, "functional_posteriors(precisions=...)")
        how = {"key": key, "num_samples": num_samples, "microbatch": microbatch, "joint": joint, "spread": spread}
        return functional_posteriors(self.fitted, x, grid, **how)

    def functional_variance(self, x: Inputs, *, microbatch: int = 64) -> Float[Array, "B ... C C"]:
        """Covariance J (G + P0)^-1 J' of the linearised outputs at inputs (B, ...); for "lanczos" from all samples."""
        fitted = self.fitted.warn_unless_converged()
        check_inputs(self.network, x)
        return next(functional_variances(fitted, x, [fitted.prior.precision], microbatch=microbatch))

    def predictive(
        self,
        x: Inputs,
        pred_type: Literal["glm", "nn"] = "glm",
        link_approx: Literal["probit", "mc", "bridge"] = "probit",
        *,
        with_noise: bool = False,
        key: Array | None = None,
        num_samples: int | None = None,
        microbatch: int = 64,
    ) -> Float[Array, "B ... C"] | tuple[Float[Array, "B ... C"], ...]:
        """Predictions under the posterior. `la(x)` is `la.predictive(x)`.

        Parameters
        ----------
        x, microbatch
            Inputs (B, ...), where B may be 0, and how many are in memory at a time.
        pred_type
            "glm": predict with the linearised network, whose posterior this is. "nn": predict with the network at
            samples of the weights, which may lie where the linearisation no longer holds.
        link_approx
            "probit": MacKay's approximation from marginal variances. "mc": the mean probability over samples. "bridge":
            the mean of a Dirichlet distribution, from the covariance of the outputs. Outside of `jit` it warns if off.
        with_noise
            For a regression: add the variance of the noise to that of the outputs.
        key, num_samples
            For "mc" and "nn". By default as many samples as "lanczos" has probes, otherwise 100.

        Returns
        -------
        Array or (Array, Array)
            Class probabilities (B, ..., C). Regression: mean and variance. "heteroscedastic": that of the noise, too.
        """
        check_inputs(self.fitted.warn_unless_converged().network, x)
        options = {"with_noise": with_noise, "key": key, "num_samples": num_samples, "microbatch": microbatch}
        return predictions(self.fitted, x, pred_type=pred_type, link_approx=link_approx, **options)

    __call__ = predictive

    def save(self, path: Path | str) -> None:
        """Write all but the user's module to a directory. Only a checkpoint, or an empty directory, is replaced."""
        on_disk.save(path, self.fitted, self.settings)

    @classmethod
    def load(cls, path: Path | str, network: Network, likelihood: Likelihood | None = None) -> "Laplace":
        """Read what `save` wrote.

        Parameters
        ----------
        path, network, likelihood
            The directory, and the network of all weights, whose weights are replaced by the saved ones. A likelihood of
            your own must be passed again, and its leaves are replaced.

        Raises
        ------
        bnnlaplace.checkpoint.CheckpointError
            If a file is damaged, or the network has another structure: the message names the file or the leaf.
        """
        return cls._of(*on_disk.load(path, network, likelihood))

    def _at(self, prior_precision: Precision | None) -> Fitted:
        """The fitted posterior at another prior precision, or as it is."""
        if prior_precision is None:
            return self.fitted
        return self.fitted.at(self.settings.at(prior_precision).prior(self.network))
