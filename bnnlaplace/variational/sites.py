"""The sites of all examples, and the model whose curvature they are."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.types import AnyArray
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import sites
from bnnlaplace.variational.draws import Draws
from bnnlaplace.variational.expectations import site_curvature


class Sites(NamedTuple):
    """The averaged curvature W_n of each example, batch by batch.

    Attributes
    ----------
    batches
        Matrices W (B, ..., C, C); or, if there are more outputs than samples, samples of the outputs
        (B, ..., S, C), of which W is the average.
    by_samples
        Whether they are samples.
    turn
        How many steps have led here.
    """

    batches: list[Float[np.ndarray, "B ..."]]
    by_samples: bool
    turn: int = 0

    def are_finite(self) -> bool:
        """Whether all numbers are."""
        return all(np.isfinite(batch).all() for batch in self.batches)

    def towards(self, other: "Sites", share: float) -> "Sites":
        """Go a part of the way to other sites.

        Matrices are averaged. Of samples that part is replaced: the same of each example, and others in each turn, so
        that none stays for ever.
        """
        if share == 1:
            return other
        pairs = zip(self.batches, other.batches, strict=True)
        if not self.by_samples:
            return Sites([(1 - share) * old + share * new for old, new in pairs], False, self.turn + 1)
        return Sites([_replaced(old, new, share, self.turn) for old, new in pairs], True, self.turn + 1)


def _replaced(
    old: Float[np.ndarray, "... O C"], new: Float[np.ndarray, "... S C"], share: float, turn: int
) -> Float[np.ndarray, "... S C"]:
    count = new.shape[-2]
    kept = np.resize(np.arange(old.shape[-2]), count)  # a fit begins with one pair of equal samples
    place = np.arange(count) + turn
    is_new = np.floor(share * (place + 1)) > np.floor(share * place)
    return np.where(is_new[:, None], new, old[..., kept, :])


def are_by_samples(num_outputs: int, num_pairs: int) -> bool:
    """Whether samples of the outputs at one position are fewer numbers than a matrix."""
    return num_outputs > 2 * num_pairs


def sites_of(likelihood: Likelihood, draws: Sequence[Draws], by_samples: bool | None = None) -> Sites:
    """Average the curvature of the likelihood over the samples of each batch."""
    if by_samples is None:
        by_samples = are_by_samples(draws[0].mean.shape[-1], len(draws[0].deviations))
    if not by_samples:
        return Sites([site_curvature(likelihood, each) for each in draws], False)
    return Sites([_in_random_order(np.asarray(each.samples())) for each in draws], True)


def _in_random_order(samples: Float[AnyArray, "S B ... C"]) -> Float[np.ndarray, "B ... S C"]:
    """Put the samples of each example and position in an order of its own, the same at every call."""
    by_example = np.moveaxis(samples, 0, -2)
    order = np.random.default_rng(0).random(by_example.shape[:-1]).argsort(axis=-1)
    return np.take_along_axis(by_example, order[..., None], axis=-2)


def at_sites(model: Model, where: Sites) -> Model:
    """The model with the curvature of the sites in place of that of the likelihood."""
    if where.by_samples:
        points, likelihood = where.batches, sites.by_samples(model.likelihood)
    else:
        points, likelihood = map(sites.roots, where.batches), sites.by_factors(model.likelihood)
    return model._replace(likelihood=likelihood, data=model.data.with_points([jnp.asarray(each) for each in points]))


def factors_of(model: Model, where: Sites, scale: float, *, microbatch: int) -> list[Float[Array, "B ... C C"]] | None:
    """Return A with A A' = W of each batch, times how much an example counts; None if sites are samples."""
    return None if where.by_samples else factors_at(at_sites(model, where), scale, microbatch=microbatch)


def factors_at(there: Model, scale: float, *, microbatch: int) -> list[Float[Array, "B ... C C"]]:
    """Return the same for a model that is at sites which are matrices."""
    return [math.sqrt(scale) * each.by_roots(each.points) for each in there.curvature_at(microbatch=microbatch)]
