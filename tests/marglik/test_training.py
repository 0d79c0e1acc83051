"""The training loop by the evidence: what it reaches, the same numbers when continued, and what bad input gets."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import exhaustive, usual

import bnnlaplace
from bnnlaplace.marglik import MarglikResult, MarglikSettings, evidence_step, initial_state, map_step

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
Y = (X @ RNG.normal(size=(2, 3)) + 0.7 * RNG.normal(size=(60, 3))).argmax(1)
KEY = jax.random.key(3)


def outputs(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"]


WEIGHTS = {
    "first": {"kernel": RNG.normal(size=(2, 6)).astype(np.float32), "bias": np.zeros(6, np.float32)},
    "last": {"kernel": RNG.normal(size=(6, 3)).astype(np.float32)},
}
NETWORK = bnnlaplace.Network.from_function(outputs, WEIGHTS)


def train(network=NETWORK, data=(X, Y), optimizer=None, **options):
    usual_options = {"num_epochs": 4, "evidence_every": 2}
    if options.get("hessian_structure") != "diag":
        usual_options["num_matvecs"] = 4
    if isinstance(data, tuple):
        usual_options["batch_size"] = 20
    options = usual_options | options
    return bnnlaplace.marglik_training(KEY, network, data, optimizer or optax.adam(1e-2), **options)


def same_bits(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)


def exact_evidence(result):
    la = bnnlaplace.Laplace(result.network, hessian_structure="full", prior_precision=result.prior_precision)
    return la.fit((X, Y))


@pytest.fixture(scope="module")
def by_both():
    """Both methods from the same start, with curvature of all data."""
    options = {"num_epochs": 300, "batch_size": 60, "num_matvecs": 18, "prior_structure": "scalar"}
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 300))
    methods = {"joint": {"num_probes": 2, "evidence_every": 2}, "online": {"evidence_every": 10}}
    return {name: train(optimizer=optimizer, method=name, **options, **own) for name, own in methods.items()}


@pytest.mark.exhaustive
def test_joint_training_reaches_a_higher_evidence_than_online_updates_at_a_mode(by_both):
    """By dense algebra. The gain of "joint" comes from weights beside the mode of the log joint."""
    joint, online = (exact_evidence(by_both[name]) for name in ("joint", "online"))
    assert joint.log_marginal_likelihood().mean > online.log_marginal_likelihood().mean + 0.5
    for la in (joint, online):
        assert la.prior_precision == pytest.approx(la.evidence_optimum().prior_precision, rel=0.15)
    assert online.mode_decrement() < 0.1 < joint.mode_decrement()


def settled(evidence, settle):
    """A run with burn-in, evidence and settling, after a look at its phases."""
    epochs = 5 + evidence + settle
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-2, epochs), b2=0.95)
    options = {"burn_in_epochs": 5, "settle_epochs": settle, "batch_size": 60, "prior_structure": "scalar"}
    result = train(optimizer=optimizer, num_epochs=epochs, **options)
    phases = [record["phase"] for record in result.history]
    assert (phases.count("burn-in"), phases.count("evidence"), phases.count("settle")) == (5, evidence, settle)
    assert {record["prior_precision"] for record in result.history[:5]} == {1.0}
    assert len({record["prior_precision"] for record in result.history[-settle - 1 :]}) == 1
    return result


def test_the_prior_stays_in_burn_in_and_while_the_weights_settle():
    settled(3, 4)


@pytest.mark.exhaustive  # the phases are compared above
def test_settling_ends_at_a_mode_of_the_log_joint():
    assert exact_evidence(settled(75, 420)).mode_decrement() < 0.1


@pytest.mark.parametrize(
    ("method", "structure"),
    [("online", "diag"), exhaustive("joint", "lanczos"), exhaustive("online", "lanczos"), exhaustive("joint", "diag")],
)
def test_a_run_that_is_continued_ends_with_the_same_bits(method, structure, tmp_path):
    options = {"method": method, "hessian_structure": structure, "burn_in_epochs": 1}
    kept = []
    whole = train(on_epoch=kept.append, **options)
    # Saved and restored: the state is a pytree of arrays, and the history is JSON.
    leaves, tree = jax.tree.flatten(kept[1].state)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        state = jax.tree.unflatten(tree, [jnp.asarray(saved[name]) for name in saved.files])
    history = json.loads(json.dumps(kept[1].history, allow_nan=False))
    continued = train(start=kept[1]._replace(state=state, history=history), **options)
    assert same_bits(continued.state, whole.state)
    numbers = [{name: value for name, value in r.items() if "seconds" not in name} for r in whole.history]
    assert numbers == [{name: value for name, value in r.items() if "seconds" not in name} for r in continued.history]
    assert continued.prior_precision == whole.prior_precision and set(whole.prior_precision) == {"first", "last"}
    bnnlaplace.Laplace(whole.network, hessian_structure="diag", prior_precision=whole.prior_precision).fit((X, Y))


def test_the_steps_make_the_loop_and_change_no_state():
    """One epoch of one batch of all data, by hand."""
    optimizer, prior_optimizer = optax.sgd(0.1), optax.sgd(0.2)
    settings = MarglikSettings(optimizer, prior_optimizer, 60)
    state = initial_state(settings, NETWORK)
    model = settings, NETWORK, bnnlaplace.categorical()
    with_gradient = evidence_step(*model, state, (X, Y), jax.random.key(0))
    after = map_step(*model, with_gradient, (X, Y), jax.random.key(0), train_prior=True)
    assert same_bits(state, initial_state(settings, NETWORK))

    def log_joint(params, log):
        log_probs = jax.nn.log_softmax(outputs(params, X))[jnp.arange(60), Y].sum()
        squares = {name: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(group)) for name, group in params.items()}
        return -log_probs + 0.5 * sum(jnp.exp(log[name]) * squares[name] for name in log)

    gradients = jax.grad(log_joint, (0, 1))(state.params, state.log_precision)
    assert jax.tree.structure(with_gradient.held) == jax.tree.structure(gradients)
    moves = ((state.params, after.params, 0.1), (state.log_precision, after.log_precision, 0.2))
    for (before, new, rate), gradient, held in zip(moves, gradients, with_gradient.held, strict=True):
        wanted = jax.tree.map(lambda w, g, h, rate=rate: w - rate * (g + h) / 60, before, gradient, held)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), new, wanted)


def test_a_heavy_example_counts_as_often_in_batches_as_in_all_data():
    """One example of class 0 weighs as much as all 31 of class 1. Eight others have weight zero."""
    weights = np.r_[31.0, np.ones(31), np.zeros(8)].astype(np.float32)
    labels = np.r_[np.zeros(1), np.ones(31), np.full(8, 2)].astype(int)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((1, 3)))
    rate = optax.adam(optax.cosine_decay_schedule(0.1, 800))
    options = {"num_epochs": 100, "batch_size": 4, "burn_in_epochs": 99, "num_matvecs": 2, "prior_precision": 1e-3}
    data = np.ones((40, 1), np.float32), labels, weights
    result = train(network, data, rate, method="online", evidence_every=1, prior_structure="scalar", **options)
    assert int(result.state.step) == 800
    probability = jax.nn.softmax(result.network(result.network.params, np.ones((1, 1), np.float32)))[0, 0]
    assert 0.42 < probability < 0.58  # of the ratio of sums it would be a tenth


def test_batches_that_are_read_again_and_weights_of_examples():
    """Examples of weight zero do not count, whatever they hold."""
    weights = np.repeat([1.0, 0.0], [40, 20]).astype(np.float32)
    spoiled = np.where(weights[:, None] > 0, X, np.float32(7))
    options = {"num_epochs": 2, "evidence_every": 1, "curvature_batch_size": 40}
    some = train(data=[(X[:40], Y[:40])], **options)
    weighted = train(data=[(spoiled[:40], Y[:40], weights[:40]), (spoiled[40:], Y[40:], weights[40:])], **options)
    assert same_bits(some.state.step, weighted.state.step)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *((r.state.params, r.state.log_precision) for r in (some, weighted)),
    )


def test_the_network_in_training_mode_is_the_one_that_is_trained_and_its_statistics_the_ones_that_are_expanded():
    seen = []

    def train_forward(params, frozen, x, key):
        seen.append(jax.random.key_data(key).shape)
        return outputs(params, x), jax.tree.map(lambda leaf: leaf + 1, frozen)

    network = bnnlaplace.Network(NETWORK.forward, NETWORK.params, {"count": jnp.zeros(())})
    result = train(network, num_epochs=1, train_forward=train_forward)
    assert float(result.network.frozen["count"]) == 3.0 and seen  # three steps
    # Its log-determinant moves the prior alone: of the weights it is that of another function.
    held_weights, held_precisions = result.state.held
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held_weights))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(held_precisions))


def test_the_held_gradient_is_a_mean_first_and_then_a_moving_average():
    settings = MarglikSettings(optax.sgd(0.1), optax.sgd(0.1), 60, memory=2)
    model = settings, NETWORK, bnnlaplace.categorical()
    state, single = initial_state(settings, NETWORK), []
    for number in range(3):
        key = jax.random.key(number)
        single.append(float(evidence_step(*model, initial_state(settings, NETWORK), (X, Y), key).held[1]["first"]))
        state = evidence_step(*model, state, (X, Y), key)
    assert float(state.held[1]["first"]) == pytest.approx(0.25 * (single[0] + single[1]) + 0.5 * single[2], rel=1e-5)


@pytest.mark.parametrize("method", usual(["online"], ["joint", "online"]))
def test_what_is_not_finite_names_the_step_and_leaves_the_last_good_result(method):
    kept = []

    def poisoned(schedule_step):
        return jnp.where(schedule_step < 4, 1e-2, 1e30)

    with pytest.raises(FloatingPointError, match=r"at step [67], in epoch 2; use a smaller learning rate"):
        train(optimizer=optax.sgd(poisoned), method=method, on_epoch=kept.append)
    assert len(kept) == 1 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept[0].state.params))


def test_the_history_has_errors_and_gradient_norms():
    first, second, *_ = train(num_epochs=3, evidence_every=2, prior_structure="scalar").history
    # Steps 0 and 2 of the first epoch: their spread is the error. One probe of step 4 alone has none.
    assert first["log_evidence_sem"] > 0 and second["log_evidence_sem"] is None
    assert first["gradient_norm"] > 0 and first["log_determinant_gradient_norm"] > 0
    assert first["seconds_per_evidence_step"] > 0 and math.isfinite(first["loss"])
    batches = [(X[:40], Y[:40]), (X[40:], Y[40:])]
    online = train(data=batches, optimizer=optax.sgd(0.0), num_epochs=1, method="online", evidence_every=1).history[0]
    assert online["log_evidence_sem"] > 0 and online["log_determinant_gradient_norm"] == 0
    # The weights stay, so that the loss of the epoch is that of all data; each batch has another one.
    negative = -jax.nn.log_softmax(outputs(WEIGHTS, X))[jnp.arange(60), Y]
    squares = 0.5 * sum(np.sum(leaf**2) for leaf in jax.tree.leaves(WEIGHTS))
    assert online["loss"] == pytest.approx((float(negative.sum()) + squares) / 60, rel=1e-5)
    assert abs(negative[:40].mean() - negative[40:].mean()) > 0.01


BAD = {
    "method": ({"method": "offline"}, r"method=...\) must be 'joint' or 'online'; got 'offline'"),
    "structure": ({"hessian_structure": "kron"}, r"must be 'lanczos' or 'diag'; got 'kron'"),
    "prior structure": ({"prior_structure": "diag"}, r"must be 'scalar' or 'layerwise'; got 'diag'"),
    "optimizer of torch": ({"optimizer": "adam"}, r"optimizer=...\) must be an optax optimiser; got str.*try optax"),
    "depth of a diagonal": (
        {"hessian_structure": "diag", "num_probes": 4},
        r"num_probes=...\) must be left out unless hessian_structure='lanczos'; got 4 with 'diag'",
    ),
    "rate of online": (
        {"method": "online", "prior_optimizer": optax.sgd(1.0)},
        r"prior_optimizer=...\) must be left out unless method='joint'",
    ),
    "gradient of online": ({"method": "online", "gradient": "quadrature"}, "must be left out unless method='joint'"),
    "no epochs left": ({"burn_in_epochs": 3, "settle_epochs": 1}, "must leave epochs between .*; got 4 with 3 and 1"),
    "no evidence": (
        {"method": "online", "evidence_every": 4, "burn_in_epochs": 1},
        r"evidence_every=...\) must be at most .* 3, .*; got 4 with num_epochs=4, burn_in_epochs=1 and settle",
    ),
    "no curvature": ({"curvature_batch_size": 0}, r"curvature_batch_size=...\) must be an integer from 1 to 60; got 0"),
    "gradient of a diagonal": (
        {"hessian_structure": "diag", "gradient": "quadrature"},
        r"gradient=...\) must be left out unless hessian_structure='lanczos'; got 'quadrature' with 'diag'",
    ),
    "memory of online": (
        {"method": "online", "evidence_memory": 10},
        r"evidence_memory=...\) must be left out unless method='joint'",
    ),
    "groups of one precision": (
        {"prior_structure": "scalar", "prior_groups": lambda path: path},
        r"prior_groups=...\) must be left out unless prior_structure='layerwise'",
    ),
    "size of batches": (
        {"data": [(X, Y)], "batch_size": 20},
        r"batch_size=...\) must be left out unless the data are arrays; got 20 with batches",
    ),
    "a function as network": ({"network": outputs}, r"^marglik_training\(network=...\) must be a bnnlaplace.Network"),
    "a number as start": ({"start": 3}, r"^marglik_training\(start=...\) must be a MarglikResult.*; got int"),
    "no optimizer": ({"optimizer": (None,)}, r"^marglik_training\(optimizer=...\) must be an optax optimiser"),
    "groups": ({"prior_groups": 3}, r"^marglik_training\(prior_groups=...\) must be a function; got int 3; try lambda"),
    "groups without names": ({"prior_groups": len}, r"^marglik_training\(prior_groups=...\) must return the name"),
    "train_forward": ({"train_forward": 3}, r"^marglik_training\(train_forward=...\) must be a function; got int 3"),
    "train_forward of two": (
        {"train_forward": outputs},
        r"^marglik_training\(train_forward=...\) must take \(params, frozen, x, key\); .* raised TypeError",
    ),
    "train_forward without state": (
        {"train_forward": lambda params, frozen, x, key: outputs(params, x)},
        r"^marglik_training\(train_forward=...\) must return \(outputs, frozen\), with outputs \(20, 3\)",
    ),
    "on_epoch": ({"on_epoch": 3}, r"^marglik_training\(on_epoch=...\) must be a function; got int 3"),
    "likelihood": (
        {"likelihood": "regresion"},
        r"^marglik_training\(likelihood=...\) must be one of .*got 'regresion'",
    ),
    "noise": ({"sigma_noise": 2.0}, r"^marglik_training\(sigma_noise=...\) must be left out unless"),
    "depth": ({"num_matvecs": 1000}, r"^marglik_training\(num_matvecs=...\) must be an integer from 1 to 36; got 1000"),
    "depth of few": (
        {"curvature_batch_size": 1},
        r"from 1 to 3; got 4; a curvature batch has 3 outputs, the network 36",
    ),
    "microbatch": ({"microbatch": 0}, r"^marglik_training\(microbatch=...\) must be an integer of at least 1; got 0"),
    "no data": ({"data": 3}, r"^marglik_training\(data=...\) must be two arrays"),
    "too few labels": ({"data": (X, Y[1:])}, r"^marglik_training\(data=\(x, y\)\) must hold as many targets"),
    "another group": ({"prior_precision": {"middle": 1.0}}, r"one for each of \['first', 'last'\]; got the names"),
    "precision zero": ({"prior_precision": 0.0}, r"prior_precision=...\) must be one positive, finite number; got 0.0"),
    "batches read once": ({"data": iter([(X, Y)])}, r"data=...\) must be .*read again; got an iterator"),
    "a large curvature batch": ({"curvature_batch_size": 61}, r"curvature_batch_size=...\) must be .*60.*got 61"),
    "labels of other classes": ({"data": (X, Y + 3)}, "labels"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_named(fault, unchecked_annotations):
    options, message = BAD[fault]
    with pytest.raises((ValueError, TypeError), match=message):
        train(**options)


def test_batches_that_become_fewer_are_named():
    class Dwindling:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X[:20], Y[:20])] * (3 if self.passes == 1 else 2))

    with pytest.raises(ValueError, match=r"^marglik_training\(data=...\) must give the same batches in every pass"):
        train(data=Dwindling(), method="online")


SETTINGS = MarglikSettings(optax.adam(1e-2), optax.adam(0.03), 60)
# As if after two epochs of "joint" with one precision for each layer.
TWO_EPOCHS = [{"epoch": epoch, "method": "joint", "phase": "evidence"} for epoch in (1, 2)]
START = MarglikResult(NETWORK, {"first": 1.0, "last": 1.0}, TWO_EPOCHS, initial_state(SETTINGS, NETWORK))
OTHER_START = {
    "shorter": ({"num_epochs": 1}, r"num_epochs=...\) must count the epochs of start, too; got 1 with a start of 2"),
    "method": ({"method": "online"}, r"method=...\) must be that of start, 'joint'; got 'online'"),
    "structure": ({"prior_structure": "scalar"}, r"prior_structure=...\) must be that of start, 'layerwise'; got 'sc"),
    "groups": ({"prior_groups": lambda path: path}, r"prior_groups=...\) must give the groups of start, \['first',"),
    "network": ({"network": NETWORK.linearised()}, r"network=...\) must be that of start; .* other names or shapes"),
    "optimizer": ({"optimizer": optax.sgd(0.1)}, r"\(optimizer=...\) must be that of start"),
    "prior optimizer": ({"prior_optimizer": optax.sgd(0.1)}, r"prior_optimizer=...\) must be that of start"),
}


@pytest.mark.parametrize("fault", OTHER_START)
def test_a_start_of_another_training_is_named(fault):
    options, message = OTHER_START[fault]
    with pytest.raises(ValueError, match=message):
        train(start=START, **options)


def test_a_start_that_is_as_long_as_the_run_is_its_result():
    result = train(start=START, num_epochs=2)
    assert same_bits(result.state, START.state) and result.history == START.history
