"""Random networks and networks that mix examples are refused. Rounding is not mistaken for either."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, X, linen_network, nnx_network, plain_network

from bnnlaplace import Network
from bnnlaplace.model.determinism import check_deterministic

REFUSED = {
    "Linen batch norm": (lambda: linen_network(train=True), "ModifyScopeVariableError.*train=False, determ.*=True"),
    "Linen dropout": (lambda: linen_network(deterministic=False), "InvalidRngError.*train=False, deterministic=True"),
    "NNX in training mode": (lambda: nnx_network(False), r"same outputs at every call.*model.eval\(\)"),
    "NNX batch norm": (lambda: nnx_network(False, dropout=False), r"whatever else is in its batch.*model.eval\(\)"),
    "NNX dropout": (lambda: nnx_network(False, batch_norm=False), r"same outputs at every call.*model.eval\(\)"),
    "random": (
        lambda: plain_network(lambda p, x: (x + np.random.default_rng().normal()) @ p["w"]),
        "same outputs at every call",
    ),
    "coupled": (lambda: plain_network(lambda p, x: (x - x.mean(0)) @ p["w"]), "whatever else is in its batch"),
    "barely coupled": (
        lambda: plain_network(lambda p, x: (x + 2e-3 * x.mean(0)) @ p["w"]),
        "whatever else is in its batch; .* among copies of itself",
    ),
    "divided by the size of the batch": (
        lambda: plain_network(lambda p, x: x @ p["w"] / len(x)),
        "whatever else is in its batch; .* alone",
    ),
}


class Outputs(nn.Module):
    """A module whose outputs are of a kind."""

    kind: str

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(3)(x)
        return {"dictionary": {"logits": logits}, "word": "logits", "vector": logits[:, 0]}[self.kind]


@pytest.mark.parametrize("kind", ["dictionary", "word", "vector"])
def test_a_module_with_other_outputs_is_refused_for_its_outputs(kind):
    """The program of the check cannot return a word, and JAX says so in words of its own."""
    module = Outputs(kind)
    variables = nn.Dense(3).init(jax.random.key(0), X)["params"]
    network = Network.from_linen(module, {"params": {"Dense_0": variables}})
    with pytest.raises(ValueError, match="^a network's outputs must be one array"):
        check_deterministic(network, X)


def test_a_function_that_keeps_state_is_called_and_not_traced():
    """A trace would leave its own values in the state, and what is refused here would be broken."""
    state = {"key": jax.random.key(0)}

    def noisy(w, x):
        state["key"], key = jax.random.split(state["key"])
        return x @ w + jax.random.normal(key, (len(x), 3))

    with pytest.raises(ValueError, match="^a network must give the same outputs at every call"):
        check_deterministic(Network.from_function(noisy, jnp.ones((X.shape[1], 3))), X)
    jax.random.split(state["key"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_function_of_one_example_is_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_deterministic(build(), X)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_one_passes(kind):
    check_deterministic(KINDS[kind](), X)


def test_rounding_of_long_sums_is_not_a_dependence():
    """Sums of 100,000 equal numbers round differently by more than half of the digits if they are taken in other ways.

    A matrix product for one example adds up in another order than one for several examples.
    """
    inputs = np.full((5, 100_000), 0.7, np.float32) * np.linspace(1, 2, 5, dtype=np.float32)[:, None]
    weights = jnp.full((100_000, 2), 0.1)
    check_deterministic(Network.from_function(lambda w, x: x @ w, weights), inputs)

    def rounded(w, x):
        """The same where the rounding is known: in a batch of one, a part of 1e-2 is lost."""
        return (x @ w) * (1 - 1e-2 * (len(x) == 1))

    check_deterministic(Network.from_function(rounded, weights), inputs)
    coupled = Network.from_function(lambda w, x: (x - 0.01 * x.mean(0)) @ w, weights)
    with pytest.raises(ValueError, match="whatever else is in its batch"):
        check_deterministic(coupled, inputs)


def test_is_called_to_be_checked_once():
    calls = []

    def counted(params, x):
        calls.append(len(x))
        return x @ params

    network = Network.from_function(counted, jnp.ones((2, 3)))
    check_deterministic(network, X[:, :2])
    assert calls == [5, 5, 5, 1]
    check_deterministic(network.with_params(jnp.zeros((2, 3))), X[:, :2])
    assert calls == [5, 5, 5, 1]
    broken = Network.from_function(lambda w, x: x @ w * np.random.default_rng().normal(), jnp.ones((2, 3)))
    for _ in range(2):  # what has not passed is not remembered
        with pytest.raises(ValueError, match="same outputs at every call"):
            check_deterministic(broken, jnp.ones((5, 2)))


def test_what_could_not_be_found_out_is_not_remembered():
    """One example, or equal ones, cannot show whether outputs depend on the rest of the batch."""
    network = Network.from_function(lambda w, x: (x - x.mean(axis=0)) @ w + 1, jnp.ones((2, 3)))
    for inputs in (X[:1, :2], np.ones((5, 2), np.float32)):
        check_deterministic(network, inputs)
    with pytest.raises(ValueError, match="whatever else is in its batch"):
        check_deterministic(network, X[:, :2])
