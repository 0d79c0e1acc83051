"""Old name of `cases`, until every test imports that."""

from cases import Problem, random_problem, two_layers

__all__ = ["Problem", "random_problem", "two_layers"]
