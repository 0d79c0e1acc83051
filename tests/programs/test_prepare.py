"""`python -m training.data prepare` in processes of its own: interrupted, killed, and without TensorFlow."""

import subprocess
import sys

from training.data import catalog
from training.data.reading import load_split


def test_interruption_leaves_nothing_and_does_not_wait_for_downloads(tmp_path):
    # The thread stands for a download of TFDS that is under way.
    code = (
        "import runpy, sys, threading, time; from training.data import digits\n"
        "def interrupt(self, split):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "digits.Digits._generate_examples = interrupt\n"
        "sys.argv[1:] = ['prepare', 'digits', '--dir', sys.argv[1]]\n"
        "runpy.run_module('training.data', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=40, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"interrupted: digits is not prepared\n")
    assert list((tmp_path / "digits").iterdir()) == []


def test_a_killed_preparation_is_not_taken_for_a_set(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from training.data import catalog, digits\n"
        "digits.Digits._generate_examples = lambda self, split: os._exit(9)\n"
        "catalog.prepare('digits', Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60).returncode == 9
    assert [path.name.startswith("incomplete") for path in (tmp_path / "digits").iterdir()] == [True]
    assert catalog.find("digits", tmp_path) is None
    assert len(load_split("digits", "test", tmp_path)[0].labels) == 360
    assert catalog.prepared_names(tmp_path) == ["digits"]


def test_tensorflow_is_never_imported(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from training.data.load import load; from training.config import Data\n"
        "print(len(load(Data(dir=Path(sys.argv[1]))).train.labels))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], timeout=60, capture_output=True)
    assert (done.stdout.decode(), done.stderr.decode()) == ("1257\n", "")
