"""The inverse root of a number as a sum of resolvents, which holds for matrices too. Nothing else lives here."""

from __future__ import annotations

import math

from continual.lazily import Tensor, torch

QUADRATURE = 2.5e-6
"""Error of `quadrature`, relative, about: the number of its points follows from that and from the range."""


def quadrature(least: float, most: float) -> tuple[Tensor, Tensor]:
    """The squares t² of the points and the weights w with x^{-1/2} = Σ w/(t² + x) for x in [least, most].

    Hale, Higham and Trefethen 2008, "Computing A^α, log(A), and Related Matrix Functions by Contour Integrals", section
    4: the integral 2/π ∫ (t² + x)⁻¹ dt by the trapezoidal rule, after a map under which it converges geometrically.
    """
    modulus = math.sqrt(least / most)  # the complementary one
    a, b, steps = [1.0], modulus, [math.sqrt(1.0 - modulus**2)]
    while steps[-1] > 1e-16 * a[-1] and len(a) < 12:
        steps.append((a[-1] - b) / 2)
        a.append((a[-1] + b) / 2)
        b = math.sqrt(b * (2 * a[-1] - b))
    quarter = math.pi / (2 * a[-1])
    count = math.ceil((math.log(most / least) + 3.0) * math.log(1.0 / QUADRATURE) / (2 * math.pi**2))
    places = (torch.arange(count, dtype=torch.float64) + 0.5) * (quarter / count)
    # Jacobi's functions by descending Landen transformations
    angle = before = places * (a[-1] * 2 ** (len(a) - 1))
    for step, mean in zip(steps[:0:-1], a[:0:-1], strict=True):
        before, angle = angle, (angle + torch.asin(step * torch.sin(angle) / mean)) / 2
    cosine = torch.cos(angle)
    slope = 1.0 / torch.cos(before - angle)  # dn / cn
    points = least * torch.tan(angle).square()
    return points, (2 * quarter * math.sqrt(least) / (math.pi * count)) * slope / cosine
