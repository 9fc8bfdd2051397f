import math

import pytest

from continual.errors import Refuse
from continual.gates.safety import NormPolicy, finite, norms

SEEN = {"count": 4.0, "norm_sum": 8.0}


@pytest.mark.parametrize(
    ("tau", "base", "totals", "reason"),
    [
        (0.0, 10.0, {}, "zero"),
        (6.0, 10.0, {}, "norm-base"),
        (61.0, 1000.0, SEEN, "norm-mean"),
        (6e-5, 1000.0, SEEN, "norm-mean"),
    ],
)
def test_refused(tau: float, base: float, totals: dict[str, float], reason: str) -> None:
    with pytest.raises(Refuse) as raised:
        norms("alice", tau**2, base**2, totals, NormPolicy())
    assert raised.value.reason == reason
    assert "alice" in str(raised.value)


def test_let_in() -> None:
    norms("alice", 4.9**2, 100.0, {}, NormPolicy())
    norms("alice", 59.0**2, 1e6, SEEN, NormPolicy())
    finite("alice", "w", 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number(value: float) -> None:
    with pytest.raises(Refuse, match=r"model\.norm"):
        finite("alice", "model.norm", value)
