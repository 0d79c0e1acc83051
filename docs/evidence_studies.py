"""Studies of posteriors whose prior precision the evidence alone chooses: their tables, and what follows from them."""

from result_table import Remark, all_of
from study_table import (
    AGAINST_MAP,
    AGAINST_T,
    AVERAGED,
    DIGITS,
    FEW,
    MAP,
    MORE_DIGITS,
    SHIFTED,
    TO_FOLDS,
    Method,
    Shown,
    point,
    posterior,
)

_LAST_LAYER: dict[Method, str] = {
    posterior("last-layer-full-laplace"): "last layer, Laplace, by the evidence",
    posterior("last-layer-full-variational"): "last layer, variational, by the evidence",
}

SHORT = Shown("study_digits_short", MAP | _LAST_LAYER, MORE_DIGITS, TO_FOLDS)
WEIGHTS = Shown(
    "study_digits_weights",
    MAP
    | {
        posterior("lanczos-laplace"): "all weights, Laplace, by the evidence",
        posterior("lanczos-variational"): "all weights, variational, by the evidence",
        posterior("lanczos-variational-g-folded"): "the same, folded, with a g-prior",
    },
    DIGITS,
)
STRUCTURES = Shown(
    "study_digits_structures",
    MAP
    | {
        posterior("diag-laplace"): "diagonal, Laplace",
        posterior("diag-variational"): "diagonal, variational",
        posterior("kron-laplace"): "Kronecker factors, Laplace",
        posterior("kron-variational"): "Kronecker factors, variational",
        posterior("last-layer-kron-laplace"): "last layer, Kronecker factors, Laplace",
        posterior("last-layer-kron-variational"): "last layer, Kronecker factors, variational",
    },
    FEW,
    TO_FOLDS,
)
NATURAL = Shown(
    "study_cifar10_short",
    {
        point("map"): "MAP",
        point("map-t-split"): "MAP + temperature, from a held-out tenth of the training images",
        point("map-t-validation"): "MAP + temperature, from the validation images",
        **_LAST_LAYER,
        posterior("last-layer-full-laplace-by-folds", choice="folds"): "last layer, Laplace, by the held-out tenth",
    },
    {"clean_2000": "2,000 images"},
    foreign={"noise": "AUROC, noise", "cifar100": "AUROC, CIFAR-100", "notmnist": "AUROC, notMNIST"},
)
# Names of rows, for the checks of remarks.
_LAPLACE, _VARIATIONAL = _LAST_LAYER.values()
_T_OF_FOLDS = MAP[point("map-t-split")]
_ALL_LAPLACE, _ALL_VARIATIONAL, _FOLDED_G = list(WEIGHTS.methods.values())[3:]
_DIAGONAL, _DIAGONAL_VARIATIONAL, _KRON, _KRON_VARIATIONAL, _, _KRON_OF_LAST = list(STRUCTURES.methods.values())[3:]
_LAPLACE_OF_ALL, _VARIATIONAL_OF_ALL = (_DIAGONAL, _KRON), (_DIAGONAL_VARIATIONAL, _KRON_VARIATIONAL)
_CLEAN = ("clean_100", "clean_300")

TABLES = [
    SHORT.table(
        "study",
        "A posterior by the evidence alone against MAP with a temperature",
        "Networks trained by AdamW on few digits; means over five seeds on 360 test images. All seeds train on the "
        "same images, so that intervals do not tell of other training sets. The weights are not at a mode of any log "
        "joint, because decoupled weight decay has no prior. A full posterior of the last layer, whose prior precision "
        "the evidence, or its lower bound, chooses from the training images alone; probit link. One column averages "
        "probabilities over samples in its place, 100 here and 32 with Lanczos. "
        "For the calibrated NLL a temperature is fitted on one half of the test images and scored on the other. "
        "Differences in NLL have 95 % intervals over seeds and images; bold ones exclude zero. The last temperature "
        "knows 180 validation images, which no other method sees. AUROC is against images of noise.",
        [
            Remark(
                "The optimum of the Laplace evidence costs .25 to .32 nats an image with 100 or 300 clean images, and "
                ".12 with 1,257: the Gaussian at the mode is too wide. The variational posterior by its bound does "
                "not.",
                all_of(
                    SHORT.within(_LAPLACE, AGAINST_MAP, 0.245, 0.325, _CLEAN),
                    SHORT.within(_LAPLACE, AGAINST_MAP, 0.115, 0.125, ["clean_1257"]),
                    SHORT.says(_LAPLACE, AGAINST_MAP, clean_100="worse", clean_300="worse", clean_1257="worse"),
                    SHORT.says_not(_VARIATIONAL, AGAINST_MAP, clean_100="worse", clean_300="worse", clean_1257="worse"),
                ),
            ),
            Remark(
                "The variational posterior by its bound alone is **better than MAP** with 100 images, and with 300 of "
                "which a fifth has wrong labels. With 300 or 1,257 clean images the test images do not tell them "
                "apart. With 1,257 images and wrong labels it is **worse**.",
                SHORT.says(
                    _VARIATIONAL,
                    AGAINST_MAP,
                    clean_100="better",
                    wrong_100="better",
                    wrong_300="better",
                    clean_300="alike",
                    clean_1257="alike",
                    wrong_1257="worse",
                ),
            ),
            Remark(
                "Clean test images do not tell it from MAP with a temperature of folds, and under shifts of 300 or "
                "1,257 clean images it is **better**. Wrong labels make it **worse** under shifts, and with 100 "
                "images on test images as well. There the features have learnt the wrong labels, and the evidence of "
                "a last layer takes its features as given. Networks of folds have not seen the labels that they "
                "predict. They cost five more trainings.",
                all_of(
                    SHORT.says(_VARIATIONAL, AGAINST_T, clean_100="alike", clean_300="alike", clean_1257="alike"),
                    SHORT.says(_VARIATIONAL, AGAINST_T, wrong_100="worse", wrong_300="alike"),
                    SHORT.says(_VARIATIONAL, SHIFTED, clean_300="better", clean_1257="better"),
                    SHORT.says(_VARIATIONAL, SHIFTED, wrong_100="worse", wrong_300="worse", wrong_1257="worse"),
                ),
            ),
            Remark(
                "With 1,257 images of which a fifth has wrong labels the temperature of folds is **worse than MAP**, "
                "and the variational posterior is **better than that temperature**: folds score by wrong labels, and "
                "those of the test images are right.",
                all_of(
                    SHORT.says(_T_OF_FOLDS, AGAINST_MAP, wrong_1257="worse"),
                    SHORT.says(_VARIATIONAL, AGAINST_T, wrong_1257="better"),
                ),
            ),
            Remark(
                "With up to 300 images averages over samples have a higher NLL than the probit link. The probit link "
                "also counts as uncertainty what all logits of an image share, which a softmax does not see.",
                all_of(*(SHORT.rises(name, "NLL", AVERAGED, regimes=DIGITS) for name in _LAST_LAYER.values())),
            ),
        ],
        {
            "clean_100_severity.png": "100 clean images: NLL (on a logarithmic axis) against the severity of five "
            "shifts, with 95 % intervals over seeds and images. Probit link; MAP + T is the temperature from folds.",
            "clean_100_rejection.png": "100 clean images: accuracy of what is kept, if the least confident test images "
            "are rejected. The predictions of all seeds make one curve.",
            "clean_100_detection_noise.png": "100 clean images: detection of images of noise by low confidence, and "
            "how confident predictions are. The predictions of all seeds make one curve; the AUROC of the table is a "
            "mean over seeds.",
        },
    ),
    WEIGHTS.table(
        "study_weights",
        "The same for a posterior of all weights",
        "The same networks and images, with a Lanczos posterior of all weights. The last row has frozen batch "
        "normalisation folded into the kernels beside it, and for each weight a prior precision in proportion to its "
        "entry of the diagonal of the GGN.",
        [
            Remark(
                "The Laplace evidence chooses a posterior whose probabilities are nearly uniform. The variational one "
                "with the same precision for all weights is not told from MAP, and better with 100 images and wrong "
                "labels. The temperature is better than it, except with 300 clean images, which do not tell.",
                all_of(
                    WEIGHTS.within(_ALL_LAPLACE, "NLL", 1.5, 2.303, DIGITS),
                    WEIGHTS.says(
                        _ALL_VARIATIONAL,
                        AGAINST_MAP,
                        clean_100="alike",
                        wrong_100="better",
                        clean_300="alike",
                        wrong_300="alike",
                    ),
                    WEIGHTS.says(
                        _ALL_VARIATIONAL,
                        AGAINST_T,
                        clean_100="worse",
                        wrong_100="worse",
                        clean_300="alike",
                        wrong_300="worse",
                    ),
                ),
            ),
            Remark(
                "Folded, with a g-prior, it is **better than MAP** with wrong labels, and not told from it with clean "
                "ones. The temperature, which takes five more trainings, is in no regime told from it on test images. "
                "Under shifts it is **better than the temperature** with clean labels, and not told from it with wrong "
                "ones. It detects noise best, or nearly so.",
                all_of(
                    WEIGHTS.says(
                        _FOLDED_G,
                        AGAINST_MAP,
                        clean_100="alike",
                        wrong_100="better",
                        clean_300="alike",
                        wrong_300="better",
                    ),
                    WEIGHTS.says(_FOLDED_G, AGAINST_T, **dict.fromkeys(DIGITS, "alike")),
                    WEIGHTS.says(
                        _FOLDED_G,
                        SHIFTED,
                        clean_100="better",
                        wrong_100="alike",
                        clean_300="better",
                        wrong_300="alike",
                    ),
                    *(WEIGHTS.orders("AUROC", name, _FOLDED_G, regimes=_CLEAN) for name in WEIGHTS.methods.values()),
                    WEIGHTS.orders("AUROC", "MAP", _FOLDED_G, regimes=DIGITS),
                ),
            ),
            Remark(
                "The mean of the linearised network can be further from the weights than they are long, and is then "
                "another network than the one that was trained. Averages over 32 samples do not cover such a posterior."
            ),
        ],
    ),
    STRUCTURES.table(
        "study_structures",
        "The same for other structures",
        "The same networks and images, with a diagonal and with Kronecker factors. The evidence, or its lower bound, "
        "chooses every prior precision.",
        [
            Remark(
                "At the optimum of their evidence the Laplace posteriors of all weights are nearly uniform and **worse "
                "than MAP**, whatever the structure.",
                all_of(
                    *(
                        check
                        for name in _LAPLACE_OF_ALL
                        for check in (
                            STRUCTURES.within(name, "NLL", 1.9, 2.303, FEW),
                            STRUCTURES.says(name, AGAINST_MAP, clean_100="worse", wrong_100="worse"),
                        )
                    ),
                ),
            ),
            Remark(
                "The variational ones of all weights are not better than MAP, and worse than the temperature. With "
                "clean labels they have about the NLL of Lanczos, and not its gain under shifts: there the test images "
                "do not tell them from the temperature.",
                all_of(
                    *(
                        check
                        for name in _VARIATIONAL_OF_ALL
                        for check in (
                            STRUCTURES.says_not(name, AGAINST_MAP, clean_100="better", wrong_100="better"),
                            STRUCTURES.says(name, AGAINST_T, clean_100="worse", wrong_100="worse"),
                            STRUCTURES.says(name, SHIFTED, clean_100="alike"),
                            STRUCTURES.within(name, "NLL", 0.68, 0.72, ["clean_100"]),
                        )
                    ),
                ),
            ),
            Remark(
                "The variational one of the last layer is **better than MAP**. With clean labels it is not told from "
                "the temperature, and better than it under shifts; with wrong labels it is worse than the temperature, "
                "as the full one of the last layer is.",
                all_of(
                    STRUCTURES.says(_KRON_OF_LAST, AGAINST_MAP, clean_100="better", wrong_100="better"),
                    STRUCTURES.says(_KRON_OF_LAST, AGAINST_T, clean_100="alike", wrong_100="worse"),
                    STRUCTURES.says(_KRON_OF_LAST, SHIFTED, clean_100="better", wrong_100="worse"),
                ),
            ),
        ],
    ),
    NATURAL.table(
        "study_natural",
        "Natural images: a posterior of the last layer against MAP with a temperature",
        "A subset of CIFAR-10 with 10,000 training images, of which 2,000 train, without augmentation, and 1,000 "
        "validate; means over three seeds on 2,000 test images. One fold: a further network, trained without a tenth "
        "of the training images, chooses the temperature and the prior precision of the last row.",
        [
            Remark(
                "Every posterior is better than MAP, and a temperature is **better than every posterior**. The "
                "features have learnt the training images, and the evidence of a last layer takes them as given.",
                all_of(
                    *(
                        NATURAL.says(name, column, clean_2000=verdict)
                        for name in list(NATURAL.methods.values())[3:]
                        for column, verdict in ((AGAINST_MAP, "better"), (AGAINST_T, "worse"))
                    )
                ),
            ),
            Remark(
                "The bound of the variational posterior prefers a narrower posterior than held-out images do: it "
                "trusts the features most. The wider one of Laplace is nearer to what held-out images choose.",
                NATURAL.orders(
                    "NLL", list(NATURAL.methods.values())[-1], _LAPLACE, _VARIATIONAL, regimes=["clean_2000"]
                ),
            ),
        ],
    ),
]
