"""The last dense layer as a map of features: derivatives of many outputs from those of fewer features.

Let f = W' phi + b with H features phi, through which alone all weights but W and b reach the outputs. Then the
curvature of those other weights is J' (W Lambda W') J with the Jacobian J of the features. A root of the H x H matrix
takes the place of the factor B of Lambda, so that there are H backward passes in place of one for each output, and none
of them passes through the layer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.roots import symmetric_root
from bnnlaplace.curvature.layers import Weights
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import sites

# Roots pay where features are fewer than outputs by this factor: a root costs about 10 H^3 multiplications.
OUTPUTS_FOR_FEATURE = 2
# Numbers of the factor, for all features, outputs and examples, that are in memory at a time.
_MOST_NUMBERS = 2**23


class Head(NamedTuple):
    """A dense layer through which alone all other weights reach the outputs.

    Attributes
    ----------
    kernel
        The matrix W, from features to outputs.
    differentiate
        A function without arguments. It takes a forward pass that ends at the features, and returns a function from
        their cotangents to a derivative for each leaf before them, as `Pass.gradients`.
    """

    kernel: Float[Array, "H C"]
    differentiate: Callable[[], Callable[[Float[Array, "M H"]], dict[int, Float[Array, "M ..."]]]]

    @property
    def is_narrow(self) -> bool:
        """Whether features are so few that roots of their curvature pay."""
        return _is_narrow(*self.kernel.shape)

    def root(self, likelihood: Likelihood, points: Float[Array, "M ..."]) -> Float[Array, "M H H"]:
        """Compute a root R of the curvature of the features, R R' = W Lambda W', at each example.

        Parameters
        ----------
        likelihood
            The likelihood.
        points
            Where its curvature is evaluated: outputs, or what a likelihood of `sites` takes in their place.
        """

        of_sample = sites.of_sample(likelihood)
        if of_sample is not None:  # the factor of which is a random one
            gram = partial(_mean_over_samples, partial(_gram, of_sample, self.kernel))
        else:
            gram = partial(_gram, likelihood, self.kernel)
        at_once = max(1, _MOST_NUMBERS // (self.kernel.size + points[0].size))
        return symmetric_root(jax.lax.map(gram, points, batch_size=min(len(points), at_once)))


def _gram(likelihood: Likelihood, kernel: Float[Array, "H C"], point: Float[Array, "..."]) -> Float[Array, "H H"]:
    """W Lambda W' at one example, from the rows of W B: it is positive semidefinite, and keeps small differences."""
    rows = jax.vmap(partial(likelihood.factor_transpose_mv, point))(kernel)
    return einsum("hk,gk->hg", rows, rows)


def _mean_over_samples(
    gram: Callable[[Float[Array, " C"]], Float[Array, "H H"]], samples: Float[Array, "S C"]
) -> Float[Array, "H H"]:
    """Average one sample after another, so that their rows are not in memory together."""
    shape = jax.eval_shape(gram, samples[0])
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.scan(lambda total, f: (total + gram(f), None), zero, samples)[0] / len(samples)


def head_layer(weights: Weights, direct: frozenset[int]) -> int | None:
    """Find the leaf of the direct layer that stands between all other weights and the outputs; None if there is none.

    Parameters
    ----------
    weights
        What `layers.find` returned.
    direct
        Its direct leaves.
    """
    layers = [leaf for leaf in direct if leaf in weights.layers]
    if len(layers) != 1 or weights.rest:
        return None
    entry = weights.layers[layers[0]].entry
    jaxpr = weights.jaxpr
    others = {variable for leaf, variable in enumerate(jaxpr.params) if leaf not in direct}
    equations = [equation for index, equation in enumerate(jaxpr.equations) if index != entry.index]
    kernel = jaxpr.equations[entry.index].invars[weights.layers[layers[0]].kernel]
    return None if _reached(equations, others) & {kernel, *jaxpr.outputs} else layers[0]


def num_narrow_features(weights: Weights, direct: frozenset[int]) -> int:
    """Count the features of the head if they are few and other weights come before them; otherwise 0.

    Parameters
    ----------
    weights, direct
        What `layers.find` returned, and its direct leaves.
    """
    leaf = head_layer(weights, direct)
    if leaf is None or len(direct) == len(weights.jaxpr.params):
        return 0
    num_features = math.prod(size for size, is_row in weights.layers[leaf].layout.segments if is_row)
    num_outputs = math.prod(weights.jaxpr.params[leaf].aval.shape) // num_features
    return num_features if _is_narrow(num_features, num_outputs) else 0


def _is_narrow(num_features: int, num_outputs: int) -> bool:
    return OUTPUTS_FOR_FEATURE * num_features <= num_outputs


def _reached(equations: list[JaxprEqn], variables: set[Var]) -> set[Var]:
    """The variables, and all that the equations compute from them."""
    reached = set(variables)
    for equation in equations:
        if any(not isinstance(atom, Literal) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return reached
