"""Checks of arguments, and warnings: the one place that words them.

Every message says what the argument must be, what it was, and what to try: "X must ...; got ...; try ...". `where` is
what a message calls the argument, such as ``"fit(tolerance=...)"``. Import the module rather than its functions, whose
names are those of common arguments: ``checks.key(key, "sample(key=...)")``.
"""

import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from bnnlaplace.core.tree import described, on_one_line

Probs = Float[np.ndarray, "N C"] | Float[Array, "N C"]
Labels = Integer[np.ndarray, " N"] | Integer[Array, " N"]

# Rows of probabilities that were computed in float32 sum to one within this. In 16 bits each probability is rounded by
# up to eps / 2 of itself, and the softmax before it by a few eps.
_SUM_TOLERANCE, _SUM_ROUNDINGS = 1e-4, 4
# A warning names the line of the user's code: frames of these packages are passed over. jaxtyping puts a frame between
# a function and its caller when its checks of annotations are on.
_PASSED_OVER = ("bnnlaplace", "jaxtyping")


# --- numbers ----------------------------------------------------------------------------------------------------


def unmasked(value: Any, where: str) -> None:
    """Raise ValueError if entries of an array of NumPy are masked: `np.asarray` drops the mask without a word."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"{where} must not be masked, as the mask would be lost; got {np.ma.count_masked(value)} masked entries; "
            "fill them, or leave these examples out"
        )


def positive(value: Any, where: str, *, advice: str = "try 1.0") -> None:
    """Raise ValueError unless `value` is one positive, finite number; only the shape of a traced one is checked.

    It must be so in the type in which it is used: without 64-bit types 1e-300 is 0 and 1e300 is infinite.
    """
    is_one_number = _is_real(value) and np.shape(value) == ()
    if is_one_number and (isinstance(value, jax.core.Tracer) or _in_range(value)):
        return
    got = f"shape {np.shape(value)}" if hasattr(value, "shape") and value.shape != () else on_one_line(value)
    raise ValueError(
        f"{where} must be one positive, finite number; got {got}{_of_type(value) if is_one_number else ''}; {advice}"
    )


def all_positive(numbers: Any, where: str, *, advice: str = "try 1.0", with_squares: bool = False) -> None:
    """Raise ValueError unless there are numbers and all are positive and finite; traced ones pass.

    They must be so in the type in which they are used, and with `with_squares` their squares must be, too.
    """
    if isinstance(numbers, jax.core.Tracer):
        return
    unmasked(numbers, where)
    known = np.asarray(numbers)  # an operation of JAX would be traced inside `jit`
    if not _is_real(known):
        raise ValueError(f"{where} must be positive, finite numbers; got {on_one_line(numbers)}; {advice}")
    if not known.size or not np.all(_in_range(known, power=2 if with_squares else 1)):
        got = f"{known}" if known.size <= 8 else f"numbers from {known.min():.3g} to {known.max():.3g}"
        raise ValueError(f"{where} must be positive and finite; got {got}{_of_type(known)}; {advice}")


def real_numbers(values: Any, where: str, *, finite: bool = False) -> None:
    """Raise ValueError unless there are leaves and all of them are real numbers, or arrays of such, not masked.

    With `finite` they must be so in the type in which JAX uses them; traced ones pass.
    """
    leaves = jax.tree.leaves(values)
    for leaf in leaves:
        unmasked(leaf, where)
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        # NumPy counts spans of time among the integers.
        is_integer = jnp.issubdtype(dtype, jnp.integer) and not jnp.issubdtype(dtype, np.timedelta64)
        if not (is_integer or is_usable_float(dtype)):
            raise ValueError(f"{where} must be real numbers; got {dtype} {on_one_line(leaf)}; try 1.0")
        if finite and not isinstance(leaf, jax.core.Tracer) and not is_finite(leaf):
            used = jax.dtypes.canonicalize_dtype(dtype if jnp.issubdtype(dtype, jnp.floating) else float)
            raise ValueError(f"{where} must be finite; got NaN or infinite values in {used}; mend or rescale them")
    if not leaves:
        raise ValueError(f"{where} must be real numbers; got {on_one_line(values)}; try 1.0")


def is_usable_float(dtype: Any) -> bool:
    """Whether numbers of a type are floating-point and JAX takes them: those of NumPy may have more than 64 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits <= 64


def is_finite(value: Any) -> bool:
    """Whether all numbers of an array, which is not traced, are finite in the type in which JAX uses them."""
    # Checked where the array is. A traced function may close over one, whose check must not be traced.
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
        return bool(jnp.isfinite(jnp.asarray(value)).all())


def _in_range(value: Any, *, power: int = 1) -> Any:
    """Whether numbers are positive and finite in the type in which JAX uses them, and so is a power of them."""
    limits = jnp.finfo(jax.dtypes.canonicalize_dtype(float))
    try:
        exact = np.asarray(value, np.float64)
    except OverflowError:  # an integer that is too large for any float
        return False
    return (exact >= float(limits.tiny) ** (1 / power)) & (exact <= float(limits.max) ** (1 / power))


def _of_type(value: Any) -> str:
    """Name the type in a message, for numbers that only that type makes zero or infinite."""
    known = np.asarray(value)
    if not _is_real(known) or not known.size or not (known > 0).all() or not np.isfinite(known).all():
        return ""
    return f", which {jax.dtypes.canonicalize_dtype(float).name} cannot hold or square"


def count(value: Any, where: str, *, least: int = 1, most: int | None = None, advice: str = "") -> int:
    """Return an integer from `least` to `most` as a Python int.

    Integers of NumPy and concrete ones of JAX are accepted, bools are not. `advice` defaults to the nearest value that
    is allowed.

    Raises
    ------
    ValueError
        If `value` is not an integer, or out of range.
    """
    allowed = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:  # floats, arrays of several numbers, traced numbers
        number = None
    if number is not None and number >= least and (most is None or number <= most):
        return number
    nearest = most if number is not None and most is not None and number > most else least
    got = value if number is None or isinstance(value, int) else number
    raise ValueError(f"{where} must be {allowed}; got {on_one_line(got)}; {advice or f'try {nearest}'}")


def _is_real(value: Any) -> bool:
    """Whether it is a number, or an array of real numbers; bools and strings are not."""
    if hasattr(value, "dtype"):
        return jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- keys and names ---------------------------------------------------------------------------------------------


def is_key(value: Any) -> bool:
    """Whether it is one random key: of `jax.random.key`, or a raw one of `jax.random.PRNGKey`."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None:
        return False
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == np.uint32 and shape in ((2,), (4,))


def key(value: Any, where: str) -> None:
    """Raise ValueError unless `value` is one random key."""
    if not is_key(value):
        got = f"{value.dtype} of shape {value.shape}" if hasattr(value, "shape") else on_one_line(value)
        raise ValueError(f"{where} must be one random key; got {got}; try jax.random.key(0)")


def choice(value: Any, where: str, options: Sequence[str], *others: str) -> None:
    """Raise ValueError unless `value` is one of the strings in `options`. `others` names what else is taken."""
    if not isinstance(value, str) or value not in options:
        names = [*map(repr, options), *others]
        listed = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        raise ValueError(f"{where} must be {listed}; got {on_one_line(value)}")


def function(value: Any, where: str, form: str) -> None:
    """Raise ValueError unless `value` can be called; `form` is an example of what can."""
    if not callable(value):
        raise ValueError(f"{where} must be a function; got {described(value)}; try {form}")


@contextmanager
def renamed(caller: str, *others: str) -> Iterator[None]:
    """Let errors name the function that the user called, where a message begins with the name of another function."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name, parenthesis, rest = str(error).partition("(")
        if name in others:
            error.args = (f"{caller}{parenthesis}{rest}",)
        raise


# --- traces -----------------------------------------------------------------------------------------------------


def known(where: str, *values: Any) -> None:
    """Raise TypeError if a number is traced by JAX, or `jit` would trace what is computed: `where` runs on the host."""
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    if is_traced or isinstance(jnp.zeros(()), jax.core.Tracer):
        raise TypeError(
            f"{where} must have known numbers, as it computes in float64 on the host; got traced ones; call it outside "
            "of jit, grad and vmap, or for derivatives of the evidence use bnnlaplace.evidence.log_marginal_likelihood"
        )


# --- processes ---------------------------------------------------------------------------------------------------


def one_process(where: str) -> None:
    """Raise ValueError if JAX runs in several processes: each would take its own part of the data for all of them."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{where} must run in a single process, as each would compute the evidence of its own part of the data; "
            f"got jax.process_count() = {jax.process_count()}; gather the data and the weights, and run this step in a "
            "process of its own, without jax.distributed.initialize"
        )


# --- class probabilities and labels -----------------------------------------------------------------------------


def predictions(probs: Probs, labels: Labels) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """Return class probabilities in float64 and their labels in int64, or raise as `probabilities` and `classes` do."""
    checked = probabilities(probs, "probs")
    return checked, classes(labels, *checked.shape)


def probabilities(probs: Probs, where: str) -> Float[np.ndarray, "N C"]:
    """Return rows of class probabilities in float64.

    Raises
    ------
    ValueError
        If the shape is wrong, an entry is negative or NaN, or a row does not sum to one.
    """
    rows = np.asarray(probs, np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(
            f"{where} must be a non-empty (N, C) array; got shape {rows.shape}; average over posterior samples first"
        )
    if np.isnan(rows).any():
        raise ValueError(f"{where} must not contain NaN; got {shape_and_faults(rows)}; check the predictive")
    if rows.min() < 0:
        raise ValueError(f"{where} must not be negative; got {rows.min():.6g}; apply the softmax first")
    worst = np.argmax(np.abs(rows.sum(axis=1) - 1))
    total = rows[worst].sum()
    dtype = getattr(probs, "dtype", rows.dtype)
    is_half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 16
    if not abs(total - 1) <= (_SUM_ROUNDINGS * float(jnp.finfo(dtype).eps) if is_half else _SUM_TOLERANCE):
        raise ValueError(f"{where} must have rows that sum to 1; row {worst} sums to {total:.6g}; apply the softmax")
    return rows


def classes(labels: Labels, num_examples: int, num_classes: int) -> Int[np.ndarray, " N"]:
    """Return labels in int64: for each example the number of its class.

    Raises
    ------
    ValueError
        If they are not integers, not one for each example, or not below `num_classes`.
    """
    numbers = np.asarray(labels)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"labels must be integer classes; got dtype {numbers.dtype}; convert them with astype(int)")
    if numbers.shape != (num_examples,):
        raise ValueError(f"labels must have shape ({num_examples},), one per example; got {numbers.shape}")
    if numbers.min() < 0 or numbers.max() >= num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}; got {numbers.min()}..{numbers.max()}; check the number of "
            "classes"
        )
    return numbers.astype(np.int64)


def shape_and_faults(array: np.ndarray) -> str:
    """Describe an array in a message: its shape, and how many entries are NaN or infinite."""
    return f"shape {array.shape} with {np.count_nonzero(~np.isfinite(array))} non-finite entries"


# --- warnings ---------------------------------------------------------------------------------------------------


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the first caller outside this package, however deep inside it the warning arises."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_passed_over(frame):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_passed_over(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER
