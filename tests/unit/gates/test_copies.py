"""What is in the merge already, as sketches tell it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from continual.errors import Refuse
from continual.gates.contract import Earlier, Numbers
from continual.gates.copies import CopiesGate
from continual.records import Totals
from continual.tensors.vectors.sketch import Sketch
from tests.unit.gates.cases import Case

Values = NDArray[np.float32]
DRAWN: Values = np.random.default_rng(0).standard_normal((9, 4, 64)).astype(np.float32)


def sketch(values: Values) -> Sketch:
    return Sketch.rounded(tuple(float(norm) for norm in np.linalg.norm(values, axis=1)), values)


KNOWN = [Earlier(f"m{n}", 16.0, sketch(values)) for n, values in enumerate(DRAWN[:6])]


def beside(values: Values, known: list[Earlier] = KNOWN) -> Numbers:
    return Numbers("alice", 16.0, None, Totals(), sketch=sketch(values), earlier=lambda: known)


def tilted(cosine: float) -> Values:
    """At this angle to the first of those that are known."""
    first, other = DRAWN[0].reshape(-1), DRAWN[7].reshape(-1)
    other = other - first * (other @ first) / (first @ first)
    found = cosine * first / np.linalg.norm(first) + math.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
    return np.asarray(found.reshape(4, 64), np.float32)


REFUSED = {
    "copy": lambda _place: Case(CopiesGate(), beside(0.97 * DRAWN[2])),
    "negated": lambda _place: Case(CopiesGate(), beside(-3 * DRAWN[2])),
    "mixture": lambda _place: Case(CopiesGate(), beside(DRAWN[:6].mean(0))),
}


def test_the_message_names_the_model_and_the_factor() -> None:
    with pytest.raises(Refuse, match=r"a copy of m2, .* 1 times as long, cosine \+1.000"):
        CopiesGate().judge(beside(DRAWN[2]))


def by_layers(*factors: float) -> Values:
    return np.asarray(DRAWN[2] * np.array(factors, np.float32)[:, None])


def few(factor: float) -> Values:
    """A group of sixteen numbers, as of a norm."""
    found = np.zeros((4, 64), np.float32)
    found[0, :16] = factor
    return found


@pytest.mark.parametrize("factors", [(1, 1, 0, 0), (0, 0, 1, 1), (0, 2, 0, 0), (5, 0.2, -3, 1)])
def test_some_layers_of_one_or_each_scaled_otherwise_are_a_copy(factors: tuple[float, ...]) -> None:
    with pytest.raises(Refuse, match=r"a copy of some layers of m2, .* by layers") as raised:
        CopiesGate().judge(beside(by_layers(*factors)))
    assert raised.value.reason == "copy"


@pytest.mark.parametrize(
    "seen",
    [
        beside(DRAWN[7]),
        beside(by_layers(1, 0, 0, 0) + DRAWN[7] * np.float32(0.5)),
        beside(few(2.0), [Earlier("m2", 16.0, sketch(few(-1.0) + by_layers(0, 1, 0, 0)))]),
        beside(by_layers(1, 0, 0, 0), [Earlier("m2", 16.0, sketch(by_layers(1, 9, 9, 9)))]),  # of 1 % of it
        beside(tilted(0.7)),
        beside(tilted(-0.7)),
        beside(DRAWN[2], []),
        beside(DRAWN[2], [Earlier("m2", 16.0, None)]),
        beside(DRAWN[2], [KNOWN[2]._replace(same_place=True)]),
        beside(DRAWN[2], [KNOWN[2]._replace(sketch=sketch(DRAWN[2][:2]))]),  # of another base
        beside(0 * DRAWN[2]),
        Numbers("alice", 16.0, None, Totals(), earlier=lambda: KNOWN),
    ],
)
def test_let_in(seen: Numbers) -> None:
    CopiesGate().judge(seen)


def test_the_settings_say_where_the_line_is() -> None:
    CopiesGate().judge(beside(tilted(0.85)))
    for gate, reason in ((CopiesGate(same=0.84), "copy"), (CopiesGate(mixed=0.7), "mixture")):
        with pytest.raises(Refuse) as raised:
            gate.judge(beside(tilted(0.85)))
        assert raised.value.reason == reason
