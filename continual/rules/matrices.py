"""What the rules that see matrices share: which tensors are matrices to them, the figures of a task vector that
`spread` reads by, and how a rule is made of its form for matrices and the plain form of everything else."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from continual import linalg
from continual.lazily import Tensor
from continual.records import SlotSpec, TensorSpec, Totals
from continual.rules import sums
from continual.rules.contract import (
    Accumulators,
    CoreFunctions,
    Factored,
    Folded,
    FoldFunctions,
    Inputs,
    Laws,
    ReadFunctions,
    Rule,
    one_sum,
)
from continual.rules.options import Globs
from continual.rules.terms import ModelTerms

IsMatrix = Callable[[TensorSpec], bool]
Include = Annotated[tuple[str, ...], Globs(), "globs of tensors that are matrices here too: embeddings, output heads"]
"""The option that every rule has which sees matrices."""


@dataclass(frozen=True)
class MatrixOptions:
    """The options of a rule that sees matrices and has no others."""

    include: Include = ()


class OnMatrices(NamedTuple):
    """A rule's form for matrices, m×n.

    fold(accumulators, τ, inputs, totals before) and read(accumulators, totals): as in `FoldFunctions` and
    `ReadFunctions`, but what is read may have any float dtype and any shape of as many elements. workspace(m, n): peak
    bytes that `fold` needs beyond the accumulators, τ and the figures. slots(m, n): the accumulators, where they are
    not one sum of the tensor's own shape. `factored`: its `cores` or `triplets`, for matrices; what is no matrix is
    linear. `decomposes`: `fold` decomposes τ, and says itself what its largest singular value is.
    goes_by(totals): what of the totals `read` goes by, as plain data; None: by all of them. `terms`: as in
    `ReadFunctions`.
    """

    fold: Callable[[Accumulators, Tensor, Inputs, Totals], Folded]
    read: Callable[[Accumulators, Totals], Tensor]
    workspace: Callable[[int, int], int]
    slots: Callable[[int, int], dict[str, SlotSpec]] | None = None
    factored: Factored | None = None
    decomposes: bool = False
    goes_by: Callable[[Totals], object] | None = None
    terms: Callable[[Accumulators, Totals], ModelTerms] | None = None


def turned(
    fold: Callable[[Accumulators, Tensor, Inputs, Totals], Folded], read: Callable[[Accumulators, Totals], Tensor]
) -> Factored:
    """Of a form that keeps one sum and reads a core as it reads a matrix."""

    def slots(rows: int, columns: int) -> dict[str, SlotSpec]:
        return {sums.SLOT: SlotSpec((rows, columns))}

    def read_core(accumulators: Accumulators, totals: Totals, sides: tuple[int, int]) -> Tensor:
        return read(accumulators, totals)

    return Factored(cores=CoreFunctions(slots, fold, read_core))


PLAIN = ReadFunctions(sums.read_mean, sums.unknown, square=sums.square_of_mean, goes_by=sums.weight)


def rule(name: str, include: Sequence[str], on: OnMatrices, laws: Laws, plain: ReadFunctions = PLAIN) -> Rule:
    """The rule `name` that takes matrices (`include` names further ones) by `on`, and everything else as a sum that
    `plain` reads. Its sums have the figures of the matrices. Unless it is `weighted` it refuses any weight but 1,
    and without `combine` one below 0.

    Of a stack it keeps what it keeps of each matrix, in arrays with a leading axis of the experts."""
    matrix = is_matrix(include)
    if laws.keeps and on.slots is not None:  # of what is no matrix something else is kept
        laws = laws._replace(keeps=laws.keeps | {f"matrices with {sorted(include)}"})

    def slots(spec: TensorSpec) -> dict[str, SlotSpec]:
        if on.slots is None or not matrix(spec):
            return one_sum(spec)
        if spec.kind != "stack":
            return on.slots(*sides(spec))
        own = on.slots(*sides(spec.expert))
        return {slot: SlotSpec((spec.experts, *one.shape), one.dtype) for slot, one in own.items()}

    def fold(accumulators: Accumulators, tau: Tensor, inputs: Inputs, totals: Totals) -> Folded:
        if not laws.weighted:
            sums.whole(name, inputs)
        elif laws.combine is None:
            sums.added(name, inputs)
        if not matrix(inputs.spec):
            return sums.fold(accumulators, tau, inputs, totals)
        top_sq = None if on.decomposes else linalg.top(tau.flatten(1)) ** 2  # first: a fold may overwrite τ
        folded = on.fold(accumulators, tau, inputs, totals)
        found = folded.sums
        return folded._replace(
            sums=found._replace(matrix_sq=found.tau_sq, top_sq=found.top_sq if top_sq is None else top_sq)
        )

    def unit(spec: TensorSpec, accumulators: Accumulators, totals: Totals) -> Tensor:
        if not matrix(spec):
            return plain.unit(spec, accumulators, totals)
        return on.read(accumulators, totals).float().view(spec.shape)

    def square(spec: TensorSpec, kept: float, totals: Totals) -> float | None:
        return None if matrix(spec) else plain.square(spec, kept, totals)

    def goes_by(spec: TensorSpec, totals: Totals) -> object:
        if matrix(spec):
            return sums.everything(spec, totals) if on.goes_by is None else on.goes_by(totals)
        return (plain.goes_by or sums.everything)(spec, totals)

    def workspace(spec: TensorSpec) -> int:
        return on.workspace(*sides(spec)) if matrix(spec) else sums.workspace(spec)

    def linear(spec: TensorSpec) -> bool:
        return not matrix(spec)

    read = plain._replace(unit=unit, matrix=matrix, elementwise=linear, square=square, goes_by=goes_by, terms=on.terms)
    return Rule(
        slots=slots,
        fold=FoldFunctions(fold, workspace, elementwise=linear),
        read=read,
        laws=laws,
        factored=on.factored and on.factored._replace(linear=linear),
        name=name,
    )


def is_matrix(include: Sequence[str]) -> IsMatrix:
    """2-D weights of linear layers, convolutions as out × rest, stacks, and what the globs `include` name; never
    an empty tensor."""

    def found(spec: TensorSpec) -> bool:
        if spec.kind == "stack":
            return spec.numel > 0
        named = spec.kind == "matrix" or any(fnmatch.fnmatchcase(spec.name, glob) for glob in include)
        return named and len(spec.shape) >= 2 and spec.numel > 0

    return found


def sides(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a matrix; a convolution is out × rest, a vector has one column, a scalar is 1 × 1."""
    return spec.shape[0] if spec.shape else 1, math.prod(spec.shape[1:])


def workspace(m: int, n: int) -> int:
    """Peak bytes of `linalg.top` beyond the task vector: a few narrow matrices of either side."""
    return 16 * 16 * (m + n)
