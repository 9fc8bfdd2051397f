"""Task vectors that point against the merge."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.interference import InterferenceGate
from continual.records import Totals
from tests.unit.gates.cases import Case


def numbers(cosine: float | None, *layers: float) -> Numbers:
    return Numbers("alice", 1.0, 10.0, Totals(), cosine=cosine, layer_cosines=layers)


REFUSED = {"interference": lambda _place: Case(InterferenceGate(), numbers(-0.2, 0.1, -0.4))}


@pytest.mark.parametrize("cosine", [None, 0.0, -0.09, 0.9])
def test_let_in(cosine: float | None) -> None:
    InterferenceGate().judge(numbers(cosine, -0.9))


def test_the_layer_that_is_most_against_is_named() -> None:
    with pytest.raises(Refuse, match=r"cosine -0\.200; most in layer group 2 of 3, -0\.400 \(gates\.interf"):
        InterferenceGate().judge(numbers(-0.2, 0.1, -0.4, 0.0))
    InterferenceGate(against=0.3).judge(numbers(-0.2))
