"""NaN and infinite values."""

from __future__ import annotations

import math

import pytest

from continual.errors import Refuse
from continual.gates.contract import TensorNumbers
from continual.gates.finite import FiniteGate
from tests.unit.gates.cases import Case

REFUSED = {"non-finite": lambda _place: Case(FiniteGate(), TensorNumbers("alice", "model.norm", math.nan))}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number(value: float) -> None:
    with pytest.raises(Refuse, match=r"alice.*model\.norm"):
        FiniteGate().judge(TensorNumbers("alice", "model.norm", value))


def test_let_in() -> None:
    FiniteGate().judge(TensorNumbers("alice", "w", 1.0))
