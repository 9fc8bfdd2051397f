"""The exact kernels: sums in float64 that no number of threads changes, and singular vectors that are right down to the
smallest that counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual import linalg
from continual.records import Totals
from continual.rules import iso_c, opcm, tsv_m, tsv_u
from tests.helpers import batch


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=random, dtype=torch.float64))[0]


def with_spectrum(sigma: Tensor, rows: int, seed: int = 1) -> Tensor:
    """A float64 matrix with these singular values."""
    return orthonormal(rows, len(sigma), seed) * sigma @ orthonormal(len(sigma), len(sigma), seed + 1).mT


SPECTRA = {
    "to 1e-5": torch.logspace(0, -5, 30, dtype=torch.float64),
    "to 1e-7": torch.logspace(0, -7, 30, dtype=torch.float64),
    "a gap": torch.cat([torch.ones(5), torch.full((9,), 3e-6), torch.full((3,), 1e-8)]).double(),
    "all steep": torch.linspace(1.0, 0.5, 12, dtype=torch.float64),
    "one direction": torch.tensor([1.0, 2e-5, 1.5e-6], dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_every_singular_value_above_null_is_right_to_eight_digits(name: str, size: float) -> None:
    sigma = SPECTRA[name]
    matrix = size * with_spectrum(sigma, 50)
    found, v = linalg.right_singular(matrix, linalg.NULL)
    held = sigma > linalg.NULL
    assert torch.equal(found > 0, held), "what is null is an exact zero, and nothing else is"
    assert torch.allclose(found[held] / size, sigma[held], rtol=2e-9, atol=0.0)
    assert torch.equal(found, found.sort(descending=True).values)
    assert torch.allclose(v.mT @ v, torch.eye(len(sigma), dtype=torch.float64), atol=1e-13)
    u = matrix @ v[:, held] / found[held]
    assert torch.allclose(u.mT @ u, torch.eye(int(held.sum()), dtype=torch.float64), atol=1e-7)


def test_the_gram_alone_is_not_enough_there() -> None:
    """Against a test that the unrefined values would pass."""
    sigma = SPECTRA["to 1e-5"]
    unrefined, _ = linalg.right_singular(with_spectrum(sigma, 50), 1.0)
    assert float((unrefined / sigma - 1).abs().max()) > 1e-8


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
@pytest.mark.parametrize("least", [1e-5, 2e-6])
def test_rules_are_right_on_matrices_of_every_condition(shape: tuple[int, int], least: float) -> None:
    """Of a float32 matrix: the flat spectrum of iso-c, the triplets and polar factors of tsv-m, and the variant of opcm
    that needs every direction."""
    sigma = torch.logspace(0, math.log10(least), 30, dtype=torch.float64)
    tall = with_spectrum(sigma, 60).float()
    matrix = tall if shape == (60, 30) else tall.mT.contiguous()
    u, exact, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    flat = exact.mean() * u @ vh
    assert float((iso_c.flat(matrix).double() - flat).norm() / flat.norm()) < 1e-7
    left, found, right = tsv_m.triplets(matrix, 30)
    assert torch.allclose(found, exact, rtol=5e-9, atol=0.0)
    assert torch.allclose(left * found @ right.mT, matrix.double(), atol=1e-12)
    assert torch.allclose(left.mT @ left, torch.eye(30, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(tsv_m.polar(tall.double()), (u @ vh) if tall is matrix else (u @ vh).mT, atol=3e-8)
    tau = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    changed = tau.clone()
    opcm.fold_matrix(matrix.clone(), changed, 0.5, "block+diagonal")
    step = batch.opcm_step(matrix, tau, 0.5, "block+diagonal")
    assert float((changed.double() - step).norm() / step.norm()) < 1e-7


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
@pytest.mark.parametrize("steep", [True, False])
def test_a_product_is_made_in_float32_where_that_harms_little(shape: tuple[int, int], steep: bool) -> None:
    """A column of U that lies close to another one keeps the product of tsv-m and tsv-u in float64, as small singular
    values do that of iso-c."""
    off = 2e-7 if steep else 5e-7
    left, right = orthonormal(60, 30, 5), orthonormal(30, 30, 6)
    if steep:
        left[:, 15] = left[:, 0] + 1e-4 * left[:, 15]
    u, v = (left.float(), right.float()) if shape == (60, 30) else (right.float(), left.float())
    given = tsv_m.Triplets([1] * 15 + [2] * 15, u, torch.linspace(2.0, 1.0, 30), v)
    for one in (tsv_m, tsv_u):
        before, after = one.factors(given, Totals(count=2.0))
        found, exact = one.merged(given, Totals(count=2.0)), before @ after.mT
        assert float((found.double() - exact).norm() / exact.norm()) < off
    assert linalg.mild(torch.linalg.svdvals(left)) is not steep
    total = with_spectrum(torch.logspace(0, -4 if steep else -0.5, 30, dtype=torch.float64), 60).float()
    total = total if shape == (60, 30) else total.mT.contiguous()
    a, sigma, b = torch.linalg.svd(total.double(), full_matrices=False)
    assert float((iso_c.flat(total).double() - sigma.mean() * a @ b).norm() / sigma.norm()) < off


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
@pytest.mark.parametrize("least", [0.5, 1e-4])
def test_what_tsv_m_keeps_is_right_where_singular_values_are_alike_and_where_they_are_not(
    shape: tuple[int, int], least: float
) -> None:
    """Long vectors of singular values far below the average are multiplied in float64: float32 is wrong there by
    1e-4."""
    sigma = torch.logspace(0, math.log10(least), 30, dtype=torch.float64)
    tall = with_spectrum(sigma, 60).float()
    matrix = tall if shape == (60, 30) else tall.mT.contiguous()
    kept = {slot: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for slot, one in tsv_m.slots(*shape).items()}
    folded = tsv_m.fold_matrix(kept, matrix, Totals(), 1.0)
    u, found, v = (kept[slot].double() for slot in (tsv_m.U, tsv_m.SIGMA, tsv_m.V))
    exact = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found, exact, rtol=1e-6, atol=0.0)
    assert folded.sums.top_sq == pytest.approx(float(exact[0]) ** 2, rel=1e-9)
    for side in (u, v):
        assert torch.allclose(side.mT @ side, torch.eye(30, dtype=torch.float64), atol=2e-6)
    assert torch.allclose((u * found) @ v.mT, matrix.double(), atol=1e-6)
    again = tsv_m.fold_matrix(kept, matrix, Totals(count=1.0), 1.0)  # ⟨τ, X⟩ of X as it was
    assert again.sums.dot == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert kept[tsv_m.OWNER].tolist() == [1] * 15 + [2] * 15


@pytest.mark.parametrize("variant", opcm.VARIANTS)
def test_opcm_is_right_where_its_block_reaches_to_small_singular_values(variant: opcm.Variant) -> None:
    """α so near 1 that six directions are protected, the last with a singular value of 6e-6; the reference is a full
    SVD. A Gram alone would be wrong by 2.7e-7 to 1.7e-6."""
    sigma = torch.tensor([1.0, 0.5, 4e-5, 2e-5, 1e-5, 6e-6, 3e-6, 2e-6], dtype=torch.float64)
    matrix = with_spectrum(sigma, 60).float()
    tau = 0.1 * torch.randn(60, 8, generator=torch.Generator().manual_seed(4))
    step = batch.opcm_step(matrix, tau, 0.999998, variant)
    opcm.fold_matrix(matrix.clone(), tau, 0.999998, variant)
    assert float((tau.double() - step).norm() / step.norm()) < 1e-7


@pytest.mark.parametrize("numel", [0, 1, 1023, 1024, 1025, linalg.SMALL, linalg.SMALL + 1, linalg.CHUNK + 1500])
def test_inner_products_of_every_length(numel: int) -> None:
    random = torch.Generator().manual_seed(numel)
    a, b = torch.randn(numel, generator=random), torch.randn(numel, generator=random)
    exact = math.fsum((a.double() * b.double()).tolist())
    length = float(a.double().norm() * b.double().norm())
    assert abs(linalg.dot(a, b) - exact) <= 1e-14 * length
    assert abs(linalg.inner(a, b) - exact) <= 3e-8 * length
    assert linalg.inners((a, a), (a, b)) == [linalg.inner(a, a), linalg.inner(a, b)]


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_an_inner_product_that_float32_cannot_hold_is_summed_in_float64(size: float) -> None:
    a = torch.full((linalg.SMALL + 10,), size)
    assert linalg.inner(a, a) == pytest.approx((linalg.SMALL + 10) * size**2, rel=1e-6, abs=0.0)


def test_a_piece_that_float32_cannot_hold_is_summed_in_float64_and_the_others_are_not_lost() -> None:
    a = torch.ones(3 * linalg.PIECE + 10)
    a[linalg.PIECE : 2 * linalg.PIECE] = 1e25
    assert linalg.inner(a, a) == pytest.approx(linalg.PIECE * 1e50, rel=1e-6)
    a[linalg.PIECE : 2 * linalg.PIECE] = math.inf
    assert linalg.inner(a, a) == math.inf


@pytest.mark.parametrize("weight", [1.0, -0.3])
def test_a_long_addition_is_that_of_torch_and_is_measured_before_and_after(weight: float) -> None:
    random = torch.Generator().manual_seed(8)
    total, term = torch.randn(2, 2 * linalg.PIECE + 1500, generator=random).unbind()
    total[: linalg.PIECE] = 0.0
    before, after = total.clone(), total.add(term, alpha=weight)
    found = linalg.add(total, term, weight)
    assert torch.equal(total, after)
    exact = linalg.Added(linalg.dot(term, term), linalg.dot(term, before), linalg.dot(after, after))
    assert found == pytest.approx(exact, rel=1e-7)


def test_small_tensors_are_summed_in_float64() -> None:
    a = torch.ones(linalg.SMALL)
    a[0] = 3e4
    assert linalg.inner(a, a) == 9e8 + linalg.SMALL - 1


def test_an_addition_says_what_was_added_to_what() -> None:
    total, term = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 0.5, 1.0])
    found = linalg.add(total, term, -2.0)
    assert torch.equal(total, torch.tensor([-3.0, 1.0, -5.0]))
    assert found == linalg.Added(term_sq=5.25, dot=0.0, total_sq=35.0)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (7, 0), (1, 1), (1000, 300), (3, linalg.BLOCK), (5, 400_000)])
def test_blocks_of_rows_cover_a_matrix_once_and_are_small(rows: int, columns: int) -> None:
    blocks = linalg.row_blocks(rows, columns)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    assert all((block.stop - block.start) * columns <= max(linalg.BLOCK, columns) for block in blocks)
    assert len(blocks) <= 1 + rows * max(1, columns) // (linalg.BLOCK // 2)


def test_a_matrix_of_several_blocks_of_rows_and_panels_has_the_singular_values_of_the_whole() -> None:
    """More rows than a block holds, and more columns than one panel of the Gram is wide."""
    columns = 150
    rows = linalg.BLOCK // columns + 500
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    assert len(linalg.row_blocks(rows, columns)) == 2
    found, _ = linalg.right_singular(matrix)
    assert torch.allclose(found, torch.linalg.svdvals(matrix.double()), rtol=1e-12)


def test_the_workspace_is_that_of_the_small_side() -> None:
    assert linalg.workspace(10, 1000) == linalg.workspace(1000, 10) == 8 * (4 * 100 + 6 * 10_000)
    assert linalg.workspace(4096, 4096) == 8 * (4 * 4096**2 + 6 * linalg.BLOCK)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_the_tall_view_has_at_least_as_many_rows_and_shares_the_memory(shape: tuple[int, int]) -> None:
    matrix = torch.arange(shape[0] * shape[1]).view(shape)
    found = linalg.tall(matrix)
    assert found.shape == (max(shape), min(shape))
    assert found.data_ptr() == matrix.data_ptr()


def product(rows: int, columns: int, rank: int, seed: int) -> Tensor:
    """A float32 matrix of this rank."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_span_has_all_directions_or_says_so(size: float) -> None:
    matrix = size * product(90, 60, 7, 1)
    found = linalg.span(matrix, 7)
    assert found is not None
    left, core = found
    assert left.shape == (90, 7 + linalg.SPARE)
    assert torch.allclose(left.mT @ left, torch.eye(left.shape[1], dtype=torch.float64), atol=1e-13)
    assert float((left @ core - matrix).norm() / matrix.double().norm()) < 1e-6
    sigma, expected = torch.linalg.svdvals(core), torch.linalg.svdvals(matrix.double())
    assert torch.allclose(sigma[:7], expected[:7], rtol=1e-12)
    assert linalg.span(size * product(90, 60, 7 + linalg.SPARE + 1, 1), 7) is None
    small = matrix + size * 1e-4 * product(90, 60, 60, 2)
    assert linalg.span(small, 7) is None, "what is left out is small, and counts in the sum of singular values"


def test_a_thin_projection_of_opcm_is_that_of_the_gram() -> None:
    """Adapter after adapter, tall and wide: the same cut, and C to a millionth."""
    for rows, columns in ((96, 80), (80, 96)):
        total = torch.zeros(rows, columns)
        for number in range(3):
            tau = product(rows, columns, 4, 10 + number)
            usual, quick = total.clone(), total.clone()
            one = opcm.fold_matrix(usual, tau.clone(), 0.5, "block")
            other = opcm.fold_matrix(quick, tau.clone(), 0.5, "block", 4 * number)
            assert one.notes["r"] == other.notes["r"]
            assert one.notes["rank"] == other.notes["rank"]
            assert float((usual - quick).norm() / tau.norm()) < 1e-6
            assert one.sums.merged_sq == pytest.approx(other.sums.merged_sq, rel=1e-6)
            assert torch.equal(usual, quick) is (number == 0), "the second is projected another way"
            total = usual


def test_where_more_is_there_than_was_said_opcm_takes_the_gram() -> None:
    total, tau = product(96, 80, 40, 1), product(96, 80, 4, 2)
    usual, quick = total.clone(), total.clone()
    opcm.fold_matrix(usual, tau.clone(), 0.5, "block")
    opcm.fold_matrix(quick, tau.clone(), 0.5, "block", 4)
    assert torch.equal(usual, quick)


def test_a_thin_projection_is_for_few_directions_and_takes_no_more_memory() -> None:
    assert linalg.spans_cheaply(896, 896, 216)
    assert not linalg.spans_cheaply(896, 896, 217)
    assert not linalg.spans_cheaply(131072, 896, 16), "its factors are longer than the Gram is large"


def test_bounds_on_the_longest_directions_hold_and_are_near() -> None:
    random = torch.Generator().manual_seed(3)
    square = torch.randn(40, 40, generator=random, dtype=torch.float64)
    several = torch.stack([square[:, :5], 1e-9 * square[:, 5:10], 0.0 * square[:, 5:10]])
    exact = torch.linalg.svdvals(several)[:, 0]
    found = linalg.longest(several)
    assert bool((exact <= found).all())
    assert bool((found <= 5**0.125 * exact * (1 + 1e-4)).all())
    heavy = square + 10.0 * torch.eye(40, dtype=torch.float64)
    for matrix in (square, heavy.triu(), heavy.triu().tril()):
        longest = 1.0 / float(torch.linalg.svdvals(matrix)[-1])
        assert longest <= linalg.longest_inverse(matrix) <= 40**0.125 * longest * (1 + 1e-4)
    assert linalg.longest_inverse(torch.zeros(4, 4, dtype=torch.float64)) == math.inf
    square[1] = square[0]
    assert linalg.longest_inverse(square) > 1e12


def test_inner_products_are_those_of_float64_also_of_float32_vectors() -> None:
    rows = torch.randn(30, 9000, generator=torch.Generator().manual_seed(5))
    exact = rows.double() @ rows.double().mT
    for given in (rows, rows.double()):
        assert torch.allclose(linalg.gram(given), exact, rtol=1e-12, atol=1e-10)
