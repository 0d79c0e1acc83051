"""Pytrees and fitted posteriors on disk: written whole or not at all, with a SHA-256 manifest."""

from bnnlaplace.checkpoint.atomic import replacing, write_text
from bnnlaplace.checkpoint.errors import CheckpointError
from bnnlaplace.checkpoint.pytree import FORMAT_VERSION, find_damage, load_pytree, restructure, save_pytree

__all__ = [
    "CheckpointError",
    "FORMAT_VERSION",
    "find_damage",
    "load_pytree",
    "replacing",
    "restructure",
    "save_pytree",
    "write_text",
]
