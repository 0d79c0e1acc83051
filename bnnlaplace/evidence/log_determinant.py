"""log det(I + P0^-1/2 G P0^-1/2), the part of the evidence that needs products: its sides, its probes, its derivatives.

Primal: M = P0^-1/2 G P0^-1/2 on P numbers. Dual: D = B' J P0^-1 J' B on outputs, with the same nonzero spectrum.

A scalar delta is a shift. The Lanczos vectors of G / delta from a probe do not depend on delta, and T is that of G over
delta. So G is decomposed, and delta enters through the function, log(1 + x / delta), and costs no product, nor do its
derivatives: they are those of the number that is returned.

One delta for each weight is none. d log det / d log delta_i = -[M (I + M)^-1]_ii, which is the mean over probes z of

    -z_i (M (I + M)^-1 z)_i,    M (I + M)^-1 z = |z| Q T (I + T)^-1 e_1 up to truncation.                         (P)

The right-hand side is known from the forward pass. Its sum over i is -|z|^2 e_1' T (I + T)^-1 e_1, the derivative of
the returned number in a factor common to all delta, whatever the truncation; for a single weight it is an unbiased
estimate where the recurrence has converged. On the dual side, with z as long as the outputs,

    -(P0^-1/2 J' B z)_i (P0^-1/2 J' B (I + D)^-1 z)_i                                                             (D)

has the same mean, and costs two products with J' B, as much as one more Lanczos step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from bnnlaplace.core.checks import is_key
from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import described
from bnnlaplace.core.types import Estimate
from bnnlaplace.curvature import ggn
from bnnlaplace.curvature.linearisation import Linearisation
from bnnlaplace.krylov import lanczos, rademacher_probes, stochastic_lanczos_quadrature
from bnnlaplace.krylov.breakdown import reached
from bnnlaplace.krylov.derivative_modes import once
from bnnlaplace.krylov.functions import convert
from bnnlaplace.krylov.tridiagonal import reached_eigenpairs, rounding_of_zero
from bnnlaplace.model.likelihood import Likelihood

Side = Literal["primal", "dual"]


class Problem(NamedTuple):
    """A linearised network, its likelihood and the side of the determinant.

    Attributes
    ----------
    linearised, likelihood, scale
        Where G comes from.
    side
        Whether Lanczos vectors have as many numbers as there are weights or outputs.
    """

    linearised: Linearisation
    likelihood: Likelihood
    scale: float
    side: Side

    def matvec(self, prior_precision: Float[Array, ""] | Float[Array, " P"] | float = 1.0) -> Callable[[Array], Array]:
        """v -> M v, or v -> D v."""
        if self.side == "dual":
            options = {"scale": self.scale, "prior_precision": prior_precision}
            return ggn.dual_operator(self.linearised, self.likelihood, **options).matvec
        product = ggn.ggn_operator(self.linearised, self.likelihood, scale=self.scale).matvec
        root = jax.lax.rsqrt(jnp.asarray(prior_precision, self.linearised.outputs.dtype))
        return lambda vector: root * product(root * vector)


class Rules(NamedTuple):
    """The Gauss rule of each probe: z' f(A) z = sum_k weights_k f(nodes_k), up to truncation.

    Attributes
    ----------
    nodes
        Ritz values.
    weights
        |z|^2 times the squares of the first entries of the eigenvectors of T; zero after a breakdown.
    """

    nodes: Float[Array, "S K"]
    weights: Float[Array, "S K"]


def choose_side(caller: str, side: str, probes: Array, num_weights: int, num_outputs: int) -> Side:
    """The side that is asked for; for "auto" the one that fits the rows, or for a key the one with shorter vectors.

    Raises
    ------
    ValueError
        If `side` is unknown, or rows fit neither side or not the one that is asked for.
    """
    lengths = {"primal": num_weights, "dual": num_outputs}
    if side not in (*lengths, "auto"):
        raise ValueError(f"{caller}(side=...) must be 'primal', 'dual' or 'auto'; got {side!r}")
    if is_key(probes):
        return min(lengths, key=lengths.__getitem__) if side == "auto" else side
    fitting = [name for name, length in lengths.items() if np.shape(probes)[1:] == (length,) and side in (name, "auto")]
    if not fitting:
        wanted = " or ".join(f"{lengths[name]} ({name})" for name in lengths if side in (name, "auto"))
        raise ValueError(
            f"{caller}(probes=...) must be a random key or have rows of {wanted} numbers; got {described(probes)}; "
            "try a key with num_probes=10"
        )
    return fitting[0]


def rows_of(caller: str, probes: Array, num_probes: int | None, size: int, dtype: Any) -> Float[Array, "S V"]:
    """The probes as they are, or Rademacher ones drawn from a key.

    Raises
    ------
    ValueError
        If `num_probes` is left out with a key, or given with rows of another number.
    """
    if is_key(probes):
        if num_probes is None:
            raise ValueError(f"{caller}(num_probes=...) must be given where probes is a random key; try 10")
        return rademacher_probes(probes, jnp.zeros(size, dtype), num_probes)
    if len(probes) == 0:
        raise ValueError(f"{caller}(probes=...) must have at least one row; got none; try a key with num_probes=10")
    if num_probes not in (None, len(probes)):
        raise ValueError(
            f"{caller}(num_probes=...) must be the number of rows of probes, {len(probes)}, or left out; got "
            f"{num_probes}; pass a random key to have them drawn"
        )
    return probes


def estimate(
    problem: Problem,
    prior_precision: Float[Array, ""] | Float[Array, " P"],
    rows: Float[Array, "S V"],
    *,
    num_matvecs: int,
    gradient: Literal["adjoint", "quadrature", "autodiff"],
    probe_batch_size: int,
) -> Estimate:
    """The log-determinant, differentiable in everything as `gradient` says."""
    is_scalar = jnp.ndim(prior_precision) == 0
    found = stochastic_lanczos_quadrature(
        (lambda x: jnp.log1p(x / prior_precision)) if is_scalar else jnp.log1p,
        problem.matvec() if is_scalar else problem.matvec(prior_precision),
        rows,
        num_matvecs=num_matvecs,
        gradient=gradient,
        probe_batch_size=probe_batch_size,
        semidefinite=True,
    )
    return Estimate(found.mean, found.sem)


def rules(problem: Problem, rows: Float[Array, "S V"], *, num_matvecs: int, probe_batch_size: int) -> Rules:
    """The Gauss rules for G itself, or for the dual with P0 = I: S K products. They have no derivatives."""

    def rule(probe: Float[Array, " V"]) -> tuple[Array, Array]:
        return _gauss_rule(matvec, probe, num_matvecs)[:2]

    matvec, batches = problem.matvec(), _batches(rows, probe_batch_size)
    found = jax.lax.map(lambda batch: _each(rule, batch), batches)
    return Rules(*(part.reshape(len(rows), -1) for part in found))


def forward_estimate(
    caller: str,
    problem: Problem,
    prior_precision: Float[Array, " P"],
    rows: Float[Array, "S V"],
    *,
    num_matvecs: int,
    probe_batch_size: int,
) -> Estimate:
    """The log-determinant, whose derivative in `prior_precision` is (P) or (D); in anything else it raises an error."""

    def values_and_slope(delta: Float[Array, " P"], rows: Float[Array, "S V"]) -> tuple[Array, Array]:
        slope = _primal_slope if problem.side == "primal" else _dual_slope

        def form(probe: Float[Array, " V"]) -> tuple[Array, Array]:
            nodes, weights, response = _gauss_rule(problem.matvec(delta), probe, num_matvecs)
            return jnp.sum(weights * jnp.log1p(nodes)), slope(problem, delta, probe, response)

        def add(total: Array, batch: Array) -> tuple[Array, Array]:
            values, slopes = _each(form, batch)
            return total + jnp.sum(slopes, axis=0), values

        total, values = jax.lax.scan(add, jnp.zeros_like(delta), _batches(rows, probe_batch_size))
        return values.reshape(-1), total / len(rows)

    converted, constants = convert(values_and_slope, prior_precision, rows)

    @jax.custom_jvp
    def run(delta: Array, rows: Array, constants: list[Array]) -> Array:
        return converted(delta, rows, *constants)[0]

    def tangent(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        d_delta, *others = tangents
        if not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(others)):
            raise TypeError(
                f"{caller}(gradient='forward') has derivatives in prior_precision and prior_mean only; got one in "
                "something else; use gradient='adjoint'"
            )
        delta, rows, constants = primals
        values, slope = converted(delta, rows, *constants)
        slope = once(slope, f"{caller}(gradient='forward') has first derivatives only; use gradient='autodiff'")
        # The same for all probes: of a sum over them only the mean has a meaning, as for the other gradients.
        return values, jnp.broadcast_to(jnp.sum(slope * d_delta / delta), values.shape)

    run.defjvp(tangent, symbolic_zeros=True)
    return mean_and_sem(run(prior_precision, rows, constants))


def mean_and_sem(forms: Float[Array, "*shape S"]) -> Estimate:
    """Over probes, along the last axis; the error is infinite for one probe, and has no derivative."""
    count, fixed = forms.shape[-1], jax.lax.stop_gradient(forms)
    mean = jnp.mean(forms, axis=-1)
    sem = jnp.std(fixed, axis=-1, ddof=1) / count**0.5 if count > 1 else jnp.full_like(mean, jnp.inf)
    return Estimate(mean, jax.lax.stop_gradient(sem))


def _batches(rows: Float[Array, "S V"], most: int) -> Float[Array, "num size V"]:
    """Equal batches of at most `most` rows, as large as leaves no rest."""
    if most < 1:
        raise ValueError(f"probe_batch_size=... must be at least 1; got {most}")
    size = max(number for number in range(1, min(most, len(rows)) + 1) if len(rows) % number == 0)
    return rows.reshape(-1, size, rows.shape[1])


def _each(function: Callable, batch: Float[Array, "size V"]) -> Any:
    """`function` of each row; choices in the recurrence remain choices where nothing is batched."""
    if len(batch) == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(batch[0]))
    return jax.vmap(function)(batch)


class Response(NamedTuple):
    """A (I + A)^-1 z and (I + A)^-1 z as coordinates in the basis of the Krylov space."""

    basis: Float[Array, "K V"]
    shrunk: Float[Array, " K"]
    inverse: Float[Array, " K"]


def _gauss_rule(matvec: Callable, probe: Array, num_matvecs: int) -> tuple[Array, Array, Response]:
    steps = lanczos(matvec, probe, num_matvecs=num_matvecs, gradient="autodiff")
    alive = reached(steps.breakdown_step, num_matvecs)
    values, vectors = reached_eigenpairs(steps.diagonal, steps.off_diagonal, alive)
    # As `semidefinite` has it elsewhere.
    values = jnp.where(values > rounding_of_zero(values), values, 0)
    first = steps.start_norm * vectors[0]
    inverse, shrunk = (matmul(vectors, first * f(values)) for f in (lambda x: 1 / (1 + x), lambda x: x / (1 + x)))
    return values, steps.start_norm * vectors[0] * first, Response(steps.basis, shrunk, inverse)


def _primal_slope(problem: Problem, delta: Array, probe: Array, response: Response) -> Float[Array, " P"]:
    """(P)."""
    del problem, delta
    return -probe * matmul(response.shrunk, response.basis)


def _dual_slope(problem: Problem, delta: Array, probe: Array, response: Response) -> Float[Array, " P"]:
    """(D)."""
    pull = ggn.dual_pullback(problem.linearised, problem.likelihood, scale=problem.scale)
    return -pull(probe) * pull(matmul(response.inverse, response.basis)) / delta
