"""log det(I + P0^-1/2 G P0^-1/2): the part of the evidence that needs products with the GGN.

There are two sides with the same nonzero spectrum. Primal: M = P0^-1/2 G P0^-1/2 acts on vectors of P numbers. Dual:
D = B' J P0^-1 J' B acts on vectors with one number for each output.

Derivative in a scalar delta. A scalar delta only scales the matrix. So the Lanczos vectors of G / delta from a probe do
not depend on delta, and its tridiagonal matrix is that of G divided by delta. G is decomposed once, and delta enters
through the function log(1 + x / delta). Neither the value nor any derivative costs another product, and the derivatives
are those of the number that is returned.

Derivative in one delta for each weight. The matrix is not just scaled, but its derivative is a diagonal,
d log det / d log delta_i = -[M (I + M)^-1]_ii, which is the mean over probes z of

    -z_i (M (I + M)^-1 z)_i,    M (I + M)^-1 z = |z| Q T (I + T)^-1 e_1 up to truncation.                         (P)

The forward pass knows the right-hand side. Its sum over i is -|z|^2 e_1' T (I + T)^-1 e_1. This is the derivative of
the returned number in a common factor of all delta, whatever the truncation. For a single weight it is an unbiased
estimate if the recurrence has converged. On the dual side z has one number for each output, and

    -(P0^-1/2 J' B z)_i (P0^-1/2 J' B (I + D)^-1 z)_i                                                             (D)

has the same mean. It costs two products with J' B, as much as one more Lanczos step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Float, Key, Num, UInt32

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import described
from bnnlaplace.core.types import AnyArray, Estimate
from bnnlaplace.curvature import ggn
from bnnlaplace.curvature.linearisation import Linearisation
from bnnlaplace.krylov import lanczos, rademacher_probes, stochastic_lanczos_quadrature
from bnnlaplace.krylov.breakdown import reached
from bnnlaplace.krylov.derivative_modes import once
from bnnlaplace.krylov.functions import convert
from bnnlaplace.krylov.tridiagonal import reached_eigenpairs, rounding_of_zero
from bnnlaplace.model.likelihood import Likelihood

Side = Literal["primal", "dual"]
# Rows of probes, or the random key (new or raw) that they are drawn from.
Probes = Float[AnyArray, "S V"] | Key[Array, ""] | UInt32[AnyArray, " k"]


class Problem(NamedTuple):
    """The determinant to be computed: the network and likelihood of the GGN, and the side.

    Attributes
    ----------
    linearised, likelihood, scale
        The linearised network, the likelihood and the scale that define G.
    side
        "primal" if Lanczos vectors have one number for each weight, "dual" if they have one for each output.
    """

    linearised: Linearisation
    likelihood: Likelihood
    scale: Num[ArrayLike, ""]
    side: Side

    def matvec(self, prior_precision: Float[ArrayLike, ""] | Float[Array, " P"] = 1.0) -> Callable[[Array], Array]:
        """Return v -> M v on the primal side, v -> D v on the dual side."""
        if self.side == "dual":
            options = {"scale": self.scale, "prior_precision": prior_precision}
            return ggn.dual_operator(self.linearised, self.likelihood, **options).matvec
        product = ggn.ggn_operator(self.linearised, self.likelihood, scale=self.scale).matvec
        # M = P0^-1/2 G P0^-1/2: whitening is two elementwise products with a diagonal.
        root = jax.lax.rsqrt(jnp.asarray(prior_precision, self.linearised.outputs.dtype))
        return lambda vector: root * product(root * vector)


class Rules(NamedTuple):
    """The Gauss rule of each probe: z' f(A) z = sum_k weights_k f(nodes_k), up to truncation.

    Attributes
    ----------
    nodes
        The Ritz values, eigenvalues of the tridiagonal matrix T.
    weights
        |z|^2 times the squares of the first entries of the eigenvectors of T; zero after a breakdown.
    """

    nodes: Float[Array, "S K"]
    weights: Float[Array, "S K"]


def choose_side(caller: str, side: str, probes: Probes, num_weights: int, num_outputs: int) -> Side:
    """Return the side that is asked for. "auto" is the side that rows of probes fit, or for a key the shorter one.

    Raises
    ------
    ValueError
        If `side` is unknown, or rows of probes do not fit the side, or either side for "auto".
    """
    lengths = {"primal": num_weights, "dual": num_outputs}
    checks.choice(side, f"{caller}(side=...)", (*lengths, "auto"))
    if checks.is_key(probes):
        return min(lengths, key=lengths.__getitem__) if side == "auto" else side
    allowed = [name for name in lengths if side in (name, "auto")]
    fitting = [name for name in allowed if np.shape(probes)[1:] == (lengths[name],)]
    if not fitting:
        wanted = " or ".join(f"{lengths[name]} ({name})" for name in allowed)
        raise ValueError(
            f"{caller}(probes=...) must be a random key or have rows of {wanted} numbers; got {described(probes)}; "
            "try a key with num_probes=10"
        )
    return fitting[0]


def rows_of(caller: str, probes: Probes, num_probes: int | None, size: int, dtype: Any) -> Float[AnyArray, "S V"]:
    """Return the rows of probes as they are, or draw Rademacher probes from a key.

    Raises
    ------
    ValueError
        If `num_probes` is left out with a key, or differs from the number of rows.
    """
    if checks.is_key(probes):
        if num_probes is None:
            raise ValueError(f"{caller}(num_probes=...) must be given if probes is a random key; got None; try 10")
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
    rows: Float[AnyArray, "S V"],
    *,
    num_matvecs: int,
    gradient: Literal["adjoint", "quadrature", "autodiff"],
    probe_batch_size: int,
) -> Estimate:
    """Estimate the log-determinant. It is differentiable in everything, in the way that `gradient` names."""
    # A scalar stays out of the products: it enters through the function alone.
    is_scalar = jnp.ndim(prior_precision) == 0
    trace = stochastic_lanczos_quadrature(
        (lambda x: jnp.log1p(x / prior_precision)) if is_scalar else jnp.log1p,
        problem.matvec() if is_scalar else problem.matvec(prior_precision),
        rows,
        num_matvecs=num_matvecs,
        gradient=gradient,
        probe_batch_size=probe_batch_size,
        semidefinite=True,
    )
    return Estimate(trace.mean, trace.sem)


def rules(problem: Problem, rows: Float[AnyArray, "S V"], *, num_matvecs: int, probe_batch_size: int) -> Rules:
    """Compute the Gauss rules of G itself, or of the dual matrix with P0 = I, by S K products. No derivatives."""

    def rule(probe: Float[Array, " V"]) -> tuple[Array, Array]:
        return _gauss_rule(matvec, probe, num_matvecs)[:2]

    matvec, batches = problem.matvec(), _batches(rows, probe_batch_size)
    nodes, weights = jax.lax.map(lambda batch: _each(rule, batch), batches)
    return Rules(nodes.reshape(len(rows), -1), weights.reshape(len(rows), -1))


def forward_estimate(
    caller: str,
    problem: Problem,
    prior_precision: Float[Array, " P"],
    rows: Float[AnyArray, "S V"],
    *,
    num_matvecs: int,
    probe_batch_size: int,
) -> Estimate:
    """Estimate the log-determinant, with (P) or (D) as its derivative in `prior_precision`.

    A derivative in anything else raises TypeError.
    """

    def values_and_slope(delta: Float[Array, " P"], rows: Float[Array, "S V"]) -> tuple[Array, Array]:
        slope = _primal_slope if problem.side == "primal" else _dual_slope

        def form(probe: Float[Array, " V"]) -> tuple[Array, Array]:
            nodes, weights, response = _gauss_rule(problem.matvec(delta), probe, num_matvecs)
            return jnp.sum(weights * jnp.log1p(nodes)), slope(problem, delta, probe, response)

        # The slopes have P numbers each, so they are summed as the batches run.
        def add(total: Array, batch: Array) -> tuple[Array, Array]:
            values, slopes = _each(form, batch)
            return total + jnp.sum(slopes, axis=0), values

        total, values = jax.lax.scan(add, jnp.zeros_like(delta), _batches(rows, probe_batch_size))
        return values.reshape(-1), total / len(rows)

    # A custom rule must not close over traced arrays. `convert` turns those that `problem` holds into arguments.
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
        # Differentiated again, (P) or (D) would not give the second derivative of the value.
        slope = once(slope, f"{caller}(gradient='forward') has first derivatives only; use gradient='autodiff'")
        # (P) and (D) estimate the derivative of the mean over probes, so every probe gets this mean.
        return values, jnp.broadcast_to(jnp.sum(slope * d_delta / delta), values.shape)

    run.defjvp(tangent, symbolic_zeros=True)
    return mean_and_sem(run(prior_precision, rows, constants))


def mean_and_sem(forms: Float[Array, "*shape S"]) -> Estimate:
    """Average over probes, along the last axis. The standard error is infinite for one probe, and has no derivative."""
    # The error is a diagnostic. Without `stop_gradient` its derivative would be NaN if all probes agree.
    count, fixed = forms.shape[-1], jax.lax.stop_gradient(forms)
    mean = jnp.mean(forms, axis=-1)
    sem = jnp.std(fixed, axis=-1, ddof=1) / count**0.5 if count > 1 else jnp.full_like(mean, jnp.inf)
    return Estimate(mean, jax.lax.stop_gradient(sem))


def _batches(rows: Float[AnyArray, "S V"], probe_batch_size: int) -> Float[AnyArray, "num size V"]:
    """Cut rows into equal batches of at most `probe_batch_size`, the largest that leave no remainder."""
    limit = min(checks.count(probe_batch_size, "probe_batch_size=..."), len(rows))
    # Without a remainder one compiled program serves all batches.
    size = max(number for number in range(1, limit + 1) if len(rows) % number == 0)
    return rows.reshape(-1, size, rows.shape[1])


def _each(function: Callable, batch: Float[Array, "size V"]) -> Any:
    """Apply `function` to each row of a batch."""
    # Under `vmap` both branches of a `cond` in the recurrence are computed. A single row does without.
    if len(batch) == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(batch[0]))
    return jax.vmap(function)(batch)


class Response(NamedTuple):
    """A basis of the Krylov space, and A (I + A)^-1 z (`shrunk`) and (I + A)^-1 z (`inverse`) as coordinates in it."""

    basis: Float[Array, "K V"]
    shrunk: Float[Array, " K"]
    inverse: Float[Array, " K"]


def _gauss_rule(matvec: Callable, probe: Array, num_matvecs: int) -> tuple[Array, Array, Response]:
    """Run Lanczos from one probe: nodes and weights of its Gauss rule, and its images under functions of A."""
    steps = lanczos(matvec, probe, num_matvecs=num_matvecs, gradient="autodiff")
    alive = reached(steps.breakdown_step, num_matvecs)
    values, vectors = reached_eigenpairs(steps.diagonal, steps.off_diagonal, alive)
    # A is semidefinite, so values within rounding of zero are zero, as in `stochastic_lanczos_quadrature`.
    values = jnp.where(values > rounding_of_zero(values), values, 0)
    # z = |z| q_1, so f(A) z has the coordinates |z| U f(theta) U' e_1 in the basis, with the eigenvectors U of T.
    first = steps.start_norm * vectors[0]
    inverse, shrunk = (matmul(vectors, first * f(values)) for f in (lambda x: 1 / (1 + x), lambda x: x / (1 + x)))
    return values, steps.start_norm * vectors[0] * first, Response(steps.basis, shrunk, inverse)


def _primal_slope(problem: Problem, delta: Array, probe: Array, response: Response) -> Float[Array, " P"]:
    """Evaluate equation (P) for one probe."""
    del problem, delta
    return -probe * matmul(response.shrunk, response.basis)


def _dual_slope(problem: Problem, delta: Array, probe: Array, response: Response) -> Float[Array, " P"]:
    """Evaluate equation (D) for one probe; dividing by delta is multiplying each factor by delta^-1/2."""
    pull = ggn.dual_pullback(problem.linearised, problem.likelihood, scale=problem.scale)
    return -pull(probe) * pull(matmul(response.inverse, response.basis)) / delta
