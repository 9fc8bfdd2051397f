"""The task vectors of one tensor in small coordinates, and what is read of them without each: what a rule says of
itself where the models are kept apart (`continual.blocks`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from continual.lazily import Tensor, torch
from continual.records import Totals


def weighed(sigma: Tensor, rows: Mapping[int, slice], weights: Sequence[float]) -> Tensor:
    """Singular values, each times the weight of its task vector, whose columns are in `rows` by its index; 0 where they
    are those of none."""
    found = torch.zeros_like(sigma)
    for index, where in rows.items():
        found[where] = weights[index] * sigma[where]
    return found


class SideVectors:
    """The singular vectors of one side, K of them: their inner products (`gram`, K×K), and as `columns` (k×K) in an
    orthonormal basis of what they span; float64. Both are made when they are first asked for."""

    def __init__(self, gram: Callable[[], Tensor], columns: Callable[[SideVectors], Tensor]) -> None:
        self._gram, self._columns = gram, columns

    @staticmethod
    def of(columns: Tensor) -> SideVectors:
        """Of vectors that are in a basis already."""
        return SideVectors(lambda: columns.mT @ columns, lambda _: columns)

    @cached_property
    def gram(self) -> Tensor:
        """Their inner products."""
        return self._gram()

    @cached_property
    def columns(self) -> Tensor:
        """In a basis."""
        return self._columns(self)


class Apart(NamedTuple):
    """The task vectors of one tensor in small coordinates, in the order in which they are folded.

    `left`, `sigma` (K), `right`: all their singular triplets; `rows`: which of them are those of each task vector, by
    its index; one that did not touch the tensor is not there. `weights`: of every task vector. `totals`: of all of
    them; `rests`: of all but each. `sides`: rows and columns of the tensor itself. `times`: what the term of each in X
    is multiplied by, where there is such a number.
    """

    left: SideVectors
    sigma: Tensor
    right: SideVectors
    rows: Mapping[int, slice]
    weights: Sequence[float]
    totals: Totals
    rests: Sequence[Totals]
    sides: tuple[int, int]
    times: Sequence[float] | None = None

    @property
    def u(self) -> Tensor:
        """The left singular vectors as columns in a basis."""
        return self.left.columns

    @property
    def v(self) -> Tensor:
        """The right singular vectors as columns in a basis."""
        return self.right.columns

    def term(self, index: int) -> tuple[Tensor, Tensor]:
        """One task vector as two factors, without its weight; without columns where it did not touch the tensor."""
        where = self.rows.get(index, slice(0, 0))
        return self.u[:, where] * self.sigma[where], self.v[:, where]

    def weighed(self) -> Apart:
        """The same with every task vector times its weight; the weights are then 1."""
        return self._replace(sigma=weighed(self.sigma, self.rows, self.weights), weights=[1.0] * len(self.weights))


class Without(NamedTuple):
    """X₋, what is read without one task vector: ‖X₋‖² and ⟨X, X₋⟩."""

    square: float
    inner: float


class WholeRead(NamedTuple):
    """X, what is read of all task vectors, by ‖X‖² and uᵀXv of every triplet."""

    square: float
    along: Tensor


class LeftOut(NamedTuple):
    """X as a matrix in the coordinates of an `Apart` (k×l, float64) or by its products, and what is known of it without
    each of the task vectors. None where it has to be read."""

    whole: Tensor | WholeRead | None
    rests: Sequence[Without | None]
