"""Likelihoods, one in each file, and the record that they are."""
