"""The tables of studies in the results: what a summary says of a few methods in each regime."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from result_table import Row, Table

Method = tuple[str, str, str | None, str | None]
"""Training, name of a method, how its prior was chosen, link."""


def point(name: str, training: str = "adamw") -> Method:
    """A method without a posterior."""
    return training, name, None, None


def posterior(name: str, training: str = "adamw", choice: str = "evidence") -> Method:
    """A posterior whose predictions go through the probit link."""
    return training, name, choice, "probit"


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
_KEY = ("training", "method", "prior", "link")
# What a difference in NLL is to, by its name in a summary.
_TO_FOLDS = {"MAP": "minus MAP", "MAP + T": "minus MAP + T of folds"}
_TO_ALL = _TO_FOLDS | {"MAP + T (validation)": "minus MAP + T of validation"}


@dataclass(frozen=True)
class Shown:
    """Which study a table shows, and what of it."""

    study: str
    """Name of the config and of the work directory."""
    methods: Mapping[Method, str]
    """What the table calls each method, in its order."""
    regimes: Mapping[str, str]
    """What it calls each regime, in its order."""
    differences: Mapping[str, str] = field(default_factory=lambda: _TO_ALL)
    """Its columns of differences."""

    def table(
        self, name: str, heading: str, text: str, remarks: str, figures: Mapping[str, str] | None = None
    ) -> Table:
        """Make the table."""
        command = f"python -m training.study --config configs/{self.study}.py --workdir checkpoints/{self.study}"
        columns = ("training images", "method", "NLL", *self.differences.values())
        columns += ("under shifts, minus MAP + T of folds", "ECE", "AUROC")
        record = f"checkpoints/{self.study}/summary/summary.json"
        return Table(name, heading, command, text, columns, self.read, write, record, remarks, figures or {})

    def read(self, records: list[dict[str, Any]]) -> list[Row]:
        """Turn a summary into rows: regime, method, NLL, its differences, that under shifts, ECE and AUROC."""
        rows = []
        for regime, label in self.regimes.items():
            of_regime = records[0]["regimes"][regime]
            if of_regime["missing"]:
                raise KeyError(f"{of_regime['missing']} units of {regime}")
            by_key = {tuple(row[part] for part in _KEY): row for row in of_regime["methods"]}
            for key, name in self.methods.items():
                numbers, to = by_key[key]["numbers"], by_key[key]["differences"]
                differences = [_interval(to.get(other, {}).get("nll")) for other in self.differences]
                shifted = _interval(to.get("MAP + T", {}).get("shift_nll"))
                measured = numbers["ece"], numbers["auroc"]["noise"]
                rows.append([label, name, numbers["nll"], *differences, shifted, *measured])
        return rows


def write(row: Row) -> list[str]:
    """Write a row of numbers. A difference whose interval excludes zero is bold."""
    regime, name, nll, *differences, ece, auroc = row
    return [regime, name, f"{nll:.3f}", *map(_difference, differences), f"{ece:.3f}", f"{auroc:.3f}"]


def _interval(difference: dict[str, Any] | None) -> list[float] | None:
    return None if difference is None else [difference[part] for part in ("value", "low", "high")]


def _difference(interval: list[float] | None) -> str:
    if interval is None:
        return "–"
    value, low, high = interval
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


_EARLIER = (
    " The variational posteriors are those of an earlier version, whose search for the prior precision could end below "
    "the largest bound."
)

TABLES = [
    Shown("study_digits_short", _MAP | _LAST_LAYER, _DIGITS, _TO_FOLDS).table(
        "study",
        "A posterior by the evidence alone against MAP with a temperature",
        "Networks trained by AdamW on few digits; means over five seeds on 360 test images. All seeds train on the "
        "same images, so that intervals do not tell of other training sets. The weights are not at a mode of any log "
        "joint, because decoupled weight decay has no prior. A full posterior of the last layer, whose prior precision "
        "the evidence, or its lower bound, chooses from the training images alone; "
        "probit link. Differences in NLL have 95 % intervals over seeds and images; bold ones exclude zero. The last "
        "temperature knows 180 validation images, which no other method sees. AUROC is against images of noise.",
        """\
- The optimum of the Laplace evidence costs .25 to .32 nats an image on clean labels: the Gaussian at the mode is too
  wide. The variational posterior by its bound does not.
- The variational posterior by its bound alone is **better than MAP** with 100 images, and with wrong labels. With 300
  clean images the test images do not tell them apart.
- Against MAP with a temperature from folds it is better under shifts of 300 clean images, and not told apart on their
  test images, on those of 100 clean ones, and on those of 300 with wrong labels. It is **worse** with 100 images of
  which a fifth has wrong labels, and under shifts wherever labels are wrong. There the features have learnt the wrong
  labels, and the evidence of a last layer takes its features as given. Networks of folds have not seen the labels that
  they predict. They cost five more trainings.""",
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
    Shown(
        "study_digits_weights",
        _MAP
        | {
            posterior("lanczos-laplace"): "all weights, Laplace, by the evidence",
            posterior("lanczos-variational"): "all weights, variational, by the evidence",
        },
        {name: _DIGITS[name] for name in ("clean_100", "wrong_100")},
    ).table(
        "study_weights",
        "The same for a posterior of all weights",
        "The same networks and images, with a Lanczos posterior of all weights.",
        """\
- The Laplace evidence chooses a posterior whose probabilities are nearly uniform. The variational posterior has less
  than half of its NLL with clean labels, and is still **worse than MAP** on test images. With wrong ones it is better
  than MAP and worse than a temperature.
- Under shifts of clean images it is **better than the temperature**. Both posteriors detect noise better than MAP does.
- The mean of the linearised network can be further from the weights than they are long, and is then another network
  than the one that was trained.""",
    ),
    Shown(
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
        {name: _DIGITS[name] for name in ("clean_100", "wrong_100")},
        _TO_FOLDS,
    ).table(
        "study_trainings",
        "Networks trained for a prior, and switches of the posterior",
        "The same images. AdamW has decoupled weight decay. Networks of posthoc minimise the negative log joint for a "
        "prior precision of .1, those of online for one that the evidence updates every ten epochs. Every posterior "
        "has the prior precision of its own evidence or lower bound; a g-prior has one in proportion to the diagonal "
        "of the GGN for each weight. Differences are to MAP of AdamW." + _EARLIER,
        """\
- Folding batch normalisation into kernels lowers the NLL of the variational posterior, and a g-prior does, too. With
  clean labels the test images do not tell these three from MAP, nor the folded one with a g-prior from the temperature.
  Under shifts they are **better than the temperature**. With wrong labels the folded one is **better than MAP**, and
  not told from the temperature, on test images or under shifts.
- Training for a prior makes a **worse MAP than AdamW** with so few clean images, whether the prior stays or the
  evidence updates it. With wrong labels no such difference shows. No posterior of these networks is better than the
  temperature of AdamW.
- With clean labels an ensemble of five networks has the lowest NLL, and is **better than the temperature**. It costs
  four more trainings; the folds of the temperature cost five more.""",
    ),
    Shown(
        "study_digits_folds",
        _MAP | {posterior("lanczos-laplace-by-folds", choice="folds"): "all weights, Laplace, by folds"},
        _DIGITS,
    ).table(
        "study_folds",
        "A posterior by folds against MAP with a temperature by the same folds",
        "The same networks and images. A Lanczos posterior of all weights, whose prior precision is the one at which "
        "the posteriors of five networks, each trained without another fifth of the training images, predict these "
        "fifths best. The temperature of the folds is chosen in the same way by the same networks. Neither sees a "
        "validation image.",
        """\
- With 100 clean images the posterior is **better than MAP, and than MAP with the temperature of 180 validation
  images**, which it has not seen. From the temperature of the same folds its NLL is not told apart. It detects noise
  worst.
- With 300 clean images the test images tell no two methods apart. Under shifts MAP, and MAP with the temperature of the
  validation images, are worse than the temperature of the folds, from which the posterior is not told apart.
- Where a fifth of the labels is wrong, the posterior is better than the temperature of the folds under shifts. On test
  images it is not told apart from it with 100 images, and **worse** with 300. Folds score by labels of which a fifth is
  wrong, and those of the test images are right: with 300 images both choices are too cautious, the posterior's
  most.""",
    ),
    Shown(
        "study_cifar10_short",
        {
            point("map"): "MAP",
            point("map-t-split"): "MAP + temperature, from a held-out tenth of the training images",
            point("map-t-validation"): "MAP + temperature, from the validation images",
            **_LAST_LAYER,
            posterior("last-layer-full-laplace-by-folds", choice="folds"): "last layer, Laplace, by the held-out tenth",
        },
        {"clean_2000": "2,000 images"},
    ).table(
        "study_natural",
        "Natural images: a posterior of the last layer against MAP with a temperature",
        "A subset of CIFAR-10 with 10,000 training images, of which 2,000 train, without augmentation, and 1,000 "
        "validate; means over three seeds on 2,000 test images. One fold: a further network, trained without a tenth "
        "of the training images, chooses the temperature and the prior precision of the last row.",
        """\
- Every posterior is better than MAP, and a temperature is **better than every posterior**. The features have learnt the
  training images, and the evidence of a last layer takes them as given.
- The bound of the variational posterior prefers a narrower posterior than held-out images do: it trusts the features
  most. The wider one of Laplace is nearer to what held-out images choose.""",
    ),
]
