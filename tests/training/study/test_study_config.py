"""A study says what it compares, and refuses what it could not."""

import dataclasses
from pathlib import Path

import pytest

from training.cli.arguments import load_definition
from training.config import Config, Data, Prior
from training.errors import UserError
from training.study import __main__ as program
from training.study import store
from training.study.config import Measures, Posterior, Regime, Study, Training, applied, from_document, to_document
from training.study.networks import check_trainings

ROOT = Path(__file__).resolve().parents[3]

FULL = Posterior("full", weights="last_layer", trainings=("posthoc",))
FULL_OF_POSTHOC = f"posthoc.{FULL.name}"
STUDY = Study(
    config=Config(data=Data(mean=(0.5,), std=(0.25,))),
    regimes=(Regime("few", {"data.train_examples": 30}), Regime("wrong", {"data.wrong_labels": 0.2})),
    seeds=(3, 1),
    trainings=(Training("adamw", weight_decay=0.1, ensemble=2), Training("posthoc", {"prior.precision": 0.5})),
    posteriors=(Posterior("kron", "laplace"), FULL),
    measures=Measures(shifts=("blur",)),
)


def test_a_study_survives_its_file(tmp_path):
    assert from_document(to_document(STUDY)) == STUDY
    store.claim_study(tmp_path / "new", STUDY, resume=False)
    assert store.load_study(tmp_path / "new") == STUDY


def test_cells_are_regimes_by_seeds_and_units_are_those_of_each_training():
    units = store.units_of(STUDY)
    assert len(units) == 2 * 2 * (2 + 3)
    assert [(unit.training, unit.name) for unit in units[:5]] == [
        ("adamw", "points"), ("adamw", "kron-laplace"),
        ("posthoc", "points"), ("posthoc", "kron-laplace"), ("posthoc", "last-layer-full-variational"),
    ]  # fmt: skip
    assert {(unit.regime, unit.seed) for unit in store.units_of(STUDY, ["wrong"], [1])} == {("wrong", 1)}


def test_variants_have_names_of_their_own():
    variants = [
        Posterior(structure, approximation, weights, prior, chosen_by, fixed_mean, folded)
        for structure in ("diag", "lanczos")
        for approximation in ("laplace", "variational")
        for weights in ("all", "last_layer", "without_normalisation")
        for prior in ("training", "scalar", "layerwise", "g")
        for folded in ((False, True) if weights == "all" else (False,))
        for chosen_by in (("evidence",) if prior == "layerwise" else ("evidence", "folds"))
        for fixed_mean in ((False, True) if approximation == "variational" else (False,))
    ]
    assert len({posterior.name for posterior in variants}) == len(variants)


def test_settings_change_the_run_by_name():
    config = applied(STUDY.config, {"data.train_examples": 30, "seed": 7}, {"prior.precision": 0.5})
    assert (config.data.train_examples, config.seed, config.prior.precision) == (30, 7, 0.5)
    assert config.data.mean == (0.5,)
    with pytest.raises(UserError, match="must be those of a run; got 'prior.presicion'"):
        applied(STUDY.config, {"prior.presicion": 1.0})
    with pytest.raises(UserError, match="`data.train_examples` must be at least 1; got 0"):
        applied(STUDY.config, {"data.train_examples": 0})


SIX = ["map", "map-part", "map-t-part", "map-t-split", "map-t-validation", "ensemble"]


@pytest.mark.parametrize("shown", [[f"adamw.{name}" for name in SIX], ["adamw.kron-laplace", FULL_OF_POSTHOC]])
def test_figures_may_show_all_methods_that_there_are(shown):
    assert dataclasses.replace(STUDY, shown=shown).shown == tuple(shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (1, 1)}, "`study.seeds` must have each name once"),
        ({"reference": "joint"}, "`study.reference` must be one of adamw, posthoc; got 'joint'"),
        ({"posteriors": (Posterior("diag", trainings=("joint",)),)}, "must name trainings of the study, not joint"),
        (
            {"trainings": (Training("posthoc", folds=0),), "posteriors": (Posterior("diag", chosen_by="folds"),)},
            "must name trainings with folds for diag-variational-by-folds, not posthoc",
        ),
        ({"regimes": ()}, "`study.regimes` must have at least 1 item"),
        (
            {"shown": ("adamw.mapp",)},
            "`study.shown` must name methods that the study has, of adamw map, map-t-validation, map-part, map-t-part, "
            "map-t-split, ensemble, kron-laplace, not adamw.mapp",
        ),
        ({"shown": ("map",)}, "must be TRAINING.METHOD, of the trainings adamw, posthoc, which map is not"),
        ({"shown": ("adamw.last-layer-full-variational",)}, "kron-laplace, not adamw.last-layer-full"),
        ({"shown": ("posthoc.ensemble",)}, "of posthoc map, .*, not posthoc.ensemble"),
        (
            {"shown": ("wide.map-t-split",), "trainings": (Training("wide", folds=0),), "posteriors": ()},
            "of wide map, ",
        ),
        ({"shown": ("adamw.map", "adamw.map")}, "`study.shown` must have each name once"),
        (
            {"shown": [f"{training}.{name}" for training in ("adamw", "posthoc") for name in SIX[:4]]},
            "`study.shown` must have at most 6 items; got",
        ),
    ],
)
def test_studies_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(STUDY, **change)


def test_records_refuse_values_that_mean_nothing():
    with pytest.raises(UserError, match="`posterior.folded` must be False unless `weights` is all"):
        Posterior("diag", weights="last_layer", folded=True)
    with pytest.raises(UserError, match="`posterior.chosen_by` must be evidence where `prior` is layerwise"):
        Posterior("diag", prior="layerwise", chosen_by="folds")
    with pytest.raises(UserError, match="`posterior.fixed_mean` must be False unless `approximation` is variational"):
        Posterior("diag", "laplace", fixed_mean=True)
    with pytest.raises(UserError, match="`training.ensemble` must be 0, or at least 2; got 1"):
        Training("adamw", ensemble=1)
    with pytest.raises(UserError, match="`training.weight_decay` must be None beside prior.update, which AdamW with"):
        Training("adamw", {"optimizer.epochs": 3, "prior.update": "joint"}, weight_decay=0.5)
    with pytest.raises(UserError, match="must be None beside optimizer.polish_learning_rate, which"):
        Training("adamw", {"optimizer.polish_learning_rate": 0.1}, weight_decay=0.5)
    with pytest.raises(UserError, match="`regime.settings` must leave out seed, which `study.seeds` has"):
        Regime("few", {"seed": 1})


@pytest.mark.parametrize("name", ["../elsewhere", "Few", "few images", "", "-few", "a" * 61, "few\n"])
def test_a_name_that_no_folder_should_have_is_refused_in_words(name):
    rule = "must begin with a letter from a to z or a digit, have only these, - and _, and at most 60 characters; got "
    for construct in (lambda: Regime(name), lambda: Regime(name=name)):
        with pytest.raises(UserError, match=f"^`regime.name` {rule}") as caught:
            construct()
        assert str(caught.value).endswith(f"got {name!r}; change it in the config file")
    assert Regime("a" * 60).name and Regime("0_few-images").name


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Posterior("ful"), "`posterior.structure` must be 'diag', 'kron', 'full' or 'lanczos'; got 'ful'"),
        (lambda: Posterior("full", "lap"), "`posterior.approximation` must be 'laplace' or 'variational'; got 'lap'"),
        (lambda: Posterior(), "`posterior.structure` must be given; got nothing"),
        (lambda: Regime("few", 3), "`regime.settings` must be a valid dictionary; got 3"),
        (lambda: Study(Config(), [3]), "`study.regimes` must be .*; got 3"),
    ],
)
def test_a_value_without_a_name_is_told_by_the_name_of_its_field(construct, message):
    with pytest.raises(UserError, match=f"^{message}; change it in the config file$"):
        construct()


def test_a_study_may_grow_and_not_shrink(tmp_path):
    root = tmp_path / "study"
    store.claim_study(root, STUDY, resume=False)
    with pytest.raises(UserError, match="must not overwrite another; .* continue it with --resume"):
        store.claim_study(root, STUDY, resume=False)
    grown = dataclasses.replace(STUDY, seeds=(3, 1, 2))
    store.claim_study(root, grown, resume=True)
    assert store.load_study(root) == grown
    with pytest.raises(UserError, match="must have the seeds that it had; the config lacks 2"):
        store.claim_study(root, STUDY, resume=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="must be new, empty, or hold a study"):
        store.claim_study(tmp_path, STUDY, resume=True)


def test_a_training_by_the_evidence_computes_it_in_every_regime():
    online = dataclasses.replace(STUDY, trainings=(*STUDY.trainings, Training("online", {"prior.update": "online"})))
    check_trainings(online)
    short = dataclasses.replace(
        online, regimes=(Regime("short", {"optimizer.epochs": 5, "optimizer.polish_epochs": 4}), *STUDY.regimes)
    )
    with pytest.raises(UserError, match="training online of regime short: .* at least one epoch; .*every_epochs` 10"):
        check_trainings(short)
    check_trainings(short, ["few"])
    # AdamW has no prior to train.
    of_adamw = dataclasses.replace(short, config=dataclasses.replace(STUDY.config, prior=Prior(update="online")))
    check_trainings(dataclasses.replace(of_adamw, trainings=STUDY.trainings[:1], posteriors=()))


def computed(root, study, *units):
    """Write results of some units, as of the settings of a study."""
    for unit in units:
        store.save_unit(root, unit, store.Result([], "MemoryError", 1.0, {}), store.settings_of(study, unit))


POINTS_OF_ADAMW = store.Unit("few", 3, "adamw", store.POINTS)
KRON_OF_ADAMW = store.Unit("few", 3, "adamw", "kron-laplace")


def with_trainings(**changes):
    """The study, with a change of its first training."""
    first, *rest = STUDY.trainings
    return dataclasses.replace(STUDY, trainings=(dataclasses.replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (with_trainings(weight_decay=0.5), "training.weight_decay: 0.1 there, 0.5 now; put back what"),
        (dataclasses.replace(STUDY, measures=Measures(shifts=("noise",))), "measures.shifts: .'blur'. there"),
        (dataclasses.replace(STUDY, config=Config(seed=1)), "config.seed: 0 there, 1 now"),
        (with_trainings(folds=3), "training.folds: 5 there, 3 now"),
    ],
)
def test_a_refused_study_leaves_the_saved_one_as_it_is(tmp_path, other, message):
    store.claim_study(tmp_path, STUDY, resume=False)
    computed(tmp_path, STUDY, KRON_OF_ADAMW, POINTS_OF_ADAMW)
    with pytest.raises(UserError, match=f"cells/few/seed_3/adamw.points must be of the .* {message}"):
        store.claim_study(tmp_path, other, resume=True)
    assert store.load_study(tmp_path) == STUDY
    store.claim_study(tmp_path, store.load_study(tmp_path), resume=True)


@pytest.mark.parametrize(
    "other",
    [
        with_trainings(folds=3, ensemble=0),
        dataclasses.replace(STUDY, reference="posthoc"),
        dataclasses.replace(STUDY, regimes=(*STUDY.regimes, Regime("many"))),
    ],
)
def test_what_no_result_depends_on_may_change(tmp_path, other):
    """Only the methods without a posterior depend on folds and on an ensemble, and there are none of them yet."""
    store.claim_study(tmp_path, STUDY, resume=False)
    computed(tmp_path, STUDY, KRON_OF_ADAMW)
    store.claim_study(tmp_path, other, resume=True)
    assert store.load_study(tmp_path) == other


def test_a_posterior_keeps_the_trainings_that_have_results_of_it(tmp_path):
    store.claim_study(tmp_path, STUDY, resume=False)
    narrower = dataclasses.replace(STUDY, posteriors=(Posterior("kron", "laplace", trainings=("posthoc",)), FULL))
    computed(tmp_path, STUDY, KRON_OF_ADAMW)
    with pytest.raises(UserError, match="the config has no kron-laplace of adamw, and .*adamw.kron-laplace does"):
        store.claim_study(tmp_path, narrower, resume=True)
    assert store.load_study(tmp_path) == STUDY


def test_a_saved_study_that_shows_what_there_is_not_can_be_mended(tmp_path):
    """Earlier versions saved such a study."""
    document = store.sealed.dump(to_document(STUDY) | {"shown": ["adamw.mapp"]}, indent=2)
    (tmp_path / store.STUDY_FILE).write_text(document)
    with pytest.raises(UserError, match="not adamw.mapp; .* restore it, or pass its --config"):
        store.load_study(tmp_path)
    store.claim_study(tmp_path, STUDY, resume=True)
    assert store.load_study(tmp_path) == STUDY


def test_networks_without_results_keep_their_settings(tmp_path):
    store.claim_study(tmp_path, STUDY, resume=False)
    (tmp_path / store.NETWORKS / "few" / "adamw" / "seed_3").mkdir(parents=True)
    with pytest.raises(UserError, match="networks/few/adamw must be of .* weight_decay: 0.1 there, 0.5 now"):
        store.claim_study(tmp_path, with_trainings(weight_decay=0.5), resume=True)
    assert store.load_study(tmp_path) == STUDY
    store.claim_study(tmp_path, with_trainings(held_out=0.1), resume=True)
    (tmp_path / store.NETWORKS / "few" / "adamw" / "seed_3_fold_0").mkdir()
    with pytest.raises(UserError, match="held_out: 0.1 there, 0.2 now"):
        store.claim_study(tmp_path, STUDY, resume=True)


def test_a_summary_needs_a_study(tmp_path, capsys):
    config, root = ROOT / "configs" / "study_digits_short.py", tmp_path / "misspelt"
    assert program.main(["--workdir", str(root), "--config", str(config), "--summary-only"]) == 2
    assert "`--workdir` must hold a study" in capsys.readouterr().err
    assert not root.exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("study_*.py")))
def test_the_studies_of_the_repository_can_be_run(name):
    study = load_definition(
        ROOT / "configs" / f"{name}.py", "study", Study, lambda record: from_document(to_document(record))
    )
    check_trainings(study)
    card = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert all(f"\n{entry} " in card for entry in ("Command", "Data", "Hardware", "Time", "Expected"))
    data = study.config.data
    if data.name == "cifar10":  # each can be run on the subset on which the numbers of the repository were measured
        assert data.train_examples + data.validation_examples <= 10_000
        assert "subset" in card
