"""The arithmetic of a forecast: laws through samples, forms of matrices, and work that is spread over threads."""

from __future__ import annotations

import pytest

from continual.forecast.forecast import Law, spread
from continual.forecast.sample import MatrixForm, dtype_of, forms_of
from continual.records import TensorSpec
from continual.rules import rule


def _matrix(m: int, n: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(f"model.layers.0.mlp.m{m}x{n}.weight", (m, n), dtype, "matrix")


def test_a_law_goes_through_both_samples_and_beyond() -> None:
    def truth(m: int, n: int) -> float:
        return 3e-9 * m * n + 5e-12 * m * n * min(m, n)

    law = Law.fitted((512, 256, truth(512, 256)), (1024, 512, truth(1024, 512)))
    assert law.of(8192, 28672) == pytest.approx(truth(8192, 28672))


@pytest.mark.parametrize(("small", "large"), [(1.0, 3.9), (1.0, 8.1), (1.0, 0.5), (0.0, 0.0)])
def test_no_term_of_a_law_is_below_zero(small: float, large: float) -> None:
    law = Law.fitted((64, 64, small), (128, 128, large))
    assert min(law) >= 0.0
    assert law.of(128, 128) == pytest.approx(large)


def test_forms_are_those_that_take_most_and_no_larger_than_the_model() -> None:
    iso, plain = rule("iso-c"), rule("task-arithmetic")
    shapes = [(4096, 4096), (4096, 1024), (1024, 4096), (64, 64), (8, 4096), (100, 7)]
    forms, side = forms_of([_matrix(m, n) for m, n in shapes], iso)
    assert (forms[0], {form.ratio for form in forms}, side) == (MatrixForm(0), {0, 2, -2}, 512)
    assert forms_of([_matrix(40, 48)], iso) == ((MatrixForm(0),), 40)
    assert forms_of([_matrix(m, n) for m, n in shapes], plain) == ((), 0)
    assert [MatrixForm(ratio).shape(8) for ratio in (-2, 0, 2, 9)] == [(8, 32), (8, 8), (32, 8), (64, 8)]
    stack = TensorSpec("experts", (6, 32, 16), "BF16", "stack", experts=6)
    assert forms_of([stack], iso) == ((MatrixForm(1),), 16)


def test_the_sample_is_of_the_dtype_that_most_bytes_have() -> None:
    assert dtype_of([_matrix(4, 4, "F32"), _matrix(9, 4), TensorSpec("n", (99, 99), "I64", "carried")]) == "BF16"
    assert dtype_of([_matrix(5, 4, "F32"), _matrix(9, 4)]) == "F32"


def test_tasks_are_handed_out_in_turn() -> None:
    tasks = [3.0, 1.0, 1.0, 1.0, 4.0]
    assert [spread(tasks, threads) for threads in (1, 2, 16)] == [10.0, 7.0, 4.0]
    assert spread([], 2) == 0.0
