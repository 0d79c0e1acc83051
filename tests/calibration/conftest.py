"""Predictions whose calibration is known to be wrong, shared by the tests of metrics and of the bootstrap."""

import numpy as np
import pytest
from scipy.special import softmax

NUM_CLASSES = 5


@pytest.fixture(scope="session")
def case():
    """Overconfident predictions: labels drawn from softmax(logits), probabilities from softmax(2 logits)."""
    rng = np.random.default_rng(1)
    logits = 1.5 * rng.normal(size=(200, NUM_CLASSES))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((200, 1))).sum(axis=1)
    outside = softmax(1.2 * rng.normal(size=(150, NUM_CLASSES)), axis=1)
    return softmax(2 * logits, axis=1), labels, outside


@pytest.fixture(scope="session")
def ece_by_loop():
    """The expected calibration error by its definition."""

    def by_loop(probs, labels, edges, closed):
        total, counted = 0.0, 0
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            members = []
            for n, confidence in enumerate(probs.max(axis=1)):
                if low < confidence <= high if closed == "above" else low <= confidence < high + (high == edges[-1]):
                    members.append(n)
            counted += len(members)
            if members:
                hits = np.mean([float(probs[n].argmax() == labels[n]) for n in members])
                total += len(members) * abs(hits - np.mean([probs[n].max() for n in members]))
        assert counted == len(probs), "a confidence outside all bins is a bug of the test"
        return total / len(probs)

    return by_loop
