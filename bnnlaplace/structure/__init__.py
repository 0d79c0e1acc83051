"""Fitted curvature structures: each answers, at any prior precision delta, the questions of a Laplace posterior.

A structure is a pytree with the methods

- `log_determinant(delta)`: log det(I + G / delta), one value per probe (a single one where it is exact);
- `samples(key, num_samples, delta)`: rows distributed as N(0, (G + delta I)^-1);
- `inverse_quadratic_form(vector, delta)`: v' (G + delta I)^-1 v;
- `functional_variance(jacobian, delta)`: J (G + delta I)^-1 J', or, where that is not to be had,
  `function_samples(pushforward, key, num_samples, deltas)`: J times samples, at every delta.

A new one is a class with these methods and a function that fits it, both named in `bnnlaplace.laplace`.
"""

from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure

__all__ = ["DenseStructure", "DiagonalStructure", "KrylovError", "KrylovStructure"]
