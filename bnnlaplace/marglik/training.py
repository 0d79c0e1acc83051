"""The training loop that follows the evidence: epochs, batches, curvature batches and the history."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from bnnlaplace.core import checks
from bnnlaplace.core.tree import examples
from bnnlaplace.marglik.arguments import CALLER, Plan, checked_plan
from bnnlaplace.marglik.objective import Batch, precision_of
from bnnlaplace.marglik.steps import (
    MarglikState,
    TrainForward,
    evidence_step,
    initial_state,
    map_step,
    without_determinant,
)
from bnnlaplace.model.data import PairOrBatches
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Groups, by_layer

_ORDER, _CURVATURE, _PROBES, _FORWARD = range(4)  # streams of the key


class MarglikResult(NamedTuple):
    """A trained network, its prior, and how they came about.

    Attributes
    ----------
    network
        The network at the trained weights.
    prior_precision
        The trained prior precision in the form that `Laplace(prior_precision=...)` takes: one number, or a dictionary
        with one number for each group.
    history
        One dictionary for each epoch, of what JSON has: `epoch`; `method`; `phase` ("burn-in", "evidence" or "settle");
        `loss`, the negative log joint in nats an example, averaged over the steps of the epoch, in which a batch
        counts by its examples; `log_evidence` and `log_evidence_sem` in nats, or None where
        no evidence was computed; `prior_precision` at the end of the epoch; `gradient_norm` and
        `log_determinant_gradient_norm`, of the last step in nats; `seconds_per_step` and `seconds_per_evidence_step`.
    state
        The state after the last step, a pytree. With the history it continues the training; see `start`.
    """

    network: Network
    prior_precision: float | dict[str, float]
    history: list[dict[str, Any]]
    state: MarglikState


def marglik_training(
    key: Key[Array, ""],
    network: Network,
    data: PairOrBatches,
    optimizer: Any,
    *,
    num_epochs: int,
    likelihood: Likelihood | str = "classification",
    sigma_noise: Any = 1.0,
    method: Literal["joint", "online"] = "joint",
    hessian_structure: Literal["lanczos", "diag"] = "lanczos",
    prior_structure: Literal["scalar", "layerwise"] = "layerwise",
    prior_precision: float | dict[str, float] = 1.0,
    prior_groups: Groups = by_layer,
    burn_in_epochs: int = 0,
    settle_epochs: int = 0,
    evidence_every: int | None = None,
    evidence_memory: int | None = None,
    batch_size: int | None = None,
    curvature_batch_size: int | None = None,
    num_matvecs: int | None = None,
    num_probes: int | None = None,
    gradient: Literal["adjoint", "quadrature"] = "adjoint",
    prior_optimizer: Any = None,
    train_forward: TrainForward | None = None,
    microbatch: int = 128,
    start: MarglikResult | None = None,
    on_epoch: Callable[[MarglikResult], None] = lambda result: None,
) -> MarglikResult:
    """Train the weights of a network and its prior precision by the evidence, without validation data.

    Weights follow the gradient of an estimate of the negative log evidence on batches. "joint" also follows that of the
    log-determinant, in weights and prior precisions. "online" leaves it out, and sets the prior precision to the
    maximiser of the evidence every few epochs.

    Parameters
    ----------
    key
        A random key. Order of the examples, curvature batches and probes are drawn from it, by the number of the step.
    network
        The network at its initial weights, in evaluation mode: the network that is expanded.
    data
        Arrays (x, y) or (x, y, w), which are shuffled and cut into batches. Or a re-iterable of such batches, which are
        taken as they come: shuffle them there.
    optimizer
        An optax optimiser. It sees gradients of the objective divided by the number of examples. It should not decay
        weights itself: the prior does.
    num_epochs
        How many passes over the data.
    likelihood, sigma_noise
        As for `Laplace`. The noise of a regression stays as it is.
    method
        "joint" or "online".
    hessian_structure
        "lanczos" for the whole GGN, "diag" for its diagonal, the baseline.
    prior_structure, prior_precision, prior_groups
        One precision for all weights ("scalar"), or one for each group ("layerwise"); those to start from; and the
        function from the path of a weight to its group.
    burn_in_epochs
        Epochs at the start in which the prior stays and no evidence is computed.
    settle_epochs
        Epochs at the end in which the prior stays and the log-determinant is left out. The weights then move to a mode
        of the log joint, at which a Laplace approximation is defined.
    evidence_every
        How many steps ("joint", by default 10) or epochs ("online", by default 1) lie between two evidence steps. In
        between, "joint" holds the gradient of the log-determinant.
    evidence_memory
        How many evidence steps of "joint" the held gradient is averaged over, by default 10. More make it less noisy,
        and older.
    batch_size
        Examples in a batch of arrays, by default 64; at most all of them. What is left over at the end of an epoch is
        dropped, and differs each time. Leave it out if the data are batches.
    curvature_batch_size
        Examples in a curvature batch; by default as many as in a batch. More make the estimate less biased.
    num_matvecs, num_probes
        Krylov depth and number of probes of "lanczos"; by default 10 and 1 for "joint", 20 and 8 for "online". The
        depth is at most the number of weights, and of outputs of a curvature batch.
    gradient
        How "joint" differentiates the log-determinant: "adjoint" by the exact gradient of the estimate, "quadrature" by
        an estimate of its own at about a third of the cost.
    prior_optimizer
        The optax optimiser of the logarithms of the prior precisions for "joint"; by default `optax.adam(0.03)`.
    train_forward
        ``train_forward(params, frozen, x, key) -> (outputs, frozen)``: the network in training mode, if it differs from
        `network`, as with dropout or batch normalisation. The curvature is always that of `network`, with the batch
        statistics that `frozen` holds. If it holds any, the log-determinant of "joint" moves the prior alone: with
        `start` and without `train_forward`, a second call trains the network that is expanded.
    microbatch
        Examples in one step of the inner loop of the curvature; it bounds memory.
    start
        A result to continue from, with the same other arguments (see `train_forward` for a reason to leave that out).
        A run that is continued with all of them ends with the same numbers as one that was never stopped. Weights and
        prior precisions are those of the result, and `num_epochs` counts its epochs, too.
    on_epoch
        Called after each epoch with the result so far, for instance to save it.

    Returns
    -------
    MarglikResult
        The trained network, the prior precision, the history, and the state.

    Raises
    ------
    TypeError
        If `network` is not a `bnnlaplace.Network`.
    ValueError
        If an option is unknown, or belongs to the other method or structure; if data do not fit the model, or can be
        read only once; if `start` is of another method, prior, network or optimiser, or longer than `num_epochs`.
    FloatingPointError
        If the loss, the evidence or a gradient is not finite. The message names the step. The result of the last good
        epoch was given to `on_epoch`.

    Notes
    -----
    Cost of an evidence step of "joint" with "lanczos": one linearisation of the curvature batch, 2 S K products, and
    for each probe a vector-Jacobian product of K terms. `log_evidence_sem` is taken over the evidence steps of an epoch
    if there are several, and so contains the randomness of curvature batches; otherwise over probes. Curvature of M of
    N examples has the rank of M examples: the log-determinant is too low for a small M, and the precision that is found
    as well. Few products make both too high. Look at the evidence of all data, by `Laplace`, at the end.

    Reference: Immer et al. 2021, arXiv 2104.04975 (online, diagonal); Krämer et al. 2024, arXiv 2405.17277, section 5.

    Examples
    --------
    >>> import bnnlaplace, optax
    >>> network = bnnlaplace.Network.from_function(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 3))})
    >>> x, y = jax.random.normal(jax.random.key(0), (32, 2)), jnp.arange(32) % 3
    >>> options = {"num_epochs": 2, "batch_size": 16, "num_matvecs": 2}
    >>> result = marglik_training(jax.random.key(1), network, (x, y), optax.adam(1e-2), **options)
    >>> sorted(result.prior_precision), len(result.history)
    (['w'], 2)
    """
    plan = checked_plan(**locals())  # the arguments are the only local variables so far
    if start is None:
        state, history = initial_state(plan.settings, network, prior_precision, prior_structure), []
    else:
        state, history = start.state, list(start.history)
    for epoch in range(len(history) + 1, num_epochs + 1):
        state, record = _epoch(plan, state, epoch, history)
        bad_step = int(state.bad_step)
        if bad_step >= 0:
            raise FloatingPointError(
                f"{CALLER}: loss, evidence and gradients must stay finite; they did not at step {bad_step + 1}, in "
                f"epoch {epoch}; use a smaller learning rate, or more burn_in_epochs; on_epoch had the last good result"
            )
        history.append(record)
        result = _result(plan, state, history)
        on_epoch(result)
    return _result(plan, state, history)


def _result(plan: Plan, state: MarglikState, history: list[dict[str, Any]]) -> MarglikResult:
    network = Network(plan.network.forward, state.params, state.frozen)
    return MarglikResult(network, precision_of(state.log_precision), list(history), state)


def _epoch(
    plan: Plan, state: MarglikState, epoch: int, history: Sequence[dict[str, Any]]
) -> tuple[MarglikState, dict[str, Any]]:
    """Take the steps of an epoch; return the state and the record of the epoch."""
    phase = "burn-in" if epoch <= plan.burn_in else "evidence" if epoch <= plan.last else "settle"
    is_joint = phase == "evidence" and plan.settings.method == "joint"
    if phase == "settle":
        state = without_determinant(state)
    model = plan.settings, plan.network, plan.likelihood
    evidences: list[Any] = []
    seconds, evidence_seconds, num_steps, batch = 0.0, 0.0, 0, None
    # The sums stay on the device until the end of the epoch.
    losses, counts = jnp.zeros_like(state.loss), jnp.zeros_like(state.loss)
    for number, batch in enumerate(_batches(plan, epoch)):
        step = int(state.step)
        if is_joint and (step % plan.every == 0 or (number == 0 and not any(r["phase"] == phase for r in history))):
            began = time.perf_counter()
            state = evidence_step(*model, state, _curvature_batch(plan, step, batch), _key(plan, _PROBES, step))
            evidences.append(jax.block_until_ready(state.evidence))
            evidence_seconds += time.perf_counter() - began
        began = time.perf_counter()
        state = map_step(*model, state, batch, _key(plan, _FORWARD, step), train_prior=is_joint)
        losses, counts = _with_loss(losses, counts, state.loss, batch[2])
        jax.block_until_ready(state.step)
        seconds, num_steps = seconds + time.perf_counter() - began, num_steps + 1
    if phase == "evidence" and plan.settings.method == "online" and (epoch - plan.burn_in) % plan.every == 0:
        began, step = time.perf_counter(), int(state.step)
        state = evidence_step(*model, state, _curvature_batch(plan, step, batch), _key(plan, _PROBES, step))
        evidences.append(jax.block_until_ready(state.evidence))
        evidence_seconds += time.perf_counter() - began
    mean, sem = _mean_and_sem(evidences)
    return state, {
        "epoch": epoch,
        "method": plan.settings.method,
        "phase": phase,
        "loss": float(losses / counts),
        "log_evidence": mean,
        "log_evidence_sem": sem,
        "prior_precision": precision_of(state.log_precision),
        "gradient_norm": float(state.gradient_norm),
        "log_determinant_gradient_norm": _norm(state.held[0]),
        "seconds_per_step": seconds / max(num_steps, 1),
        "seconds_per_evidence_step": evidence_seconds / len(evidences) if evidences else None,
    }


@jax.jit
def _with_loss(losses: Array, counts: Array, loss: Array, weights: Array) -> tuple[Array, Array]:
    """Add the loss of a batch to the sums of an epoch, as often as it has examples."""
    count = jnp.count_nonzero(weights).astype(counts.dtype)
    return losses + count * loss, counts + count


def _norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def _mean_and_sem(evidences: Sequence[Any]) -> tuple[float | None, float | None]:
    """Average the estimates of an epoch; the error is that over them, or that of a single one if it is finite."""
    if not evidences:
        return None, None
    means = np.array([float(evidence.mean) for evidence in evidences])
    sem = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float(evidences[0].sem)
    return float(means.mean()), float(sem) if np.isfinite(sem) else None


def _key(plan: Plan, stream: int, number: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(plan.key, stream), number)


def _batches(plan: Plan, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch. Those of arrays depend on the key and the epoch alone."""
    if not plan.is_array:
        with checks.renamed(CALLER, "fit"):  # each pass checks that it gives as many examples as the first
            for batch in plan.data:
                yield batch.inputs, batch.targets, batch.weights
        return
    whole, count = next(iter(plan.data)), plan.data.num_examples  # those of weight zero are the last ones
    order = np.asarray(jax.random.permutation(_key(plan, _ORDER, epoch), count))
    for first in range(0, count - plan.batch_size + 1, plan.batch_size):
        yield _rows(whole, order[first : first + plan.batch_size])


def _curvature_batch(plan: Plan, step: int, batch: Any) -> Batch:
    """Draw the examples of the curvature: from all examples of arrays, otherwise the first of the batch at hand."""
    if not plan.is_array:
        return jax.tree.map(lambda leaf: leaf[: plan.curvature_size], batch)
    whole, count = next(iter(plan.data)), plan.data.num_examples
    chosen = jax.random.choice(_key(plan, _CURVATURE, step), count, (plan.curvature_size,), replace=False)
    return _rows(whole, np.asarray(chosen))


def _rows(whole: Any, index: np.ndarray) -> Batch:
    return examples(whole.inputs, index), whole.targets[index], jnp.asarray(whole.weights)[index]
