"""Iso-C without one of its models, against the decomposition of what is left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual import linalg
from continual.records import Totals
from continual.rules import iso_c, iso_less
from continual.rules.apart import Apart, SideVectors
from continual.rules.quadrature import quadrature

Terms = list[tuple[Tensor, Tensor]]


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms_of(kind: str, m: int, n: int) -> Terms:
    found = [(normal(m, 6, 2 * i), normal(n, 6, 2 * i + 1)) for i in range(8)]
    if kind == "twins":
        found[3] = found[2]
    elif kind == "nearly twins":
        found[3] = (found[2][0] + 1e-3 * normal(m, 6, 50), found[2][1])
    elif kind == "opposite":
        found[3] = (-found[2][0], found[2][1])
    elif kind == "shared":
        found = [(a, found[0][1]) for a, _ in found]
    elif kind in ("steep", "at the threshold"):
        least = -2 if kind == "steep" else -4
        steps = torch.logspace(0, least, 6, dtype=torch.float64)
        found = [(a * steps * 10.0 ** (i % 2), b) for i, (a, b) in enumerate(found)]
    elif kind == "full":
        found = [(normal(m, n // 8, 2 * i), normal(n, n // 8, 2 * i + 1)) for i in range(8)]
    elif kind == "empty":
        found[5] = (found[5][0][:, :0], found[5][1][:, :0])
    return found


def flat(total: Tensor) -> Tensor:
    u, sigma, vh = torch.linalg.svd(total, full_matrices=False)
    held = sigma > linalg.NULL * sigma[0]
    return sigma[held].mean() * u[:, held] @ vh[held]


KINDS = ["independent", "twins", "nearly twins", "opposite", "shared", "steep", "at the threshold", "full", "empty"]


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_flat_spectrum_of_what_is_left(kind: str, shape: tuple[int, int]) -> None:
    terms = terms_of(kind, *shape)
    parts = [a @ b.mT for a, b in terms]
    total = torch.stack(parts).sum(0)
    whole, rests = iso_less.without(total, terms)
    expected = flat(total)
    assert isinstance(whole, Tensor)
    # singular values down to 1e-6 of the largest: their squares are 1e-12, where float64 is right to 1e-4
    near = 1e-3 if kind == "at the threshold" else 3e-5
    assert float((whole - expected).norm()) < near * float(expected.norm())
    known = 0
    for part, found in zip(parts, rests, strict=True):
        if found is None:
            continue
        known += 1
        rest = flat(total - part)
        length = float(rest.norm())
        assert math.sqrt(found.square) == pytest.approx(length, rel=near)
        assert found.inner == pytest.approx(float((rest * expected).sum()), abs=near * length * float(expected.norm()))
    assert known >= 6 or kind == "at the threshold", "the quick way is the usual one"


def test_what_is_better_decomposed_is_left_to_that() -> None:
    terms = terms_of("independent", 30, 30)
    assert iso_less.without(torch.stack([a @ b.mT for a, b in terms]).sum(0), terms) == (None, [None] * 8)
    wide = [(normal(64, 20, 1), normal(64, 20, 2)), (normal(64, 3, 3), normal(64, 3, 4))]
    _, rests = iso_less.without(torch.stack([a @ b.mT for a, b in wide]).sum(0), wide)
    assert rests[0] is None
    assert rests[1] is not None
    assert iso_less.without(torch.zeros(64, 64, dtype=torch.float64), []) == (None, [])


def test_a_term_that_is_all_there_is_is_left_to_the_decomposition() -> None:
    only = [(normal(64, 6, 1), normal(64, 6, 2))]
    whole, rests = iso_less.without(only[0][0] @ only[0][1].mT, only)
    assert isinstance(whole, Tensor)
    assert rests == [None]


@pytest.mark.parametrize("least", [1e-12, 1e-6, 1e-2])
def test_the_quadrature_is_the_inverse_root(least: float) -> None:
    points, weights = quadrature(least, 4.0)
    x = torch.logspace(math.log10(least), math.log10(4.0), 500, dtype=torch.float64)
    found = (weights / (points + x[:, None])).sum(1) * x.sqrt()
    assert float((found - 1).abs().max()) < 2e-5


def test_the_rule_reads_the_same_whole() -> None:
    terms = terms_of("independent", 64, 64)
    u, v = (torch.cat(side, 1) for side in zip(*terms, strict=True))
    rows = {index: slice(6 * index, 6 * index + 6) for index in range(8)}
    left, right = SideVectors.of(u), SideVectors.of(v)
    sigma, weights = torch.linspace(1.0, 3.0, 48, dtype=torch.float64), [1.0 + index for index in range(8)]
    whole, _ = iso_c.without(Apart(left, sigma, right, rows, weights, Totals(8.0), [Totals(7.0)] * 8, (64, 64)))
    assert isinstance(whole, Tensor)
    heavy = sigma * torch.tensor(weights, dtype=torch.float64).repeat_interleave(6)
    expected = iso_c.flat(((u * heavy) @ v.mT).float()).double()
    assert float((whole - expected).norm()) < 1e-5 * float(whole.norm())
    two = iso_c.without(Apart(left, sigma, right, rows, weights[:2], Totals(2.0), [Totals(1.0)] * 2, (64, 64)))
    assert two == (None, [None, None]), "one model alone has no flat spectrum"
