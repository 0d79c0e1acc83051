"""Permutations and stratified subsets: exact counts, pure functions of the seed, independence of the NumPy release."""

import numpy as np
import pytest

from training.data.shuffle import permutation, stratified_indices


def test_permutation_is_one_and_is_pinned():
    assert permutation(3, 5, 8).tolist() == [0, 6, 2, 1, 3, 4, 7, 5]
    assert sorted(permutation(0, 0, 1000)) == list(range(1000))


def test_permutation_depends_on_seed_and_stream_and_takes_any_integer():
    orders = {tuple(permutation(seed, stream, 50)) for seed in (-1, 0, 1) for stream in (0, 1, 2**64 - 1)}
    assert len(orders) == 9


def test_permutations_are_uniform():
    # Among 6,000 permutations of three elements, each of the six should come up 1,000 +- 29 times.
    codes = [int(permutation(7, stream, 3) @ [100, 10, 1]) for stream in range(6000)]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 4 * 29


@pytest.mark.parametrize("count", [0, 1, 7, 10, 99, 100])
def test_stratified_subset_keeps_class_shares_to_within_one(count):
    labels = np.repeat([0, 1, 2, 5], [50, 30, 19, 1])[permutation(1, 1, 100)]
    chosen = stratified_indices(labels, count, seed=4)
    assert len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    for label in (0, 1, 2, 5):
        assert abs(np.sum(labels[chosen] == label) - count * np.mean(labels == label)) < 1


def test_stratified_subset_depends_on_the_seed_only():
    labels = np.arange(60) % 3
    assert np.array_equal(stratified_indices(labels, 30, 1), stratified_indices(labels, 30, 1))
    assert not np.array_equal(stratified_indices(labels, 30, 1), stratified_indices(labels, 30, 2))


@pytest.mark.parametrize("count", [-1, 4])
def test_stratified_subset_of_impossible_size(count):
    with pytest.raises(ValueError, match=f"must lie in 0 to 3; got {count}"):
        stratified_indices(np.zeros(3, int), count, 0)
