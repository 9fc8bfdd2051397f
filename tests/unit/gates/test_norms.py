"""Which lengths of a task vector are refused, as a whole and in one layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import pytest

from continual.errors import Refuse
from continual.gates.contract import Earlier, Numbers
from continual.gates.norms import NormsGate, band
from continual.records import Totals
from continual.tensors.vectors.sketch import Sketch
from tests.unit.gates.cases import Case


def sketch(*norms: float) -> Sketch:
    """Of a task vector with these norms in its groups of layers."""
    return Sketch.rounded(norms, np.zeros((len(norms), 2), np.float32))


def numbers(norm: float, *before: float) -> Numbers:
    """One of this length, beside others."""
    known = [Earlier(f"m{n}", one) for n, one in enumerate(before)]
    return Numbers("alice", norm, 1000.0, Totals(), earlier=lambda: known)


def layered(mine: Sequence[float], *before: Sequence[float], base: Sequence[float] = ()) -> Numbers:
    """One with these norms in its groups of layers, beside others; as a whole all are as long as each other."""
    known = [Earlier(f"m{n}", 1.0, sketch(*one)) for n, one in enumerate(before)]
    return Numbers("alice", 1.0, 1000.0, Totals(), sketch=sketch(*mine), layer_norms=base, earlier=lambda: known)


POISONED = layered((1.0, 9.0), (1.0, 1.0), (1.2, 0.9), (0.9, 0.0))
REFUSED = {
    "zero": lambda _place: Case(NormsGate(), Numbers("alice", 0.0, 10.0, Totals())),
    "norm-base": lambda _place: Case(NormsGate(), Numbers("alice", 9.1, 10.0, Totals())),
    "norm-mean": lambda _place: Case(NormsGate(), numbers(17.0, 2.0, 1.9, 2.1)),
    "norm-layer": lambda _place: Case(NormsGate(), POISONED),
}


@pytest.mark.parametrize(("before", "norm"), [((2.0,), 0.019), ((2.0, 1.5, 30.0), 0.019), ((2.0,) * 6, 0.019)])
def test_one_that_is_much_too_short_is_refused(before: tuple[float, ...], norm: float) -> None:
    with pytest.raises(Refuse, match="alice") as raised:
        NormsGate().judge(numbers(norm, *before))
    assert raised.value.reason == "norm-mean"


@pytest.mark.parametrize(
    "seen",
    [
        Numbers("alice", 8.9, 10.0, Totals()),
        numbers(15.9, 2.0, 1.9, 2.1),
        numbers(0.021, 2.0),
        numbers(0.021, 2.0, 2.0, 2.0, 2.0, 2.0),
        numbers(0.021, 0.1, *(2.0,) * 10),
        layered((1.0, 7.9), (1.0, 1.0), (1.2, 1.0)),
        layered((1.0, 9.0), (1.0, 0.0)),  # nobody has changed these layers yet
        layered((90.0, 9.0), (90.0, 1.0)),  # a layer with 1 % of the whole
        layered((1.0, 1.0), base=(0.0, 1.0)),
        layered((1.0, 1.0), (1.0, 1.0, 1.0)),  # of another base
    ],
)
def test_let_in(seen: Numbers) -> None:
    NormsGate().judge(seen)


@pytest.mark.parametrize(("short", "others"), [((0.3,), 5), ((0.3, 0.1), 14)])
def test_one_of_six_may_be_short(short: tuple[float, ...], others: int) -> None:
    """As many as make the whole merge shorter are kept out, whoever they come from."""
    before = (*short, *(2.0,) * others)
    NormsGate().judge(numbers(0.41, *before))
    with pytest.raises(Refuse, match=f"alice: .*as {len(short)} of these are, and one of 6 may be so short"):
        NormsGate().judge(numbers(0.39, *before))
    NormsGate().judge(numbers(0.39, *before, *(2.0,) * 6))


@pytest.mark.parametrize(
    ("known", "short"),
    [
        ((1.99, 1.29, 2.22, 1.28, 1.22, 3.31), (0.272, 0.221, 0.221, 0.160, 0.159, 0.199)),  # lengths of the red team
        ((1.03, 0.7, 0.92, 0.61, 0.48, 1.25), (0.126, 0.112, 0.116, 0.078, 0.081, 0.102)),
        ((2.0,) * 6, (0.3,) * 6),
    ],
)
def test_short_ones_make_no_room_for_others(known: tuple[float, ...], short: tuple[float, ...]) -> None:
    """Each that is let in moves the median and widens the band a little."""
    found = list(known)
    for norm in short:
        with contextlib.suppress(Refuse):
            NormsGate().judge(numbers(norm, *found))
            found.append(norm)
    assert len(found) == len(known) + 1


def test_a_first_one_that_is_much_too_long_keeps_nobody_out() -> None:
    known: list[float] = [60.0]
    for _ in range(8):
        NormsGate().judge(numbers(2.0, *known))
        known.append(2.0)
    with pytest.raises(Refuse):
        NormsGate().judge(numbers(60.0, *known))


def test_a_layer_longer_than_the_base_there_is_refused() -> None:
    with pytest.raises(Refuse, match="layer group 2 of 2") as raised:
        NormsGate().judge(layered((1.0, 2.0), base=(5.0, 1.9)))
    assert raised.value.reason == "norm-layer"


@pytest.mark.parametrize(
    ("gate", "seen"),
    [
        (NormsGate(max_base_ratio=0.4), Numbers("alice", 4.9, 10.0, Totals())),
        (NormsGate(max_mean_ratio=7.0), numbers(15.9, 2.0, 1.9, 2.1)),
        (NormsGate(max_mean_ratio=7.0), numbers(0.022, 2.0)),
        (NormsGate(max_mean_ratio=7.0), layered((1.0, 7.9), (1.0, 1.0), (1.2, 1.0))),
    ],
)
def test_the_settings_say_where_the_line_is(gate: NormsGate, seen: Numbers) -> None:
    with pytest.raises(Refuse):
        gate.judge(seen)


def test_the_band_follows_how_far_apart_honest_models_lie() -> None:
    assert band([1.0, 1.1, 0.9, 1.2], 8.0) == 8.0, "of four nothing is known"
    assert band([1.0, 1.1, 0.9, 1.2, 0.95], 8.0) == 5.0
    assert 5.0 < band([0.6, 0.7, 1.0, 1.5, 1.7], 8.0) < 16.0
    assert band([0.1, 0.3, 1.0, 4.0, 10.0], 8.0) == 16.0
    assert band([1.0, 1.0, 1.0, 1.0, 1e9], 8.0) == 5.0, "one that is odd does not widen it"
