"""The GGN as a block Krylov decomposition, for any network: products are enough, and no matrix is formed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnnlaplace import krylov
from bnnlaplace.core.linalg import einsum, matmul
from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.tree import group_sums
from bnnlaplace.core.types import AnyArray
from bnnlaplace.krylov.block_rows import FLOOR
from bnnlaplace.krylov.tridiagonal import ROUNDING
from bnnlaplace.structure.outside import estimated_share, with_own_curvature
from bnnlaplace.structure.protocol import PriorPrecision, PriorPrecisions

# Error of a product with G, relative to the largest eigenvalue, over that of the derivatives. On networks in 16 bits
# Ritz values that should be zero are up to 0.1 eps. Where they are larger, as after convolutions whose sums are in 16
# bits, too, negative ones show it.
OF_PRODUCTS = 1 / 64


class KrylovError(NamedTuple):
    """Bounds on what stopping the recurrence costs at one prior precision. The randomness of the probes comes on top.

    Attributes
    ----------
    prior_precision
        The prior precision delta at which they hold.
    sample
        Bound on the relative error of a posterior sample, |e|_{G + delta I} / sqrt(effective number of parameters), as
        a root mean square over the samples.
    log_determinant
        Bound on the error of the mean over probes of the log-determinant: `truncation` + `rounding`.
    effective_parameters
        tr G (G + delta I)^-1, the number of directions that the data determine.
    truncation
        Bound on how far truncation raises the log-determinant. It is the gap between the Gauss and the Gauss-Radau rule
        for these probes. Other probes would move both rules, by about the standard error.
    rounding
        How far the log-determinant may be too low, because curvature that cannot be told from rounding counts as zero:
        what it would add if it were all there.
    """

    prior_precision: float
    sample: float
    log_determinant: float
    effective_parameters: float
    truncation: float
    rounding: float


class KrylovStructure(NamedTuple):
    """A block Krylov decomposition of G from normal probes.

    One decomposition gives, at every prior precision, the log-determinant, its slope and as many posterior samples as
    there were probes. Memory: the basis on the device, m P numbers, which no method copies. The rest is small and in
    float64 on the host.

    Attributes
    ----------
    decomposition, ritz
        The results of `krylov.block_lanczos` and `krylov.ritz`.
    radau_nodes, radau_weights
        The Gauss-Radau rule, which bounds the log-determinant from below; shapes (m + S,) and (m + S, S).
    tolerance
        The relative error of a sample below which the decomposition counts as converged.
    """

    decomposition: krylov.BlockDecomposition
    ritz: krylov.Ritz
    radau_nodes: Float[np.ndarray, " m+S"]
    radau_weights: Float[np.ndarray, "m+S S"]
    tolerance: np.float64 = np.float64(0.1)

    @classmethod
    def from_decomposition(
        cls,
        decomposition: krylov.BlockDecomposition,
        tolerance: float = 0.1,
        rounding: float = OF_FLOAT32,
        *,
        of_factors: bool = False,
    ) -> "KrylovStructure":
        """Diagonalise the small matrices behind the two quadrature rules.

        `rounding` is the relative error of the derivatives in the products. `of_factors` tells that the decomposition
        is one of `krylov.block_golub_kahan`, where it enters by its square.
        """
        eps = float(jnp.finfo(decomposition.basis.dtype).eps)
        least = max(FLOOR * eps, rounding) ** 2 if of_factors else max(ROUNDING * eps, OF_PRODUCTS * rounding)
        ritz = krylov.ritz(decomposition, rounding=least)
        return cls(decomposition, ritz, *krylov.gauss_radau(decomposition, ritz), np.float64(tolerance))

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "KrylovStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        # The small matrices stay on the host in float64.
        decomposition = krylov.BlockDecomposition(**arrays["decomposition"])
        decomposition = decomposition._replace(basis=jnp.asarray(decomposition.basis))
        tolerance = float(arrays.get("tolerance", 0.1))
        if "resolution" not in arrays["ritz"]:  # written by an earlier release, which counted rounding as curvature
            return cls.from_decomposition(decomposition, tolerance)
        ritz, radau = krylov.Ritz(**arrays["ritz"]), (arrays["radau_nodes"], arrays["radau_weights"])
        return cls(decomposition, ritz, *radau, np.float64(tolerance))

    def whitened(self, relative: Float[AnyArray, " P"]) -> "KrylovStructure":
        """Return this structure if D is one for all weights.

        Raises
        ------
        ValueError
            For any other D. The Krylov space of D^-1/2 G D^-1/2 is another one, and only new products can find it.
        """
        if not np.allclose(relative, 1, rtol=1e-6):
            raise ValueError(
                "a Krylov decomposition must be fitted at the ratios of the prior precisions that it is used with, as "
                "its space depends on them; construct Laplace(prior_precision=...) with them and fit again, or pass "
                "optimize_prior_precision(refit=lambda la: la.fit(data, key=key, ...)) with the options of this fit"
            )
        return self

    def scaled(self, factor: float) -> "KrylovStructure":
        """Return the structure of factor * G, which has the same basis and the same Ritz vectors."""
        decomposition = self.decomposition._replace(
            tridiagonal=factor * self.decomposition.tridiagonal, residual=factor * self.decomposition.residual
        )
        ritz = self.ritz._replace(
            values=factor * self.ritz.values,
            couplings=abs(factor) * self.ritz.couplings,
            tails=factor * self.ritz.tails,
            resolution=factor * self.ritz.resolution,
            hidden=factor * self.ritz.hidden,
        )
        return self._replace(decomposition=decomposition, ritz=ritz, radau_nodes=factor * self.radau_nodes)

    @property
    def num_probes(self) -> int:
        """The number of probes, and of posterior samples."""
        return len(self.decomposition.start)

    @property
    def num_vectors(self) -> int:
        """The number of basis vectors."""
        return len(self.decomposition.basis)

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from the rounding of products.

        Zero if the space is exhausted and no value is that small.
        """
        is_complete = not (self.decomposition.residual.any() or self.ritz.hidden.any())
        return 0.0 if is_complete else float(self.ritz.resolution)

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " S"]:
        """log det(I + G / delta), one estimate for each probe. Converged eigenpairs enter all of them exactly."""
        return krylov.trace_forms(self.ritz, lambda values: np.log1p(values / prior_precision))

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " S"]:
        """Bound how far truncation raises the estimate of each probe, by the Gauss minus the Gauss-Radau rule."""
        # log(1 + x / delta) has derivatives of alternating sign. For such functions the two rules bracket the value.
        upper = np.log1p(self.ritz.values / prior_precision) @ self.ritz.weights**2
        lower = np.log1p(self.radau_nodes / prior_precision) @ self.radau_weights**2
        return np.maximum(upper - lower, 0.0)

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "S g"]:
        """tr_g G (G + delta I)^-1, one estimate for each probe.

        With f(x) = x / (x + delta), an eigenpair that has converged contributes f(lambda_j) |x_j|_g^2 exactly. The rest
        is estimated by the probes, as E z_g' (f(G) z)_g, where z is a probe without its components along those
        eigenpairs. Memory: a block of S vectors beside the basis.
        """
        ratio = self.ritz.values / (self.ritz.values + prior_precision)
        exact = krylov.summed_exactly(self.ritz)
        basis, count = self.decomposition.basis, self.num_probes
        converged_sums = np.zeros(int(groups.max()) + 1)
        converged_vectors = self.ritz.vectors[:, exact].T
        # The eigenvectors in the space of the weights are formed a block at a time, as all of them would be a second
        # basis in memory.
        for first in range(0, len(converged_vectors), count):
            coordinates = jnp.asarray(converged_vectors[first : first + count], basis.dtype)
            eigenvectors = matmul(coordinates, basis)
            converged_sums += ratio[exact][first : first + count] @ group_sums(eigenvectors**2, groups)
        # The probes and their images under f(G), both without the converged eigenpairs: rows z and f(G) z.
        probes, images = (
            matmul(jnp.asarray((self.ritz.vectors[:, ~exact] @ components).T, basis.dtype), basis)
            for components in (self.ritz.weights[~exact], ratio[~exact, None] * self.ritz.weights[~exact])
        )
        return converged_sums + group_sums(probes * images, groups)

    def error(self, prior_precision: PriorPrecision) -> KrylovError:
        """Bound the error of stopping the recurrence here, at one prior precision."""
        values = self.ritz.values
        effective = krylov.trace_forms(self.ritz, lambda theta: theta / (theta + prior_precision)).mean()
        bound = krylov.inverse_sqrt_error(self.ritz, prior_precision)
        # In the norm of G + delta I the part of a sample that the data determine has this squared length on average.
        sample = np.sqrt(np.mean(bound**2) / max(effective, np.finfo(values.dtype).tiny))
        truncation = float(self.truncation(prior_precision).mean())
        rounding = float((np.log1p(self.ritz.hidden / prior_precision) @ self.ritz.weights**2).mean())
        return KrylovError(
            prior_precision=float(prior_precision),
            sample=float(sample),
            log_determinant=truncation + rounding,
            effective_parameters=float(effective),
            truncation=truncation,
            rounding=rounding,
        )

    def has_converged(self, error: KrylovError) -> bool:
        """Whether samples are within the tolerance, and truncation is below the log-determinant's standard error.

        A truncation below 0.1 nat is negligible, whatever the standard error. More vectors do not mend rounding.
        """
        forms = self.log_determinant(error.prior_precision)
        sem = forms.std(ddof=1) / np.sqrt(len(forms)) if len(forms) > 1 else 0.0
        return bool(error.sample <= self.tolerance and error.truncation <= max(0.1, sem))

    def reservation(self, prior_precision: PriorPrecision) -> str | None:
        """Say that the decomposition has not converged at a prior precision, and by how much; None if it has."""
        error = self.error(prior_precision)
        if self.has_converged(error):
            return None
        return (
            f"the Krylov decomposition has not converged with {len(self.ritz.values)} vectors: at prior precision "
            f"{prior_precision:.3g} a posterior sample can be off by {100 * error.sample:.0f} % and the "
            f"log-determinant by {error.truncation:.2g} nats"
        )

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """Bound v' (G + delta I)^-1 v from above.

        The part of v outside the basis counts with the precision of the prior alone. It is a difference of squares, so
        it is computed in float64. Memory: S rows of the basis are on the host at a time.
        """
        basis, count = self.decomposition.basis, self.num_probes
        blocks = (jax.lax.dynamic_slice_in_dim(basis, first, count) for first in range(0, len(basis), count))
        inside = np.concatenate([np.asarray(block, np.float64) @ vector for block in blocks])
        along = self.ritz.vectors.T @ inside
        outside = max(vector @ vector - inside @ inside, 0.0)
        return float(np.sum(along**2 / (self.ritz.values + prior_precision)) + outside / prior_precision)

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """Multiply v by the inverse of the Ritz pairs, and what is outside of the basis by 1 / delta."""
        basis, delta = self.decomposition.basis, float(prior_precision)
        along = self.ritz.vectors.T @ np.asarray(matmul(basis, jnp.asarray(vector, basis.dtype)), np.float64)
        # 1 / (theta + delta) - 1 / delta without the difference.
        change = self.ritz.vectors @ (along * -self.ritz.values / (self.ritz.values + delta))
        return (vector + np.asarray(matmul(jnp.asarray(change, basis.dtype), basis), np.float64)) / delta

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows (G + delta I)^-1/2 z, for probes z chosen without replacement and with random signs.

        Raises
        ------
        ValueError
            If more samples are asked for than there are probes.
        """
        return matmul(self._coefficients(key, num_samples, prior_precision), self.decomposition.basis)

    def function_samples(
        self, pushforward: Callable[[Array], Array], key: Array, num_samples: int, precisions: PriorPrecisions
    ) -> Iterator[Float[Array, "S B ... C"]]:
        """Yield J times samples of the weights for each prior precision.

        J is multiplied by the basis once, and small matrix products give the samples at every precision. If all samples
        together are fewer than the basis vectors, J is multiplied by the samples instead. Memory: B C numbers for each
        basis vector or sample.
        """
        if len(precisions) * num_samples < len(self.decomposition.basis):
            for precision in precisions:
                yield pushforward(self.samples(key, num_samples, precision))
            return
        basis, combined = self.sample_directions(key, num_samples, precisions)
        yield from combined(pushforward(basis))

    def sample_directions(
        self, key: Array, num_samples: int, precisions: PriorPrecisions
    ) -> tuple[Float[Array, "R P"], Callable[[Float[Array, "R B ... C"]], Iterable[Float[Array, "S B ... C"]]]]:
        """Return V, the basis or all samples if they are fewer, and how `function_samples` follow from J V.

        Memory: R P numbers if V is made of samples, which are fewer than the basis holds.
        """
        if len(precisions) * num_samples < len(self.decomposition.basis):
            samples = [self.samples(key, num_samples, precision) for precision in precisions]
            return jnp.concatenate(samples), lambda images: jnp.split(images, len(precisions))

        def combined(images: Float[Array, "m B ... C"]) -> Iterator[Float[Array, "S B ... C"]]:
            for precision in precisions:
                yield einsum("sm,m...->s...", self._coefficients(key, num_samples, precision), images)

        return self.decomposition.basis, combined

    def joint_covariance(self, rows: Float[Array, "B K P"], prior_precision: PriorPrecision) -> Float[Array, "B*K B*K"]:
        """Covariance of the K outputs at B inputs jointly, from their Jacobian J. It is positive semidefinite.

        With the Ritz pairs (theta_j, x_j), J = A X' + R where R is the part of J outside the basis, and the covariance
        is A (theta + delta)^-1 A' + sqrt(c) R R' sqrt(c) / delta. Without curvature outside the basis c would be 1; it
        is less where the basis has not found all curvature. Each input has its own c, which gives the sum of its K
        variances the value that the samples estimate. So the covariance of two inputs does not depend on the others.

        What remains is the noise of c, as S probes estimate it, and that all directions outside the basis count alike.
        """
        return _joint_covariance(*self._inside_and_outside(rows, prior_precision))

    def covariance_within(
        self,
        rows: Float[Array, "B K P"],
        prior_precision: PriorPrecision,
        factors: Float[Array, "B K R"] | None = None,
    ) -> Float[Array, "B K K"]:
        """Covariance of the K outputs at each of B inputs, as `joint_covariance` has it.

        If the posterior was fitted to an input, and W = A A' is the curvature of its outputs, pass the `factors` A:
        they tell along which outputs less variance is left outside of the basis. See `structure/outside.py`.
        """
        return _covariance_within(*self._inside_and_outside(rows, prior_precision), factors)

    def _inside_and_outside(self, rows: Float[Array, "B K P"], prior_precision: PriorPrecision) -> tuple[Array, ...]:
        dtype, sampled = rows.dtype, ~krylov.summed_exactly(self.ritz)
        arrays = self.ritz.vectors, self.ritz.values, self.ritz.weights, sampled
        of_ritz = (jnp.asarray(array, dtype) for array in arrays)
        return _inside_and_outside(self.decomposition.basis, *of_ritz, rows, jnp.asarray(prior_precision, dtype))

    def _coefficients(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S m"]:
        """Choose probes and signs, and return (G + delta I)^-1/2 z in the coordinates of the basis."""
        if num_samples > self.num_probes:
            raise ValueError(
                f"a Krylov posterior gives one sample per probe: num_samples must be at most {self.num_probes}; got "
                f"{num_samples}; fit with num_probes={num_samples} or more"
            )
        key_order, key_sign = jax.random.split(key)
        chosen = jax.random.permutation(key_order, self.num_probes)[:num_samples]
        # The posterior is symmetric, so a random sign makes another sample of the same probe for another key.
        signs = jax.random.rademacher(key_sign, (num_samples, 1))
        coefficients = krylov.inverse_sqrt_coefficients(self.ritz, prior_precision)
        return signs * jnp.asarray(coefficients, self.decomposition.basis.dtype)[chosen]


@jax.jit
def _joint_covariance(known: Float[Array, "B K m"], outside: Float[Array, "B K P"], share: Float[Array, " B"]) -> Array:
    """Compute `KrylovStructure.joint_covariance` from what `_inside_and_outside` returns."""
    # A share that is cut at zero stays there; the derivative of its root alone would be infinite.
    scale = jnp.where(share > 0, jnp.sqrt(jnp.where(share > 0, share, 1)), 0)
    joint = sum(matmul(part, part.T) for part in (_joined(known), _joined(scale[:, None, None] * outside)))
    return (joint + joint.T) / 2


@jax.jit
def _covariance_within(
    known: Float[Array, "B K m"],
    outside: Float[Array, "B K P"],
    share: Float[Array, " B"],
    factors: Float[Array, "B K R"] | None,
) -> Float[Array, "B K K"]:
    """Compute `KrylovStructure.covariance_within` from what `_inside_and_outside` returns."""
    inside, prior = (einsum("bkp,blp->bkl", part, part) for part in (known, outside))
    rest = share[:, None, None] * prior if factors is None else with_own_curvature(prior, factors, share)
    return inside + (rest + jnp.swapaxes(rest, -1, -2)) / 2


@jax.jit
def _inside_and_outside(
    basis: Float[Array, "m P"],
    vectors: Float[Array, "m m"],
    values: Float[Array, " m"],
    weights: Float[Array, "m S"],
    sampled: Float[Array, " m"],
    rows: Float[Array, "B K P"],
    delta: Float[Array, ""],
) -> tuple[Float[Array, "B K m"], Float[Array, "B K P"], Float[Array, " B"]]:
    """Split J (G + delta)^-1/2 into the part along the Ritz vectors and that of the prior outside; return its share.

    `sampled` is 1 for pairs that the probes estimate, else 0.
    """
    along_basis = matmul(rows, basis.T)
    outside = (rows - matmul(along_basis, basis)) / jnp.sqrt(delta)
    known = matmul(along_basis, vectors) * jax.lax.rsqrt(values + delta)
    share = estimated_share(known, jnp.sum(outside**2, axis=(1, 2)), values, weights, sampled, delta)
    return known, outside, share


def _joined(rows: Float[Array, "B K p"]) -> Float[Array, "B*K p"]:
    return rows.reshape(-1, rows.shape[-1])
