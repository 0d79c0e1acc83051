"""The GGN as a block Krylov decomposition: any network whose products can be computed, nothing formed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnnlaplace import krylov
from bnnlaplace.core.linalg import einsum, matmul
from bnnlaplace.core.tree import group_sums


class KrylovError(NamedTuple):
    """What stopping the recurrence costs at one prior precision; the randomness of the probes is no part of it.

    Attributes
    ----------
    prior_precision
        delta.
    sample
        Bound on |e|_{G + delta I} / sqrt(effective number of parameters), root mean square over the posterior samples.
    log_determinant
        How far truncation lifts the mean over probes of the log-determinant at most: the width of the bracket between
        the Gauss and the Gauss-Radau rule, both from these probes. Other probes would move the whole bracket, by its
        standard error.
    effective_parameters
        tr G (G + delta I)^-1, the number of directions that the data determine.
    """

    prior_precision: float
    sample: float
    log_determinant: float
    effective_parameters: float


class KrylovStructure(NamedTuple):
    """A block Krylov decomposition of G from normal probes.

    One decomposition gives, at every prior precision, the log-determinant, its slope and as many posterior samples as
    there were probes. Memory: the basis, m P numbers on the device, of which no method makes a copy; the rest is small,
    in float64 on the host.

    Attributes
    ----------
    decomposition, ritz
        See `bnnlaplace.krylov`.
    radau_nodes, radau_weights
        The Gauss-Radau rule that bounds the log-determinant from below; shapes (m + S,) and (m + S, S).
    tolerance
        The relative error of a sample from which on it counts as converged.
    """

    decomposition: krylov.BlockDecomposition
    ritz: krylov.Ritz
    radau_nodes: Float[np.ndarray, " m+S"]
    radau_weights: Float[np.ndarray, "m+S S"]
    tolerance: np.float64 = np.float64(0.1)

    @classmethod
    def from_decomposition(cls, decomposition: krylov.BlockDecomposition, tolerance: float = 0.1) -> "KrylovStructure":
        """Diagonalise the small matrices behind the two quadrature rules."""
        ritz = krylov.ritz(decomposition)
        return cls(decomposition, ritz, *krylov.gauss_radau(decomposition, ritz), np.float64(tolerance))

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "KrylovStructure":
        """Rebuild from its fields by name, as a checkpoint holds them; the small matrices stay on the host."""
        decomposition = krylov.BlockDecomposition(**arrays["decomposition"])
        decomposition = decomposition._replace(basis=jnp.asarray(decomposition.basis))
        ritz, radau = krylov.Ritz(**arrays["ritz"]), (arrays["radau_nodes"], arrays["radau_weights"])
        return cls(decomposition, ritz, *radau, np.float64(arrays.get("tolerance", 0.1)))

    def whitened(self, relative: Float[Array, " P"]) -> "KrylovStructure":
        """Itself where nothing changes.

        Raises
        ------
        ValueError
            Otherwise: another whitening has another Krylov space, which takes products to find.
        """
        if not np.allclose(relative, 1, rtol=1e-6):
            raise ValueError(
                "a Krylov decomposition must be fitted at the ratios of the prior precisions that it is used with, as "
                "its space depends on them; construct Laplace(prior_precision=...) with them and fit again, or pass "
                "optimize_prior_precision(refit=lambda la: la.fit(data, key=key))"
            )
        return self

    def scaled(self, factor: float) -> "KrylovStructure":
        """That of factor * G: the same basis."""
        decomposition = self.decomposition._replace(
            tridiagonal=factor * self.decomposition.tridiagonal, residual=factor * self.decomposition.residual
        )
        ritz = self.ritz._replace(
            values=factor * self.ritz.values,
            couplings=abs(factor) * self.ritz.couplings,
            tails=factor * self.ritz.tails,
        )
        return self._replace(decomposition=decomposition, ritz=ritz, radau_nodes=factor * self.radau_nodes)

    @property
    def num_probes(self) -> int:
        """The number of probes, and of posterior samples."""
        return len(self.decomposition.start)

    def log_determinant(self, prior_precision: float) -> Float[np.ndarray, " S"]:
        """log det(I + G / delta) as each probe estimates it; converged eigenpairs enter all of them exactly."""
        return krylov.trace_forms(self.ritz, lambda values: np.log1p(values / prior_precision))

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " S"]:
        """How far, at most, stopping the recurrence lifts each probe's log-determinant: Gauss minus Gauss-Radau."""
        upper = np.log1p(self.ritz.values / prior_precision) @ self.ritz.weights**2
        lower = np.log1p(self.radau_nodes / prior_precision) @ self.radau_weights**2
        return np.maximum(upper - lower, 0.0)

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "S g"]:
        """tr_g G (G + delta I)^-1 as each probe estimates it.

        Converged eigenpairs x_j enter exactly, by theta_j / (theta_j + delta) |x_j|_g^2; of the rest a probe sees
        E z_g' (f(G) z)_g, with z less what lies along those eigenpairs. Memory: a block of S vectors besides the basis.
        """
        ratio = self.ritz.values / (self.ritz.values + prior_precision)
        exact = krylov.summed_exactly(self.ritz)
        basis, count = self.decomposition.basis, self.num_probes
        known = np.zeros(int(groups.max()) + 1)
        vectors = self.ritz.vectors[:, exact].T
        for first in range(0, len(vectors), count):
            chosen = matmul(jnp.asarray(vectors[first : first + count], basis.dtype), basis)
            known += ratio[exact][first : first + count] @ group_sums(chosen**2, groups)
        seen, images = (
            matmul(jnp.asarray((self.ritz.vectors[:, ~exact] @ part).T, basis.dtype), basis)
            for part in (self.ritz.weights[~exact], ratio[~exact, None] * self.ritz.weights[~exact])
        )
        return known + group_sums(seen * images, groups)

    def error(self, prior_precision: float) -> KrylovError:
        """Bounds on the error of stopping here, at one prior precision."""
        values = self.ritz.values
        effective = krylov.trace_forms(self.ritz, lambda theta: theta / (theta + prior_precision)).mean()
        bound = krylov.inverse_sqrt_error(self.ritz, prior_precision)
        sample = np.sqrt(np.mean(bound**2) / max(effective, np.finfo(values.dtype).tiny))
        truncation = self.truncation(prior_precision).mean()
        return KrylovError(float(prior_precision), float(sample), float(truncation), float(effective))

    def has_converged(self, error: KrylovError) -> bool:
        """Whether samples are within the tolerance, and truncation is below the log-determinant's standard error.

        Truncation below 0.1 nat is negligible whatever the standard error.
        """
        forms = self.log_determinant(error.prior_precision)
        sem = forms.std(ddof=1) / np.sqrt(len(forms)) if len(forms) > 1 else 0.0
        return bool(error.sample <= self.tolerance and error.log_determinant <= max(0.1, sem))

    def reservation(self, prior_precision: float) -> str | None:
        """What to know before using it at a prior precision: that it has not converged there; None where it has."""
        error = self.error(prior_precision)
        if self.has_converged(error):
            return None
        return (
            f"the Krylov decomposition has not converged with {len(self.ritz.values)} vectors: at prior precision "
            f"{prior_precision:.3g} a posterior sample can be off by {100 * error.sample:.0f} % and the "
            f"log-determinant by {error.log_determinant:.2g} nats"
        )

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v from above: what lies outside the basis counts with the prior's precision alone.

        In float64, as the part outside is a difference. Memory: S rows of the basis are on the host at a time.
        """
        basis, count = self.decomposition.basis, self.num_probes
        blocks = (jax.lax.dynamic_slice_in_dim(basis, first, count) for first in range(0, len(basis), count))
        inside = np.concatenate([np.asarray(block, np.float64) @ vector for block in blocks])
        along = self.ritz.vectors.T @ inside
        outside = max(vector @ vector - inside @ inside, 0.0)
        return float(np.sum(along**2 / (self.ritz.values + prior_precision)) + outside / prior_precision)

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows (G + delta I)^-1/2 z for probes z drawn without replacement, with random signs.

        Raises
        ------
        ValueError
            If more samples are asked for than there were probes.
        """
        return matmul(self._coefficients(key, num_samples, prior_precision), self.decomposition.basis)

    def function_samples(
        self, pushforward: Callable[[Array], Array], key: Array, num_samples: int, precisions: Sequence[float]
    ) -> Iterator[Float[Array, "S B ... C"]]:
        """J times samples at each prior precision: J times the basis once, then small matrix products.

        Or J times the samples where those are fewer than the basis vectors. Memory: the images, B C numbers for each of
        the m basis vectors or S samples.
        """
        if len(precisions) * num_samples < len(self.decomposition.basis):
            for precision in precisions:
                yield pushforward(self.samples(key, num_samples, precision))
            return
        images = pushforward(self.decomposition.basis)
        for precision in precisions:
            yield einsum("sm,m...->s...", self._coefficients(key, num_samples, precision), images)

    def _coefficients(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S m"]:
        if num_samples > self.num_probes:
            raise ValueError(
                f"a Krylov posterior gives one sample per probe: num_samples must be at most {self.num_probes}; got "
                f"{num_samples}; fit with num_probes={num_samples} or more"
            )
        key_order, key_sign = jax.random.split(key)
        chosen = jax.random.permutation(key_order, self.num_probes)[:num_samples]
        signs = jax.random.rademacher(key_sign, (num_samples, 1))
        coefficients = krylov.inverse_sqrt_coefficients(self.ritz, prior_precision)
        return signs * jnp.asarray(coefficients, self.decomposition.basis.dtype)[chosen]
