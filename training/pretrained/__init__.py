"""Weights that others have trained: read from their files, given the names of the Flax network, and kept."""
