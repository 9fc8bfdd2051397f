"""What every gate keeps to, whoever wrote it: this suite runs over the whole list.

A gate's own test module (`test_NAME.py`) brings a case for each of its reasons, in `REFUSED`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from continual import gates
from continual.config import Settings, load
from continual.errors import Misconfigured, Refuse
from continual.gates import GATES, Gate, Headers, Numbers, TensorNumbers
from continual.gates.contract import AtFold, AtHeaders, AtNumbers, AtTensor, Earlier
from continual.records import Totals
from tests.unit.gates.cases import Case

OPERATIONS = Path(__file__).parents[3] / "ops" / "docs" / "operations.md"
Make = Callable[[Path], Case]


def cases(gate: type[Gate]) -> dict[str, Make]:
    module = importlib.import_module(f"tests.unit.gates.test_{gate.name.replace('-', '_')}")
    found: dict[str, Make] = module.REFUSED
    return found


ALL = [(gate, reason) for gate in GATES for reason in gate.reasons]
HEADERS = [(gate, reason) for gate, reason in ALL if issubclass(gate, AtHeaders | AtFold)]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[[Make], Case]]:
    """Makes cases, and closes their files."""
    found: list[Case] = []

    def make(case: Make) -> Case:
        found.append(case(tmp_path))
        return found[-1]

    yield make
    for case in found:
        if isinstance(case.seen, Headers):
            case.seen.model.close()
            case.seen.base.checkpoint.close()


def verdict(gate: Gate, seen: object) -> object:
    """What a gate says: what it found out, or why it refuses. Any other error is a mistake of the gate."""
    try:
        found: object = gate.judge(seen)  # type: ignore[attr-defined]
    except Refuse as refusal:
        found = refusal.reason, str(refusal)
    assert not isinstance(found, tuple) or isinstance(found, Headers) or found[0] in gate.reasons
    return found


def test_names_and_reasons_are_unique_words() -> None:
    names = [gate.name for gate in GATES]
    assert len(set(names)) == len(names)
    for gate in GATES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", gate.name)
        assert gate.reasons
        assert len(set(gate.reasons)) == len(gate.reasons)


def test_every_gate_has_one_stage_and_cannot_be_changed() -> None:
    for gate in GATES:
        assert sum(issubclass(gate, stage) for stage in (AtHeaders, AtFold, AtTensor, AtNumbers)) == 1
        for field in dataclasses.fields(gate):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(gate(), field.name, None)


def test_every_reason_is_explained_to_those_who_run_it() -> None:
    table = OPERATIONS.read_text().partition("## Why a candidate was refused")[2]
    explained = {word for row in re.findall(r"^\| (`.+?`) \|", table, re.M) for word in re.findall(r"`([^`]+)`", row)}
    assert {reason for gate in GATES for reason in gate.reasons} <= explained


@pytest.mark.parametrize("gate", GATES)
def test_there_is_a_case_for_every_reason_and_no_other(gate: type[Gate]) -> None:
    assert set(cases(gate)) == set(gate.reasons)


@pytest.mark.parametrize(("gate", "reason"), ALL)
def test_it_refuses_with_its_reason_and_says_the_same_again(
    made: Callable[[Make], Case], gate: type[Gate], reason: str
) -> None:
    case = made(cases(gate)[reason])
    assert isinstance(case.gate, gate)
    with pytest.raises(Refuse) as first:
        case.judge()
    with pytest.raises(Refuse) as second:
        case.judge()
    assert first.value.reason == second.value.reason == reason
    assert str(first.value) == str(second.value)
    name = case.seen.candidate.name if isinstance(case.seen, Headers) else case.seen.name
    assert name in str(first.value), "a message says which candidate"
    assert "\n" not in str(first.value)


@pytest.mark.parametrize("gate", [gate for gate in GATES if issubclass(gate, AtHeaders | AtFold)])
@pytest.mark.parametrize(("other", "reason"), HEADERS)
def test_it_has_a_verdict_on_what_other_gates_refuse(
    made: Callable[[Make], Case], gate: type[Gate], other: type[Gate], reason: str
) -> None:
    """Every gate on headers meets every bad model that any of them knows, and never fails."""
    seen = made(cases(other)[reason]).seen
    assert isinstance(seen, Headers)
    first = verdict(gate(), seen)
    assert verdict(gate(), seen) == first
    if isinstance(first, Headers):
        assert first._replace(lineage=seen.lineage, weight=seen.weight) == seen, "a gate changes only what it finds out"


def test_the_first_in_the_list_that_refuses_gives_the_reason(made: Callable[[Make], Case]) -> None:
    asked = gates.make(Settings())
    seen = made(cases(gates.LineageGate)["missing"]).seen
    assert isinstance(seen, Headers)
    reasons = []
    for release, earlier in (({"state": "ours"}, 4), (None, 4), (None, None)):
        with pytest.raises(Refuse) as refusal:
            asked.at_headers(seen._replace(release=release, earlier=earlier))
        reasons.append(refusal.value.reason)
    assert reasons == ["own-release", "update", "missing"]


def test_what_a_gate_finds_out_reaches_those_who_come_after_it(made: Callable[[Make], Case]) -> None:
    seen = made(cases(gates.OwnReleaseGate)["own-release"]).seen
    assert isinstance(seen, Headers)
    asked = gates.make(Settings(weight="2.5"))
    found = asked.at_headers(seen._replace(release=None))
    assert found.lineage is not None
    assert found == seen._replace(release=None, lineage=found.lineage), "a weight is asked for a fold only"
    assert asked.at_fold(found) == found._replace(weight=2.5)


NORMS = st.floats(0.0, 1e300)
TOTALS = st.just(Totals()) | st.builds(
    lambda count, mean: Totals(count=float(count), norm_sum=count * mean, merged_sq=mean),
    st.integers(1, 10**6),
    st.floats(1e-30, 1e30),
)


EARLIER = st.lists(st.builds(Earlier, st.just("bob"), NORMS), max_size=7).map(lambda found: lambda: found)


@given(seen=st.builds(partial(Numbers, "alice"), NORMS, NORMS, TOTALS, earlier=EARLIER))
def test_a_gate_on_numbers_has_one_verdict_on_any_numbers(seen: Numbers) -> None:
    before = dataclasses.replace(seen.totals)
    for gate in GATES:
        if issubclass(gate, AtNumbers):
            assert verdict(gate(), seen) == verdict(gate(), seen)
    assert seen.totals == before


@given(tau_sq=st.floats(0.0) | st.just(math.nan))
def test_a_gate_on_tensors_has_one_verdict_on_any_numbers(tau_sq: float) -> None:
    for gate in GATES:
        if issubclass(gate, AtTensor):
            seen = TensorNumbers("alice", "w", tau_sq)
            assert verdict(gate(), seen) == verdict(gate(), seen)


@pytest.mark.parametrize("gate", GATES)
def test_its_defaults_are_those_of_the_settings(gate: type[Gate]) -> None:
    assert gates.make(Settings()).the(gate) == gate()


def test_the_settings_reach_the_gates() -> None:
    given: dict[str, object] = {
        "updates": "add",
        "missing": "unchanged",
        "vocab": "common-rows",
        "lineage": "shapes",
        "tied": "both",
        "weight": "metadata:score",
        "weights": {"a*": 2.0},
        "max_base_ratio": 0.25,
        "max_mean_ratio": 7.0,
    }
    made = gates.make(Settings.model_validate(given))
    found = {
        field.name: getattr(made.the(gate), field.name)
        for gate in GATES
        for field in dataclasses.fields(gate)
        if field.name in gate.shared
    }
    assert found == given


@dataclass(frozen=True)
class Small(AtNumbers):
    """A gate with settings of its own, as a contributor would write one."""

    name = "small"
    reasons = ("too-large",)
    shared = ("max_base_ratio",)

    max_base_ratio: float = 0.9
    most: Annotated[float, Field(gt=0)] = 1.0
    word: str = "none"
    keep: int = 7
    """Called as a setting is, which it has nothing to do with."""

    def judge(self, seen: Numbers) -> None:
        if seen.tau_norm > self.most:
            raise Refuse("too-large", f"{seen.name}: {self.word}", by=("max_base_ratio", "keep"))


def small(file: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> Small:
    settings = load(flags, file=file, environ=environ or {})
    return gates.make(settings, (*GATES, Small)).the(Small)


def test_a_gates_own_settings_come_from_the_file_the_environment_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_base_ratio = 0.3\n[gates.small]\nmost = 2\nword = 'file'\n")
    assert small() == Small()
    assert small(file) == Small(0.3, 2.0, "file")
    assert small(file, {"CONTINUAL_GATES": "small.most=3,small.word=environment"}) == Small(0.3, 3.0, "environment")
    assert small(file, {"CONTINUAL_GATES": "small.most=3"}, gates=["small.most=4"]) == Small(0.3, 4.0, "file")
    with pytest.raises(Refuse, match="alice: file"):
        gates.make(load({}, file=file, environ={}), (*GATES, Small)).at_numbers(Numbers("alice", 2.5, 1e9, Totals()))


def test_a_field_called_like_a_setting_is_the_gates_own_unless_it_is_shared() -> None:
    assert small(keep=2, max_base_ratio=0.3) == Small(0.3)
    assert small(keep=2, gates=["small.keep=4"]).keep == 4
    asked = gates.make(load({"keep": 2, "gates": ["small.keep=4"]}, environ={}), (*GATES, Small))
    with pytest.raises(Refuse) as refused:
        asked.at_numbers(Numbers("alice", 1.5, 1e9, Totals()))
    assert refused.value.settings == {"max_base_ratio": 0.9, "gates.small.keep": 4}


@pytest.mark.parametrize("gate", GATES)
def test_what_it_shares_is_a_setting_and_one_of_its_fields(gate: type[Gate]) -> None:
    assert set(gate.shared) <= {field.name for field in dataclasses.fields(gate)} & Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("tall.most=1", "gates.tall: no such gate; known are own-release, .*small"),
        ("small.least=1", r"gates.small.least: unknown; the settings of this gate are: keep, most, word"),
        ("small.most=0", r"gates.small.most = '0'.*greater than 0"),
        ("small.most=many", r"gates.small.most = 'many'"),
        ("small.max_base_ratio=1", r"gates.small.max_base_ratio: max_base_ratio is a setting of that name"),
        ("lineage.vocab=common-rows", r"gates.lineage.vocab: vocab is a setting"),
        ("finite.most=1", r"gates.finite.most: unknown; the settings of this gate are: none"),
        ("small=1", r"gates"),
    ],
)
def test_settings_that_no_gate_has_are_refused(flag: str, words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        small(gates=[flag])
