"""The tables of studies in the results, and what follows from them."""

from result_table import Remark, all_of
from study_table import SHIFTED, TO_ALL, TO_FOLDS, Method, Shown, point, posterior

_MAP: dict[Method, str] = {
    point("map"): "MAP",
    point("map-t-split"): "MAP + temperature, from folds of the training images",
    point("map-t-validation"): "MAP + temperature, from the validation images",
}
_LAST_LAYER: dict[Method, str] = {
    posterior("last-layer-full-laplace"): "last layer, Laplace, by the evidence",
    posterior("last-layer-full-variational"): "last layer, variational, by the evidence",
}
_DIGITS = {
    "clean_100": "100 images",
    "wrong_100": "100 images, 20 % wrong labels",
    "clean_300": "300 images",
    "wrong_300": "300 images, 20 % wrong labels",
}
_FEW = {name: _DIGITS[name] for name in ("clean_100", "wrong_100")}
_EARLIER = (
    " The variational posteriors are those of an earlier version, with 100 samples of the outputs at each image. The "
    "mean followed these."
)

SHORT = Shown("study_digits_short", _MAP | _LAST_LAYER, _DIGITS, TO_FOLDS)
WEIGHTS = Shown(
    "study_digits_weights",
    _MAP
    | {
        posterior("lanczos-laplace"): "all weights, Laplace, by the evidence",
        posterior("lanczos-variational"): "all weights, variational, by the evidence",
    },
    _FEW,
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
        point("map", "posthoc"): "posthoc: MAP",
        posterior("last-layer-full-variational", "posthoc"): "posthoc: last layer, variational",
        posterior("lanczos-variational", "posthoc"): "posthoc: all weights, variational",
        point("map", "online"): "online: MAP",
        posterior("last-layer-full-variational", "online"): "online: last layer, variational",
        posterior("lanczos-laplace", "online"): "online: all weights, Laplace",
        posterior("lanczos-variational", "online"): "online: all weights, variational",
    },
    _FEW,
    TO_FOLDS,
)
FOLDS = Shown(
    "study_digits_folds",
    _MAP | {posterior("lanczos-laplace-by-folds", choice="folds"): "all weights, Laplace, by folds"},
    _DIGITS,
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
)
# Names of rows, for the checks of remarks.
_LAPLACE, _VARIATIONAL = _LAST_LAYER.values()
_ALL_LAPLACE, _ALL_VARIATIONAL = list(WEIGHTS.methods.values())[-2:]
_OF_ADAMW = "AdamW: all weights, variational"
_SWITCHES = tuple(
    f"the same, {switch}" for switch in ("batch normalisation folded into kernels", "g-prior", "folded, with a g-prior")
)
_WITH_VALIDATION, _BY_FOLDS = list(FOLDS.methods.values())[-2:]
_AGAINST_MAP, _AGAINST_T, _AGAINST_VALIDATION = TO_ALL.values()
_CLEAN = ("clean_100", "clean_300")

TABLES = [
    SHORT.table(
        "study",
        "A posterior by the evidence alone against MAP with a temperature",
        "Networks trained by AdamW on few digits; means over five seeds on 360 test images. All seeds train on the "
        "same images, so that intervals do not tell of other training sets. The weights are not at a mode of any log "
        "joint, because decoupled weight decay has no prior. A full posterior of the last layer, whose prior precision "
        "the evidence, or its lower bound, chooses from the training images alone; "
        "probit link. Differences in NLL have 95 % intervals over seeds and images; bold ones exclude zero. The last "
        "temperature knows 180 validation images, which no other method sees. AUROC is against images of noise.",
        [
            Remark(
                "The optimum of the Laplace evidence costs .25 to .32 nats an image on clean labels: the Gaussian at "
                "the mode is too wide. The variational posterior by its bound does not.",
                all_of(
                    SHORT.within(_LAPLACE, _AGAINST_MAP, 0.245, 0.325, _CLEAN),
                    SHORT.says(_LAPLACE, _AGAINST_MAP, clean_100="worse", clean_300="worse"),
                ),
            ),
            Remark(
                "The variational posterior by its bound alone is **better than MAP** with 100 images, and with wrong "
                "labels. With 300 clean images the test images do not tell them apart.",
                SHORT.says(
                    _VARIATIONAL,
                    _AGAINST_MAP,
                    clean_100="better",
                    wrong_100="better",
                    wrong_300="better",
                    clean_300="alike",
                ),
            ),
            Remark(
                "Against MAP with a temperature from folds it is better under shifts of 300 clean images, and not told "
                "apart on their test images, on those of 100 clean ones, and on those of 300 with wrong labels. It is "
                "**worse** with 100 images of which a fifth has wrong labels, and under shifts wherever labels are "
                "wrong. There the features have learnt the wrong labels, and the evidence of a last layer takes its "
                "features as given. Networks of folds have not seen the labels that they predict. They cost five more "
                "trainings.",
                all_of(
                    SHORT.says(
                        _VARIATIONAL,
                        _AGAINST_T,
                        clean_300="alike",
                        clean_100="alike",
                        wrong_300="alike",
                        wrong_100="worse",
                    ),
                    SHORT.says(_VARIATIONAL, SHIFTED, clean_300="better", wrong_100="worse", wrong_300="worse"),
                ),
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
        "The same networks and images, with a Lanczos posterior of all weights.",
        [
            Remark(
                "The Laplace evidence chooses a posterior whose probabilities are nearly uniform. The variational "
                "posterior has little more than a third of its NLL with clean labels, which the test images do not "
                "tell from that of MAP; it is **worse than the temperature**. With wrong labels it is better than MAP "
                "and worse than a temperature.",
                all_of(
                    WEIGHTS.within(_ALL_LAPLACE, "NLL", 1.5, 2.303, _FEW),
                    WEIGHTS.within(_ALL_VARIATIONAL, "NLL", 0.6, 0.75, ["clean_100"]),
                    WEIGHTS.says(_ALL_VARIATIONAL, _AGAINST_MAP, clean_100="alike", wrong_100="better"),
                    WEIGHTS.says(_ALL_VARIATIONAL, _AGAINST_T, clean_100="worse", wrong_100="worse"),
                ),
            ),
            Remark(
                "Under shifts of clean images it is **better than the temperature**. Both posteriors detect noise "
                "better than MAP does.",
                all_of(
                    WEIGHTS.says(_ALL_VARIATIONAL, SHIFTED, clean_100="better"),
                    WEIGHTS.orders("AUROC", "MAP", _ALL_LAPLACE, regimes=_FEW),
                    WEIGHTS.orders("AUROC", "MAP", _ALL_VARIATIONAL, regimes=_FEW),
                ),
            ),
            Remark(
                "The mean of the linearised network can be further from the weights than they are long, and is then "
                "another network than the one that was trained."
            ),
        ],
    ),
    TRAININGS.table(
        "study_trainings",
        "Networks trained for a prior, and switches of the posterior",
        "The same images. AdamW has decoupled weight decay. Networks of posthoc minimise the negative log joint for a "
        "prior precision of .1, those of online for one that the evidence updates every ten epochs. Every posterior "
        "has the prior precision of its own evidence or lower bound; a g-prior has one in proportion to the diagonal "
        "of the GGN for each weight. Differences are to MAP of AdamW." + _EARLIER,
        [
            Remark(
                "Folding batch normalisation into kernels lowers the NLL of the variational posterior, and a g-prior "
                "does, too. With clean labels the test images do not tell these three from MAP, nor the folded one "
                "with a g-prior from the temperature. Under shifts they are **better than the temperature**. With "
                "wrong labels the folded one is **better than MAP**, and not told from the temperature, on test images "
                "or under shifts.",
                all_of(
                    *(TRAININGS.orders("NLL", name, _OF_ADAMW, regimes=_FEW) for name in _SWITCHES),
                    *(TRAININGS.says(name, _AGAINST_MAP, clean_100="alike") for name in _SWITCHES),
                    *(TRAININGS.says(name, SHIFTED, clean_100="better") for name in _SWITCHES),
                    TRAININGS.says(_SWITCHES[2], _AGAINST_T, clean_100="alike"),
                    TRAININGS.says(_SWITCHES[0], _AGAINST_MAP, wrong_100="better"),
                    TRAININGS.says(_SWITCHES[0], _AGAINST_T, wrong_100="alike"),
                    TRAININGS.says(_SWITCHES[0], SHIFTED, wrong_100="alike"),
                ),
            ),
            Remark(
                "Training for a prior makes a **worse MAP than AdamW** with so few clean images, whether the prior "
                "stays or the evidence updates it. With wrong labels no such difference shows. No posterior of these "
                "networks is better than the temperature of AdamW.",
                all_of(
                    TRAININGS.says("posthoc: MAP", _AGAINST_MAP, clean_100="worse", wrong_100="alike"),
                    TRAININGS.says("online: MAP", _AGAINST_MAP, clean_100="worse", wrong_100="alike"),
                    *(
                        TRAININGS.says_not(name, _AGAINST_T, clean_100="better", wrong_100="better")
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
                    TRAININGS.says("AdamW: ensemble of five", _AGAINST_T, clean_100="better"),
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
                    FOLDS.says(_BY_FOLDS, _AGAINST_MAP, clean_100="better"),
                    FOLDS.says(_BY_FOLDS, _AGAINST_VALIDATION, clean_100="better"),
                    FOLDS.says(_BY_FOLDS, _AGAINST_T, clean_100="alike"),
                    *(FOLDS.orders("AUROC", _BY_FOLDS, name, regimes=["clean_100"]) for name in _MAP.values()),
                ),
            ),
            Remark(
                "With 300 clean images the test images tell no two methods apart. Under shifts MAP, and MAP with the "
                "temperature of the validation images, are worse than the temperature of the folds, from which the "
                "posterior is not told apart.",
                all_of(
                    *(FOLDS.says(_BY_FOLDS, column, clean_300="alike") for column in TO_ALL.values()),
                    *(FOLDS.says("MAP", column, clean_300="alike") for column in (_AGAINST_T, _AGAINST_VALIDATION)),
                    FOLDS.says(_WITH_VALIDATION, _AGAINST_T, clean_300="alike"),
                    FOLDS.says("MAP", SHIFTED, clean_300="worse"),
                    FOLDS.says(_WITH_VALIDATION, SHIFTED, clean_300="worse"),
                    FOLDS.says(_BY_FOLDS, SHIFTED, clean_300="alike"),
                ),
            ),
            Remark(
                "Where a fifth of the labels is wrong, the posterior is better than the temperature of the folds under "
                "shifts. On test images it is not told apart from it with 100 images, and **worse** with 300. Folds "
                "score by labels of which a fifth is wrong, and those of the test images are right: with 300 images "
                "both choices are too cautious, the posterior's most.",
                all_of(
                    FOLDS.says(_BY_FOLDS, SHIFTED, wrong_100="better", wrong_300="better"),
                    FOLDS.says(_BY_FOLDS, _AGAINST_T, wrong_100="alike", wrong_300="worse"),
                ),
            ),
        ],
    ),
    NATURAL.table(
        "study_natural",
        "Natural images: a posterior of the last layer against MAP with a temperature",
        "A subset of CIFAR-10 with 10,000 training images, of which 2,000 train, without augmentation, and 1,000 "
        "validate; means over three seeds on 2,000 test images. One fold: a further network, trained without a tenth "
        "of the training images, chooses the temperature and the prior precision of the last row. The variational "
        "posterior is that of an earlier version, with 100 samples of the outputs at each image.",
        [
            Remark(
                "Every posterior is better than MAP, and a temperature is **better than every posterior**. The "
                "features have learnt the training images, and the evidence of a last layer takes them as given.",
                all_of(
                    *(
                        NATURAL.says(name, column, clean_2000=verdict)
                        for name in list(NATURAL.methods.values())[3:]
                        for column, verdict in ((_AGAINST_MAP, "better"), (_AGAINST_T, "worse"))
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
