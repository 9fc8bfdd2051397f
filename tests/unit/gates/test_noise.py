"""Task vectors in which nothing was learned."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.noise import NoiseGate
from continual.records import Totals
from tests.unit.gates.cases import Case


def numbers(stands_out: float | None) -> Numbers:
    return Numbers("alice", 1.0, 10.0, Totals(), stands_out=stands_out)


REFUSED = {"noise": lambda _place: Case(NoiseGate(), numbers(1.3))}


@pytest.mark.parametrize("stands_out", [None, 1.6, 3.8])
def test_let_in(stands_out: float | None) -> None:
    NoiseGate().judge(numbers(stands_out))


def test_the_setting_says_where_the_line_is() -> None:
    with pytest.raises(Refuse):
        NoiseGate(least=4.0).judge(numbers(3.8))
