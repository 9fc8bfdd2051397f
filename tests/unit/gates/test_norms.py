"""Which lengths of a task vector are refused."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.norms import NormsGate
from continual.records import Totals
from tests.unit.gates.cases import Case

SEEN = Totals(count=4.0, norm_sum=8.0)
REFUSED = {
    "zero": lambda _place: Case(NormsGate(), Numbers("alice", 0.0, 10.0, Totals())),
    "norm-base": lambda _place: Case(NormsGate(), Numbers("alice", 6.0, 10.0, Totals())),
    "norm-mean": lambda _place: Case(NormsGate(), Numbers("alice", 61.0, 1000.0, SEEN)),
}


@pytest.mark.parametrize("seen", [SEEN, Totals(count=1.0, norm_sum=2.0)])
def test_one_that_is_much_too_short_is_refused(seen: Totals) -> None:
    with pytest.raises(Refuse, match="alice") as raised:
        NormsGate().judge(Numbers("alice", 6e-5, 1000.0, seen))
    assert raised.value.reason == "norm-mean"


@pytest.mark.parametrize(
    "seen",
    [Numbers("alice", 4.9, 10.0, Totals()), Numbers("alice", 59.0, 1e3, SEEN), Numbers("alice", 7e-5, 1e3, SEEN)],
)
def test_let_in(seen: Numbers) -> None:
    NormsGate().judge(seen)


@pytest.mark.parametrize(
    ("gate", "seen"),
    [
        (NormsGate(max_base_ratio=0.4), Numbers("alice", 4.9, 10.0, Totals())),
        (NormsGate(max_mean_ratio=29.0), Numbers("alice", 59.0, 1e3, SEEN)),
        (NormsGate(max_mean_ratio=29.0), Numbers("alice", 6.8e-5, 1e3, SEEN)),
    ],
)
def test_the_settings_say_where_the_line_is(gate: NormsGate, seen: Numbers) -> None:
    with pytest.raises(Refuse):
        gate.judge(seen)
