"""Predictions under the posterior, by the linearised network or by the network at samples of the weights."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import num_examples, ravel, unraveler
from bnnlaplace.core.types import Inputs
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import heteroscedastic
from bnnlaplace.model.spec import output_shape
from bnnlaplace.predictive import link
from bnnlaplace.predictive.functional import functional_posteriors, functional_variances
from bnnlaplace.predictive.reading import Draws, draws_functions
from bnnlaplace.structure import SampleStructure

# Numbers of samples of the outputs that are in memory at a time.
MOST_NUMBERS = 2**24


def predictions(
    fitted: Fitted,
    inputs: Inputs,
    *,
    pred_type: Literal["glm", "nn"] = "glm",
    link_approx: link.LinkApproximation = "probit",
    with_noise: bool = False,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> Float[Array, "B ... C"] | tuple[Float[Array, "B ... C"], ...]:
    """Predict E[y] under the posterior, or for a regression the mean and the variance of the outputs.

    For `bnnlaplace.heteroscedastic`: the mean, its variance, and the expected variance of the noise, (B, ..., C) each.

    Parameters
    ----------
    fitted
        The posterior of the weights, at its own prior.
    inputs
        (B, ...); B may be zero.
    pred_type
        "glm": predict with the linearised network. "nn": predict with the network itself at samples of the weights,
        without use of `link_approx`.
    link_approx
        The approximation of E[y], one of those in `bnnlaplace.predictive.link`. "bridge" is for "classification" only.
        A regression does not use it.
    with_noise
        For a regression: add the variance of the noise to that of the outputs.
    key, num_samples
        For "mc" and "nn". By default all samples of a `SampleStructure`, and 100 from a covariance.
    microbatch
        Inputs at a time; bounds memory.

    Raises
    ------
    ValueError
        If a name is unknown, "bridge" or noise is asked of a likelihood that does not have it, key or number of samples
        are none, or the key is missing although samples are needed.
    """
    _check_options(fitted.likelihood, pred_type, link_approx, with_noise)
    _check_draws(key, num_samples)
    likelihood = fitted.likelihood
    has_noise_output = heteroscedastic.is_heteroscedastic(likelihood)
    is_regression = likelihood.name == "regression" or has_noise_output
    noise = likelihood.sigma_noise**2 if with_noise and not has_noise_output else 0.0
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    precisions = [fitted.prior.precision]
    if pred_type == "nn" or (link_approx == "mc" and not is_regression):
        which = "pred_type='nn'" if pred_type == "nn" else "link_approx='mc'"
        if key is None:
            checks.key(key, f"predictive({which}, key=...)")
        if num_samples is None:
            num_samples = fitted.structure.num_probes if isinstance(fitted.structure, SampleStructure) else 100
        # A variance over samples needs two of them.
        needs_variance = pred_type == "nn" and is_regression
        where = f"predictive({which}, num_samples=...)" + (" of a regression" if needs_variance else "")
        checks.count(num_samples, where, least=2 if needs_variance else 1, advice="try 32")
        draw = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
        if pred_type == "nn":
            expected = heteroscedastic.moments if has_noise_output else likelihood.mean
            mean, variance = _over_weight_samples(fitted, inputs, expected, **draw)
            if has_noise_output:
                (mean, of_noise), (variance, _) = (jnp.split(moment, 2, axis=-1) for moment in (mean, variance))
                return mean, variance + of_noise if with_noise else variance, of_noise
            return (mean, variance + noise) if is_regression else mean
        return _averages(fitted, inputs, Draws(**draw, spread="none"))
    # "probit" and regression need no samples: mean and variance of the outputs are enough.
    mean = outputs(fitted.network, inputs, microbatch=microbatch)
    # Only the bridge needs covariances between outputs. Their diagonal alone is much cheaper.
    needs_covariance = link_approx == "bridge" and not is_regression
    (variance,) = functional_variances(fitted, inputs, precisions, microbatch=microbatch, marginal=not needs_covariance)
    if has_noise_output:
        mean, variance, of_noise = heteroscedastic.expected_moments(mean, variance)
        return mean, variance + of_noise if with_noise else variance, of_noise
    if is_regression:
        return mean, variance + noise
    return link.bridge(mean, variance) if needs_covariance else link.probit(likelihood, mean, variance)


def _averages(fitted: Fitted, inputs: Inputs, draws: Draws) -> Float[Array, "B ... C"]:
    """Average E[y] over samples of the linearised outputs, with memory for those of some inputs at a time."""

    def of_some(inputs: Inputs) -> Float[Array, "b ... C"]:
        (posterior,) = functional_posteriors(fitted, inputs, [fitted.prior.precision], **draws._asdict())
        return link.monte_carlo(fitted.likelihood, posterior.mean, posterior.deviations)

    if not draws_functions(fitted, inputs, draws):  # one key must not give the samples of two parts
        return of_some(inputs)
    numbers_of_input = draws.num_samples * math.prod(output_shape(fitted.network, inputs)[1:])
    size = draws.microbatch * max(1, MOST_NUMBERS // (draws.microbatch * numbers_of_input))
    starts = range(0, max(1, num_examples(inputs)), size)
    parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + size], inputs) for at in starts]
    return jnp.concatenate([of_some(part) for part in parts]) if len(parts) > 1 else of_some(inputs)


def _check_options(likelihood: Likelihood, pred_type: str, link_approx: str, with_noise: bool) -> None:
    """Raise ValueError if a name is unknown, or the likelihood does not have what is asked for."""
    checks.choice(pred_type, "predictive(pred_type=...)", ("glm", "nn"))
    link.check_link(likelihood, link_approx, "predictive", is_used=pred_type == "glm")
    if not isinstance(with_noise, (bool, np.bool_)):
        raise ValueError(f"predictive(with_noise=...) must be True or False; got {with_noise!r:.80}; try True")
    if with_noise and likelihood.sigma_noise is None and not heteroscedastic.is_heteroscedastic(likelihood):
        raise ValueError(
            f"predictive(with_noise=True) must be asked of a regression with sigma_noise; got {likelihood.name!r}"
        )


def _check_draws(key: Array | None, num_samples: int | None) -> None:
    """Raise ValueError if a key or a number of samples is given that is none, whether or not samples are needed."""
    if key is not None:
        checks.key(key, "predictive(key=...)")
    if num_samples is not None:
        checks.count(num_samples, "predictive(num_samples=...)", advice="try 32")


def _over_weight_samples(
    fitted: Fitted,
    inputs: Inputs,
    function: Callable[[Array], Array],
    *,
    key: Array,
    num_samples: int,
    microbatch: int,
) -> tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
    """Average a function of f(x; theta) over samples of the weights, and compute its variance.

    One forward pass a sample.
    """
    network = fitted.network
    centre, unravel = ravel(network.params), unraveler(network.params)
    mean = squares = 0.0
    # Welford's recurrence keeps no sample, and the variance is not a difference of large numbers.
    for count, deviation in enumerate(fitted.deviations(key, num_samples), start=1):
        sample = network.with_params(unravel(centre + deviation))
        expected = function(outputs(sample, inputs, microbatch=microbatch))
        step = expected - mean
        mean = mean + step / count
        squares = squares + step * (expected - mean)
    return mean, squares / max(num_samples - 1, 1)
