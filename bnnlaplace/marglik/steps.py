"""The steps of training by the evidence, as pure functions of an immutable state.

There are two. `map_step` follows the gradient of the negative log joint on a batch, plus the gradient of half the
log-determinant as it was last computed. `evidence_step` computes that gradient anew on a curvature batch ("joint"), or
moves the prior to where the evidence prefers it at the present weights ("online"). The log-determinant costs many
times what a step costs and changes slowly, so a loop takes an evidence step only every few steps.

A gradient that is held is the same random number in all these steps, and an optimiser takes it for a slope. So it is an
average over the last evidence steps. While a network with batch statistics trains in another mode than the one in which
it is expanded, the log-determinant moves the prior alone: the scale of a kernel before a normalised layer has no effect
on the loss then, and the log-determinant of the frozen network would shrink it without end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bnnlaplace.core.tree import ravel
from bnnlaplace.core.types import Estimate
from bnnlaplace.marglik.fixed_point import prior_update
from bnnlaplace.marglik.held import all_finite, averaged, first_bad_step, forgotten
from bnnlaplace.marglik.objective import (
    PRECISION_RANGE,
    Batch,
    EvidenceOptions,
    LogPrecision,
    half_log_determinant,
    half_quadratic_form,
    log_precision_of,
    negative_log_likelihood,
)
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Groups, by_layer

TrainForward = Callable[[PyTree, PyTree, Any, Key[Array, ""]], tuple[Array, PyTree]]
"""(params, frozen, x, key) -> (outputs, frozen): the network while it is trained."""


class MarglikSettings(NamedTuple):
    """What stays the same from step to step. It is hashable, so it is a static argument of `jit`.

    Attributes
    ----------
    optimizer
        The `optax.GradientTransformation` of the weights. It sees gradients of the objective divided by N.
    prior_optimizer
        That of the logarithms of the prior precisions, for "joint".
    num_data
        N, the number of training examples, without those of weight zero.
    method
        "joint": weights and prior follow the gradient of the evidence. "online": weights follow that of the log joint,
        and the prior is set to the maximiser of the evidence.
    options
        How the log-determinant is estimated.
    groups
        The function from the path of a weight to the name of its group.
    train_forward
        The network in training mode, if it differs from the network that is expanded.
    memory
        How many evidence steps the held gradient is averaged over: the mean of the first, then a moving average.
    """

    optimizer: Any
    prior_optimizer: Any
    num_data: float
    method: Literal["joint", "online"] = "joint"
    options: EvidenceOptions = EvidenceOptions()
    groups: Groups = by_layer
    train_forward: TrainForward | None = None
    memory: int = 10


class MarglikState(NamedTuple):
    """All that a step changes. It is a pytree of arrays: saved and restored, it continues to the same numbers.

    Attributes
    ----------
    params
        The weights.
    frozen
        The other arrays of the network, such as batch statistics.
    log_precision
        The logarithm of the prior precision: one number, or one for each group.
    opt_state, prior_opt_state
        The states of both optimisers.
    held
        The gradient of half the log-determinant in `params` and `log_precision`, averaged over the last evidence steps
        of "joint"; zeros before the first.
    estimates
        How many evidence steps `held` comes from.
    evidence
        The estimate of the log evidence of the last evidence step, in nats; NaN before the first.
    loss
        The objective of the last step over N, without the log-determinant: nats an example.
    gradient_norm
        The norm of the gradient of the last step in the weights, in nats.
    step
        The number of steps taken.
    bad_step
        The first step whose objective, evidence or gradient was not finite, or -1.
    """

    params: PyTree
    frozen: PyTree
    log_precision: LogPrecision
    opt_state: Any
    prior_opt_state: Any
    held: tuple[PyTree, LogPrecision]
    estimates: Int[Array, ""]
    evidence: Estimate
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    step: Int[Array, ""]
    bad_step: Int[Array, ""]


def initial_state(
    settings: MarglikSettings,
    network: Network,
    prior_precision: float | dict[str, float] = 1.0,
    prior_structure: Literal["scalar", "layerwise"] = "layerwise",
) -> MarglikState:
    """Return the state before the first step.

    Parameters
    ----------
    settings
        The settings of all steps.
    network
        The network at its initial weights.
    prior_precision
        The prior precision to start from: one number, or a dictionary with one for each group.
    prior_structure
        "scalar" for one precision, "layerwise" for one for each group of `settings.groups`.
    """
    log_precision = log_precision_of(prior_precision, network.params, prior_structure, settings.groups)
    # Steps donate nothing, so the network's own arrays may be part of the state.
    params = jax.tree.map(jnp.asarray, network.params)
    missing = jnp.asarray(jnp.nan, ravel(params).dtype)
    return MarglikState(
        params=params,
        frozen=jax.tree.map(jnp.asarray, network.frozen),
        log_precision=log_precision,
        opt_state=settings.optimizer.init(params),
        prior_opt_state=settings.prior_optimizer.init(log_precision),
        held=jax.tree.map(jnp.zeros_like, (params, log_precision)),
        estimates=jnp.int32(0),
        evidence=Estimate(missing, missing),
        loss=missing,
        gradient_norm=missing,
        step=jnp.int32(0),
        bad_step=jnp.int32(-1),
    )


@partial(jax.jit, static_argnames=("settings", "train_prior"))
def map_step(
    settings: MarglikSettings,
    network: Network,
    likelihood: Likelihood,
    state: MarglikState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    train_prior: bool,
) -> MarglikState:
    """Take a step of the weights, and with `train_prior` one of the prior precisions.

    Parameters
    ----------
    settings, network, likelihood
        The settings and the model. Of the network only its function counts: its arrays are in the state.
    state
        The state before the step.
    batch
        (inputs, targets).
    key
        For `settings.train_forward`, such as dropout.
    train_prior
        Whether the prior precisions follow their gradient too, as in "joint" after burn-in.
    """
    num_data, groups = settings.num_data, settings.groups

    def objective(params: PyTree, log_precision: LogPrecision) -> tuple[Array, PyTree]:
        if settings.train_forward is None:
            outputs, frozen = Network(network.forward, params, state.frozen)(params, batch[0]), state.frozen
        else:
            outputs, frozen = settings.train_forward(params, state.frozen, batch[0], key)
        negative = negative_log_likelihood(likelihood, outputs, batch, num_data)
        return negative + half_quadratic_form(params, log_precision, groups), frozen

    with_gradient = jax.value_and_grad(objective, (0, 1), has_aux=True)
    (value, frozen), gradients = with_gradient(state.params, state.log_precision)
    gradients = jax.tree.map(jnp.add, gradients, state.held)
    mean_gradients = jax.tree.map(lambda leaf: leaf / num_data, gradients)
    updates, opt_state = settings.optimizer.update(mean_gradients[0], state.opt_state, state.params)
    norm = jnp.linalg.norm(ravel(gradients[0]))
    state = state._replace(
        params=jax.tree.map(lambda leaf, update: (leaf + update).astype(leaf.dtype), state.params, updates),
        frozen=frozen,
        opt_state=opt_state,
        loss=(value / num_data).astype(state.loss.dtype),
        gradient_norm=norm.astype(state.gradient_norm.dtype),
        step=state.step + 1,
        bad_step=first_bad_step(state.bad_step, state.step, all_finite(value, norm)),
    )
    if not train_prior:
        return state
    updates, prior_opt_state = settings.prior_optimizer.update(
        mean_gradients[1], state.prior_opt_state, state.log_precision
    )
    bounds = jnp.log(jnp.asarray(PRECISION_RANGE))
    moved = jax.tree.map(lambda log, update: jnp.clip(log + update, *bounds), state.log_precision, updates)
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state.log_precision)
    return state._replace(log_precision=moved, prior_opt_state=prior_opt_state)


@partial(jax.jit, static_argnames=("settings",))
def evidence_step(
    settings: MarglikSettings,
    network: Network,
    likelihood: Likelihood,
    state: MarglikState,
    batch: Batch,
    key: Key[Array, ""],
) -> MarglikState:
    """Compute the gradient of the log-determinant anew ("joint"), or move the prior to its optimum ("online").

    Parameters
    ----------
    settings, network, likelihood, state
        As for `map_step`. The network is the one that is expanded: batch statistics are frozen at those of the state.
    batch
        (inputs, targets) of the curvature.
    key
        The probes are drawn from it.
    """
    network = Network(network.forward, state.params, state.frozen)
    model = {"network": network, "likelihood": likelihood, "num_data": settings.num_data, "options": settings.options}
    model |= {"groups": settings.groups}
    if settings.method == "online":
        update = prior_update(state.params, state.log_precision, batch, key, **model)
        evidence, state = update.log_evidence, state._replace(log_precision=update.log_precision)
        computed = update.log_precision
    else:
        gradient = jax.grad(
            lambda params, log_precision: half_log_determinant(params, log_precision, batch, key, **model),
            (0, 1),
            has_aux=True,
        )
        estimate, terms = gradient(state.params, state.log_precision)
        if settings.train_forward is not None and jax.tree.leaves(state.frozen):
            estimate = jax.tree.map(jnp.zeros_like, estimate[0]), estimate[1]
        computed = averaged(state.held, estimate, state.estimates, settings.memory)
        evidence = terms.log_marginal_likelihood
        state = state._replace(held=computed, estimates=state.estimates + 1)
    bad_step = first_bad_step(state.bad_step, state.step, all_finite(evidence.mean, computed))
    evidence = jax.tree.map(lambda number, like: number.astype(like.dtype), evidence, state.evidence)
    return state._replace(evidence=evidence, bad_step=bad_step)


def without_determinant(state: MarglikState) -> MarglikState:
    """Return the state with the gradient of the log-determinant forgotten, to settle at a mode of the log joint."""
    held, estimates = forgotten(state.held)
    return state._replace(held=held, estimates=estimates)
