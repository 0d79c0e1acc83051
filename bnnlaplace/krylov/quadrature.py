"""Stochastic Lanczos quadrature: the trace of a function of a symmetric operator, from products with it.

For a probe z with E[z z'] = I, tr f(A) = E[z' f(A) z]. K Lanczos steps from z approximate z' f(A) z by
|z|^2 e_1' f(T) e_1. This is a Gauss rule, exact for polynomials of degree 2 K - 1 (Golub and Meurant 1994; Ubaru, Chen
and Saad 2017). `quadratic_form.py` computes it for one probe, `deflation.py` removes leading eigenpairs, and this file
averages over probes, in batches, with the gradient computed along with the value.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import concatenated, floating
from bnnlaplace.krylov import finite
from bnnlaplace.krylov.checks import (
    check_count,
    check_decomposable,
    check_finite,
    check_flag,
    check_number,
    check_real,
)
from bnnlaplace.krylov.deflation import Eigenpairs, deflated_trace, deflation_rows, outside
from bnnlaplace.krylov.derivative_modes import once, once_in_reverse, reverse_only
from bnnlaplace.krylov.functions import Converted, scalar_function
from bnnlaplace.krylov.gram_schmidt import safe_norm
from bnnlaplace.krylov.operator import Settings, prepare
from bnnlaplace.krylov.quadratic_form import Form, cause_of_forms, quadratic_form

# The standard error of fewer probes is so uncertain that the loop would often stop by accident.
FEWEST_PROBES = 8


class TraceEstimate(NamedTuple):
    """An estimate of tr f(A) and its errors.

    Attributes
    ----------
    mean
        The estimate.
    sem
        Its standard error over probes, infinite for one probe. It does not include the truncation error.
    truncation
        The change of the mean over the last fifth of the Lanczos steps, which estimates the truncation error. It is
        zero if every probe found an invariant subspace, and infinite if the mean is not finite.
    num_probes
        The number of probes that were used.
    converged
        Whether the mean is finite and `relative_sem`, if given, was met. The mean is not finite if f is not at a Ritz
        value, as the logarithm of an operator that is not positive definite.
    """

    mean: Float[Array, ""]
    sem: Float[Array, ""]
    truncation: Float[Array, ""]
    num_probes: Int[Array, ""]
    converged: Bool[Array, ""]


class Plan(NamedTuple):
    """The static options of a call.

    Attributes
    ----------
    lanczos
        The options of each decomposition.
    gradient, relative_sem, semidefinite
        As for `stochastic_lanczos_quadrature`.
    batch_size
        The number of probes that are treated at once.
    deflated
        Whether eigenpairs were taken out.
    """

    lanczos: Settings
    gradient: str
    batch_size: int
    relative_sem: float | None
    deflated: bool
    semidefinite: bool


def stochastic_lanczos_quadrature(
    function: Callable[[Float[Array, ""]], Float[Array, ""]],
    matvec: Callable[..., PyTree],
    probes: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "quadrature", "autodiff"] = "adjoint",
    probe_batch_size: int = 1,
    vjp_batch_size: int = 1,
    relative_sem: float | None = None,
    deflation: Eigenpairs | None = None,
    semidefinite: bool = False,
) -> TraceEstimate:
    """Estimate tr f(A), differentiably.

    Parameters
    ----------
    function
        f, from a scalar to a scalar, smooth on the spectrum of A. It may close over traced arrays, such as a shift,
        which are differentiated as well.
    matvec, params, reorthogonalise, vjp_batch_size
        As for `lanczos`.
    num_matvecs
        The number K of Lanczos steps for each probe. The quadrature is exact for a probe once K reaches the number of
        distinct eigenvalues, which is at most the rank of A plus one.
    probes
        S probes z along the leading axis of each leaf, in float32 or float64, from `rademacher_probes` (smaller
        variance) or `normal_probes` (posterior samples can start from them). The rows of sqrt(n) times an orthogonal
        matrix give the exact trace as their mean.
    gradient
        The gradient of the mean in `params`, in the probes and in what `matvec` and `function` close over.

        "adjoint" is the exact derivative of the quadrature, by K further products and a vector-Jacobian product of K
        terms for each probe.

        "quadrature" uses d tr f(A) = E[(f'(A) z)' dA z], with f'(A) z from the decomposition at hand. It takes one
        vector-Jacobian product for each probe. It is unbiased, and up to truncation the derivative of the returned
        value.

        Both work in reverse mode only. For second derivatives of "quadrature" use jax.hessian: reverse mode twice takes
        as much memory as "autodiff".

        "autodiff" differentiates the loop, in any mode.
    probe_batch_size
        How many probes are treated at once. More are faster if products gain from batching. Each takes the memory of
        `lanczos`, also for the gradient, which is summed over batches.
    relative_sem
        Stop once sem <= relative_sem |mean|, after at least eight probes. By default all probes are used. It does not
        go with "autodiff".
    deflation
        Eigenpairs from `leading_eigenpairs`. Their f(theta) are summed exactly and the probes see only the rest of the
        space, so these pairs cause no variance. For exact eigenvectors the gradient is exact as well. Second
        derivatives depend on how the eigenvectors move: "adjoint" and "quadrature" refuse them, and "autodiff" leaves
        that part out.
    semidefinite
        Whether A has no negative eigenvalues. Ritz values below zero, or below 4 eps times the largest one, then count
        as zero, where f must be defined. Set it if A is singular and f changes much over that distance, as
        log(1 + x / delta) does for a small delta in single precision. The estimate would be noise otherwise.

    Returns
    -------
    TraceEstimate
        The estimate and its errors. Only `mean` has a gradient.

    Raises
    ------
    ValueError
        If an option is out of range or unknown, if `deflation` does not fit the probes, or if a probe is known to be
        zero or not finite.
    TypeError
        As for `lanczos`, if the probes are in half precision, if `function` does not take a scalar to a scalar, or if a
        derivative is asked for that does not exist.

    Notes
    -----
    Cost: S K products, and S K more for the adjoint. Call it inside of `jit`.

    Second derivatives are those of the estimated gradient. After a breakdown they are NaN, as for `lanczos`. At a
    breakdown in the last step they are those of the quadrature. These agree with the derivatives of tr f(A) as long as
    the Krylov space keeps its dimension, as it does for an operator of fixed rank.

    Source: Ubaru, Chen and Saad 2017; gradients: Krämer et al. 2024, arXiv 2405.17277, section 5; deflation: Gambhir,
    Stathopoulos and Orginos 2017.

    Examples
    --------
    >>> d = jnp.array([1.0, 2.0, 4.0])
    >>> probes = jnp.sqrt(3.0) * jnp.eye(3)  # or rademacher_probes(key, d, num_probes)
    >>> log_determinant = stochastic_lanczos_quadrature(jnp.log, lambda v: d * v, probes, num_matvecs=3).mean
    >>> bool(jnp.allclose(log_determinant, jnp.log(8.0), atol=1e-4))
    True
    """
    caller = "stochastic_lanczos_quadrature"
    checks.choice(gradient, f"{caller}(gradient=...)", ("adjoint", "quadrature", "autodiff"))
    probe_batch_size = check_count(caller, "probe_batch_size", probe_batch_size)
    semidefinite = check_flag(caller, "semidefinite", semidefinite)
    relative_sem = _check_relative_sem(caller, relative_sem, gradient)
    probes = check_real(caller, "probes", probes)
    count = _count(caller, probes)
    check_finite(caller, "probes", probes)
    first = jax.tree.map(lambda leaf: leaf[0], probes)
    options = {"num_matvecs": num_matvecs, "reorthogonalise": reorthogonalise, "vjp_batch_size": vjp_batch_size}
    operator, settings = prepare(caller, "probes", matvec, first, params, **options)
    check_decomposable(caller, "probes", operator.start.dtype)
    converted, constants = scalar_function(caller, function, operator.start.dtype)
    # Within shard_map the probes vary as the operator does: `operator.start` knows.
    rows = jax.vmap(concatenated)(jax.tree.map(jnp.asarray, probes)) + jnp.zeros_like(operator.start, shape=())
    offset = jnp.zeros_like(operator.start[0])
    if deflation is not None:
        vectors = deflation_rows(caller, deflation, first)
        offset = deflated_trace(converted, constants, operator.matvec, operator.arguments, vectors)
        rows = outside(vectors, rows)
    # Nothing may be left of a probe after deflation. Its form is zero. f need not be defined at zero, so the form is
    # computed for a vector of ones instead, and multiplied by zero.
    is_zero = ~jnp.any(rows != 0, axis=1)
    rows = jnp.where(is_zero[:, None], 1, rows)
    plan = Plan(settings, gradient, min(probe_batch_size, count), relative_sem, deflation is not None, semidefinite)
    inputs = offset, rows, jnp.where(is_zero, 0, jnp.ones_like(rows[:, 0])), operator.arguments, constants
    if gradient == "autodiff":
        mean, seen, _ = _run(converted, operator.matvec, plan, *inputs)
    else:
        run = partial(_differentiable_run, converted, operator.matvec, plan)
        mean, seen = reverse_only(run, f"{caller}(gradient={gradient!r})")(*inputs)
    fixed, seen = jax.lax.stop_gradient((offset, seen))
    form = Form(converted, operator.matvec, settings, semidefinite)
    cause = partial(cause_of_forms, form, seen.values, rows, operator.arguments, constants)
    finite.warn_unless_finite(caller, "a mean", mean, cause)
    is_finite = finite.is_finite(mean)
    truncation = jnp.where(is_finite, jnp.abs(jnp.sum(seen.changes) / seen.used), jnp.inf)
    return TraceEstimate(mean, _sem(seen), truncation, seen.used, is_finite & _is_precise(plan, fixed, seen))


class _Forms(NamedTuple):
    """The quadratic forms of the probes; zero for probes that were not used.

    Attributes
    ----------
    values
        z' f(A) z.
    changes
        Their change over the last fifth of the steps.
    used
        The number of probes that were used.
    """

    values: Float[Array, " S"]
    changes: Float[Array, " S"]
    used: Int[ArrayLike, ""]


def _forms(
    function: Converted, matvec: Callable, plan: Plan, batch: Array, arguments: tuple[Any, ...], constants: Any
) -> tuple[Array, Array]:
    """Return z' f(A) z for a batch of probes, and its change over the last fifth of the steps."""
    static = Form(function, matvec, plan.lanczos, plan.semidefinite)

    def form(probe: Array) -> tuple[Array, Array]:
        return quadratic_form(static, plan.gradient, probe, arguments, constants)

    # A batch of one is not mapped, so that a `cond` in the recurrence stays a choice between its branches.
    if len(batch) == 1:
        return jax.tree.map(lambda x: x[None], form(batch[0]))
    return jax.vmap(form)(batch)


def _run(
    function: Callable,
    matvec: Callable,
    plan: Plan,
    offset: Array,
    rows: Array,
    shares: Array,
    arguments: tuple[Any, ...],
    constants: tuple,
    *,
    with_gradient: bool = False,
) -> tuple[Array, _Forms, tuple | None]:
    """Average the forms of all probes, batch after batch; return offset + mean, the forms, and the mean's gradient.

    `shares` weighs the probes. The gradient is computed along with the forms, so that no decomposition outlives its
    batch.
    """
    num_probes, size = len(rows), plan.batch_size
    num_batches = math.ceil(num_probes / size)
    padded = num_batches * size
    # The last batch is filled up with copies of the first probe, which get the weight zero.
    weights = jnp.pad(shares, (0, padded - num_probes)).reshape(num_batches, size)
    batches = jnp.concatenate([rows, jnp.broadcast_to(rows[:1], (padded - num_probes, rows.shape[1]))])
    batches = batches.reshape(num_batches, size, -1)
    active = floating((arguments, constants))

    def total(batch: Array, leaves: list[Array], weight: Array) -> tuple[Array, tuple[Array, Array]]:
        values, changes = _forms(function, matvec, plan, batch, *active.fill(leaves))
        values, changes = weight * values, weight * changes
        return jnp.sum(values), (values, changes)

    def advance(i: Int[Array, ""], carry: tuple) -> tuple:
        values, changes, d_rows, d_leaves = carry
        batch = batches[i], active.leaves, weights[i]
        if with_gradient:
            (_, new), (d_batch, d_new) = jax.value_and_grad(total, (0, 1), has_aux=True)(*batch)
            d_rows, d_leaves = d_rows.at[i].set(d_batch), jax.tree.map(jnp.add, d_leaves, d_new)
        else:
            _, new = total(*batch)
        return values.at[i].set(new[0]), changes.at[i].set(new[1]), d_rows, d_leaves

    def forms(batches_done: Int[ArrayLike, ""], carry: tuple) -> _Forms:
        values, changes = (leaf.reshape(-1)[:num_probes] for leaf in carry[:2])
        return _Forms(values, changes, jnp.minimum(batches_done * size, num_probes))

    def unfinished(state: tuple) -> Array:
        seen = forms(*state)
        enough = (seen.used >= min(FEWEST_PROBES, num_probes)) & _is_precise(plan, offset, seen)
        return (state[0] < num_batches) & ~enough

    no_rows, no_leaves = jnp.zeros_like(batches), jax.tree.map(jnp.zeros_like, active.leaves)
    gradients = (no_rows, no_leaves) if with_gradient else (None, None)
    carry = jnp.zeros_like(weights), jnp.zeros_like(weights), *gradients
    if plan.relative_sem is None:
        done, carry = num_batches, jax.lax.fori_loop(0, num_batches, advance, carry)
    else:
        state = jnp.asarray(0), carry
        done, carry = jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, advance(*state)), state)
    seen = forms(done, carry)
    mean = offset + _mean(seen)
    if not with_gradient:
        return mean, seen, None
    # Sums over batches become means over the probes that were used, as the value is one.
    d_rows, d_leaves = jax.tree.map(lambda x: x / seen.used.astype(x.dtype), carry[2:])
    d_rows = d_rows.reshape(padded, -1)[:num_probes]
    # One entry for each of offset, rows, shares, arguments and constants.
    gradient = jnp.ones_like(mean), d_rows, jnp.zeros_like(shares), *active.cotangent(d_leaves)
    return mean, seen, _only_once(plan, gradient)


def _only_once(plan: Plan, gradient: Any) -> Any:
    """Return the gradient; its own derivatives raise an error if they would be wrong or do not exist."""
    caller = "stochastic_lanczos_quadrature"
    if plan.deflated:
        message = f"{caller}(deflation=...) has first derivatives only; leave it out for second ones"
        return once(gradient, message)
    return once_in_reverse(gradient, f"{caller}(relative_sem=...)") if plan.relative_sem is not None else gradient


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable_run(function: Callable, matvec: Callable, plan: Plan, *inputs: Any) -> tuple[Array, _Forms]:
    """`_run`, where the mean has the gradient that was computed along with it, and the forms have none."""
    return _run(function, matvec, plan, *inputs)[:2]


def _forward(function: Callable, matvec: Callable, plan: Plan, *inputs: Any) -> tuple[tuple[Array, _Forms], Any]:
    mean, seen, gradient = _run(function, matvec, plan, *inputs, with_gradient=True)
    return (mean, seen), gradient


def _backward(function: Callable, matvec: Callable, plan: Plan, gradient: Any, cotangent: tuple[Array, _Forms]) -> Any:
    del function, matvec, plan
    return jax.tree.map(lambda x: x * cotangent[0].astype(x.dtype), gradient)


_differentiable_run.defvjp(_forward, _backward)


def _mean(seen: _Forms) -> Array:
    return jnp.sum(seen.values) / seen.used


def _sem(seen: _Forms) -> Array:
    """The standard error of the mean over the probes that were used; infinite for one probe."""
    deviations = jnp.where(jnp.arange(len(seen.values)) < seen.used, seen.values - _mean(seen), 0)
    several = (jnp.maximum(seen.used - 1, 1) * seen.used).astype(deviations.dtype)
    return jnp.where(seen.used > 1, safe_norm(deviations) / jnp.sqrt(several), jnp.inf)


def _is_precise(plan: Plan, offset: Array, seen: _Forms) -> Array:
    """Whether `relative_sem` is met; true if it was not given."""
    if plan.relative_sem is None:
        return jnp.asarray(True)
    return _sem(seen) <= plan.relative_sem * jnp.abs(offset + _mean(seen))


def _check_relative_sem(caller: str, value: Any, gradient: str) -> float | None:
    if value is None:
        return None
    number = check_number(caller, "relative_sem", value, positive=True)
    if gradient == "autodiff":
        raise ValueError(
            f"{caller}(relative_sem=...) needs gradient='adjoint' or 'quadrature', since a loop that may stop cannot "
            f"be differentiated backwards; got {number} with gradient='autodiff'; leave it out to use all probes"
        )
    return number


def _count(caller: str, probes: PyTree) -> int:
    """Return the number of probes, the length of the leading axis that all leaves must share."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(probes)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"{caller}(probes=...) must have leaves with one leading axis, at least one probe long; got leading axes "
            f"{sorted(counts)}; draw them with rademacher_probes or normal_probes"
        )
    return counts.pop()[0]
