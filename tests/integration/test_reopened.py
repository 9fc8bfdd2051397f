"""What follows a refusal that a setting can lift: under another value of that setting the candidate is looked at again
by itself, by a fold by hand and by what is watched; under the same value it is left alone. The ledger keeps every
verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, gates, making
from continual.config import Settings, load
from continual.records import Candidate
from continual.service import once as watching
from continual.service.watched import wiring_of
from continual.sources import roster
from continual.state.entries import RefuseEntry
from tests.helpers import models, parts
from tests.helpers.command import run

HEAD = "lm_head.weight"
NORM = "model.norm.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


def opened(state: Path, base: Path, recipe: making.Recipe | None = None, **settings: object) -> api.Merge:
    if not state.exists():
        making.init(base, state, recipe or making.Recipe(rule="mean", scale="1"))
    return api.Merge(load({"state": state, **settings}, file=None, environ={}), write=True)


def verdicts(merge: api.Merge) -> list[tuple[str | None, str | None]]:
    return [(c.entry.fate, c.entry.reason) for c in merge.state.ledger.log if c.entry.candidate]


def _without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def _longer(tensors: dict[str, torch.Tensor]) -> None:
    for name in (HEAD, "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:3]])


def _more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["v_head.weight"] = torch.ones(1, 16)


def _far(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] += 1e3


CASES: dict[str, tuple[Change, dict[str, object], dict[str, object]]] = {
    "missing": (_without(NORM), {}, {"missing": "unchanged"}),
    "vocab": (_longer, {}, {"vocab": "common-rows"}),
    "extra": (_more, {"gates": ["lineage.extra=refuse"]}, {"gates": ["lineage.extra=leave-out"]}),
    "norm-base": (_far, {}, {"max_base_ratio": 1e9}),
    "weight": (lambda _: None, {"weight": "metadata:score"}, {"weights": {"a*": 2.0}}),
}


@pytest.mark.parametrize("reason", CASES)
def test_another_value_has_it_looked_at_again_and_the_same_one_does_not(tmp_path: Path, reason: str) -> None:
    change, first, second = CASES[reason]
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    alice = models.fine_tune(base, tmp_path / "alice", 1, change=change)
    with opened(state, base, **first) as merge:
        refused = merge.fold(alice)
        assert (refused.fate, refused.reason) == ("refused", reason)
        settings = merge.state.ledger.head.of_kind(RefuseEntry).settings
        assert settings
        assert f"; a fold or run with another {' or '.join(settings)} looks at it again" in refused.line()
    with opened(state, base, **first, keep=7) as merge:
        again = merge.fold(alice)
        assert (again.fate, "looks at it again" in again.line()) == ("known", True)
        assert merge.plan(alice).reason == "known"
        assert merge.standing.reopened() == []
    with opened(state, base, **{**first, **second}) as merge:
        assert merge.plan(alice).ok
        assert merge.fold(alice).fate == "folded"
        assert verdicts(merge) == [("refused", reason), ("folded", None)]
        assert merge.standing.reopened() == []
    with opened(state, base, **first) as merge:
        assert merge.fold(alice).commit.entry.fate == "folded", "what is folded stays so"


def test_a_second_look_that_refuses_again_is_the_last_under_its_settings(tmp_path: Path) -> None:
    """One record for each look, and no look without a change: nothing goes round in circles."""
    base, state = models.base(tmp_path / "base"), tmp_path / "state"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        _longer(tensors)
        tensors.pop(NORM)

    alice = models.fine_tune(base, tmp_path / "alice", 1, change=change)
    for settings, fates in (
        ({}, 1),
        ({}, 1),
        ({"missing": "unchanged"}, 2),
        ({"missing": "unchanged"}, 2),
        ({}, 2),  # it is refused by the vocabulary now
        ({"missing": "unchanged", "vocab": "common-rows"}, 3),
    ):
        with opened(state, base, **settings) as merge:
            merge.fold(alice)
            assert len(verdicts(merge)) == fates
    with opened(state, base) as merge:
        assert [reason for _, reason in verdicts(merge)] == ["missing", "vocab", None]


def test_an_update_and_an_assembly_are_looked_at_again(tmp_path: Path) -> None:
    base, state = parts.embedder(tmp_path / "base"), tmp_path / "state"
    tuned = parts.embedder(tmp_path / "ft", 1, mode="cls_token")
    with opened(state, base) as merge:
        assert "gates.assembly.differ = base" in merge.fold(tuned).message
        assert "another gates.assembly.differ" in merge.fold(tuned).message
    with opened(state, base, gates=["assembly.differ=base"]) as merge:
        assert merge.fold(tuned).fate == "folded"
    other = load_file(tuned / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in other.items()}, tuned / "model.safetensors")
    with opened(state, base, gates=["assembly.differ=base"]) as merge:
        assert merge.fold(tuned).reason == "update"
    with opened(state, base, gates=["assembly.differ=base"], updates="add", max_mean_ratio=100) as merge:
        assert merge.fold(tuned).fate == "folded"


def _without_settings(merge: api.Merge) -> None:
    """Makes the newest record one that an earlier version made."""
    ledger = merge.state.ledger
    old = ledger.head
    entry = dataclasses.replace(old.of_kind(RefuseEntry), settings=None)
    ledger._fates[old.entry.candidate.key] = dataclasses.replace(old, entry=entry)  # type: ignore[union-attr]


def test_a_record_of_an_earlier_version_stands_and_its_line_names_the_command(tmp_path: Path) -> None:
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    alice = models.fine_tune(base, tmp_path / "alice", 1, change=_longer)
    with opened(state, base) as merge:
        merge.fold(alice)
    with opened(state, base, vocab="common-rows") as merge:
        assert len(merge.state.ledger.refusals) == 1
        _without_settings(merge)
        told = merge.fold(alice)
        assert (told.fate, told.line().endswith("; after that: continual retry alice")) == ("known", True)
        merge.retry("alice")
        assert merge.fold(alice).fate == "folded"


def test_a_look_at_what_is_watched_takes_it_after_the_settings_changed(tmp_path: Path) -> None:
    base, state, watch = models.base(tmp_path / "base"), tmp_path / "state", tmp_path / "in"
    watch.mkdir()
    for number, name in enumerate(("alice", "bob")):
        models.fine_tune(base, watch / name, number, change=_longer)
    models.fine_tune(base, watch / "carol", 3, change=_without(NORM))

    def once(**settings: object) -> tuple[list[str], list[str]]:
        with opened(state, base, watch=[watch], settle=0.0, **settings) as merge:
            seen = [s.model for s in watching.survey(merge, watching.watched(merge)) if s.take]
            tried = watching.once(merge, watching.watched(merge))
            return seen, [f"{t.model} {t.outcome.fate}" for t in tried if t.outcome]

    assert once() == ([], ["alice refused", "bob refused", "carol refused"])
    assert once() == ([], [])
    assert once(vocab="common-rows") == (["alice", "bob"], ["alice folded", "bob folded"])
    assert once(vocab="common-rows") == ([], [])
    assert once(missing="unchanged") == (["carol"], ["carol folded"])


def test_those_given_by_hand_and_those_that_were_replaced_are_not_reopened(tmp_path: Path) -> None:
    """A daemon never takes what it was not told to watch, nor a commit after which another came."""
    base, state = models.base(tmp_path / "base"), tmp_path / "state"

    def refused(name: str, source: str, origin: str) -> RefuseEntry:
        candidate = Candidate(f"hub:{name}", name, source, origin, "full", 1, revision=name)
        return RefuseEntry(candidate=candidate, reason="vocab", message="m", settings={"vocab": "refuse"})

    with opened(state, base) as merge:
        merge.record(refused("a", "hand", "hf://org/hand"))
        merge.record(refused("b", "hub", "hf://org/ft"))
        merge.record(refused("c", "webhook", "hf://org/ft"))
        assert merge.standing.reopened() == []
    with opened(state, base, vocab="common-rows") as merge:
        assert [candidate.key for candidate in merge.standing.reopened()] == ["hub:c"]
        assert wiring_of(merge).reopened == merge.standing.reopened()
        assert [merge.standing.is_settled(f"hub:{name}") for name in "abc"] == [False] * 3
        assert roster.make(wiring_of(merge)) == []


def test_the_values_are_those_of_the_settings_as_json_holds_them() -> None:
    values = gates.make(Settings(max_base_ratio=float("inf"), weights={"a*": 2.0})).values
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert (values["max_base_ratio"], values["weights"], values["gates.lineage.extra"]) == (
        "inf",
        {"a*": 2.0},
        "leave-out",
    )


@pytest.mark.slow
def test_the_command_folds_what_another_flag_lets_in(tmp_path: Path) -> None:
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    making.init(base, state)
    alice = models.fine_tune(base, tmp_path / "alice", 1, change=_longer)
    first = run("fold", alice, "--state", state)
    assert first.returncode == 1
    assert "vocab = common-rows folds the rows both have; a fold or run with another vocab" in first.stderr
    second = run("fold", alice, "--state", state, "--vocab", "common-rows")
    assert (second.returncode, "folded as record 2" in second.stdout) == (0, True)
