"""The variational posterior of a small linearised network by dense algebra in NumPy: the oracle of the tests here."""

from typing import NamedTuple

import jax
import numpy as np
import oracles
from scipy.special import log_softmax
from scipy.stats import norm, qmc


class FixedPoint(NamedTuple):
    """Mean, covariance and sites, and the bound averaged over fresh noise."""

    mean: np.ndarray
    covariance: np.ndarray
    curvatures: np.ndarray
    residuals: np.ndarray
    elbo: float


def standard_noise(key, count, width, num_samples):
    """The quasi-random normals of one batch (S, N, C): shifted Sobol points and their mirror images."""
    half = num_samples // 2
    points = qmc.Sobol(width, scramble=True, seed=0).random_base2(int(np.log2(half)))
    shifts = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (count, width), float))
    eps = np.finfo(float).eps
    normal = norm.ppf(np.clip((points[:, None] + shifts) % 1, eps, 1 - eps))
    return np.concatenate([normal, -normal])


def symmetric_roots(matrices):
    values, vectors = np.linalg.eigh(matrices)
    return np.einsum("nij,nj,nkj->nik", vectors, np.sqrt(np.maximum(values, 0)), vectors)


def averages(samples, targets):
    """E log p of each example, r and W of a softmax likelihood with soft labels, over samples (S, N, C)."""
    log_probs = log_softmax(samples, axis=-1)
    probs = np.exp(log_probs)
    mean = probs.mean(axis=0)
    between = np.einsum("snc,snd->ncd", probs, probs) / len(probs)
    curvatures = np.eye(mean.shape[-1]) * mean[:, None] - between
    return np.einsum("snc,nc->n", log_probs, targets) / len(samples), targets - mean, curvatures


def bound(mean, covariance, jacobians, offsets, targets, precision, noise):
    """The evidence lower bound, with the divergence written out in full."""
    variances = np.einsum("ncp,pq,ndq->ncd", jacobians, covariance, jacobians)
    samples = offsets + jacobians @ mean + np.einsum("ncd,snd->snc", symmetric_roots(variances), noise)
    expected, residuals, curvatures = averages(samples, targets)
    num_weights = len(mean)
    trace = precision * (np.trace(covariance) + mean @ mean) - num_weights
    divergence = 0.5 * (trace - np.linalg.slogdet(covariance)[1] - num_weights * np.log(precision))
    return expected.sum() - divergence, residuals, curvatures


def solve(network, params, inputs, targets, precision, key, num_samples, *, keep=lambda ggn: ggn, fixed_mean=False):
    """Iterate sites, mean and covariance until they do not move; `keep` is what a structure keeps of the GGN."""
    jacobians = oracles.jacobian(network, params, inputs)
    flat = np.asarray(jax.flatten_util.ravel_pytree(params)[0])
    offsets = np.asarray(network(params, inputs)) - jacobians @ flat
    sizes = len(inputs), jacobians.shape[1], num_samples
    key_fit, key_bound = jax.random.split(key)
    noise = standard_noise(key_fit, *sizes)
    identity = np.eye(len(flat))
    mean = flat
    _, residuals, curvatures = averages((offsets + jacobians @ mean)[None], targets)
    for _ in range(200):
        ggn = keep(oracles.ggn(jacobians, curvatures))
        covariance = np.linalg.inv(ggn + precision * identity)
        roots = symmetric_roots(np.einsum("ncp,pq,ndq->ncd", jacobians, covariance, jacobians))
        deviations = np.einsum("ncd,snd->snc", roots, noise)
        for _ in range(30):  # Newton's method, damped by what the gradient says
            _, residuals, there = averages(offsets + jacobians @ mean + deviations, targets)
            if fixed_mean:
                break
            ascent = np.einsum("ncp,nc->p", jacobians, residuals) - precision * mean
            step = np.linalg.solve(oracles.ggn(jacobians, there) + precision * identity, ascent)
            mean = mean + min(1, 2 / np.sqrt(max(ascent @ step, 1e-300))) * step
        before, curvatures = curvatures, 0.5 * (curvatures + there)
        if np.abs(curvatures - before).max() < 1e-14:
            break
    fresh = standard_noise(key_bound, *sizes)
    elbo, _, _ = bound(mean, covariance, jacobians, offsets, targets, precision, fresh)
    return FixedPoint(mean, covariance, curvatures, residuals, elbo)
