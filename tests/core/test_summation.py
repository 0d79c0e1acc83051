"""Sums of many terms: a running sum in float32 fails all of these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.core.summation import accumulated
from bnnlaplace.curvature import microbatch as mb

# Rounded down at almost every addition once the sum is large, so that a running sum loses one part in a thousand.
TERM, COUNT = np.float32(1.1), 400_000


@pytest.fixture(scope="module")
def terms():
    return jnp.full((COUNT, 2), TERM)


def test_a_running_sum_would_fail(terms):
    """The control: the numbers are hard enough to tell the two apart."""
    plain = jax.jit(lambda terms: jax.lax.scan(lambda total, term: (total + term, None), jnp.zeros(2), terms)[0])
    assert np.abs(np.asarray(plain(terms)) / (COUNT * float(TERM)) - 1).min() > 1e-4


def test_sums_over_microbatches(terms):
    found = jax.jit(lambda terms: mb.summed(lambda term: term, terms))(terms)
    np.testing.assert_allclose(found, COUNT * float(TERM), rtol=1e-7)


def test_derivatives_of_a_sum(terms):
    """The rounding that is summed beside the total has no derivative of its own."""
    loss, pullback = jax.vjp(jax.jit(lambda terms: mb.summed(lambda term: term, terms)), terms[:5])
    np.testing.assert_array_equal(pullback(jnp.array([1.0, 2.0]))[0], np.broadcast_to([1.0, 2.0], (5, 2)))
    assert jax.jvp(lambda terms: mb.summed(lambda term: term, terms), (terms[:5],), (terms[:5],))[1] == pytest.approx(
        loss
    )


def test_sums_over_batches():
    """Arrays of JAX keep their type and their digits; numbers of NumPy are summed in float64."""
    batches = ({"device": jnp.full(2, TERM) * 1e5, "host": np.float64(0.1)} for _ in range(2000))
    found = accumulated(batches)
    assert found["device"].dtype == np.float32
    np.testing.assert_allclose(found["device"], 2000 * float(jnp.float32(TERM) * 1e5), rtol=1e-7)
    assert found["host"] == pytest.approx(200, abs=1e-10)
    assert accumulated(iter(())) is None
