"""How much of a task vector the width of a state of adapters may take."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.gates.contract import Numbers
from continual.gates.cut import CutGate
from continual.records import Totals
from tests.unit.gates.cases import Case

REFUSED = {"cut": lambda _place: Case(CutGate(), Numbers("alice", 1.0, None, Totals(), 0.02))}


def test_the_setting_says_where_the_line_is() -> None:
    CutGate().judge(Numbers("alice", 1.0, None, Totals(), 0.01))
    CutGate(most=0.5).judge(Numbers("alice", 1.0, None, Totals(), 0.4))
    with pytest.raises(Refuse, match=r"no room for 40\.00% of the square"):
        CutGate(most=0.3).judge(Numbers("alice", 1.0, None, Totals(), 0.4))
