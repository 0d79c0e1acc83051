"""Whether the weights are a mode of the log joint whose evidence is computed, and how far from one they are."""

import warnings

from bnnlaplace.structure import KrylovStructure, Structure

# Squared distance to the mode over that of a posterior sample: at a quarter the mode is half a sample away.
LARGEST_RATIO = 0.25


class NotAModeWarning(UserWarning):
    """The weights are far from a mode of the log joint."""


def warn_unless_mode(structure: Structure, decrement: float, effective_parameters: float, precision: float) -> None:
    """Warn where the mode is not much nearer than a posterior sample is.

    Parameters
    ----------
    structure
        What the numbers come from.
    decrement
        g' (G + P0)^-1 g with the gradient g of the log joint: the squared distance to the mode, in posterior standard
        deviations, of a quadratic log joint. For a truncated recurrence an upper bound.
    effective_parameters
        tr G (G + P0)^-1: that of a sample, on average, in the directions that the data determine.
    precision
        The prior precision that was assumed.
    """
    if not decrement > LARGEST_RATIO * effective_parameters:
        return
    most = "at most " if isinstance(structure, KrylovStructure) else ""
    warnings.warn(
        f"the weights are no mode of the log joint at prior precision {precision:.3g}: a Gauss-Newton step gains "
        f"{most}{0.5 * decrement:.3g} nats and goes {most}{decrement**0.5:.3g} posterior standard deviations, where a "
        f"sample goes {effective_parameters**0.5:.3g}; pass the prior precision of training (weight decay times the "
        "number of examples), train on, or use fit(mean='linear')",
        NotAModeWarning,
        stacklevel=3,
    )
