"""Likelihoods by name, and checks of targets against a likelihood. The likelihoods stand in `likelihoods`."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described
from bnnlaplace.model import arrays
from bnnlaplace.model.likelihoods.bernoulli import bernoulli
from bnnlaplace.model.likelihoods.categorical import categorical, parameters_of
from bnnlaplace.model.likelihoods.gaussian import gaussian
from bnnlaplace.model.likelihoods.heteroscedastic import heteroscedastic, is_heteroscedastic
from bnnlaplace.model.likelihoods.record import Likelihood
from bnnlaplace.model.likelihoods.tempered import tempered, untempered

_BY_NAME = {
    "classification": categorical,
    "regression": gaussian,
    "binary": bernoulli,
    "heteroscedastic": heteroscedastic,
}


def is_ours(likelihood: Likelihood) -> bool:
    """Whether the functions of a likelihood are those of one that this package defines."""
    try:
        known = with_options(likelihood.name, options_of(likelihood))
    except ValueError:
        return False
    return jax.tree.structure(likelihood) == jax.tree.structure(known)


def options_of(likelihood: Likelihood) -> list[str]:
    """The options that a likelihood was made with, by name. Their values are among its leaves."""
    options = [name for name, value in parameters_of(likelihood).items() if value is not None]
    return options if untempered(likelihood)[1] is None else [*options, "temperature"]


def with_options(name: str, options: Collection[str]) -> Likelihood:
    """A likelihood of the package with some options. It stands for its structure, so that all its leaves are ones.

    Raises
    ------
    ValueError
        If there is no such likelihood.
    """
    ones = {"ignore_index": 1, "class_weights": np.ones(1)} if name == "classification" else {}
    if name not in _BY_NAME or not {*options} <= {*ones, "temperature"}:
        raise ValueError(f"there is no likelihood {name!r:.80} with {options!r:.80}")
    likelihood = _BY_NAME[name](**{option: ones[option] for option in ones if option in options})
    return tempered(likelihood, 1.0) if "temperature" in options else likelihood


def with_noise(likelihood: Likelihood, sigma_noise: Array) -> Likelihood:
    """A regression at another noise, and at the same temperature."""
    temperature = untempered(likelihood)[1]
    return gaussian(sigma_noise) if temperature is None else tempered(gaussian(sigma_noise), temperature)


def resolve(likelihood: str | Likelihood, sigma_noise: Any = 1.0) -> Likelihood:
    """Turn the name of a likelihood into the record. A record is returned as it is.

    Raises
    ------
    ValueError
        If the name is unknown, or the noise is not one positive, finite number or one for each output. Only the shape
        of a traced noise is checked. Also if the noise is not 1 and the likelihood is not "regression".
    """
    if isinstance(likelihood, Likelihood):
        _check_functions(likelihood)
    elif not isinstance(likelihood, str) or likelihood not in _BY_NAME:
        raise ValueError(
            f"Laplace(likelihood=...) must be one of {sorted(_BY_NAME)} or a Likelihood; got {likelihood!r:.80}; "
            "build your own with bnnlaplace.Likelihood"
        )
    traced = isinstance(sigma_noise, jax.core.Tracer)
    is_number = isinstance(sigma_noise, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(sigma_noise) <= 1
    if not is_number:
        raise ValueError(
            "Laplace(sigma_noise=...) must be one positive, finite number, or one for each output; got "
            f"{described(sigma_noise)}; try 1.0"
        )
    checks.all_positive(sigma_noise, "Laplace(sigma_noise=...)", with_squares=True)
    if likelihood != "regression" and (traced or np.shape(sigma_noise) != () or float(sigma_noise) != 1.0):
        name = likelihood.name if isinstance(likelihood, Likelihood) else likelihood
        raise ValueError(
            f"Laplace(sigma_noise=...) must be left out unless likelihood='regression'; got {sigma_noise} with "
            f"{name!r}; a Likelihood holds its own noise: bnnlaplace.gaussian(sigma)"
        )
    if isinstance(likelihood, Likelihood):
        return likelihood
    return gaussian(sigma_noise) if likelihood == "regression" else _BY_NAME[likelihood]()


def _check_functions(likelihood: Likelihood) -> None:
    """Raise ValueError if something stands where a likelihood of the user's own must have a function."""
    for name in ("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv"):
        if not callable(getattr(likelihood, name)):
            raise ValueError(
                f"Likelihood({name}=...) must be a function; got {getattr(likelihood, name)!r:.80}; see the attributes "
                "of bnnlaplace.Likelihood"
            )


def check_targets(likelihood: Likelihood, outputs_shape: tuple[int, ...], targets: Any, where: str) -> None:
    """Check targets against the shape (N, ..., C) of the outputs. Wrong ones would broadcast, or become NaN, silently.

    Parameters
    ----------
    likelihood
        The likelihood, which says what its targets are.
    outputs_shape
        (N, ..., C).
    targets
        Labels (N, ...), or arrays shaped like the outputs, or as `Likelihood.target_shape` says. Only shape and type of
        traced targets are checked.
    where
        What the message calls the argument.

    Raises
    ------
    ValueError
        If labels are neither integers of shape (N, ...) within the classes nor probabilities that sum to one, other
        targets have another shape than the likelihood states, binary targets are outside of [0, 1], targets of a
        regression are not finite, a number does not fit into the type in which it is used, or there is not one noise
        scale for each output.
    """
    noise, num_outputs = likelihood.sigma_noise, outputs_shape[-1]
    if noise is not None and noise.shape not in ((), (num_outputs,)):
        raise ValueError(
            f"Laplace(sigma_noise=...) must be one number, or one for each of the {num_outputs} outputs; got "
            f"{noise.size}"
        )
    if likelihood.name == "classification" and num_outputs == 1:
        raise ValueError(
            f"{where}: 'classification' must have an output for each class, at least two; got one output; use "
            "likelihood='binary', whose output is the logit of class 1, with targets (N, 1)"
        )
    traced = isinstance(targets, jax.core.Tracer)
    # An operation of JAX would be traced inside `jit`.
    targets = targets if traced else np.asarray(arrays.as_array(targets, f"{where}: targets"))
    if arrays.used_type(targets.dtype) is None or jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise ValueError(f"{where}: targets must be real numbers; got an array of {targets.dtype}; encode them")
    expected, dtype = likelihood.targets_shape(outputs_shape), targets.dtype
    if likelihood.target_kind == "array":
        if targets.shape != expected:
            raise ValueError(
                f"{where}: targets of {likelihood.name!r} must have the shape {expected}"
                f"{' of the outputs' if expected == outputs_shape else ''}; got {targets.shape}; reshape them, or "
                "state their shape by Likelihood(target_shape=...)"
            )
    else:
        takes_soft = likelihood.target_shape is None
        is_label = targets.shape == expected and jnp.issubdtype(dtype, jnp.integer)
        is_soft = takes_soft and targets.shape == outputs_shape and jnp.issubdtype(dtype, jnp.floating)
        if not (is_label or is_soft):
            soft = f", or probabilities of shape {outputs_shape}" if takes_soft else ""
            raise ValueError(
                f"{where}: labels must be integers of shape {expected}{soft}; got {dtype} of shape {targets.shape}; "
                "pass class indices"
            )
    if not traced:
        arrays.check_fits_type(targets, f"{where}: targets")
        _check_class_weights(likelihood, num_outputs, where)
        _check_numbers(likelihood, num_outputs, targets, where)


def _check_numbers(likelihood: Likelihood, num_outputs: int, targets: np.ndarray, where: str) -> None:
    """Check the numbers of targets whose shape and type are right."""
    if likelihood.target_kind == "array":
        if likelihood.name == "binary" and not ((targets >= 0) & (targets <= 1)).all():
            raise ValueError(
                f"{where}: binary targets must be 0 or 1, or probabilities between; got numbers from "
                f"{targets.min()} to {targets.max()}; remap them, as -1 and 1 by (y + 1) / 2"
            )
        if likelihood.name == "regression" or is_heteroscedastic(
            likelihood
        ):  # NaN may stand for a missing target in a likelihood of the user's own
            arrays.check_finite(targets, f"{where}: targets")
    elif jnp.issubdtype(targets.dtype, jnp.floating):
        sums = targets.sum(axis=-1, dtype=np.float64)
        if not (np.all(targets >= 0) and np.allclose(sums, 1, atol=1e-3)):
            raise ValueError(
                f"{where}: soft targets must be probabilities, at least 0 and with a sum of 1 over classes; got "
                f"{targets.min():.4g} and more, and sums from {sums.min():.4g} to {sums.max():.4g}; normalise them"
            )
    elif likelihood.target_shape is None:
        if isinstance(parameters_of(likelihood)["ignore_index"], jax.core.Tracer):
            return
        if likelihood.ignore_index is not None:
            targets = targets[targets != likelihood.ignore_index]
        if not targets.size or 0 <= targets.min() <= targets.max() < num_outputs:
            return
        raise ValueError(
            f"{where}: labels must lie in 0..{num_outputs - 1}, as the network has {num_outputs} outputs; got labels "
            f"from {targets.min()} to {targets.max()}; remap them or widen the network"
        )


def _check_class_weights(likelihood: Likelihood, num_outputs: int, where: str) -> None:
    weights = parameters_of(likelihood)["class_weights"]
    if weights is not None and weights.shape != (num_outputs,):
        raise ValueError(
            f"{where}: categorical(class_weights=...) must be one number for each of the {num_outputs} classes; got "
            f"{weights.size}"
        )
