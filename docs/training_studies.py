"""Studies of networks that are trained for a prior, of switches of their posteriors, and of choices by folds."""

from result_table import Remark, all_of
from study_table import (
    AGAINST_MAP,
    AGAINST_T,
    AGAINST_VALIDATION,
    DIGITS,
    FEW,
    MAP,
    SHIFTED,
    TO_ALL,
    TO_FOLDS,
    Shown,
    point,
    posterior,
)

TRAININGS = Shown(
    "study_digits_trainings",
    {
        point("map"): "AdamW: MAP",
        point("map-t-split"): "AdamW: MAP + temperature, from folds of the training images",
        point("ensemble"): "AdamW: ensemble of five",
        posterior("lanczos-variational"): "AdamW: all weights, variational",
        posterior("lanczos-variational-folded"): "the same, batch normalisation folded into kernels",
        posterior("without-norms-lanczos-variational"): "the same, normalisation layers without a posterior",
        posterior("lanczos-variational-g"): "the same, g-prior",
        posterior("lanczos-variational-g-folded"): "the same, folded, with a g-prior",
        posterior("lanczos-variational-layerwise"): "the same, a prior precision for each layer",
        point("map", "posthoc"): "posthoc: MAP",
        posterior("last-layer-full-variational", "posthoc"): "posthoc: last layer, variational",
        posterior("lanczos-variational", "posthoc"): "posthoc: all weights, variational",
        point("map", "online"): "online: MAP",
        posterior("last-layer-full-variational", "online"): "online: last layer, variational",
        posterior("lanczos-laplace", "online"): "online: all weights, Laplace",
        posterior("lanczos-variational", "online"): "online: all weights, variational",
        point("map", "joint"): "joint: MAP",
        posterior("lanczos-laplace", "joint"): "joint: all weights, Laplace",
        posterior("lanczos-variational", "joint"): "joint: all weights, variational",
    },
    FEW,
    TO_FOLDS,
)
FOLDS = Shown(
    "study_digits_folds",
    MAP | {posterior("lanczos-laplace-by-folds", choice="folds"): "all weights, Laplace, by folds"},
    DIGITS,
)
# Names of rows, for the checks of remarks.
_OF_ADAMW = "AdamW: all weights, variational"
_SWITCHES = tuple(
    f"the same, {switch}" for switch in ("batch normalisation folded into kernels", "g-prior", "folded, with a g-prior")
)
_LAYERWISE = "the same, a prior precision for each layer"
_WITH_VALIDATION, _BY_FOLDS = list(FOLDS.methods.values())[-2:]

TABLES = [
    TRAININGS.table(
        "study_trainings",
        "Networks trained for a prior, and switches of the posterior",
        "The same images. AdamW has decoupled weight decay. Networks of posthoc minimise the negative log joint for a "
        "prior precision of .1, those of online for one that the evidence updates every ten epochs, and those of joint "
        "follow the gradient of the evidence themselves. Every posterior has the prior precision of its own evidence "
        "or lower bound; a g-prior has one in proportion to the diagonal of the GGN for each weight. Differences are "
        "to MAP of AdamW.",
        [
            Remark(
                "Folding batch normalisation into kernels lowers the NLL of the variational posterior, and a g-prior "
                "does, too. With clean labels the test images tell none of these three from MAP, or from the "
                "temperature, which takes five more trainings. Under shifts they are **better than the temperature**. "
                "With wrong labels they are **better than MAP**, and not told from the temperature, on test images or "
                "under shifts. All of them detect noise better than MAP.",
                all_of(
                    *(TRAININGS.orders("NLL", name, _OF_ADAMW, regimes=FEW) for name in _SWITCHES),
                    *(TRAININGS.says(name, AGAINST_MAP, clean_100="alike", wrong_100="better") for name in _SWITCHES),
                    *(TRAININGS.says(name, AGAINST_T, clean_100="alike", wrong_100="alike") for name in _SWITCHES),
                    *(TRAININGS.says(name, SHIFTED, clean_100="better", wrong_100="alike") for name in _SWITCHES),
                    *(TRAININGS.orders("AUROC", "AdamW: MAP", name, regimes=FEW) for name in _SWITCHES),
                ),
            ),
            Remark(
                "A prior precision for each layer is **worse than MAP**. Its bound is the highest by far: the fit of "
                "the labels is left to what training has learnt; see `Variational`.",
                TRAININGS.says(_LAYERWISE, AGAINST_MAP, clean_100="worse", wrong_100="worse"),
            ),
            Remark(
                "Training for a prior makes a **worse MAP than AdamW** with so few clean images, whether the prior "
                "stays or the evidence updates it. With wrong labels no such difference shows. Weights that follow the "
                "evidence as well make the worst MAP. No posterior of these networks is better than the temperature of "
                "AdamW.",
                all_of(
                    TRAININGS.says("posthoc: MAP", AGAINST_MAP, clean_100="worse", wrong_100="alike"),
                    TRAININGS.says("online: MAP", AGAINST_MAP, clean_100="worse", wrong_100="alike"),
                    TRAININGS.says("joint: MAP", AGAINST_MAP, clean_100="worse", wrong_100="worse"),
                    TRAININGS.orders("NLL", "posthoc: MAP", "joint: MAP", regimes=FEW),
                    TRAININGS.orders("NLL", "online: MAP", "joint: MAP", regimes=FEW),
                    *(
                        TRAININGS.says_not(name, AGAINST_T, clean_100="better", wrong_100="better")
                        for name in TRAININGS.methods.values()
                        if name.startswith(("posthoc", "online", "joint"))
                    ),
                ),
            ),
            Remark(
                "With clean labels an ensemble of five networks has the lowest NLL, and is **better than the "
                "temperature**. It costs four more trainings; the folds of the temperature cost five more.",
                all_of(
                    *(
                        TRAININGS.orders("NLL", "AdamW: ensemble of five", name, regimes=["clean_100"])
                        for name in TRAININGS.methods.values()
                    ),
                    TRAININGS.says("AdamW: ensemble of five", AGAINST_T, clean_100="better"),
                ),
            ),
        ],
    ),
    FOLDS.table(
        "study_folds",
        "A posterior by folds against MAP with a temperature by the same folds",
        "The same networks and images. A Lanczos posterior of all weights, whose prior precision is the one at which "
        "the posteriors of five networks, each trained without another fifth of the training images, predict these "
        "fifths best. The temperature of the folds is chosen in the same way by the same networks. Neither sees a "
        "validation image.",
        [
            Remark(
                "With 100 clean images the posterior is **better than MAP, and than MAP with the temperature of 180 "
                "validation images**, which it has not seen. From the temperature of the same folds its NLL is not "
                "told apart. It detects noise worst.",
                all_of(
                    FOLDS.says(_BY_FOLDS, AGAINST_MAP, clean_100="better"),
                    FOLDS.says(_BY_FOLDS, AGAINST_VALIDATION, clean_100="better"),
                    FOLDS.says(_BY_FOLDS, AGAINST_T, clean_100="alike"),
                    *(FOLDS.orders("AUROC", _BY_FOLDS, name, regimes=["clean_100"]) for name in MAP.values()),
                ),
            ),
            Remark(
                "With 300 clean images the test images tell no two methods apart. Under shifts MAP, and MAP with the "
                "temperature of the validation images, are worse than the temperature of the folds, from which the "
                "posterior is not told apart.",
                all_of(
                    *(FOLDS.says(_BY_FOLDS, column, clean_300="alike") for column in TO_ALL.values()),
                    *(FOLDS.says("MAP", column, clean_300="alike") for column in (AGAINST_T, AGAINST_VALIDATION)),
                    FOLDS.says(_WITH_VALIDATION, AGAINST_T, clean_300="alike"),
                    FOLDS.says("MAP", SHIFTED, clean_300="worse"),
                    FOLDS.says(_WITH_VALIDATION, SHIFTED, clean_300="worse"),
                    FOLDS.says(_BY_FOLDS, SHIFTED, clean_300="alike"),
                ),
            ),
            Remark(
                "Where a fifth of the labels is wrong, the posterior is better than the temperature of the folds under "
                "shifts with 100 images, and not told apart from it with 300. On test images it is not told apart from "
                "it with 100 images, and **worse** with 300. Folds score by labels of which a fifth is wrong, and "
                "those of the test images are right: with 300 images both choices are too cautious, the posterior's "
                "most.",
                all_of(
                    FOLDS.says(_BY_FOLDS, SHIFTED, wrong_100="better", wrong_300="alike"),
                    FOLDS.says(_BY_FOLDS, AGAINST_T, wrong_100="alike", wrong_300="worse"),
                ),
            ),
        ],
    ),
]
