"""Settings of rounds: which are refused, what is made of them, and what a record keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest

from continual.config import Settings
from continual.errors import Misconfigured
from continual.selection import options_of
from tests.helpers.waiting import OPTIONS, options


@pytest.mark.parametrize("name", ["trial", "sigmas", "patience", "age", "most", "size", "wait"])
def test_what_cannot_be_asked_is_named(name: str) -> None:
    with pytest.raises(Misconfigured, match=f"rounds: {name} = -1"):
        options(**{name: -1})


@pytest.mark.parametrize(
    "name", ["step", "rho", "search", "best", "active", "steps", "inner", "tolerance", "batch", "held", "dtype"]
)
def test_settings_that_a_plan_or_a_calibration_refuses_are_named(name: str) -> None:
    bad: Mapping[str, Any] = {"step": "big", "search": "wide", "dtype": "int4", "held": 1.5}
    settings_ = Settings.model_validate(
        {"objective": "tests.helpers.quadratic:make", "rounds": {name: bad.get(name, -1)}}
    )
    with pytest.raises(Misconfigured, match=name):
        options_of(settings_)


def test_layers_go_with_corrective_unless_said_otherwise_and_not_with_pairwise() -> None:
    def layers(**rounds: Any) -> bool:
        return options_of(
            Settings.model_validate({"objective": "tests.helpers.quadratic:make", "rounds": rounds})
        ).layers

    assert [layers(), layers(step="hard"), layers(step="hard", layers=True), layers(layers=False)] == [
        True,
        False,
        True,
        False,
    ]
    assert not layers(step="pairwise")
    for step in ("pairwise", "soft"):
        with pytest.raises(Misconfigured, match=f"{step} weighs whole models"):
            layers(step=step, layers=True)


def test_no_objective_is_said_with_what_there_is() -> None:
    with pytest.raises(Misconfigured, match=r"objective: .*causal-lm, classification or heads.*module:function"):
        options_of(Settings.model_validate({"select": "relevance"}))


def test_what_a_record_keeps_changes_with_all_that_the_choice_depends_on() -> None:
    """A round that was cut off goes on only if the same is asked; when one is due is not part of that."""
    assert options(size=1, wait=1.0).told() == OPTIONS.told()
    others: Mapping[str, Any] = {
        "trial": 0.5,
        "sigmas": 2.0,
        "stays": 0.5,
        "patience": 9,
        "step": "hard",
        "rho": 2.0,
        "search": "decay",
        "layers": False,
        "tolerance": 0.5,
        "steps": 3,
        "best": 2,
        "active": 5,
        "inner": 9,
        "age": 7.0,
        "most": 5,
    }
    assert {field.name for field in fields(OPTIONS.told())} == set(others)
    for name, value in others.items():
        changed = {name: value, **({"step": "hard"} if name == "search" else {})}
        assert getattr(options(**changed).told(), name) != getattr(OPTIONS.told(), name), name
