"""Settings: config files, command line, and the config that a work directory keeps."""

import dataclasses
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training import sealed
from training.cli.arguments import load_config, parse
from training.config import (
    Config,
    Curvature,
    Data,
    Evaluation,
    Model,
    Optimizer,
    Prior,
    from_document,
    to_document,
)
from training.errors import UserError
from training.settings import describe_difference, require_recorded
from training.train.evidence import check_window
from training.workdir import continue_command, load_saved_config, open_workdir, save_config

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "python -m training.fit_van"

UNUSUAL = Config(
    seed=5,
    data=Data(name="cifar10", dir=Path("some/where"), mean=(0.5, 0.25), std=(1.0, 2.0), train_examples=7, augment=True),
    optimizer=Optimizer(learning_rate=1, clip_norm=2.5),
    prior=Prior(update="online"),
)


def parsed(*argv: str) -> Config:
    return parse(argv, PROGRAM).settings


# --- command line ---------------------------------------------------------------------------------------------------


def test_resume_alone_continues_with_the_saved_settings(tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    argv = ["--workdir", str(tmp_path), "--resume"]
    arguments = parse(argv, PROGRAM)
    assert (arguments.settings, arguments.workdir, arguments.resume) == (UNUSUAL, tmp_path, True)
    assert parse([f"--workdir={tmp_path}", "--resume", "--evaluation.bins", "3"], PROGRAM).settings == replace(
        UNUSUAL, evaluation=Evaluation(bins=3)
    )
    # A config that is named counts, and so do the defaults of a new run.
    named = load_config(ROOT / "configs" / "van_cifar10.py")
    assert parse([*argv, "--config", "configs/van_cifar10.py"], PROGRAM).settings == named
    assert parse(argv[:2], PROGRAM).settings == load_config(ROOT / "configs" / "van_digits.py")
    assert parse(["--workdir", str(tmp_path / "new"), "--resume"], PROGRAM).settings == parse([], PROGRAM).settings


def test_options_that_contradict_the_saved_settings_are_named(tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    (tmp_path / "train").mkdir()
    arguments = parse(["--workdir", str(tmp_path), "--resume", "--seed", "7", "--data.mean", "0.5", "0.3"], PROGRAM)
    named = r"differs in seed: 5 there, 7 here; data.mean: \(0.5, 0.25\) there, \(0.5, 0.3\) here; use another"
    with pytest.raises(UserError, match=named) as caught:
        open_workdir(tmp_path, arguments.settings, resume=True)
    assert f"continue with the settings that it has: {continue_command(tmp_path)}" in str(caught.value)


def test_the_command_that_continues_a_run_can_be_typed() -> None:
    words = shlex.split(continue_command(Path("a b/'c'")))
    assert words == [sys.orig_argv[0], "-m", "training.fit_van", "--workdir", "a b/'c'", "--resume"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_defaults_come_from_the_default_config_wherever_it_runs(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    arguments = parse([], PROGRAM)
    assert arguments.settings == load_config(ROOT / "configs" / "van_digits.py")
    assert arguments.workdir == Path("checkpoints/van_digits") and not arguments.resume


def test_options_override_single_fields() -> None:
    line = (
        "--config configs/van_cifar10.py --workdir out --resume --seed 1 --optimizer.learning-rate 1e-3 "
        "--prior.update online --data.name cifar100 --data.dir /sets --data.mean 0.1 0.2 0.3 --data.no-augment"
    )
    arguments = parse(line.split(), PROGRAM)
    expected = load_config(ROOT / "configs" / "van_cifar10.py")
    data = replace(expected.data, name="cifar100", dir=Path("/sets"), mean=(0.1, 0.2, 0.3), augment=False)
    optimizer = replace(expected.optimizer, learning_rate=1e-3)
    prior = replace(expected.prior, update="online")
    assert arguments.settings == replace(expected, seed=1, data=data, optimizer=optimizer, prior=prior)
    assert arguments.workdir == Path("out") and arguments.resume


def test_help_names_every_field_with_the_default_of_the_chosen_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from training.config import *\nconfig = Config(optimizer=Optimizer(batch_size=77))\n")
    with pytest.raises(SystemExit) as caught:
        parse([f"--config={file}", "--help"], PROGRAM)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert caught.value.code == 0
    assert "It is code that is executed" in text
    assert "(default: 77)" in text and "(default: checkpoints/mine)" in text
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory) if section.name not in ALONE else ():
            assert f"--{section.name}.{field.name.replace('_', '-')}" in text
    for option in ("--config", "--workdir", "--resume", "--seed", "--init-from"):
        assert option in text
    assert text.count("(default:") == 5 + sum(len(dataclasses.fields(record)) for record in _sections())


ALONE = ("seed", "init_from")  # fields with one value each, beside the sections


def _sections() -> list[Any]:
    config = Config()
    return [config.data, config.model, config.optimizer, config.prior, config.curvature, config.evaluation]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.learning-rate", "fast"], "could not convert string to float"),
        (["--optimizer.epochs", "1.5"], "--optimizer.epochs"),
        (["--prior.update", "sometimes"], "'posthoc', 'online', 'joint'"),
        (["--seed", "1.5"], "--seed: invalid literal for int() with base 10: '1.5'"),
        (["--workdir"], "Missing value for argument '--workdir'"),
        (["--data.mean", "a", "b"], "--data.mean: no type matching"),
        (["--optimizer.momentum", "0.9"], "Unrecognized options: --optimizer.momentum"),
        (["--config"], "Missing value for argument '--config'"),
        (["stray"], "stray"),
    ],
)
def test_unusable_arguments_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv, PROGRAM)
    said = str(caught.value)
    assert message in said and argv[-1] in said and said.endswith(f"; see {PROGRAM} --help")
    assert "\n" not in said and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`--config` must name a Python file; there is none at .*known configs: .*van_digits.py"),
        ("other = 1", "has nothing of that name"),
        ("config = {'seed': 1}", "has dict; define it"),
        ("config = ", "raised SyntaxError: invalid syntax"),
        ("import nonexistent_module", "raised ModuleNotFoundError: No module named 'nonexistent_module'"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        (
            "from training.config import *\nconfig = Config(seed=-1)",
            "broken.py: `seed` must be at least 0; got -1; change it",
        ),
        (
            "from training.config import *\nconfig = Config(speed=1)",
            "broken.py: every setting must be a known one; got `speed`; change it",
        ),
    ],
)
def test_an_unusable_config_file_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", str(file)], PROGRAM)
    assert "\n" not in str(caught.value) and "broken.py" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "option"),
    [
        (Data, {"std": (0.1, 0.0)}, "data.std"),
        (Data, {"mean": (float("nan"),)}, "data.mean"),
        (Data, {"train_examples": 0}, "data.train_examples"),
        (Data, {"wrong_labels": 1.0}, "data.wrong_labels"),
        (Data, {"validation_examples": -1}, "data.validation_examples"),
        (Model, {"stem_kernel": 0}, "model.stem_kernel"),
        (Model, {"stem_stride": 0}, "model.stem_stride"),
        (Model, {"drop_path": 1.0}, "model.drop_path"),
        (Optimizer, {"learning_rate": -1.0}, "optimizer.learning_rate"),
        (Optimizer, {"polish_learning_rate": float("inf")}, "optimizer.polish_learning_rate"),
        (Optimizer, {"clip_norm": float("nan")}, "optimizer.clip_norm"),
        (Optimizer, {"batch_size": 0}, "optimizer.batch_size"),
        (Optimizer, {"epochs": -1}, "optimizer.epochs"),
        (Optimizer, {"polish_epochs": -1}, "optimizer.polish_epochs"),
        (Optimizer, {"epochs": 2, "warmup_epochs": 3}, "optimizer.warmup_epochs"),
        (Optimizer, {"epochs": 2}, "optimizer.warmup_epochs"),  # whose default is 3
        (Prior, {"precision": 0.0}, "prior.precision"),
        (Prior, {"update": "sometimes"}, "prior.update"),
        (Prior, {"every_epochs": 0}, "prior.every_epochs"),
        (Prior, {"examples": 0}, "prior.examples"),
        (Curvature, {"num_probes": 0}, "curvature.num_probes"),
        (Curvature, {"num_probes": 8, "max_vectors": 7}, "curvature.max_vectors"),
        (Curvature, {"tolerance": 0.0}, "curvature.tolerance"),
        (Curvature, {"microbatch": 0}, "curvature.microbatch"),
        (Evaluation, {"grid_low": 0.0}, "evaluation.grid_low"),
        (Evaluation, {"grid_size": 1}, "evaluation.grid_size"),
        (Evaluation, {"grid_low": 2.0, "grid_high": 1.0}, "evaluation.grid_high"),
        (Evaluation, {"bins": 0}, "evaluation.bins"),
        (Evaluation, {"resamples": 0}, "evaluation.resamples"),
        (Config, {"seed": 2**31}, "seed"),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: type, values: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=f"^`{option}` must be .*; got .*; change it"):
        section(**values)


@pytest.mark.parametrize(
    ("section", "values", "option"),
    [
        (Config, {"seed": 1.5}, "seed"),
        (Config, {"seed": "5"}, "seed"),
        (Config, {"seed": None}, "seed"),
        (Config, {"data": {"name": "digits"}}, "data"),
        (Config, {"data": Model()}, "data"),
        (Data, {"name": 3}, "data.name"),
        (Data, {"name": ""}, "data.name"),
        (Data, {"name": "a\udc80"}, "data.name"),
        (Data, {"dir": 3}, "data.dir"),
        (Data, {"dir": "a\0b"}, "data.dir"),
        (Data, {"dir": "a\udc80"}, "data.dir"),
        (Data, {"mean": 0.3}, "data.mean"),
        (Data, {"mean": ()}, "data.mean"),
        (Data, {"mean": {0.3}}, "data.mean"),
        (Data, {"mean": ["0.3"]}, "data.mean"),
        (Data, {"std": [True]}, "data.std"),
        (Data, {"train_examples": 5.0}, "data.train_examples"),
        (Data, {"augment": 1}, "data.augment"),
        (Model, {"variant": b"b0"}, "model.variant"),
        (Optimizer, {"epochs": True}, "optimizer.epochs"),
        (Optimizer, {"learning_rate": "0.1"}, "optimizer.learning_rate"),
        (Optimizer, {"clip_norm": False}, "optimizer.clip_norm"),
        (Prior, {"update": None}, "prior.update"),
        (Evaluation, {"split": "train"}, "evaluation.split"),
        (Evaluation, {"bins": [15]}, "evaluation.bins"),
    ],
)
def test_values_of_another_type_are_refused_by_name(section: type, values: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=f"^`{option}` must .*; got .*; change it") as caught:
        section(**values)
    assert "\n" not in str(caught.value)


def test_a_list_stands_for_a_tuple_a_string_for_a_path_and_an_integer_for_a_number() -> None:
    assert Data(mean=[0, 0.5], dir="sets") == Data(mean=(0.0, 0.5), dir=Path("sets"))
    assert isinstance(Data(mean=[0]).mean[0], float)


@pytest.mark.parametrize(
    "line",
    [
        'object.__setattr__(config.evaluation, "split", "train")',
        'object.__setattr__(config, "seed", 1.5)',
        'config.data.__dict__["mean"] = "0.3"',
        'config.__dict__["model"] = config.data',
    ],
)
def test_what_a_config_file_puts_into_a_record_is_checked_too(line: str, tmp_path: Path) -> None:
    file = tmp_path / "sly.py"
    file.write_text(f"from training.config import *\nconfig = Config()\n{line}\n")
    with pytest.raises(UserError, match="sly.py: `[a-z.]+` must .*; change it"):
        parse(["--config", str(file)], PROGRAM)


def other_values(section: Any) -> dict[str, Any]:
    """For each field of a section a valid value that is not its default."""
    chosen = {
        "name": "größe/1",
        "dir": Path("a b/ü"),
        "mean": (0.1, 0.2),
        "std": (1e-300, 3.0),
        "wrong_labels": 0.1 + 0.2,
        "augment": True,
        "variant": "b0",
        "drop_path": 0.1 + 0.2,
        "second_moment_decay": 0.3,
        "update": "joint",
        "structure": "layerwise",
        "curvature": "lanczos",
        "split": "validation",
        "ood": "noise",
    }
    fields = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    fields.pop("every_epochs", None)  # which joint does not have
    numbers = {name: value + 1 if value else 7 for name, value in fields.items() if name not in chosen}
    return {**numbers, **{name: value for name, value in chosen.items() if name in fields}}


@pytest.mark.parametrize("section", ["data", "model", "optimizer", "prior", "curvature", "evaluation"])
def test_every_field_comes_back_from_json(section: str, tmp_path: Path) -> None:
    values = other_values(getattr(Config(), section))
    config = replace(Config(), seed=2**31 - 1, **{section: type(getattr(Config(), section))(**values)})
    save_config(tmp_path, config)
    assert load_saved_config(tmp_path) == config
    assert from_document(json.loads(json.dumps(to_document(config)))) == config
    for name, value in values.items():
        assert type(getattr(getattr(load_saved_config(tmp_path), section), name)) is type(
            getattr(getattr(config, section), name)
        )
        assert getattr(getattr(Config(), section), name) != value


def test_a_value_out_of_range_on_the_command_line_is_one_line() -> None:
    with pytest.raises(UserError, match="`optimizer.batch_size` must be at least 1; got 0"):
        parsed("--optimizer.batch-size", "0")


# --- work directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Config(), UNUSUAL], ids=["default", "unusual"])
def test_saved_config_comes_back_typed(config: Config, tmp_path: Path) -> None:
    save_config(tmp_path / "new" / "run", config)
    loaded = load_saved_config(tmp_path / "new" / "run")
    assert loaded == config
    assert isinstance(loaded.optimizer.learning_rate, float)
    assert loaded.data.dir is None or isinstance(loaded.data.dir, Path)
    assert loaded.data.mean is None or isinstance(loaded.data.mean, tuple)
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "must be a config as it was saved; the file must be JSON; got EOF"),
        (lambda text: text.replace('"seed": 5', '"seed": "5"'), "`seed` must be a valid integer; got '5'"),
        (lambda text: text.replace('"seed": 5', '"seed": true'), "`seed` must be a valid integer; got True"),
        (lambda text: text.replace('"seed"', '"speed"'), "every setting must be a known one; got `speed`"),
        (lambda text: text.replace('"batch_size": 32', '"batch_size": 0'), "`optimizer.batch_size` must be at least 1"),
        (
            lambda text: text.replace('"online"', '"never"'),
            "`prior.update` must be 'posthoc', 'online' or 'joint'; got 'never'",
        ),
        (lambda text: "[]", r"the file must be an object; got \[\]"),
    ],
)
def test_a_damaged_saved_config_says_what_is_wrong(change: Any, message: str, tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    file = tmp_path / "config.json"
    unsigned = re.sub(r',\s*"sha256": "\w+"', "", file.read_text())
    changed = change(unsigned)
    assert changed != unsigned
    file.write_text(changed)
    with pytest.raises(UserError, match=message) as caught:
        load_saved_config(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["seed", "mean", "batch_size"])
def test_a_changed_digit_of_a_saved_config_says_what_to_do(field: str, tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    file = tmp_path / "config.json"
    changed = re.sub(rf'("{field}": \[?\s*)(\d)', lambda found: f"{found[1]}{int(found[2]) ^ 1}", file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    for read in (load_saved_config, lambda workdir: open_workdir(workdir, UNUSUAL, resume=True)):
        with pytest.raises(UserError, match=f"{file} must be a config as it was saved; its entry sha256") as caught:
            read(tmp_path)
        assert "on purpose" in str(caught.value) and "remove the entry sha256" in str(caught.value)
        assert f" -m training.fit_van --workdir {tmp_path} --resume" in str(caught.value)
    assert file.read_text() == changed


def test_a_saved_config_without_a_digest_is_unverified(tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    said: list[str] = []
    assert load_saved_config(tmp_path, said.append) == UNUSUAL
    assert len(said) == 1 and "unverified" in said[0]


def test_no_saved_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold config.json"):
        load_saved_config(tmp_path)


def test_a_field_added_later_takes_its_default(tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["optimizer"]["clip_norm"], saved["curvature"]
    (tmp_path / "config.json").write_text(sealed.dump(saved, indent=2))
    expected = replace(UNUSUAL, optimizer=replace(UNUSUAL.optimizer, clip_norm=Optimizer().clip_norm))
    assert load_saved_config(tmp_path) == expected


def test_differences_name_field_and_both_values() -> None:
    assert describe_difference(UNUSUAL, UNUSUAL) == []
    here = replace(UNUSUAL, seed=6, optimizer=replace(UNUSUAL.optimizer, learning_rate=0.001))
    differences = describe_difference(UNUSUAL, here)
    assert differences == ["seed: 5 there, 6 here", "optimizer.learning_rate: 1.0 there, 0.001 here"]


def with_pixels(config: Config, mean: Any, std: Any) -> Config:
    return replace(config, data=replace(config.data, mean=mean, std=std))


def test_measured_pixel_statistics_agree_with_a_config_that_left_them_to_measurement(tmp_path: Path) -> None:
    recorded, asked = with_pixels(Config(), (0.3,), (0.2,)), Config()
    assert describe_difference(recorded, asked) == []
    assert describe_difference(asked, recorded) == [
        "data.mean: None there, (0.3,) here",
        "data.std: None there, (0.2,) here",
    ]
    save_config(tmp_path, recorded)
    assert open_workdir(tmp_path, asked, resume=True) == recorded


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_fresh_workdir_is_created_with_its_config(resume: bool, exists: bool, tmp_path: Path) -> None:
    workdir = tmp_path / "a" / "b"
    if exists:
        workdir.mkdir(parents=True)
    assert open_workdir(workdir, UNUSUAL, resume) == UNUSUAL
    assert load_saved_config(workdir) == UNUSUAL
    # Nothing but the config is there yet, so starting it once more overwrites nothing.
    assert open_workdir(workdir, UNUSUAL, resume) == UNUSUAL


def test_a_workdir_with_a_run_needs_resume_and_the_same_settings(tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="must not overwrite another; .*continue it with: .* --resume; or use another"):
        open_workdir(tmp_path, UNUSUAL, resume=False)
    assert open_workdir(tmp_path, UNUSUAL, resume=True) == UNUSUAL
    for resume in (False, True):
        with pytest.raises(UserError, match=r"differs in seed: 5 there, 6 here; .*use another --workdir"):
            open_workdir(tmp_path, replace(UNUSUAL, seed=6), resume)
    assert load_saved_config(tmp_path) == UNUSUAL


@pytest.mark.parametrize("leftover", [None, "log.jsonl", ".config.json.writing"])
def test_a_workdir_with_only_a_config_can_be_claimed_again(leftover: str | None, tmp_path: Path) -> None:
    """A run that ended before its first record and its first checkpoint leaves only its config."""
    save_config(tmp_path, UNUSUAL)
    if leftover:
        (tmp_path / leftover).touch()
    with pytest.raises(
        UserError, match="differs in seed: 5 there, 6 here; use .* or start anew there without --resume"
    ):
        open_workdir(tmp_path, replace(UNUSUAL, seed=6), resume=True)  # this asks for the run that was there
    assert open_workdir(tmp_path, replace(UNUSUAL, seed=6), resume=False) == replace(UNUSUAL, seed=6)
    assert load_saved_config(tmp_path) == replace(UNUSUAL, seed=6)


@pytest.mark.parametrize("kept", ["log.jsonl", "train", "laplace", "metrics.json"])
def test_a_workdir_with_more_than_a_config_is_not_claimed(kept: str, tmp_path: Path) -> None:
    save_config(tmp_path, UNUSUAL)
    if "." in kept:
        (tmp_path / kept).write_text("{}\n")
    else:
        (tmp_path / kept).mkdir()
    for config in (UNUSUAL, replace(UNUSUAL, seed=6)):
        with pytest.raises(UserError, match="use another --workdir"):
            open_workdir(tmp_path, config, resume=False)
    assert load_saved_config(tmp_path) == UNUSUAL


def test_a_foreign_config_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "van"}')
    with pytest.raises(UserError, match="every setting must be a known one; got `model_type`"):
        open_workdir(tmp_path, UNUSUAL, resume=False)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "van"}'


# --- what a resumed run may change ----------------------------------------------------------------------------------

FIXED = replace(UNUSUAL, prior=Prior(), data=replace(UNUSUAL.data, mean=(0.5,), std=(0.2,)))
EVALUATED = replace(FIXED, evaluation=Evaluation(split="validation", ood="noise", grid_high=1e7, bins=10))
MORE_VECTORS = replace(FIXED, curvature=Curvature(max_vectors=1024))


def run_of(config: Config, workdir: Path, fitted: bool) -> Path:
    """Make the directory that a run of these settings leaves, with or without posteriors."""
    save_config(workdir, config)
    (workdir / "train").mkdir()
    if fitted:
        (workdir / "laplace").mkdir()
    return workdir


@pytest.mark.parametrize("fitted", [False, True])
def test_a_resumed_run_may_be_evaluated_in_another_way(fitted: bool, tmp_path: Path) -> None:
    run_of(FIXED, tmp_path, fitted)
    with pytest.raises(UserError, match="continue it with: .* --resume"):
        open_workdir(tmp_path, EVALUATED, resume=False)
    # Pixel statistics that are left to measurement are still taken from the record.
    assert open_workdir(tmp_path, with_pixels(EVALUATED, None, None), resume=True) == EVALUATED
    assert load_saved_config(tmp_path) == EVALUATED


def test_what_changes_a_run_is_refused_beside_what_does_not(tmp_path: Path) -> None:
    run_of(FIXED, tmp_path, fitted=True)
    changed = replace(EVALUATED, seed=6, prior=replace(FIXED.prior, precision=2.0))
    with pytest.raises(UserError, match=r"differs in seed: 5 there, 6 here; prior.precision: 1.0 there, 2.0 here; use"):
        open_workdir(tmp_path, changed, resume=True)
    assert load_saved_config(tmp_path) == FIXED


def test_curvature_may_change_until_posteriors_are_fitted(tmp_path: Path) -> None:
    assert open_workdir(run_of(FIXED, tmp_path / "trained", fitted=False), MORE_VECTORS, resume=True) == MORE_VECTORS
    assert load_saved_config(tmp_path / "trained") == MORE_VECTORS
    run_of(FIXED, tmp_path / "fitted", fitted=True)
    with pytest.raises(
        UserError, match=r"max_vectors: 512 there, 1024 here; .*remove .*laplace to have the posteriors"
    ):
        open_workdir(tmp_path / "fitted", MORE_VECTORS, resume=True)
    assert load_saved_config(tmp_path / "fitted") == FIXED
    # The number of images in memory at once changes no result.
    smaller = replace(FIXED, curvature=Curvature(microbatch=8))
    assert open_workdir(tmp_path / "fitted", smaller, resume=True) == smaller


def test_training_by_the_evidence_does_not_depend_on_the_curvature_of_the_posteriors(tmp_path: Path) -> None:
    """It has products, probes and images of its own."""
    changed = replace(UNUSUAL, curvature=Curvature(max_vectors=1024))
    assert open_workdir(run_of(UNUSUAL, tmp_path, fitted=False), changed, resume=True) == changed


# --- how the prior is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"matvecs": 3},
            "`prior.matvecs` must be left out where .* is posthoc: it belongs to online or joint; got 3",
        ),
        (
            {"structure": "layerwise"},
            "`prior.structure` must be scalar where .* is posthoc; got 'layerwise'",
        ),
        (
            {"update": "online", "every_steps": 4},
            "`prior.every_steps` must be left .* is online: it belongs to joint",
        ),
        ({"update": "online", "learning_rate": 0.1}, "`prior.learning_rate` must be left out .*: it belongs to joint"),
        (
            {"update": "joint", "every_epochs": 4},
            "`prior.every_epochs` must be left out .* belongs to online; got 4",
        ),
        (
            {"update": "joint", "curvature": "diagonal", "probes": 2},
            "`prior.probes` must be left out where `prior.curvature` is diagonal; got 2; change it in the config file",
        ),
    ],
)
def test_options_of_one_update_given_to_another_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Prior(**options)


def test_a_config_of_an_earlier_release_is_read_in_the_words_of_this_one(tmp_path: Path) -> None:
    document = to_document(Config(prior=Prior(precision=2.0)))
    document["prior"] = {"precision": 2.0, "update": "fixed", "every_epochs": 10, "examples": 256}
    assert from_document(document) == Config(prior=Prior(precision=2.0))
    recorded = {"sha256": sealed.digest(document), "values": document}
    require_recorded(recorded, Config(prior=Prior(precision=2.0)), tmp_path, curvature=True, report=pytest.fail)


# --- directories that do not hold a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_workdir_that_cannot_be_written(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"`--workdir` must be writable; got {tmp_path}/file: Not a directory; use"):
        open_workdir(tmp_path / "file" / "run", UNUSUAL, resume)
    run_of(UNUSUAL, tmp_path / "run", fitted=True)

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"`--workdir` must be writable; got {tmp_path}/run: Permission denied; use"):
        open_workdir(tmp_path / "run", UNUSUAL, resume)
    with pytest.raises(UserError, match=f"got {tmp_path}: Permission denied; use another"):
        open_workdir(tmp_path / "new" / "run", UNUSUAL, resume)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_workdir_that_is_a_link_to_nowhere(target: str, tmp_path: Path) -> None:
    """It was found when the directory was to be made: for an evaluation, after minutes."""
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match="must be writable; got .*link: a link to nowhere; use another --workdir"):
        open_workdir(tmp_path / "link", Config(), resume=False)


def test_a_workdir_that_does_not_hold_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="must be new, empty, or hold a run; .*holds thesis.tex"):
        open_workdir(tmp_path, UNUSUAL, resume=False)
    with pytest.raises(UserError, match="must be a directory"):
        open_workdir(tmp_path / "thesis.tex", UNUSUAL, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- shipped experiments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("van_*.py")), ids=lambda file: file.stem)
def test_every_shipped_config_is_an_experiment_card(file: Path) -> None:
    check_window(load_config(file))
    card = file.read_text().split('"""')[1]
    for entry in ("Command", "Data", "Hardware", "Time", "Expected"):
        assert re.search(rf"^{entry} +\S", card, re.MULTILINE)
    name = "" if file.stem == "van_digits" else f" --config configs/{file.name}"
    assert f"{PROGRAM}{name}\n" in card
