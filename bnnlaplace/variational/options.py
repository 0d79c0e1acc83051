"""The options of the variational posterior, and what it reports after each iteration."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from bnnlaplace.core import checks
from bnnlaplace.fitting.optimize_prior import PriorStructure

# By default the samples of an example have about this many numbers, and are not fewer or more than these.
NUMBERS, FEWEST_AND_MOST = 8192, (32, 512)
# Those of few examples are more: all examples together have about this many numbers, and one at most that many samples.
NUMBERS_OF_ALL, MOST_OF_FEW = 2**22, 4096


class Progress(NamedTuple):
    """One iteration of the variational fit.

    Attributes
    ----------
    iteration
        Its number, from 1.
    elbo
        The evidence lower bound in nats, averaged over the samples that the fit is chosen by: that of the result is a
        little lower. -inf if it, or the curvature, was not finite, so that the step was refused.
    expected_log_likelihood
        The average of log p(D | f) under the posterior, in nats: the bound without its divergence from the prior.
    prior_precision
        The prior precision, or its geometric mean over the weights.
    damping
        How far the sites went towards their averages, between 0 and 1. It is halved where the bound would fall. The
        first step of a fit that goes on from a fitted posterior is a whole one.
    newton_steps, products
        Newton steps of the mean, and how often their conjugate gradients multiplied by the GGN. Where all examples have
        few outputs together, steps are found among these, without such products.
    """

    iteration: int
    elbo: float
    expected_log_likelihood: float
    prior_precision: float
    damping: float
    newton_steps: int
    products: int


@dataclass(frozen=True)
class Variational:
    """The options of `Laplace.fit(approximation=Variational(...))`.

    A regression has the posterior of Laplace, which needs neither samples nor iterations.

    Attributes
    ----------
    num_samples
        Samples of the outputs at each training input, an even number of at least 4: expectations are averages over
        these. By default 512 for up to 16 outputs, and fewer for more of them, down to 32; for few examples up to 4096.
        With too few the mean is fitted to the samples. Then the bound in `on_iteration` is far above that of the
        result.
    tolerance
        The iteration ends if a step changes the evidence lower bound by less than this, in nats, and the next one
        promises little; with "lanczos", by less than the noise of its probes if that is larger.
    prior_structure
        Also maximise over the prior precision, whenever the rest has settled: one for all weights ("scalar"), one for
        each group of `prior_groups` ("layerwise"), or one for each weight ("diag"). By default it stays as it is.

        The bound is that of the linearised network, which at the prior mean is f(x) - J (theta* - mu) and not zero:
        what training has learnt is partly in there. With several precisions the bound can leave the fit of the labels
        to that part, at precisions of a layer that are a thousand times those of training or more. Where you see such
        precisions, do not compare the bound with others; use "scalar".
    max_iterations
        The largest number of iterations. Each computes the curvature once.
    max_newton_steps
        The largest number of Newton steps in the mean within an iteration.
    fixed_mean
        Keep the mean at the weights of the network, or at that of the posterior that is fitted again, and fit the
        covariance alone. Use it where the mean of the linearised network is far from the weights, and predicts worse
        than they do. The bound then prefers a smaller prior precision than held-out data do, because it counts the
        distance of the weights to the prior mean in full. So choose the precision on held-out data, such as folds of
        the training set. (Ortega et al., "Fixed-mean Gaussian processes for post-hoc Bayesian deep learning", arXiv
        2412.04177.)
    on_iteration
        Called with the `Progress` of each iteration, such as `print`.

    Raises
    ------
    ValueError
        If an option has another type or range.
    """

    num_samples: int | None = None
    tolerance: float = 0.5
    prior_structure: PriorStructure | None = None
    max_iterations: int = 40
    max_newton_steps: int = 20
    fixed_mean: bool = False
    on_iteration: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if self.num_samples is not None:
            count = checks.count(self.num_samples, "Variational(num_samples=...)", least=4, advice="try 256")
            if count % 2:
                raise ValueError(
                    f"Variational(num_samples=...) must be even, as samples come in pairs; got {count}; try {count + 1}"
                )
        is_number = isinstance(self.tolerance, (int, float, np.number)) and not isinstance(self.tolerance, bool)
        if not (is_number and 0 < self.tolerance < np.inf):
            raise ValueError(
                f"Variational(tolerance=...) must be a positive number of nats; got {self.tolerance!r:.80}; try 0.5"
            )
        if self.prior_structure is not None:
            checks.choice(self.prior_structure, "Variational(prior_structure=...)", get_args(PriorStructure))
        checks.count(self.max_iterations, "Variational(max_iterations=...)", advice="try 20")
        checks.count(self.max_newton_steps, "Variational(max_newton_steps=...)", advice="try 20")
        if not isinstance(self.fixed_mean, bool):
            raise ValueError(
                f"Variational(fixed_mean=...) must be True or False; got {self.fixed_mean!r:.80}; try True"
            )
        if self.on_iteration is not None and not callable(self.on_iteration):
            raise ValueError(
                "Variational(on_iteration=...) must be a function of a Progress; got "
                f"{self.on_iteration!r:.80}; try print"
            )

    def pairs_for(self, shape: tuple[int, ...], num_examples: int | None) -> int:
        """Half of the samples, for outputs of that shape at each example; their number may not be known yet."""
        if self.num_samples is not None:
            return self.num_samples // 2
        usual = float(np.clip(NUMBERS / shape[-1], *FEWEST_AND_MOST))
        of_few = NUMBERS_OF_ALL / (max(num_examples, 1) * math.prod(shape)) if num_examples is not None else 0.0
        return 2 ** math.floor(math.log2(max(usual, min(of_few, MOST_OF_FEW)))) // 2


def resolve(approximation: object) -> Variational | None:
    """Turn what a user gives as `fit(approximation=...)` into options; None stands for "laplace".

    Raises
    ------
    ValueError
        If it is neither a known name nor a `Variational`.
    """
    if isinstance(approximation, Variational):
        return approximation
    names = ("laplace", "variational")
    checks.choice(approximation, "fit(approximation=...)", names, "bnnlaplace.Variational(...) with options")
    return Variational() if approximation == "variational" else None
