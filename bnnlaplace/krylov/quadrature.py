"""Stochastic Lanczos quadrature: the trace of a function of a symmetric operator, from products with it.

For a probe z with E[z z'] = I, tr f(A) = E[z' f(A) z]. K Lanczos steps from z give z' f(A) z = |z|^2 e_1' f(T) e_1, but
for truncation: a Gauss rule, exact for polynomials of degree 2 K - 1 (Golub and Meurant 1994; Ubaru, Chen and Saad
2017).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bnnlaplace.core.tree import concatenated, floating
from bnnlaplace.krylov.checks import (
    check_choice,
    check_count,
    check_decomposable,
    check_finite,
    check_number,
    check_real,
)
from bnnlaplace.krylov.deflation import Eigenpairs, deflated_trace, deflation_rows, outside
from bnnlaplace.krylov.derivative_modes import once, once_in_reverse, reverse_only
from bnnlaplace.krylov.functions import Converted, scalar_function
from bnnlaplace.krylov.gram_schmidt import safe_norm
from bnnlaplace.krylov.operator import Settings, prepare
from bnnlaplace.krylov.quadratic_form import Form, quadratic_form

# A stop that looks at the standard error of fewer probes would often be an accident.
FEWEST_PROBES = 8


class TraceEstimate(NamedTuple):
    """An estimate of tr f(A) and its errors.

    Attributes
    ----------
    mean
        The estimate.
    sem
        Its standard error over probes; infinite for one probe. It knows nothing of truncation.
    truncation
        How much the mean changed over the last fifth of the Lanczos steps: an estimate of what stopping there costs,
        zero where every probe found an invariant subspace.
    num_probes
        How many probes were used.
    converged
        Whether the `relative_sem` that was asked for is met; true if none was.
    """

    mean: Float[Array, ""]
    sem: Float[Array, ""]
    truncation: Float[Array, ""]
    num_probes: Int[Array, ""]
    converged: Bool[Array, ""]


class Plan(NamedTuple):
    """The static part of a call."""

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
    matvec, params, num_matvecs, reorthogonalise, vjp_batch_size
        As for `lanczos`. Exact for each probe once `num_matvecs` reaches the number of distinct eigenvalues, which the
        rank plus one bounds.
    probes
        z along the leading axis of each leaf, S of them, of `rademacher_probes` or `normal_probes`; or the rows of
        sqrt(n) times an orthogonal matrix, whose mean is the exact trace. Rademacher has the smaller variance; normal
        probes are what posterior samples start from.
    gradient
        Of the mean, in `params`, in the probes and in what `matvec` and `function` close over. "adjoint": the exact
        derivative of the quadrature, by K further products and a vector-Jacobian product of K terms a probe.
        "quadrature": d tr f(A) = E[(f'(A) z)' dA z], with f'(A) z from the decomposition at hand: one vector-Jacobian
        product a probe; unbiased, but the derivative of the returned value only up to truncation. Both in reverse mode
        only; for second derivatives of "quadrature" take jax.hessian, since in reverse mode twice they take memory as
        "autodiff" does. "autodiff": through the loop, in any mode.
    probe_batch_size
        Probes at once: more are faster where products gain from batching. Each takes the memory of `lanczos`, for the
        gradient, too, which is summed as batches pass.
    relative_sem
        Stop once sem <= relative_sem |mean|, after the first eight probes or later; else all probes are used. Not with
        "autodiff".
    deflation
        Of `leading_eigenpairs`. Their f(theta) are summed exactly, and probes see the rest of the space only: the
        variance that they would cause is gone. For exact eigenvectors the gradient is exact as well. Second derivatives
        would need to know how eigenvectors move: "adjoint" and "quadrature" refuse them, and those of "autodiff" leave
        it out.
    semidefinite
        A has no negative eigenvalues, and f is defined at zero: Ritz values below 4 eps times the largest one, or below
        zero, are rounding of zero and count as such. Where A is singular and f changes much over that distance, as
        log(1 + x / delta) with a small delta in single precision, the estimate is noise otherwise.

    Returns
    -------
    TraceEstimate
        Only `mean` has a gradient.

    Raises
    ------
    ValueError
        If an option is out of range or unknown, `deflation` does not fit the probes, or, outside of `jit`, a probe is
        zero or not finite.
    TypeError
        As for `lanczos`, with the structure of one probe, of float32 or float64; if `function` does not take a scalar
        to a scalar; and if a derivative is asked for that is not there.

    Notes
    -----
    Cost: S K products, S K more for the adjoint. Call it within `jit`. Second derivatives are those of the estimate of
    the gradient; past a breakdown they are NaN, as for `lanczos`. At a breakdown in the last step they are those of the
    quadrature, which are those of tr f(A) as long as the space keeps its dimension, as for an operator of fixed rank.

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
    check_choice(caller, "gradient", gradient, ("adjoint", "quadrature", "autodiff"))
    probe_batch_size = check_count(caller, "probe_batch_size", probe_batch_size)
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
    # The form of a zero probe, such as one of which nothing is left, is zero: f is evaluated where it is defined all
    # the same, for another vector, and multiplied by zero.
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
    truncation = jnp.abs(jnp.sum(seen.changes) / seen.used)
    return TraceEstimate(mean, _sem(seen), truncation, seen.used, _is_precise(plan, fixed, seen))


class _Forms(NamedTuple):
    """What the probes saw; zero for those that were not used.

    Attributes
    ----------
    values
        z' f(A) z.
    changes
        How much of it came with the last fifth of the steps.
    used
        The number of probes used.
    """

    values: Float[Array, " S"]
    changes: Float[Array, " S"]
    used: Int[Array, ""]


def _forms(
    function: Converted, matvec: Callable, plan: Plan, batch: Array, arguments: tuple[Any, ...], constants: Any
) -> tuple[Array, Array]:
    """z' f(A) z of a batch of probes, and how much of it came with the last fifth of the steps."""

    what = Form(function, matvec, plan.lanczos, plan.semidefinite)

    def form(probe: Array) -> tuple[Array, Array]:
        return quadratic_form(what, plan.gradient, probe, arguments, constants)

    if len(batch) == 1:  # choices in the recurrence remain choices where nothing is batched
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
    """Batch after batch of probes: offset + the mean of their forms, the forms, and the gradient of the first.

    The gradient is computed along with the forms, so that no decomposition outlives its batch.
    """
    count, size = len(rows), plan.batch_size
    num_batches = math.ceil(count / size)
    filled = num_batches * size
    # Probes that fill the last batch are copies, and count for nothing.
    weights = jnp.pad(shares, (0, filled - count)).reshape(num_batches, size)
    batches = jnp.concatenate([rows, jnp.broadcast_to(rows[:1], (filled - count, rows.shape[1]))])
    batches = batches.reshape(num_batches, size, -1)
    active = floating((arguments, constants))

    def total(batch: Array, leaves: list[Array], weight: Array) -> tuple[Array, tuple[Array, Array]]:
        values, changes = _forms(function, matvec, plan, batch, *active.fill(leaves))
        values, changes = weight * values, weight * changes
        return jnp.sum(values), (values, changes)

    def advance(i: Array, carry: tuple) -> tuple:
        values, changes, d_rows, d_leaves = carry
        batch = batches[i], active.leaves, weights[i]
        if with_gradient:
            (_, new), (d_batch, d_new) = jax.value_and_grad(total, (0, 1), has_aux=True)(*batch)
            d_rows, d_leaves = d_rows.at[i].set(d_batch), jax.tree.map(jnp.add, d_leaves, d_new)
        else:
            _, new = total(*batch)
        return values.at[i].set(new[0]), changes.at[i].set(new[1]), d_rows, d_leaves

    def forms(i: Array, carry: tuple) -> _Forms:
        return _Forms(carry[0].reshape(-1)[:count], carry[1].reshape(-1)[:count], jnp.minimum(i * size, count))

    def unfinished(state: tuple) -> Array:
        seen = forms(*state)
        enough = (seen.used >= min(FEWEST_PROBES, count)) & _is_precise(plan, offset, seen)
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
    d_rows, d_leaves = jax.tree.map(lambda x: x / seen.used.astype(x.dtype), carry[2:])
    d_rows = d_rows.reshape(filled, -1)[:count]
    gradient = jnp.ones_like(mean), d_rows, jnp.zeros_like(shares), *active.cotangent(d_leaves)
    return mean, seen, _only_once(plan, gradient)


def _only_once(plan: Plan, gradient: Any) -> Any:
    """The gradient, whose own derivatives raise an error where they would be wrong or there are none."""
    caller = "stochastic_lanczos_quadrature"
    if plan.deflated:
        message = f"{caller}(deflation=...) has first derivatives only; leave it out for second ones"
        return once(gradient, message)
    return once_in_reverse(gradient, f"{caller}(relative_sem=...)") if plan.relative_sem is not None else gradient


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable_run(function: Callable, matvec: Callable, plan: Plan, *inputs: Any) -> tuple[Array, _Forms]:
    """`_run`, whose forms have no gradient and whose mean has the one that was computed along with it."""
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
    deviations = jnp.where(jnp.arange(len(seen.values)) < seen.used, seen.values - _mean(seen), 0)
    several = (jnp.maximum(seen.used - 1, 1) * seen.used).astype(deviations.dtype)
    return jnp.where(seen.used > 1, safe_norm(deviations) / jnp.sqrt(several), jnp.inf)


def _is_precise(plan: Plan, offset: Array, seen: _Forms) -> Array:
    """Whether the standard error asked for is met; it always is where none was."""
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
    """The length of the leading axis, checked to be the same for every leaf."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(probes)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"{caller}(probes=...) must have leaves with one leading axis, at least one probe long; got leading axes "
            f"{sorted(counts)}; draw them with rademacher_probes or normal_probes"
        )
    return counts.pop()[0]
