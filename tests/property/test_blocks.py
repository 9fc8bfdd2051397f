"""The law of the width: which columns each model has follows from the set of the models, and cutting later is cutting
at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.blocks import Block, Columns, Layer, decomposed, plan, triplets, width

M, N = 14, 11
RANKS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


def block_of(rank: int, seed: int) -> Block:
    random = torch.Generator().manual_seed(seed)
    return triplets(torch.randn(M, rank, generator=random), torch.randn(N, rank, generator=random))


def folded(blocks: dict[int, Block], q: int) -> Layer:
    layer = Layer.empty(M, N, q)
    for number, block in blocks.items():
        layer = layer.folded(number, block)
    return layer


def what_is_kept(layer: Layer) -> dict[int, torch.Tensor]:
    return {number: block.dense() for number, block in layer.blocks().items()}


def same(one: Layer, other: Layer) -> bool:
    ours, theirs = what_is_kept(one), what_is_kept(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[number], theirs[number]) for number in ours)


@given(ranks=RANKS, q=st.integers(1, 40))
def test_w_is_the_largest_halving_that_fits(ranks: list[int], q: int) -> None:
    w, halvings = width(ranks, q), [q >> times for times in range(q.bit_length())]
    fitting = [half for half in halvings if sum(min(rank, half) for rank in ranks) <= q]
    assert w == (fitting[0] if fitting else 1)


@given(ranks=RANKS, q=st.integers(1, 40), more=st.integers(0, 60))
def test_w_never_grows_when_a_model_comes_in(ranks: list[int], q: int, more: int) -> None:
    assert width([*ranks, more], q) <= width(ranks, q)


@given(ranks=RANKS, q=st.integers(1, 40), seed=st.integers(0, 99), order=st.randoms())
@settings(deadline=None)
def test_the_order_does_not_matter_and_cutting_later_is_cutting_at_once(
    ranks: list[int], q: int, seed: int, order: object
) -> None:
    blocks = {number: block_of(rank, seed + number) for number, rank in enumerate(ranks, 1)}
    shuffled = list(blocks.items())
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    layer = folded(blocks, q)
    assert same(layer, folded(dict(shuffled), q))
    whole = {number: block for number, block in blocks.items() if block.rank}
    if len(whole) <= q:
        w = width([block.rank for block in whole.values()], q)
        at_once = {number: block.first(w).dense() for number, block in whole.items()}
        assert what_is_kept(layer).keys() == at_once.keys()
        assert all(torch.equal(kept, at_once[number]) for number, kept in what_is_kept(layer).items())
    else:
        largest = sorted(whole, key=lambda number: -float(whole[number].sigma[0]))[:q]
        assert sorted(what_is_kept(layer)) == sorted(largest)


@given(ranks=RANKS, q=st.integers(1, 40), data=st.data())
@settings(deadline=None)
def test_one_less_is_as_if_it_had_never_come_where_nothing_was_cut(
    ranks: list[int], q: int, data: st.DataObject
) -> None:
    blocks = {number: block_of(rank, number) for number, rank in enumerate(ranks, 1)}
    out = data.draw(st.sampled_from(sorted(blocks)))
    layer = folded(blocks, q).without(out)
    others = {number: block for number, block in blocks.items() if number != out}
    assert out not in layer.columns.models
    if sum(block.rank for block in blocks.values()) <= q:
        assert same(layer, folded(others, q))
    # whatever was cut: the law of those that are left holds for the next one
    w = width(layer.columns.ranks.values(), q)
    assert all(where.stop - where.start <= w for where in layer.columns.models.values())


@given(ranks=RANKS, q=st.integers(1, 40), out=st.none() | st.integers(1, 9))
@settings(deadline=None)
def test_what_stands_before_the_first_changed_column_stays(ranks: list[int], q: int, out: int | None) -> None:
    layer = Layer.empty(M, N, q)
    for number, rank in enumerate(ranks, 1):
        block = block_of(rank, number)
        found = plan(layer.columns, number, block)
        after = layer.folded(number, block)
        assert torch.equal(after.u[: found.first], layer.u[: found.first])
        assert found.keep[: found.first] == tuple(range(found.first))
        assert found.first + len(found.moved) + found.take == found.used == after.columns.used <= q
        if sum(ranks[:number]) <= q:
            assert found.first == layer.columns.used, "nothing is cut: only the new block is written"
        for slot in (after.columns.owner, after.columns.rank, after.columns.sigma, after.columns.energy):
            assert not slot[found.used :].any()
        assert not after.u[found.used :].any()
        layer = after
    if out is not None and out in layer.columns.models:
        gone = layer.without(out)
        assert not gone.u[gone.columns.used :].any()
        assert gone.columns.used == layer.columns.used - len(layer.block(out).sigma)


@given(ranks=RANKS, q=st.integers(1, 40))
@settings(deadline=None)
def test_a_block_says_what_it_lost(ranks: list[int], q: int) -> None:
    blocks = {number: block_of(rank, number) for number, rank in enumerate(ranks, 1)}
    layer = folded(blocks, q)
    for number, lost in layer.columns.lost().items():
        kept, block = len(layer.block(number).sigma), blocks[number]
        dropped = float(block.sigma[kept:].double().square().sum())
        assert lost == pytest.approx(dropped / block.energy, abs=1e-6)
        assert (lost == 0.0) == (kept == block.rank)
        assert layer.block(number).rank == block.rank


def test_the_columns_of_a_block_that_came_wider_than_it_is_now_do_not_let_others_in_wider() -> None:
    """Cut blocks would leave room for a whole new one; the width follows from the ranks that the models came with."""
    q, ranks = 16, {1: 12, 2: 12, 3: 1, 4: 7}
    random = torch.Generator().manual_seed(1)
    blocks = {
        number: triplets(torch.randn(20, rank, generator=random), torch.randn(20, rank, generator=random))
        for number, rank in ranks.items()
    }
    layer = Layer.empty(20, 20, q)
    for number, block in blocks.items():
        layer = layer.folded(number, block)
    assert {number: len(block.sigma) for number, block in layer.blocks().items()} == {1: 4, 2: 4, 3: 1, 4: 4}


def test_a_model_comes_in_once() -> None:
    layer = Layer.empty(M, N, 8).folded(3, block_of(2, 0))
    with pytest.raises(AssertionError, match="has columns already"):
        layer.folded(3, block_of(2, 1))


def test_free_columns_are_zeros() -> None:
    columns = Columns.empty(5)
    assert (columns.used, columns.models, columns.lost()) == (0, {}, {})
    assert [slot.dtype for slot in columns] == [np.uint16, np.uint16, np.float32, np.float64]


@pytest.mark.parametrize(
    ("shape", "rank", "most"),
    [((30, 20), 20, 64), ((20, 30), 20, 7), ((9, 1), 1, 4), ((1100, 1200), 5, 8), ((1200, 1100), 40, 8)],
)
def test_a_matrix_is_decomposed_into_its_largest_triplets(shape: tuple[int, int], rank: int, most: int) -> None:
    """Rows of zeros among them; large ones by a range finder."""
    random = torch.Generator().manual_seed(6)
    left, right = torch.randn(shape[0], rank, generator=random), torch.randn(shape[1], rank, generator=random)
    left *= torch.arange(1, rank + 1) ** -1.0
    left[3] = 0.0
    matrix = left @ right.mT
    found, exact = decomposed(matrix, most), triplets(left, right)
    assert found.energy == pytest.approx(exact.energy, rel=1e-6)
    assert len(found.sigma) == min(most, exact.rank)
    assert found.rank == (exact.rank if rank <= most or max(shape) < 100 else min(shape))
    assert found.kept == pytest.approx(exact.first(most).kept, rel=1e-3)
    unit = torch.eye(len(found.sigma))
    for vectors in (found.u, found.v):
        torch.testing.assert_close(vectors @ vectors.mT, unit, rtol=0, atol=1e-5)
    if rank <= most:
        torch.testing.assert_close(found.dense(), matrix, rtol=1e-5, atol=1e-5)
