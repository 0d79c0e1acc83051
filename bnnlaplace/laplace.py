"""Laplace: the front object. It assembles the stages and holds no algorithm."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace import calibration, checkpoint, evidence, predictive, prior
from bnnlaplace.likelihood import Likelihood, check_targets, resolve
from bnnlaplace.network import Network
from bnnlaplace.structure import DenseStructure, DiagonalStructure, KrylovError, KrylovStructure
from bnnlaplace.structure.fit import fit_dense, fit_diagonal, fit_krylov
from bnnlaplace.tree import ravel, unraveler
from bnnlaplace.types import Estimate

Structure = DenseStructure | DiagonalStructure | KrylovStructure
_STRUCTURES = {"diag": DiagonalStructure, "full": DenseStructure, "lanczos": KrylovStructure}


class Fit(NamedTuple):
    """What fitting measured: the data terms of the log joint at the weights.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n), in nats.
    log_likelihood_gradient
        Its gradient in the weights, shape (P,): with the prior's, it says how far from a mode the weights are.
    num_data
        The number of training examples that the posterior speaks for.
    """

    log_likelihood: Float[Array, ""]
    log_likelihood_gradient: Float[Array, " P"]
    num_data: Float[Array, ""]


class ValidationCurve(NamedTuple):
    """Monte Carlo predictive on validation data as a function of the prior precision; arrays of shape (D,)."""

    prior_precision: Float[np.ndarray, " D"]
    negative_log_likelihood: Float[np.ndarray, " D"]
    expected_calibration_error: Float[np.ndarray, " D"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("network", "likelihood", "prior_precision", "structure", "fitted"),
    meta_fields=("hessian_structure",),
)
@dataclass(frozen=True)
class Laplace:
    """A Laplace approximation N(theta*, (G + delta I)^-1) around the weights of a network.

    Immutable: every method returns a new object. A pytree, so it can be an argument of jitted functions.

    Parameters
    ----------
    network
        From `Network.from_linen` or `Network.from_function`, at the weights training found: a mode of the log joint with
        the prior whose evidence is to be computed (`mode_gradient` says how nearly).
    likelihood
        "classification", "regression", "binary", or a `Likelihood`.
    hessian_structure
        "lanczos": the whole GGN by block Krylov, matrix-free. "diag": its exact diagonal. "full": dense, for small
        networks.
    prior_precision
        delta of the isotropic prior N(0, 1/delta).
    sigma_noise
        Standard deviation of a regression's noise.

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
    likelihood: Likelihood | str = "classification"
    hessian_structure: Literal["lanczos", "diag", "full"] = "lanczos"
    prior_precision: float | Float[Array, ""] = 1.0
    structure: Structure | None = None
    fitted: Fit | None = None
    sigma_noise: dataclasses.InitVar[float] = 1.0

    def __post_init__(self, sigma_noise: float) -> None:
        if isinstance(self.likelihood, str):
            object.__setattr__(self, "likelihood", resolve(self.likelihood, sigma_noise))
        if self.hessian_structure not in _STRUCTURES:
            raise ValueError(
                f"Laplace(hessian_structure=...) must be one of {sorted(_STRUCTURES)}; got {self.hessian_structure!r}"
            )
        if isinstance(self.prior_precision, (int, float, np.ndarray, np.generic)) and not (
            np.ndim(self.prior_precision) == 0 and 0 < self.prior_precision < float("inf")
        ):
            raise ValueError(
                f"Laplace(prior_precision=...) must be one positive, finite number; got {self.prior_precision}; try 1.0"
            )
        if isinstance(sigma_noise, (int, float)) and not 0 < sigma_noise < float("inf"):
            raise ValueError(f"Laplace(sigma_noise=...) must be positive and finite; got {sigma_noise}; try 1.0")

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
        on_block=None,
    ) -> "Laplace":
        """Compute the curvature at the network's weights.

        Parameters
        ----------
        data
            (x, y) arrays, or an iterable of (x, y) batches, without augmentation. Kept nowhere.
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
            If data are empty, labels out of range, outputs not (B, C), or inputs or weights not finite.

        Notes
        -----
        Cost in GGN products of one vector over all data: "lanczos" at most `max_vectors`; "diag" about C backward
        passes per example; "full" P^2 memory.
        """
        x, y = _as_arrays(data)
        shape = jax.eval_shape(self.network, self.network.params, x).shape
        if len(shape) != 2:
            raise ValueError(f"a network's outputs must have shape (B, C); got {shape} for {len(x)} examples")
        check_targets(self.likelihood, shape, y)
        scale = 1.0 if num_data is None else num_data / len(x)
        value, gradient = _log_likelihood(
            self.network, self.likelihood, self.network.params, x, y, microbatch=microbatch
        )
        if not bool(jnp.isfinite(value) & jnp.isfinite(gradient).all()):
            raise ValueError(
                "fit: the log likelihood or its gradient is not finite at these weights and data; look for NaN or "
                "infinite values in the inputs and the weights"
            )
        fitted = Fit(scale * value, scale * gradient, jnp.asarray(scale * len(x)))
        if self.hessian_structure == "diag":
            structure = fit_diagonal(self.network, self.likelihood, x, scale, microbatch=microbatch)
        elif self.hessian_structure == "full":
            structure = fit_dense(self.network, self.likelihood, x, scale)
        else:
            if key is None:
                raise ValueError("fit(key=...) must seed the probes of 'lanczos'; got None; pass jax.random.key(0)")
            structure = fit_krylov(
                self.network,
                self.likelihood,
                x,
                scale,
                key=key,
                log_likelihood=float(fitted.log_likelihood),
                squared_norm=self._squared_norm(),
                num_probes=num_probes,
                max_vectors=max_vectors,
                tolerance=tolerance,
                target_precision=target_precision,
                microbatch=microbatch,
                on_block=on_block,
            )
        return dataclasses.replace(self, structure=structure, fitted=fitted)

    # --- evidence and prior -----------------------------------------------------------------------------------------

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> Estimate:
        """The log evidence in nats at `prior_precision`, by default the object's own; sem = 0 where it is exact."""
        delta = float(self.prior_precision if prior_precision is None else prior_precision)
        point = self.evidence_curve([delta]).log_marginal_likelihood
        return Estimate(float(point.mean[0]), float(point.sem[0]))

    def evidence_curve(self, precisions: Iterable[float]) -> evidence.EvidenceCurve:
        """The log evidence at many prior precisions, from the curvature already computed."""
        structure, fitted = self._require_fit()
        grid = np.asarray(list(precisions), np.float64)
        return evidence.curve(structure.log_determinant, float(fitted.log_likelihood), self._squared_norm(), grid)

    def evidence_optimum(self) -> prior.PriorOptimum:
        """The prior precision that maximises the evidence, with its error interval."""
        structure, fitted = self._require_fit()
        return prior.optimum(structure.log_determinant, float(fitted.log_likelihood), self._squared_norm())

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
            "marglik": maximise the evidence; no curvature is computed again. "gridsearch": try `precisions`.
        validation, precisions, key, num_samples
            For "gridsearch"; `precisions` defaults to 25 values from 0.01 to 10,000.
        """
        if method == "marglik":
            return self.with_prior_precision(self.evidence_optimum().prior_precision)
        if method != "gridsearch":
            raise ValueError(f"optimize_prior_precision(method=...) must be 'marglik' or 'gridsearch'; got {method!r}")
        if validation is None or key is None:
            raise ValueError("optimize_prior_precision('gridsearch') must be given validation=(x, y) and key=...")
        grid = np.geomspace(1e-2, 1e4, 25) if precisions is None else np.asarray(list(precisions))
        curve = self.validation_curve(*validation, grid, key=key, num_samples=num_samples)
        return self.with_prior_precision(float(grid[np.nanargmin(curve.negative_log_likelihood)]))

    def validation_curve(
        self, x: Array, y: Array, precisions: Iterable[float], *, key: Array, num_samples: int, microbatch: int = 64
    ) -> ValidationCurve:
        """NLL and ECE of the Monte Carlo predictive at many prior precisions; classification only.

        The network is differentiated once for all of them: Lanczos pushes its basis through it, the others take one
        Jacobian per input.
        """
        grid = np.asarray(list(precisions), np.float64)
        nll, ece = [], []
        for found in self.functional_posteriors(x, grid, key=key, num_samples=num_samples, microbatch=microbatch):
            probs = np.asarray(predictive.monte_carlo(self.likelihood, found.mean, found.deviations), np.float64)
            nll.append(calibration.negative_log_likelihood(probs, y))
            ece.append(calibration.expected_calibration_error(probs, y))
        return ValidationCurve(grid, np.asarray(nll), np.asarray(ece))

    def with_prior_precision(self, prior_precision: float) -> "Laplace":
        """The same posterior at another prior precision."""
        return dataclasses.replace(self, prior_precision=prior_precision)

    def mode_gradient(self, prior_precision: float | None = None) -> Float[Array, " P"]:
        """Gradient of the log joint in the weights: zero at a mode of the model whose evidence is computed."""
        _, fitted = self._require_fit()
        delta = self.prior_precision if prior_precision is None else prior_precision
        return fitted.log_likelihood_gradient - delta * ravel(self.network.params)

    def mode_decrement(self, prior_precision: float | None = None) -> float:
        """g' (G + delta I)^-1 g, the squared distance to the mode in posterior standard deviations; g as `mode_gradient`.

        Twice what a Gauss-Newton step promises to gain, in nats. Unlike the norm of g it does not depend on how weights
        are scaled, and it sees directions that only the prior determines. Small against the effective number of
        parameters: the weights are near a mode. Exact for "diag" (of its own posterior) and "full"; for "lanczos" from
        above, as directions outside the basis count with the precision of the prior alone.
        """
        structure, _ = self._require_fit()
        delta = float(self.prior_precision if prior_precision is None else prior_precision)
        return structure.inverse_quadratic_form(np.asarray(self.mode_gradient(delta), np.float64), delta)

    def krylov_error(self) -> KrylovError | None:
        """Bounds on the Krylov error at the object's prior precision; None for structures that have none."""
        structure, _ = self._require_fit()
        return structure.error(float(self.prior_precision)) if isinstance(structure, KrylovStructure) else None

    # --- posterior and predictions ----------------------------------------------------------------------------------

    def sample(self, key: Array, num_samples: int) -> PyTree:
        """Posterior samples of the weights, a pytree like them with a leading axis of `num_samples`.

        Lanczos gives at most one sample per probe, and draws among those.
        """
        structure, _ = self._require_fit()
        deviations = structure.samples(key, num_samples, self.prior_precision)
        return jax.vmap(unraveler(self.network.params))(ravel(self.network.params) + deviations)

    def functional_posteriors(
        self, x: Array, precisions: Sequence[float], *, key: Array, num_samples: int, microbatch: int = 64
    ) -> Iterator[predictive.FunctionalPosterior]:
        """Mean, covariance and samples of the linearised outputs at each input, for each of several prior precisions.

        The network is differentiated once for all of them.

        Parameters
        ----------
        x
            Inputs (B, ...).
        precisions
            Prior precisions.
        key, num_samples
            Of the samples. For "diag" and "full" they are drawn at each input from its exact covariance; for "lanczos"
            they are weight samples pushed through the Jacobian, at most one per probe, and the covariance is estimated
            from them: without bias, with relative standard error sqrt(2 / num_samples).
        """
        self._require_fit()
        mean = predictive.outputs(self.network, x, microbatch=microbatch)
        for variance, deviations in self._functional(x, precisions, key, num_samples, microbatch):
            yield predictive.FunctionalPosterior(mean, variance, deviations)

    def functional_variance(self, x: Array, *, microbatch: int = 64) -> Float[Array, "B C C"]:
        """Covariance J (G + delta I)^-1 J' of the linearised outputs; for "lanczos" from all its samples."""
        structure, _ = self._require_fit()
        # All samples are used, so that the key only orders them.
        count = structure.num_probes if isinstance(structure, KrylovStructure) else 1
        ((variance, _),) = self._functional(x, [self.prior_precision], jax.random.key(0), count, microbatch)
        return variance

    def predictive(
        self,
        x: Array,
        pred_type: Literal["glm"] = "glm",
        link_approx: Literal["probit", "mc"] = "probit",
        *,
        key: Array | None = None,
        num_samples: int | None = None,
        microbatch: int = 64,
    ) -> Float[Array, "B C"] | tuple[Float[Array, "B C"], Float[Array, "B C"]]:
        """Predictions under the posterior of the linearised network.

        Parameters
        ----------
        x
            Inputs (B, ...).
        pred_type
            "glm": the linearised network.
        link_approx
            "probit": MacKay's approximation from marginal variances. "mc": the mean probability over samples.
        key, num_samples
            For "mc"; by default as many samples as "lanczos" has probes, otherwise 100.

        Returns
        -------
        Class probabilities (B, C); for regression (mean, variance of the outputs without noise), (B, C) each.
        """
        if pred_type != "glm":
            raise ValueError(f"predictive(pred_type=...) must be 'glm'; got {pred_type!r}")
        if link_approx not in ("probit", "mc"):
            raise ValueError(f"predictive(link_approx=...) must be 'probit' or 'mc'; got {link_approx!r}")
        if self.likelihood.name != "regression" and link_approx == "mc":
            if key is None:
                raise ValueError("predictive(link_approx='mc') must be given key=...; pass jax.random.key(0)")
            if num_samples is None:
                num_samples = self.structure.num_probes if isinstance(self.structure, KrylovStructure) else 100
            (found,) = self.functional_posteriors(
                x, [self.prior_precision], key=key, num_samples=num_samples, microbatch=microbatch
            )
            return predictive.monte_carlo(self.likelihood, found.mean, found.deviations)
        mean = predictive.outputs(self.network, x, microbatch=microbatch)
        variance = jnp.diagonal(self.functional_variance(x, microbatch=microbatch), axis1=1, axis2=2)
        if self.likelihood.name == "regression":
            return mean, variance
        return predictive.probit(self.likelihood, mean, variance)

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write everything but the user's module, atomically and with a SHA-256 manifest."""
        structure, fitted = self._require_fit()
        tree = {
            "network": {"params": self.network.params, "frozen": self.network.frozen},
            "likelihood": jax.tree.leaves(self.likelihood),
            "prior_precision": np.asarray(self.prior_precision),
            "structure": structure,
            "fitted": fitted,
        }
        checkpoint.save_pytree(
            Path(path), tree, {"hessian_structure": self.hessian_structure, "likelihood": self.likelihood.name}
        )

    @classmethod
    def load(cls, path: Path | str, network: Network, likelihood: Likelihood | None = None) -> "Laplace":
        """Read what `save` wrote, for a network of the same structure; its weights are replaced by the saved ones.

        A likelihood of one's own must be passed again; its leaves are replaced by the saved ones.

        Raises
        ------
        bnnlaplace.checkpoint.CheckpointError
            If a file is damaged, or the network has another structure: the message names the file or the leaf.
        """
        stored, metadata = checkpoint.load_pytree(Path(path))
        here = {"params": network.params, "frozen": network.frozen}
        there = checkpoint.restructure(Path(path), stored["network"], here)
        likelihood = likelihood or resolve(metadata["likelihood"])
        leaves = [jnp.asarray(leaf) for leaf in stored.get("likelihood", [])]
        hessian_structure = metadata["hessian_structure"]
        return cls(
            Network(network.forward, **there),
            jax.tree.unflatten(jax.tree.structure(likelihood), leaves),
            hessian_structure,
            float(stored["prior_precision"]),
            _STRUCTURES[hessian_structure].from_arrays(stored["structure"]),
            Fit(**{name: jnp.asarray(value) for name, value in stored["fitted"].items()}),
        )

    # --- internals --------------------------------------------------------------------------------------------------

    def _require_fit(self) -> tuple[Structure, Fit]:
        if self.structure is None:
            raise ValueError("this Laplace has no curvature yet; call la = la.fit((x, y), ...) first")
        return self.structure, self.fitted

    def _squared_norm(self) -> float:
        weights = np.asarray(ravel(self.network.params), np.float64)
        return float(weights @ weights)

    def _functional(
        self, x: Array, precisions: Sequence[float], key: Array, num_samples: int, microbatch: int
    ) -> Iterator[tuple[Float[Array, "B C C"], Float[Array, "S B C"]]]:
        """Covariance and samples of J (theta - theta*) at each prior precision; the network is differentiated once."""
        structure, _ = self._require_fit()
        if isinstance(structure, KrylovStructure):
            push = partial(predictive.pushforward, self.network, x, microbatch=microbatch)
            for deviations in structure.function_samples(push, key, num_samples, precisions):
                yield predictive.sample_variance(deviations), deviations
            return
        # One Jacobian is C gradients of P numbers: a quarter of the images of other passes keeps memory level.
        count = max(1, microbatch // 4)
        grid = jnp.asarray(precisions, self._dtype())
        for variance in predictive.structured_variance(self.network, x, structure, grid, microbatch=count):
            yield variance, predictive.marginal_samples(key, variance, num_samples)

    def _dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self.network.params)[0].dtype


_log_likelihood = jax.jit(evidence.log_likelihood_and_gradient, static_argnames="microbatch")


def _as_arrays(data: tuple[Array, Array] | Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One array of inputs and one of targets, from arrays or from batches."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data)):
        batches = list(data)
        if not batches:
            raise ValueError("fit(data=...) must hold at least one batch; got none; an iterator may be used up already")
        data = tuple(jnp.concatenate([jnp.asarray(batch[part]) for batch in batches]) for part in (0, 1))
    x, y = (jnp.asarray(part) for part in data)
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"fit(data=(x, y)) must hold as many targets as inputs, and at least one; got {len(x)} and {len(y)}"
        )
    return x, y
