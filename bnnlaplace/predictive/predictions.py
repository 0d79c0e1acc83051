"""Predictions under the posterior: of the linearised network, or of samples of the weights."""

from typing import Literal

import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.checks import check_key
from bnnlaplace.core.tree import ravel, unraveler
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.predictive import link
from bnnlaplace.predictive.functional import Posterior, functional_posteriors, functional_variances
from bnnlaplace.structure import SampleStructure

# Likelihoods whose mean is a softmax, a sigmoid, or the output itself.
PROBIT = ("classification", "binary", "regression")


def predictions(
    posterior: Posterior,
    likelihood: Likelihood,
    inputs: PyTree[Float[Array, "B ..."]],
    prior_precision: float,
    *,
    pred_type: Literal["glm", "nn"] = "glm",
    link_approx: Literal["probit", "mc", "bridge"] = "probit",
    with_noise: bool = False,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> Float[Array, "B ... C"] | tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
    """E[y] under the posterior; of a regression the mean of the outputs and their variance.

    Parameters
    ----------
    posterior, likelihood, prior_precision
        Of the weights, and what outputs mean.
    inputs
        (B, ...); none are allowed.
    pred_type
        "glm": of the linearised network. "nn": of the network itself, by samples of the weights; `link_approx` has no
        part in it.
    link_approx
        See `bnnlaplace.link`; "bridge" is for "classification", a regression needs none.
    with_noise
        Of a regression: add the variance of the noise.
    key, num_samples
        For "mc" and "nn"; by default as many samples as a `SampleStructure` has, from a covariance 100.
    microbatch
        Inputs at a time; bounds memory.

    Raises
    ------
    ValueError
        If a name is unknown, "bridge" is asked of another likelihood, noise of one that has none, or samples are needed
        and there is no key.
    """
    if pred_type not in ("glm", "nn"):
        raise ValueError(f"predictive(pred_type=...) must be 'glm' or 'nn'; got {pred_type!r}")
    if link_approx not in ("probit", "mc", "bridge"):
        raise ValueError(f"predictive(link_approx=...) must be 'probit', 'mc' or 'bridge'; got {link_approx!r}")
    is_regression = likelihood.name == "regression"
    if link_approx == "bridge" and likelihood.name != "classification":
        raise ValueError(
            f"predictive(link_approx='bridge') must be asked of 'classification'; got {likelihood.name!r}; try 'probit'"
        )
    if link_approx == "probit" and pred_type == "glm" and likelihood.name not in PROBIT:
        raise ValueError(
            f"predictive(link_approx='probit') must be asked of one of {PROBIT}, being made for softmax and sigmoid; "
            f"got {likelihood.name!r}; use link_approx='mc' with key=..."
        )
    if with_noise and likelihood.sigma_noise is None:
        raise ValueError(
            f"predictive(with_noise=True) must be asked of a regression with sigma_noise; got {likelihood.name!r}"
        )
    noise = likelihood.sigma_noise**2 if with_noise else 0.0
    posterior, inputs = posterior.at_features(inputs, microbatch=microbatch)
    structure = posterior.structure
    if pred_type == "nn" or (link_approx == "mc" and not is_regression):
        which = "pred_type='nn'" if pred_type == "nn" else "link_approx='mc'"
        check_key(key, f"predictive({which}, key=...)")
        if num_samples is None:
            num_samples = structure.num_probes if isinstance(structure, SampleStructure) else 100
        check_num_samples(num_samples, f"predictive({which}, num_samples=...)")
        if pred_type == "nn" and is_regression and num_samples < 2:
            raise ValueError("predictive(pred_type='nn', num_samples=...) of a regression must be at least 2; got 1")
        draw = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
        if pred_type == "nn":
            mean, variance = _of_weight_samples(posterior, likelihood, inputs, prior_precision, **draw)
            return (mean, variance + noise) if is_regression else mean
        (found,) = functional_posteriors(posterior, inputs, [prior_precision], **draw)
        return link.monte_carlo(likelihood, found.mean, found.deviations)
    mean = outputs(posterior.network, inputs, microbatch=microbatch)

    def variance_of(marginal: bool) -> Float[Array, "B ... C C"] | Float[Array, "B ... C"]:
        found = functional_variances(posterior, inputs, [prior_precision], microbatch=microbatch, marginal=marginal)
        return next(found)

    if is_regression:
        return mean, variance_of(marginal=True) + noise
    if link_approx == "bridge":
        return link.bridge(mean, variance_of(marginal=False))
    return link.probit(likelihood, mean, variance_of(marginal=True))


def _of_weight_samples(
    posterior: Posterior,
    likelihood: Likelihood,
    inputs: PyTree[Float[Array, "B ..."]],
    prior_precision: float,
    *,
    key: Array,
    num_samples: int,
    microbatch: int,
) -> tuple[Float[Array, "B ... C"], Float[Array, "B ... C"]]:
    """The mean over weight samples of E[y | f(x; theta)], and its variance over them; one forward pass a sample."""
    network = posterior.network
    centre, unravel = ravel(network.params), unraveler(network.params)
    mean = squares = 0.0
    for count, deviation in enumerate(posterior.deviations(key, num_samples, prior_precision), start=1):
        sample = network.with_params(unravel(centre + deviation))
        new = likelihood.mean(outputs(sample, inputs, microbatch=microbatch))
        step = new - mean
        mean = mean + step / count
        squares = squares + step * (new - mean)
    return mean, squares / max(num_samples - 1, 1)


def check_num_samples(num_samples: int, where: str, *, least: int = 1) -> None:
    """Check that there is a sample to average over, or as many as are needed.

    Parameters
    ----------
    num_samples
        How many are asked for.
    where
        The name of the argument, for the message.
    least
        How many are needed.

    Raises
    ------
    ValueError
        If there are fewer, or it is no integer.
    """
    if not isinstance(num_samples, (int, np.integer)) or num_samples < least:
        raise ValueError(f"{where} must be an integer of at least {least}; got {num_samples}; try 32")
