"""Releases of the compiler whose results are wrong."""

import os
import warnings
from importlib.metadata import version

# jaxlib 0.10.2 computes wrong sums of products on CPUs, if one factor is shared by all elements of a batch and the sum
# is used at once, as in vmap(lambda v: v - sum(p * v)), where the arrays have more than some 30,000 numbers:
# jax-ml/jax#39103. The curvature of the softmax has this form, and so do derivatives of normalisation layers. 0.10.1
# and 0.11.0 are right.
WRONG_RELEASE = "0.10.2"
# The switch that mends it.
SWITCH = "--xla_cpu_experimental_ynn_fusion_type="


def warn_of_wrong_sums(release: str | None = None, flags: str | None = None) -> None:
    """Warn if the installed jaxlib computes wrong sums on CPUs, and say what to do.

    Parameters
    ----------
    release
        The release of jaxlib; by default the one that is installed.
    flags
        The options of XLA; by default those of the environment.
    """
    release = version("jaxlib") if release is None else release
    flags = os.environ.get("XLA_FLAGS", "") if flags is None else flags
    if release == WRONG_RELEASE and SWITCH not in flags.split():
        warnings.warn(
            f"jaxlib {WRONG_RELEASE} returns wrong sums on CPUs, and with it wrong curvature (jax-ml/jax#39103); "
            f"install another release, such as 0.10.1, or set XLA_FLAGS={SWITCH} before Python starts",
            RuntimeWarning,
            stacklevel=2,
        )
