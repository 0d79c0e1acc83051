"""What the disk or the memory refuses is recognised in whatever it arrives."""

import errno
import os

import numpy as np
import pytest

from bnnlaplace.core.memory import MemoryEstimate
from training import faults


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO])
def test_a_disk_that_refuses_is_named_with_the_file(number: int) -> None:
    fault = faults.describe(OSError(number, os.strerror(number), "/some/file"))
    assert fault is not None and f"got /some/file: {os.strerror(number)}; free the disk" in fault


@pytest.mark.parametrize(
    "error",
    [
        raised_from(RuntimeError("saving failed"), OSError(errno.ENOSPC, "No space left on device")),
        ValueError("RESOURCE_EXHAUSTED: Error writing\n\n'a/0': No space left on device [os_error_code='28']"),
        ExceptionGroup("two", [ValueError("x"), OSError(errno.ENOSPC, "No space left on device")]),
    ],
)
def test_a_full_disk_is_found_behind_other_errors(error: BaseException) -> None:
    fault = faults.describe(error)
    assert fault is not None and "No space left on device; free the disk" in fault and "\n" not in fault


def test_output_that_nobody_reads_is_not_a_full_disk() -> None:
    assert "must be read to the end; got Broken pipe" in faults.describe(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_a_sentence_that_says_all_is_kept() -> None:
    said = "a save must be able to write to x; got No space left on device; free the disk"
    assert faults.describe(OSError(said)) == said


def test_memory_is_named_with_the_options_that_lower_it() -> None:
    with pytest.raises(MemoryError) as caught:
        MemoryEstimate(needed=10**12, free=10**9, shrink="use fewer vectors").check()
    fault = faults.describe(caught.value)
    assert (
        "memory: this fit needs about 1 TB of memory and 1 GB are free; use fewer vectors; free memory, or lower --curv"
        in fault
    )
    with pytest.raises(MemoryError) as caught:
        np.empty(2**57)
    assert "Unable to allocate" in faults.describe(caught.value)
    assert "an allocation failed" in faults.describe(MemoryError())
    assert "lower" in faults.describe(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"))


def test_other_errors_are_left_alone() -> None:
    assert faults.describe(ValueError("the weights must be finite")) is None
    assert faults.describe(raised_from(KeyError("a"), TypeError("b"))) is None
