"""A weighted sum made from the one before: what is kept, what is added, what is read."""

from __future__ import annotations

import pytest
import torch

from continual.selection.mixing import mix


@pytest.mark.parametrize("rest", [(), (0.25,)])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_mixed_is_the_sum_however_small_the_weights_were(rest: tuple[float, ...], seed: int) -> None:
    """In float32, as a merge is kept: a share of X that blew up its rounding would show."""
    random = torch.Generator().manual_seed(seed)
    keys = ["a", "b", "c", "d"]
    taus = torch.randn(len(keys) + bool(rest), 200, generator=random, dtype=torch.float64)
    before = torch.rand(len(taus), 1, generator=random, dtype=torch.float64)
    before[seed % 4] = 10.0 ** -(seed + 2)
    after = torch.rand(len(taus), 1, generator=random, dtype=torch.float64)
    if seed > 2:
        before[(seed + 1) % 4] = 0.0
        after[(seed + 2) % 4] = 0.0
    if rest:
        before[-1], after[-1] = rest[0], 0.5 * rest[0]
    x = (before.T @ taus)[0].float()
    found = mix(before, after, rest, keys)
    mixed = x * found.keep[0]
    for key, (scale,) in found.add.items():
        mixed.add_(taus[keys.index(key)].float(), alpha=scale)
    torch.testing.assert_close(mixed.double(), (after.T @ taus)[0], rtol=0, atol=2e-6)


def test_what_does_not_change_is_not_read() -> None:
    before = torch.tensor([[0.5, 0.2], [0.3, 0.0], [0.1, 0.4]], dtype=torch.float64)
    same = mix(before, before, (), ["a", "b", "c"])
    assert (same.keep, same.add) == ((1.0, 1.0), {})
    after = before.clone()
    after[1] = torch.tensor([0.35, 0.0])
    one = mix(before, after, (), ["a", "b", "c"])
    assert (one.keep, set(one.add)) == ((1.0, 1.0), {"b"})
    scaled = mix(before, 0.5 * before, (), ["a", "b", "c"])
    assert (scaled.keep, scaled.add) == ((0.5, 0.5), {})
    nothing = mix(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), (), ["a"])
    assert dict(nothing.add) == {"a": (1.0,)}


def test_a_small_change_is_read_and_what_rounding_left_is_not() -> None:
    before = torch.tensor([[0.5], [0.3], [0.1]], dtype=torch.float64)
    small, rounded = before.clone(), before.clone()
    small[1] += 1e-6
    rounded[1] += 5e-16
    found = mix(before, small, (), ["a", "b", "c"])
    assert (found.keep, list(found.add)) == ((1.0,), ["b"])
    assert found.add["b"] == pytest.approx((1e-6,), rel=1e-6)
    assert mix(before, rounded, (), ["a", "b", "c"]).add == {}


def test_a_layer_in_which_the_rest_has_no_weight_is_made_of_its_members_alone() -> None:
    before = torch.tensor([[0.5, 0.2], [0.25, 0.0]], dtype=torch.float64)
    after = torch.tensor([[0.5, 0.6], [0.1, 0.0]], dtype=torch.float64)
    found = mix(before, after, (0.25, 0.0), ["a"])
    assert found.keep == (pytest.approx(0.4), 0.0)
    assert found.add["a"] == (pytest.approx(0.3), 0.6)
