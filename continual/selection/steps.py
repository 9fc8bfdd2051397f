"""Frank-Wolfe steps over the coefficients of task vectors, and the duality gap. Pure maths: what a loss and a gradient
are is the caller's.

Minimises ℓ(Σ_i w_i τ_i) over 𝓜 = ρ·conv({0} ∪ {τ_i}) ("FW-Merging: Scaling Model Merging with Frank-Wolfe
Optimization", 2025). A vertex is a task vector; its coefficients are a row of m × L `weights`, where L is 1 (task-wise)
or the number of layers. Feasible: 0 <= weights <= caps, each column's sum <= ρ.

Departures from the paper: the zero vertex belongs to the hull; weights stay in it; a vertex may have a cap (it can
shrink and not grow beyond); who enters is the caller's decision; pairwise and fully-corrective steps (Lacoste-Julien
and Jaggi, "On the Global Linear Convergence of Frank-Wolfe Optimization Variants", 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from continual.errors import Misconfigured

Step = Literal["hard", "pairwise", "soft", "corrective"]
Admit = Callable[[int, Tensor], bool]
"""May this vertex, whose weights are all 0, enter at these weights?"""
Told = Callable[["Taken"], None]

GONE = 1e-9  # weights up to this share of ρ are 0
BOUND = 1e-6  # a step this near to its bound goes all the way
DECREASE = 1e-4  # the share of the slope's promise that a step has to keep (Armijo)
TRIES = 8  # evaluations of one line search


class Problem(Protocol):
    """ℓ as a function of the weights."""

    def loss(self, weights: Tensor) -> float: ...

    def gradient(self, weights: Tensor, of: Tensor | None = None) -> tuple[float, Tensor]:
        """The loss and the slopes, m × L: slopes[i, l] = ⟨g_l, τ_{i,l}⟩; where some are asked for, `of` them (m, bool),
        those of the others are not looked at.

        The same point may be asked for twice in a row, for some and then for all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to step. `best` is the k of soft; `most` ordinary vertices may have weight, and beyond it none is admitted;
    `inner` iterations of projected gradient make a step of soft or corrective; `tolerance` is a duality gap, in units
    of the loss."""

    step: Step = "corrective"
    rho: float = 1.0
    search: Literal["line", "decay"] = "line"
    best: int = 4
    most: int = 16
    steps: int = 30
    inner: int = 4
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            ("step", self.step in get_args(Step), f"one of {', '.join(get_args(Step))}"),
            ("search", self.search in ("line", "decay"), "line or decay"),
            ("search", self.search != "decay" or self.step == "hard", "line; decay goes with step = 'hard' alone"),
            ("rho", 0 < self.rho < math.inf, "a finite number above 0"),
            ("tolerance", 0 <= self.tolerance < math.inf, "a finite number, 0 or above"),
            *((name, getattr(self, name) >= 1, "at least 1") for name in ("best", "most", "steps", "inner")),
        ):
            if not fine:
                raise Misconfigured(f"{name} = {getattr(self, name)!r}: name {allowed}")


class Taken(NamedTuple):
    """What a step did. `gap` is before it, `loss` after it. `gamma`: of hard and corrective (there the last inner
    iteration's) the share of the way that was gone, of pairwise the weight that moved, of soft 1 minus what is left of
    the weights before."""

    step: Step
    number: int
    loss: float
    gap: float
    gamma: float
    entered: tuple[int, ...]
    left: tuple[int, ...]


class Solved(NamedTuple):
    """Where it ended, and the way there. `first` is the loss at the start, `gap` is that of the end."""

    weights: Tensor
    loss: float
    first: float
    gap: float
    steps: list[Taken]


def always(vertex: int, weights: Tensor) -> bool:  # noqa: ARG001
    """Every vertex may enter."""
    return True


def ignore(taken: Taken) -> None:
    """Nobody is told."""


def oracle(slopes: Tensor, rho: float, allowed: Tensor, caps: Tensor) -> Tensor:
    """The feasible weights, m × L, with the least ⟨slopes, weights⟩: in each column the most negative slopes, each up
    to its cap, until ρ is used."""
    order = slopes.argsort(dim=0, stable=True)
    room = torch.where(allowed[:, None] & (slopes < 0), caps.clamp(max=rho), 0.0).gather(0, order)
    before = room.cumsum(0) - room  # what better vertices of the column can take
    return torch.zeros_like(slopes).scatter(0, order, room.minimum((rho - before).clamp(min=0.0)))


def gap(weights: Tensor, slopes: Tensor, rho: float, allowed: Tensor, caps: Tensor | None = None) -> float:
    """⟨g, τ⟩ − min over what is feasible with the `allowed` vertices (m, bool); without caps Σ_l ⟨g_l, τ_l⟩ − min(0,
    ρ·min_i slopes[i, l]). Of a convex ℓ at least ℓ − ℓ*."""
    target = oracle(slopes, rho, allowed, torch.full_like(slopes, math.inf) if caps is None else caps)
    return float((slopes * (weights - target)).sum())


def project(values: Tensor, total: float, caps: Tensor) -> Tensor:
    """The nearest to `values` (1-D) of {0 <= u <= caps, Σu <= total}: clip(values − θ, 0, caps) with the least θ >= 0
    that fits."""
    fits = values.clamp(min=0.0).minimum(caps)
    if float(fits.sum()) <= total:
        return fits
    breaks = (
        torch.cat([values.new_zeros(1), values, values - caps]).clamp(min=0.0).sort().values
    )  # Σ(θ) is linear between two
    sums = (values - breaks[:, None]).clamp(min=0.0).minimum(caps).sum(1)
    low = int((sums > total).sum()) - 1  # Σ(breaks[low]) > total >= Σ(breaks[low + 1])
    over = values - (breaks[low] + breaks[low + 1]) / 2
    full, free = over >= caps, (over > 0) & (over < caps)
    theta = breaks[low] if not bool(free.any()) else (values[free].sum() + caps[full].sum() - total) / free.sum()
    return (values - theta).clamp(min=0.0).minimum(caps)


def minimise(
    evaluate: Callable[[float], float], loss: float, slope: float, most: float, *, eager: bool = False
) -> float:
    """A γ in (0, most] that lowers φ enough, where φ(0) = loss and φ'(0) = slope < 0; 0 where none tried does. First
    `most`, then the minimiser of the parabola through what is known: of a quadratic two evaluations are exact. `eager`:
    `most` will do if it lowers φ enough."""
    gamma, kept, at_kept = most, 0.0, loss
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


class Point(NamedTuple):
    """Weights with what is known of them."""

    weights: Tensor
    loss: float
    slopes: Tensor


class Task(NamedTuple):
    """What is minimised, over what, and how."""

    problem: Problem
    caps: Tensor
    plan: Plan

    def feasible(self, weights: Tensor) -> Tensor:
        """Exactly 0 where a vertex has left, and within the hull where rounding, or another ρ or cap than before, left
        it."""
        weights, rho = weights.clamp(min=0.0).minimum(self.caps), self.plan.rho
        weights = torch.where((weights <= GONE * rho).all(1, keepdim=True), 0.0, weights)
        for column in (weights.sum(0) > rho * (1 + 1e-12)).nonzero().flatten().tolist():
            weights[:, column] = project(weights[:, column], rho, self.caps[:, column])
        return weights

    def loss(self, weights: Tensor) -> float:
        return self.problem.loss(self.feasible(weights))

    def at(self, weights: Tensor, of: Tensor | None = None) -> Point:
        point = Point(weights := self.feasible(weights), *self.problem.gradient(weights, of))
        if not (math.isfinite(point.loss) and bool(point.slopes.isfinite().all())):
            raise Misconfigured(
                f"the objective: its loss ({point.loss}) and every slope have to be finite; look at its rows and its dtype"
            )
        return point

    def gap(self, point: Point, allowed: Tensor) -> float:
        return gap(point.weights, point.slopes, self.plan.rho, allowed, self.caps)

    def oracle(self, point: Point, allowed: Tensor) -> Tensor:
        return oracle(point.slopes, self.plan.rho, allowed, self.caps)


class Door:
    """Who may have weight in one step: `allowed` are those with weight and those admitted, `unbarred` all but the
    refused."""

    def __init__(self, task: Task, weights: Tensor, admit: Admit) -> None:
        self._weights, self._admit, self._most = weights, admit, task.plan.most
        self._ordinary = task.caps.isinf().all(1)
        self.allowed = (weights > 0).any(1)
        self.unbarred = torch.ones_like(self.allowed)
        self._count()

    def ask(self, vertex: int) -> bool:
        """May it have weight? Nobody is asked twice."""
        if self.unbarred[vertex] and not self.allowed[vertex]:
            admitted = self._admit(vertex, self._weights.clone())
            (self.allowed if admitted else self.unbarred)[vertex] = admitted
            self._count()
        return bool(self.allowed[vertex])

    def _count(self) -> None:
        if int((self.allowed & self._ordinary).sum()) >= self._most:
            self.unbarred &= self.allowed | ~self._ordinary


def solve(
    problem: Problem, start: Tensor, caps: Tensor, plan: Plan, admit: Admit = always, told: Told = ignore
) -> Solved:
    """Steps from `start` until the gap is within the tolerance, none lowers the loss, or their limit; `told` of each.

    A vertex without weight is asked about when a step would give it some, the most negative slope first, and only while
    the gap over all not refused is above the tolerance; a refusal holds for that step. Every gap is over those not
    refused. A step depends on the weights alone (decay: and on its number). A point within a step may be asked for some
    slopes, and then for all. Raises Misconfigured where the objective gives no finite number."""
    assert (start.shape, start.dtype, caps.dtype) == (caps.shape, torch.float64, torch.float64), (start, caps)
    if plan.step in ("pairwise", "soft") and start.shape[1] > 1:
        raise Misconfigured(
            f'step = "{plan.step}": takes one coefficient a model, not {start.shape[1]}; with more name hard or corrective'
        )
    task = Task(problem, caps, plan)
    point = task.at(start)
    first = point.loss
    steps: list[Taken] = []
    for number in range(plan.steps + 1):
        door = Door(task, point.weights, admit)
        before = door.allowed.clone()
        bound = _choose(task, point, door)
        if number == plan.steps or (bound <= plan.tolerance and torch.equal(before, door.allowed)):
            break
        after, gamma = _step(task, point, door, number)
        if after.loss >= point.loss and plan.search == "line":
            break
        now = (after.weights > 0).any(1)
        steps.append(Taken(plan.step, number, after.loss, bound, gamma, _which(now & ~before), _which(before & ~now)))
        point = (
            after if plan.step in ("hard", "pairwise") else task.at(after.weights)
        )  # inner steps look at the allowed alone
        told(steps[-1])
    return Solved(point.weights, point.loss, first, bound, steps)


def _choose(task: Task, point: Point, door: Door) -> float:
    """Asks whom the oracle picks until all it picks are allowed, or the gap is small enough; the gap then."""
    order = point.slopes.clamp(max=0.0).sum(1)
    while True:
        bound = task.gap(point, door.unbarred)
        new = (task.oracle(point, door.unbarred) > 0).any(1) & ~door.allowed
        if bound <= task.plan.tolerance or not bool(new.any()):
            return bound
        door.ask(int(torch.where(new, order, math.inf).argmin()))


def _step(task: Task, point: Point, door: Door, number: int) -> tuple[Point, float]:
    """Where one step leads, and its γ; `point` itself where none lowers the loss."""
    if task.plan.step == "pairwise":
        return _pairwise(task, point, door)
    if task.plan.step == "soft":
        return _soft(task, point, door)
    if task.plan.step == "corrective":
        rows = door.allowed
        space = Space(torch.eye(len(rows), dtype=torch.float64)[:, rows], task.caps[rows], task.plan.rho)
        return _descend(task, point, rows, space, point.weights[rows])[:2]
    way = task.oracle(point, door.allowed) - point.weights  # hard: τ ← τ + γ(ρτ_j − τ), one j a column
    if task.plan.search == "decay":
        return task.at(point.weights + 2 / (number + 2) * way), 2 / (number + 2)
    return _along(task, point, way, 1.0)


def _along(
    task: Task, point: Point, way: Tensor, most: float, eager: bool = False, of: Tensor | None = None
) -> tuple[Point, float]:
    """weights + γ·way with a γ up to `most` that lowers the loss; slopes `of` some vertices."""
    slope = float((point.slopes * way).sum())
    gamma = (
        minimise(lambda gamma: task.loss(point.weights + gamma * way), point.loss, slope, most, eager=eager)
        if slope < 0
        else 0.0
    )
    return (task.at(point.weights + gamma * way, of), gamma) if gamma else (point, 0.0)


def _pairwise(task: Task, point: Point, door: Door) -> tuple[Point, float]:
    """Weight from the worst vertex that has some to the best that can take some; the last of m + 1 is the zero vertex,
    with what is left of ρ."""
    rho, weights = task.plan.rho, point.weights[:, 0]
    has = torch.cat([weights, rho - weights.sum(0, keepdim=True)])
    takes = torch.cat([torch.where(door.allowed, task.caps[:, 0] - weights, 0.0), has.new_full((1,), math.inf)])
    slopes = torch.cat([point.slopes[:, 0], has.new_zeros(1)])
    worst = int(torch.where(has > GONE * rho, slopes, -math.inf).argmax())
    best = int(torch.where(takes > GONE * rho, slopes, math.inf).argmin())
    every = torch.eye(len(has), dtype=torch.float64)
    return _along(task, point, (every[best] - every[worst])[:-1, None], float(has[worst].minimum(takes[best])))


def _soft(task: Task, point: Point, door: Door) -> tuple[Point, float]:
    """τ ← τ + Σ_j u_j (a_j − τ) with u on the simplex: a_j is ρτ_j, or τ_j at its cap, of the k best; where caps make
    the oracle's point none of these, it as well."""
    slopes, most = point.slopes[:, 0], task.caps[:, 0].clamp(max=task.plan.rho)
    chosen: list[int] = []
    for vertex in slopes.argsort(stable=True).tolist():
        if len(chosen) < task.plan.best and slopes[vertex] < 0 < most[vertex] and door.ask(vertex):
            chosen.append(vertex)
    atoms, target = torch.diag(most)[:, chosen], task.oracle(point, door.allowed)  # m × k, m × 1
    if not bool((atoms == target).all(0).any()):
        atoms = torch.cat([atoms, target], dim=1)
    none = atoms.new_zeros(atoms.shape[1], 1)
    after, _, u = _descend(task, point, door.allowed, Space(atoms - point.weights, none + math.inf, 1.0), none)
    return after, float(u.sum())


class Space(NamedTuple):
    """Variables x (p × L), of which ways·x (m × L) is added to the weights: 0 <= x <= caps, and each column of x sums
    to at most `total`."""

    ways: Tensor
    caps: Tensor
    total: float


def _descend(task: Task, point: Point, allowed: Tensor, space: Space, x: Tensor) -> tuple[Point, float, Tensor]:
    """Spectral projected gradient (Birgin, Martínez and Raydan, 2000, SPG2), but monotone: the point, the last γ and x.
    The first length, for which nothing is known, gets a line search; those after are Barzilai and Borwein's, and go the
    whole way if that lowers the loss enough."""
    length, gamma, slopes = 0.0, 0.0, space.ways.T @ point.slopes
    for number in range(task.plan.inner):
        scale = float(slopes.abs().max()) / space.total
        if scale == 0 or (number and task.gap(point, allowed) <= task.plan.tolerance):
            break
        length = min(max(length, 1e-4 / scale), 1e4 / scale) if length else 1 / scale
        columns = zip((x - length * slopes).T, space.caps.T, strict=True)
        way = torch.stack([project(values, space.total, caps) for values, caps in columns], dim=1) - x
        after, tried = _along(task, point, space.ways @ way, 1.0, eager=number > 0, of=allowed)
        if after is point:
            break
        point, gamma, x, old, slopes = after, tried, x + tried * way, slopes, space.ways.T @ after.slopes
        bend = gamma * float((way * (slopes - old)).sum())
        length = gamma**2 * float((way * way).sum()) / bend if bend > 0 else 0.0
    return point, gamma, x


def _which(vertices: Tensor) -> tuple[int, ...]:
    return tuple(vertices.nonzero().flatten().tolist())
