"""Frank-Wolfe steps over weights of task vectors, until the duality gap is small. Pure maths: the hull and its gap are
in `hull`; what a loss and a gradient are, the caller knows.

Departures from the paper that `hull` cites, besides those named there: weights stay in the hull; the caller decides who
may enter; there are pairwise and fully-corrective steps (Lacoste-Julien and Jaggi, "On the Global Linear Convergence of
Frank-Wolfe Optimization Variants", 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from continual.config import StepSettings
from continual.errors import Misconfigured
from continual.lazily import Tensor, torch
from continual.selection.hull import GONE, Hull, Point, Problem, project

Step = Literal["hard", "pairwise", "soft", "corrective"]
Gamma = Literal["line", "decay"]
"""How γ is found: by line search, or as 2/(t + 2)."""
STEPS: tuple[Step, ...] = ("hard", "pairwise", "soft", "corrective")
GAMMAS: tuple[Gamma, ...] = ("line", "decay")
WHOLE: tuple[Step, ...] = ("pairwise", "soft")
"""Steps that weigh whole models: one coefficient a model."""
Admit = Callable[[int, Tensor], bool]
"""May this vertex, which has no weight, enter at these weights?"""
Hear = Callable[["Taken"], None]
"""Called with each step as it is made."""

BOUND = 1e-6
"""A step that ends within this share of its bound goes all the way."""
DECREASE = 1e-4
"""A step has to keep this share of what the slope promises (Armijo)."""
TRIES = 8
"""Evaluations of one line search."""


@dataclass(frozen=True, slots=True)
class Stepping:
    """How steps are made. `settings` hold ρ, the k of soft (`best`), the projected gradients of one soft or corrective
    step (`inner`), and the duality gap, in units of the loss, at which the steps end (`tolerance`).

    `most`: ordinary vertices, those without a cap, that may have weight; beyond that nobody is admitted. `steps`: how
    many steps are made at most. Both are the settings' own, unless a caller puts others in their place.
    """

    settings: StepSettings
    step: Step
    search: Gamma
    most: int
    steps: int

    @classmethod
    def of(cls, settings: StepSettings) -> Stepping:
        """From the settings. Raises Misconfigured naming one that cannot be used."""
        step = next((known for known in STEPS if known == settings.step), None)
        search = next((known for known in GAMMAS if known == settings.search), None)
        decays = search == "decay" and step != "hard"
        for name, value, fine, allowed in (
            ("step", settings.step, step is not None, f"one of {', '.join(STEPS)}"),
            ("search", settings.search, search is not None, "line or decay"),
            ("search", settings.search, not decays, "line; decay goes with step = 'hard' alone"),
            ("rho", settings.rho, 0 < settings.rho < math.inf, "a finite number above 0"),
            ("tolerance", settings.tolerance, 0 <= settings.tolerance < math.inf, "a finite number, 0 or above"),
            ("best", settings.best, settings.best >= 1, "at least 1"),
            ("active", settings.active, settings.active >= 1, "at least 1"),
            ("steps", settings.steps, settings.steps >= 1, "at least 1"),
            ("inner", settings.inner, settings.inner >= 1, "at least 1"),
        ):
            if not fine:
                raise Misconfigured(f"{name} = {value!r}: name {allowed}")
        assert step is not None
        assert search is not None
        return cls(settings, step, search, settings.active, settings.steps)


class Taken(NamedTuple):
    """What a step did: `gap` before it, `loss` after it, the vertices that `entered` and that `left`.

    `gamma` is, for hard and corrective, the share of the way that was gone (for corrective in its last inner
    iteration); for pairwise, the weight that moved; for soft, 1 minus what is left of the weights before.
    """

    step: Step
    number: int
    loss: float
    gap: float
    gamma: float
    entered: tuple[int, ...]
    left: tuple[int, ...]


class Solved(NamedTuple):
    """Where the steps ended: `weights` (m × L), the `loss` and the `gap` there, the loss at the start (`first`), and
    the steps that led there."""

    weights: Tensor
    loss: float
    first: float
    gap: float
    steps: list[Taken]


def always(vertex: int, weights: Tensor) -> bool:  # noqa: ARG001
    """Every vertex may enter."""
    return True


def ignore(taken: Taken) -> None:
    """Nobody hears of the steps."""


class Door:
    """Who may have weight in one step. `allowed` (m, bool): the vertices with weight and those that were admitted;
    `unbarred` (m, bool): all vertices but those that were refused."""

    def __init__(self, hull: Hull, most: int, weights: Tensor, admit: Admit) -> None:
        self._weights = weights
        self._admit = admit
        self._most = most
        self._ordinary = hull.caps.isinf().all(1)
        self.allowed = (weights > 0).any(1)
        self.unbarred = torch.ones_like(self.allowed)
        self._close_if_full()

    def ask(self, vertex: int) -> bool:
        """Whether the vertex may have weight. Nobody is asked twice."""
        if self.unbarred[vertex] and not self.allowed[vertex]:
            if self._admit(vertex, self._weights.clone()):
                self.allowed[vertex] = True
            else:
                self.unbarred[vertex] = False
            self._close_if_full()
        return bool(self.allowed[vertex])

    def _close_if_full(self) -> None:
        if int((self.allowed & self._ordinary).sum()) >= self._most:
            self.unbarred &= self.allowed | ~self._ordinary


def solve(
    problem: Problem, start: Tensor, caps: Tensor, stepping: Stepping, admit: Admit = always, hear: Hear = ignore
) -> Solved:
    """Makes steps from the weights `start` (m × L, float64) until the gap is within the tolerance, no step lowers the
    loss, or there were as many as `stepping` allows. `hear` is called with each.

    A vertex without weight is asked about, through `admit`, when a step would give it some: the one with the most
    negative slope first, and only while the gap over all vertices that were not refused is above the tolerance. A
    refusal holds for that step. Every gap is over the vertices that were not refused. A step depends on the weights
    alone; with search decay, on its number too. Within a step, `problem` may be asked for some slopes of a point, and
    then for all.

    Raises Misconfigured where the objective gives no finite number, or where the step weighs whole models and `start`
    has several columns.
    """
    assert (start.shape, start.dtype, caps.dtype) == (caps.shape, torch.float64, torch.float64), (start, caps)
    if stepping.step in WHOLE and start.shape[1] > 1:
        raise Misconfigured(
            f'step = "{stepping.step}": takes one coefficient a model, not {start.shape[1]}; '
            "with more name hard or corrective"
        )
    hull = Hull(problem, caps, stepping.settings.rho)
    tolerance = stepping.settings.tolerance
    point = hull.at(start)
    first = point.loss
    steps: list[Taken] = []
    for number in range(stepping.steps + 1):
        door = Door(hull, stepping.most, point.weights, admit)
        before = door.allowed.clone()
        bound = _let_in(hull, point, door, tolerance)
        if number == stepping.steps or (bound <= tolerance and torch.equal(before, door.allowed)):
            break
        after, gamma = _step(hull, stepping, point, door, number)
        if after.loss >= point.loss and stepping.search == "line":
            break
        now = (after.weights > 0).any(1)
        entered, left = _which(now & ~before), _which(before & ~now)
        steps.append(Taken(stepping.step, number, after.loss, bound, gamma, entered, left))
        # The inner iterations of soft and corrective look at the slopes of the allowed vertices alone.
        point = after if stepping.step in ("hard", "pairwise") else hull.at(after.weights)
        hear(steps[-1])
    return Solved(point.weights, point.loss, first, bound, steps)


def _let_in(hull: Hull, point: Point, door: Door, tolerance: float) -> float:
    """Asks about the vertices that the oracle picks, until all of them are allowed or the gap is within the tolerance.
    Returns the gap then."""
    order = point.slopes.clamp(max=0.0).sum(1)
    while True:
        bound = hull.gap(point, door.unbarred)
        new = (hull.oracle(point, door.unbarred) > 0).any(1) & ~door.allowed
        if bound <= tolerance or not bool(new.any()):
            return bound
        door.ask(int(torch.where(new, order, math.inf).argmin()))


def _step(hull: Hull, stepping: Stepping, point: Point, door: Door, number: int) -> tuple[Point, float]:
    """Where one step leads, and its γ; `point` itself where no step lowers the loss."""
    if stepping.step == "pairwise":
        return _pairwise(hull, point, door)
    if stepping.step == "soft":
        return _soft(hull, stepping.settings, point, door)
    if stepping.step == "corrective":
        rows = door.allowed
        space = Space(torch.eye(len(rows), dtype=torch.float64)[:, rows], hull.caps[rows], hull.rho)
        after, gamma, _ = _descend(hull, stepping.settings, point, rows, space, point.weights[rows])
        return after, gamma
    way = hull.oracle(point, door.allowed) - point.weights  # hard: τ ← τ + γ(ρτ_j − τ), one j a column
    if stepping.search == "decay":
        gamma = 2 / (number + 2)
        return hull.at(point.weights + gamma * way), gamma
    return _along(hull, point, way, 1.0)


def minimise(
    evaluate: Callable[[float], float], loss: float, slope: float, most: float, *, eager: bool = False
) -> float:
    """A γ in (0, most] that lowers φ enough, where φ(0) = loss and φ'(0) = slope < 0; 0 where none that was tried does.

    First `most` is tried, then the minimiser of the parabola through what is known: of a quadratic two evaluations are
    exact. `eager`: `most` is taken at once where it lowers φ enough.
    """
    gamma = most
    kept = 0.0
    at_kept = loss
    for number in range(TRIES):
        value = evaluate(gamma)
        bend = value - loss - slope * gamma
        lowest = math.inf if bend <= 0 else -slope * gamma**2 / (2 * bend)  # 0 or nan where the loss is no number
        enough = value < loss and value <= loss + DECREASE * gamma * slope
        if kept and not (enough and value < at_kept):
            return kept
        if enough and (number > 0 or eager or lowest >= (1 - BOUND) * most):
            return gamma
        if enough:
            kept, at_kept, gamma = gamma, value, lowest
        else:
            gamma *= min(max(lowest / gamma, 0.1 if number else BOUND), 0.5) if math.isfinite(value) else 0.1
    return kept


def _along(
    hull: Hull, point: Point, way: Tensor, most: float, *, eager: bool = False, of: Tensor | None = None
) -> tuple[Point, float]:
    """The point at weights + γ·way, and γ: at most `most`, and such that the loss falls; `point` and 0 where there is
    none. `of` as for `Problem.gradient`."""
    slope = float((point.slopes * way).sum())
    if not slope < 0:
        return point, 0.0
    gamma = minimise(lambda gamma: hull.loss(point.weights + gamma * way), point.loss, slope, most, eager=eager)
    return (hull.at(point.weights + gamma * way, of), gamma) if gamma else (point, 0.0)


def _pairwise(hull: Hull, point: Point, door: Door) -> tuple[Point, float]:
    """Moves weight from the worst vertex that has some to the best that can take some. The last of m + 1 is the zero
    vertex; its weight is what is left of ρ."""
    rho, weights = hull.rho, point.weights[:, 0]
    has = torch.cat([weights, rho - weights.sum(0, keepdim=True)])
    takes = torch.cat([torch.where(door.allowed, hull.caps[:, 0] - weights, 0.0), has.new_full((1,), math.inf)])
    slopes = torch.cat([point.slopes[:, 0], has.new_zeros(1)])
    worst = int(torch.where(has > GONE * rho, slopes, -math.inf).argmax())
    best = int(torch.where(takes > GONE * rho, slopes, math.inf).argmin())
    every = torch.eye(len(has), dtype=torch.float64)
    return _along(hull, point, (every[best] - every[worst])[:-1, None], float(has[worst].minimum(takes[best])))


def _soft(hull: Hull, settings: StepSettings, point: Point, door: Door) -> tuple[Point, float]:
    """τ ← τ + Σ_j u_j (a_j − τ) with u on the simplex. The a_j are ρτ_j, or τ_j at its cap, of the k best vertices;
    where caps make the oracle's point none of these, it is one more."""
    slopes, most = point.slopes[:, 0], hull.caps[:, 0].clamp(max=hull.rho)
    chosen: list[int] = []
    for vertex in slopes.argsort(stable=True).tolist():
        if len(chosen) < settings.best and slopes[vertex] < 0 < most[vertex] and door.ask(vertex):
            chosen.append(vertex)
    atoms = torch.diag(most)[:, chosen]  # m × k
    target = hull.oracle(point, door.allowed)  # m × 1
    if not bool((atoms == target).all(0).any()):
        atoms = torch.cat([atoms, target], dim=1)
    none = atoms.new_zeros(atoms.shape[1], 1)
    space = Space(atoms - point.weights, none + math.inf, 1.0)
    after, _, u = _descend(hull, settings, point, door.allowed, space, none)
    return after, float(u.sum())


class Space(NamedTuple):
    """Variables x (p × L). ways·x (m × L) is added to the weights; 0 <= x <= caps, and each column of x sums to at most
    `total`."""

    ways: Tensor
    caps: Tensor
    total: float


def _descend(
    hull: Hull, settings: StepSettings, point: Point, allowed: Tensor, space: Space, x: Tensor
) -> tuple[Point, float, Tensor]:
    """Spectral projected gradient (Birgin, Martínez and Raydan, 2000, SPG2), but monotone. Returns the point, the last
    γ, and x.

    The first length, for which nothing is known, gets a line search. Those after it are Barzilai and Borwein's, and go
    the whole way if that lowers the loss enough.
    """
    length = 0.0
    gamma = 0.0
    slopes = space.ways.T @ point.slopes
    for number in range(settings.inner):
        scale = float(slopes.abs().max()) / space.total
        if scale == 0 or (number and hull.gap(point, allowed) <= settings.tolerance):
            break
        length = min(max(length, 1e-4 / scale), 1e4 / scale) if length else 1 / scale
        columns = zip((x - length * slopes).T, space.caps.T, strict=True)
        way = torch.stack([project(values, space.total, caps) for values, caps in columns], dim=1) - x
        after, tried = _along(hull, point, space.ways @ way, 1.0, eager=number > 0, of=allowed)
        if after is point:
            break
        old, slopes = slopes, space.ways.T @ after.slopes
        x = x + tried * way
        point = after
        gamma = tried
        bend = gamma * float((way * (slopes - old)).sum())
        length = gamma**2 * float((way * way).sum()) / bend if bend > 0 else 0.0
    return point, gamma, x


def _which(vertices: Tensor) -> tuple[int, ...]:
    return tuple(vertices.nonzero().flatten().tolist())
