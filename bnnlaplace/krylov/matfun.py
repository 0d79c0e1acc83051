"""Functions of a matrix times a vector, f(A) v, from a Krylov decomposition, with an estimate of the error.

In the Krylov space of v, f(A) v is approximated by |v| Q f(T) e_1. That is exact once the space is invariant, and for
polynomials of degree K - 1 (Saad 1992; Higham 2008, chapter 13). Lanczos serves symmetric operators and any scalar f;
Arnoldi serves all operators and an f on dense matrices. `frechet.py` differentiates both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov import breakdown, finite
from bnnlaplace.krylov.arnoldi import Arnoldi, arnoldi_adjoint, arnoldi_forward
from bnnlaplace.krylov.checks import check_decomposable
from bnnlaplace.krylov.derivative_modes import reverse_only
from bnnlaplace.krylov.frechet import Method, times_vector
from bnnlaplace.krylov.functions import Converted, matrix_function, scalar_function
from bnnlaplace.krylov.gram_schmidt import safe_norm
from bnnlaplace.krylov.lanczos import Lanczos, lanczos_adjoint, lanczos_forward
from bnnlaplace.krylov.operator import FlatOperator, Settings, prepare
from bnnlaplace.krylov.tridiagonal import divided_differences, function_times_first, reached_eigenpairs

GRADIENTS = ("adjoint", "frechet", "autodiff")


class MatrixFunction(NamedTuple):
    """f(A) v and an estimate of its error.

    Attributes
    ----------
    value
        f(A) v, like the vector.
    error
        The length of the change of `value` over the last fifth of the steps. It estimates the remaining error
        |f(A) v - value|, and is not a bound of it: it is on the safe side if convergence is at least linear. It is zero
        where the space is invariant, and infinite where `value` is not finite. It says nothing of the error of
        derivatives, and has no derivative itself.
    """

    value: PyTree[Float[Array, "..."]]
    error: Float[Array, ""]


def matfun_lanczos(
    function: Callable[[Float[Array, ""]], Float[Array, ""]],
    matvec: Callable[..., PyTree],
    vector: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "frechet", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
) -> MatrixFunction:
    """Compute f(A) v for a symmetric A and any scalar f, differentiably in v, A and f.

    Parameters
    ----------
    function
        f, from a scalar to a scalar, smooth on the spectrum of A: `jnp.exp`, `jnp.log`, `jnp.sqrt`, `jax.lax.rsqrt`, or
        your own. It may close over traced arrays, which are differentiated as well.
    matvec, params, num_matvecs, reorthogonalise, vjp_batch_size
        As for `lanczos`.
    vector
        v, like `start` of `lanczos`, in float32 or float64. A zero v inside of `jit` gives zero.
    gradient
        "adjoint" differentiates the value that is returned, by the adjoint of `lanczos`. Where the space of v is
        invariant, that value is exact, and the gradient is that of "frechet".

        "frechet" differentiates f(A) v itself, by a second decomposition, which starts at the cotangent. Its only error
        is one of truncation. Use it if v may lie in an almost invariant space, as for an operator with few distinct
        eigenvalues. It costs K products, as "adjoint" does, and both work in reverse mode only.

        "autodiff" differentiates the loop, in any mode. In an invariant space this is the gradient of a loop that
        ended, not that of f(A) v.

    Returns
    -------
    MatrixFunction
        The value and an estimate of its error.

    Raises
    ------
    ValueError, TypeError
        As for `lanczos`, and if `function` does not take a scalar to a scalar.

    Notes
    -----
    Cost: that of `lanczos`, and of order K^3. Memory: that of `lanczos`, and K n numbers more for the gradient of
    "adjoint". Call it inside of `jit`. Under `vmap` the second decomposition runs for all of the batch if the space of
    one vector is invariant. Second derivatives are those of "adjoint"; in an invariant space they are NaN.

    Source: Saad 1992; "adjoint": Krämer et al. 2024, arXiv 2405.17277; "frechet": Kandolf, Koskela, Relton and
    Schweitzer 2021.

    Examples
    --------
    >>> d = jnp.array([1.0, 4.0, 9.0])
    >>> root = matfun_lanczos(jnp.sqrt, lambda v: d * v, jnp.ones(3), num_matvecs=3)
    >>> bool(jnp.allclose(root.value, jnp.array([1.0, 2.0, 3.0]), atol=1e-4))
    True
    """
    caller = "matfun_lanczos"
    checks.choice(gradient, f"{caller}(gradient=...)", GRADIENTS)
    options = {"num_matvecs": num_matvecs, "reorthogonalise": reorthogonalise, "vjp_batch_size": vjp_batch_size}
    operator, settings = prepare(caller, "vector", matvec, vector, params, **options)
    check_decomposable(caller, "vector", operator.start.dtype)
    converted, constants = scalar_function(caller, function, operator.start.dtype)
    return _matfun(caller, SYMMETRIC, converted, operator, settings, gradient, constants)


def matfun_arnoldi(
    function: Callable[[Float[Array, "k k"]], Float[Array, "k k"]],
    matvec: Callable[..., PyTree],
    vector: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "frechet", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
) -> MatrixFunction:
    """Compute f(A) v for any square A, with f given on dense matrices, differentiably in v, A and f.

    Parameters
    ----------
    function
        f on small dense matrices, such as `jax.scipy.linalg.expm`. JAX differentiates it as it is. After a breakdown
        the diagonal of the projected matrix is filled up with v' A v / v' v, or with a small positive number if that is
        almost zero; f must be defined there.
    matvec, params, num_matvecs, reorthogonalise, vjp_batch_size
        As for `arnoldi`.
    vector, gradient
        As for `matfun_lanczos`. The second decomposition is one of the transposed operator.

    Returns
    -------
    MatrixFunction
        The value and an estimate of its error.

    Raises
    ------
    ValueError, TypeError
        As for `arnoldi`, and if `function` does not take a matrix to one of the same shape and dtype.

    Notes
    -----
    Cost: that of `arnoldi`, and two evaluations of `function` on matrices of at most K x K, with one on a 2 K x 2 K
    matrix for "frechet". Call it inside of `jit`.

    Source: as for `matfun_lanczos`; Higham 2008, Functions of Matrices, section 3.2 and chapter 13.

    Examples
    --------
    >>> quarter_turn = jnp.pi / 2 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> start = jnp.array([2.0, 0.0])
    >>> turned = matfun_arnoldi(jax.scipy.linalg.expm, lambda v: quarter_turn @ v, start, num_matvecs=2)
    >>> bool(jnp.allclose(turned.value, jnp.array([0.0, 2.0]), atol=1e-4))
    True
    """
    caller = "matfun_arnoldi"
    checks.choice(gradient, f"{caller}(gradient=...)", GRADIENTS)
    options = {"num_matvecs": num_matvecs, "reorthogonalise": reorthogonalise, "vjp_batch_size": vjp_batch_size}
    operator, settings = prepare(caller, "vector", matvec, vector, params, **options)
    check_decomposable(caller, "vector", operator.start.dtype)
    # All sizes for which f will be asked: the projected matrix, the shorter one of the error estimate, and (M').
    sizes = [settings.num_matvecs, _without_last_fifth(settings.num_matvecs)]
    if gradient != "autodiff":
        sizes.append(2 * settings.num_matvecs)
    converted, constants = matrix_function(caller, function, sizes, operator.start.dtype)
    return _matfun(caller, GENERAL, converted, operator, settings, gradient, constants)


def _matfun(
    caller: str,
    method: Method,
    function: Converted,
    operator: FlatOperator,
    settings: Settings,
    gradient: str,
    constants: Any,
) -> MatrixFunction:
    """Run `times_vector` and put its result into the user's structure."""
    run = partial(times_vector, method, function, operator.matvec, settings, gradient)
    if gradient != "autodiff":
        run = reverse_only(run, f"{caller}(gradient={gradient!r})")
    value, change = run(operator.start, operator.arguments, constants)

    def cause() -> str:
        steps = method.forward(operator.matvec, settings, operator.start, operator.arguments)
        if isinstance(steps, Lanczos):
            return finite.cause_of_function(function, constants, steps)
        if not finite.is_finite(steps.hessenberg):
            return finite.cause_of_products(value.dtype)
        return "function is not finite at the projected matrix; pass a function that is defined on the spectrum"

    finite.warn_unless_finite(caller, "a value", value, cause)
    error = jnp.where(finite.is_finite(value), safe_norm(change), jnp.inf)
    return MatrixFunction(operator.unravel(value), error)


def function_times_start(function: Converted, constants: Any, steps: Lanczos) -> tuple[Array, Array]:
    """Return |v| f(T) e_1, the coordinates of f(A) v in the basis, and their change over the last fifth of steps."""
    scalar = partial(_at, function, constants)
    coordinates = steps.start_norm * function_times_first(
        scalar, steps.diagonal, steps.off_diagonal, steps.breakdown_step
    )
    # The same space, cut off: f of a leading block of T. The error estimate has no gradient and costs none.
    fewer = _without_last_fifth(len(steps.diagonal))
    shorter = jax.lax.stop_gradient((steps.diagonal[:fewer], steps.off_diagonal[: fewer - 1], steps.breakdown_step))
    before = steps.start_norm * function_times_first(scalar, *shorter)
    return coordinates, _change(coordinates, before, steps.breakdown_step)


def _at(function: Converted, constants: Any, x: Array) -> Array:
    return function(x, constants)


def _pairing_lanczos(function: Converted, constants: Any, steps: Lanczos, other: Lanczos) -> Float[Array, "K K"]:
    """Return M of (M) in `frechet.py`."""
    (values, vectors), (other_values, other_vectors) = _eigenpairs(steps), _eigenpairs(other)
    both = jnp.concatenate([values, other_values])
    scalars = jax.vmap(partial(_at, function, constants))
    num = len(values)
    # Between the Ritz values of the two spaces, which may coincide: hence divided differences of all of them.
    divided = divided_differences(scalars, both, scalars(both))[:num, num:]
    inner = matmul(vectors, divided * vectors[0][:, None] * other_vectors[0])
    return steps.start_norm * other.start_norm * matmul(inner, other_vectors.T)


def _eigenpairs(steps: Lanczos) -> tuple[Array, Array]:
    reached = breakdown.reached(steps.breakdown_step, len(steps.diagonal))
    return reached_eigenpairs(steps.diagonal, steps.off_diagonal, reached)


def _coordinates_arnoldi(function: Converted, constants: Any, steps: Arnoldi) -> tuple[Array, Array]:
    matrix = _filled_hessenberg(steps)
    coordinates = steps.start_norm * function(matrix, constants)[:, 0]
    fewer = _without_last_fifth(len(matrix))
    before = function(jax.lax.stop_gradient(matrix[:fewer, :fewer]), constants)[:, 0] * steps.start_norm
    return coordinates, _change(coordinates, before, steps.breakdown_step)


def _pairing_arnoldi(function: Converted, constants: Any, steps: Arnoldi, other: Arnoldi) -> Float[Array, "K K"]:
    """Return M of (M') in `frechet.py`."""
    right, left = _filled_hessenberg(steps), _filled_hessenberg(other)
    corner = jnp.zeros_like(left).at[0, 0].set(1)
    image = function(jnp.block([[left, corner], [jnp.zeros_like(left), right.T]]), constants)
    return steps.start_norm * other.start_norm * image[: len(left), len(left) :].T


def _filled_hessenberg(steps: Arnoldi) -> Float[Array, "K K"]:
    """Return H with its zero diagonal after a breakdown filled up, since f need not be defined at zero.

    The filler is the first entry, v' A v / v' v, or a small positive number if that entry is almost zero.
    """
    matrix = jax.lax.stop_gradient(steps.hessenberg)
    small = 1e-2 * jnp.max(jnp.abs(matrix))
    filler = jnp.where(jnp.abs(matrix[0, 0]) >= small, matrix[0, 0], small)
    reached = breakdown.reached(steps.breakdown_step, len(matrix))
    return steps.hessenberg + jnp.diag(jnp.where(reached, 0, filler))


def _transpose(matvec: Callable) -> Callable:
    """Return the products with A'."""

    def transposed(vector: Array, *arguments: Any) -> Array:
        # A is linear, so any point will do to linearise it at, and `vector` has the right shape.
        return jax.vjp(lambda v: matvec(v, *arguments), vector)[1](vector)[0]

    return transposed


def _without_last_fifth(num_matvecs: int) -> int:
    """Return the number of steps without the last fifth, which is at least one step; never below one."""
    return max(num_matvecs - max(num_matvecs // 5, 1), 1)


def _change(coordinates: Array, before: Array, breakdown_step: Array) -> Array:
    """Return the difference of two approximations, the shorter one padded, without a gradient.

    In an invariant space the value is exact and the change is zero.
    """
    change = coordinates - jnp.pad(before, (0, len(coordinates) - len(before)))
    # A single step has nothing before it to compare with, so all of the value counts.
    change = change if len(coordinates) > 1 else coordinates
    return jax.lax.stop_gradient(jnp.where(breakdown_step < 0, change, 0))


SYMMETRIC = Method(lanczos_forward, lanczos_adjoint, lambda matvec: matvec, function_times_start, _pairing_lanczos)
GENERAL = Method(arnoldi_forward, arnoldi_adjoint, _transpose, _coordinates_arnoldi, _pairing_arnoldi)
