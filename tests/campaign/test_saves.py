"""Saves that are killed, and saves to full disks: what was there before, or what was saved, is there in whole."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from campaign.test_damaged import fit

import bnnlaplace
from bnnlaplace.checkpoint import CheckpointError

KILLS = 30


def test_a_killed_save_leaves_the_old_or_the_new(tmp_path, tally):
    script = Path(__file__).with_name("saves.py")
    run = [sys.executable, str(script), str(tmp_path), str(KILLS), "1"]
    program = subprocess.run(run, capture_output=True, text=True, timeout=300)
    outcomes = [json.loads(line) for line in program.stdout.splitlines()]
    for outcome in outcomes:
        tally("kill of a save", outcome.partition(":")[0])
    assert outcomes == ["same"] * KILLS, program.stderr


@contextmanager
def files_of_at_most(size: int):
    """Let writes fail as they do on a full disk, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 10, 50, 200, 1000, 3000])
@pytest.mark.parametrize("old", [True, False])
def test_a_save_to_a_full_disk_is_one_sentence(tmp_path, tally, capfd, size, old):
    la, path = fit("kron"), tmp_path / "posterior"
    if old:
        la.save(path)
    with pytest.raises(CheckpointError) as caught, files_of_at_most(size):
        la.with_prior_precision(7.0).save(path)
    message, printed = str(caught.value), "".join(capfd.readouterr())
    is_whole = os.listdir(tmp_path) == (["posterior"] if old else [])
    if old:
        again = bnnlaplace.Laplace.load(path, la.network)
        is_whole &= np.array_equal(again.log_marginal_likelihood().mean, la.log_marginal_likelihood().mean)
    outcome = "error" if message.isprintable() and not printed else "raw"
    tally("save to a full disk", outcome if is_whole else "lost")
    assert outcome == "error" and is_whole and "File too large" in message
