"""Products of paired matrices, from their Gram matrices: as multiplied out, however the heads lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from continual.tensors.names.pairings import Pairing, Side
from continual.tensors.vectors.products import figures

HEADS, SHARED, SIZE, WIDTH = 6, 3, 8, 40
Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]


class World:
    """A pair as heads × size × width, its matrices laid out as `layout` says, read in parts of `at_once` steps."""

    def __init__(self, layout: str, at_once: int = 2) -> None:
        self.at_once = at_once
        draw = np.random.default_rng(0)
        self.ours = [draw.normal(size=(count, SIZE, WIDTH)) for count in (HEADS, HEADS // SHARED)]
        self.theirs = [one + 0.3 * draw.normal(size=one.shape) for one in self.ours]
        sides = {
            "rows": (Side("a", 0, SIZE, False), Side("b", 0, SIZE, False)),
            "behind": (Side("a", 0, SIZE, False), Side("b", 2 * SIZE, SIZE, False)),
            "across": (Side("a", 0, SIZE, True), Side("b", 2 * SIZE, SIZE, True)),
            "interleaved": (Side("a", 0, SIZE, False), Side("b", SIZE, 3 * SIZE, False)),
        }
        self.pair = Pairing("l.0", "query-key", *sides[layout], HEADS, SHARED, SIZE)

    def rows(self, name: str, step: int) -> Iterator[tuple[Matrix, Matrix]]:
        number = "ab".index(name)
        side = (self.pair.first, self.pair.second)[number]
        ours, theirs = (self._laid(one[number], side) for one in (self.ours, self.theirs))
        for start in range(0, len(ours), self.at_once * step):
            part = slice(start, start + self.at_once * step)
            yield ours[part].astype(np.float32), (theirs - ours)[part].astype(np.float32)

    def _laid(self, heads: Floats, side: Side) -> Floats:
        filler = np.full((len(heads), side.step, WIDTH), 7.0)
        start, inner = divmod(side.start, side.step)
        filler[:, inner : inner + SIZE] = heads
        found = np.concatenate([np.full((start * side.step, WIDTH), 9.0), filler.reshape(-1, WIDTH)])
        return found.T if side.across else found

    def figures(self) -> list[tuple[float, float, float]]:
        """Apart, moved and alike of each head, by the products themselves."""
        found = []
        for head in range(HEADS):
            (a, a0), (b, b0) = (
                (theirs[h], ours[h])
                for theirs, ours, h in zip(self.theirs, self.ours, (head, head // SHARED), strict=True)
            )
            product, base = a.T @ b, a0.T @ b0
            norm = float(np.linalg.norm(base))
            alike = float(np.sum(product * base) / np.linalg.norm(product)) / norm
            a, b = (np.linalg.lstsq(y.T, x.T, rcond=None)[0].T @ y for x, y in ((a, a0), (b, b0)))
            apart = min(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in ((a, a0), (b, b0)))
            found.append((apart, float(np.linalg.norm(a.T @ b - base)) / norm, alike))
        return found


@pytest.mark.parametrize("layout", ["rows", "behind", "across", "interleaved"])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_as_multiplied_out(layout: str, at_once: int) -> None:
    world = World(layout, at_once)
    found = figures(world.pair, world.rows)
    got = np.stack([found.apart, found.moved, found.alike], 1)
    np.testing.assert_allclose(got, world.figures(), rtol=1e-5)
    assert not found.elsewhere


@pytest.mark.parametrize("layout", ["rows", "across", "interleaved"])
def test_an_invertible_matrix_between_the_two_moves_no_product(layout: str) -> None:
    world = World(layout)
    between = np.random.default_rng(1).normal(size=(HEADS // SHARED, SIZE, SIZE)) + 2 * np.eye(SIZE)
    back = np.linalg.inv(between).transpose(0, 2, 1)
    world.theirs = [np.repeat(between, SHARED, 0) @ world.ours[0], back @ world.ours[1]]
    found = figures(world.pair, world.rows)
    assert found.moved.max() < 1e-4 < 0.1 < found.apart.min()
    assert found.alike.min() > 0.999


@pytest.mark.parametrize("layout", ["rows", "across"])
def test_heads_in_another_order_are_found(layout: str) -> None:
    world = World(layout)
    groups = [1, 0]
    order = [SHARED * group + n for group in groups for n in (2, 0, 1)]
    world.theirs = [world.ours[0][order], world.ours[1][groups]]
    found = figures(world.pair, world.rows)
    assert {one.here: one.there for one in found.elsewhere} == dict(enumerate(order))
    assert min(one.alike for one in found.elsewhere) > 0.999


def test_a_head_that_is_zero_in_the_base_says_nothing() -> None:
    world = World("rows")
    world.ours[1][:] = 0.0
    found = figures(world.pair, world.rows)
    assert not found.apart.any()
    assert not found.moved.any()
    assert (found.alike == 1).all()
    assert not found.elsewhere
