"""Sketches: what they say of the task vectors that they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from continual.records import TensorSpec
from continual.tensors.vectors.sketch import SIZE, Alike, Projection, Sketch, SketchPlan, Watched, explained

RANDOM = np.random.default_rng(0)
Values = NDArray[np.float64]


def specs(layers: int) -> list[TensorSpec]:
    return [TensorSpec(f"l{n}", (8, 8), "F32", "matrix", n / max(1, layers - 1)) for n in range(layers)]


def sketched(plan: SketchPlan, tensors: dict[str, Values]) -> Sketch:
    found = {name: Projection(name, plan.width) for name in tensors}
    for name, values in tensors.items():
        found[name].add(0, values.reshape(-1).astype(np.float32))
    squares = {name: float((values**2).sum()) for name, values in tensors.items()}
    return Sketch.of(plan, squares, {name: one.values for name, one in found.items()})


def drawn(plan: SketchPlan) -> dict[str, Values]:
    return {name: RANDOM.standard_normal((200, 200)) for name in plan.group}


@pytest.mark.parametrize("layers", [1, 4, 64, 126])
def test_its_size_does_not_depend_on_the_model(layers: int) -> None:
    plan = SketchPlan.of(specs(layers))
    assert plan.groups == min(64, layers)
    assert SIZE / 2 < plan.groups * plan.width <= SIZE
    assert sorted(set(plan.group.values())) == list(range(plan.groups)), "no group is empty"


def test_cosines_and_norms() -> None:
    plan = SketchPlan.of(specs(4))
    one, two = drawn(plan), drawn(plan)
    both = {name: 0.6 * one[name] + 0.8 * two[name] for name in one}
    seen = [sketched(plan, each) for each in (one, two, both)]
    assert np.allclose(Alike.of(seen[2], seen[:2]).cosine, [0.6, 0.8], atol=0.06)
    assert abs(Alike.of(seen[0], seen[1:2]).cosine[0]) < 0.06
    assert seen[0].norms == pytest.approx([np.linalg.norm(one[name]) for name in sorted(one)], rel=1e-5)
    assert explained(seen[2], seen[:2]) == pytest.approx(1.0, abs=1e-3), "eight bits a number"
    assert explained(seen[2], seen[:1]) == pytest.approx(0.36, abs=0.06)


def test_parts_of_any_length_make_the_same() -> None:
    values = RANDOM.standard_normal(10_000).astype(np.float32)
    whole, parts = Projection("w", 64), Projection("w", 64)
    whole.add(0, values)
    for start in range(0, len(values), 999):
        parts.add(start, values[start : start + 999])
    assert np.allclose(whole.values, parts.values, atol=1e-3)
    assert not np.allclose(whole.values, 0)


def test_products_are_compared_without_being_made() -> None:
    ratios = []
    for number in range(60):
        left, right, other = (RANDOM.standard_normal(shape) for shape in ((90, 3), (3, 70), (3, 70)))
        found = [Projection(f"w{number}", 64) for _ in range(2)]
        found[0].add_product(left, right)
        found[1].add_product(left, right + 0.5 * other)
        inner = float(((left @ right) * (left @ (right + 0.5 * other))).sum())
        ratios.append(found[0].values @ found[1].values / inner)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15), "the expected inner product is that of the products"


def test_what_a_record_keeps_is_nearly_the_same() -> None:
    plan = SketchPlan.of(specs(4))
    seen = sketched(plan, drawn(plan))
    again = Sketch.read(seen.norms, seen.text)
    assert again is not None
    assert len(seen.text) < 1.4 * SIZE
    assert Alike.of(seen, [again]).cosine[0] > 0.9999
    assert again.norms == seen.norms


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA", "AAAAAAAAAAAAAAAAAAAAAA=="])
def test_what_is_no_sketch_is_none(text: str) -> None:
    assert Sketch.read((1.0, 2.0, 3.0), text) is None
    assert Sketch.read((), text) is None


def stands_out(matrix: Values) -> float | None:
    spec = TensorSpec("w", matrix.shape, "F32", "matrix")
    seen = Watched(spec, SketchPlan.of([spec], ["w"]))
    flat = matrix.reshape(-1).astype(np.float32)
    for start in range(0, len(flat), 5000):
        seen.add(start, flat[start : start + 5000])
    return seen.picture().stands_out


def test_what_was_learned_stands_out_of_noise() -> None:
    noise = RANDOM.standard_normal((300, 200))
    assert 0.7 < (stands_out(noise) or 0) < 1.1
    assert 0.7 < (stands_out(1e-4 * noise) or 0) < 1.1, "whatever its length"
    learned = noise + np.outer(RANDOM.standard_normal(300), RANDOM.standard_normal(200))
    assert (stands_out(learned) or 0) > 3.8


def test_what_says_nothing_is_left_out() -> None:
    assert stands_out(RANDOM.standard_normal((300, 63))) is None, "too narrow to tell"
    assert stands_out(np.zeros((80, 80))) is None
    assert stands_out(np.full((80, 80), np.nan)) is None
    spec = TensorSpec("w", (80, 80), "F32", "matrix")
    unchanged = Watched(spec, SketchPlan.of([spec], []))
    unchanged.add(0, np.ones(6400, np.float32))
    assert unchanged.picture().stands_out is None
