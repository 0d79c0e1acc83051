"""The settings that a file on disk was computed with, against those of now."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training import sealed, settings
from training.config import Config, Curvature, Data, Evaluation, Optimizer, Prior
from training.errors import UserError

RUN = Config(seed=4, data=Data(mean=(0.3,), std=(0.2,)), optimizer=Optimizer(learning_rate=0.02))
PATH = Path("step_00000007")


def compare(recorded: Any, config: Config, curvature: bool = False) -> list[str]:
    said: list[str] = []
    settings.require_recorded(recorded, config, PATH, curvature=curvature, report=said.append)
    return said


def test_the_same_settings_pass_and_what_nothing_depends_on_may_differ() -> None:
    recorded = settings.record(RUN)
    elsewhere = replace(
        RUN,
        data=replace(RUN.data, dir=Path("elsewhere")),
        curvature=Curvature(microbatch=8),
        evaluation=Evaluation(split="validation", bins=3),
    )
    assert compare(recorded, RUN) == compare(recorded, elsewhere, curvature=True) == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(RUN, seed=5), "seed: 4 there, 5 in config.json"),
        (replace(RUN, data=replace(RUN.data, mean=(0.31,))), r"data.mean: \[0.3\] there, \[0.31\] in config.json"),
        (replace(RUN, prior=Prior(precision=2.0)), "prior.precision: 1.0 there, 2.0 in config.json"),
    ],
)
def test_other_settings_are_named_with_both_values(config: Config, named: str) -> None:
    with pytest.raises(UserError, match=f"{PATH} must have been computed .*{named}; restore config.json") as caught:
        compare(settings.record(RUN), config)
    assert "\n" not in str(caught.value)


def test_the_curvature_counts_where_it_was_used() -> None:
    other = replace(RUN, curvature=Curvature(max_vectors=900))
    assert compare(settings.record(RUN), other) == []
    with pytest.raises(UserError, match="curvature.max_vectors: 512 there, 900"):
        compare(settings.record(RUN), other, curvature=True)


def test_files_of_earlier_releases_are_unverified() -> None:
    (said,) = compare(None, RUN)
    assert f"{PATH} has no record of its settings" in said and "unverified" in said


def test_settings_that_came_or_went_with_a_release_do_not_count() -> None:
    recorded = settings.record(RUN)
    del recorded["values"]["optimizer"]["clip_norm"]
    recorded["values"]["model"]["old"] = 3
    recorded["sha256"] = sealed.digest(recorded["values"])
    assert compare(recorded, RUN) == []


@pytest.mark.parametrize("change", [{"sha256": "0"}, {"values": {}}, {"values": None}])
def test_a_changed_record_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must hold the settings as they were recorded"):
        compare({**settings.record(RUN), **change}, RUN)
