"""Findings that rest on several tables of results. The page begins with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evidence_studies import NATURAL, SHORT, STRUCTURES, WEIGHTS
from result_table import Check, all_of, as_list
from study_table import AGAINST_MAP, AGAINST_T, DIGITS, FEW, SHIFTED, point, posterior
from training_studies import TRAININGS


@dataclass(frozen=True)
class Finding:
    """A statement, and whether the tables that it rests on support it."""

    text: str
    """In Markdown."""
    holds: Mapping[str, Check]
    """A check for the rows of each table, by the name of the table."""


def lines(numbers: Mapping[str, Any]) -> list[str]:
    """Return the findings as a list.

    Raises
    ------
    SystemExit
        A table contradicts a finding.
    """
    for finding in FINDINGS:
        for table, holds in finding.holds.items():
            if not holds(numbers[table]["rows"]):
                raise SystemExit(f"{finding.text} must agree with table {table!r}; write it anew in docs/in_short.py")
    return as_list([finding.text for finding in FINDINGS])


_LAST_LAYER = SHORT.methods[posterior("last-layer-full-variational")]
_LAST_LAYER_LAPLACE = SHORT.methods[posterior("last-layer-full-laplace")]
_FOLDED_G = WEIGHTS.methods[posterior("lanczos-variational-g-folded")]
_LANCZOS = WEIGHTS.methods[posterior("lanczos-variational")]
_LANCZOS_LAPLACE = WEIGHTS.methods[posterior("lanczos-laplace")]
_ENSEMBLE = TRAININGS.methods[point("ensemble")]
_ANYWHERE = dict.fromkeys(DIGITS, "better")
_CLEAN = {"clean_100": "worse", "clean_300": "worse"}

FINDINGS = [
    Finding(
        "**With images that training has not seen, or networks of folds: a temperature.** On images like the training "
        "images a variational posterior by its bound is better than it in one case alone: with 1,257 digits, a fifth "
        "of them with wrong labels. Folds score by these labels, and MAP without a temperature is better still.",
        {
            "study": all_of(
                SHORT.says_not(_LAST_LAYER, AGAINST_T, **_ANYWHERE, clean_1257="better"),
                SHORT.says(_LAST_LAYER, AGAINST_T, wrong_1257="better"),
                SHORT.says(_LAST_LAYER, AGAINST_MAP, wrong_1257="worse"),
            ),
            "study_weights": all_of(
                *(WEIGHTS.says_not(name, AGAINST_T, **_ANYWHERE) for name in (_LANCZOS, _FOLDED_G))
            ),
            "study_structures": all_of(
                *(
                    STRUCTURES.says_not(name, AGAINST_T, **dict.fromkeys(FEW, "better"))
                    for key, name in STRUCTURES.methods.items()
                    if key[1].endswith("variational")
                )
            ),
            "study_natural": NATURAL.says(_LAST_LAYER, AGAINST_T, clean_2000="worse"),
        },
    ),
    Finding(
        "**With training images alone: a variational posterior by its bound, if they are few.** With up to 300 digits "
        "that of the last layer is better than MAP or not told from it. So is that of all weights with batch "
        "normalisation folded into kernels and a g-prior. Laplace by its evidence is worse than MAP there if labels "
        "are clean. With 1,257 digits the variational one is not told from MAP, and worse if labels are wrong. With "
        "natural images both are better than MAP, and Laplace, which is wider, has the lower NLL.",
        {
            "study": all_of(
                SHORT.says(_LAST_LAYER_LAPLACE, AGAINST_MAP, **_CLEAN),
                SHORT.says_not(_LAST_LAYER, AGAINST_MAP, **dict.fromkeys(DIGITS, "worse")),
                SHORT.says(_LAST_LAYER, AGAINST_MAP, clean_100="better", clean_1257="alike", wrong_1257="worse"),
            ),
            "study_weights": all_of(
                WEIGHTS.says(_LANCZOS_LAPLACE, AGAINST_MAP, **_CLEAN),
                WEIGHTS.says_not(_FOLDED_G, AGAINST_MAP, **dict.fromkeys(DIGITS, "worse")),
                WEIGHTS.says(_FOLDED_G, AGAINST_MAP, wrong_100="better", wrong_300="better"),
            ),
            "study_natural": all_of(
                NATURAL.says(_LAST_LAYER, AGAINST_MAP, clean_2000="better"),
                NATURAL.says(_LAST_LAYER_LAPLACE, AGAINST_MAP, clean_2000="better"),
                NATURAL.orders("NLL", _LAST_LAYER_LAPLACE, _LAST_LAYER, regimes=["clean_2000"]),
            ),
        },
    ),
    Finding(
        "**For shifted and foreign images: that of all weights, folded and with a g-prior.** With clean labels it is "
        "better than the temperature under shifts, and it detects images of noise better than MAP does.",
        {
            "study_weights": all_of(
                WEIGHTS.says(_FOLDED_G, SHIFTED, clean_100="better", clean_300="better"),
                WEIGHTS.orders("AUROC", "MAP", _FOLDED_G, regimes=DIGITS),
            )
        },
    ),
    Finding(
        "**With time for more trainings: an ensemble.** Five networks of 100 clean images are better than the "
        "temperature.",
        {"study_trainings": TRAININGS.says(_ENSEMBLE, AGAINST_T, clean_100="better")},
    ),
]
